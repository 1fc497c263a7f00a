//! Where things lie in the log's file, and what is fixed for the life of a store.

use std::io::IoSlice;

use twox_hash::XxHash3_64;

use crate::{
    BLOCK_BYTES, Backing, SECTOR_BYTES,
    codec::{Fields, Put},
    record::{self, MAX_BLOCKS},
};

const MAGIC: u64 = u64::from_le_bytes(*b"kagelog1");
const SUPERBLOCK_BYTES: usize = 4096;
/// Blocks of the largest disk: its log's positions and its blocks' numbers have 32 bits to spare.
const MAX_DISK_BLOCKS: u64 = 1 << 31;

/// Shape of a store, fixed when it is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks of 4 KiB that the disk has.
    pub blocks: u64,
    /// Bytes of a segment, a power of two.
    pub segment_bytes: u32,
    /// Segments the log may ever have.
    pub segments: u32,
}

/// A shape that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// More blocks than positions can tell apart, or none.
    #[error("a disk of {blocks} blocks; 1 to {MAX_DISK_BLOCKS} are possible")]
    Blocks {
        /// Blocks asked for.
        blocks: u64,
    },
    /// Segments of a length that cannot work.
    #[error("segments of {bytes} bytes; 32 KiB to 64 MiB in powers of two are possible")]
    SegmentBytes {
        /// Bytes asked for.
        bytes: u32,
    },
    /// A log that leaves the cleaner no room.
    #[error("a log of {segments} segments; at least {} are needed", Geometry::MIN_SEGMENTS)]
    Segments {
        /// Segments asked for.
        segments: u32,
    },
}

impl Geometry {
    /// Bytes of a segment unless said otherwise: room for a record of a mebibyte, and few enough to copy
    /// that a write which cleans three of them waits some milliseconds.
    pub const SEGMENT_BYTES: u32 = 2 << 20;
    /// Fewer segments leave no room to clean in.
    pub const MIN_SEGMENTS: u32 = 8;

    /// A disk of `blocks` blocks whose log never takes more than about `log_bytes`.
    ///
    /// The log keeps a reserve for its cleaner; a disk that is to be filled whole needs about a quarter
    /// more log than disk, and 16 MiB: see [`Geometry::log_bytes_for`].
    ///
    /// # Errors
    /// The shape is impossible.
    pub fn new(blocks: u64, log_bytes: u64) -> Result<Self, GeometryError> {
        let segments = u32::try_from(log_bytes / u64::from(Self::SEGMENT_BYTES)).unwrap_or(u32::MAX);
        Self { blocks, segment_bytes: Self::SEGMENT_BYTES, segments }.validated()
    }

    /// Log bytes with which every block of a disk of `blocks` can be written.
    #[must_use]
    pub fn log_bytes_for(blocks: u64) -> u64 {
        let disk = blocks.saturating_mul(BLOCK_BYTES as u64);
        disk.saturating_add(disk / 4).saturating_add(16 << 20)
    }

    /// The same shape, if it can be.
    ///
    /// # Errors
    /// The shape is impossible.
    pub fn validated(self) -> Result<Self, GeometryError> {
        let Self { blocks, segment_bytes: bytes, segments } = self;
        if blocks == 0 || blocks > MAX_DISK_BLOCKS {
            return Err(GeometryError::Blocks { blocks });
        }
        if !(32 << 10..=64 << 20).contains(&bytes) || !bytes.is_power_of_two() {
            return Err(GeometryError::SegmentBytes { bytes });
        }
        // Positions have 40 bits of sectors.
        let end = u64::from(segments) * u64::from(bytes);
        if segments < Self::MIN_SEGMENTS || end > 1 << 48 {
            return Err(GeometryError::Segments { segments });
        }
        Ok(self)
    }

    /// Segments that user writes leave to the cleaner.
    pub(crate) fn reserve(&self) -> u32 {
        (self.segments / 64).clamp(3, 16)
    }

    /// Blocks that a full segment holds.
    pub(crate) fn segment_blocks(&self) -> u32 {
        let bytes = self.segment_bytes as usize;
        let record = MAX_BLOCKS * BLOCK_BYTES + record::MAX_HEADER_BYTES;
        let whole = bytes / record * MAX_BLOCKS;
        let blocks = whole + record::blocks_that_fit(bytes % record, true);
        u32::try_from(blocks).unwrap_or(u32::MAX)
    }

    /// Blocks the log may hold at once, those of the last commit included: with a sixteenth of what the
    /// reserve leaves dead, cleaning always gains.
    #[must_use]
    pub fn max_held_blocks(&self) -> u64 {
        let segments = u64::from(self.segments.saturating_sub(self.reserve() + 2));
        segments * u64::from(self.segment_blocks()) / 16 * 15
    }

    /// Bytes of each of the two checkpoint slots: room for a whole index and as many uncommitted blocks,
    /// and again for what is appended to it.
    pub(crate) fn slot_bytes(&self) -> u64 {
        (self.blocks * 96 + (64 << 10)).next_multiple_of(BLOCK_BYTES as u64)
    }

    pub(crate) fn slot_at(&self, slot: usize) -> u64 {
        2 * SUPERBLOCK_BYTES as u64 + if slot == 0 { 0 } else { self.slot_bytes() }
    }

    fn log_at(&self) -> u64 {
        (self.slot_at(1) + self.slot_bytes()).next_multiple_of(1 << 20)
    }

    /// First byte of a segment.
    pub(crate) fn segment_at(&self, segment: u32) -> u64 {
        self.log_at() + u64::from(segment) * u64::from(self.segment_bytes)
    }

    /// Which segment byte `at` lies in, if any.
    pub(crate) fn segment_of(&self, at: u64) -> Option<u32> {
        let segment = at.checked_sub(self.log_at())? >> self.segment_bytes.trailing_zeros();
        u32::try_from(segment).ok().filter(|segment| *segment < self.segments)
    }

    /// Whether a block's bytes may lie at `at`.
    pub(crate) fn holds_block(&self, at: u64) -> bool {
        let segment = self.segment_of(at);
        segment.is_some() && segment == self.segment_of(at.saturating_add(BLOCK_BYTES as u64 - 1))
    }
}

/// What identifies a store and its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) geometry: Geometry,
    pub(crate) identity: [u8; 16],
    /// Drawn when the store was created; in every record and piece.
    pub(crate) life: u64,
}

impl Superblock {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SUPERBLOCK_BYTES);
        bytes.put_u64(MAGIC);
        bytes.put_u64(self.geometry.blocks);
        bytes.put_u32(self.geometry.segment_bytes);
        bytes.put_u32(self.geometry.segments);
        bytes.extend_from_slice(&self.identity);
        bytes.put_u64(self.life);
        bytes.put_u64(XxHash3_64::oneshot(&bytes));
        bytes.resize(SUPERBLOCK_BYTES, 0);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields::new(bytes);
        let magic = fields.u64()?;
        let geometry =
            Geometry { blocks: fields.u64()?, segment_bytes: fields.u32()?, segments: fields.u32()? };
        let (identity, life) = (fields.bytes16()?, fields.u64()?);
        let whole = magic == MAGIC && fields.u64()? == XxHash3_64::oneshot(bytes.get(..48)?);
        let geometry = geometry.validated().ok()?;
        whole.then_some(Self { geometry, identity, life })
    }

    /// Writes both copies.
    pub(crate) fn write(&self, backing: &impl Backing) -> std::io::Result<()> {
        let bytes = self.encode();
        backing.write_at(0, &[IoSlice::new(&bytes), IoSlice::new(&bytes)])
    }

    /// Whether neither copy was ever written.
    pub(crate) fn is_blank(backing: &impl Backing) -> std::io::Result<bool> {
        let mut bytes = [0; 2 * SUPERBLOCK_BYTES];
        backing.read_at(0, &mut bytes)?;
        Ok(bytes.iter().all(|byte| *byte == 0))
    }

    /// Reads the first copy that is whole.
    pub(crate) fn read(backing: &impl Backing) -> std::io::Result<Option<Self>> {
        for copy in 0..2 {
            let mut bytes = [0; SECTOR_BYTES];
            backing.read_at(copy * SUPERBLOCK_BYTES as u64, &mut bytes)?;
            if let Some(found) = Self::decode(&bytes) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SimulatedDisk;

    #[test]
    fn either_copy_of_the_superblock_is_enough() {
        let geometry = Geometry::new(1000, 64 << 20).unwrap();
        let disk = SimulatedDisk::new();
        assert_eq!(Superblock::read(&disk).unwrap(), None);
        let superblock = Superblock { geometry, identity: [7; 16], life: 9 };
        superblock.write(&disk).unwrap();
        disk.corrupt(20, 1);
        assert_eq!(Superblock::read(&disk).unwrap(), Some(superblock));
        disk.corrupt(4096 + 20, 1);
        assert_eq!(Superblock::read(&disk).unwrap(), None);
    }

    #[test]
    fn impossible_shapes_are_refused_and_blocks_stay_in_one_segment() {
        assert!(Geometry::new(0, 1 << 30).is_err());
        assert!(Geometry::new(1 << 40, 1 << 30).is_err());
        assert!(Geometry::new(10, 1 << 20).is_err());
        let geometry = Geometry { blocks: 10, segment_bytes: 64 << 10, segments: 8 }.validated().unwrap();
        let at = geometry.segment_at(3);
        assert_eq!((geometry.segment_of(at - 1), geometry.segment_of(at)), (Some(2), Some(3)));
        assert!(geometry.holds_block(at) && !geometry.holds_block(at - 512));
        assert_eq!(geometry.segment_of(geometry.segment_at(8)), None);
        assert!(!geometry.holds_block(0) && !geometry.holds_block(u64::MAX - 5000));
        for blocks in [1024, 262_144, 16 << 20] {
            let geometry = Geometry::new(blocks, Geometry::log_bytes_for(blocks)).unwrap();
            assert!(
                geometry.max_held_blocks() >= blocks,
                "{geometry:?} holds {}",
                geometry.max_held_blocks()
            );
        }
    }
}

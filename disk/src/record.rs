//! Records of the log.
//!
//! ```text
//!  0 magic u32 · kind u8 · flags u8 · entries u16 · sectors u32 · next segment u32
//! 16 sequence u64 · 24 life u64 · 32 session u64 · 40 chain u64
//! 48 durable u64 · 56 settled u64 · 64 piece u64 · 72 commit u64
//! 80 checksum u64 of all of the header but itself
//! 88 entries, zeros up to the sector · payload: the entries' blocks, 4 KiB each
//! ```
//!
//! Entries: written `digest u64 · block u32 · 0 u32`; moved the same `· from u64`; range
//! `first u32 · count u32 · word u32 · 0 u32`. A record is a whole number of sectors, so that no two
//! share one, and lies in one segment.

use twox_hash::XxHash3_64;

use crate::{
    BLOCK_BYTES, SECTOR_BYTES,
    codec::{Fields, Put},
    index::Word,
};

const MAGIC: u32 = u32::from_le_bytes(*b"KLR1");
const HEAD_BYTES: usize = 88;
const CHECKSUM: std::ops::Range<usize> = 80..88;
const FLAG_LAST: u8 = 1;
const FLAG_DAMAGED: u8 = 2;
/// Blocks of one record: a mebibyte.
pub(crate) const MAX_BLOCKS: usize = 256;
/// Ranges of one record: as many as fit its one sector.
pub(crate) const MAX_RANGES: usize = (SECTOR_BYTES - HEAD_BYTES) / RANGE_BYTES;
const WRITTEN_BYTES: usize = 16;
const MOVED_BYTES: usize = 24;
const RANGE_BYTES: usize = 16;
/// No record's header is longer.
pub(crate) const MAX_HEADER_BYTES: usize =
    (HEAD_BYTES + MAX_BLOCKS * MOVED_BYTES).next_multiple_of(SECTOR_BYTES);

/// A block that a record carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) block: u32,
    pub(crate) digest: u64,
}

/// A block whose bytes the cleaner wrote anew; holds wherever the state before says `from`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moved {
    pub(crate) block: u32,
    pub(crate) digest: u64,
    pub(crate) from: Word,
}

/// Blocks that became zeros or missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockRange {
    pub(crate) first: u32,
    pub(crate) count: u32,
    pub(crate) word: Word,
}

/// What a record does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    /// Writes blocks, from the next commit on.
    Written(Vec<Written>),
    /// Moves blocks; changes no block's bytes, so it holds without a commit. `damaged`: the bytes do not
    /// have their digest, and did not before.
    Moved { entries: Vec<Moved>, damaged: bool },
    /// Makes blocks zeros or missing, from the next commit on.
    Ranges(Vec<BlockRange>),
    /// Everything since the last commit holds.
    Commit,
    /// Nothing written since the last commit ever holds.
    Rollback,
    /// Only says where the log goes on.
    Jump,
}

impl Body {
    fn kind(&self) -> u8 {
        match self {
            Self::Written(_) => 1,
            Self::Moved { .. } => 2,
            Self::Ranges(_) => 3,
            Self::Commit => 4,
            Self::Rollback => 5,
            Self::Jump => 6,
        }
    }

    fn entries(&self) -> usize {
        match self {
            Self::Written(entries) => entries.len(),
            Self::Moved { entries, .. } => entries.len(),
            Self::Ranges(ranges) => ranges.len(),
            Self::Commit | Self::Rollback | Self::Jump => 0,
        }
    }

    fn entry_bytes(&self) -> usize {
        match self {
            Self::Written(_) => WRITTEN_BYTES,
            Self::Moved { .. } => MOVED_BYTES,
            Self::Ranges(_) => RANGE_BYTES,
            Self::Commit | Self::Rollback | Self::Jump => 0,
        }
    }

    /// Blocks of payload.
    pub(crate) fn payload_blocks(&self) -> usize {
        match self {
            Self::Written(_) | Self::Moved { .. } => self.entries(),
            Self::Ranges(_) | Self::Commit | Self::Rollback | Self::Jump => 0,
        }
    }

    /// Whether a crash may not lose this once it is synced.
    pub(crate) fn settles(&self) -> bool {
        matches!(self, Self::Commit | Self::Moved { .. })
    }

    pub(crate) fn header_bytes(&self) -> usize {
        (HEAD_BYTES + self.entries() * self.entry_bytes()).next_multiple_of(SECTOR_BYTES)
    }

    pub(crate) fn record_bytes(&self) -> usize {
        self.header_bytes() + self.payload_blocks() * BLOCK_BYTES
    }

    /// Digests that the payload must have, block by block; empty where none are promised.
    pub(crate) fn payload_digests(&self) -> Vec<u64> {
        match self {
            Self::Written(entries) => entries.iter().map(|entry| entry.digest).collect(),
            Self::Moved { entries, damaged: false } => entries.iter().map(|entry| entry.digest).collect(),
            Self::Moved { damaged: true, .. }
            | Self::Ranges(_)
            | Self::Commit
            | Self::Rollback
            | Self::Jump => Vec::new(),
        }
    }
}

/// Most blocks whose record fits `room` bytes; moved ones need more header.
pub(crate) fn blocks_that_fit(room: usize, moved: bool) -> usize {
    let entry = if moved { MOVED_BYTES } else { WRITTEN_BYTES };
    let mut count = (room.saturating_sub(HEAD_BYTES) / (BLOCK_BYTES + entry)).min(MAX_BLOCKS);
    while count > 0
        && (HEAD_BYTES + count * entry).next_multiple_of(SECTOR_BYTES) + count * BLOCK_BYTES > room
    {
        count -= 1;
    }
    count
}

/// Everything of a record's header but its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    /// Place in the one order of all records; consecutive.
    pub(crate) sequence: u64,
    /// Which store.
    pub(crate) life: u64,
    /// Drawn by each writer, so that two of them never append the same record in the same place.
    pub(crate) session: u64,
    /// Checksum of the record before.
    pub(crate) chain: u64,
    /// Everything up to this sequence was synced when this was appended.
    pub(crate) durable: u64,
    /// Last commit or move that was synced when this was appended: no crash may lose it.
    pub(crate) settled: u64,
    /// The checkpoint piece that was synced when this was appended.
    pub(crate) piece: u64,
    /// Of a commit its number, of others that of the last one.
    pub(crate) commit: u64,
    /// The segment where the log goes on, where this is the last record of its own.
    pub(crate) next: Option<u32>,
}

/// A record as read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) head: Head,
    pub(crate) body: Body,
    pub(crate) checksum: u64,
}

fn checksum(header: &[u8]) -> u64 {
    let (before, rest) = header.split_at(CHECKSUM.start.min(header.len()));
    let behind = rest.get(CHECKSUM.len()..).unwrap_or_default();
    XxHash3_64::oneshot_with_seed(XxHash3_64::oneshot(before), behind)
}

/// Writes the header of a record into `into` and returns its checksum.
pub(crate) fn encode(head: &Head, body: &Body, into: &mut Vec<u8>) -> u64 {
    into.clear();
    let flags = if head.next.is_some() { FLAG_LAST } else { 0 }
        | if matches!(body, Body::Moved { damaged: true, .. }) { FLAG_DAMAGED } else { 0 };
    into.put_u32(MAGIC);
    into.extend_from_slice(&[body.kind(), flags]);
    into.extend_from_slice(&u16::try_from(body.entries()).unwrap_or(u16::MAX).to_le_bytes());
    into.put_u32(u32::try_from(body.record_bytes() / SECTOR_BYTES).unwrap_or(u32::MAX));
    into.put_u32(head.next.unwrap_or(0));
    for field in [head.sequence, head.life, head.session, head.chain, head.durable] {
        into.put_u64(field);
    }
    for field in [head.settled, head.piece, head.commit, 0] {
        into.put_u64(field);
    }
    let entry = |into: &mut Vec<u8>, block: u32, digest: u64| {
        into.put_u64(digest);
        into.put_u32(block);
        into.put_u32(0);
    };
    match body {
        Body::Written(entries) => {
            entries.iter().for_each(|written| entry(into, written.block, written.digest));
        }
        Body::Moved { entries, .. } => {
            for moved in entries {
                entry(into, moved.block, moved.digest);
                into.put_u64(moved.from.0);
            }
        }
        Body::Ranges(ranges) => {
            for range in ranges {
                into.put_u32(range.first);
                into.put_u32(range.count);
                into.put_u32(u32::try_from(range.word.0).unwrap_or(0));
                into.put_u32(0);
            }
        }
        Body::Commit | Body::Rollback | Body::Jump => {}
    }
    into.resize(body.header_bytes(), 0);
    let sum = checksum(into);
    if let Some(field) = into.get_mut(CHECKSUM) {
        field.copy_from_slice(&sum.to_le_bytes());
    }
    sum
}

/// Whether a record may begin here.
pub(crate) fn has_magic(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC.to_le_bytes())
}

/// Reads a header from the front of `bytes`; none where they are no whole, unharmed header.
pub(crate) fn decode(bytes: &[u8]) -> Option<Record> {
    let mut fields = Fields::new(bytes);
    if fields.u32()? != MAGIC {
        return None;
    }
    let (kind, flags, count, sectors) = (fields.u8()?, fields.u8()?, fields.u16()?, fields.u32()?);
    let next = fields.u32()?;
    let head = Head {
        sequence: fields.u64()?,
        life: fields.u64()?,
        session: fields.u64()?,
        chain: fields.u64()?,
        durable: fields.u64()?,
        settled: fields.u64()?,
        piece: fields.u64()?,
        commit: fields.u64()?,
        next: (flags & FLAG_LAST != 0).then_some(next),
    };
    let stored = fields.u64()?;
    let count = usize::from(count);
    let body = match kind {
        1 if count <= MAX_BLOCKS => Body::Written(fields.list(count, WRITTEN_BYTES, |fields| {
            let (digest, block, _) = (fields.u64()?, fields.u32()?, fields.u32()?);
            Some(Written { block, digest })
        })?),
        2 if count <= MAX_BLOCKS => Body::Moved {
            entries: fields.list(count, MOVED_BYTES, |fields| {
                let (digest, block, _) = (fields.u64()?, fields.u32()?, fields.u32()?);
                Some(Moved { block, digest, from: Word(fields.u64()?) })
            })?,
            damaged: flags & FLAG_DAMAGED != 0,
        },
        3 if count <= MAX_RANGES => Body::Ranges(fields.list(count, RANGE_BYTES, |fields| {
            let (first, count, word, _) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
            Some(BlockRange { first, count, word: Word(u64::from(word)) })
        })?),
        4 => Body::Commit,
        5 => Body::Rollback,
        6 => Body::Jump,
        _ => return None,
    };
    let whole = body.record_bytes() / SECTOR_BYTES == usize::try_from(sectors).ok()?
        && checksum(bytes.get(..body.header_bytes())?) == stored;
    whole.then_some(Record { head, body, checksum: stored })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: Head = Head {
        sequence: 3,
        life: 4,
        session: 5,
        chain: 6,
        durable: 2,
        settled: 2,
        piece: 1,
        commit: 9,
        next: Some(8),
    };

    fn bodies() -> Vec<Body> {
        let written = (0..30).map(|block| Written { block, digest: u64::from(block) << 40 }).collect();
        let moved = Moved { block: 7, digest: 8, from: Word(9) };
        vec![
            Body::Written(written),
            Body::Moved { entries: vec![moved; MAX_BLOCKS], damaged: true },
            Body::Ranges(vec![BlockRange { first: 1, count: 2, word: Word::MISSING }; MAX_RANGES]),
            Body::Commit,
            Body::Rollback,
            Body::Jump,
        ]
    }

    #[test]
    fn every_record_reads_back_and_none_cut_short_or_with_a_flipped_byte() {
        for body in bodies() {
            let mut bytes = Vec::new();
            let sum = encode(&HEAD, &body, &mut bytes);
            assert_eq!(bytes.len() % SECTOR_BYTES, 0);
            assert!(bytes.len() <= MAX_HEADER_BYTES);
            assert_eq!(decode(&bytes), Some(Record { head: HEAD, body: body.clone(), checksum: sum }));
            for at in 0..bytes.len() {
                assert_eq!(decode(&bytes[..at]), None, "cut at {at}");
                let mut flipped = bytes.clone();
                flipped[at] ^= 0x10;
                assert_eq!(decode(&flipped), None, "flipped at {at}");
            }
        }
    }

    #[test]
    fn a_header_has_these_bytes() {
        let mut bytes = Vec::new();
        encode(&HEAD, &Body::Written(vec![Written { block: 0x0102, digest: 0xaabb }]), &mut bytes);
        assert_eq!(bytes[..16], *b"KLR1\x01\x01\x01\x00\x09\x00\x00\x00\x08\x00\x00\x00");
        assert_eq!(bytes[16..24], 3u64.to_le_bytes());
        assert_eq!(bytes[88..104], *b"\xbb\xaa\0\0\0\0\0\0\x02\x01\0\0\0\0\0\0");
        assert_eq!(bytes[80..88], 0x0e35_1e73_8214_51edu64.to_le_bytes());
    }

    #[test]
    fn as_many_blocks_fit_as_can() {
        for room in (0..2 << 20).step_by(509) {
            for moved in [false, true] {
                let count = blocks_that_fit(room, moved);
                let bytes = |count: usize| {
                    let body = if moved {
                        let entry = Moved { block: 0, digest: 0, from: Word(0) };
                        Body::Moved { entries: vec![entry; count], damaged: false }
                    } else {
                        Body::Written(vec![Written { block: 0, digest: 0 }; count])
                    };
                    body.record_bytes()
                };
                assert!(count == 0 || bytes(count) <= room);
                assert!(count == MAX_BLOCKS || bytes(count + 1) > room);
            }
        }
    }
}

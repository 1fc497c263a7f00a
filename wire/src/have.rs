//! Which blocks of a disk a host holds, each by its digest: what need not be sent to it.
//!
//! ```text
//! run    varint skip     blocks since the last run's end that are not held; 0 only in the first run
//!        varint count    blocks held one after another, at least 1
//!        count × u64     their digests, little-endian
//! ```
//! Runs until the bytes end, each integer in as few bytes as it takes (LEB128), so that equal lists have equal
//! bytes. A list is checked once, when it is read; walking it cannot fail.

use kage_machine::{Geometry, PAGE_SIZE};

use crate::bytes::{Cursor, Short};

/// Bytes of a digest.
const DIGEST: usize = 8;

/// Most bytes of a list: the largest disk in one run. Every further run saves the digest of the block before it.
pub const MAX_HAVE: usize = (Geometry::MAX_DISK / PAGE_SIZE as u64) as usize * DIGEST + 8;

/// Most bytes of a [`Held`].
pub const MAX_HELD: usize = 4 + MAX_HAVE + (Geometry::MAX_MEMORY / PAGE_SIZE as u64) as usize * DIGEST + 8;

/// Why bytes are no list of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HaveError {
    /// Ends within a run.
    #[error("the list of held blocks is cut short")]
    Short,
    /// More than the largest disk needs.
    #[error("a list of held blocks of {bytes} bytes is above the limit of {MAX_HAVE}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// A run that no writer makes.
    #[error("the list of held blocks is damaged: {0}")]
    Damaged(&'static str),
    /// A block the disk does not have.
    #[error("the list of held blocks goes to block {end} of a disk of {blocks}")]
    Outside {
        /// Where the run ends.
        end: u64,
        /// Blocks of the disk.
        blocks: u32,
    },
}

impl From<Short> for HaveError {
    fn from(_: Short) -> Self {
        Self::Short
    }
}

/// A list of held blocks.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Have {
    bytes: Vec<u8>,
    blocks: u32,
}

impl std::fmt::Debug for Have {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Have({} blocks)", self.blocks)
    }
}

impl Have {
    /// Of blocks and their digests. One that does not come after the one before it is left out.
    #[must_use]
    pub fn of(held: impl IntoIterator<Item = (u32, u64)>) -> Self {
        let mut writer = Writer::default();
        held.into_iter().for_each(|(block, digest)| writer.push(block, digest));
        writer.finish()
    }

    /// Checks what a peer says it holds of a disk of that many blocks.
    ///
    /// # Errors
    /// [`HaveError`].
    pub fn parse(bytes: &[u8], disk_blocks: u32) -> Result<Self, HaveError> {
        if bytes.len() > MAX_HAVE {
            return Err(HaveError::TooLong { bytes: bytes.len() });
        }
        let (mut cursor, mut end, mut blocks) = (Cursor::new(bytes), 0, 0);
        while !cursor.rest().is_empty() {
            let first = blocks == 0;
            let (skip, count) = (varint(&mut cursor)?, varint(&mut cursor)?);
            if count == 0 {
                return Err(HaveError::Damaged("a run without blocks"));
            }
            if skip == 0 && !first {
                return Err(HaveError::Damaged("two runs where one would do"));
            }
            end += u64::from(skip) + u64::from(count);
            if end > u64::from(disk_blocks) {
                return Err(HaveError::Outside { end, blocks: disk_blocks });
            }
            // Within a disk, so far from overflowing.
            cursor.take(count as usize * DIGEST)?;
            blocks += count;
        }
        Ok(Self { bytes: bytes.to_vec(), blocks })
    }

    /// What [`Self::parse`] takes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many blocks are held.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.blocks
    }

    /// Whether none is.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// The blocks in ascending order, and their digests.
    #[must_use]
    pub const fn iter(&self) -> Iter<'_> {
        Iter { cursor: Cursor::new(self.bytes.as_slice()), next: 0, left: 0 }
    }
}

impl<'a> IntoIterator for &'a Have {
    type Item = (u32, u64);
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

/// What a replica holds: the blocks of its disk, each by the digest of its bytes, and the pages of its memory that are
/// not zeros, each by half the digest it counts with.
///
/// ```text
/// u32     bytes of the list of blocks, little-endian
/// list    of blocks
/// list    of pages
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Of the disk.
    pub disk: Have,
    /// Of the memory.
    pub memory: Have,
}

impl Held {
    /// Checks what a peer says it holds of a machine.
    ///
    /// # Errors
    /// [`HaveError`].
    pub fn parse(bytes: &[u8], geometry: Geometry) -> Result<Self, HaveError> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let mut cursor = Cursor::new(bytes);
        let length = cursor.u32()? as usize;
        let disk = Have::parse(cursor.take(length)?, geometry.disk_pages)?;
        let memory = Have::parse(cursor.rest(), geometry.memory_pages)?;
        Ok(Self { disk, memory })
    }

    /// What [`Self::parse`] takes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let disk = self.disk.as_bytes();
        [&(disk.len() as u32).to_le_bytes(), disk, self.memory.as_bytes()].concat()
    }
}

/// Walks a [`Have`].
#[derive(Debug)]
pub struct Iter<'a> {
    cursor: Cursor<'a>,
    /// The block after the last one given.
    next: u32,
    /// Blocks left of the run.
    left: u32,
}

impl Iterator for Iter<'_> {
    type Item = (u32, u64);

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            self.next += varint(&mut self.cursor).ok()?;
            self.left = varint(&mut self.cursor).ok()?;
        }
        let digest = self.cursor.u64().ok()?;
        let block = self.next;
        (self.next, self.left) = (block + 1, self.left - 1);
        Some((block, digest))
    }
}

/// Collects runs.
#[derive(Default)]
struct Writer {
    have: Have,
    /// Where the runs written end.
    end: u32,
    /// First block of the run being collected.
    first: u32,
    run: Vec<u64>,
}

impl Writer {
    fn push(&mut self, block: u32, digest: u64) {
        let next = u64::from(self.first) + self.run.len() as u64;
        if u64::from(block) < next {
            return;
        }
        if u64::from(block) > next {
            self.end_run();
            self.first = block;
        }
        self.run.push(digest);
    }

    fn end_run(&mut self) {
        let count = self.run.len() as u32;
        if count == 0 {
            return;
        }
        push_varint(&mut self.have.bytes, self.first - self.end);
        push_varint(&mut self.have.bytes, count);
        self.run.drain(..).for_each(|digest| self.have.bytes.extend_from_slice(&digest.to_le_bytes()));
        self.have.blocks += count;
        self.end = self.first + count;
    }

    fn finish(mut self) -> Have {
        self.end_run();
        self.have
    }
}

fn push_varint(bytes: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn varint(cursor: &mut Cursor<'_>) -> Result<u32, HaveError> {
    let mut value = 0;
    for shift in [0, 7, 14, 21, 28] {
        let byte = cursor.u8()?;
        let bits = u32::from(byte & 0x7f);
        if shift == 28 && bits > 0xf {
            return Err(HaveError::Damaged("an integer too large"));
        }
        value |= bits << shift;
        if byte < 0x80 {
            return if byte == 0 && shift > 0 {
                Err(HaveError::Damaged("an integer longer than it need be"))
            } else {
                Ok(value)
            };
        }
    }
    Err(HaveError::Damaged("an integer too large"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const BLOCKS: u32 = 1000;

    #[test]
    fn golden_bytes() {
        let have = Have::of([(3, 0x0102_0304_0506_0708), (4, 1), (305, 2)]);
        let golden = [
            3, 2, 8, 7, 6, 5, 4, 3, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, // two blocks after three
            0xac, 2, 1, 2, 0, 0, 0, 0, 0, 0, 0, // one after 300 more
        ];
        assert_eq!(have.as_bytes(), golden);
        assert_eq!(Have::parse(&golden, 306), Ok(have.clone()));
        assert_eq!(Have::parse(&golden, 305), Err(HaveError::Outside { end: 306, blocks: 305 }));
        assert_eq!((have.len(), have.is_empty()), (3, false));
        assert_eq!(Have::of([]).as_bytes(), [0; 0]);
        assert_eq!(Have::parse(&[], 0), Ok(Have::default()));
    }

    #[test]
    fn what_is_held_of_a_machine_is_two_lists() {
        let held = Held { disk: Have::of([(0, 1)]), memory: Have::of([(2, 3), (3, 4)]) };
        let geometry = Geometry { memory_pages: 4, disk_pages: 1 };
        let bytes = held.to_bytes();
        assert_eq!(bytes[..6], [10, 0, 0, 0, 0, 1]);
        assert_eq!(Held::parse(&bytes, geometry), Ok(held.clone()));
        assert_eq!(Held::parse(&[], geometry), Ok(Held::default()));
        for end in 1..bytes.len() {
            let cut = Held::parse(&bytes[..end], geometry);
            assert!(cut != Ok(held.clone()), "cut at {end}");
        }
        let smaller = Geometry { memory_pages: 3, ..geometry };
        assert_eq!(Held::parse(&bytes, smaller), Err(HaveError::Outside { end: 4, blocks: 3 }));
    }

    #[test]
    fn the_largest_disk_fits_its_limit_however_its_blocks_lie() {
        let blocks = (Geometry::MAX_DISK / PAGE_SIZE as u64) as u32;
        for step in [1, 2, 3, 129] {
            let all =
                Have::of((0..blocks).filter(|block| step == 1 || block % step != 0).map(|block| (block, 9)));
            assert!(all.as_bytes().len() <= MAX_HAVE, "{step}");
            assert_eq!(Have::parse(all.as_bytes(), blocks).unwrap().len(), all.len());
        }
        assert_eq!(
            Have::parse(&vec![0; MAX_HAVE + 1], blocks),
            Err(HaveError::TooLong { bytes: MAX_HAVE + 1 })
        );
    }

    #[test]
    fn truncation_at_every_byte_is_refused_except_between_runs() {
        let have = Have::of([(3, 7), (4, 1), (305, 2)]);
        for end in 0..have.as_bytes().len() {
            let read = Have::parse(&have.as_bytes()[..end], BLOCKS);
            assert_eq!(read.is_ok(), [0, 18].contains(&end), "cut at {end}");
        }
    }

    #[test]
    fn runs_that_no_writer_makes_are_refused() {
        let digest = [1; 8];
        let refused = |head: &[u8]| match Have::parse(&[head, &digest].concat(), BLOCKS) {
            Err(HaveError::Damaged(why)) => why,
            other => panic!("{head:?}: {other:?}"),
        };
        assert_eq!(refused(&[0, 0]), "a run without blocks");
        assert_eq!(refused(&[[0, 1].as_slice(), &digest, &[0, 1]].concat()), "two runs where one would do");
        assert_eq!(refused(&[0x80, 0, 1]), "an integer longer than it need be");
        assert_eq!(refused(&[0x80, 0x80, 0x80, 0x80, 0x10, 1]), "an integer too large");
        assert_eq!(refused(&[0x80, 0x80, 0x80, 0x80, 0x80, 1]), "an integer too large");
        let most = [0xff, 0xff, 0xff, 0xff, 0xf, 0xff, 0xff, 0xff, 0xff, 0xf];
        assert!(matches!(Have::parse(&most, BLOCKS), Err(HaveError::Outside { .. })));
    }

    #[test]
    fn blocks_out_of_order_are_left_out() {
        let have = Have::of([(3, 7), (3, 8), (2, 9), (5, 1), (4, 2)]);
        assert_eq!(have.iter().collect::<Vec<_>>(), [(3, 7), (5, 1)]);
    }

    proptest! {
        #[test]
        fn a_list_comes_back(held in prop::collection::btree_map(0..BLOCKS, any::<u64>(), 0..300)) {
            let have = Have::of(held.clone());
            let read = Have::parse(have.as_bytes(), BLOCKS);
            prop_assert_eq!(&read, &Ok(have.clone()));
            prop_assert_eq!(have.len() as usize, held.len());
            prop_assert_eq!(have.iter().collect::<BTreeMap<_, _>>(), held);
        }

        #[test]
        fn arbitrary_bytes_are_refused_or_what_a_writer_makes(
            bytes in prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..200),
            blocks in 0..BLOCKS,
        ) {
            if let Ok(have) = Have::parse(&bytes, blocks) {
                prop_assert!(have.iter().all(|(block, _)| block < blocks));
                prop_assert_eq!(have.iter().count(), have.len() as usize);
                let again = Have::of(&have);
                prop_assert_eq!(again.as_bytes(), &bytes[..]);
            }
        }
    }
}

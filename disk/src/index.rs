//! Where each block is, in memory that processes share.
//!
//! ```text
//! word 0..512      what the writer tells of itself (IndexHeader)
//! word 512+2b      block b: 0 zeros · 1 missing · position (40 bits of sectors) ∥ tag (24 bits of the digest)
//! word 512+2b+1    digest of its bytes (XXH3-64); of a missing block what is known of it, 0: nothing
//! ```
//!
//! The position word decides; it is stored after the digest and after the bytes it points to are
//! written. A reader that meets a digest which belongs to another word sees it by the tag.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{Ordering, fence},
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use twox_hash::XxHash3_64;

use crate::{SECTOR_BYTES, mapping::Words};

const HEADER_WORDS: usize = 512;
const MAGIC: u64 = u64::from_le_bytes(*b"kageidx1");
const TAG_BITS: u32 = 24;
const TAG_MASK: u64 = (1 << TAG_BITS) - 1;

/// Checksum of a block's bytes; equal on every host.
#[must_use]
pub fn digest_of(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// The word of one block, as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Word(pub(crate) u64);

/// What a [`Word`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nothing was ever written: reads as zeros.
    Zeros,
    /// Another host has it.
    Missing,
    /// In the log, at this byte.
    At(u64),
    /// No word that a store writes.
    Unknown,
}

/// What an index says of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It reads as zeros.
    Zeros,
    /// It is in the log; the digest of its bytes.
    Held(u64),
    /// Another host has it; the digest of its bytes, where somebody has told it.
    Missing(Option<u64>),
}

/// Looks at an entry that changes all the while, before it counts as one that nobody can make out.
const LOOKS: usize = 64;

impl Word {
    pub(crate) const ZEROS: Self = Self(0);
    pub(crate) const MISSING: Self = Self(1);

    /// Word of the bytes at `at`, a multiple of a sector.
    pub(crate) fn at(at: u64, digest: u64) -> Self {
        Self(((at / SECTOR_BYTES as u64) << TAG_BITS) | (digest & TAG_MASK))
    }

    pub(crate) fn place(self) -> Place {
        match self.0 {
            0 => Place::Zeros,
            1 => Place::Missing,
            word if word >> TAG_BITS == 0 => Place::Unknown,
            word => Place::At((word >> TAG_BITS) * SECTOR_BYTES as u64),
        }
    }

    /// Byte of the log, of a block that is there.
    pub(crate) fn position(self) -> Option<u64> {
        match self.place() {
            Place::At(at) => Some(at),
            Place::Zeros | Place::Missing | Place::Unknown => None,
        }
    }

    /// Whether `digest` may belong to this word.
    pub(crate) fn tagged(self, digest: u64) -> bool {
        self.0 & TAG_MASK == digest & TAG_MASK
    }
}

/// A block's word and digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Entry {
    pub(crate) word: Word,
    pub(crate) digest: u64,
}

/// What a writer tells of itself in the index's header, for whoever looks on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IndexHeader {
    /// Which store: drawn when it was created.
    pub life: u64,
    /// Records appended so far.
    pub sequence: u64,
    /// Commits so far.
    pub commit: u64,
    /// Writes behind the last commit, in blocks.
    pub uncommitted: u64,
    /// Blocks of the log that are in use.
    pub held_blocks: u64,
}

/// The index of one disk: a shared mapping.
#[derive(Debug)]
pub struct Index {
    words: Words,
    blocks: u64,
    writable: bool,
}

impl Index {
    /// Bytes that the memory for a disk of `blocks` must have.
    #[must_use]
    pub fn bytes_for(blocks: u64) -> u64 {
        (HEADER_WORDS as u64 + 2 * blocks) * 8
    }

    /// Creates memory for a disk of `blocks`, sealed at its size, for [`Index::map`] here and elsewhere.
    ///
    /// # Errors
    /// Those of `memfd_create(2)` and `ftruncate(2)`.
    pub fn memory(blocks: u64) -> io::Result<OwnedFd> {
        let memory = memfd_create("kage-disk-index", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&memory, Self::bytes_for(blocks))?;
        fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW)?;
        Ok(memory)
    }

    /// Maps the index of a disk of `blocks`.
    ///
    /// # Errors
    /// `InvalidInput` where the memory is too short; those of `mmap(2)`.
    pub fn map(memory: impl AsFd, blocks: u64, writable: bool) -> io::Result<Self> {
        let length = u64::try_from(rustix::fs::fstat(&memory)?.st_size).unwrap_or(0);
        if length < Self::bytes_for(blocks) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("index memory of {length} bytes is too short for {blocks} blocks"),
            ));
        }
        let words = Words::of_file(memory, words_for(blocks)?, writable)?;
        Ok(Self { words, blocks, writable })
    }

    /// An index that only this process has.
    ///
    /// # Errors
    /// Those of `mmap(2)`.
    pub fn private(blocks: u64) -> io::Result<Self> {
        Ok(Self { words: Words::anonymous(words_for(blocks)?)?, blocks, writable: true })
    }

    /// Blocks of the disk.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Where `block` is; one outside the disk is [`Place::Unknown`].
    #[must_use]
    pub fn place(&self, block: u64) -> Place {
        self.word(block).map_or(Place::Unknown, Word::place)
    }

    /// What is known of `block` without reading it. One outside the disk is zeros; one whose entry makes no sense is
    /// missing.
    #[must_use]
    pub fn known(&self, block: u64) -> Known {
        for _ in 0..LOOKS {
            let Some(Entry { word, digest }) = self.entry(block) else { return Known::Zeros };
            match word.place() {
                Place::Zeros => return Known::Zeros,
                Place::Missing if self.word(block) == Some(word) => {
                    return Known::Missing(Some(digest).filter(|digest| *digest != 0));
                }
                Place::At(_) if word.tagged(digest) => return Known::Held(digest),
                Place::At(_) | Place::Missing => {}
                Place::Unknown => break,
            }
        }
        Known::Missing(None)
    }

    /// Loads a word and makes what its writer did before it visible. A plain load and a fence, since a
    /// read-only mapping allows no stronger load.
    fn load(&self, index: usize) -> Option<u64> {
        let word = self.words.get(index)?.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        Some(word)
    }

    fn slot(&self, block: u64) -> Option<usize> {
        let block = if block < self.blocks { usize::try_from(block).ok()? } else { return None };
        Some(HEADER_WORDS + 2 * block)
    }

    pub(crate) fn word(&self, block: u64) -> Option<Word> {
        self.load(self.slot(block)?).map(Word)
    }

    /// Word and digest; the digest may be a newer word's, which [`Word::tagged`] tells.
    pub(crate) fn entry(&self, block: u64) -> Option<Entry> {
        let slot = self.slot(block)?;
        Some(Entry { word: Word(self.load(slot)?), digest: self.load(slot + 1)? })
    }

    /// Stores a block's place. What `entry` points to must be written already.
    pub(crate) fn set(&self, block: u64, entry: Entry) {
        let Some(slot) = self.slot(block).filter(|_| self.writable) else { return };
        let (Some(word), Some(digest)) = (self.words.get(slot), self.words.get(slot + 1)) else { return };
        digest.store(entry.digest, Ordering::Release);
        word.store(entry.word.0, Ordering::Release);
    }

    pub(crate) fn set_header(&self, header: &IndexHeader) {
        if !self.writable {
            return;
        }
        let words =
            [MAGIC, header.life, header.sequence, header.commit, header.uncommitted, header.held_blocks];
        for (index, value) in words.into_iter().enumerate() {
            if let Some(word) = self.words.get(index) {
                word.store(value, Ordering::Relaxed);
            }
        }
    }

    /// What the writer last told; none where no store ever wrote here. Its fields are each right, but not
    /// of one instant.
    #[must_use]
    pub fn header(&self) -> Option<IndexHeader> {
        let word = |index| self.load(index).unwrap_or(0);
        (word(0) == MAGIC).then(|| IndexHeader {
            life: word(1),
            sequence: word(2),
            commit: word(3),
            uncommitted: word(4),
            held_blocks: word(5),
        })
    }
}

fn words_for(blocks: u64) -> io::Result<usize> {
    usize::try_from(Index::bytes_for(blocks) / 8).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_what_was_put_into_them() {
        assert_eq!(Word::ZEROS.place(), Place::Zeros);
        assert_eq!(Word::MISSING.place(), Place::Missing);
        assert_eq!(Word(2).place(), Place::Unknown);
        let word = Word::at(512 * 77, 0x1234_5678_9abc_def0);
        assert_eq!(word.place(), Place::At(512 * 77));
        assert!(word.tagged(0xffff_ffff_ffbc_def0) && !word.tagged(0));
    }

    #[test]
    fn another_mapping_of_the_same_memory_sees_every_store() -> io::Result<()> {
        let memory = Index::memory(8)?;
        let (writer, reader) = (Index::map(&memory, 8, true)?, Index::map(&memory, 8, false)?);
        let entry = Entry { word: Word::at(4096, 7), digest: 7 };
        writer.set(3, entry);
        assert_eq!(reader.entry(3), Some(entry));
        assert_eq!(reader.place(3), Place::At(4096));
        assert_eq!((reader.entry(8), reader.place(8)), (None, Place::Unknown));
        assert_eq!(
            (reader.known(3), reader.known(4), reader.known(8)),
            (Known::Held(7), Known::Zeros, Known::Zeros)
        );
        writer.set(4, Entry { word: Word::MISSING, digest: 0 });
        assert_eq!(reader.known(4), Known::Missing(None));
        writer.set(4, Entry { word: Word::MISSING, digest: 9 });
        assert_eq!(reader.known(4), Known::Missing(Some(9)));
        writer.set(4, Entry { word: Word(2), digest: 9 });
        assert_eq!(reader.known(4), Known::Missing(None), "no word that a store writes");
        assert_eq!(reader.header(), None);
        let header = IndexHeader { life: 9, sequence: 1, commit: 2, uncommitted: 3, held_blocks: 4 };
        writer.set_header(&header);
        assert_eq!(reader.header(), Some(header));
        reader.set(3, Entry::default());
        assert_eq!(reader.entry(3), Some(entry), "a reader's mapping cannot be stored to");
        assert!(Index::map(&memory, 9, false).is_err());
        Ok(())
    }
}

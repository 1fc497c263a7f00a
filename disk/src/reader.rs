//! Reading blocks without a lock, in any process, while the writer writes.
//!
//! A block's word is read, then the bytes it points to. If these have the digest that belongs to the
//! word, they are what the block held when the word was read. If not, the word is read again: a new one
//! means that the writer was faster, the same one that the bytes are corrupt.

use std::io;

use crate::{
    BLOCK_BYTES, Backing, Geometry,
    index::{Entry, Index, Place, digest_of},
};

/// Why blocks could not be read. Names the first such block; those before it were read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The medium failed.
    #[error("reading block {block}: {source}")]
    Io {
        /// Block that was read.
        block: u64,
        /// What the medium said.
        #[source]
        source: io::Error,
    },
    /// Another host has the block.
    #[error("block {block} is on another host")]
    Missing {
        /// Block that is missing.
        block: u64,
    },
    /// The block's bytes are not those that were written.
    #[error("block {block} is corrupt")]
    Corrupt {
        /// Block that is corrupt.
        block: u64,
    },
    /// The disk has no such blocks.
    #[error("blocks from {first} on, {bytes} bytes: not whole blocks of this disk")]
    OutOfRange {
        /// First block asked for.
        first: u64,
        /// Bytes asked for.
        bytes: usize,
    },
}

/// What [`Reader::block`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Never written, or discarded: the bytes are zeros.
    Zeros,
    /// Another host has it; no bytes.
    Missing,
    /// The bytes are what was written.
    Data,
    /// The bytes are not what was written.
    Corrupt,
}

/// Reads a disk of which another process, or the same, is the writer.
#[derive(Debug)]
pub struct Reader<B> {
    backing: B,
    index: Index,
    geometry: Geometry,
}

impl<B: Backing> Reader<B> {
    /// A reader of the log on `backing` by its `index`, of the shape its writer has.
    #[must_use]
    pub fn new(backing: B, index: Index, geometry: Geometry) -> Self {
        Self { backing, index, geometry }
    }

    /// The index read by.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Reads whole blocks from `first` on; zeros where nothing was written.
    ///
    /// # Errors
    /// The first block that is missing, corrupt or cannot be read.
    pub fn read(&self, first: u64, into: &mut [u8]) -> Result<(), ReadError> {
        Blocks { backing: &self.backing, index: &self.index, geometry: &self.geometry }.read(first, into)
    }

    /// Reads one block and says what it is.
    ///
    /// # Errors
    /// The medium failed, or the disk has no such block.
    pub fn block(&self, block: u64, into: &mut [u8; BLOCK_BYTES]) -> Result<Found, ReadError> {
        match self.read(block, into) {
            Ok(()) if self.index.place(block) == Place::Zeros && into.iter().all(|byte| *byte == 0) => {
                Ok(Found::Zeros)
            }
            Ok(()) => Ok(Found::Data),
            Err(ReadError::Missing { .. }) => Ok(Found::Missing),
            Err(ReadError::Corrupt { .. }) => Ok(Found::Corrupt),
            Err(error) => Err(error),
        }
    }
}

/// What reading needs, borrowed.
pub(crate) struct Blocks<'a, B> {
    pub(crate) backing: &'a B,
    pub(crate) index: &'a Index,
    pub(crate) geometry: &'a Geometry,
}

/// Blocks whose bytes lie one behind the other in the log.
struct Run {
    first: u64,
    at: u64,
    entries: Vec<Entry>,
}

impl<B: Backing> Blocks<'_, B> {
    pub(crate) fn read(&self, first: u64, into: &mut [u8]) -> Result<(), ReadError> {
        let count = (into.len() / BLOCK_BYTES) as u64;
        let inside = first.checked_add(count).is_some_and(|end| end <= self.index.blocks());
        if !inside || !into.len().is_multiple_of(BLOCK_BYTES) {
            return Err(ReadError::OutOfRange { first, bytes: into.len() });
        }
        let mut block = first;
        let mut rest = into;
        while !rest.is_empty() {
            let run = self.run(block, rest.len() / BLOCK_BYTES)?;
            let blocks = run.as_ref().map_or(1, |run| run.entries.len());
            let (part, behind) = rest.split_at_mut(blocks * BLOCK_BYTES);
            match run {
                Some(run) => self.read_run(&run, part)?,
                None => part.fill(0),
            }
            block += blocks as u64;
            rest = behind;
        }
        Ok(())
    }

    /// The longest run from `block` on; none for a block of zeros.
    fn run(&self, block: u64, most: usize) -> Result<Option<Run>, ReadError> {
        let entry = self.index.entry(block).ok_or(ReadError::Corrupt { block })?;
        let at = match entry.word.place() {
            Place::Zeros => return Ok(None),
            Place::Missing => return Err(ReadError::Missing { block }),
            Place::Unknown => return Err(ReadError::Corrupt { block }),
            Place::At(at) => at,
        };
        let mut entries = vec![entry];
        let mut next = at + BLOCK_BYTES as u64;
        while entries.len() < most {
            let Some(entry) = self.index.entry(block + entries.len() as u64) else { break };
            if entry.word.position() != Some(next) {
                break;
            }
            entries.push(entry);
            next += BLOCK_BYTES as u64;
        }
        Ok(Some(Run { first: block, at, entries }))
    }

    fn read_run(&self, run: &Run, into: &mut [u8]) -> Result<(), ReadError> {
        let ends = [run.at, run.at + into.len().saturating_sub(BLOCK_BYTES) as u64];
        let readable = ends.into_iter().all(|at| self.geometry.holds_block(at))
            && self.backing.read_at(run.at, into).is_ok();
        for ((block, entry), bytes) in (run.first..).zip(&run.entries).zip(into.chunks_exact_mut(BLOCK_BYTES))
        {
            if !readable || digest_of(bytes) != entry.digest {
                self.read_one(block, bytes)?;
            }
        }
        Ok(())
    }

    /// Reads a block until its word stands still.
    fn read_one(&self, block: u64, into: &mut [u8]) -> Result<(), ReadError> {
        loop {
            let entry = self.index.entry(block).ok_or(ReadError::Corrupt { block })?;
            let at = match entry.word.place() {
                Place::Zeros => {
                    into.fill(0);
                    return Ok(());
                }
                Place::Missing => return Err(ReadError::Missing { block }),
                Place::At(at) if self.geometry.holds_block(at) => at,
                Place::At(_) | Place::Unknown => return Err(ReadError::Corrupt { block }),
            };
            let read = self.backing.read_at(at, into);
            let digest = digest_of(into);
            let right = read.is_ok() && digest == entry.digest;
            if right && entry.word.tagged(digest) {
                return Ok(());
            }
            if self.index.word(block) != Some(entry.word) {
                continue;
            }
            // A digest of another word: the writer stopped between its two stores, so the tag decides.
            if read.is_ok() && !entry.word.tagged(entry.digest) && entry.word.tagged(digest) {
                return Ok(());
            }
            read.map_err(|source| ReadError::Io { block, source })?;
            return Err(ReadError::Corrupt { block });
        }
    }
}

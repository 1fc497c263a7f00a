//! A machine's disk, as its daemon sees it.
//!
//! A block is known by the digest of its bytes wherever it lies. So a host that held the disk before holds every
//! block of it that has not changed since, and a block that is missing here is the same block at whichever host
//! has one of that digest.

use std::time::Duration;

use twox_hash::XxHash3_64;

use crate::{MachineError, PAGE_SIZE, PageBytes};

/// Digest of a block's bytes (XXH3-64): the block store's own, equal on every host.
#[must_use]
pub fn block_digest(bytes: &PageBytes) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// What is known of a block without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Zeros.
    Zeros,
    /// Held here; the digest of its bytes.
    Held(u64),
    /// Not held here, or no longer what it was; its digest, where that is known.
    Missing(Option<u64>),
}

impl Block {
    /// Of bytes that are held.
    #[must_use]
    pub fn of(bytes: &PageBytes) -> Self {
        if *bytes == [0; PAGE_SIZE] { Self::Zeros } else { Self::Held(block_digest(bytes)) }
    }
}

/// What is given for a block that is missing or corrupt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Its bytes.
    Bytes(Box<PageBytes>),
    /// It is zeros.
    Zeros,
    /// Its digest; the bytes come later.
    Expect(u64),
    /// Nobody has it for now: reads of it that wait fail.
    Unavailable,
}

/// What one step of a scrub found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Bytes of the log read.
    pub checked_bytes: u64,
    /// Blocks whose bytes are not what was written, in order.
    pub corrupt: Vec<u32>,
    /// The end was reached; the next call begins anew.
    pub done: bool,
}

/// The disk of one machine. Calls block, and may come from any thread.
pub trait Disk: Send + Sync {
    /// Blocks of 4 KiB.
    fn blocks(&self) -> u32;

    /// What a block is; one outside the disk is zeros.
    fn block(&self, block: u32) -> Block;

    /// Reads a block. The bytes are its own unless it is [`Block::Missing`], also because it is corrupt.
    fn read(&self, block: u32, into: &mut PageBytes) -> Block;

    /// Gives what was missing or corrupt. Blocks that are neither stay as they are, and so does one whose digest is
    /// known and another than that of the bytes given.
    ///
    /// # Errors
    /// As any call to a machine.
    fn fill(&self, blocks: &[(u32, Fill)]) -> Result<(), MachineError>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// As any call to a machine.
    fn flush(&self) -> Result<(), MachineError>;

    /// Reads about so many bytes of the log and says what of them is corrupt.
    ///
    /// # Errors
    /// As any call to a machine.
    fn scrub(&self, budget_bytes: u64) -> Result<Scrubbed, MachineError>;

    /// Has the guest write and flush what it holds; nothing to do where none runs.
    ///
    /// # Errors
    /// Refused when it could not in `patience`, or said why.
    fn sync_guest(&self, patience: Duration) -> Result<(), MachineError>;
}

/// Hears of a disk. Called on a thread of the disk's own, one call at a time.
pub trait DiskEvents: Send + Sync {
    /// Somebody reads these blocks, which are missing or corrupt, and waits for a [`Fill`].
    fn needed(&self, blocks: &[u32]);
    /// A read met a block whose bytes are not what was written.
    fn corrupt(&self, block: u32);
    /// The disk cannot be used any more; every request of the guest fails.
    fn failed(&self, reason: &str);
}

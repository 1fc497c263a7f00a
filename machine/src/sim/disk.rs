//! A simulated disk: blocks by their digests, some of them at another host.

use std::sync::{Arc, Mutex};

use super::lock;
use crate::{
    PAGE_SIZE, PageBytes,
    disk::{Block, block_digest},
};

/// A disk as one host keeps it: it outlives the machines that use it there. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<Vec<Kept>>>);

#[derive(Clone)]
enum Kept {
    Zeros,
    Held(u64, Arc<PageBytes>),
    Missing(Option<u64>),
}

impl Kept {
    fn of(bytes: &PageBytes) -> Self {
        match Block::of(bytes) {
            Block::Held(digest) => Self::Held(digest, Arc::new(*bytes)),
            Block::Zeros | Block::Missing(_) => Self::Zeros,
        }
    }

    const fn block(&self) -> Block {
        match self {
            Self::Zeros => Block::Zeros,
            Self::Held(digest, _) => Block::Held(*digest),
            Self::Missing(digest) => Block::Missing(*digest),
        }
    }
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.blocks()).finish()
    }
}

impl SimDisk {
    /// A disk of zeros.
    #[must_use]
    pub fn new(blocks: u32) -> Self {
        Self(Arc::new(Mutex::new(vec![Kept::Zeros; blocks as usize])))
    }

    /// What every block is.
    #[must_use]
    pub fn blocks(&self) -> Vec<Block> {
        lock(&self.0).iter().map(Kept::block).collect()
    }

    /// What a block is; one outside the disk is zeros.
    #[must_use]
    pub fn block(&self, block: u32) -> Block {
        lock(&self.0).get(block as usize).map_or(Block::Zeros, Kept::block)
    }

    /// Reads a block; one that is missing reads as zeros.
    pub fn read(&self, block: u32, into: &mut PageBytes) -> Block {
        let kept = lock(&self.0);
        let kept = kept.get(block as usize).unwrap_or(&Kept::Zeros);
        *into = if let Kept::Held(_, bytes) = kept { **bytes } else { [0; PAGE_SIZE] };
        kept.block()
    }

    /// Writes a block; one outside the disk is ignored.
    pub fn write(&self, block: u32, bytes: &PageBytes) {
        self.set(block, Kept::of(bytes));
    }

    /// Makes a block missing, unless one of that digest is held.
    pub fn leave_missing(&self, block: u32, digest: Option<u64>) {
        if digest.is_none_or(|digest| self.block(block) != Block::Held(digest)) {
            self.set(block, Kept::Missing(digest));
        }
    }

    /// Gives what is missing; whether that was it.
    pub fn fill(&self, block: u32, bytes: &PageBytes) -> bool {
        let wanted = match self.block(block) {
            Block::Missing(Some(digest)) => digest == block_digest(bytes),
            Block::Missing(None) => true,
            Block::Zeros | Block::Held(_) => false,
        };
        if wanted {
            self.write(block, bytes);
        }
        wanted
    }

    /// Another disk with the same blocks.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(lock(&self.0).clone())))
    }

    /// Takes another disk's blocks for its own.
    pub fn restore(&self, other: &Self) {
        let kept = lock(&other.0).clone();
        *lock(&self.0) = kept;
    }

    fn set(&self, block: u32, kept: Kept) {
        if let Some(slot) = lock(&self.0).get_mut(block as usize) {
            *slot = kept;
        }
    }
}

/// What is known of a disk's blocks, wherever their bytes are: equal for two hosts that keep the same disk.
#[must_use]
pub fn digests(blocks: &[Block]) -> Vec<Option<u64>> {
    blocks
        .iter()
        .map(|block| match block {
            Block::Zeros => Some(0),
            Block::Held(digest) | Block::Missing(Some(digest)) => Some(*digest),
            Block::Missing(None) => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_block_takes_only_its_own_bytes() {
        let (disk, mut bytes) = (SimDisk::new(4), [0; PAGE_SIZE]);
        disk.write(1, &[7; PAGE_SIZE]);
        let digest = block_digest(&[7; PAGE_SIZE]);
        disk.leave_missing(1, Some(digest));
        assert_eq!(disk.block(1), Block::Held(digest), "kept, since it is held");
        disk.leave_missing(2, Some(digest));
        assert_eq!(disk.read(2, &mut bytes), Block::Missing(Some(digest)));
        assert_eq!(digests(&disk.blocks()), [Some(0), Some(digest), Some(digest), Some(0)]);
        assert!(!disk.fill(2, &[8; PAGE_SIZE]) && !disk.fill(1, &[8; PAGE_SIZE]));
        assert!(disk.fill(2, &[7; PAGE_SIZE]));
        assert_eq!((disk.read(2, &mut bytes), bytes), (Block::Held(digest), [7; PAGE_SIZE]));
        disk.write(2, &[0; PAGE_SIZE]);
        assert_eq!(disk.block(2), Block::Zeros);
        disk.leave_missing(3, None);
        assert_eq!((disk.block(3), disk.block(4)), (Block::Missing(None), Block::Zeros));
    }
}

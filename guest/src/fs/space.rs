//! Which blocks of the disk are in use.
//!
//! The bitmap is not on the disk: a mount derives it from what inodes refer to. So nothing can leak or disagree.

use alloc::{vec, vec::Vec};

/// Blocks given out and free.
pub struct Space {
    /// A bit for each block, set while it is in use.
    words: Vec<u64>,
    blocks: u32,
    free: u32,
    /// Where the search for blocks goes on.
    next: u32,
}

impl Space {
    /// So many blocks, all free.
    pub fn new(blocks: u32) -> Self {
        Self { words: vec![0; (blocks as usize).div_ceil(64)], blocks, free: blocks, next: 0 }
    }

    /// Blocks there are.
    pub const fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Free ones.
    pub const fn free(&self) -> u32 {
        self.free
    }

    /// Whether a block is free; none beyond the last is.
    pub fn is_free(&self, block: u32) -> bool {
        let word = self.words.get(block as usize / 64);
        block < self.blocks && word.is_some_and(|word| word >> (block % 64) & 1 == 0)
    }

    fn set(&mut self, block: u32, used: bool) {
        let Some(word) = self.words.get_mut(block as usize / 64) else { return };
        let bit = 1 << (block % 64);
        if used != (*word & bit != 0) {
            *word ^= bit;
            self.free = if used { self.free - 1 } else { self.free + 1 };
        }
    }

    /// Takes these blocks, or none if any of them is not free.
    pub fn claim(&mut self, start: u32, count: u32) -> bool {
        let Some(end) = start.checked_add(count).filter(|&end| end <= self.blocks) else { return false };
        let free = (start..end).all(|block| self.is_free(block));
        if free {
            (start..end).for_each(|block| self.set(block, true));
        }
        free
    }

    /// Gives blocks back.
    pub fn release(&mut self, start: u32, count: u32) {
        for block in start..start.saturating_add(count).min(self.blocks) {
            self.set(block, false);
        }
    }

    /// Takes one block: `wanted` if it is free, so that what belongs together lies together, else the next.
    pub fn take(&mut self, wanted: Option<u32>) -> Option<u32> {
        let block = match wanted.filter(|&block| self.is_free(block)) {
            Some(block) => block,
            None => {
                let found = self.search(self.next, self.blocks).or_else(|| self.search(0, self.next))?;
                self.next = found + 1;
                found
            }
        };
        self.set(block, true);
        if block == self.next {
            self.next = block + 1;
        }
        Some(block)
    }

    /// The first free block of a range.
    fn search(&self, start: u32, end: u32) -> Option<u32> {
        let mut block = start;
        while block < end {
            let word = self.words.get(block as usize / 64)?;
            let free = !word & (u64::MAX << (block % 64));
            if free != 0 {
                let found = block / 64 * 64 + free.trailing_zeros();
                return Some(found).filter(|&found| found < end);
            }
            block = block / 64 * 64 + 64;
        }
        None
    }

    /// Takes `count` blocks that start at a multiple of `count`: the first there are.
    pub fn take_aligned(&mut self, count: u32) -> Option<u32> {
        let starts = (0..self.blocks / count).map(|area| area * count);
        let mut found = starts.filter(|&start| (start..start + count).all(|block| self.is_free(block)));
        let start = found.next()?;
        self.claim(start, count).then_some(start)
    }
}

//! Private memory of this process that a guest's processor reads as page tables.

use std::{io, ptr::NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Words of private memory, zero at first. Untouched pages of it cost nothing.
#[derive(Debug)]
pub struct Words {
    at: NonNull<u64>,
    count: usize,
}

// SAFETY: plain memory that lives until drop, reached through this value alone on our side.
unsafe impl Send for Words {}

impl Words {
    /// Maps `count` words.
    ///
    /// # Errors
    /// Those of `mmap(2)`; a count of 0 is refused.
    pub fn new(count: usize) -> io::Result<Self> {
        let bytes = count * size_of::<u64>();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address the kernel chooses aliases nothing.
        let at = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags) }?;
        // Tables are few and far between: a huge page would be mostly waste. A kernel without huge pages says no.
        // SAFETY: exactly the mapping just made.
        let _ = unsafe { madvise(at, bytes, Advice::LinuxNoHugepage) };
        let at = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { at, count })
    }

    /// Address in this process, for KVM's slot.
    pub fn address(&self) -> u64 {
        self.at.as_ptr() as u64
    }

    /// Bytes of all.
    pub const fn bytes(&self) -> usize {
        self.count * size_of::<u64>()
    }

    /// Reads a word; one outside reads as zero.
    pub fn get(&self, index: usize) -> u64 {
        if index >= self.count {
            return 0;
        }
        // SAFETY: the index is below the count, the memory is mapped, aligned and always initialised. Volatile: a
        // processor reads it too.
        unsafe { self.at.as_ptr().wrapping_add(index).read_volatile() }
    }

    /// Writes a word; one outside is ignored.
    pub fn set(&mut self, index: usize, word: u64) {
        if index < self.count {
            // SAFETY: as in `get`.
            unsafe { self.at.as_ptr().wrapping_add(index).write_volatile(word) }
        }
    }

    /// Makes the first `count` words zero again and gives their memory back.
    ///
    /// # Errors
    /// Those of `madvise(2)`.
    pub fn clear(&mut self, count: usize) -> io::Result<()> {
        let bytes = count.min(self.count) * size_of::<u64>();
        // SAFETY: a part of this mapping, from its start; private anonymous memory reads as zeros afterwards.
        unsafe { madvise(self.at.as_ptr().cast(), bytes, Advice::LinuxDontNeed) }?;
        Ok(())
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped.
        let _ = unsafe { munmap(self.at.as_ptr().cast(), self.bytes()) };
    }
}

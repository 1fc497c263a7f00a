//! Words of memory that several processes share.
#![expect(unsafe_code, reason = "maps memory that other processes write at the same time")]

use std::{io, os::fd::AsFd, ptr::NonNull, sync::atomic::AtomicU64};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// A shared mapping, seen as atomic words.
#[derive(Debug)]
pub(crate) struct Words {
    at: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the mapping lives until drop and is only reached through atomics.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Maps `count` words of `file` from its start. The file must not be cut shorter while it is mapped.
    ///
    /// # Errors
    /// Those of `mmap(2)`.
    pub(crate) fn of_file(file: impl AsFd, count: usize, writable: bool) -> io::Result<Self> {
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let length = count.checked_mul(8).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address the kernel chooses aliases nothing.
        let at =
            unsafe { mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, file.as_fd(), 0) }?;
        Self::mapped(at.cast(), count)
    }

    /// Maps `count` zero words that this process alone has.
    ///
    /// # Errors
    /// Those of `mmap(2)`.
    pub(crate) fn anonymous(count: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let length = count.checked_mul(8).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address the kernel chooses aliases nothing.
        let at = unsafe { mmap_anonymous(std::ptr::null_mut(), length, protection, MapFlags::PRIVATE) }?;
        Self::mapped(at.cast(), count)
    }

    fn mapped(at: *mut AtomicU64, count: usize) -> io::Result<Self> {
        let at = NonNull::new(at).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { at, count })
    }

    /// Word `index`. Storing to one of a read-only mapping ends the process.
    pub(crate) fn get(&self, index: usize) -> Option<&AtomicU64> {
        if index >= self.count {
            return None;
        }
        // SAFETY: `index` lies in the mapping, so the addition stays inside it.
        let word = unsafe { self.at.add(index) };
        // SAFETY: mapped until `self` is dropped, aligned since mappings are, never borrowed but as an atomic.
        Some(unsafe { word.as_ref() })
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what was mapped; the borrows `get` gave out have ended.
        let _ = unsafe { munmap(self.at.as_ptr().cast(), self.count * 8) };
    }
}

//! Shared mappings of a machine's memory, disk and control page.

use std::{io, os::fd::AsFd, ptr::NonNull};

use kage_machine::{PAGE_SIZE, PageBytes};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// A shared mapping of a whole file, or of memory.
///
/// Other processes write it at the same time. Bytes are copied in and out by volatile words, so that
/// a concurrent write tears a copy but is never undefined behaviour of ours to build on.
#[derive(Debug)]
pub struct Mapping {
    at: NonNull<u8>,
    length: usize,
    writable: bool,
}

// SAFETY: the mapping is plain memory that lives until drop; all access goes through copies.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent copies may tear, which the type's contract says.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes of `file` from its start.
    ///
    /// # Errors
    /// Those of `mmap(2)`; a length of 0 is refused.
    pub fn new(file: impl AsFd, length: usize, writable: bool) -> io::Result<Self> {
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new mapping at an address the kernel chooses aliases nothing.
        let at =
            unsafe { mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, file.as_fd(), 0) }?;
        let at = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { at, length, writable })
    }

    /// Address of the mapping in this process, for KVM's slot.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.at.as_ptr() as u64
    }

    fn page(&self, index: usize) -> Option<*mut u64> {
        let at = index.checked_mul(PAGE_SIZE)?;
        if at.checked_add(PAGE_SIZE)? > self.length {
            return None;
        }
        // SAFETY: `at` and a page behind it lie in the mapping, as just checked.
        Some(unsafe { self.at.as_ptr().add(at) }.cast())
    }

    /// Copies page `index` out; a page outside reads as zeros.
    pub fn read_page(&self, index: usize, into: &mut PageBytes) {
        let Some(from) = self.page(index) else {
            into.fill(0);
            return;
        };
        for (word, chunk) in into.chunks_exact_mut(8).enumerate() {
            // SAFETY: `word` < 512, so the read lies in the page; it is aligned since pages are.
            let value = unsafe { from.wrapping_add(word).read_volatile() };
            chunk.copy_from_slice(&value.to_ne_bytes());
        }
    }

    /// Overwrites page `index`; a page outside is ignored.
    pub fn write_page(&self, index: usize, bytes: &PageBytes) {
        let (Some(to), true) = (self.page(index), self.writable) else { return };
        for (word, chunk) in bytes.chunks_exact(8).enumerate() {
            let mut value = [0; 8];
            value.copy_from_slice(chunk);
            // SAFETY: as in `read_page`, and the mapping is writable.
            unsafe { to.wrapping_add(word).write_volatile(u64::from_ne_bytes(value)) };
        }
    }

    /// Copies bytes out; what lies outside reads as zeros.
    pub fn read(&self, at: usize, into: &mut [u8]) {
        for (offset, byte) in into.iter_mut().enumerate() {
            let position = at.saturating_add(offset);
            *byte = if position < self.length {
                // SAFETY: `position` lies in the mapping.
                unsafe { self.at.as_ptr().wrapping_add(position).read_volatile() }
            } else {
                0
            };
        }
    }

    /// Overwrites bytes; what lies outside is ignored.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        for (offset, &byte) in bytes.iter().enumerate() {
            let position = at.saturating_add(offset);
            if position < self.length && self.writable {
                // SAFETY: `position` lies in the mapping, which is writable.
                unsafe { self.at.as_ptr().wrapping_add(position).write_volatile(byte) };
            }
        }
    }

    /// Gives the backing of page `index` back; it reads as zeros from then on.
    ///
    /// # Errors
    /// Those of `madvise(2)`.
    pub fn punch(&self, index: usize) -> io::Result<()> {
        let Some(at) = self.page(index) else { return Ok(()) };
        // SAFETY: the page lies in this mapping, to which no reference exists.
        unsafe { madvise(at.cast(), PAGE_SIZE, Advice::LinuxRemove) }?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped; nothing borrows from it.
        let _ = unsafe { munmap(self.at.as_ptr().cast(), self.length) };
    }
}

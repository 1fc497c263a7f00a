//! One split virtqueue (virtio 1.2 §2.7), driver side.

use alloc::{
    alloc::{Layout, alloc_zeroed, handle_alloc_error},
    vec::Vec,
};
use core::sync::atomic::{Ordering, fence};

#[repr(C)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Part of a request: address, bytes, whether the device writes it.
#[derive(Clone, Copy)]
pub struct Part {
    /// Guest address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// The device writes it.
    pub writable: bool,
}

/// A queue whose memory lives for ever. Descriptor table, available and used ring share pages as far as
/// they fit, since each page a queue touches is dirty at every epoch.
pub struct Queue {
    size: u16,
    base: *mut u8,
    free: Vec<u16>,
    next_avail: u16,
    next_used: u16,
}

/// Memory that is never given back, aligned to a page.
pub fn forever(bytes: usize) -> *mut u8 {
    let Ok(layout) = Layout::from_size_align(bytes, 4096) else { panic!("a queue of {bytes} bytes") };
    // SAFETY: the layout's size is not zero: all callers pass a positive size.
    let at = unsafe { alloc_zeroed(layout) };
    if at.is_null() {
        handle_alloc_error(layout);
    }
    at
}

impl Queue {
    /// A queue of `size` entries, a power of two up to 1,024.
    pub fn new(size: u16) -> Self {
        let n = usize::from(size);
        let base = forever(16 * n + 6 + 2 * n + 2 + 6 + 8 * n + 64);
        Self { size, base, free: (0..size).rev().collect(), next_avail: 0, next_used: 0 }
    }

    /// Entries.
    pub const fn size(&self) -> u16 {
        self.size
    }

    fn avail(&self) -> *mut u16 {
        // SAFETY: the table of 16 bytes an entry is followed by the available ring, within the allocation.
        unsafe { self.base.add(16 * usize::from(self.size)).cast() }
    }

    fn used(&self) -> *mut u8 {
        let n = usize::from(self.size);
        // SAFETY: the used ring starts at the next multiple of 4 behind the available ring, within the allocation.
        unsafe { self.base.add((16 * n + 6 + 2 * n).next_multiple_of(4)) }
    }

    /// Addresses of table, available and used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.base as u64, self.avail() as u64, self.used() as u64]
    }

    /// Descriptors left.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Queues one request; returns its number, or `None` when there is no room.
    pub fn push(&mut self, parts: &[Part]) -> Option<u16> {
        if parts.is_empty() || self.free.len() < parts.len() {
            return None;
        }
        let mut next = 0;
        let mut more = 0;
        for part in parts.iter().rev() {
            let index = self.free.pop()?;
            let flags = more | if part.writable { WRITE } else { 0 };
            let descriptor = Descriptor { address: part.address, length: part.length, flags, next };
            // SAFETY: `index` < size, so the descriptor lies in the table, which only this driver writes.
            unsafe { self.base.cast::<Descriptor>().add(usize::from(index)).write_volatile(descriptor) };
            (next, more) = (index, NEXT);
        }
        let slot = 2 + usize::from(self.next_avail % self.size);
        // SAFETY: the slot lies in the available ring.
        unsafe { self.avail().add(slot).write_volatile(next) };
        fence(Ordering::Release);
        crate::arch::note_queued();
        self.next_avail = self.next_avail.wrapping_add(1);
        // SAFETY: the ring's index is its second word.
        unsafe { self.avail().add(1).write_volatile(self.next_avail) };
        Some(next)
    }

    /// The next completed request: its number and the bytes the device wrote.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        // SAFETY: the used ring's index is its second 16-bit word.
        let index = unsafe { self.used().cast::<u16>().add(1).read_volatile() };
        if index == self.next_used {
            return None;
        }
        fence(Ordering::Acquire);
        let at = 4 + 8 * usize::from(self.next_used % self.size);
        // SAFETY: the entry lies in the used ring.
        let entry = unsafe { self.used().add(at).cast::<[u32; 2]>().read_volatile() };
        self.next_used = self.next_used.wrapping_add(1);
        let head = (entry[0] as u16) % self.size;
        let mut index = head;
        for _ in 0..self.size {
            self.free.push(index);
            // SAFETY: `index` < size.
            let descriptor =
                unsafe { self.base.cast::<Descriptor>().add(usize::from(index)).read_volatile() };
            if descriptor.flags & NEXT == 0 {
                break;
            }
            index = descriptor.next % self.size;
        }
        Some((head, entry[1]))
    }

    /// Fills descriptor table and available ring with nonsense.
    pub fn spoil(&mut self) {
        let bytes = 16 * usize::from(self.size) + 6 + 2 * usize::from(self.size);
        for at in 0..bytes {
            // SAFETY: table and available ring lie in the allocation, one behind the other.
            unsafe { self.base.add(at).write_volatile((at as u8).wrapping_mul(151) | 1) };
        }
    }
}

//! What a process may use, and where its memory comes from.
//!
//! A linear memory is a window: growing one maps frames in it, piece by piece, and lets others run in between. A
//! program that asks for more than its limit, or than there is, is told so as the specification says (`memory.grow`
//! gives −1); what it then dies of is told together with the limit.
#![expect(unsafe_code, reason = "promises the engine what windows are")]

use alloc::{boxed::Box, string::String, sync::Arc};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use wasmtime::{Error, LinearMemory, MemoryCreator, MemoryType, ResourceLimiter};

use super::fiber;
use crate::{
    executor, heap,
    memory::{self, Access, Kind, OutOfMemory, PAGE, Window},
};

/// Pages mapped in one go.
const PIECE: usize = 128;
/// Zeroing and mapping a page, in estimated nanoseconds.
const PAGE_COST: u64 = 400;
/// Elements of all tables of a process, a word each in the kernel's heap.
const TABLE_ELEMENTS: usize = 256 << 10;
/// Kernel's heap that tables leave.
const LEFT: usize = heap::RESERVE / 2;
/// Tables of a process.
const TABLES: usize = 16;

/// What a process uses, and whether it was refused more. Shared by the process and the engine's limiter.
#[derive(Debug, Default)]
pub struct Usage {
    bytes: AtomicUsize,
    refused: AtomicBool,
}

impl Usage {
    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Accounts for `bytes` more.
    pub fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether it asked for more than it may have.
    pub fn was_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }
}

/// The engine's limiter of one process.
pub struct Limits {
    usage: Arc<Usage>,
    /// Bytes it may use in all.
    memory: usize,
    elements: usize,
}

impl Limits {
    /// At most `memory` bytes, accounted for in `usage`.
    pub fn new(usage: Arc<Usage>, memory: usize) -> Self {
        Self { usage, memory, elements: 0 }
    }

    fn take(&self, bytes: usize) -> bool {
        let fits = self.usage.bytes().checked_add(bytes).is_some_and(|total| total <= self.memory);
        if fits {
            self.usage.add(bytes);
        } else {
            self.usage.refused.store(true, Ordering::Relaxed);
        }
        fits
    }
}

impl ResourceLimiter for Limits {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> Result<bool, Error> {
        Ok(self.take(desired.saturating_sub(current)))
    }

    fn memory_grow_failed(&mut self, _: Error) -> Result<(), Error> {
        self.usage.refused.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> Result<bool, Error> {
        let more = desired.saturating_sub(current);
        let fits = self.elements.checked_add(more).is_some_and(|total| total <= TABLE_ELEMENTS)
            && memory::heap_free_bytes() >= LEFT + more.saturating_mul(size_of::<usize>()) * 2
            && self.take(more.saturating_mul(size_of::<usize>()));
        if fits {
            self.elements += more;
        }
        Ok(fits)
    }

    fn instances(&self) -> usize {
        1
    }

    fn tables(&self) -> usize {
        TABLES
    }

    fn memories(&self) -> usize {
        1
    }
}

/// Makes linear memories.
pub struct Memories;

// SAFETY: a window of a memory is 8 GiB: the reservation and the guard that the engine is configured for; its pages
// are mapped zero, and nothing else is mapped there.
unsafe impl MemoryCreator for Memories {
    fn new_memory(
        &self,
        _: MemoryType,
        minimum: usize,
        _: Option<usize>,
        reserved: Option<usize>,
        guard: usize,
    ) -> Result<Box<dyn LinearMemory>, String> {
        let window = Window::reserve(Kind::Memory).ok_or("no window is left for a memory")?;
        if reserved.unwrap_or(0).saturating_add(guard) > window.bytes() {
            return Err("a memory is larger than a window".into());
        }
        let mut memory = Memory { window, bytes: 0 };
        memory.extend(minimum).map_err(|OutOfMemory| "the machine has no memory left")?;
        Ok(Box::new(memory))
    }
}

struct Memory {
    window: Window,
    bytes: usize,
}

impl Memory {
    fn extend(&mut self, bytes: usize) -> Result<(), OutOfMemory> {
        let pages = bytes.div_ceil(PAGE);
        // What is mapped stays so if there is not enough for all of it: the next attempt goes on from there.
        while self.window.mapped_pages() < pages {
            let first = self.window.mapped_pages();
            let piece = PIECE.min(pages - first);
            if memory::free_frames() < pages - first {
                return Err(OutOfMemory);
            }
            self.window.map(first, piece, Access::ReadWrite)?;
            if executor::charge(piece as u64 * PAGE_COST) {
                fiber::block_on(executor::yield_now()).map_err(|fiber::Killed| OutOfMemory)?;
            }
        }
        self.bytes = bytes;
        Ok(())
    }
}

// SAFETY: the memory never moves, is accessible up to its size, and faults behind it up to the window's end.
unsafe impl LinearMemory for Memory {
    fn byte_size(&self) -> usize {
        self.bytes
    }

    fn byte_capacity(&self) -> usize {
        kage_engine::MEMORY_RESERVATION as usize
    }

    fn grow_to(&mut self, bytes: usize) -> Result<(), Error> {
        self.extend(bytes).map_err(|OutOfMemory| Error::msg("the machine has no memory left"))
    }

    fn as_ptr(&self) -> *mut u8 {
        self.window.base() as *mut u8
    }
}

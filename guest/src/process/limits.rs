//! What a process may use, and where its memory comes from.
//!
//! A linear memory is a window: growing one takes frames, piece by piece, and lets others run in between; they are
//! mapped once all of them are there, since what is mapped can be reached whatever the memory's size is said to be. A
//! program that asks for more than its limit, or than there is, is told so as the specification says (`memory.grow`
//! gives −1); what it then dies of is told together with the limit.
#![expect(unsafe_code, reason = "promises the engine what windows are")]

use alloc::{boxed::Box, string::String, sync::Arc, vec::Vec};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use wasmtime::{Error, LinearMemory, MemoryCreator, MemoryType, ResourceLimiter};

use super::fiber;
use crate::{
    executor,
    memory::{self, Access, Frames, Kind, OutOfMemory, PAGE, Window},
};

/// Pages taken in one go.
const PIECE: usize = 128;
/// Zeroing a page, and mapping it, in estimated nanoseconds.
const TAKE_COST: u64 = 300;
const MAP_COST: u64 = 100;
/// Asking for memory, in estimated nanoseconds.
const GROW_COST: u64 = 250;
/// Elements of all tables of a process, a word each in the kernel's heap.
const TABLE_ELEMENTS: usize = 256 << 10;
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

    /// Accounts for `bytes` less.
    pub fn subtract(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
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
    /// Bytes that a growth has been promised and may not get.
    pending: usize,
}

impl Limits {
    /// At most `memory` bytes, accounted for in `usage`.
    pub fn new(usage: Arc<Usage>, memory: usize) -> Self {
        Self { usage, memory, elements: 0, pending: 0 }
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
        // A program that does nothing but ask is to let others run, too.
        if executor::charge(GROW_COST) {
            fiber::block_on(executor::yield_now())?;
        }
        let more = desired.saturating_sub(current);
        let fits = self.take(more);
        self.pending = if fits { more } else { 0 };
        Ok(fits)
    }

    fn memory_grow_failed(&mut self, _: Error) -> Result<(), Error> {
        self.usage.refused.store(true, Ordering::Relaxed);
        self.usage.subtract(core::mem::take(&mut self.pending));
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> Result<bool, Error> {
        let more = desired.saturating_sub(current);
        let fits = self.elements.checked_add(more).is_some_and(|total| total <= TABLE_ELEMENTS)
            && memory::kernel_room(more.saturating_mul(2 * size_of::<usize>()))
            && self.take(more.saturating_mul(size_of::<usize>()));
        self.pending = 0;
        if fits {
            self.elements += more;
            self.pending = more;
        }
        Ok(fits)
    }

    fn table_grow_failed(&mut self, _: Error) -> Result<(), Error> {
        let elements = core::mem::take(&mut self.pending);
        self.elements -= elements;
        self.usage.subtract(elements * size_of::<usize>());
        Ok(())
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

/// Accounts for work, and lets others run when it was enough; a process that is to end gets no more.
fn pause(cost: u64) -> Result<(), OutOfMemory> {
    if executor::charge(cost) {
        fiber::block_on(executor::yield_now()).map_err(|fiber::Killed| OutOfMemory)?;
    }
    Ok(())
}

struct Memory {
    window: Window,
    bytes: usize,
}

impl Memory {
    fn extend(&mut self, bytes: usize) -> Result<(), OutOfMemory> {
        let (before, pages) = (self.window.mapped_pages(), bytes.div_ceil(PAGE));
        let mut taken = Vec::new();
        let mut left = pages.saturating_sub(before);
        while left > 0 {
            if memory::free_frames() < left {
                return Err(OutOfMemory);
            }
            let piece = PIECE.min(left);
            taken.push(Frames::take(piece)?);
            left -= piece;
            pause(piece as u64 * TAKE_COST)?;
        }
        let mapped = taken.into_iter().try_for_each(|frames| {
            let count = frames.count() as u64;
            self.window.map_frames(self.window.mapped_pages(), frames, Access::ReadWrite)?;
            pause(count * MAP_COST)
        });
        match mapped {
            Ok(()) => self.bytes = bytes,
            Err(OutOfMemory) => self.window.cut(before),
        }
        mapped
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

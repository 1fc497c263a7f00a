//! The machine's memory beside the kernel's own data.
//!
//! ```text
//! kernel's data │ frame table, bitmaps │ heap ──▶      free      ◀── frames of processes │ end
//!                                             heap_end      first_frame
//! ```
//!
//! The heap grows upwards and frames are given from the top downwards, so either gets what the other does not need.
//! Where frames that are in use lie between, the heap takes a whole megabyte of free ones as it is, and gives it back
//! once it is empty.
//! A frame is one page of memory; the kernel reaches each at its own address, and a process through a [`Window`]
//! that it is mapped in.

mod frames;
mod windows;

use core::sync::atomic::{AtomicUsize, Ordering};

pub use frames::{Frames, OutOfMemory};
pub use windows::{Access, Kind, Window, drop_spare};

use crate::heap;

/// Bytes in a page.
pub const PAGE: usize = kage_abi::PAGE as usize;

/// One past the heap's last address.
static HEAP_END: AtomicUsize = AtomicUsize::new(0);
/// The highest the heap's end ever was: frames below were written.
static HEAP_HIGH: AtomicUsize = AtomicUsize::new(0);
/// First address of the frames that were given and are not all free again.
static FRAMES_START: AtomicUsize = AtomicUsize::new(0);

/// Divides the memory behind the kernel's data. Called once, before anything is allocated.
pub fn start() {
    let (start, end) = crate::arch::free_range();
    let start = frames::start(start, end);
    HEAP_END.store(start, Ordering::Relaxed);
    HEAP_HIGH.store(start, Ordering::Relaxed);
    FRAMES_START.store(end, Ordering::Relaxed);
    heap::start();
    windows::start();
}

/// Bytes between heap and frames.
fn gap() -> usize {
    FRAMES_START.load(Ordering::Relaxed) - HEAP_END.load(Ordering::Relaxed)
}

/// The heap's end, which is where it may be extended.
pub fn heap_end() -> usize {
    HEAP_END.load(Ordering::Relaxed)
}

/// Moves the heap's end up by `bytes`, whole pages; false when they are not there.
pub fn extend_heap(bytes: usize) -> bool {
    if bytes > gap() {
        return false;
    }
    let end = HEAP_END.load(Ordering::Relaxed) + bytes;
    HEAP_END.store(end, Ordering::Relaxed);
    HEAP_HIGH.fetch_max(end, Ordering::Relaxed);
    true
}

/// Moves the heap's end down to `end`, the start of a page.
pub fn cut_heap(end: usize) {
    HEAP_END.fetch_min(end, Ordering::Relaxed);
}

/// Takes memory for the heap from among the frames, `bytes` at the least in a row: its first address, and how much it
/// is.
pub fn claim(bytes: usize) -> Option<(usize, usize)> {
    frames::claim(bytes)
}

/// Takes back from the heap what [`claim`] gave.
pub fn give_back_claim(at: usize, bytes: usize) {
    frames::give_back_claim(at, bytes);
}

/// Bytes that nobody uses, wherever they are.
pub fn free_bytes() -> usize {
    heap::unused_bytes() + gap() + (frames::given_back() + windows::spare_pages()) * PAGE
}

/// Bytes there are for heap and frames.
pub fn total_bytes() -> usize {
    let (start, end) = crate::arch::free_range();
    end - start
}

/// Bytes that the kernel's heap can still get.
pub fn heap_free_bytes() -> usize {
    heap::unused_bytes() + gap() + frames::in_groups() * PAGE
}

/// Whether the kernel's heap has `bytes` for what a process makes it keep. The rest is for whoever else needs some:
/// a heap without any is the machine's end.
pub fn kernel_room(bytes: usize) -> bool {
    heap_free_bytes() >= bytes.saturating_add(heap::RESERVE / 2)
}

/// Whether the kernel's heap has less than what is kept for it.
pub fn is_short() -> bool {
    heap_free_bytes() < heap::RESERVE
}

/// Frames that can be had: all but what is kept for the kernel's heap.
pub fn free_frames() -> usize {
    frames_at_hand() + windows::spare_pages()
}

/// Frames that can be had without taking any from who might do without.
fn frames_at_hand() -> usize {
    let groups = frames::in_groups();
    let common = gap() + groups * PAGE;
    frames::given_back() - groups + heap_free_bytes().saturating_sub(heap::RESERVE).min(common) / PAGE
}

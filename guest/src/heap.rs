//! The heap: everything from the kernel's data to the end of memory.
#![expect(unsafe_code, reason = "gives the allocator its memory, and takes some of it as it is")]

use alloc::vec::Vec;
use core::alloc::Layout;

use talc::{TalcLock, source::Manual};

/// What no one program may take, so that connections and their buffers go on: a dozen connections with
/// full buffers.
pub const RESERVE: usize = 5 << 20;

#[global_allocator]
static HEAP: TalcLock<spinning_top::RawSpinlock, Manual> = TalcLock::new(Manual);

/// Gives the allocator all memory behind the kernel's data. Called once, before anything is allocated.
pub fn start() {
    let (start, end) = crate::arch::heap_range();
    // SAFETY: the range is mapped read-write for ever, lies behind everything the linker placed, and is
    // given away once.
    let claimed = unsafe { HEAP.lock().claim(start as *mut u8, end - start) };
    assert!(claimed.is_some(), "no heap");
}

/// Bytes not allocated, in however many pieces.
pub fn free_bytes() -> usize {
    HEAP.lock().counters().available_bytes
}

/// Bytes there are.
pub fn total_bytes() -> usize {
    HEAP.lock().counters().claimed_bytes
}

/// A buffer with whatever its memory held before. Unlike a zeroed one it touches no page until it is used, and
/// a page untouched is a page that a moving machine need not send.
pub fn buffer(bytes: usize) -> Vec<u8> {
    let Some(layout) = Layout::from_size_align(bytes, 1).ok().filter(|layout| layout.size() > 0) else {
        return Vec::new();
    };
    // SAFETY: the layout's size is not zero. The allocator is asked directly, past the language's own
    // allocation function: what it gives is plain memory, zeroed by the host once and written by whoever had it.
    let Some(at) = (unsafe { HEAP.lock().allocate(layout) }) else { return alloc::vec![0; bytes] };
    // SAFETY: `at` was allocated by the global allocator for exactly `bytes` bytes of alignment 1, all of them
    // initialised as said above.
    unsafe { Vec::from_raw_parts(at.as_ptr(), bytes, bytes) }
}

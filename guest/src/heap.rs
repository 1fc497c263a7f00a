//! The heap: everything from the kernel's data to the end of memory.
#![expect(unsafe_code, reason = "gives the allocator its memory")]

use talc::{TalcLock, source::Manual};

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

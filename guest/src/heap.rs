//! The kernel's heap: it grows upwards into the free memory, and is cut when others need it. When there is none behind
//! it, it takes more from among the frames.
#![expect(unsafe_code, reason = "gives the allocator its memory, and takes some of it as it is")]

use alloc::vec::Vec;
use core::{alloc::Layout, ptr::NonNull};

use talc::{
    TalcLock,
    base::{Talc, binning::Binning},
    source::Source,
};

use crate::memory::{self, PAGE};

/// What no one program may take, so that connections and their buffers go on: a dozen connections with
/// full buffers.
pub const RESERVE: usize = 5 << 20;
/// The heap grows by so much at least: each step writes a mark at its new end, a page more to be sent in a move.
const STEP: usize = 256 << 10;
/// What the heap keeps when it is cut, so that it does not grow again at once.
const SLACK: usize = 64 << 10;

/// Pieces of memory from among the frames that the heap may have at a time.
const CLAIMS: usize = 64;

#[derive(Debug)]
struct Growing {
    /// Address and bytes of the pieces from among the frames; no bytes: none.
    claims: [(usize, usize); CLAIMS],
}

#[global_allocator]
static HEAP: TalcLock<spinning_top::RawSpinlock, Growing> =
    TalcLock::new(Growing { claims: [(0, 0); CLAIMS] });

// SAFETY: `acquire` allocates nothing and reaches the allocator only through its argument.
unsafe impl Source for Growing {
    fn acquire<B: Binning>(talc: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        // The allocator's own marks, and alignment, come on top.
        let wanted =
            layout.size().checked_add(layout.align()).and_then(|bytes| bytes.checked_add(PAGE)).ok_or(())?;
        let wanted = wanted.checked_next_multiple_of(PAGE).ok_or(())?;
        let end = memory::heap_end();
        let Some(grown) = [wanted.max(STEP), wanted].into_iter().find(|&bytes| memory::extend_heap(bytes))
        else {
            return claim(talc, wanted);
        };
        let at = NonNull::new(end as *mut u8).ok_or(())?;
        // SAFETY: the heap's end is where `start` or the last change of it left it, a multiple of a page; the memory
        // behind it was just taken from the free memory, is mapped read-write for ever and given away once.
        unsafe { talc.extend(at, (end + grown) as *mut u8) };
        Ok(())
    }
}

/// Extends the heap by memory from among the frames.
fn claim<B: Binning>(talc: &mut Talc<Growing, B>, wanted: usize) -> Result<(), ()> {
    let place = talc.source.claims.iter().position(|(_, bytes)| *bytes == 0).ok_or(())?;
    let (at, bytes) = memory::claim(wanted).ok_or(())?;
    // SAFETY: whole pages, mapped read-write for ever, just taken from the frames, and nobody else's until they are
    // given back.
    let claimed = unsafe { talc.claim(at as *mut u8, bytes) };
    if claimed.is_none_or(|end| end.as_ptr() as usize != at + bytes) {
        return Err(());
    }
    talc.source.claims[place] = (at, bytes);
    Ok(())
}

/// Makes the heap. Called once, before anything is allocated.
pub fn start() {
    let start = memory::heap_end();
    assert!(memory::extend_heap(STEP), "no heap");
    // SAFETY: the range is mapped read-write for ever, lies behind everything the linker placed, and is
    // given away once.
    let claimed = unsafe { HEAP.lock().claim(start as *mut u8, STEP) };
    assert!(claimed.is_some_and(|end| end.as_ptr() as usize == start + STEP), "no heap");
}

/// Gives what is unused at the heap's end, and what of the frames' memory is, back to the free memory.
pub fn shrink() {
    let mut heap = HEAP.lock();
    for place in 0..CLAIMS {
        let (at, bytes) = heap.source.claims[place];
        let Some(end) = NonNull::new((at + bytes) as *mut u8).filter(|_| bytes > 0) else { continue };
        // SAFETY: `claim` left the end of this piece there, and nothing has changed it.
        let is_used = unsafe { heap.reserved(end) }.any;
        if !is_used {
            // SAFETY: as above; nothing of the piece is allocated, so all of it is released.
            unsafe { heap.truncate(end, core::ptr::null_mut()) };
            heap.source.claims[place] = (0, 0);
            memory::give_back_claim(at, bytes);
        }
    }
    let Some(end) = NonNull::new(memory::heap_end() as *mut u8) else { return };
    // SAFETY: as in `acquire`: this is the heap's end.
    let used = unsafe { heap.reserved(end) }.up_to;
    let cut = (used.as_ptr() as usize + SLACK).next_multiple_of(PAGE);
    if cut < end.as_ptr() as usize {
        // SAFETY: as above; nothing behind `cut` is allocated, as was just asked.
        let end = unsafe { heap.truncate(end, cut as *mut u8) };
        memory::cut_heap(end.map_or(cut, |end| end.as_ptr() as usize));
    }
}

/// Bytes of the heap that are not allocated, in however many pieces.
pub fn unused_bytes() -> usize {
    HEAP.lock().counters().available_bytes
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

//! Frames: pages of memory for processes, files, and whoever wants memory by the page.
//!
//! The frame table, one word a frame, says where each is mapped: the host reads it ([`kage_abi::frame`]). Two bitmaps
//! beside it say which frames were given back, and which were ever given: one that never was holds zeros and is not
//! touched before it is used, since a page untouched is a page that a moving machine need not send.
#![expect(unsafe_code, reason = "hands out memory by address")]

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use kage_abi::MEMORY;

use super::{FRAMES_START, HEAP_HIGH, PAGE};
use crate::{arch, heap, local::Local};

/// No memory is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;

/// A row of frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Run {
    /// Its first frame.
    pub first: u32,
    /// How many.
    pub count: u32,
}

fn address(frame: u32) -> usize {
    MEMORY as usize + frame as usize * PAGE
}

fn frame_at(address: usize) -> u32 {
    ((address - MEMORY as usize) / PAGE) as u32
}

/// Frames of a *group*, which lies aligned. One that is free as a whole is as good as the memory between heap and
/// frames: the heap can have it.
const GROUP: u32 = 256;
/// Words of a bitmap for a group.
const GROUP_WORDS: usize = GROUP as usize / 64;

/// The table and the bitmaps, by address: the host reads the table at the door.
struct Pool {
    table: *mut u64,
    free: &'static mut [u64],
    given: &'static mut [u64],
    /// Frames of the machine.
    frames: u32,
    /// Bits set in `free`.
    freed: usize,
    /// Groups that are free as a whole.
    whole: usize,
    /// No bit of `free` is set in words above.
    highest: usize,
}

static POOL: Local<Pool> = Local::new();

/// Places table and bitmaps at `start`; returns the address behind them.
pub(super) fn start(start: usize, end: usize) -> usize {
    let frames = frame_at(end);
    let words = frames.div_ceil(64) as usize;
    let table = start as *mut u64;
    let free = start + frames as usize * size_of::<u64>();
    let given = free + words * size_of::<u64>();
    // SAFETY: the memory behind the kernel's data is mapped, zero, aligned to a page, and nobody's yet; the parts do
    // not overlap.
    let free = unsafe { core::slice::from_raw_parts_mut(free as *mut u64, words) };
    // SAFETY: as above.
    let given_bits = unsafe { core::slice::from_raw_parts_mut(given as *mut u64, words) };
    POOL.set(Pool { table, free, given: given_bits, frames, freed: 0, whole: 0, highest: 0 });
    arch::set_frame_table(start);
    arch::set_first_frame(frames);
    (given + words * size_of::<u64>()).next_multiple_of(PAGE)
}

/// Frames that were given back.
pub(super) fn given_back() -> usize {
    POOL.get().freed
}

/// Those of them that make up whole groups.
pub(super) fn in_groups() -> usize {
    POOL.get().in_groups()
}

/// Takes groups for the heap, `bytes` at the least in a row: their first address, and how many bytes they are.
pub(super) fn claim(bytes: usize) -> Option<(usize, usize)> {
    let run = POOL.get().claim(bytes.div_ceil(GROUP as usize * PAGE))?;
    Some((address(run.first), run.count as usize * PAGE))
}

/// Takes back from the heap what [`claim`] gave.
pub(super) fn give_back_claim(at: usize, bytes: usize) {
    POOL.get().give_back(Run { first: frame_at(at), count: (bytes / PAGE) as u32 });
}

impl Pool {
    fn set_entry(&mut self, frame: u32, entry: u64) {
        assert!(frame < self.frames, "frame {frame:#x} is not there");
        // SAFETY: the table has an entry for each frame below `frames`.
        unsafe { self.table.wrapping_add(frame as usize).write_volatile(entry) }
    }

    /// At most `most` frames in a row: those given back first, since they are in use anyway.
    fn take(&mut self, most: u32) -> Option<Run> {
        if self.freed > self.in_groups() {
            return self.take_freed(most, false);
        }
        // What is left is the heap's too, which keeps its reserve.
        let common = super::gap() + self.in_groups() * PAGE;
        let room = (heap::unused_bytes() + common).saturating_sub(heap::RESERVE).min(common) / PAGE;
        let count = most.min(u32::try_from(room).unwrap_or(u32::MAX));
        if count == 0 {
            return None;
        }
        if self.whole > 0 {
            return self.take_freed(count, true);
        }
        let low = FRAMES_START.load(Ordering::Relaxed);
        let count = count.min((super::gap() / PAGE) as u32);
        let start = low - count as usize * PAGE;
        FRAMES_START.store(start, Ordering::Relaxed);
        let run = Run { first: frame_at(start), count };
        arch::set_first_frame(run.first);
        Some(run)
    }

    /// At most `most` frames in a row that were given back: of whole groups, or beside those.
    fn take_freed(&mut self, most: u32, of_groups: bool) -> Option<Run> {
        while self.highest > 0 && self.free[self.highest] == 0 {
            self.highest -= 1;
        }
        let fits = |word: usize| self.free[word] != 0 && (of_groups || !self.is_whole(word / GROUP_WORDS));
        let word = (0..=self.highest).rev().find(|&word| fits(word))?;
        // Downwards from the highest free frame, for as long as the row goes on.
        let last = word as u32 * 64 + self.free[word].ilog2();
        let mut first = last;
        self.clear_free(last);
        while last - first + 1 < most && first > 0 && self.is_free(first - 1) {
            if !of_groups && self.is_whole(((first - 1) / GROUP) as usize) {
                break;
            }
            first -= 1;
            self.clear_free(first);
        }
        Some(Run { first, count: last - first + 1 })
    }

    fn in_groups(&self) -> usize {
        self.whole * GROUP as usize
    }

    /// Whether all frames of a group are free.
    fn is_whole(&self, group: usize) -> bool {
        let words = self.free.get(group * GROUP_WORDS..(group + 1) * GROUP_WORDS);
        words.is_some_and(|words| words.iter().all(|&word| word == u64::MAX))
    }

    /// Takes the lowest `groups` whole groups that lie in a row: frames are given from above.
    fn claim(&mut self, groups: usize) -> Option<Run> {
        if self.whole < groups || groups == 0 {
            return None;
        }
        let mut row = 0;
        let last = (0..self.free.len() / GROUP_WORDS).find(|&group| {
            row = if self.is_whole(group) { row + 1 } else { 0 };
            row == groups
        })?;
        let first = (last + 1 - groups) as u32 * GROUP;
        let run = Run { first, count: groups as u32 * GROUP };
        for frame in run.first..run.first + run.count {
            self.clear_free(frame);
        }
        Some(run)
    }

    fn is_free(&self, frame: u32) -> bool {
        self.free[frame as usize / 64] & 1 << (frame % 64) != 0
    }

    fn set_free(&mut self, frame: u32) {
        debug_assert!(!self.is_free(frame));
        self.free[frame as usize / 64] |= 1 << (frame % 64);
        self.freed += 1;
        self.whole += usize::from(self.is_whole((frame / GROUP) as usize));
    }

    fn clear_free(&mut self, frame: u32) {
        self.whole -= usize::from(self.is_whole((frame / GROUP) as usize));
        self.free[frame as usize / 64] &= !(1 << (frame % 64));
        self.freed -= 1;
    }

    /// Whether a frame may hold something; from now on it may.
    fn note_given(&mut self, frame: u32) -> bool {
        let (word, bit) = (frame as usize / 64, 1 << (frame % 64));
        let before = self.given[word] & bit != 0;
        self.given[word] |= bit;
        before || address(frame) < HEAP_HIGH.load(Ordering::Relaxed)
    }

    fn give_back(&mut self, run: Run) {
        for frame in run.first..run.first + run.count {
            self.set_free(frame);
        }
        self.highest = self.highest.max((run.first + run.count - 1) as usize / 64);
        // What is free at the low end is anybody's again, the heap's too.
        let mut low = frame_at(FRAMES_START.load(Ordering::Relaxed));
        while low < self.frames && self.is_free(low) {
            self.clear_free(low);
            low += 1;
        }
        FRAMES_START.store(address(low), Ordering::Relaxed);
        arch::set_first_frame(low);
    }
}

/// Notes where the frames of a run are mapped: at `address` and on.
pub(super) fn note_mapped(run: Run, address: u64, flags: u64) {
    let mut pool = POOL.get();
    for at in 0..run.count {
        pool.set_entry(run.first + at, (address + u64::from(at) * PAGE as u64) | flags);
    }
}

/// Notes that the frames of a run are mapped nowhere.
pub(super) fn note_unmapped(run: Run) {
    let mut pool = POOL.get();
    for at in 0..run.count {
        pool.set_entry(run.first + at, 0);
    }
}

/// Frames of whoever holds this; they are free again when it is dropped.
#[derive(Debug, Default)]
pub struct Frames {
    runs: Vec<Run>,
}

impl Frames {
    /// Takes `count` frames, all zero.
    ///
    /// # Errors
    /// [`OutOfMemory`]; nothing is taken then.
    pub fn take(count: usize) -> Result<Self, OutOfMemory> {
        let mut frames = Self::default();
        let mut left = u32::try_from(count).map_err(|_| OutOfMemory)?;
        if super::frames_at_hand() < count {
            heap::shrink();
        }
        if super::frames_at_hand() < count {
            super::windows::drop_spare();
        }
        if super::frames_at_hand() < count {
            return Err(OutOfMemory);
        }
        while left > 0 {
            // Dropping `frames` gives back what was taken.
            let run = POOL.get().take(left).ok_or(OutOfMemory)?;
            frames.runs.push(run);
            left -= run.count;
            for frame in run.first..run.first + run.count {
                let written = POOL.get().note_given(frame);
                if written {
                    // SAFETY: the frame was just taken, so nobody refers to it.
                    unsafe { (address(frame) as *mut u8).write_bytes(0, PAGE) };
                }
            }
        }
        Ok(frames)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.runs.iter().map(|run| run.count as usize).sum()
    }

    /// Their rows, in order.
    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    fn find(&self, index: usize) -> Option<usize> {
        let mut index = u32::try_from(index).ok()?;
        for run in &self.runs {
            if index < run.count {
                return Some(address(run.first + index));
            }
            index -= run.count;
        }
        None
    }

    /// The bytes of one.
    pub fn page_mut(&mut self, index: usize) -> Option<&mut [u8; PAGE]> {
        let at = self.find(index)?;
        // SAFETY: the frame is this value's, which is borrowed for as long as the reference lives; any bytes are valid.
        Some(unsafe { &mut *(at as *mut [u8; PAGE]) })
    }

    /// The words of one.
    pub fn words_mut(&mut self, index: usize) -> Option<&mut [u64; PAGE / 8]> {
        let at = self.find(index)?;
        // SAFETY: as above, and a page is aligned to a word.
        Some(unsafe { &mut *(at as *mut [u64; PAGE / 8]) })
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        let mut pool = POOL.get();
        for &run in &self.runs {
            pool.give_back(run);
        }
    }
}

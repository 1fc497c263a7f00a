//! Windows: virtual space of processes, in which frames are mapped.
//!
//! The host keeps the page tables and only ever adds to them: so a window that had anything mapped is *retired* when
//! it is given up, its frames are free at once, and it is used again after the tables were built anew, which happens
//! when windows or tables run out, or while little is mapped: the guest pays for it by touching all pages anew. The
//! frames of code are free only then: what is executable anywhere is not given to be written.
//! Stacks are all alike, so some are kept with their pages mapped for the next who wants one.

use alloc::vec::Vec;

use kage_abi::{MAP_FRAMES, MAP_RANGES, MapRange, frame, window};

use super::{
    PAGE,
    frames::{self, Frames, OutOfMemory, Run},
};
use crate::{arch, local::Local};

/// What a window is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A linear memory: 8 GiB.
    Memory,
    /// A stack: 4 MiB.
    Stack,
    /// Code that is not in the image: 256 MiB.
    Code,
}

impl Kind {
    const fn first(self) -> u64 {
        match self {
            Self::Memory => window::MEMORY,
            Self::Stack => window::STACK,
            Self::Code => window::CODE,
        }
    }

    /// Bytes of a window.
    pub const fn bytes(self) -> usize {
        (match self {
            Self::Memory => window::MEMORY_STRIDE,
            Self::Stack => window::STACK_STRIDE,
            Self::Code => window::CODE_STRIDE,
        }) as usize
    }

    const fn count(self) -> u64 {
        match self {
            Self::Memory => window::MEMORY_COUNT,
            Self::Stack => window::STACK_COUNT,
            Self::Code => window::CODE_COUNT,
        }
    }
}

/// What process code may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read and write.
    ReadWrite,
    /// Read and execute; in code windows alone.
    ReadExecute,
}

impl Access {
    const fn flags(self) -> u64 {
        frame::PRESENT
            | match self {
                Self::ReadWrite => frame::WRITABLE,
                Self::ReadExecute => frame::EXECUTABLE,
            }
    }
}

/// Retired windows from which on the tables are built anew when few pages are mapped, and how many these are: each takes
/// some 4 µs to be touched anew, as whatever else the machine touches then, since its host forgets the kernel's pages too.
const MANY_RETIRED: usize = 256;
const FEW_PAGES: usize = 512;
/// Stacks kept.
const SPARE_STACKS: usize = 8;

/// The windows of one kind.
#[derive(Default)]
struct Region {
    /// Windows from this one on were never used.
    next: u64,
    /// Have no page mapped.
    clean: Vec<u32>,
    /// Given up with pages mapped.
    retired: Vec<u32>,
}

/// All windows.
#[derive(Default)]
struct Windows {
    regions: [Region; 3],
    /// Pages mapped in windows that are not retired.
    pages: usize,
    /// Stacks with their pages mapped that nobody uses.
    spare: Vec<Window>,
    /// Frames of code that was given up.
    code: Vec<Frames>,
}

static WINDOWS: Local<Windows> = Local::new();

pub(super) fn start() {
    WINDOWS.set(Windows::default());
}

/// Frees the frames of spare stacks and of code that was given up.
pub fn drop_spare() {
    let spare = core::mem::take(&mut WINDOWS.get().spare);
    spare.into_iter().for_each(Window::retire);
    let holds_code = !WINDOWS.get().code.is_empty();
    if holds_code {
        rebuild();
    }
}

/// Pages of spare stacks and of code that was given up.
pub(super) fn spare_pages() -> usize {
    let windows = WINDOWS.get();
    let stacks: usize = windows.spare.iter().map(|window| window.pages).sum();
    stacks + windows.code.iter().map(Frames::count).sum::<usize>()
}

impl Region {
    fn take(&mut self, kind: Kind) -> Option<u32> {
        self.clean.pop().or_else(|| {
            let index = self.next;
            (index < kind.count()).then(|| {
                self.next += 1;
                index as u32
            })
        })
    }
}

/// Has the host build the tables anew, without what was given up. What is mapped then was before, so there are tables
/// for it.
fn rebuild() {
    assert!(arch::rebuild(), "the host has lost page tables");
    let code = {
        let mut windows = WINDOWS.get();
        for region in &mut windows.regions {
            let retired = core::mem::take(&mut region.retired);
            region.clean.extend(retired);
        }
        core::mem::take(&mut windows.code)
    };
    drop(code);
}

/// Has the host map frames from `address` on; false when it has no page for another table. A piece is named before it
/// is noted in the frame table: a host to which the machine moves in between may have no tables for it either, and
/// knows what to leave out.
fn request(runs: &[Run], address: u64, flags: u64) -> bool {
    let mut pieces = [Run::default(); MAP_RANGES];
    let (mut count, mut frames, mut at) = (0, 0, address);
    let mut ask = |pieces: &[Run]| {
        let mut ranges = [MapRange::default(); MAP_RANGES];
        for (range, piece) in ranges.iter_mut().zip(pieces) {
            *range = MapRange { first: piece.first, count: piece.count };
        }
        arch::set_map(&ranges, pieces.len());
        for &piece in pieces {
            frames::note_mapped(piece, at, flags);
            at += u64::from(piece.count) * PAGE as u64;
        }
        arch::map()
    };
    for run in runs {
        let mut left = *run;
        while left.count > 0 {
            let take = left.count.min((MAP_FRAMES - frames) as u32);
            pieces[count] = Run { first: left.first, count: take };
            (count, frames) = (count + 1, frames + u64::from(take));
            left = Run { first: left.first + take, count: left.count - take };
            if count == MAP_RANGES || frames == MAP_FRAMES {
                if !ask(&pieces[..count]) {
                    return false;
                }
                (count, frames) = (0, 0);
            }
        }
    }
    count == 0 || ask(&pieces[..count])
}

fn unnote(frames: &Frames) {
    frames.runs().iter().copied().for_each(frames::note_unmapped);
}

/// Pages of a window that are mapped, in the order of their frames' runs.
struct Part {
    first_page: usize,
    frames: Frames,
}

/// A part of virtual space and the frames mapped in it; they are free again when it is dropped.
///
/// Whoever drops one must be sure that no code uses its addresses any more.
pub struct Window {
    kind: Kind,
    index: u32,
    parts: Vec<Part>,
    pages: usize,
}

impl Window {
    /// Reserves a window with nothing mapped; `None` when all are in use.
    pub fn reserve(kind: Kind) -> Option<Self> {
        let taken = WINDOWS.get().regions[kind as usize].take(kind);
        let index = match taken {
            Some(index) => index,
            None if WINDOWS.get().regions[kind as usize].retired.is_empty() => return None,
            None => {
                rebuild();
                WINDOWS.get().regions[kind as usize].take(kind)?
            }
        };
        Some(Self { kind, index, parts: Vec::new(), pages: 0 })
    }

    /// A stack with its highest `pages` pages mapped read-write, and all below absent. What it holds is not zero: it
    /// may have been another's.
    ///
    /// # Errors
    /// [`OutOfMemory`], also when there are no windows left.
    pub fn stack(pages: usize) -> Result<Self, OutOfMemory> {
        {
            let spare = &mut WINDOWS.get().spare;
            if let Some(at) = spare.iter().position(|window| window.pages == pages) {
                return Ok(spare.swap_remove(at));
            }
        }
        let mut window = Self::reserve(Kind::Stack).ok_or(OutOfMemory)?;
        window.map(window.bytes() / PAGE - pages, pages, Access::ReadWrite)?;
        Ok(window)
    }

    /// Its first address.
    pub const fn base(&self) -> usize {
        self.kind.first() as usize + self.index as usize * self.kind.bytes()
    }

    /// Bytes of virtual space.
    pub const fn bytes(&self) -> usize {
        self.kind.bytes()
    }

    /// Pages mapped.
    pub const fn mapped_pages(&self) -> usize {
        self.pages
    }

    /// Maps `pages` fresh frames, all zero, from page `first_page` on. Zeroing takes its time: ask for at most 256
    /// pages at once, and let others run in between.
    ///
    /// # Errors
    /// [`OutOfMemory`]; nothing is mapped then.
    ///
    /// # Panics
    /// When the pages lie outside the window, or one is mapped already, or executable where none may be.
    pub fn map(&mut self, first_page: usize, pages: usize, access: Access) -> Result<(), OutOfMemory> {
        self.map_frames(first_page, Frames::take(pages)?, access)
    }

    /// Maps `frames` from page `first_page` on.
    ///
    /// # Errors
    /// [`OutOfMemory`] when the host has no page for another table; nothing is mapped then.
    ///
    /// # Panics
    /// As [`Window::map`].
    pub fn map_frames(
        &mut self,
        first_page: usize,
        frames: Frames,
        access: Access,
    ) -> Result<(), OutOfMemory> {
        let pages = frames.count();
        let end = first_page.checked_add(pages).filter(|end| *end <= self.bytes() / PAGE);
        assert!(end.is_some(), "{pages} pages at {first_page} lie outside a window");
        assert!(access != Access::ReadExecute || self.kind == Kind::Code, "executable outside code");
        let free = |part: &Part| {
            part.first_page + part.frames.count() <= first_page || first_page + pages <= part.first_page
        };
        assert!(self.parts.iter().rev().all(free), "pages at {first_page} are mapped already");
        if pages == 0 {
            return Ok(());
        }
        let address = (self.base() + first_page * PAGE) as u64;
        if !request(frames.runs(), address, access.flags()) {
            // Those of retired windows come free when all are built anew: without what found no table, lest the host
            // leave something else out.
            unnote(&frames);
            rebuild();
            if !request(frames.runs(), address, access.flags()) {
                unnote(&frames);
                rebuild();
                return Err(OutOfMemory);
            }
        }
        self.parts.push(Part { first_page, frames });
        self.pages += pages;
        WINDOWS.get().pages += pages;
        Ok(())
    }

    /// Takes away what was mapped from page `first_page` on, which is the first of what one call has mapped. All
    /// windows' pages are touched anew after that.
    pub fn cut(&mut self, first_page: usize) {
        let parts = core::mem::take(&mut self.parts).into_iter();
        let (gone, kept): (Vec<Part>, Vec<Part>) = parts.partition(|part| part.first_page >= first_page);
        self.parts = kept;
        let pages: usize = gone.iter().map(|part| part.frames.count()).sum();
        if pages == 0 {
            return;
        }
        gone.iter().for_each(|part| unnote(&part.frames));
        self.pages -= pages;
        WINDOWS.get().pages -= pages;
        rebuild();
    }

    /// Fills mapped pages from byte `offset` on, through the kernel's own view of their frames: so executable ones
    /// too. Bytes for pages that are not mapped are left out.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(PAGE - at % PAGE));
            if let Some(page) = self.page_mut(at / PAGE) {
                page[at % PAGE..][..now.len()].copy_from_slice(now);
            }
            at += now.len();
            rest = later;
        }
    }

    fn page_mut(&mut self, page: usize) -> Option<&mut [u8; PAGE]> {
        self.parts.iter_mut().find_map(|part| {
            let index = page.checked_sub(part.first_page)?;
            part.frames.page_mut(index)
        })
    }
}

impl Window {
    /// Frees the frames and leaves the addresses to the next rebuild.
    fn retire(mut self) {
        self.give_up();
        // Nothing is left to do for the drop.
        core::mem::forget(self);
    }

    fn give_up(&mut self) {
        let parts = core::mem::take(&mut self.parts);
        parts.iter().for_each(|part| unnote(&part.frames));
        let mut windows = WINDOWS.get();
        windows.pages -= self.pages;
        let region = &mut windows.regions[self.kind as usize];
        if parts.is_empty() {
            region.clean.push(self.index);
        } else {
            region.retired.push(self.index);
        }
        let retired: usize = windows.regions.iter().map(|region| region.retired.len()).sum();
        let due = retired >= MANY_RETIRED && windows.pages <= FEW_PAGES;
        let parts = if self.kind == Kind::Code {
            windows.code.extend(parts.into_iter().map(|part| part.frames));
            Vec::new()
        } else {
            parts
        };
        drop(windows);
        drop(parts);
        if due {
            rebuild();
        }
    }

    /// Whether exactly the highest pages are mapped.
    fn is_plain_stack(&self) -> bool {
        let top = self.bytes() / PAGE;
        self.kind == Kind::Stack
            && matches!(self.parts.as_slice(), [part] if part.first_page + part.frames.count() == top)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let kept = self.is_plain_stack() && WINDOWS.get().spare.len() < SPARE_STACKS;
        if kept {
            let window = Self {
                kind: self.kind,
                index: self.index,
                parts: core::mem::take(&mut self.parts),
                pages: self.pages,
            };
            WINDOWS.get().spare.push(window);
        } else {
            self.give_up();
        }
    }
}

//! Page tables of the guest's windows: the VMM's own memory, filled as the guest's frame table says.
//!
//! The guest can neither read nor write them. It keeps a word for each page of its memory in its own memory
//! ([`abi::frame`]) and asks for frames to be mapped; each word is copied once and checked, and what no guest asks
//! for ends the machine. So tables are a pure function of the guest's memory: nothing of them is saved or sent, and a
//! machine restored elsewhere has them built there.
//!
//! Entries go from absent to present alone: where ring 0 is emulated, a change of a present one is never seen. To
//! change anything else, all is dropped and the slot is made anew ([`Tables::clear`], then a rebuild).
//!
//! Invariants: no page of a window is writable and executable, and a frame that is executable in one is not mapped
//! writable in another until all is dropped (the reverse is the guest's own care: a frame of a window that it has given
//! up may become code while that window's entries still stand); no page but those of the machine's memory is mapped; no
//! more than the slot's pages are used.

use std::io;

use kage_abi::{self as abi, BootPage, MapRange, frame, offset, window};
use vm_memory::{Bytes, GuestAddress};

use crate::{dirty::GuestMemory, sys::Words};

/// Entries of a table.
const ENTRIES: usize = 512;
const PAGE: u64 = abi::PAGE;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Why a frame is not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The slot's pages are used up; the guest is told.
    #[error("no page is left for another page table")]
    NoTable,
    /// A frame that is not there.
    #[error("the guest asked to map frame {0:#x}, which it has not")]
    Frame(u64),
    /// The frame table lies where no memory is.
    #[error("the guest's frame table at {0:#x} is not in its memory")]
    FrameTable(u64),
    /// More ranges or frames at once than the interface has.
    #[error("the guest asked to map {0} ranges or frames at once")]
    TooMany(u64),
    /// An entry that says what none may.
    #[error("the guest's frame {frame:#x} has the entry {entry:#x}, which none may have")]
    Entry {
        /// The frame.
        frame: u32,
        /// Its entry.
        entry: u64,
    },
    /// It is executable elsewhere.
    #[error("the guest mapped frame {frame:#x} writable at {address:#x}, which is mapped executable")]
    Code {
        /// The frame.
        frame: u32,
        /// The virtual page.
        address: u64,
    },
    /// The page is mapped to something else.
    #[error("the guest mapped frame {frame:#x} at {address:#x}, where another is")]
    Taken {
        /// The frame.
        frame: u32,
        /// The virtual page.
        address: u64,
    },
}

/// The slot's content.
#[derive(Debug)]
pub struct Tables {
    words: Words,
    memory_pages: u32,
    /// Pages in the slot.
    pages: usize,
    /// Pages in use, from the start; the root's fixed ones count always.
    used: usize,
    /// The last table of pages that was used: its number, and the address whose pages it holds.
    last: Option<(usize, u64)>,
    /// A bit for each frame: it is mapped executable.
    executable: Vec<u64>,
}

impl Tables {
    /// Empty tables for a machine of that much memory.
    ///
    /// # Errors
    /// Those of `mmap(2)`.
    pub fn new(memory_bytes: u64) -> io::Result<Self> {
        let pages = abi::table_pages(memory_bytes) as usize;
        let memory_pages = u32::try_from(memory_bytes / PAGE).unwrap_or(u32::MAX);
        Ok(Self {
            words: Words::new(pages * ENTRIES)?,
            memory_pages,
            pages,
            used: window::ROOT_ENTRIES as usize,
            last: None,
            executable: vec![0; memory_pages.div_ceil(64) as usize],
        })
    }

    /// Address in this process, for KVM's slot.
    pub fn address(&self) -> u64 {
        self.words.address()
    }

    /// Bytes of the slot.
    pub const fn bytes(&self) -> u64 {
        self.words.bytes() as u64
    }

    /// Forgets all mappings. The slot must be made anew around this.
    ///
    /// # Errors
    /// Those of `madvise(2)`.
    pub fn clear(&mut self) -> io::Result<()> {
        self.words.clear(self.used * ENTRIES)?;
        self.used = window::ROOT_ENTRIES as usize;
        self.last = None;
        self.executable.fill(0);
        Ok(())
    }

    /// Whether nothing was mapped since they were made or cleared.
    pub const fn is_empty(&self) -> bool {
        self.used == window::ROOT_ENTRIES as usize
    }

    /// Maps what the boot page asks for.
    ///
    /// # Errors
    /// [`MapError`]; what was mapped before it stays.
    pub fn map_requested(&mut self, memory: &GuestMemory) -> Result<(), MapError> {
        let ranges = self.requested(memory)?;
        let table = read_u64(memory, std::mem::offset_of!(BootPage, frame_table));
        ranges.iter().try_for_each(|&(first, count)| self.map_frames(memory, table, first, first + count))
    }

    /// The ranges that the boot page asks for, all of them of frames that are there.
    fn requested(&self, memory: &GuestMemory) -> Result<Vec<(u32, u32)>, MapError> {
        let count = read_u32(memory, std::mem::offset_of!(BootPage, map_count));
        if count as usize > abi::MAP_RANGES {
            return Err(MapError::TooMany(count.into()));
        }
        let mut bytes = [0; abi::MAP_RANGES * size_of::<MapRange>()];
        read(memory, boot(std::mem::offset_of!(BootPage, map)), &mut bytes);
        let words = bytes.chunks_exact(size_of::<MapRange>()).map(|bytes| bytes.split_at(4));
        let ranges: Vec<(u32, u32)> =
            words.take(count as usize).map(|(first, count)| (u32_of(first), u32_of(count))).collect();
        let mut frames = 0;
        for &(first, count) in &ranges {
            frames += u64::from(count);
            let end = u64::from(first) + u64::from(count);
            if end > u64::from(self.memory_pages) {
                return Err(MapError::Frame(end.saturating_sub(1)));
            }
        }
        if frames > abi::MAP_FRAMES {
            return Err(MapError::TooMany(frames));
        }
        Ok(ranges)
    }

    /// Maps all that the frame table holds. The tables must be empty.
    ///
    /// # Errors
    /// [`MapError`]; what was mapped before it stays.
    pub fn map_all(&mut self, memory: &GuestMemory) -> Result<(), MapError> {
        let table = read_u64(memory, std::mem::offset_of!(BootPage, frame_table));
        if table == 0 {
            return Ok(());
        }
        let first = read_u32(memory, std::mem::offset_of!(BootPage, first_frame));
        self.map_frames(memory, table, first.min(self.memory_pages), self.memory_pages)
    }

    /// The same without what the boot page asks for.
    ///
    /// # Errors
    /// [`MapError`]; what was mapped before it stays.
    pub fn map_all_but_requested(&mut self, memory: &GuestMemory) -> Result<(), MapError> {
        let table = read_u64(memory, std::mem::offset_of!(BootPage, frame_table));
        let first = read_u32(memory, std::mem::offset_of!(BootPage, first_frame));
        let mut ranges = self.requested(memory)?;
        ranges.sort_unstable();
        let mut at = first.min(self.memory_pages);
        for (first, count) in ranges {
            self.map_frames(memory, table, at, first)?;
            at = at.max(first + count);
        }
        self.map_frames(memory, table, at, self.memory_pages)
    }

    /// Maps those frames from `first` to `end` that the frame table at `table` says are mapped.
    fn map_frames(&mut self, memory: &GuestMemory, table: u64, first: u32, end: u32) -> Result<(), MapError> {
        let misplaced = MapError::FrameTable(table);
        if !table.is_multiple_of(8) {
            return Err(misplaced);
        }
        let mut bytes = [0; ENTRIES * 8];
        let mut at = first;
        while at < end {
            let count = (end - at).min(ENTRIES as u32);
            let bytes = &mut bytes[..count as usize * 8];
            let from = table.checked_add(u64::from(at) * 8).ok_or(misplaced)?;
            memory.read_slice(bytes, GuestAddress(from)).map_err(|_| misplaced)?;
            for (index, word) in bytes.chunks_exact(8).enumerate() {
                let entry = u64_of(word);
                if entry & frame::PRESENT != 0 {
                    self.map(at + index as u32, entry)?;
                }
            }
            at += count;
        }
        Ok(())
    }

    /// Maps one frame as its entry says.
    fn map(&mut self, number: u32, entry: u64) -> Result<(), MapError> {
        let refused = MapError::Entry { frame: number, entry };
        let address = entry & frame::ADDRESS;
        let flags = entry & !frame::ADDRESS;
        let (writable, executable) = (entry & frame::WRITABLE != 0, entry & frame::EXECUTABLE != 0);
        if flags & !(frame::PRESENT | frame::WRITABLE | frame::EXECUTABLE) != 0
            || !(window::FIRST..window::END).contains(&address)
            || (writable && executable)
            || (executable && address < window::CODE)
        {
            return Err(refused);
        }
        let (word, bit) = (number as usize / 64, 1 << (number % 64));
        let code = self.executable.get_mut(word).ok_or(MapError::Frame(number.into()))?;
        if writable && *code & bit != 0 {
            return Err(MapError::Code { frame: number, address });
        }
        if executable {
            *code |= bit;
        }
        let table = self.table(address)?;
        let index = table * ENTRIES + (address / PAGE) as usize % ENTRIES;
        let leaf = (abi::MEMORY + u64::from(number) * PAGE)
            | (PRESENT | USER | ACCESSED | DIRTY)
            | if writable { WRITABLE } else { 0 }
            | if executable { 0 } else { NO_EXECUTE };
        match self.words.get(index) {
            0 => self.words.set(index, leaf),
            there if there == leaf => {}
            _ => return Err(MapError::Taken { frame: number, address }),
        }
        Ok(())
    }

    /// The table with the entries of the pages around `address`, made if absent.
    fn table(&mut self, address: u64) -> Result<usize, MapError> {
        let around = address >> 21;
        if let Some((table, of)) = self.last
            && of == around
        {
            return Ok(table);
        }
        let mut table = ((address - window::FIRST) >> 39) as usize;
        for shift in [30, 21] {
            let index = table * ENTRIES + (address >> shift) as usize % ENTRIES;
            let entry = self.words.get(index);
            table = if entry == 0 {
                if self.used == self.pages {
                    return Err(MapError::NoTable);
                }
                let child = self.used;
                self.used += 1;
                let flags = PRESENT | WRITABLE | USER | ACCESSED;
                self.words.set(index, (abi::TABLES + child as u64 * PAGE) | flags);
                child
            } else {
                (((entry & ADDRESS) - abi::TABLES) / PAGE) as usize
            };
        }
        self.last = Some((table, around));
        Ok(table)
    }
}

fn boot(field: usize) -> u64 {
    abi::MEMORY + offset::BOOT + field as u64
}

/// The boot page lies in memory by construction; a failed read leaves zeros.
fn read(memory: &GuestMemory, at: u64, into: &mut [u8]) {
    let _ = memory.read_slice(into, GuestAddress(at));
}

fn u32_of(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte))
}

fn u64_of(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

fn read_u32(memory: &GuestMemory, field: usize) -> u32 {
    let mut bytes = [0; 4];
    read(memory, boot(field), &mut bytes);
    u32::from_le_bytes(bytes)
}

fn read_u64(memory: &GuestMemory, field: usize) -> u64 {
    let mut bytes = [0; 8];
    read(memory, boot(field), &mut bytes);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests;

//! A machine's page space as its daemon has it: memory mapped, the disk by its log and its worker.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, OnceLock, PoisonError, RwLock},
};

use kage_machine::{
    Geometry, Memory, Missing as _, PAGE_SIZE, PageBytes, PageIndex, PageSet,
    disk::{Block, Disk as _},
};
use rustix::fs::{SeekFrom, seek};

use super::{RemoteDisk, missing::Lack};
use crate::{disk::line::Content, sys::Mapping};

/// Memory and disk of one machine.
///
/// A page of memory that is missing is never touched through the mapping. Read, it is zeros, and counts as written once
/// it is here, so that whoever copies pages copies it again; written, it is brought.
pub(super) struct Pages {
    geometry: Geometry,
    memory: Mapping,
    memory_file: OwnedFd,
    lack: OnceLock<Arc<Lack>>,
    disk: RwLock<Option<Arc<RemoteDisk>>>,
}

impl Pages {
    pub(super) fn new(geometry: Geometry, memory: Mapping, memory_file: OwnedFd) -> Self {
        Self { geometry, memory, memory_file, lack: OnceLock::new(), disk: RwLock::new(None) }
    }

    pub(super) fn disk(&self) -> Option<Arc<RemoteDisk>> {
        self.disk.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_disk(&self, disk: Arc<RemoteDisk>) {
        *self.disk.write().unwrap_or_else(PoisonError::into_inner) = Some(disk);
    }

    /// What of the memory is missing, if anything ever was.
    pub(super) fn lack(&self) -> Option<&Arc<Lack>> {
        self.lack.get()
    }

    /// Notes what is missing; false when something was before.
    pub(super) fn set_lack(&self, lack: Arc<Lack>) -> bool {
        self.lack.set(lack).is_ok()
    }

    /// Makes a page of memory a hole.
    pub(super) fn punch(&self, page: PageIndex) -> std::io::Result<()> {
        self.memory.punch(page.0 as usize)
    }

    /// Whether a page that is about to be read is missing.
    fn lacks(&self, page: PageIndex) -> bool {
        self.lack().is_some_and(|lack| lack.note_read(page))
    }

    /// Brings a page that is missing; false when it was not, or nobody needs it any more.
    fn bring(&self, page: PageIndex, bytes: &PageBytes) -> bool {
        let lack = self.lack().filter(|lack| lack.is_missing(page));
        // What is to be in a process that is gone is nowhere.
        lack.is_some_and(|lack| lack.bring(page, bytes).unwrap_or(true))
    }

    /// Copies bytes of the memory out; those of missing pages are zeros.
    pub(super) fn read_bytes(&self, at: usize, into: &mut [u8]) {
        let Some(lack) = self.lack().filter(|lack| lack.is_short()) else {
            self.memory.read(at, into);
            return;
        };
        let mut at = at;
        let mut rest = into;
        while !rest.is_empty() {
            let (part, behind) = rest.split_at_mut(rest.len().min(PAGE_SIZE - at % PAGE_SIZE));
            if lack.is_missing(PageIndex(u32::try_from(at / PAGE_SIZE).unwrap_or(u32::MAX))) {
                part.fill(0);
            } else {
                self.memory.read(at, part);
            }
            at += part.len();
            rest = behind;
        }
    }

    /// Copies bytes into the memory.
    pub(super) fn write_bytes(&self, at: usize, bytes: &[u8]) {
        self.memory.write(at, bytes);
    }

    /// The disk's block that a page is; none of memory.
    fn place(&self, page: PageIndex) -> Option<u32> {
        page.0.checked_sub(self.geometry.memory_pages)
    }

    /// Changes a block of the disk.
    fn set(&self, block: u32, content: Content, bytes: Option<&PageBytes>) {
        if let Some(disk) = self.disk().filter(|_| block < self.geometry.disk_pages) {
            disk.set(block, content, bytes);
        }
    }
}

impl Memory for Pages {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read(&self, page: PageIndex, into: &mut PageBytes) {
        match self.place(page) {
            None if self.lacks(page) => into.fill(0),
            None => self.memory.read_page(page.0 as usize, into),
            Some(_) => {
                self.read_block(page, into);
            }
        }
    }

    fn write(&self, page: PageIndex, bytes: &PageBytes) {
        match self.place(page) {
            None if self.bring(page, bytes) => {}
            None => self.memory.write_page(page.0 as usize, bytes),
            Some(block) if *bytes == [0; PAGE_SIZE] => self.set(block, Content::Zeros, None),
            Some(block) => self.set(block, Content::Bytes, Some(bytes)),
        }
    }

    fn zero(&self, page: PageIndex) {
        match self.place(page) {
            None if self.bring(page, &[0; PAGE_SIZE]) => {}
            None if self.memory.punch(page.0 as usize).is_err() => {
                self.memory.write_page(page.0 as usize, &[0; PAGE_SIZE]);
            }
            None => {}
            Some(block) => self.set(block, Content::Zeros, None),
        }
    }

    fn populated(&self) -> PageSet {
        let mut set = PageSet::empty(self.geometry.pages());
        add_data(&self.memory_file, &mut set);
        if let Some(lack) = self.lack().filter(|lack| lack.is_short()) {
            set.union(&lack.left());
        }
        if let Some(disk) = self.disk() {
            let first = self.geometry.memory_pages;
            disk.populated(|block| {
                set.insert(PageIndex(first.saturating_add(block)));
            });
        }
        set
    }

    fn block(&self, page: PageIndex) -> Block {
        match (self.place(page), self.disk()) {
            (Some(block), Some(disk)) => disk.block(block),
            (Some(_), None) => Block::Zeros,
            (None, _) => {
                let mut bytes = [0; PAGE_SIZE];
                self.read(page, &mut bytes);
                Block::of(&bytes)
            }
        }
    }

    fn read_block(&self, page: PageIndex, into: &mut PageBytes) -> Block {
        match (self.place(page), self.disk()) {
            (Some(block), Some(disk)) => disk.read(block, into),
            (Some(_), None) => {
                into.fill(0);
                Block::Zeros
            }
            (None, _) => {
                self.read(page, into);
                Block::of(into)
            }
        }
    }

    fn leave_missing(&self, page: PageIndex, digest: u64) -> bool {
        let Some(block) = self.place(page).filter(|_| self.disk().is_some()) else { return false };
        self.set(block, Content::Elsewhere(digest), None);
        true
    }
}

/// Adds the pages of `file` that are no holes.
fn add_data(file: &OwnedFd, set: &mut PageSet) {
    let page = PAGE_SIZE as u64;
    let mut at = 0;
    while let Ok(data) = seek(file, SeekFrom::Data(at)) {
        let end = seek(file, SeekFrom::Hole(data)).unwrap_or(u64::MAX);
        for index in data / page..end.div_ceil(page) {
            let Ok(index) = u32::try_from(index) else { return };
            if !set.insert(PageIndex(index)) && index >= set.pages() {
                return;
            }
        }
        at = end;
    }
}

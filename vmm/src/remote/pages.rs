//! A machine's page space as its daemon has it: memory mapped, the disk by its log and its worker.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, PoisonError, RwLock},
};

use kage_machine::{
    Geometry, Memory, PAGE_SIZE, PageBytes, PageIndex, PageSet,
    disk::{Block, Disk as _},
};
use rustix::fs::{SeekFrom, seek};

use super::RemoteDisk;
use crate::{disk::line::Content, sys::Mapping};

/// Memory and disk of one machine.
pub(super) struct Pages {
    geometry: Geometry,
    memory: Mapping,
    memory_file: OwnedFd,
    disk: RwLock<Option<Arc<RemoteDisk>>>,
}

impl Pages {
    pub(super) fn new(geometry: Geometry, memory: Mapping, memory_file: OwnedFd) -> Self {
        Self { geometry, memory, memory_file, disk: RwLock::new(None) }
    }

    pub(super) fn disk(&self) -> Option<Arc<RemoteDisk>> {
        self.disk.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_disk(&self, disk: Arc<RemoteDisk>) {
        *self.disk.write().unwrap_or_else(PoisonError::into_inner) = Some(disk);
    }

    /// Copies bytes of the memory out.
    pub(super) fn read_bytes(&self, at: usize, into: &mut [u8]) {
        self.memory.read(at, into);
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
            None => self.memory.read_page(page.0 as usize, into),
            Some(_) => {
                self.read_block(page, into);
            }
        }
    }

    fn write(&self, page: PageIndex, bytes: &PageBytes) {
        match self.place(page) {
            None => self.memory.write_page(page.0 as usize, bytes),
            Some(block) if *bytes == [0; PAGE_SIZE] => self.set(block, Content::Zeros, None),
            Some(block) => self.set(block, Content::Bytes, Some(bytes)),
        }
    }

    fn zero(&self, page: PageIndex) {
        match self.place(page) {
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
                self.memory.read_page(page.0 as usize, into);
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

//! A plain memory and page contents for this crate's tests.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use kage_machine::{Geometry, Memory, PAGE_SIZE, PageBytes, PageIndex, PageSet, disk::Block};
use proptest::prelude::*;

pub(crate) struct TestMemory {
    geometry: Geometry,
    pages: Mutex<Vec<PageBytes>>,
    /// Blocks that are not here; what is in their place is not theirs.
    missing: Mutex<BTreeMap<u32, Option<u64>>>,
    /// Whether blocks may be left missing.
    pub(crate) leaves: bool,
    /// Blocks of the disk read.
    pub(crate) reads: AtomicU64,
}

impl TestMemory {
    pub(crate) fn new(memory_pages: u32, disk_pages: u32) -> Self {
        let geometry = Geometry { memory_pages, disk_pages };
        Self {
            geometry,
            pages: Mutex::new(vec![[0; PAGE_SIZE]; geometry.pages() as usize]),
            missing: Mutex::default(),
            leaves: true,
            reads: AtomicU64::new(0),
        }
    }

    /// What every block of the disk is.
    pub(crate) fn blocks(&self) -> Vec<Block> {
        let pages = self.geometry.memory_pages..self.geometry.pages();
        pages.map(|page| self.block(PageIndex(page))).collect()
    }

    /// Takes a block away.
    pub(crate) fn lose(&self, page: PageIndex, digest: Option<u64>) {
        self.missing.lock().unwrap().insert(page.0, digest);
    }

    /// Gives a missing block its bytes.
    pub(crate) fn fill(&self, page: PageIndex, bytes: &PageBytes) {
        self.write(page, bytes);
    }

    pub(crate) fn contents(&self) -> Vec<PageBytes> {
        self.pages.lock().unwrap().clone()
    }
}

impl Memory for TestMemory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read(&self, page: PageIndex, into: &mut PageBytes) {
        *into = self.pages.lock().unwrap().get(page.0 as usize).copied().unwrap_or([0; PAGE_SIZE]);
    }

    fn write(&self, page: PageIndex, bytes: &PageBytes) {
        if let Some(slot) = self.pages.lock().unwrap().get_mut(page.0 as usize) {
            *slot = *bytes;
        }
        self.missing.lock().unwrap().remove(&page.0);
    }

    fn zero(&self, page: PageIndex) {
        self.write(page, &[0; PAGE_SIZE]);
    }

    fn populated(&self) -> PageSet {
        let mut set = PageSet::empty(self.geometry.pages());
        for (index, page) in self.pages.lock().unwrap().iter().enumerate() {
            if page.iter().any(|&byte| byte != 0) {
                set.insert(PageIndex(index as u32));
            }
        }
        self.missing.lock().unwrap().keys().for_each(|&page| {
            set.insert(PageIndex(page));
        });
        set
    }

    fn block(&self, page: PageIndex) -> Block {
        if let Some(&digest) = self.missing.lock().unwrap().get(&page.0) {
            return Block::Missing(digest);
        }
        let mut bytes = [0; PAGE_SIZE];
        self.read(page, &mut bytes);
        Block::of(&bytes)
    }

    fn read_block(&self, page: PageIndex, into: &mut PageBytes) -> Block {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.read(page, into);
        self.block(page)
    }

    fn leave_missing(&self, page: PageIndex, digest: u64) -> bool {
        if self.leaves && self.block(page) != Block::Held(digest) {
            self.lose(page, Some(digest));
        }
        self.leaves
    }
}

/// Bytes that follow from a seed: zeros, one value, a short cycle, noise, noise and zeros.
pub(crate) fn content(shape: u8, seed: u64) -> PageBytes {
    let mut state = seed | 1;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    match shape % 5 {
        0 => [0; PAGE_SIZE],
        1 => [seed as u8; PAGE_SIZE],
        2 => std::array::from_fn(|at| (at as u64 % (1 + seed % 97)) as u8),
        3 => std::array::from_fn(|_| noise()),
        _ => std::array::from_fn(|at| if at % 1024 < 512 { noise() } else { 0 }),
    }
}

pub(crate) fn page() -> impl Strategy<Value = PageBytes> {
    (any::<u8>(), any::<u64>()).prop_map(|(shape, seed)| content(shape, seed))
}

//! Pages: the unit in which a machine's state is tracked, sent and stored.
//!
//! A machine has one flat page space: first its read-write memory, then its disk, both in units of
//! 4 KiB. The read-only base (kernel, constants) is not part of it: every host builds the same.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// The bytes of one page.
pub type PageBytes = [u8; PAGE_SIZE];

/// Number of a page in a machine's flat page space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageIndex(pub u32);

impl fmt::Debug for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

/// How many pages a machine has, and of which kind: `[0, memory)` is memory, `[memory, memory + disk)` disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Pages of read-write memory.
    pub memory_pages: u32,
    /// 4 KiB blocks of disk.
    pub disk_pages: u32,
}

/// Why a geometry is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Outside what the guest's memory map carries.
    #[error("memory of {bytes} bytes is refused; choose between 16MiB and 2GiB, a multiple of 2MiB")]
    Memory {
        /// The size asked for.
        bytes: u64,
    },
    /// Larger than a page index carries.
    #[error("disk of {bytes} bytes is refused; choose a multiple of 4KiB up to 2GiB")]
    Disk {
        /// The size asked for.
        bytes: u64,
    },
}

impl Geometry {
    /// Smallest memory in bytes.
    pub const MIN_MEMORY: u64 = 16 << 20;
    /// Largest memory in bytes.
    pub const MAX_MEMORY: u64 = 2 << 30;
    /// Largest disk in bytes.
    pub const MAX_DISK: u64 = 2 << 30;

    /// Checks sizes in bytes.
    ///
    /// # Errors
    /// [`GeometryError`] names the size at fault and the limits.
    pub fn from_bytes(memory: u64, disk: u64) -> Result<Self, GeometryError> {
        if !(Self::MIN_MEMORY..=Self::MAX_MEMORY).contains(&memory) || !memory.is_multiple_of(2 << 20) {
            return Err(GeometryError::Memory { bytes: memory });
        }
        if disk > Self::MAX_DISK || !disk.is_multiple_of(PAGE_SIZE as u64) {
            return Err(GeometryError::Disk { bytes: disk });
        }
        let pages = |bytes: u64| (bytes / PAGE_SIZE as u64) as u32;
        Ok(Self { memory_pages: pages(memory), disk_pages: pages(disk) })
    }

    /// Pages in all.
    #[must_use]
    pub const fn pages(self) -> u32 {
        self.memory_pages + self.disk_pages
    }

    /// Bytes of memory.
    #[must_use]
    pub const fn memory_bytes(self) -> u64 {
        self.memory_pages as u64 * PAGE_SIZE as u64
    }

    /// Bytes of disk.
    #[must_use]
    pub const fn disk_bytes(self) -> u64 {
        self.disk_pages as u64 * PAGE_SIZE as u64
    }
}

/// A set of pages out of `[0, pages)`, as a bitmap.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageSet {
    pages: u32,
    words: Vec<u64>,
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} of {})", self.len(), self.pages)
    }
}

impl PageSet {
    /// The empty set over `[0, pages)`.
    #[must_use]
    pub fn empty(pages: u32) -> Self {
        Self { pages, words: vec![0; (pages as usize).div_ceil(64)] }
    }

    /// All of `[0, pages)`.
    #[must_use]
    pub fn full(pages: u32) -> Self {
        let mut set = Self { pages, words: vec![u64::MAX; (pages as usize).div_ceil(64)] };
        set.trim();
        set
    }

    /// Takes bitmap words as they came from a kernel or a peer; bits beyond `pages` are dropped,
    /// missing words are empty.
    #[must_use]
    pub fn from_words(pages: u32, mut words: Vec<u64>) -> Self {
        words.resize((pages as usize).div_ceil(64), 0);
        let mut set = Self { pages, words };
        set.trim();
        set
    }

    /// Whether the words fit the declared size: what a peer sent must be checked before use.
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        let mut copy = self.clone();
        copy.trim();
        self.words.len() == (self.pages as usize).div_ceil(64) && copy.words == self.words
    }

    fn trim(&mut self) {
        let used = self.pages % 64;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }

    /// The bitmap, least significant bit first.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The size of the page space the set is over.
    #[must_use]
    pub const fn pages(&self) -> u32 {
        self.pages
    }

    /// Adds a page; one outside the space is ignored. Returns whether it was new.
    pub fn insert(&mut self, page: PageIndex) -> bool {
        if page.0 >= self.pages {
            return false;
        }
        let (word, bit) = (page.0 as usize / 64, 1u64 << (page.0 % 64));
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        new
    }

    /// Removes a page; returns whether it was there.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        let had = self.contains(page);
        if had {
            self.words[page.0 as usize / 64] &= !(1u64 << (page.0 % 64));
        }
        had
    }

    /// Whether the page is in the set.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && self.words[page.0 as usize / 64] & (1u64 << (page.0 % 64)) != 0
    }

    /// Adds all pages of `other`.
    pub fn union(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        self.trim();
    }

    /// Removes all pages of `other`.
    pub fn subtract(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }

    /// Empties the set and returns what it held.
    #[must_use]
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::empty(self.pages))
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            let mut left = word;
            std::iter::from_fn(move || {
                if left == 0 {
                    return None;
                }
                let bit = left.trailing_zeros();
                left &= left - 1;
                Some(PageIndex(index as u32 * 64 + bit))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn page_set_agrees_with_an_ordered_set(pages in 1u32..300, ops in prop::collection::vec((any::<bool>(), 0u32..320), 0..200)) {
            let mut set = PageSet::empty(pages);
            let mut model = BTreeSet::new();
            for (add, page) in ops {
                if add {
                    prop_assert_eq!(set.insert(PageIndex(page)), page < pages && model.insert(page));
                } else {
                    prop_assert_eq!(set.remove(PageIndex(page)), model.remove(&page));
                }
            }
            prop_assert_eq!(set.iter().map(|page| page.0).collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len() as usize, model.len());
            prop_assert!(set.is_well_formed());
        }
    }

    #[test]
    fn sizes_outside_the_limits_are_refused() {
        for memory in [0, 1 << 10, 1 << 40, (64 << 20) + 4096] {
            assert!(Geometry::from_bytes(memory, 0).is_err(), "{memory}");
        }
        assert_eq!(Geometry::from_bytes(64 << 20, 1 << 20).unwrap().pages(), 16384 + 256);
    }

    #[test]
    fn a_full_set_has_no_bit_beyond_its_end() {
        assert_eq!(PageSet::full(70).len(), 70);
        assert!(PageSet::from_words(3, vec![u64::MAX; 9]).is_well_formed());
    }
}

//! Digests of pages, and of all pages a replica holds.
//!
//! A page's digest is XXH3-128 with its index as the seed; a zero page's is 0. In memory it is over the
//! page's bytes, on the disk over the block's own digest ([`kage_machine::disk::block_digest`]): so it is
//! known of blocks that are held at both ends or missing without reading them.
//!
//! The digest of a whole replica is the sum of its pages' digests modulo 2^128, so it follows every
//! write at the cost of one page and a fresh, all-zero replica has digest 0. Sender and receiver
//! keep one table each, computed from the bytes they sent and the bytes they applied; the end of
//! every epoch compares the sums, and so *everything* held, not only that epoch.
//!
//! It finds our own errors (a codec, a lost or misplaced page); peers are kept honest by TLS and
//! the directory's record. A guest that made two pages of its own collide could only keep its own
//! older page. So neither a cryptographic hash nor a tree is needed; BLAKE3 took 3.2 µs a page at
//! either end where this takes 0.6, on the same machine, more than all the rest of moving a page.

use kage_machine::{Geometry, PageBytes, PageIndex, disk::Block};
use twox_hash::XxHash3_128;

/// The block digest of zeros.
const BLOCK_OF_ZEROS: u64 = 0x93d7_6fe1_48c6_89ba;

/// Whether a page is a block of the disk.
pub(crate) const fn is_block(geometry: Geometry, page: PageIndex) -> bool {
    page.0 >= geometry.memory_pages && page.0 < geometry.pages()
}

/// Digest of one page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageDigest(u128);

impl PageDigest {
    /// Of a page of zeros.
    pub const ZERO: Self = Self(0);

    /// Of a page of which it is only known that it is another: no page is taken for it.
    pub(crate) const OTHER: Self = Self(u128::MAX);

    /// Of a page of memory.
    #[must_use]
    pub fn of(index: PageIndex, bytes: &PageBytes) -> Self {
        if is_zero(bytes) { Self::ZERO } else { Self::of_non_zero(index, bytes) }
    }

    /// Of a page of memory known not to be zero.
    #[must_use]
    pub fn of_non_zero(index: PageIndex, bytes: &PageBytes) -> Self {
        // A digest of 0 means a page of zeros.
        Self(XxHash3_128::oneshot_with_seed(u64::from(index.0), bytes).max(1))
    }

    /// Of a page of the disk by the digest of its block.
    #[must_use]
    pub fn of_block_digest(index: PageIndex, digest: u64) -> Self {
        if digest == BLOCK_OF_ZEROS {
            return Self::ZERO;
        }
        Self(XxHash3_128::oneshot_with_seed(u64::from(index.0), &digest.to_le_bytes()).max(1))
    }

    /// Of a page of the disk; none where its block is not known.
    #[must_use]
    pub fn of_block(index: PageIndex, block: Block) -> Option<Self> {
        match block {
            Block::Zeros => Some(Self::ZERO),
            Block::Held(digest) | Block::Missing(Some(digest)) => Some(Self::of_block_digest(index, digest)),
            Block::Missing(None) => None,
        }
    }

    /// Its bytes.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// Half of it: enough to tell whether two hosts hold the same page.
    #[must_use]
    pub const fn half(self) -> u64 {
        self.0 as u64
    }

    /// Whether it is a page of zeros.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }
}

/// Whether a page is all zeros. About 60 ns for a zero page, a few for most others.
#[must_use]
pub fn is_zero(bytes: &PageBytes) -> bool {
    // Blocks of 128 bytes without a branch within, which compilers turn into vector code.
    bytes.chunks_exact(128).all(|block| block.iter().fold(0, |seen, byte| seen | byte) == 0)
}

/// Digests of all pages of one replica.
#[derive(Clone)]
pub struct DigestTable {
    // Zeroed memory of the allocator: pages of a large disk that were never sent cost nothing.
    pages: Vec<u128>,
    sum: u128,
}

impl std::fmt::Debug for DigestTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DigestTable({:032x} over {} pages)", self.sum, self.pages.len())
    }
}

impl DigestTable {
    /// Of a replica that is all zeros.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self { pages: vec![0; geometry.pages() as usize], sum: 0 }
    }

    /// The page's digest; of one outside the geometry, that of zeros.
    #[must_use]
    pub fn get(&self, page: PageIndex) -> PageDigest {
        PageDigest(self.pages.get(page.0 as usize).copied().unwrap_or(0))
    }

    /// Records what the page holds now; ignored outside the geometry.
    pub fn set(&mut self, page: PageIndex, digest: PageDigest) {
        if let Some(slot) = self.pages.get_mut(page.0 as usize) {
            self.sum = self.sum.wrapping_sub(*slot).wrapping_add(digest.0);
            *slot = digest.0;
        }
    }

    /// Digest of everything held.
    #[must_use]
    pub const fn sum(&self) -> u128 {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use kage_machine::{PAGE_SIZE, disk::block_digest};

    use super::*;

    const GEOMETRY: Geometry = Geometry { memory_pages: 8, disk_pages: 2 };

    #[test]
    fn equal_bytes_elsewhere_have_another_digest() {
        let bytes = [7; PAGE_SIZE];
        assert_ne!(PageDigest::of(PageIndex(1), &bytes), PageDigest::of(PageIndex(2), &bytes));
        assert_eq!(PageDigest::of(PageIndex(1), &[0; PAGE_SIZE]), PageDigest::ZERO);
    }

    #[test]
    fn a_block_is_known_by_its_digest_held_or_missing() {
        let (page, digest) = (PageIndex(8), block_digest(&[7; PAGE_SIZE]));
        let held = PageDigest::of_block(page, Block::Held(digest));
        assert_eq!(held, PageDigest::of_block(page, Block::Missing(Some(digest))));
        assert_ne!(held, PageDigest::of_block(PageIndex(9), Block::Held(digest)));
        assert_eq!(PageDigest::of_block(page, Block::Missing(None)), None);
        // Zeros that somebody wrote are zeros.
        assert_eq!(block_digest(&[0; PAGE_SIZE]), BLOCK_OF_ZEROS);
        for block in [Block::Zeros, Block::Held(BLOCK_OF_ZEROS), Block::Missing(Some(BLOCK_OF_ZEROS))] {
            assert_eq!(PageDigest::of_block(page, block), Some(PageDigest::ZERO));
        }
    }

    #[test]
    fn blocks_are_those_behind_the_memory() {
        let blocks: Vec<_> = (0..12).filter(|&page| is_block(GEOMETRY, PageIndex(page))).collect();
        assert_eq!(blocks, [8, 9]);
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        for byte in 0..PAGE_SIZE {
            let mut bytes = [0; PAGE_SIZE];
            bytes[byte] = 0x80;
            assert!(!is_zero(&bytes));
        }
        assert!(is_zero(&[0; PAGE_SIZE]));
    }

    #[test]
    fn the_sum_depends_on_what_is_held_not_on_how_it_came() {
        let (mut one, mut other) = (DigestTable::new(GEOMETRY), DigestTable::new(GEOMETRY));
        let digest = |page, byte| PageDigest::of(PageIndex(page), &[byte; PAGE_SIZE]);
        one.set(PageIndex(1), digest(1, 3));
        one.set(PageIndex(1), digest(1, 4));
        one.set(PageIndex(9), digest(9, 5));
        one.set(PageIndex(10), digest(10, 5));
        other.set(PageIndex(9), digest(9, 5));
        assert_ne!(one.sum(), other.sum());
        other.set(PageIndex(1), digest(1, 4));
        assert_eq!(one.sum(), other.sum());
        for page in [1, 9] {
            one.set(PageIndex(page), PageDigest::ZERO);
        }
        assert_eq!(one.sum(), 0);
    }
}

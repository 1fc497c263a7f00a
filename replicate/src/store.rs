//! Replicas on disk or in memory of this host.
//!
//! A [`Mirror`] is kept nearly fresh, page by page: every page has the epoch it was last written
//! in, pages known to be older than their owner's are *stale*, and what is missing is known in
//! bytes. A mirror has no consistency and is never promoted as it is; at a handover the last epoch
//! makes it whole.
//!
//! Blocks of the disk that an earlier stay left here are kept: what is *held* of them is said to the owner
//! ([`Mirror::have`]), which sends only what differs. A block that the owner misses too stays missing here.
//!
//! Invariant: the digest table describes the mirror's memory byte for byte, and its disk block by block, as
//! long as nothing else writes them. [`Mirror::scrub`] checks that.
//!
//! Deliberately not here: checkpoints (a copy of one whole epoch, applied atomically).

use std::sync::Arc;

use kage_machine::{
    Epoch, Geometry, Memory, PAGE_SIZE, PageBytes, PageIndex, PageSet,
    disk::{Block, block_digest},
};
use kage_wire::{Have, Held};

use crate::digest::{DigestTable, PageDigest, is_block};

/// Why a page cannot be left missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElsewhereError {
    /// Memory, or outside the machine.
    #[error("{0:?} is no block of the disk, so it cannot be at another host")]
    NoBlock(PageIndex),
    /// The disk here has no place for that.
    #[error("{0:?} is at another host, and this host's disk cannot leave a block out")]
    Refused(PageIndex),
}

/// A copy of a machine's pages, each with its version.
pub struct Mirror {
    memory: Arc<dyn Memory>,
    geometry: Geometry,
    digests: DigestTable,
    // Zeroed memory of the allocator: pages never written cost nothing.
    versions: Vec<u64>,
    stale: PageSet,
    epoch: Epoch,
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mirror")
            .field("epoch", &self.epoch)
            .field("digests", &self.digests)
            .field("missing_bytes", &self.missing_bytes())
            .finish_non_exhaustive()
    }
}

impl Mirror {
    /// A mirror in `memory`. Its pages are made zeros: a shell from a pool may hold those of the template it
    /// was warmed with. Blocks held of its disk are kept; missing ones are made zeros, since the owner
    /// names them again where they are still the disk's.
    #[must_use]
    pub fn new(memory: Arc<dyn Memory>) -> Self {
        let geometry = memory.geometry();
        let mut digests = DigestTable::new(geometry);
        for page in memory.populated().iter() {
            let block = if is_block(geometry, page) { memory.block(page) } else { Block::Missing(None) };
            match block {
                Block::Zeros => {}
                Block::Held(digest) => digests.set(page, PageDigest::of_block_digest(page, digest)),
                Block::Missing(_) => memory.zero(page),
            }
        }
        Self {
            geometry,
            digests,
            versions: vec![0; geometry.pages() as usize],
            stale: PageSet::empty(geometry.pages()),
            epoch: Epoch(0),
            memory,
        }
    }

    /// Another stream begins: its epochs count from the start.
    pub fn begin_anew(&mut self) {
        self.versions = vec![0; self.geometry.pages() as usize];
        self.epoch = Epoch(0);
    }

    /// Sizes of the page space.
    #[must_use]
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The epoch of the latest write.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The epoch in which the page was last written; 0 for never.
    #[must_use]
    pub fn version(&self, page: PageIndex) -> Epoch {
        Epoch(self.versions.get(page.0 as usize).copied().unwrap_or(0))
    }

    /// Digest of everything held.
    #[must_use]
    pub const fn digest(&self) -> u128 {
        self.digests.sum()
    }

    /// What is held.
    #[must_use]
    pub fn held(&self) -> Held {
        let pages = (0..self.geometry.memory_pages).map(PageIndex);
        let pages = pages.map(|page| (page, self.digests.get(page))).filter(|(_, digest)| !digest.is_zero());
        Held { disk: self.have(), memory: Have::of(pages.map(|(page, digest)| (page.0, digest.half()))) }
    }

    /// Which blocks of the disk are held.
    #[must_use]
    pub fn have(&self) -> Have {
        let blocks = (0..self.geometry.disk_pages).map(|block| (block, self.page_of(block)));
        Have::of(blocks.filter_map(|(block, page)| {
            if self.digests.get(page).is_zero() {
                return None;
            }
            match self.memory.block(page) {
                Block::Held(digest) => Some((block, digest)),
                Block::Zeros | Block::Missing(_) => None,
            }
        }))
    }

    const fn page_of(&self, block: u32) -> PageIndex {
        PageIndex(self.geometry.memory_pages + block)
    }

    /// What is held, page by page, for whoever goes on from here.
    #[must_use]
    pub fn into_digests(self) -> DigestTable {
        self.digests
    }

    /// Pages that are older than their owner's.
    #[must_use]
    pub const fn stale(&self) -> &PageSet {
        &self.stale
    }

    /// Bytes to be sent before the mirror is fresh.
    #[must_use]
    pub fn missing_bytes(&self) -> u64 {
        u64::from(self.stale.len()) * PAGE_SIZE as u64
    }

    /// The owner has written these pages since; as said by it at a switch or on the way.
    pub fn mark_stale(&mut self, pages: &PageSet) {
        self.stale.union(pages);
    }

    /// A page as it is held; zeros outside the geometry.
    #[must_use]
    pub fn read(&self, page: PageIndex) -> PageBytes {
        let mut bytes = [0; PAGE_SIZE];
        self.memory.read(page, &mut bytes);
        bytes
    }

    /// Writes a page of an epoch. Returns whether the page lies within the geometry; one that does
    /// not changes nothing.
    #[must_use]
    pub fn write(&mut self, epoch: Epoch, page: PageIndex, bytes: &PageBytes) -> bool {
        if !self.touch(epoch, page) {
            return false;
        }
        let digest = if is_block(self.geometry, page) {
            PageDigest::of_block_digest(page, block_digest(bytes))
        } else {
            PageDigest::of(page, bytes)
        };
        self.digests.set(page, digest);
        self.memory.write(page, bytes);
        true
    }

    /// Makes a page of an epoch zero; returns as [`Self::write`].
    #[must_use]
    pub fn zero(&mut self, epoch: Epoch, page: PageIndex) -> bool {
        if !self.touch(epoch, page) {
            return false;
        }
        self.digests.set(page, PageDigest::ZERO);
        self.memory.zero(page);
        true
    }

    /// Notes that a page of an epoch is a block with this digest, which its owner does not have. It is kept
    /// where it is held here, and otherwise left missing.
    ///
    /// # Errors
    /// [`ElsewhereError`]; nothing is changed.
    pub fn elsewhere(&mut self, epoch: Epoch, page: PageIndex, digest: u64) -> Result<(), ElsewhereError> {
        if !is_block(self.geometry, page) {
            return Err(ElsewhereError::NoBlock(page));
        }
        if self.memory.block(page) != Block::Held(digest) && !self.memory.leave_missing(page, digest) {
            return Err(ElsewhereError::Refused(page));
        }
        self.digests.set(page, PageDigest::of_block_digest(page, digest));
        let _inside = self.touch(epoch, page);
        Ok(())
    }

    fn touch(&mut self, epoch: Epoch, page: PageIndex) -> bool {
        let Some(version) = self.versions.get_mut(page.0 as usize) else { return false };
        *version = epoch.0;
        self.epoch = self.epoch.max(epoch);
        self.stale.remove(page);
        true
    }

    /// Reads everything that is held again and returns the pages that are not what the digests say.
    #[must_use]
    pub fn scrub(&self) -> PageSet {
        let mut wrong = PageSet::empty(self.geometry.pages());
        for page in (0..self.geometry.pages()).map(PageIndex) {
            let found = if is_block(self.geometry, page) {
                self.scrub_block(page)
            } else {
                Some(PageDigest::of(page, &self.read(page)))
            };
            if found != Some(self.digests.get(page)) {
                wrong.insert(page);
            }
        }
        wrong
    }

    /// The digest of a page of the disk; none of one that is not known, or held and damaged.
    fn scrub_block(&self, page: PageIndex) -> Option<PageDigest> {
        let said = self.memory.block(page);
        let mut bytes = [0; PAGE_SIZE];
        match (said, self.memory.read_block(page, &mut bytes)) {
            (Block::Held(_), Block::Held(_)) => Some(PageDigest::of_block_digest(page, block_digest(&bytes))),
            (Block::Held(_), Block::Missing(_)) => None,
            (Block::Zeros | Block::Missing(_) | Block::Held(_), found) => PageDigest::of_block(page, found),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMemory;

    #[test]
    fn a_mirror_starts_from_zeros_whatever_its_shell_held() {
        let memory = Arc::new(TestMemory::new(16, 4));
        memory.write(PageIndex(3), &[9; PAGE_SIZE]);
        let mirror = Mirror::new(memory.clone());
        assert!(memory.populated().is_empty());
        assert_eq!(mirror.digest(), 0);
        assert!(mirror.scrub().is_empty());
    }

    #[test]
    fn versions_staleness_and_digest_follow_writes() {
        let memory = Arc::new(TestMemory::new(16, 4));
        let mut mirror = Mirror::new(memory.clone());
        let mut stale = PageSet::empty(20);
        stale.insert(PageIndex(3));
        stale.insert(PageIndex(18));
        mirror.mark_stale(&stale);
        assert_eq!(mirror.missing_bytes(), 2 * 4096);
        assert!(mirror.write(Epoch(4), PageIndex(3), &[1; PAGE_SIZE]));
        assert!(mirror.zero(Epoch(5), PageIndex(18)));
        assert_eq!(mirror.missing_bytes(), 0);
        assert_eq!((mirror.version(PageIndex(3)), mirror.version(PageIndex(18))), (Epoch(4), Epoch(5)));
        assert_eq!(mirror.epoch(), Epoch(5));
        assert_ne!(mirror.digest(), 0);
        assert!(!mirror.write(Epoch(6), PageIndex(20), &[1; PAGE_SIZE]));
        assert_eq!(mirror.epoch(), Epoch(5));
    }

    #[test]
    fn scrubbing_names_the_page_another_hand_wrote() {
        let memory = Arc::new(TestMemory::new(16, 4));
        let mut mirror = Mirror::new(memory.clone());
        assert!(mirror.write(Epoch(1), PageIndex(3), &[1; PAGE_SIZE]));
        memory.write(PageIndex(7), &[1; PAGE_SIZE]);
        assert_eq!(mirror.scrub().iter().collect::<Vec<_>>(), [PageIndex(7)]);
    }
}

//! Disks: what hosts begin with, what is pulled from host to host, and what may not be lost.

use super::*;

impl Sim {
    /// The first owner has just come by the image: one host has all of its disk, the owner some, and the third host
    /// what an earlier stay left.
    pub(crate) fn fill_disks(&mut self) {
        for block in 0..GEOMETRY.disk_pages {
            let (whole, other) = (self.random_block(), self.random_block());
            let junk = self.random.next();
            let [owner, stale, origin] = [0, 1, 2].map(|host: usize| self.hosts[host].disk.clone());
            origin.write(block, &whole);
            match (self.random.below(4), Block::of(&whole)) {
                (0 | 1, Block::Held(digest)) => owner.leave_missing(block, Some(digest)),
                (2, _) => owner.write(block, &other),
                _ => owner.write(block, &whole),
            }
            match self.random.below(4) {
                0 => stale.leave_missing(block, Some(junk)),
                1 => stale.write(block, &other),
                2 => stale.write(block, &whole),
                _ => {}
            }
        }
    }

    fn random_block(&mut self) -> PageBytes {
        if self.random.chance(25) {
            return [0; PAGE_SIZE];
        }
        let word = self.random.next().to_le_bytes();
        std::array::from_fn(|at| word[at % 8])
    }

    /// The host that holds a block of that digest.
    fn holder(&self, block: u32, digest: u64) -> Option<usize> {
        (0..HOSTS).find(|&host| self.hosts[host].disk.block(block) == Block::Held(digest))
    }

    /// Pulls one block that is missing here from where it is.
    pub(crate) fn pull(&mut self, host: usize) {
        let block = self.random.below(GEOMETRY.disk_pages.into()) as u32;
        let disk = self.hosts[host].disk.clone();
        let Block::Missing(Some(digest)) = disk.block(block) else { return };
        if let Some(from) = self.holder(block, digest) {
            let mut bytes = [0; PAGE_SIZE];
            self.hosts[from].disk.read(block, &mut bytes);
            assert_eq!(block_digest(&bytes), digest);
            assert!(disk.fill(block, &bytes));
            self.note(|| format!("host {host} pulls block {block} from {from}"));
        }
    }

    /// Whatever a host misses of the disk is held by another.
    pub(crate) fn check_missing(&self, host: usize) {
        for (block, state) in self.hosts[host].disk.blocks().into_iter().enumerate() {
            if let Block::Missing(digest) = state {
                let digest = digest.expect("a block that nobody knows");
                assert!(self.holder(block as u32, digest).is_some(), "block {block} of host {host} is lost");
            }
        }
    }
}

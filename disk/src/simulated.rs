//! A medium in memory that loses power.
//!
//! Until a sync, each sector of a write may reach the medium or not, in any order: a cut keeps for every
//! sector one of its versions since the last sync, drawn from a seed. The operation during which the
//! power goes fails halfway, and so do all behind it, until [`SimulatedDisk::power_on`].

use std::{
    collections::BTreeMap,
    io::{self, IoSlice},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{Backing, SECTOR_BYTES};

/// Numbers that look random and follow from a seed alone (SplitMix64).
#[derive(Debug, Clone)]
pub struct Seeded(u64);

impl Seeded {
    /// Numbers of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`; 0 where that is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next_number().checked_rem(limit).unwrap_or(0)
    }
}

/// What an unsynced sector may be found as after a cut.
type Versions = Vec<[u8; SECTOR_BYTES]>;

#[derive(Debug, Default)]
struct Medium {
    /// What reads see.
    bytes: Vec<u8>,
    /// Sectors written since the last sync: the synced version first, then each later one.
    unsynced: BTreeMap<usize, Versions>,
    operations: u64,
    cut_at: Option<u64>,
    off: bool,
    syncs_fail: bool,
}

impl Medium {
    /// Counts an operation; true when the power goes during this one.
    fn operation(&mut self) -> io::Result<bool> {
        if self.off {
            return Err(io::Error::other("no power"));
        }
        self.operations += 1;
        if self.cut_at.is_some_and(|cut| self.operations >= cut) {
            self.off = true;
        }
        Ok(self.off)
    }

    fn sector(&self, sector: usize) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        if let Some(found) = self.bytes.get(sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES) {
            bytes.copy_from_slice(found);
        }
        bytes
    }

    fn overwrite(&mut self, at: usize, bytes: &[u8]) {
        let end = (at + bytes.len()).next_multiple_of(SECTOR_BYTES);
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        let sectors = at / SECTOR_BYTES..end / SECTOR_BYTES;
        for sector in sectors.clone() {
            let before = self.sector(sector);
            self.unsynced.entry(sector).or_insert_with(|| vec![before]);
        }
        if let Some(to) = self.bytes.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(bytes);
        }
        for sector in sectors {
            let now = self.sector(sector);
            self.unsynced.entry(sector).or_default().push(now);
        }
    }
}

/// A medium in memory that loses power on demand. Clones are the same medium.
#[derive(Debug, Clone, Default)]
pub struct SimulatedDisk(Arc<Mutex<Medium>>);

impl SimulatedDisk {
    /// An empty medium.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn medium(&self) -> MutexGuard<'_, Medium> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Operations so far: writes, syncs, punches.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.medium().operations
    }

    /// Lets the power go during the `count`-th operation from now (1 is the next).
    pub fn cut_power_after(&self, count: u64) {
        let mut medium = self.medium();
        medium.cut_at = Some(medium.operations + count);
    }

    /// Lets every sync fail from now on, or no longer.
    pub fn fail_syncs(&self, fail: bool) {
        self.medium().syncs_fail = fail;
    }

    /// Brings the power back: of every sector written since the last sync one version is found, by `seed`.
    ///
    /// One seed in four keeps only synced bytes, one in four keeps everything, the others mix.
    pub fn power_on(&self, seed: u64) {
        let mut random = Seeded::new(seed);
        let manner = random.below(4);
        let mut medium = self.medium();
        for (sector, versions) in std::mem::take(&mut medium.unsynced) {
            let last = versions.len() as u64 - 1;
            let pick = match manner {
                0 => 0,
                1 => last,
                2 => random.below(last + 1),
                // Nearly everything arrived: the cases in which one hole decides.
                _ if random.below(16) == 0 => random.below(last + 1),
                _ => last,
            };
            let Some(version) = versions.get(usize::try_from(pick).unwrap_or(0)) else { continue };
            if let Some(to) = medium.bytes.get_mut(sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES) {
                to.copy_from_slice(version);
            }
        }
        medium.off = false;
        medium.cut_at = None;
    }

    /// Flips bits of one byte, as a failing medium would, synced or not.
    pub fn corrupt(&self, at: u64, mask: u8) {
        let mut medium = self.medium();
        if let Some(byte) = usize::try_from(at).ok().and_then(|at| medium.bytes.get_mut(at)) {
            *byte ^= mask;
        }
    }
}

impl Backing for SimulatedDisk {
    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let medium = self.medium();
        if medium.off {
            return Err(io::Error::other("no power"));
        }
        let at = usize::try_from(at).map_err(io::Error::other)?;
        let there = medium.bytes.get(at..).unwrap_or_default();
        let there = there.get(..into.len()).unwrap_or(there);
        let (found, behind) = into.split_at_mut(there.len());
        found.copy_from_slice(there);
        behind.fill(0);
        Ok(())
    }

    fn write_at(&self, at: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let at = usize::try_from(at).map_err(io::Error::other)?;
        let bytes = parts.iter().flat_map(|part| part.iter().copied()).collect::<Vec<_>>();
        let mut medium = self.medium();
        let cut = medium.operation()?;
        medium.overwrite(at, &bytes);
        if cut { Err(io::Error::other("the power went")) } else { Ok(()) }
    }

    fn sync(&self) -> io::Result<()> {
        let mut medium = self.medium();
        if medium.operation()? || medium.syncs_fail {
            return Err(io::Error::other("the sync failed"));
        }
        medium.unsynced.clear();
        Ok(())
    }

    fn punch(&self, at: u64, length: u64) -> io::Result<()> {
        let zeros = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        self.write_at(at, &[IoSlice::new(&zeros)])
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.medium().bytes.len() as u64)
    }
}

//! A disk with files: what of it is in use, and what is to be written by the next commit.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    vec,
    vec::Vec,
};
use core::time::Duration;

use super::{
    format::{FIRST_RECORD, Key, PathHash, Super},
    records::Records,
    space::Space,
    store::Number,
    wait::Waiters,
};
use crate::virtio::block::BLOCK;

/// Free metadata blocks that new files leave to changes of old ones.
const RECORDS_KEPT: usize = 4;
/// Bytes of items that surely find room in a free metadata block: one larger than half of it may leave the rest empty.
const RECORD_HOLDS: usize = 2000;
/// Inodes that wait to be written before a commit begins by itself; taking a snapshot of one costs less than 1 µs.
const MOST_NODES: usize = 256;

/// Whether something can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It can.
    Yes,
    /// After a commit it may.
    Wait,
    /// The disk is full.
    No,
}

/// Something of the image that was removed.
#[derive(Clone, Copy, Debug)]
pub struct Removed {
    /// Index of its VID.
    pub index: Number,
    /// The metadata block that says so; 0 = none yet.
    pub home: u32,
}

/// Commits: each has a number, and holds everything that was done before it began.
#[derive(Default)]
pub struct Commits {
    /// The last one that began.
    pub begun: u64,
    /// The last one that succeeded.
    pub done: u64,
    /// The last one that failed.
    pub failed: u64,
    /// One is wanted at once, up to this number.
    pub wanted: u64,
    /// When the oldest change was made that no commit has begun to write.
    pub since: Option<Duration>,
    /// How many failed in a row.
    pub failures: u32,
    /// Where the task that commits waits.
    pub waker: Waiters,
}

impl Commits {
    /// Whether one has begun and has not ended.
    pub fn is_under_way(&self) -> bool {
        self.begun > self.done.max(self.failed)
    }
}

/// The disk.
pub struct Volume {
    /// Its superblock as of the last commit.
    pub superblock: Super,
    /// The superblock's second copy is behind in what matters.
    pub both: bool,
    /// Blocks in use.
    pub space: Space,
    /// Metadata blocks.
    pub records: Records,
    /// What of the image was removed.
    pub removed: BTreeMap<PathHash, Removed>,
    /// Inodes whose items changed.
    pub nodes: BTreeSet<Number>,
    /// Groups of files whose items changed.
    pub groups: BTreeSet<(Number, u32)>,
    /// Chunks with changed blocks.
    pub chunks: BTreeSet<(Number, u64)>,
    /// Files of the image that were changed, and are to be copied.
    pub copies: BTreeSet<Number>,
    /// Removals that are not on the disk yet.
    pub removals: BTreeSet<PathHash>,
    /// Items that are to go.
    pub gone: Vec<(u32, Key)>,
    /// Blocks that become free with the commit after the next snapshot.
    pub freed: Vec<(u32, u32)>,
    /// Blocks of changed data that have no place on the disk yet.
    pub reserved: u32,
    /// Blocks freed and not to be used yet.
    pub quarantined: u32,
    /// Changed blocks in memory, those of a commit under way not counted.
    pub dirty: u32,
    /// Most of them before writers wait.
    pub most_dirty: u32,
    /// Bytes of items that are new or grow, at most.
    pub growth: usize,
    /// Commits.
    pub commits: Commits,
    /// A block of zeros.
    pub zeros: Rc<Vec<u8>>,
    /// Metadata blocks that could not be read: whatever they held is lost.
    pub lost: Vec<u32>,
}

impl Volume {
    /// A disk of which nothing is known but its superblock.
    pub fn new(superblock: Super, most_dirty: u32) -> Self {
        Self {
            space: Space::new(u32::try_from(superblock.blocks).unwrap_or(u32::MAX)),
            records: Records::new(superblock.identity),
            superblock,
            both: true,
            removed: BTreeMap::new(),
            nodes: BTreeSet::new(),
            groups: BTreeSet::new(),
            chunks: BTreeSet::new(),
            copies: BTreeSet::new(),
            removals: BTreeSet::new(),
            gone: Vec::new(),
            freed: Vec::new(),
            reserved: 0,
            quarantined: 0,
            dirty: 0,
            most_dirty,
            growth: 0,
            commits: Commits::default(),
            zeros: Rc::new(vec![0; BLOCK]),
            lost: Vec::new(),
        }
    }

    /// Whether a commit has anything to write.
    pub fn is_dirty(&self) -> bool {
        !(self.nodes.is_empty()
            && self.groups.is_empty()
            && self.chunks.is_empty()
            && self.copies.is_empty()
            && self.removals.is_empty()
            && self.gone.is_empty()
            && self.freed.is_empty()
            && !self.records.is_changed())
    }

    /// Whether a commit is under way, or has anything to write: memory may become free by it.
    pub fn is_busy(&self) -> bool {
        self.is_dirty() || self.commits.is_under_way()
    }

    /// Notes a change that a commit is to write before long.
    pub fn changed(&mut self) {
        let commits = &mut self.commits;
        if commits.since.is_none() {
            commits.since = Some(crate::time::now());
            commits.waker.wake();
        }
        if self.dirty >= self.most_dirty / 2 || self.nodes.len() + self.gone.len() >= MOST_NODES {
            self.want();
        }
    }

    /// Has a commit begin as soon as none is under way.
    pub fn want(&mut self) {
        let next = self.commits.begun + 1;
        if self.commits.wanted < next {
            self.commits.wanted = next;
            self.commits.waker.wake();
        }
    }

    /// Notes an inode whose item changed, and grew to `grown` bytes if that is not 0.
    pub fn mark(&mut self, number: Number, grown: usize) {
        self.nodes.insert(number);
        self.growth += grown;
        self.changed();
    }

    /// Whether there is room for items of so many bytes more. Takes another area for metadata if it must.
    pub fn has_room_for_items(&mut self, bytes: usize) -> bool {
        let wanted = self.growth + bytes;
        while self.records.empty().saturating_sub(RECORDS_KEPT) * RECORD_HOLDS < wanted {
            if !self.add_area() {
                return false;
            }
        }
        true
    }

    /// Takes an area for metadata.
    pub fn add_area(&mut self) -> bool {
        // What was promised to data is not taken.
        let area_blocks = self.superblock.area_blocks;
        if self.space.free().saturating_sub(self.reserved) < area_blocks {
            return false;
        }
        let Some(start) = self.space.take_aligned(area_blocks) else { return false };
        if !self.superblock.add(start / area_blocks) {
            self.space.release(start, area_blocks);
            return false;
        }
        for number in start.max(FIRST_RECORD)..start + area_blocks {
            self.records.add_empty(number);
        }
        self.both = true;
        true
    }

    /// Whether there is room for `blocks` of data more and items of `bytes`.
    pub fn room(&mut self, blocks: u32, bytes: usize) -> Room {
        let taken = u64::from(self.reserved) + u64::from(blocks);
        if taken > u64::from(self.space.free()) {
            return if taken <= u64::from(self.space.free()) + u64::from(self.quarantined) {
                Room::Wait
            } else {
                Room::No
            };
        }
        if self.has_room_for_items(bytes) {
            Room::Yes
        } else if self.growth > 0 || self.quarantined > 0 {
            Room::Wait
        } else {
            Room::No
        }
    }

    /// Frees blocks once a commit has forgotten them.
    pub fn free(&mut self, start: u32, count: u32) {
        self.quarantined += count;
        self.freed.push((start, count));
    }

    /// Bytes in use, and how many there are. What is not yet free again counts as free.
    pub fn usage(&self) -> (u64, u64) {
        let blocks = u64::from(self.space.blocks());
        let used = blocks - u64::from(self.space.free()) - u64::from(self.quarantined);
        let used = used + u64::from(self.reserved);
        (used * BLOCK as u64, blocks * BLOCK as u64)
    }
}

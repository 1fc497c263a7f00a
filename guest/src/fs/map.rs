//! Where a file's blocks lie on the disk: runs, in groups of 1 MiB of the file.
//!
//! A group is what is written to the disk as one, so a change in a large file rewrites little.

use alloc::vec::Vec;

/// Blocks of a file in a group.
pub const GROUP: u64 = 256;

/// Blocks that lie one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First block on the disk.
    pub block: u32,
    /// First block in the group.
    pub start: u16,
    /// How many.
    pub count: u16,
}

/// A group of a file that has blocks, or had some when it was last written.
#[derive(Debug, Default)]
pub struct Group {
    /// Its number in the file.
    pub number: u32,
    /// The metadata block that holds it; 0 = none yet.
    pub home: u32,
    /// In order, without overlaps.
    pub runs: Vec<Run>,
}

/// The blocks of a file.
#[derive(Debug, Default)]
pub struct Map {
    groups: Vec<Group>,
}

/// The group of a block of a file, and the place in it.
pub const fn place(at: u64) -> (u32, u16) {
    ((at / GROUP) as u32, (at % GROUP) as u16)
}

impl Map {
    fn index(&self, number: u32) -> Result<usize, usize> {
        self.groups.binary_search_by_key(&number, |group| group.number)
    }

    /// A group.
    pub fn group(&self, number: u32) -> Option<&Group> {
        self.groups.get(self.index(number).ok()?)
    }

    /// A group.
    pub fn group_mut(&mut self, number: u32) -> Option<&mut Group> {
        let index = self.index(number).ok()?;
        self.groups.get_mut(index)
    }

    /// All groups.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// All groups.
    pub fn groups_mut(&mut self) -> &mut [Group] {
        &mut self.groups
    }

    /// Forgets a group.
    pub fn forget(&mut self, number: u32) {
        if let Ok(index) = self.index(number) {
            self.groups.remove(index);
        }
    }

    /// Puts a group in place of one of its number; false when there is one.
    pub fn insert(&mut self, group: Group) -> bool {
        match self.index(group.number) {
            Ok(_) => false,
            Err(index) => {
                if self.groups.is_empty() {
                    self.groups.reserve_exact(1);
                }
                self.groups.insert(index, group);
                true
            }
        }
    }

    /// Where block `at` of the file lies.
    pub fn get(&self, at: u64) -> Option<u32> {
        let (number, place) = place(at);
        let runs = &self.group(number)?.runs;
        let index = runs.partition_point(|run| run.start <= place).checked_sub(1)?;
        let run = runs.get(index)?;
        let inside = place - run.start;
        (inside < run.count).then(|| run.block + u32::from(inside))
    }

    /// Says where block `at` of the file lies, which lay nowhere.
    pub fn set(&mut self, at: u64, block: u32) {
        let (number, place) = place(at);
        let index = match self.index(number) {
            Ok(index) => index,
            Err(index) => {
                if self.groups.is_empty() {
                    self.groups.reserve_exact(1);
                }
                self.groups.insert(index, Group { number, home: 0, runs: Vec::with_capacity(1) });
                index
            }
        };
        let Some(group) = self.groups.get_mut(index) else { return };
        let next = group.runs.partition_point(|run| run.start <= place);
        let joins = |run: &Run| {
            run.start + run.count == place && run.block.checked_add(run.count.into()) == Some(block)
        };
        match next.checked_sub(1).and_then(|before| group.runs.get_mut(before)) {
            Some(run) if joins(run) => run.count += 1,
            _ => group.runs.insert(next, Run { block, start: place, count: 1 }),
        }
    }

    /// Cuts off all blocks from `at` on; `freed` hears of runs on the disk, `touched` of groups that changed.
    pub fn cut(&mut self, at: u64, mut freed: impl FnMut(u32, u32), mut touched: impl FnMut(u32)) {
        let (number, place) = place(at);
        let from = self.groups.partition_point(|group| group.number < number);
        for group in self.groups.get_mut(from..).unwrap_or_default() {
            let keep = if group.number == number { place } else { 0 };
            let mut changed = false;
            group.runs.retain_mut(|run| {
                if run.start + run.count <= keep {
                    return true;
                }
                let kept = keep.saturating_sub(run.start);
                freed(run.block + u32::from(kept), u32::from(run.count - kept));
                run.count = kept;
                changed = true;
                kept > 0
            });
            if changed {
                touched(group.number);
            }
        }
    }

    /// Blocks it has on the disk.
    pub fn blocks(&self) -> u64 {
        self.groups.iter().flat_map(|group| &group.runs).map(|run| u64::from(run.count)).sum()
    }
}

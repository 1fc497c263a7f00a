//! The metadata blocks in memory, as they lie on the disk or will after the next commit.
//!
//! They change only when a commit takes its snapshot, so what a commit writes stays as it is while others go on.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    vec,
    vec::Vec,
};

use super::format::{self, HEADER, Key};
use crate::virtio::block::BLOCK;

struct Record {
    block: Rc<Vec<u8>>,
    used: usize,
}

/// All metadata blocks.
pub struct Records {
    identity: u64,
    blocks: BTreeMap<u32, Record>,
    /// Blocks that hold something, by their room.
    rooms: BTreeSet<(usize, u32)>,
    empty: BTreeSet<u32>,
    changed: BTreeSet<u32>,
}

/// Where an item of that name lies.
fn find(record: &Record, key: Key) -> Option<(usize, usize)> {
    let mut items = format::items(&record.block, record.used).filter_map(Result::ok);
    items.find(|item| item.key == key).map(|item| (item.at, item.length))
}

impl Records {
    /// Those of a disk; none yet.
    pub const fn new(identity: u64) -> Self {
        Self {
            identity,
            blocks: BTreeMap::new(),
            rooms: BTreeSet::new(),
            empty: BTreeSet::new(),
            changed: BTreeSet::new(),
        }
    }

    /// Adds a free block.
    pub fn add_empty(&mut self, number: u32) {
        self.empty.insert(number);
    }

    /// Adds a block as it was read; its items end at `used`.
    pub fn add(&mut self, number: u32, block: Vec<u8>, used: usize) {
        self.rooms.insert((BLOCK - used, number));
        self.blocks.insert(number, Record { block: Rc::new(block), used });
    }

    /// Free blocks.
    pub fn empty(&self) -> usize {
        self.empty.len()
    }

    /// Blocks that hold something.
    pub fn full(&self) -> usize {
        self.blocks.len()
    }

    /// Whether anything changed since the last commit.
    pub fn is_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Numbers and items of all blocks.
    pub fn items(&self) -> impl Iterator<Item = (u32, Result<format::Item<'_>, format::FormatError>)> {
        self.blocks.iter().flat_map(|(&number, record)| {
            format::items(&record.block, record.used).map(move |item| (number, item))
        })
    }

    /// A block as it is or will be on the disk; `None` for one that is free.
    pub fn block(&self, number: u32) -> Option<&[u8]> {
        self.blocks.get(&number).map(|record| record.block.as_slice())
    }

    /// Puts an item in place of the one of its name, which lies in block `home` if that is not 0; returns where it
    /// lies from now on, best in block `near`, or `None` when there is no room.
    pub fn put(&mut self, home: u32, near: u32, key: Key, item: &[u8]) -> Option<u32> {
        if let Some(record) = self.blocks.get_mut(&home)
            && let Some((at, length)) = find(record, key)
            && length == item.len()
        {
            // What does not change need not be written.
            if record.block.get(at..at + length) != Some(item) {
                if let Some(old) = Rc::make_mut(&mut record.block).get_mut(at..at + length) {
                    old.copy_from_slice(item);
                }
                self.changed.insert(home);
            }
            return Some(home);
        }
        self.remove(home, key);
        let fits = |record: &Record| BLOCK - record.used >= item.len();
        let wanted = [home, near].into_iter().find(|number| self.blocks.get(number).is_some_and(fits));
        let number = match wanted {
            Some(number) => number,
            None => match self.rooms.range((item.len(), 0)..).next() {
                Some(&(_, number)) => number,
                None => self.begin()?,
            },
        };
        let record = self.blocks.get_mut(&number)?;
        self.rooms.remove(&(BLOCK - record.used, number));
        let end = record.used + item.len();
        Rc::make_mut(&mut record.block).get_mut(record.used..end)?.copy_from_slice(item);
        record.used = end;
        self.rooms.insert((BLOCK - end, number));
        self.changed.insert(number);
        Some(number)
    }

    /// Takes a free block into use.
    fn begin(&mut self) -> Option<u32> {
        let number = self.empty.pop_first()?;
        self.add(number, vec![0; BLOCK], HEADER);
        Some(number)
    }

    /// Removes an item, which lies in block `home` if that is not 0.
    pub fn remove(&mut self, home: u32, key: Key) {
        let Some(record) = self.blocks.get_mut(&home) else { return };
        let Some((at, length)) = find(record, key) else { return };
        self.rooms.remove(&(BLOCK - record.used, home));
        self.changed.insert(home);
        let used = record.used;
        record.used -= length;
        if record.used == HEADER {
            self.blocks.remove(&home);
            self.empty.insert(home);
            return;
        }
        let block = Rc::make_mut(&mut record.block);
        block.copy_within((at + length).min(used)..used, at);
        if let Some(rest) = block.get_mut(used - length..used) {
            rest.fill(0);
        }
        self.rooms.insert((BLOCK - (used - length), home));
    }

    /// Blocks that changed, sealed; `None` for one that is free now.
    pub fn take_changed(&mut self) -> Vec<(u32, Option<Rc<Vec<u8>>>)> {
        let numbers = core::mem::take(&mut self.changed);
        let sealed = numbers.into_iter().map(|number| {
            let record = self.blocks.get_mut(&number);
            let block = record.map(|record| {
                let image: &mut Vec<u8> = Rc::make_mut(&mut record.block);
                format::seal(image, record.used, number, self.identity);
                Rc::clone(&record.block)
            });
            (number, block)
        });
        sealed.collect()
    }

    /// Notes blocks that could not be written.
    pub fn changed_again(&mut self, numbers: impl Iterator<Item = u32>) {
        self.changed.extend(numbers);
    }
}

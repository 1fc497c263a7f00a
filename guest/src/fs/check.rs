//! Whether everything fits together, and what to do when it does not.

use alloc::{collections::BTreeMap, format, string::String, vec::Vec};

use super::{
    FILES,
    content::{CHUNK_BLOCKS, blocks},
    format::{FIRST_RECORD, Key},
    map,
    space::Space,
    tree::{Body, Tree},
    volume::Volume,
};
use crate::{
    executor, heap,
    virtio::block::{self, BLOCK, MOST_BLOCKS},
};

/// What is wrong is told up to here.
const TOLD: usize = 100;
/// Reading and comparing a block, in estimated nanoseconds.
const BLOCK_COST: u64 = 1_000;

/// What is wrong, one line each; nothing if all is well. With `deep`, every block of every file is read.
pub async fn check(deep: bool) -> Vec<String> {
    super::ready().await;
    let mut wrong = {
        let tree = FILES.get();
        let mut wrong = Vec::new();
        tree.check_names(&mut wrong);
        tree.check_space(&mut wrong);
        tree.check_items(&mut wrong);
        if let Some(reason) = &tree.store.read_only {
            wrong.push(format!("read-only: {reason}"));
        }
        if let Some(volume) = &tree.store.volume {
            let torn = tree.store.contents.iter().filter(|(_, content)| content.torn);
            wrong.extend(torn.map(|(&number, _)| {
                let path = tree.path(number).unwrap_or_else(|| format!("inode {number:x}"));
                format!("{path}: some of it is lost")
            }));
            wrong.extend(volume.lost.iter().map(|block| format!("metadata block {block} is damaged")));
        }
        wrong
    };
    check_records(&mut wrong).await;
    if deep {
        check_data(&mut wrong).await;
    }
    wrong.truncate(TOLD);
    wrong
}

impl Tree {
    /// Inodes.
    pub fn inodes(&self) -> usize {
        self.nodes.len()
    }

    /// Names of inodes and entries of directories.
    fn check_names(&self, wrong: &mut Vec<String>) {
        let (mut names, mut entries) = (0, 0);
        for (&number, node) in &self.nodes {
            names += node.names.len();
            for (parent, name) in &node.names {
                if self.find(*parent, name) != Ok(Some(number)) {
                    wrong.push(format!("inode {number:x} is not in directory {parent:x} as {name}"));
                }
            }
            if let Body::Directory(directory) = &node.body {
                entries += directory.names.len();
                if node.names.len() > 1 {
                    wrong.push(format!("directory {number:x} has {} names", node.names.len()));
                }
            }
            if self.is_named(number) && self.path(number).is_none() {
                wrong.push(format!("no path leads to inode {number:x}"));
            }
            let is_file = matches!(node.body, Body::File);
            if is_file != self.store.contents.contains_key(&number) {
                wrong.push(format!("inode {number:x} and its content do not fit"));
            }
        }
        if names != entries || entries != self.names {
            wrong.push(format!("{names} names, {entries} entries, {} counted", self.names));
        }
        if let Some(number) = self.store.contents.keys().find(|number| !self.nodes.contains_key(number)) {
            wrong.push(format!("content {number:x} belongs to no inode"));
        }
    }

    /// Blocks in use, and what is counted of changed ones.
    fn check_space(&self, wrong: &mut Vec<String>) {
        let Some(volume) = &self.store.volume else { return };
        let mut space = Space::new(volume.space.blocks());
        let area = volume.superblock.area_blocks;
        let areas = volume.superblock.record_areas().map(|number| (number * area, area));
        let owned = areas.map(|(start, count)| (0, start, count)).chain(self.store.contents.iter().flat_map(
            |(&number, content)| {
                let runs = content.map.groups().iter().flat_map(|group| &group.runs);
                runs.map(move |run| (number, run.block, u32::from(run.count)))
            },
        ));
        for (number, start, count) in owned {
            if !space.claim(start, count) {
                wrong.push(format!("blocks {start} and on of inode {number:x} are not its own"));
            }
        }
        // Those of a commit under way are not listed; they count as quarantined.
        let derived = space.free();
        let counted = volume.space.free() + volume.quarantined;
        if derived != counted {
            wrong.push(format!("{derived} blocks are free, {counted} counted"));
        }
        let (mut dirty, mut reserved) = (0, 0);
        for content in self.store.contents.values() {
            reserved += content.copy_blocks;
            for (number, chunk) in content.all_chunks() {
                dirty += chunk.dirty.count_ones();
                let first = number * CHUNK_BLOCKS as u64;
                let unplaced = blocks(chunk.dirty).filter(|&at| content.map.get(first + at as u64).is_none());
                reserved += unplaced.count() as u32;
                if chunk.dirty & !chunk.present != 0 {
                    wrong.push(format!("chunk {number} is to be written and not there"));
                }
            }
        }
        if (dirty, reserved) != (volume.dirty, volume.reserved) {
            let counted = (volume.dirty, volume.reserved);
            wrong.push(format!("{dirty} blocks changed, {reserved} without a place; counted {counted:?}"));
        }
    }

    /// Items of metadata blocks, against what they are to hold.
    fn check_items(&self, wrong: &mut Vec<String>) {
        let Some(volume) = &self.store.volume else { return };
        let mut homes = BTreeMap::new();
        for (home, item) in volume.records.items() {
            match item {
                Ok(item) => {
                    if homes.insert(item.key, (home, item.content)).is_some() {
                        wrong.push(format!("{:?} is there twice", item.key));
                    }
                }
                Err(_) => wrong.push(format!("metadata block {home} holds what is no item")),
            }
        }
        let mut expected = Vec::new();
        for &number in self.nodes.keys() {
            let Some((node, home)) = self.record(number).filter(|(_, home)| *home != 0) else { continue };
            let mut item = Vec::new();
            if !volume.nodes.contains(&number) {
                node.encode(&mut item);
            }
            expected.push((Key::node(number), home, item));
        }
        for removed in volume.removed.values().filter(|removed| removed.home != 0) {
            expected.push((Key::node(removed.index), removed.home, Vec::new()));
        }
        for (&number, content) in &self.store.contents {
            for group in content.map.groups().iter().filter(|group| group.home != 0) {
                let key = Key::map(number, group.number);
                let mut item = Vec::new();
                if !volume.groups.contains(&(number, group.number)) {
                    super::format::encode_runs(&mut item, key, &group.runs);
                }
                expected.push((key, group.home, item));
            }
        }
        for &(home, key) in &volume.gone {
            expected.push((key, home, Vec::new()));
        }
        for (key, home, item) in expected {
            match homes.remove(&key) {
                None => wrong.push(format!("{key:?} is not in metadata block {home}")),
                Some((at, _)) if at != home => {
                    wrong.push(format!("{key:?} is in metadata block {at}, not in {home}"));
                }
                Some((_, content)) => {
                    if item
                        .get(item.len().saturating_sub(content.len())..)
                        .is_some_and(|item| !item.is_empty() && item != content)
                    {
                        wrong.push(format!("{key:?} is not as it was written"));
                    }
                }
            }
        }
        wrong.extend(homes.keys().map(|key| format!("{key:?} belongs to nothing")));
    }

    /// Whether a metadata block was read as it is known, or is known to be lost; `None` while anything is under way.
    fn matches(&self, number: u32, read: Option<&[u8]>) -> Option<bool> {
        let volume = self.store.volume.as_ref().filter(|volume| !volume.is_busy())?;
        let same = match (read, volume.records.block(number)) {
            (None, _) => false,
            (Some(read), Some(known)) => read == known,
            (Some(read), None) => read.iter().all(|&byte| byte == 0),
        };
        Some(same || volume.lost.contains(&number))
    }

    /// Has everything written anew, without what is lost.
    pub fn repair(&mut self) -> bool {
        let Some(volume) = &mut self.store.volume else { return false };
        if self.store.read_only.take().is_none() {
            return true;
        }
        let old = &volume.superblock;
        let area = old.area_blocks;
        let mut fresh = Volume::new(old.clone(), volume.most_dirty);
        for start in old.record_areas().map(|number| number * area) {
            fresh.space.claim(start, area);
            for number in start.max(FIRST_RECORD)..start + area {
                fresh.records.add_empty(number);
            }
            fresh.records.changed_again(start.max(FIRST_RECORD)..start + area);
        }
        fresh.commits = core::mem::take(&mut volume.commits);
        fresh.removed = core::mem::take(&mut volume.removed);
        for (hash, removed) in &mut fresh.removed {
            removed.home = 0;
            fresh.removals.insert(*hash);
        }
        fresh.growth = fresh.removed.len() * super::format::node_bytes([].into_iter(), 0);
        for (&number, content) in &mut self.store.contents {
            content.torn = false;
            fresh.reserved += content.copy_blocks;
            if content.copy_blocks > 0 {
                fresh.copies.insert(number);
            }
            for group in content.map.groups_mut() {
                group.home = 0;
                fresh.groups.insert((number, group.number));
                fresh.growth += super::format::runs_bytes(group.runs.len());
                group.runs.iter().for_each(|run| {
                    fresh.space.claim(run.block, run.count.into());
                });
            }
            let map = &content.map;
            for (chunk, own) in content.all_chunks().filter(|(_, own)| own.dirty | own.frozen != 0) {
                fresh.dirty += own.dirty.count_ones();
                fresh.chunks.insert((number, chunk));
                let first = chunk * CHUNK_BLOCKS as u64;
                fresh.reserved +=
                    blocks(own.dirty).filter(|&at| map.get(first + at as u64).is_none()).count() as u32;
            }
        }
        *volume = fresh;
        let numbers: Vec<_> = self.nodes.keys().copied().collect();
        for number in numbers {
            self.set_home(number, 0);
            let bytes = self.item_bytes(number, None);
            if let Some(volume) = &mut self.store.volume {
                volume.mark(number, bytes);
            }
        }
        if let Some(volume) = &mut self.store.volume {
            // There was room before; where there is none now, the commit says so.
            let _ = volume.has_room_for_items(0);
            volume.want();
        }
        true
    }
}

/// Metadata blocks on the disk, against those in memory. Nothing may be under way.
async fn check_records(wrong: &mut Vec<String>) {
    let areas: Vec<(u32, u32)> = {
        let tree = FILES.get();
        let Some(volume) = tree.store.volume.as_ref().filter(|volume| !volume.is_busy()) else { return };
        let area = volume.superblock.area_blocks;
        volume.superblock.record_areas().map(|number| (number * area, area)).collect()
    };
    for number in areas.into_iter().flat_map(|(start, count)| start.max(FIRST_RECORD)..start + count) {
        let read = block::read(number.into(), Vec::from([heap::buffer(BLOCK)])).await;
        let read = read.ok().and_then(|mut buffers| buffers.pop());
        let known = FILES.get().matches(number, read.as_deref());
        match known {
            None => return,
            Some(true) => {}
            Some(false) => wrong.push(format!("metadata block {number} is not as it was written")),
        }
        executor::work(BLOCK_COST).await;
    }
}

/// Whether every block of every file can be read.
async fn check_data(wrong: &mut Vec<String>) {
    let numbers: Vec<u64> = FILES.get().store.contents.keys().copied().collect();
    for number in numbers {
        let mut from = 0;
        loop {
            // Looked up anew each time: files change meanwhile.
            let next = {
                let tree = FILES.get();
                let Some(content) = tree.store.contents.get(&number) else { break };
                let groups = content.map.groups().iter();
                let runs = groups.flat_map(|group| {
                    let first = u64::from(group.number) * map::GROUP;
                    group.runs.iter().map(move |run| (first + u64::from(run.start), run.block, run.count))
                });
                let mut runs = runs.filter(|(at, ..)| *at >= from);
                runs.next()
            };
            let Some((at, block, count)) = next else { break };
            let count = usize::from(count).min(MOST_BLOCKS);
            from = at + 1;
            if block::read(block.into(), Vec::from([heap::buffer(count * BLOCK)])).await.is_err() {
                for index in 0..count {
                    let block = u64::from(block) + index as u64;
                    if block::read(block, Vec::from([heap::buffer(BLOCK)])).await.is_err() {
                        let path = FILES.get().path(number);
                        let path = path.unwrap_or_else(|| format!("inode {number:x}"));
                        let offset = (at + index as u64) * BLOCK as u64;
                        wrong.push(format!(
                            "{path}: offset {offset} cannot be read, block {block} of the disk"
                        ));
                    }
                }
            }
            executor::work(BLOCK_COST * count as u64).await;
        }
    }
}

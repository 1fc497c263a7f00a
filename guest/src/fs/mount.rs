//! From the disk's metadata to a tree in memory.
//!
//! Nothing on the disk is trusted: every length, number and reference is checked before it is used, and what a walk
//! over it may cost is bounded by what there is memory for. What does not fit together is left out, and then nothing
//! is written, so that nothing makes it worse, until [`repair`](super::repair) is asked for.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    rc::Rc,
    string::String,
    vec::Vec,
};
use core::{cell::RefCell, time::Duration};

use super::{
    MAX_LENGTH, MAX_NAMES, MAX_NODES, SHARE,
    content::Content,
    format::{self, FIRST_RECORD, FormatError, Key, Node as Record, Super, What, kind},
    image::Image,
    map::{GROUP, Group, Run},
    store::{Number, Store},
    tree::{self, Body, Directory, Kind, Times, Tree},
    volume::{Removed, Volume},
    wait::all,
};
use crate::{
    executor, heap, log, memory, time, vid,
    virtio::block::{self, BLOCK},
};

/// Blocks of one request, and requests at a time: what waits to be looked at fits in half of what the heap keeps.
const REQUEST: u32 = 64;
const REQUESTS: usize = 8;
/// Free memory that a mount leaves.
const LEFT: usize = heap::RESERVE;
/// One part in so many of memory for data in memory, and for what of it waits to be written.
const CACHE_SHARE: u64 = 4;
const DIRTY_SHARE: u64 = 16;
/// Checking a metadata block, and making an inode of an item, in estimated nanoseconds.
const BLOCK_COST: u64 = 1_000;
const ITEM_COST: u64 = 500;
/// Where what has lost its directory is found.
const FOUND: &str = "lost+found";
/// Damage that is logged, piece by piece.
const TOLD: usize = 16;

/// Why a disk is not used at all.
#[derive(Clone, Debug, thiserror::Error)]
enum MountError {
    #[error("the disk is {0}")]
    Format(FormatError),
    #[error("the disk has {0} blocks, fewer than the {1} of its files")]
    Short(u64, u64),
    #[error("the disk has more metadata than there is memory for")]
    Memory,
}

/// Mounts the disk; whatever comes of it, there are files afterwards.
pub async fn mount(image: Image) {
    let began = time::now();
    let blocks = block::blocks();
    let (mut tree, reason) = match try_mount(&image, blocks).await {
        Ok(mounted) => mounted,
        Err(error) => {
            let mut tree = Tree::new(Store::new(image.memory / SHARE, None));
            image.furnish(&mut tree, true).await;
            (tree, Some(format!("{error}")))
        }
    };
    if let Some(reason) = reason {
        log!("files are read-only: {reason}");
        tree.store.read_only = Some(Rc::from(reason));
    }
    let (used, limit) = tree.store.usage();
    let took = time::now().saturating_sub(began);
    log!(
        "files: {} inodes, {} of {} KiB, mounted in {} µs",
        tree.nodes.len(),
        used >> 10,
        limit >> 10,
        took.as_micros()
    );
    super::install(tree);
}

async fn try_mount(image: &Image, blocks: u64) -> Result<(Tree, Option<String>), MountError> {
    let most_dirty = (image.memory / DIRTY_SHARE).clamp(1 << 20, 64 << 20) / BLOCK as u64;
    let cache = (image.memory / CACHE_SHARE).max(4 << 20);
    let blocks = blocks.min(u64::from(u32::MAX) - 1);
    let Some((superblock, whole)) = superblock().await? else {
        let superblock = Super::new(blocks, u64::try_from(time::wall().as_nanos()).unwrap_or(1));
        let mut volume = Volume::new(superblock, most_dirty as u32);
        volume.add_area();
        let mut tree = Tree::new(Store::new(cache, Some(volume)));
        image.furnish(&mut tree, true).await;
        return Ok((tree, None));
    };
    if blocks < superblock.blocks {
        return Err(MountError::Short(blocks, superblock.blocks));
    }
    let bitmap = superblock.blocks as usize / 8;
    let areas = superblock.record_areas().count() as u64 * u64::from(superblock.area_blocks);
    // Blocks of zeros in the areas take no memory, but nobody needs so many.
    if bitmap + LEFT > memory::heap_free_bytes() || areas > superblock.blocks {
        return Err(MountError::Memory);
    }
    let mut superblock = superblock;
    superblock.grow(blocks);
    let read_only =
        superblock.read_only.then(|| String::from("they use features that this kernel only reads"));
    let mut volume = Volume::new(superblock, most_dirty as u32);
    volume.both = !whole;
    let mut mount = Mount { tree: Tree::empty(Store::new(cache, None)), volume, damage: 0, found: None };
    mount.read_blocks().await?;
    mount.take_items().await?;
    mount.join_names().await?;
    let Mount { mut tree, volume, damage, .. } = mount;
    let next = tree.nodes.keys().last().map_or(0, |last| last + 1).max(volume.superblock.next_index);
    let ours = vid::resume(next);
    tree.store.volume = Some(volume);
    tree.mounting = false;
    image.furnish(&mut tree, false).await;
    let reason = match (read_only, damage, ours) {
        (Some(reason), ..) => Some(reason),
        (None, 1.., _) => Some(format!("{damage} parts of the metadata are damaged; `fsck` says more")),
        (None, 0, false) => Some(String::from("they have identities beyond those of this machine")),
        (None, 0, true) => None,
    };
    Ok((tree, reason))
}

/// The superblock, and whether both copies of it are whole; `None` on a blank disk.
async fn superblock() -> Result<Option<(Super, bool)>, MountError> {
    let mut copies = Vec::new();
    for block in 0..2 {
        let bytes = block::read(block, Vec::from([heap::buffer(BLOCK)])).await;
        let bytes = bytes.ok().and_then(|mut bytes| bytes.pop());
        copies.push(bytes.ok_or(FormatError::Damaged).and_then(|bytes| Super::decode(&bytes)));
    }
    if copies.iter().all(|copy| *copy == Err(FormatError::Blank)) {
        return Ok(None);
    }
    let whole = copies.iter().all(Result::is_ok);
    // What is newer is not overruled by an older copy.
    let newer = |error: &FormatError| matches!(error, FormatError::Newer(_) | FormatError::Features(_));
    if let Some(Err(error)) = copies.iter().find(|copy| copy.as_ref().is_err_and(newer)) {
        return Err(MountError::Format(*error));
    }
    match copies.into_iter().flatten().max_by_key(|copy| copy.sequence) {
        Some(superblock) => Ok(Some((superblock, whole))),
        None => Err(MountError::Format(FormatError::Damaged)),
    }
}

/// # Errors
/// [`MountError::Memory`] when so little is left that the rest is kept for others.
fn has_memory() -> Result<(), MountError> {
    if memory::heap_free_bytes() < LEFT { Err(MountError::Memory) } else { Ok(()) }
}

/// A directory in place of one that is lost.
fn stand_in(index: Number) -> tree::Node {
    let now = time::wall();
    let times = Times { accessed: now, modified: now, changed: now };
    let body = Body::Directory(Directory::default());
    let vid = vid::again(vid::Kind::File, index);
    let mode = tree::default_mode(&body);
    tree::Node { vid, body, names: Vec::new(), opens: 0, mode, times, base: None, home: 0 }
}

struct Mount {
    tree: Tree,
    volume: Volume,
    /// Pieces of damage.
    damage: usize,
    /// The directory for what has none.
    found: Option<Number>,
}

impl Mount {
    fn damaged(&mut self, what: core::fmt::Arguments<'_>) {
        self.damage += 1;
        if self.damage <= TOLD {
            log!("files: {what}");
        }
    }

    /// Reads all metadata blocks, many at a time.
    async fn read_blocks(&mut self) -> Result<(), MountError> {
        let area_blocks = self.volume.superblock.area_blocks;
        let areas: Vec<u32> = self.volume.superblock.record_areas().collect();
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        for area in areas {
            let start = area.saturating_mul(area_blocks);
            if !self.volume.space.claim(start, area_blocks) {
                self.damaged(format_args!("area {area} of the metadata is not on the disk"));
                continue;
            }
            let mut at = start;
            while at < start + area_blocks {
                let count = REQUEST.min(start + area_blocks - at);
                match ranges.last_mut() {
                    Some((first, last)) if *first + *last == at && *last + count <= REQUEST => *last += count,
                    _ => ranges.push((at, count)),
                }
                at += count;
            }
        }
        if self.volume.space.is_free(0) {
            self.volume.space.claim(0, FIRST_RECORD);
            self.damaged(format_args!("the first area is not marked as metadata"));
        }
        let shared = RefCell::new(self);
        let reads = ranges.into_iter().map(async |(start, count)| {
            let whole = block::read(start.into(), Vec::from([heap::buffer(count as usize * BLOCK)])).await;
            if let Some(bytes) = whole.ok().and_then(|mut bytes| bytes.pop()) {
                for (number, bytes) in (start..).zip(bytes.chunks_exact(BLOCK)) {
                    shared.borrow_mut().take_block(number, Some(bytes))?;
                    executor::work(BLOCK_COST).await;
                }
                return Ok(());
            }
            for number in start..start + count {
                let alone = block::read(number.into(), Vec::from([heap::buffer(BLOCK)])).await;
                shared
                    .borrow_mut()
                    .take_block(number, alone.ok().and_then(|mut bytes| bytes.pop()).as_deref())?;
            }
            Ok(())
        });
        all(REQUESTS, reads).await
    }

    fn take_block(&mut self, number: u32, bytes: Option<&[u8]>) -> Result<(), MountError> {
        if number < FIRST_RECORD {
            return Ok(());
        }
        let opened = bytes.ok_or(FormatError::Damaged).and_then(|bytes| {
            format::open(bytes, number, self.volume.superblock.identity).map(|used| (bytes, used))
        });
        match opened {
            Ok((bytes, used)) => {
                has_memory()?;
                self.volume.records.add(number, bytes.to_vec(), used);
            }
            Err(FormatError::Blank) => self.volume.records.add_empty(number),
            Err(_) => {
                self.volume.lost.push(number);
                self.damaged(format_args!("metadata block {number} is damaged"));
            }
        }
        Ok(())
    }

    /// Makes inodes of items.
    async fn take_items(&mut self) -> Result<(), MountError> {
        let mut nodes = Vec::new();
        let mut groups = Vec::new();
        let mut faults = BTreeSet::new();
        let mut names = 0;
        for (home, item) in self.volume.records.items() {
            let Ok(item) = item else {
                faults.insert(home);
                continue;
            };
            has_memory()?;
            let Key { index, kind, part } = item.key;
            match kind {
                kind::NODE if (1..=kage_abi::resources::INDEX_MAX).contains(&index) => {
                    match Record::decode(index, item.content) {
                        Ok(record) if nodes.len() < MAX_NODES && names + record.names.len() <= MAX_NAMES => {
                            names += record.names.len();
                            nodes.push((home, record));
                        }
                        Ok(_) | Err(_) => drop(faults.insert(home)),
                    }
                }
                kind::MAP if u64::from(part) < MAX_LENGTH / (GROUP * BLOCK as u64) => {
                    match format::decode_runs(item.content) {
                        Ok(runs) => groups.push((index, Group { number: part, home, runs })),
                        Err(_) => drop(faults.insert(home)),
                    }
                }
                _ => drop(faults.insert(home)),
            }
            executor::work(ITEM_COST).await;
        }
        for home in faults {
            self.damaged(format_args!("metadata block {home} holds what is no item"));
        }
        let mut blocks = BTreeMap::new();
        for (home, record) in nodes {
            if record.what == What::File && record.blocks > 0 {
                blocks.insert(record.index, record.blocks);
            }
            has_memory()?;
            self.take_node(home, record);
            executor::work(ITEM_COST).await;
        }
        for (index, group) in groups {
            self.take_group(index, group);
            executor::work(ITEM_COST).await;
        }
        for (index, expected) in blocks {
            let Some(content) = self.tree.store.contents.get_mut(&index) else { continue };
            if content.map.blocks() != expected {
                content.torn = true;
                self.damaged(format_args!("inode {index:x} has lost some of its blocks"));
            }
        }
        Ok(())
    }

    fn take_node(&mut self, home: u32, record: Record) {
        let index = record.index;
        let twice = self.tree.nodes.contains_key(&index);
        let body = match (record.what, record.target) {
            _ if twice => None,
            (What::Removed, _) => {
                let Some(hash) = record.base else {
                    return self.damaged(format_args!("a removed inode is nothing of the image's"));
                };
                self.volume.removed.insert(hash, Removed { index, home });
                return;
            }
            (What::Directory, _) => Some(Body::Directory(Directory::default())),
            (What::File, _) if record.size <= MAX_LENGTH => Some(Body::File),
            (What::Link, Some(target)) if !target.is_empty() && !target.contains('\0') => {
                Some(Body::Link(target))
            }
            (What::File | What::Link, _) => None,
        };
        let Some(body) = body else {
            return self.damaged(format_args!("inode {index:x} makes no sense"));
        };
        if matches!(body, Body::File) {
            let own = record.base.is_some() && !record.lower;
            let content = Content::on_disk(record.size, own);
            self.tree.store.contents.insert(index, content);
        }
        let [accessed, modified, changed] = record.times.map(Duration::from_nanos);
        let node = tree::Node {
            vid: vid::again(vid::Kind::File, index),
            body,
            names: record.names,
            opens: 0,
            mode: record.mode & 0o7777,
            times: Times { accessed, modified, changed },
            base: record.base,
            home,
        };
        self.tree.nodes.insert(index, node);
    }

    /// Takes over where blocks of a file lie. Those whose file is lost are kept all the same: what a repair gives up
    /// is its business.
    fn take_group(&mut self, index: Number, group: Group) {
        let number = group.number;
        let space = &mut self.volume.space;
        let mut clash = 0;
        let end = self.tree.store.contents.get(&index).map(|content| content.length.div_ceil(BLOCK as u64));
        let first = u64::from(number) * GROUP;
        let mut claim = |run: &Run| {
            // A file whose inode is lost keeps what it has.
            let inside = end.is_none_or(|end| first + u64::from(run.start) + u64::from(run.count) <= end);
            let free = inside && space.claim(run.block, run.count.into());
            clash += usize::from(!free);
            free
        };
        let mut group = group;
        group.runs.retain(&mut claim);
        let orphan = match self.tree.store.contents.get_mut(&index) {
            Some(content) => !content.map.insert(group),
            None => true,
        };
        if clash > 0 {
            self.damaged(format_args!(
                "inode {index:x} has blocks that are not its own, in its part {number}"
            ));
        }
        if orphan {
            self.damaged(format_args!("part {number} of inode {index:x} is not part of a file"));
        }
    }

    /// Puts directories together from the names of what is in them.
    async fn join_names(&mut self) -> Result<(), MountError> {
        self.take_root();
        let root = self.tree.root();
        let numbers: Vec<Number> = self.tree.nodes.keys().copied().collect();
        for &number in &numbers {
            has_memory()?;
            let Some(node) = self.tree.nodes.get_mut(&number) else { continue };
            let names = core::mem::take(&mut node.names);
            if number == root {
                continue;
            }
            let directory = matches!(node.body, Body::Directory(_));
            let wanted = names.len();
            let mut kept = Vec::with_capacity(wanted.min(1));
            for (parent, name) in names {
                let one = !directory || kept.is_empty();
                let good = one && parent != number && format::is_name(&name);
                if good && self.join(parent, &name, number) {
                    kept.push((parent, name));
                }
            }
            if kept.len() != wanted {
                self.damaged(format_args!("inode {number:x} has a name in no directory"));
            }
            if let Some(node) = self.tree.nodes.get_mut(&number) {
                node.names = kept;
            }
            executor::work(ITEM_COST).await;
        }
        let numbers: Vec<Number> = self.tree.nodes.keys().copied().collect();
        self.attach(&numbers).await;
        Ok(())
    }

    /// Puts a name into a directory. One that is lost is made anew, without a name of its own, so that what lay in it
    /// stays together.
    fn join(&mut self, parent: Number, name: &Rc<str>, number: Number) -> bool {
        let sound = (1..=kage_abi::resources::INDEX_MAX).contains(&parent);
        if sound && !self.tree.nodes.contains_key(&parent) && self.tree.nodes.len() < MAX_NODES {
            self.tree.nodes.insert(parent, stand_in(parent));
            self.damaged(format_args!("directory {parent:x} is lost"));
        }
        let Some(tree::Node { body: Body::Directory(directory), .. }) = self.tree.nodes.get_mut(&parent)
        else {
            return false;
        };
        let free = !directory.names.contains_key(name);
        if free {
            directory.insert(Rc::clone(name), number);
            self.tree.names += 1;
        }
        free
    }

    /// Finds the root, or makes it anew: what lies in it knows its number.
    fn take_root(&mut self) {
        let wanted = self.volume.superblock.root;
        let sound = (1..=kage_abi::resources::INDEX_MAX).contains(&wanted);
        match self.tree.nodes.get(&wanted).map(|node| &node.body) {
            Some(Body::Directory(_)) => return self.tree.set_root(wanted),
            None if sound => {
                self.tree.nodes.insert(wanted, stand_in(wanted));
                self.tree.set_root(wanted);
            }
            _ => {
                let mut fresh = Tree::new(Store::new(0, None));
                // A number that is taken names something else: the root gets another.
                while self.tree.nodes.contains_key(&fresh.root()) {
                    fresh = Tree::new(Store::new(0, None));
                }
                let root = fresh.root();
                self.tree.set_root(root);
                self.tree.nodes.append(&mut fresh.nodes);
            }
        }
        self.damaged(format_args!("the root directory is lost"));
    }

    /// Gives what no path leads to a place.
    async fn attach(&mut self, numbers: &[Number]) {
        let root = self.tree.root();
        // Directories from which parents lead to the root.
        let mut reachable = BTreeSet::from([root]);
        for &number in numbers {
            let mut chain = BTreeMap::new();
            let mut at = number;
            let lost = loop {
                if reachable.contains(&at) {
                    break None;
                }
                if chain.insert(at, ()).is_some() {
                    break Some(at);
                }
                match self.tree.nodes.get(&at).and_then(|node| node.names.first()) {
                    Some((parent, _)) => at = *parent,
                    None => break Some(at),
                }
            };
            if let Some(lost) = lost {
                self.adopt(lost);
                self.damaged(format_args!("inode {lost:x} has no place any more"));
            }
            let directory = |at: &Number| self.tree.kind(*at).is_ok_and(|kind| kind == Kind::Directory);
            reachable.extend(chain.into_keys().filter(directory));
            executor::work(ITEM_COST).await;
        }
    }

    /// Moves an inode to where the lost are found.
    fn adopt(&mut self, number: Number) {
        let root = self.tree.root();
        let found = match self.found {
            Some(found) => found,
            None => {
                let found = match self.tree.find(root, FOUND) {
                    Ok(Some(found)) if self.tree.kind(found) == Ok(Kind::Directory) => found,
                    Ok(None) => {
                        let made = self.tree.make(root, FOUND, Body::Directory(Directory::default()));
                        made.unwrap_or(root)
                    }
                    _ => root,
                };
                *self.found.insert(found)
            }
        };
        let old = self.tree.nodes.get_mut(&number).map(|node| core::mem::take(&mut node.names));
        for (parent, name) in old.unwrap_or_default() {
            if let Some(tree::Node { body: Body::Directory(directory), .. }) =
                self.tree.nodes.get_mut(&parent)
            {
                directory.remove(&name);
                self.tree.names -= 1;
            }
        }
        let mut name: Rc<str> = Rc::from(format::found_name(number));
        while !self.join(found, &name, number) {
            name = Rc::from(format!("{name}-"));
        }
        if let Some(node) = self.tree.nodes.get_mut(&number) {
            node.names.push((found, name));
        }
    }
}

//! Commits: what was changed in memory goes to the disk, all of it or nothing.
//!
//! ```text
//!  changes ──▶ dirty ──snapshot──▶ frozen ──written, then FLUSH──▶ clean
//!                ▲                    │ the disk failed
//!                └────────────────────┘
//! ```
//!
//! A snapshot is taken at one instant, between two polls: places on the disk are given to changed blocks, changed
//! inodes are written to their metadata blocks in memory, and what is to go to the disk is held. Writers go on at once:
//! a block they change is a copy then. So after a crash the files are as they were at one instant, all of them.
//!
//! One commit runs at a time, in a task of its own: when something has been dirty for some seconds, when much is, or
//! when someone asks for it; whoever asks meanwhile shares the next one. What a commit frees is used again only by the
//! commits after it.

use alloc::{rc::Rc, vec::Vec};
use core::{
    future::{Future, poll_fn},
    pin::Pin,
    task::Poll,
    time::Duration,
};

use super::{
    FILES, FileError,
    content::{CHUNK_BLOCKS, blocks},
    format::{Key, Node, What, encode_runs},
    store::Number,
    tree::Tree,
    wait::all,
};
use crate::{
    executor, log, time, vid,
    virtio::block::{self, BLOCK, DiskError, MOST_BLOCKS, MOST_PARTS, Piece},
};

/// How long a change stays in memory alone, if nobody asks.
const AGE: Duration = Duration::from_secs(4);
/// Requests of a commit at a time.
const REQUESTS: usize = 16;
/// Most pieces of one write: a chunk's bytes, and zeros for each of its blocks.
const PIECES: usize = 1 + CHUNK_BLOCKS;
/// Failures in a row after which nothing more is written.
const PATIENCE: u32 = 3;
/// Submitting a request, in estimated nanoseconds.
const REQUEST_COST: u64 = 4_000;

/// Bytes of blocks that are to be written.
enum Source {
    /// Part of a chunk, or a metadata block; zeros follow.
    Memory(Rc<Vec<u8>>, usize),
    /// Part of the image.
    Image(&'static [u8]),
    /// Zeros.
    Zeros,
}

/// Blocks that lie one behind the other.
struct Write {
    block: u32,
    count: u32,
    source: Source,
}

/// What a commit writes.
pub struct Batch {
    number: u64,
    writes: Vec<Write>,
    freed: Vec<(u32, u32)>,
    zeros: Rc<Vec<u8>>,
    /// What is frozen meanwhile.
    held: Held,
}

struct Held {
    chunks: Vec<(Number, u64)>,
    copied: Vec<Number>,
    records: Vec<u32>,
}

/// There is no room for a metadata block, although it was kept free.
#[derive(Debug)]
pub struct NoRoom;

impl Tree {
    /// Takes a snapshot of everything that changed since the last one.
    ///
    /// # Errors
    /// [`NoRoom`]; the tree is of no more use for writing then.
    pub fn freeze(&mut self) -> Result<Option<Batch>, NoRoom> {
        let Some(volume) = &mut self.store.volume else { return Ok(None) };
        volume.commits.begun += 1;
        volume.commits.since = None;
        let number = volume.commits.begun;
        if !volume.is_dirty() {
            volume.commits.done = number;
            return Ok(None);
        }
        let mut writes = Vec::new();
        let chunks = self.freeze_chunks(&mut writes)?;
        let copied = self.freeze_copies(&mut writes)?;
        self.freeze_items()?;
        let root = self.root();
        let Some(volume) = &mut self.store.volume else { return Ok(None) };
        volume.growth = 0;
        volume.superblock.sequence += 1;
        volume.superblock.next_index = volume.superblock.next_index.max(vid::upcoming());
        volume.superblock.root = root;
        let superblock = Rc::new(volume.superblock.encode());
        let copies = if core::mem::take(&mut volume.both) { 2 } else { 1 };
        for block in 0..copies {
            writes.push(Write { block, count: 1, source: Source::Memory(Rc::clone(&superblock), 0) });
        }
        let changed = volume.records.take_changed();
        let records = changed.iter().map(|(block, _)| *block).collect();
        writes.extend(changed.into_iter().map(|(block, bytes)| {
            let source = bytes.map_or(Source::Zeros, |bytes| Source::Memory(bytes, 0));
            Write { block, count: 1, source }
        }));
        writes.sort_unstable_by_key(|write| write.block);
        let freed = core::mem::take(&mut volume.freed);
        let zeros = Rc::clone(&volume.zeros);
        Ok(Some(Batch { number, writes, freed, zeros, held: Held { chunks, copied, records } }))
    }

    /// Gives changed blocks of files their places.
    fn freeze_chunks(&mut self, writes: &mut Vec<Write>) -> Result<Vec<(Number, u64)>, NoRoom> {
        let Some(volume) = &mut self.store.volume else { return Ok(Vec::new()) };
        let changed = core::mem::take(&mut volume.chunks);
        let mut held = Vec::with_capacity(changed.len());
        for (number, chunk) in changed {
            let Some(content) = self.store.contents.get_mut(&number) else { continue };
            let Some(own) = content.chunk_mut(chunk).filter(|own| own.dirty != 0) else { continue };
            let dirty = core::mem::take(&mut own.dirty);
            own.frozen = dirty;
            volume.dirty -= dirty.count_ones();
            let bytes = Rc::clone(&own.bytes);
            held.push((number, chunk));
            let first = chunk * CHUNK_BLOCKS as u64;
            for index in blocks(dirty) {
                let at = first + index as u64;
                let block = match content.map.get(at) {
                    Some(block) => block,
                    None => {
                        let before = at.checked_sub(1).and_then(|before| content.map.get(before));
                        let block = volume.space.take(before.map(|block| block + 1)).ok_or(NoRoom)?;
                        volume.reserved -= 1;
                        content.map.set(at, block);
                        volume.groups.insert((number, super::map::place(at).0));
                        block
                    }
                };
                let start = index * BLOCK;
                match writes.last_mut() {
                    Some(Write { block: first, count, source: Source::Memory(same, from) })
                        if Rc::ptr_eq(same, &bytes)
                            && *first + *count == block
                            && *from + *count as usize * BLOCK == start =>
                    {
                        *count += 1;
                    }
                    _ => writes.push(Write {
                        block,
                        count: 1,
                        source: Source::Memory(Rc::clone(&bytes), start),
                    }),
                }
            }
        }
        Ok(held)
    }

    /// Copies what is left of the image's bytes in files that were changed.
    fn freeze_copies(&mut self, writes: &mut Vec<Write>) -> Result<Vec<Number>, NoRoom> {
        let Some(volume) = &mut self.store.volume else { return Ok(Vec::new()) };
        let copies: Vec<Number> = core::mem::take(&mut volume.copies).into_iter().collect();
        for &number in &copies {
            let Some(content) = self.store.contents.get_mut(&number) else { continue };
            volume.reserved -= core::mem::take(&mut content.copy_blocks);
            for (at, bytes) in (0u64..).zip(content.lower.chunks(BLOCK)) {
                let own = content.chunk(at / CHUNK_BLOCKS as u64).map_or(0, |own| own.present);
                if own >> (at as usize % CHUNK_BLOCKS) & 1 == 1 {
                    continue;
                }
                let block = match content.map.get(at) {
                    Some(block) => block,
                    None => {
                        let before = at.checked_sub(1).and_then(|before| content.map.get(before));
                        let block = volume.space.take(before.map(|block| block + 1)).ok_or(NoRoom)?;
                        content.map.set(at, block);
                        volume.groups.insert((number, super::map::place(at).0));
                        block
                    }
                };
                writes.push(Write { block, count: 1, source: Source::Image(bytes) });
            }
        }
        Ok(copies)
    }

    /// Writes changed inodes to their metadata blocks.
    fn freeze_items(&mut self) -> Result<(), NoRoom> {
        let Some(volume) = &mut self.store.volume else { return Ok(()) };
        for (home, key) in core::mem::take(&mut volume.gone) {
            volume.records.remove(home, key);
        }
        let mut item = Vec::new();
        for hash in core::mem::take(&mut volume.removals) {
            let Some(removed) = volume.removed.get_mut(&hash) else { continue };
            let node = Node {
                index: removed.index,
                what: What::Removed,
                root: false,
                mode: 0,
                size: 0,
                times: [0; 3],
                blocks: 0,
                base: Some(hash),
                lower: false,
                names: Vec::new(),
                target: None,
            };
            node.encode(&mut item);
            removed.home =
                volume.records.put(removed.home, 0, Key::node(removed.index), &item).ok_or(NoRoom)?;
        }
        let nodes = core::mem::take(&mut volume.nodes);
        let groups = core::mem::take(&mut volume.groups);
        let mut groups = groups;
        for number in nodes {
            let Some((node, home)) = self.record(number) else { continue };
            node.encode(&mut item);
            let Some(volume) = &mut self.store.volume else { return Ok(()) };
            let home = volume.records.put(home, 0, Key::node(number), &item).ok_or(NoRoom)?;
            self.set_home(number, home);
            // An inode and where its blocks lie are lost together or not at all, as far as there is room.
            let own = groups.range((number, 0)..=(number, u32::MAX));
            for group in own.copied().collect::<Vec<_>>() {
                groups.remove(&group);
                self.freeze_group(group, home, &mut item)?;
            }
        }
        for group in groups {
            self.freeze_group(group, 0, &mut item)?;
        }
        Ok(())
    }

    /// Writes a group of a file to its metadata block, which is `near` if it has none yet.
    fn freeze_group(
        &mut self,
        (number, part): (Number, u32),
        near: u32,
        item: &mut Vec<u8>,
    ) -> Result<(), NoRoom> {
        // What has no name any more is kept in memory alone.
        if !self.is_named(number) {
            return Ok(());
        }
        let Some(volume) = &mut self.store.volume else { return Ok(()) };
        let Some(content) = self.store.contents.get_mut(&number) else { return Ok(()) };
        let Some(group) = content.map.group_mut(part) else { return Ok(()) };
        let key = Key::map(number, part);
        if group.runs.is_empty() {
            volume.records.remove(group.home, key);
            content.map.forget(part);
        } else {
            encode_runs(item, key, &group.runs);
            group.home = volume.records.put(group.home, near, key, item).ok_or(NoRoom)?;
        }
        Ok(())
    }

    /// Takes note of how a commit ended.
    fn thaw(&mut self, number: u64, held: Held, freed: Vec<(u32, u32)>, result: Result<(), DiskError>) {
        let Some(volume) = &mut self.store.volume else { return };
        for (number, chunk) in held.chunks {
            let content = self.store.contents.get_mut(&number);
            let Some(own) = content.and_then(|content| content.chunk_mut(chunk)) else { continue };
            let frozen = core::mem::take(&mut own.frozen);
            if result.is_err() && frozen != 0 {
                volume.dirty += (frozen & !own.dirty).count_ones();
                own.dirty |= frozen;
                volume.chunks.insert((number, chunk));
            }
        }
        match result {
            Ok(()) => {
                for number in held.copied {
                    if let Some(content) = self.store.contents.get_mut(&number) {
                        content.lower = &[];
                    }
                }
                for (start, count) in freed {
                    volume.space.release(start, count);
                    volume.quarantined -= count;
                }
                volume.commits.done = number;
                volume.commits.failures = 0;
            }
            Err(_) => {
                volume.copies.extend(held.copied);
                volume.records.changed_again(held.records.into_iter());
                volume.freed.extend(freed);
                volume.both = true;
                volume.commits.failed = number;
                volume.commits.failures += 1;
                if volume.commits.failures >= PATIENCE {
                    self.store.read_only = Some(Rc::from("the disk cannot be written"));
                    log!("files: the disk cannot be written; they are read-only from now on");
                } else {
                    log!("files: the disk cannot be written; it will be tried again");
                    volume.changed();
                }
            }
        }
        self.store.waiters.wake();
    }
}

impl Batch {
    /// Writes everything and commits it.
    async fn write(&self) -> Result<(), DiskError> {
        let most = block::discard_blocks();
        let discards = self.freed.iter().filter(|_| most > 0).flat_map(|&(start, count)| {
            let (start, end) = (u64::from(start), u64::from(start) + u64::from(count));
            (start..end).step_by(most as usize).map(move |at| (at, most.min(end - at)))
        });
        // That the host need not keep them is no loss if it does.
        let discard = async |(at, count)| {
            let _ = block::discard(at, count).await;
            Ok::<(), DiskError>(())
        };
        all(REQUESTS, discards.map(discard)).await?;
        let mut rest = self.writes.as_slice();
        let requests = core::iter::from_fn(|| {
            let (block, pieces) = self.request(&mut rest)?;
            Some(async move {
                executor::work(REQUEST_COST).await;
                block::write(block, pieces).await
            })
        });
        all(REQUESTS, requests).await?;
        block::flush().await
    }

    /// Takes what makes a request off the writes.
    fn request(&self, rest: &mut &[Write]) -> Option<(u64, Vec<Piece>)> {
        let first = rest.first()?.block;
        let (mut pieces, mut count) = (Vec::new(), 0);
        while let Some((write, more)) = rest.split_first() {
            let fits = first + count == write.block
                && (count + write.count) as usize <= MOST_BLOCKS
                && pieces.len() + PIECES <= MOST_PARTS;
            if !fits {
                break;
            }
            let length = write.count as usize * BLOCK;
            let piece = match &write.source {
                Source::Memory(bytes, start) => Piece::new(Rc::clone(bytes), *start..*start + length),
                Source::Image(bytes) => Piece::new(Rc::new(bytes.to_vec()), 0..length),
                Source::Zeros => Piece::new(Rc::clone(&self.zeros), 0..0),
            };
            let mut lacking = length - piece.bytes().len();
            if lacking < length {
                pieces.push(piece);
            }
            // A chunk that ends early lacks more than a block only if its file was cut just before.
            while lacking > 0 {
                let zeros = Piece::new(Rc::clone(&self.zeros), 0..lacking.min(BLOCK));
                lacking -= zeros.bytes().len();
                pieces.push(zeros);
            }
            count += write.count;
            *rest = more;
        }
        Some((first.into(), pieces))
    }
}

/// Commits whenever it is time to.
pub async fn keep() {
    loop {
        due().await;
        let frozen = FILES.get().freeze();
        let batch = match frozen {
            Ok(Some(batch)) => batch,
            Ok(None) => {
                FILES.get().store.waiters.wake();
                continue;
            }
            Err(NoRoom) => {
                let mut tree = FILES.get();
                log!("files: no room for metadata; they are read-only from now on");
                tree.store.read_only = Some(Rc::from("no room for metadata"));
                tree.store.waiters.wake();
                continue;
            }
        };
        let result = batch.write().await;
        let Batch { number, writes, freed, held, .. } = batch;
        // Blocks that only the commit held are writers' own again.
        drop(writes);
        FILES.get().thaw(number, held, freed, result);
    }
}

/// Waits until a commit is due.
async fn due() {
    let mut timer: Option<time::Sleep> = None;
    poll_fn(|context| {
        let at = {
            let mut tree = FILES.get();
            let writable = tree.store.writable().is_ok();
            let Some(volume) = &mut tree.store.volume else { return Poll::Pending };
            let commits = &mut volume.commits;
            commits.waker.add(context);
            if !writable {
                return Poll::Pending;
            }
            if commits.wanted > commits.begun {
                return Poll::Ready(());
            }
            commits.since.map(|since| since + AGE)
        };
        match at {
            None => Poll::Pending,
            Some(at) => {
                let timer = timer.get_or_insert_with(|| time::sleep_until(at));
                Pin::new(timer).poll(context)
            }
        }
    })
    .await;
}

/// Returns once everything done before is safe on the disk.
///
/// # Errors
/// [`FileError::Damaged`] when the disk failed, [`FileError::ReadOnly`] when it can no longer be written.
pub async fn sync_all() -> Result<(), FileError> {
    super::ready().await;
    let target = {
        let mut tree = FILES.get();
        let writable = tree.store.writable();
        let Some(volume) = &mut tree.store.volume else { return Ok(()) };
        if volume.is_dirty() {
            writable?;
            volume.want();
            volume.commits.begun + 1
        } else if volume.commits.is_under_way() {
            volume.commits.begun
        } else {
            return Ok(());
        }
    };
    poll_fn(|context| {
        let mut tree = FILES.get();
        let writable = tree.store.writable();
        let Some(volume) = &tree.store.volume else { return Poll::Ready(Ok(())) };
        let commits = &volume.commits;
        if commits.done >= target {
            return Poll::Ready(Ok(()));
        }
        if commits.failed >= target {
            return Poll::Ready(Err(FileError::Damaged));
        }
        if writable.is_err() {
            return Poll::Ready(writable);
        }
        tree.store.waiters.add(context);
        Poll::Pending
    })
    .await
}

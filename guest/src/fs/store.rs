//! What files hold: bytes in chunks, over the disk's blocks or the image's read-only bytes.
//!
//! A chunk in memory holds some of its blocks of 4 KiB; one that it does not hold is the image's bytes, or a block on
//! the disk, or a hole that reads as zeros. A chunk's own bytes may end before the chunk does: what follows is zeros
//! too. So a growing file is never copied, and a hole costs nothing.
//!
//! Without a disk every chunk stays. With one, chunks are a cache with a bound: blocks that a commit has yet to write
//! are *dirty*, those that one is writing are *frozen* (whoever changes them then changes a copy), and a chunk with
//! neither can be dropped.

use alloc::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
    vec::Vec,
};
use core::task::{Context, Poll};

use super::{
    FileError, MAX_LENGTH,
    content::{CHUNK, CHUNK_BLOCKS, Content, Source, blocks, place, touched},
    format::runs_bytes,
    load::{self, Wanted},
    map,
    volume::{Room, Volume},
    wait::Waiters,
};
use crate::{memory, virtio::block::BLOCK};

/// Names a content: its inode's number.
pub type Number = u64;

/// Chunks looked at before one gives up to find some to drop, and those looked at when memory is short.
const MOST_LOOKS: usize = 2048;
const SOME: usize = 32;
/// Length of the order of chunks up to which it need not be tidied.
const LEAST_ORDER: usize = 1024;
/// Bytes of items that a changed chunk may add: a head, and a run for each of its blocks.
const CHUNK_GROWTH: usize = runs_bytes(CHUNK_BLOCKS);

/// The contents of all files.
pub struct Store {
    /// By inode.
    pub contents: BTreeMap<Number, Content>,
    /// Bytes of chunks in memory, and the most there may be.
    bytes: u64,
    limit: u64,
    /// The disk, if there is one.
    pub volume: Option<Volume>,
    /// Why nothing can be changed.
    pub read_only: Option<Rc<str>>,
    /// Chunks with a disk behind them, the one next considered for dropping first; some of them are gone.
    order: VecDeque<(Number, u64)>,
    /// So long it may become before it is made anew.
    order_limit: usize,
    /// Chunks that are being read.
    pub loading: BTreeSet<(Number, u64)>,
    /// Blocks of files that could not be read; whoever wanted one is told once.
    pub failed: BTreeSet<(Number, u64)>,
    /// Who waits for a read or a commit.
    pub waiters: Waiters,
}

impl Store {
    /// An empty store that takes `limit` bytes of memory.
    pub const fn new(limit: u64, volume: Option<Volume>) -> Self {
        Self {
            contents: BTreeMap::new(),
            bytes: 0,
            limit,
            volume,
            read_only: None,
            order: VecDeque::new(),
            order_limit: LEAST_ORDER,
            loading: BTreeSet::new(),
            failed: BTreeSet::new(),
            waiters: Waiters::new(),
        }
    }

    /// Bytes that files take, and the most there may be: of the disk, or of memory where there is none.
    pub fn usage(&self) -> (u64, u64) {
        self.volume.as_ref().map_or((self.bytes, self.limit), Volume::usage)
    }

    /// Bytes of files in memory, and the most there may be.
    pub const fn cached(&self) -> (u64, u64) {
        (self.bytes, self.limit)
    }

    /// # Errors
    /// [`FileError::ReadOnly`].
    pub fn writable(&self) -> Result<(), FileError> {
        if self.read_only.is_some() { Err(FileError::ReadOnly) } else { Ok(()) }
    }

    /// A content of the image's bytes, perhaps none.
    pub fn create(&mut self, number: Number, lower: &'static [u8]) {
        let content = Content { lower, length: lower.len() as u64, ..Content::default() };
        self.contents.insert(number, content);
    }

    /// Forgets a content, and frees what it has on the disk.
    pub fn remove(&mut self, number: Number) {
        // What it holds goes first, so that nothing of it counts any more.
        let _ = self.cut(number, 0);
        self.contents.remove(&number);
        self.failed.retain(|(failed, _)| *failed != number);
    }

    /// Its length.
    pub fn length(&self, number: Number) -> u64 {
        self.contents.get(&number).map_or(0, |content| content.length)
    }

    /// Reads from `offset`; 0 only at the end, and fewer than wanted where the rest is not in memory yet.
    pub fn poll_read(
        &mut self,
        context: &Context<'_>,
        number: Number,
        offset: u64,
        into: &mut [u8],
    ) -> Poll<Result<usize, FileError>> {
        let Some(content) = self.contents.get_mut(&number) else { return Poll::Ready(Ok(0)) };
        let left = content.length.saturating_sub(offset);
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(into.len());
        let in_order = content.next_read == offset;
        let mut done = 0;
        let (mut missing, mut lost) = (None, false);
        while done < count {
            let at = offset + done as u64;
            let (block, inside) = (at / BLOCK as u64, (at % BLOCK as u64) as usize);
            let room = (BLOCK - inside).min(count - done);
            let Some(now) = into.get_mut(done..done + room) else { break };
            match content.source(block) {
                Source::Memory(bytes) => {
                    let bytes = bytes.get(inside..).unwrap_or_default();
                    let (full, empty) = now.split_at_mut(bytes.len().min(room));
                    full.copy_from_slice(bytes.get(..full.len()).unwrap_or_default());
                    empty.fill(0);
                }
                Source::Hole => now.fill(0),
                Source::Lost => {
                    lost = true;
                    break;
                }
                Source::Disk => {
                    missing = Some(block);
                    break;
                }
            }
            if let Some(chunk) = content.chunk_mut(block / CHUNK_BLOCKS as u64) {
                chunk.used = true;
            }
            done += room;
        }
        if lost && done == 0 {
            return Poll::Ready(Err(FileError::Damaged));
        }
        if let Some(block) = missing {
            if self.failed.remove(&(number, block)) {
                return Poll::Ready(if done > 0 { Ok(done) } else { Err(FileError::Damaged) });
            }
            let last = (offset + count as u64 - 1) / BLOCK as u64;
            load::start(self, Wanted { number, first: block, last, ahead: in_order });
            if done == 0 {
                self.waiters.add(context);
                return Poll::Pending;
            }
        } else if in_order && done > 0 && self.volume.is_some() {
            load::ahead(self, number, (offset + done as u64).div_ceil(BLOCK as u64));
        }
        if let Some(content) = self.contents.get_mut(&number) {
            content.next_read = offset + done as u64;
        }
        Poll::Ready(Ok(done))
    }

    /// Has a block of a file read, before it is changed in part.
    fn poll_load(&mut self, context: &Context<'_>, number: Number, block: u64) -> Poll<FileError> {
        if self.failed.remove(&(number, block)) {
            return Poll::Ready(FileError::Damaged);
        }
        load::start(self, Wanted { number, first: block, last: block, ahead: false });
        self.waiters.add(context);
        Poll::Pending
    }

    /// Writes at `offset` and returns how much: less than all when the rest has to wait, or finds no room.
    pub fn poll_write(
        &mut self,
        context: &Context<'_>,
        number: Number,
        offset: u64,
        bytes: &[u8],
    ) -> Poll<Result<usize, FileError>> {
        let end = offset.checked_add(bytes.len() as u64).filter(|&end| end <= MAX_LENGTH);
        if end.is_none() {
            return Poll::Ready(Err(FileError::TooLarge));
        }
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            let at = offset + done as u64;
            let (_, start) = place(at);
            let now = rest.get(..CHUNK - start).unwrap_or(rest);
            match self.poll_put(context, number, at, now) {
                Poll::Ready(Ok(())) => done += now.len(),
                _ if done > 0 => break,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(done))
    }

    /// Writes bytes of one chunk.
    fn poll_put(
        &mut self,
        context: &Context<'_>,
        number: Number,
        offset: u64,
        bytes: &[u8],
    ) -> Poll<Result<(), FileError>> {
        let (chunk, start) = place(offset);
        let end = start + bytes.len();
        let file_end = offset + bytes.len() as u64;
        let mask = touched(start, end);
        let Some(content) = self.contents.get(&number) else { return Poll::Ready(Err(FileError::NotFound)) };
        let first = chunk * CHUNK_BLOCKS as u64;
        // A block that is changed in part is needed whole, unless the rest of it lies behind the file's end.
        let partly =
            |block: usize| block * BLOCK < start || ((block + 1) * BLOCK > end && file_end < content.length);
        let missing = blocks(mask).find(|&block| partly(block) && content.is_missing(first + block as u64));
        if let Some(block) = missing {
            return self.poll_load(context, number, first + block as u64).map(Err);
        }
        let (present, dirty) = content.chunk(chunk).map_or((0, 0), |own| (own.present, own.dirty));
        let new = blocks(mask & !dirty)
            .filter(|&block| content.map.get(first + block as u64).is_none())
            .count() as u32;
        if let Some(failed) = self.poll_room(context, number, chunk, (mask & !dirty, new)) {
            return failed.map(Err);
        }
        // Whole chunks come from the image where nothing says otherwise: only blocks do where there is a disk.
        let fills = if self.volume.is_some() { mask } else { touched(0, CHUNK) };
        let Some(content) = self.contents.get(&number) else { return Poll::Ready(Err(FileError::NotFound)) };
        let lowers: Vec<(usize, &'static [u8])> = blocks(fills & !present)
            .map(|block| (block, content.lower(first + block as u64)))
            .filter(|(_, lower)| !lower.is_empty())
            .collect();
        let before = content.chunk(chunk).map_or(0, |own| own.bytes.len());
        let lower_end = lowers.last().map_or(0, |(block, lower)| block * BLOCK + lower.len());
        let after = before.max(end).max(lower_end);
        if let Err(wait) = self.reserve(number, chunk, before, after) {
            return match (wait, &mut self.volume) {
                (true, Some(volume)) => {
                    volume.want();
                    self.waiters.add(context);
                    Poll::Pending
                }
                _ => Poll::Ready(Err(FileError::Full)),
            };
        }
        let Some(content) = self.contents.get_mut(&number) else { return Poll::Ready(Ok(())) };
        content.length = content.length.max(file_end);
        let own = content.insert(chunk);
        let bytes_of = Rc::make_mut(&mut own.bytes);
        if bytes_of.len() < after {
            // One that was copied for its change has lost its room.
            if bytes_of.capacity() < after {
                bytes_of.reserve_exact(after - bytes_of.len());
            }
            bytes_of.resize(after, 0);
        }
        for (block, lower) in lowers {
            if let Some(into) = bytes_of.get_mut(block * BLOCK..block * BLOCK + lower.len()) {
                into.copy_from_slice(lower);
            }
        }
        if let Some(into) = bytes_of.get_mut(start..end) {
            into.copy_from_slice(bytes);
        }
        own.present |= fills;
        own.used = true;
        if let Some(volume) = &mut self.volume {
            volume.dirty += (mask & !own.dirty).count_ones();
            own.dirty |= mask;
            volume.reserved += new;
            if new > 0 {
                let (group, _) = map::place(first);
                let runs = content.map.group(group).map_or(0, |group| group.runs.len());
                volume.growth += CHUNK_GROWTH + runs_bytes(runs);
            }
            volume.chunks.insert((number, chunk));
            volume.changed();
        }
        Poll::Ready(Ok(()))
    }

    /// Gives a file of a new machine its few first bytes, as far as there is room.
    pub fn fill(&mut self, number: Number, bytes: &[u8]) {
        let _ = self.poll_write(&Context::from_waker(core::task::Waker::noop()), number, 0, bytes);
    }

    /// Whether a chunk of which `changes` become dirty can be written, `new` of them to blocks of their own.
    fn poll_room(
        &mut self,
        context: &Context<'_>,
        number: Number,
        chunk: u64,
        (changes, new): (u8, u32),
    ) -> Option<Poll<FileError>> {
        let content = self.contents.get(&number)?;
        let copy = if content.own { 0 } else { content.lower_blocks() };
        let volume = self.volume.as_mut()?;
        if volume.dirty + changes.count_ones() > volume.most_dirty {
            volume.want();
            self.waiters.add(context);
            return Some(Poll::Pending);
        }
        if new + copy > 0 {
            let (group, _) = map::place(chunk * CHUNK_BLOCKS as u64);
            let runs = content.map.group(group).map_or(0, |group| group.runs.len());
            let bytes = CHUNK_GROWTH + runs_bytes(runs) + copy_growth(copy);
            match volume.room(new + copy, bytes) {
                Room::Yes => {}
                Room::Wait => {
                    volume.want();
                    self.waiters.add(context);
                    return Some(Poll::Pending);
                }
                Room::No => return Some(Poll::Ready(FileError::Full)),
            }
        }
        self.own(number);
        None
    }

    /// Notes that a file is the image's no more; there is room for it.
    fn own(&mut self, number: Number) {
        let Some(content) = self.contents.get_mut(&number) else { return };
        let Some(volume) = &mut self.volume else { return };
        if content.own || content.lower.is_empty() {
            return;
        }
        content.own = true;
        content.copy_blocks = content.lower_blocks();
        volume.reserved += content.copy_blocks;
        volume.growth += copy_growth(content.copy_blocks);
        volume.copies.insert(number);
        volume.mark(number, 0);
    }

    /// Makes room in memory for a chunk that grows from `before` to `after`; whether it helps to wait, if there is none.
    fn reserve(&mut self, number: Number, chunk: u64, before: usize, after: usize) -> Result<(), bool> {
        let more = after - before;
        if more == 0 {
            return Ok(());
        }
        if self.volume.is_some() {
            self.make_room(more as u64);
            if self.contents.get(&number).is_some_and(|content| content.chunk(chunk).is_none()) {
                self.enqueue(number, chunk);
            }
        } else if self.limit.saturating_sub(self.bytes) < more as u64 {
            return Err(false);
        }
        let waits = self.volume.as_ref().is_some_and(Volume::is_busy);
        if !memory::kernel_room(CHUNK) {
            return Err(waits);
        }
        let content = self.contents.get_mut(&number).ok_or(false)?;
        let own = Rc::make_mut(&mut content.insert(chunk).bytes);
        // Doubling up to the middle, then the whole: a chunk never holds more than its size.
        let reserved = if after > CHUNK / 2 {
            own.try_reserve_exact(CHUNK - own.len())
        } else {
            own.try_reserve(after - own.len())
        };
        if reserved.is_err() {
            if content.chunk(chunk).is_some_and(|own| own.present == 0) {
                content.forget(chunk);
            }
            return Err(waits);
        }
        self.bytes += more as u64;
        Ok(())
    }

    /// Drops chunks that can be had again, until there is room for `more` bytes or none is left.
    pub fn make_room(&mut self, more: u64) {
        // Each is looked at twice at the most: once to be spared.
        for _ in 0..(2 * self.order.len()).min(MOST_LOOKS) {
            if self.bytes + more <= self.limit && memory::kernel_room(CHUNK + more as usize) {
                return;
            }
            self.drop_next();
        }
    }

    /// Drops some chunks that can be had again.
    pub fn drop_some(&mut self) {
        for _ in 0..self.order.len().min(SOME) {
            self.drop_next();
        }
    }

    /// Drops a chunk, or spares it for now.
    fn drop_next(&mut self) {
        let Some((number, chunk)) = self.order.pop_front() else { return };
        let Some(content) = self.contents.get_mut(&number) else { return };
        let Some(own) = content.chunk_mut(chunk) else { return };
        if own.dirty | own.frozen != 0 || core::mem::take(&mut own.used) {
            self.order.push_back((number, chunk));
        } else if let Some(own) = content.forget(chunk) {
            self.bytes -= own.bytes.len() as u64;
        }
    }

    /// Notes a chunk that may be dropped some time.
    fn enqueue(&mut self, number: Number, chunk: u64) {
        if self.order.len() >= self.order_limit {
            let contents = self.contents.iter();
            let held = contents
                .flat_map(|(&number, content)| content.chunks.iter().map(move |(at, _)| (number, *at)));
            self.order = held.collect();
            self.order_limit = LEAST_ORDER.max(2 * self.order.len());
        }
        self.order.push_back((number, chunk));
    }

    /// Takes over blocks of one chunk that were read from `block` on, as far as they still are what the file has there.
    pub fn loaded(&mut self, number: Number, at: u64, block: u32, mut bytes: Vec<u8>) {
        let Some(content) = self.contents.get_mut(&number) else { return };
        let (chunk, place) = (at / CHUNK_BLOCKS as u64, at as usize % CHUNK_BLOCKS);
        let still = |content: &Content, index: usize| {
            let (at, block) = (at + index as u64, block + index as u32);
            content.is_missing(at) && content.map.get(at) == Some(block)
        };
        let count = bytes.len().div_ceil(BLOCK);
        let left = content.length.saturating_sub(at * BLOCK as u64);
        bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        let fresh = content.chunk(chunk).is_none();
        if fresh && place == 0 && (0..count).all(|index| still(content, index)) {
            let own = content.insert(chunk);
            self.bytes += bytes.len() as u64;
            own.bytes = Rc::new(bytes);
            own.present = touched(0, count * BLOCK);
            own.used = true;
        } else {
            for (index, bytes) in bytes.chunks(BLOCK).enumerate() {
                if !still(content, index) {
                    continue;
                }
                let own = content.insert(chunk);
                let (start, before) = ((place + index) * BLOCK, own.bytes.len());
                let into = Rc::make_mut(&mut own.bytes);
                if into.len() < start + bytes.len() {
                    into.resize(start + bytes.len(), 0);
                }
                if let Some(into) = into.get_mut(start..start + bytes.len()) {
                    into.copy_from_slice(bytes);
                }
                self.bytes += (into.len() - before) as u64;
                own.present |= 1 << (place + index);
                own.used = true;
            }
        }
        if fresh && content.chunk(chunk).is_some() {
            self.enqueue(number, chunk);
        }
    }

    /// Sets the length; what is added reads as zeros.
    pub fn poll_truncate(
        &mut self,
        context: &Context<'_>,
        number: Number,
        length: u64,
    ) -> Poll<Result<(), FileError>> {
        if length > MAX_LENGTH {
            return Poll::Ready(Err(FileError::TooLarge));
        }
        let Some(content) = self.contents.get(&number) else { return Poll::Ready(Err(FileError::NotFound)) };
        let (tail, inside) = (length / BLOCK as u64, length as usize % BLOCK);
        if length < content.length && inside > 0 && content.is_missing(tail) {
            return self.poll_load(context, number, tail).map(Err);
        }
        if length == content.length {
            return Poll::Ready(Ok(()));
        }
        // What is left of the image's bytes is copied.
        let keeps =
            content.lower_blocks().min(u32::try_from(length.div_ceil(BLOCK as u64)).unwrap_or(u32::MAX));
        if let Some(volume) = self.volume.as_mut().filter(|_| !content.own && keeps > 0) {
            match volume.room(keeps, copy_growth(keeps)) {
                Room::Yes => {}
                Room::Wait => {
                    volume.want();
                    self.waiters.add(context);
                    return Poll::Pending;
                }
                Room::No => return Poll::Ready(Err(FileError::Full)),
            }
        }
        if length < content.length {
            Poll::Ready(self.cut(number, length))
        } else {
            self.own(number);
            if let Some(content) = self.contents.get_mut(&number) {
                content.length = length;
            }
            Poll::Ready(Ok(()))
        }
    }

    /// Cuts a file off. The block that is cut is in memory, if it has any bytes of its own.
    pub fn cut(&mut self, number: Number, length: u64) -> Result<(), FileError> {
        let content = self.contents.get_mut(&number).ok_or(FileError::NotFound)?;
        let (chunk, at) = place(length);
        let from = content.chunks.partition_point(|(number, _)| *number < chunk);
        let mut freed = 0;
        let (mut dirty, mut unplaced) = (0, 0);
        for (number, own) in content.chunks.get_mut(from..).unwrap_or_default() {
            let keep = if *number == chunk { at } else { 0 };
            let gone = !touched(0, keep) & touched(0, CHUNK);
            let before = own.bytes.len();
            if before > keep {
                Rc::make_mut(&mut own.bytes).truncate(keep);
            }
            freed += before - own.bytes.len();
            let first = *number * CHUNK_BLOCKS as u64;
            dirty += (own.dirty & gone).count_ones();
            unplaced += blocks(own.dirty & gone)
                .filter(|&block| content.map.get(first + block as u64).is_none())
                .count() as u32;
            own.present &= !gone;
            own.dirty &= !gone;
            own.frozen &= !gone;
        }
        let keeps = from
            + usize::from(
                content.chunks.get(from).is_some_and(|(number, own)| *number == chunk && own.present != 0),
            );
        content.chunks.truncate(keeps);
        self.bytes -= freed as u64;
        let visible = usize::try_from(length).unwrap_or(usize::MAX).min(content.lower.len());
        let was_lower = !content.lower.is_empty();
        content.lower = content.lower.get(..visible).unwrap_or_default();
        content.length = length;
        let Some(volume) = &mut self.volume else { return Ok(()) };
        volume.dirty -= dirty;
        volume.reserved -= unplaced;
        let (mut runs, mut groups) = (Vec::new(), Vec::new());
        let first = length.div_ceil(BLOCK as u64);
        content.map.cut(first, |start, count| runs.push((start, count)), |group| groups.push(group));
        runs.into_iter().for_each(|(start, count)| volume.free(start, count));
        volume.groups.extend(groups.into_iter().map(|group| (number, group)));
        if content.own && was_lower {
            let now = content.lower_blocks().min(content.copy_blocks);
            volume.reserved -= content.copy_blocks - now;
            content.copy_blocks = now;
        }
        // The rest of the last block is to be zeros on the disk as well.
        let tail = at / BLOCK;
        if let Some(own) =
            content.chunk_mut(chunk).filter(|own| at % BLOCK > 0 && own.present >> tail & 1 == 1)
            && own.dirty >> tail & 1 == 0
        {
            own.dirty |= 1 << tail;
            volume.dirty += 1;
            volume.chunks.insert((number, chunk));
            if content.map.get(chunk * CHUNK_BLOCKS as u64 + tail as u64).is_none() {
                volume.reserved += 1;
            }
        }
        if was_lower {
            self.own_cut(number);
        }
        if let Some(volume) = &mut self.volume {
            volume.changed();
        }
        Ok(())
    }

    /// Notes that a file of the image was cut, perhaps to nothing.
    fn own_cut(&mut self, number: Number) {
        self.own(number);
        let Some(content) = self.contents.get_mut(&number) else { return };
        if !content.own {
            content.own = true;
            if let Some(volume) = &mut self.volume {
                volume.mark(number, 0);
            }
        }
    }
}

/// Bytes of items for a copy of so many blocks of the image.
const fn copy_growth(blocks: u32) -> usize {
    let groups = (blocks as usize).div_ceil(map::GROUP as usize);
    groups * runs_bytes(8)
}

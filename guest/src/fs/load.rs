//! Reads blocks of files from the disk into memory.
//!
//! A read is a task of its own: whoever waits for it may go away, and several may wait for the same. A block that the
//! disk cannot give is asked for alone, so that it costs no other.

use alloc::vec::Vec;

use super::{
    FILES,
    content::CHUNK_BLOCKS,
    store::{Number, Store},
    wait::all,
};
use crate::{
    executor, heap, log, memory,
    virtio::block::{self, BLOCK, MOST_BLOCKS, MOST_PARTS},
};

/// Blocks read ahead of who reads in order: the disk's time for them is about that of copying them out.
const AHEAD: u64 = 64;
/// Blocks of a reader who does not, at a time.
const MOST: u64 = 64;
/// Requests of one read at a time.
const REQUESTS: usize = 8;
/// Memory that reading ahead leaves.
const LEFT: usize = heap::RESERVE;

/// What is wanted.
pub struct Wanted {
    /// Whose blocks.
    pub number: Number,
    /// First of them, which is missing.
    pub first: u64,
    /// Last of them.
    pub last: u64,
    /// More will be.
    pub ahead: bool,
}

/// Blocks of one chunk.
struct Part {
    at: u64,
    count: usize,
}

/// Blocks that lie one behind the other on the disk.
struct Segment {
    block: u32,
    count: u32,
    parts: Vec<Part>,
}

/// Starts reading.
pub fn start(store: &mut Store, wanted: Wanted) {
    let Wanted { number, first, last, ahead } = wanted;
    let mut last = last.min(first + MOST);
    if ahead {
        last = last.max(first + AHEAD) | (CHUNK_BLOCKS as u64 - 1);
    }
    store.make_room((last - first + 1) * BLOCK as u64);
    if memory::heap_free_bytes() < LEFT {
        last = first;
    }
    let Some(content) = store.contents.get(&number) else { return };
    // Whatever the length, what is wanted first is read, or its reader would wait for ever.
    last = last.min(content.length.div_ceil(BLOCK as u64).saturating_sub(1)).max(first);
    let mut segments: Vec<Segment> = Vec::new();
    let mut chunks = Vec::new();
    for at in first..=last {
        let chunk = at / CHUNK_BLOCKS as u64;
        let Some(block) = content.map.get(at).filter(|_| content.is_missing(at)) else { continue };
        if store.loading.contains(&(number, chunk)) {
            continue;
        }
        if chunks.last() != Some(&(number, chunk)) {
            chunks.push((number, chunk));
        }
        let follows = |segment: &&mut Segment| {
            segment.block.checked_add(segment.count) == Some(block)
                && (segment.count as usize) < MOST_BLOCKS
                && segment.parts.len() < MOST_PARTS
        };
        match segments.last_mut().filter(follows) {
            Some(segment) => {
                segment.count += 1;
                match segment.parts.last_mut() {
                    Some(part)
                        if part.at / CHUNK_BLOCKS as u64 == chunk && part.at + part.count as u64 == at =>
                    {
                        part.count += 1;
                    }
                    _ => segment.parts.push(Part { at, count: 1 }),
                }
            }
            None => segments.push(Segment { block, count: 1, parts: Vec::from([Part { at, count: 1 }]) }),
        }
    }
    if segments.is_empty() {
        return;
    }
    store.loading.extend(chunks.iter().copied());
    executor::spawn("read", async move {
        let reads = segments.into_iter().map(|segment| read(number, segment));
        // Each says itself what it could not read.
        let _ = all(REQUESTS, reads).await;
        let mut tree = FILES.get();
        for chunk in &chunks {
            tree.store.loading.remove(chunk);
        }
        tree.store.make_room(0);
        tree.store.waiters.wake();
    });
}

/// Reads on for who reads in order and will come to block `at`.
pub fn ahead(store: &mut Store, number: Number, at: u64) {
    let Some(content) = store.contents.get(&number) else { return };
    let end = content.length.div_ceil(BLOCK as u64).min(at + AHEAD / 2);
    // Looked at once in a while, not at each of many short reads.
    if !at.is_multiple_of(CHUNK_BLOCKS as u64) || memory::heap_free_bytes() < 2 * LEFT {
        return;
    }
    if let Some(first) = (at..end).find(|&block| content.is_missing(block)) {
        start(store, Wanted { number, first, last: first, ahead: true });
    }
}

async fn read(number: Number, segment: Segment) -> Result<(), core::convert::Infallible> {
    let buffers = segment.parts.iter().map(|part| heap::buffer(part.count * BLOCK)).collect();
    let whole = block::read(segment.block.into(), buffers).await;
    let mut block = segment.block;
    match whole {
        Ok(buffers) => {
            let mut tree = FILES.get();
            for (part, bytes) in segment.parts.iter().zip(buffers) {
                tree.store.loaded(number, part.at, block, bytes);
                block += part.count as u32;
            }
        }
        Err(_) => {
            for at in segment.parts.iter().flat_map(|part| part.at..part.at + part.count as u64) {
                let alone = block::read(block.into(), Vec::from([heap::buffer(BLOCK)])).await;
                let mut tree = FILES.get();
                match alone.ok().and_then(|mut buffers| buffers.pop()) {
                    Some(bytes) => tree.store.loaded(number, at, block, bytes),
                    None => {
                        let path = tree.path(number);
                        let path = path.as_deref().unwrap_or("a file without a name");
                        log!(
                            "{path}: offset {} cannot be read, block {block} of the disk",
                            at * BLOCK as u64
                        );
                        tree.store.failed.insert((number, at));
                    }
                }
                drop(tree);
                block += 1;
            }
        }
    }
    Ok(())
}

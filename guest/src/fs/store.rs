//! What files hold: bytes in chunks, over the image's read-only bytes.
//!
//! A chunk that was never written is the image's bytes, or a hole that reads as zeros. A chunk's own bytes may end
//! before the chunk does: what follows is zeros too. So a growing file is never copied, and a hole costs nothing.

use alloc::{collections::BTreeMap, vec::Vec};

use super::{FileError, MAX_LENGTH};
use crate::{heap, memory};

/// Names a content: its inode's number.
pub type Number = u64;

/// Bytes of a chunk.
const CHUNK: usize = 16 << 10;

#[derive(Default)]
struct Content {
    /// What of the image's bytes is still visible; shrinks when the file does.
    lower: &'static [u8],
    chunks: BTreeMap<u64, Vec<u8>>,
    length: u64,
}

/// The contents of all files.
pub struct Store {
    contents: BTreeMap<Number, Content>,
    bytes: u64,
    limit: u64,
}

/// The chunk of an offset, and the place in it.
fn place(offset: u64) -> (u64, usize) {
    (offset / CHUNK as u64, (offset % CHUNK as u64) as usize)
}

impl Content {
    /// The image's bytes in a chunk.
    fn lower(&self, chunk: u64) -> &'static [u8] {
        let start = usize::try_from(chunk).ok().and_then(|chunk| chunk.checked_mul(CHUNK));
        let Some(rest) = start.and_then(|start| self.lower.get(start..)) else { return &[] };
        rest.get(..CHUNK).unwrap_or(rest)
    }

    /// Bytes of chunk `chunk` from `at` on; zeros follow them.
    fn bytes(&self, chunk: u64, at: usize) -> &[u8] {
        let bytes = match self.chunks.get(&chunk) {
            Some(own) => own,
            None => self.lower(chunk),
        };
        bytes.get(at..).unwrap_or_default()
    }
}

impl Store {
    /// An empty store that takes `limit` bytes.
    pub const fn new(limit: u64) -> Self {
        Self { contents: BTreeMap::new(), bytes: 0, limit }
    }

    /// Bytes held, and the most there may be.
    pub const fn usage(&self) -> (u64, u64) {
        (self.bytes, self.limit)
    }

    /// A content of the image's bytes, perhaps none.
    pub fn create(&mut self, number: Number, lower: &'static [u8]) {
        let content = Content { lower, length: lower.len() as u64, ..Content::default() };
        self.contents.insert(number, content);
    }

    /// Forgets a content.
    pub fn remove(&mut self, number: Number) {
        if let Some(content) = self.contents.remove(&number) {
            self.bytes -= held(&content.chunks);
        }
    }

    /// Its length.
    pub fn length(&self, number: Number) -> u64 {
        self.contents.get(&number).map_or(0, |content| content.length)
    }

    /// Reads from `offset`; fewer than wanted only at the end.
    pub fn read(&self, number: Number, offset: u64, into: &mut [u8]) -> usize {
        let Some(content) = self.contents.get(&number) else { return 0 };
        let left = content.length.saturating_sub(offset);
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(into.len());
        let mut rest = into.get_mut(..count).unwrap_or_default();
        let mut offset = offset;
        while !rest.is_empty() {
            let (chunk, at) = place(offset);
            let (now, later) = rest.split_at_mut(rest.len().min(CHUNK - at));
            let bytes = content.bytes(chunk, at);
            let (full, empty) = now.split_at_mut(now.len().min(bytes.len()));
            full.copy_from_slice(bytes.get(..full.len()).unwrap_or_default());
            empty.fill(0);
            offset += (full.len() + empty.len()) as u64;
            rest = later;
        }
        count
    }

    /// Writes at `offset` and returns how much: less than all only when there is no room for the rest.
    pub fn write(&mut self, number: Number, offset: u64, bytes: &[u8]) -> Result<usize, FileError> {
        let end = offset.checked_add(bytes.len() as u64).filter(|&end| end <= MAX_LENGTH);
        end.ok_or(FileError::TooLarge)?;
        let content = self.contents.get_mut(&number).ok_or(FileError::NotFound)?;
        let (mut rest, mut at) = (bytes, offset);
        while !rest.is_empty() {
            let (chunk, start) = place(at);
            let (now, later) = rest.split_at(rest.len().min(CHUNK - start));
            let lower = content.lower(chunk);
            let before = content.chunks.get(&chunk).map_or(0, Vec::len);
            let after = before.max(start + now.len()).max(if before == 0 { lower.len() } else { 0 });
            let room = self.limit.saturating_sub(self.bytes) >= (after - before) as u64;
            if !room || !put(&mut content.chunks, chunk, (lower, after), start, now) {
                break;
            }
            self.bytes += (after - before) as u64;
            at += now.len() as u64;
            rest = later;
        }
        match bytes.len() - rest.len() {
            0 if !bytes.is_empty() => Err(FileError::Full),
            0 => Ok(0),
            count => {
                content.length = content.length.max(at);
                Ok(count)
            }
        }
    }

    /// Sets the length; what is added reads as zeros.
    pub fn truncate(&mut self, number: Number, length: u64) -> Result<(), FileError> {
        if length > MAX_LENGTH {
            return Err(FileError::TooLarge);
        }
        let content = self.contents.get_mut(&number).ok_or(FileError::NotFound)?;
        if length < content.length {
            let (chunk, at) = place(length);
            let mut gone = content.chunks.split_off(&chunk);
            self.bytes -= held(&gone);
            if let Some(mut last) = gone.remove(&chunk).filter(|_| at > 0) {
                last.truncate(at);
                self.bytes += last.len() as u64;
                content.chunks.insert(chunk, last);
            }
            let visible = usize::try_from(length).unwrap_or(usize::MAX).min(content.lower.len());
            content.lower = content.lower.get(..visible).unwrap_or_default();
        }
        content.length = length;
        Ok(())
    }
}

fn held(chunks: &BTreeMap<u64, Vec<u8>>) -> u64 {
    chunks.values().map(|chunk| chunk.len() as u64).sum()
}

/// Writes `bytes` at `start` of a chunk, which starts as a copy of `lower` and becomes `length` bytes long; whether
/// there was memory.
fn put(
    chunks: &mut BTreeMap<u64, Vec<u8>>,
    chunk: u64,
    (lower, length): (&[u8], usize),
    start: usize,
    bytes: &[u8],
) -> bool {
    let fresh = !chunks.contains_key(&chunk);
    let kept = chunks.get(&chunk).map_or(0, Vec::len);
    if length > kept {
        if memory::heap_free_bytes() < CHUNK + heap::RESERVE / 2 {
            return false;
        }
        let own = chunks.entry(chunk).or_default();
        // Doubling up to the middle, then the whole: a chunk never holds more than its size.
        let reserved = if length > CHUNK / 2 {
            own.try_reserve_exact(CHUNK - kept)
        } else {
            own.try_reserve(length - kept)
        };
        if reserved.is_err() {
            if fresh {
                chunks.remove(&chunk);
            }
            return false;
        }
        if fresh {
            own.extend_from_slice(lower);
        }
        own.resize(length, 0);
    }
    let into = chunks.get_mut(&chunk).and_then(|own| own.get_mut(start..start + bytes.len()));
    into.is_some_and(|into| {
        into.copy_from_slice(bytes);
        true
    })
}

//! What one file holds: chunks in memory, blocks on the disk, the image's bytes.

use alloc::{rc::Rc, vec::Vec};

use super::map::Map;
use crate::virtio::block::BLOCK;

/// Bytes of a chunk.
pub const CHUNK: usize = 16 << 10;
/// Blocks of a chunk.
pub const CHUNK_BLOCKS: usize = CHUNK / BLOCK;
/// Part of a file in memory.
#[derive(Default)]
pub struct Chunk {
    /// Its bytes; zeros follow, and stand where a block is not present.
    pub bytes: Rc<Vec<u8>>,
    /// The blocks it holds, a bit each.
    pub present: u8,
    /// Those of them that are to be written.
    pub dirty: u8,
    /// Those of them that are being written.
    pub frozen: u8,
    /// Used since it was last considered for dropping.
    pub used: bool,
}

/// What a file holds.
#[derive(Default)]
pub struct Content {
    /// What of the image's bytes is still visible; shrinks when the file does.
    pub lower: &'static [u8],
    /// Chunks in memory, in order.
    pub chunks: Vec<(u64, Chunk)>,
    /// Bytes.
    pub length: u64,
    /// Blocks on the disk.
    pub map: Map,
    /// With a disk: it is the image's as a whole no more.
    pub own: bool,
    /// Blocks reserved for a copy of the image's bytes.
    pub copy_blocks: u32,
    /// Some of its blocks are lost, and nobody knows which: what looks like a hole may be one of them.
    pub torn: bool,
    /// Where a reader in order goes on.
    pub next_read: u64,
}

/// The chunk of an offset, and the place in it.
pub const fn place(offset: u64) -> (u64, usize) {
    (offset / CHUNK as u64, (offset % CHUNK as u64) as usize)
}

/// A bit for each block that a range in a chunk touches.
pub const fn touched(start: usize, end: usize) -> u8 {
    let (first, last) = (start / BLOCK, end.div_ceil(BLOCK));
    ((1u16 << last) - (1u16 << first)) as u8
}

/// Blocks of a mask.
pub fn blocks(mask: u8) -> impl Iterator<Item = usize> {
    (0..CHUNK_BLOCKS).filter(move |block| mask >> block & 1 == 1)
}

/// What a read finds where.
pub enum Source<'a> {
    /// These bytes, then zeros.
    Memory(&'a [u8]),
    /// A block of the disk.
    Disk,
    /// Zeros.
    Hole,
    /// What is lost.
    Lost,
}

impl Content {
    /// That of a file on the disk, whose blocks are still to be told.
    pub fn on_disk(length: u64, own: bool) -> Self {
        Self { length, own, ..Self::default() }
    }

    fn index(&self, chunk: u64) -> Result<usize, usize> {
        self.chunks.binary_search_by_key(&chunk, |(number, _)| *number)
    }

    /// A chunk in memory.
    pub fn chunk(&self, chunk: u64) -> Option<&Chunk> {
        self.chunks.get(self.index(chunk).ok()?).map(|(_, chunk)| chunk)
    }

    /// A chunk in memory.
    pub fn chunk_mut(&mut self, chunk: u64) -> Option<&mut Chunk> {
        let index = self.index(chunk).ok()?;
        self.chunks.get_mut(index).map(|(_, chunk)| chunk)
    }

    /// All chunks in memory.
    pub fn all_chunks(&self) -> impl Iterator<Item = (u64, &Chunk)> {
        self.chunks.iter().map(|(number, chunk)| (*number, chunk))
    }

    /// A chunk in memory, empty if it was not there.
    pub fn insert(&mut self, number: u64) -> &mut Chunk {
        let index = match self.index(number) {
            Ok(index) => index,
            Err(index) => {
                if self.chunks.is_empty() {
                    self.chunks.reserve_exact(1);
                }
                self.chunks.insert(index, (number, Chunk::default()));
                index
            }
        };
        &mut self.chunks[index].1
    }

    /// Forgets a chunk.
    pub fn forget(&mut self, chunk: u64) -> Option<Chunk> {
        let index = self.index(chunk).ok()?;
        let (_, chunk) = self.chunks.remove(index);
        if self.chunks.is_empty() {
            self.chunks = Vec::new();
        }
        Some(chunk)
    }

    /// The image's bytes in a block of the file.
    pub fn lower(&self, at: u64) -> &'static [u8] {
        let start = usize::try_from(at).ok().and_then(|at| at.checked_mul(BLOCK));
        let Some(rest) = start.and_then(|start| self.lower.get(start..)) else { return &[] };
        rest.get(..BLOCK).unwrap_or(rest)
    }

    /// Where a block of the file is to be had.
    pub fn source(&self, at: u64) -> Source<'_> {
        let (chunk, block) = (at / CHUNK_BLOCKS as u64, at as usize % CHUNK_BLOCKS);
        if let Some(own) = self.chunk(chunk).filter(|own| own.present >> block & 1 == 1) {
            let bytes = own.bytes.get(block * BLOCK..).unwrap_or_default();
            return Source::Memory(bytes.get(..BLOCK).unwrap_or(bytes));
        }
        match self.lower(at) {
            [] if self.map.get(at).is_some() => Source::Disk,
            [] if self.torn => Source::Lost,
            [] => Source::Hole,
            lower => Source::Memory(lower),
        }
    }

    /// Whether a block of the file can only be had from the disk.
    pub fn is_missing(&self, at: u64) -> bool {
        matches!(self.source(at), Source::Disk)
    }

    /// Blocks that the image's bytes take.
    pub fn lower_blocks(&self) -> u32 {
        u32::try_from(self.lower.len().div_ceil(BLOCK)).unwrap_or(u32::MAX)
    }
}

//! The one writer of a disk.

use std::{io, ops::Range};

use rustix::rand::{GetRandomFlags, getrandom};

use crate::{
    BLOCK_BYTES, Backing, Geometry, GeometryError, Index, IndexHeader, ReadError,
    checkpoint::{self, Layer, LogPoint, Piece, PiecePoint},
    index::{Entry, Place, Word, digest_of},
    layout::Superblock,
    reader::Blocks,
    record::{BlockRange, Body},
    recovery::{Recovered, RecoveryError, Uncommitted, recover},
    segments::Segments,
};

mod append;
mod check;
mod clean;
mod commit;
mod marks;
mod scrub;
mod state;
#[cfg(test)]
mod tests;

use marks::Marks;

pub use clean::Cleaned;
pub use scrub::Scrubbed;
pub use state::{State, StateError};

/// Why a write, discard, flush or cleaning failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The medium failed; nothing of this call counts unless it was a write of several records.
    #[error("{doing}: {source}")]
    Io {
        /// What the store was at.
        doing: &'static str,
        /// What the medium said.
        #[source]
        source: io::Error,
    },
    /// No room, even after cleaning. Nothing is harmed: flushing frees what the last commit alone needed,
    /// discarding frees more.
    #[error("the disk is full: its log holds {held_blocks} blocks of at most {max_blocks}")]
    Full {
        /// Blocks in use.
        held_blocks: u64,
        /// Blocks that may be.
        max_blocks: u64,
    },
    /// A sync failed before, so that what the medium has is unknown.
    #[error("a sync failed before; open the disk anew")]
    Broken,
    /// The disk has no such blocks.
    #[error("blocks from {first} on, {bytes} bytes: not whole blocks of this disk")]
    OutOfRange {
        /// First block.
        first: u64,
        /// Bytes that were to be theirs.
        bytes: u64,
    },
    /// The bytes given to repair a block are not those that it had.
    #[error("block {block} never had these bytes")]
    NotThisBlock {
        /// Block to repair.
        block: u64,
    },
}

/// Why a store could not be created, opened or taken over.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The medium failed.
    #[error("{doing}: {source}")]
    Io {
        /// What the store was at.
        doing: &'static str,
        /// What the medium said.
        #[source]
        source: io::Error,
    },
    /// The shape is impossible.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The log could not be read.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// There is something where a store was to be created.
    #[error("the log file holds a store already")]
    NotEmpty,
    /// The log is another disk's.
    #[error("the log belongs to another disk")]
    OtherIdentity,
    /// The index cannot be stored to, or is for a disk of another size.
    #[error("an index for {blocks} blocks, writable or not, does not fit this disk")]
    Index {
        /// Blocks that the index is for.
        blocks: u64,
    },
    /// The state does not fit the log and index.
    #[error(transparent)]
    State(#[from] StateError),
    /// The log could not be brought into order.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a new disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initial {
    /// Zeros.
    Zeros,
    /// Another host has every block.
    Missing,
}

/// What may differ between two writers of the same log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// The log may have this many hundredths of what it holds before writes clean first.
    pub log_percent: u32,
    /// And this many bytes.
    pub log_slack_bytes: u64,
    /// A flush writes a checkpoint once in so many bytes of log.
    pub checkpoint_bytes: u64,
    /// So many records without a flush are synced and covered by a checkpoint all the same, so that opening
    /// need not walk more.
    pub checkpoint_records: u64,
    /// A flush of more than this syncs first and commits then, so that opening need not read it again.
    pub verify_bytes: u64,
}

impl Default for Tuning {
    /// 150 % and 32 MiB: a log two thirds full writes 1.9 bytes for each byte of random overwrites in
    /// records of 128 KiB (2.2 in single blocks), one four fifths full 3.2 (3.8), one half full 1.3 (1.5).
    /// A checkpoint in 32 MiB is 1 to 3 % of that; opening a 1 GiB disk with as much single blocks behind
    /// its checkpoint as may be takes 16 ms. Measured by `figures`.
    fn default() -> Self {
        Self {
            log_percent: 150,
            log_slack_bytes: 32 << 20,
            checkpoint_bytes: 32 << 20,
            checkpoint_records: 1 << 16,
            verify_bytes: 8 << 20,
        }
    }
}

/// Counters since the writer began, and sizes now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Bytes written by callers.
    pub user_bytes: u64,
    /// Bytes appended to the log, headers and cleaning included.
    pub log_bytes: u64,
    /// Bytes of blocks that cleaning copied.
    pub cleaned_bytes: u64,
    /// Bytes of checkpoints.
    pub checkpoint_bytes: u64,
    /// Commits.
    pub commits: u64,
    /// Syncs, those of commits included.
    pub syncs: u64,
    /// Bytes of blocks that the current state or the last commit needs.
    pub held_bytes: u64,
    /// Bytes of segments in use.
    pub in_use_bytes: u64,
}

impl Stats {
    /// Bytes written to the medium for each byte that callers wrote.
    #[must_use]
    pub fn amplification(&self) -> f64 {
        (self.log_bytes + self.checkpoint_bytes) as f64 / self.user_bytes.max(1) as f64
    }
}

/// The one writer of a disk.
#[derive(Debug)]
pub struct Store<B> {
    backing: B,
    index: Index,
    geometry: Geometry,
    identity: [u8; 16],
    life: u64,
    session: u64,
    tuning: Tuning,
    /// Where the next record goes.
    log: LogPoint,
    /// Last record that is known synced.
    durable: u64,
    /// Last commit or move appended, and last known synced.
    settling: u64,
    settled: u64,
    /// Bytes appended since the last sync.
    unsynced: u64,
    /// Bytes appended since the last checkpoint.
    uncovered: u64,
    /// Last piece written, and last known synced.
    piece: PiecePoint,
    durable_piece: PiecePoint,
    segments: Segments,
    /// Every live block is in its segment's list.
    listed: bool,
    /// Blocks written since the last commit, with what they were at it.
    pending: Marks<Entry>,
    /// Blocks to be told in the next piece; none when it must be a whole index.
    changed: Option<Marks<()>>,
    /// Something was written since the last commit.
    uncommitted: bool,
    /// A sync failed.
    broken: bool,
    stats: Stats,
    /// Reused for each record.
    header: Vec<u8>,
    scrub_next: u32,
}

fn drawn() -> io::Result<u64> {
    let mut bytes = [0; 8];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

fn open_io(doing: &'static str) -> impl Fn(io::Error) -> OpenError {
    move |source| OpenError::Io { doing, source }
}

impl<B: Backing> Store<B> {
    /// Whether no store of such a shape was ever created on `backing`, or not to the end.
    ///
    /// # Errors
    /// The backing fails.
    pub fn is_blank(backing: &B, geometry: &Geometry) -> io::Result<bool> {
        Ok(backing.length()? <= geometry.segment_at(0) && Superblock::is_blank(backing)?)
    }

    /// Creates a store on a blank `backing` for the disk `identity`, and returns once it is durable. The superblock is
    /// written last: a creation that was cut short leaves a blank.
    ///
    /// # Errors
    /// The backing is not blank or fails, or shape and index do not fit.
    pub fn create(
        backing: B,
        index: Index,
        identity: [u8; 16],
        geometry: Geometry,
        initial: Initial,
        tuning: Tuning,
    ) -> Result<Self, OpenError> {
        let geometry = geometry.validated()?;
        if !Self::is_blank(&backing, &geometry).map_err(open_io("reading the superblock"))? {
            return Err(OpenError::NotEmpty);
        }
        let life = drawn().map_err(open_io("drawing a number"))?;
        let superblock = Superblock { geometry, identity, life };
        let mut segments = Segments::new(geometry, 0);
        let segment = segments.take().unwrap_or(0);
        let log = LogPoint { segment, chain: life, ..LogPoint::default() };
        let mut committed = Layer::default();
        let word = match initial {
            Initial::Zeros => Word::ZEROS,
            Initial::Missing => Word::MISSING,
        };
        let count = u32::try_from(geometry.blocks).unwrap_or(u32::MAX);
        committed.ranges.push(BlockRange { first: 0, count, word });
        let first = Piece { log, committed, uncommitted: Layer::default() };
        let piece = checkpoint::begin(&backing, &geometry, life, &PiecePoint::default(), &first)
            .map_err(open_io("writing the first checkpoint"))?;
        backing.sync().map_err(open_io("syncing the first checkpoint"))?;
        superblock.write(&backing).map_err(open_io("writing the superblock"))?;
        let mut store = Self::assemble(backing, index, superblock, tuning, log, segments)?;
        (store.piece, store.changed) = (piece, Some(Marks::new(geometry.blocks)));
        for block in 0..geometry.blocks {
            store.show(block, Entry { word, digest: 0 });
        }
        store.sync_log()?;
        store.tell();
        Ok(store)
    }

    /// Opens the store on `backing` as it was at its last commit; the index is filled anew.
    ///
    /// For a machine that died with its writer.
    ///
    /// # Errors
    /// The log is no store, another disk's, or damaged; the backing fails; the index does not fit.
    pub fn open(backing: B, index: Index, identity: [u8; 16], tuning: Tuning) -> Result<Self, OpenError> {
        Self::recovered(backing, index, identity, tuning, Uncommitted::Drop)
    }

    /// Takes over from a writer that was killed on this host, with all that it wrote, committed or not.
    ///
    /// For a disk whose machine lives on elsewhere. Not for a host that lost power: what was not synced
    /// may be there in part.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn take_over(
        backing: B,
        index: Index,
        identity: [u8; 16],
        tuning: Tuning,
    ) -> Result<Self, OpenError> {
        Self::recovered(backing, index, identity, tuning, Uncommitted::Keep)
    }

    fn recovered(
        backing: B,
        index: Index,
        identity: [u8; 16],
        tuning: Tuning,
        uncommitted: Uncommitted,
    ) -> Result<Self, OpenError> {
        let Recovered { superblock, committed, uncommitted, log, settled, piece, walked, rollback } =
            recover(&backing, uncommitted)?;
        if superblock.identity != identity {
            return Err(OpenError::OtherIdentity);
        }
        let written = backing.length().map_err(open_io("measuring the log"))?;
        let segments = Segments::new(superblock.geometry, written);
        let mut store = Self::assemble(backing, index, superblock, tuning, log, segments)?;
        (store.piece, store.durable_piece, store.settling) = (piece, piece, settled);
        for (block, entry) in (0..).zip(&committed) {
            let now = u32::try_from(block).ok().and_then(|block| uncommitted.get(&block));
            store.show(block, *now.unwrap_or(entry));
        }
        store.uncommitted = !uncommitted.is_empty();
        for block in uncommitted.keys() {
            if let Some(before) = committed.get(*block as usize) {
                store.pending.mark(*block, *before);
            }
        }
        store.count_segments(&walked).map_err(|at| RecoveryError::Damaged {
            what: format!("a block is said to lie at byte {at}, outside the log"),
        })?;
        // What was read need not be on the medium: only this host's memory may have it.
        store.sync_log()?;
        if rollback {
            store.append_control(&Body::Rollback)?;
            store.sync_log()?;
        }
        store.segments.reclaim(store.durable, store.durable_piece.sequence);
        store.tell();
        Ok(store)
    }

    fn assemble(
        backing: B,
        index: Index,
        superblock: Superblock,
        tuning: Tuning,
        log: LogPoint,
        segments: Segments,
    ) -> Result<Self, OpenError> {
        let Superblock { geometry, identity, life } = superblock;
        if index.blocks() != geometry.blocks || !index.is_writable() {
            return Err(OpenError::Index { blocks: index.blocks() });
        }
        Ok(Self {
            backing,
            index,
            geometry,
            identity,
            life,
            session: drawn().map_err(open_io("drawing a number"))?,
            tuning,
            log,
            durable: 0,
            settling: 0,
            settled: 0,
            unsynced: 0,
            uncovered: 0,
            piece: PiecePoint::default(),
            durable_piece: PiecePoint::default(),
            segments,
            listed: true,
            pending: Marks::new(geometry.blocks),
            changed: None,
            uncommitted: false,
            broken: false,
            stats: Stats::default(),
            header: Vec::new(),
            scrub_next: 0,
        })
    }

    /// Stores an index entry unless it stands there already, so that readers meet no change without one.
    fn show(&self, block: u64, entry: Entry) {
        if self.index.entry(block) != Some(entry) {
            self.index.set(block, entry);
        }
    }

    /// Counts every block of index and last commit into its segment, those in `used` being in use anyway.
    /// Returns the position of a block that lies in none.
    fn count_segments(&mut self, used: &[(u32, u64)]) -> Result<(), u64> {
        let mut in_use = vec![false; self.geometry.segments as usize];
        let shadows = self.pending.iter().map(|(_, entry)| entry.word);
        let current = (0..self.geometry.blocks).filter_map(|block| self.index.word(block));
        for word in current.chain(shadows) {
            let at = match word.place() {
                Place::Zeros | Place::Missing => continue,
                Place::At(at) if self.geometry.holds_block(at) => at,
                Place::At(at) => return Err(at),
                Place::Unknown => return Err(word.0),
            };
            let segment = self.geometry.segment_of(at).ok_or(at)?;
            if let Some(seen @ false) = in_use.get_mut(segment as usize) {
                *seen = true;
                self.segments.occupy(segment, false, 0);
            }
            self.segments.count(segment);
        }
        for (segment, last) in used {
            self.segments.occupy(*segment, false, *last);
        }
        self.segments.occupy(self.log.segment, true, self.log.sequence);
        self.segments.sort_out(self.log.sequence);
        self.listed = false;
        Ok(())
    }

    /// Lists the blocks of each segment, unless that was done: a writer that begins only counts them, as
    /// it is waited for.
    fn list_blocks(&mut self) {
        if self.listed {
            return;
        }
        self.listed = true;
        for block in 0..u32::try_from(self.geometry.blocks).unwrap_or(u32::MAX) {
            let now = self.index.word(u64::from(block));
            let before = self.pending.get(block).map(|entry| entry.word);
            for at in now.into_iter().chain(before).filter_map(Word::position) {
                self.segments.list(at, block);
            }
        }
    }

    /// Shape of the disk and its log.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The disk that the log belongs to.
    #[must_use]
    pub fn identity(&self) -> [u8; 16] {
        self.identity
    }

    /// The index that the store keeps.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Counters and sizes.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            held_bytes: self.segments.held() * BLOCK_BYTES as u64,
            in_use_bytes: u64::from(self.segments.in_use()) * u64::from(self.geometry.segment_bytes),
            ..self.stats
        }
    }

    /// Number of the last commit.
    #[must_use]
    pub fn commits(&self) -> u64 {
        self.log.commit
    }

    /// Bytes that may be written before [`StoreError::Full`], if nothing written before is overwritten.
    #[must_use]
    pub fn room_bytes(&self) -> u64 {
        self.geometry.max_held_blocks().saturating_sub(self.segments.held()) * BLOCK_BYTES as u64
    }

    /// Reads whole blocks from `first` on; zeros where nothing was written.
    ///
    /// # Errors
    /// The first block that is missing, corrupt or cannot be read.
    pub fn read(&self, first: u64, into: &mut [u8]) -> Result<(), ReadError> {
        Blocks { backing: &self.backing, index: &self.index, geometry: &self.geometry }.read(first, into)
    }

    /// Checksum of a block's bytes as they should be, without reading them; none where another host has
    /// the block.
    #[must_use]
    pub fn digest(&self, block: u64) -> Option<u64> {
        let entry = self.index.entry(block)?;
        match entry.word.place() {
            Place::Zeros => Some(digest_of(&[0; BLOCK_BYTES])),
            Place::At(_) if entry.word.tagged(entry.digest) => Some(entry.digest),
            Place::At(_) | Place::Missing | Place::Unknown => None,
        }
    }

    /// Whether no sync has failed.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        !self.broken
    }

    fn usable(&self) -> Result<(), StoreError> {
        if self.broken { Err(StoreError::Broken) } else { Ok(()) }
    }

    fn full(&self) -> StoreError {
        StoreError::Full { held_blocks: self.segments.held(), max_blocks: self.geometry.max_held_blocks() }
    }

    fn inside(&self, blocks: &Range<u64>) -> Result<Range<u32>, StoreError> {
        let out_of_range = || StoreError::OutOfRange {
            first: blocks.start,
            bytes: blocks.end.saturating_sub(blocks.start).saturating_mul(BLOCK_BYTES as u64),
        };
        if blocks.start > blocks.end || blocks.end > self.geometry.blocks {
            return Err(out_of_range());
        }
        let number = |block: u64| u32::try_from(block).map_err(|_| out_of_range());
        Ok(number(blocks.start)?..number(blocks.end)?)
    }

    /// Tells onlookers where the store stands.
    fn tell(&self) {
        self.index.set_header(&IndexHeader {
            life: self.life,
            sequence: self.log.sequence,
            commit: self.log.commit,
            uncommitted: self.pending.len() as u64,
            held_blocks: self.segments.held(),
        });
    }
}

//! What a log says after its writer is gone.
//!
//! Starts from the newest checkpoint and walks the headers of the records behind it. Records that were
//! synced, as a later one testifies, count as they are; behind those a record counts only if its payload
//! has its digests, so that the log ends before the first one that did not arrive whole. Up to there the
//! last commit decides, and moves hold. No segment is used again before a checkpoint covers its records,
//! so every payload that the walk may want to see is still there. Nothing is written.

use std::{collections::HashMap, io};

use crate::{
    BLOCK_BYTES, Backing, Geometry, SECTOR_BYTES,
    checkpoint::{self, LogPoint, PiecePoint},
    index::{Entry, Word, digest_of},
    layout::Superblock,
    record::{self, Body, MAX_HEADER_BYTES, Record},
};

/// Records a walk reads in one go where they are small.
const WINDOW_BYTES: usize = 32 << 10;

/// Why a log could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The medium failed.
    #[error("reading the log: {0}")]
    Io(#[from] io::Error),
    /// No store was ever created here, or its first bytes are lost.
    #[error("no store: neither copy of the superblock is whole")]
    NotAStore,
    /// What was synced is not there.
    #[error("the log is damaged: {what}; the disk must be fetched from another host")]
    Damaged {
        /// What is missing.
        what: String,
    },
}

fn damaged(what: impl Into<String>) -> RecoveryError {
    RecoveryError::Damaged { what: what.into() }
}

/// What becomes of writes behind the last commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Uncommitted {
    /// The machine that made them is gone.
    Drop,
    /// The machine lives on and has seen them.
    Keep,
}

/// State of a store at the end of its log.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) superblock: Superblock,
    /// Every block as of the last commit.
    pub(crate) committed: Vec<Entry>,
    /// Blocks written since, where they are kept.
    pub(crate) uncommitted: HashMap<u32, Entry>,
    pub(crate) log: LogPoint,
    /// Last commit or move.
    pub(crate) settled: u64,
    pub(crate) piece: PiecePoint,
    /// Segments with records behind the checkpoint, and the last of these.
    pub(crate) walked: Vec<(u32, u64)>,
    /// Writes that do not hold stand before the log's end, or behind it.
    pub(crate) rollback: bool,
}

struct Walk<'a, B> {
    backing: &'a B,
    geometry: Geometry,
    life: u64,
    at: LogPoint,
    window: Vec<u8>,
    window_at: u64,
}

/// A record, the segment it lies in, and the log's point behind it.
struct Step {
    record: Record,
    payload_at: u64,
    segment: u32,
    behind: LogPoint,
}

impl<B: Backing> Walk<'_, B> {
    /// Header bytes at `at`, from the window where that has them.
    fn header(&mut self, at: u64, room: usize) -> io::Result<&[u8]> {
        let wanted = room.min(MAX_HEADER_BYTES);
        let skip = at.checked_sub(self.window_at).and_then(|skip| usize::try_from(skip).ok());
        let inside = skip.filter(|skip| skip + wanted <= self.window.len());
        let skip = if let Some(skip) = inside {
            skip
        } else {
            self.window.resize(room.min(WINDOW_BYTES), 0);
            self.backing.read_at(at, &mut self.window)?;
            self.window_at = at;
            0
        };
        Ok(self.window.get(skip..skip + wanted).unwrap_or_default())
    }

    fn next(&mut self) -> io::Result<Option<Step>> {
        let LogPoint { segment, offset, sequence, chain, .. } = self.at;
        let room = self.geometry.segment_bytes.saturating_sub(offset) as usize;
        let at = self.geometry.segment_at(segment) + u64::from(offset);
        if room < SECTOR_BYTES {
            return Ok(None);
        }
        let (life, segments) = (self.life, self.geometry.segments);
        let Some(record) = record::decode(self.header(at, room)?) else { return Ok(None) };
        let head = &record.head;
        let follows = head.life == life
            && head.sequence == sequence + 1
            && head.chain == chain
            && record.body.record_bytes() <= room
            && head.next.is_none_or(|next| next < segments && next != segment);
        if !follows {
            return Ok(None);
        }
        let end = offset + u32::try_from(record.body.record_bytes()).unwrap_or(u32::MAX);
        let (to, offset) = head.next.map_or((segment, end), |next| (next, 0));
        let behind = LogPoint {
            segment: to,
            offset,
            sequence: head.sequence,
            chain: record.checksum,
            commit: head.commit,
        };
        self.at = behind;
        let payload_at = at + record.body.header_bytes() as u64;
        Ok(Some(Step { record, payload_at, segment, behind }))
    }
}

/// Whether a record's payload is what it promises.
fn payload_is_whole(backing: &impl Backing, step: &Step) -> io::Result<bool> {
    let digests = step.record.body.payload_digests();
    let mut bytes = vec![0; digests.len() * BLOCK_BYTES];
    backing.read_at(step.payload_at, &mut bytes)?;
    Ok(bytes.chunks_exact(BLOCK_BYTES).zip(digests).all(|(block, digest)| digest_of(block) == digest))
}

/// How many of `steps` count.
fn counted(
    backing: &impl Backing,
    steps: &[Step],
    durable: u64,
    uncommitted: Uncommitted,
) -> io::Result<usize> {
    let synced = steps.partition_point(|step| step.record.head.sequence <= durable);
    let behind = steps.get(synced..).unwrap_or_default();
    // Moves count without a commit: if they were synced, what they moved may be gone from its old place.
    let counts = |step: &Step| step.record.body.settles();
    let worth_it = match uncommitted {
        Uncommitted::Keep => behind.len(),
        Uncommitted::Drop => behind.iter().rposition(counts).map_or(0, |last| last + 1),
    };
    let mut count = 0;
    for (place, step) in behind.iter().take(worth_it).enumerate() {
        if !payload_is_whole(backing, step)? {
            break;
        }
        if uncommitted == Uncommitted::Keep || counts(step) {
            count = place + 1;
        }
    }
    Ok(synced + count)
}

#[derive(Debug)]
struct Layers {
    committed: Vec<Entry>,
    uncommitted: HashMap<u32, Entry>,
    dirty: bool,
}

impl Layers {
    fn write(&mut self, block: u32, entry: Entry) {
        self.dirty = true;
        if (block as usize) < self.committed.len() {
            self.uncommitted.insert(block, entry);
        }
    }

    fn commit(&mut self) {
        for (block, entry) in self.uncommitted.drain() {
            if let Some(committed) = self.committed.get_mut(block as usize) {
                *committed = entry;
            }
        }
        self.dirty = false;
    }

    fn apply(&mut self, step: &Step) {
        let at = |place: usize| step.payload_at + (place * BLOCK_BYTES) as u64;
        match &step.record.body {
            Body::Written(entries) => {
                for (place, written) in entries.iter().enumerate() {
                    let digest = written.digest;
                    self.write(written.block, Entry { word: Word::at(at(place), digest), digest });
                }
            }
            Body::Moved { entries, .. } => {
                for (place, moved) in entries.iter().enumerate() {
                    let to = Entry { word: Word::at(at(place), moved.digest), digest: moved.digest };
                    let committed = self.committed.get_mut(moved.block as usize);
                    let uncommitted = self.uncommitted.get_mut(&moved.block);
                    for entry in committed.into_iter().chain(uncommitted) {
                        if entry.word == moved.from {
                            *entry = to;
                        }
                    }
                }
            }
            Body::Ranges(ranges) => {
                for range in ranges {
                    for block in range.first..range.first.saturating_add(range.count) {
                        self.write(block, Entry { word: range.word, digest: 0 });
                        if block as usize >= self.committed.len() {
                            break;
                        }
                    }
                }
            }
            Body::Commit => self.commit(),
            Body::Rollback => {
                self.uncommitted.clear();
                self.dirty = false;
            }
            Body::Jump => {}
        }
    }
}

/// Looks for a record that says more was settled than was found: silence about that would be worse than
/// no disk.
fn refuse_if_more_was_settled(
    backing: &impl Backing,
    superblock: &Superblock,
    walked_to: LogPoint,
    end: u64,
    piece: &PiecePoint,
) -> Result<(), RecoveryError> {
    let geometry = &superblock.geometry;
    let claims_more = |bytes: &[u8]| {
        record::decode(bytes).is_some_and(|record| {
            record.head.life == superblock.life
                && (record.head.settled > end || record.head.piece > piece.number)
        })
    };
    let rest = geometry.segment_bytes.saturating_sub(walked_to.offset) as usize;
    let mut bytes = vec![0; rest];
    backing.read_at(geometry.segment_at(walked_to.segment) + u64::from(walked_to.offset), &mut bytes)?;
    if (0..rest).step_by(SECTOR_BYTES).any(|at| claims_more(bytes.get(at..).unwrap_or_default())) {
        return Err(damaged(format!("a record in segment {} is lost", walked_to.segment)));
    }
    let written = backing.length()?;
    let mut header = [0; MAX_HEADER_BYTES];
    for segment in 0..geometry.segments {
        let at = geometry.segment_at(segment);
        if at >= written {
            break;
        }
        let (sector, rest) = header.split_at_mut(SECTOR_BYTES);
        backing.read_at(at, sector)?;
        if record::has_magic(sector) {
            backing.read_at(at + SECTOR_BYTES as u64, rest)?;
            if claims_more(&header) {
                return Err(damaged(format!("records before segment {segment} are lost")));
            }
        }
    }
    Ok(())
}

/// Reads what the log says.
///
/// # Errors
/// The medium failed, or what was synced is not there.
pub(crate) fn recover(backing: &impl Backing, uncommitted: Uncommitted) -> Result<Recovered, RecoveryError> {
    let superblock = Superblock::read(backing)?.ok_or(RecoveryError::NotAStore)?;
    let (geometry, life) = (superblock.geometry, superblock.life);
    let (piece, pieces) = checkpoint::load(backing, &geometry, life)?
        .ok_or_else(|| damaged("neither checkpoint slot holds a whole index"))?;
    let blocks = usize::try_from(geometry.blocks).map_err(io::Error::other)?;
    let mut layers =
        Layers { committed: vec![Entry::default(); blocks], uncommitted: HashMap::new(), dirty: false };
    let mut start = LogPoint::default();
    for piece in pieces {
        piece.committed.for_each(geometry.blocks, |block, entry| {
            if let Some(committed) = layers.committed.get_mut(block as usize) {
                *committed = entry;
            }
        });
        layers.uncommitted.clear();
        piece.uncommitted.for_each(geometry.blocks, |block, entry| {
            layers.uncommitted.insert(block, entry);
        });
        start = piece.log;
    }
    layers.dirty = !layers.uncommitted.is_empty();
    if start.segment >= geometry.segments || start.offset > geometry.segment_bytes {
        return Err(damaged("the checkpoint ends outside the log"));
    }
    let mut walk = Walk { backing, geometry, life, at: start, window: Vec::new(), window_at: 0 };
    let mut steps = Vec::new();
    while let Some(step) = walk.next()? {
        steps.push(step);
    }
    let walked_to = walk.at;
    let durable = steps.iter().map(|step| step.record.head.durable).fold(start.sequence, u64::max);
    let count = counted(backing, &steps, durable, uncommitted)?;
    let mut log = start;
    let mut settled = start.sequence;
    let mut walked: Vec<(u32, u64)> = Vec::new();
    for step in steps.iter().take(count) {
        layers.apply(step);
        log = step.behind;
        if step.record.body.settles() {
            settled = log.sequence;
        }
        match walked.last_mut() {
            Some((segment, last)) if *segment == step.segment => *last = log.sequence,
            _ => walked.push((step.segment, log.sequence)),
        }
    }
    refuse_if_more_was_settled(backing, &superblock, walked_to, log.sequence, &piece)?;
    // Dropped records must not be found again by one who would keep them.
    let rollback = uncommitted == Uncommitted::Drop && (layers.dirty || count < steps.len());
    if uncommitted == Uncommitted::Drop {
        layers.uncommitted.clear();
    }
    let Layers { committed, uncommitted, .. } = layers;
    Ok(Recovered { superblock, committed, uncommitted, log, settled, piece, walked, rollback })
}

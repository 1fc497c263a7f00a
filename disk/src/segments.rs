//! Which segments of the log are in use, by how much, and which may be used again.
//!
//! A segment is `free → active → closed → free`. Closed ones lose blocks as these are overwritten,
//! discarded or moved. Blocks count as long as the last commit or the current state needs them. An
//! empty segment is free once no crash can bring its blocks back (the record that emptied it is synced)
//! and opening no longer walks it (a synced checkpoint covers its records).

use crate::Geometry;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Active,
    Closed,
}

#[derive(Debug, Clone)]
struct Segment {
    state: State,
    /// Blocks in it that the last commit or the current state needs.
    live: u32,
    /// Last record in it.
    last_sequence: u64,
    /// Record that took away its last block so far.
    emptied_by: u64,
    /// When it was closed, in bytes appended to the log.
    closed_at: u64,
    /// Every block that was written into it; some more than once.
    blocks: Vec<u32>,
}

const EMPTY: Segment = Segment {
    state: State::Free,
    live: 0,
    last_sequence: 0,
    emptied_by: 0,
    closed_at: 0,
    blocks: Vec::new(),
};

/// The segments of one log.
#[derive(Debug)]
pub(crate) struct Segments {
    geometry: Geometry,
    table: Vec<Segment>,
    /// Free ones whose space the file still has; writing them changes no file system metadata.
    warm: Vec<u32>,
    /// Free ones without space.
    fresh: Vec<u32>,
    /// Closed ones without blocks that are not free yet.
    emptied: Vec<u32>,
    held: u64,
}

impl Segments {
    /// All segments free; those that begin before byte `written` of the file have space.
    pub(crate) fn new(geometry: Geometry, written: u64) -> Self {
        let warm = |segment: &u32| geometry.segment_at(*segment) < written;
        Self {
            geometry,
            table: vec![EMPTY; geometry.segments as usize],
            warm: (0..geometry.segments).rev().filter(warm).collect(),
            fresh: (0..geometry.segments).rev().filter(|segment| !warm(segment)).collect(),
            emptied: Vec::new(),
            held: 0,
        }
    }

    fn get(&mut self, segment: u32) -> Option<&mut Segment> {
        self.table.get_mut(segment as usize)
    }

    /// Blocks that the last commit or the current state needs.
    pub(crate) fn held(&self) -> u64 {
        self.held
    }

    pub(crate) fn free(&self) -> u32 {
        u32::try_from(self.warm.len() + self.fresh.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn in_use(&self) -> u32 {
        self.geometry.segments - self.free()
    }

    /// Empty segments that are not free yet.
    pub(crate) fn waiting(&self) -> usize {
        self.emptied.len()
    }

    /// Makes a free segment the active one.
    pub(crate) fn take(&mut self) -> Option<u32> {
        let segment = self.warm.pop().or_else(|| self.fresh.pop())?;
        *self.get(segment)? = Segment { state: State::Active, ..EMPTY };
        Some(segment)
    }

    /// Undoes [`Segments::take`] of a segment that was not written.
    pub(crate) fn give_back(&mut self, segment: u32) {
        if let Some(entry) = self.get(segment) {
            *entry = EMPTY;
            self.warm.push(segment);
        }
    }

    /// Notes that the log has a segment in use: `active`, or closed. [`Segments::sort_out`] must follow.
    pub(crate) fn occupy(&mut self, segment: u32, active: bool, last_sequence: u64) {
        let state = if active { State::Active } else { State::Closed };
        if let Some(entry) = self.get(segment) {
            entry.state = state;
            entry.last_sequence = entry.last_sequence.max(last_sequence);
        }
    }

    /// Sorts out which segments are free and which in use are empty, once all blocks are in; `sequence` is
    /// the log's last.
    pub(crate) fn sort_out(&mut self, sequence: u64) {
        let is_free =
            |segment: &u32| self.table.get(*segment as usize).is_some_and(|entry| entry.state == State::Free);
        self.warm.retain(is_free);
        self.fresh.retain(is_free);
        self.emptied.clear();
        for (number, segment) in (0..).zip(&mut self.table) {
            if segment.state == State::Closed && segment.live == 0 {
                segment.emptied_by = sequence;
                self.emptied.push(number);
            }
        }
    }

    /// Notes that record `sequence` was appended to `segment`.
    pub(crate) fn appended(&mut self, segment: u32, sequence: u64) {
        if let Some(entry) = self.get(segment) {
            entry.last_sequence = sequence;
        }
    }

    /// Notes that the log went on elsewhere.
    pub(crate) fn close(&mut self, segment: u32, log_bytes: u64) {
        if let Some(entry) = self.get(segment) {
            entry.state = State::Closed;
            entry.closed_at = log_bytes;
            entry.emptied_by = entry.emptied_by.max(entry.last_sequence);
            if entry.live == 0 {
                self.emptied.push(segment);
            }
        }
    }

    /// Counts a block that lies at `at` already, without listing it.
    pub(crate) fn count(&mut self, segment: u32) {
        if let Some(entry) = self.get(segment) {
            entry.live += 1;
            self.held += 1;
        }
    }

    /// Lists a block that was counted.
    pub(crate) fn list(&mut self, at: u64, block: u32) {
        if let Some(entry) = self.geometry.segment_of(at).and_then(|segment| self.get(segment)) {
            entry.blocks.push(block);
        }
    }

    /// Counts and lists a block at byte `at` of the file.
    pub(crate) fn add(&mut self, at: u64, block: u32) {
        let Some(segment) = self.geometry.segment_of(at) else { return };
        if let Some(entry) = self.get(segment) {
            entry.live += 1;
            entry.blocks.push(block);
            self.held += 1;
        }
    }

    /// Counts a block at `at` no longer, from record `sequence` on.
    pub(crate) fn remove(&mut self, at: u64, sequence: u64) {
        let Some(segment) = self.geometry.segment_of(at) else { return };
        let Some(entry) = self.get(segment) else { return };
        entry.live = entry.live.saturating_sub(1);
        entry.emptied_by = entry.emptied_by.max(sequence);
        let emptied = entry.live == 0 && entry.state == State::Closed;
        self.held = self.held.saturating_sub(1);
        if emptied {
            self.emptied.push(segment);
        }
    }

    /// Frees what may be freed, with everything up to `durable` synced and a synced checkpoint of
    /// everything up to `covered`. Returns how many.
    pub(crate) fn reclaim(&mut self, durable: u64, covered: u64) -> u32 {
        let mut freed = 0;
        let (table, warm) = (&mut self.table, &mut self.warm);
        self.emptied.retain(|number| {
            let Some(segment) = table.get_mut(*number as usize) else { return false };
            if segment.emptied_by > durable || segment.last_sequence > covered {
                return true;
            }
            *segment = EMPTY;
            warm.push(*number);
            freed += 1;
            false
        });
        freed
    }

    /// A free segment whose space may go back to the file system, beyond `keep` that stay.
    pub(crate) fn surplus(&mut self, keep: usize) -> Option<u32> {
        (self.warm.len() > keep).then(|| self.warm.swap_remove(0))
    }

    /// Notes that a [`Segments::surplus`] segment has no space any more, or, failing that, still has it.
    pub(crate) fn punched(&mut self, segment: u32, punched: bool) {
        if punched { self.fresh.push(segment) } else { self.warm.push(segment) }
    }

    /// The closed segment that is best cleaned: much to gain, little to copy, and cold, so that what is
    /// copied stays put (Rosenblum's cost-benefit rule). One that is full of live blocks never is.
    pub(crate) fn victim(&self, log_bytes: u64) -> Option<u32> {
        let capacity = u64::from(self.geometry.segment_blocks());
        let score = |segment: &Segment| {
            let live = u64::from(segment.live);
            let age = log_bytes.saturating_sub(segment.closed_at) / u64::from(self.geometry.segment_bytes);
            let gain = capacity.saturating_sub(live) as f64;
            gain / (capacity + live) as f64 * (age + 1) as f64
        };
        let dead_enough = |segment: &Segment| u64::from(segment.live) * 32 < capacity * 31;
        (0..)
            .zip(&self.table)
            .filter(|(_, segment)| segment.state == State::Closed && segment.live > 0 && dead_enough(segment))
            .max_by(|(_, one), (_, other)| score(one).total_cmp(&score(other)))
            .map(|(number, _)| number)
    }

    /// Takes the list of blocks that were written into a segment, each once.
    pub(crate) fn take_blocks(&mut self, segment: u32) -> Vec<u32> {
        let mut blocks = self.get(segment).map(|entry| std::mem::take(&mut entry.blocks)).unwrap_or_default();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }

    /// Puts blocks of a segment back that could not be moved.
    pub(crate) fn put_back_blocks(&mut self, segment: u32, blocks: Vec<u32>) {
        if let Some(entry) = self.get(segment) {
            entry.blocks = blocks;
        }
    }

    /// Live blocks of a segment; none for a free one.
    pub(crate) fn live(&self, segment: u32) -> Option<u32> {
        let entry = self.table.get(segment as usize)?;
        (entry.state != State::Free).then_some(entry.live)
    }

    /// Whether the log went on from this segment elsewhere.
    pub(crate) fn is_closed(&self, segment: u32) -> bool {
        self.table.get(segment as usize).is_some_and(|entry| entry.state == State::Closed)
    }

    /// Blocks that were written into a segment.
    pub(crate) fn blocks(&self, segment: u32) -> &[u32] {
        self.table.get(segment as usize).map_or(&[], |entry| &entry.blocks)
    }

    /// Segments in use with records behind `covered`, and the last of these.
    pub(crate) fn uncovered(&self, covered: u64) -> Vec<(u32, u64)> {
        (0..)
            .zip(&self.table)
            .filter(|(_, segment)| segment.state != State::Free && segment.last_sequence > covered)
            .map(|(number, segment)| (number, segment.last_sequence))
            .collect()
    }

    /// Free segments.
    pub(crate) fn free_list(&self) -> Vec<u32> {
        self.warm.iter().chain(&self.fresh).copied().collect()
    }
}

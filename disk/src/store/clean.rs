//! Making room: survivors of mostly dead segments are written anew, and the segments used again.

use std::io::IoSlice;

use crate::{
    BLOCK_BYTES, Backing, Store, StoreError,
    index::{Entry, Word, digest_of},
    record::{Body, Moved},
    store::append::{Appended, By},
};

/// What a piece of cleaning did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cleaned {
    /// Bytes of blocks copied.
    pub copied_bytes: u64,
    /// Segments freed.
    pub freed: u32,
    /// There is more that is worth cleaning.
    pub more: bool,
}

/// Free segments that keep their space in the file.
const WARM_SEGMENTS: usize = 8;

/// Segments cleaned for each one a caller takes once free ones grow few: at 80 % full three give one.
const PACE: u32 = 3;

/// A block's bytes that must outlive their segment.
struct Survivor {
    block: u32,
    entry: Entry,
    at: u64,
}

impl<B: Backing> Store<B> {
    /// Cleans until about `budget` bytes were copied or nothing is worth it, and gives surplus space back
    /// to the file system. For idle times: with room left, writes then never wait for cleaning.
    ///
    /// # Errors
    /// The medium failed.
    pub fn clean(&mut self, budget: u64) -> Result<Cleaned, StoreError> {
        self.usable()?;
        let before = self.stats.cleaned_bytes;
        let free = self.segments.free();
        let copied = |store: &Self| store.stats.cleaned_bytes - before;
        while self.worth_cleaning() && copied(self) < budget {
            if self.segments.free() <= 1 {
                if self.segments.waiting() == 0 {
                    break;
                }
                self.settle()?;
                continue;
            }
            let Some(victim) = self.segments.victim(self.stats.log_bytes) else { break };
            self.evacuate(victim)?;
        }
        if self.segments.waiting() > 0 {
            self.settle()?;
        }
        let freed = self.segments.free().saturating_sub(free);
        let mut punches = budget / u64::from(self.geometry.segment_bytes) + 1;
        while punches > 0
            && let Some(segment) = self.segments.surplus(WARM_SEGMENTS)
        {
            let at = self.geometry.segment_at(segment);
            let punched = self.backing.punch(at, u64::from(self.geometry.segment_bytes));
            self.segments.punched(segment, punched.is_ok());
            punched.map_err(|source| StoreError::Io { doing: "punching a free segment", source })?;
            punches -= 1;
        }
        self.tell();
        Ok(Cleaned { copied_bytes: copied(self), freed, more: self.worth_cleaning() })
    }

    /// Whether [`Store::clean`] has something to do that is worth it.
    #[must_use]
    pub fn wants_cleaning(&self) -> bool {
        !self.broken && self.worth_cleaning()
    }

    /// Whether segments in use beyond what is held justify copying.
    fn worth_cleaning(&self) -> bool {
        let waiting = u32::try_from(self.segments.waiting()).unwrap_or(u32::MAX);
        self.segments.in_use().saturating_sub(waiting) > self.allowance(0)
    }

    /// Segments that may be in use for what is held, plus `slack` bytes.
    fn allowance(&self, slack: u64) -> u32 {
        let held = self.segments.held() * u64::from(self.tuning.log_percent) / 100;
        let segments = held / u64::from(self.geometry.segment_blocks())
            + slack.div_ceil(u64::from(self.geometry.segment_bytes));
        u32::try_from(segments).unwrap_or(u32::MAX).saturating_add(2)
    }

    /// Takes a free segment for the log to go on in; a caller's append cleans first where it must.
    pub(super) fn take_segment(&mut self, by: By) -> Result<u32, StoreError> {
        let segment = match by {
            By::Cleaner => self.segments.take(),
            By::User => {
                self.make_room()?;
                self.segments.take()
            }
        };
        let segment = segment.ok_or_else(|| self.full())?;
        let at = self.geometry.segment_at(segment);
        if let Err(source) = self.backing.reserve(at, u64::from(self.geometry.segment_bytes)) {
            self.segments.give_back(segment);
            return Err(self.failed_write(source));
        }
        Ok(segment)
    }

    /// Cleans until a caller may take a segment: a little each time once free ones grow few, so that no one
    /// write pays for all.
    fn make_room(&mut self) -> Result<(), StoreError> {
        let reserve = self.geometry.reserve();
        let mut pace = PACE;
        for _ in 0..self.geometry.segments.saturating_mul(4) {
            let (free, waiting) = (self.segments.free(), self.segments.waiting());
            let plenty = free > reserve + reserve / 2
                && self.segments.in_use() < self.allowance(self.tuning.log_slack_bytes);
            if free > reserve && (plenty || pace == 0) {
                return Ok(());
            }
            if waiting > 0 && (waiting >= reserve as usize || free <= 1) {
                self.settle()?;
            } else if free > 0
                && let Some(victim) = self.segments.victim(self.stats.log_bytes)
            {
                self.evacuate(victim)?;
                pace = pace.saturating_sub(1);
            } else if waiting > 0 {
                self.settle()?;
            } else if free > reserve {
                return Ok(());
            } else {
                break;
            }
        }
        Err(self.full())
    }

    /// Frees segments that wait for a sync and, where that is not enough, for a checkpoint.
    fn settle(&mut self) -> Result<(), StoreError> {
        self.sync_log()?;
        self.segments.reclaim(self.durable, self.durable_piece.sequence);
        if self.segments.waiting() > 0 {
            self.write_piece()?;
            self.sync_log()?;
            self.segments.reclaim(self.durable, self.durable_piece.sequence);
        }
        Ok(())
    }

    /// Blocks of `segment` that the current state or the last commit needs, in the segment's order.
    fn survivors(&self, segment: u32, blocks: &[u32]) -> Vec<Survivor> {
        let mut survivors = Vec::new();
        for block in blocks {
            let now = self.index.entry(u64::from(*block));
            for entry in now.iter().chain(self.pending.get(*block)) {
                if let Some(at) = entry.word.position()
                    && self.geometry.segment_of(at) == Some(segment)
                {
                    survivors.push(Survivor { block: *block, entry: *entry, at });
                }
            }
        }
        survivors.sort_unstable_by_key(|survivor| survivor.at);
        survivors
    }

    /// Writes the survivors of a closed segment anew, so that it becomes empty.
    pub(super) fn evacuate(&mut self, segment: u32) -> Result<(), StoreError> {
        self.list_blocks();
        let blocks = self.segments.take_blocks(segment);
        let survivors = self.survivors(segment, &blocks);
        let moved = self.move_survivors(&survivors);
        if moved.is_err() {
            self.segments.put_back_blocks(segment, blocks);
        }
        moved
    }

    fn move_survivors(&mut self, survivors: &[Survivor]) -> Result<(), StoreError> {
        let (Some(first), Some(last)) = (survivors.first(), survivors.last()) else { return Ok(()) };
        let length = usize::try_from(last.at - first.at).unwrap_or(0) + BLOCK_BYTES;
        let mut bytes = vec![0; length];
        self.backing
            .read_at(first.at, &mut bytes)
            .map_err(|source| StoreError::Io { doing: "reading a segment to clean it", source })?;
        let of = |survivor: &Survivor| {
            let at = usize::try_from(survivor.at - first.at).unwrap_or(usize::MAX);
            bytes.get(at..at.saturating_add(BLOCK_BYTES)).unwrap_or_default()
        };
        // Corrupt bytes move too, under the digest they ought to have: they stay known as corrupt.
        let (whole, corrupt): (Vec<&Survivor>, Vec<&Survivor>) =
            survivors.iter().partition(|survivor| digest_of(of(survivor)) == survivor.entry.digest);
        for (list, damaged) in [(whole, false), (corrupt, true)] {
            let mut rest = list.as_slice();
            while !rest.is_empty() {
                let (count, next) = self.room_for(rest.len(), true, By::Cleaner)?;
                let (part, behind) = rest.split_at(count);
                let payload = part.iter().map(|survivor| IoSlice::new(of(survivor))).collect::<Vec<_>>();
                let entries = part
                    .iter()
                    .map(|survivor| Moved {
                        block: survivor.block,
                        digest: survivor.entry.digest,
                        from: survivor.entry.word,
                    })
                    .collect();
                self.append_moved(entries, damaged, &payload, next)?;
                self.stats.cleaned_bytes += (count * BLOCK_BYTES) as u64;
                rest = behind;
            }
        }
        Ok(())
    }

    /// Appends bytes that blocks have already, at a new place, and points everything there.
    pub(super) fn append_moved(
        &mut self,
        entries: Vec<Moved>,
        damaged: bool,
        payload: &[IoSlice<'_>],
        next: Option<u32>,
    ) -> Result<(), StoreError> {
        let body = Body::Moved { entries, damaged };
        let Appended { at, left } = self.append_record(&body, payload, next)?;
        let Body::Moved { entries, .. } = body else { return Ok(()) };
        for (at, moved) in (at..).step_by(BLOCK_BYTES).zip(entries) {
            let to = Entry { word: Word::at(at, moved.digest), digest: moved.digest };
            let Some(old) = moved.from.position() else { continue };
            let block = u64::from(moved.block);
            if self.index.word(block) == Some(moved.from) {
                self.index.set(block, to);
                self.recount(old, at, moved.block);
            }
            if let Some(before) = self.pending.get_mut(moved.block)
                && before.word == moved.from
            {
                *before = to;
                self.recount(old, at, moved.block);
            }
            if let Some(changed) = &mut self.changed {
                changed.mark(moved.block, ());
            }
        }
        self.close(left);
        Ok(())
    }

    fn recount(&mut self, from: u64, to: u64, block: u32) {
        self.segments.add(to, block);
        self.segments.remove(from, self.log.sequence);
    }
}

//! Looking for corruption before anyone needs the bytes, and putting them right.

use std::io::IoSlice;

use crate::{
    BLOCK_BYTES, Backing, SECTOR_BYTES, Store, StoreError,
    index::digest_of,
    record::{self, Moved},
    store::append::By,
};

/// What a piece of scrubbing found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scrubbed {
    /// Bytes of the log read.
    pub checked_bytes: u64,
    /// Blocks whose bytes are not those that were written, in order: to be repaired, or reported.
    pub corrupt: Vec<u64>,
    /// Records with a damaged header. Healed already: a checkpoint covers them now.
    pub damaged_records: u64,
    /// The end was reached; the next call begins anew.
    pub done: bool,
}

impl<B: Backing> Store<B> {
    /// Checks the next segments, about `budget` bytes of them: every live block against its digest, every
    /// record header against its checksum.
    ///
    /// # Errors
    /// The medium failed other than by bytes it could not read, which count as corrupt.
    pub fn scrub(&mut self, budget: u64) -> Result<Scrubbed, StoreError> {
        self.list_blocks();
        let mut found = Scrubbed::default();
        while found.checked_bytes < budget && !found.done {
            let segment = self.scrub_next;
            if segment >= self.geometry.segments {
                self.scrub_next = 0;
                found.done = true;
                break;
            }
            self.scrub_next += 1;
            if self.segments.live(segment).is_some() {
                self.scrub_segment(segment, &mut found);
            }
        }
        found.corrupt.sort_unstable();
        found.corrupt.dedup();
        if found.damaged_records > 0 && self.log.sequence > self.durable_piece.sequence {
            self.write_piece()?;
            self.sync_log()?;
        }
        Ok(found)
    }

    fn scrub_segment(&self, segment: u32, found: &mut Scrubbed) {
        let start = self.geometry.segment_at(segment);
        let end = if segment == self.log.segment { self.log.offset } else { self.geometry.segment_bytes };
        let mut bytes = vec![0; end as usize];
        found.checked_bytes += u64::from(end);
        let readable = self.backing.read_at(start, &mut bytes).is_ok();
        for block in self.segments.blocks(segment) {
            let Some(entry) = self.index.entry(u64::from(*block)) else { continue };
            let Some(at) = entry.word.position().and_then(|at| at.checked_sub(start)) else { continue };
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            let Some(held) = bytes.get(at..at.saturating_add(BLOCK_BYTES)) else { continue };
            if !readable || digest_of(held) != entry.digest {
                found.corrupt.push(u64::from(*block));
            }
        }
        found.damaged_records += u64::from(!self.headers_are_whole(segment, &bytes));
    }

    /// Whether the records of a segment follow one another up to where the log goes on.
    fn headers_are_whole(&self, segment: u32, bytes: &[u8]) -> bool {
        let mut at = 0;
        let mut before = None;
        while at < bytes.len() {
            let Some(record) = bytes.get(at..).and_then(record::decode) else { return false };
            let follows = before.is_none_or(|(sequence, chain)| {
                record.head.sequence == sequence + 1 && record.head.chain == chain
            });
            if !follows || record.head.life != self.life {
                return false;
            }
            if record.head.next.is_some() {
                return self.segments.is_closed(segment);
            }
            before = Some((record.head.sequence, record.checksum));
            at += record.body.record_bytes().max(SECTOR_BYTES);
        }
        segment == self.log.segment
    }

    /// Puts a block's bytes right with `bytes` from another host, if they are what it should have.
    ///
    /// # Errors
    /// [`StoreError::NotThisBlock`] where they are not; the medium failed.
    pub fn repair(&mut self, block: u64, bytes: &[u8; BLOCK_BYTES]) -> Result<(), StoreError> {
        self.usable()?;
        let number = self.inside(&(block..block.saturating_add(1)))?.start;
        let digest = digest_of(bytes);
        let mut repaired = false;
        for of_last_commit in [false, true] {
            let place = |store: &Self| {
                let now = || store.index.entry(block);
                let entry = if of_last_commit { store.pending.get(number).copied() } else { now() };
                entry.filter(|entry| entry.digest == digest && entry.word.position().is_some())
            };
            if place(self).is_none() {
                continue;
            }
            let (_, next) = self.room_for(1, true, By::User)?;
            // Only now: making room may have moved the corrupt bytes on.
            let Some(entry) = place(self) else { continue };
            let moved = Moved { block: number, digest, from: entry.word };
            self.append_moved(vec![moved], false, &[IoSlice::new(bytes)], next)?;
            repaired = true;
        }
        self.tell();
        if repaired { Ok(()) } else { Err(StoreError::NotThisBlock { block }) }
    }
}

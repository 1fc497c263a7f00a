//! Writing: records to the log, then words to the index.

use std::{
    io::{self, IoSlice},
    ops::Range,
};

use crate::{
    BLOCK_BYTES, Backing, SECTOR_BYTES, Store, StoreError,
    index::{Entry, Known, Place, Word, digest_of},
    record::{self, BlockRange, Body, Head, MAX_BLOCKS, MAX_RANGES, Written},
};

/// The kernel's pages: an append that ends inside one is filled up with zeros, so that the page cache
/// need not read a page of a segment's earlier life to write a part of it.
const PAGE: usize = 4096;
static ZEROS: [u8; PAGE] = [0; PAGE];

/// Who appends, and so which free segments it may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    /// A caller: the reserve stays free.
    User,
    /// The cleaner, which gives back more than it takes.
    Cleaner,
}

/// Where a record's payload lies, and the segment that it was the last of.
pub(super) struct Appended {
    pub(super) at: u64,
    pub(super) left: Option<u32>,
}

impl<B: Backing> Store<B> {
    /// Writes whole blocks from `first` on. Everyone reads them at once; they are durable after a flush.
    ///
    /// # Errors
    /// [`StoreError::Full`] before anything is written; the medium failed.
    pub fn write(&mut self, first: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let count = bytes.len() / BLOCK_BYTES;
        let blocks = self.inside(&(first..first.saturating_add(count as u64)))?;
        if !bytes.len().is_multiple_of(BLOCK_BYTES) {
            return Err(StoreError::OutOfRange { first, bytes: bytes.len() as u64 });
        }
        self.admit(count)?;
        let (mut block, mut rest) = (blocks.start, bytes);
        while !rest.is_empty() {
            let (count, next) = self.room_for(rest.len() / BLOCK_BYTES, false, By::User)?;
            let (part, behind) = rest.split_at(count * BLOCK_BYTES);
            let written = (block..)
                .zip(part.chunks_exact(BLOCK_BYTES))
                .map(|(block, bytes)| Written { block, digest: digest_of(bytes) })
                .collect();
            self.append_written(written, &[IoSlice::new(part)], next)?;
            block = block.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
            rest = behind;
        }
        self.wrote(bytes.len())
    }

    /// Writes blocks that lie anywhere, in as few records as possible: one for up to 256.
    ///
    /// # Errors
    /// As [`Store::write`].
    pub fn write_scattered(&mut self, blocks: &[(u64, &[u8; BLOCK_BYTES])]) -> Result<(), StoreError> {
        for (block, _) in blocks {
            self.inside(&(*block..block.saturating_add(1)))?;
        }
        self.admit(blocks.len())?;
        let mut rest = blocks;
        while !rest.is_empty() {
            let (count, next) = self.room_for(rest.len(), false, By::User)?;
            let (part, behind) = rest.split_at(count);
            let written = |(block, bytes): &(u64, &[u8; BLOCK_BYTES])| Written {
                block: u32::try_from(*block).unwrap_or(u32::MAX),
                digest: digest_of(*bytes),
            };
            let payload = part.iter().map(|(_, bytes)| IoSlice::new(*bytes)).collect::<Vec<_>>();
            self.append_written(part.iter().map(written).collect(), &payload, next)?;
            rest = behind;
        }
        self.wrote(blocks.len() * BLOCK_BYTES)
    }

    /// Writes those of the blocks from `first` on that are still missing and expected to be these, or anything; a
    /// newer write here is never overwritten by what another host had. Returns how many were written.
    ///
    /// # Errors
    /// As [`Store::write`].
    pub fn fill(&mut self, first: u64, bytes: &[u8]) -> Result<u64, StoreError> {
        let count = (bytes.len() / BLOCK_BYTES) as u64;
        self.inside(&(first..first.saturating_add(count)))?;
        let blocks = (first..).zip(bytes.chunks(BLOCK_BYTES));
        let fits: Vec<bool> =
            blocks.map(|(block, bytes)| self.is_what_is_missing(block, digest_of(bytes))).collect();
        let (mut block, mut rest, mut filled) = (first, bytes, 0);
        for run in fits.chunk_by(|one, next| one == next) {
            let (part, behind) = rest.split_at(rest.len().min(run.len() * BLOCK_BYTES));
            if part.len() == run.len() * BLOCK_BYTES && run.first() == Some(&true) {
                self.write(block, part)?;
                filled += run.len() as u64;
            }
            block += run.len() as u64;
            rest = behind;
        }
        if bytes.len().is_multiple_of(BLOCK_BYTES) {
            Ok(filled)
        } else {
            Err(StoreError::OutOfRange { first, bytes: bytes.len() as u64 })
        }
    }

    /// Whether a block is missing and may have this digest.
    #[must_use]
    pub fn is_what_is_missing(&self, block: u64, digest: u64) -> bool {
        match self.index.known(block) {
            Known::Missing(expected) => expected.is_none_or(|expected| expected == digest),
            Known::Zeros | Known::Held(_) => false,
        }
    }

    /// Says what digest a missing block's bytes have: kept in memory only. Whether it was missing and nothing was
    /// known of it.
    pub fn expect(&mut self, block: u64, digest: u64) -> bool {
        let unknown = digest != 0
            && block < self.geometry.blocks
            && self.index.known(block) == Known::Missing(None)
            && self.index.place(block) == Place::Missing;
        if unknown {
            self.index.set(block, Entry { word: Word::MISSING, digest });
        }
        unknown
    }

    /// Makes blocks missing whose bytes another host has, under the digests given. One that holds these bytes keeps
    /// them.
    ///
    /// # Errors
    /// As [`Store::discard`].
    pub fn leave_missing(&mut self, blocks: &[(u32, u64)]) -> Result<(), StoreError> {
        for (block, _) in blocks {
            self.inside(&(u64::from(*block)..u64::from(*block) + 1))?;
        }
        let lost: Vec<(u32, u64)> = blocks
            .iter()
            .copied()
            .filter(|(block, digest)| self.index.known(u64::from(*block)) != Known::Held(*digest))
            .collect();
        self.set_each(lost.iter().map(|(block, _)| *block), Word::MISSING)?;
        for (block, digest) in lost {
            self.index.set(u64::from(block), Entry { word: Word::MISSING, digest });
        }
        Ok(())
    }

    /// Makes blocks zeros and gives their space back, from the next flush on for good.
    ///
    /// # Errors
    /// The medium failed. Never [`StoreError::Full`] but on a log whose medium is full.
    pub fn discard(&mut self, blocks: Range<u64>) -> Result<(), StoreError> {
        self.set_ranges(&blocks, Word::ZEROS)
    }

    /// The same for blocks that lie anywhere.
    ///
    /// # Errors
    /// As [`Store::discard`].
    pub fn discard_each(&mut self, blocks: &[u32]) -> Result<(), StoreError> {
        for block in blocks {
            self.inside(&(u64::from(*block)..u64::from(*block) + 1))?;
        }
        self.set_each(blocks.iter().copied(), Word::ZEROS)
    }

    /// Makes blocks missing: another host has them, and what this one had is out of date.
    ///
    /// # Errors
    /// As [`Store::discard`].
    pub fn mark_missing(&mut self, blocks: Range<u64>) -> Result<(), StoreError> {
        self.set_ranges(&blocks, Word::MISSING)
    }

    fn set_ranges(&mut self, blocks: &Range<u64>, word: Word) -> Result<(), StoreError> {
        let blocks = self.inside(blocks)?;
        self.set_each(blocks, word)
    }

    fn set_each(&mut self, blocks: impl Iterator<Item = u32>, word: Word) -> Result<(), StoreError> {
        self.usable()?;
        let mut ranges: Vec<BlockRange> = Vec::new();
        for block in blocks {
            if self.index.word(u64::from(block)) == Some(word) {
                continue;
            }
            match ranges.last_mut() {
                Some(last) if last.first + last.count == block => last.count += 1,
                _ => ranges.push(BlockRange { first: block, count: 1, word }),
            }
        }
        for part in ranges.chunks(MAX_RANGES) {
            self.append_control(&Body::Ranges(part.to_vec()))?;
            self.uncommitted = true;
            for block in part.iter().flat_map(|range| range.first..range.first + range.count) {
                self.place(block, Entry { word, digest: 0 });
            }
        }
        self.tell();
        Ok(())
    }

    /// Refuses what cannot fit even after cleaning.
    pub(super) fn admit(&self, blocks: usize) -> Result<(), StoreError> {
        self.usable()?;
        let held = self.segments.held().saturating_add(blocks as u64);
        if held > self.geometry.max_held_blocks() { Err(self.full()) } else { Ok(()) }
    }

    fn wrote(&mut self, bytes: usize) -> Result<(), StoreError> {
        self.stats.user_bytes += bytes as u64;
        self.tell();
        let walk = self.log.sequence.saturating_sub(self.piece.sequence);
        if walk > self.tuning.checkpoint_records { self.write_piece() } else { Ok(()) }
    }

    fn append_written(
        &mut self,
        written: Vec<Written>,
        payload: &[IoSlice<'_>],
        next: Option<u32>,
    ) -> Result<(), StoreError> {
        let body = Body::Written(written);
        let Appended { at, left } = self.append_record(&body, payload, next)?;
        self.uncommitted = true;
        let Body::Written(written) = body else { return Ok(()) };
        for (at, Written { block, digest }) in (at..).step_by(BLOCK_BYTES).zip(written) {
            self.place(block, Entry { word: Word::at(at, digest), digest });
        }
        self.close(left);
        Ok(())
    }

    /// Makes a caller's change of one block visible; its record is the log's last.
    fn place(&mut self, block: u32, entry: Entry) {
        let before = self.index.entry(u64::from(block)).unwrap_or_default();
        // What the last commit has stays held until the next; what was written since is gone at once.
        if !self.pending.mark(block, before)
            && let Some(at) = before.word.position()
        {
            self.segments.remove(at, self.log.sequence);
        }
        if let Some(at) = entry.word.position() {
            self.segments.add(at, block);
        }
        self.index.set(u64::from(block), entry);
        if let Some(changed) = &mut self.changed {
            changed.mark(block, ());
        }
    }

    /// Appends a record without payload.
    pub(super) fn append_control(&mut self, body: &Body) -> Result<(), StoreError> {
        let bytes = body.record_bytes();
        while self.room() < bytes + SECTOR_BYTES {
            let next = self.take_segment(By::User)?;
            // Cleaning may have gone on to another segment meanwhile.
            if self.room() < bytes + SECTOR_BYTES {
                self.jump(next)?;
            } else {
                self.segments.give_back(next);
            }
        }
        self.append_record(body, &[], None)?;
        Ok(())
    }

    /// Lets the log go on in `next`.
    fn jump(&mut self, next: u32) -> Result<(), StoreError> {
        let Appended { left, .. } = self.append_record(&Body::Jump, &[], Some(next))?;
        self.close(left);
        Ok(())
    }

    /// Closes the segment that the log has left, once the blocks of its last record are counted.
    pub(super) fn close(&mut self, left: Option<u32>) {
        if let Some(segment) = left {
            self.segments.close(segment, self.stats.log_bytes);
        }
    }

    /// Bytes left in the active segment.
    fn room(&self) -> usize {
        self.geometry.segment_bytes.saturating_sub(self.log.offset) as usize
    }

    /// Makes room for the next record of at most `blocks` blocks: how many it may have, and the segment
    /// to name in it where it is its own segment's last.
    ///
    /// Every other record leaves a sector, so that a jump always fits.
    pub(super) fn room_for(
        &mut self,
        blocks: usize,
        moved: bool,
        by: By,
    ) -> Result<(usize, Option<u32>), StoreError> {
        let wanted = blocks.min(MAX_BLOCKS);
        loop {
            if record::blocks_that_fit(self.room().saturating_sub(SECTOR_BYTES), moved) >= wanted {
                return Ok((wanted, None));
            }
            let next = self.take_segment(by)?;
            if record::blocks_that_fit(self.room().saturating_sub(SECTOR_BYTES), moved) >= wanted {
                self.segments.give_back(next);
                return Ok((wanted, None));
            }
            match record::blocks_that_fit(self.room(), moved) {
                0 => self.jump(next)?,
                fit => return Ok((fit.min(wanted), Some(next))),
            }
        }
    }

    /// Appends one record where `room_for` made room. On failure the log is as before: what was written
    /// lies behind its end.
    pub(super) fn append_record(
        &mut self,
        body: &Body,
        payload: &[IoSlice<'_>],
        next: Option<u32>,
    ) -> Result<Appended, StoreError> {
        let head = Head {
            sequence: self.log.sequence + 1,
            life: self.life,
            session: self.session,
            chain: self.log.chain,
            durable: self.durable,
            settled: self.settled,
            piece: self.durable_piece.number,
            commit: self.log.commit + u64::from(matches!(body, Body::Commit)),
            next,
        };
        let checksum = record::encode(&head, body, &mut self.header);
        let bytes = body.record_bytes();
        let at = self.geometry.segment_at(self.log.segment) + u64::from(self.log.offset);
        let end = self.log.offset as usize + bytes;
        let fill = end.next_multiple_of(PAGE) - end;
        let mut parts = Vec::with_capacity(payload.len() + 2);
        parts.push(IoSlice::new(&self.header));
        parts.extend_from_slice(payload);
        parts.push(IoSlice::new(ZEROS.get(..fill).unwrap_or_default()));
        if let Err(source) = self.backing.write_at(at, &parts) {
            if let Some(next) = next {
                self.segments.give_back(next);
            }
            return Err(self.failed_write(source));
        }
        self.stats.log_bytes += bytes as u64;
        self.unsynced += bytes as u64;
        self.uncovered += bytes as u64;
        self.segments.appended(self.log.segment, head.sequence);
        (self.log.sequence, self.log.chain, self.log.commit) = (head.sequence, checksum, head.commit);
        if body.settles() {
            self.settling = head.sequence;
        }
        let left = next.map(|_| self.log.segment);
        (self.log.segment, self.log.offset) =
            next.map_or((self.log.segment, u32::try_from(end).unwrap_or(u32::MAX)), |next| (next, 0));
        Ok(Appended { at: at + body.header_bytes() as u64, left })
    }

    pub(super) fn failed_write(&self, source: io::Error) -> StoreError {
        if source.kind() == io::ErrorKind::StorageFull {
            return self.full();
        }
        StoreError::Io { doing: "appending to the log", source }
    }
}

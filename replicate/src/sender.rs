//! The owner's end of a page stream.
//!
//! ```text
//! send_epoch:   Pages* EpochEnd → EpochAck        queue empty: the follower has applied all
//! encode_last:  EpochMark, batches                one buffer for the switch message
//! ```
//! A [`Sender`] belongs to one follower and knows what that follower holds, by digest: a page that
//! is what was sent last is not sent again, a zero page only where something else was. It ends every
//! epoch by comparing digests of everything held.
//!
//! Deliberately not here: which pages (tracker, planner), when to stop (`kage-migrate`).

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use kage_machine::{Epoch, Geometry, Memory, PAGE_SIZE, PageIndex, PageSet};
use kage_wire::{BatchError, BatchWriter, Encoding, EpochMark, Frame, Kind, pages::append_to_last_epoch};

use crate::{
    cache::Cache,
    codec::{Chooser, Encoder, Scheme},
    digest::{DigestTable, PageDigest},
    link::{Link, LinkError},
    pace::{Meter, Rate, TokenBucket},
    planner::StreamRates,
};

/// Assumed of a link before anything was sent: about where compressing stops to pay.
const UNKNOWN_LINK: Rate = Rate::bytes_per_s(125e6);

/// The link's rate is the mean over about so many bytes: enough that one preempted send (4 ms) does
/// not make a fast link look thin, little enough that the kernel's buffers, which swallow the first
/// 50 to 100 KiB at once, are soon forgotten.
const LINK_WINDOW: u64 = 2 << 20;

/// A batch takes about so long on the link: cancelling and pacing act within it. Shorter ones
/// compress worse (below 64 KiB of pages zstd loses 5 to 10 %).
const BATCH_TIME: Duration = Duration::from_millis(20);
/// Smallest batch, in bytes of records.
const MIN_BATCH: u64 = 32 << 10;

/// While waiting for an acknowledgement the caller is asked so often whether to go on.
const WATCH_INTERVAL: Duration = Duration::from_millis(20);

/// Longest wait for an acknowledgement. What can be queued is one batch, the kernel's unsent 16 KiB
/// and what is in flight: this is a follower that hangs.
const ACK_TIMEOUT: Duration = Duration::from_secs(10);

/// Burst of the token bucket: what a limit of 50 Mbit/s sends in 5 ms.
const BURST: u64 = 32 << 10;

/// Pages of which the last sent version is kept for deltas: 64 MiB, all of a usual machine. Only
/// pages that were sent take memory, only while there is a stream.
const CACHED_PAGES: usize = 16 << 10;

/// On links faster than this only pages sent before are kept: what deltas save there is not worth
/// copying all of a memory that crosses in a tenth of a second.
const FAST_LINK: Rate = Rate::bytes_per_s(125e6);

/// How far an epoch is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Pages looked at.
    pub pages_done: u32,
    /// Pages of the epoch.
    pub pages_total: u32,
    /// Bytes sent in this epoch.
    pub bytes_wire: u64,
    /// Since the epoch's start.
    pub elapsed: Duration,
}

/// What an epoch took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EpochStats {
    /// Pages sent with their content.
    pub pages: u64,
    /// Those of them sent as what differs from the version before.
    pub pages_delta: u64,
    /// Pages sent as zero.
    pub pages_zero: u64,
    /// Pages not sent since the follower holds the same.
    pub pages_unchanged: u64,
    /// Bytes of the pages sent with their content.
    pub bytes_raw: u64,
    /// Bytes handed to the link, frames' headers included.
    pub bytes_wire: u64,
    /// From the start until the link had taken everything.
    pub sending: Duration,
    /// From then until the follower's acknowledgement.
    pub acknowledged: Duration,
}

impl std::ops::AddAssign for EpochStats {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.pages_delta += other.pages_delta;
        self.pages_zero += other.pages_zero;
        self.pages_unchanged += other.pages_unchanged;
        self.bytes_raw += other.bytes_raw;
        self.bytes_wire += other.bytes_wire;
        self.sending += other.sending;
        self.acknowledged += other.acknowledged;
    }
}

/// Why an epoch did not get through.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The link; this sender is of no further use.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The caller's wish. The sender can go on with a next epoch.
    #[error("stopped on request")]
    Cancelled {
        /// Pages of the epoch that were not sent.
        unsent: PageSet,
    },
    /// The follower's acknowledgement is none.
    #[error("the follower's acknowledgement is damaged: {0}")]
    Damaged(#[from] BatchError),
    /// The follower does not hold what was sent: a defect, here or there.
    #[error("the follower holds {found:?} instead of {expected:?}")]
    Mismatch {
        /// What it must hold.
        expected: EpochMark,
        /// What it says.
        found: EpochMark,
    },
}

/// The pages of a last epoch do not fit one message; send them as an epoch of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the last epoch is larger than {cap} bytes")]
pub struct TooLarge {
    /// The limit given.
    pub cap: usize,
}

/// A last epoch in one buffer.
#[derive(Clone, Debug)]
pub struct LastEpoch {
    /// For [`crate::Receiver::apply_last`].
    pub bytes: Vec<u8>,
    /// What the follower must hold once it is applied.
    pub mark: EpochMark,
    /// Its pages and bytes; no times.
    pub stats: EpochStats,
}

/// Streams one machine's pages to one follower.
#[derive(Debug)]
pub struct Sender {
    geometry: Geometry,
    held: DigestTable,
    /// What `held` has digests of, for some pages; no page that is zero in `held` is looked up.
    cache: Cache,
    encoder: Encoder,
    chooser: Chooser,
    link: Meter,
    limit: Option<TokenBucket>,
    /// Wire bytes per byte of non-zero pages over recent epochs.
    ratio: Option<f64>,
    round_trip: Option<Duration>,
    /// Records sent since the last mark.
    records: u32,
    /// Acknowledgements of cancelled epochs that are still to come.
    owed: u32,
}

impl Sender {
    /// For a follower whose replica is all zeros, as [`crate::Receiver::new`] makes it.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            held: DigestTable::new(geometry),
            cache: Cache::new(CACHED_PAGES),
            encoder: Encoder::new(),
            chooser: Chooser::default(),
            link: Meter::new(LINK_WINDOW),
            limit: None,
            ratio: None,
            round_trip: None,
            records: 0,
            owed: 0,
        }
    }

    /// Limits the stream's rate from now on, or lifts the limit.
    pub fn set_limit(&mut self, limit: Option<Rate>) {
        self.limit = limit.map(|rate| TokenBucket::new(rate, BURST, Instant::now()));
    }

    /// What the follower holds once everything sent has arrived.
    #[must_use]
    pub const fn digest(&self) -> u128 {
        self.held.sum()
    }

    /// What the stream moves and gains, as measured so far.
    #[must_use]
    pub fn rates(&self) -> StreamRates {
        let link = self.link_rate();
        let ratio = self.ratio.unwrap_or_else(|| self.chooser.ratio(link));
        StreamRates { link, ratio, round_trip: self.round_trip.unwrap_or_default() }
    }

    fn link_rate(&self) -> Rate {
        let link = self.link.rate().unwrap_or(UNKNOWN_LINK);
        match &self.limit {
            Some(limit) if limit.rate() < link => limit.rate(),
            _ => link,
        }
    }

    /// Sends those pages as they are now and waits until the follower has applied them. `watch` is
    /// called after every batch and while waiting.
    ///
    /// # Errors
    /// [`SendError`].
    pub fn send_epoch(
        &mut self,
        link: &mut dyn Link,
        memory: &dyn Memory,
        pages: &PageSet,
        epoch: Epoch,
        watch: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<EpochStats, SendError> {
        let start = Instant::now();
        let mut stats = EpochStats::default();
        let mut progress =
            Progress { pages_done: 0, pages_total: pages.len(), bytes_wire: 0, elapsed: Duration::ZERO };
        let mut left = pages.iter();
        let mut batch = Batch::new(epoch, self.scheme());
        loop {
            let more = self.fill(&mut batch, memory, &mut left, &mut progress.pages_done, &mut stats, None);
            if batch.writer.records() > 0 {
                self.ship(link, &mut batch, &mut stats)?;
                (progress.bytes_wire, progress.elapsed) = (stats.bytes_wire, start.elapsed());
                if watch(&progress).is_break() {
                    let mut unsent = PageSet::empty(pages.pages());
                    left.for_each(|page| {
                        unsent.insert(page);
                    });
                    return Err(SendError::Cancelled { unsent });
                }
            }
            if !more {
                break;
            }
        }
        let mark = self.take_mark(epoch);
        let end = Frame::new(Kind::EpochEnd, mark.emit().to_vec());
        stats.bytes_wire += end.wire_len() as u64;
        link.send(&end)?;
        stats.sending = start.elapsed();
        progress.bytes_wire = stats.bytes_wire;
        stats.acknowledged = self.await_ack(link, mark, pages.pages(), &mut || {
            progress.elapsed = start.elapsed();
            watch(&progress)
        })?;
        if stats.bytes_raw > 0 {
            let ratio = stats.bytes_wire as f64 / stats.bytes_raw as f64;
            self.ratio = Some(self.ratio.map_or(ratio, |before| (before + ratio) / 2.0));
        }
        Ok(stats)
    }

    /// Encodes those pages as they are now, and the mark that ends the stream, into one buffer of
    /// at most `cap` bytes for the switch message. The follower is taken to apply it.
    ///
    /// # Errors
    /// [`TooLarge`]; nothing is changed.
    pub fn encode_last(
        &mut self,
        memory: &dyn Memory,
        pages: &PageSet,
        epoch: Epoch,
        cap: usize,
    ) -> Result<LastEpoch, TooLarge> {
        let mut stats = EpochStats::default();
        let (records, mut before) = (self.records, Vec::new());
        let mut bytes = vec![0; EpochMark::BYTES];
        // Not the time to try other schemes.
        let scheme = self.chooser.best(self.link_rate());
        let mut batch = Batch::new(epoch, scheme);
        let (mut left, mut done) = (pages.iter(), 0);
        loop {
            let more = self.fill(&mut batch, memory, &mut left, &mut done, &mut stats, Some(&mut before));
            if batch.writer.records() > 0 {
                append_to_last_epoch(&mut bytes, &self.finish(&mut batch));
            }
            if bytes.len() > cap {
                before.into_iter().rev().for_each(|(page, digest)| self.held.set(page, digest));
                self.records = records;
                return Err(TooLarge { cap });
            }
            if !more {
                break;
            }
        }
        // It holds the versions before this epoch.
        self.cache.clear();
        let mark = self.take_mark(epoch);
        bytes[..EpochMark::BYTES].copy_from_slice(&mark.emit());
        stats.bytes_wire = bytes.len() as u64;
        Ok(LastEpoch { bytes, mark, stats })
    }

    fn scheme(&mut self) -> Scheme {
        let link = self.link_rate();
        self.chooser.next(link)
    }

    fn take_mark(&mut self, epoch: Epoch) -> EpochMark {
        EpochMark { epoch, records: std::mem::take(&mut self.records), digest: self.held.sum() }
    }

    /// Fills a batch from what is left; whether there may be more. With `before`, as for a last
    /// epoch: it is given every page whose digest changes and what that was, and the cache stays as
    /// it is.
    fn fill(
        &mut self,
        batch: &mut Batch,
        memory: &dyn Memory,
        left: &mut dyn Iterator<Item = PageIndex>,
        done: &mut u32,
        stats: &mut EpochStats,
        mut before: Option<&mut Vec<(PageIndex, PageDigest)>>,
    ) -> bool {
        let link = self.link_rate();
        let limit = (link.bytes_in(BATCH_TIME) as f64 / self.chooser.ratio(link)) as u64;
        let limit = limit.max(MIN_BATCH) as usize;
        let mut bytes = [0; PAGE_SIZE];
        while batch.writer.has_room() && batch.writer.record_bytes().len() < limit {
            let Some(page) = left.next() else { return false };
            *done += 1;
            if page.0 >= self.geometry.pages() {
                continue;
            }
            memory.read(page, &mut bytes);
            let (digest, old) = (PageDigest::of(page, &bytes), self.held.get(page));
            if digest == old {
                stats.pages_unchanged += 1;
                continue;
            }
            self.held.set(page, digest);
            self.records += 1;
            if let Some(before) = &mut before {
                before.push((page, old));
            }
            if digest.is_zero() {
                stats.pages_zero += 1;
                batch.writer.push(page, Encoding::Zero, &[]);
                continue;
            }
            stats.pages += 1;
            stats.bytes_raw += PAGE_SIZE as u64;
            let kept = self.cache.get(page);
            let again = !old.is_zero() || kept.is_some();
            let base = kept.filter(|_| !old.is_zero());
            // LZ4 takes microseconds a page; reading the clock twice is 2 % of that.
            let start = (batch.scheme == Scheme::Lz4).then(Instant::now);
            let encoded = self.encoder.push(&mut batch.writer, batch.scheme, page, &bytes, base);
            batch.encoding += start.map_or(Duration::ZERO, |start| start.elapsed());
            batch.raw += encoded as u64;
            stats.pages_delta += u64::from(encoded < PAGE_SIZE);
            if before.is_none() && (again || link < FAST_LINK) {
                self.cache.put(page, &bytes, again);
            }
        }
        true
    }

    /// Ends a batch and counts what it cost; the next one starts with the same scheme.
    fn finish(&mut self, batch: &mut Batch) -> Vec<u8> {
        let start = Instant::now();
        let body = self.encoder.finish(&mut batch.writer, batch.scheme);
        let took = batch.encoding + start.elapsed();
        self.chooser.record(batch.scheme, batch.raw, body.len() as u64, took);
        (batch.raw, batch.encoding) = (0, Duration::ZERO);
        body
    }

    fn ship(
        &mut self,
        link: &mut dyn Link,
        batch: &mut Batch,
        stats: &mut EpochStats,
    ) -> Result<(), SendError> {
        let frame = Frame::new(Kind::Pages, self.finish(batch));
        batch.scheme = self.scheme();
        let bytes = frame.wire_len() as u64;
        if let Some(limit) = &mut self.limit {
            let now = Instant::now();
            let wait = limit.wait(now);
            if !wait.is_zero() {
                self.idle(link, now + wait)?;
            }
        }
        let start = Instant::now();
        if let Some(limit) = &mut self.limit {
            limit.take(start, bytes);
        }
        link.send(&frame)?;
        self.link.record(bytes, start.elapsed());
        stats.bytes_wire += bytes;
        batch.writer.reuse(frame.body);
        Ok(())
    }

    /// Waits, listening: a follower that refuses is heard at once.
    fn idle(&mut self, link: &mut dyn Link, until: Instant) -> Result<(), LinkError> {
        loop {
            match link.recv(Some(until)) {
                Err(LinkError::Timeout) => return Ok(()),
                Ok(frame) if frame.kind == Kind::EpochAck && self.owed > 0 => self.owed -= 1,
                Ok(frame) => return Err(LinkError::Unexpected(frame.kind)),
                Err(error) => return Err(error),
            }
        }
    }

    fn await_ack(
        &mut self,
        link: &mut dyn Link,
        expected: EpochMark,
        pages: u32,
        watch: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Duration, SendError> {
        let start = Instant::now();
        let found = loop {
            match link.recv(Some(Instant::now() + WATCH_INTERVAL)) {
                Ok(frame) if frame.kind != Kind::EpochAck => {
                    return Err(LinkError::Unexpected(frame.kind).into());
                }
                Ok(_) if self.owed > 0 => self.owed -= 1,
                Ok(frame) => break EpochMark::parse(&frame.body)?,
                Err(LinkError::Timeout) if start.elapsed() > ACK_TIMEOUT => {
                    return Err(LinkError::Timeout.into());
                }
                Err(LinkError::Timeout) => {
                    if watch().is_break() {
                        self.owed += 1;
                        return Err(SendError::Cancelled { unsent: PageSet::empty(pages) });
                    }
                }
                Err(error) => return Err(error.into()),
            }
        };
        if found != expected {
            return Err(SendError::Mismatch { expected, found });
        }
        let took = start.elapsed();
        let round_trip = self.round_trip.map_or(took, |least| least.min(took));
        self.round_trip = Some(round_trip);
        // What the wait is longer than a round trip went into emptying the queue.
        self.link.record(0, took - round_trip);
        Ok(took)
    }
}

/// A batch being filled.
struct Batch {
    writer: BatchWriter,
    scheme: Scheme,
    /// Bytes of its non-zero pages and deltas before compression.
    raw: u64,
    /// Time spent encoding them.
    encoding: Duration,
}

impl Batch {
    fn new(epoch: Epoch, scheme: Scheme) -> Self {
        Self { writer: BatchWriter::new(epoch), scheme, raw: 0, encoding: Duration::ZERO }
    }
}

#[cfg(test)]
mod tests;

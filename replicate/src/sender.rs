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
//! A page of the disk is looked at by its digest first, and read only if the follower holds another. One that
//! is missing at the owner too goes as its digest alone; when its bytes come later, nothing is sent.
//!
//! Deliberately not here: which pages (tracker, planner), when to stop (`kage-migrate`).

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use kage_machine::{Epoch, Geometry, Memory, PAGE_SIZE, PageBytes, PageIndex, PageSet, disk::Block};
use kage_wire::{
    BatchError, BatchWriter, Encoding, EpochMark, Frame, Have, Held, Kind,
    pages::{RECORD_HEADER, append_to_last_epoch},
};

use crate::{
    cache::Cache,
    codec::{Chooser, Encoder, Scheme},
    courtesy,
    digest::{DigestTable, PageDigest, is_block},
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
    /// Blocks of the disk sent as their digest, since the owner misses them too.
    pub pages_elsewhere: u64,
    /// Of the pages sent with their content, those of the disk.
    pub disk_pages: u64,
    /// Bytes of the pages sent with their content.
    pub bytes_raw: u64,
    /// Of the bytes handed to the link, those of the disk's pages; in a batch that was compressed as one, their share.
    pub disk_bytes_wire: u64,
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
        self.pages_elsewhere += other.pages_elsewhere;
        self.disk_pages += other.disk_pages;
        self.disk_bytes_wire += other.disk_bytes_wire;
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
    /// The disk is not known well enough; this sender is of no further use.
    #[error(transparent)]
    Unknown(#[from] UnknownBlock),
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

/// A block is at another host, and what it is has not been heard from there yet: nothing can be said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the list of its disk's blocks is still being fetched")]
pub struct UnknownBlock {
    /// The first such page.
    pub page: PageIndex,
}

/// Finds a block of the disk of which nothing can be said yet.
///
/// # Errors
/// [`UnknownBlock`]: a stream of this machine would fail.
pub fn find_unknown(memory: &dyn Memory) -> Result<(), UnknownBlock> {
    let geometry = memory.geometry();
    let populated = memory.populated();
    let mut blocks = populated.iter().filter(|&page| is_block(geometry, page));
    match blocks.find(|&page| memory.block(page) == Block::Missing(None)) {
        Some(page) => Err(UnknownBlock { page }),
        None => Ok(()),
    }
}

/// Why there is no last epoch; nothing is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LastError {
    /// Its pages do not fit one message; send them as an epoch of their own.
    #[error("the last epoch is larger than {cap} bytes")]
    TooLarge {
        /// The limit given.
        cap: usize,
    },
    /// The disk is not known well enough.
    #[error(transparent)]
    Unknown(#[from] UnknownBlock),
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
    /// Pages of the memory that the follower says it holds, by half their digests; until [`Sender::due`] compares them.
    claimed: Have,
    /// What `held` has digests of, for some pages; only pages of `sent` are looked up.
    cache: Cache,
    /// Pages whose last record had their content.
    sent: PageSet,
    encoder: Encoder,
    chooser: Chooser,
    link: Meter,
    /// Pages go as they are, whatever would be gained.
    plain: bool,
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
    /// For a follower whose replica is all zeros.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self::knowing(geometry, &Have::default())
    }

    /// For a follower whose replica is zeros but for the blocks that [`crate::Receiver::have`] says.
    #[must_use]
    pub fn knowing(geometry: Geometry, have: &Have) -> Self {
        let mut held = DigestTable::new(geometry);
        for (block, digest) in have {
            let page = PageIndex(geometry.memory_pages.saturating_add(block));
            held.set(page, PageDigest::of_block_digest(page, digest));
        }
        Self::of(geometry, held, Have::default())
    }

    /// For a follower that holds what [`crate::Receiver::held`] says. [`Self::due`] has to be called before the first
    /// epoch, and all of it sent in that.
    #[must_use]
    pub fn holding(geometry: Geometry, held: &Held) -> Self {
        Self { claimed: held.memory.clone(), ..Self::knowing(geometry, &held.disk) }
    }

    /// For a follower that holds exactly this.
    #[must_use]
    pub fn following(geometry: Geometry, held: DigestTable) -> Self {
        Self::of(geometry, held, Have::default())
    }

    fn of(geometry: Geometry, held: DigestTable, claimed: Have) -> Self {
        Self {
            geometry,
            held,
            claimed,
            sent: PageSet::empty(geometry.pages()),
            cache: Cache::new(CACHED_PAGES),
            encoder: Encoder::new(),
            chooser: Chooser::default(),
            link: Meter::new(LINK_WINDOW),
            plain: false,
            limit: None,
            ratio: None,
            round_trip: None,
            records: 0,
            owed: 0,
        }
    }

    /// What the follower lacks of a machine: what its memory holds, and the blocks of its disk that are others there,
    /// in either direction. Reads no block, and of the memory only pages the follower says it holds. What is written
    /// after the harvest before this call is found by the next one.
    #[must_use]
    pub fn due(&mut self, memory: &dyn Memory) -> PageSet {
        let mut due = memory.populated();
        let mut bytes = [0; PAGE_SIZE];
        for (page, half) in &std::mem::take(&mut self.claimed) {
            let page = PageIndex(page);
            memory.read(page, &mut bytes);
            let digest = PageDigest::of(page, &bytes);
            if digest.half() == half {
                self.held.set(page, digest);
                due.remove(page);
            } else {
                self.held.set(page, PageDigest::OTHER);
                due.insert(page);
            }
        }
        for page in (self.geometry.memory_pages..self.geometry.pages()).map(PageIndex) {
            let held = self.held.get(page);
            // What is not populated is zeros: there is no need to ask.
            let same = if due.contains(page) {
                PageDigest::of_block(page, memory.block(page)) == Some(held)
            } else {
                held.is_zero()
            };
            if same {
                due.remove(page);
            } else {
                due.insert(page);
            }
        }
        due
    }

    /// Limits the stream's rate from now on, or lifts the limit.
    pub fn set_limit(&mut self, limit: Option<Rate>) {
        self.limit = limit.map(|rate| TokenBucket::new(rate, BURST, Instant::now()));
    }

    /// From now on sends pages that are not zero as they are, or encoded again: to see what encoding gains.
    pub const fn set_plain(&mut self, plain: bool) {
        self.plain = plain;
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
            let more =
                self.fill(&mut batch, memory, &mut left, &mut progress.pages_done, &mut stats, None)?;
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
            // Names of blocks are no part of what a page costs.
            let names = stats.pages_elsewhere * (RECORD_HEADER + size_of::<u64>()) as u64;
            let ratio = stats.bytes_wire.saturating_sub(names) as f64 / stats.bytes_raw as f64;
            self.ratio = Some(self.ratio.map_or(ratio, |before| (before + ratio) / 2.0));
        }
        Ok(stats)
    }

    /// Encodes those pages as they are now, and the mark that ends the stream, into one buffer of
    /// at most `cap` bytes for the switch message. The follower is taken to apply it.
    ///
    /// # Errors
    /// [`LastError`]; nothing is changed.
    pub fn encode_last(
        &mut self,
        memory: &dyn Memory,
        pages: &PageSet,
        epoch: Epoch,
        cap: usize,
    ) -> Result<LastEpoch, LastError> {
        let mut stats = EpochStats::default();
        let (records, mut before) = (self.records, Vec::new());
        let mut bytes = vec![0; EpochMark::BYTES];
        // Not the time to try other schemes.
        let scheme = if self.plain { Scheme::Raw } else { self.chooser.best(self.link_rate()) };
        let mut batch = Batch::new(epoch, scheme);
        let (mut left, mut done) = (pages.iter(), 0);
        loop {
            let more = self.fill(&mut batch, memory, &mut left, &mut done, &mut stats, Some(&mut before));
            if more.is_ok() && batch.writer.records() > 0 {
                let body = self.finish(&mut batch, &mut stats);
                append_to_last_epoch(&mut bytes, &body);
            }
            let failed = match more {
                Err(unknown) => Some(unknown.into()),
                Ok(_) if bytes.len() > cap => Some(LastError::TooLarge { cap }),
                Ok(true) => None,
                Ok(false) => break,
            };
            if let Some(error) = failed {
                before.into_iter().rev().for_each(|(page, digest)| self.held.set(page, digest));
                self.records = records;
                return Err(error);
            }
        }
        // The cache holds the versions before this epoch. To empty it here would cost milliseconds of the pause.
        before.iter().for_each(|&(page, _)| {
            self.sent.remove(page);
        });
        let mark = self.take_mark(epoch);
        bytes[..EpochMark::BYTES].copy_from_slice(&mark.emit());
        stats.bytes_wire = bytes.len() as u64;
        Ok(LastEpoch { bytes, mark, stats })
    }

    fn scheme(&mut self) -> Scheme {
        let link = self.link_rate();
        if self.plain { Scheme::Raw } else { self.chooser.next(link) }
    }

    fn take_mark(&mut self, epoch: Epoch) -> EpochMark {
        EpochMark { epoch, records: std::mem::take(&mut self.records), digest: self.held.sum() }
    }

    /// Looks at a page, reading it unless it is a block that the follower holds.
    fn look(
        &self,
        memory: &dyn Memory,
        page: PageIndex,
        bytes: &mut PageBytes,
    ) -> Result<Seen, UnknownBlock> {
        if !is_block(self.geometry, page) {
            memory.read(page, bytes);
            return Ok(Seen { digest: PageDigest::of(page, bytes), elsewhere: None });
        }
        let known = PageDigest::of_block(page, memory.block(page));
        if let Some(digest) = known.filter(|&digest| digest == self.held.get(page)) {
            return Ok(Seen { digest, elsewhere: None });
        }
        let block = memory.read_block(page, bytes);
        let elsewhere = match block {
            Block::Missing(digest) => digest,
            Block::Zeros | Block::Held(_) => None,
        };
        let digest = PageDigest::of_block(page, block).ok_or(UnknownBlock { page })?;
        Ok(Seen { digest, elsewhere })
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
    ) -> Result<bool, UnknownBlock> {
        let link = self.link_rate();
        let limit = (link.bytes_in(BATCH_TIME) as f64 / self.chooser.ratio(link)) as u64;
        let limit = limit.max(MIN_BATCH) as usize;
        let mut bytes = [0; PAGE_SIZE];
        while batch.writer.has_room() && batch.writer.record_bytes().len() < limit {
            let Some(page) = left.next() else { return Ok(false) };
            *done += 1;
            if done.is_multiple_of(courtesy::PAGES as u32) {
                courtesy::let_others_run();
            }
            if page.0 >= self.geometry.pages() {
                continue;
            }
            let (seen, old) = (self.look(memory, page, &mut bytes)?, self.held.get(page));
            if seen.digest == old {
                stats.pages_unchanged += 1;
                continue;
            }
            self.held.set(page, seen.digest);
            self.records += 1;
            if let Some(before) = &mut before {
                before.push((page, old));
            }
            let start = batch.writer.record_bytes().len();
            if seen.digest.is_zero() {
                stats.pages_zero += 1;
                batch.writer.push(page, Encoding::Zero, &[]);
                self.forget(page, before.is_none());
            } else if let Some(digest) = seen.elsewhere {
                stats.pages_elsewhere += 1;
                batch.writer.push(page, Encoding::Elsewhere, &digest.to_le_bytes());
                self.forget(page, before.is_none());
            } else {
                stats.pages += 1;
                stats.disk_pages += u64::from(is_block(self.geometry, page));
                stats.bytes_raw += PAGE_SIZE as u64;
                let delta = self.push_content(batch, page, &bytes, link, before.is_none());
                stats.pages_delta += u64::from(delta);
                batch.content += batch.writer.record_bytes().len() - start;
            }
            if is_block(self.geometry, page) {
                batch.disk += batch.writer.record_bytes().len() - start;
            }
        }
        Ok(true)
    }

    /// What the cache has of a page is not what the follower holds any more. Of the pages of a last epoch that is said
    /// once it comes to be sent.
    fn forget(&mut self, page: PageIndex, keep: bool) {
        if keep {
            self.sent.remove(page);
        }
    }

    /// Adds a page that is neither zero nor elsewhere; whether it went as what differs. `keep`: for later deltas.
    fn push_content(
        &mut self,
        batch: &mut Batch,
        page: PageIndex,
        bytes: &PageBytes,
        link: Rate,
        keep: bool,
    ) -> bool {
        let kept = self.cache.get(page);
        let again = self.sent.contains(page) || kept.is_some();
        let base = kept.filter(|_| self.sent.contains(page) && !self.plain);
        // LZ4 takes microseconds a page; reading the clock twice is 2 % of that.
        let start = (batch.scheme == Scheme::Lz4).then(Instant::now);
        let encoded = self.encoder.push(&mut batch.writer, batch.scheme, page, bytes, base);
        batch.encoding += start.map_or(Duration::ZERO, |start| start.elapsed());
        batch.raw += encoded as u64;
        if keep {
            // What the cache has of a page that goes plainly is not what the follower holds.
            if self.plain {
                self.sent.remove(page);
            } else {
                self.sent.insert(page);
            }
            if !self.plain && (again || link < FAST_LINK) {
                self.cache.put(page, bytes, again);
            }
        }
        encoded < PAGE_SIZE
    }

    /// Ends a batch and counts what it cost; the next one starts with the same scheme.
    fn finish(&mut self, batch: &mut Batch, stats: &mut EpochStats) -> Vec<u8> {
        let (start, records) = (Instant::now(), batch.writer.record_bytes().len().max(1));
        let body = self.encoder.finish(&mut batch.writer, batch.scheme);
        let took = batch.encoding + start.elapsed();
        let share = |part: usize| (body.len() as f64 * part as f64 / records as f64) as u64;
        self.chooser.record(batch.scheme, batch.raw, share(batch.content), took);
        stats.disk_bytes_wire += share(batch.disk);
        (batch.raw, batch.content, batch.disk, batch.encoding) = (0, 0, 0, Duration::ZERO);
        body
    }

    fn ship(
        &mut self,
        link: &mut dyn Link,
        batch: &mut Batch,
        stats: &mut EpochStats,
    ) -> Result<(), SendError> {
        let frame = Frame::new(Kind::Pages, self.finish(batch, stats));
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
    /// Bytes of these pages' records.
    content: usize,
    /// Bytes of the disk's records.
    disk: usize,
    /// Time spent encoding them.
    encoding: Duration,
}

/// A page as it is now.
struct Seen {
    digest: PageDigest,
    /// The digest of a block that is missing here.
    elsewhere: Option<u64>,
}

impl Batch {
    fn new(epoch: Epoch, scheme: Scheme) -> Self {
        Self {
            writer: BatchWriter::new(epoch),
            scheme,
            raw: 0,
            content: 0,
            disk: 0,
            encoding: Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod disk_tests;
#[cfg(test)]
mod tests;

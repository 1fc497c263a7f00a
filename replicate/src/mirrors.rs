//! The mirrors of one machine, at its owner: who follows it, and the streams that keep them fresh.
//!
//! ```text
//!  want ──▶ Connecting ──▶ Copying ──▶ Fresh ──▶ (given to a handover, or no longer wanted)
//!              ▲               │         │
//!              └── link lost ──┴─────────┘
//! ```
//! Each mirror has a thread that runs [`Mirrors::run`]: it asks the follower what it holds, sends the rest, and from
//! then on what [`crate::planner::for_mirror`] says, epoch by epoch. Between two epochs nothing is under way, so that a
//! mirror can be [given](Mirrors::give) to a handover, which goes on with the same stream.
//!
//! Harvests are the machine's, not a mirror's: whichever stream finds one due makes it, for all of them. While somebody
//! else holds the machine (a handover) there are none but what that [tells](Mirrors::harvested).
//!
//! Deliberately not here: which hosts ([`crate::predict`]), the follower's end (`kage-migrate`, beside the target's).

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant},
};

use kage_machine::{Epoch, Geometry, HostName, Memory, PAGE_SIZE, PageSet};
use kage_wire::{
    Held,
    handover::{Follow, Message},
};

use crate::{
    digest::DigestTable,
    link::{Link, LinkError},
    pace::Rate,
    planner::{self, Estimate, HARVEST_LEAST, HOLD, StreamRates},
    sender::{EpochStats, SendError, Sender},
    tracker::Tracker,
};

/// Longest wait for a follower to make its shell and say what it holds.
const READY: Duration = Duration::from_secs(10);

/// Before a lost or refused mirror is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(2);

/// A page that is always written anew is sent after so long all the same: how far a mirror is behind at most.
const OLDEST: Duration = Duration::from_secs(5);

/// With nothing to send the link is tried so often: a follower that is gone is no mirror.
const HEARTBEAT: Duration = Duration::from_secs(4);

/// Longest wait for a mirror that is given to a handover: one batch and its acknowledgement.
const GIVING: Duration = Duration::from_secs(1);

/// Before a machine that somebody else holds is asked again.
const HELD: Duration = Duration::from_millis(20);

/// Longest wait of a stream for handovers: longer than one to a mirror takes, shorter than one that copies everything.
const WAY: Duration = Duration::from_millis(500);
/// Looks at them meanwhile.
const BUSY: Duration = Duration::from_millis(5);

/// What a daemon lends to the mirrors of a machine.
pub trait OwnerSide: Send + Sync {
    /// The machine's page space; none once it is not this host's any more.
    fn memory(&self) -> Option<Arc<dyn Memory>>;
    /// Pages written since the last harvest; none while somebody else holds the machine.
    fn harvest(&self) -> Option<PageSet>;
    /// What to ask of a follower; `expects` as in [`Follow`].
    ///
    /// # Errors
    /// Why there can be no mirror now, in words.
    fn request(&self, expects: Option<u128>) -> Result<Follow, String>;
    /// Opens a link to a follower.
    ///
    /// # Errors
    /// Why not, in words.
    fn connect(&self, host: &HostName) -> Result<Box<dyn Link>, String>;
    /// Most bytes per second of one mirror.
    fn limit(&self) -> Option<Rate>;
    /// Whether a handover from this host is under way, which goes first.
    fn is_busy(&self) -> bool {
        false
    }
    /// An epoch has been sent, so long after the oldest of its pages was found written.
    fn sent(&self, host: &HostName, stats: &EpochStats, lag: Duration);
    /// So many pages were found written: what a mirror that is sent every one of them whole would cost.
    fn found(&self, pages: u64) {
        let _ = pages;
    }
}

/// A mirror as it is now.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// Where.
    pub host: HostName,
    /// Its last whole epoch; 0 before the first.
    pub epoch: Epoch,
    /// Whether everything has been sent once.
    pub whole: bool,
    /// Age of its oldest difference.
    pub lag: Duration,
    /// Bytes of pages it lacks.
    pub missing_bytes: u64,
    /// What a handover would cost now.
    pub estimate: Estimate,
    /// Why it is not there, if it is not.
    pub note: Option<String>,
}

/// A mirror that is given away: all that was sent is acknowledged.
#[derive(Debug)]
pub struct Given<L = Box<dyn Link>> {
    /// What was sent.
    pub sender: Sender,
    /// On which more can be.
    pub link: L,
    /// The next epoch.
    pub epoch: Epoch,
    /// Pages it lacks, as far as they were harvested.
    pub due: PageSet,
}

/// A question to a stream, which answers it between two epochs: with its last epoch, the digest of everything sent, and
/// whether it can still wait.
type Question = Box<dyn FnOnce(Epoch, u128, &dyn Fn() -> bool) + Send>;

/// What is wanted of a stream.
#[derive(Default)]
enum Wish {
    #[default]
    Go,
    /// It is not wanted any more: the follower drops it.
    Stop,
    /// The machine goes: the follower keeps it, for the next owner.
    Leave,
    Give(mpsc::Sender<Given>),
    Ask(Question),
}

struct Entry {
    wish: Wish,
    epoch: Epoch,
    whole: bool,
    /// Since when it has lacked something, but what is being sent.
    behind: Option<Instant>,
    /// What is being sent.
    sending: Option<Sending>,
    rates: Option<StreamRates>,
    note: Option<String>,
}

/// An epoch under way.
#[derive(Clone, Copy)]
struct Sending {
    pages: u32,
    /// Since when the oldest of them was lacking.
    behind: Option<Instant>,
}

impl Entry {
    /// Since when the oldest of its differences is one.
    fn oldest(&self) -> Option<Instant> {
        [self.behind, self.sending.and_then(|sending| sending.behind)].into_iter().flatten().min()
    }

    const fn is_wanted(&self) -> bool {
        matches!(self.wish, Wish::Go | Wish::Ask(_))
    }
}

/// What the machine held at its switch to this host, and what was written since.
struct Origin {
    held: DigestTable,
    written: PageSet,
}

struct Inner {
    tracker: Option<Tracker>,
    interval: Duration,
    harvested: Option<Instant>,
    origin: Option<Origin>,
    streams: BTreeMap<HostName, Entry>,
}

/// All mirrors of one machine.
pub struct Mirrors {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Default for Mirrors {
    fn default() -> Self {
        let inner = Inner {
            tracker: None,
            interval: HARVEST_LEAST,
            harvested: None,
            origin: None,
            streams: BTreeMap::new(),
        };
        Self { inner: Mutex::new(inner), changed: Condvar::new() }
    }
}

/// Why a stream ended.
enum Ended {
    /// It is not wanted any more, or was given away.
    Done,
    /// It was lost, and is to be tried again.
    Lost(String),
}

impl From<LinkError> for Ended {
    fn from(error: LinkError) -> Self {
        Self::Lost(error.to_string())
    }
}

impl Inner {
    /// Spreads a harvest.
    fn spread(&mut self, now: Instant, dirty: &PageSet) {
        if let Some(tracker) = &mut self.tracker {
            tracker.harvest(now, dirty);
        }
        if let Some(origin) = &mut self.origin {
            origin.written.union(dirty);
        }
        let since = self.harvested.map_or(HARVEST_LEAST, |last| now.saturating_duration_since(last));
        self.interval = planner::next_harvest(since, dirty.len());
        self.harvested = Some(now);
        if !dirty.is_empty() {
            for entry in self.streams.values_mut() {
                entry.behind.get_or_insert(now);
            }
        }
    }

    fn harvest_due(&self) -> Instant {
        self.harvested.map_or_else(Instant::now, |last| last + self.interval)
    }

    /// What a follower lacks; none where it is none.
    fn due(&self, host: &HostName) -> Option<PageSet> {
        self.tracker.as_ref().filter(|tracker| tracker.follows(host)).map(|tracker| tracker.due(host))
    }
}

impl Mirrors {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>, until: Instant) -> MutexGuard<'a, Inner> {
        let left = until.saturating_duration_since(Instant::now());
        match self.changed.wait_timeout(inner, left) {
            Ok((guard, _)) => guard,
            Err(poisoned) => poisoned.into_inner().0,
        }
    }

    /// From now on wants mirrors at exactly those hosts; returns those for which [`Self::run`] has to be called.
    #[must_use]
    pub fn want(&self, hosts: &[HostName]) -> Vec<HostName> {
        let mut inner = self.inner();
        let mut new = Vec::new();
        for (host, entry) in &mut inner.streams {
            if !hosts.contains(host) && !matches!(entry.wish, Wish::Leave | Wish::Give(_)) {
                entry.wish = Wish::Stop;
            }
        }
        for host in hosts {
            match inner.streams.get_mut(host) {
                // One that is ending goes on as if nothing had been, unless it is given away.
                Some(entry) if matches!(entry.wish, Wish::Stop | Wish::Leave) => entry.wish = Wish::Go,
                Some(_) => {}
                None => {
                    let entry = Entry {
                        wish: Wish::Go,
                        epoch: Epoch(0),
                        whole: false,
                        behind: Some(Instant::now()),
                        sending: None,
                        rates: None,
                        note: None,
                    };
                    inner.streams.insert(host.clone(), entry);
                    new.push(host.clone());
                }
            }
        }
        drop(inner);
        self.changed.notify_all();
        new
    }

    /// The hosts at which mirrors are wanted.
    #[must_use]
    pub fn hosts(&self) -> Vec<HostName> {
        let inner = self.inner();
        let wanted = inner.streams.iter().filter(|(_, entry)| entry.is_wanted());
        wanted.map(|(host, _)| host.clone()).collect()
    }

    /// The machine has come here with this content: its former owner, and with it whoever is told so, holds the same.
    pub fn begin_from(&self, held: DigestTable, geometry: Geometry) {
        self.inner().origin = Some(Origin { held, written: PageSet::empty(geometry.pages()) });
    }

    /// Ends all streams: the machine is not this host's any more, or is another one. Followers keep what they have for
    /// a while, unless it is of no use to anybody.
    pub fn stop(&self, keep: bool) {
        let mut inner = self.inner();
        for entry in inner.streams.values_mut() {
            entry.wish = if keep { Wish::Leave } else { Wish::Stop };
        }
        (inner.tracker, inner.origin, inner.harvested) = (None, None, None);
        drop(inner);
        self.changed.notify_all();
    }

    /// Takes in a harvest that somebody else made.
    pub fn harvested(&self, pages: &PageSet) {
        self.inner().spread(Instant::now(), pages);
    }

    /// All mirrors, as they are now.
    #[must_use]
    pub fn views(&self) -> Vec<View> {
        let inner = self.inner();
        let now = Instant::now();
        let wanted = inner.streams.iter().filter(|(_, entry)| entry.is_wanted());
        let views = wanted.map(|(host, entry)| {
            let sending = entry.sending.map_or(0, |sending| sending.pages);
            let due = inner.due(host).map_or(0, |due| due.len()) + sending;
            let rates = entry.rates.unwrap_or(StreamRates {
                link: Rate::bytes_per_s(125e6),
                ratio: 1.0,
                round_trip: Duration::ZERO,
            });
            View {
                host: host.clone(),
                epoch: entry.epoch,
                whole: entry.whole,
                lag: entry.oldest().map(|since| now.saturating_duration_since(since)).unwrap_or_default(),
                missing_bytes: u64::from(due) * PAGE_SIZE as u64,
                estimate: planner::if_now(due, &rates),
                note: entry.note.clone(),
            }
        });
        views.collect()
    }

    /// Takes the mirror at a host out, for a handover to it; none where there is none that is whole. What is left of it
    /// otherwise ends. Blocks for a batch at most.
    #[must_use]
    pub fn give(&self, host: &HostName) -> Option<Given> {
        let (give, given) = mpsc::channel();
        {
            let mut inner = self.inner();
            let entry = inner.streams.get_mut(host)?;
            if !entry.whole {
                entry.wish = Wish::Leave;
                drop(inner);
                self.changed.notify_all();
                return None;
            }
            entry.wish = Wish::Give(give);
        }
        self.changed.notify_all();
        // Ends at once where the stream does.
        given.recv_timeout(GIVING).ok()
    }

    /// Waits for handovers that are under way, unless something else is wanted of the stream than to send.
    fn make_way(&self, side: &dyn OwnerSide, host: &HostName) {
        let until = Instant::now() + WAY;
        while side.is_busy() && Instant::now() < until {
            let inner = self.inner();
            if !inner.streams.get(host).is_some_and(|entry| matches!(entry.wish, Wish::Go)) {
                return;
            }
            drop(self.wait(inner, Instant::now() + BUSY));
        }
    }

    /// Has a mirror's stream answer between two epochs: `question` is called with its last epoch, the digest of
    /// everything sent, and what says whether the stream has nothing better to do than to wait for it. Whether there is a
    /// stream to ask.
    pub fn ask(
        &self,
        host: &HostName,
        question: impl FnOnce(Epoch, u128, &dyn Fn() -> bool) + Send + 'static,
    ) -> bool {
        let mut inner = self.inner();
        let Some(entry) = inner.streams.get_mut(host) else { return false };
        if !matches!(entry.wish, Wish::Go) || !entry.whole {
            return false;
        }
        entry.wish = Wish::Ask(Box::new(question));
        drop(inner);
        self.changed.notify_all();
        true
    }

    /// Keeps the mirror at a host until it is no longer wanted. Blocks: on a thread of its own.
    pub fn run(&self, side: &dyn OwnerSide, host: &HostName) {
        loop {
            let ended = self.stream(side, host);
            let mut inner = self.inner();
            let until = Instant::now() + TRY_AGAIN;
            if let (Ended::Lost(why), Some(entry)) = (&ended, inner.streams.get_mut(host)) {
                tracing::debug!(%host, why, "a mirror is not kept for now");
                entry.note = Some(why.clone());
            }
            if let Some(entry) = inner.streams.get_mut(host) {
                (entry.whole, entry.sending) = (false, None);
            }
            if let Some(tracker) = &mut inner.tracker {
                tracker.unfollow(host);
            }
            loop {
                let wanted = inner.streams.get(host).is_some_and(Entry::is_wanted);
                if !wanted || side.memory().is_none() {
                    inner.streams.remove(host);
                    return;
                }
                // One that is wanted again begins again at once.
                if matches!(ended, Ended::Done) || Instant::now() >= until {
                    break;
                }
                inner = self.wait(inner, until);
            }
        }
    }

    /// One stream from its link to its end.
    fn stream(&self, side: &dyn OwnerSide, host: &HostName) -> Ended {
        match self.try_stream(side, host) {
            Ok(()) => Ended::Done,
            Err(ended) => ended,
        }
    }

    fn try_stream(&self, side: &dyn OwnerSide, host: &HostName) -> Result<(), Ended> {
        let Some(memory) = side.memory() else { return Ok(()) };
        let expects = self.inner().origin.as_ref().map(|origin| origin.held.sum());
        let request = side.request(expects).map_err(Ended::Lost)?;
        let mut link = side.connect(host).map_err(Ended::Lost)?;
        let held = ask_held(&mut *link, &request)?;
        let Some(sender) = self.begin(side, host, &*memory, held)? else { return Ok(()) };
        let stream =
            Streaming { mirrors: self, side, host, memory, link, sender, epoch: Epoch(1), limit: None };
        stream.follow()
    }

    /// Makes the sender, and has the tracker follow what the mirror lacks; none where it is not wanted any more.
    fn begin(
        &self,
        side: &dyn OwnerSide,
        host: &HostName,
        memory: &dyn Memory,
        held: Option<Held>,
    ) -> Result<Option<Sender>, Ended> {
        let geometry = memory.geometry();
        let mut inner = self.inner();
        loop {
            if !inner.streams.get(host).is_some_and(Entry::is_wanted) {
                return Ok(None);
            }
            // Tracking starts with the harvest: what is written from here on is found later.
            if let Some(dirty) = side.harvest() {
                inner.spread(Instant::now(), &dirty);
                break;
            }
            inner = self.wait(inner, Instant::now() + HELD);
        }
        let tracker = inner.tracker.get_or_insert_with(|| Tracker::new(geometry));
        tracker.follow(host.clone(), PageSet::empty(geometry.pages()));
        let (sender, due) = match (held, &inner.origin) {
            (None, Some(origin)) => {
                (Sender::following(geometry, origin.held.clone()), origin.written.clone())
            }
            (None, None) => return Err(Ended::Lost("the machine was handed over meanwhile".to_owned())),
            (Some(held), _) => {
                // Reads memory: nobody is kept waiting for it.
                drop(inner);
                let mut sender = Sender::holding(geometry, &held);
                let due = sender.due(memory);
                inner = self.inner();
                (sender, due)
            }
        };
        if let Some(tracker) = &mut inner.tracker {
            tracker.put_back(host, &due);
        }
        if let Some(entry) = inner.streams.get_mut(host) {
            (entry.note, entry.epoch, entry.whole) = (None, Epoch(0), false);
            entry.behind = Some(Instant::now());
        }
        Ok(Some(sender))
    }
}

/// Asks a follower what it holds; none where that is what was expected.
fn ask_held(link: &mut dyn Link, request: &Follow) -> Result<Option<Held>, Ended> {
    link.send(&Message::Follow(request.clone()).to_frame())?;
    let answer = link.recv(Some(Instant::now() + READY))?;
    let lost = |why: String| Ended::Lost(why);
    match Message::from_frame(&answer).map_err(|error| lost(error.to_string()))? {
        (Message::Ready { as_expected: true }, _) if request.expects.is_some() => Ok(None),
        (Message::Ready { as_expected: false }, held) => {
            Held::parse(held, request.geometry).map(Some).map_err(|error| lost(error.to_string()))
        }
        (Message::Failed { reason }, _) => Err(lost(reason)),
        (other, _) => Err(lost(format!("the follower said {other:?} where it has no place"))),
    }
}

/// What a stream does next.
enum Next {
    Send(PageSet),
    Heartbeat,
    Over,
    Drop,
    Give(mpsc::Sender<Given>),
    Answer(Question),
}

/// A stream whose follower is ready.
struct Streaming<'a> {
    mirrors: &'a Mirrors,
    side: &'a dyn OwnerSide,
    host: &'a HostName,
    memory: Arc<dyn Memory>,
    link: Box<dyn Link>,
    sender: Sender,
    epoch: Epoch,
    limit: Option<Rate>,
}

impl Streaming<'_> {
    fn follow(mut self) -> Result<(), Ended> {
        loop {
            match self.next() {
                Next::Over => return Ok(()),
                Next::Drop => return Ok(self.link.send(&Message::Cancel.to_frame())?),
                Next::Send(pages) => self.send(&pages)?,
                Next::Heartbeat => self.send(&PageSet::empty(self.memory.geometry().pages()))?,
                Next::Answer(question) => {
                    let is_free = || {
                        let inner = self.mirrors.inner();
                        inner.streams.get(self.host).is_some_and(|entry| matches!(entry.wish, Wish::Go))
                    };
                    question(Epoch(self.epoch.0 - 1), self.sender.digest(), &is_free);
                }
                Next::Give(give) => {
                    // What an unknown follower lacks is not known.
                    let Some(due) = self.mirrors.inner().due(self.host) else { return Ok(()) };
                    let Self { sender, link, epoch, .. } = self;
                    // Who asked may have given up; the follower keeps what it has for a while.
                    let _ = give.send(Given { sender, link, epoch, due });
                    return Ok(());
                }
            }
        }
    }

    /// Waits until there is something to do.
    fn next(&mut self) -> Next {
        let begun = Instant::now();
        let mut inner = self.mirrors.inner();
        loop {
            let Some(entry) = inner.streams.get_mut(self.host) else { return Next::Over };
            match &entry.wish {
                Wish::Go => {}
                Wish::Stop => return Next::Drop,
                Wish::Leave => return Next::Over,
                Wish::Give(_) | Wish::Ask(_) => {
                    return match std::mem::take(&mut entry.wish) {
                        Wish::Give(give) => {
                            entry.wish = Wish::Leave;
                            Next::Give(give)
                        }
                        Wish::Ask(question) => Next::Answer(question),
                        Wish::Go | Wish::Stop | Wish::Leave => continue,
                    };
                }
            }
            // Another machine of the user's may run here by now.
            let is_same = self.side.memory().is_some_and(|memory| Arc::ptr_eq(&memory, &self.memory));
            if inner.due(self.host).is_none() || !is_same {
                return Next::Over;
            }
            let mut until = inner.harvest_due();
            if Instant::now() >= until {
                match self.side.harvest() {
                    Some(dirty) => {
                        inner.spread(Instant::now(), &dirty);
                        self.side.found(u64::from(dirty.len()) * inner.streams.len() as u64);
                        until = inner.harvest_due();
                    }
                    None => until = Instant::now() + HELD,
                }
            }
            let due = self.planned(&mut inner);
            if !due.is_empty() {
                return Next::Send(due);
            }
            if begun.elapsed() >= HEARTBEAT {
                return Next::Heartbeat;
            }
            inner = self.mirrors.wait(inner, until.min(begun + HEARTBEAT));
        }
    }

    /// What is to be sent now, taken from the tracker.
    fn planned(&self, inner: &mut Inner) -> PageSet {
        let empty = PageSet::empty(self.memory.geometry().pages());
        let (Some(tracker), Some(entry)) = (&mut inner.tracker, inner.streams.get_mut(self.host)) else {
            return empty;
        };
        let due = tracker.due(self.host);
        if due.is_empty() {
            (entry.behind, entry.sending) = (None, None);
            // One that lacks nothing from the start needs no first copy.
            entry.whole = true;
            return empty;
        }
        let all = !entry.whole || entry.behind.is_some_and(|since| since.elapsed() >= OLDEST);
        let now = if all {
            due
        } else {
            planner::for_mirror(&due, |page| tracker.heat(page), &self.sender.rates(), HOLD)
        };
        tracker.take(self.host, &now);
        if !now.is_empty() {
            entry.sending = Some(Sending { pages: now.len(), behind: entry.behind });
        }
        if all {
            // What is found from now on is another difference.
            entry.behind = None;
        }
        now
    }

    /// Sends an epoch. What is not sent since something else is wanted is put back.
    fn send(&mut self, pages: &PageSet) -> Result<(), Ended> {
        let limit = self.side.limit();
        if limit != self.limit {
            self.sender.set_limit(limit);
            self.limit = limit;
        }
        let (mirrors, host) = (self.mirrors, self.host);
        let side = self.side;
        mirrors.make_way(side, host);
        let mut watch = |progress: &crate::sender::Progress| {
            mirrors.make_way(side, host);
            // An epoch that has been sent is worth its acknowledgement.
            let done = progress.pages_done >= progress.pages_total;
            let wanted = mirrors.inner().streams.get(host).is_some_and(Entry::is_wanted);
            if done || wanted { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        let sent = self.sender.send_epoch(&mut *self.link, &*self.memory, pages, self.epoch, &mut watch);
        let (sent, unsent) = match sent {
            Ok(stats) => (stats, None),
            Err(SendError::Cancelled { unsent }) => (self.close_epoch()?, Some(unsent)),
            Err(error) => return Err(Ended::Lost(error.to_string())),
        };
        let epoch = self.epoch;
        self.epoch.0 += 1;
        let mut inner = self.mirrors.inner();
        let behind = inner.streams.get(self.host).and_then(Entry::oldest);
        self.side.sent(self.host, &sent, behind.map(|since| since.elapsed()).unwrap_or_default());
        let Inner { tracker, streams, .. } = &mut *inner;
        if let (Some(tracker), Some(unsent)) = (tracker.as_mut(), &unsent) {
            tracker.put_back(self.host, unsent);
        }
        if let Some(entry) = streams.get_mut(self.host) {
            entry.epoch = epoch;
            entry.rates = Some(self.sender.rates());
            entry.whole |= unsent.is_none();
            let sending = entry.sending.take();
            if unsent.is_some() {
                entry.behind = sending.and_then(|sending| sending.behind).or(entry.behind);
            }
            if tracker.as_ref().is_none_or(|tracker| tracker.due(self.host).is_empty()) {
                entry.behind = None;
            }
        }
        Ok(())
    }

    /// Ends an epoch that was cut short, so that nothing is under way.
    fn close_epoch(&mut self) -> Result<EpochStats, Ended> {
        let whole = self.mirrors.inner().streams.get(self.host).is_some_and(|entry| entry.whole);
        if !whole {
            // What the follower had of its own is not all replaced, so no digest can be said.
            return Err(Ended::Done);
        }
        let empty = PageSet::empty(self.memory.geometry().pages());
        let mut go_on = |_: &crate::sender::Progress| ControlFlow::Continue(());
        self.sender
            .send_epoch(&mut *self.link, &*self.memory, &empty, self.epoch, &mut go_on)
            .map_err(|error| Ended::Lost(error.to_string()))
    }
}

#[cfg(test)]
mod tests;

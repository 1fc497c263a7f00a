//! What accounting reports mean: who is where, who has left. Pure: time is an argument.
//!
//! ```text
//!            Start at AP                     Start at another AP
//!  (nobody) ─────────────▶ at AP ──────────────────────────────▶ at AP'
//!      ▲                     │ Stop from the current AP              │
//!      │     grace over      ▼                                      │
//!      └──────────────── leaving ◀──────────────────────────────────┘
//! ```
//!
//! Rules (what real access points do): a move is a Start from a new AP, the old one's Stop comes late or never;
//! a Stop counts only from the current AP and only after the grace time; session ids are reused and differ per
//! AP, so a session is keyed by user and station, and ordered by the time of the event. Accounting-On and -Off
//! end every session of their AP that began before. Duplicates change nothing. Of several devices of a user the one
//! with the latest traffic counts; the last Stop is the logout.
//!
//! When an event was, [`super::clocks`] decides. What is older than the grace time begins no session: it is word of
//! somebody who may be gone.

mod table;

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::{Duration, Instant},
};

use kage_machine::{UserName, identity::ApName};

use super::{
    clocks::{Clock, FRESH_MS, When},
    names::{self, Names},
    radius::{Accounting, DeviceAddresses, Status},
};
use table::{Key, Table};

/// Sessions kept; those of which nothing was heard for longest give way.
const MAX_SESSIONS: usize = 100_000;

/// What a device sends and receives with nobody using it: neighbour discovery, keep-alives. Below it, octets are no
/// traffic that a machine would follow.
const IDLE_OCTETS_PER_S: u64 = 100;

/// Octets kept of a Calling-Station-Id that is no MAC address.
const LONGEST_STATION: usize = 64;

/// Other access points that are named with a device's traffic; nobody carries more devices.
const MOST_OTHERS: usize = 8;

/// What follows from a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Consequence {
    /// A user is at an access point, with a device.
    Arrived {
        /// Who.
        user: UserName,
        /// Where.
        ap: ApName,
        /// The device's addresses, as far as they were told.
        device: DeviceAddresses,
        /// When, in milliseconds since 1970; 0 if only that it was some time ago is known.
        at_ms: u64,
        /// Whether a Start said so; an Interim-Update tells of somebody who has been there.
        start: bool,
        /// Whether this begins the user's first session, or stands for one of which nothing was heard for the grace
        /// time at the same access point: the user may have been logged out elsewhere since.
        first: bool,
    },
    /// A device of a user has had traffic since it was last heard of.
    Active {
        /// Who.
        user: UserName,
        /// Where.
        ap: ApName,
        /// Where the user's other devices are, as far as they are known here.
        others: Vec<ApName>,
        /// The device's addresses.
        device: DeviceAddresses,
        /// When the device came there, in milliseconds since 1970.
        since_ms: u64,
        /// When that was told, in milliseconds since 1970.
        at_ms: u64,
    },
    /// A device has left, and its user still has another one.
    Departed {
        /// Who.
        user: UserName,
        /// The access point it left.
        from: ApName,
        /// Its addresses.
        device: DeviceAddresses,
        /// Where the other device with the latest traffic is.
        ap: ApName,
        /// When the device left, in milliseconds since 1970: from then on the other one counts.
        at_ms: u64,
    },
    /// The user's last device has left, and the grace time is over.
    Left {
        /// Who.
        user: UserName,
        /// The access point it left.
        from: ApName,
        /// When, in milliseconds since 1970.
        at_ms: u64,
    },
}

/// Why a report has no consequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ignored {
    /// The same as before.
    Duplicate,
    /// Older than what is known.
    Late,
    /// Of so long ago that it begins nothing.
    Stale,
    /// Not from the access point where the device is.
    NotCurrent,
    /// No access point of that name.
    UnknownAp,
    /// It names no user.
    UnknownUser,
    /// A status that nothing follows from.
    Other,
}

impl Ignored {
    /// The name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Duplicate => "duplicate",
            Self::Late => "late",
            Self::Stale => "stale",
            Self::NotCurrent => "not_current",
            Self::UnknownAp => "unknown_ap",
            Self::UnknownUser => "unknown_user",
            Self::Other => "other",
        }
    }
}

/// What tells two reports of one session apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fingerprint {
    /// Digest of Acct-Session-Id, which may be long.
    session: Option<u64>,
    at: Option<u32>,
    device: DeviceAddresses,
}

impl Fingerprint {
    fn of(report: &Accounting) -> Self {
        let digest = |id: &String| {
            let mut hasher = DefaultHasher::new();
            id.hash(&mut hasher);
            hasher.finish()
        };
        Self {
            session: report.session_id.as_ref().map(digest),
            at: report.event_timestamp,
            device: report.device(),
        }
    }
}

/// A report with where and when it was.
struct Event<'a> {
    report: &'a Accounting,
    ap: ApName,
    when: When,
    now_ms: u64,
}

impl Event<'_> {
    /// When the session began that an Interim-Update speaks of, if it says so.
    fn began_ms(&self) -> Option<u64> {
        let elapsed_ms = u64::from(self.report.session_seconds?) * 1000;
        Some(self.when.ms.saturating_sub(elapsed_ms))
    }
}

#[derive(Clone, Debug)]
struct Session {
    report: Fingerprint,
    ap: ApName,
    device: DeviceAddresses,
    /// When the device came there.
    at_ms: u64,
    /// When it was last heard of.
    heard_ms: u64,
    /// When it last had traffic.
    active_ms: u64,
    /// Octets so far, as last told.
    octets: u64,
    /// Event-Timestamp of the Stop.
    stopped: Option<u32>,
    /// When the Stop was, or what else ended it; not before the device came.
    left_ms: u64,
    /// Set by a Stop: when the grace time is over.
    leaving: Option<Instant>,
}

impl Session {
    /// Whether a report of this session's access point is older than what is known of it. Both are of one clock,
    /// so that it need not be right.
    fn is_after(&self, report: &Accounting) -> bool {
        let known = self.stopped.filter(|_| self.leaving.is_some()).or(self.report.at);
        report.event_timestamp.zip(known).is_some_and(|(told, known)| told < known)
    }

    /// Whether a Stop is about an earlier session of the same device: one that ended when this had begun.
    fn is_not_ended_by(&self, event: &Event<'_>) -> bool {
        let other = Fingerprint::of(event.report);
        let differ = self.report.session.zip(other.session).is_some_and(|(mine, other)| mine != other);
        let same_second = other.at.zip(self.report.at).is_some_and(|(told, mine)| told <= mine);
        self.is_after(event.report) || event.when.ms / 1000 < self.at_ms / 1000 || (differ && same_second)
    }

    /// Takes in the counters of a report; whether they tell of traffic.
    fn count(&mut self, report: &Accounting, now_ms: u64) -> bool {
        let elapsed_ms = now_ms.saturating_sub(self.heard_ms);
        self.heard_ms = now_ms;
        let Some(octets) = report.octets() else { return false };
        let grown = octets.saturating_sub(self.octets);
        self.octets = octets;
        let has_traffic = grown.saturating_mul(1000) > IDLE_OCTETS_PER_S.saturating_mul(elapsed_ms);
        if has_traffic {
            self.active_ms = now_ms;
        }
        has_traffic
    }
}

/// All sessions.
#[derive(Clone, Debug)]
pub struct Sessions {
    names: Names,
    grace: Duration,
    most: usize,
    /// Of access points that are configured, and of no others.
    clocks: BTreeMap<ApName, Clock>,
    table: Table,
}

impl Sessions {
    /// None yet.
    #[must_use]
    pub fn new(names: Names, grace: Duration) -> Self {
        Self { names, grace, most: MAX_SESSIONS, clocks: BTreeMap::new(), table: Table::default() }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes in a report that arrived at `now`, which is `now_ms` since 1970.
    ///
    /// # Errors
    /// Why nothing follows.
    pub fn take(
        &mut self,
        report: &Accounting,
        now: Instant,
        now_ms: u64,
    ) -> Result<Option<Consequence>, Ignored> {
        let ap = self.names.ap(report).cloned().ok_or(Ignored::UnknownAp)?;
        let when = self.clocks.entry(ap.clone()).or_default().place(report, now_ms);
        let event = Event { report, ap, when, now_ms };
        match report.status {
            Status::AccountingOn | Status::AccountingOff => {
                self.end_all(&event, now);
                Ok(None)
            }
            Status::Start => self.start(event).map(Some),
            Status::InterimUpdate => self.interim(event).map(Some),
            Status::Stop => self.stop(&event, now).map(|()| None),
            Status::Other(_) => Err(Ignored::Other),
        }
    }

    fn key(&self, report: &Accounting) -> Result<Key, Ignored> {
        let user = self.names.user(report).ok_or(Ignored::UnknownUser)?;
        let told = report.calling_station_id.as_deref().unwrap_or_default();
        let other = || told.chars().take(LONGEST_STATION).collect::<String>().to_ascii_lowercase();
        Ok(Arc::new((user, names::station(told).unwrap_or_else(other))))
    }

    fn start(&mut self, event: Event<'_>) -> Result<Consequence, Ignored> {
        let (key, new) = (self.key(event.report)?, Fingerprint::of(event.report));
        if let Some(known) = self.table.get(&key) {
            let is_here = known.ap == event.ap;
            // Word of the same event again. A new Start at the same place is none: the user may have been at
            // access points of which this host hears nothing. Without a time, one after a Stop is a new one.
            if is_here && known.report == new && (new.at.is_some() || known.leaving.is_none()) {
                return Err(Ignored::Duplicate);
            }
            if event.when.is_before(known.at_ms) || (is_here && known.is_after(event.report)) {
                return Err(Ignored::Late);
            }
        }
        self.is_recent(&event)?;
        let first =
            self.table.of(&key.0).all(|(other, known)| *other == key && self.is_silent(known, &event));
        let at_ms = event.when.ms;
        Ok(self.arrive(key, event, at_ms, first))
    }

    /// Whether a session that a Start at its access point replaces may have ended long ago, unknown to this host.
    fn is_silent(&self, known: &Session, event: &Event<'_>) -> bool {
        let grace_ms = u64::try_from(self.grace.as_millis()).unwrap_or(u64::MAX);
        known.ap == event.ap
            && known.leaving.is_none()
            && known.heard_ms.saturating_add(grace_ms) < event.now_ms
    }

    /// An interim report speaks of a session that stands: it may be new here, but nobody logs in by it, and an old
    /// access point goes on with them for a while.
    fn interim(&mut self, event: Event<'_>) -> Result<Consequence, Ignored> {
        let (key, report) = (self.key(event.report)?, event.report);
        let Some(known) = self.table.get(&key) else {
            self.is_recent(&event)?;
            // An old access point may speak so, too: it displaces nothing that came after the session began.
            let at_ms = event.began_ms().unwrap_or(0);
            return Ok(self.arrive(key, event, at_ms, false));
        };
        if known.ap != event.ap {
            // A Start may be lost. A session that began before the one that has ended is an old one.
            let goes_on = known.leaving.is_some()
                && event.when.ms > known.left_ms
                && event.began_ms().is_none_or(|began_ms| began_ms > known.at_ms);
            if !goes_on {
                return Err(Ignored::NotCurrent);
            }
            let at_ms = event.began_ms().unwrap_or(event.when.ms);
            return Ok(self.arrive(key, event, at_ms, false));
        }
        if known.is_after(report) {
            return Err(Ignored::Late);
        }
        // A device learns its address after it has come, and it may be back before its grace time is over.
        if known.leaving.is_some() {
            let at_ms = event.when.ms;
            return Ok(self.arrive(key, event, at_ms, false));
        }
        if report.device().or(known.device) != known.device {
            let at_ms = known.at_ms;
            return Ok(self.arrive(key, event, at_ms, false));
        }
        let mut session = known.clone();
        let has_traffic = session.count(report, event.now_ms);
        let (device, since_ms, at_ms) = (session.device, session.at_ms, event.when.ms);
        self.table.put(key.clone(), session);
        if !has_traffic {
            return Err(Ignored::Duplicate);
        }
        let others = self.table.of(&key.0).filter(|(other, _)| **other != key);
        let others = others.map(|(_, other)| other.ap.clone()).take(MOST_OTHERS).collect();
        Ok(Consequence::Active { user: key.0.clone(), ap: event.ap, others, device, since_ms, at_ms })
    }

    fn is_recent(&self, event: &Event<'_>) -> Result<(), Ignored> {
        let longest = u64::try_from(self.grace.as_millis()).unwrap_or(u64::MAX).max(FRESH_MS);
        if event.when.ms.saturating_add(longest) < event.now_ms { Err(Ignored::Stale) } else { Ok(()) }
    }

    fn arrive(&mut self, key: Key, event: Event<'_>, at_ms: u64, first: bool) -> Consequence {
        let Event { report, ap, now_ms, .. } = event;
        let known = self.table.remove(&key);
        if self.table.len() >= self.most
            && let Some(oldest) = self.table.oldest()
        {
            self.table.remove(&oldest);
        }
        let device = report.device().or(known.as_ref().map(|known| known.device).unwrap_or_default());
        let session = Session {
            report: Fingerprint::of(report),
            ap: ap.clone(),
            device,
            at_ms: known.map_or(at_ms, |known| known.at_ms.max(at_ms)),
            heard_ms: now_ms,
            active_ms: now_ms,
            octets: report.octets().unwrap_or(0),
            stopped: None,
            left_ms: 0,
            leaving: None,
        };
        let (user, at_ms, start) = (key.0.clone(), session.at_ms, report.status == Status::Start);
        self.table.put(key, session);
        Consequence::Arrived { user, ap, device, at_ms, start, first }
    }

    fn stop(&mut self, event: &Event<'_>, now: Instant) -> Result<(), Ignored> {
        let key = self.key(event.report)?;
        let Some(known) = self.table.get(&key).filter(|known| known.ap == event.ap) else {
            return Err(Ignored::NotCurrent);
        };
        if known.leaving.is_some() {
            return Err(Ignored::Duplicate);
        }
        if known.is_not_ended_by(event) {
            return Err(Ignored::Late);
        }
        let session = Session {
            leaving: Some(now + self.grace),
            stopped: event.report.event_timestamp,
            left_ms: event.when.ms.max(known.at_ms),
            heard_ms: event.now_ms,
            ..known.clone()
        };
        self.table.put(key, session);
        Ok(())
    }

    /// An access point starts or ends: what it had then is over.
    fn end_all(&mut self, event: &Event<'_>, now: Instant) {
        for key in self.table.at(&event.ap) {
            let Some(known) = self.table.get(&key) else { continue };
            if known.leaving.is_none() && !event.when.is_before(known.at_ms) {
                let left_ms = event.when.ms.max(known.at_ms);
                let session = Session { leaving: Some(now + self.grace), left_ms, ..known.clone() };
                self.table.put(key, session);
            }
        }
    }

    /// Ends the sessions whose grace time is over; a user whose last one it was has left.
    pub fn expire(&mut self, now: Instant) -> Vec<Consequence> {
        let mut over = Vec::new();
        while let Some((end, key)) = self.table.next_end() {
            if end > now {
                break;
            }
            let key = key.clone();
            let Some(gone) = self.table.remove(&key) else { break };
            let user = key.0.clone();
            let latest =
                self.table.of(&user).max_by_key(|(_, other)| (other.leaving.is_none(), other.active_ms));
            over.push(match latest {
                None => Consequence::Left { user, from: gone.ap, at_ms: gone.left_ms },
                Some((_, other)) => Consequence::Departed {
                    from: gone.ap,
                    device: gone.device,
                    ap: other.ap.clone(),
                    at_ms: gone.left_ms,
                    user,
                },
            });
        }
        over
    }

    /// When the next grace time is over.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Instant> {
        self.table.next_end().map(|(end, _)| end)
    }
}

#[cfg(test)]
mod tests;

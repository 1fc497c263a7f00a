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
//! end every session of their AP. Duplicates change nothing.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use kage_machine::{UserName, identity::ApName};

use super::radius::{Accounting, DeviceAddresses, Status};

/// How old a report's time may be for the report to count as fresh.
const FRESH_MS: u64 = 3_000;

/// Sessions kept; the oldest give way.
const MAX_SESSIONS: usize = 100_000;

/// What is known about the access network.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// Access points by their NAS identifier.
    pub aps: BTreeMap<String, ApName>,
    /// Users by identity, where that is not the user's name.
    pub users: BTreeMap<String, UserName>,
}

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
        /// When, in milliseconds since 1970.
        at_ms: u64,
        /// Whether this begins the user's first session.
        first: bool,
    },
    /// The user's last device has left, and the grace time is over.
    Left {
        /// Who.
        user: UserName,
    },
}

/// Why a report has no consequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ignored {
    /// The same as before.
    Duplicate,
    /// Older than what is known.
    Late,
    /// Not from the access point where the device is.
    NotCurrent,
    /// No access point of that name.
    UnknownAp,
    /// No user of that identity.
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
            Self::NotCurrent => "not_current",
            Self::UnknownAp => "unknown_ap",
            Self::UnknownUser => "unknown_user",
            Self::Other => "other",
        }
    }
}

/// What tells two reports of one session apart.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fingerprint {
    session: Option<String>,
    at: Option<u32>,
    device: DeviceAddresses,
}

impl Fingerprint {
    fn of(report: &Accounting) -> Self {
        Self { session: report.session_id.clone(), at: report.event_timestamp, device: report.device() }
    }
}

#[derive(Clone, Debug)]
struct Session {
    report: Fingerprint,
    ap: ApName,
    device: DeviceAddresses,
    at_ms: u64,
    /// Set by a Stop: when the grace time is over.
    leaving: Option<Instant>,
}

/// All sessions.
#[derive(Clone, Debug)]
pub struct Sessions {
    names: Names,
    grace: Duration,
    /// By user and station.
    sessions: BTreeMap<(UserName, String), Session>,
}

impl Sessions {
    /// None yet.
    #[must_use]
    pub fn new(names: Names, grace: Duration) -> Self {
        Self { names, grace, sessions: BTreeMap::new() }
    }

    /// The user a report is about: Chargeable-User-Identity, then Class, then User-Name, each as configured; a
    /// plain User-Name that is a user's name stands for itself.
    #[must_use]
    pub fn user(&self, report: &Accounting) -> Option<UserName> {
        let text =
            |bytes: &Option<Vec<u8>>| bytes.as_ref().and_then(|bytes| String::from_utf8(bytes.clone()).ok());
        let identities =
            [text(&report.chargeable_user_identity), text(&report.class), report.user_name.clone()];
        let configured =
            identities.iter().flatten().find_map(|identity| self.names.users.get(identity).cloned());
        configured.or_else(|| report.user_name.as_ref()?.parse().ok())
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
        let ap = report.nas_identifier.as_ref().and_then(|nas| self.names.aps.get(nas)).cloned();
        let ap = ap.ok_or(Ignored::UnknownAp)?;
        match report.status {
            Status::AccountingOn | Status::AccountingOff => {
                let over = now + self.grace;
                for session in self.sessions.values_mut().filter(|session| session.ap == ap) {
                    session.leaving.get_or_insert(over);
                }
                Ok(None)
            }
            Status::Start | Status::InterimUpdate => self.start(report, ap, now_ms),
            Status::Stop => self.stop(report, &ap, now),
            Status::Other(_) => Err(Ignored::Other),
        }
    }

    fn key(&self, report: &Accounting) -> Result<(UserName, String), Ignored> {
        let user = self.user(report).ok_or(Ignored::UnknownUser)?;
        Ok((user, report.calling_station_id.clone().unwrap_or_default().to_ascii_lowercase()))
    }

    fn start(
        &mut self,
        report: &Accounting,
        ap: ApName,
        now_ms: u64,
    ) -> Result<Option<Consequence>, Ignored> {
        let key = self.key(report)?;
        let at_ms = event_time(report, now_ms);
        let known = self.sessions.get(&key);
        if let Some(known) = known {
            // Word of the same event again. A new Start at the same place is none: the user may have been at
            // access points of which this host hears nothing.
            if known.ap == ap && known.leaving.is_none() && known.report == Fingerprint::of(report) {
                return Err(Ignored::Duplicate);
            }
            // Event-Timestamp counts seconds: of two in one second the later arrival counts.
            if at_ms / 1000 < known.at_ms / 1000 {
                return Err(Ignored::Late);
            }
            if report.status == Status::InterimUpdate && (known.ap != ap || known.leaving.is_none()) {
                // An old access point still counts, or nothing is new; only a Start is a move.
                return Err(if known.ap == ap { Ignored::Duplicate } else { Ignored::NotCurrent });
            }
        }
        let device = report.device().or(known.map(|known| known.device).unwrap_or_default());
        // An interim report speaks of a session that stands: it may be new here, but nobody logs in by it.
        let first = report.status == Status::Start && !self.sessions.keys().any(|(user, _)| *user == key.0);
        if self.sessions.len() >= MAX_SESSIONS && known.is_none() {
            let oldest =
                self.sessions.iter().min_by_key(|(_, session)| session.at_ms).map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                self.sessions.remove(&oldest);
            }
        }
        let user = key.0.clone();
        self.sessions.insert(
            key,
            Session { ap: ap.clone(), device, at_ms, leaving: None, report: Fingerprint::of(report) },
        );
        Ok(Some(Consequence::Arrived { user, ap, device, at_ms, first }))
    }

    fn stop(
        &mut self,
        report: &Accounting,
        ap: &ApName,
        now: Instant,
    ) -> Result<Option<Consequence>, Ignored> {
        let key = self.key(report)?;
        let over = now + self.grace;
        match self.sessions.get_mut(&key) {
            Some(session) if session.ap == *ap => {
                if session.leaving.is_some() {
                    return Err(Ignored::Duplicate);
                }
                session.leaving = Some(over);
                Ok(None)
            }
            _ => Err(Ignored::NotCurrent),
        }
    }

    /// Ends the sessions whose grace time is over; a user whose last one it was has left.
    pub fn expire(&mut self, now: Instant) -> Vec<Consequence> {
        let over = |session: &Session| session.leaving.is_some_and(|until| until <= now);
        let ended: Vec<_> =
            self.sessions.iter().filter(|(_, session)| over(session)).map(|(key, _)| key.clone()).collect();
        let mut left = Vec::new();
        for key in ended {
            self.sessions.remove(&key);
            if !self.sessions.keys().any(|(user, _)| *user == key.0) {
                left.push(Consequence::Left { user: key.0 });
            }
        }
        left
    }

    /// When the next grace time is over.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Instant> {
        self.sessions.values().filter_map(|session| session.leaving).min()
    }
}

/// When the reported event was, in milliseconds since 1970. Event-Timestamp counts seconds, which orders a walk
/// badly: a fresh report is placed by its arrival less Acct-Delay-Time, only an old one by its timestamp. A time in
/// the future is not believed.
fn event_time(report: &Accounting, now_ms: u64) -> u64 {
    let arrival = now_ms.saturating_sub(u64::from(report.delay_seconds.unwrap_or(0)) * 1000);
    match report.event_timestamp.map(|seconds| u64::from(seconds) * 1000) {
        Some(told) if told + FRESH_MS < now_ms => told,
        _ => arrival,
    }
}

#[cfg(test)]
mod tests;

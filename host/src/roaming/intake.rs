//! One datagram after the other: who may send, what is answered, what follows. Pure: time is an argument.
//!
//! Whatever is signed by a client's secret is answered, or it would be sent again and again; only what is signed can
//! have a consequence, and the same bytes only once. Everything kept is bounded.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use super::{
    radius::{ACCOUNTING_REQUEST, Accounting, Packet, Status},
    recent::{Quiet, Recent},
    sessions::{Consequence, Ignored, Sessions},
};
use crate::config::Subnet;

/// How long a request is known for one that was taken. A client sends again for some seconds (RFC 2866 §2); whoever
/// recorded a request may send it at any time, and Event-Timestamp tells only where it is there and right.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// How many are, 48 octets each.
const MOST_REMEMBERED: usize = 65_536;
/// How far apart lines of one kind are in the log.
const QUIET: Duration = Duration::from_secs(10);
/// Characters of a foreign name that are logged.
const LOGGED: usize = 64;

/// A secret and who may use it.
#[derive(Clone, Debug)]
pub struct Client {
    /// Addresses that may send.
    pub from: Subnet,
    /// What they share with this host.
    pub secret: Vec<u8>,
}

/// What became of a datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What it was, for the figures.
    pub kind: &'static str,
    /// What became of it, for the figures.
    pub result: &'static str,
    /// What to send back.
    pub answer: Option<Vec<u8>>,
    /// What to do.
    pub consequence: Option<Consequence>,
    /// What to log.
    pub notice: Option<Notice>,
}

impl Outcome {
    const fn dropped(result: &'static str, notice: Option<Notice>) -> Self {
        Self { kind: "unknown", result, answer: None, consequence: None, notice }
    }
}

/// A line for the log, with its cure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// What, and what to do.
    pub text: &'static str,
    /// Of which access point, as it calls itself.
    pub nas: String,
    /// How many like it were not logged before.
    pub withheld: u64,
}

/// The pure part of the listener.
#[derive(Clone, Debug)]
pub struct Intake {
    clients: Vec<Client>,
    sessions: Sessions,
    /// Authenticators of requests that were taken. One is a digest over the whole request and the secret.
    taken: Recent<[u8; 16]>,
    quiet: Quiet,
}

impl Intake {
    /// Nothing has come yet.
    #[must_use]
    pub fn new(clients: Vec<Client>, sessions: Sessions) -> Self {
        Self { clients, sessions, taken: Recent::new(MOST_REMEMBERED, REMEMBERED), quiet: Quiet::new(QUIET) }
    }

    /// Takes one datagram that arrived at `now`, which is `now_ms` since 1970.
    pub fn take(&mut self, bytes: &[u8], from: IpAddr, now: Instant, now_ms: u64) -> Outcome {
        let from = from.to_canonical();
        let Some(client) = self.clients.iter().find(|client| client.from.contains(from)) else {
            let text = "accounting from an address that no [[roam.radius.client]] has";
            return Outcome::dropped("unknown_client", self.notice(text, None, now));
        };
        let Ok(packet) = Packet::parse(bytes) else { return Outcome::dropped("malformed", None) };
        if packet.code() != ACCOUNTING_REQUEST {
            return Outcome::dropped("malformed", None);
        }
        if !packet.is_request_of(&client.secret) {
            let text = "accounting with a wrong authenticator; is the secret the same at both ends?";
            return Outcome::dropped("bad_authenticator", self.notice(text, None, now));
        }
        let answer = Some(packet.response(&client.secret));
        let report = match Accounting::from_packet(&packet) {
            Ok(report) => report,
            Err(error) => {
                tracing::debug!(%from, %error, "accounting that is not understood");
                return Outcome { answer, ..Outcome::dropped("malformed", None) };
            }
        };
        let kind = kind(report.status);
        let nothing = Outcome { kind, answer, ..Outcome::dropped("taken", None) };
        if self.taken.again(packet.authenticator(), now) {
            return Outcome { result: "retransmission", ..nothing };
        }
        match self.sessions.take(&report, now, now_ms) {
            Ok(consequence) => Outcome { consequence, ..nothing },
            Err(why) => {
                tracing::debug!(?why, ?report, "accounting without consequence");
                Outcome { result: why.name(), notice: self.explain(why, &report, now), ..nothing }
            }
        }
    }

    /// What an operator should know of.
    fn explain(&mut self, why: Ignored, report: &Accounting, now: Instant) -> Option<Notice> {
        let text = match why {
            Ignored::UnknownAp => "accounting of an access point that no [[ap]] names; see `nas`",
            Ignored::UnknownUser => "accounting that names no user; see `identity` in [roam.radius]",
            Ignored::Stale => {
                "accounting of so long ago that it begins nothing; is the access point's clock right?"
            }
            Ignored::Duplicate | Ignored::Late | Ignored::NotCurrent | Ignored::Other => return None,
        };
        self.notice(text, Some(report), now)
    }

    fn notice(&mut self, text: &'static str, report: Option<&Accounting>, now: Instant) -> Option<Notice> {
        let withheld = self.quiet.may_say(text, now)?;
        let address = || report.and_then(|report| Some(report.nas_ip_address?.to_string()));
        let nas = report.and_then(|report| {
            report.nas_identifier.clone().or_else(address).or_else(|| report.called_station_id.clone())
        });
        Some(Notice { text, nas: nas.unwrap_or_default().chars().take(LOGGED).collect(), withheld })
    }

    /// What follows from time alone.
    pub fn expire(&mut self, now: Instant) -> Vec<Consequence> {
        self.sessions.expire(now)
    }

    /// When something follows from time alone.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Instant> {
        self.sessions.next_expiry()
    }

    /// How many sessions and requests are remembered.
    #[must_use]
    pub fn kept(&self) -> (usize, usize) {
        (self.sessions.len(), self.taken.len())
    }
}

const fn kind(status: Status) -> &'static str {
    match status {
        Status::Start => "start",
        Status::Stop => "stop",
        Status::InterimUpdate => "interim",
        Status::AccountingOn => "on",
        Status::AccountingOff => "off",
        Status::Other(_) => "other",
    }
}

#[cfg(test)]
mod tests;

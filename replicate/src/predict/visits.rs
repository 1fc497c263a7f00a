//! Where one user was: the log that everything about this user is read from.
//!
//! A bounded list of visits in order, four bytes each, beside a table of the access points' names. An access point that
//! finds no room in the table takes that of the one seen longest ago. Times are kept as what the experts ask for (how
//! long a visit was, at what minute of the week it began), so that no clock can put the log out of order.

use kage_machine::identity::ApName;
use serde::{Deserialize, Serialize};

/// Most visits kept: with [`MAX_NAMES`] names of 63 bytes, 15 KiB serialised.
pub const MAX_VISITS: usize = 2048;
/// Visits dropped at once, the oldest, when the log is full.
const DROPPED: usize = MAX_VISITS / 8;
/// Most access points that are known by name.
pub const MAX_NAMES: usize = 96;
/// The user was nowhere.
pub const AWAY: u8 = 255;
/// The user was at an access point whose name had to make room.
const FORGOTTEN: u8 = 254;
/// Arrivals whose time is kept.
pub const TRAIL: usize = 6;
/// Minutes of a week.
pub const WEEK: u16 = 7 * DAY;
/// Minutes of a day.
pub const DAY: u16 = 24 * 60;
/// Steps of [`stay_code`] per doubling.
const STEPS: f32 = 12.0;

/// Being at one place from one time to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Visit {
    /// Number of the access point's name, or [`AWAY`].
    pub ap: u8,
    /// How long, as [`stay_code`]; 0 where that is unknown, as of the last.
    pub stay: u8,
    /// Minute of the week, from Thursday 1970-01-01 00:00, at which it began.
    pub minute: u16,
}

/// A user's visits in order, the last being the present one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Visits {
    names: Vec<ApName>,
    log: Vec<Visit>,
    since_ms: u64,
    /// Number of the access point, and when the user came, of the last arrivals without a gap between them.
    trail: Vec<(u8, u64)>,
}

/// A length of time in a byte: 12 steps to a doubling, from 1 for nothing to 255 for 26 days and more.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "held between 0 and 254")]
pub fn stay_code(stay_ms: u64) -> u8 {
    1 + (((stay_ms as f32) / 1000.0 + 1.0).log2() * STEPS).round().clamp(0.0, 254.0) as u8
}

/// The seconds that a [`stay_code`] stands for.
pub fn stay_s(code: u8) -> f32 {
    (f32::from(code.saturating_sub(1)) / STEPS).exp2() - 1.0
}

/// How many doublings lie between two [`stay_code`]s.
pub fn doublings(from: u8, to: u8) -> f32 {
    (f32::from(to) - f32::from(from)) / STEPS
}

/// The minute of the week of a time since 1970.
#[expect(clippy::cast_possible_truncation, reason = "below the minutes of a week")]
pub const fn minute_of(at_ms: u64) -> u16 {
    (at_ms / 60_000 % WEEK as u64) as u16
}

impl Visits {
    /// Notes an arrival; at the place where the user already is it changes nothing.
    pub fn arrived(&mut self, ap: &ApName, at_ms: u64) {
        if self.at() == Some(ap) {
            return;
        }
        let number = self.number_for(ap);
        if self.log.last().is_none_or(|last| last.ap >= FORGOTTEN) {
            self.trail.clear();
        }
        self.push(number, at_ms);
        if self.trail.len() == TRAIL {
            self.trail.remove(0);
        }
        self.trail.push((number, at_ms));
    }

    /// Notes that the user is nowhere.
    pub fn left(&mut self, at_ms: u64) {
        if self.at().is_some() {
            self.push(AWAY, at_ms);
            self.trail.clear();
        }
    }

    fn push(&mut self, ap: u8, at_ms: u64) {
        let stay = at_ms.checked_sub(self.since_ms).map_or(0, stay_code);
        if let Some(last) = self.log.last_mut() {
            last.stay = stay;
        }
        if self.log.len() >= MAX_VISITS {
            self.log.drain(..DROPPED);
            self.forget_unused();
        }
        self.log.push(Visit { ap, stay: 0, minute: minute_of(at_ms) });
        self.since_ms = at_ms;
    }

    /// The number of a name, which is entered where it is new.
    #[expect(clippy::cast_possible_truncation, reason = "there are fewer names than numbers")]
    fn number_for(&mut self, ap: &ApName) -> u8 {
        if let Some(number) = self.number_of(ap) {
            return number;
        }
        if self.names.len() < MAX_NAMES {
            self.names.push(ap.clone());
            return (self.names.len() - 1) as u8;
        }
        let mut seen = [0_usize; MAX_NAMES];
        for (at, visit) in self.log.iter().enumerate() {
            if let Some(seen) = seen.get_mut(usize::from(visit.ap)) {
                *seen = at + 1;
            }
        }
        let oldest = (0..MAX_NAMES).min_by_key(|&number| seen[number]).unwrap_or(0);
        for visit in self.log.iter_mut().filter(|visit| usize::from(visit.ap) == oldest) {
            visit.ap = FORGOTTEN;
        }
        self.trail.retain(|&(number, _)| usize::from(number) != oldest);
        self.names[oldest] = ap.clone();
        oldest as u8
    }

    /// Makes room in the table of names.
    #[expect(clippy::cast_possible_truncation, reason = "there are fewer names than numbers")]
    fn forget_unused(&mut self) {
        let mut now = [FORGOTTEN; 256];
        let mut kept = Vec::with_capacity(self.names.len());
        for (number, name) in self.names.drain(..).enumerate() {
            let used = |ap: u8| usize::from(ap) == number;
            if self.log.iter().any(|visit| used(visit.ap)) || self.trail.iter().any(|&(ap, _)| used(ap)) {
                now[number] = kept.len() as u8;
                kept.push(name);
            }
        }
        now[usize::from(AWAY)] = AWAY;
        self.names = kept;
        self.log.iter_mut().for_each(|visit| visit.ap = now[usize::from(visit.ap)]);
        self.trail.iter_mut().for_each(|entry| entry.0 = now[usize::from(entry.0)]);
    }

    /// The same within all bounds, whoever wrote it.
    pub fn checked(mut self) -> Self {
        self.names.truncate(MAX_NAMES);
        self.log.drain(..self.log.len().saturating_sub(MAX_VISITS));
        let known = self.names.len();
        for visit in &mut self.log {
            if visit.ap != AWAY && usize::from(visit.ap) >= known {
                visit.ap = FORGOTTEN;
            }
            visit.minute %= WEEK;
        }
        self.trail.drain(..self.trail.len().saturating_sub(TRAIL));
        self.trail.retain(|&(ap, _)| usize::from(ap) < known);
        self.names.shrink_to_fit();
        self.log.shrink_to_fit();
        self
    }

    /// Where the user is.
    pub fn at(&self) -> Option<&ApName> {
        self.name(self.log.last()?.ap)
    }

    /// Since when the user is there, or away, in milliseconds since 1970.
    pub const fn since_ms(&self) -> u64 {
        self.since_ms
    }

    /// All visits, the oldest first.
    pub fn log(&self) -> &[Visit] {
        &self.log
    }

    /// The name with that number.
    pub fn name(&self, number: u8) -> Option<&ApName> {
        self.names.get(usize::from(number))
    }

    /// The number of a name.
    pub fn number_of(&self, ap: &ApName) -> Option<u8> {
        self.names.iter().position(|name| name == ap).and_then(|at| u8::try_from(at).ok())
    }

    /// The last arrivals without a gap between them, the oldest first: where, and when in milliseconds since 1970.
    pub fn trail(&self) -> impl Iterator<Item = (&ApName, u64)> {
        self.trail.iter().filter_map(|&(ap, at_ms)| Some((self.name(ap)?, at_ms)))
    }
}

//! When reported events were, by clocks of access points that need not be right. Pure.
//!
//! Event-Timestamp counts seconds, which orders a walk badly: a report whose timestamp agrees with its arrival (less
//! Acct-Delay-Time) is placed by the arrival. A timestamp in the past is believed: the report was long on its way,
//! or was recorded and is sent again. One in the future is not: no clock that is right can say it.
//!
//! A clock that is slow says of everything that it was long ago. It is known by several events, one after the other,
//! that are all late by the same time; what is sent again after an outage is late by different ones, and what
//! somebody recorded and sends again at its pace was told before. Only an access point that restarts may tell of
//! times that it told of already.

use super::radius::{Accounting, Status};

/// By how much a report's time may differ from its arrival: clocks of access points differ a little, and a client
/// that got no answer sends again after some seconds.
pub(super) const FRESH_MS: u64 = 3_000;

/// How many events in a row have to be late by the same time for their clock to be the reason.
const ENOUGH: u32 = 3;

/// When a reported event was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct When {
    /// In milliseconds since 1970.
    pub ms: u64,
    /// Whether that is an Event-Timestamp, and so only as good as a second.
    pub is_told: bool,
}

impl When {
    /// Whether this was before what happened at `ms`. Of two fresh ones in one second the later arrival counts; of
    /// one that may have been recorded and sent again nobody can say that it came later.
    pub fn is_before(self, ms: u64) -> bool {
        if self.is_told { self.ms / 1000 <= ms / 1000 } else { self.ms / 1000 < ms / 1000 }
    }
}

/// What is known of an access point's clock.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Clock {
    /// Latest Event-Timestamp that was believed or late: what was told before it is told again.
    told_ms: u64,
    /// By how much it was.
    late_ms: u64,
    /// How many in a row were late by that.
    row: u32,
    /// By how much the clock is slow, once that is known.
    slow_ms: Option<u64>,
}

impl Clock {
    /// Places a report that arrived at `now_ms` since 1970.
    pub fn place(&mut self, report: &Accounting, now_ms: u64) -> When {
        let delay_ms = u64::from(report.delay_seconds.unwrap_or(0)) * 1000;
        let arrival = When { ms: now_ms.saturating_sub(delay_ms), is_told: false };
        let Some(seconds) = report.event_timestamp else { return arrival };
        if report.status == Status::AccountingOn {
            // After a restart a clock may go on from the past.
            (self.told_ms, self.row) = (0, 0);
        }
        let told_ms = u64::from(seconds) * 1000;
        let late_ms = arrival.ms.saturating_sub(told_ms);
        if late_ms <= FRESH_MS {
            // In the future it says nothing about being slow.
            if told_ms <= arrival.ms {
                *self = Self { told_ms: self.told_ms.max(told_ms), ..Self::default() };
            }
            return arrival;
        }
        if told_ms > self.told_ms {
            let is_same = late_ms.abs_diff(self.late_ms) <= FRESH_MS;
            self.row = if is_same { self.row.saturating_add(1) } else { 1 };
            (self.told_ms, self.late_ms) = (told_ms, late_ms);
            if self.row >= ENOUGH {
                self.slow_ms = Some(late_ms);
            }
        }
        match self.slow_ms {
            Some(slow_ms) if late_ms <= slow_ms + FRESH_MS => arrival,
            Some(slow_ms) => When { ms: told_ms + slow_ms, is_told: true },
            None => When { ms: told_ms, is_told: true },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: u64 = 1_700_000_000_500;

    fn report(told: Option<u32>, delay: Option<u32>) -> Accounting {
        Accounting { event_timestamp: told, delay_seconds: delay, ..Accounting::new(Status::Start) }
    }

    #[test]
    fn a_walk_within_one_second_keeps_its_order() {
        let place = |told, delay, now_ms| Clock::default().place(&report(told, delay), now_ms);
        let fresh = |ms| When { ms, is_told: false };
        assert_eq!(place(Some(1_700_000_000), None, 1_700_000_000_900), fresh(1_700_000_000_900));
        assert_eq!(place(Some(1_700_000_000), None, 1_700_000_001_010), fresh(1_700_000_001_010));
        let told = When { ms: 1_700_000_000_000, is_told: true };
        assert_eq!(place(Some(1_700_000_000), None, 1_700_000_009_000), told);
        assert_eq!(place(Some(1_800_000_000), Some(2), 1_700_000_009_000), fresh(1_700_000_007_000));
        assert_eq!(place(Some(1_700_000_000), Some(9), 1_700_000_009_000), fresh(1_700_000_000_000));
        assert_eq!(place(None, Some(u32::MAX), NOW_MS).ms, 0);
        assert_eq!(place(Some(u32::MAX), Some(u32::MAX), NOW_MS).ms, 0);
    }

    #[test]
    fn a_slow_clock_is_known_after_some_events() {
        let mut clock = Clock::default();
        let mut at = |second: u64| {
            let told = 1_600_000_000 + second as u32;
            clock.place(&report(Some(told), None), NOW_MS + second * 1000).is_told
        };
        assert_eq!([at(0), at(40), at(95), at(140)], [true, true, false, false]);
        // What is later than its clock explains is late.
        let now_ms = NOW_MS + 200_000;
        let late = clock.place(&report(Some(1_600_000_100), None), now_ms);
        assert!(late.is_told && late.ms.abs_diff(now_ms - 100_000) <= FRESH_MS, "{late:?}");
        // Set right, it is believed again.
        assert!(!clock.place(&report(Some(1_700_000_200), None), now_ms).is_told);
        assert!(clock.place(&report(Some(1_700_000_190), None), now_ms).is_told);
    }

    #[test]
    fn what_was_told_already_is_late_at_whatever_pace_it_is_sent_again() {
        let mut clock = Clock::default();
        let told = |second: u64| report(Some(1_700_000_000 + second as u32), None);
        for second in [0, 10, 20, 30] {
            assert!(!clock.place(&told(second), NOW_MS + second * 1000).is_told);
        }
        for second in [0, 10, 20] {
            assert!(clock.place(&told(second), NOW_MS + 600_000 + second * 1000).is_told, "{second}");
        }
        // An access point that has restarted without its clock is known after some events all the same.
        let on = Accounting { status: Status::AccountingOn, ..report(Some(1_000), None) };
        clock.place(&on, NOW_MS + 700_000);
        let mut at = |second: u64| {
            clock.place(&report(Some(1_000 + second as u32), None), NOW_MS + 700_000 + second * 1000).is_told
        };
        assert_eq!([at(10), at(20), at(30)], [true, false, false]);
    }

    #[test]
    fn what_was_kept_back_and_comes_at_once_is_late() {
        let mut clock = Clock::default();
        for second in (0..100).step_by(10) {
            let told = 1_699_999_800 + second;
            assert!(clock.place(&report(Some(told), None), NOW_MS).is_told, "{second}");
        }
        // One event again and again is no row.
        for again in 0..10 {
            assert!(clock.place(&report(Some(1_699_999_890), None), NOW_MS + again * 100).is_told);
        }
    }
}

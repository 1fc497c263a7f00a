//! When to stop copying and switch: a pure rule.
//!
//! A round sends what was written during the one before. The rule estimates the blackout were the
//! machine paused now, from what is dirty and the bandwidth seen, and asks for another round as long
//! as that brings the estimate down.

use std::time::Duration;

/// Blackout that no round can reduce: vCPU out, save, restore, first instruction on two quiet hosts
/// (150–250 µs measured between two processes), plus encoding. Measure again with `kage bench migrate`.
pub const FIXED_BLACKOUT: Duration = Duration::from_micros(400);

/// What a round takes beside sending and the way there and back: a harvest, and two hosts that wake up.
const FIXED_ROUND: Duration = Duration::from_micros(500);

/// A round must bring the estimate down to this share of the last one to count as progress.
const PROGRESS: f64 = 0.9;

/// A blackout that is short enough is made shorter still, by as much at least, while a round takes no longer than that
/// or than this share of the time so far.
const WORTH: Duration = Duration::from_micros(200);
const SHORT_ROUND: Duration = Duration::from_millis(20);
const SHORT_SHARE: u32 = 50;

/// Rounds without progress after which the rate of change is believed to exceed the bandwidth.
const STALLED_ROUNDS: u32 = 3;

/// Longest blackout that is accepted when the deadline says "switch anyway".
pub const LONGEST_BLACKOUT: Duration = Duration::from_secs(10);

/// Bytes per second assumed before anything was measured.
const FIRST_GUESS: f64 = 100e6;

/// Bytes a page costs on the wire before anything was measured.
const FIRST_PAGE: f64 = 4096.0;

/// What to do when rounds no longer help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stubborn {
    /// Switch anyway, with a longer blackout.
    Switch,
    /// Keep the machine here.
    Keep,
}

/// What is asked of a handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Goal {
    /// Blackout to stay below.
    pub blackout: Duration,
    /// From the request to the switch, at most.
    pub timeout: Duration,
    /// When the blackout cannot be met.
    pub stubborn: Stubborn,
}

/// What one round did, and what it left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Round {
    /// Pages it sent.
    pub pages: u64,
    /// Bytes it put on the wire.
    pub bytes_wire: u64,
    /// How long it took, acknowledgement included.
    pub took: Duration,
    /// Pages written while it ran: what a switch now would have to send.
    pub dirty: u64,
    /// Time since the request.
    pub elapsed: Duration,
    /// Link round trip.
    pub rtt: Duration,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Send another round.
    Round,
    /// Pause and switch.
    Switch,
    /// Keep the machine here, and why.
    GiveUp(String),
}

/// The rule's memory: bandwidth, page cost, progress. Integers, so that deciders compare and hash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Convergence {
    /// Rounds so far.
    pub rounds: u32,
    bytes_per_second: u64,
    bytes_per_page: u64,
    best: Duration,
    /// A switch would have been short enough.
    met: bool,
    stalled: u32,
}

impl Convergence {
    /// Estimated blackout with `dirty` pages left to send.
    #[must_use]
    pub fn estimate(&self, dirty: u64, rtt: Duration) -> Duration {
        FIXED_BLACKOUT + rtt / 2 + self.transfer(dirty)
    }

    /// Time to send `pages` pages.
    #[must_use]
    pub fn transfer(&self, pages: u64) -> Duration {
        let or = |value: u64, guess: f64| if value == 0 { guess } else { value as f64 };
        let bytes = pages as f64 * or(self.bytes_per_page, FIRST_PAGE);
        Duration::try_from_secs_f64(bytes / or(self.bytes_per_second, FIRST_GUESS)).unwrap_or(Duration::MAX)
    }

    /// Takes a finished round in and decides.
    #[must_use]
    pub fn after(mut self, round: &Round, goal: &Goal) -> (Self, Verdict) {
        self.learn(round);
        let estimate = self.estimate(round.dirty, round.rtt);
        if self.rounds == 1 || estimate.as_secs_f64() <= self.best.as_secs_f64() * PROGRESS {
            self.stalled = 0;
        } else {
            self.stalled += 1;
        }
        self.best = if self.rounds == 1 { estimate } else { self.best.min(estimate) };
        let left = goal.timeout.saturating_sub(round.elapsed);
        let verdict = if estimate <= goal.blackout {
            self.met = true;
            if self.pays(round) && left > estimate.saturating_mul(3) {
                Verdict::Round
            } else {
                Verdict::Switch
            }
        } else if self.met && estimate <= goal.blackout.saturating_mul(2) {
            // It was short enough before a round that was to make it shorter.
            Verdict::Switch
        } else if self.stalled < STALLED_ROUNDS && left > estimate.saturating_mul(3) {
            Verdict::Round
        } else {
            self.stuck(round, goal, estimate)
        };
        (self, verdict)
    }

    /// Whether one more round makes a blackout that is short enough shorter, at little cost.
    fn pays(&self, round: &Round) -> bool {
        let next = self.transfer(round.dirty) + round.rtt + FIXED_ROUND;
        let rate = round.dirty as f64 / round.took.max(FIXED_ROUND).as_secs_f64();
        let left = self.transfer((rate * next.as_secs_f64()).ceil() as u64);
        self.stalled == 0
            && next <= SHORT_ROUND.max(round.elapsed / SHORT_SHARE)
            && self.transfer(round.dirty) >= left + WORTH
    }

    fn learn(&mut self, round: &Round) {
        self.rounds += 1;
        // A round of a few pages measures the round trip, not the link.
        let sending = round.took.saturating_sub(round.rtt);
        if round.bytes_wire >= 64 << 10 && !sending.is_zero() {
            self.bytes_per_second = ((round.bytes_wire as f64 / sending.as_secs_f64()) as u64).max(1);
        }
        if round.pages >= 16 {
            self.bytes_per_page = (round.bytes_wire / round.pages).max(1);
        }
    }

    fn stuck(&self, round: &Round, goal: &Goal, estimate: Duration) -> Verdict {
        let rate = round.dirty as f64 / round.took.as_secs_f64().max(1e-6);
        let why = format!(
            "{} pages are dirty after {} rounds, {rate:.0} more each second; a switch would take {} ms, asked for {} ms",
            round.dirty,
            self.rounds,
            estimate.as_millis(),
            goal.blackout.as_millis(),
        );
        match goal.stubborn {
            Stubborn::Switch if estimate <= LONGEST_BLACKOUT => Verdict::Switch,
            Stubborn::Switch | Stubborn::Keep => Verdict::GiveUp(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn goal(stubborn: Stubborn) -> Goal {
        Goal { blackout: Duration::from_millis(10), timeout: Duration::from_secs(30), stubborn }
    }

    /// Plays a machine that dirties `rate` pages a second of a working set over a link.
    fn play(rate: f64, working_set: u64, bytes_per_second: f64, goal: &Goal) -> (Convergence, Verdict, u64) {
        let (mut rule, mut pages, mut elapsed) = (Convergence::default(), 16384u64, 0.0);
        loop {
            let took = (pages as f64 * 4096.0 / bytes_per_second).max(0.0005);
            elapsed += took;
            let dirty = ((rate * took) as u64).min(working_set);
            let round = Round {
                pages,
                bytes_wire: pages * 4096,
                took: Duration::from_secs_f64(took),
                dirty,
                elapsed: Duration::from_secs_f64(elapsed),
                rtt: Duration::from_micros(100),
            };
            let (next, verdict) = rule.after(&round, goal);
            rule = next;
            if verdict != Verdict::Round {
                return (rule, verdict, dirty);
            }
            pages = dirty;
        }
    }

    #[test]
    fn an_idle_machine_switches_after_one_round() {
        let (rule, verdict, _) = play(0.0, 0, 6.25e6, &goal(Stubborn::Keep));
        assert_eq!((rule.rounds, verdict), (1, Verdict::Switch));
    }

    #[test]
    fn a_working_set_slower_than_the_link_converges_below_the_target() {
        let (rule, verdict, dirty) = play(500.0, 4915, 6.25e6, &goal(Stubborn::Keep));
        assert_eq!(verdict, Verdict::Switch);
        assert!(rule.rounds < 10 && dirty < 20, "{} rounds, {dirty} pages", rule.rounds);
    }

    #[test]
    fn a_short_blackout_is_made_shorter_where_that_costs_little() {
        // 5,000 pages a second over a link of 400 MB/s: 800 pages after the first round.
        let (rule, verdict, dirty) = play(5000.0, 4915, 400e6, &goal(Stubborn::Keep));
        assert_eq!(verdict, Verdict::Switch);
        assert!(rule.rounds > 1 && dirty < 50, "{} rounds, {dirty} pages", rule.rounds);
        // Where a round brings no more, there is none.
        let (rule, _, _) = play(0.0, 0, 400e6, &goal(Stubborn::Keep));
        assert_eq!(rule.rounds, 1);
    }

    #[test]
    fn a_machine_faster_than_the_link_is_kept_with_the_figures() {
        let (_, verdict, _) = play(5000.0, 4915, 6.25e6, &goal(Stubborn::Keep));
        let Verdict::GiveUp(why) = verdict else { panic!("{verdict:?}") };
        assert!(why.contains("asked for 10 ms"), "{why}");
    }

    #[test]
    fn a_machine_faster_than_the_link_switches_anyway_when_allowed() {
        assert_eq!(play(5000.0, 4915, 6.25e6, &goal(Stubborn::Switch)).1, Verdict::Switch);
    }

    proptest! {
        #[test]
        fn the_rule_always_ends(rate in 0.0..1e6f64, working_set in 0u64..16384, mbit in 1.0..10000f64, keep: bool) {
            let stubborn = if keep { Stubborn::Keep } else { Stubborn::Switch };
            let (rule, _, _) = play(rate, working_set, mbit * 125_000.0, &goal(stubborn));
            prop_assert!(rule.rounds < 200);
        }
    }
}

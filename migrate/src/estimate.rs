//! What a handover would cost: the rule of [`crate::converge`] played over measured facts. Pure.

use std::time::Duration;

use crate::converge::{Convergence, Goal, Round, Verdict};

/// Rounds that are played at most; the rule itself ends earlier.
const MOST_ROUNDS: u32 = 1000;

/// How a machine writes: within `t` it writes `working_set · (1 − e^(−rate·t / working_set))` different pages.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Writing {
    /// Pages per second, a page counted each time.
    pub pages_per_s: f64,
    /// Pages it writes at all.
    pub working_set: f64,
}

impl Writing {
    /// From the different pages that were written within `span`, and within the first `part` of it. What shows no sign of
    /// an end writes `most` pages.
    #[must_use]
    pub fn measured(first: u64, part: Duration, all: u64, span: Duration, most: u64) -> Self {
        let (first, all, most) = (first as f64, all.max(first) as f64, most as f64);
        let (part, span) = (part.as_secs_f64(), span.as_secs_f64());
        if all == 0.0 || part <= 0.0 || span <= part {
            return Self::default();
        }
        let steady = Self { pages_per_s: all / span, working_set: most.max(all) };
        if first == 0.0 || all / first >= 0.95 * span / part {
            return steady;
        }
        // The share of the working set that is written again grows with x = rate · part / working set.
        let grown = |x: f64| (1.0 - (-x * span / part).exp()) / (1.0 - (-x).exp());
        let (mut low, mut high) = (1e-6, 50.0);
        for _ in 0..60 {
            let x = f64::midpoint(low, high);
            if grown(x) > all / first { low = x } else { high = x }
        }
        let working_set = (all / (1.0 - (-low * span / part).exp())).clamp(all, most.max(all));
        Self { pages_per_s: low * working_set / part, working_set }
    }

    /// Different pages written within that time.
    #[must_use]
    pub fn within(&self, time: Duration) -> u64 {
        if self.working_set <= 0.0 {
            return 0;
        }
        let written = self.pages_per_s * time.as_secs_f64() / self.working_set;
        (self.working_set * (1.0 - (-written).exp())).round() as u64
    }
}

/// What is known of a machine, a link and a target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Facts {
    /// Pages the target lacks.
    pub pages: u64,
    /// What one costs on the wire.
    pub bytes_per_page: f64,
    /// What the link, or the cap on it, carries.
    pub bytes_per_s: f64,
    /// Of the link.
    pub rtt: Duration,
    /// How the machine writes.
    pub writing: Writing,
}

/// What a handover would cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Rounds before the switch.
    pub rounds: u32,
    /// Pages in all.
    pub pages_sent: u64,
    /// Pages in the pause.
    pub pages_at_switch: u64,
    /// Bytes on the wire.
    pub bytes_wire: u64,
    /// From the request to the last page.
    pub total: Duration,
    /// Nobody runs the machine for so long.
    pub blackout: Duration,
    /// [`Verdict::Switch`], or why it would be kept.
    pub verdict: Verdict,
}

/// Estimates a handover.
#[must_use]
pub fn estimate(facts: &Facts, goal: &Goal) -> Estimate {
    let bytes = |pages: u64| (pages as f64 * facts.bytes_per_page) as u64;
    let (mut rule, mut verdict) = (Convergence::default(), Verdict::Round);
    let (mut pages, mut sent, mut wire, mut elapsed) = (facts.pages, 0, 0, facts.rtt * 3);
    while verdict == Verdict::Round && rule.rounds < MOST_ROUNDS {
        let sending = bytes(pages) as f64 / facts.bytes_per_s.max(1.0);
        let took = Duration::try_from_secs_f64(sending).unwrap_or(Duration::MAX).saturating_add(facts.rtt);
        elapsed = elapsed.saturating_add(took);
        (sent, wire) = (sent + pages, wire + bytes(pages));
        // What runs into its time is not played to its end.
        if elapsed >= goal.timeout {
            let why = format!("copying alone takes longer than {} s", goal.timeout.as_secs_f64());
            verdict = Verdict::GiveUp(why);
            pages = facts.writing.within(goal.timeout);
            rule.rounds += 1;
            break;
        }
        let dirty = facts.writing.within(took);
        let round = Round { pages, bytes_wire: bytes(pages), took, dirty, elapsed, rtt: facts.rtt };
        (rule, verdict) = rule.after(&round, goal);
        pages = dirty;
    }
    let blackout = rule.estimate(pages, facts.rtt);
    Estimate {
        rounds: rule.rounds,
        pages_sent: sent + pages,
        pages_at_switch: pages,
        bytes_wire: wire + bytes(pages),
        total: elapsed.saturating_add(blackout),
        blackout,
        verdict,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::converge::Stubborn;

    const GOAL: Goal = Goal {
        blackout: Duration::from_millis(10),
        timeout: Duration::from_secs(30),
        stubborn: Stubborn::Keep,
    };

    fn facts(pages: u64, mbit: f64, pages_per_s: f64, working_set: f64) -> Facts {
        Facts {
            pages,
            bytes_per_page: 1300.0,
            bytes_per_s: mbit * 125e3,
            rtt: Duration::from_millis(1),
            writing: Writing { pages_per_s, working_set },
        }
    }

    #[test]
    fn an_idle_machine_takes_its_bytes_over_the_links_rate() {
        let found = estimate(&facts(16_384, 50.0, 0.0, 0.0), &GOAL);
        assert_eq!((found.rounds, &found.verdict, found.pages_at_switch), (1, &Verdict::Switch, 0));
        assert_eq!(found.bytes_wire, 16_384 * 1300);
        let expected = 16_384.0 * 1300.0 / 6.25e6;
        assert!((found.total.as_secs_f64() - expected).abs() < 0.02, "{found:?}");
        assert!(found.blackout < Duration::from_millis(2), "{found:?}");
    }

    #[test]
    fn a_busy_machine_takes_more_rounds_and_one_that_is_faster_than_the_link_is_kept() {
        let busy = estimate(&facts(16_384, 50.0, 500.0, 4915.0), &GOAL);
        assert!(busy.rounds > 1 && busy.verdict == Verdict::Switch, "{busy:?}");
        assert!(busy.blackout <= GOAL.blackout);
        let hot = estimate(&facts(16_384, 50.0, 50_000.0, 8000.0), &GOAL);
        assert!(
            matches!(&hot.verdict, Verdict::GiveUp(why) if why.contains("not") || why.contains("dirty")),
            "{hot:?}"
        );
        let slow = estimate(&facts(16_384, 1.0, 0.0, 0.0), &GOAL);
        assert!(matches!(slow.verdict, Verdict::GiveUp(_)), "170 s of copying do not fit into 30: {slow:?}");
    }

    #[test]
    fn a_mirror_leaves_little_to_send() {
        let found = estimate(&facts(40, 50.0, 500.0, 4915.0), &GOAL);
        assert!(found.total < Duration::from_millis(100), "{found:?}");
    }

    #[test]
    fn a_rate_and_a_working_set_are_found_again() {
        let ms = Duration::from_millis;
        for (pages_per_s, working_set) in
            [(500.0, 4915.0), (20_000.0, 2000.0), (100.0, 10.0), (5000.0, 16_000.0)]
        {
            let writing = Writing { pages_per_s, working_set };
            let found =
                Writing::measured(writing.within(ms(100)), ms(100), writing.within(ms(400)), ms(400), 16_384);
            // What matters: how much it writes in a second and in ten.
            for time in [ms(1000), ms(10_000)] {
                let (is, was) = (found.within(time) as f64, writing.within(time) as f64);
                assert!(is >= was * 0.6 && is <= was * 3.5 + 5.0, "{writing:?} {found:?}: {is} for {was}");
            }
        }
        let idle = Writing::measured(0, ms(100), 0, ms(400), 16_384);
        assert_eq!(idle.within(ms(100_000)), 0);
    }

    proptest! {
        #[test]
        fn an_estimate_always_ends_and_a_faster_link_never_takes_longer(
            pages in 0u64..20_000, mbit in 0.1..2000.0f64, rate in 0.0..1e6f64, working_set in 0.0..16_384.0f64,
        ) {
            let slow = estimate(&facts(pages, mbit, rate, working_set), &GOAL);
            prop_assert!(slow.rounds >= 1 && slow.pages_sent >= pages);
            prop_assert!(slow.verdict != Verdict::Round);
            let idle = |mbit| estimate(&facts(pages, mbit, 0.0, 0.0), &GOAL).total;
            prop_assert!(idle(mbit * 2.0) <= idle(mbit));
        }

        #[test]
        fn what_is_measured_is_never_less_than_what_was_seen(
            first in 0u64..5000, more in 0u64..20_000, most in 0u64..16_384,
        ) {
            let (part, span) = (Duration::from_millis(100), Duration::from_millis(400));
            let found = Writing::measured(first, part, first + more, span, most);
            prop_assert!(found.pages_per_s.is_finite() && found.working_set.is_finite());
            prop_assert!(found.working_set + 1e-6 >= (first + more) as f64);
        }
    }
}

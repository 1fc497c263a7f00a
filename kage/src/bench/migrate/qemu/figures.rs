//! What the guest noted, as its memory holds it, and what a move did to it.

use std::time::{Duration, Instant};

use kage_abi::HEARTBEAT_INTERVAL_NS;

use super::program::Orders;

/// Less time than this on the guest's clock is not told from the errors of reading it from outside.
const CLOCK_ERROR: Duration = Duration::from_millis(3);

/// The first figures in the guest's memory, read at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When, within the time it took to ask.
    pub at: Instant,
    /// How long it took to ask.
    pub took: Duration,
    /// Beats noted.
    pub beats: u64,
    /// Ticks at the last of them.
    pub last: u64,
    /// Ticks at the start.
    pub began: u64,
    /// Pages rewritten.
    pub turns: u64,
}

impl Sample {
    /// From words as the monitor's `xp` prints them.
    pub fn read(text: &str, asked: Instant, answered: Instant) -> Option<Self> {
        let [beats, last, began, turns] = words(text)[..] else { return None };
        let took = answered - asked;
        Some(Self { at: asked + took / 2, took, beats, last, began, turns })
    }

    /// Ticks per second, from this to a later sample.
    pub fn ticks_per_second(&self, later: &Self) -> Option<u64> {
        let ticks = later.last.checked_sub(self.last)?;
        let seconds = later.at.checked_duration_since(self.at)?.as_secs_f64();
        (seconds > 0.0).then(|| (ticks as f64 / seconds) as u64)
    }

    /// How much of the time from this to a later sample the guest's clock left out. A processor whose counter is
    /// set to what it was when the guest stopped hides the stop from it.
    pub fn hidden_until(&self, later: &Self, orders: &Orders) -> Duration {
        let passed = later.at.saturating_duration_since(self.at).as_secs_f64();
        let seen = (later.last as f64 - self.last as f64) / orders.ticks_per_second as f64;
        let hidden = Duration::try_from_secs_f64(passed - seen).unwrap_or_default();
        // The guest's clock was compared with ours for a second, by two samples that are a beat off at most.
        let rate_error = (self.took + later.took).as_secs_f64() + 2.0 * HEARTBEAT_INTERVAL_NS as f64 / 1e9;
        let drift = Duration::try_from_secs_f64(passed * rate_error).unwrap_or_default();
        if hidden < CLOCK_ERROR + self.took + later.took + drift { Duration::ZERO } else { hidden }
    }
}

/// Numbers of a dump: lines of an address, a colon and words in hexadecimal.
fn words(text: &str) -> Vec<u64> {
    let numbers =
        text.lines().filter_map(|line| line.split_once(':')).flat_map(|(_, words)| words.split_whitespace());
    numbers.filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()).collect()
}

/// Gaps of a stretch of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gaps {
    /// The longest.
    pub longest: Duration,
    /// The sum of those above a millisecond, less the interval of the heartbeat each.
    pub stall: Duration,
}

impl Gaps {
    /// Those of the slots from that of `from` on, in ticks of the guest's clock; `slots` as they are in its memory.
    pub fn of(slots: &[u8], orders: &Orders, began: u64, from: u64) -> Self {
        let first = from.saturating_sub(began) / orders.slot_ticks();
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let (mut longest, mut stall) = (0, 0);
        for slot in slots.chunks_exact(16).skip(usize::try_from(first).unwrap_or(usize::MAX)) {
            let (gap, sum) = slot.split_at(8);
            longest = word(gap).max(longest);
            stall += word(sum);
        }
        let time = |ticks: u64| {
            let nanoseconds = u128::from(ticks) * 1_000_000_000 / u128::from(orders.ticks_per_second.max(1));
            Duration::from_nanos(nanoseconds as u64)
        };
        Self { longest: time(longest), stall: time(stall) }
    }

    /// With a stop that the guest's clock hid.
    pub fn and_hidden(self, hidden: Duration) -> Self {
        if hidden.is_zero() {
            return self;
        }
        let gap = hidden + Duration::from_nanos(HEARTBEAT_INTERVAL_NS);
        Self { longest: self.longest.max(gap), stall: self.stall + hidden }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDERS: Orders = Orders { ticks_per_second: 1_000_000_000, rate: 0, working_set: 0 };

    fn sample(at: Instant, last: u64) -> Sample {
        Sample { at, took: Duration::ZERO, beats: 1, last, began: 0, turns: 0 }
    }

    #[test]
    fn a_dump_is_read_word_by_word() {
        let text = "0000000000009000: 0x0000000000000001 0x0000000000000010\r\n\
                    0000000000009010: 0x0000000000000020 0xffffffffffffffff\r\n";
        let now = Instant::now();
        let sample = Sample::read(text, now, now + Duration::from_millis(2)).unwrap();
        assert_eq!((sample.beats, sample.last, sample.began, sample.turns), (1, 16, 32, u64::MAX));
        assert_eq!(sample.at, now + Duration::from_millis(1));
        for cut in 0..text.len() - 3 {
            assert!(Sample::read(&text[..cut], now, now).is_none_or(|sample| sample.turns < u64::MAX));
        }
    }

    #[test]
    fn a_clock_that_stood_still_hides_a_stop() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let before = sample(now, 5_000_000_000);
        assert_eq!(before.ticks_per_second(&sample(now + second, 7_500_000_000)), Some(2_500_000_000));
        let hidden = |last: u64| before.hidden_until(&sample(now + second, last), &ORDERS);
        assert_eq!(hidden(6_000_000_000), Duration::ZERO);
        assert_eq!(hidden(6_100_000_000), Duration::ZERO);
        assert_eq!(hidden(5_998_000_000), Duration::ZERO);
        let found = hidden(5_900_000_000);
        assert!((found.as_secs_f64() - 0.1).abs() < 1e-6, "{found:?}");
        let gaps = Gaps::default().and_hidden(found);
        assert!(gaps.longest > found && gaps.stall == found);
        assert_eq!(gaps.and_hidden(Duration::ZERO), gaps);
    }

    #[test]
    fn gaps_before_the_move_do_not_count() {
        let slot = |gap: u64, stall: u64| [gap.to_le_bytes(), stall.to_le_bytes()].concat();
        let slots = [slot(9_000_000, 8_750_000), slot(300_000, 0), slot(2_000_000, 3_500_000)].concat();
        let gaps = |from: u64| Gaps::of(&slots, &ORDERS, 1_000, from);
        let ms = |micros: u64| Duration::from_micros(micros);
        assert_eq!(gaps(0), Gaps { longest: ms(9_000), stall: ms(12_250) });
        assert_eq!(gaps(1_000 + ORDERS.slot_ticks()), Gaps { longest: ms(2_000), stall: ms(3_500) });
        assert_eq!(gaps(u64::MAX), Gaps::default());
    }
}

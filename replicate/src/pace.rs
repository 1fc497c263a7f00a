//! Rates: a token bucket that limits them, a meter that measures them. Pure; time is an argument.

use std::time::{Duration, Instant};

/// Bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Rate(f64);

impl Rate {
    /// A rate of that many bytes per second; at least one.
    #[must_use]
    pub const fn bytes_per_s(bytes: f64) -> Self {
        // NaN and negative rates are nobody's: the comparison is false for both.
        Self(if bytes > 1.0 { bytes } else { 1.0 })
    }

    /// As bytes per second.
    #[must_use]
    pub const fn as_bytes_per_s(self) -> f64 {
        self.0
    }

    /// How long that many bytes take.
    #[must_use]
    pub fn time_for(self, bytes: u64) -> Duration {
        Duration::try_from_secs_f64(bytes as f64 / self.0).unwrap_or(Duration::MAX)
    }

    /// How many bytes pass in that time.
    #[must_use]
    pub fn bytes_in(self, time: Duration) -> u64 {
        (self.0 * time.as_secs_f64()) as u64
    }
}

/// Limits a stream to a rate, with a burst.
///
/// May go into debt by one take, so that a frame larger than the burst still passes and the rate
/// holds over any two frames.
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    rate: Rate,
    burst: f64,
    tokens: f64,
    at: Instant,
}

impl TokenBucket {
    /// A full bucket.
    #[must_use]
    pub fn new(rate: Rate, burst: u64, now: Instant) -> Self {
        let burst = burst as f64;
        Self { rate, burst, tokens: burst, at: now }
    }

    /// The rate it holds.
    #[must_use]
    pub const fn rate(&self) -> Rate {
        self.rate
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + elapsed * self.rate.0).min(self.burst);
        self.at = self.at.max(now);
    }

    /// How long to wait before the next take.
    #[must_use]
    pub fn wait(&mut self, now: Instant) -> Duration {
        self.refill(now);
        if self.tokens >= 0.0 {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(-self.tokens / self.rate.0).unwrap_or(Duration::MAX)
    }

    /// Takes for bytes that are sent now.
    pub fn take(&mut self, now: Instant, bytes: u64) {
        self.refill(now);
        self.tokens -= bytes as f64;
    }
}

/// Measures a rate from amounts and the times they took: the mean of recent ones, older ones
/// fading with the amount seen since.
#[derive(Clone, Copy, Debug)]
pub struct Meter {
    /// Amount after which older measurements count 1/e.
    window: f64,
    amount: f64,
    seconds: f64,
}

impl Meter {
    /// A meter that forgets over `window` bytes.
    #[must_use]
    pub fn new(window: u64) -> Self {
        Self { window: window.max(1) as f64, amount: 0.0, seconds: 0.0 }
    }

    /// Counts bytes and the time they took.
    pub fn record(&mut self, bytes: u64, took: Duration) {
        let fade = (-(bytes as f64) / self.window).exp();
        self.amount = self.amount * fade + bytes as f64;
        self.seconds = self.seconds * fade + took.as_secs_f64();
    }

    /// The rate, once something was recorded.
    #[must_use]
    pub fn rate(&self) -> Option<Rate> {
        (self.amount > 0.0 && self.seconds > 0.0).then(|| Rate::bytes_per_s(self.amount / self.seconds))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bucket_never_lets_more_than_burst_rate_and_one_frame_pass(
            frames in prop::collection::vec((1u64..300_000, 0u64..50_000), 1..60),
        ) {
            let rate = Rate::bytes_per_s(1e6);
            let (burst, start) = (64_000, Instant::now());
            let mut bucket = TokenBucket::new(rate, burst, start);
            let (mut now, mut sent) = (start, 0);
            for (bytes, idle_us) in frames {
                now += Duration::from_micros(idle_us);
                let wait = bucket.wait(now);
                now += wait;
                // Waiting as told is enough, up to rounding.
                prop_assert!(bucket.wait(now) <= Duration::from_nanos(2));
                let allowed = burst as f64 + (now - start).as_secs_f64() * 1e6;
                prop_assert!(sent as f64 <= allowed + 1.0, "{} above {}", sent, allowed);
                bucket.take(now, bytes);
                sent += bytes;
            }
        }
    }

    #[test]
    fn time_that_steps_back_gives_no_tokens() {
        let now = Instant::now() + Duration::from_secs(10);
        let mut bucket = TokenBucket::new(Rate::bytes_per_s(1000.0), 100, now);
        bucket.take(now, 1100);
        assert_eq!(bucket.wait(now), Duration::from_secs(1));
        assert_eq!(bucket.wait(now - Duration::from_secs(5)), Duration::from_secs(1));
        assert_eq!(bucket.wait(now + Duration::from_secs(1)), Duration::ZERO);
    }

    #[test]
    fn a_meter_follows_a_change_of_rate() {
        let mut meter = Meter::new(1 << 20);
        assert_eq!(meter.rate(), None);
        meter.record(1 << 20, Duration::from_millis(10));
        let fast = meter.rate().unwrap().as_bytes_per_s();
        assert!((fast / (100.0 * (1 << 20) as f64) - 1.0).abs() < 1e-6);
        for _ in 0..64 {
            meter.record(256 << 10, Duration::from_millis(50));
        }
        let slow = meter.rate().unwrap().as_bytes_per_s();
        assert!((slow / (5.0 * (1 << 20) as f64) - 1.0).abs() < 0.01, "{slow}");
    }

    #[test]
    fn senseless_rates_are_one_byte_per_second() {
        for rate in [0.0, -1.0, f64::NAN] {
            assert_eq!(Rate::bytes_per_s(rate).as_bytes_per_s(), 1.0);
        }
        assert_eq!(Rate::bytes_per_s(f64::INFINITY).time_for(u64::MAX), Duration::ZERO);
    }
}

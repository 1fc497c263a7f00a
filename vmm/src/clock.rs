//! Guest time: monotonic time that goes on by the true elapsed time across a move, and a wall clock
//! that is slewed, never stepped, towards the host's.

use kage_machine::{HostInstant, state::ClockState};

/// Fastest correction of the wall clock, as NTP's kernel discipline uses it.
const SLEW_PPM: i64 = 500;

/// Host times are passed in; this holds only differences.
#[derive(Clone, Copy, Debug)]
pub struct GuestClock {
    /// Guest monotonic minus host monotonic time.
    monotonic_offset: i64,
    /// Guest wall clock minus guest monotonic time.
    wall_base: i64,
    /// Last guest monotonic time given out.
    last: u64,
}

/// One reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Guest monotonic time in nanoseconds.
    pub monotonic_ns: u64,
    /// Guest wall clock in nanoseconds since 1970.
    pub wall_ns: u64,
}

impl GuestClock {
    /// A clock that starts at zero now.
    #[must_use]
    pub const fn start(host: HostInstant, host_wall_ns: u64) -> Self {
        Self { monotonic_offset: -(host.ns as i64), wall_base: host_wall_ns as i64, last: 0 }
    }

    /// A clock that goes on from a saved state taken at `paused_at` on this host's clock.
    #[must_use]
    pub const fn resume(saved: ClockState, paused_at: HostInstant) -> Self {
        Self {
            monotonic_offset: saved.monotonic_ns as i64 - paused_at.ns as i64,
            wall_base: saved.wall_ns as i64 - saved.monotonic_ns as i64,
            last: saved.monotonic_ns,
        }
    }

    /// Reads the clock; never less than before.
    pub fn read(&mut self, host: HostInstant, host_wall_ns: u64) -> Reading {
        let raw = host.ns as i64 + self.monotonic_offset;
        let now = raw.max(self.last as i64).max(0);
        let elapsed = now - self.last as i64;
        let wanted = host_wall_ns as i64 - now;
        let most = elapsed / 1_000_000 * SLEW_PPM + elapsed % 1_000_000 * SLEW_PPM / 1_000_000;
        self.wall_base += (wanted - self.wall_base).clamp(-most, most);
        self.last = now as u64;
        Reading { monotonic_ns: self.last, wall_ns: (self.wall_base + now).max(0) as u64 }
    }

    /// Guest monotonic time at a host time, without moving the clock.
    #[must_use]
    pub const fn at(&self, host: HostInstant) -> u64 {
        let raw = host.ns as i64 + self.monotonic_offset;
        if raw < self.last as i64 { self.last } else { raw as u64 }
    }

    /// What to save for another host to go on from.
    #[must_use]
    pub const fn save(&self, paused_at: HostInstant, generation: u64) -> ClockState {
        let now = self.at(paused_at);
        ClockState { monotonic_ns: now, wall_ns: (self.wall_base + now as i64) as u64, generation }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WALL: u64 = 1_700_000_000_000_000_000;

    fn at(ns: u64) -> HostInstant {
        HostInstant { ns }
    }

    #[test]
    fn monotonic_time_goes_on_by_the_elapsed_time_across_a_move() {
        let mut source = GuestClock::start(at(1_000), WALL);
        assert_eq!(source.read(at(6_000), WALL + 5_000).monotonic_ns, 5_000);
        let saved = source.save(at(7_000), 1);
        // The target's clock runs 900 000 ns ahead of the source's; it paused there at 907 000.
        let mut target = GuestClock::resume(saved, at(907_000));
        assert_eq!(target.read(at(909_000), WALL + 8_000).monotonic_ns, 8_000);
    }

    #[test]
    fn time_never_goes_back_when_the_clock_offset_was_misjudged() {
        let mut source = GuestClock::start(at(0), WALL);
        source.read(at(5_000), WALL);
        let mut target = GuestClock::resume(source.save(at(5_000), 1), at(9_000));
        assert_eq!(target.read(at(8_000), WALL).monotonic_ns, 5_000);
    }

    #[test]
    fn the_wall_clock_is_slewed_and_not_stepped() {
        let mut clock = GuestClock::start(at(0), WALL);
        let second = 1_000_000_000;
        let before = clock.read(at(second), WALL + second).wall_ns;
        let after = clock.read(at(2 * second), WALL + 2 * second + 10_000_000).wall_ns;
        assert_eq!(after - before, second + 500_000);
    }
}

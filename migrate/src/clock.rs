//! The offset between two hosts' clocks, from probes over a link.
//!
//! As in NTP (RFC 5905 §8): of several round trips the shortest says most, and half of it is the
//! largest error. Pure.

use std::time::Duration;

use kage_machine::HostInstant;

/// What is known of the peer's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerClock {
    /// Peer's clock − own clock, in nanoseconds.
    offset_ns: i64,
    best: Option<Duration>,
}

impl PeerClock {
    /// Takes a round trip in: sent and received on the own clock, `peer` in between on the peer's.
    pub fn learn(&mut self, sent: HostInstant, peer: HostInstant, received: HostInstant) {
        let trip = received.since(sent);
        if self.best.is_some_and(|best| best <= trip) {
            return;
        }
        self.best = Some(trip);
        let middle = sent.ns + received.ns.saturating_sub(sent.ns) / 2;
        self.offset_ns = i64::try_from(i128::from(peer.ns) - i128::from(middle)).unwrap_or_default();
    }

    /// Shortest round trip seen.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        self.best.unwrap_or_default()
    }

    /// Largest error of a conversion.
    #[must_use]
    pub fn error(&self) -> Duration {
        self.round_trip() / 2
    }

    /// An own instant on the peer's clock.
    #[must_use]
    pub const fn to_peer(&self, own: HostInstant) -> HostInstant {
        HostInstant { ns: own.ns.saturating_add_signed(self.offset_ns) }
    }

    /// A peer's instant on the own clock.
    #[must_use]
    pub const fn to_own(&self, peer: HostInstant) -> HostInstant {
        HostInstant { ns: peer.ns.saturating_add_signed(self.offset_ns.saturating_neg()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ns: u64) -> HostInstant {
        HostInstant { ns }
    }

    #[test]
    fn the_shortest_round_trip_counts() {
        let mut clock = PeerClock::default();
        clock.learn(at(1_000), at(51_500), at(2_000));
        clock.learn(at(3_000), at(53_050), at(3_100));
        clock.learn(at(4_000), at(60_000), at(5_000));
        assert_eq!(clock.to_peer(at(10_000)), at(60_000));
        assert_eq!(clock.to_own(at(60_000)), at(10_000));
        assert_eq!(clock.error(), Duration::from_nanos(50));
    }

    #[test]
    fn a_peer_whose_clock_lies_behind_is_converted_too() {
        let mut clock = PeerClock::default();
        clock.learn(at(1_000_000), at(100), at(1_000_200));
        assert_eq!(clock.to_peer(at(1_000_100)), at(100));
        assert_eq!(clock.to_own(at(0)), at(1_000_000));
    }
}

//! What a handover reports: the fields of `kage migrate -o json`.

use std::time::Duration;

use kage_machine::{HostName, Term, UserName};
use serde::{Deserialize, Serialize};

use crate::outcome::Outcome;

/// How much of the machine the target already held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplicaHit {
    /// All of it.
    Full,
    /// Part of it.
    Partial,
    /// Nothing.
    #[default]
    None,
}

/// One part of a handover.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// `prepare`, `copy`, `switch`, `settle`, `drain`.
    pub name: String,
    /// How long it took.
    pub ms: f64,
    /// Bytes it put on the wire.
    pub bytes: u64,
}

/// What became of a handover, and its figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Whose image.
    pub user: UserName,
    /// The source.
    pub from: HostName,
    /// The target.
    pub to: HostName,
    /// How: `precopy`.
    pub mode: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, unless handed over as asked.
    pub reason: Option<String>,
    /// The owner's term now, as far as known.
    pub term: Term,
    /// The request … the last page at the target.
    pub total_ms: f64,
    /// Last exit at the source … first entry at the target.
    pub blackout_ms: f64,
    /// Longest heartbeat gap; filled in by the caller.
    pub gap_ms: f64,
    /// Sum of heartbeat gaps; filled in by the caller.
    pub stall_ms: f64,
    /// Error of the exchanged clock offset.
    pub clock_error_us: u64,
    /// Epochs sent before the switch.
    pub rounds: u32,
    /// Pages sent in all.
    pub pages_sent: u64,
    /// Pages in the switch message.
    pub pages_at_switch: u64,
    /// Bytes on the wire.
    pub bytes_wire: u64,
    /// The same pages unencoded.
    pub bytes_raw: u64,
    /// Of the pages sent, blocks of the disk.
    #[serde(default)]
    pub disk_pages_sent: u64,
    /// Of the bytes on the wire, theirs; about, since pages are compressed together.
    #[serde(default)]
    pub disk_bytes_sent: u64,
    /// Blocks of the disk that the source misses too, sent as their digest.
    #[serde(default)]
    pub disk_pages_elsewhere: u64,
    /// Blocks of the disk that the target held before.
    #[serde(default)]
    pub disk_pages_held: u64,
    /// Pages asked for after the switch.
    pub faults: u64,
    /// Time spent waiting for them.
    pub fault_wait_ms: f64,
    /// Frames that the source's tap queue still held, sent on.
    pub forwarded_frames: u64,
    /// Frames that may have arrived out of order.
    pub reordered_frames: u64,
    /// Frames dropped.
    pub lost_frames: u64,
    /// Pages that could not be brought over.
    pub lost_pages: u64,
    /// What the target held before.
    pub replica_hit: ReplicaHit,
    /// Its parts.
    pub phases: Vec<Phase>,
    /// The parts of the blackout, at both sides: `stop`, `encode`, `cross`, `apply`, `restore`, `enter`.
    #[serde(default)]
    pub blackout_phases: Vec<Phase>,
}

/// How far the copying before the switch is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moving {
    /// Which round, from 1.
    pub round: u32,
    /// Pages of it that were looked at.
    pub pages_done: u64,
    /// Pages of it.
    pub pages_total: u64,
    /// Bytes on the wire so far, of all rounds.
    pub bytes_wire: u64,
    /// Bytes per second of this round.
    pub bytes_per_s: f64,
    /// Pages that were written during the round before: what it is about.
    pub dirty_pages: Option<u64>,
    /// Since the request.
    pub elapsed: Duration,
    /// How much longer the copying takes, if pages go on being written as fast as during the last round.
    pub left: Option<Duration>,
}

impl Moving {
    /// How much longer rounds take of which each leaves `left_over` of its pages to the next, when this one has taken
    /// `elapsed` for `done` of `total` pages; `None` where that cannot be said.
    #[must_use]
    pub fn left(done: u64, total: u64, elapsed: Duration, left_over: f64) -> Option<Duration> {
        if done == 0 || left_over >= 1.0 {
            return None;
        }
        let whole = elapsed.as_secs_f64() * total as f64 / done as f64;
        let later = whole * left_over / (1.0 - left_over);
        Duration::try_from_secs_f64((whole - elapsed.as_secs_f64()).max(0.0) + later).ok()
    }
}

/// What was left in the source's tap at the switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Frames sent on to the target.
    pub forwarded_frames: u64,
    /// Of those, frames that may arrive after later ones.
    pub reordered_frames: u64,
    /// Frames dropped.
    pub lost_frames: u64,
}

impl std::ops::AddAssign for Drained {
    fn add_assign(&mut self, other: Self) {
        self.forwarded_frames += other.forwarded_frames;
        self.reordered_frames += other.reordered_frames;
        self.lost_frames += other.lost_frames;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_counts_the_rounds_to_come() {
        let s = Duration::from_secs;
        assert_eq!(Moving::left(0, 10, s(1), 0.0), None);
        assert_eq!(Moving::left(5, 10, s(5), 0.0), Some(s(5)));
        // Half of each round is left to the next: 10 s more behind this one.
        assert_eq!(Moving::left(5, 10, s(5), 0.5), Some(s(15)));
        assert_eq!(Moving::left(10, 10, s(5), 1.0), None);
    }
}

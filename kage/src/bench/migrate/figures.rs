//! Moves summed up: cases, and how far from the least that could be.

use std::time::Duration;

use kage_migrate::converge::FIXED_BLACKOUT;
use serde::Serialize;
use serde_json::Value;

use super::{
    bed::{Move, Played},
    matrix::Kind,
};
use crate::{bench::Case, output::table};

/// Seconds in which a link carries a move's bytes, the last of them on its way, and the switch that no round can make
/// shorter ([`FIXED_BLACKOUT`]).
pub fn floor_s(bytes_wire: u64, bandwidth: f64, delay: Duration) -> f64 {
    bytes_wire as f64 / bandwidth + delay.as_secs_f64() + FIXED_BLACKOUT.as_secs_f64()
}

/// A case that was played.
#[derive(Debug)]
pub struct Row {
    /// What it is.
    pub kind: Kind,
    /// What its link carries, in bytes per second; none where there was no link.
    pub bandwidth: Option<f64>,
    /// What came of it.
    pub played: Played,
    /// What came of it at a peer, by setting and figure.
    pub peers: Vec<PeerFigures>,
}

/// Figures of a peer that did the same work.
#[derive(Clone, Debug)]
pub struct PeerFigures {
    /// Who, and how it was set.
    pub name: String,
    /// Which of ours they stand beside.
    pub figure: &'static str,
    /// One for each move.
    pub figures: Vec<f64>,
}

impl PeerFigures {
    fn median(&self) -> f64 {
        middle(self.figures.clone())
    }

    /// How much better than it the case's own figure is: above 1 is better.
    pub fn ratio(&self, row: &Row) -> Option<f64> {
        Some(self.median() / row.median(self.figure)?).filter(|ratio| ratio.is_finite())
    }
}

/// The middle one.
fn middle(figures: Vec<f64>) -> f64 {
    Case::of("", Value::Null, "", figures).median
}

/// A case of which not all moves could be made.
#[derive(Clone, Debug, Serialize)]
pub struct Failed {
    /// Its name.
    pub name: String,
    /// What it was to be measured with.
    pub params: Value,
    /// How many moves could be made.
    pub runs: usize,
    /// Why there are no more.
    pub reason: String,
}

/// A name, a unit, and the figure of a move.
struct Figure {
    name: &'static str,
    unit: &'static str,
    of: fn(&Row, &Move) -> Option<f64>,
}

const FIGURES: [Figure; 9] = [
    Figure { name: "total", unit: "ms", of: |_, made| Some(made.report.total_ms) },
    Figure { name: "gap", unit: "ms", of: |_, made| Some(made.report.gap_ms) },
    Figure { name: "client gap", unit: "ms", of: |_, made| Some(made.client_gap_ms) },
    Figure { name: "blackout", unit: "ms", of: |_, made| Some(made.report.blackout_ms) },
    Figure { name: "stall", unit: "ms", of: |_, made| Some(made.report.stall_ms) },
    Figure { name: "wire", unit: "MB", of: |_, made| Some(made.report.bytes_wire as f64 / 1e6) },
    Figure {
        name: "pages at the switch",
        unit: "pages",
        of: |_, made| Some(made.report.pages_at_switch as f64),
    },
    Figure { name: "CPU per GB", unit: "s/GB", of: |row, made| Some(made.cpu_s / memory_gb(row)) },
    Figure { name: "ratio to floor", unit: "×", of: ratio_to_floor },
];

fn memory_gb(row: &Row) -> f64 {
    row.kind.work.memory.0 as f64 / 1e9
}

fn ratio_to_floor(row: &Row, made: &Move) -> Option<f64> {
    let floor = floor_s(made.report.bytes_wire, row.bandwidth?, row.kind.link.delay);
    Some(made.report.total_ms / 1e3 / floor)
}

impl Row {
    /// The figures of that name, of each move.
    pub fn all(&self, name: &str) -> Vec<f64> {
        let figure = FIGURES.iter().find(|figure| figure.name == name);
        let of = |made| figure.and_then(|figure| (figure.of)(self, made));
        self.played.moves.iter().filter_map(of).collect()
    }

    /// The middle one; none without a move.
    pub fn median(&self, name: &str) -> Option<f64> {
        let all = self.all(name);
        (!all.is_empty()).then(|| middle(all))
    }

    /// What a peer has for a figure, as it is set best for that one.
    pub fn peer(&self, name: &str) -> Option<&PeerFigures> {
        let found = self.peers.iter().filter(|peer| peer.figure == name && !peer.figures.is_empty());
        found.min_by(|one, other| one.median().total_cmp(&other.median()))
    }

    /// All figures as cases.
    pub fn cases(&self) -> Vec<Case> {
        let name = self.kind.name();
        let with = FIGURES.iter().map(|figure| (figure, self.all(figure.name)));
        with.filter(|(_, all)| !all.is_empty())
            .map(|(figure, all)| {
                let case =
                    Case::of(&format!("{name}: {}", figure.name), self.kind.params(), figure.unit, all);
                match self.peer(figure.name) {
                    Some(peer) => case.beside(&peer.name, peer.figures.clone()),
                    None => case,
                }
            })
            .collect()
    }

    /// Why it is not whole.
    pub fn failed(&self) -> Option<Failed> {
        let failure = self.played.failure.as_ref()?;
        Some(Failed {
            name: self.kind.name(),
            params: self.kind.params(),
            runs: self.played.moves.len(),
            reason: failure.message.clone(),
        })
    }
}

/// Columns of the table for people: what stands above, which figure, and its decimals.
const COLUMNS: [(&str, &str, usize); 9] = [
    ("TOTAL ms", "total", 0),
    ("GAP ms", "gap", 1),
    ("CLIENT ms", "client gap", 1),
    ("BLACKOUT ms", "blackout", 2),
    ("STALL ms", "stall", 1),
    ("WIRE MB", "wire", 2),
    ("AT SWITCH", "pages at the switch", 0),
    ("CPU s/GB", "CPU per GB", 2),
    ("× FLOOR", "ratio to floor", 2),
];

/// A row for each case: what stands above, and medians.
pub fn cells(rows: &[Row]) -> (Vec<&'static str>, Vec<Vec<String>>) {
    let titles = COLUMNS.iter().map(|(title, ..)| *title);
    let header = ["CASE", "RUNS"].into_iter().chain(titles).chain(["NOTE"]).collect();
    let shown = |row: &Row| {
        let figures = COLUMNS.iter().map(|(_, name, places)| {
            let median = row.median(name).map(|median| format!("{median:.places$}"));
            let peer = row
                .peer(name)
                .map(|peer| peer.ratio(row))
                .and_then(|ratio| Some(format!(" ({:.2})", ratio?)));
            format!("{}{}", median.unwrap_or_default(), peer.unwrap_or_default())
        });
        let note = row.played.failure.as_ref().map(|failure| format!("failed: {}", failure.message));
        let first = [row.kind.name(), row.played.moves.len().to_string()];
        first.into_iter().chain(figures).chain([note.unwrap_or_default()]).collect()
    };
    (header, rows.iter().map(shown).collect())
}

/// The same for people.
pub fn show(rows: &[Row]) -> String {
    let (header, cells) = cells(rows);
    table(&header, &cells)
}

#[cfg(test)]
pub mod tests {
    use kage_host::api::types::{MoveOutcome, MoveReport};

    use super::*;
    use crate::bench::migrate::matrix::BASE;

    /// A case with a move for each pair of a duration and a gap.
    pub fn row(kind: Kind, moves: &[(f64, f64)]) -> Row {
        let made = moves.iter().map(|&(total_ms, gap_ms)| Move {
            case: kind.name(),
            report: report(total_ms, gap_ms),
            client_gap_ms: gap_ms + 1.0,
            cpu_s: 0.5,
        });
        Row {
            kind,
            bandwidth: Some(6.25e6),
            played: Played { moves: made.collect(), failure: None },
            peers: Vec::new(),
        }
    }

    fn report(total_ms: f64, gap_ms: f64) -> MoveReport {
        MoveReport {
            user: "alice".parse().unwrap(),
            from: "h1".parse().unwrap(),
            to: "h2".parse().unwrap(),
            mode: "precopy".to_owned(),
            outcome: MoveOutcome::HandedOver,
            reason: None,
            term: kage_machine::Term(2),
            total_ms,
            blackout_ms: gap_ms,
            gap_ms,
            stall_ms: gap_ms,
            clock_error_us: 0,
            rounds: 3,
            pages_sent: 16_384,
            pages_at_switch: 10,
            bytes_wire: 25_000_000,
            bytes_raw: 64 << 20,
            disk_pages_sent: 0,
            disk_bytes_sent: 0,
            disk_pages_elsewhere: 0,
            disk_pages_held: 0,
            faults: 0,
            fault_wait_ms: 0.0,
            forwarded_frames: 0,
            reordered_frames: 0,
            lost_frames: 0,
            lost_pages: 0,
            replica_hit: kage_host::api::types::ReplicaHit::None,
            phases: Vec::new(),
            blackout_phases: Vec::new(),
        }
    }

    #[test]
    fn the_floor_is_bytes_over_bandwidth_and_what_cannot_be_avoided() {
        let floor = floor_s(25_000_000, 6.25e6, Duration::from_millis(10));
        assert!((floor - (4.0 + 0.010 + 0.0004)).abs() < 1e-9, "{floor}");
        assert!((floor_s(0, 1.0, Duration::ZERO) - FIXED_BLACKOUT.as_secs_f64()).abs() < 1e-12);
    }

    #[test]
    fn a_case_has_a_figure_of_each_kind_from_all_moves() {
        let row = row(BASE, &[(4_800.48, 9.0), (6_000.6, 7.0), (4_000.4, 30.0)]);
        let cases = row.cases();
        assert_eq!(cases.len(), FIGURES.len());
        let total = &cases[0];
        assert_eq!((total.name.as_str(), total.runs), ("50 Mbit/s, 500/s, none: total", 3));
        assert_eq!((total.median, total.min, total.max), (4_800.48, 4_000.4, 6_000.6));
        let ratio = row.median("ratio to floor").unwrap();
        assert!((ratio - 1.2).abs() < 1e-9, "{ratio}");
        assert!((row.median("CPU per GB").unwrap() - 0.5 / 0.067_108_864).abs() < 1e-9);
        assert_eq!(row.median("weight"), None);
    }

    #[test]
    fn a_peer_stands_beside_each_figure_with_its_best_setting() {
        let mut row = row(BASE, &[(4_000.0, 10.0)]);
        let of = |name: &str, figure, figures: &[f64]| PeerFigures {
            name: name.to_owned(),
            figure,
            figures: figures.to_vec(),
        };
        row.peers = vec![
            of("qemu, defaults", "total", &[8_000.0, 9_000.0, 7_000.0]),
            of("qemu, tuned", "total", &[6_000.0]),
            of("qemu, tuned", "gap", &[30.0]),
            of("qemu, defaults", "gap", &[25.0]),
        ];
        let cases = row.cases();
        let of = |name: &str| cases.iter().find(|case| case.name.ends_with(name)).unwrap();
        let peer = |name: &str| (of(name).peer.as_ref().unwrap().name.clone(), of(name).ratio.unwrap());
        assert_eq!(peer(": total"), ("qemu, tuned".to_owned(), 1.5));
        assert_eq!(peer(": gap"), ("qemu, defaults".to_owned(), 2.5));
        assert!(of(": blackout").peer.is_none());
        let (_, cells) = cells(&[row]);
        assert_eq!(cells[0][2], "4000 (1.50)");
    }

    #[test]
    fn a_case_that_failed_says_why_and_keeps_what_it_has() {
        let mut row = row(BASE, &[(4_000.0, 10.0)]);
        assert!(row.failed().is_none());
        row.played.failure = Some(crate::client::Failure::new("kept: the link was lost"));
        let failed = row.failed().unwrap();
        assert_eq!((failed.runs, failed.reason.as_str()), (1, "kept: the link was lost"));
        assert!(show(&[row]).contains("failed: kept: the link was lost"));
    }
}

//! The figures of Maeda, Sato and Yano (their tables 3 and 4) beside moves of this run.
//!
//! Theirs are estimates from the rates of a disk and a link: a machine of 64 MB of which 30 % is dirty is flushed over
//! 50 Mbit/s to a host that has the rest, and then pages in at the new host what it wants. Ours are measured; moves to a
//! host that has the rest as it was (*old*) are of that kind.

use serde::Serialize;

use super::{
    figures::Row,
    matrix::{BASE, Kind, Mirror, paged_in},
};

/// Time at an access point, in seconds: 50 m at 4 km/h.
const STAY_S: f64 = 45.0;
/// Page-in after the move, by share of the memory.
const PAGE_IN_S: [(u8, f64); 3] = [(5, 1.85), (10, 3.70), (20, 7.40)];

/// One of their figures, and ours of that kind.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// What it is.
    pub what: String,
    /// Of the figures.
    pub unit: &'static str,
    /// Theirs, an estimate.
    pub paper: f64,
    /// Ours.
    pub ours: Vec<Ours>,
}

/// A median of this run.
#[derive(Clone, Debug, Serialize)]
pub struct Ours {
    /// Of which case.
    pub case: String,
    /// Which figure.
    pub figure: &'static str,
    /// The middle one.
    pub median: f64,
}

/// Both tables, as far as their cases were played.
pub fn lines(rows: &[Row]) -> Vec<Line> {
    let held = [Mirror::Old, Mirror::None, Mirror::Fresh].map(|mirror| Kind { mirror, ..BASE });
    let of = |kinds: &[Kind], figure: &'static str, factor: f64| -> Vec<Ours> {
        let played = kinds.iter().filter_map(|kind| rows.iter().find(|row| row.kind == *kind));
        let medians = played.filter_map(|row| Some((row, row.median(figure)? * factor)));
        medians.map(|(row, median)| Ours { case: row.kind.name(), figure, median }).collect()
    };
    let seconds = |what: &str, paper, ours| Line { what: what.to_owned(), unit: "s", paper, ours };
    let percent = |what: &str, ours| Line { what: what.to_owned(), unit: "%", paper: 10.7, ours };
    let mut lines = vec![
        seconds("network transfer of what is dirty", 3.07, of(&held[..1], "total", 1e-3)),
        seconds("flush in all: network 3.07 s, disk 1.75 s", 4.82, of(&held, "total", 1e-3)),
        seconds("nobody runs the machine meanwhile", 4.82, of(&held, "blackout", 1e-3)),
        percent("flush as a share of 45 s at an access point", of(&held, "total", 0.1 / STAY_S)),
        percent("of these 45 s nobody runs the machine", of(&held, "blackout", 0.1 / STAY_S)),
    ];
    lines.extend(PAGE_IN_S.map(|(set, paper)| {
        let what = format!("page-in of {set} % after the move");
        seconds(&what, paper, of(&paged_in(set), "stall", 1e-3))
    }));
    lines.retain(|line| !line.ours.is_empty());
    lines
}

/// For people.
pub fn show(lines: &[Line]) -> Vec<Vec<String>> {
    let shown = |line: &Line| {
        line.ours
            .iter()
            .map(move |ours| {
                let (unit, median) = (line.unit, super::chart::figure(ours.median));
                vec![
                    line.what.clone(),
                    format!("{} {unit}", line.paper),
                    format!("{median} {unit}"),
                    format!("{} of {}", ours.figure, ours.case),
                ]
            })
            .collect::<Vec<_>>()
    };
    lines.iter().flat_map(shown).collect()
}

/// What stands above its columns.
pub const HEADER: [&str; 4] = ["AS IN THE PAPER", "PAPER", "HERE", "MEDIAN"];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::migrate::figures::tests::row;

    #[test]
    fn only_what_was_played_stands_beside_the_paper() {
        assert!(lines(&[]).is_empty());
        let fresh = Kind { mirror: Mirror::Fresh, ..BASE };
        let found = lines(&[row(fresh, &[(450.0, 9.0)]), row(paged_in(10)[0], &[(450.0, 9.0)])]);
        let whats: Vec<_> = found.iter().map(|line| line.what.as_str()).collect();
        assert_eq!(whats.len(), 5, "{whats:?}");
        assert!(whats[4].contains("10 %") && found[4].paper == 3.70);
        let share = &found[2].ours[0];
        assert!((share.median - 1.0).abs() < 1e-9, "450 ms of 45 s are 1 %: {share:?}");
        assert_eq!(show(&found).len(), 5);
    }
}

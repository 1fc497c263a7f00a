//! `kage bench migrate`: what moves cost, and what of each somebody feels.
//!
//! A machine that rewrites its memory all the while ([`matrix`]) moves back and forth between two hosts ([`bed`]) whose
//! link is shaped, or is what the machine here gives ([`link`]). The machine's own heartbeat says what it felt, a probe
//! at its user's device what that saw, and each move's duration stands beside the least that its bytes could have taken
//! on that link ([`figures`]); with `--peer` also beside the same work by somebody else ([`peer`]). The figures of the paper whose idea all this is stand beside ours ([`paper`]), and all
//! together on one page ([`html`], [`chart`]).

mod bed;
mod chart;
mod figures;
mod html;
mod link;
pub mod matrix;
mod paper;
mod peer;
pub mod qemu;

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{Case, MachineInfo, Report};
use crate::{
    client::Failure,
    output::{Output, table},
    testbed::Cancel,
};
use bed::{Bed, BedSpec, Move, Played};
use figures::{Failed, Row};
use matrix::Kind;
use peer::{Peer, PeerArg};

/// Moves of each case with `--quick`.
const QUICK_RUNS: u32 = 3;

/// `kage bench migrate`.
#[derive(Clone, Debug, Args)]
pub struct MigrateBenchArgs {
    /// Moves of each case
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Six cases, three moves each
    #[arg(long, conflicts_with = "full")]
    pub quick: bool,
    /// Every combination: 3,240 cases, days
    #[arg(long)]
    pub full: bool,
    /// Only cases whose name holds this; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub case: Vec<String>,
    /// Who does the same work in the same run; ratios above 1 say how much better Kage is
    #[arg(long, value_enum, value_name = "NAME")]
    pub peer: Option<PeerArg>,
    /// Write all of it as one page to this file
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
}

/// Answer of the bench.
#[derive(Clone, Debug, Serialize)]
pub struct MigrateReport {
    /// As of every bench.
    #[serde(flatten)]
    pub report: Report,
    /// Cases of which not all moves could be made.
    pub failed: Vec<Failed>,
    /// The paper's figures, and ours of that kind.
    pub paper: Vec<paper::Line>,
    /// Every move.
    pub moves: Vec<Move>,
}

/// Runs the bench.
///
/// # Errors
/// What keeps it from running; a case that fails is part of the report.
pub fn run(args: &MigrateBenchArgs, output: Output) -> Result<(), Failure> {
    let kinds = chosen(args)?;
    let runs = if args.quick { args.runs.min(QUICK_RUNS) } else { args.runs };
    let cancel = crate::testbed::cli::cancel_on_signals().map_err(Failure::new)?;
    // What would be missing in the end is missing now.
    if args.peer.is_some() {
        qemu::check_installed()?;
    }
    if let Some(path) = &args.report {
        std::fs::File::create(path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
    }
    let mut rows = play(&kinds, runs, output, &cancel)?;
    match args.peer {
        Some(PeerArg::Qemu) => beside_qemu(&mut rows, runs, output, &cancel)?,
        None => {}
    }
    let cases: Vec<Case> = rows.iter().flat_map(Row::cases).collect();
    let report = MigrateReport {
        report: Report { machine: MachineInfo::here(), cases },
        failed: rows.iter().filter_map(Row::failed).collect(),
        paper: paper::lines(&rows),
        moves: rows.iter().flat_map(|row| row.played.moves.iter().cloned()).collect(),
    };
    output.result(&report, |report| shown(report, &rows))?;
    if let Some(path) = &args.report {
        std::fs::write(path, html::page(&report, &rows, &rerun()))
            .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
    }
    if report.moves.is_empty() {
        return Err(Failure::new("no case could be measured"));
    }
    // As `dirty` says of memory that it did not rewrite.
    let damaged = report.failed.iter().find(|failed| failed.reason.contains("DAMAGED"));
    damaged.map_or(Ok(()), |failed| Err(Failure::new(format!("{}: {}", failed.name, failed.reason))))
}

/// A report for people.
fn shown(report: &MigrateReport, rows: &[Row]) -> String {
    let mut text = format!("{}\n{}", report.report.machine.line(), figures::show(rows));
    if !report.paper.is_empty() {
        text.push_str("\n\n");
        text.push_str(&table(&paper::HEADER, &paper::show(&report.paper)));
    }
    text
}

/// The command line, as it can be typed again.
fn rerun() -> String {
    let plain = |word: &str| word.chars().all(|at| at.is_alphanumeric() || "-_./=%:,".contains(at));
    let quoted = |word: String| match plain(&word) {
        true if !word.is_empty() => word,
        _ => format!("'{}'", word.replace('\'', "'\\''")),
    };
    std::iter::once("kage".to_owned())
        .chain(std::env::args_os().skip(1).map(|word| quoted(word.to_string_lossy().into_owned())))
        .collect::<Vec<_>>()
        .join(" ")
}

/// The cases that were asked for.
fn chosen(args: &MigrateBenchArgs) -> Result<Vec<Kind>, Failure> {
    let mut kinds = match (args.quick, args.full) {
        (true, _) => matrix::quick(),
        (false, true) => matrix::full(),
        (false, false) => matrix::usual(),
    };
    let wanted = |kind: &Kind| {
        let name = kind.name();
        args.case.is_empty() || args.case.iter().any(|text| name.contains(text))
    };
    kinds.retain(wanted);
    if kinds.is_empty() {
        return Err(Failure::usage(format!("--case: no case is called like {}", args.case.join(" or "))));
    }
    Ok(kinds)
}

/// Plays all cases, those on the same hosts one after the other, and returns them in their order.
fn play(kinds: &[Kind], runs: u32, output: Output, cancel: &Cancel) -> Result<Vec<Row>, Failure> {
    let mut rows: Vec<Option<Row>> = kinds.iter().map(|_| None).collect();
    for first in 0..kinds.len() {
        if rows[first].is_some() {
            continue;
        }
        let spec = BedSpec::of(&kinds[first]);
        output.progress(format!("making two hosts for {}", kinds[first].name()));
        let mut bed = Bed::make(&spec, output, cancel);
        cancel.check().map_err(Failure::new)?;
        for (kind, row) in kinds.iter().zip(&mut rows).skip(first) {
            if BedSpec::of(kind) != spec {
                continue;
            }
            let (bandwidth, played) = match &mut bed {
                Ok(bed) => (Some(bed.bandwidth), bed.play(kind, runs)),
                Err(failure) => (None, Played { moves: Vec::new(), failure: Some(failure.clone()) }),
            };
            cancel.check().map_err(Failure::new)?;
            if let Some(failure) = &played.failure {
                output.progress(format!("{}: failed: {}", kind.name(), failure.message));
            }
            *row = Some(Row { kind: *kind, bandwidth, played, peers: Vec::new() });
        }
    }
    Ok(rows.into_iter().flatten().collect())
}

/// Has QEMU do the same, case by case. A case that it cannot do stands alone.
fn beside_qemu(rows: &mut [Row], runs: u32, output: Output, cancel: &Cancel) -> Result<(), Failure> {
    let mut peer = Peer::default();
    for row in rows {
        match peer.beside(&row.kind, runs, output, cancel) {
            Ok(figures) => row.peers = figures,
            Err(failure) => {
                cancel.check().map_err(Failure::new)?;
                output.warn(format!("qemu: {}: {}", row.kind.name(), failure.message));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_chosen_by_what_their_names_hold() {
        let args = MigrateBenchArgs {
            runs: 1,
            quick: true,
            full: false,
            case: vec!["fresh".to_owned()],
            peer: None,
            report: None,
        };
        assert_eq!(chosen(&args).unwrap().len(), 2);
        let none = MigrateBenchArgs { case: vec!["by train".to_owned()], ..args };
        assert_eq!(chosen(&none).unwrap_err().exit, 2);
    }
}

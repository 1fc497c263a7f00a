//! `--peer qemu`: the same work by QEMU under KVM, on a link of the same shape, in the same run.
//!
//! QEMU is set up in several ways, and stands beside each figure with the one that is best for that. Moves before whose
//! switch all pages are there are compared with its pre-copy, those whose pages follow with its post-copy. It has no
//! mirrors: beside a move to one it begins with nothing.

use clap::ValueEnum;
use kage_host::config::Mode;

use super::{
    bed::timeout,
    figures::PeerFigures,
    matrix::{Kind, Link, Work},
    qemu::{self, Figures, Run, Tuning},
};
use crate::{
    client::Failure,
    output::Output,
    testbed::{Cancel, LinkShape},
};

/// Who does the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PeerArg {
    /// `qemu-system-x86_64`, with KVM.
    Qemu,
}

/// What it has done so far: cases that differ in mirrors alone are one to it.
#[derive(Debug, Default)]
pub struct Peer {
    done: Vec<(Work, Link, bool, Vec<PeerFigures>)>,
}

/// A figure of ours, and the same of a move of its.
const FIGURES: [(&str, fn(&Figures) -> f64); 4] = [
    ("total", |figures| figures.total_ms),
    ("gap", |figures| figures.gap_ms),
    ("stall", |figures| figures.stall_ms),
    ("wire", |figures| figures.bytes_wire as f64 / 1e6),
];

/// Ways to set it up for such a move.
const fn tunings(is_postcopy: bool) -> &'static [Tuning] {
    if is_postcopy {
        &[Tuning::Postcopy, Tuning::PostcopyPreempt]
    } else {
        &[Tuning::Defaults, Tuning::MultifdZstd, Tuning::Compress, Tuning::Xbzrle]
    }
}

impl Peer {
    /// Its figures of a case, by setting.
    ///
    /// # Errors
    /// When it is missing, does not run, or the bench is cancelled.
    pub fn beside(
        &mut self,
        kind: &Kind,
        runs: u32,
        output: Output,
        cancel: &Cancel,
    ) -> Result<Vec<PeerFigures>, Failure> {
        let is_postcopy = kind.mode == Mode::Postcopy;
        let same = |(work, link, postcopy, _): &&(Work, Link, bool, Vec<PeerFigures>)| {
            (work, link, *postcopy) == (&kind.work, &kind.link, is_postcopy)
        };
        if let Some((.., figures)) = self.done.iter().find(same) {
            return Ok(figures.clone());
        }
        let mut figures = Vec::new();
        for tuning in tunings(is_postcopy) {
            let moved = moves(kind, *tuning, runs, output, cancel)?;
            figures.extend(FIGURES.map(|(figure, of)| PeerFigures {
                name: format!("qemu, {}", tuning.name()),
                figure,
                figures: moved.iter().map(of).collect(),
            }));
        }
        self.done.push((kind.work, kind.link, is_postcopy, figures.clone()));
        Ok(figures)
    }
}

/// So many moves; none where the first does not end, since others would not either.
fn moves(
    kind: &Kind,
    tuning: Tuning,
    runs: u32,
    output: Output,
    cancel: &Cancel,
) -> Result<Vec<Figures>, Failure> {
    let bandwidth = kind.link.rate.map(|rate| rate.bytes_per_second() as f64);
    let work = qemu::Work {
        memory_bytes: kind.work.memory.0,
        working_set_percent: u64::from(kind.work.set_percent),
        pages_per_second: u64::from(kind.work.writes_per_s),
        patience: timeout(&kind.work, bandwidth).duration(),
    };
    let shape = LinkShape { rate: kind.link.rate, delay: kind.link.delay, loss_ppm: 0 };
    let mut moved = Vec::new();
    // The first alone: each that never ends takes as long as anybody waits.
    for part in [1, runs - 1].into_iter().filter(|part| *part > 0) {
        for run in qemu::measure(&work, &shape, tuning, part, cancel)? {
            match run {
                Run::Moved(figures) => moved.push(figures),
                Run::GivenUp(reason) => {
                    output.progress(format!("qemu, {}: {}: {reason}", tuning.name(), kind.name()));
                    // Those that do end are no measure of all.
                    return Ok(Vec::new());
                }
            }
        }
    }
    if let Some(last) = moved.last() {
        output.progress(format!(
            "qemu, {}: {}: {} moves, the last: total {:.0} ms, gap {:.1} ms, {:.2} MB",
            tuning.name(),
            kind.name(),
            moved.len(),
            last.total_ms,
            last.gap_ms,
            last.bytes_wire as f64 / 1e6
        ));
    }
    Ok(moved)
}

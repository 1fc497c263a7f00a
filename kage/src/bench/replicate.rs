//! `kage bench replicate`: what mirrors cost their owner.
//!
//! One machine that does not move, under four loads, with mirrors at 0 to 3 other hosts. The counts take turns: a *round*
//! has one slice of each, in an order of its own, so that what drifts is the same for all. Of each slice with mirrors and
//! the slice without of the same round, which are a *pair*, the slow-down is
//!
//! ```text
//!   host CPU per unit of work with mirrors − host CPU per unit of work without
//!   ──────────────────────────────────────────────────────────────────────────
//!           CPU of the machine's process per unit of work without
//! ```
//!
//! Host CPU is that of the machine's process (guest, exits, write faults, harvest) and of the owner's daemon. A slice
//! begins once the mirrors have caught up, so that their first copy is no part of it.
//!
//! - [`loads`]: what the machine does meanwhile, and what a unit of its work is.
//! - [`meter`]: processor time and counters.

mod loads;
mod meter;

use std::time::{Duration, Instant};

use clap::Args;
use kage_host::units::{Rate, Size, Span};
use serde_json::json;

use super::{Case, MachineInfo, Report, desk::Desk, show, walk::route::Dice};
use crate::{
    client::Failure,
    output::Output,
    testbed::{Cancel, LinkShape, Testbed, TestbedSpec},
};
use loads::{LOADS, Load, Work};
use meter::{Copied, Meter, Used};

/// Threads of the daemon that end within a longer slice would take their time with them.
const LONGEST_SLICE: Duration = Duration::from_secs(10);
/// Memory of the machine.
const MEMORY: Size = Size(64 << 20);
/// Rounds and length of a slice with `--quick`.
const QUICK_RUNS: u32 = 3;
const QUICK_SLICE: Duration = Duration::from_secs(2);
/// Between the last change of anything and a slice.
const REST: Duration = Duration::from_millis(500);
/// A load that uses less of a processor than this share of the time does no work that could be slowed down.
const NO_WORK: f64 = 0.001;

/// `kage bench replicate`.
#[derive(Clone, Debug, Args)]
pub struct ReplicateArgs {
    /// Rounds of each load: pairs with and without mirrors
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub runs: u32,
    /// How long each count of mirrors is measured at a time, at most 10s
    #[arg(long, default_value = "4s", value_name = "TIME")]
    pub slice: Span,
    /// How many mirrors, beside none
    #[arg(
        long,
        value_delimiter = ',',
        default_values = ["1", "2", "3"],
        value_name = "N,…",
        value_parser = clap::value_parser!(u8).range(1..=3)
    )]
    pub mirrors: Vec<u8>,
    /// What the machine does meanwhile: idle, interactive, dirty_5, dirty_30; may be repeated [default: each]
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub load: Vec<String>,
    /// Rate of each host's link to the others (default: unlimited)
    #[arg(long, value_name = "RATE")]
    pub link: Option<Rate>,
    /// Of scripts and of the order of slices
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// Fewer rounds and shorter slices
    #[arg(long)]
    pub quick: bool,
}

/// One slice.
#[derive(Clone, Copy, Debug)]
struct Slice {
    mirrors: u8,
    used: Used,
    copied: Copied,
    work: Work,
}

impl Slice {
    /// Host CPU seconds per unit of work.
    fn per_work(&self) -> f64 {
        self.used.total_s() / self.work.units
    }

    /// Milliseconds of host CPU per second.
    fn host_ms(&self) -> f64 {
        1e3 * self.used.total_s() / self.work.seconds
    }

    /// Of those, the machine's process'.
    fn machine_ms(&self) -> f64 {
        1e3 * self.used.machine_s / self.work.seconds
    }
}

/// Runs the bench.
///
/// # Errors
/// What keeps it from running.
pub fn run(args: &ReplicateArgs, output: Output) -> Result<(), Failure> {
    let mut counts = args.mirrors.clone();
    counts.sort_unstable();
    counts.dedup();
    if args.slice.duration() > LONGEST_SLICE {
        return Err(Failure::usage(format!("--slice: at most {LONGEST_SLICE:?}")));
    }
    let chosen: Vec<&Load> = if args.load.is_empty() {
        LOADS.iter().collect()
    } else {
        args.load.iter().map(|name| loads::named(name)).collect::<Result<_, _>>()?
    };
    let (runs, slice) = if args.quick {
        (args.runs.min(QUICK_RUNS), args.slice.duration().min(QUICK_SLICE))
    } else {
        (args.runs, args.slice.duration())
    };
    let cancel = crate::testbed::cli::cancel_on_signals().map_err(Failure::new)?;
    let dir = std::env::temp_dir().join(format!("kage-bench-{}", std::process::id()));
    let binary = std::env::current_exe().map_err(Failure::new)?;
    let hosts = u16::from(counts.last().copied().unwrap_or(0)) + 1;
    let spec = TestbedSpec {
        hosts,
        devices: 1,
        link: LinkShape { rate: args.link, ..LinkShape::default() },
        image_memory: Some(MEMORY),
        ..TestbedSpec::new(dir, binary)
    };
    output.progress(format!("making {hosts} hosts and a device"));
    let testbed = Testbed::scoped(spec, &cancel).map_err(Failure::new)?;
    let desk = Desk::login(&testbed)?;
    let bench =
        Bench { desk: &desk, counts, runs: runs.max(1), slice, seed: args.seed, output, cancel: &cancel };
    // Whoever has no mirrors says so before the long part.
    desk.pin(Some(&[]))?;
    let mut cases = Vec::new();
    for load in chosen {
        let slices = bench.load(load)?;
        cases.extend(bench.cases(load, &slices, args.link.map(|rate| rate.to_string())));
    }
    desk.pin(None)?;
    output.result(&Report { machine: MachineInfo::here(), cases }, show)
}

struct Bench<'a> {
    desk: &'a Desk<'a>,
    /// Numbers of mirrors, each above 0.
    counts: Vec<u8>,
    runs: u32,
    slice: Duration,
    seed: u64,
    output: Output,
    cancel: &'a Cancel,
}

impl Bench<'_> {
    /// All rounds of a load.
    fn load(&self, load: &Load) -> Result<Vec<Vec<Slice>>, Failure> {
        let mut running = load.start(self.desk, self.seed)?;
        let mut dice = Dice::new(self.seed);
        let mut rounds = Vec::new();
        for round in 0..self.runs {
            let mut order: Vec<u8> = std::iter::once(0).chain(self.counts.iter().copied()).collect();
            for last in (1..order.len()).rev() {
                order.swap(last, dice.index(last + 1));
            }
            let mut slices = Vec::new();
            for mirrors in order {
                self.mirrors(mirrors)?;
                self.cancel.wait_until(Instant::now() + REST).map_err(Failure::new)?;
                let meter = Meter::start(self.desk)?;
                let work = running.work(round, self.slice, self.cancel)?;
                let (used, copied) = meter.stop(self.desk)?;
                slices.push(Slice { mirrors, used, copied, work });
            }
            self.output.progress(format!("{}: round {} of {}", load.name, round + 1, self.runs));
            rounds.push(slices);
        }
        running.stop()?;
        Ok(rounds)
    }

    /// Has mirrors at so many hosts, and waits until they have caught up.
    fn mirrors(&self, count: u8) -> Result<(), Failure> {
        let hosts: Vec<_> = (0..count).map(|number| format!("h{}", number + 2)).collect();
        self.desk.mirrored(&hosts, MEMORY.0, self.cancel)
    }

    /// What came of a load.
    fn cases(&self, load: &Load, rounds: &[Vec<Slice>], link: Option<String>) -> Vec<Case> {
        let params = |mirrors: u8| {
            json!({
                "load": load.line, "mirrors": mirrors, "slice_s": self.slice.as_secs_f64(), "link": link,
                "memory_bytes": MEMORY.0, "unit_of_work": load.unit, "seed": self.seed,
            })
        };
        let all = |mirrors: u8, figure: &dyn Fn(&Slice) -> f64| -> Vec<f64> {
            rounds.iter().flatten().filter(|slice| slice.mirrors == mirrors).map(figure).collect()
        };
        let name = |mirrors: u8, what: &str| format!("{}_{mirrors}_mirrors_{what}", load.name);
        let used: [(&str, &dyn Fn(&Slice) -> f64); 2] =
            [("host_cpu", &Slice::host_ms), ("machine_cpu", &Slice::machine_ms)];
        let mut cases: Vec<_> = used
            .iter()
            .map(|(what, figure)| Case::of_mean(&name(0, what), params(0), "ms/s", all(0, *figure)))
            .collect();
        for &mirrors in &self.counts {
            let rate = |bytes: u64, slice: &Slice| bytes as f64 / 1e3 / slice.work.seconds;
            let sent = all(mirrors, &|slice| rate(slice.copied.mirror, slice));
            let naive = all(mirrors, &|slice| rate(slice.copied.naive, slice));
            cases
                .push(Case::of(&name(mirrors, "sent"), params(mirrors), "kB/s", sent).beside("naive", naive));
            for (what, figure) in used {
                let case = Case::of_mean(&name(mirrors, what), params(mirrors), "ms/s", all(mirrors, figure));
                cases.push(case.beside("no mirrors", all(0, figure)));
            }
            let slowdown = slowdowns(rounds, mirrors);
            if !slowdown.is_empty() {
                cases.push(Case::of_mean(&name(mirrors, "slowdown"), params(mirrors), "%", slowdown));
            }
        }
        cases
    }
}

/// The slow-down of each pair with so many mirrors, in percent; none where the machine does next to nothing.
fn slowdowns(rounds: &[Vec<Slice>], mirrors: u8) -> Vec<f64> {
    let pairs = rounds.iter().filter_map(|slices| {
        let with = |count: u8| slices.iter().find(|slice| slice.mirrors == count);
        Some((with(mirrors)?, with(0)?))
    });
    let works = |off: &Slice| off.used.machine_s > NO_WORK * off.work.seconds;
    pairs
        .filter(|(_, off)| works(off))
        .map(|(on, off)| 100.0 * (on.per_work() - off.per_work()) / (off.used.machine_s / off.work.units))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(mirrors: u8, machine_s: f64, daemon_s: f64, units: f64) -> Slice {
        Slice {
            mirrors,
            used: Used { machine_s, daemon_s },
            copied: Copied { mirror: 8_000, naive: 80_000 },
            work: Work { units, seconds: 2.0 },
        }
    }

    #[test]
    fn a_slow_down_is_the_extra_time_per_second_of_the_machines_own() {
        // 1.1 s for 10 units without; 2.5 s for 20 units with: 0.015 s more a unit, of 0.1 s.
        let rounds = [vec![slice(2, 2.2, 0.3, 20.0), slice(0, 1.0, 0.1, 10.0)]];
        let found = slowdowns(&rounds, 2);
        assert!(found.len() == 1 && (found[0] - 15.0).abs() < 1e-9, "{found:?}");
        assert!(slowdowns(&rounds, 1).is_empty());
    }

    #[test]
    fn a_machine_that_does_nothing_cannot_be_slowed_down() {
        let rounds = [vec![slice(0, 0.001, 0.1, 2.0), slice(1, 0.002, 0.1, 2.0)]];
        assert!(slowdowns(&rounds, 1).is_empty());
    }
}

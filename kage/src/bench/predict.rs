//! `kage bench predict`: how often forecasts are right, beside Markov predictors in the same run, and what they cost.
//!
//! Without a trace: made ones, several seeds of each kind. With one: that alone. What counts as a hit is said in
//! [`kage_replicate::predict::trial`] and in `docs/prediction.md`.

use std::{path::PathBuf, time::Instant};

use kage_replicate::predict::{
    campus::{Kind, Spec},
    fleet::Fleet,
    trial::{Hits, Kage, Predictor, Tally, Trial},
};
use serde::Serialize;
use serde_json::json;

use super::{
    Case, MachineInfo, Report, show,
    trace::{Aps, Trace},
};
use crate::{client::Failure, output::Output, testbed::Cancel};

/// Seeds with `--quick`.
const QUICK: u32 = 2;
/// The large site, and a quick one.
const FLEET: Fleet = Fleet { users: 10_000, hosts: 500, aps: 2_000, changes: 100 };
const QUICK_FLEET: Fleet = Fleet { users: 1_000, changes: 50, ..FLEET };
/// Events that are timed together.
const BATCH: usize = 1_000;
/// Events between two looks for ^C.
const LOOK: usize = 4_096;

/// A trace of the user's.
#[derive(Clone, Debug)]
pub struct Given {
    /// Rows `t_s,user,ap`.
    pub trace: PathBuf,
    /// Lines `ap,host,x_m,y_m`.
    pub aps: PathBuf,
}

/// How often a predictor was right: shares from 0 to 1; over several seeds the mean of theirs.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// Which.
    pub predictor: String,
    /// Share of new access points found first.
    pub hit1: f64,
    /// Among the first two.
    pub hit2: f64,
    /// Among the first three.
    pub hit3: f64,
    /// Share of new access points whose host was found first, the present host being one that can be found.
    pub host_hit1: f64,
    /// Among the first two.
    pub host_hit2: f64,
    /// Among the first three.
    pub host_hit3: f64,
    /// How many changes of access point were scored, in all.
    pub predictions: u64,
    /// Those of them that went back to the access point before, within 30 s.
    pub returns: Part,
    /// Those that went to an access point of another host; hosts are asked for among the others.
    pub moves: Part,
}

/// Part of the changes.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "as in Prediction")]
pub struct Part {
    pub predictions: u64,
    pub hit1: f64,
    pub hit2: f64,
    pub hit3: f64,
    pub host_hit1: f64,
    pub host_hit2: f64,
    pub host_hit3: f64,
}

/// Runs the bench.
///
/// # Errors
/// What keeps it from running.
pub fn run(runs: u32, quick: bool, given: Option<&Given>, output: Output) -> Result<(), Failure> {
    let cancel = crate::testbed::cli::cancel_on_signals().map_err(Failure::new)?;
    let cases = match given {
        Some(given) => scored(given, output, &cancel)?,
        None => {
            let seeds = u64::from(if quick { runs.min(QUICK) } else { runs }.max(1));
            let mut cases = Vec::new();
            for kind in Kind::ALL {
                cases.extend(made(kind, seeds, output, &cancel)?);
            }
            cases.extend(cost(if quick { QUICK_FLEET } else { FLEET }, output, &cancel)?);
            cases
        }
    };
    output.result(&Report { machine: MachineInfo::here(), cases }, show)
}

/// Cases of one kind of made traces.
fn made(kind: Kind, seeds: u64, output: Output, cancel: &Cancel) -> Result<Vec<Case>, Failure> {
    let spec = Spec::new(kind);
    let mut results: Vec<(String, Vec<Tally>)> = Vec::new();
    for seed in 0..seeds {
        let trace = spec.make(seed);
        let mut trial = Trial::of_all(&trace.site);
        for events in trace.events.chunks(LOOK) {
            cancel.check().map_err(Failure::new)?;
            events.iter().for_each(|event| trial.feed(event));
        }
        for (at, (name, tally)) in trial.results().enumerate() {
            if at == results.len() {
                results.push((name.to_owned(), Vec::new()));
            }
            results[at].1.push(*tally);
        }
    }
    let params = json!({ "trace": kind.name(), "users": spec.users, "days": spec.days, "seeds": seeds });
    let cases = predictions(kind.name(), &params, &results);
    output.progress(format!("{}: {}", kind.name(), summary(&cases)));
    Ok(cases)
}

/// Cases of a trace of the user's.
fn scored(given: &Given, output: Output, cancel: &Cancel) -> Result<Vec<Case>, Failure> {
    let aps = Aps::read(&given.aps)?;
    let mut trace = Trace::open(&given.trace, &aps)?;
    let mut trial = Trial::of_all(&aps.site);
    let mut events = 0_usize;
    while let Some(event) = trace.next_event()? {
        if events.is_multiple_of(LOOK) {
            cancel.check().map_err(Failure::new)?;
        }
        events += 1;
        trial.feed(&event);
    }
    let found = &trace.found;
    for problem in &found.problems {
        output.warn(problem);
    }
    if events == 0 {
        let path = given.trace.display();
        return Err(Failure::new(format!(
            "{path}: no row could be used; rows are `t_s,user,ap` in time order"
        )));
    }
    let left_out = found.junk + found.out_of_order;
    if left_out + found.unknown_aps > 0 {
        output.warn(format!(
            "{left_out} of {} rows left out ({} not rows, {} out of order); {} at unknown access points",
            found.rows, found.junk, found.out_of_order, found.unknown_aps
        ));
    }
    let mut params = serde_json::to_value(found).map_err(Failure::new)?;
    params["trace"] = json!(given.trace.display().to_string());
    params["aps"] = json!(aps.site.names().len());
    params["hosts"] = json!(aps.site.hosts().len());
    let results: Vec<_> = trial.results().map(|(name, tally)| (name.to_owned(), vec![*tally])).collect();
    Ok(predictions("trace", &params, &results))
}

/// A case for each predictor, and one for how far the first is ahead of the best of the others.
fn predictions(trace: &str, params: &serde_json::Value, results: &[(String, Vec<Tally>)]) -> Vec<Case> {
    let percent = |tally: &Tally| tally.all.hit1() * 100.0;
    let mut cases: Vec<Case> = results
        .iter()
        .map(|(name, tallies)| {
            let figures = tallies.iter().map(percent).collect();
            let case = Case::of(&format!("{trace}_{name}"), params.clone(), "%", figures);
            Case { prediction: Some(Prediction::of(name, tallies)), ..case }
        })
        .collect();
    if let Some(((_, ours), others)) = results.split_first() {
        let best = |run: usize| others.iter().map(|(_, tallies)| percent(&tallies[run])).fold(0.0, f64::max);
        let lead = ours.iter().enumerate().map(|(run, tally)| percent(tally) - best(run)).collect();
        cases.push(Case::of(&format!("{trace}_lead"), params.clone(), "points", lead));
    }
    cases
}

impl Prediction {
    fn of(predictor: &str, tallies: &[Tally]) -> Self {
        let all = Part::of(tallies, |tally| &tally.all);
        Self {
            predictor: predictor.to_owned(),
            hit1: all.hit1,
            hit2: all.hit2,
            hit3: all.hit3,
            host_hit1: all.host_hit1,
            host_hit2: all.host_hit2,
            host_hit3: all.host_hit3,
            predictions: all.predictions,
            returns: Part::of(tallies, |tally| &tally.returns),
            moves: Part::of(tallies, |tally| &tally.moves),
        }
    }
}

impl Part {
    fn of(tallies: &[Tally], part: impl Fn(&Tally) -> &Hits) -> Self {
        let counted: Vec<&Hits> = tallies.iter().map(part).filter(|hits| hits.predictions > 0).collect();
        let mean = |hits: fn(&Hits) -> u64| {
            counted.iter().map(|of| of.share(hits(of))).sum::<f64>() / counted.len().max(1) as f64
        };
        Self {
            predictions: counted.iter().map(|hits| hits.predictions).sum(),
            hit1: mean(|hits| hits.aps[0]),
            hit2: mean(|hits| hits.aps[1]),
            hit3: mean(|hits| hits.aps[2]),
            host_hit1: mean(|hits| hits.hosts[0]),
            host_hit2: mean(|hits| hits.hosts[1]),
            host_hit3: mean(|hits| hits.hosts[2]),
        }
    }
}

fn summary(cases: &[Case]) -> String {
    let parts = cases.iter().filter_map(|case| case.prediction.as_ref());
    let parts = parts.map(|of| format!("{} {:.1} %", of.predictor, of.hit1 * 100.0));
    parts.collect::<Vec<_>>().join(", ")
}

/// What a roam event costs on a large site, and what is kept for each user.
fn cost(fleet: Fleet, output: Output, cancel: &Cancel) -> Result<Vec<Case>, Failure> {
    let trace = fleet.make(1);
    let mut kage = Kage::default();
    let before = resident_bytes();
    let mut event_us = Vec::new();
    for events in trace.events.chunks(BATCH) {
        cancel.check().map_err(Failure::new)?;
        let begun = Instant::now();
        events.iter().for_each(|event| kage.learn(event, &trace.site));
        event_us.push(begun.elapsed().as_secs_f64() * 1e6 / events.len() as f64);
    }
    let grown = resident_bytes().saturating_sub(before) as f64 / f64::from(fleet.users.max(1));
    let written = |size: Result<Vec<u8>, postcard::Error>| size.map(|bytes| bytes.len() as f64);
    let users: Result<Vec<f64>, _> =
        kage.users.values().map(|history| written(postcard::to_stdvec(history))).collect();
    let everybody = written(postcard::to_stdvec(&kage.everybody)).map_err(Failure::new)?;
    let params = json!({
        "users": fleet.users, "hosts": fleet.hosts, "aps": fleet.aps, "events": trace.events.len(), "events_in_a_run": BATCH,
    });
    let cases = vec![
        Case::of("fleet_event", params.clone(), "us", event_us),
        Case::of("fleet_user_stored", params.clone(), "bytes", users.map_err(Failure::new)?),
        Case::of("fleet_user_resident", params.clone(), "bytes", vec![grown]),
        Case::of("fleet_everybody_stored", params, "bytes", vec![everybody]),
    ];
    output.progress(format!("{} users: {:.1} us an event", fleet.users, cases[0].median));
    Ok(cases)
}

/// Memory of this process, in bytes.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

//! Steps of walks summed up: hits and misses apart.

use kage_host::units::{Rate, Size};
use serde_json::{Value, json};

use super::{Plan, Step, WalkReport, Walker};
use crate::{
    bench::Case,
    output::{bytes, table},
};

/// The share of the time at an access point that a handover costs in the paper whose idea this is, in percent.
const PAPER_PERCENT: f64 = 10.7;
/// Time at an access point in that paper.
const PAPER_DWELL_S: f64 = 45.0;

/// What was measured with.
pub struct Params {
    pub plan: Plan,
    pub link: Rate,
    pub memory: Size,
}

impl Params {
    fn json(&self) -> Value {
        let plan = &self.plan;
        json!({
            "hosts": plan.hosts, "users": plan.users, "learning_moves": plan.warmup, "moves": plan.runs,
            "dwell_s": plan.dwell.as_secs_f64(), "detours_percent": plan.detours_percent, "seed": plan.seed,
            "load": plan.load, "link": self.link, "memory_bytes": self.memory.0,
        })
    }
}

/// What a move found at its target, as cases are named for it.
const KINDS: [(&str, &str); 3] = [("hit", "full"), ("partial", "partial"), ("miss", "none")];

/// A name, a unit, and the figure of a step.
type Figure = (&'static str, &'static str, fn(&Step) -> Option<f64>);

const FIGURES: [Figure; 7] = [
    ("event_to_running", "ms", |step| step.event_to_running_ms),
    ("total", "ms", |step| step.total_ms),
    ("blackout", "ms", |step| step.blackout_ms),
    ("gap", "ms", |step| step.gap_ms),
    ("client_gap", "ms", |step| Some(step.client_gap_ms)),
    ("bytes_after_roam", "kB", |step| step.bytes_wire.map(|bytes| bytes as f64 / 1e3)),
    ("share_of_dwell", "%", |step| share(step.blackout_ms, step.dwell_ms)),
];

/// What of a stay a time took, in percent.
fn share(ms: Option<f64>, dwell_ms: Option<f64>) -> Option<f64> {
    let dwell_ms = dwell_ms.filter(|dwell_ms| *dwell_ms > 0.0)?;
    ms.map(|ms| 100.0 * ms / dwell_ms)
}

fn is_moved(step: &Step) -> bool {
    step.outcome == "handed_over"
}

/// All cases of a walk.
pub fn cases(params: &Params, users: &[Walker], steps: &[Step]) -> Vec<Case> {
    let params = params.json();
    let counted: Vec<&Step> = steps.iter().filter(|step| !step.learning).collect();
    let moved: Vec<&Step> = counted.iter().copied().filter(|step| is_moved(step)).collect();
    let mut cases = Vec::new();
    for (kind, hit) in KINDS {
        let these: Vec<_> = moved.iter().filter(|step| step.replica_hit == hit).collect();
        for (name, unit, figure) in FIGURES {
            let found: Vec<f64> = these.iter().filter_map(|step| figure(step)).collect();
            if !found.is_empty() {
                cases.push(Case::of(&format!("{kind}_{name}"), params.clone(), unit, found));
            }
        }
    }
    cases.extend(shares(&params, &moved));
    cases.extend(rates(&params, users, steps));
    cases
}

/// The paper's figure, over all moves: of the time nobody ran the machine, and of the time until it ran where its user
/// was; of the stays as they were, and as if each had been as long as in the paper.
fn shares(params: &Value, moved: &[&Step]) -> Vec<Case> {
    let costs: [(&str, fn(&Step) -> Option<f64>); 2] =
        [("", |step| step.blackout_ms), ("event_to_running_", |step| step.event_to_running_ms)];
    let stays: [(&str, fn(&Step) -> Option<f64>); 2] =
        [("dwell", |step| step.dwell_ms), ("45_s", |_| Some(PAPER_DWELL_S * 1e3))];
    let mut params = params.clone();
    params["paper_percent"] = json!(PAPER_PERCENT);
    let mut cases = Vec::new();
    for (cost, ms) in costs {
        for (stay, dwell_ms) in stays {
            let found: Vec<_> = moved.iter().filter_map(|step| share(ms(step), dwell_ms(step))).collect();
            if !found.is_empty() {
                cases.push(Case::of_mean(&format!("{cost}share_of_{stay}"), params.clone(), "%", found));
            }
        }
    }
    cases
}

/// Shares of steps whose move found a mirror, per user, while learning and afterwards; and of forecasts that were right.
/// A step whose machine did not come found none: every access point is at a host of its own.
fn rates(params: &Value, users: &[Walker], steps: &[Step]) -> Vec<Case> {
    let mut cases = Vec::new();
    for (prefix, learning) in [("", false), ("learning_", true)] {
        for (name, hits) in [("full_rate", &["full"][..]), ("mirror_rate", &["full", "partial"])] {
            let rate = |user: &Walker| {
                let theirs = |step: &&Step| step.user == user.user && step.learning == learning;
                let all: Vec<_> = steps.iter().filter(theirs).collect();
                let is_found = |step: &&&Step| is_moved(step) && hits.contains(&step.replica_hit.as_str());
                let found = all.iter().filter(is_found).count();
                (!all.is_empty()).then(|| 100.0 * found as f64 / all.len() as f64)
            };
            let found: Vec<_> = users.iter().filter_map(rate).collect();
            if !found.is_empty() {
                cases.push(Case::of_mean(&format!("{prefix}{name}"), params.clone(), "%", found));
            }
        }
    }
    let forecasts: [(&str, fn(&Walker) -> Option<f64>); 2] =
        [("prediction_hit1", |user| user.hit1), ("prediction_hit3", |user| user.hit3)];
    for (name, share) in forecasts {
        let found: Vec<_> = users.iter().filter_map(share).map(|share| 100.0 * share).collect();
        if !found.is_empty() {
            cases.push(Case::of_mean(name, params.clone(), "%", found));
        }
    }
    cases
}

/// A step, while the walk is under way.
pub fn line(step: &Step) -> String {
    let ms = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1} ms"));
    let what = match step.outcome.as_str() {
        "" => "not over yet".to_owned(),
        "handed_over" => format!(
            "mirror {}; running after {}, blackout {}, {} sent",
            step.replica_hit,
            ms(step.event_to_running_ms),
            ms(step.blackout_ms),
            step.bytes_wire.map_or_else(|| "-".to_owned(), bytes),
        ),
        other => other.to_owned(),
    };
    let learning = if step.learning { " (learning)" } else { "" };
    format!(
        "{} {:>3} {} → {}: {what}; the device waited {:.1} ms{learning}",
        step.user, step.number, step.from_ap, step.to_ap, step.client_gap_ms
    )
}

/// A report for people: what moves to mirrors and to elsewhere cost, then every case.
pub fn show(report: &WalkReport) -> String {
    let mut rows = Vec::new();
    for (kind, hit) in KINDS {
        let of = |learning: bool| {
            let fits = |step: &&Step| step.learning == learning && is_moved(step) && step.replica_hit == hit;
            report.moves.iter().filter(fits).count()
        };
        let figure = |name: &str| {
            let name = format!("{kind}_{name}");
            let case = report.report.cases.iter().find(|case| case.name == name);
            case.map_or_else(|| "-".to_owned(), |case| format!("{:.3} {}", case.median, case.unit))
        };
        let mut row = vec![kind.to_owned(), of(true).to_string(), of(false).to_string()];
        row.extend(FIGURES.iter().map(|(name, ..)| figure(name)));
        rows.push(row);
    }
    let header = [
        "MIRROR",
        "LEARNING",
        "MOVES",
        "EVENT→RUNNING",
        "TOTAL",
        "BLACKOUT",
        "GAP",
        "CLIENT GAP",
        "AFTER ROAM",
        "SHARE",
    ];
    let others = report.moves.iter().filter(|step| !is_moved(step)).count();
    let users: Vec<_> = report
        .users
        .iter()
        .map(|user| {
            let percent =
                |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.0} %", share * 100.0));
            let (first, third) = (percent(user.hit1), percent(user.hit3));
            let session = if user.session_alive { "session alive" } else { "session BROKEN" };
            format!(
                "{}: {session}; next access point first {first}, in three {third}; {}",
                user.user, user.load
            )
        })
        .collect();
    format!(
        "{}\nsteps without a move, or whose move did not end well: {others}\n{}\n\n{}",
        table(&header, &rows),
        users.join("\n"),
        crate::bench::show(&report.report)
    )
}

/// What broke, if anything did.
pub fn broken(report: &WalkReport) -> Option<String> {
    let users = report.users.iter().filter_map(|user| {
        let whole = user.load.contains(" whole");
        (!user.session_alive || !whole).then(|| format!("{}: {}", user.user, user.load))
    });
    let broken: Vec<_> = users.collect();
    if !broken.is_empty() {
        return Some(format!("a session broke, or memory changed: {}", broken.join("; ")));
    }
    let lost = report.users.iter().find(|user| user.machine_at != user.user_at)?;
    Some(format!("{} is at {} in the end, and the machine at {}", lost.user, lost.user_at, lost.machine_at))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bench::{MachineInfo, Report};

    fn params() -> Params {
        let plan = Plan {
            hosts: 5,
            users: 1,
            runs: 3,
            warmup: 1,
            dwell: Duration::from_secs(9),
            detours_percent: 10,
            seed: 1,
            load: "dirty 30% 500/s".into(),
        };
        Params { plan, link: Rate(50_000_000), memory: Size(64 << 20) }
    }

    fn step(number: u32, hit: &str, blackout_ms: f64) -> Step {
        Step {
            user: "alice".into(),
            number,
            learning: number == 1,
            outcome: "handed_over".into(),
            replica_hit: hit.into(),
            event_to_running_ms: Some(20.0),
            total_ms: Some(15.0),
            blackout_ms: Some(blackout_ms),
            bytes_wire: Some(5_000),
            dwell_ms: Some(9_000.0),
            ..Step::default()
        }
    }

    fn report() -> WalkReport {
        let user = Walker {
            user: "alice".into(),
            session_alive: true,
            load: "dirty: rewrote 1 pages; 9 untouched pages whole, checksum 0".into(),
            user_at: "h2".into(),
            machine_at: "h2".into(),
            window: Some(3),
            hit1: Some(0.5),
            hit3: None,
        };
        let kept = Step { outcome: "kept".into(), replica_hit: "none".into(), ..step(5, "none", 1.0) };
        let moves = vec![
            step(1, "none", 90.0),
            step(2, "full", 4.5),
            step(3, "full", 1.5),
            step(4, "none", 9.0),
            kept,
        ];
        let cases = cases(&params(), std::slice::from_ref(&user), &moves);
        WalkReport { report: Report { machine: MachineInfo::here(), cases }, users: vec![user], moves }
    }

    #[test]
    fn hits_and_misses_are_apart_and_learning_is_left_out() {
        let report = report();
        let case = |name: &str| report.report.cases.iter().find(|case| case.name == name);
        let hit = case("hit_blackout").unwrap();
        assert_eq!((hit.runs, hit.min, hit.max), (2, 1.5, 4.5));
        let miss = case("miss_blackout").unwrap();
        assert_eq!((miss.runs, miss.median), (1, 9.0));
        assert!(case("partial_blackout").is_none());
        assert_eq!(case("hit_bytes_after_roam").unwrap().median, 5.0);
        let rates =
            ["full_rate", "learning_full_rate", "prediction_hit1"].map(|name| case(name).unwrap().median);
        assert_eq!(rates, [50.0, 0.0, 50.0], "one of the four was not moved");
        assert!(case("prediction_hit3").is_none());
    }

    #[test]
    fn the_papers_figure_is_the_share_of_the_time_at_an_access_point() {
        let report = report();
        let case = |name: &str| report.report.cases.iter().find(|case| case.name == name).unwrap();
        // (4.5 + 1.5 + 9) ms of three times 9 s, and of three times 45 s.
        let mean = |name: &str| case(name).mean.unwrap();
        assert!((mean("share_of_dwell") - 100.0 * 15.0 / 27_000.0).abs() < 1e-9);
        assert!((mean("share_of_45_s") - 100.0 * 15.0 / 135_000.0).abs() < 1e-9);
        // 20 ms each.
        assert!((mean("event_to_running_share_of_45_s") - 100.0 * 20.0 / 45_000.0).abs() < 1e-9);
        assert_eq!(case("share_of_dwell").params["paper_percent"], 10.7);
    }

    #[test]
    fn what_broke_is_told() {
        let mut report = report();
        assert_eq!(broken(&report), None);
        assert!(show(&report).contains("did not end well: 1"), "{}", show(&report));
        report.users[0].machine_at = "h3".into();
        assert!(broken(&report).unwrap().contains("h3"));
        report.users[0].load = "dirty: 9 untouched pages DAMAGED".into();
        assert!(broken(&report).unwrap().contains("DAMAGED"));
    }
}

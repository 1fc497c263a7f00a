//! Two hosts with a link between them, and a case played on them: one machine that works, moved back and forth.
//!
//! Each move is one towards its user: the device that probes it is at the target's access point already. What the target holds is arranged before each move:
//!
//! - *none*: hosts keep no mirrors, nor what a machine leaves (`followers = 0`).
//! - *fresh*: a mirror is pinned to the target, and has caught up.
//! - *old*: the target keeps what the machine left there when it went away, and nobody keeps that in step; meanwhile the
//!   machine has worked long enough to rewrite most of its working set.
//!
//! What a move found there is in its report, and a move that found something else is a failure.

use std::time::{Duration, Instant};

use http::Method;
use kage_host::{
    api::types::{MigrateRequest, MoveOutcome, MoveReport, ReplicaHit},
    http::Call,
    units::Span,
};
use serde::Serialize;
use serde_json::Value;

use super::{
    link::throughput,
    matrix::{Kind, Link, Mirror, Work},
};
use crate::{
    bench::{
        desk::{Desk, Running, runtime},
        processor::used_s,
    },
    client::Failure,
    output::Output,
    probe::Probe,
    testbed::{Cancel, LinkShape, ScopedTestbed, Testbed, TestbedSpec},
};

/// Before each move the machine's own use of processors is watched for so long, and all else comes to rest.
const REST: Duration = Duration::from_secs(2);
/// Longest pause before a move for a working set to be rewritten: what a machine left is kept for a minute.
const LONGEST_AGE: Duration = Duration::from_secs(30);
/// Shortest.
const SHORTEST_AGE: Duration = Duration::from_secs(2);
/// A move may take so long beyond sending all memory twice.
const PATIENCE: Duration = Duration::from_secs(30);
/// Slowest link that an unshaped one is taken for, in bytes per second.
const UNSHAPED: f64 = 50e6;

/// What a bed is made for: cases that agree in this share it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BedSpec {
    /// Between the hosts.
    pub link: Link,
    memory: kage_host::units::Size,
    /// Whether hosts keep what machines leave.
    keeps: bool,
}

impl BedSpec {
    /// For a case.
    pub fn of(kind: &Kind) -> Self {
        Self { link: kind.link, memory: kind.work.memory, keeps: kind.mirror != Mirror::None }
    }
}

/// One move.
#[derive(Clone, Debug, Serialize)]
pub struct Move {
    /// Of which case.
    pub case: String,
    /// What the hosts say of it.
    #[serde(flatten)]
    pub report: MoveReport,
    /// The device's longest wait for an answer.
    pub client_gap_ms: f64,
    /// Processor time of both hosts, beyond what the machine's work and its heartbeat take.
    pub cpu_s: f64,
}

/// What came of a case.
#[derive(Debug)]
pub struct Played {
    /// Its moves.
    pub moves: Vec<Move>,
    /// Why there are no more of them.
    pub failure: Option<Failure>,
}

/// Two hosts.
pub struct Bed {
    testbed: ScopedTestbed,
    /// What the link carries, in bytes per second.
    pub bandwidth: f64,
    output: Output,
    cancel: Cancel,
    users: u32,
}

impl Bed {
    /// Makes them.
    ///
    /// # Errors
    /// As [`Testbed::up`]; or the link carries nothing.
    pub fn make(spec: &BedSpec, output: Output, cancel: &Cancel) -> Result<Self, Failure> {
        let dir = std::env::temp_dir().join(format!("kage-bench-{}", std::process::id()));
        let binary = std::env::current_exe().map_err(Failure::new)?;
        let link = LinkShape { rate: spec.link.rate, delay: spec.link.delay, loss_ppm: 0 };
        let testbed = TestbedSpec {
            hosts: 2,
            devices: 2,
            link,
            image_memory: Some(spec.memory),
            followers: Some(u8::from(spec.keeps)),
            ..TestbedSpec::new(dir, binary)
        };
        let testbed = Testbed::scoped(testbed, cancel).map_err(Failure::new)?;
        let bandwidth = match spec.link.rate {
            Some(rate) => rate.bytes_per_second() as f64,
            None => throughput(&testbed)?,
        };
        Ok(Self { testbed, bandwidth, output, cancel: cancel.clone(), users: 0 })
    }

    /// Plays a case: a machine of its own, moved back and forth.
    pub fn play(&mut self, kind: &Kind, runs: u32) -> Played {
        self.users += 1;
        let mut moves = Vec::new();
        let failure = self.play_into(&mut moves, kind, runs).err();
        Played { moves, failure }
    }

    fn play_into(&self, moves: &mut Vec<Move>, kind: &Kind, runs: u32) -> Result<(), Failure> {
        let user = format!("bench-{}", self.users);
        let desk = Desk::login_as(&self.testbed, &user, &self.device_at("h1")?, Some("h1"))?;
        let mut load = desk.spawn_on_terminal(&kind.load())?;
        let trip = Trip { bed: self, desk: &desk, kind, name: kind.name() };
        let went = load.line_with("dirty:").and_then(|_| trip.go(runs, moves));
        // Whatever came of it: the next case wants the host to itself.
        let ended = end(&desk, load, went.is_ok());
        went.and(ended)
    }
}

impl Bed {
    /// The device at a host's access point.
    fn device_at(&self, host: &str) -> Result<String, Failure> {
        let status = self.testbed.status().map_err(Failure::new)?;
        let host = status.hosts.iter().find(|found| found.name == host);
        let device = host.and_then(|host| status.devices.iter().find(|device| host.aps.contains(&device.ap)));
        device.map(|device| device.name.clone()).ok_or_else(|| Failure::new("a host has no device"))
    }
}

/// Ends a case's machine; `checked` after a look at the memory that was not rewritten.
fn end(desk: &Desk<'_>, mut load: Running, checked: bool) -> Result<(), Failure> {
    let whole = if checked {
        let said = load.write("\x03").and_then(|()| load.line_with("untouched pages"));
        said.and_then(|said| if said.contains(" whole") { Ok(()) } else { Err(Failure::new(said)) })
    } else {
        Ok(())
    };
    drop(load);
    let logout = Call::new(Method::DELETE, format!("/v1/images/{}", desk.user));
    let _: Value = runtime()?.block_on(desk.client.call(&logout))?;
    whole
}

/// A case under way.
struct Trip<'a> {
    bed: &'a Bed,
    desk: &'a Desk<'a>,
    kind: &'a Kind,
    name: String,
}

impl Trip<'_> {
    fn go(&self, runs: u32, moves: &mut Vec<Move>) -> Result<(), Failure> {
        if self.kind.mirror == Mirror::Old {
            // Once there and back, so that both hosts have what it left; nobody keeps that in step.
            for _ in 0..2 {
                self.desk.pin(Some(&[]))?;
                self.migrate()?;
            }
        }
        for run in 1..=runs {
            let made = self.make_one()?;
            let Move { report, client_gap_ms, .. } = &made;
            self.bed.output.progress(format!(
                "{}: {run} of {runs}: total {:.0} ms, gap {:.1} ms, blackout {:.2} ms, client {client_gap_ms:.1} ms, \
                 {:.2} MB",
                self.name,
                report.total_ms,
                report.gap_ms,
                report.blackout_ms,
                report.bytes_wire as f64 / 1e6
            ));
            moves.push(made);
        }
        Ok(())
    }

    /// One move, with what has to be there before it.
    fn make_one(&self) -> Result<Move, Failure> {
        let expected: &[ReplicaHit] = match self.kind.mirror {
            Mirror::None => &[ReplicaHit::None],
            Mirror::Old => {
                self.wait(age(&self.kind.work, self.kind.set_pages()))?;
                &[ReplicaHit::Partial, ReplicaHit::Full]
            }
            Mirror::Fresh => {
                self.desk.mirrored(&[self.target()?], self.kind.work.memory.0, &self.bed.cancel)?;
                &[ReplicaHit::Full]
            }
        };
        let device = self.bed.device_at(&self.target()?)?;
        let probe = Probe::start(&self.bed.testbed, &device, self.desk.login.address)?;
        // A move watches the machine's heartbeat, which costs more than many a move: it beats before as it does meanwhile.
        self.desk.say("heartbeat")?;
        let before = (Instant::now(), used_s(&self.bed.testbed)?);
        self.wait(REST)?;
        let at_begin = (Instant::now(), used_s(&self.bed.testbed)?);
        let report = self.migrate()?;
        let client_gap_ms = probe.gap_since(at_begin.0).as_secs_f64() * 1e3;
        let at_end = (Instant::now(), used_s(&self.bed.testbed)?);
        self.desk.say("heartbeat off")?;
        if !expected.contains(&report.replica_hit) {
            let found = report.replica_hit;
            return Err(Failure::new(format!("the target was to hold {expected:?}, and held {found:?}")));
        }
        let own = (at_begin.1 - before.1) / (at_begin.0 - before.0).as_secs_f64();
        let cpu_s = (at_end.1 - at_begin.1) - own * (at_end.0 - at_begin.0).as_secs_f64();
        Ok(Move { case: self.name.clone(), report, client_gap_ms, cpu_s: cpu_s.max(0.0) })
    }

    /// Moves it to the other host.
    fn migrate(&self) -> Result<MoveReport, Failure> {
        self.bed.cancel.check().map_err(Failure::new)?;
        let request = MigrateRequest {
            to: Some(self.target()?.parse().map_err(Failure::new)?),
            mode: Some(self.kind.mode),
            timeout: Some(timeout(&self.kind.work, self.kind.link.rate.map(|_| self.bed.bandwidth))),
            ..MigrateRequest::default()
        };
        let report: MoveReport = self.desk.migrate(&request, self.bed.output)?;
        if report.outcome != MoveOutcome::HandedOver {
            let reason = report.reason.as_deref().unwrap_or("no reason given");
            return Err(Failure::new(format!("{}: {reason}", report.outcome)));
        }
        Ok(report)
    }

    /// The host where the machine is not.
    fn target(&self) -> Result<String, Failure> {
        let at = self.desk.view()?.host.to_string();
        Ok(if at == "h1" { "h2" } else { "h1" }.to_owned())
    }

    fn wait(&self, time: Duration) -> Result<(), Failure> {
        self.bed.cancel.wait_until(Instant::now() + time).map_err(Failure::new)
    }
}

/// How long a machine works before it comes back: twice the time in which so many pages are written as it rewrites.
fn age(work: &Work, set_pages: u64) -> Duration {
    let seconds = 2 * set_pages / u64::from(work.writes_per_s.max(1));
    Duration::from_secs(seconds).clamp(SHORTEST_AGE, LONGEST_AGE)
}

/// Longest move that is waited for.
pub fn timeout(work: &Work, bandwidth: Option<f64>) -> Span {
    let twice = 2.0 * work.memory.0 as f64 / bandwidth.unwrap_or(UNSHAPED);
    Span::from_millis((PATIENCE.as_millis() as f64 + 1e3 * twice) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::migrate::matrix::BASE;

    #[test]
    fn a_mirror_is_old_once_its_working_set_was_rewritten_and_before_it_is_dropped() {
        assert_eq!(age(&BASE.work, BASE.set_pages()), Duration::from_secs(19));
        assert_eq!(age(&Work { writes_per_s: 0, ..BASE.work }, BASE.set_pages()), LONGEST_AGE);
        assert_eq!(age(&Work { writes_per_s: 50_000, ..BASE.work }, BASE.set_pages()), SHORTEST_AGE);
    }

    #[test]
    fn a_move_may_take_as_long_as_its_link_needs() {
        let span = timeout(&BASE.work, Some(6.25e6));
        assert!((50.0..52.0).contains(&span.duration().as_secs_f64()), "{span}");
        assert!(timeout(&BASE.work, None).duration() < Duration::from_secs(35));
    }

    #[test]
    fn cases_share_hosts_where_link_memory_and_what_is_kept_are_the_same() {
        let fresh = Kind { mirror: Mirror::Fresh, ..BASE };
        let old = Kind { mirror: Mirror::Old, ..BASE };
        let busy = Kind { work: Work { writes_per_s: 5_000, ..BASE.work }, ..BASE };
        assert_eq!(BedSpec::of(&fresh), BedSpec::of(&old));
        assert_eq!(BedSpec::of(&BASE), BedSpec::of(&busy));
        assert_ne!(BedSpec::of(&BASE), BedSpec::of(&fresh));
        let other = Kind { link: Link { rate: None, ..BASE.link }, ..BASE };
        assert_ne!(BedSpec::of(&BASE), BedSpec::of(&other));
    }
}

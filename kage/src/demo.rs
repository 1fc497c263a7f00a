//! `kage demo`: the main job, to be watched.
//!
//! Edge hosts as network namespaces; alice logs in at the first access point, opens an SSH session and a download,
//! and walks. Every move is driven as in life: the device changes its link, the access point sends its
//! accounting Start, the hosts do the rest. What the device saw is measured at the device.
//!
//! - [`observe`]: the SSH session and the download.
//! - [`screen`]: what is shown of it.

mod observe;
mod screen;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use http::Method;
use kage_host::{
    api::types::{LoginReply, LoginRequest},
    events::Event,
    http::Call,
};
use serde::Serialize;

use crate::{
    cli::DemoArgs,
    client::{Client, Failure},
    output::Output,
    probe::{Probe, ProbeSummary},
    ssh::Key,
    testbed::{Cancel, LinkShape, Testbed, TestbedSpec},
};
use observe::{Download, Session};
use screen::Screen;

/// Who walks.
const USER: &str = "alice";
/// Her device.
const DEVICE: &str = "d1";
/// Seed of the download's content.
const SEED: u64 = 20_240_817;
/// How long a move may take to be reported.
const REPORT: Duration = Duration::from_secs(40);
/// How long she stays at an access point before the next move.
const DWELL: Duration = Duration::from_millis(400);
/// About how long a move takes with its report; the download is paced to last for all of them.
const PER_MOVE: Duration = Duration::from_millis(2_000);

/// One move, as the device and the hosts saw it.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Access point and host before.
    pub from_ap: String,
    /// Access point after.
    pub to_ap: String,
    /// The machine's host before.
    pub from: String,
    /// The machine's host after.
    pub to: String,
    /// `handed_over`, if all went well.
    pub outcome: String,
    /// From the request to the last page.
    pub total_ms: f64,
    /// Last exit at the source to first entry at the target.
    pub blackout_ms: f64,
    /// The machine's own longest heartbeat gap.
    pub gap_ms: f64,
    /// Longest silence of the device's probe, its change of link included.
    pub client_gap_ms: f64,
    /// Bytes between the hosts.
    pub bytes_wire: u64,
    /// Frames lost by the hosts.
    pub lost_frames: u64,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Whether nothing broke.
    pub ok: bool,
    /// From the login to the machine's first answer.
    pub started_ms: f64,
    /// The moves.
    pub moves: Vec<Step>,
    /// The SSH session.
    pub ssh: observe::SessionSummary,
    /// The download.
    pub stream: observe::DownloadSummary,
    /// The probe.
    pub probe: ProbeSummary,
    /// What broke.
    pub broken: Vec<String>,
}

/// Runs the demonstration.
///
/// # Errors
/// What keeps it from running, or what broke.
pub fn run(args: &DemoArgs, output: Output) -> Result<(), Failure> {
    if args.hosts < 2 {
        return Err(Failure::usage("--hosts: a walk needs at least 2 hosts"));
    }
    let screen = Screen::new(output);
    let cancel = crate::testbed::cli::cancel_on_signals().map_err(Failure::new)?;
    screen.title();
    let binary = std::env::current_exe().map_err(Failure::new)?;
    // A demonstration that was killed left its namespaces; its directory is its own.
    Testbed::remove(&args.dir).map_err(Failure::new)?;
    let delay = args.delay.map_or(Duration::ZERO, kage_host::units::Span::duration);
    let link = LinkShape { rate: args.link, delay, loss_ppm: 0 };
    let spec = TestbedSpec { hosts: args.hosts, devices: 1, link, ..TestbedSpec::new(&args.dir, binary) };
    screen.note(format!(
        "making {} edge hosts, their access points and a device as network namespaces",
        args.hosts
    ));
    let testbed = Testbed::scoped(spec, &cancel).map_err(Failure::new)?;
    let summary = walk(&testbed, args, screen, &cancel);
    if args.keep {
        if let Some(testbed) = testbed.keep() {
            screen.note(format!(
                "left running; remove it with: kage testbed down --dir {}",
                testbed.dir().display()
            ));
        }
    } else {
        screen.note("removing every trace");
        let dir = testbed.dir().to_owned();
        drop(testbed);
        Key::remove(&dir, USER);
        // Only when nothing of somebody else's is in it.
        let _ = std::fs::remove_dir(&dir);
    }
    let summary = summary?;
    if output.is_json() {
        output.result(&summary, |_| String::new())?;
    } else {
        screen.summary(&summary);
    }
    if summary.ok { Ok(()) } else { Err(Failure::new(summary.broken.join("; "))) }
}

/// The socket of a host's daemon.
fn socket(testbed: &Testbed, host: &str) -> Result<PathBuf, Failure> {
    let status = testbed.status().map_err(Failure::new)?;
    let found = status.hosts.into_iter().find(|found| found.name == host);
    found.map(|found| found.socket).ok_or_else(|| Failure::new(format!("there is no host {host}")))
}

fn walk(testbed: &Testbed, args: &DemoArgs, screen: Screen, cancel: &Cancel) -> Result<Summary, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    let check = || cancel.check().map_err(Failure::new);
    let key = Key::make(testbed.dir(), USER)?;
    let request =
        LoginRequest { at: Some("ap-1".to_owned()), key: Some(key.line()?), image: None, cold: false };
    let login = Call::new(Method::PUT, format!("/v1/images/{USER}")).json(&request);
    let login: LoginReply = runtime.block_on(Client::at(socket(testbed, "h1")?).call(&login))?;
    screen.logged_in(&login);

    let probe = Probe::start(testbed, DEVICE, login.address)?;
    let session = Session::start(testbed, DEVICE, USER, login.address, &key)?;
    let lasting = PER_MOVE * (args.steps + 1);
    let download = Download::start(testbed, DEVICE, login.address, args.bytes, SEED, lasting)?;
    screen.watching(args.bytes);

    let mut moves = Vec::new();
    let mut broken = Vec::new();
    screen.header();
    for step in 0..args.steps {
        check()?;
        let at = |step: u32| step % u32::from(args.hosts) + 1;
        let (from_ap, to_ap) = (format!("ap-{}", at(step)), format!("ap-{}", at(step + 1)));
        let from = format!("h{}", at(step));
        let client = Client::at(socket(testbed, &from)?);
        let seen = runtime.block_on(newest(&client))?;
        let since = Instant::now();
        screen.moving(step + 1, &from_ap, &to_ap);
        testbed.move_device(DEVICE, &to_ap, false).map_err(Failure::new)?;
        let event = wait_for_report(&runtime, &client, seen, cancel, || {
            screen.live(step + 1, &from_ap, &to_ap, &session, &download, &probe);
        })?;
        let Some(event) = event else {
            broken.push(format!("move {} to {to_ap} was not reported in {REPORT:?}", step + 1));
            break;
        };
        let moved = as_step(&event, from_ap, to_ap, probe.gap_since(since));
        screen.moved(step + 1, &moved, &session, &download);
        if moved.outcome != "handed_over" {
            let reason =
                event.details.get("reason").and_then(|reason| reason.as_str()).unwrap_or("no reason given");
            broken.push(format!("move {} ended as {}: {reason}", step + 1, moved.outcome));
        }
        moves.push(moved);
        pause(DWELL, cancel)?;
    }
    screen.finishing();
    let stream = download.finish(cancel, |download| screen.draining(download));
    let ssh = session.finish();
    let probe = probe.finish();
    check()?;
    broken.extend(stream.broken());
    broken.extend(ssh.broken());
    let lost: u64 = moves.iter().map(|moved| moved.lost_frames).sum();
    if lost > 0 {
        broken.push(format!("{lost} frames were lost by the hosts"));
    }
    Ok(Summary { ok: broken.is_empty(), started_ms: login.started_ms, moves, ssh, stream, probe, broken })
}

async fn newest(client: &Client) -> Result<u64, Failure> {
    let events: Vec<Event> = client.call(&Call::new(Method::GET, "/v1/events?follow=false")).await?;
    Ok(events.last().map_or(0, |event| event.id))
}

/// Waits for the source's report of a move; `None` when it does not come.
fn wait_for_report(
    runtime: &tokio::runtime::Runtime,
    client: &Client,
    after: u64,
    cancel: &Cancel,
    show: impl Fn(),
) -> Result<Option<Event>, Failure> {
    let deadline = Instant::now() + REPORT;
    while Instant::now() < deadline {
        cancel.check().map_err(Failure::new)?;
        let call = Call::new(Method::GET, format!("/v1/events?follow=false&after={after}"));
        let events: Vec<Event> = runtime.block_on(client.call(&call))?;
        let report = events.into_iter().find(|event| {
            event.details.contains_key("blackout_ms")
                && event.user.as_ref().is_some_and(|user| user.as_str() == USER)
        });
        if report.is_some() {
            return Ok(report);
        }
        show();
        pause(Duration::from_millis(50), cancel)?;
    }
    Ok(None)
}

fn pause(time: Duration, cancel: &Cancel) -> Result<(), Failure> {
    std::thread::sleep(time);
    cancel.check().map_err(Failure::new)
}

fn as_step(event: &Event, from_ap: String, to_ap: String, client_gap: Duration) -> Step {
    let text =
        |name: &str| event.details.get(name).and_then(|value| value.as_str()).unwrap_or_default().to_owned();
    let float = |name: &str| event.details.get(name).and_then(serde_json::Value::as_f64).unwrap_or_default();
    let whole = |name: &str| event.details.get(name).and_then(serde_json::Value::as_u64).unwrap_or_default();
    Step {
        from_ap,
        to_ap,
        from: text("from"),
        to: text("to"),
        outcome: event.kind.clone(),
        total_ms: float("total_ms"),
        blackout_ms: float("blackout_ms"),
        gap_ms: float("gap_ms"),
        client_gap_ms: client_gap.as_secs_f64() * 1e3,
        bytes_wire: whole("bytes_wire"),
        lost_frames: whole("lost_frames"),
    }
}

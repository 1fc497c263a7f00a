//! `kage bench walk`: users who walk a campus, each with a machine that works.
//!
//! Edge hosts on shaped links, one access point each. Every user has a device, a route of habit with detours
//! ([`route`]), and a machine that rewrites its memory all the while. A step is a step as in life: the device changes its
//! link, the new access point sends its accounting Start, the hosts do the rest. What they did is told by their events
//! ([`listen`]); what the device saw of it, by a probe. The first steps of each user are *learning*: they count apart.
//!
//! - [`figures`]: steps summed up.
//! - [`listen`]: what the daemons tell of moves.
//! - [`route`]: where users go.

mod figures;
mod listen;
pub mod route;

use std::{
    panic::resume_unwind,
    path::PathBuf,
    sync::{Barrier, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use http::Method;
use kage_host::{
    events::now_ms,
    http::Call,
    roaming::radius::Status,
    units::{Rate, Size, Span},
};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    MachineInfo, Report,
    desk::{Desk, Running, runtime},
};
use crate::{
    client::{Client, Failure},
    output::Output,
    probe::Probe,
    testbed::{Cancel, LinkShape, Testbed, TestbedSpec, TestbedStatus},
};
use listen::{Listener, Told};
use route::{Route, SHORTEST_STAY};

/// Time at an access point with `--quick`.
const QUICK_DWELL: Duration = Duration::from_secs(10);
/// Steps of each user with `--quick`.
const QUICK_RUNS: u32 = 5;
const QUICK_WARMUP: u32 = 8;
/// Longest wait for the report of a user's last step.
const REPORT: Duration = Duration::from_secs(45);
/// A probe is under way for so long before its step.
const LEAD: Duration = Duration::from_millis(200);

/// `kage bench walk`.
#[derive(Clone, Debug, Args)]
pub struct WalkArgs {
    /// Edge hosts, with one access point each
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=100))]
    pub hosts: u16,
    /// Users, each with a device and a machine
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=100))]
    pub users: u16,
    /// Moves of each user that count
    #[arg(long, default_value_t = 12, value_name = "N")]
    pub runs: u32,
    /// Moves of each user before those, by which the hosts learn
    #[arg(long, default_value_t = 12, value_name = "N")]
    pub warmup: u32,
    /// Mean time at an access point [default: 45s, with --quick 10s]
    #[arg(long, value_name = "TIME")]
    pub dwell: Option<Span>,
    /// Of a hundred steps, how many lead elsewhere than habit
    #[arg(long, default_value_t = 10, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(..=100))]
    pub detours: u8,
    /// What each machine does: the arguments of its command `dirty`
    #[arg(long, default_value = "30% 500/s", value_name = "W% R/s")]
    pub load: String,
    /// Rate of each host's link to the others
    #[arg(long, default_value = "50mbit", value_name = "RATE")]
    pub link: Rate,
    /// Delay between any two hosts, one way
    #[arg(long, value_name = "TIME")]
    pub delay: Option<Span>,
    /// Memory of the machines
    #[arg(long, default_value = "64MiB", value_name = "SIZE")]
    pub memory: Size,
    /// Of routes and stays
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// Fewer moves and shorter stays
    #[arg(long)]
    pub quick: bool,
}

/// How users walk.
#[derive(Clone, Debug)]
struct Plan {
    hosts: u16,
    users: u16,
    /// Steps of each user that count.
    runs: u32,
    /// Steps of each user before those.
    warmup: u32,
    dwell: Duration,
    detours_percent: u8,
    seed: u64,
    /// What each machine does, as its shell is told.
    load: String,
}

/// One step of a user, as hosts and device saw it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Step {
    /// Who.
    pub user: String,
    /// Of the user's steps, from 1.
    pub number: u32,
    /// Whether it is one of the first, by which the hosts learn.
    pub learning: bool,
    /// Access point before.
    pub from_ap: String,
    /// Access point after.
    pub to_ap: String,
    /// That one's host.
    pub to: String,
    /// `handed_over`; `stays`: the machine was there; `kept` and others: see `reason`; `unreported`: the user had gone
    /// on before the move was over.
    pub outcome: String,
    /// Why, unless handed over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What the target held: `full`, `partial` or `none`.
    pub replica_hit: String,
    /// From the accounting Start to the machine's arrival, the change of owner included.
    pub event_to_running_ms: Option<f64>,
    /// From the owner's decision to the last page.
    pub total_ms: Option<f64>,
    /// Nobody ran it for so long.
    pub blackout_ms: Option<f64>,
    /// The machine's own longest heartbeat gap.
    pub gap_ms: Option<f64>,
    /// The device's longest wait for an answer.
    pub client_gap_ms: f64,
    /// Bytes between the hosts after the accounting Start.
    pub bytes_wire: Option<u64>,
    /// Pages sent in the pause.
    pub pages_at_switch: Option<u64>,
    /// How long the user stayed; not known of the last.
    pub dwell_ms: Option<f64>,
    /// When the Start was sent, in milliseconds since 1970.
    pub at_ms: u64,
}

/// What came of one user's walk.
#[derive(Clone, Debug, Serialize)]
pub struct Walker {
    /// Who.
    pub user: String,
    /// Whether the SSH session in which the load ran was alive to the end.
    pub session_alive: bool,
    /// What the load said of the memory it had not rewritten.
    pub load: String,
    /// The host of the user's last access point.
    pub user_at: String,
    /// The host of the machine at the end.
    pub machine_at: String,
    /// Forecasts that were scored; absent where the hosts make none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<u64>,
    /// Share of them that had the next access point first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hit1: Option<f64>,
    /// Share of them that had it among the first three.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hit3: Option<f64>,
}

/// Answer of the bench.
#[derive(Clone, Debug, Serialize)]
pub struct WalkReport {
    /// As of every bench.
    #[serde(flatten)]
    pub report: Report,
    /// Users.
    pub users: Vec<Walker>,
    /// Steps, by user.
    pub moves: Vec<Step>,
}

/// Runs the bench.
///
/// # Errors
/// What keeps it from running; a session that broke or memory that changed.
pub fn run(args: &WalkArgs, output: Output) -> Result<(), Failure> {
    let plan = Plan {
        hosts: args.hosts,
        users: args.users,
        runs: if args.quick { args.runs.min(QUICK_RUNS) } else { args.runs }.max(1),
        warmup: if args.quick { args.warmup.min(QUICK_WARMUP) } else { args.warmup },
        dwell: match args.dwell {
            Some(dwell) => dwell.duration(),
            None if args.quick => QUICK_DWELL,
            None => Duration::from_secs(45),
        },
        detours_percent: args.detours,
        seed: args.seed,
        load: format!("dirty {}", args.load),
    };
    let cancel = crate::testbed::cli::cancel_on_signals().map_err(Failure::new)?;
    let dir = std::env::temp_dir().join(format!("kage-bench-{}", std::process::id()));
    let binary = std::env::current_exe().map_err(Failure::new)?;
    let delay = args.delay.map_or(Duration::ZERO, Span::duration);
    let spec = TestbedSpec {
        hosts: plan.hosts,
        devices: plan.users,
        link: LinkShape { rate: Some(args.link), delay, loss_ppm: 0 },
        image_memory: Some(args.memory),
        ..TestbedSpec::new(dir, binary)
    };
    output.progress(format!("making {} hosts on {} links and {} devices", plan.hosts, args.link, plan.users));
    let testbed = Testbed::scoped(spec, &cancel).map_err(Failure::new)?;
    let walk = Walk::new(&testbed, &plan, output, &cancel)?;
    let (users, moves) = walk.go()?;
    let params = figures::Params { plan: plan.clone(), link: args.link, memory: args.memory };
    let cases = figures::cases(&params, &users, &moves);
    let report = WalkReport { report: Report { machine: MachineInfo::here(), cases }, users, moves };
    output.result(&report, figures::show)?;
    figures::broken(&report).map_or(Ok(()), |broken| Err(Failure::new(broken)))
}

/// Everything users share.
struct Walk<'a> {
    testbed: &'a Testbed,
    status: TestbedStatus,
    plan: &'a Plan,
    listener: Listener,
    output: Output,
    cancel: &'a Cancel,
}

impl<'a> Walk<'a> {
    fn new(
        testbed: &'a Testbed,
        plan: &'a Plan,
        output: Output,
        cancel: &'a Cancel,
    ) -> Result<Self, Failure> {
        let status = testbed.status().map_err(Failure::new)?;
        let sockets: Vec<PathBuf> = status.hosts.iter().map(|host| host.socket.clone()).collect();
        let listener = Listener::start(sockets)?;
        Ok(Self { testbed, status, plan, listener, output, cancel })
    }

    /// Everybody walks, each on a thread of their own; the first failure cancels the others.
    fn go(&self) -> Result<(Vec<Walker>, Vec<Step>), Failure> {
        let failed = Mutex::new(None);
        let ready = Barrier::new(usize::from(self.plan.users));
        let walked: Vec<_> = thread::scope(|scope| {
            let walkers: Vec<_> = (0..self.plan.users)
                .map(|number| {
                    let (failed, ready) = (&failed, &ready);
                    scope.spawn(move || {
                        let prepared = self.settle_in(usize::from(number));
                        // Nobody waits for ever for one who failed.
                        ready.wait();
                        prepared.and_then(|(user, load)| self.walk(usize::from(number), user, load)).map_err(
                            |failure| {
                                let mut first = failed.lock().unwrap_or_else(PoisonError::into_inner);
                                first.get_or_insert(failure);
                                self.cancel.cancel();
                            },
                        )
                    })
                })
                .collect();
            let joined = walkers.into_iter().map(thread::ScopedJoinHandle::join);
            joined.filter_map(|walked| walked.unwrap_or_else(|panic| resume_unwind(panic)).ok()).collect()
        });
        if let Some(failure) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(failure);
        }
        let (users, moves): (Vec<_>, Vec<_>) = walked.into_iter().unzip();
        Ok((users, moves.into_iter().flatten().collect()))
    }

    /// Logs a user in where the device is, and starts the load.
    fn settle_in(&self, number: usize) -> Result<(Desk<'a>, Running), Failure> {
        let device = self.status.devices.get(number).ok_or_else(|| Failure::new("a device is missing"))?;
        let user = self.testbed.user_of(&device.name).map_err(Failure::new)?;
        let desk = Desk::login_as(self.testbed, &user, &device.name, Some(&device.ap))?;
        // What its access point sends when a device comes: the walk's first place.
        self.testbed.account(&device.name, Status::Start).map_err(Failure::new)?;
        let mut load = desk.spawn_on_terminal(&self.plan.load)?;
        let began = load.line_with("dirty:")?;
        self.output.progress(format!("{user} is at {}; {began}", device.ap));
        Ok((desk, load))
    }

    /// One user's walk.
    fn walk(&self, number: usize, desk: Desk<'a>, mut load: Running) -> Result<(Walker, Vec<Step>), Failure> {
        let aps = self.status.hosts.len();
        let seed = self.plan.seed.wrapping_mul(1000).wrapping_add(number as u64);
        let mut route = Route::new(seed, aps, number % aps, self.plan.detours_percent);
        let mut at = Stop { ap: self.ap(number % aps)?.0, since: Instant::now() };
        let mut steps: Vec<Step> = Vec::new();
        for turn in 1..=self.plan.warmup + self.plan.runs {
            let leave = at.since + route.stay(self.plan.dwell);
            self.cancel.wait_until(leave).map_err(Failure::new)?;
            if let Some(last) = steps.last_mut() {
                last.dwell_ms = Some(at.since.elapsed().as_secs_f64() * 1e3);
            }
            let (ap, host) = self.ap(route.step())?;
            let step = Step {
                user: desk.user.clone(),
                number: turn,
                learning: turn <= self.plan.warmup,
                from_ap: std::mem::replace(&mut at.ap, ap.clone()),
                to_ap: ap,
                to: host,
                ..Step::default()
            };
            // Who goes on before the report is there reads it later.
            let last = turn == self.plan.warmup + self.plan.runs;
            let patience = if last { REPORT } else { self.plan.dwell.mul_f64(SHORTEST_STAY) };
            steps.push(self.step(&desk, step, &mut at, patience)?);
        }
        self.look_again(&mut steps)?;
        let session_alive = load.0.try_wait().map_err(Failure::new)?.is_none();
        // ^C, as it is typed.
        let said = load.write("\x03").and_then(|()| load.line_with("untouched pages"));
        let forecast = self.forecast(&desk);
        let figure = |name: &str| forecast.as_ref().and_then(|forecast| forecast.get(name));
        let walker = Walker {
            user: desk.user.clone(),
            session_alive,
            load: said.unwrap_or_else(|failure| failure.message),
            user_at: steps.last().map(|step| step.to.clone()).unwrap_or_default(),
            machine_at: self.machine_at(&desk)?,
            window: figure("window").and_then(Value::as_u64),
            hit1: figure("hit1").and_then(Value::as_f64),
            hit3: figure("hit3").and_then(Value::as_f64),
        };
        Ok((walker, steps))
    }

    /// An access point and its host, by number from 0.
    fn ap(&self, number: usize) -> Result<(String, String), Failure> {
        let host = self.status.hosts.get(number);
        host.and_then(|host| Some((host.aps.first()?.clone(), host.name.clone())))
            .ok_or_else(|| Failure::new(format!("there is no access point number {number}")))
    }

    /// Carries the device, and waits for what the hosts tell of it, but no longer than `patience`.
    fn step(
        &self,
        desk: &Desk<'_>,
        mut step: Step,
        at: &mut Stop,
        patience: Duration,
    ) -> Result<Step, Failure> {
        let probe = Probe::start(self.testbed, &desk.device, desk.login.address)?;
        self.cancel.wait_until(Instant::now() + LEAD).map_err(Failure::new)?;
        let (began, began_ms) = (Instant::now(), now_ms());
        let moved = self.testbed.move_device(&desk.device, &step.to_ap, false).map_err(Failure::new)?;
        let link = Duration::from_secs_f64(moved.link_ms / 1e3);
        at.since = began + link;
        step.at_ms = began_ms + link.as_millis() as u64;
        let told = |events: &[_]| Told::of(events, &step.user, &step.to_ap, &step.to, (step.at_ms, u64::MAX));
        let over = |events: &[_]| Some(told(events)).filter(Told::is_over);
        let found = self.listener.wait(at.since + patience, self.cancel, over)?;
        step.client_gap_ms = probe.gap_since(began).as_secs_f64() * 1e3;
        step.fill_in(&found.unwrap_or_default());
        self.output.progress(figures::line(&step));
        Ok(step)
    }

    /// Takes in the reports that came only after their user had gone on.
    fn look_again(&self, steps: &mut [Step]) -> Result<(), Failure> {
        for index in 0..steps.len() {
            let (step, later) = (&steps[index], &steps[index + 1..]);
            if !step.outcome.is_empty() {
                continue;
            }
            let again =
                later.iter().find(|later| later.to_ap == step.to_ap).map_or(u64::MAX, |step| step.at_ms);
            let told = self.listener.wait(Instant::now(), self.cancel, |events| {
                Some(Told::of(events, &step.user, &step.to_ap, &step.to, (step.at_ms, again)))
            })?;
            let step = &mut steps[index];
            step.fill_in(&told.unwrap_or_default());
            if step.outcome.is_empty() {
                step.outcome = "unreported".to_owned();
            }
        }
        Ok(())
    }

    /// The host where a user's machine is.
    fn machine_at(&self, desk: &Desk<'_>) -> Result<String, Failure> {
        let host = self.status.hosts.first().ok_or_else(|| Failure::new("there is no host"))?;
        let call = Call::new(Method::GET, format!("/v1/images/{}", desk.user));
        let image: Value = runtime()?.block_on(Client::at(&host.socket).call(&call))?;
        Ok(image["host"].as_str().unwrap_or_default().to_owned())
    }

    /// How often the hosts' forecasts for a user were right; nothing where they make none.
    fn forecast(&self, desk: &Desk<'_>) -> Option<Map<String, Value>> {
        let at =
            self.testbed.status().ok()?.devices.into_iter().find(|device| device.name == desk.device)?.ap;
        let host = self.status.hosts.iter().find(|host| host.aps.contains(&at))?;
        let call = Call::new(Method::GET, format!("/v1/images/{}/prediction", desk.user));
        match runtime().ok()?.block_on(Client::at(&host.socket).call::<Value>(&call)) {
            Ok(Value::Object(forecast)) => Some(forecast),
            Ok(_) => None,
            Err(error) => {
                self.output.progress(format!("no forecasts for {}: {}", desk.user, error.message));
                None
            }
        }
    }
}

/// Where a user is.
struct Stop {
    ap: String,
    since: Instant,
}

impl Step {
    /// Takes in what was told; what is not known yet stays empty.
    fn fill_in(&mut self, told: &Told) {
        if told.stays {
            self.outcome = "stays".to_owned();
        }
        let Some(report) = &told.report else { return };
        let float = |name: &str| report.get(name).and_then(Value::as_f64);
        let whole = |name: &str| report.get(name).and_then(Value::as_u64);
        let text = |name: &str| report.get(name).and_then(Value::as_str).map(str::to_owned);
        self.outcome = told.outcome.clone().unwrap_or_default();
        self.reason = text("reason");
        self.replica_hit = text("replica_hit").unwrap_or_default();
        self.event_to_running_ms = told.arrived_at_ms.map(|at| at.saturating_sub(self.at_ms) as f64);
        self.total_ms = float("total_ms");
        self.blackout_ms = float("blackout_ms");
        self.gap_ms = float("gap_ms");
        self.bytes_wire = whole("bytes_wire");
        self.pages_at_switch = whole("pages_at_switch");
    }
}

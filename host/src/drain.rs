//! Emptying this host: every machine that runs here moves elsewhere, several at once.
//!
//! - [`plan`]: which one next and where to, pure.
//! - [`cordon`]: keeping new ones away.
//!
//! A drain is one operation of this host; each of its moves is one as well, which can be looked at and cancelled alone. Its
//! outcome says of every machine what became of it. A machine that could not be moved runs on here. Cancelled, or
//! overruled by an uncordon, it begins no further move and cancels those that have not offered their switch yet. It ends
//! with its daemon; the host stays cordoned, and a second drain goes on with what is left.

pub mod cordon;
pub mod plan;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use http::Method;
use kage_directory::{ImageRecord, Records as _, Wanted};
use kage_machine::{HostName, PAGE_SIZE, UserName};
use kage_migrate::outcome::{blames_target, is_cancelled};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};

use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{
            DrainProgress, DrainReport, DrainRequest, DrainedImage, MigrateRequest, MoveOutcome, MoveReport,
            Operation, Ready,
        },
    },
    events::now_ms,
    http::Call,
    lifecycle::{Daemon, blocking},
    moves::report_of,
    operations::Handle,
    units::Rate,
};
use plan::{Came, Leaver, Plan, Room};

/// Moves at once unless told otherwise: two keep a link busy while others prepare and settle. More share the link, so that
/// each copies for longer and more of it is written meanwhile (`kage bench drain`).
const PARALLEL: u16 = 4;

/// Most moves at once: each has a thread and two links here and there.
const MOST_PARALLEL: u16 = 64;

/// How long a host may take to say what room it has.
const LOOK: Duration = Duration::from_secs(2);

/// Between two words of how far it is where nothing else happens.
const TELL: Duration = Duration::from_millis(500);

/// What a drain hears.
enum Heard {
    /// A machine is at one host or the other; its report is still to come.
    Settled(UserName),
    /// A move has ended.
    Ended(UserName, HostName, Box<Result<MoveReport, ErrorBody>>),
    /// A host takes machines, with so much memory; or it does not answer.
    Room(HostName, Option<Ready>),
}

/// A drain under way.
struct Draining<'a> {
    daemon: &'a Arc<Daemon>,
    request: &'a DrainRequest,
    handle: &'a Handle,
    begun: Instant,
    plan: Plan,
    /// What hosts that answered have said.
    ready: BTreeMap<HostName, Ready>,
    /// Moves under way.
    moves: BTreeMap<UserName, String>,
    ended: Vec<DrainedImage>,
    cancelled: bool,
    tell: mpsc::UnboundedSender<Heard>,
}

impl Daemon {
    /// Begins to empty this host, or goes on with it: there is one drain at a time.
    ///
    /// # Errors
    /// A request that cannot be carried out.
    pub async fn begin_drain(self: &Arc<Self>, request: DrainRequest) -> Result<Operation, ErrorBody> {
        if request.parallel.is_some_and(|parallel| !(1..=MOST_PARALLEL).contains(&parallel)) {
            return Err(ErrorBody::bad_request(format!(
                "from 1 to {MOST_PARALLEL} moves can be made at once"
            )));
        }
        let handle = match self.operations.begin_only("drain") {
            Ok(handle) => handle,
            Err(same) => return Ok(*same),
        };
        let (daemon, id) = (self.clone(), handle.id());
        self.runtime.spawn(async move {
            let outcome = daemon.drain(&handle, &request).await;
            if let Ok(report) = &outcome {
                let details = json!({
                    "moved": report.moved, "stay": report.stay, "cancelled": report.cancelled,
                    "total_ms": report.total_ms, "worst_gap_ms": report.worst_gap_ms,
                });
                daemon.events.emit("drained", None, details);
            }
            handle.end(outcome.map(|report| json!(report)));
        });
        self.operations.get(&id, Duration::ZERO).await
    }

    async fn drain(
        self: &Arc<Self>,
        handle: &Handle,
        request: &DrainRequest,
    ) -> Result<DrainReport, ErrorBody> {
        let begun = Instant::now();
        self.set_cordoned(&self.me, true).await?;
        // Whoever chooses a target here has to see it, and so has whoever looks for an uncordon.
        let mut seen = self.seen.subscribe();
        let is_seen = seen.wait_for(|seen| seen.hosts.get(&self.me).is_some_and(|record| record.cordoned));
        let _ = tokio::time::timeout(LOOK, is_seen).await;
        let (tell, mut heard) = mpsc::unbounded_channel();
        let mut draining = Draining {
            daemon: self,
            request,
            handle,
            begun,
            plan: Plan::new(request.parallel.unwrap_or(PARALLEL).into()),
            ready: BTreeMap::new(),
            moves: BTreeMap::new(),
            ended: Vec::new(),
            cancelled: false,
            tell,
        };
        draining.ask_all().await;
        let mut stopped = draining.look().await?;
        let mut ticks = tokio::time::interval(TELL);
        loop {
            draining.offer();
            draining.begin();
            draining.say();
            if draining.plan.is_over() {
                let before = draining.plan.count();
                // A login that was under way, or a machine that came back.
                match draining.look().await {
                    Ok(now) => stopped = now,
                    // What became of those that were here is told in any case.
                    Err(error) => tracing::warn!(%error, "what else is here is not known"),
                }
                draining.offer();
                if draining.cancelled || draining.plan.count() == before {
                    break;
                }
                continue;
            }
            tokio::select! {
                Some(heard) = heard.recv() => draining.hear(heard).await,
                () = handle.cancelled(), if !draining.cancelled => draining.cancel("cancelled"),
                changed = seen.changed() => {
                    if changed.is_ok() && !draining.cancelled && !self.is_cordoned(&self.me) {
                        draining.cancel("the host was uncordoned");
                    }
                }
                _ = ticks.tick() => {}
            }
        }
        Ok(draining.report(stopped))
    }

    /// The machines that are here, and the users whose machines are stopped; blocks.
    fn leavers(&self) -> Result<(Vec<(UserName, Leaver)>, Vec<UserName>), ErrorBody> {
        let (mut here, mut stopped) = (Vec::new(), Vec::new());
        for (user, found) in self.directory.read_all::<ImageRecord>()?.0 {
            let record = found.record;
            if record.owner != self.me {
                continue;
            }
            let memory = self.known(&user).and_then(|image| image.status().memory);
            if record.wanted == Wanted::Stopped && memory.is_none() {
                stopped.push(user);
                continue;
            }
            let mirrors = self.replicas(&user);
            let all = || memory.map_or(0, |memory| u64::from(memory.populated().len()) * PAGE_SIZE as u64);
            let outlook = self.predictions.outlook(&user, now_ms());
            let places = self.predictions.places();
            let leaver = Leaver {
                bytes: mirrors.iter().map(|mirror| mirror.missing_bytes).min().unwrap_or_else(all),
                memory_bytes: record.profile.memory_bytes,
                user_at: outlook.at.and_then(|ap| Some(places.get(&ap)?.host.clone())),
                mirrors: mirrors.into_iter().map(|mirror| mirror.host).collect(),
                likely: outlook.forecast.map(|forecast| forecast.hosts).unwrap_or_default(),
            };
            here.push((user, leaver));
        }
        Ok((here, stopped))
    }
}

impl Draining<'_> {
    /// Asks every host for its room.
    async fn ask_all(&mut self) {
        let hosts: Vec<_> = self.daemon.seen.borrow().hosts.keys().cloned().collect();
        let asked: Vec<_> = hosts
            .into_iter()
            .filter(|host| *host != self.daemon.me)
            .map(|host| tokio::spawn(ask(self.daemon.clone(), host)))
            .collect();
        for answer in asked {
            if let Ok((host, Some(ready))) = answer.await {
                self.ready.insert(host, ready);
            }
        }
    }

    /// Looks which machines are here; returns those that are stopped.
    async fn look(&mut self) -> Result<Vec<UserName>, ErrorBody> {
        let daemon = self.daemon.clone();
        let (here, stopped) = blocking(move || daemon.leavers()).await?;
        if !self.cancelled {
            self.plan.found(here);
        }
        Ok(stopped)
    }

    /// Takes in which hosts take images.
    fn offer(&mut self) {
        let seen = self.daemon.seen.borrow().clone();
        let mut images: BTreeMap<&HostName, u64> = BTreeMap::new();
        let others = seen.images.iter().filter(|(user, _)| !self.plan.has(user));
        for (_, image) in others.filter(|(_, image)| image.wanted == Wanted::Running) {
            *images.entry(&image.owner).or_default() += 1;
        }
        let open = seen.hosts.iter().filter(|(_, record)| !record.cordoned);
        let rooms = open.filter_map(|(host, _)| {
            let ready = self.ready.get(host)?;
            let images = images.get(host).copied().unwrap_or(0);
            Some((host.clone(), Room { images, free_bytes: ready.memory_available_bytes }))
        });
        self.plan.offered(rooms.collect());
    }

    /// Begins every move that may begin.
    fn begin(&mut self) {
        while let Some((user, to)) = self.plan.begin() {
            let image = self.daemon.image(&user);
            let (settled, is_settled) = oneshot::channel::<()>();
            let request = MigrateRequest {
                to: Some(to.clone()),
                blackout: self.request.blackout,
                timeout: self.request.timeout,
                bandwidth: self.share(),
                ..MigrateRequest::default()
            };
            let id = self.daemon.launch(&image, to.clone(), request, Some(settled));
            self.moves.insert(user.clone(), id.clone());
            let (daemon, tell) = (self.daemon.clone(), self.tell.clone());
            tokio::spawn(async move {
                // Nothing is sent: it is dropped. A drain that is gone hears nothing.
                let _ = is_settled.await;
                let _ = tell.send(Heard::Settled(user.clone()));
                let outcome = daemon.operations.over(&id).await.and_then(report_of);
                let _ = tell.send(Heard::Ended(user, to, Box::new(outcome)));
            });
        }
    }

    /// What each move may take of the link.
    fn share(&self) -> Option<Rate> {
        let all = self.request.bandwidth.or(self.daemon.config.replicate.max_rate)?;
        let count = self.plan.count();
        let left = count.images - count.moved - count.stay;
        Some(all.divided(u64::from(self.request.parallel.unwrap_or(PARALLEL)).min(left).max(1)))
    }

    async fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::Settled(user) => self.plan.settled(&user),
            Heard::Room(host, Some(ready)) => {
                // Its memory as it was before any of this went there: the plan counts that itself.
                self.ready.entry(host).or_insert(ready);
            }
            Heard::Room(host, None) => {
                self.ready.remove(&host);
            }
            Heard::Ended(user, to, outcome) => {
                self.moves.remove(&user);
                let (came, image) = self.judge(&user, &to, *outcome).await;
                // The host may be down, or full.
                if matches!(came, Came::Refused(_)) {
                    let (daemon, tell) = (self.daemon.clone(), self.tell.clone());
                    tokio::spawn(async move {
                        let (host, ready) = ask(daemon, to).await;
                        let _ = tell.send(Heard::Room(host, ready));
                    });
                }
                self.plan.ended(&user, came);
                self.ended.retain(|before| before.user != user);
                self.ended.push(image);
            }
        }
    }

    /// What a move came to.
    async fn judge(
        &self,
        user: &UserName,
        to: &HostName,
        outcome: Result<MoveReport, ErrorBody>,
    ) -> (Came, DrainedImage) {
        let mut image = DrainedImage {
            user: user.clone(),
            to: Some(to.clone()),
            outcome: String::new(),
            reason: None,
            tries: 0,
            report: None,
        };
        let came = match outcome {
            Ok(report) => {
                let reason = report.reason.clone().unwrap_or_else(|| report.outcome.to_string());
                image.outcome = report.outcome.to_string();
                let came = match report.outcome {
                    MoveOutcome::HandedOver => Came::Gone,
                    MoveOutcome::KeptHere if blames_target(&reason) => Came::Refused(reason),
                    // By somebody else than this drain.
                    MoveOutcome::KeptHere if is_cancelled(&reason) && !self.cancelled => {
                        Came::Refused(reason)
                    }
                    MoveOutcome::KeptHere | MoveOutcome::InDoubt | MoveOutcome::Restarted => {
                        Came::Stays(reason)
                    }
                };
                image.report = Some(report);
                came
            }
            Err(error) => {
                let (daemon, name) = (self.daemon.clone(), user.clone());
                let record = blocking(move || daemon.existing(&name)).await.map(|found| found.record);
                match record {
                    Ok(record) if record.owner != self.daemon.me => {
                        (image.outcome, image.to) = ("left".to_owned(), Some(record.owner));
                        Came::Gone
                    }
                    Ok(record) if record.wanted == Wanted::Stopped => {
                        (image.outcome, image.to) = ("left".to_owned(), None);
                        Came::Gone
                    }
                    Ok(_) | Err(_) if error.code == Code::Cancelled => {
                        image.outcome = "kept".to_owned();
                        let reason = "cancelled".to_owned();
                        if self.cancelled { Came::Stays(reason) } else { Came::Refused(reason) }
                    }
                    Ok(_) | Err(_) => {
                        image.outcome = "failed".to_owned();
                        Came::Stays(error.message)
                    }
                }
            }
        };
        (came, image)
    }

    fn cancel(&mut self, reason: &str) {
        self.cancelled = true;
        self.plan.stop(reason);
        for id in self.moves.values() {
            // One that has just ended is none to cancel.
            let _ = self.daemon.operations.cancel(id);
        }
    }

    fn say(&self) {
        let count = self.plan.count();
        let elapsed = self.begun.elapsed();
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "about"
        )]
        let eta = |done: u64| (elapsed.as_secs_f64() * 1e3 * count.bytes_left as f64 / done as f64) as u64;
        let progress = DrainProgress {
            phase: if self.cancelled { "cancel" } else { "drain" }.to_owned(),
            images: count.images,
            moved: count.moved,
            stay: count.stay,
            moving: count.moving,
            elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            eta_ms: (count.bytes_done > 0).then(|| eta(count.bytes_done)),
        };
        self.handle.progress(json!(progress));
    }

    fn report(self, stopped: Vec<UserName>) -> DrainReport {
        let Self { daemon, begun, plan, ended, cancelled, .. } = self;
        let mut images = ended;
        for user in plan.staying() {
            if !images.iter().any(|image| image.user == *user) {
                images.push(DrainedImage {
                    user: user.clone(),
                    to: None,
                    outcome: "kept".to_owned(),
                    reason: None,
                    tries: 0,
                    report: None,
                });
            }
        }
        for image in &mut images {
            let (reason, tries) = plan.fate(&image.user);
            (image.reason, image.tries) = (reason.map(str::to_owned), tries);
        }
        let reports = || images.iter().filter_map(|image| image.report.as_ref());
        let worst = |figure: fn(&MoveReport) -> f64| reports().map(figure).fold(0.0, f64::max);
        let count = plan.count();
        DrainReport {
            host: daemon.me.clone(),
            cordoned: daemon.is_cordoned(&daemon.me),
            cancelled,
            moved: count.moved,
            stay: count.stay,
            total_ms: begun.elapsed().as_secs_f64() * 1e3,
            worst_blackout_ms: worst(|report| report.blackout_ms),
            worst_gap_ms: worst(|report| report.gap_ms),
            bytes_wire: reports().map(|report| report.bytes_wire).sum(),
            images,
            stopped,
        }
    }
}

/// Asks a host what room it has.
async fn ask(daemon: Arc<Daemon>, host: HostName) -> (HostName, Option<Ready>) {
    let call = Call::new(Method::GET, "/readyz").patience(LOOK);
    let answer = match daemon.address(&host) {
        Ok(address) => daemon.peers.call(&host, address, &call).await.and_then(|answer| answer.into_value()),
        Err(error) => Err(error),
    };
    let ready = answer.inspect_err(|error| tracing::debug!(%error, %host, "a host takes no machines now"));
    (host, ready.ok().filter(|ready: &Ready| ready.ready))
}

//! This host is the source of a handover.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kage_directory::ImageRecord;
use kage_machine::{HostName, Machine, PageSet, Term};
use kage_migrate::{
    Cause, Outcome, Report, Ticket,
    drive::{Control, source, source::SourceSide},
    report::{Drained, Moving},
};
use kage_replicate::{Given, Link};
use kage_wire::Purpose;
use serde_json::json;
use tokio::sync::{OwnedMutexGuard, oneshot};

use super::{CONNECT, MEASURES, new_handover, on_thread};
use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{CopyProgress, MigrateRequest, MoveProgress, State},
    },
    lifecycle::{Daemon, Image, Slot, Status, blocking},
    machines::{Addresses, MachineSpec, Via},
    mirrors::Departure,
    operations::Handle,
};

/// After the last page the heartbeat is watched for so long.
const AFTERGLOW: Duration = Duration::from_secs(1);

/// How long a move waits for the list of what its machine's disk lacks.
const DIGESTS: Duration = Duration::from_secs(5);

/// What the source's driver is lent.
pub struct Leaving {
    daemon: Arc<Daemon>,
    image: Arc<Image>,
    slot: OwnedMutexGuard<Slot>,
    target: HostName,
    addresses: Option<Addresses>,
    progress: Option<Tell>,
    departure: Option<Departure>,
}

/// Tells how far a move is.
pub struct Tell {
    handle: Arc<Handle>,
    phase: &'static str,
    said: Option<Instant>,
}

impl Tell {
    /// Between two words of the same phase.
    const OFTEN: Duration = Duration::from_millis(200);

    const fn new(handle: Arc<Handle>) -> Self {
        Self { handle, phase: "", said: None }
    }

    fn say(&mut self, copy: Option<CopyProgress>) {
        self.handle.progress(json!(MoveProgress { phase: self.phase.to_owned(), copy }));
    }
}

impl Leaving {
    pub fn new(
        daemon: &Arc<Daemon>,
        image: &Arc<Image>,
        slot: OwnedMutexGuard<Slot>,
        ticket: &Ticket,
        progress: Option<Tell>,
    ) -> Self {
        let seen = daemon.seen.borrow().clone();
        let of_record = |record: &ImageRecord| Addresses { vid: daemon.vid(record), ipv4: record.ipv4 };
        let addresses = slot.spec.as_ref().map(MachineSpec::addresses);
        let addresses = addresses.or_else(|| seen.images.get(&image.user).map(of_record));
        if let Some(addresses) = addresses {
            daemon.routes.hold(addresses.vid);
        }
        Self {
            daemon: daemon.clone(),
            image: image.clone(),
            slot,
            target: ticket.target.clone(),
            addresses,
            progress,
            departure: None,
        }
    }

    /// Leaves the image as the handover ended; gives the slot back.
    pub fn over(mut self, report: &Report) {
        self.departure = None;
        let (daemon, image) = (&self.daemon, &self.image);
        let mut leavings = None;
        match report.outcome {
            Outcome::HandedOver => {
                let number = self.slot.spec.as_ref().map(|spec| spec.number);
                let left = self.slot.machine.as_ref().map(|machine| machine.memory());
                image.following.left(&self.target);
                self.slot.tap = None;
                image.mirrors.streams.stop(true);
                daemon.end_here(image, &mut self.slot);
                if let Some(number) = number
                    && let Err(reason) = daemon.net.remove_tap(number)
                {
                    tracing::warn!(reason, "a tap was not removed");
                }
                // What is emptied keeps nothing.
                let keeps = daemon.config.replicate.followers > 0 && !daemon.is_cordoned(&daemon.me);
                leavings = left.filter(|_| keeps);
            }
            Outcome::KeptHere if self.slot.machine.is_some() => {
                image.update(|status| {
                    status.state = State::Running;
                    status.note = None;
                    status.operation = None;
                    status.term = report.term;
                });
                daemon.keep_mirrors(image);
            }
            // Nothing runs, or nothing is settled: looked at anew.
            Outcome::KeptHere | Outcome::InDoubt | Outcome::Restarted => image.update(|status| {
                status.operation = None;
                status.note.clone_from(&report.reason);
            }),
        }
        if let Some(Addresses { vid, .. }) = self.addresses {
            let term = if report.outcome == Outcome::HandedOver { report.term } else { Term(0) };
            daemon.routes.let_go(vid, term);
        }
        if let Some(left) = leavings
            && let Err(reason) = daemon.stay_as_mirror(image, &self.slot, &*left)
        {
            tracing::debug!(reason, user = %image.user, "what it left is not kept as a mirror");
        }
        if matches!(report.outcome, Outcome::Restarted | Outcome::InDoubt)
            || (report.outcome == Outcome::KeptHere && self.slot.machine.is_none())
        {
            let (daemon, user) = (daemon.clone(), image.user.clone());
            let reason = report.reason.clone().unwrap_or_else(|| "its handover failed".to_owned());
            self.daemon.runtime.spawn(async move { daemon.settle(user, reason).await });
        }
    }
}

impl SourceSide for Leaving {
    fn machine(&mut self) -> Option<&mut dyn Machine> {
        self.slot.machine.as_mut().map(|machine| machine.as_machine())
    }

    fn connect(&mut self, purpose: Purpose) -> Result<Box<dyn Link>, String> {
        self.daemon.link_to(&self.target, purpose, CONNECT)
    }

    fn mirror(&mut self) -> Option<Given> {
        let mirror = self.image.mirrors.streams.give(&self.target);
        // From now on, so that the stream is not one of those that wait.
        self.departure = Some(self.daemon.leaving.begin());
        mirror
    }

    fn harvested(&mut self, pages: &PageSet) {
        self.image.mirrors.streams.harvested(pages);
    }

    fn announced(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn source_released(&mut self) {
        // Nothing of it waits behind mirrors any more.
        self.departure = None;
        let Some(addresses) = self.addresses else { return };
        let begun = Instant::now();
        let flipped = self.daemon.routes.image(addresses, &Via::Host(self.target.clone()));
        self.daemon.metrics.observe("kage_route_switch_seconds", &[], begun.elapsed());
        if let Err(reason) = flipped {
            tracing::error!(reason, user = %self.image.user, "the route to the image's new host was not set");
        }
    }

    fn drain(&mut self) -> Drained {
        self.slot.tap.as_ref().map(|tap| self.daemon.net.drain(tap)).unwrap_or_default()
    }

    fn restart(&mut self) {
        // The machine has ended; once the slot is free the image is looked at anew and started.
        if let Some(mut machine) = self.slot.machine.take() {
            machine.end();
        }
        self.image.disk.back();
    }

    fn in_doubt(&mut self, cause: &Cause) {
        self.departure = None;
        self.image.set(State::InDoubt, Some(cause.to_string()));
        let details = json!({ "reason": cause.to_string(), "to": self.target });
        self.daemon.events.emit("in_doubt", Some(&self.image.user), details);
    }

    fn phase(&mut self, name: &'static str) {
        if let Some(tell) = &mut self.progress {
            (tell.phase, tell.said) = (name, None);
            tell.say(None);
        }
    }

    fn moving(&mut self, moving: &Moving) {
        if let Some(tell) = &mut self.progress
            && tell.said.is_none_or(|said| said.elapsed() >= Tell::OFTEN)
        {
            tell.said = Some(Instant::now());
            tell.say(Some(moving.into()));
        }
    }
}

impl Daemon {
    /// Moves an image that this host owns, and says what came of it.
    pub(crate) async fn carry_out(
        self: &Arc<Self>,
        image: &Arc<Image>,
        to: &HostName,
        request: &MigrateRequest,
        handle: Arc<Handle>,
        settled: Option<oneshot::Sender<()>>,
    ) -> Result<Report, ErrorBody> {
        handle.progress(json!({ "phase": "wait" }));
        let slot = handle.unless_cancelled(image.slot.clone().lock_owned()).await?;
        let (daemon, user) = (self.clone(), image.user.clone());
        let record = blocking(move || daemon.existing(&user)).await?.record;
        if record.owner != self.me {
            drop(slot);
            if settled.is_some() {
                return Err(self.went_to(&image.user, &record.owner));
            }
            let request = MigrateRequest { to: Some(to.clone()), ..request.clone() };
            return self.hand_on(&image.user, &record.owner, &request, &handle).await;
        }
        if slot.machine.is_none() || image.status().state == State::Failed {
            return Err(ErrorBody::new(Code::Busy, format!("{}'s machine is not running", image.user)));
        }
        handle.unless_cancelled(self.await_digests(image, &record, DIGESTS)).await??;
        let ticket = Ticket {
            user: image.user.clone(),
            term: record.term,
            handover: new_handover(),
            source: self.me.clone(),
            target: to.clone(),
        };
        image.update(|status| {
            status.state = State::Moving;
            status.operation = Some(handle.id());
        });
        let begun = Instant::now();
        let spec = self.source_spec(ticket, request);
        let (daemon, holder, control) = (self.clone(), image.clone(), handle.control());
        let handed =
            on_thread("kage-source", move || daemon.hand_over(&holder, slot, spec, &handle, &control)).await;
        let mut report = match handed {
            Ok(report) => report,
            // Nobody knows how far it came: what is here and what the directory says decide.
            Err(error) => {
                image.move_over();
                let (daemon, user, why) = (self.clone(), image.user.clone(), error.message.clone());
                self.runtime.spawn(async move { daemon.settle(user, why).await });
                return Err(error);
            }
        };
        drop(settled);
        let pulse = if report.outcome == Outcome::HandedOver || report.outcome == Outcome::KeptHere {
            tokio::time::sleep(AFTERGLOW).await;
            self.pulse_anywhere(&image.user, &report).await
        } else {
            Err(ErrorBody::failed("nothing runs"))
        };
        match pulse {
            Ok(pulse) => {
                // The guest's own word, but not beyond what can have been.
                let most = begun.elapsed().as_secs_f64() * 1e3;
                report.gap_ms = pulse.gap_ms.max(report.blackout_ms).min(most);
                report.stall_ms = pulse.stall_ms.min(most);
                if report.outcome == Outcome::HandedOver {
                    report.lost_frames += pulse.dropped_frames;
                }
            }
            // Without the guest's word the switch itself is the least it must have felt.
            Err(error) => {
                tracing::debug!(%error, "no heartbeat");
                report.gap_ms = report.blackout_ms;
                report.stall_ms = report.blackout_ms;
            }
        }
        self.tell_move(&report, request.bandwidth.or(self.config.replicate.max_rate).is_some());
        Ok(report)
    }

    /// The blocking part of a move.
    fn hand_over(
        self: &Arc<Self>,
        image: &Arc<Image>,
        mut slot: OwnedMutexGuard<Slot>,
        spec: source::SourceSpec,
        handle: &Arc<Handle>,
        control: &Control,
    ) -> Report {
        let number = slot.spec.as_ref().map(|spec| spec.number);
        let drops = |daemon: &Daemon, slot: &mut Slot| {
            let tap = number.map_or(0, |number| daemon.net.tap_drops(number));
            tap + slot.machine.as_mut().map_or(0, |machine| machine.dropped_frames())
        };
        let before = drops(self, &mut slot);
        if let Some(machine) = &mut slot.machine
            && let Err(error) = machine.heartbeat(true)
        {
            tracing::debug!(%error, "no heartbeat");
        }
        let mut side = Leaving::new(self, image, slot, &spec.ticket, Some(Tell::new(handle.clone())));
        let directory = self.directory.clone();
        let mut report = source::run(&spec, &mut side, &*directory, control);
        let tap = number.map_or(0, |number| self.net.tap_drops(number));
        report.lost_frames += tap.saturating_sub(before);
        side.over(&report);
        report
    }

    /// Writes a move into figures and events; `capped` where it may not have had all of the link.
    pub(crate) fn tell_move(&self, report: &Report, capped: bool) {
        let outcome = report.outcome.to_string();
        let labels = [("mode", report.mode.as_str()), ("outcome", outcome.as_str())];
        self.metrics.add("kage_handovers_total", &labels, 1);
        let mode = [("mode", report.mode.as_str())];
        if report.outcome == Outcome::HandedOver {
            let span = |ms: f64| Duration::from_secs_f64(ms.max(0.0) / 1e3);
            self.metrics.observe("kage_handover_total_seconds", &mode, span(report.total_ms));
            self.metrics.observe("kage_handover_blackout_seconds", &mode, span(report.blackout_ms));
        }
        for phase in &report.phases {
            self.metrics.add("kage_handover_bytes_total", &[("phase", &phase.name)], phase.bytes);
        }
        // Less says more of the machine than of the link; and a cap is not the link's.
        if let Some(copy) = report.phases.iter().find(|phase| phase.name == "copy" && phase.bytes >= MEASURES)
            && !capped
        {
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            self.link_carried(&report.to, copy.bytes as f64 * 1e3 / copy.ms.max(1.0));
        }
        self.metrics.add("kage_forwarded_frames_total", &[], report.forwarded_frames);
        self.metrics.add("kage_lost_frames_total", &[], report.lost_frames);
        self.events.emit(&outcome, Some(&report.user), json!(report));
    }
}

impl Image {
    /// Ends the status of a move that could not begin.
    fn move_over(&self) {
        self.update(|status: &mut Status| {
            status.operation = None;
            if status.state == State::Moving {
                status.state = State::Running;
            }
        });
    }
}

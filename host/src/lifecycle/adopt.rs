//! Machines that were here before this daemon, and machines whose process ended.
//!
//! What is found is judged by `kage-migrate`'s recovery rules; this module carries the verdict out.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use kage_directory::{ImageRecord, Records as _, Versioned, Wanted};
use kage_machine::UserName;
use kage_migrate::recover::{Found, Recovery, Scene, recover};
use serde_json::json;
use tokio::sync::OwnedMutexGuard;

use super::{Daemon, Image, Slot, blocking};
use crate::{
    api::{
        error::{Code, ErrorBody},
        types::State,
    },
    handover::Resumed,
    machines::{Adopted, MachineSpec, Via},
};

/// Why a machine is started when a daemon starts.
const NOT_FOUND: &str = "this host's daemon found no process of it";

/// Why a machine is started when a move of it was left open.
const LEFT_OPEN: &str = "a move of it was left open";

/// Between two looks at what was left open.
const SUPERVISION: Duration = Duration::from_secs(2);

impl Daemon {
    /// Takes over what an earlier daemon left; blocks. Done before any peer is listened to: what this host says
    /// that it holds is binding.
    pub fn adopt(self: &Arc<Self>) {
        for (user, adopted) in self.machines.adopt() {
            let image = self.image(&user);
            let Ok(mut slot) = image.slot.clone().try_lock_owned() else { continue };
            self.take_over(&image, &mut slot, adopted);
            let daemon = self.clone();
            self.runtime.spawn(async move { daemon.settle(user, NOT_FOUND.to_owned()).await });
        }
    }

    /// Takes what an earlier daemon left into its slot.
    fn take_over(self: &Arc<Self>, image: &Arc<Image>, slot: &mut Slot, adopted: Adopted) {
        let (label, found, mut machine) = match adopted {
            Adopted::Machine { label, found, machine } => (label, found, machine),
            Adopted::Unreachable(reason) => {
                let _ = image.disk.lend();
                let note = format!("its process is held here, and cannot be reached: {reason}");
                image.set(State::InDoubt, Some(note));
                if slot.unreachable.as_ref() != Some(&reason) {
                    self.events.emit("in_doubt", Some(&image.user), json!({ "reason": reason }));
                }
                slot.unreachable = Some(reason);
                return;
            }
        };
        let details = json!({ "found": format!("{found:?}").to_lowercase(), "pid": machine.pid() });
        self.events.emit("adopted", Some(&image.user), details);
        image.update(|status| {
            status.state = if found == Found::Running { State::Running } else { State::InDoubt };
            status.note = None;
            status.term = label.term;
            status.memory = Some(machine.memory());
            status.inspector = machine.inspector();
            status.pid = machine.pid();
        });
        let geometry = machine.memory().geometry();
        slot.spec = Some(MachineSpec::adopted(&label, geometry, self.config.network.prefix, self.net.mtu()));
        slot.unreachable = None;
        slot.tap = machine.take_tap();
        slot.ticket = label.ticket;
        self.listen_to_disk(image, &mut *machine);
        slot.machine = Some(machine);
    }

    /// Looks again for a machine that could not be reached; whether that is settled, either way.
    fn look_again(self: &Arc<Self>, image: &Arc<Image>, slot: &mut Slot) -> bool {
        match self.machines.adopt_one(&image.user) {
            Some(adopted) => self.take_over(image, slot, adopted),
            None => {
                slot.unreachable = None;
                image.disk.back();
                image.update(|status| *status = super::Status::default());
            }
        }
        slot.unreachable.is_none()
    }

    /// Starts what should run here and does not.
    ///
    /// # Errors
    /// When the directory does not answer; the call is made again later.
    pub async fn start_missing(self: &Arc<Self>) -> Result<(), ErrorBody> {
        let daemon = self.clone();
        let records = blocking(move || Ok(daemon.directory.read_all::<ImageRecord>()?.0)).await?;
        for (user, found) in records.into_iter().filter(|(_, found)| found.record.owner == self.me) {
            let daemon = self.clone();
            self.runtime.spawn(async move {
                daemon.settle(user.clone(), NOT_FOUND.to_owned()).await;
                // Of one that is stopped too: its user may log in anywhere once all of it is here.
                if found.record.disk_origin.is_some() {
                    daemon.pull(&daemon.image(&user));
                }
            });
        }
        Ok(())
    }

    /// Looks after what a move left open: an intent that its source could not clear while the directory was away keeps
    /// the image from being stopped or started. Ends with the daemon.
    pub async fn supervise(daemon: Weak<Self>) {
        loop {
            tokio::time::sleep(SUPERVISION).await;
            let Some(daemon) = daemon.upgrade() else { return };
            let seen = daemon.seen.borrow().clone();
            let mine = |record: &ImageRecord| record.owner == daemon.me && record.intent.is_some();
            for (user, _) in seen.images.iter().filter(|(_, record)| mine(record)) {
                let image = daemon.image(user);
                // Whoever is at work on it settles it; one that cannot be reached is looked at again already.
                let Ok(slot) = image.slot.clone().try_lock_owned() else { continue };
                if slot.unreachable.is_some() {
                    continue;
                }
                let (reader, name) = (daemon.clone(), user.clone());
                // Nobody has the slot, so that no move of this host has an intent of its own in there.
                let found = blocking(move || Ok((reader.record(&name)?, slot))).await;
                if let Ok((Some(found), slot)) = found
                    && mine(&found.record)
                {
                    drop(slot);
                    let (daemon, user) = (daemon.clone(), user.clone());
                    tokio::spawn(async move { daemon.settle(user, LEFT_OPEN.to_owned()).await });
                }
            }
        }
    }

    /// Acts on the end of a machine's process.
    pub(super) async fn after_end(self: &Arc<Self>, user: UserName, incarnation: u64, seen: String) {
        let Some(image) = self.known(&user) else { return };
        {
            // While a move holds the slot the handover sees the same end and decides.
            let mut slot = image.slot.lock().await;
            if slot.incarnation != incarnation {
                return;
            }
            let Some(machine) = slot.machine.as_mut() else { return };
            if let Some(reason) = machine.failure() {
                // The guest's own fault would come again; its memory is kept for `kage logs`.
                image.set(State::Failed, Some(reason.clone()));
                self.events.emit("guest_failed", Some(&user), json!({ "reason": reason }));
                return;
            }
            machine.end();
            image.disk.back();
            slot.machine = None;
            slot.incarnation += 1;
        }
        self.events.emit("died", Some(&user), json!({ "reason": seen }));
        self.settle(user, seen).await;
    }

    /// Brings an image here to where the directory and what is found say it belongs.
    pub(crate) async fn settle(self: &Arc<Self>, user: UserName, reason: String) {
        let image = self.image(&user);
        let mut slot = image.slot.clone().lock_owned().await;
        let begun = Instant::now();
        loop {
            let (daemon, holder, why) = (self.clone(), image.clone(), reason.clone());
            let next = blocking(move || Ok(daemon.settle_held(&holder, slot, &why, begun))).await;
            match next {
                Ok(Next::Settled) => return,
                Ok(Next::Again(guard)) => slot = guard,
                Ok(Next::Resume(guard, resumed)) => {
                    if !self.resume(&image, guard, *resumed).await {
                        tokio::time::sleep(super::AGAIN).await;
                    }
                    // What a resumed handover ended with is judged once more.
                    slot = image.slot.clone().lock_owned().await;
                }
                Ok(Next::Wait(guard)) => {
                    tokio::time::sleep(super::AGAIN).await;
                    slot = guard;
                }
                Ok(Next::Later) => {
                    tokio::time::sleep(super::AGAIN).await;
                    slot = image.slot.clone().lock_owned().await;
                }
                Err(error) => {
                    image.set(State::Failed, Some(error.message));
                    return;
                }
            }
        }
    }

    fn settle_held(
        self: &Arc<Self>,
        image: &Arc<Image>,
        mut slot: OwnedMutexGuard<Slot>,
        reason: &str,
        begun: Instant,
    ) -> Next {
        if slot.unreachable.is_some() && !self.look_again(image, &mut slot) {
            return Next::Later;
        }
        let found = slot.machine.as_mut().map_or(Found::None, |machine| machine.found());
        let record = self.record(&image.user);
        let scene = Scene {
            me: &self.me,
            user: &image.user,
            found,
            label: slot.ticket.as_ref(),
            record: record.as_ref().map(|found| found.as_ref().map(|found| &found.record)).map_err(|_| ()),
        };
        let verdict = recover(&scene);
        tracing::debug!(user = %image.user, ?found, ?verdict, "looked at");
        let record = record.ok().flatten();
        let wanted = record.as_ref().map_or(Wanted::Stopped, |found| found.record.wanted);
        match verdict {
            Recovery::Nothing => {
                image.update(|status| *status = super::Status::default());
                Next::Settled
            }
            Recovery::End => {
                self.end_here(image, &mut slot);
                // The record may still want this host to start it.
                match record {
                    Some(found) if found.record.owner == self.me => Next::Again(slot),
                    _ => Next::Settled,
                }
            }
            Recovery::Keep | Recovery::Run if wanted == Wanted::Stopped && record.is_some() => {
                if let Some(found) = &record {
                    self.take_down(image, &mut slot, &found.record);
                }
                Next::Settled
            }
            Recovery::Keep | Recovery::Run => match record {
                Some(found) => {
                    if let Err(error) = self.keep(image, &mut slot, &found.record) {
                        image.set(State::Failed, Some(error.message));
                    }
                    Next::Settled
                }
                // It runs, and the directory is away: judged again once it answers.
                None => Next::Wait(slot),
            },
            Recovery::Start => {
                let Some(Versioned { revision, record }) = record else { return Next::Wait(slot) };
                if record.wanted == Wanted::Stopped {
                    self.take_down(image, &mut slot, &record);
                    return Next::Settled;
                }
                if !slot.restarts.allow(Instant::now()) {
                    let note = format!(
                        "its process ended too often ({reason}); `kage start {}` tries again",
                        image.user
                    );
                    self.end_here(image, &mut slot);
                    image.set(State::Failed, Some(note.clone()));
                    self.events.emit("gave_up", Some(&image.user), json!({ "reason": note }));
                    return Next::Settled;
                }
                match self.start_anew(image, &mut slot, revision, record, false) {
                    Ok(record) => {
                        self.metrics.add("kage_restarts_total", &[], 1);
                        let details = json!({
                            "outcome": "restarted", "reason": reason, "term": record.term,
                            "ms": begun.elapsed().as_secs_f64() * 1e3,
                        });
                        self.events.emit("restarted", Some(&image.user), details);
                    }
                    // The swap was not made, or is not known to be: what the directory says next decides.
                    Err(error) if matches!(error.code, Code::Unreachable | Code::OwnershipLost) => {
                        slot.restarts.uncount();
                        tracing::warn!(user = %image.user, %error, "a machine is not started again yet");
                        image.set(State::InDoubt, Some(error.message));
                        return Next::Wait(slot);
                    }
                    Err(error) => {
                        tracing::error!(user = %image.user, %error, "a machine was not started again")
                    }
                }
                Next::Settled
            }
            Recovery::Wait => {
                image.set(State::InDoubt, Some("waiting for the directory to say who owns it".to_owned()));
                Next::Wait(slot)
            }
            Recovery::Source(ticket, source, actions) => {
                let note = format!("a handover to {} stood open; asking it", ticket.target);
                image.set(State::InDoubt, Some(note));
                Next::Resume(slot, Box::new(Resumed::Source(ticket, source, actions)))
            }
            Recovery::Target(ticket, target, actions) => {
                let note = format!("a handover from {} stood open; settling it", ticket.source);
                image.set(State::InDoubt, Some(note));
                Next::Resume(slot, Box::new(Resumed::Target(ticket, target, actions)))
            }
        }
    }

    /// Goes on with a machine that is this host's: gate open, route set, listened to.
    fn keep(
        self: &Arc<Self>,
        image: &Arc<Image>,
        slot: &mut Slot,
        record: &ImageRecord,
    ) -> Result<(), ErrorBody> {
        let Some(mut machine) = slot.machine.take() else { return Ok(()) };
        let result = self.spec(&image.user, record).and_then(|spec| {
            match machine.found() {
                Found::Paused => machine.resume()?,
                Found::Gated => machine.open_gate()?,
                Found::None | Found::Shell | Found::Running | Found::Released => {}
            }
            machine.relabel(&spec.label())?;
            self.routes.image(spec.addresses(), &Via::Tap).map_err(ErrorBody::failed)?;
            Ok(spec)
        });
        match result {
            Ok(spec) => {
                slot.ticket = None;
                self.install(image, slot, spec, machine);
                self.keep_mirrors(image);
                Ok(())
            }
            Err(error) => {
                slot.machine = Some(machine);
                Err(error)
            }
        }
    }

    /// Ends the process here; the image is another host's, or starts anew.
    pub(crate) fn end_here(&self, image: &Image, slot: &mut Slot) {
        slot.incarnation += 1;
        (slot.spec, slot.ticket, slot.tap) = (None, None, None);
        if let Some(mut machine) = slot.machine.take() {
            machine.end();
        }
        image.disk.back();
        image.update(|status| *status = super::Status::default());
    }
}

/// What follows a look at an image.
enum Next {
    /// Nothing.
    Settled,
    /// Another look.
    Again(OwnedMutexGuard<Slot>),
    /// Another look after a while.
    Wait(OwnedMutexGuard<Slot>),
    /// Another look after a while, with the slot free for whoever asks meanwhile.
    Later,
    /// An open handover goes on.
    Resume(OwnedMutexGuard<Slot>, Box<Resumed>),
}

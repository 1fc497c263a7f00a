//! This host is the target of a handover.

use std::{sync::Arc, time::Duration};

use kage_directory::{DirectoryError, DiskOrigin, ImageRecord, Versioned, Wanted};
use kage_machine::{HandoverId, HostName, Machine, Term, UserName};
use kage_migrate::{
    Cause, Ticket,
    drive::target::{MirrorSide, TargetHost, TargetSide},
    recover::Found,
    target::TargetOutcome,
};
use kage_replicate::{Link, digest::DigestTable, link::TlsLink};
use kage_wire::{
    Purpose,
    handover::{Follow, Prepare},
};
use serde_json::json;
use tokio::sync::OwnedMutexGuard;

use crate::{
    api::{error::ErrorBody, types::State},
    lifecycle::{AGAIN, Daemon, Image, Slot, blocking},
    machines::{Hosted, MachineSpec, Via},
    mirrors::{Parts, Shelf},
};

/// How long a former copy may take to be gone before a new one is taken.
const SLOT: Duration = Duration::from_secs(2);

/// The daemon as the sessions see it.
struct Receiving(Arc<Daemon>);

impl TargetHost for Receiving {
    fn prepare(
        &self,
        ticket: &Ticket,
        request: &Prepare,
        mirror: Option<Box<dyn MirrorSide>>,
    ) -> Result<Box<dyn TargetSide>, String> {
        let side = Arriving::prepare(&self.0, ticket, request, mirror.and_then(Shelf::from_side))?;
        Ok(Box::new(side))
    }

    fn follow(
        &self,
        owner: &HostName,
        request: &Follow,
        kept: Option<Box<dyn MirrorSide>>,
    ) -> Result<Box<dyn MirrorSide>, String> {
        self.0.take_in_mirror(owner, request, kept)
    }

    fn owned_by(&self, host: &HostName, user: &UserName, term: Term) -> Result<(), String> {
        self.0.owned_by(host, user, term).map(|_| ())
    }

    fn holds(&self, user: &UserName) -> bool {
        let Some(image) = self.0.known(user) else { return false };
        match image.slot.try_lock() {
            Ok(slot) if slot.unreachable.is_some() => true,
            Ok(mut slot) => slot.machine.as_mut().is_some_and(|machine| {
                !matches!(machine.found(), Found::None | Found::Shell | Found::Released)
            }),
            // Somebody is at work on it, and will be asked again.
            Err(_) => true,
        }
    }
}

impl Daemon {
    /// The record of an image that the directory says that host owns under that term; blocks.
    ///
    /// # Errors
    /// Whom it names instead, in words.
    pub(crate) fn owned_by(
        &self,
        host: &HostName,
        user: &UserName,
        term: Term,
    ) -> Result<ImageRecord, String> {
        let record = self.existing(user).map_err(|error| error.message)?.record;
        if record.owner == *host && record.term == term {
            return Ok(record);
        }
        Err(format!("the directory names {} as owner under term {}", record.owner, record.term.0))
    }

    /// Serves a peer's link of a handover until it ends; blocks.
    pub(crate) fn take_handover_link(self: &Arc<Self>, mut link: TlsLink, purpose: Purpose) {
        let peer = link.peer().clone();
        if let Err(error) = link.welcome(self.me.clone(), purpose) {
            tracing::debug!(%peer, %error, "a link ended");
            return;
        }
        match purpose {
            Purpose::Switch => self.targets.serve_switch(&Receiving(self.clone()), Box::new(link)),
            Purpose::Bulk { handover } => self.attach_bulk(handover, link),
            Purpose::Mirror => self.targets.serve_mirror(&Receiving(self.clone()), Box::new(link)),
            Purpose::Directory => {}
        }
    }

    /// Before a machine whose gate was never opened here is started anew: has the record say that the source has its
    /// disk, for as long as it takes. Whether it may be started. The slot is held.
    pub(crate) async fn stand_on_source(self: &Arc<Self>, image: &Arc<Image>, source: &HostName) -> bool {
        loop {
            let (daemon, holder, host) = (self.clone(), image.clone(), source.clone());
            match blocking(move || daemon.found_on_source(&holder.user, &host)).await {
                Ok(None) => return true,
                Ok(Some(reason)) => {
                    self.events.emit("start_failed", Some(&image.user), json!({ "reason": reason }));
                    image.set(State::Failed, Some(reason));
                    return false;
                }
                // What is here must not become the disk: nothing starts until the directory answers.
                Err(error) => {
                    image.set(State::InDoubt, Some(error.message));
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }

    /// Returns why the machine cannot be started, if it cannot.
    fn found_on_source(&self, user: &UserName, source: &HostName) -> Result<Option<String>, ErrorBody> {
        loop {
            let Some(Versioned { revision, record }) = self.record(user)? else { return Ok(None) };
            let (next, reason) = match Ground::of(&record, &self.me, source) {
                Ground::Firm => return Ok(None),
                Ground::Source(next) => (next, None),
                Ground::Split(next) => {
                    let origin =
                        record.disk_origin.as_ref().map_or("another host", |origin| origin.host.as_str());
                    let reason = format!(
                        "its machine ended before it could run here; what it wrote last is at host {source}, the rest \
                         of its disk at host {origin}, and what is here is older: whoever starts it goes on without \
                         what host {source} has"
                    );
                    (next, Some(reason))
                }
            };
            match self.swap(user, revision, &next) {
                Ok(_) => return Ok(reason),
                Err(DirectoryError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The slot of an image that is to arrive; blocks.
    pub(crate) fn slot_for_arrival(&self, image: &Image) -> Result<OwnedMutexGuard<Slot>, String> {
        self.runtime
            .block_on(async { tokio::time::timeout(SLOT, image.slot.clone().lock_owned()).await })
            .map_err(|_| "something of it is still under way at this host; try again".to_owned())
    }

    fn attach_bulk(&self, handover: HandoverId, link: TlsLink) {
        self.targets.attach_bulk(handover, Box::new(link));
    }
}

/// What the target's driver is lent.
pub struct Arriving {
    daemon: Arc<Daemon>,
    image: Arc<Image>,
    slot: OwnedMutexGuard<Slot>,
    machine: Box<dyn Hosted>,
    spec: MachineSpec,
    term: Term,
    /// What it held at the switch, as its source knows too.
    held: Option<DigestTable>,
    /// Its gate was opened. Before that its disk commits nothing here, and the source's log is the current one.
    opened: bool,
}

/// What a machine whose gate was never opened here is started from.
enum Ground {
    /// Nothing is in the way of a start.
    Firm,
    /// The record as it must be first: the source has the disk.
    Source(Box<ImageRecord>),
    /// Parts of the disk are at the source, others at its origin; no start can have both.
    Split(Box<ImageRecord>),
}

impl Ground {
    fn of(record: &ImageRecord, me: &HostName, source: &HostName) -> Self {
        if record.owner != *me || record.profile.disk_bytes == 0 {
            return Self::Firm;
        }
        let here = DiskOrigin { host: source.clone(), since: record.term };
        match &record.disk_origin {
            None => Self::Source(Box::new(ImageRecord { disk_origin: Some(here), ..record.clone() })),
            // A swap that was not answered has applied.
            Some(origin) if *origin == here => Self::Firm,
            // Wanted no more, so that no daemon starts it on its own.
            Some(_) => Self::Split(Box::new(ImageRecord { wanted: Wanted::Stopped, ..record.clone() })),
        }
    }
}

impl Arriving {
    fn prepare(
        daemon: &Arc<Daemon>,
        ticket: &Ticket,
        request: &Prepare,
        mirror: Option<Box<Shelf>>,
    ) -> Result<Self, String> {
        let record = daemon.owned_by(&ticket.source, &ticket.user, ticket.term)?;
        if record.wanted == Wanted::Stopped {
            return Err("its user wants it stopped".to_owned());
        }
        if mirror.is_some() && record.disk_origin.is_some() {
            return Err("its mirror here is of another stay than its disk; try again".to_owned());
        }
        if record.ipv4.is_some() && !daemon.config.uses_ipv4() {
            return Err(
                "it has an IPv4 address, and this host no IPv4: give `ipv4` in [network] as elsewhere"
                    .to_owned(),
            );
        }
        let image = daemon.image(&ticket.user);
        let mut slot = daemon.slot_for_arrival(&image)?;
        if slot.unreachable.is_some() {
            return Err("this host holds a machine of it that cannot be reached".to_owned());
        }
        if let Some(machine) = &mut slot.machine {
            match machine.found() {
                Found::None | Found::Shell | Found::Released => daemon.end_here(&image, &mut slot),
                Found::Running | Found::Gated | Found::Paused => {
                    return Err("this host holds a machine of it".to_owned());
                }
            }
        }
        let spec = daemon.spec(&ticket.user, &record).map_err(|error| error.message)?;
        if spec.geometry != request.geometry {
            return Err("its size in the directory is another than its machine's".to_owned());
        }
        slot.tap = None;
        let Parts { mut machine, tap: kept } = match mirror {
            Some(shelf) => {
                shelf.into_parts(request.base).ok_or("the process of its mirror here has ended; try again")?
            }
            None => {
                // First: what has the log may have a tap of that name too.
                daemon.lend_log(&image, &record, true).map_err(|error| error.message)?;
                let tap = daemon.fresh_tap(spec.number).map_err(|error| {
                    image.disk.back();
                    error.message
                })?;
                let kept = tap.try_clone().ok();
                Parts {
                    machine: daemon.machines.shell(&spec, tap).inspect_err(|_| image.disk.back())?,
                    tap: kept,
                }
            }
        };
        if machine.base() != request.base {
            machine.end();
            image.disk.back();
            return Err(format!(
                "image {:?} is another build at host {} than what this machine runs; install the same at both hosts, \
                 and stop and start the machine where its own is the older",
                spec.profile.image, daemon.me
            ));
        }
        let mut label = spec.label();
        label.ticket = Some(ticket.clone());
        if let Err(error) = machine.relabel(&label) {
            machine.end();
            image.disk.back();
            return Err(error.to_string());
        }
        daemon.listen_to_disk(&image, &mut *machine);
        slot.tap = kept;
        slot.ticket = Some(ticket.clone());
        daemon.routes.hold(spec.vid);
        let term = ticket.term.next();
        Ok(Self { daemon: daemon.clone(), image, slot, machine, spec, term, held: None, opened: false })
    }

    /// With a machine that an earlier daemon had taken.
    pub fn adopted(
        daemon: &Arc<Daemon>,
        image: &Arc<Image>,
        mut slot: OwnedMutexGuard<Slot>,
    ) -> Option<Self> {
        let spec = slot.spec.clone()?;
        let mut machine = slot.machine.take()?;
        // One that is gone may have run.
        let opened = matches!(machine.found(), Found::Running | Found::None);
        let term = slot.ticket.as_ref().map_or(spec.term, |ticket| ticket.term.next());
        daemon.routes.hold(spec.vid);
        let (daemon, image) = (daemon.clone(), image.clone());
        Some(Self { daemon, image, slot, machine, spec, term, held: None, opened })
    }

    fn route_here(&self) {
        if let Err(reason) = self.daemon.routes.image(self.spec.addresses(), &Via::Tap) {
            tracing::error!(reason, user = %self.image.user, "the route to an arrived machine was not set");
        }
    }
}

impl TargetSide for Arriving {
    fn machine(&mut self) -> &mut dyn Machine {
        self.machine.as_machine()
    }

    fn switched(&mut self, held: DigestTable) {
        self.held = Some(held);
    }

    fn target_started(&mut self) {
        self.route_here();
    }

    fn target_running(&mut self) {
        self.opened = true;
        self.route_here();
        let (memory, pid, term) = (self.machine.memory(), self.machine.pid(), self.term);
        let inspector = self.machine.inspector();
        self.image.update(|status| {
            *status = crate::lifecycle::Status {
                state: State::Running,
                term,
                memory: Some(memory),
                inspector,
                pid,
                ..Default::default()
            };
        });
    }

    fn restart(&mut self) {
        // Its machine has ended; once the slot is free the image is looked at anew and started.
        self.machine.end();
    }

    fn in_doubt(&mut self, cause: &Cause) {
        self.image.set(State::InDoubt, Some(cause.to_string()));
        let details = json!({ "reason": cause.to_string() });
        self.daemon.events.emit("in_doubt", Some(&self.image.user), details);
    }

    fn ended(self: Box<Self>, ticket: &Ticket, outcome: &TargetOutcome) {
        let Self { daemon, image, mut slot, mut machine, mut spec, term, held, opened } = *self;
        let vid = spec.vid;
        slot.ticket = None;
        match outcome {
            TargetOutcome::Owner => {
                spec.term = term;
                if let Err(error) = machine.relabel(&spec.label()) {
                    tracing::warn!(%error, "an arrived machine keeps its old label");
                }
                let geometry = spec.geometry;
                image.following.came(&ticket.source);
                daemon.ask_for_history(&image.user, &ticket.source);
                daemon.install(&image, &mut slot, spec, machine);
                if let Some(held) = held {
                    image.mirrors.streams.begin_from(held, geometry);
                }
                // Its former host has it as it was at the switch: the cheapest mirror there is.
                if daemon.config.replicate.followers > 0 && !daemon.is_cordoned(&ticket.source) {
                    daemon.mirror_to(&image.user, &[ticket.source.clone()]);
                }
                daemon.pull(&image);
                daemon.routes.let_go(vid, term);
                let details = json!({ "from": ticket.source, "term": term });
                daemon.events.emit("arrived", Some(&image.user), details);
            }
            TargetOutcome::Restarted(cause) => {
                machine.end();
                image.disk.back();
                slot.tap = None;
                daemon.routes.let_go(vid, Term(0));
                image.set(State::Starting, Some(cause.to_string()));
                let (again, reason, source) = (daemon.clone(), cause.to_string(), ticket.source.clone());
                daemon.runtime.spawn(async move {
                    // With the slot held: nobody starts it before.
                    if !opened && !again.stand_on_source(&image, &source).await {
                        return;
                    }
                    drop(slot);
                    again.settle(image.user.clone(), reason).await;
                });
            }
            TargetOutcome::Nothing(cause) => {
                machine.end();
                image.disk.back();
                slot.tap = None;
                if let Err(reason) = daemon.net.remove_tap(spec.number) {
                    tracing::warn!(reason, "a tap was not removed");
                }
                daemon.routes.let_go(vid, Term(0));
                image.update(|status| *status = crate::lifecycle::Status::default());
                let details = json!({ "from": ticket.source, "reason": cause.to_string() });
                daemon.events.emit("not_taken", Some(&image.user), details);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_ran_here_is_started_from_its_source() {
        let (me, source): (HostName, HostName) = ("b".parse().unwrap(), "a".parse().unwrap());
        let origin = |host: &str, since| Some(DiskOrigin { host: host.parse().unwrap(), since: Term(since) });
        let record = |owner: &str, disk_bytes, disk_origin| ImageRecord {
            term: Term(4),
            owner: owner.parse().unwrap(),
            intent: None,
            backup: None,
            wanted: Wanted::Running,
            number: kage_machine::ImageNumber(7),
            indices: ImageRecord::FIRST_INDICES,
            ipv4: None,
            disk_origin,
            profile: kage_directory::Profile { disk_bytes, ..crate::fake::profile() },
        };
        let firm = |record| matches!(Ground::of(&record, &me, &source), Ground::Firm);
        assert!(firm(record("b", 0, None)) && firm(record("a", 4096, None)));
        assert!(firm(record("b", 4096, origin("a", 4))), "said already");
        match Ground::of(&record("b", 4096, None), &me, &source) {
            Ground::Source(next) => assert_eq!(*next, record("b", 4096, origin("a", 4))),
            Ground::Firm | Ground::Split(_) => panic!("the source has the disk"),
        }
        for before in [origin("o", 3), origin("a", 3)] {
            match Ground::of(&record("b", 4096, before.clone()), &me, &source) {
                Ground::Split(next) => {
                    assert_eq!((next.disk_origin, next.wanted), (before, Wanted::Stopped));
                }
                Ground::Firm | Ground::Source(_) => panic!("no host has all of it"),
            }
        }
    }
}

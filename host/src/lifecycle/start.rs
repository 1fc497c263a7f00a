//! Login, start, stop.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use kage_directory::{
    DirectoryError, ImageRecord, Profile, Revision, Versioned, Wanted, allocate_image_number,
};
use kage_machine::{HostName, ImageNumber, Term, UserName, Vid, identity::ApName};
use serde_json::json;
use tokio::sync::OwnedMutexGuard;

use super::{Daemon, Image, Slot, blocking, check_key, decide};
use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{Given, LoginReply, LoginRequest, State},
    },
    machines::{MachineSpec, Via},
    resources,
};

/// How long a started machine may take to answer its first packet.
const FIRST_ANSWER: Duration = Duration::from_secs(10);

/// Room for one user's keys, as the machine's configuration page has it.
const KEYS_MAX: usize = 12 << 10;

/// How a machine is started.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// The caller brought a key.
    pub with_key: bool,
    /// Even when one is ready, make it on the spot.
    pub cold: bool,
    /// The caller made the record under this term, to start the machine: no other swap is needed.
    pub fresh: Option<Term>,
}

/// How long the guest may take to write what it holds before its machine is ended.
const SYNC: Duration = Duration::from_secs(10);

/// How often a login looks again when the machine went elsewhere meanwhile.
const MOST_TURNS: u32 = 4;

/// What a login found to do.
enum Claimed {
    /// Another host has to do it.
    Elsewhere(HostName),
    /// To ask its owner for it.
    Take(HostName, Vid),
    /// This host; with the term, when the record was made for it, and where to bring it then.
    Here { fresh: Option<Term>, near: Option<HostName> },
}

/// Where a login has to be done.
#[derive(Debug)]
pub enum Login {
    /// Here, and it is done.
    Done(LoginReply),
    /// By another host.
    Ask(HostName),
}

impl Daemon {
    /// Starts or finds a user's machine, when that is this host's to do; `passed_on` by a host that found so.
    ///
    /// # Errors
    /// [`ErrorBody`]; nothing is lost.
    pub async fn login(
        self: &Arc<Self>,
        user: &UserName,
        request: &LoginRequest,
        passed_on: bool,
    ) -> Result<Login, ErrorBody> {
        let key = request.key.as_deref().map(check_key).transpose()?;
        let begun = Instant::now();
        let (mut taken, mut turns) = (None, 0);
        let (mut reply, fresh, near) = loop {
            let (daemon, name, wish, key) = (self.clone(), user.clone(), request.clone(), key.clone());
            let (fresh, near) = match blocking(move || daemon.claim(&name, &wish, key, passed_on)).await? {
                Claimed::Elsewhere(host) => return Ok(Login::Ask(host)),
                Claimed::Take(owner, vid) => {
                    // Once the record is seen, the directory's view wants a route to a tap that is not there yet.
                    self.routes.hold(vid);
                    let given = self.take(user, &owner).await;
                    if !matches!(given, Ok(Given { term: Some(_) })) {
                        self.routes.let_go(vid, Term(0));
                    }
                    taken = given?.term;
                    if taken.is_none() {
                        return Ok(Login::Ask(owner));
                    }
                    self.ask_for_history(user, &owner);
                    continue;
                }
                Claimed::Here { fresh, near } => (fresh, near),
            };
            tracing::debug!(%user, took = ?begun.elapsed(), "claimed");
            let how = How { with_key: request.key.is_some(), cold: request.cold, fresh: fresh.or(taken) };
            turns += 1;
            match self.start(user, begun, how).await {
                Ok(reply) => break (reply, fresh, near),
                // Somebody else was faster: where it is now decides.
                Err(error) if error.code == Code::OwnershipLost && turns < MOST_TURNS => {}
                Err(error) => return Err(error),
            }
        };
        if fresh.is_some() {
            let daemon = self.clone();
            self.runtime.spawn_blocking(move || daemon.reserve_number());
        }
        self.learn_login(user, request).await;
        self.metrics.add("kage_logins_total", &[], 1);
        if !reply.found {
            self.metrics.observe("kage_login_start_seconds", &[], begun.elapsed());
        }
        if let Some(place) = request.at.as_deref().and_then(|at| self.place(at).ok())
            && !reply.found
            && place != self.me
            && self.is_cordoned(&place)
        {
            reply.note = Some(format!("host {place} is cordoned"));
        }
        match near {
            Some(at) if !reply.found => Ok(Login::Done(self.bring_near(reply, at).await)),
            _ => Ok(Login::Done(reply)),
        }
    }

    /// Who logs in at an access point is there.
    async fn learn_login(self: &Arc<Self>, user: &UserName, request: &LoginRequest) {
        let at = request.at.as_deref();
        let is_host = |at: &str| {
            at.parse().is_ok_and(|at: HostName| at == self.me || self.seen.borrow().hosts.contains_key(&at))
        };
        let Some(ap) = at.filter(|at| !is_host(at)).and_then(|at| at.parse::<ApName>().ok()) else { return };
        let (daemon, user, now) = (self.clone(), user.clone(), crate::events::now_ms());
        let learned = blocking(move || {
            daemon.learn(&user, &ap, now);
            Ok(())
        });
        if let Err(error) = learned.await {
            tracing::error!(%error, "a login was not learned from");
        }
    }

    /// Makes the image's record, or adds the key to it.
    fn claim(
        self: &Arc<Self>,
        user: &UserName,
        request: &LoginRequest,
        key: Option<String>,
        passed_on: bool,
    ) -> Result<Claimed, ErrorBody> {
        let place = request.at.as_deref().map(|at| self.place(at)).transpose()?;
        loop {
            let found = self.record(user)?;
            let record = found.as_ref().map(|found| &found.record);
            let starts = record.is_none_or(|record| record.wanted == Wanted::Stopped);
            let at = match &place {
                Some(place) if starts => Some(self.open_near(place, passed_on)?),
                place => place.clone(),
            };
            if let (Some(image), Some(record)) = (&request.image, record)
                && *image != record.profile.image
            {
                return Err(ErrorBody::bad_request(format!(
                    "{user}'s machine is made from image {:?}, not {image:?}; leave --image away",
                    record.profile.image
                )));
            }
            let may_give = record.is_some_and(|record| self.may_give(record));
            let decided = decide::login(record, &self.me, at.as_ref(), may_give);
            let near = match &decided {
                decide::Login::HereThenNear(at) => Some(at.clone()),
                _ => None,
            };
            let outcome = match decided {
                decide::Login::Ask(host) => return Ok(Claimed::Elsewhere(host)),
                decide::Login::Take(owner) => {
                    let Some(record) = record else { continue };
                    return Ok(Claimed::Take(owner, self.vid(record)));
                }
                decide::Login::Create => {
                    let record = self.new_record(user, request, key.clone())?;
                    // Once the record is seen, the directory's view wants a route to a tap that is not there yet.
                    let vid = self.vid(&record);
                    self.routes.hold(vid);
                    match self.swap(user, Revision::ABSENT, &record) {
                        Ok(_) => return Ok(Claimed::Here { fresh: Some(record.term), near: None }),
                        Err(error) => {
                            self.routes.let_go(vid, Term(0));
                            Err(error)
                        }
                    }
                }
                decide::Login::Here | decide::Login::HereThenNear(_) => {
                    let Some(Versioned { revision, mut record }) = found else { continue };
                    match &key {
                        Some(key) if !record.profile.authorized_keys.contains(key) => {
                            record.profile.authorized_keys.push(key.clone());
                            check_room(&record.profile)?;
                            self.swap(user, revision, &record)
                        }
                        _ => return Ok(Claimed::Here { fresh: None, near }),
                    }
                }
            };
            match outcome {
                Ok(_) => return Ok(Claimed::Here { fresh: None, near }),
                // Somebody else was faster: what is there now decides.
                Err(DirectoryError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn new_record(
        &self,
        user: &UserName,
        request: &LoginRequest,
        key: Option<String>,
    ) -> Result<ImageRecord, ErrorBody> {
        let image = request.image.clone().unwrap_or_else(|| self.config.image.default.clone());
        let least = self.config.image.geometry().map_err(ErrorBody::failed)?;
        let geometry = self.machines.check(&image, least).map_err(ErrorBody::failed)?;
        let mut seed = [0; 32];
        crate::init::random(&mut seed);
        let profile = Profile {
            image,
            memory_bytes: geometry.memory_bytes(),
            disk_bytes: geometry.disk_bytes(),
            host_key_seed: seed,
            authorized_keys: self.operator_keys.iter().cloned().chain(key).collect(),
        };
        check_room(&profile)?;
        Ok(ImageRecord {
            term: Term(1),
            owner: self.me.clone(),
            intent: None,
            backup: None,
            wanted: Wanted::Running,
            number: self.take_number()?,
            indices: ImageRecord::FIRST_INDICES,
            ipv4: self.assign_ipv4(user, None)?,
            disk_origin: None,
            profile,
        })
    }

    /// A number for a new image. One is kept in reserve, so that a login waits for one swap only; a reserve that
    /// is never used is a number lost, which is harmless.
    fn take_number(&self) -> Result<ImageNumber, ErrorBody> {
        let reserve = || self.spare_number.lock().unwrap_or_else(PoisonError::into_inner);
        let spare = reserve().take();
        match spare {
            Some(number) => Ok(number),
            None => Ok(allocate_image_number(&*self.directory)?),
        }
    }

    /// Keeps a number in reserve; blocks.
    pub(crate) fn reserve_number(&self) {
        let reserve = || self.spare_number.lock().unwrap_or_else(PoisonError::into_inner);
        if reserve().is_some() {
            return;
        }
        match allocate_image_number(&*self.directory) {
            Ok(number) => *reserve() = Some(number),
            Err(error) => tracing::debug!(%error, "no image number in reserve"),
        }
    }

    /// Starts a machine whose owner is this host, or finds it running.
    ///
    /// # Errors
    /// [`ErrorBody`].
    pub async fn start(
        self: &Arc<Self>,
        user: &UserName,
        begun: Instant,
        how: How,
    ) -> Result<LoginReply, ErrorBody> {
        let image = self.image(user);
        // A machine that serves is found without waiting for a move that may hold the slot.
        let status = image.status();
        let serving = matches!(status.state, State::Running | State::Moving);
        let found = if serving {
            let (daemon, name) = (self.clone(), user.clone());
            let record = blocking(move || daemon.existing(&name)).await?.record;
            (record.owner == self.me).then_some((record, true))
        } else {
            None
        };
        let (record, found) = match found {
            Some(found) => found,
            None => {
                let guard = image.slot.clone().lock_owned().await;
                let (daemon, image) = (self.clone(), image.clone());
                let (record, found, guard) = blocking(move || daemon.start_held(&image, guard, how)).await?;
                if !found {
                    let (net, vid) = (self.net.clone(), self.vid(&record));
                    blocking(move || {
                        net.first_answer(vid.address(), FIRST_ANSWER)
                            .map_err(|reason| ErrorBody::new(Code::TimedOut, reason))
                    })
                    .await?;
                }
                drop(guard);
                (record, found)
            }
        };
        let vid = self.vid(&record).address();
        let started_ms = begun.elapsed().as_secs_f64() * 1e3;
        let kind = if found { "found" } else { "login" };
        self.events.emit(kind, Some(user), json!({ "address": vid, "started_ms": started_ms }));
        let (holder, comes) = (image.clone(), record.clone());
        let disk_missing_bytes = match record.disk_origin {
            Some(_) => blocking(move || Ok(holder.disk.missing_at_start(&comes))).await?,
            None => 0,
        };
        let note = (found && how.with_key)
            .then(|| "it was running: a key it did not have opens it from its next start on".to_owned());
        Ok(LoginReply {
            user: user.clone(),
            vid,
            address: vid,
            ipv4: record.ipv4,
            host: self.me.clone(),
            state: image.status().state,
            started_ms,
            found,
            disk_missing_bytes,
            disk_pulled_bytes: if record.disk_origin.is_some() { image.disk.pulled_bytes() } else { 0 },
            note,
        })
    }

    /// With the slot held: finds the machine, or starts it under a new term.
    fn start_held(
        self: &Arc<Self>,
        image: &Arc<Image>,
        mut slot: OwnedMutexGuard<Slot>,
        how: How,
    ) -> Result<(ImageRecord, bool, OwnedMutexGuard<Slot>), ErrorBody> {
        let Versioned { revision, record } = self.existing(&image.user)?;
        if record.owner != self.me {
            return Err(ErrorBody::new(
                Code::OwnershipLost,
                format!("{}'s machine went to host {} meanwhile; try again", image.user, record.owner),
            ));
        }
        Self::reachable(image, &slot)?;
        let failed = image.status().state == State::Failed;
        if slot.machine.is_some() && !failed {
            return Ok((record, true, slot));
        }
        if record.intent.is_some() {
            return Err(ErrorBody::new(
                Code::Busy,
                format!(
                    "a move of {}'s machine is not settled yet; try again, or see `kage show {0}`",
                    image.user
                ),
            ));
        }
        let record = if how.fresh == Some(record.term) && !failed {
            image.set(State::Starting, None);
            let result = self.bring_up(image, &mut slot, &record, how.cold);
            self.came_up(image, &record, result)?;
            record
        } else {
            self.start_anew(image, &mut slot, revision, record, how.cold)?
        };
        Ok((record, false, slot))
    }

    /// Starts a machine of which nothing runs: first the swap, then the process.
    pub(crate) fn start_anew(
        self: &Arc<Self>,
        image: &Arc<Image>,
        slot: &mut Slot,
        revision: Revision,
        mut record: ImageRecord,
        cold: bool,
    ) -> Result<ImageRecord, ErrorBody> {
        if let Some(mut old) = slot.machine.take() {
            old.end();
            if old.failure().is_some() {
                record.return_indices(resources::next_index(&*old.memory()));
            }
        }
        image.disk.back();
        image.update(|status| *status = super::Status { state: State::Starting, ..Default::default() });
        let before = record.clone();
        record.term = record.term.next();
        record.wanted = Wanted::Running;
        record.renew_indices();
        match self.assign_ipv4(&image.user, record.ipv4) {
            Ok(ipv4) => record.ipv4 = ipv4,
            Err(error) => tracing::warn!(user = %image.user, %error, "its IPv4 address stays as it is"),
        }
        // Once the swap is seen, the directory's view wants a route to a tap that is not there yet.
        self.routes.hold(self.vid(&record));
        match self.swap(&image.user, revision, &record) {
            Ok(_) => {
                if let Some(address) = before.ipv4.filter(|_| before.ipv4 != record.ipv4)
                    && let Err(error) = self.give_up_ipv4(&image.user, address)
                {
                    tracing::warn!(user = %image.user, %error, %address, "nobody else gets it");
                }
                let result = self.bring_up(image, slot, &record, cold);
                self.came_up(image, &record, result)?;
                Ok(record)
            }
            Err(error) => {
                self.came_up(image, &before, Err(error.into()))?;
                Ok(before)
            }
        }
    }

    /// Lets the route go and says why a machine did not come up.
    fn came_up(
        &self,
        image: &Image,
        record: &ImageRecord,
        result: Result<(), ErrorBody>,
    ) -> Result<(), ErrorBody> {
        self.routes.let_go(self.vid(record), record.term);
        if let Err(error) = &result {
            image.set(State::Failed, Some(error.message.clone()));
            self.events.emit("start_failed", Some(&image.user), json!({ "reason": error.message }));
        }
        result
    }

    fn bring_up(
        self: &Arc<Self>,
        image: &Arc<Image>,
        slot: &mut Slot,
        record: &ImageRecord,
        cold: bool,
    ) -> Result<(), ErrorBody> {
        // A mirror for another owner is in the way of it.
        self.targets.forget_mirror(&image.user);
        let mut spec = self.spec(&image.user, record)?;
        spec.cold = cold;
        let begun = Instant::now();
        slot.tap = None;
        // First: what has the log may have a tap of that name too.
        self.lend_place(image)?;
        let started = self.fresh_tap(spec.number).and_then(|tap| {
            slot.tap = tap.try_clone().ok();
            let tapped = begun.elapsed();
            self.routes.image(spec.addresses(), &Via::Tap).map_err(ErrorBody::failed)?;
            // Last: from here on something of the disk is here.
            self.lend_log(image, record, false)?;
            Ok((self.machines.start(&spec, tap).map_err(ErrorBody::failed)?, tapped))
        });
        let (machine, tapped) = started.inspect_err(|_| image.disk.back())?;
        self.install(image, slot, spec, machine);
        self.keep_mirrors(image);
        tracing::debug!(user = %image.user, ?tapped, up = ?begun.elapsed(), "brought up");
        Ok(())
    }

    /// Makes an image's tap; one that a former machine still holds gives way.
    pub(crate) fn fresh_tap(&self, number: ImageNumber) -> Result<std::os::fd::OwnedFd, ErrorBody> {
        self.net
            .tap(number)
            .or_else(|_| self.net.remove_tap(number).and_then(|()| self.net.tap(number)))
            .map_err(ErrorBody::failed)
    }

    /// What a machine of this record is made of here.
    ///
    /// # Errors
    /// When this host cannot carry it.
    pub fn spec(&self, user: &UserName, record: &ImageRecord) -> Result<MachineSpec, ErrorBody> {
        let disks = self.config.host.state_dir.join("disks");
        std::fs::create_dir_all(&disks)
            .map_err(|error| ErrorBody::failed(format!("{}: {error}", disks.display())))?;
        MachineSpec::of(user, record, self.config.network.prefix, self.net.mtu(), &disks)
            .map_err(ErrorBody::bad_request)
    }

    /// Takes a running machine into its slot and listens to it.
    pub fn install(
        self: &Arc<Self>,
        image: &Arc<Image>,
        slot: &mut Slot,
        spec: MachineSpec,
        mut machine: Box<dyn crate::machines::Hosted>,
    ) {
        slot.incarnation += 1;
        // Those of another machine are none of this one.
        image.mirrors.streams.stop(true);
        let (daemon, user, incarnation) = (Arc::downgrade(self), image.user.clone(), slot.incarnation);
        image.update(|status| {
            *status = super::Status {
                state: State::Running,
                term: spec.term,
                memory: Some(machine.memory()),
                inspector: machine.inspector(),
                pid: machine.pid(),
                ..Default::default()
            };
        });
        self.listen_to_disk(image, &mut *machine);
        if spec.disk_elsewhere {
            self.pull(image);
        }
        machine.watch(Box::new(move |seen| {
            if let Some(daemon) = daemon.upgrade() {
                daemon.ended(user, incarnation, seen);
            }
        }));
        slot.spec = Some(spec);
        slot.machine = Some(machine);
    }

    /// Stops a machine whose owner is this host; keeps disk and identity. Idempotent. Returns why the guest has not
    /// written what it held, if it has not: it is ended all the same.
    ///
    /// # Errors
    /// [`ErrorBody`].
    pub async fn stop(self: &Arc<Self>, user: &UserName) -> Result<Option<String>, ErrorBody> {
        let image = self.image(user);
        // A move under way would hold the slot to its end.
        if let Some(operation) = image.status().operation {
            let _ = self.operations.cancel(&operation);
        }
        let mut slot = image.slot.clone().lock_owned().await;
        let daemon = self.clone();
        blocking(move || {
            let Versioned { mut revision, mut record } = daemon.existing(&image.user)?;
            if record.owner != daemon.me {
                let message =
                    format!("{}'s machine went to host {} meanwhile; try again", image.user, record.owner);
                return Err(ErrorBody::new(Code::OwnershipLost, message));
            }
            if record.intent.is_some() {
                let message = format!("a move of {}'s machine is not settled yet; try again", image.user);
                return Err(ErrorBody::new(Code::Busy, message));
            }
            Self::reachable(&image, &slot)?;
            let unsynced = daemon.sync_guest(&image, &slot);
            if record.wanted != Wanted::Stopped {
                record.wanted = Wanted::Stopped;
                revision = daemon.swap(&image.user, revision, &record)?;
            }
            let memory = slot.machine.as_ref().map(|machine| machine.memory());
            daemon.take_down(&image, &mut slot, &record);
            // Only now does it give out no more of them.
            if let Some(memory) = memory {
                let before = record.indices.clone();
                record.return_indices(resources::next_index(&*memory));
                if record.indices != before
                    && let Err(error) = daemon.swap(&image.user, revision, &record)
                {
                    tracing::debug!(%error, user = %image.user, "indices that nothing had are not given back");
                }
            }
            daemon.learn_left(&image.user);
            daemon.events.emit("stopped", Some(&image.user), json!({ "unsynced": unsynced }));
            if record.disk_origin.is_some() {
                daemon.pull(&image);
            }
            Ok(unsynced)
        })
        .await
    }

    /// Has a machine's guest write what it holds; says why it did not.
    fn sync_guest(&self, image: &Image, slot: &Slot) -> Option<String> {
        let machine = slot.machine.as_ref().filter(|_| image.status().state != State::Failed)?;
        let error = machine.disk()?.sync_guest(SYNC).err()?;
        Some(format!(
            "files written last may be lost: the machine did not sync its disk before it was ended ({error})"
        ))
    }

    /// Ends the process here, if there is one, and removes its tap.
    pub(crate) fn take_down(&self, image: &Image, slot: &mut Slot, record: &ImageRecord) {
        slot.incarnation += 1;
        image.mirrors.streams.stop(false);
        if let Some(mut machine) = slot.machine.take() {
            machine.end();
        }
        image.disk.back();
        (slot.spec, slot.tap, slot.ticket) = (None, None, None);
        if let Err(reason) = self.net.remove_tap(record.number) {
            tracing::warn!(reason, "a tap was not removed");
        }
        image.update(|status| *status = super::Status::default());
    }
}

fn check_room(profile: &Profile) -> Result<(), ErrorBody> {
    let bytes: usize = profile.authorized_keys.iter().map(|key| key.len() + 1).sum();
    if bytes > KEYS_MAX {
        return Err(ErrorBody::bad_request(format!(
            "the user's keys take {bytes} bytes, at most {KEYS_MAX} fit"
        )));
    }
    Ok(())
}

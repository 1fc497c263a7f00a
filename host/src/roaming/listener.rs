//! The accounting socket: every request is checked, answered at once, and then acted on.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use kage_directory::{DeviceRecord, Records as _, Versioned, Wanted};
use kage_machine::{HostName, UserName, identity::ApName};
use serde_json::json;
use tokio::{
    net::UdpSocket,
    task::{Id, JoinSet},
};

use super::{
    backlog::Backlog,
    intake::{Client, Intake, Notice},
    names::Names,
    radius::{DeviceAddresses, MAX_PACKET_BYTES},
    recent::Quiet,
    sessions::{Consequence, Sessions},
};
use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{LoginReply, LoginRequest, PredictionView, RoamAction, RoamRequest},
    },
    config::{Ap, Mobility, Radius},
    events::now_ms,
    http::Call,
    lifecycle::{Daemon, Login, blocking},
};

/// How often an owner is told of an arrival that it could not act on, and the pause between.
const MOST_TRIES: u32 = 10;
const TRY_AGAIN: Duration = Duration::from_millis(300);

/// How far apart lines about what was refused are in the log.
const QUIET: Duration = Duration::from_secs(10);

/// How long another host may take to stop a machine.
const STOP: Duration = Duration::from_secs(30);

/// Opens the socket and serves it in the background.
///
/// # Errors
/// A secret that cannot be read, an address that is taken.
pub async fn spawn(daemon: Arc<Daemon>, config: &Radius) -> Result<(), ErrorBody> {
    let mut clients = Vec::new();
    for client in &config.clients {
        let path = &client.secret_file;
        let secret = std::fs::read_to_string(path)
            .map_err(|error| ErrorBody::bad_request(format!("secret_file {}: {error}", path.display())))?;
        let secret = secret.trim().as_bytes().to_vec();
        if secret.is_empty() {
            return Err(ErrorBody::bad_request(format!("secret_file {} is empty", path.display())));
        }
        clients.push(Client { from: client.from, secret });
    }
    let socket = UdpSocket::bind(config.listen).await.map_err(|error| {
        ErrorBody::failed(format!("accounting at {}: {error}; see [roam.radius]", config.listen))
    })?;
    let names = Names::new(
        daemon.config.aps.iter().map(|ap| (ap.nas().to_owned(), ap.id.clone())),
        daemon.config.users.iter().map(|user| (user.identity.clone(), user.image.clone())),
        &config.identity,
    );
    let intake = Intake::new(clients, Sessions::new(names, config.logout_grace.duration()));
    let listener = Listener {
        daemon,
        socket,
        intake,
        backlog: Backlog::default(),
        under_way: JoinSet::new(),
        leaving: HashMap::new(),
        quiet: Quiet::new(QUIET),
        first_use: config.first_use,
    };
    tokio::spawn(listener.run());
    Ok(())
}

struct Listener {
    daemon: Arc<Daemon>,
    socket: UdpSocket,
    intake: Intake,
    backlog: Backlog,
    /// What was begun; the next packet is not kept waiting for it.
    under_way: JoinSet<()>,
    /// Those of it that are users' leaving.
    leaving: HashMap<Id, UserName>,
    quiet: Quiet,
    first_use: bool,
}

impl Listener {
    async fn run(mut self) {
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        loop {
            let expiry = self.intake.next_expiry();
            let expired = async {
                match expiry {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                received = self.socket.recv_from(&mut buffer) => match received {
                    Ok((length, from)) => {
                        let outcome =
                            self.intake.take(&buffer[..length], from.ip(), Instant::now(), now_ms());
                        if let Some(answer) = &outcome.answer
                            && let Err(error) = self.socket.send_to(answer, from).await
                        {
                            tracing::debug!(%error, %from, "an accounting answer was not sent");
                        }
                        if let Some(Notice { text, nas, withheld }) = &outcome.notice {
                            tracing::warn!(%from, ?nas, withheld, "{text}");
                        }
                        self.put_off(outcome.consequence, outcome.kind, outcome.result);
                    }
                    // An ICMP error to an earlier answer: the access point is gone.
                    Err(error) => tracing::debug!(%error, "accounting socket"),
                },
                Some(over) = self.under_way.join_next_with_id() => {
                    let id = over.map_or_else(|error| error.id(), |(id, ())| id);
                    self.backlog.end(self.leaving.remove(&id).as_ref());
                }
                () = expired => {
                    for consequence in self.intake.expire(Instant::now()) {
                        self.put_off(Some(consequence), "expiry", "taken");
                    }
                }
            }
            while let Some(consequence) = self.backlog.begin() {
                self.act(consequence);
            }
        }
    }

    /// Has a consequence wait for its turn, and counts what it comes from.
    fn put_off(&mut self, consequence: Option<Consequence>, kind: &'static str, result: &'static str) {
        let wanted = consequence.filter(|consequence| match consequence {
            // Nearly all traffic is where the machine is.
            Consequence::Active { user, ap, others, device, since_ms, .. } => {
                !self.daemon.has_walked_on(user, ap, *device, *since_ms)
                    && self.daemon.is_led_away(user, ap, others)
            }
            Consequence::Arrived { .. } | Consequence::Departed { .. } | Consequence::Left { .. } => true,
        });
        let has_room = wanted.is_none_or(|consequence| self.backlog.push(consequence));
        if !has_room && let Some(withheld) = self.quiet.may_say("overload", Instant::now()) {
            tracing::warn!(
                kind,
                withheld,
                "too much waits: a report was answered and nothing follows from it"
            );
        }
        let result = if has_room { result } else { "overload" };
        self.daemon.metrics.add("kage_radius_packets_total", &[("type", kind), ("result", result)], 1);
    }

    /// Acts in the background.
    fn act(&mut self, consequence: Consequence) {
        let (daemon, first_use) = (self.daemon.clone(), self.first_use);
        match consequence {
            Consequence::Arrived { user, ap, device, at_ms, start, first } => {
                let login = Start { first, may_create: start && (first_use || daemon.is_configured(&user)) };
                self.under_way.spawn(async move { daemon.arrived(user, ap, device, at_ms, login).await });
            }
            Consequence::Active { user, ap, at_ms, .. } => {
                self.under_way.spawn(async move { daemon.active(user, ap, at_ms).await });
            }
            Consequence::Departed { user, from, device, ap, at_ms } => {
                self.under_way.spawn(async move {
                    daemon.forget_device(&user, device, at_ms).await;
                    // Where the machine is by another device's traffic it stays.
                    if daemon.is_at(&user, &from) && daemon.is_led_away(&user, &ap, &[from]) {
                        daemon.active(user, ap, at_ms).await;
                    }
                });
            }
            Consequence::Left { user, from, at_ms } => {
                let leaving = user.clone();
                let begun = self.under_way.spawn(async move { daemon.left(user, from, at_ms).await });
                self.leaving.insert(begun.id(), leaving);
            }
        }
    }
}

/// What an arrival may begin.
#[derive(Clone, Copy, Debug)]
struct Start {
    /// It is the first of its user's sessions: a login, unless the site knows better.
    first: bool,
    /// A user without an image gets one.
    may_create: bool,
}

impl Daemon {
    /// A user is at an access point now: route the device, bring the machine, or start it.
    async fn arrived(
        self: &Arc<Self>,
        user: UserName,
        ap: ApName,
        device: DeviceAddresses,
        at_ms: u64,
        login: Start,
    ) {
        let mine = |own: &&Ap| own.id == ap && own.host == self.me && own.mobility == Mobility::Route;
        let mine = self.config.aps.iter().any(|own| mine(&own));
        // A device that the site knows already is moving, whatever this host has seen of it.
        let (daemon, name) = (self.clone(), user.clone());
        let known = blocking(move || Ok(!daemon.devices_of(&name)?.is_empty())).await.unwrap_or(true);
        let first = login.first && !known;
        // What access points tell of IPv4 nearly always is of use only to a site that has it.
        let wanted = |address: &IpAddr| mine && (address.is_ipv6() || self.config.uses_ipv4());
        for address in device.iter().filter(wanted) {
            let (daemon, user, ap) = (self.clone(), user.clone(), ap.clone());
            match blocking(move || daemon.attach_device(address, &user, &ap, at_ms)).await {
                Ok(true) => {}
                // Something later is known: this report is about the past.
                Ok(false) => return,
                Err(error) => tracing::warn!(%error, %address, "a device's route was not set"),
            }
        }
        let outcome = match self.follow_user(&user, &ap, device, at_ms).await {
            Ok(RoamAction::Stopped) if first => self.log_in(&user, &ap).await,
            Ok(_) => Ok(()),
            Err(error) if error.code == Code::NotFound && login.may_create => self.log_in(&user, &ap).await,
            // A device of somebody who has no machine: its route is all there is to do.
            Err(error) if error.code == Code::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            tracing::warn!(%error, %user, %ap, "an arrival had no effect");
            self.events.emit("arrival_failed", Some(&user), json!({ "ap": ap, "reason": error.message }));
        }
    }

    /// Has a user's machine follow to an access point. Its owner sees to it from then on; until the owner has heard of
    /// it, it is told again, as long as the user is still there.
    async fn follow_user(
        self: &Arc<Self>,
        user: &UserName,
        ap: &ApName,
        device: DeviceAddresses,
        at_ms: u64,
    ) -> Result<RoamAction, ErrorBody> {
        let mut tries = 0;
        loop {
            let age_ms = now_ms().saturating_sub(at_ms);
            let request = RoamRequest {
                user: user.clone(),
                ap: ap.clone(),
                device: None,
                wait: true,
                age_ms,
                // A time that is not known is before all others, whatever the owner's clock says.
                at_ms: (at_ms == 0).then_some(0),
            };
            let outcome = self.roam(&request, 0).await;
            let again = match &outcome {
                Ok(_) => false,
                // Who cancels a move knows better: the user is elsewhere by now.
                Err(error) if error.code == Code::Cancelled => return Ok(RoamAction::Stays),
                Err(error) => matches!(error.code, Code::OwnershipLost | Code::Busy | Code::Unreachable),
            };
            tries += 1;
            if !again || tries >= MOST_TRIES {
                return outcome.map(|reply| reply.action);
            }
            tokio::time::sleep(TRY_AGAIN).await;
            if let Some(address) = device.iter().next() {
                let daemon = self.clone();
                let seen = blocking(move || Ok(daemon.directory.read::<DeviceRecord>(&address)?)).await?;
                if seen.is_some_and(|seen| seen.record.since_ms > at_ms) {
                    // The user has walked on; who was told of that acts on it.
                    return Ok(RoamAction::Stays);
                }
            }
        }
    }

    /// Whether a user's machine is at one of the access points `others` while a device at `ap` is used, as far as
    /// this host knows: where the site shows another device of the user's, that is one of them, too. A machine that
    /// was moved to where none of its user's devices is stays there.
    fn is_led_away(&self, user: &UserName, ap: &ApName, others: &[ApName]) -> bool {
        let host = |ap: &ApName| self.config.aps.iter().find(|known| known.id == *ap).map(|ap| &ap.host);
        let seen = self.seen.borrow();
        let Some(image) = seen.images.get(user) else { return false };
        if image.wanted == Wanted::Stopped || host(ap).is_none_or(|host| image.owner == *host) {
            return false;
        }
        others.iter().any(|other| host(other) == Some(&image.owner))
            || seen.devices.values().any(|device| device.user == *user && device.host == image.owner)
    }

    /// Whether a device is known to have come to another access point after it came to `ap`, which still speaks of it.
    fn has_walked_on(&self, user: &UserName, ap: &ApName, device: DeviceAddresses, since_ms: u64) -> bool {
        let seen = self.seen.borrow();
        let mut records = device.iter().filter_map(|address| seen.devices.get(&address));
        records.any(|known| known.user == *user && known.ap != *ap && known.since_ms > since_ms)
    }

    /// Whether a user's machine is at an access point's host.
    fn is_at(&self, user: &UserName, ap: &ApName) -> bool {
        let seen = self.seen.borrow();
        let host = self.config.aps.iter().find(|known| known.id == *ap).map(|ap| &ap.host);
        seen.images.get(user).is_some_and(|image| host == Some(&image.owner))
    }

    /// A device of several is used: its user's machine follows it.
    async fn active(self: &Arc<Self>, user: UserName, ap: ApName, at_ms: u64) {
        if let Err(error) = self.follow_user(&user, &ap, DeviceAddresses::default(), at_ms).await {
            tracing::debug!(%error, %user, %ap, "traffic had no effect");
        }
    }

    /// A device is gone from here since then: what routed to it is removed, unless something later is known.
    async fn forget_device(self: &Arc<Self>, user: &UserName, device: DeviceAddresses, left_ms: u64) {
        let (daemon, user) = (self.clone(), user.clone());
        let forgotten = blocking(move || {
            for address in device.iter() {
                let Some(found) = daemon.directory.read::<DeviceRecord>(&address)? else { continue };
                let DeviceRecord { user: whose, host, since_ms: later, .. } = &found.record;
                if *whose == user && *host == daemon.me && *later <= left_ms {
                    daemon.directory.swap::<DeviceRecord>(&address, found.revision, None)?;
                }
            }
            Ok(())
        });
        if let Err(error) = forgotten.await {
            tracing::warn!(%error, "the route of a device that left is still there");
        }
    }

    fn is_configured(&self, user: &UserName) -> bool {
        self.config.users.iter().any(|configured| configured.image == *user)
    }

    /// The login that a first Start stands for; the host of the access point or the image's owner does it.
    async fn log_in(self: &Arc<Self>, user: &UserName, ap: &ApName) -> Result<(), ErrorBody> {
        let request = LoginRequest { at: Some(ap.to_string()), ..LoginRequest::default() };
        match self.login(user, &request, false).await? {
            Login::Done(_) => Ok(()),
            Login::Ask(host) => {
                let call = Call::new(http::Method::PUT, format!("/v1/images/{user}")).json(&request);
                let call = Call { hops: 1, ..call };
                let answer = self.peers.call(&host, self.address(&host)?, &call).await?;
                answer.into_value::<LoginReply>().map(|_| ())
            }
        }
    }

    fn devices_of(&self, user: &UserName) -> Result<Vec<(IpAddr, Versioned<DeviceRecord>)>, ErrorBody> {
        let (mut devices, _) = self.directory.read_all::<DeviceRecord>()?;
        devices.retain(|(_, device)| device.record.user == *user);
        Ok(devices)
    }

    /// A user's last device has left an access point: log out, if that is where the user was seen last; the machine goes
    /// to where another host has a device of the user's.
    async fn left(self: &Arc<Self>, user: UserName, from: ApName, at_ms: u64) {
        let (daemon, name) = (self.clone(), user.clone());
        let Some(there) = self.config.aps.iter().find(|ap| ap.id == from).map(|ap| ap.host.clone()) else {
            return;
        };
        let host = there.clone();
        let current = blocking(move || {
            let devices = daemon.devices_of(&name)?;
            let (here, elsewhere): (Vec<_>, Vec<_>) =
                devices.iter().partition(|(_, device)| device.record.host == host);
            let latest = elsewhere.into_iter().max_by_key(|(_, device)| device.record.since_ms);
            let latest = latest.map(|(_, device)| device.record.ap.clone());
            let is_back = here.iter().any(|(_, device)| device.record.since_ms > at_ms);
            for (address, device) in here.iter().filter(|(_, device)| device.record.since_ms <= at_ms) {
                daemon.directory.swap::<DeviceRecord>(address, device.revision, None)?;
            }
            let record = daemon.record(&name)?.filter(|found| found.record.wanted != Wanted::Stopped);
            Ok((record.map(|found| found.record.owner), is_back, latest))
        })
        .await;
        let outcome = match current {
            Ok((None, ..) | (_, true, _)) => Ok(()),
            Ok((Some(owner), false, latest)) => {
                let host = |ap: &ApName| self.seen.borrow().aps.get(ap).map(|known| known.host.clone());
                let last = self.last_seen(&user, &owner).await;
                let seen_at = last.as_ref().and_then(host);
                let seen = last.as_ref().map(|ap| (ap, seen_at.as_ref()));
                let is_busy =
                    owner == self.me && self.known(&user).is_some_and(|image| image.following.has_goal());
                let is_last = is_logout((&from, &there), &owner, seen, is_busy);
                match latest {
                    // A machine that was moved elsewhere by hand is only told.
                    Some(ap) if owner == there || (is_last && host(&ap).as_ref() == Some(&owner)) => {
                        self.active(user.clone(), ap, at_ms).await;
                        Ok(())
                    }
                    None if is_last => self.log_out(&user, &owner).await,
                    Some(_) | None => {
                        tracing::debug!(%user, %from, ?last, "who left there is elsewhere by now");
                        Ok(())
                    }
                }
            }
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            tracing::warn!(%error, %user, "a logout had no effect");
        }
    }

    /// The access point where the owner of a user's machine has seen the user last; `None` if it cannot say.
    async fn last_seen(self: &Arc<Self>, user: &UserName, owner: &HostName) -> Option<ApName> {
        if *owner == self.me {
            return self.prediction(user).await.ok()?.at;
        }
        let call = Call { hops: 1, ..Call::new(http::Method::GET, format!("/v1/images/{user}/prediction")) };
        let answer = self.peers.call(owner, self.address(owner).ok()?, &call).await.ok()?;
        answer.into_value::<PredictionView>().ok()?.at
    }

    /// The logout that a last Stop stands for, done by the machine's host.
    async fn log_out(self: &Arc<Self>, user: &UserName, host: &HostName) -> Result<(), ErrorBody> {
        self.events.emit("logout", Some(user), json!({ "reason": "accounting stop" }));
        if *host == self.me {
            return self.stop(user).await.map(|_| ());
        }
        let call = Call { hops: 1, ..Call::new(http::Method::POST, format!("/v1/images/{user}/stop")) };
        let answer = self.peers.call(host, self.address(host)?, &call.patience(STOP)).await?;
        answer.into_value::<serde_json::Value>().map(|_| ())
    }
}

/// Whether a user who left an access point of a host is to be logged out from the machine at `owner`. `seen` is where
/// the owner saw the user last, and whose access point that is; while the machine follows (`is_busy`) the user is
/// elsewhere. A machine that stays at another host is stopped only by who left exactly where the user was last.
fn is_logout(
    (from, there): (&ApName, &HostName),
    owner: &HostName,
    seen: Option<(&ApName, Option<&HostName>)>,
    is_busy: bool,
) -> bool {
    match seen {
        Some((ap, _)) if ap == from => true,
        Some((_, host)) => owner == there && host == Some(there),
        None => owner == there && !is_busy,
    }
}

#[cfg(test)]
mod tests;

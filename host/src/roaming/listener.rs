//! The accounting socket: every request is checked, answered at once, and then acted on.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use kage_directory::{DeviceRecord, Records as _, Versioned};
use kage_machine::{UserName, identity::ApName};
use serde_json::json;
use tokio::net::UdpSocket;

use super::{
    radius::{Accounting, DeviceAddresses, MAX_PACKET_BYTES, Packet, Status},
    sessions::{Consequence, Names, Sessions},
};
use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{LoginReply, LoginRequest, RoamAction, RoamRequest},
    },
    config::{Ap, Mobility, Radius, Subnet},
    events::now_ms,
    lifecycle::{Daemon, Login, blocking},
};

/// How long an answer is remembered for retransmissions of its request (RFC 2866 §2: some seconds apart).
const REMEMBERED: Duration = Duration::from_secs(30);

/// How often an owner is told of an arrival that it could not act on, and the pause between.
const MOST_TRIES: u32 = 10;
const TRY_AGAIN: Duration = Duration::from_millis(300);

/// How many answers are remembered.
const MAX_REMEMBERED: usize = 4096;

/// A secret and who may use it.
struct Client {
    from: Subnet,
    secret: Vec<u8>,
}

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
    let names = Names {
        aps: daemon.config.aps.iter().map(|ap| (ap.nas().to_owned(), ap.id.clone())).collect(),
        users: daemon.config.users.iter().map(|user| (user.identity.clone(), user.image.clone())).collect(),
    };
    let sessions = Sessions::new(names, config.logout_grace.duration());
    tokio::spawn(Listener { daemon, socket, clients, sessions, answered: HashMap::new() }.run());
    Ok(())
}

/// A request: its sender, identifier and authenticator.
type Request = (SocketAddr, u8, [u8; 16]);

struct Listener {
    daemon: Arc<Daemon>,
    socket: UdpSocket,
    clients: Vec<Client>,
    sessions: Sessions,
    answered: HashMap<Request, (Instant, Vec<u8>)>,
}

impl Listener {
    async fn run(mut self) {
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        loop {
            let expiry = self.sessions.next_expiry();
            let expired = async {
                match expiry {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                received = self.socket.recv_from(&mut buffer) => match received {
                    Ok((length, from)) => {
                        let (kind, result) = self.packet(&buffer[..length], from).await;
                        let labels = [("type", kind), ("result", result)];
                        self.daemon.metrics.add("kage_radius_packets_total", &labels, 1);
                    }
                    // An ICMP error to an earlier answer: the access point is gone.
                    Err(error) => tracing::debug!(%error, "accounting socket"),
                },
                () = expired => {
                    for consequence in self.sessions.expire(Instant::now()) {
                        self.act(consequence);
                    }
                }
            }
        }
    }

    /// Takes one datagram; returns its kind and what became of it, for the figures.
    async fn packet(&mut self, bytes: &[u8], from: SocketAddr) -> (&'static str, &'static str) {
        let address: IpAddr = from.ip().to_canonical();
        let Some(client) = self.clients.iter().find(|client| client.from.contains(address)) else {
            return ("unknown", "unknown_client");
        };
        let Ok(packet) = Packet::parse(bytes) else { return ("unknown", "malformed") };
        if !packet.is_request_of(&client.secret) {
            tracing::warn!(%from, "accounting with a wrong authenticator; is the secret the same at both ends?");
            return ("unknown", "bad_authenticator");
        }
        let report = match Accounting::from_packet(&packet) {
            Ok(report) => report,
            Err(error) => {
                tracing::debug!(%from, %error, "accounting that is not understood");
                return ("unknown", "malformed");
            }
        };
        let kind = kind(report.status);
        let key = (from, packet.identifier(), packet.authenticator());
        let now = Instant::now();
        if let Some((_, answer)) = self.answered.get(&key).filter(|(at, _)| now - *at < REMEMBERED) {
            let answer = answer.clone();
            self.answer(&answer, from).await;
            return (kind, "retransmission");
        }
        let answer = packet.response(&client.secret);
        self.answer(&answer, from).await;
        if self.answered.len() >= MAX_REMEMBERED {
            self.answered.retain(|_, (at, _)| now - *at < REMEMBERED);
        }
        if self.answered.len() < MAX_REMEMBERED {
            self.answered.insert(key, (now, answer));
        }
        match self.sessions.take(&report, now, now_ms()) {
            Ok(Some(consequence)) => {
                self.act(consequence);
                (kind, "taken")
            }
            Ok(None) => (kind, "taken"),
            Err(why) => {
                tracing::debug!(?why, ?report, "accounting without consequence");
                (kind, why.name())
            }
        }
    }

    async fn answer(&self, answer: &[u8], to: SocketAddr) {
        if let Err(error) = self.socket.send_to(answer, to).await {
            tracing::debug!(%error, %to, "an accounting answer was not sent");
        }
    }

    /// Acts in the background: the next packet is not kept waiting.
    fn act(&self, consequence: Consequence) {
        let daemon = self.daemon.clone();
        match consequence {
            Consequence::Arrived { user, ap, device, at_ms, first } => {
                tokio::spawn(async move { daemon.arrived(user, ap, device, at_ms, first).await });
            }
            Consequence::Left { user } => {
                tokio::spawn(async move { daemon.left(user).await });
            }
        }
    }
}

const fn kind(status: Status) -> &'static str {
    match status {
        Status::Start => "start",
        Status::Stop => "stop",
        Status::InterimUpdate => "interim",
        Status::AccountingOn => "on",
        Status::AccountingOff => "off",
        Status::Other(_) => "other",
    }
}

impl Daemon {
    /// A user is at an access point now: route the device, bring the machine, or start it.
    async fn arrived(
        self: &Arc<Self>,
        user: UserName,
        ap: ApName,
        device: DeviceAddresses,
        at_ms: u64,
        first: bool,
    ) {
        let mine = |own: &&Ap| own.id == ap && own.host == self.me && own.mobility == Mobility::Route;
        let mine = self.config.aps.iter().any(|own| mine(&own));
        // A device that the site knows already is moving, whatever this host has seen of it.
        let (daemon, name) = (self.clone(), user.clone());
        let known = blocking(move || Ok(!daemon.devices_of(&name)?.is_empty())).await.unwrap_or(true);
        let first = first && !known;
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
            Err(error) if error.code == Code::NotFound && self.is_configured(&user) => {
                self.log_in(&user, &ap).await
            }
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
                at_ms: None,
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

    fn is_configured(&self, user: &UserName) -> bool {
        self.config.users.iter().any(|configured| configured.image == *user)
    }

    /// The login that a first Start stands for; the host of the access point or the image's owner does it.
    async fn log_in(self: &Arc<Self>, user: &UserName, ap: &ApName) -> Result<(), ErrorBody> {
        let request = LoginRequest { at: Some(ap.to_string()), ..LoginRequest::default() };
        match self.login(user, &request).await? {
            Login::Done(_) => Ok(()),
            Login::Ask(host) => {
                let call =
                    crate::http::Call::new(http::Method::PUT, format!("/v1/images/{user}")).json(&request);
                let call = crate::http::Call { hops: 1, ..call };
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

    /// A user's last device has left: log out, if the machine is still here and nobody saw the user elsewhere.
    async fn left(self: &Arc<Self>, user: UserName) {
        let (daemon, name) = (self.clone(), user.clone());
        let current = blocking(move || {
            let devices = daemon.devices_of(&name)?;
            let elsewhere = devices.iter().any(|(_, device)| device.record.host != daemon.me);
            for (address, device) in devices.iter().filter(|(_, device)| device.record.host == daemon.me) {
                daemon.directory.swap::<DeviceRecord>(address, device.revision, None)?;
            }
            let mine = daemon.record(&name)?.is_some_and(|found| found.record.owner == daemon.me);
            Ok(mine && !elsewhere)
        })
        .await;
        match current {
            Ok(true) => {
                self.events.emit("logout", Some(&user), json!({ "reason": "accounting stop" }));
                if let Err(error) = self.stop(&user).await {
                    tracing::warn!(%error, %user, "a logout had no effect");
                }
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, %user, "a logout had no effect"),
        }
    }
}

#[cfg(test)]
mod tests;

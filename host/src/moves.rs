//! Moves: what makes one, carrying it out, and what came of it.
//!
//! - [`plan`]: what one would cost.
//! - [`roam`]: a user is at an access point.
//! - [`following`]: the machine follows its user; [`chase`]: the rules of that, pure.

pub mod chase;
pub mod following;
mod plan;
mod roam;

use std::{sync::Arc, time::Duration};

use kage_machine::{HostName, UserName};
use kage_migrate::outcome::is_cancelled;
use serde_json::json;
use tokio::sync::oneshot;

use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{LoginReply, MigrateRequest, MoveOutcome, MoveReport, Operation, OperationState},
    },
    config::Mode,
    http::Call,
    lifecycle::{Daemon, Image},
    operations::Handle,
};

/// Least cap of a move, in bytes a second: a batch of pages takes seconds at that.
const LEAST_RATE: u64 = 8_000;

impl Daemon {
    /// Where a move of this request goes.
    ///
    /// # Errors
    /// An unknown host, this host, or none to choose from.
    fn target(&self, user: &UserName, request: &MigrateRequest) -> Result<HostName, ErrorBody> {
        if request.mode == Some(Mode::Postcopy) {
            let message = "--mode postcopy is not in this version; use auto or precopy";
            return Err(ErrorBody::new(Code::Unsupported, message));
        }
        if request.blackout.zip(request.timeout).is_some_and(|(blackout, timeout)| timeout <= blackout) {
            return Err(ErrorBody::bad_request(
                "a move may not last shorter than its pause; raise --timeout",
            ));
        }
        if request.bandwidth.is_some_and(|rate| rate.bytes_per_second() < LEAST_RATE) {
            return Err(ErrorBody::bad_request(
                "a move capped below 64kbit would not end; raise --bandwidth",
            ));
        }
        let seen = self.seen.borrow();
        match &request.to {
            Some(host) if *host == self.me => {
                Err(ErrorBody::bad_request(format!("{user}'s machine is at host {host} already")))
            }
            Some(host) if seen.hosts.contains_key(host) => Ok(host.clone()),
            Some(_) if seen.hosts.is_empty() => Err(ErrorBody::new(
                Code::Busy,
                format!("host {} has not read the directory yet; try again", self.me),
            )),
            Some(host) => Err(ErrorBody::no_host(host.as_str())),
            None => seen
                .hosts
                .iter()
                .filter(|(name, record)| **name != self.me && !record.cordoned)
                .min_by_key(|(name, _)| seen.images.values().filter(|image| image.owner == **name).count())
                .map(|(name, _)| name.clone())
                .ok_or_else(|| {
                    ErrorBody::bad_request("there is no other host to move to; `kage hosts` lists them")
                }),
        }
    }

    fn not_running(&self, user: &UserName) -> ErrorBody {
        ErrorBody::new(Code::Busy, format!("{user}'s machine is not running; `kage start {user}` starts it"))
    }

    /// Begins a move of an image that this host owns.
    ///
    /// # Errors
    /// [`ErrorBody`]; nothing has begun.
    pub async fn begin_move(
        self: &Arc<Self>,
        user: &UserName,
        request: &MigrateRequest,
    ) -> Result<Operation, ErrorBody> {
        let to = self.target(user, request)?;
        let image = self.image(user);
        if image.status().memory.is_none() {
            return Err(self.not_running(user));
        }
        let id = self.launch(&image, to, request.clone(), None);
        self.operations.get(&id, Duration::ZERO).await
    }

    /// Has a move carried out in the background; returns its operation. With `settled`, which is dropped once the machine
    /// is at one host or the other, only from here: not where it has gone elsewhere by then.
    pub(crate) fn launch(
        self: &Arc<Self>,
        image: &Arc<Image>,
        to: HostName,
        request: MigrateRequest,
        settled: Option<oneshot::Sender<()>>,
    ) -> String {
        let handle = self.operations.begin("migrate", &image.user, &to);
        let id = handle.id();
        let (daemon, image, handle) = (self.clone(), image.clone(), Arc::new(handle));
        self.runtime.spawn(async move {
            let outcome = daemon.carry_out(&image, &to, &request, handle.clone(), settled).await;
            match outcome {
                Ok(report) if was_cancelled(&report) => handle.end_cancelled(json!(report)),
                outcome => handle.end(outcome.map(|report| json!(report))),
            }
        });
        id
    }

    /// After a login that started a machine far from where its user is, since it could not be given away: brings it
    /// there.
    pub(crate) async fn bring_near(self: &Arc<Self>, mut reply: LoginReply, at: HostName) -> LoginReply {
        let request = MigrateRequest { to: Some(at.clone()), ..MigrateRequest::default() };
        let moved = match self.begin_move(&reply.user, &request).await {
            Ok(operation) => self.await_move(&operation.id).await,
            Err(error) => Err(error),
        };
        let why = match moved {
            Ok(report) if report.outcome == MoveOutcome::HandedOver => {
                reply.host = at;
                return reply;
            }
            Ok(report) => report.reason.unwrap_or_else(|| report.outcome.to_string()),
            Err(error) => error.to_string(),
        };
        reply.note = Some(format!("it was not brought to {at}: {why}"));
        reply
    }

    pub(crate) fn went_to(&self, user: &UserName, owner: &HostName) -> ErrorBody {
        let message = format!("{user}'s machine went to host {owner} meanwhile; try again");
        ErrorBody::new(Code::OwnershipLost, message)
    }

    /// Has the owner carry out a move that waited here for its turn while the machine went there.
    pub(crate) async fn hand_on(
        self: &Arc<Self>,
        user: &UserName,
        owner: &HostName,
        request: &MigrateRequest,
        handle: &Handle,
    ) -> Result<MoveReport, ErrorBody> {
        if request.to.as_ref() == Some(owner) {
            return Err(self.went_to(user, owner));
        }
        let ask = |method, path: String| Call { hops: 1, ..Call::new(method, path) };
        let call = ask(http::Method::POST, format!("/v1/images/{user}/migrate")).json(request);
        let mut operation: Operation =
            self.peers.call(owner, self.address(owner)?, &call).await?.into_value()?;
        let (mut cancelled, control) = (false, handle.control());
        while operation.state == OperationState::Running {
            let id = &operation.id;
            let call = if control.is_cancelled() && !std::mem::replace(&mut cancelled, true) {
                ask(http::Method::DELETE, format!("/v1/operations/{id}"))
            } else {
                ask(http::Method::GET, format!("/v1/operations/{id}?wait=500ms"))
            };
            operation = self.peers.call(owner, self.address(owner)?, &call).await?.into_value()?;
            handle.progress(operation.progress.clone());
        }
        report_of(operation)
    }

    /// Longest wait for a move's end.
    fn move_patience(&self) -> Duration {
        self.config.migrate.timeout.duration() + Duration::from_secs(10)
    }

    /// Waits for the report of a move of this host.
    async fn await_move(&self, id: &str) -> Result<MoveReport, ErrorBody> {
        report_of(self.operations.ended(id, self.move_patience()).await?)
    }
}

/// Whether a move came to nothing because somebody asked for that.
pub(crate) fn was_cancelled(report: &MoveReport) -> bool {
    report.outcome == MoveOutcome::KeptHere && report.reason.as_deref().is_some_and(is_cancelled)
}

/// What a move that has ended came to.
pub(crate) fn report_of(operation: Operation) -> Result<MoveReport, ErrorBody> {
    match (operation.result, operation.error) {
        (Some(result), _) => serde_json::from_value(result).map_err(ErrorBody::failed),
        (None, Some(error)) => Err(error),
        (None, None) => Err(ErrorBody::failed(format!("operation {} ended without a result", operation.id))),
    }
}

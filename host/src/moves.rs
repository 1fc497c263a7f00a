//! Moves: what makes one, carrying it out, and what came of it.
//!
//! - [`roam`]: a user is at an access point.
//! - [`following`]: the machine follows its user; [`chase`]: the rules of that, pure.

pub mod chase;
pub mod following;
mod roam;

use std::{sync::Arc, time::Duration};

use kage_machine::{HostName, UserName};
use kage_migrate::drive::Control;
use serde_json::json;

use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{LoginReply, MigrateRequest, MovePlan, MoveReport, Operation, OperationState},
    },
    config::Mode,
    http::Call,
    lifecycle::{Daemon, blocking},
};

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

    /// Says what a move would do.
    ///
    /// # Errors
    /// As the move.
    pub async fn plan_move(
        self: &Arc<Self>,
        user: &UserName,
        request: &MigrateRequest,
    ) -> Result<MovePlan, ErrorBody> {
        let to = self.target(user, request)?;
        let status = self.image(user).status();
        let memory = status.memory.ok_or_else(|| self.not_running(user))?;
        let pages = blocking(move || Ok(u64::from(memory.populated().len()))).await?;
        Ok(MovePlan {
            user: user.clone(),
            from: self.me.clone(),
            to,
            mode: "precopy".to_owned(),
            pages,
            bytes_raw: pages * kage_machine::PAGE_SIZE as u64,
            dry_run: true,
        })
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
        let handle = self.operations.begin("migrate", user, &to);
        let id = handle.id();
        let (daemon, request, handle) = (self.clone(), request.clone(), Arc::new(handle));
        self.runtime.spawn(async move {
            let outcome = daemon.carry_out(&image, &to, &request, handle.clone()).await;
            if outcome.is_err() {
                image.move_over();
            }
            handle.end(outcome.map(|report| json!(report)));
        });
        self.operations.get(&id, Duration::ZERO).await
    }

    /// After a login that started a machine far from where its user is, since it could not be given away: brings it
    /// there.
    pub(crate) async fn bring_near(self: &Arc<Self>, mut reply: LoginReply, at: HostName) -> LoginReply {
        let request = MigrateRequest { to: Some(at.clone()), ..MigrateRequest::default() };
        let moved = match self.begin_move(&reply.user, &request).await {
            Ok(operation) => self.operations.ended(&operation.id, Duration::from_secs(30)).await,
            Err(error) => Err(error),
        };
        match moved {
            Ok(operation) if operation.state == OperationState::Done => reply.host = at,
            Ok(operation) => {
                reply.note = operation.error.map(|error| format!("it was not brought to {at}: {error}"))
            }
            Err(error) => reply.note = Some(format!("it was not brought to {at}: {error}")),
        }
        reply
    }

    fn went_to(&self, user: &UserName, owner: &HostName) -> ErrorBody {
        let message = format!("{user}'s machine went to host {owner} meanwhile; try again");
        ErrorBody::new(Code::OwnershipLost, message)
    }

    /// Has the owner carry out a move that waited here for its turn while the machine went there.
    pub(crate) async fn hand_on(
        self: &Arc<Self>,
        user: &UserName,
        owner: &HostName,
        request: &MigrateRequest,
        control: &Control,
    ) -> Result<MoveReport, ErrorBody> {
        if request.to.as_ref() == Some(owner) {
            return Err(self.went_to(user, owner));
        }
        let ask = |method, path: String| Call { hops: 1, ..Call::new(method, path) };
        let call = ask(http::Method::POST, format!("/v1/images/{user}/migrate")).json(request);
        let mut operation: Operation =
            self.peers.call(owner, self.address(owner)?, &call).await?.into_value()?;
        let mut cancelled = false;
        while operation.state == OperationState::Running {
            let id = &operation.id;
            let call = if control.is_cancelled() && !std::mem::replace(&mut cancelled, true) {
                ask(http::Method::DELETE, format!("/v1/operations/{id}"))
            } else {
                ask(http::Method::GET, format!("/v1/operations/{id}?wait=500ms"))
            };
            operation = self.peers.call(owner, self.address(owner)?, &call).await?.into_value()?;
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

/// What a move that has ended came to.
fn report_of(operation: Operation) -> Result<MoveReport, ErrorBody> {
    match (operation.result, operation.error) {
        (Some(result), _) => serde_json::from_value(result).map_err(ErrorBody::failed),
        (None, Some(error)) => Err(error),
        (None, None) => Err(ErrorBody::failed(format!("operation {} ended without a result", operation.id))),
    }
}

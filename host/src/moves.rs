//! Moves: what makes one, carrying it out, and what came of it.

use std::{sync::Arc, time::Duration};

use kage_directory::Records as _;
use kage_machine::{HostName, UserName};
use serde_json::json;

use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{
            LoginReply, MigrateRequest, MovePlan, MoveReport, Operation, OperationState, RoamAction,
            RoamReply, RoamRequest,
        },
    },
    config::Mode,
    http::Call,
    lifecycle::{Daemon, blocking, decide},
    operations::Operations,
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
        let handle = self.operations.begin("migrate", user);
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

    /// After a login that started a machine far from where its user is: brings it there.
    pub async fn bring_near(self: &Arc<Self>, mut reply: LoginReply, at: HostName) -> LoginReply {
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

    /// Takes in that a user is at an access point now.
    ///
    /// # Errors
    /// An unknown user or access point; a move that could not begin.
    pub async fn roam(self: &Arc<Self>, request: &RoamRequest) -> Result<RoamReply, ErrorBody> {
        let (daemon, wish) = (self.clone(), request.clone());
        let (host, record) = blocking(move || {
            let ap = daemon.directory.read::<kage_directory::ApRecord>(&wish.ap)?.ok_or_else(|| {
                ErrorBody::new(
                    Code::NotFound,
                    format!("access point {} is unknown; `kage hosts` lists those there are", wish.ap),
                )
            })?;
            let record = daemon.existing(&wish.user)?.record;
            if let Some(device) = wish.device
                && ap.record.host == daemon.me
            {
                daemon.attach_device(device, &wish.user, &wish.ap, crate::events::now_ms())?;
            }
            Ok((ap.record.host, record))
        })
        .await?;
        let mut reply = RoamReply {
            user: request.user.clone(),
            ap: request.ap.clone(),
            host: host.clone(),
            action: RoamAction::Stays,
            operation: None,
            report: None,
        };
        match decide::roam(&record, &host) {
            decide::Roam::Stays => {}
            decide::Roam::Stopped => reply.action = RoamAction::Stopped,
            decide::Roam::Moves { from } => {
                reply.action = RoamAction::Moves;
                let operation = self.ask_move(&request.user, &from, &host).await?;
                if request.wait {
                    reply.report = Some(self.await_move(&operation.id).await?);
                }
                reply.operation = Some(operation.id);
            }
        }
        let details =
            json!({ "ap": request.ap, "to": host, "action": reply.action, "operation": reply.operation });
        self.events.emit("roam", Some(&request.user), details);
        Ok(reply)
    }

    /// Has the owner begin a move.
    async fn ask_move(
        self: &Arc<Self>,
        user: &UserName,
        owner: &HostName,
        to: &HostName,
    ) -> Result<Operation, ErrorBody> {
        let request = MigrateRequest { to: Some(to.clone()), ..MigrateRequest::default() };
        if *owner == self.me {
            return self.begin_move(user, &request).await;
        }
        let call = Call::new(http::Method::POST, format!("/v1/images/{user}/migrate")).json(&request);
        let call = Call { hops: 1, ..call };
        self.peers.call(owner, self.address(owner)?, &call).await?.into_value()
    }

    /// Waits for a move's report, here or at another host.
    async fn await_move(self: &Arc<Self>, id: &str) -> Result<MoveReport, ErrorBody> {
        let patience = self.config.migrate.timeout.duration() + Duration::from_secs(10);
        let deadline = tokio::time::Instant::now() + patience;
        let operation = match Operations::host_of(id).filter(|host| *host != self.me) {
            None => self.operations.ended(id, patience).await?,
            Some(host) => loop {
                let call = Call::new(http::Method::GET, format!("/v1/operations/{id}?wait=10s"));
                let call = Call { hops: 1, ..call };
                let operation: Operation =
                    self.peers.call(&host, self.address(&host)?, &call).await?.into_value()?;
                if operation.state != OperationState::Running {
                    break operation;
                }
                if tokio::time::Instant::now() >= deadline {
                    return Err(ErrorBody::new(Code::TimedOut, format!("operation {id} is still under way")));
                }
            },
        };
        match (operation.result, operation.error) {
            (Some(result), _) => serde_json::from_value(result).map_err(ErrorBody::failed),
            (None, Some(error)) => Err(error),
            (None, None) => Err(ErrorBody::failed(format!("operation {id} ended without a result"))),
        }
    }
}

//! Images: list, log in, start, stop, move, logs.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Bytes,
    extract::{Path, Query, State},
    response::{IntoResponse, Response},
    routing::{delete, get, post, put},
};
use http::Method;
use kage_directory::{ImageRecord, Records as _};
use kage_machine::{HostName, UserName, identity::Kind};
use serde::Deserialize;
use serde_json::json;

use super::{
    App, Hops, Reply, Route, Wait, accepted, body,
    error::{Code, ErrorBody},
    name,
    types::{
        ImageView, LogView, LoginRequest, MigrateRequest, Operation, OperationState, Place, PulseRequest,
        Resources, State as MachineState,
    },
};
use crate::{
    http::Call,
    lifecycle::{Daemon, How, Login, blocking},
    operations::Operations,
    resources::Only,
    units::Span,
};

/// How long a login or start at another host may take.
const START: Duration = Duration::from_secs(30);

/// How long the owner may take to say how an image is.
const LOOK: Duration = Duration::from_secs(3);

pub(super) fn routes() -> Vec<Route> {
    let route = |method, path, summary, body, answer, query, handler| Route {
        method,
        path,
        summary,
        body,
        answer,
        query,
        handler,
    };
    vec![
        route(Method::GET, "/v1/images", "All images.", None, "ImageView[]", &[], get(list)),
        route(
            Method::GET,
            "/v1/images/{user}",
            "One image; waits for a state or a host.",
            None,
            "ImageView",
            &["state", "at", "timeout"],
            get(show),
        ),
        route(
            Method::PUT,
            "/v1/images/{user}",
            "Starts or finds the user's machine.",
            Some("LoginRequest"),
            "LoginReply",
            &[],
            put(login),
        ),
        route(
            Method::DELETE,
            "/v1/images/{user}",
            "Logs the user out: stops the machine, keeps disk and identity.",
            None,
            "ImageView",
            &[],
            delete(stop),
        ),
        route(
            Method::POST,
            "/v1/images/{user}/start",
            "Starts a stopped machine.",
            None,
            "LoginReply",
            &[],
            post(start),
        ),
        route(Method::POST, "/v1/images/{user}/stop", "Stops a machine.", None, "ImageView", &[], post(stop)),
        route(
            Method::POST,
            "/v1/images/{user}/migrate",
            "Moves a machine to another host.",
            Some("MigrateRequest"),
            "Operation",
            &[],
            post(migrate),
        ),
        route(
            Method::DELETE,
            "/v1/images/{user}/migrate",
            "Cancels the machine's moves; answers with those that were under way, else with the last if it was cancelled.",
            None,
            "Operation[]",
            &[],
            delete(cancel_moves),
        ),
        route(
            Method::GET,
            "/v1/images/{user}/logs",
            "What the guest wrote to its log.",
            None,
            "LogView",
            &["after"],
            get(logs),
        ),
        route(
            Method::GET,
            "/v1/images/{user}/resources",
            "The machine's processes, files and sockets, or those of a kind, or the one of a VID.",
            None,
            "Resources",
            &["kind", "vid"],
            get(resources),
        ),
        route(
            Method::GET,
            "/v1/where/{vid}",
            "The host that an image or a resource is on now.",
            None,
            "Place",
            &[],
            get(place),
        ),
        route(
            Method::POST,
            "/v1/images/{user}/pulse",
            "Turns a machine's heartbeat on or off, and says what it saw.",
            Some("PulseRequest"),
            "Pulse",
            &[],
            post(pulse),
        ),
        route(
            Method::GET,
            "/v1/operations/{id}",
            "An operation; waits for its next change.",
            None,
            "Operation",
            &["wait"],
            get(operation),
        ),
        route(
            Method::DELETE,
            "/v1/operations/{id}",
            "Cancels an operation.",
            None,
            "Operation",
            &[],
            delete(cancel),
        ),
    ]
}

async fn list(State(app): State<App>) -> Reply<Vec<ImageView>> {
    let daemon = app.clone();
    let all = blocking(move || {
        let records = daemon.directory.read_all::<ImageRecord>()?.0;
        let view = |(user, found): (UserName, kage_directory::Versioned<ImageRecord>)| {
            (daemon.full_view(&user, &found.record), found.record.owner)
        };
        Ok(records.into_iter().map(view).collect::<Vec<_>>())
    })
    .await?;
    let mut views = Vec::with_capacity(all.len());
    let mut asked = Vec::new();
    for (view, owner) in all {
        if owner == app.me {
            views.push(view);
        } else {
            let app = app.clone();
            asked.push(tokio::spawn(async move { app.ask_owner(view, LOOK).await }));
        }
    }
    for answer in asked {
        views.extend(answer.await.ok());
    }
    views.sort_by(|a, b| a.user.cmp(&b.user));
    Ok(Json(views))
}

#[derive(Debug, Default, Deserialize)]
struct Until {
    state: Option<String>,
    at: Option<HostName>,
    timeout: Option<Span>,
}

async fn show(
    State(app): State<App>,
    Path(user): Path<String>,
    Query(until): Query<Until>,
) -> Reply<ImageView> {
    let user: UserName = name(&user)?;
    let wanted: Option<MachineState> = until.state.as_deref().map(name).transpose()?;
    let timeout = until.timeout.map_or(Duration::ZERO, Span::duration).min(Wait::MOST);
    let deadline = tokio::time::Instant::now() + timeout;
    let mut seen = app.seen.subscribe();
    loop {
        seen.borrow_and_update();
        // A name that is asked for is not one that is here.
        let mut changed = app.known(&user).map(|image| image.changed.subscribe());
        let (daemon, name) = (app.clone(), user.clone());
        let record = blocking(move || {
            if timeout.is_zero() {
                daemon.look_at_disk(&name);
            }
            let found = daemon.record(&name)?;
            Ok(found.map(|found| (daemon.full_view(&name, &found.record), found.record.owner)))
        })
        .await?;
        let view = match record {
            Some((view, owner)) if owner == app.me => Some(view),
            Some((view, _)) => Some(app.ask_owner(view, LOOK).await),
            None if timeout.is_zero() => return Err(ErrorBody::no_user(&user)),
            None => None,
        };
        let fits = |view: &ImageView| {
            wanted.is_none_or(|state| view.state == state)
                && until.at.as_ref().is_none_or(|at| view.host == *at)
        };
        match view {
            Some(view) if fits(&view) || timeout.is_zero() => return Ok(Json(view)),
            view if tokio::time::Instant::now() >= deadline => {
                let is = view.map_or_else(
                    || "has no image".to_owned(),
                    |view| format!("is {} at {}", view.state.name(), view.host),
                );
                return Err(ErrorBody::new(Code::TimedOut, format!("after {timeout:?} {user} still {is}")));
            }
            _ => {}
        }
        // Changes here and in the directory are heard at once; those of a state elsewhere are looked for.
        let again = (tokio::time::Instant::now() + Duration::from_millis(50)).min(deadline);
        let changes = async {
            match &mut changed {
                Some(changed) => drop(changed.changed().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = seen.changed() => {}
            () = changes => {}
            () = tokio::time::sleep_until(again) => {}
        }
    }
}

async fn login(
    State(app): State<App>,
    Path(user): Path<String>,
    hops: Hops,
    bytes: Bytes,
) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    let mut request: LoginRequest = body(&bytes)?;
    // Whoever is asked first knows what "here" means. An access point stays one: that is where the user is.
    match &request.at {
        Some(at) => drop(app.place(at)?),
        None => request.at = Some(app.me.to_string()),
    }
    match app.login(&user, &request, hops.count() > 0).await? {
        Login::Done(reply) => Ok(Json(reply).into_response()),
        Login::Ask(host) => {
            let path = format!("/v1/images/{user}");
            app.pass_on(&host, hops, Call::new(Method::PUT, path).json(&request).patience(START)).await
        }
    }
}

async fn start(State(app): State<App>, Path(user): Path<String>, hops: Hops) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    if let Some(owner) = app.elsewhere(&user).await? {
        let path = format!("/v1/images/{user}/start");
        return app.pass_on(&owner, hops, Call::new(Method::POST, path).patience(START)).await;
    }
    Ok(Json(app.start(&user, std::time::Instant::now(), How::default()).await?).into_response())
}

async fn stop(State(app): State<App>, Path(user): Path<String>, hops: Hops) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    if let Some(owner) = app.elsewhere(&user).await? {
        let path = format!("/v1/images/{user}/stop");
        return app.pass_on(&owner, hops, Call::new(Method::POST, path).patience(START)).await;
    }
    let unsynced = app.stop(&user).await?;
    let daemon = app.clone();
    let mut view = blocking(move || Ok(daemon.full_view(&user, &daemon.existing(&user)?.record))).await?;
    view.note = view.note.or(unsynced);
    Ok(Json(view).into_response())
}

async fn migrate(
    State(app): State<App>,
    Path(user): Path<String>,
    hops: Hops,
    bytes: Bytes,
) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    let request: MigrateRequest = body(&bytes)?;
    if let Some(owner) = app.elsewhere(&user).await? {
        let path = format!("/v1/images/{user}/migrate");
        return app.pass_on(&owner, hops, Call::new(Method::POST, path).json(&request)).await;
    }
    if request.dry_run {
        return Ok(Json(app.plan_move(&user, &request).await?).into_response());
    }
    Ok(accepted(app.begin_move(&user, &request).await?))
}

async fn cancel_moves(
    State(app): State<App>,
    Path(user): Path<String>,
    hops: Hops,
) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    if let Some(owner) = app.elsewhere(&user).await? {
        let path = format!("/v1/images/{user}/migrate");
        return app.pass_on(&owner, hops, Call::new(Method::DELETE, path)).await;
    }
    let mut cancelled = Vec::new();
    for (id, _) in app.operations.under_way(&user) {
        cancelled.push(app.operations.cancel(&id)?);
        app.events.emit("cancel", Some(&user), json!({ "operation": id }));
    }
    if cancelled.is_empty() {
        // Whoever asks twice is told the same.
        let last = app.operations.last_move(&user);
        cancelled.extend(last.filter(|last| last.state == OperationState::Cancelled));
    }
    if cancelled.is_empty() {
        let message = format!("no move of {user}'s machine is under way; it is at host {}", app.me);
        return Err(ErrorBody::new(Code::NotFound, message));
    }
    Ok(Json(cancelled).into_response())
}

#[derive(Debug, Default, Deserialize)]
struct After {
    after: Option<u64>,
}

async fn logs(
    State(app): State<App>,
    Path(user): Path<String>,
    Query(after): Query<After>,
    hops: Hops,
) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    let after = after.after.unwrap_or(0);
    if let Some(owner) = app.elsewhere(&user).await? {
        let path = format!("/v1/images/{user}/logs?after={after}");
        return app.pass_on(&owner, hops, Call::new(Method::GET, path)).await;
    }
    let view: LogView = blocking(move || app.logs(&user, after)).await?;
    Ok(Json(view).into_response())
}

#[derive(Debug, Default, Deserialize)]
struct Which {
    kind: Option<Kind>,
    vid: Option<std::net::Ipv6Addr>,
}

async fn resources(
    State(app): State<App>,
    Path(user): Path<String>,
    Query(which): Query<Which>,
    hops: Hops,
) -> Reply<Resources> {
    let user: UserName = name(&user)?;
    let only = match which.vid {
        Some(address) => Only::One(app.known_vid(address)?),
        None => which.kind.map_or(Only::All, Only::Kind),
    };
    Ok(Json(app.resources(&user, only, hops.count()).await?))
}

async fn place(State(app): State<App>, Path(vid): Path<String>) -> Reply<Place> {
    let address = vid
        .parse()
        .map_err(|_| ErrorBody::bad_request(format!("{vid:?} is no IPv6 address, which every VID is")))?;
    Ok(Json(app.place_of(address).await?))
}

async fn pulse(
    State(app): State<App>,
    Path(user): Path<String>,
    hops: Hops,
    bytes: Bytes,
) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    let request: PulseRequest = body(&bytes)?;
    if let Some(owner) = app.elsewhere(&user).await? {
        let path = format!("/v1/images/{user}/pulse");
        return app.pass_on(&owner, hops, Call::new(Method::POST, path).json(&request)).await;
    }
    Ok(Json(app.pulse(&user, request.on).await?).into_response())
}

/// The host an operation is at, when it is not this one.
fn operation_elsewhere(app: &Daemon, id: &str) -> Option<HostName> {
    Operations::host_of(id).filter(|host| *host != app.me)
}

async fn operation(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(wait): Query<Wait>,
    hops: Hops,
) -> Result<Response, ErrorBody> {
    if let Some(host) = operation_elsewhere(&app, &id) {
        let path = format!("/v1/operations/{id}?wait={}ms", wait.duration().as_millis());
        return app.pass_on(&host, hops, Call::new(Method::GET, path).patience(Wait::MOST + LOOK)).await;
    }
    let operation: Operation = app.operations.get(&id, wait.duration()).await?;
    Ok(Json(operation).into_response())
}

async fn cancel(State(app): State<App>, Path(id): Path<String>, hops: Hops) -> Result<Response, ErrorBody> {
    if let Some(host) = operation_elsewhere(&app, &id) {
        let path = format!("/v1/operations/{id}");
        return app.pass_on(&host, hops, Call::new(Method::DELETE, path)).await;
    }
    let operation = app.operations.cancel(&id)?;
    app.events.emit("cancel", operation.user.as_ref(), json!({ "operation": id }));
    Ok(Json(operation).into_response())
}

impl Daemon {
    /// Completes a view with what the owner knows; an owner that does not answer leaves it in doubt.
    async fn ask_owner(self: &Arc<Self>, mut view: ImageView, patience: Duration) -> ImageView {
        let call = Call::new(Method::GET, format!("/v1/images/{}", view.user)).patience(patience);
        let call = Call { hops: 1, ..call };
        let answer = match self.address(&view.host) {
            Ok(address) => {
                self.peers.call(&view.host, address, &call).await.and_then(|answer| answer.into_value())
            }
            Err(error) => Err(error),
        };
        match answer {
            Ok(answer) => answer,
            Err(error) => {
                if view.state != MachineState::Stopped {
                    view.state = MachineState::InDoubt;
                }
                view.note = Some(error.message);
                view
            }
        }
    }
}

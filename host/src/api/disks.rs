//! Disks: blocks for other hosts, images that go to them, scrubs.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::{FromRequestParts, Path, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::{Method, StatusCode, request::Parts};
use kage_machine::{HostName, UserName};

use super::{
    App, Hops, Reply, Route, body,
    error::{Code, ErrorBody},
    name,
    types::{GiveRequest, Given},
};
use crate::{http::Call, lifecycle::Daemon};

/// Who asks, as a connection's certificate says.
#[derive(Clone, Debug)]
pub struct Peer(pub HostName);

/// A host of this site that asks for what is not for people.
pub(super) struct Asking(HostName);

impl FromRequestParts<App> for Asking {
    type Rejection = ErrorBody;
    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ErrorBody> {
        let Some(Peer(host)) = parts.extensions.get::<Peer>() else {
            return Err(ErrorBody::bad_request("only other hosts ask for this, with their certificate"));
        };
        if !app.seen.borrow().hosts.contains_key(host) {
            return Err(ErrorBody::no_host(host.as_str()));
        }
        Ok(Self(host.clone()))
    }
}

pub(super) fn routes() -> Vec<Route> {
    let route = |method, path, summary, body, answer, handler| Route {
        method,
        path,
        summary,
        body,
        answer,
        query: &[],
        handler,
    };
    vec![
        route(
            Method::POST,
            "/v1/images/{user}/scrub",
            "Looks through a disk for damage, and repairs what another host has.",
            None,
            "Operation",
            post(scrub),
        ),
        route(
            Method::POST,
            "/v1/images/{user}/give",
            "For hosts: gives a stopped image to the host that asks.",
            Some("GiveRequest"),
            "Given",
            post(give),
        ),
        route(
            Method::GET,
            "/v1/images/{user}/disk/digests",
            "For hosts: the digests of the blocks that this host has.",
            None,
            "bytes",
            get(digests),
        ),
        route(
            Method::POST,
            "/v1/images/{user}/disk/blocks",
            "For hosts: blocks that this host has, by their digests.",
            Some("bytes"),
            "bytes",
            post(blocks),
        ),
    ]
}

async fn scrub(State(app): State<App>, Path(user): Path<String>, hops: Hops) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    if let Some(owner) = app.elsewhere(&user).await? {
        let path = format!("/v1/images/{user}/scrub");
        return app.pass_on(&owner, hops, Call::new(Method::POST, path)).await;
    }
    let operation = app.begin_scrub(&user).await?;
    let location = [(http::header::LOCATION, format!("/v1/operations/{}", operation.id))];
    Ok((StatusCode::ACCEPTED, location, Json(operation)).into_response())
}

async fn give(
    State(app): State<App>,
    Path(user): Path<String>,
    Asking(host): Asking,
    bytes: Bytes,
) -> Reply<Given> {
    let user: UserName = name(&user)?;
    let request: GiveRequest = body(&bytes)?;
    if request.to != host {
        return Err(ErrorBody::bad_request(format!("host {host} asks for another, {}", request.to)));
    }
    if request.to == app.me {
        return Err(ErrorBody::new(Code::BadRequest, "this host asks itself"));
    }
    Ok(Json(app.give(&user, &request.to).await?))
}

pub(super) fn octets(bytes: Vec<u8>) -> Response {
    ([(http::header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response()
}

async fn digests(State(app): State<App>, Path(user): Path<String>, _: Asking) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    Ok(octets(app.serve_list(&user).await?))
}

async fn blocks(
    State(app): State<App>,
    Path(user): Path<String>,
    _: Asking,
    bytes: Bytes,
) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    Ok(octets(app.serve_blocks(&user, &bytes).await?))
}

impl Daemon {
    /// An image's view of its disk, also where its log has to be opened for it; blocks.
    pub(super) fn look_at_disk(self: &Arc<Self>, user: &UserName) {
        let Ok(Some(found)) = self.record(user) else { return };
        if found.record.owner == self.me
            && found.record.profile.disk_bytes > 0
            && let Err(error) = self.disk(&self.image(user), &found.record)
        {
            tracing::debug!(%error, %user, "its disk is not looked at");
        }
    }
}

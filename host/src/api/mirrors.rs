//! Mirrors: where they are to be, and whether they are what they claim.

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
    response::{IntoResponse, Response},
    routing::{post, put},
};
use http::Method;
use kage_machine::UserName;

use super::{
    App, Hops, Reply, Route, body,
    disks::Asking,
    error::ErrorBody,
    name,
    types::{MirrorState, MirrorsRequest},
};
use crate::http::Call;

/// Longest wait for an owner that reads all its mirrors.
const CHECK: std::time::Duration = std::time::Duration::from_secs(60);

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
            Method::PUT,
            "/v1/images/{user}/mirrors",
            "Pins a machine's mirrors to hosts, or leaves them to the prediction again.",
            Some("MirrorsRequest"),
            "MirrorsRequest",
            put(pin).post(pin),
        ),
        route(
            Method::POST,
            "/v1/images/{user}/mirrors/check",
            "Reads all mirrors of a machine and compares them with what was sent.",
            None,
            "MirrorCheck[]",
            post(check),
        ),
        route(
            Method::POST,
            "/v1/mirrors/{user}/check",
            "For hosts: reads the mirror that this host keeps.",
            None,
            "MirrorState",
            post(check_own),
        ),
    ]
}

async fn pin(
    State(app): State<App>,
    Path(user): Path<String>,
    hops: Hops,
    bytes: Bytes,
) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    let request: MirrorsRequest = body(&bytes)?;
    if let Some(owner) = app.elsewhere(&user).await? {
        let path = format!("/v1/images/{user}/mirrors");
        return app.pass_on(&owner, hops, Call::new(Method::PUT, path).json(&request)).await;
    }
    for host in request.hosts.iter().flatten() {
        app.address(host)?;
    }
    let image = app.known(&user).ok_or_else(|| ErrorBody::no_user(&user))?;
    app.pin_mirrors(&image, request.hosts.clone());
    Ok(Json(request).into_response())
}

async fn check(State(app): State<App>, Path(user): Path<String>, hops: Hops) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    if let Some(owner) = app.elsewhere(&user).await? {
        let path = format!("/v1/images/{user}/mirrors/check");
        return app.pass_on(&owner, hops, Call::new(Method::POST, path).patience(CHECK)).await;
    }
    Ok(Json(app.check_mirrors(&user).await?).into_response())
}

async fn check_own(State(app): State<App>, Path(user): Path<String>, _: Asking) -> Reply<MirrorState> {
    Ok(Json(app.check_own_mirror(&name(&user)?).await?))
}

//! The daemon's HTTP API: one table of routes, from which both the router and `/openapi.json` are made.
//!
//! Served on the unix socket, and to other daemons of the site over mutual TLS on the peer port. A request
//! about an image that another host owns is passed on to that host.

mod disks;
pub mod error;
mod hosts;
mod images;
mod mirrors;
mod openapi;
mod prediction;
mod stream;
pub mod types;

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{FromRequestParts, State},
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
    routing::MethodRouter,
};
use http::Method;
use kage_machine::{HostName, UserName};
use serde::{Deserialize, de::DeserializeOwned};

use crate::{http::Call, http::HOPS, lifecycle::Daemon};
use error::{Code, ErrorBody};

pub use disks::Peer;

/// What handlers share.
pub type App = Arc<Daemon>;

/// Result of a handler.
pub type Reply<T> = Result<Json<T>, ErrorBody>;

/// A host may pass a request on this often: the owner may change while it is on its way.
const MAX_HOPS: u8 = 4;

/// One route.
pub struct Route {
    /// Its method.
    pub method: Method,
    /// Its path, with `{parameters}`.
    pub path: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// Name of the body's type.
    pub body: Option<&'static str>,
    /// Name of the answer's type.
    pub answer: &'static str,
    /// Its query parameters.
    pub query: &'static [&'static str],
    handler: MethodRouter<App>,
}

fn routes() -> Vec<Route> {
    let mut all = images::routes();
    all.extend(disks::routes());
    all.extend(mirrors::routes());
    all.extend(prediction::routes());
    all.extend(hosts::routes());
    all.extend(stream::routes());
    all
}

/// The router of a daemon.
pub fn router(daemon: App) -> Router {
    let mut router = Router::new();
    for route in routes() {
        router = router.route(route.path, route.handler);
    }
    router
        .fallback(|method: Method, uri: http::Uri| async move {
            ErrorBody::new(Code::NotFound, format!("{method} {} is unknown; see /openapi.json", uri.path()))
        })
        .method_not_allowed_fallback(|method: Method, uri: http::Uri| async move {
            let message = format!("{method} is not offered by {}; see /openapi.json", uri.path());
            (StatusCode::METHOD_NOT_ALLOWED, Json(ErrorBody::bad_request(message)))
        })
        .layer(axum::middleware::from_fn_with_state(daemon.clone(), count))
        .with_state(daemon)
}

/// `/metrics` alone, for a scraper that has no certificate.
pub fn metrics_router(daemon: App) -> Router {
    Router::new().route("/metrics", axum::routing::get(hosts::metrics)).with_state(daemon)
}

/// The description of the API (OpenAPI 3).
#[must_use]
pub fn description() -> serde_json::Value {
    openapi::document()
}

async fn count(
    State(app): State<App>,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    let response = next.run(request).await;
    app.metrics.add("kage_api_requests_total", &[("status", response.status().as_str())], 1);
    response
}

/// How often a request was passed on already.
#[derive(Clone, Copy, Debug)]
pub struct Hops(u8);

impl Hops {
    const fn count(self) -> u8 {
        self.0
    }
}

impl<S: Sync> FromRequestParts<S> for Hops {
    type Rejection = std::convert::Infallible;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let hops = parts.headers.get(HOPS).and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Self(hops.unwrap_or(0)))
    }
}

/// `?wait=5s` and the like.
#[derive(Clone, Debug, Default, Deserialize)]
struct Wait {
    wait: Option<crate::units::Span>,
}

impl Wait {
    const MOST: Duration = Duration::from_secs(60);

    fn duration(&self) -> Duration {
        self.wait.map_or(Duration::ZERO, crate::units::Span::duration).min(Self::MOST)
    }
}

/// Reads a JSON body; an empty one is a value with nothing set.
fn body<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, ErrorBody> {
    let bytes: &[u8] = if bytes.is_empty() { b"{}" } else { bytes };
    serde_json::from_slice(bytes)
        .map_err(|error| ErrorBody::bad_request(format!("the body is refused: {error}")))
}

/// Reads a name from a path.
fn name<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, ErrorBody> {
    text.parse().map_err(ErrorBody::bad_request)
}

/// An operation that has begun, with where to ask for it.
fn accepted(operation: types::Operation) -> Response {
    let location = [(http::header::LOCATION, format!("/v1/operations/{}", operation.id))];
    (StatusCode::ACCEPTED, location, Json(operation)).into_response()
}

impl Daemon {
    /// Passes a request on to a host; the answer comes back as it is.
    async fn pass_on(&self, host: &HostName, hops: Hops, mut call: Call) -> Result<Response, ErrorBody> {
        if hops.0 >= MAX_HOPS {
            let message = format!("the image's owner keeps changing (last seen: {host}); try again");
            return Err(ErrorBody::new(Code::Busy, message));
        }
        call.hops = hops.0 + 1;
        let answer = self.peers.call(host, self.address(host)?, &call).await?;
        let json = [(http::header::CONTENT_TYPE, "application/json")];
        Ok((answer.status, json, answer.body).into_response())
    }

    /// Where a host's peers connect.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub fn address(&self, host: &HostName) -> Result<std::net::SocketAddr, ErrorBody> {
        let seen = self.seen.borrow();
        seen.hosts.get(host).map(|record| record.advertise).ok_or_else(|| ErrorBody::no_host(host.as_str()))
    }

    /// The owner of a user's image, when it is not this host.
    async fn elsewhere(self: &Arc<Self>, user: &UserName) -> Result<Option<HostName>, ErrorBody> {
        let (daemon, user) = (self.clone(), user.clone());
        let owner = crate::lifecycle::blocking(move || Ok(daemon.existing(&user)?.record.owner)).await?;
        Ok((owner != self.me).then_some(owner))
    }
}

#[cfg(test)]
mod tests;

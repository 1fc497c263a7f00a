//! Hosts, access points, and where users are.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::Method;
use kage_directory::{ApRecord, Records as _};
use kage_machine::HostName;

use super::{
    App, Hops, Reply, Route, accepted, body,
    error::ErrorBody,
    name, openapi,
    types::{ApView, Cordon, DrainRequest, HostView, OperatorView, Ready, RoamReply, RoamRequest},
};
use crate::{
    http::Call,
    lifecycle::{Daemon, blocking},
    mirrors::memory_here,
};

/// How long a host may take to say that it is up.
const LOOK: Duration = Duration::from_secs(2);

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
        route(Method::GET, "/v1/hosts", "All hosts.", None, "HostView[]", get(hosts)),
        route(
            Method::POST,
            "/v1/hosts/{host}/cordon",
            "Keeps new images away from a host.",
            None,
            "Cordon",
            post(cordon),
        ),
        route(
            Method::POST,
            "/v1/hosts/{host}/uncordon",
            "Lets a host have new images again; ends a drain of it.",
            None,
            "Cordon",
            post(uncordon),
        ),
        route(
            Method::POST,
            "/v1/hosts/{host}/drain",
            "Cordons a host and moves every machine off it; its operation's result is a DrainReport.",
            Some("DrainRequest"),
            "Operation",
            post(drain),
        ),
        route(
            Method::GET,
            "/v1/operator",
            "Where this host has the operator's key.",
            None,
            "OperatorView",
            get(operator),
        ),
        route(Method::GET, "/v1/aps", "All access points.", None, "ApView[]", get(aps)),
        route(
            Method::POST,
            "/v1/roam",
            "Says that a user is at an access point now, as an Accounting-Start would.",
            Some("RoamRequest"),
            "RoamReply",
            post(roam),
        ),
        route(Method::GET, "/healthz", "Whether the daemon answers.", None, "text", get(async || "ok\n")),
        route(Method::GET, "/readyz", "Whether the daemon can do everything.", None, "Ready", get(ready)),
        route(Method::GET, "/metrics", "Figures for Prometheus.", None, "text", get(metrics)),
        route(
            Method::GET,
            "/openapi.json",
            "This description.",
            None,
            "OpenApi",
            get(async || Json(openapi::document())),
        ),
    ]
}

async fn hosts(State(app): State<App>) -> Reply<Vec<HostView>> {
    let seen = app.seen.borrow().clone();
    let daemon = app.clone();
    let aps = blocking(move || Ok(daemon.directory.read_all::<ApRecord>()?.0)).await?;
    let mut views = Vec::new();
    let mut asked = BTreeMap::new();
    for (name, record) in &seen.hosts {
        if *name != app.me {
            let (app, host, address) = (app.clone(), name.clone(), record.advertise);
            let call = Call::new(Method::GET, "/healthz").patience(LOOK);
            asked.insert(
                name.clone(),
                tokio::spawn(async move { app.peers.call(&host, address, &call).await.is_ok() }),
            );
        }
        views.push(HostView {
            name: name.clone(),
            advertise: record.advertise,
            up: true,
            cordoned: record.cordoned,
            images: seen.images.values().filter(|image| image.owner == *name).count() as u64,
            aps: aps.iter().filter(|(_, ap)| ap.record.host == *name).map(|(id, _)| id.clone()).collect(),
        });
    }
    for view in &mut views {
        if let Some(answer) = asked.remove(&view.name) {
            view.up = answer.await.unwrap_or(false);
        }
    }
    Ok(Json(views))
}

async fn set_cordon(app: App, host: &str, cordoned: bool) -> Reply<Cordon> {
    let host: HostName = name(host)?;
    let changed = app.set_cordoned(&host, cordoned).await?;
    Ok(Json(Cordon { host, cordoned, changed }))
}

async fn cordon(State(app): State<App>, Path(host): Path<String>) -> Reply<Cordon> {
    set_cordon(app, &host, true).await
}

async fn uncordon(State(app): State<App>, Path(host): Path<String>) -> Reply<Cordon> {
    set_cordon(app, &host, false).await
}

async fn drain(
    State(app): State<App>,
    Path(host): Path<String>,
    hops: Hops,
    bytes: Bytes,
) -> Result<Response, ErrorBody> {
    let host: HostName = name(&host)?;
    let request: DrainRequest = body(&bytes)?;
    if host != app.me {
        let call = Call::new(Method::POST, format!("/v1/hosts/{host}/drain")).json(&request);
        return app.pass_on(&host, hops, call).await;
    }
    Ok(accepted(app.begin_drain(request).await?))
}

async fn operator(State(app): State<App>) -> Json<OperatorView> {
    Json(OperatorView { key_file: app.config.image.operator_key_file.clone() })
}

async fn aps(State(app): State<App>) -> Reply<Vec<ApView>> {
    let records = blocking(move || Ok(app.directory.read_all::<ApRecord>()?.0)).await?;
    let view = |(id, found): (_, kage_directory::Versioned<ApRecord>)| ApView {
        id,
        nas: found.record.nas,
        host: found.record.host,
        position_m: found.record.position_m,
        mobility: match found.record.mobility {
            kage_directory::Mobility::L2 => "l2".to_owned(),
            kage_directory::Mobility::Route => "route".to_owned(),
        },
    };
    Ok(Json(records.into_iter().map(view).collect()))
}

async fn roam(State(app): State<App>, hops: Hops, bytes: Bytes) -> Reply<RoamReply> {
    let request: RoamRequest = body(&bytes)?;
    Ok(Json(app.roam(&request, hops.0).await?))
}

async fn ready(State(app): State<App>) -> Response {
    let lacks = app.lacks().await;
    let (warm_logins, warm_shells) = app.machines.ready();
    let memory_available_bytes = memory_here().map(|(_, available)| available);
    let ready = Ready {
        host: app.me.clone(),
        ready: lacks.is_empty(),
        lacks,
        warm_logins,
        warm_shells,
        memory_available_bytes,
    };
    let status = if ready.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(ready)).into_response()
}

pub(super) async fn metrics(State(app): State<App>) -> impl IntoResponse {
    app.count_images();
    ([(http::header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.text())
}

impl Daemon {
    /// What keeps this daemon from doing everything.
    async fn lacks(self: &std::sync::Arc<Self>) -> Vec<String> {
        let daemon = self.clone();
        let found = blocking(move || {
            let mut lacks = Vec::new();
            if let Err(error) = daemon.directory.get("host/") {
                lacks.push(error.to_string());
            }
            let image = &daemon.config.image;
            let least = image.geometry().map_err(|error| error.to_string());
            lacks.extend(least.and_then(|least| daemon.machines.check(&image.default, least)).err());
            Ok(lacks)
        })
        .await;
        found.unwrap_or_else(|error| vec![error.message])
    }

    /// Sets the gauges of images by state and of what waits in the pools.
    fn count_images(&self) {
        let (logins, shells) = self.machines.ready();
        for (kind, count) in [("login", logins), ("shell", shells)] {
            #[expect(clippy::cast_precision_loss, reason = "a count of machines")]
            let count = count as f64;
            self.metrics.set("kage_pool_ready", &[("kind", kind)], count);
        }
        let local = self.local();
        for state in super::types::State::ALL {
            #[expect(clippy::cast_precision_loss, reason = "a count of machines")]
            let count = local
                .iter()
                .map(|image| image.status())
                .filter(|status| {
                    status.state == state
                        && (status.memory.is_some() || state != super::types::State::Stopped)
                })
                .count() as f64;
            self.metrics.set("kage_images", &[("state", state.name())], count);
        }
        // Beside the states of machines that are here: those of other hosts that are followed here.
        #[expect(clippy::cast_precision_loss, reason = "a count of machines")]
        let mirrors = self.targets.mirror_count() as f64;
        self.metrics.set("kage_images", &[("state", "mirror")], mirrors);
    }
}

//! Where users may be next.

use axum::{
    Json,
    extract::{Path, State},
    response::{IntoResponse, Response},
    routing::get,
};
use http::Method;
use kage_machine::UserName;

use super::{
    App, Hops, Route,
    disks::{Asking, octets},
    error::ErrorBody,
    name,
};
use crate::http::Call;

pub(super) fn routes() -> Vec<Route> {
    let route = |path, summary, answer, handler| Route {
        method: Method::GET,
        path,
        summary,
        body: None,
        answer,
        query: &[],
        handler,
    };
    vec![
        route(
            "/v1/images/{user}/prediction",
            "Where the user may be next, and how often that was right.",
            "PredictionView",
            get(prediction),
        ),
        route(
            "/v1/images/{user}/history",
            "For hosts: what this host knows of the user's ways, for the machine's next owner.",
            "bytes",
            get(history),
        ),
    ]
}

async fn prediction(
    State(app): State<App>,
    Path(user): Path<String>,
    hops: Hops,
) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    if let Some(owner) = app.elsewhere(&user).await? {
        let path = format!("/v1/images/{user}/prediction");
        return app.pass_on(&owner, hops, Call::new(Method::GET, path)).await;
    }
    Ok(Json(app.prediction(&user).await?).into_response())
}

async fn history(State(app): State<App>, Path(user): Path<String>, _: Asking) -> Result<Response, ErrorBody> {
    let user: UserName = name(&user)?;
    Ok(octets(app.tell_history(&user).await?))
}

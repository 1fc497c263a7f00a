//! Events as they happen: server-sent events (HTML standard §9.2), resumed by `Last-Event-ID`.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::{Query, State},
    http::HeaderMap,
    response::{IntoResponse, Response},
    routing::get,
};
use futures_core::Stream;
use http::Method;
use serde::Deserialize;
use tokio::sync::mpsc;

use super::{App, Route};
use crate::lifecycle::Daemon;

/// How many chunks wait for a slow reader before the stream waits for it.
const AHEAD: usize = 16;

/// Pause after which a comment keeps the connection alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub(super) fn routes() -> Vec<Route> {
    vec![Route {
        method: Method::GET,
        path: "/v1/events",
        summary: "Events as server-sent events (follow=false: those there are, as JSON).",
        body: None,
        answer: "Event",
        query: &["after", "follow"],
        handler: get(events),
    }]
}

#[derive(Debug, Default, Deserialize)]
struct From {
    after: Option<u64>,
    follow: Option<bool>,
}

async fn events(State(app): State<App>, Query(from): Query<From>, headers: HeaderMap) -> Response {
    let last = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok());
    let after: u64 = last.or(from.after).unwrap_or(0);
    if from.follow == Some(false) {
        return Json(app.events.since(after).events).into_response();
    }
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(feed(Arc::downgrade(&app), after, sender));
    let headers =
        [(http::header::CONTENT_TYPE, "text/event-stream"), (http::header::CACHE_CONTROL, "no-store")];
    (headers, Body::from_stream(Chunks { receiver })).into_response()
}

/// Sends events after `after` until the reader or the daemon is gone.
async fn feed(app: std::sync::Weak<Daemon>, mut after: u64, sender: mpsc::Sender<Bytes>) {
    let Some(mut newest) = app.upgrade().map(|app| app.events.newest()) else { return };
    loop {
        newest.borrow_and_update();
        let Some(since) = app.upgrade().map(|app| app.events.since(after)) else { return };
        if since.gap && sender.send(Bytes::from_static(b": some events are forgotten\n\n")).await.is_err() {
            return;
        }
        for event in since.events {
            let data = serde_json::to_string(&event).unwrap_or_default();
            let chunk = format!("id: {}\nevent: {}\ndata: {data}\n\n", event.id, event.kind);
            if sender.send(chunk.into()).await.is_err() {
                return;
            }
            after = event.id;
        }
        match tokio::time::timeout(KEEP_ALIVE, newest.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) => {
                if sender.send(Bytes::from_static(b": still here\n\n")).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Chunks of a body from a channel.
struct Chunks {
    receiver: mpsc::Receiver<Bytes>,
}

impl Stream for Chunks {
    type Item = Result<Bytes, Infallible>;
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(context).map(|chunk| chunk.map(Ok))
    }
}

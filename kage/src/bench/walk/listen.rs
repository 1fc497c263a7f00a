//! What the daemons of a testbed tell of moves, as they tell it.

use std::{
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use http::Method;
use kage_host::{events::Event, http::Call};
use tokio::{sync::oneshot, task::JoinSet};

use crate::{
    bench::desk::runtime,
    client::{Client, Failure},
    testbed::Cancel,
};

/// A cancelled wait ends within this.
const CANCELLED_WITHIN: Duration = Duration::from_millis(100);

/// Kinds of events that tell how a user's way to a host began and ended, beside those that carry a move's report.
const KINDS: [&str; 2] = ["roam", "arrived"];

/// Follows the daemons until dropped. What it keeps grows with the walk, and with nothing else.
pub struct Listener {
    heard: Arc<Heard>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Heard {
    inner: Mutex<Inner>,
    more: Condvar,
}

#[derive(Default)]
struct Inner {
    events: Vec<Event>,
    failed: Option<Failure>,
}

impl Heard {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether an event carries the report of a move.
fn is_report(event: &Event) -> bool {
    event.details.contains_key("blackout_ms")
}

impl Listener {
    /// Follows the daemons of these sockets, from what comes next.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn start(sockets: Vec<PathBuf>) -> Result<Self, Failure> {
        let runtime = runtime()?;
        let heard = Arc::new(Heard::default());
        let mut followers = JoinSet::new();
        for socket in sockets {
            let client = Client::at(socket);
            let call = Call::new(Method::GET, "/v1/events?follow=false");
            let before: Vec<Event> = runtime.block_on(client.call(&call))?;
            let (after, heard) = (before.last().map_or(0, |event| event.id), heard.clone());
            followers.spawn_on(async move { follow(&client, after, &heard).await }, runtime.handle());
        }
        let (stop, stopped) = oneshot::channel();
        let telling = heard.clone();
        let thread = thread::spawn(move || {
            runtime.block_on(async move {
                tokio::select! {
                    Some(Ok(failed)) = followers.join_next() => {
                        telling.lock().failed = Some(failed);
                        telling.more.notify_all();
                    }
                    _ = stopped => {}
                }
            });
        });
        Ok(Self { heard, stop: Some(stop), thread: Some(thread) })
    }

    /// What `find` makes of all that was heard, as soon as it makes anything of it; `None` at the deadline.
    ///
    /// # Errors
    /// When a daemon has ended, or the bench is cancelled.
    pub fn wait<T>(
        &self,
        deadline: Instant,
        cancel: &Cancel,
        find: impl Fn(&[Event]) -> Option<T>,
    ) -> Result<Option<T>, Failure> {
        let mut inner = self.heard.lock();
        loop {
            cancel.check().map_err(Failure::new)?;
            if let Some(found) = find(&inner.events) {
                return Ok(Some(found));
            }
            if let Some(failed) = &inner.failed {
                return Err(failed.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let waited = self.heard.more.wait_timeout(inner, left.min(CANCELLED_WITHIN));
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

async fn follow(client: &Client, after: u64, heard: &Heard) -> Failure {
    let take = |event: &Event| {
        if event.user.is_some() && (is_report(event) || KINDS.contains(&event.kind.as_str())) {
            heard.lock().events.push(event.clone());
            heard.more.notify_all();
        }
        Ok(())
    };
    client.follow(after, take).await
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It may have ended by itself.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What became of a user's way to a host, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// The machine was there already, and stays.
    pub stays: bool,
    /// When it had arrived, in milliseconds since 1970.
    pub arrived_at_ms: Option<u64>,
    /// The move's report.
    pub report: Option<serde_json::Map<String, serde_json::Value>>,
    /// Its outcome.
    pub outcome: Option<String>,
}

impl Told {
    /// Of a user who went to a host's access point at the first of two times, and there again at the second, both in
    /// milliseconds since 1970: what was told between them.
    #[must_use]
    pub fn of(events: &[Event], user: &str, ap: &str, host: &str, between: (u64, u64)) -> Self {
        let theirs = || {
            let user = |event: &&Event| event.user.as_ref().is_some_and(|of| of.as_str() == user);
            events.iter().filter(user).filter(|event| (between.0..between.1).contains(&event.at_ms))
        };
        let text = |event: &Event, name: &str| {
            event.details.get(name).and_then(|value| value.as_str()).unwrap_or_default().to_owned()
        };
        let mut told = Self::default();
        let roam = theirs().find(|event| event.kind == "roam" && text(event, "ap") == ap);
        told.stays = roam.is_some_and(|event| text(event, "action") == "stays");
        if told.stays {
            return told;
        }
        let ended = theirs().find(|event| is_report(event) && text(event, "to") == host);
        let arrived = theirs().find(|event| event.kind == "arrived" && event.host.as_str() == host);
        told.arrived_at_ms = arrived.map(|event| event.at_ms);
        told.report = ended.map(|event| event.details.clone());
        told.outcome = ended.map(|event| event.kind.clone());
        told
    }

    /// Whether nothing more is to come.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.stays || self.report.is_some()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(at_ms: u64, host: &str, kind: &str, user: &str, details: serde_json::Value) -> Event {
        let serde_json::Value::Object(details) = details else { panic!("no object") };
        let (host, user) = (host.parse().unwrap(), user.parse().ok());
        Event { id: at_ms, at_ms, host, kind: kind.into(), user, details }
    }

    #[test]
    fn a_move_is_told_by_what_came_after_it_began() {
        let report = json!({ "from": "h1", "to": "h2", "blackout_ms": 1.5 });
        let events = [
            event(90, "h1", "handed_over", "alice", json!({ "to": "h2", "blackout_ms": 9.0 })),
            event(100, "h2", "roam", "alice", json!({ "ap": "ap-2", "action": "moves" })),
            event(110, "h2", "arrived", "bob", json!({})),
            event(120, "h2", "arrived", "alice", json!({})),
            event(130, "h1", "handed_over", "bob", report.clone()),
            event(140, "h3", "handed_over", "alice", json!({ "to": "h1", "blackout_ms": 3.0 })),
            event(150, "h1", "handed_over", "alice", report.clone()),
        ];
        let told = Told::of(&events, "alice", "ap-2", "h2", (95, 200));
        assert_eq!((told.arrived_at_ms, told.outcome.as_deref()), (Some(120), Some("handed_over")));
        assert!(told.is_over() && !told.stays);
        assert_eq!(told.report.map(serde_json::Value::Object), Some(report));
        // Before the report nothing is over.
        let early = Told::of(&events[..4], "alice", "ap-2", "h2", (95, 200));
        assert!(!early.is_over() && early.arrived_at_ms == Some(120));
        assert_eq!(Told::of(&events, "carol", "ap-2", "h2", (0, 200)), Told::default());
    }

    #[test]
    fn a_machine_that_stays_waits_for_no_report() {
        let roam = |at: u64, action: &str| {
            event(at, "h2", "roam", "alice", json!({ "ap": "ap-2", "action": action }))
        };
        assert!(Told::of(&[roam(100, "stays")], "alice", "ap-2", "h2", (95, 200)).is_over());
        // A later visit of the same access point is another matter.
        assert!(!Told::of(&[roam(300, "stays")], "alice", "ap-2", "h2", (95, 200)).is_over());
    }
}

//! What happened on this host, numbered: a bounded ring that readers follow and resume.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use kage_machine::{HostName, UserName};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::watch;

/// How many events are kept for readers that come back.
const KEPT: usize = 4096;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its number on this host, from 1.
    pub id: u64,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Where.
    pub host: HostName,
    /// What: `login`, `handed_over`, `restarted`, …
    pub kind: String,
    /// Whose image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserName>,
    /// What else to know, by kind.
    #[serde(flatten)]
    pub details: Map<String, Value>,
}

/// The ring.
pub struct Events {
    host: HostName,
    ring: Mutex<Ring>,
    newest: watch::Sender<u64>,
}

struct Ring {
    events: VecDeque<Event>,
    last: u64,
}

/// Events after a number.
#[derive(Clone, Debug, PartialEq)]
pub struct Since {
    /// The events, oldest first.
    pub events: Vec<Event>,
    /// Whether some in between are forgotten.
    pub gap: bool,
}

impl Events {
    /// An empty ring of `host`'s.
    #[must_use]
    pub fn new(host: HostName) -> Self {
        Self {
            host,
            ring: Mutex::new(Ring { events: VecDeque::new(), last: 0 }),
            newest: watch::Sender::new(0),
        }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event; `details` is a JSON object.
    pub fn emit(&self, kind: &str, user: Option<&UserName>, details: Value) {
        let mut details = match details {
            Value::Object(details) => details,
            Value::Null => Map::new(),
            other => Map::from_iter([("detail".to_owned(), other)]),
        };
        for own in ["id", "at_ms", "host", "kind", "user"] {
            details.remove(own);
        }
        let shown = serde_json::to_string(&details).unwrap_or_default();
        tracing::info!(target: "kage::event", kind, user = user.map(UserName::as_str), details = shown);
        let at_ms = now_ms();
        let id = {
            let mut ring = self.ring();
            ring.last += 1;
            let event = Event {
                id: ring.last,
                at_ms,
                host: self.host.clone(),
                kind: kind.to_owned(),
                user: user.cloned(),
                details,
            };
            ring.events.push_back(event);
            if ring.events.len() > KEPT {
                ring.events.pop_front();
            }
            ring.last
        };
        self.newest.send_replace(id);
    }

    /// The events after number `after`. A number of an earlier run of the daemon (above the newest) starts anew.
    #[must_use]
    pub fn since(&self, after: u64) -> Since {
        let ring = self.ring();
        let after = if after > ring.last { 0 } else { after };
        let events: Vec<_> = ring.events.iter().filter(|event| event.id > after).cloned().collect();
        let gap = events.first().is_some_and(|first| first.id > after + 1);
        Since { events, gap }
    }

    /// The newest event's number, to be watched.
    #[must_use]
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_reader_resumes_after_the_number_it_saw() {
        let events = Events::new("h1".parse().unwrap());
        for n in 0..5 {
            events.emit("tick", None, json!({ "n": n }));
        }
        let since = events.since(3);
        assert_eq!(since.events.iter().map(|event| event.id).collect::<Vec<_>>(), [4, 5]);
        assert!(!since.gap);
        assert!(events.since(5).events.is_empty());
        assert_eq!(*events.newest().borrow(), 5);
    }

    #[test]
    fn details_never_hide_an_events_own_fields() {
        let events = Events::new("h1".parse().unwrap());
        events.emit(
            "handed_over",
            "alice".parse().ok().as_ref(),
            json!({ "user": "bob", "id": "x", "from": "h1" }),
        );
        let text = serde_json::to_string(&events.since(0).events[0]).unwrap();
        let event: Event = serde_json::from_str(&text).unwrap();
        assert_eq!((event.id, event.user.unwrap().as_str()), (1, "alice"));
    }

    #[test]
    fn the_ring_is_bounded_and_says_what_it_forgot() {
        let events = Events::new("h1".parse().unwrap());
        for _ in 0..KEPT + 10 {
            events.emit("tick", None, Value::Null);
        }
        let since = events.since(1);
        assert_eq!(since.events.len(), KEPT);
        assert!(since.gap);
    }

    #[test]
    fn a_number_of_an_earlier_run_starts_anew() {
        let events = Events::new("h1".parse().unwrap());
        events.emit("start", None, Value::Null);
        assert_eq!(events.since(900).events.len(), 1);
    }
}

//! Sessions and the orders in which they are looked for, so that nothing a packet asks for walks over all of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use kage_machine::{UserName, identity::ApName};

use super::Session;

/// Whose session, and with which device.
pub(super) type Key = Arc<(UserName, String)>;

/// All sessions. Whatever changes one puts it in anew, so that every order holds it as it is.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    sessions: BTreeMap<Key, Session>,
    by_ap: BTreeMap<ApName, BTreeSet<Key>>,
    by_heard: BTreeSet<(u64, Key)>,
    by_end: BTreeSet<(Instant, Key)>,
}

impl Table {
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    pub fn get(&self, key: &Key) -> Option<&Session> {
        self.sessions.get(key)
    }

    /// Puts a session in, in place of the one of that key.
    pub fn put(&mut self, key: Key, session: Session) {
        self.remove(&key);
        self.by_ap.entry(session.ap.clone()).or_default().insert(key.clone());
        self.by_heard.insert((session.heard_ms, key.clone()));
        if let Some(end) = session.leaving {
            self.by_end.insert((end, key.clone()));
        }
        self.sessions.insert(key, session);
    }

    pub fn remove(&mut self, key: &Key) -> Option<Session> {
        let session = self.sessions.remove(key)?;
        if let Some(here) = self.by_ap.get_mut(&session.ap) {
            here.remove(key);
            if here.is_empty() {
                self.by_ap.remove(&session.ap);
            }
        }
        self.by_heard.remove(&(session.heard_ms, key.clone()));
        if let Some(end) = session.leaving {
            self.by_end.remove(&(end, key.clone()));
        }
        Some(session)
    }

    /// The sessions of a user.
    pub fn of(&self, user: &UserName) -> impl Iterator<Item = (&Key, &Session)> {
        let first: Key = Arc::new((user.clone(), String::new()));
        let user = user.clone();
        self.sessions.range(first..).take_while(move |(key, _)| key.0 == user)
    }

    /// The sessions at an access point.
    pub fn at(&self, ap: &ApName) -> Vec<Key> {
        self.by_ap.get(ap).map(|here| here.iter().cloned().collect()).unwrap_or_default()
    }

    /// The session of which nothing was heard for longest.
    pub fn oldest(&self) -> Option<Key> {
        self.by_heard.first().map(|(_, key)| key.clone())
    }

    /// The session that ends next, and when.
    pub fn next_end(&self) -> Option<(Instant, &Key)> {
        self.by_end.first().map(|(end, key)| (*end, key))
    }

    /// Whether every order holds every session, and nothing else.
    #[cfg(test)]
    pub fn is_consistent(&self) -> bool {
        let at: usize = self.by_ap.values().map(BTreeSet::len).sum();
        let leaving = self.sessions.values().filter(|session| session.leaving.is_some()).count();
        at == self.len()
            && self.by_heard.len() == self.len()
            && self.by_end.len() == leaving
            && self.sessions.iter().all(|(key, session)| {
                self.by_ap.get(&session.ap).is_some_and(|here| here.contains(key))
                    && self.by_heard.contains(&(session.heard_ms, key.clone()))
                    && session.leaving.is_none_or(|end| self.by_end.contains(&(end, key.clone())))
            })
    }
}

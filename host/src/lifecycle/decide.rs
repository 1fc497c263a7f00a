//! What to do with an image, from what the directory says and what is here. Pure.

use std::time::{Duration, Instant};

use kage_directory::{ImageRecord, Wanted};
use kage_machine::HostName;

/// What a login at `me` does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Login {
    /// Nobody has this image: make its record.
    Create,
    /// Its owner is this host: start it, or find it running.
    Here,
    /// Its owner is this host, and cannot give it away: start it, then bring it to where its user is.
    HereThenNear(HostName),
    /// It is stopped, and this is the host where its user is: ask its owner for it.
    Take(HostName),
    /// Another host does it.
    Ask(HostName),
}

/// Decides a login of a user near host `at`. Only a machine that is to be stopped now goes there: one that is wanted
/// is where others find it, so that logins at the same time are all answered with the same host. `may_give` says
/// whether this host, as its owner, may give it away.
#[must_use]
pub fn login(record: Option<&ImageRecord>, me: &HostName, at: Option<&HostName>, may_give: bool) -> Login {
    let Some(record) = record else {
        return match at {
            Some(at) if at != me => Login::Ask(at.clone()),
            _ => Login::Create,
        };
    };
    let is_mine = record.owner == *me;
    match at.filter(|at| record.wanted == Wanted::Stopped && record.owner != **at) {
        None if is_mine => Login::Here,
        None => Login::Ask(record.owner.clone()),
        Some(at) if at == me => Login::Take(record.owner.clone()),
        Some(at) if is_mine && !may_give => Login::HereThenNear(at.clone()),
        Some(at) => Login::Ask(at.clone()),
    }
}

/// Limits how often a machine that keeps dying is started again.
#[derive(Clone, Debug, Default)]
pub struct Restarts {
    recent: Vec<Instant>,
}

impl Restarts {
    /// Restarts allowed within [`Restarts::WINDOW`].
    pub const MOST: usize = 5;
    /// Over how long they are counted.
    pub const WINDOW: Duration = Duration::from_secs(60);

    /// Whether one more is allowed now; counts it.
    pub fn allow(&mut self, now: Instant) -> bool {
        self.recent.retain(|then| now.duration_since(*then) < Self::WINDOW);
        let allowed = self.recent.len() < Self::MOST;
        if allowed {
            self.recent.push(now);
        }
        allowed
    }

    /// The one last allowed did not come about.
    pub fn uncount(&mut self) {
        self.recent.pop();
    }
}

#[cfg(test)]
mod tests {
    use kage_directory::Profile;
    use kage_machine::{ImageNumber, Term};

    use super::*;

    fn host(name: &str) -> HostName {
        name.parse().unwrap()
    }

    fn record(owner: &str, wanted: Wanted) -> ImageRecord {
        ImageRecord {
            term: Term(3),
            owner: host(owner),
            intent: None,
            backup: None,
            wanted,
            number: ImageNumber(7),
            indices: ImageRecord::FIRST_INDICES,
            ipv4: None,
            disk_origin: None,
            profile: Profile {
                image: "default".into(),
                memory_bytes: 64 << 20,
                disk_bytes: 0,
                host_key_seed: [0; 32],
                authorized_keys: Vec::new(),
            },
        }
    }

    #[test]
    fn only_a_stopped_image_goes_to_where_its_user_logs_in() {
        use Wanted::{Running, Stopped};
        let (a, b, c) = (&host("a"), &host("b"), &host("c"));
        let ask = |host: &HostName| Login::Ask(host.clone());
        for (owned, me, at, may_give, expected) in [
            (None, a, None, true, Login::Create),
            (None, a, Some(a), true, Login::Create),
            (None, a, Some(b), true, ask(b)),
            (Some(("a", Stopped)), a, None, true, Login::Here),
            (Some(("a", Stopped)), a, Some(a), true, Login::Here),
            (Some(("b", Stopped)), a, None, true, ask(b)),
            (Some(("b", Stopped)), a, Some(a), true, Login::Take(b.clone())),
            (Some(("b", Stopped)), a, Some(b), true, ask(b)),
            (Some(("b", Stopped)), a, Some(c), true, ask(c)),
            (Some(("a", Stopped)), a, Some(b), true, ask(b)),
            (Some(("a", Stopped)), a, Some(b), false, Login::HereThenNear(b.clone())),
            // Whoever was faster has started it, and is answered with where it is.
            (Some(("a", Running)), a, Some(b), true, Login::Here),
            (Some(("b", Running)), a, Some(a), true, ask(b)),
            (Some(("b", Running)), a, Some(c), false, ask(b)),
        ] {
            let record = owned.map(|(owner, wanted)| record(owner, wanted));
            assert_eq!(
                login(record.as_ref(), me, at, may_give),
                expected,
                "{owned:?} {me} {at:?} {may_give}"
            );
        }
    }

    #[test]
    fn a_machine_that_keeps_dying_is_left_alone_for_a_while() {
        let start = Instant::now();
        let mut restarts = Restarts::default();
        assert!((0..Restarts::MOST).all(|_| restarts.allow(start)));
        assert!(!restarts.allow(start));
        restarts.uncount();
        assert!(restarts.allow(start));
        assert!(!restarts.allow(start));
        assert!(restarts.allow(start + Restarts::WINDOW));
    }
}

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
    /// Its owner is another host, which starts or finds it.
    Ask(HostName),
}

/// Decides a login. An image is always started by its owner, which has its disk.
#[must_use]
pub fn login(record: Option<&ImageRecord>, me: &HostName) -> Login {
    match record {
        None => Login::Create,
        Some(record) if record.owner == *me => Login::Here,
        Some(record) => Login::Ask(record.owner.clone()),
    }
}

/// What a user's arrival at an access point of host `at` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Roam {
    /// The image is there.
    Stays,
    /// It is there, and on its way elsewhere: it is to stay.
    Recalled,
    /// A move that leads there is under way.
    Comes,
    /// Its owner has to hand it over to the access point's host.
    Moves,
    /// It is not running; nobody starts it by walking.
    Stopped,
}

/// Decides a roam at the image's owner, which knows where the moves `under_way` lead. The record's intent is no guide:
/// there is none yet while a move is prepared, and one may be left of a move that is over.
#[must_use]
pub fn roam(record: &ImageRecord, at: &HostName, under_way: &[&HostName]) -> Roam {
    if record.wanted == Wanted::Stopped {
        return Roam::Stopped;
    }
    match (record.owner == *at, under_way) {
        (true, []) => Roam::Stays,
        (true, _) => Roam::Recalled,
        (false, moves) if moves.contains(&at) => Roam::Comes,
        (false, _) => Roam::Moves,
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
    use kage_directory::{Intent, Profile};
    use kage_machine::{HandoverId, ImageNumber, Term};

    use super::*;

    fn host(name: &str) -> HostName {
        name.parse().unwrap()
    }

    fn record(owner: &str, intent: Option<&str>, wanted: Wanted) -> ImageRecord {
        ImageRecord {
            term: Term(3),
            owner: host(owner),
            intent: intent.map(|target| Intent { target: host(target), handover: HandoverId([1; 16]) }),
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
    fn only_the_owner_starts_an_image() {
        assert_eq!(login(None, &host("a")), Login::Create);
        assert_eq!(login(Some(&record("a", None, Wanted::Stopped)), &host("a")), Login::Here);
        assert_eq!(login(Some(&record("b", None, Wanted::Stopped)), &host("a")), Login::Ask(host("b")));
        assert_eq!(login(Some(&record("b", Some("a"), Wanted::Running)), &host("a")), Login::Ask(host("b")));
    }

    #[test]
    fn roaming_moves_running_images_to_the_access_points_host() {
        use Wanted::{Running, Stopped};
        for (record, moves, expected) in [
            (record("b", None, Running), vec![], Roam::Stays),
            (record("a", None, Running), vec![], Roam::Moves),
            // A move is prepared before its intent is recorded, and an intent may outlive its move.
            (record("a", None, Running), vec!["b"], Roam::Comes),
            (record("a", Some("b"), Running), vec!["c", "b"], Roam::Comes),
            (record("a", Some("b"), Running), vec![], Roam::Moves),
            (record("a", Some("c"), Running), vec!["c"], Roam::Moves),
            (record("b", None, Running), vec!["c"], Roam::Recalled),
            (record("b", Some("c"), Running), vec!["c"], Roam::Recalled),
            (record("b", Some("c"), Running), vec![], Roam::Stays),
            (record("a", None, Stopped), vec![], Roam::Stopped),
        ] {
            let moves: Vec<_> = moves.into_iter().map(host).collect();
            let under_way: Vec<_> = moves.iter().collect();
            assert_eq!(roam(&record, &host("b"), &under_way), expected, "{record:?} {moves:?}");
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

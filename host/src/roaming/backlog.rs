//! What is to be done and is not begun: as many consequences at a time as a host can carry out, and of those that
//! wait only the latest of each device. Who has come back has not left, and whose leaving is begun is seen anew when
//! that is over. Pure.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use kage_machine::UserName;

use super::{radius::DeviceAddresses, sessions::Consequence};

/// Begun at a time. One takes some kilobytes and mostly waits for a move; a user who walks on is chased by a
/// second one beside the first.
const MOST_BEGUN: usize = 2_048;
/// Waiting; beyond, what comes is refused and counted.
const MOST_WAITING: usize = 100_000;

/// Of two consequences with the same key the later one makes the earlier one pointless.
type Key = (UserName, DeviceAddresses, Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Place,
    Traffic,
    Departure,
    Left,
}

/// What waits.
#[derive(Debug, Default)]
pub struct Backlog {
    begun: usize,
    /// Users whose leaving is begun.
    leaving: BTreeSet<UserName>,
    waiting: BTreeMap<Key, Consequence>,
    order: VecDeque<Key>,
}

impl Backlog {
    /// Adds one; `false` if there is no room for it.
    #[must_use]
    pub fn push(&mut self, consequence: Consequence) -> bool {
        let key = key(&consequence);
        if key.2 == Kind::Place {
            let left = (key.0.clone(), DeviceAddresses::default(), Kind::Left);
            if self.waiting.remove(&left).is_some() {
                self.order.retain(|waiting| *waiting != left);
            }
        }
        if let Some(waiting) = self.waiting.get_mut(&key) {
            *waiting = merged(waiting, consequence);
            return true;
        }
        if self.waiting.len() >= MOST_WAITING {
            return false;
        }
        self.order.push_back(key.clone());
        self.waiting.insert(key, consequence);
        true
    }

    /// The next one to begin, while not too many are begun.
    pub fn begin(&mut self) -> Option<Consequence> {
        if self.begun >= MOST_BEGUN {
            return None;
        }
        let at = self.order.iter().position(|(user, ..)| !self.leaving.contains(user))?;
        let next = self.waiting.remove(&self.order.remove(at)?)?;
        self.begun += 1;
        if let Consequence::Left { user, .. } = &next {
            self.leaving.insert(user.clone());
        }
        Some(next)
    }

    /// One that was begun is over; the leaving of `left`, if it was one.
    pub fn end(&mut self, left: Option<&UserName>) {
        self.begun = self.begun.saturating_sub(1);
        if let Some(user) = left {
            self.leaving.remove(user);
        }
    }
}

fn key(consequence: &Consequence) -> Key {
    let none = DeviceAddresses::default();
    let (user, device, kind) = match consequence {
        Consequence::Arrived { user, device, .. } => (user, *device, Kind::Place),
        Consequence::Active { user, .. } => (user, none, Kind::Traffic),
        Consequence::Departed { user, device, .. } => (user, *device, Kind::Departure),
        Consequence::Left { user, .. } => (user, none, Kind::Left),
    };
    (user.clone(), device, kind)
}

/// The later one, which still is the login that the earlier one was.
fn merged(earlier: &Consequence, later: Consequence) -> Consequence {
    match (earlier, later) {
        (
            Consequence::Arrived { start: started, first: was_first, .. },
            Consequence::Arrived { user, ap, device, at_ms, start, first },
        ) => Consequence::Arrived {
            user,
            ap,
            device,
            at_ms,
            start: start || *started,
            first: first || *was_first,
        },
        (_, later) => later,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrived(user: usize, ap: &str, first: bool) -> Consequence {
        Consequence::Arrived {
            user: format!("user{user}").parse().unwrap(),
            ap: ap.parse().unwrap(),
            device: DeviceAddresses::default(),
            at_ms: 0,
            start: first,
            first,
        }
    }

    #[test]
    fn of_one_device_only_the_latest_word_waits() {
        let mut backlog = Backlog::default();
        assert!(backlog.push(arrived(1, "ap-1", true)));
        assert!(backlog.push(arrived(2, "ap-1", false)));
        assert!(backlog.push(arrived(1, "ap-2", false)));
        assert_eq!(backlog.begin(), Some(arrived(1, "ap-2", true)), "a login still");
        assert_eq!(backlog.begin(), Some(arrived(2, "ap-1", false)));
        assert_eq!(backlog.begin(), None);
    }

    fn left(user: usize) -> Consequence {
        let user = format!("user{user}").parse().unwrap();
        Consequence::Left { user, from: "ap-1".parse().unwrap(), at_ms: 0 }
    }

    #[test]
    fn who_comes_back_has_not_left_or_waits_until_that_is_over() {
        let mut backlog = Backlog::default();
        assert!(backlog.push(left(1)) && backlog.push(left(2)));
        assert!(backlog.push(arrived(1, "ap-1", true)));
        assert_eq!(backlog.begin(), Some(left(2)));
        assert_eq!(backlog.begin(), Some(arrived(1, "ap-1", true)));
        assert!(backlog.push(arrived(2, "ap-1", true)) && backlog.push(arrived(3, "ap-1", true)));
        assert_eq!(backlog.begin(), Some(arrived(3, "ap-1", true)), "nobody else is held up");
        assert_eq!(backlog.begin(), None);
        backlog.end(Some(&"user2".parse().unwrap()));
        assert_eq!(backlog.begin(), Some(arrived(2, "ap-1", true)));
    }

    #[test]
    fn a_flood_neither_begins_nor_waits_without_bound() {
        let mut backlog = Backlog::default();
        let taken = (0..MOST_WAITING + 10).filter(|user| backlog.push(arrived(*user, "ap-1", true))).count();
        assert_eq!(taken, MOST_WAITING);
        let begun = std::iter::from_fn(|| backlog.begin()).count();
        assert_eq!(begun, MOST_BEGUN);
        backlog.end(None);
        assert!(backlog.begin().is_some());
        assert!(backlog.begin().is_none());
    }
}

//! Which machine leaves next, and where to: pure.
//!
//! The machine with the fewest bytes to send leaves first. So after any time as many users as can be are off the host, and
//! those whose machines need the link to themselves in order to converge come last, when few others are left to share it.
//!
//! A target is one with room. Of those with about the fewest images it is where the user is; else one that has a mirror;
//! else where the user is likely to be next; else the one with the fewest images. A target that refused a machine is not
//! asked for it again, unless something has changed since: a move has ended.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use kage_machine::{HostName, UserName};

/// Moves of one machine that are tried at most.
pub const MOST_TRIES: u32 = 4;

/// So many images above the fewest, or a quarter of those, are about the fewest.
const SLACK: u64 = 2;

/// A user is likely to be next where this is the probability at least.
const LIKELY: f64 = 0.1;

/// What another host has room for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Images it owns.
    pub images: u64,
    /// Memory that nobody has; `None` where it is not known.
    pub free_bytes: Option<u64>,
}

/// A machine that is to go.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Leaver {
    /// Bytes to send, about.
    pub bytes: u64,
    /// Memory it may come to need at a target.
    pub memory_bytes: u64,
    /// The host whose access point its user is at.
    pub user_at: Option<HostName>,
    /// Hosts that have a mirror of it.
    pub mirrors: Vec<HostName>,
    /// Where its user may be next.
    pub likely: Vec<(HostName, f64)>,
}

/// Chooses a target among hosts with room.
#[must_use]
pub fn choose(
    rooms: &BTreeMap<HostName, Room>,
    leaver: &Leaver,
    refused: &BTreeSet<HostName>,
) -> Option<HostName> {
    let fits = |room: &Room| room.free_bytes.is_none_or(|free| free >= leaver.memory_bytes);
    let open: Vec<_> = rooms.iter().filter(|(host, room)| !refused.contains(*host) && fits(room)).collect();
    let fewest = open.iter().map(|(_, room)| room.images).min()?;
    let most = fewest + SLACK.max(fewest / 4);
    let wish = |host: &HostName| {
        let likely = leaver.likely.iter().any(|(next, chance)| next == host && *chance >= LIKELY);
        (leaver.user_at.as_ref() == Some(host), leaver.mirrors.contains(host), likely)
    };
    let near = open.iter().filter(|(_, room)| room.images <= most).map(|(host, room)| (*host, room));
    // The first of those that are equal, so that the choice is the same every time.
    let best = near.reduce(|best, next| {
        let rank = |(host, room): (&HostName, &&Room)| (wish(host), std::cmp::Reverse(room.images));
        if rank((next.0, next.1)) > rank((best.0, best.1)) { next } else { best }
    });
    best.map(|(host, _)| host.clone())
}

/// How a move ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Came {
    /// It is gone.
    Gone,
    /// That target would or could not take it.
    Refused(String),
    /// No target would make a difference.
    Stays(String),
}

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    leaver: Leaver,
    refused: BTreeSet<HostName>,
    tries: u32,
    reason: Option<String>,
    at: At,
}

#[derive(Clone, Debug, PartialEq)]
enum At {
    Waiting,
    /// Copying or switching.
    Moving(HostName),
    /// Handed over or kept, and its report is still to come.
    Reporting(HostName),
    Gone(HostName),
    Stays,
}

/// How far a drain is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Machines in all.
    pub images: u64,
    /// Gone.
    pub moved: u64,
    /// Known to stay.
    pub stay: u64,
    /// On their way.
    pub moving: u64,
    /// Bytes of those that are gone.
    pub bytes_done: u64,
    /// Bytes of those that wait or are on their way.
    pub bytes_left: u64,
}

/// A drain.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    parallel: usize,
    rooms: BTreeMap<HostName, Room>,
    entries: BTreeMap<UserName, Entry>,
    order: VecDeque<UserName>,
    stopping: bool,
}

impl Plan {
    /// Of a host from which so many machines may move at once.
    #[must_use]
    pub fn new(parallel: usize) -> Self {
        Self { parallel: parallel.max(1), ..Self::default() }
    }

    /// Takes in which machines are here. One that came back is to go once more.
    pub fn found(&mut self, here: impl IntoIterator<Item = (UserName, Leaver)>) {
        for (user, leaver) in here {
            let new = || Entry {
                leaver: Leaver::default(),
                refused: BTreeSet::new(),
                tries: 0,
                reason: None,
                at: At::Waiting,
            };
            let entry = self.entries.entry(user).or_insert_with(new);
            entry.leaver = leaver;
            if matches!(entry.at, At::Gone(_)) && entry.tries < MOST_TRIES {
                entry.at = At::Waiting;
            }
        }
        let mut order: Vec<_> = self.entries.iter().filter(|(_, entry)| entry.at == At::Waiting).collect();
        order.sort_by_key(|(_, entry)| entry.leaver.bytes);
        self.order = order.into_iter().map(|(user, _)| user.clone()).collect();
    }

    /// Takes in the hosts that take images, with the images there that are none of this plan's.
    pub fn offered(&mut self, rooms: BTreeMap<HostName, Room>) {
        self.rooms = rooms;
    }

    /// Whether a user's machine is one of those that are to go.
    #[must_use]
    pub fn has(&self, user: &UserName) -> bool {
        self.entries.contains_key(user)
    }

    /// Begins no more moves: what waits stays.
    pub fn stop(&mut self, reason: &str) {
        self.stopping = true;
        for entry in self.entries.values_mut().filter(|entry| entry.at == At::Waiting) {
            entry.at = At::Stays;
            entry.reason = Some(reason.to_owned());
        }
        self.order.clear();
    }

    /// The hosts with what went to them, and what is on its way.
    fn rooms_now(&self) -> BTreeMap<HostName, Room> {
        let mut rooms = self.rooms.clone();
        for entry in self.entries.values() {
            if let At::Moving(to) | At::Reporting(to) | At::Gone(to) = &entry.at
                && let Some(room) = rooms.get_mut(to)
            {
                room.images += 1;
                room.free_bytes = room.free_bytes.map(|free| free.saturating_sub(entry.leaver.memory_bytes));
            }
        }
        rooms
    }

    fn moving(&self) -> usize {
        self.entries.values().filter(|entry| matches!(entry.at, At::Moving(_))).count()
    }

    /// The next machine to go and where to, if one may go now; it counts as on its way.
    pub fn begin(&mut self) -> Option<(UserName, HostName)> {
        if self.stopping || self.moving() >= self.parallel {
            return None;
        }
        let rooms = self.rooms_now();
        let place = |user: &UserName| {
            let entry = self.entries.get(user)?;
            choose(&rooms, &entry.leaver, &entry.refused)
        };
        let (index, to) =
            self.order.iter().enumerate().find_map(|(index, user)| Some((index, place(user)?)))?;
        let user = self.order.remove(index)?;
        let entry = self.entries.get_mut(&user)?;
        entry.tries += 1;
        entry.at = At::Moving(to.clone());
        Some((user, to))
    }

    /// A machine's handover is over; its report is still to come. Its place is free.
    pub fn settled(&mut self, user: &UserName) {
        if let Some(entry) = self.entries.get_mut(user)
            && let At::Moving(to) = &entry.at
        {
            entry.at = At::Reporting(to.clone());
        }
    }

    /// A move has ended.
    pub fn ended(&mut self, user: &UserName, came: Came) {
        let stopping = self.stopping;
        let Some(entry) = self.entries.get_mut(user) else { return };
        let (At::Moving(to) | At::Reporting(to)) = &entry.at else { return };
        let to = to.clone();
        match came {
            Came::Gone => (entry.at, entry.reason) = (At::Gone(to), None),
            Came::Stays(reason) => (entry.at, entry.reason) = (At::Stays, Some(reason)),
            Came::Refused(reason) => {
                let again = !stopping && entry.tries < MOST_TRIES;
                entry.refused.insert(to);
                entry.at = if again { At::Waiting } else { At::Stays };
                entry.reason = Some(reason);
                if again {
                    self.order.push_back(user.clone());
                }
                return;
            }
        }
        // Whoever was refused for want of room may find some now; who asked every host asks again.
        for entry in self.entries.values_mut().filter(|entry| entry.at == At::Waiting) {
            if self.rooms.keys().all(|host| entry.refused.contains(host)) {
                entry.refused.clear();
            }
        }
    }

    /// Whether nothing is on its way, and nothing that waits can go: those stay.
    pub fn is_over(&mut self) -> bool {
        let busy = |entry: &Entry| matches!(entry.at, At::Moving(_) | At::Reporting(_));
        if self.entries.values().any(busy) {
            return false;
        }
        let rooms = self.rooms_now();
        let can_go = |entry: &Entry| {
            entry.at == At::Waiting && choose(&rooms, &entry.leaver, &entry.refused).is_some()
        };
        if self.entries.values().any(can_go) {
            return false;
        }
        let none = if rooms.is_empty() {
            "there is no other host that takes images; `kage hosts` lists them"
        } else {
            "no other host has room for it"
        };
        for entry in self.entries.values_mut().filter(|entry| entry.at == At::Waiting) {
            entry.at = At::Stays;
            entry.reason.get_or_insert_with(|| none.to_owned());
        }
        self.order.clear();
        true
    }

    /// How far it is.
    #[must_use]
    pub fn count(&self) -> Count {
        let mut count = Count { images: self.entries.len() as u64, ..Count::default() };
        for entry in self.entries.values() {
            match &entry.at {
                At::Gone(_) => {
                    (count.moved, count.bytes_done) = (count.moved + 1, count.bytes_done + entry.leaver.bytes)
                }
                At::Stays => count.stay += 1,
                At::Moving(_) | At::Reporting(_) => {
                    (count.moving, count.bytes_left) =
                        (count.moving + 1, count.bytes_left + entry.leaver.bytes);
                }
                At::Waiting => count.bytes_left += entry.leaver.bytes,
            }
        }
        count
    }

    /// Why a machine stays, and how often it was tried.
    #[must_use]
    pub fn fate(&self, user: &UserName) -> (Option<&str>, u32) {
        self.entries.get(user).map_or((None, 0), |entry| (entry.reason.as_deref(), entry.tries))
    }

    /// The machines that stay.
    pub fn staying(&self) -> impl Iterator<Item = &UserName> {
        self.entries.iter().filter(|(_, entry)| entry.at == At::Stays).map(|(user, _)| user)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host(number: usize) -> HostName {
        format!("h{number}").parse().unwrap()
    }

    fn user(number: usize) -> UserName {
        format!("u{number:03}").parse().unwrap()
    }

    fn rooms(images: &[u64]) -> BTreeMap<HostName, Room> {
        let room = |images: &u64| Room { images: *images, free_bytes: None };
        images.iter().enumerate().map(|(at, images)| (host(at + 2), room(images))).collect()
    }

    fn leaver(bytes: u64) -> Leaver {
        Leaver { bytes, memory_bytes: 10, ..Leaver::default() }
    }

    #[test]
    fn a_target_is_where_the_user_is_as_long_as_load_allows() {
        let none = BTreeSet::new();
        let wishes = Leaver {
            user_at: Some(host(3)),
            mirrors: vec![host(4)],
            likely: vec![(host(2), 0.9)],
            ..leaver(1)
        };
        assert_eq!(choose(&rooms(&[0, 2, 0]), &wishes, &none), Some(host(3)));
        assert_eq!(choose(&rooms(&[0, 3, 0]), &wishes, &none), Some(host(4)), "too many are there");
        assert_eq!(choose(&rooms(&[0, 3, 3]), &wishes, &none), Some(host(2)));
        assert_eq!(choose(&rooms(&[1, 0, 0]), &leaver(1), &none), Some(host(3)), "the fewest, the first");
        assert_eq!(choose(&BTreeMap::new(), &wishes, &none), None);
    }

    #[test]
    fn a_host_without_room_is_not_chosen() {
        let mut rooms = rooms(&[0, 9]);
        rooms.get_mut(&host(2)).unwrap().free_bytes = Some(9);
        assert_eq!(choose(&rooms, &leaver(1), &BTreeSet::new()), Some(host(3)));
        assert_eq!(choose(&rooms, &leaver(1), &[host(3)].into()), None);
    }

    #[test]
    fn the_smallest_leave_first_and_no_more_at_once_than_may() {
        let mut plan = Plan::new(2);
        plan.offered(rooms(&[0, 0]));
        plan.found([(user(1), leaver(30)), (user(2), leaver(10)), (user(3), leaver(20))]);
        assert_eq!(plan.begin(), Some((user(2), host(2))));
        assert_eq!(plan.begin(), Some((user(3), host(3))));
        assert_eq!(plan.begin(), None);
        plan.settled(&user(2));
        assert_eq!(plan.begin().map(|(user, _)| user), Some(user(1)), "its report may come later");
        assert!(!plan.is_over());
        for number in 1..=3 {
            plan.ended(&user(number), Came::Gone);
        }
        assert!(plan.is_over());
        let count = plan.count();
        assert_eq!((count.moved, count.stay, count.bytes_done, count.bytes_left), (3, 0, 60, 0));
    }

    #[test]
    fn a_refusal_leads_to_another_target_and_at_last_to_its_reason() {
        let mut plan = Plan::new(1);
        plan.offered(rooms(&[0, 0]));
        plan.found([(user(1), leaver(1))]);
        for expected in [host(2), host(3)] {
            assert_eq!(plan.begin(), Some((user(1), expected)));
            plan.ended(&user(1), Came::Refused("no shell".into()));
        }
        assert_eq!(plan.begin(), None);
        assert!(plan.is_over());
        assert_eq!(plan.fate(&user(1)), (Some("no shell"), 2));
        assert_eq!(plan.staying().collect::<Vec<_>>(), [&user(1)]);
    }

    #[test]
    fn whoever_was_refused_everywhere_asks_again_when_a_move_has_ended() {
        let mut plan = Plan::new(2);
        plan.offered(rooms(&[0]));
        plan.found([(user(1), leaver(1)), (user(2), leaver(2))]);
        assert!(plan.begin().is_some() && plan.begin().is_some());
        plan.ended(&user(1), Came::Refused("something of it is still under way".into()));
        assert_eq!(plan.begin(), None);
        assert!(!plan.is_over(), "the other one is on its way");
        plan.ended(&user(2), Came::Gone);
        assert_eq!(plan.begin(), Some((user(1), host(2))));
    }

    #[test]
    fn what_waits_stays_when_it_is_stopped() {
        let mut plan = Plan::new(1);
        plan.offered(rooms(&[0]));
        plan.found([(user(1), leaver(1)), (user(2), leaver(2))]);
        assert!(plan.begin().is_some());
        plan.stop("cancelled");
        assert!(!plan.is_over());
        plan.ended(&user(1), Came::Refused("the target refused".into()));
        assert!(plan.is_over() && plan.begin().is_none());
        assert_eq!(plan.fate(&user(2)).0, Some("cancelled"));
        assert_eq!(plan.count().stay, 2);
    }

    #[test]
    fn one_that_came_back_goes_again_but_not_for_ever() {
        let mut plan = Plan::new(1);
        plan.offered(rooms(&[0]));
        for _ in 0..MOST_TRIES {
            plan.found([(user(1), leaver(1))]);
            assert!(plan.begin().is_some());
            plan.ended(&user(1), Came::Gone);
        }
        plan.found([(user(1), leaver(1))]);
        assert!(plan.begin().is_none());
    }

    proptest! {
        #[test]
        fn a_choice_has_room_was_not_refused_and_is_about_the_least_loaded(
            images in prop::collection::vec((0u64..40, prop::option::of(0u64..20)), 0..6),
            refused in prop::collection::btree_set(2usize..8, 0..4),
            at in 2usize..8, mirror in 2usize..8,
        ) {
            let rooms: BTreeMap<_, _> = images
                .iter()
                .enumerate()
                .map(|(at, (images, free))| (host(at + 2), Room { images: *images, free_bytes: *free }))
                .collect();
            let refused: BTreeSet<_> = refused.into_iter().map(host).collect();
            let wishes = Leaver { user_at: Some(host(at)), mirrors: vec![host(mirror)], ..leaver(1) };
            let open = |host: &HostName, room: &Room| {
                !refused.contains(host) && room.free_bytes.is_none_or(|free| free >= 10)
            };
            let fewest = rooms.iter().filter(|(host, room)| open(host, room)).map(|(_, room)| room.images).min();
            match choose(&rooms, &wishes, &refused) {
                None => prop_assert_eq!(fewest, None),
                Some(to) => {
                    prop_assert!(open(&to, &rooms[&to]));
                    let fewest = fewest.unwrap();
                    prop_assert!(rooms[&to].images <= fewest + SLACK.max(fewest / 4));
                }
            }
        }

        /// Whatever moves come to, in whatever order, a drain ends, tries none too often, and never has more under way
        /// than it may.
        #[test]
        fn a_drain_ends_with_every_machine_gone_or_staying_for_a_reason(
            sizes in prop::collection::vec(0u64..100, 1..20),
            parallel in 1usize..5,
            hosts in 0usize..4,
            events in prop::collection::vec((any::<usize>(), 0u8..4), 0..200),
        ) {
            let mut plan = Plan::new(parallel);
            plan.offered(rooms(&vec![0; hosts]));
            plan.found(sizes.iter().enumerate().map(|(number, size)| (user(number), leaver(*size))));
            let mut moving: Vec<UserName> = Vec::new();
            let mut events = events.into_iter();
            for _ in 0..10_000 {
                while let Some((next, _)) = plan.begin() {
                    moving.push(next);
                }
                prop_assert!(plan.moving() <= parallel);
                if moving.is_empty() {
                    break;
                }
                let (which, what) = events.next().unwrap_or((0, 0));
                let at = which % moving.len();
                match what {
                    3 => plan.settled(&moving[at]),
                    what => {
                        let came = match what {
                            0 => Came::Gone,
                            1 => Came::Refused("no".into()),
                            _ => Came::Stays("never".into()),
                        };
                        plan.ended(&moving.swap_remove(at), came);
                    }
                }
            }
            prop_assert!(plan.is_over());
            let count = plan.count();
            prop_assert_eq!((count.moving, count.moved + count.stay), (0, sizes.len() as u64));
            let staying: Vec<_> = plan.staying().cloned().collect();
            for user in staying {
                let (reason, tries) = plan.fate(&user);
                prop_assert!(reason.is_some() && tries <= MOST_TRIES);
            }
        }
    }
}

//! A large site, for cost: many users walk between their places over a grid of access points.

use kage_machine::{HostName, identity::ApName};

use super::{
    Place,
    campus::{Random, Trace},
    trial::{Event, Site},
};

/// Metres between two access points.
const SPACING_M: f64 = 45.0;
/// Places of a user.
const PLACES: usize = 4;
/// How far a user's places are apart at most, in access points each way.
const RANGE: usize = 12;

/// How large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fleet {
    /// Users.
    pub users: u32,
    /// Hosts.
    pub hosts: u32,
    /// Access points, at least one.
    pub aps: u32,
    /// Changes of access point per user.
    pub changes: u32,
}

impl Fleet {
    /// Makes a trace. The same seed makes the same.
    #[must_use]
    pub fn make(&self, seed: u64) -> Trace {
        let mut random = Random::new(seed);
        let aps = self.aps.max(1);
        let columns = (1..=aps).find(|columns| columns * columns >= aps).unwrap_or(1);
        let mut events = Vec::new();
        for user in 0..self.users {
            self.walk(user, [columns, aps / columns], &mut random, &mut events);
        }
        events.sort_by_key(|event| event.at_ms);
        let hosts = u64::from(self.hosts.clamp(1, aps));
        let site = (0..aps).filter_map(|ap| {
            let host: HostName = format!("h-{}", u64::from(ap) * hosts / u64::from(aps) + 1).parse().ok()?;
            let name: ApName = format!("ap-{}", ap + 1).parse().ok()?;
            let position_m = [ap % columns, ap / columns].map(|at| f64::from(at) * SPACING_M);
            Some((name, Place { host, position_m }))
        });
        Trace { site: Site::new(site.collect()), events }
    }

    fn walk(&self, user: u32, size: [u32; 2], random: &mut Random, events: &mut Vec<Event>) {
        let size = size.map(|size| size.max(1) as usize);
        let home = size.map(|size| random.below(size));
        let mut place = || [0, 1].map(|axis| (home[axis] + random.below(RANGE)) % size[axis]);
        let places: [[usize; 2]; PLACES] = std::array::from_fn(|_| place());
        let (mut at, mut turn, mut now_ms) = (places[0], 0, 0);
        for _ in 0..self.changes {
            now_ms += 20_000 + random.next_number() % 30_000;
            let mut tries = 0;
            while at == places[turn] && tries < PLACES {
                turn = if random.happens(0.8) { (turn + 1) % PLACES } else { random.below(PLACES) };
                now_ms += 600_000 + random.next_number() % 3_600_000;
                tries += 1;
            }
            let goal = places[turn];
            let axis = usize::from(at[0] == goal[0] || (at[1] != goal[1] && random.happens(0.1)));
            at[axis] = if at[axis] < goal[axis] { at[axis] + 1 } else { at[axis].saturating_sub(1) };
            let ap = u32::try_from(at[0] + at[1] * size[0]).ok();
            events.push(Event { at_ms: now_ms, user, ap });
        }
    }
}

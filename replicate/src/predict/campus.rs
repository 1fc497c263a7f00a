//! Makes traces: users who walk, and the access points their devices hand over between. Seeded and deterministic.
//!
//! - [`Kind::Campus`]: people with timetables. Streets in a grid, buildings with several access points each; homes,
//!   lectures by weekday and hour, lunch, library, sport; everybody with habits, and with days on which they are broken.
//! - [`Kind::Town`]: places scattered at random; people return to places in proportion to how often they were there, or
//!   explore new ones, at no particular time.
//! - [`Kind::Waypoint`]: Random Waypoint, and [`Kind::Levy`]: a Lévy walk. No routines: only direction can be known.
//!
//! A device hands over when another access point has been clearly nearer, as seen through noise; so it also flaps.

use kage_machine::{HostName, identity::ApName};

use super::{
    Place,
    motion::{Point, distance},
    trial::{Ap, Event, Site},
};

/// Seconds between two looks of a device at its access points, while it moves.
const LOOK_S: f64 = 2.0;
/// How much nearer, as seen, another access point must be, in metres.
const HYSTERESIS_M: f64 = 6.0;
/// Beyond that, each way, an access point is not seen, in metres.
const FARTHEST_SEEN_M: f64 = 140.0;
/// Metres between two crossings of streets.
const BLOCK_M: f64 = 80.0;
/// Monday 2026-01-05 00:00, so that days are what they are called.
const BEGIN_S: f64 = 1_767_571_200.0;
const DAY_S: f64 = 86_400.0;

/// What people do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Timetables.
    Campus,
    /// Favourite places.
    Town,
    /// Random Waypoint.
    Waypoint,
    /// Lévy walk.
    Levy,
}

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// What people do.
    pub kind: Kind,
    /// How many people.
    pub users: u32,
    /// For how many days. A random walk goes on for an hour of each.
    pub days: u32,
    /// Standard deviation of a distance as seen, in metres.
    pub noise_m: f64,
    /// How often a habit is broken, from 0 to 1.
    pub variation: f64,
}

/// A trace and the site it was made on.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Access points and hosts.
    pub site: Site,
    /// What happened, in time order.
    pub events: Vec<Event>,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Campus, Self::Town, Self::Waypoint, Self::Levy];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Campus => "campus",
            Self::Town => "town",
            Self::Waypoint => "waypoint",
            Self::Levy => "levy",
        }
    }
}

impl Spec {
    /// Thirty people for three weeks; random walkers for three hours each.
    #[must_use]
    pub const fn new(kind: Kind) -> Self {
        let days = match kind {
            Kind::Campus | Kind::Town => 21,
            Kind::Waypoint | Kind::Levy => 3,
        };
        Self { kind, users: 30, days, noise_m: 3.0, variation: 0.12 }
    }

    /// Makes a trace. The same seed makes the same.
    #[must_use]
    pub fn make(&self, seed: u64) -> Trace {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5bd1_e995);
        let world = World::new(self.kind, &mut random);
        let mut events = Vec::new();
        for user in 0..self.users {
            let mut device =
                Device { world: &world, user, noise_m: self.noise_m, at: None, events: &mut events };
            match self.kind {
                Kind::Campus => Student::new(&world, &mut random).live(self, &mut device, &mut random),
                Kind::Town => townsfolk(self, &mut device, &mut random),
                Kind::Waypoint | Kind::Levy => walker(self, &mut device, &mut random),
            }
        }
        events.sort_by_key(|event| event.at_ms);
        Trace { site: world.site(), events }
    }
}

/// Random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub const fn next_number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to just below 1.
    pub fn share(&mut self) -> f64 {
        (self.next_number() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Whether something of that probability happens.
    pub fn happens(&mut self, probability: f64) -> bool {
        self.share() < probability
    }

    /// Below a number, which is not 0.
    #[expect(clippy::cast_possible_truncation, reason = "below a usize")]
    pub const fn below(&mut self, limit: usize) -> usize {
        (self.next_number() % limit as u64) as usize
    }

    /// Between two numbers.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.share()
    }

    /// From the normal distribution.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.share()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.share()).cos()
    }
}

/// Where everything stands.
struct World {
    size_m: Point,
    aps: Vec<Point>,
    hosts: Vec<Point>,
    /// Buildings, or places one goes to.
    targets: Vec<Point>,
    streets: bool,
}

impl World {
    fn new(kind: Kind, random: &mut Random) -> Self {
        match kind {
            Kind::Campus => Self::campus(random),
            Kind::Town => {
                let size_m = [1400.0, 1000.0];
                let aps = scattered(110, 45.0, size_m, random);
                let targets = scattered(70, 30.0, size_m, random);
                Self { size_m, aps, hosts: scattered(9, 200.0, size_m, random), targets, streets: false }
            }
            Kind::Waypoint | Kind::Levy => {
                let size_m = [900.0, 900.0];
                let aps = scattered(100, 60.0, size_m, random);
                Self {
                    size_m,
                    aps,
                    hosts: scattered(9, 150.0, size_m, random),
                    targets: Vec::new(),
                    streets: false,
                }
            }
        }
    }

    /// Seven by six crossings, an access point at two of three; a building beside two of five, with three.
    fn campus(random: &mut Random) -> Self {
        let (mut aps, mut targets) = (Vec::new(), Vec::new());
        for column in 0..7 {
            for row in 0..6 {
                let crossing = [f64::from(column) * BLOCK_M, f64::from(row) * BLOCK_M];
                if random.happens(0.65) {
                    aps.push([
                        crossing[0] + random.between(-9.0, 9.0),
                        crossing[1] + random.between(-9.0, 9.0),
                    ]);
                }
                if random.happens(0.4) {
                    let door = [crossing[0] + 24.0, crossing[1] + 24.0];
                    for wing in [[0.0, 0.0], [26.0, 4.0], [4.0, 26.0]] {
                        let room = [door[0] + wing[0], door[1] + wing[1]];
                        aps.push([room[0] + random.normal() * 3.0, room[1] + random.normal() * 3.0]);
                        targets.push(room);
                    }
                }
            }
        }
        if targets.is_empty() {
            targets.push([24.0, 24.0]);
            aps.push([24.0, 24.0]);
        }
        let size_m = [6.0 * BLOCK_M, 5.0 * BLOCK_M];
        Self { size_m, aps, hosts: scattered(8, 90.0, size_m, random), targets, streets: true }
    }

    fn site(&self) -> Site {
        let name = |kind: &str, number: usize| format!("{kind}-{}", number + 1);
        let aps = self.aps.iter().enumerate().filter_map(|(number, &position_m)| {
            let near = |host: &Point| distance(*host, position_m);
            let host = (0..self.hosts.len())
                .min_by(|&a, &b| near(&self.hosts[a]).total_cmp(&near(&self.hosts[b])))?;
            let host: HostName = name("h", host).parse().ok()?;
            let ap: ApName = name("ap", number).parse().ok()?;
            Some((ap, Place { host, position_m }))
        });
        Site::new(aps.collect())
    }

    /// Corners of the way between two points: along streets, or straight.
    fn way(&self, from: Point, to: Point, across_first: bool) -> Vec<Point> {
        if !self.streets {
            return vec![from, to];
        }
        let crossing = |at: Point| at.map(|at| ((at - 24.0) / BLOCK_M).floor().max(0.0) * BLOCK_M);
        let (begin, end) = (crossing(from), crossing(to));
        if begin == end {
            return vec![from, to];
        }
        let corner = if across_first { [end[0], begin[1]] } else { [begin[0], end[1]] };
        vec![from, begin, corner, end, to]
    }
}

/// Points at random, a distance apart where that can be had.
fn scattered(count: usize, apart_m: f64, size_m: Point, random: &mut Random) -> Vec<Point> {
    let mut points: Vec<Point> = Vec::with_capacity(count);
    for _ in 0..count {
        let mut point = [0.0; 2];
        for _ in 0..30 {
            point = size_m.map(|size| random.between(0.0, size));
            if points.iter().all(|other| distance(*other, point) >= apart_m) {
                break;
            }
        }
        points.push(point);
    }
    points
}

/// A device, carried about.
struct Device<'a> {
    world: &'a World,
    user: u32,
    noise_m: f64,
    at: Option<Ap>,
    events: &'a mut Vec<Event>,
}

impl Device<'_> {
    /// Looks once; hands over where another access point is clearly nearer.
    fn look(&mut self, at_s: f64, here: Point, random: &mut Random) {
        let mut seen = |ap: usize| distance(self.world.aps[ap], here) + self.noise_m * random.normal();
        let current = self.at.map(|ap| seen(ap as usize));
        let mut best: Option<(usize, f64)> = None;
        for ap in 0..self.world.aps.len() {
            if [0, 1].iter().any(|&axis| (self.world.aps[ap][axis] - here[axis]).abs() > FARTHEST_SEEN_M) {
                continue;
            }
            let seen = seen(ap);
            if best.is_none_or(|(_, least)| seen < least) {
                best = Some((ap, seen));
            }
        }
        let Some((best, seen)) = best else { return };
        let best = u32::try_from(best).unwrap_or(0);
        if self.at != Some(best) && current.is_none_or(|current| seen + HYSTERESIS_M < current) {
            self.at = Some(best);
            self.event(at_s, Some(best));
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "after 1970")]
    fn event(&mut self, at_s: f64, ap: Option<Ap>) {
        self.events.push(Event { at_ms: ((BEGIN_S + at_s) * 1000.0) as u64, user: self.user, ap });
    }

    /// Carries it along corners; when it is there, in seconds.
    fn walk(&mut self, begin_s: f64, corners: &[Point], speed: f64, random: &mut Random) -> f64 {
        let mut now_s = begin_s;
        for leg in corners.windows(2) {
            let length = distance(leg[0], leg[1]);
            let mut gone = 0.0;
            while gone < length {
                let part = gone / length;
                let at = [0, 1].map(|axis| leg[0][axis] + (leg[1][axis] - leg[0][axis]) * part);
                self.look(now_s, at, random);
                gone += speed * LOOK_S;
                now_s += LOOK_S;
            }
        }
        if let Some(&end) = corners.last() {
            self.look(now_s, end, random);
        }
        now_s
    }

    /// Leaves it where it is; it looks about every seven minutes.
    fn rest(&mut self, begin_s: f64, end_s: f64, here: Point, random: &mut Random) {
        let mut now_s = begin_s + random.between(0.0, 420.0);
        while now_s < end_s {
            self.look(now_s, here, random);
            now_s += random.between(240.0, 600.0);
        }
    }

    fn switch_off(&mut self, at_s: f64) {
        if self.at.take().is_some() {
            self.event(at_s, None);
        }
    }
}

/// Somebody with a timetable.
struct Student {
    home: Point,
    /// By weekday: hour, where.
    lectures: Vec<Vec<(f64, Point)>>,
    lunch: [Point; 2],
    library: Point,
    evening: Point,
    speed: f64,
    /// Decides which way is the usual one between two places.
    habit: u64,
}

impl Student {
    fn new(world: &World, random: &mut Random) -> Self {
        // Few homes and lecture halls, so that people share them.
        let among = |first: usize, count: usize, random: &mut Random| {
            let step = (world.targets.len() / count).max(1);
            world.targets[(first + random.below(count) * step) % world.targets.len()]
        };
        let halls: Vec<Point> = (0..5).map(|_| among(0, 9, random)).collect();
        let mut lectures = vec![Vec::new(); 5];
        for day in &mut lectures {
            for hour in [8.0, 10.0, 13.0, 15.0] {
                if random.happens(0.65) {
                    day.push((hour, halls[random.below(halls.len())]));
                }
            }
        }
        Self {
            home: among(1, 6, random),
            lectures,
            lunch: [among(2, 4, random), among(2, 4, random)],
            library: among(0, 3, random),
            evening: among(1, 7, random),
            speed: random.between(1.1, 1.7),
            habit: random.next_number(),
        }
    }

    /// What is planned for a day: when to set out, in seconds of the day, and where to.
    fn plan(&self, spec: &Spec, day: u32, random: &mut Random) -> Vec<(f64, Point)> {
        let weekday = (day % 7) as usize;
        let mut plan = Vec::new();
        if let Some(lectures) = self.lectures.get(weekday) {
            for &(hour, hall) in lectures {
                if random.happens(spec.variation) {
                    continue;
                }
                plan.push((hour * 3600.0 - 420.0 + random.normal() * 150.0, hall));
                if hour == 10.0 || hour == 15.0 || random.happens(0.2) {
                    plan.push(((hour + 1.6) * 3600.0 + random.normal() * 200.0, self.library));
                }
            }
            let lunch = self.lunch[usize::from(random.happens(0.15 + spec.variation))];
            plan.push((12.0 * 3600.0 + random.normal() * 500.0, lunch));
        } else if random.happens(0.6) {
            plan.push((11.0 * 3600.0 + random.normal() * 3000.0, self.library));
        }
        if weekday % 2 == 1 && !random.happens(spec.variation) {
            plan.push((17.5 * 3600.0 + random.normal() * 600.0, self.evening));
        }
        plan.push((19.0 * 3600.0 + random.normal() * 1800.0, self.home));
        plan.sort_by(|a, b| a.0.total_cmp(&b.0));
        plan
    }

    fn live(&self, spec: &Spec, device: &mut Device<'_>, random: &mut Random) {
        for day in 0..spec.days {
            let midnight = f64::from(day) * DAY_S;
            let mut here = self.home;
            let mut now_s = midnight + 7.2 * 3600.0 + random.normal() * 600.0;
            device.look(now_s, here, random);
            for (second, target) in self.plan(spec, day, random) {
                let leave = (midnight + second).max(now_s + 60.0);
                device.rest(now_s, leave, here, random);
                let usual = (self.habit ^ (here[0] * 7.0 + target[1]).to_bits()).is_multiple_of(2);
                let across_first = usual != random.happens(spec.variation);
                let corners = device.world.way(here, target, across_first);
                let speed = self.speed * random.between(0.9, 1.1);
                now_s = device.walk(leave, &corners, speed, random);
                here = target;
            }
            let night = now_s + random.between(1800.0, 7200.0);
            device.rest(now_s, night, here, random);
            device.switch_off(night);
        }
    }
}

/// Somebody who explores, and returns to what is known in proportion to how often it was visited.
fn townsfolk(spec: &Spec, device: &mut Device<'_>, random: &mut Random) {
    let targets = &device.world.targets;
    let mut known: Vec<(usize, u32)> = vec![(random.below(targets.len()), 3)];
    let speed = random.between(1.0, 1.8);
    let mut at = known[0].0;
    for day in 0..spec.days {
        let mut now_s = f64::from(day) * DAY_S + random.between(6.0, 10.0) * 3600.0;
        let end_s = now_s + random.between(10.0, 14.0) * 3600.0;
        device.look(now_s, targets[at], random);
        while now_s < end_s {
            let stay_s = (7.4 + random.normal()).exp().min(4.0 * 3600.0);
            device.rest(now_s, now_s + stay_s, targets[at], random);
            now_s += stay_s;
            let explore = 0.6 * (known.len() as f64).powf(-0.5) * (0.4 + 5.0 * spec.variation);
            let next = if random.happens(explore) {
                random.below(targets.len())
            } else {
                let all: u32 = known.iter().map(|(_, count)| count).sum();
                let mut pick = random.below(all as usize);
                let of = known.iter().find(|(_, count)| {
                    let found = pick < *count as usize;
                    pick = pick.saturating_sub(*count as usize);
                    found
                });
                of.map_or(at, |(target, _)| *target)
            };
            match known.iter_mut().find(|(target, _)| *target == next) {
                Some((_, count)) => *count += 1,
                None => known.push((next, 1)),
            }
            let way = device.world.way(targets[at], targets[next], true);
            now_s = device.walk(now_s, &way, speed, random);
            at = next;
        }
        device.switch_off(now_s);
    }
}

/// Somebody without aim: an hour of each day.
fn walker(spec: &Spec, device: &mut Device<'_>, random: &mut Random) {
    let size_m = device.world.size_m;
    let mut here = size_m.map(|size| random.between(0.0, size));
    for day in 0..spec.days {
        let mut now_s = f64::from(day) * DAY_S + 10.0 * 3600.0;
        let end_s = now_s + 3600.0;
        while now_s < end_s {
            let (to, pause_s) = if spec.kind == Kind::Waypoint {
                (size_m.map(|size| random.between(0.0, size)), random.between(0.0, 60.0))
            } else {
                let length = (15.0 * (1.0 - random.share()).powf(-1.0 / 1.5)).min(600.0);
                let turn = random.between(0.0, std::f64::consts::TAU);
                let to = [here[0] + length * turn.cos(), here[1] + length * turn.sin()];
                let pause_s = (5.0 * (1.0 - random.share()).powf(-1.0 / 1.2)).min(300.0);
                ([0, 1].map(|axis| reflected(to[axis], size_m[axis])), pause_s)
            };
            now_s = device.walk(now_s, &[here, to], random.between(0.8, 1.8), random);
            here = to;
            device.rest(now_s, now_s + pause_s, here, random);
            now_s += pause_s;
        }
        device.switch_off(now_s);
    }
}

/// Back into the area.
fn reflected(at: f64, size: f64) -> f64 {
    let folded = at.abs() % (2.0 * size);
    folded.min(2.0 * size - folded)
}

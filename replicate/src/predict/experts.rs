//! What each expert gives each candidate.
//!
//! Counting experts are chained: each gives a candidate (count + κ · what the expert it leans on gives) / (all + κ), with
//! κ growing with the number of different successors (Witten and Bell), so that an expert that knows little says what the
//! next simpler one says.
//!
//! ```text
//! near ◀─ everybody here ◀─ coming from ◀─ and before that
//!              ▲  ▲ at that time  ▲  ▲ after so long
//!              │                  └── user here ◀─ coming from ◀─ order 3 ◀─ order 4 and more
//!              │                          ▲ at that time of day    ▲ after so long, at that time, like this
//!   motion ────┘ (leans on near)
//! ```

use kage_machine::identity::ApName;

use super::{
    Place, Places,
    everybody::{Everybody, Situation},
    motion::{self, Point},
    visits::{self, DAY, Visit, Visits, WEEK},
};

/// Experts, by the place of their features.
mod expert {
    pub const NEAR: usize = 0;
    pub const ALL_1: usize = 1;
    pub const ALL_2: usize = 2;
    pub const ALL_3: usize = 3;
    pub const ALL_STAY: usize = 4;
    pub const ALL_TIME: usize = 5;
    pub const USER_1: usize = 6;
    pub const USER_2: usize = 7;
    pub const USER_3: usize = 8;
    pub const USER_4: usize = 9;
    pub const USER_TIME: usize = 10;
    pub const USER_STAY: usize = 11;
    pub const USER_LIKE: usize = 12;
    pub const USER_LATE: usize = 13;
    pub const MOTION_SHORT: usize = 14;
    pub const MOTION_LONG: usize = 15;
    pub const MOTION_TIMED: usize = 16;
    pub const RETURN: usize = 17;
    pub const RETURN_SOON: usize = 18;
}
use expert::*;

/// How many features a candidate has.
pub const FEATURES: usize = 19;
/// Features of a candidate.
pub type Features = [f32; FEATURES];

/// Experts whose word alone may be the best there is.
pub const ALONE: [usize; 6] = [ALL_1, ALL_2, ALL_3, USER_1, USER_2, USER_3];

/// Weights before anything was learnt.
pub const INITIAL: Features =
    [0.05, 0.05, 0.1, 0.1, 0.1, 0.05, 0.05, 0.1, 0.15, 0.1, 0.1, 0.1, 0.15, 0.05, 0.05, 0.05, 0.1, 0.0, 0.0];

/// Counting experts and motion, and whom each leans on, which comes before it.
const CHAIN: [(usize, usize); 16] = [
    (ALL_1, NEAR),
    (ALL_2, ALL_1),
    (ALL_3, ALL_2),
    (ALL_STAY, ALL_2),
    (ALL_TIME, ALL_1),
    (USER_1, ALL_2),
    (USER_2, USER_1),
    (USER_3, USER_2),
    (USER_4, USER_3),
    (USER_TIME, USER_1),
    (USER_STAY, USER_2),
    (USER_LIKE, USER_2),
    (USER_LATE, USER_1),
    (MOTION_SHORT, NEAR),
    (MOTION_LONG, NEAR),
    (MOTION_TIMED, NEAR),
];
/// Experts of everybody, in the order of [`Situation::contexts`].
const ALL: [usize; 5] = [ALL_1, ALL_2, ALL_3, ALL_STAY, ALL_TIME];
/// Most candidates.
const MOST: usize = 48;
/// How many visits before the present one are compared.
const DEEPEST: usize = 6;
/// A return is soon within that many seconds.
const SOON_S: f32 = 30.0;

/// A possible next access point.
#[derive(Debug)]
pub struct Candidate<'a> {
    /// Its name.
    pub ap: &'a ApName,
    /// Where it is.
    pub place: &'a Place,
    /// What the experts give it, as logarithms.
    pub features: Features,
}

/// All candidates, and what kind of case it is.
#[derive(Debug, Default)]
pub struct Field<'a> {
    /// Most [`MOST`].
    pub candidates: Vec<Candidate<'a>>,
    /// Below [`super::mixer::KINDS`].
    pub kind: usize,
}

/// A candidate while it is counted for.
struct Counted<'a> {
    ap: &'a ApName,
    place: &'a Place,
    counts: Features,
}

/// Candidates by the numbers under which user and everybody know them.
struct Counting<'a, 'h> {
    places: &'a Places,
    here: &'h ApName,
    found: Vec<Counted<'a>>,
    all: [f32; FEATURES],
    different: [f32; FEATURES],
}

impl<'a> Counting<'a, '_> {
    fn find(&mut self, ap: &ApName) -> Option<usize> {
        let (ap, place) = self.places.get_key_value(ap)?;
        self.enter(ap, place)
    }

    /// The candidate that is this access point; none where there are too many, or the user is there.
    fn enter(&mut self, ap: &'a ApName, place: &'a Place) -> Option<usize> {
        // Within one table an access point has one entry.
        if let Some(at) = self.found.iter().position(|found| std::ptr::eq(found.place, place)) {
            return Some(at);
        }
        if self.found.len() == MOST || *ap == *self.here {
            return None;
        }
        self.found.push(Counted { ap, place, counts: [0.0; FEATURES] });
        Some(self.found.len() - 1)
    }

    fn add(&mut self, expert: usize, candidate: usize, count: f32) {
        let counted = &mut self.found[candidate].counts[expert];
        self.different[expert] += f32::from(u8::from(*counted == 0.0 && count > 0.0));
        *counted += count;
        self.all[expert] += count;
    }
}

/// The situation of a user: where, whence, how long, when.
pub fn situation(visits: &Visits, everybody: &Everybody, now_ms: u64) -> Situation {
    let mut last = visits.log().iter().rev();
    let mut number = || last.next().and_then(|visit| everybody.number_of(visits.name(visit.ap)?));
    let (at, before, earlier) = (number(), number(), number());
    let stay = now_ms.checked_sub(visits.since_ms()).map_or(0, visits::stay_code);
    Situation { at, before, earlier, stay, minute: visits::minute_of(now_ms) }
}

/// What the experts give every candidate for the place after the present one.
pub fn field<'a>(visits: &Visits, everybody: &Everybody, places: &'a Places, now_ms: u64) -> Field<'a> {
    let (Some(here), Some(last)) = (visits.at(), visits.log().last()) else { return Field::default() };
    let situation = situation(visits, everybody, now_ms);
    let before = visits.log().iter().rev().nth(1).and_then(|visit| visits.name(visit.ap));
    let mut counting = Counting {
        places,
        here,
        found: Vec::with_capacity(MOST),
        all: [0.0; FEATURES],
        different: [0.0; FEATURES],
    };
    count_user(&mut counting, visits, last.ap, &situation);
    count_everybody(&mut counting, everybody, &situation);
    for (name, place) in everybody.around(here, places) {
        counting.enter(name, place);
    }
    let here_m = places.get(here).and_then(|place| motion::sound(place.position_m));
    let around: Vec<Option<Point>> =
        counting.found.iter().map(|found| motion::sound(found.place.position_m)).collect();
    let elapsed_s = now_ms.checked_sub(visits.since_ms()).map(|elapsed| elapsed as f64 / 1000.0);
    if let Some(here_m) = here_m {
        count_motion(&mut counting, visits, here_m, &around, elapsed_s);
    }
    let near = nearness(here_m, &around);
    let soon = elapsed_s.is_some_and(|elapsed| elapsed <= f64::from(SOON_S));
    let own = counting.all[USER_2];
    let candidates = logarithms(counting, &near, before, soon);
    let moving = usize::from(elapsed_s.is_none_or(|elapsed| elapsed > 120.0));
    let habit = [0.5, 2.5, 8.0].iter().filter(|&&least| own > least).count();
    Field { candidates, kind: habit * 2 + moving }
}

/// Counts what the user did at this place before, by how much it was like now.
fn count_user(counting: &mut Counting<'_, '_>, visits: &Visits, here: u8, now: &Situation) {
    let log = visits.log();
    let mut numbered = [None; visits::MAX_NAMES];
    let mut late = 1.0;
    let present = log.len() - 1;
    for at in (0..present).rev() {
        let (visit, next) = (log[at], log[at + 1]);
        if visit.ap != here || next.ap == here {
            continue;
        }
        let Some(slot) = numbered.get_mut(usize::from(next.ap)) else { continue };
        let candidate =
            *slot.get_or_insert_with(|| visits.name(next.ap).and_then(|name| counting.find(name)));
        let Some(candidate) = candidate else { continue };
        let same =
            (1..=DEEPEST.min(at)).take_while(|&back| log[at - back].ap == log[present - back].ap).count();
        let time = like_time(next.minute, now.minute);
        let stay = like_stay(visit, now.stay);
        counting.add(USER_1, candidate, 1.0);
        for (order, expert) in [(1, USER_2), (2, USER_3)] {
            if same >= order {
                counting.add(expert, candidate, 1.0);
            }
        }
        if same >= 3 {
            counting.add(USER_4, candidate, 1.0 + 2.0 * (same as f32 - 3.0));
        }
        let order = same.min(4) as f32;
        counting.add(USER_TIME, candidate, time);
        counting.add(USER_STAY, candidate, stay * (1.0 + order));
        counting.add(USER_LIKE, candidate, time * stay * (1.0 + 2.0 * order));
        counting.add(USER_LATE, candidate, late * (1.0 + order));
        late *= 0.85;
    }
}

/// From 0 to 1: how near two minutes of the week are in the day, less on another day of the week, least where one is a
/// weekend's and the other not.
pub fn like_time(then: u16, now: u16) -> f32 {
    let apart = then.abs_diff(now) % DAY;
    let apart = f32::from(apart.min(DAY - apart)) / 25.0;
    let (then, now) = (then % WEEK / DAY, now % WEEK / DAY);
    // Thursday is the first day of 1970.
    let weekend = |day: u16| day == 2 || day == 3;
    let day = match (then == now, weekend(then) == weekend(now)) {
        (true, _) => 1.0,
        (_, true) => 0.35,
        _ => 0.1,
    };
    day * (-0.5 * apart * apart).exp()
}

/// From 0 to 1: how like a past stay is to one that has lasted so long. One that was longer may yet be like it.
fn like_stay(visit: Visit, now: u8) -> f32 {
    if visit.stay == 0 || now == 0 {
        return 0.2;
    }
    let longer = visits::doublings(now, visit.stay);
    if longer > 0.0 { (-0.7 * longer).exp() } else { (-2.0 * longer * longer).exp() }
}

/// Counts what everybody did in such a situation.
fn count_everybody(counting: &mut Counting<'_, '_>, everybody: &Everybody, situation: &Situation) {
    let mut numbered: Vec<(u16, Option<usize>)> = Vec::with_capacity(MOST);
    for (expert, context) in ALL.into_iter().zip(situation.contexts()) {
        let Some(context) = context else { continue };
        for &(number, count) in everybody.after(context) {
            let known = numbered.iter().find(|(known, _)| *known == number).map(|(_, candidate)| *candidate);
            let candidate = known.unwrap_or_else(|| {
                let candidate = everybody.name(number).and_then(|name| counting.find(name));
                numbered.push((number, candidate));
                candidate
            });
            if let Some(candidate) = candidate {
                counting.add(expert, candidate, f32::from(count));
            }
        }
    }
}

/// Counts the votes of speed and direction.
fn count_motion(
    counting: &mut Counting<'_, '_>,
    visits: &Visits,
    here_m: Point,
    around: &[Option<Point>],
    elapsed_s: Option<f64>,
) {
    let trail: Option<Vec<(Point, f64)>> = visits
        .trail()
        .map(|(ap, at_ms)| {
            let position_m = motion::sound(counting.places.get(ap)?.position_m)?;
            Some((position_m, at_ms as f64 / 1000.0))
        })
        .collect();
    let [short, long] = trail.map_or([None, None], |trail| motion::walks(&trail));
    for (expert, walk, elapsed_s) in
        [(MOTION_SHORT, short, None), (MOTION_LONG, long, None), (MOTION_TIMED, long, elapsed_s)]
    {
        let Some(walk) = walk else { continue };
        let mut votes = vec![0.0; around.len()];
        walk.vote(here_m, around, elapsed_s, &mut votes);
        for (candidate, vote) in votes.into_iter().enumerate().filter(|(_, vote)| *vote > 0.0) {
            counting.add(expert, candidate, vote);
        }
    }
}

/// What is known of places before anything was counted: the nearer the likelier.
fn nearness(here_m: Option<Point>, around: &[Option<Point>]) -> Vec<f32> {
    let distances: Vec<Option<f64>> =
        around.iter().map(|place| Some(motion::distance(here_m?, (*place)?))).collect();
    let nearest = distances.iter().flatten().copied().fold(f64::INFINITY, f64::min).clamp(1.0, 1e6);
    let near = |away: &Option<f64>| away.map_or(0.02, |away| 1.0 / (0.1 + (away / nearest).powi(3)));
    #[expect(clippy::cast_possible_truncation, reason = "between 0 and 10")]
    let near: Vec<f32> = distances.iter().map(|away| near(away) as f32 + 0.001).collect();
    let sum: f32 = near.iter().sum();
    near.into_iter().map(|near| near / sum).collect()
}

/// Chains the experts and takes logarithms.
fn logarithms<'a>(
    counting: Counting<'a, '_>,
    near: &[f32],
    before: Option<&ApName>,
    soon: bool,
) -> Vec<Candidate<'a>> {
    let Counting { found, all, different, .. } = counting;
    let mut candidates = Vec::with_capacity(found.len());
    for (Counted { ap, place, counts }, near) in found.into_iter().zip(near) {
        let mut given = [*near; FEATURES];
        for (expert, leans_on) in CHAIN {
            let motion = expert >= MOTION_SHORT;
            let kappa = if motion { 0.15 } else { 0.4 + 0.5 * different[expert].min(all[expert]) };
            given[expert] = kappa.mul_add(given[leans_on], counts[expert]) / (all[expert] + kappa);
        }
        let mut features = given.map(|given| given.max(1e-9).ln());
        let returns = before == Some(ap);
        features[RETURN] = f32::from(u8::from(returns));
        features[RETURN_SOON] = f32::from(u8::from(returns && soon));
        candidates.push(Candidate { ap, place, features });
    }
    candidates
}

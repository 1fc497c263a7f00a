//! Where a user of a campus walks: a round of habit, with detours. Pure, and the same for the same seed.
//!
//! A round comes by every access point once, and by one of them, the *hub*, twice where there are enough of them: where
//! somebody goes from there can only be told from where they came from. Detours are at random and end where habit
//! would have led, so that they cannot be foretold at all.

use std::time::Duration;

use kage_abi::content::mix;

/// Fewest access points for a hub: with fewer, the two visits would be next to each other.
const WITH_HUB: usize = 4;

/// Shortest and longest stay, as parts of the mean.
pub const SHORTEST_STAY: f64 = 0.8;
const LONGEST_STAY: f64 = 1.2;

/// Numbers that look random, the same for the same seed.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Of a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// A number below `bound`, 0 where that is 0. Its bias is below one in 2^32 for bounds below 2^32.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0).checked_rem(bound).unwrap_or(0)
    }

    /// An index of something with so many.
    pub fn index(&mut self, count: usize) -> usize {
        self.below(count as u64) as usize
    }
}

/// A user's way. Access points are numbered from 0.
#[derive(Clone, Debug)]
pub struct Route {
    round: Vec<usize>,
    /// Where in the round habit has led so far.
    place: usize,
    here: usize,
    aps: usize,
    detours_percent: u8,
    dice: Dice,
}

impl Route {
    /// A way over `aps` access points that begins at `start`, where so many steps of a hundred are detours.
    #[must_use]
    pub fn new(seed: u64, aps: usize, start: usize, detours_percent: u8) -> Self {
        let mut dice = Dice::new(seed);
        let mut round: Vec<_> = (0..aps).filter(|ap| *ap != start).collect();
        for last in (1..round.len()).rev() {
            round.swap(last, dice.index(last + 1));
        }
        round.insert(0, start);
        if aps >= WITH_HUB {
            let hub = dice.index(aps);
            // About opposite, and so next to itself on neither side.
            round.insert((hub + aps / 2) % aps + 1, round[hub]);
            let begin = round.iter().position(|ap| *ap == start).unwrap_or(0);
            round.rotate_left(begin);
        }
        Self { round, place: 0, here: start, aps, detours_percent, dice }
    }

    /// The next access point, never the one before. It is the same one where there is no other.
    pub fn step(&mut self) -> usize {
        let place = (self.place + 1) % self.round.len();
        let habit = self.round[place];
        let others: Vec<_> = (0..self.aps).filter(|ap| *ap != self.here && *ap != habit).collect();
        // Drawn in any case, so that steps and dwells stay the same whatever the share of detours.
        let (roll, other) = (self.dice.below(100), self.dice.index(others.len()));
        let detour = others.get(other).copied().filter(|_| roll < u64::from(self.detours_percent));
        // Where habit leads stays the same over a detour, and is never where that has led.
        if let Some(detour) = detour {
            self.here = detour;
        } else {
            (self.place, self.here) = (place, habit);
        }
        self.here
    }

    /// How long the user stays at an access point, which is `mean` on the average.
    pub fn stay(&mut self, mean: Duration) -> Duration {
        let share = self.dice.below(1001) as f64 / 1e3;
        mean.mul_f64(SHORTEST_STAY + share * (LONGEST_STAY - SHORTEST_STAY))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(mut route: Route, count: usize) -> Vec<usize> {
        (0..count).map(|_| route.step()).collect()
    }

    #[test]
    fn a_round_comes_by_every_access_point_and_never_stands_still() {
        for aps in 2..12 {
            for seed in 0..200 {
                let start = seed as usize % aps;
                let route = Route::new(seed, aps, start, 0);
                let round = route.round.clone();
                assert_eq!((round[0], round.len()), (start, aps + usize::from(aps >= WITH_HUB)));
                assert!((0..aps).all(|ap| round.contains(&ap)), "{round:?}");
                let walked = steps(route, 3 * round.len());
                let expected: Vec<_> = round.iter().cycle().skip(1).take(walked.len()).copied().collect();
                assert_eq!(walked, expected, "seed {seed}");
                assert!(walked.windows(2).all(|pair| pair[0] != pair[1]), "seed {seed}: {walked:?}");
            }
        }
    }

    #[test]
    fn detours_are_as_frequent_as_asked_and_lead_elsewhere() {
        let mut route = Route::new(7, 6, 2, 20);
        let (mut detours, mut before) = (0, 2);
        for _ in 0..10_000 {
            let place = route.place;
            let here = route.step();
            assert_ne!(here, before);
            detours += u32::from(route.place == place);
            before = here;
        }
        assert!((1800..2200).contains(&detours), "{detours}");
    }

    #[test]
    fn the_same_seed_walks_the_same_way() {
        let walk = |seed| steps(Route::new(seed, 5, 0, 10), 100);
        assert_eq!(walk(3), walk(3));
        assert_ne!(walk(3), walk(4));
    }

    #[test]
    fn stays_are_about_as_long_as_asked() {
        let mut route = Route::new(1, 3, 0, 0);
        let stays: Vec<_> = (0..1000).map(|_| route.stay(Duration::from_secs(10)).as_secs_f64()).collect();
        assert!(stays.iter().all(|stay| (8.0..=12.0).contains(stay)));
        let mean = stays.iter().sum::<f64>() / 1000.0;
        assert!((9.8..10.2).contains(&mean), "{mean}");
    }

    #[test]
    fn one_access_point_is_no_walk_and_no_panic() {
        assert_eq!(steps(Route::new(1, 1, 0, 50), 3), [0, 0, 0]);
    }
}

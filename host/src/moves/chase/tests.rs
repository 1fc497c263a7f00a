use std::collections::BTreeMap;

use kage_machine::{ImageNumber, Term};
use proptest::prelude::*;

use super::*;

const DWELL: Duration = Duration::from_secs(3);

fn host(index: usize) -> HostName {
    format!("h{index}").parse().unwrap()
}

fn record(owner: usize, wanted: Wanted) -> ImageRecord {
    ImageRecord {
        term: Term(1),
        owner: host(owner),
        intent: None,
        backup: None,
        wanted,
        number: ImageNumber(7),
        indices: ImageRecord::FIRST_INDICES,
        ipv4: None,
        disk_origin: None,
        profile: crate::fake::profile(),
    }
}

fn place(index: usize, at_ms: u64) -> Place {
    Place { ap: format!("ap-{index}").parse().unwrap(), host: host(index), at_ms }
}

fn to(ids: &[(&str, usize)]) -> Vec<(String, HostName)> {
    ids.iter().map(|(id, index)| ((*id).to_owned(), host(*index))).collect()
}

/// A host's next step, with moves under way of which the first has begun.
fn step(chase: &mut Chase, owner: usize, under_way: &[(&str, usize)], now: Instant) -> Step {
    let (under_way, record) = (to(under_way), record(owner, Wanted::Running));
    let begun = under_way.first().map(|(id, _)| id.clone());
    let scene = Scene { me: &host(0), record: &record, under_way: &under_way, begun: begun.as_deref() };
    chase.step(&scene, DWELL, now)
}

#[test]
fn a_user_elsewhere_is_gone_for_and_one_here_is_not() {
    let now = Instant::now();
    let mut chase = Chase::default();
    assert_eq!(step(&mut chase, 0, &[], now), Step::Rest(Rest::There));
    assert_eq!(chase.seen(place(1, 10), &[], now), Some(1));
    assert_eq!(step(&mut chase, 0, &[], now), Step::Begin(host(1)));
    assert_eq!(step(&mut chase, 0, &[("m", 1)], now), Step::Comes("m".into()));
    // Another access point of the same host is the same goal.
    assert_eq!(chase.seen(place(1, 11), &to(&[("m", 1)]), now), Some(1));
    assert_eq!(step(&mut chase, 1, &[], now), Step::PassOn(place(1, 11)));
    assert_eq!((chase.goal(), step(&mut chase, 1, &[], now)), (None, Step::Rest(Rest::There)));
    assert_eq!(chase.seen(place(0, 12), &[], now), Some(2));
    assert_eq!(step(&mut chase, 0, &[], now), Step::Rest(Rest::There));
}

#[test]
fn word_of_an_earlier_place_changes_nothing() {
    let now = Instant::now();
    let mut chase = Chase::default();
    assert!(chase.seen(place(1, 10), &[], now).is_some());
    assert_eq!(chase.seen(place(2, 9), &[], now), None);
    assert_eq!(step(&mut chase, 0, &[], now), Step::Begin(host(1)));
    chase.knows(20);
    assert_eq!(chase.seen(place(2, 19), &[], now), None);
    assert!(chase.seen(place(2, 20), &[], now).is_some());
}

#[test]
fn a_move_that_has_begun_ends_first_and_those_in_the_queue_are_cancelled() {
    let now = Instant::now();
    let mut chase = Chase::default();
    let moves = [("m1", 1), ("m2", 2)];
    chase.seen(place(3, 10), &to(&moves), now);
    assert_eq!(step(&mut chase, 0, &moves, now), Step::Cancel(vec!["m2".into()]));
    assert_eq!(step(&mut chase, 0, &moves, now), Step::Await("m1".into()));
    assert_eq!(step(&mut chase, 0, &[], now), Step::Begin(host(3)));
    // Whoever cancels a move does not want it, but for the sake of a user who is back by now.
    assert_eq!(chase.seen(place(1, 11), &[], now), Some(2));
    for (id, goal, left) in [("m2", 2, Some(2)), ("by hand", 1, Some(2)), ("by hand", 2, None)] {
        chase.cancelled(id, goal);
        assert_eq!(chase.goal(), left, "{id} {goal}");
    }
    // One that is to stay is recalled.
    let mut chase = Chase::default();
    chase.seen(place(0, 10), &to(&moves[..1]), now);
    assert_eq!(step(&mut chase, 0, &moves[..1], now), Step::Cancel(vec!["m1".into()]));
    assert_eq!(step(&mut chase, 0, &moves[..1], now), Step::Await("m1".into()));
    assert_eq!(step(&mut chase.clone(), 0, &[], now), Step::Rest(Rest::There));
    assert_eq!(step(&mut chase, 1, &[], now), Step::PassOn(place(0, 10)), "it was too late");
}

#[test]
fn whoever_moves_or_stops_a_machine_by_hand_is_right() {
    let now = Instant::now();
    let mut chase = Chase::default();
    chase.seen(place(1, 10), &[], now);
    assert_eq!(step(&mut chase, 0, &[("by hand", 2)], now), Step::Rest(Rest::Overruled));
    assert_eq!(step(&mut chase, 0, &[], now), Step::Rest(Rest::There), "there is no goal any more");
    chase.seen(place(1, 11), &[], now);
    let stopped = record(0, Wanted::Stopped);
    let scene = Scene { me: &host(0), record: &stopped, under_way: &[], begun: None };
    assert_eq!(chase.step(&scene, DWELL, now), Step::Rest(Rest::Stopped));
    // One begun for the user's sake is nobody's order, even if it was begun while the user went on.
    let mut chase = Chase::default();
    chase.began("m1");
    chase.seen(place(1, 12), &[], now);
    assert_eq!(step(&mut chase, 0, &[("m1", 2)], now), Step::Await("m1".into()));
    assert_eq!(step(&mut chase, 0, &[("m1", 2)], now), Step::Await("m1".into()));
}

#[test]
fn what_comes_to_nothing_is_tried_again_and_at_last_given_up() {
    let mut now = Instant::now();
    let mut chase = Chase::default();
    chase.seen(place(1, 10), &[], now);
    for tries in 1..MOST_TRIES {
        assert_eq!(step(&mut chase, 0, &[], now), Step::Begin(host(1)), "{tries}");
        assert!(!chase.failed(now));
        match step(&mut chase, 0, &[], now) {
            Step::Wait(until) => now = until,
            other => panic!("{tries}: {other:?}"),
        }
    }
    assert!(chase.failed(now));
    assert_eq!(step(&mut chase, 0, &[], now), Step::Rest(Rest::There));
    // The user is seen again: that is a new goal.
    chase.seen(place(1, 11), &[], now);
    assert_eq!(step(&mut chase, 0, &[], now), Step::Begin(host(1)));
}

#[test]
fn only_ping_pong_waits_and_only_for_the_dwell_time() {
    let start = Instant::now();
    let at = |seconds: u64| start + Duration::from_secs(seconds);
    let back = |left: u64, came: u64| {
        let mut chase = Chase::default();
        chase.left(&host(1), at(left));
        chase.came(&host(1), at(came));
        chase
    };
    let goes = |mut chase: Chase, to: usize, when: u64| {
        chase.seen(place(to, when * 1000), &[], at(when));
        step(&mut chase, 0, &[], at(when))
    };
    assert_eq!(goes(back(0, 5), 1, 7), Step::Wait(at(10)));
    assert_eq!(goes(back(0, 5), 2, 7), Step::Begin(host(2)), "somewhere else");
    assert_eq!(goes(back(0, 11), 1, 13), Step::Begin(host(1)), "long away");
    assert_eq!(goes(back(0, 5), 1, 15), Step::Begin(host(1)), "long here");
    let mut once = Chase::default();
    once.came(&host(1), at(0));
    assert_eq!(goes(once, 1, 1), Step::Begin(host(1)), "a single return");
    let mut round = Chase::default();
    round.left(&host(1), at(0));
    round.came(&host(2), at(2));
    assert_eq!(goes(round, 1, 3), Step::Begin(host(1)), "a walk in a circle");

    // Whoever stays is followed, and whoever goes on like that is not.
    let mut chase = back(0, 5);
    chase.seen(place(1, 7_000), &[], at(7));
    assert_eq!(step(&mut chase, 0, &[], at(9)), Step::Wait(at(10)));
    assert_eq!(step(&mut chase.clone(), 0, &[], at(10)), Step::Begin(host(1)));
    for second in (9..60).step_by(4) {
        chase.seen(place(0, second * 1000), &[], at(second));
        assert_eq!(step(&mut chase, 0, &[], at(second)), Step::Rest(Rest::There));
        chase.seen(place(1, (second + 2) * 1000), &[], at(second + 2));
        assert_eq!(step(&mut chase, 0, &[], at(second + 2)), Step::Wait(at(second + 2) + DWELL), "{second}");
    }
}

/// xorshift, so that a seed is a whole story.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % most
    }
}

struct Move {
    id: String,
    from: usize,
    to: usize,
    ends_ms: u64,
    succeeds: bool,
}

/// Hosts that chase one machine; word between them takes its time, and moves take theirs or fail.
struct World {
    dice: Dice,
    start: Instant,
    now_ms: u64,
    owner: usize,
    chases: Vec<Chase>,
    moving: Option<Move>,
    /// Places on their way to whoever is the owner then.
    word: BTreeMap<(u64, u64), Place>,
    sent: u64,
    moves: u32,
    tried: u32,
}

const HOSTS: usize = 4;

impl World {
    fn new(seed: u64) -> Self {
        Self {
            dice: Dice(seed | 1),
            start: Instant::now(),
            now_ms: 0,
            owner: 0,
            chases: vec![Chase::default(); HOSTS],
            moving: None,
            word: BTreeMap::new(),
            sent: 0,
            moves: 0,
            tried: 0,
        }
    }

    fn at(&self, ms: u64) -> Instant {
        self.start + Duration::from_millis(ms)
    }

    fn tell(&mut self, place: Place) {
        let arrives = self.now_ms + self.dice.below(300);
        self.sent += 1;
        self.word.insert((arrives, self.sent), place);
    }

    fn under_way(&self, host_index: usize) -> Vec<(String, HostName)> {
        let mine = self.moving.as_ref().filter(|moving| moving.from == host_index);
        mine.map(|moving| (moving.id.clone(), host(moving.to))).into_iter().collect()
    }

    fn run_until(&mut self, end_ms: u64) {
        while self.now_ms < end_ms {
            self.now_ms += 10;
            while let Some(word) = self.word.first_entry().filter(|word| word.key().0 <= self.now_ms) {
                let place = word.remove();
                let (under_way, at) = (self.under_way(self.owner), self.at(place.at_ms));
                self.chases[self.owner].seen(place, &under_way, at);
            }
            if self.moving.as_ref().is_some_and(|moving| moving.ends_ms <= self.now_ms) {
                self.end_move();
            }
            for index in 0..HOSTS {
                self.act(index);
            }
        }
    }

    fn end_move(&mut self) {
        let Some(moving) = self.moving.take() else { return };
        let now = self.at(self.now_ms);
        if moving.succeeds {
            self.moves += 1;
            self.owner = moving.to;
            self.chases[moving.from].left(&host(moving.to), now);
            self.chases[moving.to].came(&host(moving.from), now);
        } else {
            self.chases[moving.from].failed(now);
        }
    }

    fn act(&mut self, index: usize) {
        if self.chases[index].goal().is_none() {
            return;
        }
        let (under_way, now) = (self.under_way(index), self.at(self.now_ms));
        let begun = under_way.first().map(|(id, _)| id.clone());
        let record = record(self.owner, Wanted::Running);
        let scene =
            Scene { me: &host(index), record: &record, under_way: &under_way, begun: begun.as_deref() };
        match self.chases[index].step(&scene, DWELL, now) {
            Step::PassOn(place) => self.tell(place),
            Step::Cancel(_) => {
                // In time, or too late.
                let late = self.dice.below(2) == 0;
                if let Some(moving) = self.moving.as_mut().filter(|_| !late) {
                    (moving.succeeds, moving.ends_ms) = (false, self.now_ms);
                }
            }
            Step::Begin(target) => {
                assert_eq!(index, self.owner, "only the owner moves a machine");
                assert!(self.moving.is_none());
                self.tried += 1;
                let to = (0..HOSTS).find(|index| host(*index) == target).unwrap();
                self.moving = Some(Move {
                    id: self.tried.to_string(),
                    from: index,
                    to,
                    ends_ms: self.now_ms + 50 + self.dice.below(2_500),
                    succeeds: self.dice.below(4) > 0,
                });
            }
            Step::Rest(Rest::Overruled) => panic!("nobody moves it by hand"),
            Step::Rest(_) | Step::Await(_) | Step::Comes(_) | Step::Wait(_) => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn a_machine_ends_up_where_its_user_was_last_seen(seed in any::<u64>()) {
        let mut world = World::new(seed);
        let roams = 1 + world.dice.below(25);
        let mut last = 0;
        for _ in 0..roams {
            let pause = [20, 200, 2_000, 9_000][world.dice.below(4) as usize];
            let until = world.now_ms + 10 + world.dice.below(pause);
            world.run_until(until);
            last = world.dice.below(HOSTS as u64) as usize;
            world.tell(place(last, world.now_ms));
        }
        world.run_until(world.now_ms + 90_000);
        prop_assert_eq!(world.owner, last);
        prop_assert!(world.chases.iter().all(|chase| chase.goal().is_none()) && world.moving.is_none());
        // Each place leads to one move at most, and word that came late to two more: there and back.
        prop_assert!(u64::from(world.moves) <= 3 * roams, "{} moves for {roams} places", world.moves);
        prop_assert!(u64::from(world.tried) <= u64::from(MOST_TRIES) * 3 * roams);
    }

    #[test]
    fn ping_pong_moves_a_machine_a_few_times_and_then_where_its_user_stays(seed in any::<u64>(), flips in 5_u64..40) {
        let mut world = World::new(seed);
        for flip in 1..=flips {
            let until = world.now_ms + 500 + world.dice.below(1_500);
            world.run_until(until);
            world.tell(place((flip % 2) as usize, world.now_ms));
        }
        world.run_until(world.now_ms + 30_000);
        prop_assert_eq!(world.owner as u64, flips % 2);
        prop_assert!(world.moves <= 8, "{} moves", world.moves);
    }
}

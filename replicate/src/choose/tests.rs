use proptest::prelude::*;

use super::*;

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

fn hosts(names: &str) -> Vec<HostName> {
    names.split_whitespace().map(host).collect()
}

fn likely(all: &[(&str, f64)]) -> Vec<(HostName, f64)> {
    all.iter().map(|(name, probability)| (host(name), *probability)).collect()
}

const BUDGET: Budget = Budget { mirrors: 2, memory_bytes: u64::MAX, bytes_per_s: None };

/// What a test says; the rest is a machine at `a` with its user and nothing known.
#[derive(Clone, Debug)]
struct Case {
    user_at: Option<HostName>,
    likely: Vec<(HostName, f64)>,
    left_s: Option<f64>,
    near: Vec<HostName>,
    followers: Vec<HostName>,
    former: Option<(HostName, Duration)>,
    usable: BTreeSet<HostName>,
    budget: Budget,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            user_at: Some(host("a")),
            likely: Vec::new(),
            left_s: None,
            near: Vec::new(),
            followers: Vec::new(),
            former: None,
            usable: hosts("a b c d e f").into_iter().collect(),
            budget: BUDGET,
        }
    }
}

impl Case {
    fn likely(all: &[(&str, f64)]) -> Self {
        Self { likely: likely(all), ..Self::default() }
    }

    fn following(self, names: &str) -> Self {
        Self { followers: hosts(names), ..self }
    }

    fn chosen(&self) -> Vec<HostName> {
        choose(&Scene {
            owner: &host("a"),
            user_at: self.user_at.as_ref(),
            likely: &self.likely,
            left_s: self.left_s,
            near: &self.near,
            followers: &self.followers,
            former: self.former.as_ref().map(|(host, since)| (host, *since)),
            usable: &self.usable,
            machine_bytes: 64 << 20,
            budget: self.budget,
        })
    }
}

#[test]
fn the_likeliest_hosts_get_mirrors_within_the_budget() {
    let case = Case::likely(&[("b", 0.2), ("c", 0.5), ("d", 0.1)]);
    assert_eq!(case.chosen(), hosts("c b"));
    let fewer = Case { budget: Budget { mirrors: 1, ..BUDGET }, ..case.clone() };
    assert_eq!(fewer.chosen(), hosts("c"));
    let small = Case { budget: Budget { memory_bytes: 100 << 20, ..BUDGET }, ..case.clone() };
    assert_eq!(small.chosen(), hosts("c"));
    let none = Case { budget: Budget { mirrors: 0, ..BUDGET }, ..case };
    assert_eq!(none.chosen(), hosts(""));
}

#[test]
fn hosts_that_are_unlikely_unknown_or_cordoned_get_none() {
    assert_eq!(Case::likely(&[("b", 0.9), ("c", 0.049)]).chosen(), hosts("b"));
    let case = Case::likely(&[("x", 0.6), ("b", 0.3)]).following("x");
    assert_eq!(case.chosen(), hosts("b"));
}

#[test]
fn a_mirror_that_stands_gives_way_to_a_clear_gain_only() {
    let one = |all: &[(&str, f64)], standing: &str| {
        let case = Case { budget: Budget { mirrors: 1, ..BUDGET }, ..Case::likely(all) };
        case.following(standing).chosen()
    };
    assert_eq!(one(&[("b", 0.4), ("c", 0.5)], ""), hosts("c"));
    assert_eq!(one(&[("b", 0.4), ("c", 0.5)], "b"), hosts("b"));
    assert_eq!(one(&[("b", 0.2), ("c", 0.5)], "b"), hosts("c"));
    assert_eq!(one(&[("b", 0.03)], "b"), hosts("b"));
    assert_eq!(one(&[("b", 0.01)], "b"), hosts(""));
}

#[test]
fn the_former_owner_stays_while_nobody_needs_its_place() {
    let former = |case: Case, ago| {
        Case { former: Some((host("d"), Duration::from_secs(ago))), ..case }.following("d").chosen()
    };
    assert_eq!(former(Case::likely(&[("b", 0.6)]), 10), hosts("b d"));
    assert_eq!(former(Case::likely(&[("b", 0.6), ("c", 0.3)]), 10), hosts("b c"));
    assert_eq!(former(Case::likely(&[("b", 0.6)]), 601), hosts("b"));
    // One that lost its mirror is a host like others.
    let without = Case { former: Some((host("d"), Duration::ZERO)), ..Case::default() };
    assert_eq!(without.chosen(), hosts(""));
}

#[test]
fn where_nothing_is_known_the_nearest_hosts_get_mirrors() {
    let case = Case { near: hosts("c b d"), ..Case::default() };
    assert_eq!(case.chosen(), hosts("c b"));
    // What is known counts for more.
    let some = Case { near: hosts("c b d"), ..Case::likely(&[("d", 0.7), ("e", 0.2)]) };
    assert_eq!(some.chosen(), hosts("d e"));
    // Also where the user is not known.
    assert_eq!(Case { user_at: None, ..case }.chosen(), hosts("c b"));
}

#[test]
fn a_machine_away_from_its_user_gets_a_mirror_there_and_no_other_new_one() {
    let case = Case { user_at: Some(host("b")), ..Case::likely(&[("c", 0.7), ("d", 0.3)]) };
    assert_eq!(case.chosen(), hosts("b"));
    assert_eq!(case.following("d c").chosen(), hosts("b c"));
    // However much is said of another.
    let said_twice = Case { user_at: Some(host("b")), ..Case::likely(&[("c", 0.9), ("c", 0.9)]) };
    assert_eq!(said_twice.following("c").chosen(), hosts("b c"));
}

#[test]
fn no_more_mirrors_are_begun_than_can_be_filled_in_time() {
    let rate = Budget { mirrors: 3, bytes_per_s: Some(1e6), ..BUDGET };
    // 64 MiB take 67 s.
    for (left_s, expected) in
        [(Some(10.0), "b"), (Some(130.0), "b"), (Some(140.0), "b c"), (Some(300.0), "b c d"), (None, "b c d")]
    {
        let case = Case { left_s, budget: rate, ..Case::likely(&[("b", 0.4), ("c", 0.3), ("d", 0.2)]) };
        assert_eq!(case.chosen(), hosts(expected), "{left_s:?}");
        // What stands needs no filling.
        assert_eq!(case.following("b c d").chosen(), hosts("b c d"));
    }
}

fn case() -> impl Strategy<Value = Case> {
    let name = || prop::sample::select(hosts("a b c d e f x"));
    let probability = prop_oneof![9 => 0.0..1.0, 1 => Just(f64::NAN)];
    (
        prop::option::of(name()),
        prop::collection::vec((name(), probability), 0..5),
        prop::option::of(0.0..500.0),
        prop::collection::vec(name(), 0..5),
        prop::collection::btree_set(name(), 0..5),
        prop::option::of((name(), 0_u64..1200)),
        (0_usize..4, 0_u64..400 << 20, prop::option::of(0.0..1e8)),
    )
        .prop_map(|(user_at, likely, left_s, near, followers, former, (mirrors, memory_bytes, rate))| {
            Case {
                user_at,
                likely,
                left_s,
                near,
                followers: followers.into_iter().collect(),
                former: former.map(|(host, since)| (host, Duration::from_secs(since))),
                budget: Budget { mirrors, memory_bytes, bytes_per_s: rate },
                ..Case::default()
            }
        })
}

proptest! {
    #[test]
    fn whatever_is_known_the_choice_is_within_its_budget_and_stands(case in case()) {
        let chosen = case.chosen();
        prop_assert!(chosen.len() <= case.budget.mirrors);
        prop_assert!(chosen.len() as u64 * (64 << 20) <= case.budget.memory_bytes);
        let distinct: BTreeSet<_> = chosen.iter().collect();
        prop_assert_eq!(distinct.len(), chosen.len());
        prop_assert!(chosen.iter().all(|chosen| *chosen != host("a") && case.usable.contains(chosen)));
        // The same once more, with what was chosen standing: nothing that was chosen goes.
        let again = Case { followers: chosen.clone(), ..case.clone() }.chosen();
        prop_assert!(chosen.iter().all(|host| again.contains(host)), "{:?} then {:?}", chosen, again);
        // Where the user waits for the machine comes first.
        if let Some(at) = case.user_at.filter(|at| *at != host("a") && case.usable.contains(at))
            && case.budget.mirrors > 0 && case.budget.memory_bytes >= 64 << 20
        {
            prop_assert_eq!(chosen.first(), Some(&at));
        }
    }

    #[test]
    fn small_changes_of_a_forecast_move_no_mirror(
        even in 0.1..0.4_f64, changes in prop::collection::vec((-0.04..0.04_f64, -0.04..0.04_f64), 1..20),
    ) {
        let budget = Budget { mirrors: 1, ..BUDGET };
        let mut standing = Case { budget, ..Case::likely(&[("b", even), ("c", even)]) }.chosen();
        let first = standing.clone();
        for (b, c) in changes {
            let names: Vec<_> = standing.iter().map(HostName::as_str).collect();
            let case = Case { budget, ..Case::likely(&[("b", even + b), ("c", even + c)]) };
            standing = case.following(&names.join(" ")).chosen();
            prop_assert_eq!(&standing, &first);
        }
    }
}

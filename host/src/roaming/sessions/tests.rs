use proptest::prelude::*;

use super::*;
use crate::config::IdentityKind;

const NOW_MS: u64 = 1_700_000_000_500;
const GRACE: Duration = Duration::from_secs(120);

fn sessions() -> Sessions {
    let aps = (1..=3).map(|index| (format!("nas-{index}"), format!("ap-{index}").parse().unwrap()));
    let users = [("alice@example.org".to_owned(), "alice".parse().unwrap())];
    let order = [IdentityKind::Cui, IdentityKind::Class, IdentityKind::UserName];
    Sessions::new(Names::new(aps, users, &order), GRACE)
}

fn report(status: Status, user: &str, nas: &str) -> Accounting {
    Accounting {
        user_name: Some(user.into()),
        calling_station_id: Some("02-00-00-00-00-01".into()),
        session_id: Some("1".into()),
        nas_identifier: Some(nas.into()),
        ..Accounting::new(status)
    }
}

fn arrived(taken: Result<Option<Consequence>, Ignored>) -> Option<(String, String, bool)> {
    match taken {
        Ok(Some(Consequence::Arrived { user, ap, first, .. })) => {
            Some((user.to_string(), ap.to_string(), first))
        }
        _ => None,
    }
}

fn left(user: &str, ap: &str, at_ms: u64) -> Consequence {
    Consequence::Left { user: user.parse().unwrap(), from: ap.parse().unwrap(), at_ms }
}

#[test]
fn a_start_at_a_new_access_point_is_a_move() {
    let (mut sessions, now) = (sessions(), Instant::now());
    let at = |nas| report(Status::Start, "alice@example.org", nas);
    assert_eq!(
        arrived(sessions.take(&at("nas-1"), now, NOW_MS)),
        Some(("alice".into(), "ap-1".into(), true))
    );
    assert_eq!(sessions.take(&at("nas-1"), now, NOW_MS), Err(Ignored::Duplicate));
    assert_eq!(
        arrived(sessions.take(&at("nas-2"), now, NOW_MS + 9)),
        Some(("alice".into(), "ap-2".into(), false))
    );
    assert_eq!(
        arrived(sessions.take(&at("nas-1"), now, NOW_MS + 20)),
        Some(("alice".into(), "ap-1".into(), false))
    );
}

#[test]
fn a_new_start_at_the_same_place_counts_since_the_user_may_have_been_at_another_hosts() {
    let (mut sessions, now) = (sessions(), Instant::now());
    let at = |session: &str| Accounting {
        session_id: Some(session.into()),
        ..report(Status::Start, "bob", "nas-1")
    };
    assert!(arrived(sessions.take(&at("1"), now, NOW_MS)).is_some());
    assert_eq!(sessions.take(&at("1"), now, NOW_MS + 1), Err(Ignored::Duplicate));
    assert!(arrived(sessions.take(&at("2"), now, NOW_MS + 2)).is_some());
    let interim =
        Accounting { session_id: Some("2".into()), ..report(Status::InterimUpdate, "bob", "nas-1") };
    assert_eq!(sessions.take(&interim, now, NOW_MS + 3), Err(Ignored::Duplicate));
}

#[test]
fn a_stop_counts_only_from_the_current_access_point_and_after_the_grace_time() {
    let (mut sessions, now) = (sessions(), Instant::now());
    sessions.take(&report(Status::Start, "bob", "nas-1"), now, NOW_MS).unwrap();
    sessions.take(&report(Status::Start, "bob", "nas-2"), now, NOW_MS).unwrap();
    assert_eq!(sessions.take(&report(Status::Stop, "bob", "nas-1"), now, NOW_MS), Err(Ignored::NotCurrent));
    assert_eq!(sessions.take(&report(Status::Stop, "bob", "nas-2"), now, NOW_MS + 9), Ok(None));
    assert_eq!(sessions.next_expiry(), Some(now + GRACE));
    assert!(sessions.expire(now + GRACE - Duration::from_millis(1)).is_empty());
    assert_eq!(sessions.expire(now + GRACE), [left("bob", "ap-2", NOW_MS + 9)], "by the time of the Stop");
    assert!(sessions.expire(now + 2 * GRACE).is_empty());
}

#[test]
fn coming_back_within_the_grace_time_is_no_logout() {
    let (mut sessions, now) = (sessions(), Instant::now());
    sessions.take(&report(Status::Start, "bob", "nas-1"), now, NOW_MS).unwrap();
    sessions.take(&report(Status::Stop, "bob", "nas-1"), now, NOW_MS).unwrap();
    assert!(arrived(sessions.take(&report(Status::Start, "bob", "nas-1"), now, NOW_MS + 5)).is_some());
    assert!(sessions.expire(now + 2 * GRACE).is_empty());
}

#[test]
fn the_last_device_logs_its_user_out() {
    let (mut sessions, now) = (sessions(), Instant::now());
    let other = |status| Accounting {
        calling_station_id: Some("02-00-00-00-00-02".into()),
        ..report(status, "bob", "nas-3")
    };
    sessions.take(&report(Status::Start, "bob", "nas-1"), now, NOW_MS).unwrap();
    sessions.take(&other(Status::Start), now, NOW_MS).unwrap();
    sessions.take(&report(Status::Stop, "bob", "nas-1"), now, NOW_MS).unwrap();
    // The one that is left has the machine.
    let left = sessions.expire(now + GRACE);
    assert!(
        matches!(left.as_slice(), [Consequence::Departed { ap, .. }] if ap.as_str() == "ap-3"),
        "{left:?}"
    );
    sessions.take(&other(Status::Stop), now + GRACE, NOW_MS).unwrap();
    assert_eq!(sessions.expire(now + 2 * GRACE).len(), 1);
}

#[test]
fn late_packets_and_old_access_points_move_nobody_back() {
    let (mut sessions, now) = (sessions(), Instant::now());
    let at = |status, nas, seconds: u32| Accounting {
        event_timestamp: Some(seconds),
        ..report(status, "bob", nas)
    };
    sessions.take(&at(Status::Start, "nas-1", 1_699_999_990), now, NOW_MS).unwrap();
    sessions.take(&at(Status::Start, "nas-2", 1_699_999_995), now, NOW_MS).unwrap();
    assert_eq!(sessions.take(&at(Status::Start, "nas-1", 1_699_999_990), now, NOW_MS), Err(Ignored::Late));
    assert_eq!(
        sessions.take(&at(Status::InterimUpdate, "nas-1", 1_699_999_999), now, NOW_MS),
        Err(Ignored::NotCurrent)
    );
    // A clock that runs years ahead is not believed: the next honest report still counts.
    sessions.take(&at(Status::Start, "nas-3", 4_000_000_000), now, NOW_MS).unwrap();
    assert!(arrived(sessions.take(&at(Status::Start, "nas-1", 1_700_000_001), now, NOW_MS + 1000)).is_some());
}

#[test]
fn an_access_point_that_restarts_ends_its_sessions_after_the_grace_time() {
    let (mut sessions, now) = (sessions(), Instant::now());
    sessions.take(&report(Status::Start, "bob", "nas-1"), now, NOW_MS).unwrap();
    sessions.take(&report(Status::Start, "eve", "nas-2"), now, NOW_MS).unwrap();
    sessions.take(&report(Status::AccountingOn, "", "nas-1"), now, NOW_MS).unwrap();
    assert_eq!(sessions.expire(now + GRACE), [left("bob", "ap-1", NOW_MS)]);
}

#[test]
fn unknown_access_points_and_users_are_told_apart() {
    let (mut sessions, now) = (sessions(), Instant::now());
    assert_eq!(sessions.take(&report(Status::Start, "bob", "nas-9"), now, NOW_MS), Err(Ignored::UnknownAp));
    assert_eq!(
        sessions.take(&report(Status::Start, "anonymous", "nas-1"), now, NOW_MS),
        Err(Ignored::UnknownUser)
    );
    assert_eq!(sessions.take(&report(Status::Other(15), "bob", "nas-1"), now, NOW_MS), Err(Ignored::Other));
}

fn second(status: Status, nas: &str) -> Accounting {
    Accounting { calling_station_id: Some("02-00-00-00-00-02".into()), ..report(status, "bob", nas) }
}

/// Counters at a time.
fn counted(report: Accounting, octets: u64) -> Accounting {
    Accounting { input_octets: Some(octets / 2), output_octets: Some(octets - octets / 2), ..report }
}

#[test]
fn of_two_devices_the_one_with_traffic_is_told() {
    let (mut sessions, now) = (sessions(), Instant::now());
    sessions.take(&report(Status::Start, "bob", "nas-1"), now, NOW_MS).unwrap();
    sessions.take(&second(Status::Start, "nas-2"), now, NOW_MS).unwrap();
    let interim = |octets| counted(report(Status::InterimUpdate, "bob", "nas-1"), octets);
    let active = Consequence::Active {
        user: "bob".parse().unwrap(),
        ap: "ap-1".parse().unwrap(),
        others: vec!["ap-2".parse().unwrap()],
        device: DeviceAddresses::default(),
        since_ms: NOW_MS,
        // Later than the other device's arrival: by that alone the owner follows.
        at_ms: NOW_MS + 60_000,
    };
    assert_eq!(sessions.take(&interim(1 << 33), now, NOW_MS + 60_000), Ok(Some(active)));
    // The same counters again, or what a device sends by itself, is no traffic.
    assert_eq!(sessions.take(&interim(1 << 33), now, NOW_MS + 120_000), Err(Ignored::Duplicate));
    assert_eq!(sessions.take(&interim((1 << 33) + 5_000), now, NOW_MS + 180_000), Err(Ignored::Duplicate));
    assert!(sessions.take(&interim((1 << 33) + 50_000), now, NOW_MS + 240_000).unwrap().is_some());
    // Counters begin anew.
    assert_eq!(sessions.take(&interim(10), now, NOW_MS + 300_000), Err(Ignored::Duplicate));
    assert!(sessions.take(&interim(900_000), now, NOW_MS + 360_000).unwrap().is_some());
}

#[test]
fn when_one_of_two_devices_leaves_its_user_is_where_the_other_is() {
    let (mut sessions, now) = (sessions(), Instant::now());
    let device = "fd0d::1".parse().unwrap();
    let first = Accounting { framed_ipv6_address: Some(device), ..report(Status::Start, "bob", "nas-1") };
    sessions.take(&first, now, NOW_MS).unwrap();
    sessions.take(&second(Status::Start, "nas-2"), now, NOW_MS + 1).unwrap();
    sessions.take(&report(Status::Stop, "bob", "nas-1"), now, NOW_MS + 2).unwrap();
    assert_eq!(
        sessions.expire(now + GRACE),
        [Consequence::Departed {
            user: "bob".parse().unwrap(),
            from: "ap-1".parse().unwrap(),
            device: DeviceAddresses { ipv6: Some(device), ipv4: None },
            ap: "ap-2".parse().unwrap(),
            at_ms: NOW_MS + 2,
        }]
    );
}

#[test]
fn an_address_told_later_is_news_and_stays() {
    let (mut sessions, now) = (sessions(), Instant::now());
    sessions.take(&report(Status::Start, "bob", "nas-1"), now, NOW_MS).unwrap();
    let address = Some("fd0d::1".parse().unwrap());
    let mut interim =
        Accounting { framed_ipv6_address: address, ..report(Status::InterimUpdate, "bob", "nas-1") };
    let Ok(Some(Consequence::Arrived { device, at_ms, start, first, .. })) =
        sessions.take(&interim, now, NOW_MS + 5_000)
    else {
        panic!("an address is news");
    };
    assert_eq!(at_ms, NOW_MS, "the device has been there since");
    assert_eq!((device.ipv6, start, first), (address, false, false));
    assert_eq!(sessions.take(&interim, now, NOW_MS + 10_000), Err(Ignored::Duplicate));
    interim.framed_ipv6_address = None;
    assert_eq!(sessions.take(&interim, now, NOW_MS + 15_000), Err(Ignored::Duplicate));
}

#[test]
fn a_late_stop_of_an_earlier_session_at_the_same_place_ends_nothing() {
    let (mut sessions, now) = (sessions(), Instant::now());
    let at = |status, session: &str, seconds| Accounting {
        session_id: Some(session.into()),
        event_timestamp: Some(seconds),
        ..report(status, "bob", "nas-1")
    };
    let second = 1_700_000_000;
    sessions.take(&at(Status::Start, "1", second - 60), now, NOW_MS - 60_000).unwrap();
    sessions.take(&at(Status::Start, "2", second), now, NOW_MS).unwrap();
    // The end of the first one, told a moment later, and its repetition with the same id.
    assert_eq!(sessions.take(&at(Status::Stop, "1", second), now, NOW_MS + 200), Err(Ignored::Late));
    assert_eq!(sessions.take(&at(Status::Stop, "2", second - 1), now, NOW_MS + 300), Err(Ignored::Late));
    assert_eq!(sessions.next_expiry(), None);
    assert_eq!(sessions.take(&at(Status::Stop, "2", second), now, NOW_MS + 400), Ok(None));
}

#[test]
fn reports_that_are_sent_again_later_move_nobody_and_keep_nobody_here() {
    let (mut sessions, now) = (sessions(), Instant::now());
    let at =
        |status, nas, seconds| Accounting { event_timestamp: Some(seconds), ..report(status, "bob", nas) };
    let second = 1_700_000_000;
    let first = at(Status::Start, "nas-1", second);
    sessions.take(&first, now, NOW_MS).unwrap();
    // Two access points within a second: what is sent again cannot be told from what was first, and counts as that.
    sessions.take(&at(Status::Start, "nas-2", second), now, NOW_MS + 100).unwrap();
    for later in [4_000, 60_000, 86_400_000] {
        assert_eq!(sessions.take(&first, now, NOW_MS + later), Err(Ignored::Late), "{later}");
    }
    // The user goes; nothing of before brings the user back.
    let start = at(Status::Start, "nas-2", second + 10);
    sessions.take(&start, now, NOW_MS + 10_000).unwrap();
    sessions.take(&at(Status::Stop, "nas-2", second + 20), now, NOW_MS + 20_000).unwrap();
    assert_eq!(sessions.take(&start, now, NOW_MS + 30_000), Err(Ignored::Duplicate));
    let interim = at(Status::InterimUpdate, "nas-2", second + 15);
    assert_eq!(sessions.take(&interim, now, NOW_MS + 30_000), Err(Ignored::Late));
    assert_eq!(sessions.expire(now + GRACE).len(), 1);
    for report in [&first, &start, &interim] {
        assert_eq!(sessions.take(report, now, NOW_MS + 200_000), Err(Ignored::Stale));
    }
    assert!(sessions.is_empty());
}

#[test]
fn a_walk_goes_on_at_an_access_point_whose_clock_is_slow() {
    let (mut sessions, now) = (sessions(), Instant::now());
    let at = |user: &str, nas, seconds: u64| Accounting {
        event_timestamp: Some(seconds as u32),
        ..report(Status::Start, user, nas)
    };
    // nas-2 is a minute behind, as everybody's arrivals there show.
    for (step, user) in ["carol", "dave", "erin"].into_iter().enumerate() {
        let later = step as u64 * 7;
        sessions.take(&at(user, "nas-2", 1_699_999_940 + later), now, NOW_MS + later * 1000).unwrap();
    }
    sessions.take(&at("bob", "nas-1", 1_700_000_020), now, NOW_MS + 20_000).unwrap();
    let walked = sessions.take(&at("bob", "nas-2", 1_699_999_970), now, NOW_MS + 30_000);
    assert_eq!(arrived(walked), Some(("bob".into(), "ap-2".into(), false)));
}

#[test]
fn an_old_word_of_an_access_points_end_ends_nothing_that_began_since() {
    let (mut sessions, now) = (sessions(), Instant::now());
    let off =
        Accounting { event_timestamp: Some(1_699_999_900), ..report(Status::AccountingOff, "", "nas-1") };
    sessions.take(&report(Status::Start, "bob", "nas-1"), now, NOW_MS).unwrap();
    sessions.take(&off, now, NOW_MS + 5_000).unwrap();
    assert_eq!(sessions.next_expiry(), None);
}

#[test]
fn a_hundred_thousand_users_and_one_more() {
    let (mut sessions, now) = (sessions(), Instant::now());
    let user = |number: usize| format!("user{number}");
    for number in 0..MAX_SESSIONS {
        let nas = format!("nas-{}", number % 3 + 1);
        let taken = sessions.take(&report(Status::Start, &user(number), &nas), now, NOW_MS + number as u64);
        assert!(arrived(taken).is_some());
    }
    // Everybody walks; whoever was silent for longest gives way to newcomers.
    let later = NOW_MS + 1_000_000;
    for number in 1..MAX_SESSIONS {
        let report = report(Status::Start, &user(number), &format!("nas-{}", (number + 1) % 3 + 1));
        assert!(arrived(sessions.take(&report, now, later + number as u64)).is_some());
    }
    assert!(arrived(sessions.take(&report(Status::Start, "new", "nas-1"), now, later)).is_some());
    assert_eq!(sessions.len(), MAX_SESSIONS);
    let back = sessions.take(&report(Status::InterimUpdate, &user(0), "nas-1"), now, later + 500_000);
    assert_eq!(arrived(back), Some((user(0), "ap-1".into(), false)), "the oldest was forgotten");
    assert!(sessions.table.is_consistent());
    sessions.take(&report(Status::AccountingOff, "", "nas-1"), now, later + 600_000).unwrap();
    sessions.take(&report(Status::AccountingOff, "", "nas-2"), now, later + 600_000).unwrap();
    let left = sessions.expire(now + GRACE).len();
    assert!(left > MAX_SESSIONS / 2 && sessions.len() == MAX_SESSIONS - left, "{left}");
}

#[test]
fn a_start_in_place_of_a_session_long_silent_is_a_login() {
    let (mut sessions, now) = (sessions(), Instant::now());
    let at = |session: &str, nas| Accounting {
        session_id: Some(session.into()),
        ..report(Status::Start, "bob", nas)
    };
    sessions.take(&at("1", "nas-1"), now, NOW_MS).unwrap();
    // Another host hears of the walk to its access point and of the end; a quick return is a walk still.
    let first = |taken| arrived(taken).map(|(_, _, first)| first);
    assert_eq!(first(sessions.take(&at("2", "nas-1"), now, NOW_MS + 60_000)), Some(false));
    let morning = NOW_MS + 36_000_000;
    assert_eq!(first(sessions.take(&at("3", "nas-1"), now, morning)), Some(true));
    assert_eq!(sessions.take(&at("3", "nas-1"), now, morning + 36_000_000), Err(Ignored::Duplicate));
    // A walk within this host's sight is none, nor is a start beside another device's session.
    assert_eq!(first(sessions.take(&at("4", "nas-2"), now, 2 * morning)), Some(false));
    sessions.take(&second(Status::Start, "nas-3"), now, 2 * morning).unwrap();
    assert_eq!(first(sessions.take(&at("5", "nas-2"), now, 3 * morning)), Some(false));
}

#[test]
fn an_unknown_session_is_placed_when_it_began() {
    let interim =
        |seconds| Accounting { session_seconds: seconds, ..report(Status::InterimUpdate, "bob", "nas-1") };
    for (seconds, began_ms) in [(Some(3_600), NOW_MS - 3_600_000), (Some(0), NOW_MS), (None, 0)] {
        let taken = sessions().take(&interim(seconds), Instant::now(), NOW_MS);
        let Ok(Some(Consequence::Arrived { at_ms, start: false, first: false, .. })) = taken else {
            panic!("{taken:?}");
        };
        assert_eq!(at_ms, began_ms, "{seconds:?}");
    }
}

#[test]
fn after_a_stop_an_update_from_elsewhere_stands_for_a_lost_start() {
    let interim =
        |seconds| Accounting { session_seconds: seconds, ..report(Status::InterimUpdate, "bob", "nas-2") };
    let now = Instant::now();
    let stopped = || {
        let mut sessions = sessions();
        sessions.take(&report(Status::Start, "bob", "nas-1"), now, NOW_MS).unwrap();
        assert_eq!(sessions.take(&interim(None), now, NOW_MS + 5_000), Err(Ignored::NotCurrent));
        sessions.take(&report(Status::Stop, "bob", "nas-1"), now, NOW_MS + 10_000).unwrap();
        sessions
    };
    for (seconds, since_ms) in [(None, NOW_MS + 60_000), (Some(51), NOW_MS + 9_000)] {
        let mut sessions = stopped();
        let taken = sessions.take(&interim(seconds), now, NOW_MS + 60_000);
        let Ok(Some(Consequence::Arrived { ap, at_ms, first: false, .. })) = taken else {
            panic!("{taken:?}");
        };
        assert_eq!((ap.as_str(), at_ms), ("ap-2", since_ms), "{seconds:?}");
        assert!(sessions.expire(now + 2 * GRACE).is_empty(), "its user is not logged out");
    }
    // An access point where the device was before goes on for a while.
    let mut sessions = stopped();
    assert_eq!(sessions.take(&interim(Some(300)), now, NOW_MS + 60_000), Err(Ignored::NotCurrent));
    assert_eq!(sessions.take(&interim(None), now, NOW_MS + 10_000), Err(Ignored::NotCurrent));
    assert_eq!(sessions.expire(now + 2 * GRACE), [left("bob", "ap-1", NOW_MS + 10_000)]);
}

proptest! {
    /// Whatever access points send: a user has left only once, and only after having arrived.
    #[test]
    fn nobody_leaves_who_has_not_arrived(reports in prop::collection::vec((0u8..5, 1u8..4, 0u8..2, any::<bool>()), 0..60)) {
        let (mut sessions, start) = (sessions(), Instant::now());
        let mut here = std::collections::BTreeSet::new();
        for (step, (status, nas, user, wait)) in reports.into_iter().enumerate() {
            let status = [Status::Start, Status::Stop, Status::InterimUpdate, Status::AccountingOff, Status::Start][usize::from(status)];
            let now = start + GRACE * (step as u32) / 2;
            let report = report(status, ["bob", "eve"][usize::from(user)], &format!("nas-{nas}"));
            if let Ok(Some(Consequence::Arrived { user, first, .. })) = sessions.take(&report, now, NOW_MS + step as u64 * 60_000) {
                let new = here.insert(user);
                prop_assert!(new || !first);
            }
            if wait {
                for consequence in sessions.expire(now) {
                    let Consequence::Left { user, .. } = consequence else { panic!("only leaving follows from time") };
                    prop_assert!(here.remove(&user));
                }
            }
            prop_assert!(sessions.table.is_consistent());
        }
    }
}

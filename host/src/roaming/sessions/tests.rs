use proptest::prelude::*;

use super::*;

const NOW_MS: u64 = 1_700_000_000_500;
const GRACE: Duration = Duration::from_secs(120);

fn sessions() -> Sessions {
    let mut names = Names::default();
    for index in 1..=3 {
        names.aps.insert(format!("nas-{index}"), format!("ap-{index}").parse().unwrap());
    }
    names.users.insert("alice@example.org".into(), "alice".parse().unwrap());
    Sessions::new(names, GRACE)
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
fn a_walk_within_one_second_keeps_its_order() {
    let mut report = report(Status::Start, "bob", "nas-1");
    report.event_timestamp = Some(1_700_000_000);
    assert_eq!(event_time(&report, 1_700_000_000_900), 1_700_000_000_900);
    assert_eq!(event_time(&report, 1_700_000_001_010), 1_700_000_001_010);
    assert_eq!(event_time(&report, 1_700_000_009_000), 1_700_000_000_000);
    report.event_timestamp = Some(1_800_000_000);
    report.delay_seconds = Some(2);
    assert_eq!(event_time(&report, 1_700_000_009_000), 1_700_000_007_000);
}

#[test]
fn a_stop_counts_only_from_the_current_access_point_and_after_the_grace_time() {
    let (mut sessions, now) = (sessions(), Instant::now());
    sessions.take(&report(Status::Start, "bob", "nas-1"), now, NOW_MS).unwrap();
    sessions.take(&report(Status::Start, "bob", "nas-2"), now, NOW_MS).unwrap();
    assert_eq!(sessions.take(&report(Status::Stop, "bob", "nas-1"), now, NOW_MS), Err(Ignored::NotCurrent));
    assert_eq!(sessions.take(&report(Status::Stop, "bob", "nas-2"), now, NOW_MS), Ok(None));
    assert_eq!(sessions.next_expiry(), Some(now + GRACE));
    assert!(sessions.expire(now + GRACE - Duration::from_millis(1)).is_empty());
    assert_eq!(sessions.expire(now + GRACE), [Consequence::Left { user: "bob".parse().unwrap() }]);
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
    assert!(sessions.expire(now + GRACE).is_empty());
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
    assert_eq!(sessions.expire(now + GRACE), [Consequence::Left { user: "bob".parse().unwrap() }]);
}

#[test]
fn identities_are_looked_up_in_their_order() {
    let sessions = sessions();
    let mut report = report(Status::Start, "anonymous@example.org", "nas-1");
    assert_eq!(sessions.user(&report).unwrap().as_str(), "anonymous@example.org");
    report.class = Some(b"alice@example.org".to_vec());
    assert_eq!(sessions.user(&report).unwrap().as_str(), "alice");
    report.class = Some(vec![0xff]);
    report.user_name = Some("no name".into());
    assert_eq!(sessions.user(&report), None);
}

#[test]
fn unknown_access_points_and_users_are_told_apart() {
    let (mut sessions, now) = (sessions(), Instant::now());
    assert_eq!(sessions.take(&report(Status::Start, "bob", "nas-9"), now, NOW_MS), Err(Ignored::UnknownAp));
    assert_eq!(
        sessions.take(&report(Status::Start, "b o b", "nas-1"), now, NOW_MS),
        Err(Ignored::UnknownUser)
    );
    assert_eq!(sessions.take(&report(Status::Other(15), "bob", "nas-1"), now, NOW_MS), Err(Ignored::Other));
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
                    let Consequence::Left { user } = consequence else { panic!("only leaving follows from time") };
                    prop_assert!(here.remove(&user));
                }
            }
        }
    }
}

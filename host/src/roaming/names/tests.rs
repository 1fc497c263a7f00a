use proptest::prelude::*;

use super::*;
use crate::roaming::radius::Status;

const ORDER: [IdentityKind; 3] = [IdentityKind::Cui, IdentityKind::Class, IdentityKind::UserName];

fn names(order: &[IdentityKind]) -> Names {
    let aps =
        [("ap.one", "ap-1"), ("02-00-00-00-00-A2", "ap-2"), ("FD00:0::3", "ap-3"), ("10.0.0.4", "ap-4")];
    Names::new(
        aps.map(|(nas, ap)| (nas.to_owned(), ap.parse().unwrap())),
        [("alice@example.org".to_owned(), "alice".parse().unwrap())],
        order,
    )
}

fn report() -> Accounting {
    Accounting::new(Status::Start)
}

fn user(report: &Accounting) -> Option<String> {
    names(&ORDER).user(report).map(|user| user.to_string())
}

#[test]
fn identities_are_looked_up_in_their_order() {
    let mut report = Accounting { user_name: Some("bob@example.org".into()), ..report() };
    assert_eq!(user(&report).unwrap(), "bob@example.org");
    report.class = Some(b"carol".to_vec());
    assert_eq!(user(&report).unwrap(), "carol");
    report.class = Some(b"alice@example.org".to_vec());
    assert_eq!(user(&report).unwrap(), "alice", "configured");
    report.chargeable_user_identity = Some(b"dave".to_vec());
    report.class = Some(b"erin".to_vec());
    assert_eq!(user(&report).unwrap(), "dave");
    let by_name = names(&[IdentityKind::UserName]);
    assert_eq!(by_name.user(&report).unwrap().as_str(), "bob@example.org");
}

#[test]
fn a_configured_identity_counts_before_one_of_first_use_but_not_against_the_servers_word() {
    let mut report = Accounting { user_name: Some("alice@example.org".into()), ..report() };
    report.class = Some(b"staff".to_vec());
    assert_eq!(user(&report).unwrap(), "alice");
    // Outside the tunnel anybody can claim any name; Chargeable-User-Identity is the server's.
    report.chargeable_user_identity = Some(b"mallory".to_vec());
    report.class = None;
    assert_eq!(user(&report).unwrap(), "mallory");
    for request in [vec![], vec![0]] {
        report.chargeable_user_identity = Some(request);
        assert_eq!(user(&report).unwrap(), "alice", "that only asks for an identity");
    }
}

#[test]
fn nobody_is_named_by_an_anonymous_outer_identity_or_a_servers_note() {
    for name in ["anonymous", "Anonymous@example.org", "@example.org", ""] {
        let report = Accounting { user_name: Some(name.into()), class: Some(vec![0xff, 0]), ..report() };
        assert_eq!(user(&report), None, "{name}");
    }
    assert_eq!(user(&report()), None);
}

#[test]
fn every_identity_has_an_image_of_its_own() {
    assert_eq!(image_name(b"bob@example.org").as_str(), "bob@example.org");
    let (odd, other) = (image_name(b"EXAMPLE\\bob"), image_name(b"EXAMPLE/bob"));
    assert!(odd.as_str().starts_with("EXAMPLE-bob."), "{odd}");
    assert_ne!(odd, other);
    // Nobody gets at it by calling himself so.
    assert_ne!(image_name(odd.as_str().as_bytes()), odd);
    assert!(image_name(&[0xff; 253]).as_str().len() <= 63);
    assert!(image_name("-- \u{e9}".as_bytes()).as_str().len() > 32);
}

#[test]
fn nobody_gets_a_configured_users_image_by_its_name() {
    // Alice's image is `alice`, by her identity `alice@example.org` alone.
    let told = |kind: &str| match kind {
        "cui" => Accounting { chargeable_user_identity: Some(b"alice".to_vec()), ..report() },
        "class" => Accounting { class: Some(b"alice".to_vec()), ..report() },
        _ => Accounting { user_name: Some("alice".into()), ..report() },
    };
    for kind in ["cui", "user-name"] {
        let name = user(&told(kind)).unwrap();
        assert!(name.starts_with("alice."), "{kind}: {name}");
    }
    assert_eq!(user(&told("class")), None);
}

#[test]
fn access_points_are_named_by_identifier_address_or_station() {
    let ap = |report: Accounting| names(&ORDER).ap(&report).map(ToString::to_string);
    let nas = |name: &str| Accounting { nas_identifier: Some(name.into()), ..report() };
    let called = |name: &str| Accounting { called_station_id: Some(name.into()), ..report() };
    assert_eq!(ap(nas("ap.one")).unwrap(), "ap-1");
    assert_eq!(ap(nas("ap.two")), None);
    for name in ["02-00-00-00-00-A2:kage", "02:00:00:00:00:a2", "0200.0000.00a2", "0200000000A2"] {
        assert_eq!(ap(called(name)).unwrap(), "ap-2", "{name}");
    }
    assert_eq!(ap(called("02-00-00-00-00-A")), None);
    assert_eq!(ap(called("é2-00-00-00-00-A2:kage")), None);
    let address = Accounting { nas_ipv6_address: Some("fd00::3".parse().unwrap()), ..report() };
    assert_eq!(ap(address.clone()).unwrap(), "ap-3");
    let address4 = Accounting { nas_ip_address: Some("10.0.0.4".parse().unwrap()), ..report() };
    assert_eq!(ap(address4).unwrap(), "ap-4");
    // A controller's name is no access point's, but it says which one it speaks for.
    assert_eq!(ap(Accounting { nas_identifier: Some("controller".into()), ..address }).unwrap(), "ap-3");
}

proptest! {
    #[test]
    fn any_identity_has_a_name(one in prop::collection::vec(any::<u8>(), 0..253), other in prop::collection::vec(any::<u8>(), 0..253)) {
        prop_assert_eq!(image_name(&one) == image_name(&other), one == other);
    }
}

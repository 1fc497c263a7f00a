//! Hostile datagrams: whatever comes, nothing panics, nothing unsigned has a consequence, and what is kept is bounded.

use kage_machine::identity::ApName;

use super::*;
use crate::{
    config::IdentityKind,
    roaming::{names::Names, radius::MAX_PACKET_BYTES},
};

const SECRET: &[u8] = b"shared between access points and hosts";
const NOW_MS: u64 = 1_700_000_000_500;
const GRACE: Duration = Duration::from_secs(120);

fn intake() -> Intake {
    let aps = (1..=3).map(|index| (format!("nas-{index}"), format!("ap-{index}").parse::<ApName>().unwrap()));
    let names = Names::new(aps, [], &[IdentityKind::Cui, IdentityKind::Class, IdentityKind::UserName]);
    let client = |from: &str, secret: &[u8]| Client { from: from.parse().unwrap(), secret: secret.to_vec() };
    let clients = vec![client("10.0.0.0/8", SECRET), client("fd00::/16", SECRET)];
    Intake::new(clients, Sessions::new(names, GRACE))
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

fn from() -> IpAddr {
    "10.1.2.3".parse().unwrap()
}

/// A small generator with a seed, so that a failure can be had again.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit.max(1)
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most + 1)).map(|_| self.below(256) as u8).collect()
    }

    fn report(&mut self) -> Accounting {
        let statuses = [1, 1, 1, 2, 3, 3, 7, 8, 0, 15, u32::MAX];
        let status = Status::from_value(statuses[self.below(statuses.len())]);
        let user = ["alice", "bob", "anonymous", "", "odd name"][self.below(5)].to_owned();
        let nas = format!("nas-{}", self.below(5));
        let number = |random: &mut Self| {
            let near = 1_700_000_000 + random.below(20) as u32 - 10;
            [None, Some(0), Some(near), Some(u32::MAX)][random.below(4)]
        };
        Accounting {
            chargeable_user_identity: (self.below(4) == 0).then(|| self.bytes(253)),
            class: (self.below(4) == 0).then(|| self.bytes(40)),
            event_timestamp: number(self),
            delay_seconds: number(self).filter(|_| self.below(4) == 0),
            input_octets: number(self).map(|octets| u64::from(octets) << self.below(40)),
            framed_ipv6_address: (self.below(3) == 0)
                .then(|| std::net::Ipv6Addr::from(self.below(9) as u128)),
            ..report(status, &user, &nas)
        }
    }

    /// Changes a datagram the way networks and attackers do.
    fn damage(&mut self, bytes: &mut Vec<u8>) {
        match self.below(5) {
            0 => bytes.truncate(self.below(bytes.len())),
            1 => bytes.extend(self.bytes(64)),
            2 => *bytes = self.bytes(MAX_PACKET_BYTES + 10),
            _ => {
                for _ in 0..=self.below(4) {
                    let at = self.below(bytes.len());
                    bytes[at] ^= 1 << self.below(8);
                }
            }
        }
    }
}

#[test]
fn nothing_unsigned_has_a_consequence_and_nothing_panics() {
    for seed in 0..20 {
        let (mut random, mut intake, start) = (Random(seed), intake(), Instant::now());
        let mut signed = 0;
        for step in 0..2_000_u64 {
            let (now, now_ms) = (start + Duration::from_millis(step * 50), NOW_MS + step * 50);
            let mut bytes = random.report().encode(random.below(256) as u8, SECRET).unwrap();
            if random.below(3) > 0 {
                random.damage(&mut bytes);
            }
            let is_signed = Packet::parse(&bytes)
                .is_ok_and(|packet| packet.code() == ACCOUNTING_REQUEST && packet.is_request_of(SECRET));
            let before = intake.kept();
            let outcome = intake.take(&bytes, from(), now, now_ms);
            assert_eq!(outcome.answer.is_some(), is_signed, "seed {seed}, step {step}");
            if !is_signed {
                assert_eq!((outcome.consequence, intake.kept()), (None, before), "seed {seed}, step {step}");
            }
            signed += u64::from(is_signed);
            let _ = intake.expire(now);
            let (sessions, requests) = intake.kept();
            assert!(sessions <= 500 && requests <= MOST_REMEMBERED, "seed {seed}, step {step}");
        }
        assert!((300..1_500).contains(&signed), "seed {seed}: {signed} of 2000");
    }
}

#[test]
fn attributes_that_lie_are_answered_if_they_are_signed_and_mean_nothing() {
    // Signed by somebody who knows the secret, with attributes of any form.
    let (mut random, mut intake) = (Random(7), intake());
    let mut understood = 0;
    for step in 0..5_000_u64 {
        let mut bytes = report(Status::Start, "alice", "nas-1").encode(1, SECRET).unwrap();
        for _ in 0..random.below(4) {
            let value = random.bytes(20);
            bytes.extend([random.below(256) as u8, value.len() as u8 + 2]);
            bytes.extend(value);
        }
        let at = 20 + random.below(bytes.len() - 20);
        bytes[at] = random.below(256) as u8;
        let bytes = crate::roaming::radius::signed(bytes, SECRET);
        let outcome = intake.take(&bytes, from(), Instant::now(), NOW_MS + step);
        assert_eq!(outcome.answer.is_some(), Packet::parse(&bytes).is_ok(), "step {step}");
        understood += u32::from(outcome.answer.is_some() && outcome.kind != "unknown");
    }
    assert!(understood > 500, "{understood}");
}

#[test]
fn the_same_bytes_count_once_from_wherever_they_come() {
    let (mut intake, now) = (intake(), Instant::now());
    let start = report(Status::Start, "bob", "nas-1").encode(1, SECRET).unwrap();
    let moved = report(Status::Start, "bob", "nas-2").encode(2, SECRET).unwrap();
    let first = intake.take(&start, from(), now, NOW_MS);
    assert_eq!((first.kind, first.result), ("start", "taken"));
    assert!(intake.take(&moved, from(), now, NOW_MS + 1).consequence.is_some());
    for minutes in [0, 1, 30, 59] {
        let later = now + Duration::from_secs(minutes * 60);
        let again = intake.take(&start, "fd00::9".parse().unwrap(), later, NOW_MS + minutes * 60_000 + 5_000);
        assert_eq!((again.result, &again.answer), ("retransmission", &first.answer), "after {minutes} min");
        assert_eq!(again.consequence, None);
    }
}

#[test]
fn clients_are_told_apart_by_address_and_strangers_get_no_answer() {
    let (mut intake, now) = (intake(), Instant::now());
    let bytes = report(Status::Start, "bob", "nas-1").encode(1, SECRET).unwrap();
    for stranger in ["192.168.0.1", "fe80::1", "::ffff:192.168.0.1"] {
        let outcome = intake.take(&bytes, stranger.parse().unwrap(), now, NOW_MS);
        assert_eq!((outcome.result, outcome.answer), ("unknown_client", None), "{stranger}");
    }
    let outcome = intake.take(&bytes, "::ffff:10.0.0.1".parse().unwrap(), now, NOW_MS);
    assert!(outcome.consequence.is_some(), "IPv4 by a socket of IPv6");
}

#[test]
fn a_flood_of_refusals_is_a_line_in_ten_seconds() {
    let (mut intake, start) = (intake(), Instant::now());
    let (mut lines, mut withheld) = (0, 0);
    let wrong = report(Status::Start, "bob", "nas-1").encode(1, b"other").unwrap();
    for step in 0..3_000_u64 {
        let nowhere = report(Status::Start, "bob", &format!("nowhere-{step}")).encode(1, SECRET).unwrap();
        let now = start + Duration::from_millis(step * 10);
        for bytes in [&wrong, &nowhere] {
            if let Some(notice) = intake.take(bytes, from(), now, NOW_MS + step * 10).notice {
                lines += 1;
                withheld += notice.withheld;
                assert!(notice.nas.len() <= LOGGED);
            }
        }
    }
    assert_eq!((lines, withheld), (6, 2 * 2 * 999));
    assert_eq!(intake.kept(), (0, 3_000));
}

#[test]
fn a_hundred_thousand_users_are_taken_in_bounded_memory() {
    let (mut intake, now) = (intake(), Instant::now());
    for number in 0..110_000_u64 {
        let bytes = report(Status::Start, &format!("user{number}"), &format!("nas-{}", number % 3 + 1))
            .encode(number as u8, SECRET)
            .unwrap();
        let outcome = intake.take(&bytes, from(), now, NOW_MS + number);
        assert!(outcome.consequence.is_some() && outcome.answer.is_some(), "{number}");
    }
    assert_eq!(intake.kept(), (100_000, MOST_REMEMBERED));
}

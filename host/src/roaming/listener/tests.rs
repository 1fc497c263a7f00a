use std::path::PathBuf;

use std::net::SocketAddr;

use super::*;
use crate::{
    config::Config,
    lifecycle::tests::{TestHost, TestSite},
    roaming::radius::{Accounting, Packet, Status},
    units::Span,
};

const SECRET: &str = "shared between access points and hosts";

/// A listener of `host`'s, and where it listens.
async fn listening(host: &TestHost, name: &str) -> (SocketAddr, PathBuf) {
    let path = std::env::temp_dir().join(format!("kage-secret-{name}-{}", std::process::id()));
    std::fs::write(&path, format!("{SECRET}\n")).unwrap();
    let free = std::net::UdpSocket::bind("[::1]:0").unwrap().local_addr().unwrap();
    let text = format!(
        "[host]\nname = \"x\"\n[peer]\nadvertise = \"[::1]:1\"\n[network]\nprefix = \"fd00::/48\"\nunderlay = \"lo\"\n\
         [roam.radius]\nlisten = \"{free}\"\n[[roam.radius.client]]\nfrom = \"::1/128\"\nsecret_file = {path:?}\n"
    );
    let mut radius = Config::parse(std::path::Path::new("x"), &text).unwrap().radius.unwrap();
    radius.logout_grace = Span::from_millis(100);
    spawn(host.daemon.clone(), &radius).await.unwrap();
    (free, path)
}

async fn ask(to: SocketAddr, bytes: &[u8]) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind("[::1]:0").await.unwrap();
    socket.send_to(bytes, to).await.unwrap();
    let mut buffer = vec![0; 4096];
    let (length, _) =
        tokio::time::timeout(Duration::from_millis(500), socket.recv_from(&mut buffer)).await.ok()?.unwrap();
    buffer.truncate(length);
    Some(buffer)
}

fn report(status: Status, user: &str, nas: &str) -> Accounting {
    Accounting {
        user_name: Some(user.into()),
        nas_identifier: Some(nas.into()),
        calling_station_id: Some("02-00-00-00-00-01".into()),
        framed_ipv6_address: Some("fd0d::1".parse().unwrap()),
        ..Accounting::new(status)
    }
}

async fn state(host: &TestHost, query: &str) -> String {
    host.show(query).await.state.name().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn start_and_stop_log_in_and_out_a_user_who_was_here_before() {
    let (_site, hosts) = TestSite::new("radius-life", 1).await;
    let host = &hosts[0];
    let (to, path) = listening(host, "life").await;
    host.login("alice", serde_json::json!({})).await;
    host.daemon.stop(&"alice".parse().unwrap()).await.unwrap();
    let start = report(Status::Start, "alice", "ap-1").encode(1, SECRET.as_bytes()).unwrap();
    let answer = ask(to, &start).await.unwrap();
    let request = Packet::parse(&start).unwrap();
    assert!(Packet::parse(&answer).unwrap().answers(&request, SECRET.as_bytes()));
    assert_eq!(state(host, "alice?state=running&timeout=5s").await, "running");
    assert!(
        host.net.calls().iter().any(|call| call.starts_with("device fd0d::1 Ap")),
        "{:?}",
        host.net.calls()
    );
    let stop = report(Status::Stop, "alice", "ap-1").encode(2, SECRET.as_bytes()).unwrap();
    assert!(ask(to, &stop).await.is_some());
    assert_eq!(state(host, "alice?state=stopped&timeout=5s").await, "stopped");
    // Coming back is logging in.
    assert!(
        ask(to, &report(Status::Start, "alice", "ap-1").encode(3, SECRET.as_bytes()).unwrap())
            .await
            .is_some()
    );
    assert_eq!(state(host, "alice?state=running&timeout=5s").await, "running");
    let _ = std::fs::remove_file(path);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_garbage_and_wrong_secrets_are_dropped_and_counted() {
    let (_site, hosts) = TestSite::new("radius-bad", 1).await;
    let host = &hosts[0];
    let (to, path) = listening(host, "bad").await;
    let good = report(Status::Start, "nobody", "ap-1").encode(1, SECRET.as_bytes()).unwrap();
    assert!(ask(to, &report(Status::Start, "nobody", "ap-1").encode(1, b"other").unwrap()).await.is_none());
    assert!(ask(to, &good[..good.len() - 1]).await.is_none());
    assert!(ask(to, b"hello").await.is_none());
    assert!(ask(to, &good).await.is_some(), "an unknown user is answered all the same");
    let text = host.daemon.metrics.text();
    for (labels, count) in [
        ("type=\"unknown\",result=\"bad_authenticator\"", 1),
        ("type=\"unknown\",result=\"malformed\"", 2),
        ("type=\"start\",result=\"taken\"", 1),
    ] {
        let line = format!("kage_radius_packets_total{{{labels}}} {count}");
        assert!(text.contains(&line), "{line} is not in\n{text}");
    }
    let _ = std::fs::remove_file(path);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retransmission_is_answered_with_the_same_bytes_and_counts_once() {
    let (_site, hosts) = TestSite::new("radius-again", 1).await;
    let (to, path) = listening(&hosts[0], "again").await;
    let bytes = report(Status::Start, "nobody", "ap-1").encode(1, SECRET.as_bytes()).unwrap();
    let socket = UdpSocket::bind("[::1]:0").await.unwrap();
    let mut answers = Vec::new();
    for _ in 0..2 {
        socket.send_to(&bytes, to).await.unwrap();
        let mut buffer = [0; 4096];
        let (length, _) = socket.recv_from(&mut buffer).await.unwrap();
        answers.push(buffer[..length].to_vec());
    }
    assert_eq!(answers[0], answers[1]);
    let text = hosts[0].daemon.metrics.text();
    assert!(text.contains("{type=\"start\",result=\"retransmission\"} 1"), "{text}");
    let _ = std::fs::remove_file(path);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_makes_a_machine_and_an_interim_report_makes_none() {
    let (_site, hosts) = TestSite::new("radius-first", 1).await;
    let host = &hosts[0];
    let (to, path) = listening(host, "first").await;
    let interim = report(Status::InterimUpdate, "carol", "ap-1").encode(1, SECRET.as_bytes()).unwrap();
    assert!(ask(to, &interim).await.is_some());
    let start = report(Status::Start, "bob@example.org", "ap-1");
    let start = Accounting { framed_ipv6_address: Some("fd0d::2".parse().unwrap()), ..start };
    assert!(ask(to, &start.encode(2, SECRET.as_bytes()).unwrap()).await.is_some());
    assert_eq!(state(host, "bob@example.org?state=running&timeout=5s").await, "running");
    let users: Vec<_> = host.daemon.local().iter().map(|image| image.user.to_string()).collect();
    assert_eq!(users, ["bob@example.org"]);
    let _ = std::fs::remove_file(path);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_device_that_stays_keeps_the_machine_and_the_other_ones_route_goes() {
    let (_site, hosts) = TestSite::new("radius-two", 1).await;
    let host = &hosts[0];
    let (to, path) = listening(host, "two").await;
    let device = |number: u8, status| Accounting {
        calling_station_id: Some(format!("02-00-00-00-00-0{number}")),
        framed_ipv6_address: Some(format!("fd0d::{number}").parse().unwrap()),
        ..report(status, "bob", "ap-1")
    };
    for (id, number, status) in [(1, 1, Status::Start), (2, 2, Status::Start), (3, 1, Status::Stop)] {
        assert!(ask(to, &device(number, status).encode(id, SECRET.as_bytes()).unwrap()).await.is_some());
    }
    assert_eq!(state(host, "bob?state=running&timeout=5s").await, "running");
    let address = |number: u8| -> IpAddr { format!("fd0d::{number}").parse().unwrap() };
    let mut seen = host.daemon.seen.subscribe();
    let gone = seen
        .wait_for(|seen| seen.devices.contains_key(&address(2)) && !seen.devices.contains_key(&address(1)));
    tokio::time::timeout(Duration::from_secs(5), gone).await.unwrap().unwrap();
    assert_eq!(state(host, "bob").await, "running");
    assert!(ask(to, &device(2, Status::Stop).encode(4, SECRET.as_bytes()).unwrap()).await.is_some());
    assert_eq!(state(host, "bob?state=stopped&timeout=5s").await, "stopped");
    let _ = std::fs::remove_file(path);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_machine_goes_to_the_host_of_the_device_with_the_latest_traffic() {
    let (_site, hosts) = TestSite::new("radius-traffic", 2).await;
    let (first, path) = listening(&hosts[0], "traffic-1").await;
    let (second, other) = listening(&hosts[1], "traffic-2").await;
    let device = |number: u8, status| Accounting {
        calling_station_id: Some(format!("02-00-00-00-00-0{number}")),
        framed_ipv6_address: Some(format!("fd0d::{number}").parse().unwrap()),
        ..report(status, "bob", &format!("ap-{number}"))
    };
    let send = |to, id, report: Accounting| async move {
        assert!(ask(to, &report.encode(id, SECRET.as_bytes()).unwrap()).await.is_some());
    };
    let is_at = |host: &'static str| {
        let mut seen = hosts[0].daemon.seen.subscribe();
        async move {
            let there = seen.wait_for(|seen| {
                seen.images.get(&"bob".parse().unwrap()).is_some_and(|image| image.owner.as_str() == host)
                    && seen.devices.len() == 2
            });
            tokio::time::timeout(Duration::from_secs(10), there).await.expect(host).unwrap();
        }
    };
    send(first, 1, device(1, Status::Start)).await;
    assert_eq!(state(&hosts[0], "bob?state=running&timeout=5s").await, "running");
    send(second, 2, device(2, Status::Start)).await;
    is_at("h2").await;
    // Used, the first one has it back, although the other came later.
    let used = Accounting { output_octets: Some(1 << 20), ..device(1, Status::InterimUpdate) };
    send(first, 3, used).await;
    is_at("h1").await;
    // The Stop of where the user was seen last but one ends nothing here.
    send(second, 4, device(2, Status::Stop)).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(state(&hosts[0], "bob?state=running&timeout=5s").await, "running");
    for path in [path, other] {
        let _ = std::fs::remove_file(path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_stop_ends_nothing_while_the_machine_has_not_followed_its_user_yet() {
    let (_site, hosts) = TestSite::new("radius-late", 2).await;
    let host = &hosts[0];
    let (to, path) = listening(host, "late").await;
    let silent = |status| Accounting { framed_ipv6_address: None, ..report(status, "alice", "ap-1") };
    assert!(ask(to, &silent(Status::Start).encode(1, SECRET.as_bytes()).unwrap()).await.is_some());
    assert_eq!(state(host, "alice?state=running&timeout=5s").await, "running");
    // Seen at the other host's access point; no move has come of it.
    let (daemon, alice) = (host.daemon.clone(), "alice".parse::<UserName>().unwrap());
    for _ in 0..100 {
        if daemon.last_seen(&alice, &daemon.me).await == Some("ap-1".parse().unwrap()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (user, ap) = (alice.clone(), "ap-2".parse().unwrap());
    blocking(move || Ok(daemon.learn(&user, &ap, now_ms() + 1))).await.unwrap();
    assert_eq!(host.daemon.last_seen(&alice, &host.daemon.me).await, Some("ap-2".parse().unwrap()));
    assert!(ask(to, &silent(Status::Stop).encode(2, SECRET.as_bytes()).unwrap()).await.is_some());
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(state(host, "alice").await, "running");
    // Word of no known time does not bring the user back here.
    let unknown = RoamRequest {
        user: alice.clone(),
        ap: "ap-1".parse().unwrap(),
        device: None,
        wait: true,
        age_ms: 0,
        at_ms: Some(0),
    };
    host.daemon.roam(&unknown, 0).await.unwrap();
    assert_eq!(host.daemon.last_seen(&alice, &host.daemon.me).await, Some("ap-2".parse().unwrap()));
    // Who leaves where the user was seen last is logged out, wherever the machine is.
    hosts[1].daemon.left(alice, "ap-2".parse().unwrap(), now_ms()).await;
    assert_eq!(state(host, "alice?state=stopped&timeout=5s").await, "stopped");
    let _ = std::fs::remove_file(path);
}

#[test]
fn only_who_leaves_where_the_user_was_last_is_logged_out() {
    let ap = |number: u8| -> ApName { format!("ap-{number}").parse().unwrap() };
    let host = |number: u8| -> HostName { format!("h{number}").parse().unwrap() };
    // Access point 1 of host 1 is left, and 2 is of host 2; 3 is of host 1, too.
    let is_logout = |owner: u8, seen: Option<(u8, u8)>, is_busy| {
        let seen = seen.map(|(at, of)| (ap(at), host(of)));
        let seen = seen.as_ref().map(|(ap, host)| (ap, Some(host)));
        super::is_logout((&ap(1), &host(1)), &host(owner), seen, is_busy)
    };
    assert!(is_logout(1, Some((1, 1)), false) && is_logout(1, Some((3, 1)), false));
    assert!(!is_logout(1, Some((2, 2)), false), "the machine has not followed");
    assert!(is_logout(2, Some((1, 1)), true), "the machine is elsewhere");
    assert!(!is_logout(2, Some((2, 2)), false) && !is_logout(2, Some((3, 1)), false));
    assert!(is_logout(1, None, false) && !is_logout(1, None, true) && !is_logout(2, None, false));
}

//! Moves between daemons on loopback: real links, real directory, simulated machines.

use std::time::Duration;

use http::Method;
use kage_machine::{BaseHash, PAGE_SIZE, PageIndex};
use serde_json::{Value, json};

use crate::{
    api::types::{MoveOutcome, MoveReport, Operation, OperationState, State},
    http::Call,
    lifecycle::tests::{TestHost, TestSite, until},
};

async fn migrate(host: &TestHost, user: &str, body: Value) -> Operation {
    let (status, reply) =
        host.call(&Call::new(Method::POST, format!("/v1/images/{user}/migrate")).json(&body)).await;
    assert_eq!(status, 202, "{reply}");
    let mut operation: Operation = serde_json::from_value(reply).unwrap();
    while operation.state == OperationState::Running {
        let path = format!("/v1/operations/{}?wait=5s", operation.id);
        let (status, reply) = host.call(&Call::new(Method::GET, path)).await;
        assert_eq!(status, 200, "{reply}");
        operation = serde_json::from_value(reply).unwrap();
    }
    operation
}

fn report(operation: Operation) -> MoveReport {
    let result = operation.result.unwrap_or_else(|| panic!("{:?}", operation.error));
    serde_json::from_value(result).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_moves_with_its_memory_and_its_route() {
    let (_site, hosts) = TestSite::new("move", 3).await;
    let login = hosts[0].login("alice", json!({})).await;
    let memory = hosts[0].machines.process("alice").unwrap().memory();
    for page in 0..200 {
        memory.write(PageIndex(page * 7), &[page as u8 + 1; PAGE_SIZE]);
    }
    // Asked of a host that has nothing to do with it.
    let report = report(migrate(&hosts[2], "alice", json!({ "to": "h2" })).await);
    assert_eq!(
        (report.outcome, report.term.0, report.to.as_str()),
        (MoveOutcome::HandedOver, 2, "h2"),
        "{report:?}"
    );
    assert!(report.pages_sent >= 200 && report.forwarded_frames >= 2, "{report:?}");
    let arrived = hosts[1].machines.process("alice").unwrap().memory();
    for page in 0..1400 {
        let (mut before, mut after) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        memory.read(PageIndex(page), &mut before);
        arrived.read(PageIndex(page), &mut after);
        assert!(before == after, "page {page}");
    }
    assert!(!hosts[0].machines.runs("alice"));
    let view = hosts[0].show("alice?state=running&at=h2&timeout=5s").await;
    assert_eq!(view.address, login.address);
    let vid = login.vid.to_string();
    until("routes", async || {
        let last = |host: &TestHost| {
            host.net.calls().into_iter().rfind(|call| call.starts_with("image") && call.contains(&vid))
        };
        let (a, b, c) = (last(&hosts[0]), last(&hosts[1]), last(&hosts[2]));
        [(a, "h2"), (b, "Tap"), (c, "h2")]
            .into_iter()
            .all(|(call, to)| call.is_some_and(|call| call.contains(to)))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_follows_its_user_back_and_forth() {
    let (_site, hosts) = TestSite::with("walk", 2, "[roam]\ndwell = \"0\"").await;
    hosts[0].login("alice", json!({})).await;
    for step in 0..4 {
        let (ap, to) = [("ap-2", "h2"), ("ap-1", "h1")][step % 2];
        let body = json!({ "user": "alice", "ap": ap, "wait": true });
        let (status, reply) = hosts[step % 2].call(&Call::new(Method::POST, "/v1/roam").json(&body)).await;
        assert_eq!(
            (status, &reply["action"], &reply["report"]["outcome"]),
            (200, &json!("moves"), &json!("handed_over")),
            "{reply}"
        );
        let view = hosts[0].show(&format!("alice?state=running&at={to}&timeout=5s")).await;
        assert_eq!(view.term.0, step as u64 + 2);
    }
    let body = json!({ "user": "alice", "ap": "ap-1" });
    let (_, reply) = hosts[1].call(&Call::new(Method::POST, "/v1/roam").json(&body)).await;
    assert_eq!(reply["action"], "stays");
    assert!(hosts[0].machines.runs("alice") && !hosts[1].machines.runs("alice"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_to_a_host_that_is_down_keeps_the_machine() {
    let (_site, mut hosts) = TestSite::new("move-down", 3).await;
    hosts[0].login("alice", json!({})).await;
    hosts.remove(1).kill();
    let report = report(migrate(&hosts[0], "alice", json!({ "to": "h2" })).await);
    assert_eq!(report.outcome, MoveOutcome::KeptHere);
    assert!(report.reason.unwrap().contains("h2"));
    let view = hosts[0].show("alice").await;
    assert_eq!((view.state, view.host.as_str(), view.operation), (State::Running, "h1", None));
    // And it can go elsewhere at once.
    let again = migrate(&hosts[0], "alice", json!({ "to": "h3" })).await;
    assert_eq!(self::report(again).outcome, MoveOutcome::HandedOver);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_with_another_build_of_the_image_refuses_a_machine() {
    let (_site, hosts) = TestSite::new("move-build", 2).await;
    hosts[0].login("alice", json!({})).await;
    *hosts[1].machines.base.lock().unwrap() = BaseHash([1; 32]);
    let report = report(migrate(&hosts[0], "alice", json!({ "to": "h2" })).await);
    assert_eq!(report.outcome, MoveOutcome::KeptHere);
    let reason = report.reason.unwrap();
    assert!(reason.contains("another build at host h2"), "{reason}");
    assert!(!hosts[1].machines.runs("alice"));
    assert_eq!(hosts[0].show("alice").await.state, State::Running);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_tap_of_an_adopted_machine_holds_is_sent_on() {
    let (site, mut hosts) = TestSite::new("move-adopted", 2).await;
    hosts[1].login("alice", json!({})).await;
    let host = site.restart(1, hosts.remove(1).kill()).await;
    host.show("alice?state=running&timeout=5s").await;
    let report = report(migrate(&host, "alice", json!({ "to": "h1" })).await);
    assert_eq!(report.outcome, MoveOutcome::HandedOver, "{report:?}");
    assert!(report.forwarded_frames >= 2, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_machine_is_not_moved_and_a_login_elsewhere_brings_it_near() {
    let (_site, hosts) = TestSite::new("move-stopped", 2).await;
    hosts[0].login("alice", json!({})).await;
    hosts[0].call(&Call::new(Method::POST, "/v1/images/alice/stop")).await;
    let (status, body) = hosts[0]
        .call(&Call::new(Method::POST, "/v1/images/alice/migrate").json(&json!({ "to": "h2" })))
        .await;
    assert_eq!(status, 409, "{body}");
    assert!(body["message"].as_str().unwrap().contains("kage start alice"));
    let reply = hosts[1].login("alice", json!({ "at": "ap-2" })).await;
    assert_eq!((reply.host.as_str(), reply.found), ("h2", false), "{reply:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_changes_nothing() {
    let (_site, hosts) = TestSite::new("move-plan", 2).await;
    hosts[0].login("alice", json!({})).await;
    let memory = hosts[0].machines.process("alice").unwrap().memory();
    memory.write(PageIndex(3), &[1; PAGE_SIZE]);
    let call = Call::new(Method::POST, "/v1/images/alice/migrate").json(&json!({ "dry_run": true }));
    let (status, plan) = hosts[1].call(&call).await;
    assert_eq!(
        (status, &plan["to"], &plan["pages"], &plan["dry_run"]),
        (200, &json!("h2"), &json!(1), &json!(true)),
        "{plan}"
    );
    assert_eq!(hosts[0].show("alice").await.host.as_str(), "h1");
}

#[tokio::test(flavor = "multi_thread")]
async fn moves_asked_for_at_the_same_time_come_one_after_the_other() {
    let (_site, hosts) = TestSite::new("move-queue", 3).await;
    hosts[0].login("alice", json!({})).await;
    let (a, b) = tokio::join!(
        migrate(&hosts[0], "alice", json!({ "to": "h2" })),
        migrate(&hosts[0], "alice", json!({ "to": "h3" }))
    );
    // The one that came second found the machine at its new owner, which went on with it.
    let mut reports = [report(a), report(b)];
    reports.sort_by_key(|report| report.term);
    let [first, second] = reports;
    assert_eq!((first.from.as_str(), first.outcome), ("h1", MoveOutcome::HandedOver), "{first:?}");
    assert_eq!((&second.from, second.outcome), (&first.to, MoveOutcome::HandedOver), "{second:?}");
    let holders = hosts.iter().filter(|host| host.machines.runs("alice")).count();
    assert_eq!(holders, 1);
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(hosts[0].show("alice?state=running&timeout=5s").await.host, second.to);
}

/// Writes over a megabyte of a machine's memory that no encoding makes smaller.
pub fn fill_with_noise(host: &TestHost, user: &str) {
    let memory = host.machines.process(user).unwrap().memory();
    for page in 0..300_u32 {
        let mut bytes = [0; PAGE_SIZE];
        let mut noise = page.wrapping_mul(2_654_435_761) | 1;
        bytes.fill_with(|| {
            noise ^= noise << 13;
            noise ^= noise >> 17;
            noise ^= noise << 5;
            noise as u8
        });
        memory.write(PageIndex(page), &bytes);
    }
}

/// Begins a move that lasts for seconds, and waits until it copies.
async fn slow_move(host: &TestHost, user: &str, to: &str) -> String {
    fill_with_noise(host, user);
    let body = json!({ "to": to, "bandwidth": "2mbit" });
    let (status, reply) =
        host.call(&Call::new(Method::POST, format!("/v1/images/{user}/migrate")).json(&body)).await;
    assert_eq!(status, 202, "{reply}");
    let id = reply["id"].as_str().unwrap().to_owned();
    until("copying", async || {
        let (_, operation) = host.call(&Call::new(Method::GET, format!("/v1/operations/{id}"))).await;
        operation["progress"]["phase"] == "copy"
    })
    .await;
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_walks_back_during_a_move_keeps_the_machine() {
    let (_site, hosts) = TestSite::new("walk-back", 2).await;
    hosts[0].login("alice", json!({})).await;
    for asked in &hosts {
        let id = slow_move(&hosts[0], "alice", "h2").await;
        let body = json!({ "user": "alice", "ap": "ap-1", "wait": true });
        let (status, reply) = asked.call(&Call::new(Method::POST, "/v1/roam").json(&body)).await;
        assert_eq!((status, &reply["action"]), (200, &json!("stays")), "{reply}");
        let (_, operation) = hosts[0].call(&Call::new(Method::GET, format!("/v1/operations/{id}"))).await;
        assert_eq!(operation["result"]["outcome"], "kept", "{operation}");
        let view = hosts[1].show("alice").await;
        assert_eq!((view.host.as_str(), view.state, view.operation), ("h1", State::Running, None));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_walks_on_during_a_move_is_followed() {
    let (_site, hosts) = TestSite::new("walk-on", 3).await;
    hosts[0].login("alice", json!({})).await;
    slow_move(&hosts[0], "alice", "h2").await;
    let roam = |ap: &str, wait: bool| {
        Call::new(Method::POST, "/v1/roam").json(&json!({ "user": "alice", "ap": ap, "wait": wait }))
    };
    let (_, comes) = hosts[1].call(&roam("ap-2", false)).await;
    assert_eq!((&comes["action"], comes["operation"].is_string()), (&json!("stays"), true), "{comes}");
    let (status, reply) = hosts[2].call(&roam("ap-3", true)).await;
    assert_eq!((status, &reply["report"]["outcome"]), (200, &json!("handed_over")), "{reply}");
    assert_eq!(hosts[0].show("alice?state=running&timeout=5s").await.host.as_str(), "h3");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_move_says_so_and_so_does_one_that_waits_behind_it() {
    let (_site, hosts) = TestSite::new("move-cancel", 3).await;
    hosts[0].login("alice", json!({})).await;
    let cancel = Call::new(Method::DELETE, "/v1/images/alice/migrate");
    let (status, reply) = hosts[1].call(&cancel).await;
    assert_eq!(status, 404, "{reply}");
    let first = slow_move(&hosts[0], "alice", "h2").await;
    let body = json!({ "to": "h3" });
    let (_, second) = hosts[0].call(&Call::new(Method::POST, "/v1/images/alice/migrate").json(&body)).await;
    let second = second["id"].as_str().unwrap().to_owned();
    let operation = async |id: &str| {
        let path = format!("/v1/operations/{id}?wait=10s");
        let mut operation = Value::Null;
        while operation.is_null() || operation["state"] == "running" {
            operation = hosts[1].call(&Call::new(Method::GET, path.clone())).await.1;
        }
        operation
    };
    // The one that waits for its turn ends at once, the other goes on.
    hosts[1].call(&Call::new(Method::DELETE, format!("/v1/operations/{second}"))).await;
    assert_eq!(operation(&second).await["state"], "cancelled");
    let (_, copying) = hosts[0].call(&Call::new(Method::GET, format!("/v1/operations/{first}"))).await;
    assert_eq!(copying["state"], "running", "{copying}");
    until("progress", async || {
        let (_, told) = hosts[0].call(&Call::new(Method::GET, format!("/v1/operations/{first}"))).await;
        told["progress"]["pages_done"].as_u64().is_some_and(|done| done > 0)
            && told["progress"]["eta_ms"].is_u64()
            && told["progress"]["round"] == 1
    })
    .await;
    let (status, reply) = hosts[1].call(&cancel).await;
    assert_eq!((status, reply.as_array().map(Vec::len)), (200, Some(1)), "{reply}");
    let ended = operation(&first).await;
    assert_eq!(
        (&ended["state"], &ended["result"]["outcome"], &ended["result"]["reason"]),
        (&json!("cancelled"), &json!("kept"), &json!("cancelled")),
        "{ended}"
    );
    // Twice is once.
    let (status, reply) = hosts[1].call(&cancel).await;
    assert_eq!((status, &reply[0]["state"]), (200, &json!("cancelled")), "{reply}");
    let view = hosts[1].show("alice").await;
    assert_eq!((view.host.as_str(), view.state, view.operation), ("h1", State::Running, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_takes_no_more_of_the_link_than_it_may() {
    let (_site, hosts) = TestSite::new("move-cap", 2).await;
    hosts[0].login("alice", json!({})).await;
    fill_with_noise(&hosts[0], "alice");
    let begun = std::time::Instant::now();
    let report = report(migrate(&hosts[0], "alice", json!({ "to": "h2", "bandwidth": "8mbit" })).await);
    assert_eq!(report.outcome, MoveOutcome::HandedOver, "{report:?}");
    let copied = report.phases.iter().find(|phase| phase.name == "copy").unwrap();
    // A megabyte per second; but for what may go at once in front, and the last batch, which nothing waits behind.
    let least = (copied.bytes as f64 - 330e3) / 1e6;
    assert!(
        copied.bytes > 1_000_000 && copied.ms / 1e3 >= least,
        "{} bytes in {} ms",
        copied.bytes,
        copied.ms
    );
    assert!(begun.elapsed().as_secs_f64() >= least);
}

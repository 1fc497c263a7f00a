//! Drains between daemons on loopback: real links, real directory, simulated machines.

use std::time::Duration;

use http::Method;
use kage_machine::BaseHash;
use serde_json::{Value, json};

use crate::{
    api::types::{DrainReport, Operation, OperationState, State},
    http::Call,
    lifecycle::tests::{TestHost, TestSite, until},
};

async fn post(host: &TestHost, path: &str, body: Value) -> (u16, Value) {
    host.call(&Call::new(Method::POST, path).json(&body)).await
}

async fn begin(host: &TestHost, which: &str, body: Value) -> Operation {
    let (status, reply) = post(host, &format!("/v1/hosts/{which}/drain"), body).await;
    assert_eq!(status, 202, "{reply}");
    serde_json::from_value(reply).unwrap()
}

async fn end(host: &TestHost, mut operation: Operation) -> DrainReport {
    while operation.state == OperationState::Running {
        let path = format!("/v1/operations/{}?wait=5s", operation.id);
        let (_, reply) = host.call(&Call::new(Method::GET, path)).await;
        operation = serde_json::from_value(reply).unwrap();
    }
    let result = operation.result.unwrap_or_else(|| panic!("{:?}", operation.error));
    serde_json::from_value(result).unwrap()
}

async fn log_in(host: &TestHost, users: usize) {
    for number in 0..users {
        host.login(&format!("u{number}"), json!({})).await;
    }
}

/// Waits until a host knows whether another is cordoned.
async fn knows(host: &TestHost, which: &str, cordoned: bool) {
    until("word of a cordon", async || host.daemon.is_cordoned(&which.parse().unwrap()) == cordoned).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_host_is_empty_cordoned_and_its_machines_are_spread() {
    let (_site, hosts) = TestSite::new("drain", 3).await;
    log_in(&hosts[0], 6).await;
    hosts[0].login("gone", json!({})).await;
    post(&hosts[0], "/v1/images/gone/stop", json!({})).await;
    // Asked of another host; and once more, which is the same.
    let first = begin(&hosts[1], "h1", json!({})).await;
    assert_eq!((first.id.as_str(), first.user.is_none()), ("h1:1", true));
    assert_eq!(begin(&hosts[2], "h1", json!({})).await.id, first.id);
    let report = end(&hosts[2], first).await;
    assert_eq!((report.moved, report.stay, report.cordoned), (6, 0, true), "{report:?}");
    assert!(report.images.iter().all(|image| image.outcome == "handed_over" && image.tries == 1));
    assert_eq!(report.stopped, ["gone".parse::<kage_machine::UserName>().unwrap()]);
    for host in &hosts[1..] {
        let running = (0..6).filter(|number| host.machines.runs(&format!("u{number}"))).count();
        assert!((2..=4).contains(&running), "about as many at each host: {running}");
    }
    // There is nothing left to do.
    let report = end(&hosts[0], begin(&hosts[0], "h1", json!({})).await).await;
    assert_eq!((report.moved, report.stay), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cordoned_host_gets_no_machine_until_it_is_uncordoned() {
    let (site, mut hosts) = TestSite::new("cordon", 3).await;
    hosts[1].login("carol", json!({})).await;
    let (status, reply) = post(&hosts[2], "/v1/hosts/h1/cordon", json!({})).await;
    assert_eq!((status, &reply["cordoned"], &reply["changed"]), (200, &json!(true), &json!(true)), "{reply}");
    let (_, again) = post(&hosts[2], "/v1/hosts/h1/cordon", json!({})).await;
    assert_eq!(again["changed"], json!(false));
    let (status, reply) = post(&hosts[2], "/v1/hosts/h9/cordon", json!({})).await;
    assert_eq!(status, 404, "{reply}");
    // Its daemon starts again: it stays cordoned.
    let parts = hosts.remove(0).kill();
    hosts.insert(0, site.restart(0, parts).await);
    for host in &hosts {
        knows(host, "h1", true).await;
    }
    // A login there is done at the nearest other host, wherever it is asked for.
    for (user, asked, at) in [("alice", 0, "ap-1"), ("bob", 2, "h1")] {
        let reply = hosts[asked].login(user, json!({ "at": at })).await;
        assert_eq!(reply.host.as_str(), "h2", "{reply:?}");
        assert!(reply.note.unwrap().contains("h1 is cordoned"));
    }
    // A user who walks there is not followed.
    let (_, reply) =
        post(&hosts[1], "/v1/roam", json!({ "user": "carol", "ap": "ap-1", "wait": true })).await;
    assert_eq!(reply["action"], "stays", "{reply}");
    // A move without a host named leads elsewhere; with one it is the operator's word.
    let (_, plan) = post(&hosts[1], "/v1/images/carol/migrate", json!({ "dry_run": true })).await;
    assert_eq!(plan["to"], "h3", "{plan}");
    let (_, reply) = post(&hosts[1], "/v1/hosts/h1/uncordon", json!({})).await;
    assert_eq!((&reply["cordoned"], &reply["changed"]), (&json!(false), &json!(true)));
    knows(&hosts[0], "h1", false).await;
    assert_eq!(hosts[0].login("dave", json!({ "at": "ap-1" })).await.host.as_str(), "h1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_refuses_is_passed_over_and_what_nobody_takes_stays_and_is_named() {
    let (_site, hosts) = TestSite::new("drain-refused", 3).await;
    log_in(&hosts[0], 2).await;
    *hosts[1].machines.base.lock().unwrap() = BaseHash([1; 32]);
    let report = end(&hosts[0], begin(&hosts[0], "h1", json!({})).await).await;
    assert_eq!((report.moved, report.stay), (2, 0), "{report:?}");
    assert!(hosts[2].machines.runs("u0") && hosts[2].machines.runs("u1"));
    // Nobody can take what is left.
    let (_, _) = post(&hosts[0], "/v1/hosts/h1/uncordon", json!({})).await;
    knows(&hosts[0], "h1", false).await;
    hosts[0].login("last", json!({})).await;
    *hosts[2].machines.base.lock().unwrap() = BaseHash([2; 32]);
    let report = end(&hosts[0], begin(&hosts[0], "h1", json!({})).await).await;
    assert_eq!((report.moved, report.stay, report.images.len()), (0, 1, 1), "{report:?}");
    let image = &report.images[0];
    assert_eq!((image.outcome.as_str(), image.tries), ("kept", 2));
    assert!(image.reason.as_deref().unwrap().contains("another build"), "{image:?}");
    assert_eq!(hosts[0].show("last").await.state, State::Running);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_without_another_host_says_so() {
    let (_site, hosts) = TestSite::new("drain-alone", 1).await;
    log_in(&hosts[0], 1).await;
    let report = end(&hosts[0], begin(&hosts[0], "h1", json!({})).await).await;
    assert_eq!(report.stay, 1);
    assert!(report.images[0].reason.as_deref().unwrap().contains("no other host"), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_ends_when_it_is_cancelled_or_its_host_uncordoned() {
    let (_site, hosts) = TestSite::new("drain-cancel", 2).await;
    for cancel in [true, false] {
        log_in(&hosts[0], 3).await;
        for number in 0..3 {
            crate::handover::tests::fill_with_noise(&hosts[0], &format!("u{number}"));
        }
        let body = json!({ "parallel": 2, "bandwidth": "2mbit" });
        let operation = begin(&hosts[0], "h1", body).await;
        until("two moves", async || {
            let operation = hosts[0].daemon.operations.get(&operation.id, Duration::ZERO).await.unwrap();
            operation.progress["moving"] == 2
        })
        .await;
        if cancel {
            let path = format!("/v1/operations/{}", operation.id);
            hosts[1].call(&Call::new(Method::DELETE, path)).await;
        } else {
            post(&hosts[1], "/v1/hosts/h1/uncordon", json!({})).await;
        }
        let report = end(&hosts[0], operation).await;
        assert_eq!((report.cancelled, report.moved, report.stay), (true, 0, 3), "{report:?}");
        assert_eq!(report.cordoned, cancel);
        for image in &report.images {
            assert_eq!((image.outcome.as_str(), image.reason.is_some()), ("kept", true), "{image:?}");
        }
        assert!((0..3).all(|number| hosts[0].machines.runs(&format!("u{number}"))));
        post(&hosts[1], "/v1/hosts/h1/uncordon", json!({})).await;
        knows(&hosts[0], "h1", false).await;
    }
}

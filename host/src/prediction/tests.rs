use http::Method;
use kage_directory::{HostRecord, Records as _};
use kage_machine::HostName;
use kage_replicate::predict::Place;
use serde_json::{Value, json};

use super::*;
use crate::{
    http::Call,
    lifecycle::{
        Daemon, blocking,
        tests::{TestHost, TestSite, until},
    },
    scratch::Scratch,
};

fn user() -> UserName {
    "alice".parse().unwrap()
}

fn ap(index: usize) -> ApName {
    format!("ap-{index}").parse().unwrap()
}

fn store(dir: &Scratch, name: &str) -> Predictions {
    let store = Predictions::new(&dir.path().join(name));
    let place = |index: usize| Place {
        host: format!("h{index}").parse().unwrap(),
        position_m: [index as f64 * 40.0, 0.0],
    };
    store.set_places((1..5).map(|index| (ap(index), place(index))).collect());
    store
}

/// A user who walks round three access points.
fn walk(store: &Predictions, changes: usize) {
    for step in 0..=changes {
        let learned = store.arrived(&user(), &ap(step % 3 + 1), 1_000 * (step as u64 + 1));
        assert_eq!(learned.is_some(), step > 0);
    }
}

#[test]
fn an_event_counts_once_and_none_that_is_late() {
    let dir = Scratch::new("predict-once");
    let store = store(&dir, "a");
    walk(&store, 6);
    assert_eq!(store.outlook(&user(), 8_000).score.window, 6);
    assert_eq!(store.arrived(&user(), &ap(1), 7_500), None, "where the user is");
    assert_eq!(store.arrived(&user(), &ap(2), 6_000), None, "long over");
    let outlook = store.outlook(&user(), 8_000);
    assert_eq!((outlook.at, outlook.score.window), (Some(ap(1)), 6));
    store.left(&user(), 8_000);
    assert_eq!(store.outlook(&user(), 8_000).at, None);
}

#[test]
fn what_was_learned_outlives_the_daemon_and_damage_costs_only_knowledge() {
    let dir = Scratch::new("predict-kept");
    let before = store(&dir, "a");
    walk(&before, 6);
    let expected = before.outlook(&user(), 8_000);
    before.write();
    assert_eq!(store(&dir, "a").outlook(&user(), 8_000), expected);
    // Nothing new, nothing written.
    let file = before.file(&user());
    fs::remove_file(&file).unwrap();
    before.write();
    assert!(!file.exists());
    for damage in [&b""[..], b"\x07abc", b"\x01", b"\x01\xff\xff\xff\xff\xff\xff", &[0; 64]] {
        fs::write(&file, damage).unwrap();
        fs::write(before.everybody_file(), damage).unwrap();
        let anew = store(&dir, "a");
        assert_eq!(anew.outlook(&user(), 8_000).score.window, 0, "{damage:?}");
        walk(&anew, 3);
        anew.write();
        assert_eq!(store(&dir, "a").outlook(&user(), 8_000).score.window, 3);
    }
    fs::write(&file, vec![1; MAX_HISTORY_BYTES + 1]).unwrap();
    assert_eq!(store(&dir, "a").outlook(&user(), 8_000).score.window, 0);
}

#[test]
fn a_history_follows_its_machine_and_events_that_waited_count_behind_it() {
    let dir = Scratch::new("predict-follows");
    let (former, next) = (store(&dir, "a"), store(&dir, "b"));
    walk(&former, 6);
    let bytes = former.for_next_owner(&user()).unwrap();
    let sent = || Kept::from_foreign(&bytes, 8_000).ok();
    next.ask(&user());
    assert_eq!(next.arrived(&user(), &ap(2), 8_000), None, "it waits");
    assert_eq!(next.outlook(&user(), 8_000).score.window, 0);
    let learned = next.answered(&user(), sent());
    assert_eq!(learned.iter().map(|learned| learned.ap.clone()).collect::<Vec<_>>(), [ap(2)]);
    assert_eq!(next.outlook(&user(), 8_000).score.window, 7);
    // What is older than one's own is not taken, and no answer is one too.
    for answer in [sent(), None] {
        next.ask(&user());
        assert_eq!(next.arrived(&user(), &ap(2), 9_000), None);
        assert_eq!(next.answered(&user(), answer), []);
        assert_eq!(next.outlook(&user(), 9_000).score.window, 7);
    }
    assert_eq!(next.arrived(&user(), &ap(3), 10_000).map(|learned| learned.ap), Some(ap(3)));
    assert_eq!(next.for_next_owner(&"nobody".parse().unwrap()), None);
}

#[test]
fn what_another_host_sends_is_whole_or_refused() {
    let dir = Scratch::new("predict-foreign");
    let store = store(&dir, "a");
    walk(&store, 6);
    let bytes = store.for_next_owner(&user()).unwrap();
    for length in 0..bytes.len() {
        assert!(Kept::from_foreign(&bytes[..length], 8_000).is_err(), "{length} of {}", bytes.len());
    }
    let refused = |bytes: &[u8], now_ms, why: &str| {
        let reason = Kept::from_foreign(bytes, now_ms).unwrap_err();
        assert!(reason.contains(why), "{reason}");
    };
    refused(&[&bytes[..], b"x"].concat(), 8_000, "follow");
    refused(&vec![1; MAX_HISTORY_BYTES + 1], 8_000, "at most");
    let late = Kept { last_ms: AHEAD_MS + 8_001, ..Kept::default() };
    refused(&encode(&late), 8_000, "future");
    let ahead = Kept { last_ms: 9_000, ..Kept::default() };
    assert_eq!(Kept::from_foreign(&encode(&ahead), 8_000).unwrap().last_ms(), 8_000);
}

#[test]
fn the_history_not_used_for_longest_gives_way_and_is_read_again() {
    let dir = Scratch::new("predict-many");
    let store = store(&dir, "a");
    walk(&store, 3);
    for number in 0..MOST_USERS + 5 {
        let _ = store.outlook(&format!("user-{number}").parse().unwrap(), 0);
    }
    assert_eq!(store.inner().users.len(), MOST_USERS);
    assert!(!store.inner().users.contains_key(&user()));
    assert_eq!(store.outlook(&user(), 8_000).score.window, 3);
}

async fn roam(host: &TestHost, ap: usize, wait: bool) -> Value {
    let body = json!({ "user": "alice", "ap": format!("ap-{ap}"), "wait": wait });
    let (status, reply) = host.call(&Call::new(Method::POST, "/v1/roam").json(&body)).await;
    assert_eq!(status, 200, "{reply}");
    reply
}

async fn prediction(host: &TestHost) -> Value {
    let (status, view) = host.call(&Call::new(Method::GET, "/v1/images/alice/prediction")).await;
    assert_eq!(status, 200, "{view}");
    view
}

/// The hosts that would get mirrors of alice's machine.
async fn mirrors(host: &TestHost) -> Option<Vec<HostName>> {
    let daemon: Arc<Daemon> = host.daemon.clone();
    blocking(move || Ok(daemon.wanted_mirrors(&user()))).await.unwrap()
}

fn hosts_of(names: &[&str]) -> Option<Vec<HostName>> {
    Some(names.iter().map(|name| name.parse().unwrap()).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_learned_of_a_user_follows_the_machine_and_is_told_at_any_host() {
    let (site, mut hosts) = TestSite::new("predict-walk", 3).await;
    hosts[0].login("alice", json!({ "at": "ap-1" })).await;
    for (asked, ap) in [(0, 2), (2, 3), (1, 1)] {
        let reply = roam(&hosts[asked], ap, true).await;
        assert_eq!(reply["report"]["outcome"], "handed_over", "{reply}");
        // Word of the same event again.
        roam(&hosts[asked], ap, false).await;
    }
    for host in &hosts {
        until("three changes", async || {
            let view = prediction(host).await;
            (&view["at"], &view["window"]) == (&json!("ap-1"), &json!(3))
        })
        .await;
    }
    let scored: usize = hosts
        .iter()
        .map(|host| {
            host.daemon.events.since(0).events.iter().filter(|event| event.kind == "predicted").count()
        })
        .sum();
    assert_eq!(scored, 3);
    let text: String = hosts.iter().map(|host| host.daemon.metrics.text()).collect();
    let counted = text.lines().filter(|line| line.starts_with("kage_prediction_total{"));
    let counted: f64 = counted.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum();
    assert_eq!(counted, 3.0);
    // Hosts alone are told what another host knows.
    let (status, _) = hosts[0].call(&Call::new(Method::GET, "/v1/images/alice/history")).await;
    assert_eq!(status, 400);
    let (status, _) = hosts[0].call(&Call::new(Method::GET, "/v1/images/nobody/prediction")).await;
    assert_eq!(status, 404);

    hosts[0].daemon.predictions.write();
    let host = hosts.remove(0);
    let host = site.restart(0, host.kill()).await;
    assert_eq!(prediction(&host).await["window"], 3);
    let (status, _) = host.call(&Call::new(Method::DELETE, "/v1/images/alice")).await;
    assert_eq!(status, 200);
    let view = prediction(&host).await;
    assert_eq!((&view["at"], &view["window"]), (&Value::Null, &json!(3)), "{view}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_wanted_near_the_user_and_never_at_hosts_that_are_cordoned() {
    let (_site, hosts) = TestSite::new("predict-mirrors", 3).await;
    hosts[0].login("alice", json!({ "at": "ap-1" })).await;
    // Nothing is known yet but where access points are.
    until("the nearest first", async || mirrors(&hosts[0]).await == hosts_of(&["h2", "h3"])).await;
    assert_eq!(mirrors(&hosts[1]).await, None, "its owner chooses");
    let directory = &hosts[0].daemon.directory;
    let h2 = "h2".parse().unwrap();
    let record = directory.read::<HostRecord>(&h2).unwrap().unwrap().record;
    directory.publish(&h2, &HostRecord { cordoned: true, ..record }).unwrap();
    until("without the cordoned one", async || mirrors(&hosts[0]).await == hosts_of(&["h3"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_learned_where_that_is_turned_off() {
    let (_site, hosts) = TestSite::with("predict-off", 2, "[replicate]\nmodel = \"off\"").await;
    hosts[0].login("alice", json!({ "at": "ap-1" })).await;
    roam(&hosts[0], 2, true).await;
    let view = prediction(&hosts[0]).await;
    assert_eq!((&view["at"], &view["window"]), (&Value::Null, &json!(0)), "{view}");
    assert_eq!(mirrors(&hosts[1]).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_is_gone_again_is_chased_to_the_last_place() {
    let (_site, hosts) = TestSite::new("chase", 3).await;
    hosts[0].login("alice", json!({})).await;
    for (asked, ap) in [(0, 2), (1, 3), (2, 1), (0, 3), (1, 2), (0, 3)] {
        roam(&hosts[asked], ap, false).await;
    }
    let following = |host: &TestHost| host.daemon.image(&user()).following.is_busy();
    until("the chase's end", async || {
        hosts[1].show("alice").await.host.as_str() == "h3" && !hosts.iter().any(following)
    })
    .await;
    let view = hosts[1].show("alice?state=running&at=h3&timeout=10s").await;
    assert!(view.term.0 <= 7, "one move a place at most: {view:?}");
    let holders = hosts.iter().filter(|host| host.machines.runs("alice")).count();
    assert_eq!(holders, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_follows_to_a_host_that_comes_back() {
    let (site, mut hosts) = TestSite::new("chase-down", 2).await;
    hosts[0].login("alice", json!({})).await;
    let parts = hosts.remove(1).kill();
    let reply = roam(&hosts[0], 2, true).await;
    assert_eq!(reply["report"]["outcome"], "kept", "{reply}");
    let _back = site.restart(1, parts).await;
    hosts[0].show("alice?state=running&at=h2&timeout=20s").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ping_pong_waits_until_the_user_stays() {
    let (_site, hosts) = TestSite::new("ping-pong", 2).await;
    hosts[0].login("alice", json!({})).await;
    for ap in [2, 1] {
        assert_eq!(roam(&hosts[0], ap, true).await["report"]["outcome"], "handed_over");
    }
    for _ in 0..5 {
        let reply = roam(&hosts[1], 2, false).await;
        assert_eq!((&reply["action"], &reply["operation"]), (&json!("moves"), &Value::Null), "{reply}");
        let reply = roam(&hosts[1], 1, false).await;
        assert_eq!((&reply["action"], &reply["operation"]), (&json!("stays"), &Value::Null), "{reply}");
    }
    let view = hosts[0].show("alice").await;
    assert_eq!((view.host.as_str(), view.term.0), ("h1", 3));
    let reply = roam(&hosts[0], 2, true).await;
    assert_eq!(reply["report"]["outcome"], "handed_over", "{reply}");
    assert_eq!(hosts[0].show("alice?state=running&timeout=5s").await.host.as_str(), "h2");
}

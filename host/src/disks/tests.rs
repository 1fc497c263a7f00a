//! Disks of images that go from host to host: real daemons on loopback, simulated machines and logs.

use std::{sync::Arc, time::Duration};

use http::Method;
use kage_directory::ImageRecord;
use kage_machine::{
    PAGE_SIZE, PageBytes,
    disk::{Block, Disk as _},
};
use serde_json::{Value, json};

use crate::{
    api::types::{LoginReply, Operation, OperationState, ScrubReport},
    fake::FakeDisk,
    http::Call,
    lifecycle::tests::{TestHost, TestSite, until},
};

const SIZE: &str = "2MiB";
const BLOCKS: u32 = 512;

fn page(number: u32) -> PageBytes {
    let mut bytes = [7; PAGE_SIZE];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn disk(host: &TestHost) -> Arc<FakeDisk> {
    host.machines.process("alice").unwrap().disk()
}

async fn get(host: &TestHost, block: u32) -> Option<PageBytes> {
    let disk = disk(host);
    tokio::task::spawn_blocking(move || disk.get(block)).await.unwrap()
}

fn record(host: &TestHost) -> ImageRecord {
    host.daemon.existing(&"alice".parse().unwrap()).unwrap().record
}

fn events(host: &TestHost, kind: &str) -> Vec<Value> {
    let events = host.daemon.events.since(0).events;
    events.into_iter().filter(|event| event.kind == kind).map(|event| Value::Object(event.details)).collect()
}

async fn stop(host: &TestHost) -> Value {
    let (status, view) = host.call(&Call::new(Method::DELETE, "/v1/images/alice")).await;
    assert_eq!(status, 200, "{view}");
    view
}

async fn login(host: &TestHost, at: &str) -> LoginReply {
    host.login("alice", json!({ "at": at })).await
}

async fn whole(host: &TestHost) {
    until("a whole disk", async || record(host).disk_origin.is_none()).await;
}

async fn ended(host: &TestHost, call: &Call) -> Operation {
    let (status, reply) = host.call(call).await;
    assert_eq!(status, 202, "{reply}");
    let mut operation: Operation = serde_json::from_value(reply).unwrap();
    while operation.state == OperationState::Running {
        let path = format!("/v1/operations/{}?wait=5s", operation.id);
        operation = serde_json::from_value(host.call(&Call::new(Method::GET, path)).await.1).unwrap();
    }
    operation
}

async fn migrate(host: &TestHost, to: &str) -> Operation {
    ended(host, &Call::new(Method::POST, "/v1/images/alice/migrate").json(&json!({ "to": to }))).await
}

async fn scrub(host: &TestHost) -> ScrubReport {
    let operation = ended(host, &Call::new(Method::POST, "/v1/images/alice/scrub")).await;
    serde_json::from_value(operation.result.unwrap_or_else(|| panic!("{:?}", operation.error))).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_logout_the_next_login_anywhere_finds_the_same_blocks() {
    let (_site, hosts) = TestSite::with_disks("disk-follow", 2, SIZE).await;
    login(&hosts[0], "h1").await;
    let written = disk(&hosts[0]);
    for block in [0, 1, 63, 64, 65, 300, BLOCKS - 1] {
        written.put(block, &page(block));
    }
    assert_eq!(stop(&hosts[0]).await["note"], Value::Null);
    assert_eq!(written.synced(), 1);
    // Asked of the one to start it at the other.
    let reply = login(&hosts[0], "ap-2").await;
    assert_eq!((reply.host.as_str(), reply.found), ("h2", false));
    assert_eq!(get(&hosts[1], 300).await, Some(page(300)));
    whole(&hosts[1]).await;
    let here = disk(&hosts[1]);
    for block in 0..BLOCKS {
        assert_eq!(here.block(block), written.block(block), "{block}");
    }
    until("the event", async || !events(&hosts[1], "disk_whole").is_empty()).await;
    let event = &events(&hosts[1], "disk_whole")[0];
    let came = event["bytes"].as_u64().unwrap();
    assert_eq!((&event["from"], came), (&json!("h1"), 7 * 4096));
    let view = hosts[0].show("alice").await.disk.unwrap();
    assert_eq!(
        (view.bytes, view.held_bytes, view.missing_bytes, view.pulled_bytes, view.origin),
        (2 << 20, Some(7 * 4096), Some(0), came, None)
    );
    // Stopped, its log is opened to look.
    stop(&hosts[1]).await;
    assert_eq!(hosts[0].show("alice").await.disk.unwrap().held_bytes, Some(7 * 4096));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_stay_left_is_good_by_its_digests_and_never_as_the_disk() {
    let (_site, hosts) = TestSite::with_disks("disk-old", 2, SIZE).await;
    login(&hosts[0], "h1").await;
    for block in 0..100 {
        disk(&hosts[0]).put(block, &page(block));
    }
    stop(&hosts[0]).await;
    login(&hosts[1], "h2").await;
    whole(&hosts[1]).await;
    disk(&hosts[1]).put(50, &page(1050));
    disk(&hosts[1]).put(200, &page(1200));
    stop(&hosts[1]).await;
    login(&hosts[0], "h1").await;
    assert_eq!(get(&hosts[0], 50).await, Some(page(1050)));
    whole(&hosts[0]).await;
    for block in 0..BLOCKS {
        let expected = match block {
            50 | 200 => page(1000 + block),
            0..100 => page(block),
            _ => [0; PAGE_SIZE],
        };
        assert_eq!(disk(&hosts[0]).get(block), Some(expected), "{block}");
    }
    until("the event", async || !events(&hosts[0], "disk_whole").is_empty()).await;
    let bytes = events(&hosts[0], "disk_whole")[0]["bytes"].as_u64().unwrap();
    // A block that is needed before the list has come is asked for unseen, with its neighbours.
    assert!((2 * 4096..=11 * 4096).contains(&bytes), "{bytes}");
    let files: Vec<_> = std::fs::read_dir(hosts[0].daemon.disks_dir())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(files.iter().all(|file| file.ends_with(".log")), "{files:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_before_the_rest_has_come_outlives_any_restart() {
    let (site, mut hosts) = TestSite::with_disks("disk-restart", 3, SIZE).await;
    login(&hosts[1], "h2").await;
    for block in 0..10 {
        disk(&hosts[1]).put(block, &page(block));
    }
    stop(&hosts[1]).await;
    login(&hosts[2], "h3").await;
    whole(&hosts[2]).await;
    disk(&hosts[2]).put(4, &page(1004));
    stop(&hosts[2]).await;
    // Now back, with an old log there, and the blocks do not come.
    let origin = hosts[2].daemon.clone();
    let held = origin.disk_limits.answers.acquire_many(super::ANSWERS as u32).await.unwrap();
    assert_eq!(login(&hosts[1], "h2").await.host.as_str(), "h2");
    disk(&hosts[1]).put(7, &page(2007));
    hosts[1].machines.process("alice").unwrap().kill("killed by signal 9");
    until("the restart", async || record(&hosts[1]).term.0 > 3 && hosts[1].machines.runs("alice")).await;
    // And the daemon, with its machine.
    let host = hosts.remove(1);
    let (machines, net, embedded) = host.kill();
    machines.process("alice").unwrap().kill("while nobody looked");
    let host = site.restart(1, (machines, net, embedded)).await;
    until("the machine", async || host.machines.runs("alice")).await;
    assert!(record(&host).disk_origin.is_some());
    drop(held);
    whole(&host).await;
    for (block, expected) in [(3, page(3)), (4, page(1004)), (7, page(2007)), (11, [0; PAGE_SIZE])] {
        assert_eq!(get(&host, block).await, Some(expected), "{block}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_waits_for_an_origin_that_is_away() {
    let (site, mut hosts) = TestSite::with_disks("disk-away", 3, SIZE).await;
    login(&hosts[1], "h2").await;
    disk(&hosts[1]).put(5, &page(5));
    stop(&hosts[1]).await;
    // It dies between giving the image away and the first block.
    let to = "h3".parse().unwrap();
    assert!(hosts[1].daemon.give(&"alice".parse().unwrap(), &to).await.unwrap().term.is_some());
    let parts = hosts.remove(1).kill();
    assert_eq!(hosts[1].call(&Call::new(Method::POST, "/v1/images/alice/start")).await.0, 200);
    let here = disk(&hosts[1]);
    let reader = tokio::task::spawn_blocking(move || here.get(5));
    until("somebody to say so", async || !events(&hosts[1], "disk_waits").is_empty()).await;
    assert!(!reader.is_finished());
    let _origin = site.restart(1, parts).await;
    assert_eq!(reader.await.unwrap(), Some(page(5)));
    whole(&hosts[1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_moves_while_blocks_are_missing_and_its_new_owner_goes_on() {
    let (_site, hosts) = TestSite::with_disks("disk-move", 3, SIZE).await;
    login(&hosts[1], "h2").await;
    for block in 0..100 {
        disk(&hosts[1]).put(block * 3, &page(block));
    }
    stop(&hosts[1]).await;
    let answers = hosts[1].daemon.disk_limits.answers.acquire_many(super::ANSWERS as u32).await.unwrap();
    let reply = login(&hosts[2], "h3").await;
    assert!(reply.disk_missing_bytes > 0 && reply.disk_pulled_bytes == 0, "{reply:?}");
    assert_eq!(migrate(&hosts[2], "h1").await.result.unwrap()["outcome"], "handed_over");
    let moved = record(&hosts[0]);
    assert_eq!((moved.owner.as_str(), moved.disk_origin.unwrap().host.as_str()), ("h1", "h2"));
    let here = disk(&hosts[0]);
    let reader = tokio::task::spawn_blocking(move || here.get(30));
    drop(answers);
    assert_eq!(reader.await.unwrap(), Some(page(10)));
    whole(&hosts[0]).await;
    assert_eq!(get(&hosts[0], 297).await, Some(page(99)));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_machine_moves_before_it_is_known_what_is_missing() {
    let (_site, hosts) = TestSite::with_disks("disk-unlisted", 2, SIZE).await;
    login(&hosts[0], "h1").await;
    disk(&hosts[0]).put(5, &page(5));
    stop(&hosts[0]).await;
    let lists = hosts[0].daemon.disk_limits.lists.acquire().await.unwrap();
    login(&hosts[1], "h2").await;
    let refused = migrate(&hosts[1], "h1").await.error.unwrap();
    assert!(
        refused.message.contains("list of what is missing") && refused.message.contains("h1"),
        "{refused}"
    );
    drop(lists);
    whole(&hosts[1]).await;
    assert_eq!(migrate(&hosts[1], "h1").await.result.unwrap()["outcome"], "handed_over");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_partly_elsewhere_is_not_given_away_but_brought() {
    let (_site, hosts) = TestSite::with_disks("disk-parts", 3, SIZE).await;
    login(&hosts[1], "h2").await;
    disk(&hosts[1]).put(5, &page(5));
    stop(&hosts[1]).await;
    let answers = hosts[1].daemon.disk_limits.answers.acquire_many(super::ANSWERS as u32).await.unwrap();
    login(&hosts[2], "h3").await;
    stop(&hosts[2]).await;
    let reply = login(&hosts[0], "h1").await;
    assert_eq!((reply.host.as_str(), reply.found, reply.note), ("h1", false, None));
    assert_eq!(record(&hosts[0]).disk_origin.unwrap().host.as_str(), "h2");
    drop(answers);
    whole(&hosts[0]).await;
    assert_eq!(get(&hosts[0], 5).await, Some(page(5)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_never_came_to_its_owner_goes_back() {
    let (_site, hosts) = TestSite::with_disks("disk-untouched", 2, SIZE).await;
    login(&hosts[0], "h1").await;
    disk(&hosts[0]).put(5, &page(5));
    stop(&hosts[0]).await;
    hosts[1].net.fail_next("image");
    let (status, body) =
        hosts[1].call(&Call::new(Method::PUT, "/v1/images/alice").json(&json!({ "at": "h2" }))).await;
    assert_eq!(status, 500, "{body}");
    assert_eq!(record(&hosts[0]).owner.as_str(), "h2");
    stop(&hosts[0]).await;
    let reply = login(&hosts[0], "h1").await;
    assert_eq!((reply.host.as_str(), reply.found, reply.disk_missing_bytes), ("h1", false, 0));
    assert_eq!((record(&hosts[0]).disk_origin, get(&hosts[0], 5).await), (None, Some(page(5))));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_log_does_not_become_the_disk_of_an_owner_that_never_started() {
    let (_site, hosts) = TestSite::with_disks("disk-stale", 2, SIZE).await;
    login(&hosts[1], "h2").await;
    disk(&hosts[1]).put(5, &page(5));
    stop(&hosts[1]).await;
    login(&hosts[0], "h1").await;
    whole(&hosts[0]).await;
    disk(&hosts[0]).put(5, &page(1005));
    stop(&hosts[0]).await;
    hosts[1].net.fail_next("image");
    let (status, body) =
        hosts[1].call(&Call::new(Method::PUT, "/v1/images/alice").json(&json!({ "at": "h2" }))).await;
    assert_eq!(status, 500, "{body}");
    let image = hosts[1].daemon.image(&"alice".parse().unwrap());
    hosts[1].daemon.pull(&image);
    stop(&hosts[1]).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(record(&hosts[0]).disk_origin.unwrap().host.as_str(), "h1");
    login(&hosts[1], "h2").await;
    assert_eq!(get(&hosts[1], 5).await, Some(page(1005)));
    whole(&hosts[1]).await;
    assert_eq!(get(&hosts[1], 5).await, Some(page(1005)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_never_ran_where_it_was_taken_goes_on_from_its_source() {
    let (_site, hosts) = TestSite::with_disks("disk-revived", 2, SIZE).await;
    login(&hosts[1], "h2").await;
    disk(&hosts[1]).put(5, &page(5));
    stop(&hosts[1]).await;
    login(&hosts[0], "h1").await;
    whole(&hosts[0]).await;
    disk(&hosts[0]).put(5, &page(1005));
    stop(&hosts[0]).await;
    // As a claim leaves it: the right is here, and the log an earlier stay's.
    let (user, me) = ("alice".parse().unwrap(), hosts[1].daemon.me.clone());
    let found = hosts[0].daemon.existing(&user).unwrap();
    let term = found.record.term.next();
    let claimed = ImageRecord { owner: me, term, ..found.record };
    hosts[0].daemon.swap(&user, found.revision, &claimed).unwrap();
    let image = hosts[1].daemon.image(&user);
    assert!(hosts[1].daemon.stand_on_source(&image, &hosts[0].daemon.me).await);
    login(&hosts[1], "h2").await;
    assert_eq!(get(&hosts[1], 5).await, Some(page(1005)));
    whole(&hosts[1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_disk_becomes_whole_too_and_then_goes_on() {
    let (_site, hosts) = TestSite::with_disks("disk-stopped", 3, SIZE).await;
    login(&hosts[1], "h2").await;
    disk(&hosts[1]).put(5, &page(5));
    stop(&hosts[1]).await;
    let answers = hosts[1].daemon.disk_limits.answers.acquire_many(super::ANSWERS as u32).await.unwrap();
    login(&hosts[2], "h3").await;
    stop(&hosts[2]).await;
    drop(answers);
    whole(&hosts[2]).await;
    login(&hosts[0], "h1").await;
    assert_eq!(record(&hosts[0]).disk_origin.unwrap().host.as_str(), "h3");
    assert_eq!(get(&hosts[0], 5).await, Some(page(5)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_block_is_put_right_by_whoever_has_it() {
    let (_site, hosts) = TestSite::with_disks("disk-corrupt", 3, SIZE).await;
    login(&hosts[1], "h2").await;
    let former = disk(&hosts[1]);
    for block in [5, 6, 7] {
        former.put(block, &page(block));
    }
    stop(&hosts[1]).await;
    login(&hosts[2], "h3").await;
    whole(&hosts[2]).await;
    let here = disk(&hosts[2]);
    here.harm(5);
    assert_eq!(get(&hosts[2], 5).await, Some(page(5)));
    until("the event", async || !events(&hosts[2], "disk_repaired").is_empty()).await;
    assert_eq!(events(&hosts[2], "disk_repaired")[0]["blocks"], json!([5]));
    // Where nobody has it, its reader is told.
    here.harm(6);
    former.harm(6);
    assert_eq!(get(&hosts[2], 6).await, None);
    until("the event", async || !events(&hosts[2], "disk_damaged").is_empty()).await;
    assert_eq!(events(&hosts[2], "disk_damaged")[0]["blocks"], json!([6]));
    assert_eq!(get(&hosts[2], 7).await, Some(page(7)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_finds_all_damage_and_repairs_what_others_have() {
    let (_site, hosts) = TestSite::with_disks("disk-scrub", 2, SIZE).await;
    login(&hosts[0], "h1").await;
    let former = disk(&hosts[0]);
    for block in 0..150 {
        former.put(block, &page(block));
    }
    stop(&hosts[0]).await;
    login(&hosts[1], "h2").await;
    whole(&hosts[1]).await;
    let here = disk(&hosts[1]);
    let clean = scrub(&hosts[0]).await;
    assert_eq!((clean.checked_bytes, clean.corrupt_blocks), (150 * 4096, 0), "{clean:?}");
    for block in 0..130 {
        here.harm(block);
    }
    former.harm(3);
    former.harm(120);
    let report = scrub(&hosts[0]).await;
    assert_eq!(
        (report.corrupt_blocks, report.repaired_blocks, report.lost_blocks, report.lost),
        (130, 128, 2, vec![3, 120])
    );
    // Stopped too.
    stop(&hosts[1]).await;
    let report = scrub(&hosts[0]).await;
    assert_eq!((report.corrupt_blocks, report.lost), (2, vec![3, 120]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_does_not_sync_is_named_when_it_is_ended() {
    let (_site, hosts) = TestSite::with_disks("disk-deaf", 1, SIZE).await;
    login(&hosts[0], "h1").await;
    disk(&hosts[0]).deafen("its file system is read-only");
    let note = stop(&hosts[0]).await["note"].as_str().unwrap().to_owned();
    assert!(note.contains("may be lost") && note.contains("read-only"), "{note}");
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_for_hosts_of_the_site_alone() {
    let (_site, hosts) = TestSite::with_disks("disk-private", 2, SIZE).await;
    login(&hosts[0], "h1").await;
    let give = Call::new(Method::POST, "/v1/images/alice/give").json(&json!({ "to": "h2" }));
    let digests = Call::new(Method::GET, "/v1/images/alice/disk/digests");
    let blocks = Call::new(Method::POST, "/v1/images/alice/disk/blocks").bytes(vec![0; 12]);
    for call in [&give, &digests, &blocks] {
        let (status, body) = hosts[0].call(call).await;
        assert_eq!((status, body["code"].as_str()), (400, Some("bad_request")), "{body}");
    }
    let h1 = "h1".parse().unwrap();
    let ask = async |call: &Call| {
        let address = hosts[1].daemon.address(&h1).unwrap();
        hosts[1].daemon.peers.call(&h1, address, call).await.unwrap()
    };
    let elsewhere = Call::new(Method::POST, "/v1/images/alice/give").json(&json!({ "to": "h3" }));
    assert_eq!(ask(&elsewhere).await.status, 400);
    let stays = ask(&give).await;
    assert_eq!(serde_json::from_slice::<Value>(&stays.body).unwrap()["term"], Value::Null, "it runs");
    assert_eq!(ask(&blocks).await.body.as_ref(), [2]);
    let nobody = Call::new(Method::GET, "/v1/images/nobody/disk/digests");
    assert_eq!(ask(&nobody).await.status, 404);
    for bytes in [vec![0; 13], vec![0; 12 * 65]] {
        let damaged = Call::new(Method::POST, "/v1/images/alice/disk/blocks").bytes(bytes);
        assert_eq!(ask(&damaged).await.status, 400);
    }
    assert_eq!(disk(&hosts[0]).block(0), Block::Zeros);
    tokio::time::timeout(Duration::from_secs(10), login(&hosts[1], "h2")).await.unwrap();
}

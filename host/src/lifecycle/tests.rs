//! Daemons on loopback with simulated machines: real API, real TLS, real directory.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use kage_directory::{Directory, Embedded, Records as _};
use kage_machine::{HostName, UserName};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};

use super::*;
use crate::{
    api::types::{ImageView, LoginReply},
    fake::{FakeMachines, FakeNet},
    http::{Call, Connection, unix},
    init::{HostSpec, site},
    scratch::Scratch,
    serve,
    tls::Identity,
};
use http::Method;

pub(crate) const KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl alice@laptop";

/// One daemon and what would outlive it.
pub(crate) struct TestHost {
    pub daemon: Arc<Daemon>,
    pub machines: Arc<FakeMachines>,
    pub net: Arc<FakeNet>,
    pub socket: PathBuf,
    tasks: Vec<JoinHandle<()>>,
    embedded: Option<Arc<dyn Directory>>,
}

impl TestHost {
    /// Ends the daemon as SIGKILL would; machines live on.
    pub fn kill(self) -> (Arc<FakeMachines>, Arc<FakeNet>, Option<Arc<dyn Directory>>) {
        for task in self.tasks {
            task.abort();
        }
        self.machines.unwatch();
        (self.machines, self.net, self.embedded)
    }

    pub async fn call(&self, call: &Call) -> (u16, Value) {
        let mut connection: Connection = unix(&self.socket).await.unwrap();
        let answer = connection.call(call).await.unwrap();
        let body = serde_json::from_slice(&answer.body).unwrap_or(Value::Null);
        (answer.status.as_u16(), body)
    }

    pub async fn login(&self, user: &str, body: Value) -> LoginReply {
        let (status, reply) =
            self.call(&Call::new(Method::PUT, format!("/v1/images/{user}")).json(&body)).await;
        assert_eq!(status, 200, "{reply}");
        serde_json::from_value(reply).unwrap()
    }

    pub async fn show(&self, query: &str) -> ImageView {
        let (status, reply) = self.call(&Call::new(Method::GET, format!("/v1/images/{query}"))).await;
        assert_eq!(status, 200, "{reply}");
        serde_json::from_value(reply).unwrap()
    }
}

/// Hosts h1 (which serves the directory), h2, …
pub(crate) struct TestSite {
    dir: Scratch,
    addresses: Vec<SocketAddr>,
    network: String,
    disk: String,
}

fn host_name(index: usize) -> HostName {
    format!("h{}", index + 1).parse().unwrap()
}

impl TestSite {
    pub async fn new(name: &str, hosts: usize) -> (Self, Vec<TestHost>) {
        Self::with(name, hosts, "").await
    }

    /// With more lines of `[network]`.
    pub async fn with(name: &str, hosts: usize, network: &str) -> (Self, Vec<TestHost>) {
        Self::configured(name, hosts, network, "0B").await
    }

    /// With disks of a size.
    pub async fn with_disks(name: &str, hosts: usize, disk: &str) -> (Self, Vec<TestHost>) {
        Self::configured(name, hosts, "", disk).await
    }

    async fn configured(name: &str, hosts: usize, network: &str, disk: &str) -> (Self, Vec<TestHost>) {
        let dir = Scratch::new(name);
        let specs: Vec<_> =
            (0..hosts).map(|index| HostSpec { name: host_name(index), advertise: None }).collect();
        site(dir.path(), &specs).unwrap();
        let mut listeners = Vec::new();
        for _ in 0..hosts {
            listeners.push(TcpListener::bind("[::1]:0").await.unwrap());
        }
        let addresses = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
        let site = Self { dir, addresses, network: network.to_owned(), disk: disk.to_owned() };
        let embedded = Embedded::open(&site.dir.path().join("directory.redb")).unwrap();
        let mut embedded: Option<Arc<dyn Directory>> = Some(Arc::new(embedded));
        let mut all = Vec::new();
        for (index, listener) in listeners.into_iter().enumerate() {
            let parts = (Arc::default(), Arc::default(), embedded.take());
            all.push(site.start(index, listener, parts).await);
        }
        for host in &all {
            let mut seen = host.daemon.seen.subscribe();
            let all_seen = seen.wait_for(|seen| seen.hosts.len() == hosts);
            tokio::time::timeout(Duration::from_secs(10), all_seen).await.unwrap().unwrap();
        }
        (site, all)
    }

    pub async fn start(
        &self,
        index: usize,
        listener: TcpListener,
        parts: (Arc<FakeMachines>, Arc<FakeNet>, Option<Arc<dyn Directory>>),
    ) -> TestHost {
        let (machines, net, embedded) = parts;
        let name = host_name(index);
        let dir = self.dir.path().join(name.as_str());
        let text = format!(
            "[host]\nname = {name:?}\nstate_dir = {state:?}\nrun_dir = {run:?}\n\
             [peer]\nadvertise = \"{address}\"\ntls_dir = {tls:?}\n\
             [cluster]\nendpoints = [\"{first}\"]\n\
             [network]\nprefix = \"fd4b:6167:6500::/48\"\nunderlay = \"lo\"\n{network}\n\
             [image]\nmemory = \"16MiB\"\ndisk = {disk:?}\n\
             [[ap]]\nid = \"ap-{n}\"\nhost = {name:?}\nmobility = \"route\"\nposition_m = [{n}0, 0]\n",
            name = name.as_str(),
            state = dir.join("state").to_str().unwrap(),
            run = dir.join("run").to_str().unwrap(),
            tls = dir.join("tls").to_str().unwrap(),
            address = self.addresses[index],
            first = self.addresses[0],
            network = self.network,
            disk = self.disk,
            n = index + 1,
        );
        let config = Config::parse(std::path::Path::new("host.toml"), &text).unwrap();
        let socket = config.socket();
        let identity = Identity::load(&config.peer.tls_dir, &name).unwrap();
        let directory = match &embedded {
            Some(embedded) => embedded.clone(),
            None => crate::links::open_directory(&config, &identity).unwrap(),
        };
        let parts = Parts {
            config,
            directory,
            machines: machines.clone(),
            net: net.clone(),
            peers: Peers::new(identity),
        };
        let daemon = Daemon::new(parts).unwrap();
        let adopting = daemon.clone();
        blocking(move || {
            adopting.adopt();
            Ok(())
        })
        .await
        .unwrap();
        let unix = serve::open_unix(&socket).await.unwrap();
        let mut tasks = Vec::new();
        let (api, peers, served) = (daemon.clone(), daemon.clone(), embedded.clone());
        tasks.push(tokio::spawn(async move { serve::serve_unix(api, unix).await.unwrap() }));
        tasks.push(tokio::spawn(serve::serve_peers(peers, listener, served)));
        let publisher = daemon.clone();
        blocking(move || publisher.publish()).await.unwrap();
        let follower = daemon.clone();
        std::thread::spawn(move || follower.follow());
        daemon.start_missing().await.unwrap();
        tasks.push(tokio::spawn(Daemon::supervise(Arc::downgrade(&daemon))));
        tasks.push(tokio::spawn(Daemon::look_ahead(Arc::downgrade(&daemon))));
        TestHost { daemon, machines, net, socket, tasks, embedded }
    }

    /// Starts a daemon again that was killed.
    pub async fn restart(
        &self,
        index: usize,
        parts: (Arc<FakeMachines>, Arc<FakeNet>, Option<Arc<dyn Directory>>),
    ) -> TestHost {
        let mut listener = None;
        // A task that was ended lets go of its socket a moment later.
        until("the killed daemon's port", async || {
            let socket = tokio::net::TcpSocket::new_v6().unwrap();
            socket.set_reuseaddr(true).unwrap();
            listener = socket.bind(self.addresses[index]).and_then(|()| socket.listen(64)).ok();
            listener.is_some()
        })
        .await;
        let host = self.start(index, listener.unwrap(), parts).await;
        // It serves before it has read the directory.
        let mut seen = host.daemon.seen.subscribe();
        let hosts = self.addresses.len();
        let all_seen = seen.wait_for(|seen| seen.hosts.len() == hosts);
        tokio::time::timeout(Duration::from_secs(10), all_seen).await.unwrap().unwrap();
        host
    }
}

pub(crate) async fn until(what: &str, mut is: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !is().await {
        assert!(tokio::time::Instant::now() < deadline, "{what}: not within 10 s");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_starts_a_machine_and_a_second_one_elsewhere_finds_it() {
    let (_site, hosts) = TestSite::new("life-login", 2).await;
    let first = hosts[0].login("alice", json!({ "key": KEY })).await;
    assert_eq!((first.host.as_str(), first.found, first.state), ("h1", false, State::Running));
    let second = hosts[1].login("alice", json!({ "at": "h2" })).await;
    assert_eq!((second.host.as_str(), second.found, second.vid), ("h1", true, first.vid));
    assert_eq!(*hosts[0].machines.started.lock().unwrap() + *hosts[1].machines.started.lock().unwrap(), 1);
    let view = hosts[1].show("alice").await;
    assert_eq!((view.state, view.term.0, view.memory_bytes), (State::Running, 1, 16 << 20));
    until("the route through the tunnel", async || {
        hosts[1].net.calls().iter().any(|call| call.contains(&first.vid.to_string()) && call.contains("Host"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_at_the_same_time_start_one_machine() {
    let (_site, hosts) = TestSite::new("life-race", 2).await;
    let (a, b, c) = tokio::join!(
        hosts[0].login("alice", json!({})),
        hosts[1].login("alice", json!({})),
        hosts[1].login("alice", json!({ "at": "ap-1" }))
    );
    assert_eq!((a.vid, &a.host), (b.vid, &b.host));
    assert_eq!((a.vid, &a.host), (c.vid, &c.host));
    assert_eq!(*hosts[0].machines.started.lock().unwrap() + *hosts[1].machines.started.lock().unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_at_an_access_point_starts_at_its_host() {
    let (_site, hosts) = TestSite::new("life-place", 2).await;
    let reply = hosts[0].login("bob", json!({ "at": "ap-2" })).await;
    assert_eq!(reply.host.as_str(), "h2");
}

#[tokio::test(flavor = "multi_thread")]
async fn logout_keeps_the_identity_for_the_next_login() {
    let (_site, hosts) = TestSite::new("life-logout", 2).await;
    let first = hosts[0].login("alice", json!({ "key": KEY })).await;
    let (status, view) = hosts[1].call(&Call::new(Method::DELETE, "/v1/images/alice")).await;
    assert_eq!((status, &view["state"]), (200, &json!("stopped")), "{view}");
    assert!(!hosts[0].machines.runs("alice"));
    let (status, _) = hosts[0].call(&Call::new(Method::POST, "/v1/images/alice/stop")).await;
    assert_eq!(status, 200, "stopping twice is stopping once");
    let again = hosts[0].login("alice", json!({})).await;
    assert_eq!((again.vid, again.found), (first.vid, false));
    let record = hosts[0].daemon.existing(&"alice".parse().unwrap()).unwrap().record;
    assert_eq!((record.term.0, record.profile.authorized_keys), (2, vec![KEY.to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_whose_process_dies_is_started_again_under_a_new_term() {
    let (_site, hosts) = TestSite::new("life-death", 1).await;
    hosts[0].login("alice", json!({})).await;
    hosts[0].machines.process("alice").unwrap().kill("killed by signal 9");
    until("the restart", async || {
        let events = hosts[0].daemon.events.since(0).events;
        events.iter().any(|event| event.kind == "restarted" && event.details["outcome"] == "restarted")
    })
    .await;
    let view = hosts[0].show("alice?state=running&timeout=5s").await;
    assert_eq!(view.term.0, 2);
    for _ in 0..decide::Restarts::MOST {
        until("a process", async || hosts[0].machines.runs("alice")).await;
        until("running", async || hosts[0].show("alice").await.state == State::Running).await;
        hosts[0].machines.process("alice").unwrap().kill("again");
    }
    let view = hosts[0].show("alice?state=failed&timeout=5s").await;
    assert!(view.note.unwrap().contains("too often"));
    let (status, _) = hosts[0].call(&Call::new(Method::POST, "/v1/images/alice/start")).await;
    assert_eq!(status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_fails_is_shown_with_its_log_and_can_be_started_again() {
    let (_site, hosts) = TestSite::new("life-panic", 1).await;
    hosts[0].login("alice", json!({})).await;
    hosts[0].machines.process("alice").unwrap().fail("panicked at shell.rs:7");
    let view = hosts[0].show("alice?state=failed&timeout=5s").await;
    assert!(view.note.unwrap().contains("shell.rs:7"));
    let (status, log) = hosts[0].call(&Call::new(Method::GET, "/v1/images/alice/logs")).await;
    assert_eq!((status, &log["text"]), (200, &json!("fake\n")));
    let (status, reply) = hosts[0].call(&Call::new(Method::POST, "/v1/images/alice/start")).await;
    assert_eq!((status, &reply["state"]), (200, &json!("running")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_daemon_adopts_its_machines_and_starts_what_is_missing() {
    let (site, mut hosts) = TestSite::new("life-adopt", 2).await;
    hosts[1].login("alice", json!({})).await;
    hosts[1].login("bob", json!({})).await;
    let alice = hosts[1].machines.process("alice").unwrap();
    let (machines, net, embedded) = hosts.remove(1).kill();
    machines.process("bob").unwrap().kill("while nobody looked");
    let view = hosts[0].show("alice").await;
    assert_eq!(view.state, State::InDoubt, "{view:?}");
    assert!(view.note.unwrap().contains("host h2 does not answer"));
    let host = site.restart(1, (machines, net, embedded)).await;
    let view = host.show("alice?state=running&timeout=5s").await;
    assert_eq!(view.term.0, 1, "adopted, not started anew");
    assert!(Arc::ptr_eq(&alice, &host.machines.process("alice").unwrap()));
    let view = host.show("bob?state=running&timeout=5s").await;
    assert_eq!(view.term.0, 2);
    assert_eq!(hosts[0].show("alice?state=running&timeout=5s").await.host.as_str(), "h2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_cannot_be_reached_is_never_started_twice() {
    let (site, mut hosts) = TestSite::new("life-silent", 2).await;
    hosts[1].login("alice", json!({})).await;
    let alice = hosts[1].machines.process("alice").unwrap();
    let (machines, net, embedded) = hosts.remove(1).kill();
    machines.silent.store(true, Ordering::SeqCst);
    let host = site.restart(1, (machines, net, embedded)).await;
    let view = host.show("alice?state=in_doubt&timeout=5s").await;
    assert!(view.note.unwrap().contains("does not answer"));
    let login = Call::new(Method::PUT, "/v1/images/alice").json(&json!({}));
    for call in [login, Call::new(Method::POST, "/v1/images/alice/stop")] {
        let (status, body) = host.call(&call).await;
        assert_eq!(status, 409, "{} {}: {body}", call.method, call.path);
        assert!(body["message"].as_str().unwrap().contains("cannot be reached"), "{body}");
    }
    host.machines.silent.store(false, Ordering::SeqCst);
    let view = host.show("alice?state=running&timeout=5s").await;
    assert_eq!((view.term.0, view.note), (1, None));
    assert!(Arc::ptr_eq(&alice, &host.machines.process("alice").unwrap()));
    assert_eq!(*host.machines.started.lock().unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_gets_a_clear_error() {
    let (_site, hosts) = TestSite::new("life-bad", 2).await;
    hosts[0].login("alice", json!({})).await;
    let put = |user: &str, body: Value| Call::new(Method::PUT, format!("/v1/images/{user}")).json(&body);
    let post = |path: &str, body: Value| Call::new(Method::POST, path).json(&body);
    for (call, status, says) in [
        (Call::new(Method::GET, "/v1/images/nobody"), 404, "kage login nobody"),
        (Call::new(Method::GET, "/v1/images/-x"), 400, "refused"),
        (Call::new(Method::GET, "/v1/images/alice?state=sleeping"), 400, "choose one of"),
        (
            Call::new(Method::GET, "/v1/images/alice?state=stopped&timeout=100ms"),
            504,
            "still is running at h1",
        ),
        (put("bob", json!({ "key": "nonsense" })), 400, "ssh-keygen"),
        (put("bob", json!({ "at": "ap-99" })), 404, "neither a host nor an access point"),
        (put("bob", json!({ "image": "windows" })), 500, "no image"),
        (put("bob", json!({ "kee": "x" })), 400, "unknown field"),
        (put("alice", json!({ "image": "other" })), 400, "leave --image away"),
        (post("/v1/images/nobody/start", json!({})), 404, "no image"),
        (post("/v1/images/nobody/stop", json!({})), 404, "no image"),
        (post("/v1/images/alice/migrate", json!({ "to": "h9" })), 404, "host h9 is unknown"),
        (post("/v1/images/alice/migrate", json!({ "to": "h1" })), 400, "already"),
        (post("/v1/images/alice/migrate", json!({ "mode": "postcopy" })), 501, "postcopy"),
        (post("/v1/images/alice/migrate", json!({ "blackout": "10" })), 400, "write it as 10ms"),
        (post("/v1/roam", json!({ "user": "alice", "ap": "ap-99" })), 404, "ap-99 is unknown"),
        (post("/v1/roam", json!({ "user": "nobody", "ap": "ap-1" })), 404, "no image"),
        (Call::new(Method::GET, "/v1/operations/h1:77"), 404, "unknown"),
        (Call::new(Method::GET, "/v1/operations/h9:1"), 404, "host h9 is unknown"),
        (Call::new(Method::GET, "/nowhere"), 404, "openapi"),
        (Call::new(Method::DELETE, "/v1/hosts"), 405, "not offered"),
    ] {
        let (found, body) = hosts[0].call(&call).await;
        let message = body["message"].as_str().unwrap_or_default();
        assert_eq!(found, status, "{} {}: {body}", call.method, call.path);
        assert!(message.contains(says), "{} {}: {message}", call.method, call.path);
        assert!(body["code"].is_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_down_is_named() {
    let (_site, mut hosts) = TestSite::new("life-down", 2).await;
    hosts[1].login("alice", json!({})).await;
    hosts.remove(1).kill();
    let started = std::time::Instant::now();
    let (status, body) = hosts[0].call(&Call::new(Method::PUT, "/v1/images/alice").json(&json!({}))).await;
    assert_eq!(status, 502, "{body}");
    assert!(body["message"].as_str().unwrap().contains("host h2 does not answer"), "{body}");
    assert!(started.elapsed() < Duration::from_secs(5));
    let (_, list) = hosts[0].call(&Call::new(Method::GET, "/v1/hosts")).await;
    let up: Vec<_> = list.as_array().unwrap().iter().map(|host| host["up"].as_bool()).collect();
    assert_eq!(up, [Some(true), Some(false)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_published_and_the_latest_word_wins() {
    let (_site, hosts) = TestSite::new("life-device", 2).await;
    let address = "fd0d::1".parse().unwrap();
    let (user, ap): (UserName, _) = ("alice".parse().unwrap(), "ap-1".parse().unwrap());
    assert!(hosts[0].daemon.attach_device(address, &user, &ap, 20).unwrap());
    assert!(!hosts[1].daemon.attach_device(address, &user, &"ap-2".parse().unwrap(), 10).unwrap());
    until("the route at the other host", async || {
        hosts[1].net.calls().iter().any(|call| call.starts_with("device fd0d::1") && call.contains("h1"))
    })
    .await;
    assert!(hosts[1].daemon.attach_device(address, &user, &"ap-2".parse().unwrap(), 30).unwrap());
    until("the route at the first host", async || {
        hosts[0].net.calls().iter().any(|call| call.starts_with("device fd0d::1") && call.contains("h2"))
    })
    .await;
    let found = hosts[0].daemon.directory.read::<kage_directory::DeviceRecord>(&address).unwrap().unwrap();
    assert_eq!(found.record.host.as_str(), "h2");
    assert!(hosts[0].daemon.attach_device("fe80::1".parse().unwrap(), &user, &ap, 1).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_intent_that_a_move_left_open_is_closed_and_the_machine_runs_on() {
    let (_site, hosts) = TestSite::new("life-intent", 2).await;
    hosts[0].login("alice", json!({})).await;
    let process = hosts[0].machines.process("alice").unwrap();
    let (user, directory) = ("alice".parse::<UserName>().unwrap(), &hosts[0].daemon.directory);
    let found = hosts[0].daemon.existing(&user).unwrap();
    let intent = kage_directory::Intent { target: host_name(1), handover: kage_machine::HandoverId([9; 16]) };
    let left = ImageRecord { intent: Some(intent), ..found.record.clone() };
    directory.swap(&user, found.revision, Some(&left)).unwrap();
    until("the intent's end", async || hosts[0].daemon.existing(&user).unwrap().record.intent.is_none())
        .await;
    let view = hosts[0].show("alice?state=running&timeout=5s").await;
    assert_eq!((view.host.as_str(), view.term), ("h1", found.record.term));
    assert!(Arc::ptr_eq(&process, &hosts[0].machines.process("alice").unwrap()));
    let (status, reply) = hosts[0].call(&Call::new(Method::POST, "/v1/images/alice/stop")).await;
    assert_eq!(status, 200, "{reply}");
}

/// A directory that does not answer a few swaps of images.
struct Deaf {
    inner: Arc<dyn Directory>,
    left: std::sync::atomic::AtomicU32,
}

impl Directory for Deaf {
    fn get(&self, key: &str) -> Result<Option<kage_directory::Entry>, kage_directory::DirectoryError> {
        self.inner.get(key)
    }
    fn list(&self, prefix: &str) -> Result<kage_directory::Listing, kage_directory::DirectoryError> {
        self.inner.list(prefix)
    }
    fn compare_and_swap(
        &self,
        key: &str,
        expected: kage_directory::Revision,
        value: Option<&[u8]>,
    ) -> Result<kage_directory::Revision, kage_directory::DirectoryError> {
        use std::sync::atomic::Ordering::SeqCst;
        let one_less = |left: u32| left.checked_sub(1);
        if key.starts_with(<ImageRecord as kage_directory::Record>::PREFIX)
            && self.left.fetch_update(SeqCst, SeqCst, one_less).is_ok()
        {
            return Err(kage_directory::DirectoryError::Unreachable { reason: "deaf".into() });
        }
        self.inner.compare_and_swap(key, expected, value)
    }
    fn watch(
        &self,
        prefix: &str,
        after: kage_directory::Revision,
        timeout: Duration,
    ) -> Result<kage_directory::Changes, kage_directory::DirectoryError> {
        self.inner.watch(prefix, after, timeout)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_whose_swap_is_not_answered_is_tried_again() {
    let (site, mut hosts) = TestSite::new("life-deaf", 1).await;
    hosts[0].login("alice", json!({})).await;
    let (machines, net, embedded) = hosts.remove(0).kill();
    machines.process("alice").unwrap().kill("while nobody looked");
    // More often than a machine may die in a minute.
    let left = (decide::Restarts::MOST as u32 + 1).into();
    let deaf: Arc<dyn Directory> = Arc::new(Deaf { inner: embedded.unwrap(), left });
    let host = site.restart(0, (machines, net, Some(deaf))).await;
    let view = host.show("alice?state=running&timeout=20s").await;
    assert_eq!((view.host.as_str(), view.term.0), ("h1", 2));
    assert!(host.machines.runs("alice"));
}

#[tokio::test(flavor = "multi_thread")]
async fn asking_for_names_leaves_nothing_behind() {
    let (_site, hosts) = TestSite::new("life-names", 1).await;
    for number in 0..20 {
        let (status, _) = hosts[0].call(&Call::new(Method::GET, format!("/v1/images/nobody-{number}"))).await;
        assert_eq!(status, 404);
        let path = format!("/v1/images/nobody-{number}?state=running&timeout=20ms");
        assert_eq!(hosts[0].call(&Call::new(Method::GET, path)).await.0, 504);
    }
    assert_eq!(hosts[0].daemon.local().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_gets_what_its_image_needs_or_nothing_at_all() {
    let (_site, hosts) = TestSite::new("life-needs", 1).await;
    hosts[0].login("alice", json!({ "image": "roomy" })).await;
    let profile = hosts[0].daemon.existing(&"alice".parse().unwrap()).unwrap().record.profile;
    assert_eq!((profile.memory_bytes, profile.disk_bytes), (32 << 20, 2 << 20));
    // What this host cannot make leaves nothing behind that would stand in the way of another image.
    let put = Call::new(Method::PUT, "/v1/images/bob").json(&json!({ "image": "windows" }));
    assert_eq!(hosts[0].call(&put).await.0, 500);
    hosts[0].login("bob", json!({})).await;
}

/// The page that guests publish their next index in.
fn with_next_index(next: u64) -> kage_machine::PageBytes {
    let mut page = [0; kage_machine::PAGE_SIZE];
    let at = std::mem::offset_of!(kage_abi::resources::Resources, next_index);
    page[at..at + 8].copy_from_slice(&next.to_le_bytes());
    page
}

#[tokio::test(flavor = "multi_thread")]
async fn no_index_is_given_out_twice_however_late_a_machine_makes_something() {
    let (_site, hosts) = TestSite::new("life-indices", 1).await;
    let user: UserName = "alice".parse().unwrap();
    hosts[0].login("alice", json!({})).await;
    let page = kage_machine::PageIndex(
        (kage_abi::offset::RESOURCES / kage_machine::PAGE_SIZE as u64).try_into().unwrap(),
    );
    let process = hosts[0].machines.process("alice").unwrap();
    process.memory().write(page, &with_next_index(100));
    // It goes on making files until it is ended.
    process.at_end(move |memory| memory.write(page, &with_next_index(260)));
    assert_eq!(hosts[0].call(&Call::new(Method::POST, "/v1/images/alice/stop")).await.0, 200);
    assert_eq!(hosts[0].daemon.existing(&user).unwrap().record.indices.end, 260);
    hosts[0].login("alice", json!({})).await;
    assert_eq!(hosts[0].daemon.existing(&user).unwrap().record.indices.start, 260);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resource_that_may_be_left_out_is_not_said_to_be_gone() {
    use kage_abi::resources::table::{self, Entry, Facts, FileState};
    let (_site, hosts) = TestSite::new("life-omitted", 1).await;
    let entry =
        Entry { index: 3, facts: Facts::File { state: FileState::File, bytes: 9 }, text: "/etc/motd" };
    let with = |all| {
        let mut bytes = table::header(1, all).to_vec();
        table::write(&entry, |part| bytes.extend_from_slice(part));
        bytes
    };
    for (user, all, expected) in [("alice", 1, 404), ("bob", 9, 500)] {
        *hosts[0].machines.table.lock().unwrap() = with(all);
        hosts[0].login(user, json!({})).await;
        let record = hosts[0].daemon.existing(&user.parse().unwrap()).unwrap().record;
        let prefix = hosts[0].daemon.config.network.prefix;
        let vid =
            |index| Vid::new(prefix, record.number, kage_machine::identity::Kind::File, index).address();
        let place = |index| Call::new(Method::GET, format!("/v1/where/{}", vid(index)));
        let (status, body) = hosts[0].call(&place(3)).await;
        assert_eq!((status, &body["name"]), (200, &json!("/etc/motd")), "{body}");
        let (status, body) = hosts[0].call(&place(4)).await;
        assert_eq!(status, expected, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_device_reports_leads_nothing_astray() {
    let (_site, hosts) = TestSite::with("life-reports", 1, "ipv4 = \"10.77.0.0/24\"").await;
    let (_other, without) = TestSite::new("life-reports-6", 1).await;
    let (user, ap): (UserName, kage_machine::identity::ApName) =
        ("alice".parse().unwrap(), "ap-1".parse().unwrap());
    for address in ["192.168.1.10", "fd0d::5"] {
        let address = address.parse().unwrap();
        assert!(hosts[0].daemon.attach_device(address, &user, &ap, 1).unwrap());
        assert_eq!(without[0].daemon.attach_device(address, &user, &ap, 1).is_ok(), address.is_ipv6());
    }
    for address in [
        "10.77.0.5",
        "255.255.255.254",
        "240.1.2.3",
        "0.1.2.3",
        "169.254.0.1",
        "fd4b:6167:6500::1:0:0",
        "::1",
        "fe80::1",
    ] {
        let address = address.parse().unwrap();
        assert!(hosts[0].daemon.attach_device(address, &user, &ap, 1).is_err(), "{address}");
    }
    let devices = without[0].daemon.directory.read_all::<kage_directory::DeviceRecord>().unwrap().0;
    assert_eq!(devices.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ipv4_address_is_one_images_and_none_is_lost() {
    let (_site, hosts) = TestSite::with("life-ipv4", 1, "ipv4 = \"10.77.0.0/30\"").await;
    let daemon = &hosts[0].daemon;
    // A login that claimed an address and did not come to make its record.
    let claim = kage_directory::Ipv4Record { user: "alice".parse().unwrap() };
    let address = "10.77.0.2".parse().unwrap();
    daemon.directory.swap(&address, kage_directory::Revision::ABSENT, Some(&claim)).unwrap();
    assert_eq!(hosts[0].login("alice", json!({})).await.ipv4, Some(address));
    assert_eq!(hosts[0].login("bob", json!({})).await.ipv4, Some("10.77.0.1".parse().unwrap()));
    assert_eq!(hosts[0].login("carol", json!({})).await.ipv4, None, "there are two");
    assert_eq!(hosts[0].login("alice", json!({})).await.ipv4, Some(address));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_elsewhere_that_is_the_one_to_start_the_machine_leaves_it_where_others_find_it() {
    let (_site, hosts) = TestSite::new("life-second", 2).await;
    // A first login has made the record at h1, and was overtaken before it started the machine.
    hosts[0].login("alice", json!({})).await;
    let (user, directory) = ("bob".parse::<UserName>().unwrap(), &hosts[0].daemon.directory);
    let like = hosts[0].daemon.existing(&"alice".parse().unwrap()).unwrap().record;
    let number = kage_directory::allocate_image_number(&**directory).unwrap();
    let record = ImageRecord { number, ..like };
    directory.swap(&user, kage_directory::Revision::ABSENT, Some(&record)).unwrap();
    let second = hosts[1].login("bob", json!({ "at": "ap-2" })).await;
    assert_eq!((second.host.as_str(), second.found), ("h1", false), "{second:?}");
    let first = hosts[0].login("bob", json!({ "at": "ap-1" })).await;
    assert_eq!((first.host.as_str(), first.found), ("h1", true), "{first:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_machine_goes_to_where_its_user_logs_in() {
    let (_site, hosts) = TestSite::new("life-take", 3).await;
    let first = hosts[0].login("alice", json!({})).await;
    for (asked, at, to) in [(1, "ap-2", "h2"), (0, "ap-3", "h3"), (2, "h1", "h1")] {
        assert_eq!(hosts[0].call(&Call::new(Method::DELETE, "/v1/images/alice")).await.0, 200);
        let reply = hosts[asked].login("alice", json!({ "at": at })).await;
        assert_eq!((reply.host.as_str(), reply.found, reply.vid), (to, false, first.vid), "{reply:?}");
        let holders = hosts.iter().filter(|host| host.machines.runs("alice")).count();
        assert_eq!(holders, 1);
    }
    let record = hosts[0].daemon.existing(&"alice".parse().unwrap()).unwrap().record;
    assert_eq!((record.term.0, record.disk_origin), (4, None), "one swap each");
    // Whoever logs in at several places at once finds one machine.
    assert_eq!(hosts[0].call(&Call::new(Method::DELETE, "/v1/images/alice")).await.0, 200);
    let (a, b, c) = tokio::join!(
        hosts[0].login("alice", json!({ "at": "ap-1" })),
        hosts[1].login("alice", json!({ "at": "ap-2" })),
        hosts[2].login("alice", json!({ "at": "ap-3" }))
    );
    assert_eq!((&a.host, &a.host), (&b.host, &c.host));
    let holders = hosts.iter().filter(|host| host.machines.runs("alice")).count();
    assert_eq!(holders, 1);
}

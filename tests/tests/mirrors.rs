//! Mirrors of a machine that works: they hold what they claim, moves to them find everything, and they come and go with
//! their hosts and their machine.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    hash::{BuildHasher, RandomState},
    io::Write,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use kage::testbed::Cancel;
use kage_tests::{Site, lines, text};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Longest wait for mirrors to be as they should.
const PATIENCE: Duration = Duration::from_secs(30);

/// A mirror is nearly fresh that lacks no more than this of 64 MiB: what the load dirties in some seconds.
const NEARLY_FRESH: u64 = 12 << 20;

/// What a mirror that was made anew would have cost on the wire at least.
const COPIED_ANEW: u64 = 16_000_000;

/// Calls the API of a host's daemon.
fn api(site: &Site, host: &str, method: &str, path: &str, body: &Value) -> Value {
    let mut curl = Command::new("curl");
    curl.args([
        "-sS",
        "--fail-with-body",
        "-X",
        method,
        "-H",
        "Content-Type: application/json",
        "--unix-socket",
    ]);
    curl.arg(site.dir().join(host).join("run/host.sock"));
    curl.args(["-d", &body.to_string(), &format!("http://kage{path}")]);
    let output = curl.output().expect("curl is installed");
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{method} {path} at {host}: {said}{errors}{}", site.daemon_logs());
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{method} {path} at {host}: {error}: {said}"))
}

/// Keeps mirrors of alice's machine at exactly those hosts.
fn pin(site: &Site, hosts: &[&str]) {
    let _ = api(site, "h1", "POST", "/v1/images/alice/mirrors", &json!({ "hosts": hosts }));
}

/// The mirrors of alice's machine by host, with what each lacks.
fn mirrors(site: &Site) -> BTreeMap<String, u64> {
    let shown = site.show("alice");
    let replicas = shown["replicas"].as_array().expect("a list of replicas");
    let mirror = |replica: &Value| {
        assert_eq!(text(replica, "kind"), "mirror", "{shown}");
        assert!(replica["lag_ms"].as_f64().is_some_and(|lag| lag >= 0.0), "{shown}");
        (text(replica, "host").to_owned(), replica["missing_bytes"].as_u64().expect("bytes"))
    };
    let found: BTreeMap<_, _> = replicas.iter().map(mirror).collect();
    assert_eq!(found.len(), replicas.len(), "two mirrors at one host: {shown}");
    found
}

/// Waits until there are nearly fresh mirrors at exactly those hosts.
fn await_mirrors(site: &Site, hosts: &[&str]) {
    let wanted: BTreeSet<_> = hosts.iter().map(|host| (*host).to_owned()).collect();
    await_that(site, &format!("nearly fresh mirrors at {hosts:?}"), |found| {
        found.keys().cloned().collect::<BTreeSet<_>>() == wanted
            && found.values().all(|missing| *missing <= NEARLY_FRESH)
    });
}

fn await_that(site: &Site, what: &str, holds: impl Fn(&BTreeMap<String, u64>) -> bool) {
    let until = Instant::now() + PATIENCE;
    loop {
        let found = mirrors(site);
        if holds(&found) {
            return;
        }
        assert!(Instant::now() < until, "no {what}, but {found:?}{}", site.daemon_logs());
        // Freshness changes all the while, without an event.
        thread::sleep(Duration::from_millis(50));
    }
}

/// Has every mirror compared with its owner's memory, by digest; returns the epochs at which they were.
fn check(site: &Site, hosts: &[&str]) -> BTreeMap<String, String> {
    let answer = api(site, "h1", "POST", "/v1/images/alice/mirrors/check", &json!({}));
    let checked = answer.as_array().unwrap_or_else(|| panic!("no list: {answer}"));
    let mut epochs = BTreeMap::new();
    for mirror in checked {
        let digest =
            |name: &str| mirror[name].as_str().filter(|digest| !digest.is_empty()).map(str::to_owned);
        let owner = digest("owner_digest").unwrap_or_else(|| panic!("no digest of the owner's: {answer}"));
        assert_eq!(digest("mirror_digest"), Some(owner), "{answer}{}", site.daemon_logs());
        assert_eq!(mirror["scrubbed_wrong_pages"], 0, "{answer}");
        epochs.insert(text(mirror, "host").to_owned(), mirror["epoch"].to_string());
    }
    assert!(epochs.keys().eq(hosts.iter()), "checked {epochs:?} instead of {hosts:?}");
    epochs
}

/// A number below `bound`, another each time.
fn random(bound: u64) -> u64 {
    RandomState::new().hash_one(bound) % bound
}

/// Checks mirrors at random instants; what they are compared at must not stand still.
fn check_at_random_instants(site: &Site, hosts: &[&str], times: u32) {
    let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for _ in 0..times {
        thread::sleep(Duration::from_millis(random(300)));
        for (host, epoch) in check(site, hosts) {
            seen.entry(host).or_default().insert(epoch);
        }
    }
    assert!(
        seen.values().all(|epochs| epochs.len() > 1),
        "mirrors stood still: {seen:?}{}",
        site.daemon_logs()
    );
}

/// Bytes that a host has sent to mirrors since its daemon was started.
fn sent_to_mirrors(site: &Site, host: &str) -> u64 {
    let counts = site.figures(host, "kage_replica_bytes_total", "\"mirror\"");
    assert!(!counts.is_empty(), "{host} does not count what it sends to mirrors{}", site.daemon_logs());
    counts.iter().sum::<f64>() as u64
}

/// An upload over scp that lasts for some seconds.
struct Upload {
    scp: Child,
    digest: String,
}

impl Upload {
    fn start(site: &Site, address: &str) -> Self {
        let mut content = vec![0; 6 << 20];
        kage_abi::stream::Stream::new(11).fill(&mut content);
        let file = site.dir().join("upload");
        fs::write(&file, &content).unwrap();
        let digest = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
        let mut scp = site.client("scp", "alice");
        scp.args(["-q", "-l", "6000"]).arg(&file).arg(format!("alice@[{address}]:upload"));
        Self { scp: site.start("d1", scp.stderr(Stdio::inherit())), digest }
    }

    /// Waits for its end; what has arrived is what was sent.
    fn arrives(mut self, site: &Site, address: &str) {
        assert!(self.scp.wait().unwrap().success(), "the upload broke{}", site.daemon_logs());
        let sum = site.say("alice", address, "sum upload");
        assert!(sum.starts_with(&self.digest), "{sum}");
    }
}

/// The load, on a terminal, so that it can be interrupted as by a user.
struct Load {
    ssh: Child,
    said: Box<dyn Iterator<Item = String>>,
}

impl Load {
    fn start(site: &Site, address: &str) -> Self {
        let mut ssh = site.ssh("alice", address);
        let mut ssh = site.start("d1", ssh.args(["-tt", "dirty 30% 500/s"]).stdin(Stdio::piped()));
        let mut said = Box::new(lines(&mut ssh));
        let begun = said.next().expect("dirty says when its memory is filled");
        assert!(begun.starts_with("dirty:"), "{begun}");
        Self { ssh, said }
    }

    /// Ends it; nothing it had not rewritten has changed.
    fn is_whole(mut self) {
        assert!(self.ssh.try_wait().unwrap().is_none(), "the load's session ended");
        self.ssh.stdin.take().expect("a pipe").write_all(b"\x03").unwrap();
        let verdict = self.said.find(|line| line.contains("untouched pages")).expect("a verdict");
        assert!(verdict.contains(" whole"), "{verdict}");
        self.ssh.wait().unwrap();
    }
}

#[test]
fn mirrors_hold_what_they_claim_and_follow_their_machine_and_hosts() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address").to_owned();
    pin(&site, &["h2", "h3"]);
    let upload = Upload::start(&site, &address);
    let load = Load::start(&site, &address);
    await_mirrors(&site, &["h2", "h3"]);
    check_at_random_instants(&site, &["h2", "h3"], 6);

    // To a mirror: it finds everything, nothing breaks, and neither the other nor the former owner needs a new copy.
    let report = site.migrate("alice", "h2");
    assert_eq!((text(&report, "outcome"), text(&report, "replica_hit")), ("handed_over", "full"), "{report}");
    // Whoever owns it now was told nothing yet.
    pin(&site, &["h1", "h3"]);
    await_mirrors(&site, &["h1", "h3"]);
    let sent = sent_to_mirrors(&site, "h2");
    assert!(sent < COPIED_ANEW, "mirrors did not survive the move: {sent} bytes were sent to them");
    check_at_random_instants(&site, &["h1", "h3"], 3);
    upload.arrives(&site, &address);

    // A host that is lost loses its mirror, and gets another when it is back.
    site.kill_daemon("h3").unwrap();
    await_that(&site, "end of the mirror at h3", |found| !found.contains_key("h3"));
    site.start_daemon("h3", &Cancel::new().unwrap()).unwrap();
    await_mirrors(&site, &["h1", "h3"]);
    let _ = check(&site, &["h1", "h3"]);
    load.is_whole();

    let _ = site.json("h1", &["logout", "alice"]);
    await_that(&site, "end of all mirrors", BTreeMap::is_empty);
}

//! Operation of moves: a host is emptied under its users, and a move ends when it is told to.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use kage_tests::{Site, lines, text};
use serde_json::Value;

const IMAGES: usize = 12;
const SESSIONS: usize = 3;

fn user(number: usize) -> String {
    format!("user{number:02}")
}

#[test]
fn a_drained_host_is_empty_and_no_session_notices() {
    let site = Site::up(1);
    let logins: Vec<Value> = (0..IMAGES).map(|number| site.login(&user(number), "ap-1")).collect();
    let mut sessions: Vec<Child> = (0..SESSIONS)
        .map(|number| {
            let mut ssh = site.ssh(&user(number), text(&logins[number], "address"));
            site.start("d1", ssh.arg("count 15000"))
        })
        .collect();
    let counted: Vec<_> = sessions
        .iter_mut()
        .map(|session| {
            let mut lines = lines(session);
            assert_eq!(lines.next().as_deref(), Some("1"));
            thread::spawn(move || lines.collect::<Vec<_>>())
        })
        .collect();
    let gone = site.login("gone", "ap-1");
    let _ = site.json("h1", &["stop", "gone"]);

    // Asked of another host than the one that is emptied.
    let report = site.json("h2", &["host-drain", "h1"]);
    println!("{} ms, worst gap {} ms", report["total_ms"], report["worst_gap_ms"]);
    assert_eq!((&report["moved"], &report["stay"]), (&Value::from(IMAGES), &Value::from(0)), "{report}");
    assert_eq!(report["stopped"], Value::from(vec!["gone"]));
    let images = report["images"].as_array().unwrap();
    for image in images {
        assert_eq!(text(image, "outcome"), "handed_over", "{image}");
        assert_eq!(image["report"]["lost_frames"], 0, "{image}");
    }
    let shown = site.json("h3", &["ls"]);
    let shown = shown.as_array().unwrap();
    let at =
        |host: &str| shown.iter().filter(|view| view["host"] == host && view["state"] == "running").count();
    assert_eq!((at("h1"), at("h2") + at("h3")), (0, IMAGES), "{shown:?}");
    assert!(at("h2").abs_diff(at("h3")) <= 4, "{} at h2, {} at h3", at("h2"), at("h3"));
    for (mut session, counted) in sessions.into_iter().zip(counted) {
        let counted = counted.join().unwrap();
        assert!(session.wait().unwrap().success());
        let expected: Vec<_> = (2..=15_000).map(|number| number.to_string()).collect();
        assert!(counted == expected, "lines were lost, doubled or out of order");
    }
    let hosts = site.json("h1", &["hosts"]);
    assert_eq!((&hosts[0]["cordoned"], &hosts[1]["cordoned"]), (&Value::from(true), &Value::from(false)));

    // A stopped machine starts near its user, but not there; its disk comes along.
    let again = site.login("gone", "ap-1");
    assert_ne!(text(&again, "host"), "h1", "{again}");
    assert_eq!(text(&again, "address"), text(&gone, "address"));
    let _ = site.json("h1", &["host-uncordon", "h1"]);
    let waited = Instant::now();
    while text(&site.login("new", "ap-1"), "host") != "h1" {
        assert!(waited.elapsed() < Duration::from_secs(5), "the host takes no images");
        let _ = site.json("h1", &["stop", "new"]);
    }
}

/// A mirror would leave a move little to do.
fn keep_no_mirrors(site: &Site) {
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--fail", "-X", "POST", "-d", r#"{"hosts":[]}"#, "--unix-socket"]);
    curl.arg(site.dir().join("h1/run/host.sock")).arg("http://kage/v1/images/alice/mirrors");
    assert!(curl.output().expect("curl is installed").status.success());
}

/// A site on thin links with a machine whose memory takes its time, as long as that session lasts.
fn thin_site() -> (Site, Child) {
    let site = Site::with(|spec| {
        spec.devices = 1;
        spec.link.rate = Some("10mbit".parse().unwrap());
    });
    let login = site.login("alice", "ap-1");
    keep_no_mirrors(&site);
    let mut dirty = site.ssh("alice", text(&login, "address"));
    let mut dirty = site.start("d1", dirty.arg("dirty 1% 1").stdin(Stdio::piped()));
    assert!(lines(&mut dirty).next().is_some(), "dirty says when its memory is filled");
    (site, dirty)
}

/// Starts a move and waits until it tells that line.
fn moving(site: &Site, arguments: &[&str], until: &str) -> (Child, thread::JoinHandle<Vec<String>>) {
    let mut command = Command::new(kage_tests::program());
    command.args(["-o", "json", "migrate", "alice"]).args(arguments).stderr(Stdio::piped());
    let mut child = site.start("h1", &mut command);
    let mut told = BufReader::new(child.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
    let seen = told.by_ref().find(|line| line.contains(until));
    assert!(seen.is_some(), "it never came to {until:?}{}", site.daemon_logs());
    (child, thread::spawn(move || told.collect()))
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn a_move_on_a_thin_link_tells_how_far_it_is_and_is_cancelled_in_any_phase() {
    let (site, _dirty) = thin_site();
    // As early as can be; among the first pages; in the middle.
    for until in ["\"phase\"", "\"phase\":\"copy\"", "round 1"] {
        let (child, rest) = moving(&site, &["h2", "--verbose"], until);
        let begun = Instant::now();
        let cancelled = site.kage("h2", &["-o", "json", "migrate", "alice", "--cancel"]);
        let took = begun.elapsed();
        assert!(cancelled.status.success(), "at {until}: {}", String::from_utf8_lossy(&cancelled.stderr));
        let answer = json(&cancelled);
        println!("cancelled at {until} after {took:?}");
        assert_eq!(answer["cancelled"], true, "{answer}");
        assert!(took < Duration::from_secs(10), "all of it would take 17 s on this link: {took:?}");
        // Whoever began it is told so too.
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "at {until}: {:?}", rest.join());
        let report = json(&output);
        assert_eq!((text(&report, "outcome"), text(&report, "reason")), ("kept", "cancelled"), "{report}");
        // Twice is once.
        let again = site.kage("h1", &["migrate", "alice", "--cancel"]);
        assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
        let view = site.show("alice");
        assert_eq!((text(&view, "host"), text(&view, "state")), ("h1", "running"));
    }

    // ^C is a cancel, and its outcome is told.
    let (child, rest) = moving(&site, &["h2", "--verbose"], "round 1");
    let interrupted = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{:?}", rest.join());
    assert_eq!(text(&json(&output), "reason"), "cancelled");

    // A move that waits behind another is cancelled alone.
    let (first, told) = moving(&site, &["h2", "--verbose"], "\"phase\":\"copy\"");
    let (second, rest) = moving(&site, &["h3", "--verbose"], "\"phase\":\"wait\"");
    assert!(Command::new("kill").args(["-INT", &second.id().to_string()]).status().unwrap().success());
    let output = second.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told_so = rest.join().unwrap();
    assert!(told_so.iter().any(|line| line.contains("cancelled")), "{told_so:?}");

    // And the other goes on, tells how far it is at least each second or two, and ends.
    let begun = Instant::now();
    let output = first.wait_with_output().unwrap();
    assert!(output.status.success());
    let (took, told) = (begun.elapsed(), told.join().unwrap());
    let lines = told.iter().filter(|line| line.contains("pages") && line.contains(" sent")).count();
    println!("{lines} lines in {took:?}, the last {:?}", told.last());
    assert!(lines as u64 >= took.as_secs() / 2, "{told:?}");
    let late = site.kage("h1", &["migrate", "alice", "--cancel"]);
    assert_eq!(
        late.status.code(),
        Some(3),
        "nothing is under way: {}",
        String::from_utf8_lossy(&late.stderr)
    );
}

#[test]
fn a_cap_holds_over_all_rounds() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    keep_no_mirrors(&site);
    let mut dirty = site.ssh("alice", text(&login, "address"));
    let mut dirty = site.start("d1", dirty.arg("dirty 10% 200").stdin(Stdio::piped()));
    assert!(lines(&mut dirty).next().is_some(), "dirty says when its memory is filled");
    let report = site.json("h1", &["migrate", "alice", "h2", "--bandwidth", "20mbit"]);
    dirty.kill().unwrap();
    dirty.wait().unwrap();
    assert_eq!(text(&report, "outcome"), "handed_over", "{report}");
    let copy = report["phases"].as_array().unwrap().iter().find(|phase| phase["name"] == "copy").unwrap();
    let (bytes, ms) = (copy["bytes"].as_f64().unwrap(), copy["ms"].as_f64().unwrap());
    println!("{bytes} bytes in {ms} ms, {} rounds", report["rounds"]);
    // But for what may go at once in front of a round, and its last batch, which nothing waits behind.
    let burst = 330e3 * report["rounds"].as_f64().unwrap();
    assert!(bytes > 2.0 * burst, "{bytes} bytes say little");
    assert!(ms / 1e3 >= (bytes - burst) / 2.5e6, "{bytes} bytes in {ms} ms: more than 20 Mbit/s");
}

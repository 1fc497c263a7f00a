//! Daemons, machines and links that die in the middle of a move.

use std::{
    io::{BufRead, BufReader},
    os::unix::net::UnixStream,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use kage::testbed::Cancel;
use kage_tests::{Site, lines, text};
use serde_json::Value;

/// Phases of a move as its progress names them, in order.
const PHASES: [&str; 5] = ["prepare", "copy", "switch", "settle", "drain"];

/// Longest wait for everything to be settled after a fault.
const SETTLED: Duration = Duration::from_secs(20);

/// Whether the machine answers, and keeps the same connection answering.
fn answers(site: &Site, address: &str) -> bool {
    site.output("d1", site.ssh("alice", address).arg("true")).unwrap().status.success()
}

/// Counts over one SSH session while `fault` strikes during moves; the session must come out whole.
fn session_survives(ap: &str, fault: impl FnOnce(&Site) + Send) {
    let site = Site::with(|spec| {
        spec.devices = 1;
        spec.link.rate = Some("50mbit".parse().expect("a rate"));
    });
    let login = site.login("alice", ap);
    let address = text(&login, "address").to_owned();
    let mut count = site.start("d1", site.ssh("alice", &address).arg("count 12000"));
    let counted = lines(&mut count);
    let counting = thread::spawn(move || counted.collect::<Vec<_>>());
    fault(&site);
    assert!(count.wait().unwrap().success(), "the session broke{}", site.daemon_logs());
    let expected: Vec<_> = (1..=12_000).map(|number| number.to_string()).collect();
    assert!(counting.join().unwrap() == expected, "lines were lost or doubled");
    assert!(answers(&site, &address));
    assert_one_machine(&site);
}

/// Hosts on which a process holds alice's machine, or could: not those whose daemon keeps it as a mirror's shell. Such
/// a socket takes packets, which a stream's caller is told; one whose process has ended refuses.
fn holders(site: &Site) -> Vec<&'static str> {
    let held = |host: &&str| {
        let socket = site.dir().join(host).join("run/vmm/user-alice.sock");
        let lives = UnixStream::connect(socket).err().and_then(|error| error.raw_os_error())
            == Some(libc::EPROTOTYPE);
        lives && site.figures(host, "kage_images", "\"mirror\"") != [1.0]
    };
    ["h1", "h2", "h3"].into_iter().filter(held).collect()
}

/// Once all is settled one process holds the machine, and it is the owner's.
fn assert_one_machine(site: &Site) {
    let until = Instant::now() + SETTLED;
    loop {
        let shown = site.show("alice");
        let (owner, held) = (text(&shown, "host"), holders(site));
        if held == [owner] && text(&shown, "state") == "running" {
            return;
        }
        assert!(Instant::now() < until, "{shown}, held by {held:?}{}", site.daemon_logs());
        thread::sleep(Duration::from_millis(50));
    }
}

/// Moves alice from `from` to `to` and strikes once the move has come to `phase`. The report, unless the daemon that
/// was to give it is gone.
fn strike(site: &Site, from: &str, to: &str, phase: &str, strike: impl FnOnce()) -> Option<Value> {
    let wanted = PHASES.iter().position(|known| *known == phase).expect("a phase");
    let mut command = Command::new(kage_tests::program());
    command.args(["-o", "json", "migrate", "alice", to, "--verbose"]).stderr(Stdio::piped());
    let mut moving = site.start(from, &mut command);
    let mut told = BufReader::new(moving.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
    let reached = |line: &String| {
        PHASES.iter().position(|known| line.contains(known)).is_some_and(|position| position >= wanted)
    };
    let seen = told.by_ref().find(reached);
    strike();
    // Whoever does not read what it is told may keep the teller waiting.
    let rest = thread::spawn(move || told.collect::<Vec<_>>());
    let output = moving.wait_with_output().unwrap();
    let rest = rest.join().unwrap();
    let report = serde_json::from_slice::<Value>(&output.stdout).ok();
    println!("struck at {phase}, seen {seen:?}: {:?}", report.as_ref().map(|report| &report["outcome"]));
    // A move to a fresh mirror may be over before its last phases are told: then the fault strikes just behind it.
    let is_late = wanted > PHASES.iter().position(|known| *known == "copy").expect("a phase");
    let is_over = is_late && report.as_ref().is_some_and(|report| text(report, "outcome") == "handed_over");
    assert!(seen.is_some() || is_over, "the move never came to {phase}: {rest:?}{}", site.daemon_logs());
    if let Some(report) = &report
        && text(report, "outcome") != "handed_over"
    {
        assert!(report["reason"].is_string(), "no reason is given: {report}");
    }
    report
}

#[test]
fn a_target_daemon_killed_in_any_phase_of_a_move_costs_nothing() {
    for phase in PHASES {
        session_survives("ap-1", |site| {
            let report = strike(site, "h1", "h2", phase, || {
                site.kill_daemon("h2").unwrap();
                site.start_daemon("h2", &Cancel::new().unwrap()).unwrap();
            });
            assert!(report.is_some(), "the source said nothing{}", site.daemon_logs());
        });
    }
}

#[test]
fn a_source_and_directory_daemon_killed_in_any_phase_of_a_move_costs_nothing() {
    for phase in PHASES {
        session_survives("ap-1", |site| {
            let _ = strike(site, "h1", "h2", phase, || site.kill_daemon("h1").unwrap());
            site.start_daemon("h1", &Cancel::new().unwrap()).unwrap();
        });
    }
}

#[test]
fn a_directory_daemon_killed_in_any_phase_of_a_move_between_others_costs_nothing() {
    for phase in PHASES {
        session_survives("ap-2", |site| {
            let _ = strike(site, "h2", "h3", phase, || {
                site.kill_daemon("h1").unwrap();
                site.start_daemon("h1", &Cancel::new().unwrap()).unwrap();
            });
        });
    }
}

#[test]
fn a_cut_link_in_the_middle_of_a_move_costs_nothing() {
    for phase in ["copy", "switch"] {
        session_survives("ap-1", |site| {
            let _ = strike(site, "h1", "h2", phase, || {
                site.set_link("h2", false).unwrap();
                thread::sleep(Duration::from_secs(1));
                site.set_link("h2", true).unwrap();
            });
        });
    }
}

#[test]
fn a_restarted_daemon_adopts_its_machines() {
    session_survives("ap-1", |site| {
        site.kill_daemon("h1").unwrap();
        site.start_daemon("h1", &Cancel::new().unwrap()).unwrap();
        let report = site.migrate("alice", "h2");
        assert_eq!(text(&report, "outcome"), "handed_over");
        // The tap came to the new daemon with the machine, or what waited in it would be lost and not counted.
        assert_eq!(report["lost_frames"], 0, "{report}");
    });
}

#[test]
fn a_killed_machine_is_restarted_with_its_identity() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address").to_owned();
    assert!(answers(&site, &address));
    let pid = site.show("alice")["pid"].as_u64().expect("the process of a running machine");
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
    let waited = site.kage("h1", &["wait", "alice", "--state", "running", "--timeout", "10s"]);
    assert!(waited.status.success());
    // The client refuses another host key than the one it saw first.
    let mut tries = 0;
    while !answers(&site, &address) {
        tries += 1;
        assert!(tries < 10, "the machine does not come back{}", site.daemon_logs());
    }
    let events = site.kage("h1", &["events"]);
    assert!(String::from_utf8_lossy(&events.stdout).contains("restarted"));
    let shown = site.show("alice");
    assert_eq!(text(&shown, "vid"), text(&login, "vid"));
}

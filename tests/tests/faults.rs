//! Daemons, machines and links that die in the middle of a move.

use std::{process::Command, thread, time::Duration};

use kage::testbed::Cancel;
use kage_tests::{Site, lines, text};

/// Whether the machine answers, and keeps the same connection answering.
fn answers(site: &Site, address: &str) -> bool {
    site.output("d1", site.ssh("alice", address).arg("true")).unwrap().status.success()
}

/// Counts over one SSH session while `fault` strikes during moves; the session must come out whole.
fn session_survives(fault: impl FnOnce(&Site) + Send) {
    let site = Site::with(|spec| {
        spec.devices = 1;
        spec.link.rate = Some("50mbit".parse().expect("a rate"));
    });
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address").to_owned();
    let mut count = site.start("d1", site.ssh("alice", &address).arg("count 12000"));
    let counted = lines(&mut count);
    let counting = thread::spawn(move || counted.collect::<Vec<_>>());
    fault(&site);
    assert!(count.wait().unwrap().success(), "the session broke{}", site.daemon_logs());
    let expected: Vec<_> = (1..=12_000).map(|number| number.to_string()).collect();
    assert!(counting.join().unwrap() == expected, "lines were lost or doubled");
    assert!(answers(&site, &address));
}

/// Starts a move to `h2` and strikes after `delay`.
fn strike_during_move(site: &Site, delay: Duration, strike: impl FnOnce()) {
    let mut command = Command::new(kage_tests::program());
    command.args(["-o", "json", "migrate", "alice", "h2"]);
    let mut moving = site.start("h1", &mut command);
    // The delay places the fault, it waits for nothing: any phase may be the one that is hit.
    thread::sleep(delay);
    strike();
    let _ = moving.wait();
}

#[test]
fn a_target_daemon_killed_at_any_time_of_a_move_costs_nothing() {
    for delay in [0, 20, 60, 120, 250] {
        session_survives(|site| {
            strike_during_move(site, Duration::from_millis(delay), || site.kill_daemon("h2").unwrap());
            site.start_daemon("h2", &Cancel::new().unwrap()).unwrap();
        });
    }
}

#[test]
fn a_source_and_directory_daemon_killed_at_any_time_of_a_move_costs_nothing() {
    for delay in [0, 20, 60, 120, 250] {
        session_survives(|site| {
            strike_during_move(site, Duration::from_millis(delay), || site.kill_daemon("h1").unwrap());
            site.start_daemon("h1", &Cancel::new().unwrap()).unwrap();
        });
    }
}

#[test]
fn a_cut_link_in_the_middle_of_a_move_costs_nothing() {
    for delay in [20, 120] {
        session_survives(|site| {
            strike_during_move(site, Duration::from_millis(delay), || {
                site.set_link("h2", false).unwrap();
                thread::sleep(Duration::from_secs(1));
                site.set_link("h2", true).unwrap();
            });
        });
    }
}

#[test]
fn a_restarted_daemon_adopts_its_machines() {
    session_survives(|site| {
        site.kill_daemon("h1").unwrap();
        site.start_daemon("h1", &Cancel::new().unwrap()).unwrap();
        let report = site.migrate("alice", "h2");
        assert_eq!(text(&report, "outcome"), "handed_over");
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

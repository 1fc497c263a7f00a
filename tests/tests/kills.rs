//! Files in machines and daemons that are killed: what was said to be safe is there.

use std::{
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use kage::testbed::Cancel;
use kage_tests::{Site, lines, text};

/// Longest wait for a machine to be back, or a record to be told.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    /// The process that holds the machine.
    Machine,
    /// The host's daemon.
    Daemon,
    /// Both, the machine first.
    Both,
}

fn kill_machine(site: &Site, host: &str) {
    let shown = site.json(host, &["show", "alice"]);
    let pid = shown["pid"].as_u64().unwrap_or_else(|| panic!("no process in {shown}")).to_string();
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
}

/// Runs a line as soon as the machine takes it.
fn say_when_back(site: &Site, address: &str, line: &str) -> String {
    let until = Instant::now() + PATIENCE;
    loop {
        let mut ssh = site.ssh("alice", address);
        ssh.args(["-o", "ConnectTimeout=2", "-o", "ServerAliveInterval=2", line]).stdin(Stdio::null());
        let output = site.output("d1", &mut ssh).unwrap();
        // 255 is ssh's own word for a connection that failed.
        if output.status.code() != Some(255) {
            let (said, errors) =
                (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "{line}: {said}{errors}{}", site.daemon_logs());
            return said.into_owned();
        }
        assert!(Instant::now() < until, "the machine does not come back{}", site.daemon_logs());
    }
}

#[test]
fn nothing_that_was_said_to_be_safe_is_lost_in_twenty_kills() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address");
    let mut told = 0;
    for round in 0..20 {
        let victim = match round % 4 {
            0 | 2 => Victim::Machine,
            1 => Victim::Daemon,
            _ => Victim::Both,
        };
        let mut load =
            site.start("d1", site.ssh("alice", address).arg("work file append records").stdin(Stdio::null()));
        let (tell, hear) = mpsc::channel();
        let output = lines(&mut load);
        let reading = thread::spawn(move || {
            for line in output {
                // Nobody listens any more once the kill is over.
                let _ = tell.send(line.parse::<u64>().expect("a number"));
            }
        });
        // Not always after the same number of records.
        for _ in 0..10 + round * 7 % 29 {
            told = hear
                .recv_timeout(PATIENCE)
                .unwrap_or_else(|_| panic!("nothing is told{}", site.daemon_logs()));
        }
        if victim != Victim::Daemon {
            kill_machine(&site, "h1");
        }
        if victim != Victim::Machine {
            site.kill_daemon("h1").unwrap();
            site.start_daemon("h1", &Cancel::new().unwrap()).unwrap();
        }
        if victim == Victim::Daemon {
            // Its machines do not notice: more is told.
            told = hear
                .recv_timeout(PATIENCE)
                .unwrap_or_else(|_| panic!("the load ended{}", site.daemon_logs()));
        }
        // A machine that is gone says nothing more, not even that.
        load.kill().unwrap();
        load.wait().unwrap();
        reading.join().unwrap();
        told = hear.try_iter().last().unwrap_or(told);
        let there: u64 =
            say_when_back(&site, address, "work file verify records").trim().parse().expect("a count");
        assert!(there > told, "round {round}, {victim:?}: record {told} was told, {there} are there");
        assert_eq!(
            say_when_back(&site, address, "fsck -a").trim(),
            "all is well",
            "round {round}, {victim:?}"
        );
        println!("round {round}, {victim:?}: {told} was told, {there} are there");
    }
}

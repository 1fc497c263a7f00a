//! The main job: a machine moves from host to host under its user, and nothing the user has open notices.

use std::{
    collections::BTreeSet,
    fs,
    process::{Command, Stdio},
    thread,
};

use kage_tests::{Site, lines, text, walk};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of what `/stream?bytes=N&seed=S` sends.
fn stream_hash(bytes: u64, seed: u64) -> String {
    let mut hasher = Sha256::new();
    let mut stream = kage_abi::stream::Stream::new(seed);
    let mut left = bytes;
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        let take = left.min(buffer.len() as u64) as usize;
        stream.fill(&mut buffer[..take]);
        hasher.update(&buffer[..take]);
        left -= take as u64;
    }
    hex(&hasher.finalize())
}

#[test]
fn an_ssh_session_and_a_download_survive_ten_moves() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address");

    let mut count = site.start("d1", site.ssh("alice", address).arg("count 20000"));
    let counted = lines(&mut count);
    let counting = thread::spawn(move || counted.collect::<Vec<_>>());

    let (bytes, seed) = (60_000_000, 7);
    let file = site.dir().join("download");
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--fail", "-g", "--limit-rate", "4M", "-o"]).arg(&file);
    curl.arg(format!("http://[{address}]/stream?bytes={bytes}&seed={seed}"));
    let mut download = site.start("d1", &mut curl);

    for host in walk(10) {
        let report = site.migrate("alice", host);
        assert_eq!(text(&report, "outcome"), "handed_over", "{report}");
        assert_eq!(report["lost_frames"], 0, "{report}");
        println!("to {host}: blackout {} ms, {} bytes", report["blackout_ms"], report["bytes_wire"]);
    }

    assert!(count.wait().unwrap().success());
    let counted = counting.join().unwrap();
    let expected: Vec<_> = (1..=20_000).map(|number| number.to_string()).collect();
    assert!(counted == expected, "lines were lost, doubled or out of order");
    assert!(download.wait().unwrap().success());
    assert_eq!(hex(&Sha256::digest(fs::read(&file).unwrap())), stream_hash(bytes, seed));
}

#[test]
fn no_ping_is_lost_in_twenty_moves() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let mut ping = Command::new("ping");
    ping.args(["-6", "-D", "-i", "0.001", "-W", "2", text(&login, "address")]);
    let mut ping = site.start("d1", &mut ping);
    let answers = lines(&mut ping);
    let collecting = thread::spawn(move || answers.collect::<Vec<_>>());
    let mut blackouts = Vec::new();
    for host in walk(20) {
        let report = site.migrate("alice", host);
        assert_eq!(text(&report, "outcome"), "handed_over", "{report}");
        blackouts.push(report["blackout_ms"].as_f64().unwrap());
    }
    // ping prints its summary on SIGINT.
    let interrupted = Command::new("kill").args(["-INT", &ping.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    ping.wait().unwrap();
    let output = collecting.join().unwrap();
    for line in output.iter().filter(|line| line.starts_with("From ")) {
        println!("{line}");
    }
    let summary = output.iter().find(|line| line.contains("packets transmitted")).expect("a summary");
    let numbers: Vec<u64> = summary.split(' ').filter_map(|word| word.parse().ok()).collect();
    blackouts.sort_by(f64::total_cmp);
    // `-D` puts the time of each answer in front: the silences the device saw.
    let times =
        output.iter().filter_map(|line| line.strip_prefix('[')?.split(']').next()?.parse::<f64>().ok());
    let times: Vec<_> = times.collect();
    let mut gaps: Vec<_> = times.windows(2).map(|pair| (pair[1] - pair[0]) * 1e3).collect();
    gaps.sort_by(f64::total_cmp);
    let (median, most) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
    println!("{summary}; blackout median {} ms, most {} ms", blackouts[10], blackouts[19]);
    println!("gap between answers: median {median:.2} ms, most {most:.2} ms");
    // The last request may still be on its way when ping is interrupted.
    assert!(numbers[0] - numbers[1] <= 1, "{summary}");
    assert!(numbers[0] > 1000, "{summary}");
}

#[test]
fn a_machine_under_load_moves_twenty_times_byte_for_byte() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address").to_owned();
    let mut dirty = site.start("d1", site.ssh("alice", &address).arg("dirty 30% 500").stdin(Stdio::piped()));
    let mut said = lines(&mut dirty);
    let begun = said.next().expect("dirty says when its memory is filled");
    for host in walk(20) {
        // The target compares the hash of all memory and disk with the source's, and refuses where it differs.
        let report = site.json("h1", &["migrate", "alice", host, "--verify"]);
        assert_eq!(text(&report, "outcome"), "handed_over", "{report}");
    }
    let uptime = site.output("d1", site.ssh("alice", &address).arg("uptime")).unwrap();
    assert!(uptime.status.success(), "after {begun}");
    dirty.kill().unwrap();
    dirty.wait().unwrap();
}

#[test]
fn a_running_sum_is_the_same_moved_and_unmoved() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address").to_owned();
    let mut stream = kage_abi::stream::Stream::new(3);
    let mut content = vec![0; 24 << 20];
    stream.fill(&mut content);
    let file = site.dir().join("content");
    fs::write(&file, &content).unwrap();
    let mut sum = site.ssh("alice", &address);
    sum.arg("sum").stdin(fs::File::open(&file).unwrap());
    let mut sum = site.start("d1", &mut sum);
    for host in walk(4) {
        assert_eq!(text(&site.migrate("alice", host), "outcome"), "handed_over");
    }
    let said = lines(&mut sum).next().expect("a sum");
    assert!(sum.wait().unwrap().success());
    assert!(said.starts_with(&hex(&Sha256::digest(&content))), "{said}");
}

#[test]
fn the_machine_follows_its_device_from_access_point_to_access_point() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    assert_eq!(text(&login, "host"), "h1");
    let address = text(&login, "address").to_owned();
    let mut count = site.start("d1", site.ssh("alice", &address).arg("count 6000"));
    let counted = lines(&mut count);
    let counting = thread::spawn(move || counted.collect::<Vec<_>>());
    for (ap, host) in [("ap-2", "h2"), ("ap-3", "h3"), ("ap-1", "h1")] {
        site.move_device("d1", ap, false).unwrap();
        let waited =
            site.kage("h1", &["wait", "alice", "--state", "running", "--at", host, "--timeout", "10s"]);
        assert!(waited.status.success(), "at {ap}: {}", String::from_utf8_lossy(&waited.stderr));
    }
    assert!(count.wait().unwrap().success());
    assert_eq!(counting.join().unwrap().len(), 6000);
    // What was learned on the way came along, and any host tells it.
    let view = site.json("h2", &["predict", "alice"]);
    assert_eq!((text(&view, "at"), &view["window"]), ("ap-1", &Value::from(3)), "{view}");
    for field in ["user", "next", "hosts", "left_s", "hit1", "hit3"] {
        assert!(view.get(field).is_some(), "{field} is missing: {view}");
    }
}

#[test]
fn identity_is_the_same_after_moves_and_a_restart() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address").to_owned();
    let run = |line: &str| {
        // The client keeps the key it saw first and refuses another.
        let output = site.output("d1", site.ssh("alice", &address).arg(line)).unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let _ = run("echo remembered > /tmp/note");
    for host in walk(3) {
        let _ = site.migrate("alice", host);
    }
    assert_eq!(run("cat /tmp/note").trim(), "remembered");
    let shown = site.show("alice");
    assert_eq!((text(&shown, "vid"), text(&shown, "address")), (text(&login, "vid"), address.as_str()));
    let _ = site.json("h1", &["stop", "alice"]);
    let _ = site.json("h1", &["start", "alice"]);
    let _ = run("uptime");
    assert_eq!(text(&site.show("alice"), "vid"), text(&login, "vid"));
}

#[test]
fn machines_share_no_key_and_no_randomness() {
    let site = Site::up(1);
    let mut seen = Vec::new();
    for user in ["alice", "bob"] {
        let login = site.login(user, "ap-1");
        let address = text(&login, "address").to_owned();
        let mut scan = Command::new("ssh-keyscan");
        let scan = site.output("d1", scan.args(["-T", "10", "-t", "ed25519", &address])).unwrap();
        let key = String::from_utf8_lossy(&scan.stdout).split(' ').next_back().unwrap_or_default().to_owned();
        assert!(key.len() > 60, "{}", String::from_utf8_lossy(&scan.stderr));
        // The server's greeting and the start of its first packet, with 16 random bytes.
        let mut greeting = Command::new("bash");
        greeting.args(["-c", &format!("exec 3<>/dev/tcp/{address}/22; head -c 64 <&3")]);
        let greeting = site.output("d1", &mut greeting).unwrap().stdout;
        assert_eq!(greeting.len(), 64);
        seen.push((key, greeting));
    }
    assert_ne!(seen[0].0, seen[1].0, "host keys");
    assert_ne!(seen[0].1, seen[1].1, "cookies of the key exchange");
}

#[test]
fn a_move_reports_every_field() {
    let site = Site::up(1);
    let _ = site.login("alice", "ap-1");
    let report = site.migrate("alice", "h2");
    let wanted: BTreeSet<_> = "user from to mode outcome reason term total_ms blackout_ms gap_ms stall_ms clock_error_us \
         rounds pages_sent pages_at_switch bytes_wire bytes_raw faults fault_wait_ms forwarded_frames reordered_frames \
         lost_frames lost_pages replica_hit phases"
        .split_whitespace()
        .collect();
    let found: BTreeSet<_> = report.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(wanted.difference(&found).collect::<Vec<_>>(), Vec::<&&str>::new());
    assert!(report["gap_ms"].as_f64().unwrap() >= report["blackout_ms"].as_f64().unwrap(), "{report}");
    assert_eq!(report["faults"], 0);
    let phase =
        |phase: &Value| phase["name"].is_string() && phase["ms"].is_number() && phase["bytes"].is_number();
    assert!(report["phases"].as_array().unwrap().iter().all(phase));
}

//! Files follow their machine: copied while it moves, found again at another host, and never silently wrong.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use kage_tests::{Site, program, text, walk};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Longest wait for what a host does in the background.
const SETTLED: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;
/// What every block of a marked file begins with.
const MARK: &[u8; 16] = b"kage marked bloc";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hash(path: &Path) -> String {
    hex(&Sha256::digest(fs::read(path).unwrap()))
}

/// A file of the test's with bytes that look random.
fn content(site: &Site, name: &str, bytes: usize) -> PathBuf {
    let mut content = vec![0; bytes];
    kage_abi::stream::Stream::new(bytes as u64).fill(&mut content);
    let path = site.dir().join(name);
    fs::write(&path, content).unwrap();
    path
}

/// SHA-256 of a file in the machine.
fn sum(site: &Site, address: &str, path: &str) -> String {
    let said = site.say("alice", address, &format!("sum {path}"));
    said.split(' ').next().unwrap_or_default().to_owned()
}

/// Writes a file of the test's into the machine and has it synced.
fn put(site: &Site, address: &str, file: &Path, path: &str) {
    let mut ssh = site.ssh("alice", address);
    ssh.arg(format!("cat > {path}; sync")).stdin(File::open(file).unwrap());
    let output = site.output("d1", &mut ssh).unwrap();
    assert!(output.status.success(), "{path}: {}", said(&output));
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// VIDs of the files below a directory, by path.
fn vids(site: &Site, below: &str) -> BTreeMap<String, String> {
    let files = site.json("h1", &["files", "alice"]);
    let all = files.as_array().unwrap().iter().map(|file| (text(file, "path"), text(file, "vid")));
    all.filter(|(path, _)| path.starts_with(below))
        .map(|(path, vid)| (path.to_owned(), vid.to_owned()))
        .collect()
}

/// Moves the machine while a client runs, at least so often and at most as there are hosts; the client then has to end
/// well.
fn move_while(site: &Site, mut client: Child, least: usize, hosts: &mut impl Iterator<Item = &'static str>) {
    let mut moves = 0;
    while client.try_wait().unwrap().is_none()
        && let Some(host) = hosts.next()
    {
        let report = site.migrate("alice", host);
        assert_eq!(text(&report, "outcome"), "handed_over", "{report}");
        moves += 1;
    }
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "{}{}", said(&output), site.daemon_logs());
    assert!(moves >= least, "over after {moves} moves");
}

#[test]
fn a_hundred_megabytes_go_up_by_scp_and_down_by_sftp_during_five_moves() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address");
    let file = content(&site, "content", 100_000_000);

    // At 12.5 MB a second, so that the moves are within.
    let mut scp = site.client("scp", "alice");
    scp.args(["-s", "-q", "-l", "100000"]).arg(&file).arg(format!("alice@[{address}]:content"));
    let up = site.start("d1", scp.stderr(Stdio::piped()));
    move_while(&site, up, 3, &mut walk(3));
    let expected = hash(&file);
    assert_eq!(sum(&site, address, "content"), expected, "in the machine");

    let back = site.dir().join("back");
    let mut sftp = site.client("sftp", "alice");
    sftp.args(["-q", "-l", "100000"]).arg(format!("alice@[{address}]:content")).arg(&back);
    let down = site.start("d1", sftp.stderr(Stdio::piped()));
    move_while(&site, down, 2, &mut ["h2", "h3"].into_iter());
    assert_eq!(hash(&back), expected, "back again");
    assert_eq!(site.say("alice", address, "fsck -a").trim(), "all is well");
}

/// Logs alice out, and in at an access point; returns the answer.
fn log_in_again(site: &Site, ap: &str) -> Value {
    let output = site.kage("h1", &["logout", "alice"]);
    assert!(output.status.success(), "{}", said(&output));
    let login = site.login("alice", ap);
    println!("at {ap}: started after {} ms, lacking {}", login["started_ms"], login["disk_missing_bytes"]);
    login
}

/// Waits until nothing of alice's disk is elsewhere; returns what was pulled.
fn whole(site: &Site) -> u64 {
    let until = Instant::now() + SETTLED;
    loop {
        let shown = site.show("alice");
        let disk = &shown["disk"];
        if disk["origin"].is_null() && disk["missing_bytes"] == 0 {
            return disk["pulled_bytes"].as_u64().unwrap_or_else(|| panic!("no pulled_bytes in {shown}"));
        }
        assert!(Instant::now() < until, "{shown}{}", site.daemon_logs());
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn files_are_there_at_the_next_login_anywhere_and_only_what_changed_comes_back() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address");
    let (large, other) = (content(&site, "large", 40 << 20), content(&site, "other", 1 << 20));
    put(&site, address, &large, "large");
    site.say("alice", address, "mkdir notes; echo remember > notes/one; echo and > notes/two; sync");
    let (expected, before) = (hash(&large), vids(&site, "/home/alice"));
    assert!(before.len() >= 4, "{before:?}");

    let login = log_in_again(&site, "ap-2");
    assert_eq!((text(&login, "host"), text(&login, "address")), ("h2", address));
    // Read while most of it is still on its way.
    assert_eq!(site.say("alice", address, "cat notes/one"), "remember\n");
    assert_eq!(sum(&site, address, "large"), expected);
    assert_eq!(vids(&site, "/home/alice"), before, "files keep their identities");
    let pulled = whole(&site);
    println!("the other host pulled {pulled} bytes");
    assert!(pulled >= 40 << 20, "{pulled}");

    put(&site, address, &other, "other");
    site.say("alice", address, "rm notes/two; sync");
    let login = log_in_again(&site, "ap-1");
    assert_eq!(text(&login, "host"), "h1");
    assert_eq!(sum(&site, address, "large"), expected);
    assert_eq!(sum(&site, address, "other"), hash(&other));
    let pulled = whole(&site);
    println!("the first host pulled {pulled} bytes when its user was back");
    assert!((1 << 20..8 << 20).contains(&pulled), "{pulled}");
    assert_eq!(site.say("alice", address, "fsck -a").trim(), "all is well");
    let after = vids(&site, "/home/alice/notes");
    assert_eq!(after.keys().collect::<Vec<_>>(), ["/home/alice/notes", "/home/alice/notes/one"]);
    assert!(after.iter().all(|(path, vid)| before.get(path) == Some(vid)), "{after:?} {before:?}");
}

/// A file of which every block can be told from all others on a host's disk.
fn marked(site: &Site) -> PathBuf {
    let mut bytes = Vec::new();
    for number in 0..256u32 {
        let mut block = [0x6b; BLOCK];
        block[..16].copy_from_slice(MARK);
        block[16..20].copy_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(&block);
    }
    let path = site.dir().join("marked");
    fs::write(&path, bytes).unwrap();
    path
}

/// Flips a bit in some marked blocks that a host keeps, wherever it keeps them; how many.
fn corrupt(site: &Site, host: &str) -> usize {
    let mut left = vec![site.dir().join(host).join("state")];
    let mut flipped = 0;
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let Ok(file) = File::options().read(true).write(true).open(&path) else { continue };
        let mut chunk = vec![0; 8 << 20];
        let mut at = 0;
        loop {
            let read = file.read_at(&mut chunk, at).unwrap();
            if read == 0 {
                break;
            }
            // The log's records, and so the blocks, begin at sectors.
            for sector in (0..read).step_by(512) {
                let number = chunk.get(sector + 16).copied().unwrap_or_default();
                if chunk[sector..read].starts_with(MARK) && number % 64 == 7 {
                    file.write_all_at(&[0x6a], at + sector as u64 + 100).unwrap();
                    flipped += 1;
                }
            }
            at += read as u64;
        }
        file.sync_all().unwrap();
    }
    flipped
}

#[test]
fn a_corrupt_block_is_repaired_from_a_host_that_had_the_disk() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address");
    let file = marked(&site);
    put(&site, address, &file, "marked");
    assert_eq!(text(&site.migrate("alice", "h2"), "outcome"), "handed_over");
    let flipped = corrupt(&site, "h2");
    assert!(flipped >= 4, "only {flipped} blocks of the file are at h2");
    let report = site.json("h2", &["scrub", "alice"]);
    println!("{report}");
    let count = |field: &str| report[field].as_u64().unwrap_or_else(|| panic!("no {field} in {report}"));
    assert!(count("corrupt_blocks") >= 4 && count("checked_bytes") >= 1 << 20, "{report}");
    assert_eq!((count("repaired_blocks"), count("lost_blocks")), (count("corrupt_blocks"), 0), "{report}");
    // From the disk, and not from what the machine remembers.
    let login = log_in_again(&site, "ap-2");
    assert_eq!(text(&login, "host"), "h2");
    assert_eq!(sum(&site, address, "marked"), hash(&file));
    let again = site.json("h2", &["scrub", "alice"]);
    assert_eq!(again["corrupt_blocks"], 0, "{again}");
}

#[test]
fn a_corrupt_block_that_nobody_else_has_is_an_error_and_its_file_is_named() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address");
    let file = marked(&site);
    put(&site, address, &file, "marked");
    site.say("alice", address, "echo fine > other; sync");
    let output = site.kage("h1", &["logout", "alice"]);
    assert!(output.status.success(), "{}", said(&output));
    assert!(corrupt(&site, "h1") >= 4);
    let login = site.login("alice", "ap-1");
    assert_eq!(text(&login, "host"), "h1");
    let read = site.output("d1", site.ssh("alice", address).arg("sum marked").stdin(Stdio::null())).unwrap();
    assert!(!read.status.success(), "what is not what was written was read: {}", said(&read));
    assert_eq!(site.say("alice", address, "cat other"), "fine\n");
    let output = site.kage("h1", &["-o", "json", "scrub", "alice"]);
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", said(&output)));
    println!("{report}");
    assert!(report["lost_blocks"].as_u64().is_some_and(|lost| lost >= 4), "{report}");
    let files = report["files"].as_array().unwrap_or_else(|| panic!("no files in {report}"));
    assert_eq!(
        files.iter().filter_map(Value::as_str).collect::<Vec<_>>(),
        ["/home/alice/marked"],
        "{report}"
    );
}

/// Starts `kage` at a host.
fn start(site: &Site, host: &str, arguments: &[&str]) -> Child {
    let mut command = Command::new(program());
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::piped());
    site.start(host, &mut command)
}

#[test]
fn the_operator_copies_and_runs_commands_through_moves() {
    // Slow enough that moves are within.
    let site = Site::with(|spec| {
        spec.devices = 1;
        spec.link.rate = Some("200mbit".parse().expect("a rate"));
    });
    let login = site.login("alice", "ap-1");
    assert_eq!(text(&site.migrate("alice", "h2"), "outcome"), "handed_over");
    let file = content(&site, "content", 40_000_000);
    let (from, back) = (file.display().to_string(), site.dir().join("back"));
    // One way for both copies: how many moves the first takes is not known.
    let mut around = ["h3", "h2"].into_iter().cycle();
    move_while(&site, start(&site, "h1", &["--quiet", "cp", &from, "alice:content"]), 1, &mut around);
    let count = start(&site, "h1", &["exec", "alice", "--", "count", "3000"]);
    let counting = thread::spawn(move || count.wait_with_output().unwrap());
    let to = back.display().to_string();
    move_while(&site, start(&site, "h1", &["-o", "json", "cp", "alice:content", &to]), 1, &mut around);
    assert_eq!(hash(&back), hash(&file));
    let counted = counting.join().unwrap();
    assert!(counted.status.success(), "{}", said(&counted));
    let expected: String = (1..=3000).map(|number| format!("{number}\n")).collect();
    assert!(String::from_utf8_lossy(&counted.stdout) == expected, "lines were lost or doubled");
    assert_eq!(sum(&site, text(&login, "address"), "content"), hash(&file));
}

#[test]
fn the_operator_is_told_what_a_command_or_a_copy_came_to() {
    let site = Site::up(1);
    let nobody = site.kage("h1", &["exec", "alice", "--", "true"]);
    assert_eq!(nobody.status.code(), Some(3), "{}", said(&nobody));
    let login = site.login("alice", "ap-1");
    // Also from outside the host's namespace: where its daemon is, the machine is reached.
    let outside = |arguments: &[&str]| {
        let socket = site.dir().join("h1/run/host.sock");
        let mut command = Command::new(program());
        command.args(arguments).env("KAGE_SOCKET", socket).current_dir(site.dir()).stdin(Stdio::null());
        command.output().unwrap()
    };
    for (line, code) in [("true", 0), ("false", 1), ("nosuch", 127)] {
        for output in
            [site.kage("h1", &["exec", "alice", "--", line]), outside(&["exec", "alice", "--", line])]
        {
            assert_eq!(output.status.code(), Some(code), "{line}: {}", said(&output));
        }
    }
    let words = outside(&["exec", "alice", "--", "echo", "a  b", "$HOME", "it's"]);
    assert_eq!(String::from_utf8_lossy(&words.stdout), "a  b $HOME it's\n");
    let mut cat = Command::new(program());
    let input = content(&site, "input", 300_000);
    cat.args(["exec", "alice", "--", "cat"]).stdin(File::open(&input).unwrap());
    assert_eq!(site.output("h1", &mut cat).unwrap().stdout, fs::read(&input).unwrap());

    // What is ended here ends there.
    // Tests that run in the background of a shell have ^C ignored, and what they start would too.
    let mut endless = Command::new("env");
    endless.args(["--default-signal=INT", &program().display().to_string()]);
    endless.args(["exec", "alice", "--", "work loop"]).stdin(Stdio::null()).stderr(Stdio::piped());
    let mut endless = site.start("h1", &mut endless);
    let runs =
        || site.json("h1", &["ps", "alice"]).as_array().unwrap().iter().any(|one| one["name"] == "work");
    let until = Instant::now() + SETTLED;
    while !runs() {
        assert!(Instant::now() < until, "work loop does not start");
    }
    assert!(Command::new("kill").args(["-INT", &endless.id().to_string()]).status().unwrap().success());
    endless.wait().unwrap();
    while runs() {
        assert!(Instant::now() < until, "work loop outlives the command");
    }

    let tree = site.dir().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    for (name, text) in [("one", "1"), ("a/two", "22"), ("a/b/three", "333")] {
        fs::write(tree.join(name), text).unwrap();
    }
    assert_eq!(outside(&["cp", "tree", "alice:"]).status.code(), Some(2), "a directory wants -r");
    let up = outside(&["-o", "json", "cp", "-r", "tree", "alice:"]);
    let copied: Value = serde_json::from_slice(&up.stdout).unwrap_or_else(|_| panic!("{}", said(&up)));
    assert_eq!((&copied["files"], &copied["bytes"]), (&3.into(), &6.into()), "{copied}");
    assert!(copied["seconds"].is_number());
    assert!(outside(&["cp", "-r", "alice:tree", "again"]).status.success());
    assert_eq!(fs::read_to_string(site.dir().join("again/a/b/three")).unwrap(), "333");
    for (arguments, code, word) in [
        (["cp", "alice:nosuch", "x"], 1, "nosuch"),
        (["cp", "nosuch", "alice:"], 1, "nosuch"),
        (["cp", "x", "y"], 2, "USER:PATH"),
        (["cp", "input", "bob:"], 3, "bob"),
        (["cp", "input", "alice:/no/such/place"], 1, "/no/such/place"),
    ] {
        let output = outside(&arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
        assert!(errors.contains(word), "{arguments:?}: {errors}");
    }
    // No other key is taken than the one in the machine's record.
    let mut scan = Command::new("ssh-keyscan");
    let address = text(&login, "address");
    let scanned = site.output("d1", scan.args(["-T", "10", "-t", "ed25519", address])).unwrap();
    let key = text(&site.show("alice"), "host_key").to_owned();
    assert!(String::from_utf8_lossy(&scanned.stdout).contains(&key), "{key} is not {}", said(&scanned));
}

//! The server as Debian's OpenSSH client sees it: real `ssh` processes against a socket on loopback.

mod server;

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use kage_ssh::keys::{AuthorizedKey, HostKey};
use kage_ssh::{Account, Config, Limits};
use rustix::process::{Pid, Signal, kill_process};
use server::{Ended, Server, pattern};
use sha2::{Digest as _, Sha256};

const MEGABYTES_20: usize = 20_000_000;

/// A server with a user `alice`, and everything her client needs, in a directory of its own.
struct Bench {
    directory: PathBuf,
    server: Server,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Bench {
    fn new() -> Self {
        Self::with(&["ed25519"], Limits::default())
    }

    /// Alice has a key of each of these types, in files named for them.
    fn with(types: &[&str], limits: Limits) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        // Not the target directory: a control socket's path has to stay below 108 bytes.
        let directory = std::env::temp_dir().join(format!("kage-ssh-{}-{count}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory for keys");
        let keys = types
            .iter()
            .map(|kind| {
                let line =
                    fs::read_to_string(keygen(&directory, kind, kind)).expect("the key ssh-keygen wrote");
                AuthorizedKey::parse(&line).expect("a key ssh-keygen wrote").key
            })
            .collect();
        let host_key = HostKey::from_seed(&[42; 32]);
        let known = format!("kage {}\n", host_key.to_line());
        fs::write(directory.join("known_hosts"), known).expect("known_hosts");
        let accounts = vec![Account { user: "alice".into(), keys }];
        Self { directory, server: Server::start(Config { host_key, accounts, limits }) }
    }

    /// The client with nothing of this machine's configuration, and the host key checked.
    fn ssh(&self, key: &str) -> Command {
        let mut command = Command::new("ssh");
        command.args(["-F", "/dev/null", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"]);
        command.args(["-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "HostKeyAlias=kage"]);
        command.arg("-o").arg(format!("UserKnownHostsFile={}", self.directory.join("known_hosts").display()));
        command.arg("-i").arg(self.directory.join(key));
        command.arg("-p").arg(self.server.port().to_string());
        command.env_remove("SSH_AUTH_SOCK").stdin(Stdio::null());
        command
    }

    fn run(&self, options: &[&str], program: &str) -> Output {
        output(self.ssh("ed25519").args(options).arg("alice@127.0.0.1").arg(program))
    }
}

/// Makes a key and returns the path of its public half.
fn keygen(directory: &Path, kind: &str, name: &str) -> PathBuf {
    let file = directory.join(name);
    let made =
        Command::new("ssh-keygen").args(["-q", "-t", kind, "-N", "", "-C", name, "-f"]).arg(&file).status();
    assert!(made.expect("ssh-keygen; install openssh-client").success());
    file.with_extension("pub")
}

/// A client that takes longer hangs: the slowest one here takes seconds.
const HANGS: Duration = Duration::from_secs(120);

fn output(command: &mut Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    outcome(child.expect("ssh; install openssh-client"))
}

/// Waits for a child; one that hangs is killed and fails the test.
fn outcome(child: Child) -> Output {
    let pid = Pid::from_child(&child);
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(HANGS) {
        Ok(output) => output.expect("waits for ssh"),
        Err(_) => {
            kill_process(pid, Signal::KILL).expect("the child runs");
            let output = receiver.recv().expect("the waiter").expect("waits for ssh");
            panic!("the client hangs; it said: {}", text(&output.stderr));
        }
    }
}

fn spawn(command: &mut Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("ssh; install openssh-client")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn assert_ends(output: &Output, status: i32) {
    assert_eq!(output.status.code(), Some(status), "stderr: {}", text(&output.stderr));
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Gives a child its input, and gathers its output meanwhile.
fn talk(mut child: Child, input: Vec<u8>) -> (ExitStatus, Vec<u8>, Vec<u8>) {
    let mut stdin = child.stdin.take().expect("piped");
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let Output { status, stdout, stderr } = outcome(child);
    let written = writer.join().expect("no panic");
    assert!(written.is_ok(), "{written:?}: {}", text(&stderr));
    (status, stdout, stderr)
}

#[test]
fn a_command_ends_with_its_exit_status_and_both_outputs() {
    let bench = Bench::new();
    let good = bench.run(&[], "say out");
    assert_ends(&good, 0);
    assert_eq!((text(&good.stdout), text(&good.stderr)), ("out".into(), "".into()));
    let bad = bench.run(&[], "fail 37 complaint");
    assert_ends(&bad, 37);
    assert_eq!((text(&bad.stdout), text(&bad.stderr)), ("".into(), "complaint".into()));
    let killed = bench.run(&[], "killed");
    assert_ends(&killed, 255);
    assert_ends(&bench.run(&[], "no-such-program"), 255);
}

#[test]
fn every_type_of_key_logs_in() {
    let types = ["ed25519", "ecdsa", "rsa"];
    let bench = Bench::with(&types, Limits::default());
    for kind in types {
        let output = output(bench.ssh(kind).args(["alice@127.0.0.1", "say", kind]));
        assert_ends(&output, 0);
        assert_eq!(text(&output.stdout), kind);
    }
}

#[test]
fn clients_with_other_preferences_get_in() {
    let bench = Bench::new();
    for option in
        ["KexAlgorithms=curve25519-sha256@libssh.org", "Compression=yes", "PubkeyAuthentication=host-bound"]
    {
        let output = bench.run(&["-o", option], "say in");
        assert_ends(&output, 0);
        assert_eq!(text(&output.stdout), "in", "{option}");
    }
    let none = bench.run(&["-o", "Ciphers=aes128-ctr"], "say in");
    assert_ends(&none, 255);
    assert!(text(&none.stderr).contains("no matching cipher found"), "{}", text(&none.stderr));
}

#[test]
fn strangers_are_refused_and_told_what_would_be_accepted() {
    let bench = Bench::new();
    keygen(&bench.directory, "ed25519", "stranger");
    for (key, user) in [("stranger", "alice@127.0.0.1"), ("ed25519", "bob@127.0.0.1")] {
        let output = output(bench.ssh(key).args([user, "say in"]));
        assert_ends(&output, 255);
        assert!(text(&output.stderr).contains("Permission denied (publickey)"), "{}", text(&output.stderr));
    }
}

#[test]
fn another_host_key_is_noticed_by_the_client() {
    let bench = Bench::new();
    let other = HostKey::from_seed(&[43; 32]);
    fs::write(bench.directory.join("known_hosts"), format!("kage {}\n", other.to_line()))
        .expect("known_hosts");
    let output = bench.run(&[], "say in");
    assert_ends(&output, 255);
    assert!(text(&output.stderr).contains("HAS CHANGED"), "{}", text(&output.stderr));
}

#[test]
fn the_fingerprint_is_the_one_ssh_keygen_prints() {
    let bench = Bench::new();
    let key = HostKey::from_seed(&[42; 32]);
    let file = bench.directory.join("host.pub");
    fs::write(&file, key.to_line()).expect("the key's file");
    let listed = output(Command::new("ssh-keygen").arg("-lf").arg(&file));
    assert!(text(&listed.stdout).contains(&key.fingerprint()), "{}", text(&listed.stdout));
}

#[test]
fn twenty_megabytes_arrive_unchanged_in_each_direction() {
    let bench = Bench::new();
    let data = pattern(MEGABYTES_20);
    let digest = spawn(bench.ssh("ed25519").args(["alice@127.0.0.1", "digest"]));
    let (status, stdout, stderr) = talk(digest, data.clone());
    assert!(status.success(), "{}", text(&stderr));
    assert_eq!(text(&stdout), hash(&data));

    let generated = bench.run(&[], &format!("generate {MEGABYTES_20}"));
    assert_ends(&generated, 0);
    assert_eq!(hash(&generated.stdout), hash(&data));
}

#[test]
fn twenty_megabytes_echo_while_keys_are_renewed_by_the_client() {
    let bench = Bench::new();
    let data = pattern(MEGABYTES_20);
    let cat = spawn(bench.ssh("ed25519").args(["-v", "-o", "RekeyLimit=1M", "alice@127.0.0.1", "cat"]));
    let (status, stdout, stderr) = talk(cat, data.clone());
    assert!(status.success(), "{}", text(&stderr));
    assert_eq!(hash(&stdout), hash(&data));
    let exchanges = text(&stderr).matches("SSH2_MSG_NEWKEYS received").count();
    assert!(exchanges > 10, "{exchanges} key exchanges");
}

#[test]
fn twenty_megabytes_echo_while_keys_are_renewed_by_the_server() {
    let bench = Bench::with(&["ed25519"], Limits { rekey_bytes: 1 << 20, ..Limits::default() });
    let data = pattern(MEGABYTES_20);
    let cat = spawn(bench.ssh("ed25519").args(["-v", "alice@127.0.0.1", "cat"]));
    let (status, stdout, stderr) = talk(cat, data.clone());
    assert!(status.success(), "{}", text(&stderr));
    assert_eq!(hash(&stdout), hash(&data));
    let exchanges = text(&stderr).matches("SSH2_MSG_NEWKEYS received").count();
    assert!(exchanges > 10, "{exchanges} key exchanges");
}

#[test]
fn keys_renewed_by_both_sides_at_once_do_no_harm() {
    let bench = Bench::with(&["ed25519"], Limits { rekey_bytes: 300_000, ..Limits::default() });
    let data = pattern(5_000_000);
    let cat = spawn(bench.ssh("ed25519").args(["-o", "RekeyLimit=300K", "alice@127.0.0.1", "cat"]));
    let (status, stdout, stderr) = talk(cat, data.clone());
    assert!(status.success(), "{}", text(&stderr));
    assert_eq!(hash(&stdout), hash(&data));
}

#[test]
fn a_small_window_and_a_small_output_only_slow_things_down() {
    let limits = Limits { receive_window: 40_000, output: 3_000, ..Limits::default() };
    let bench = Bench::with(&["ed25519"], limits);
    let data = pattern(2_000_000);
    let cat = spawn(bench.ssh("ed25519").args(["alice@127.0.0.1", "cat"]));
    let (status, stdout, stderr) = talk(cat, data.clone());
    assert!(status.success(), "{}", text(&stderr));
    assert_eq!(hash(&stdout), hash(&data));
}

#[test]
fn a_shell_on_a_terminal_edits_lines_and_leaves() {
    let bench = Bench::new();
    let shell = spawn(bench.ssh("ed25519").args(["-tt", "alice@127.0.0.1"]));
    let (status, stdout, stderr) = talk(shell, b"say helo\x1b[Dl\r\x1b[A!\rexit 5\r".to_vec());
    assert_eq!(status.code(), Some(5), "{}", text(&stderr));
    let shown = text(&stdout);
    assert!(shown.contains("\r\nhello\r\n"), "{shown:?}");
    assert!(shown.contains("\r\nhello!\r\n"), "{shown:?}");
}

#[test]
fn a_shell_on_a_pipe_reads_lines_to_the_end() {
    let bench = Bench::new();
    let shell = spawn(bench.ssh("ed25519").args(["-T", "alice@127.0.0.1"]));
    let (status, stdout, stderr) = talk(shell, b"say one\nsay two".to_vec());
    assert!(status.success(), "{}", text(&stderr));
    assert_eq!(text(&stdout), "one\ntwo\n");
}

#[test]
fn environment_and_terminal_reach_the_program() {
    let bench = Bench::new();
    let mut ssh = bench.ssh("ed25519");
    ssh.env("LC_TEST", "value").env("TERM", "vt100").args(["-tt", "-o", "SendEnv=LC_TEST"]);
    let output = output(ssh.args(["alice@127.0.0.1", "surroundings"]));
    assert_ends(&output, 0);
    assert_eq!(text(&output.stdout), "LC_TEST=value TERM=vt100");
}

#[test]
fn an_unknown_subsystem_is_refused_and_the_client_ends() {
    let bench = Bench::new();
    let output = bench.run(&["-s"], "sftp");
    assert_ends(&output, 255);
    assert!(text(&output.stderr).contains("subsystem request failed"), "{}", text(&output.stderr));
}

#[test]
fn forwarding_is_refused_without_harm_to_the_connection() {
    let bench = Bench::new();
    let forwarded = output(bench.ssh("ed25519").args(["-W", "127.0.0.1:9", "alice@127.0.0.1"]));
    assert_ends(&forwarded, 255);
    assert!(text(&forwarded.stderr).contains("forwarding is not supported"), "{}", text(&forwarded.stderr));
    let remote = bench.run(&["-R", "0:127.0.0.1:9"], "say still here");
    assert_ends(&remote, 0);
    assert_eq!(text(&remote.stdout), "still here");
}

#[test]
fn channels_of_one_connection_do_not_hold_each_other_up() {
    let bench = Bench::new();
    let socket = bench.directory.join("control");
    let path = format!("ControlPath={}", socket.display());
    let mut master = spawn(bench.ssh("ed25519").args(["-M", "-o", &path, "alice@127.0.0.1", "cat"]));
    // The master's echo proves that it is logged in; its socket exists from then on.
    let mut echo = [0; 3];
    master.stdin.as_mut().expect("piped").write_all(b"one").expect("written");
    master.stdout.as_mut().expect("piped").read_exact(&mut echo).expect("echoed");

    let through = |program: &str| {
        let mut ssh = bench.ssh("ed25519");
        ssh.args([
            "-o",
            &path,
            "-o",
            "ControlMaster=no",
            "-o",
            "ProxyCommand=false",
            "alice@127.0.0.1",
            program,
        ]);
        spawn(&mut ssh)
    };
    let data = pattern(3_000_000);
    let digests: Vec<_> = (0..3)
        .map(|_| {
            let (child, data) = (through("digest"), data.clone());
            std::thread::spawn(move || talk(child, data))
        })
        .collect();
    let (status, stdout, _) = talk(through("fail 9 quick"), Vec::new());
    assert_eq!((status.code(), stdout.len()), (Some(9), 0));
    for digest in digests {
        let (status, stdout, stderr) = digest.join().expect("no panic");
        assert!(status.success(), "{}", text(&stderr));
        assert_eq!(text(&stdout), hash(&data));
    }
    let (status, stdout, stderr) = talk(master, b"two".to_vec());
    assert!(status.success(), "{}", text(&stderr));
    assert_eq!(text(&stdout), "two");
    assert_eq!(bench.server.accepted(), 1, "connections");
}

#[test]
fn a_client_killed_midway_leaves_nothing_behind() {
    let bench = Bench::new();
    let mut client = spawn(bench.ssh("ed25519").args(["alice@127.0.0.1", "generate 1000000000"]));
    let mut start = [0; 100_000];
    client.stdout.as_mut().expect("piped").read_exact(&mut start).expect("the first bytes");
    client.kill().expect("killed");
    client.wait().expect("waited");
    assert_eq!(bench.server.next_end(), Ended::HungUp);
    assert_ends(&bench.run(&[], "say again"), 0);
}

#[test]
fn the_client_gives_a_sign_of_life_when_asked() {
    let output = Bench::new().run(&[], "alive");
    assert_ends(&output, 0);
    assert_eq!(text(&output.stdout), "alive");
}

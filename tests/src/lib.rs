//! End-to-end tests: hosts as network namespaces, real daemons, real machines, real clients.
//!
//! Everything goes through what users have: the `kage` program and the clients of their device.
//! Needs root, `/dev/kvm` and `/dev/net/tun`, and fails loudly without.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader},
    ops::Deref,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use kage::testbed::{Cancel, ScopedTestbed, Testbed, TestbedSpec};
use serde_json::Value;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A testbed of its own for one test, removed with it.
pub struct Site {
    testbed: Option<ScopedTestbed>,
    dir: PathBuf,
}

/// The program under test, built beside the tests.
#[must_use]
pub fn program() -> PathBuf {
    let mut path = std::env::current_exe().expect("a test knows its program");
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    let path = path.join("kage");
    assert!(path.exists(), "{} is missing: cargo build --release -p kage", path.display());
    path
}

impl Site {
    /// A testbed of three hosts and `devices` devices on unshaped links.
    #[must_use]
    pub fn up(devices: u16) -> Self {
        Self::with(|spec| spec.devices = devices)
    }

    /// A testbed with changes to its plan.
    #[must_use]
    pub fn with(change: impl FnOnce(&mut TestbedSpec)) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("kage-e2e-{}-{number}", std::process::id()));
        let mut spec = TestbedSpec::new(&dir, program());
        change(&mut spec);
        let testbed = Testbed::scoped(spec, &Cancel::new().expect("a pipe"))
            .unwrap_or_else(|error| panic!("testbed: {error}"));
        Self { testbed: Some(testbed), dir }
    }

    /// Runs `kage` against host `host`'s daemon.
    pub fn kage(&self, host: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(program());
        command.args(arguments);
        self.output(host, &mut command).unwrap_or_else(|error| panic!("kage {arguments:?}: {error}"))
    }

    /// Runs `kage … -o json` and expects it to succeed.
    #[must_use]
    pub fn json(&self, host: &str, arguments: &[&str]) -> Value {
        let mut all = vec!["-o", "json"];
        all.extend(arguments);
        let output = self.kage(host, &all);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kage {arguments:?} at {host}: {errors}{}", self.daemon_logs());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("kage {arguments:?}: {error}"))
    }

    /// What the daemons wrote last, for a failure's message.
    #[must_use]
    pub fn daemon_logs(&self) -> String {
        let mut text = String::new();
        for host in ["h1", "h2", "h3"] {
            let log = fs::read_to_string(self.dir.join(host).join("log")).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            let _ = write!(text, "\n-- {host} --\n{}", lines[lines.len().saturating_sub(15)..].join("\n"));
        }
        text
    }

    /// A key pair of the user's own.
    #[must_use]
    pub fn key(&self, name: &str) -> PathBuf {
        let path = self.dir.join(format!("key-{name}"));
        if !path.exists() {
            let mut command = Command::new("ssh-keygen");
            command.args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"]).arg(&path);
            assert!(command.status().expect("ssh-keygen is installed").success());
        }
        path
    }

    /// Logs a user in at an access point; returns the answer.
    #[must_use]
    pub fn login(&self, user: &str, at: &str) -> Value {
        let public = self.key(user).with_extension("pub");
        self.json("h1", &["login", user, "--at", at, "--key", &public.display().to_string()])
    }

    /// OpenSSH's client on a device, as `user`, which accepts the machine's key once and for all.
    #[must_use]
    pub fn ssh(&self, user: &str, address: &str) -> Command {
        let mut command = self.client("ssh", user);
        command.arg(format!("{user}@{address}"));
        command
    }

    /// Runs a line in a machine and returns what it prints; it must succeed.
    pub fn say(&self, user: &str, address: &str, line: &str) -> String {
        let mut ssh = self.ssh(user, address);
        let output = self.output("d1", ssh.arg(line).stdin(Stdio::null())).expect("ssh is installed");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line:.60}: {}: {errors}{}", output.status, self.daemon_logs());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// One of OpenSSH's clients (`ssh`, `scp`, `sftp`) as [`Site::ssh`] starts it, without a destination.
    #[must_use]
    pub fn client(&self, program: &str, user: &str) -> Command {
        let mut command = Command::new(program);
        let known = self.dir.join("known_hosts");
        command.arg("-i").arg(self.key(user)).arg("-F").arg("/dev/null");
        command.arg("-o").arg(format!("UserKnownHostsFile={}", known.display()));
        for option in
            ["IdentitiesOnly=yes", "StrictHostKeyChecking=accept-new", "BatchMode=yes", "LogLevel=ERROR"]
        {
            command.args(["-o", option]);
        }
        command
    }

    /// Starts a command on a device with its output in a pipe.
    #[must_use]
    pub fn start(&self, device: &str, command: &mut Command) -> Child {
        command.stdout(Stdio::piped());
        self.spawn(device, command).unwrap_or_else(|error| panic!("{command:?}: {error}"))
    }

    /// Moves a user's machine and returns the report.
    #[must_use]
    pub fn migrate(&self, user: &str, to: &str) -> Value {
        self.json("h1", &["migrate", user, to])
    }

    /// The machine as `kage show` has it.
    #[must_use]
    pub fn show(&self, user: &str) -> Value {
        self.json("h1", &["show", user])
    }

    /// The figures of a host's daemon with this name whose labels contain that; none while the daemon does not answer.
    #[must_use]
    pub fn figures(&self, host: &str, name: &str, label: &str) -> Vec<f64> {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--fail", "--unix-socket"]).arg(self.dir().join(host).join("run/host.sock"));
        let output = curl.arg("http://kage/metrics").output().expect("curl is installed");
        let text = String::from_utf8_lossy(&output.stdout);
        let lines =
            text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('{')?.rsplit_once("} "));
        let values = lines.filter(|(labels, _)| labels.contains(label)).map(|(_, value)| value.parse());
        values.collect::<Result<_, _>>().expect("figures are numbers")
    }

    /// Where files of this test may lie.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Deref for Site {
    type Target = Testbed;
    fn deref(&self) -> &Testbed {
        self.testbed.as_ref().expect("up until dropped")
    }
}

/// The hosts to visit on a walk of `moves` moves that starts at `h1`.
pub fn walk(moves: usize) -> impl Iterator<Item = &'static str> {
    ["h2", "h3", "h1"].into_iter().cycle().take(moves)
}

/// Lines of a child's output as they come.
pub fn lines(child: &mut Child) -> impl Iterator<Item = String> + use<> {
    let output = child.stdout.take().expect("started with a pipe");
    BufReader::new(output).lines().map_while(Result::ok)
}

/// A text field of a JSON object.
#[must_use]
pub fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("no {field} in {value}"))
}

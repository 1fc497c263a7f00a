//! A user with a key, a machine and the usual clients.

use std::{
    fs,
    io::{Read, Write},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use kage_ssh::keys::HostKey;
use kage_vmm::remote::RemoteMachine;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Lab;

/// Seed of the machine's host key.
pub const HOST_SEED: [u8; 32] = [7; 32];

/// A user with a key, and their machine.
pub struct Desk<'a> {
    pub lab: &'a Lab,
    pub machine: Option<RemoteMachine>,
    pub key: PathBuf,
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A new key in the lab's directory; returns its path.
pub fn make_key(lab: &Lab, name: &str) -> PathBuf {
    let path = lab.dir().join(name);
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&path).status();
    assert!(made.expect("ssh-keygen is installed").success());
    path
}

fn public(key: &std::path::Path) -> String {
    fs::read_to_string(key.with_extension("pub")).expect("ssh-keygen wrote it")
}

impl<'a> Desk<'a> {
    pub fn new(lab: &'a Lab) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let key = make_key(lab, &format!("key-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let machine = lab.login_with(public(&key), HOST_SEED, [9; 32]);
        let known = format!("{} {}\n", lab.address(), HostKey::from_seed(&HOST_SEED).to_line());
        fs::write(lab.dir().join("known_hosts"), known).unwrap();
        Self { lab, machine: Some(machine), key }
    }

    /// The key that the machine lets in.
    #[allow(dead_code, reason = "not every test logs in twice")]
    pub fn public_key(&self) -> String {
        public(&self.key)
    }

    pub fn machine(&mut self) -> &mut RemoteMachine {
        self.machine.as_mut().expect("the desk has a machine")
    }

    /// Moves the machine to another process.
    pub fn walk(&mut self) -> Duration {
        let machine = self.machine.take().expect("the desk has a machine");
        let (machine, blackout) = self.lab.move_machine(machine);
        self.machine = Some(machine);
        blackout
    }

    /// OpenSSH that accepts only the host key of the seed.
    pub fn ssh(&self, options: &[&str]) -> Command {
        let mut command = self.client("ssh");
        command.args(options).arg(format!("alice@{}", self.lab.address()));
        command
    }

    /// What `scp` and `sftp` call a path of the machine.
    pub fn remote(&self, path: &str) -> String {
        format!("alice@[{}]:{path}", self.lab.address())
    }

    /// A client of OpenSSH's: `ssh`, `scp` or `sftp`.
    pub fn client(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        command.args(["-F", "none", "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes"]);
        command.args(["-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=10"]);
        command.arg("-o").arg(format!("UserKnownHostsFile={}", self.lab.dir().join("known_hosts").display()));
        command.arg("-i").arg(&self.key).stdin(Stdio::null());
        command
    }

    /// Runs a command line; returns what it gave.
    pub fn exec(&self, line: &str) -> Output {
        self.ssh(&[]).args(["--", line]).output().expect("ssh is installed")
    }

    /// Runs a command line that succeeds; returns its output.
    pub fn say(&self, line: &str) -> String {
        let output = self.exec(line);
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://[{}]{path}", self.lab.address())
    }

    pub fn curl(&self, arguments: &[&str], path: &str) -> Output {
        let mut command = Command::new("curl");
        command.args(["-sS", "-g", "-m", "60"]).args(arguments).arg(self.url(path));
        let output = command.output().expect("curl is installed");
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }
}

impl Drop for Desk<'_> {
    fn drop(&mut self) {
        use kage_machine::Machine;
        if let Some(machine) = &mut self.machine {
            if std::thread::panicking() {
                eprintln!("{}", self.lab.logs(machine));
            }
            machine.end();
        }
    }
}

/// A client with a terminal.
pub struct Terminal {
    pub child: Child,
    keys: ChildStdin,
    screen: std::process::ChildStdout,
    seen: String,
}

impl Drop for Terminal {
    /// A test that ends early leaves no client behind.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Terminal {
    pub fn open(desk: &Desk<'_>) -> Self {
        let mut child = desk
            .ssh(&["-tt"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("ssh is installed");
        let (keys, screen) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut terminal = Self { child, keys, screen, seen: String::new() };
        terminal.until("$ ");
        terminal
    }

    pub fn keys(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    /// Reads the screen up to some text; returns all of it and forgets it.
    pub fn until(&mut self, text: &str) -> String {
        let mut buffer = [0; 4096];
        loop {
            if let Some(at) = self.seen.find(text) {
                let rest = self.seen.split_off(at + text.len());
                return std::mem::replace(&mut self.seen, rest);
            }
            let mut polled = [PollFd::new(&self.screen, PollFlags::IN)];
            let ready = poll(&mut polled, Some(&Timespec { tv_sec: 20, tv_nsec: 0 })).unwrap();
            assert!(ready > 0, "no {text:?} within 20 s, only {:?}", self.seen);
            let count = self.screen.read(&mut buffer).unwrap();
            assert!(count > 0, "the screen ended before {text:?}: {:?}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    }
}

/// Pages of a machine that hold something.
pub fn pages_in_use(machine: &RemoteMachine) -> (usize, usize) {
    use kage_machine::Machine;
    let memory = machine.memory();
    let mut bytes = [0; kage_machine::PAGE_SIZE];
    let populated = memory.populated();
    let full = populated.iter().filter(|page| {
        memory.read(*page, &mut bytes);
        bytes.iter().any(|byte| *byte != 0)
    });
    (full.count(), populated.iter().count())
}

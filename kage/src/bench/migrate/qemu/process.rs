//! One QEMU process, from its start to its end.

use std::{
    fs::{self, File},
    io,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    figures::Sample,
    firmware::{FIGURES, LOW_START, PAGES},
    qmp::{Event, Qmp, QmpError},
};
use crate::{
    client::Failure,
    testbed::{Cancel, Testbed},
};

/// The program.
const PROGRAM: &str = "qemu-system-x86_64";
/// The smallest machine that can be moved: no bus, no disk, no timers of its own.
const MACHINE: &str =
    "microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off,auto-kernel-cmdline=off";
/// How long a guest may take to its first beat.
const FIRST_BEAT: Duration = Duration::from_secs(20);
/// Pause between two looks at it: nothing tells of it.
const LOOK: Duration = Duration::from_millis(20);
/// Readings of the figures, of which the quickest counts.
const READINGS: usize = 5;

/// Says early that the peer is missing.
///
/// # Errors
/// How to install it.
pub fn check_installed() -> Result<(), Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|dir| dir.join(PROGRAM).is_file()) {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{PROGRAM} is not installed; apt-get install --no-install-recommends qemu-system-x86"
    )))
}

/// What a source begins with; a target begins with nothing.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The image of low memory.
    pub low: &'a Path,
    /// What its pages are filled with.
    pub pages: &'a Path,
}

/// A process that is ended when dropped.
#[derive(Debug)]
pub struct Qemu {
    process: Ended,
    /// Its control socket.
    pub qmp: Qmp,
    log: PathBuf,
    dump: PathBuf,
}

impl Qemu {
    /// Starts one on a host of a testbed, with its files in `dir`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(
        testbed: &Testbed,
        host: &str,
        dir: &Path,
        memory_bytes: u64,
        contents: Option<Contents<'_>>,
        cancel: &Cancel,
    ) -> Result<Self, Failure> {
        let (socket, log) = (dir.join(format!("{host}.qmp")), dir.join(format!("{host}.log")));
        let failed = |error: io::Error| Failure::new(format!("{}: {error}", socket.display()));
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&socket).map_err(failed)?;
        let output = File::create(&log).map_err(failed)?;
        let mut command = Command::new(PROGRAM);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-cpu", "host", "-smp", "1"]);
        command.args(["-machine", MACHINE, "-m", &format!("{}k", memory_bytes >> 10)]);
        command.arg("-bios").arg(dir.join("firmware"));
        command.args(["-qmp", &format!("unix:{}", socket.display())]);
        if let Some(contents) = contents {
            for (file, address) in [(contents.low, LOW_START), (contents.pages, PAGES)] {
                let device = format!("loader,file={},addr={address},force-raw=on", file.display());
                command.args(["-device", &device]);
            }
        } else {
            command.args(["-incoming", "defer"]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(output);
        let process = Ended(testbed.spawn(host, &mut command).map_err(Failure::new)?);
        let qmp = Qmp::accept(&listener, cancel).map_err(|error| explained(&error, &log))?;
        Ok(Self { process, qmp, log, dump: dir.join(format!("{host}.dump")) })
    }

    /// Bytes its host has sent.
    ///
    /// # Errors
    /// When it is gone.
    pub fn sent(&self) -> Result<u64, Failure> {
        let path = format!("/proc/{}/net/dev", self.process.0.id());
        let text = fs::read_to_string(&path).map_err(|error| Failure::new(format!("{path}: {error}")))?;
        sent(&text, "eth0").ok_or_else(|| Failure::new(format!("{path}: no eth0")))
    }

    /// Has it do something.
    ///
    /// # Errors
    /// When it does not.
    pub fn execute(
        &mut self,
        command: &str,
        arguments: serde_json::Value,
    ) -> Result<serde_json::Value, Failure> {
        self.qmp.execute(command, arguments).map_err(|error| explained(&error, &self.log))
    }

    /// What happened since it was last asked.
    ///
    /// # Errors
    /// When it has ended.
    pub fn events(&mut self) -> Result<Vec<Event>, Failure> {
        self.qmp.events().map_err(|error| explained(&error, &self.log))
    }

    /// Reads the figures of its guest.
    ///
    /// # Errors
    /// When it does not tell.
    pub fn sample(&mut self) -> Result<Sample, Failure> {
        let line = format!("xp /4gx {FIGURES:#x}");
        let mut best: Option<Sample> = None;
        for _ in 0..READINGS {
            let asked = Instant::now();
            let said = self.execute("human-monitor-command", json!({ "command-line": line }))?;
            let sample = said.as_str().and_then(|text| Sample::read(text, asked, Instant::now()));
            let sample = sample.ok_or_else(|| Failure::new(format!("QEMU's xp said {said}")))?;
            best = best.filter(|best| best.took <= sample.took).or(Some(sample));
        }
        best.ok_or_else(|| Failure::new("QEMU's xp said nothing"))
    }

    /// Waits until its guest runs.
    ///
    /// # Errors
    /// When it does not.
    pub fn until_beating(&mut self, cancel: &Cancel) -> Result<Sample, Failure> {
        let deadline = Instant::now() + FIRST_BEAT;
        loop {
            let sample = self.sample()?;
            if sample.beats > 0 {
                return Ok(sample);
            }
            if Instant::now() > deadline {
                return Err(Failure::new(format!("the guest in QEMU did not start within {FIRST_BEAT:?}")));
            }
            cancel.wait_until(Instant::now() + LOOK).map_err(Failure::new)?;
        }
    }

    /// Copies some of its guest's memory.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn memory(&mut self, address: u64, bytes: u64) -> Result<Vec<u8>, Failure> {
        let filename = self.dump.display().to_string();
        self.execute("pmemsave", json!({ "val": address, "size": bytes, "filename": filename }))?;
        let read = fs::read(&self.dump);
        read.map_err(|error| Failure::new(format!("{}: {error}", self.dump.display())))
    }
}

/// A child that is ended when dropped; one that has ended already is just collected.
#[derive(Debug)]
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bytes sent by an interface, from `/proc/net/dev` (proc(5)).
fn sent(text: &str, interface: &str) -> Option<u64> {
    let counters = text.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'))?;
    counters.split_whitespace().nth(8)?.parse().ok()
}

fn explained(error: &QmpError, log: &Path) -> Failure {
    let said = fs::read_to_string(log).unwrap_or_default();
    let last = said.trim().lines().next_back().unwrap_or_default().to_owned();
    if last.is_empty() { Failure::new(error) } else { Failure::new(format!("{error}: {last}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sent_bytes_are_found_by_interface() {
        let text = "Inter-| Receive | Transmit\n face |bytes packets\n    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n\
                    \x20 eth0: 100 2 0 0 0 0 0 0 4200 3 0 0 0 0 0 0\n";
        assert_eq!((sent(text, "eth0"), sent(text, "lo"), sent(text, "eth1")), (Some(4200), Some(9), None));
    }
}

//! Processes of a testbed: told apart from later ones with the same number, found without a record, ended.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid},
};
use serde::{Deserialize, Serialize};

use super::{TestbedError, namespace};

/// Marks a testbed's processes in their environment, with its identity.
pub const MARK: &str = "KAGE_TESTBED";
/// How long a killed process may take to be gone: it may have much memory to give back.
const PATIENCE: Duration = Duration::from_secs(10);

/// A process and when it started, so that a later one with its number is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Clock ticks from the machine's start to its own (proc(5)).
    pub start_ticks: u64,
}

impl Process {
    /// The process that has a number now.
    pub fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, start_ticks: start_ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)? })
    }

    /// Whether it still runs; one that has ended but was not waited for does not.
    pub fn is_running(self) -> bool {
        let alive = fs::read_to_string(format!("/proc/{}/stat", self.pid)).is_ok_and(|stat| {
            start_ticks(&stat) == Some(self.start_ticks) && !stat.contains(") Z ") && !stat.contains(") X ")
        });
        alive && self.handle().is_some()
    }

    /// Ends it by SIGKILL and waits until it is gone.
    pub fn end(self) -> Result<(), TestbedError> {
        let Some(handle) = self.handle() else { return Ok(()) };
        kill(&handle)?;
        wait_for_end(&[(self.pid, handle)])
    }

    /// A descriptor that is this process, whatever becomes of its number.
    fn handle(self) -> Option<OwnedFd> {
        let handle = pidfd_open(Pid::from_raw(i32::try_from(self.pid).ok()?)?, PidfdFlags::empty()).ok()?;
        // Only after the descriptor is open it cannot become another process.
        (Self::of(self.pid) == Some(self)).then_some(handle)
    }
}

/// Field 22 of `/proc/PID/stat`; the name in field 2 may hold spaces and parentheses.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split(' ').nth(19)?.parse().ok()
}

/// Ends all processes of a testbed: those with its mark and those in its namespaces, except the caller and those
/// it descends from.
pub fn end_all(id: &str) -> Result<(), TestbedError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = find(id)?;
        if found.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(TestbedError::Undying(found[0].pid));
        }
        // Each round ends whom it found; the next finds whom those started meanwhile.
        let mut ended = Vec::new();
        for process in found {
            if let Some(handle) = process.handle() {
                kill(&handle)?;
                ended.push((process.pid, handle));
            }
        }
        wait_for_end(&ended)?;
    }
}

fn find(id: &str) -> Result<Vec<Process>, TestbedError> {
    let inodes = namespace::inodes(id)?;
    let own = ancestors(std::process::id());
    let ours = |&pid: &u32| {
        let inside = fs::metadata(format!("/proc/{pid}/ns/net"))
            .is_ok_and(|namespace| inodes.contains(&namespace.ino()));
        (inside || is_marked(pid, id)) && !own.contains(&pid)
    };
    Ok(all()?.filter(ours).filter_map(Process::of).filter(|process| process.is_running()).collect())
}

/// Processes that carry a testbed's mark.
pub fn marked(id: &str) -> Result<Vec<u32>, TestbedError> {
    Ok(all()?.filter(|&pid| is_marked(pid, id)).collect())
}

/// Every process there is.
fn all() -> Result<impl Iterator<Item = u32>, TestbedError> {
    let entries =
        fs::read_dir("/proc").map_err(|source| TestbedError::File { path: "/proc".into(), source })?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()))
}

fn is_marked(pid: u32, id: &str) -> bool {
    let mark = format!("{MARK}={id}");
    fs::read(format!("/proc/{pid}/environ"))
        .is_ok_and(|environment| environment.split(|&byte| byte == 0).any(|pair| pair == mark.as_bytes()))
}

/// A process, its parent, and so on.
fn ancestors(mut pid: u32) -> Vec<u32> {
    let mut all = Vec::new();
    while pid > 1 && !all.contains(&pid) {
        all.push(pid);
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        pid = parent.unwrap_or(0);
    }
    all
}

fn kill(handle: &OwnedFd) -> Result<(), TestbedError> {
    match pidfd_send_signal(handle, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(errno) => Err(TestbedError::System { doing: "ending a process", source: errno.into() }),
    }
}

fn wait_for_end(processes: &[(u32, OwnedFd)]) -> Result<(), TestbedError> {
    let deadline = Instant::now() + PATIENCE;
    for (pid, handle) in processes {
        if !wait(handle, deadline)
            .map_err(|source| TestbedError::System { doing: "waiting for a process", source })?
        {
            return Err(TestbedError::Undying(*pid));
        }
        // A child of ours would stay as a zombie; of others this has no right and no need to collect.
        let _ = waitid(WaitId::PidFd(handle.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    }
    Ok(())
}

fn wait(handle: &OwnedFd, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match rustix::event::poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_start_is_found_behind_any_name() {
        let stat = format!("7 (a) (b) Z) S 1 {} 4242 5", "0 ".repeat(17).trim_end());
        assert_eq!(start_ticks(&stat), Some(4242));
        for cut in 0..stat.len() - 6 {
            let _ = start_ticks(&stat[..cut]);
        }
    }

    #[test]
    fn a_process_is_known_by_its_start_and_ended() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(process.is_running());
        let other = Process { start_ticks: process.start_ticks + 1, ..process };
        assert!(!other.is_running());
        other.end().unwrap();
        assert!(process.is_running());
        process.end().unwrap();
        assert!(!process.is_running());
        process.end().unwrap();
        assert!(child.wait().is_err(), "it was collected already");
    }

    #[test]
    fn marked_processes_are_found_and_ended() {
        let id = format!("test{}", std::process::id());
        let mut child = Command::new("sleep").arg("60").env(MARK, &id).spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        // Between fork and exec it has the environment of its parent.
        while find(&id).unwrap().is_empty() {
            std::thread::yield_now();
        }
        end_all(&id).unwrap();
        assert!(!process.is_running());
        assert!(child.wait().is_err(), "it was collected already");
    }
}

//! The daemons of a testbed's hosts: started in their namespaces, outliving the command that starts them.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags};

use super::{
    TestbedError,
    layout::{HostLayout, Layout},
    namespace,
    notify::{Cancel, Readiness, poll_until},
    process::{MARK, Process},
    state::State,
};

/// How long a daemon may take to be ready; a cold one on a busy machine takes about a second.
const START: Duration = Duration::from_secs(30);
/// How much of its log is shown when it does not start.
const LOG_TAIL_BYTES: u64 = 2000;

/// A daemon that was started but has not said that it is ready.
struct Starting {
    host: String,
    log: PathBuf,
    child: Child,
    handle: std::os::fd::OwnedFd,
    readiness: Readiness,
}

/// Starts daemons and waits until all of them are ready.
pub fn start(
    layout: &Layout,
    state: &mut State,
    hosts: &[&HostLayout],
    cancel: &Cancel,
) -> Result<(), TestbedError> {
    let mut waiting = Vec::new();
    for host in hosts {
        let starting = spawn(layout, state, host)?;
        // Before anything else can fail, so that the record knows it.
        if let Some(process) = Process::of(starting.child.id()) {
            state.daemons.insert(starting.host.clone(), process);
        }
        state.write(&layout.dir)?;
        waiting.push(starting);
    }
    let deadline = Instant::now() + START;
    while !waiting.is_empty() {
        let mut fds = vec![PollFd::new(cancel, PollFlags::IN)];
        for starting in &waiting {
            fds.push(PollFd::new(&starting.readiness, PollFlags::IN));
            fds.push(PollFd::new(&starting.handle, PollFlags::IN));
        }
        let ready = poll_until(&mut fds, deadline)
            .map_err(|source| TestbedError::System { doing: "waiting for daemons", source })?;
        cancel.check()?;
        let mut still = Vec::new();
        for mut starting in waiting {
            if starting.readiness.is_ready() {
                continue;
            }
            if let Ok(Some(outcome)) = starting.child.try_wait() {
                return Err(TestbedError::DaemonEnded {
                    host: starting.host,
                    outcome: outcome.to_string(),
                    log_tail: tail(&starting.log),
                    log: starting.log,
                });
            }
            if ready == 0 {
                return Err(TestbedError::DaemonSlow {
                    host: starting.host,
                    seconds: START.as_secs(),
                    log_tail: tail(&starting.log),
                    log: starting.log,
                });
            }
            still.push(starting);
        }
        waiting = still;
    }
    Ok(())
}

fn spawn(layout: &Layout, state: &State, host: &HostLayout) -> Result<Starting, TestbedError> {
    let notify = layout.host_dir(&host.name).join("notify");
    let readiness = Readiness::bind(&notify)?;
    let log = layout.log(&host.name);
    let open = || -> std::io::Result<(File, File)> {
        let output = File::options().create(true).append(true).open(&log)?;
        Ok((output.try_clone()?, output))
    };
    let (output, errors) = open().map_err(|source| TestbedError::File { path: log.clone(), source })?;
    let failed = |source| TestbedError::Program { program: state.binary.display().to_string(), source };
    let mut command = Command::new(&state.binary);
    command
        .args(["host", "-c"])
        .arg(layout.config(&host.name))
        .env("NOTIFY_SOCKET", &notify)
        .env(MARK, &layout.id)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        // ^C at the terminal is for the command that starts it.
        .process_group(0);
    let child = namespace::within(&host.netns, || command.spawn())?.map_err(failed)?;
    let pid = rustix::process::Pid::from_child(&child);
    let handle = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
        .map_err(|errno| failed(errno.into()))?;
    Ok(Starting { host: host.name.to_string(), log, child, handle, readiness })
}

fn tail(log: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(log)?;
        let length = fs::metadata(log)?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    };
    read().unwrap_or_else(|error| format!("(the log cannot be read: {error})"))
}

/// The number of a host's daemon.
pub fn running(state: &State, host: &str) -> Result<u32, TestbedError> {
    let process = state.daemons.get(host).filter(|process| process.is_running());
    process.map(|process| process.pid).ok_or_else(|| TestbedError::NoDaemon(host.into()))
}

/// Kills a host's daemon, and nothing else.
pub fn kill(state: &State, host: &str) -> Result<(), TestbedError> {
    state.daemons.get(host).map_or(Ok(()), |process| process.end())
}

//! Processor time of processes, and counters of a daemon, over a slice.

use std::{collections::BTreeMap, fs};

use http::Method;
use kage_host::{
    api::types::ImageView,
    http::{Call, unix},
};

use crate::{
    bench::desk::{Desk, runtime},
    client::Failure,
};

/// The host that owns the machine.
const OWNER: &str = "h1";
/// The counter of bytes to mirrors.
const FAMILY: &str = "kage_replica_bytes_total";

/// Processor time that was used, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Used {
    /// By the process that holds the machine, its guest included.
    pub machine_s: f64,
    /// By the owner's daemon.
    pub daemon_s: f64,
}

impl Used {
    /// By both.
    pub fn total_s(&self) -> f64 {
        self.machine_s + self.daemon_s
    }
}

/// Bytes to mirrors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// As they went over the wire.
    pub mirror: u64,
    /// As a mirror would have taken that is sent every page found dirty whole, each time.
    pub naive: u64,
}

/// A reading at the beginning of a slice.
pub struct Meter {
    machine: Threads,
    daemon: Threads,
    copied: Copied,
}

impl Meter {
    /// Reads.
    ///
    /// # Errors
    /// When the machine or its owner's daemon is gone.
    pub fn start(desk: &Desk<'_>) -> Result<Self, Failure> {
        let call = Call::new(Method::GET, format!("/v1/images/{}", desk.user));
        let view: ImageView = runtime()?.block_on(desk.client.call(&call))?;
        let pid = view
            .pid
            .ok_or_else(|| Failure::new("the daemon does not say which process holds the machine"))?;
        let daemon = desk.testbed.daemon(OWNER).map_err(Failure::new)?;
        // Asking costs the daemon time, so it is asked before its time is read.
        let copied = copied(desk)?;
        Ok(Self { machine: Threads::of(pid)?, daemon: Threads::of(daemon)?, copied })
    }

    /// Reads again, and says what was used meanwhile.
    ///
    /// # Errors
    /// When one of them is gone.
    pub fn stop(self, desk: &Desk<'_>) -> Result<(Used, Copied), Failure> {
        let (machine, daemon) = (Threads::of(self.machine.pid)?, Threads::of(self.daemon.pid)?);
        let used = Used { machine_s: self.machine.until(&machine), daemon_s: self.daemon.until(&daemon) };
        let now = copied(desk)?;
        let more = Copied {
            mirror: now.mirror.saturating_sub(self.copied.mirror),
            naive: now.naive.saturating_sub(self.copied.naive),
        };
        Ok((used, more))
    }
}

/// Nanoseconds on a processor of each thread of a process. Clock ticks, which whole processes are counted in, are as
/// long as what is measured.
struct Threads {
    pid: u32,
    ns: BTreeMap<u32, u64>,
}

impl Threads {
    /// Reads those of a process (`/proc/PID/task/TID/schedstat`, first field).
    fn of(pid: u32) -> Result<Self, Failure> {
        let dir = format!("/proc/{pid}/task");
        let failed = |error: std::io::Error| Failure::new(format!("{dir}: {error}"));
        let mut ns = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let Ok(thread) = entry.map_err(failed)?.file_name().to_string_lossy().parse() else { continue };
            // One that has just ended is left out here as well as there.
            let Ok(text) = fs::read_to_string(format!("{dir}/{thread}/schedstat")) else { continue };
            let first = text.split(' ').next().and_then(|first| first.parse().ok());
            ns.insert(thread, first.ok_or_else(|| Failure::new(format!("{dir}: no time in {text:?}")))?);
        }
        Ok(Self { pid, ns })
    }

    /// Seconds used between two readings. What a thread did that ended in between is not known; the daemon's end after
    /// ten idle seconds, so that in a shorter slice they have done nothing.
    fn until(&self, later: &Self) -> f64 {
        let used = later.ns.iter().map(|(thread, ns)| ns - self.ns.get(thread).unwrap_or(&0).min(ns));
        used.sum::<u64>() as f64 / 1e9
    }
}

/// The owner's counters.
fn copied(desk: &Desk<'_>) -> Result<Copied, Failure> {
    let status = desk.testbed.status().map_err(Failure::new)?;
    let owner = status.hosts.iter().find(|host| host.name == OWNER);
    let socket = &owner.ok_or_else(|| Failure::new(format!("there is no host {OWNER}")))?.socket;
    let answer =
        runtime()?.block_on(async { unix(socket).await?.call(&Call::new(Method::GET, "/metrics")).await })?;
    Ok(read(&String::from_utf8_lossy(&answer.body)))
}

/// Reads them from Prometheus's text format; what was never counted is not there.
fn read(text: &str) -> Copied {
    let of = |kind: &str| {
        let label = format!("kind=\"{kind}\"");
        let lines = text.lines().filter_map(|line| line.strip_prefix(FAMILY)?.strip_prefix('{'));
        let values = lines.filter_map(|line| {
            let (labels, value) = line.split_once('}')?;
            labels.split(',').any(|found| found == label).then(|| value.trim().parse::<f64>().ok())?
        });
        values.sum::<f64>() as u64
    };
    Copied { mirror: of("mirror"), naive: of("naive") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_their_kind() {
        let text = "# HELP kage_replica_bytes_total Bytes.\n# TYPE kage_replica_bytes_total counter\n\
                    kage_replica_bytes_total{kind=\"mirror\"} 1200\n\
                    kage_replica_bytes_total{host=\"h2\",kind=\"naive\"} 4e3\n\
                    kage_replica_bytes_total{host=\"h3\",kind=\"naive\"} 96\n\
                    kage_replica_bytes_totals{kind=\"mirror\"} 7\nkage_images{state=\"running\"} 1\n";
        assert_eq!(read(text), Copied { mirror: 1200, naive: 4096 });
        assert_eq!(read(""), Copied::default());
    }

    #[test]
    fn time_is_summed_over_threads_and_new_ones_count_whole() {
        let threads = |ns: &[(u32, u64)]| Threads { pid: 1, ns: ns.iter().copied().collect() };
        let used =
            threads(&[(1, 1_000_000_000), (2, 5)]).until(&threads(&[(1, 1_500_000_000), (3, 250_000_000)]));
        assert!((used - 0.75).abs() < 1e-9, "{used}");
    }

    #[test]
    fn this_process_has_used_time() {
        let before = Threads::of(std::process::id()).unwrap();
        let begun = std::time::Instant::now();
        while begun.elapsed() < std::time::Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        assert!(before.until(&Threads::of(std::process::id()).unwrap()) > 0.0);
    }
}

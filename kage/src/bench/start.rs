//! `kage bench start`: from the login call to the machine's first TCP reply at its user's device.
//!
//! *Warm*: the pool has a clone of the template waiting. *Cold*: nothing is ready; the VMM process is spawned and
//! the template copied while the user waits. *Again*: a login that finds the machine running.

use std::{
    io::{Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use http::Method;
use kage_host::{
    api::types::{ImageView, LoginReply, LoginRequest, Ready},
    http::Call,
    units::Size,
};
use serde_json::json;

use super::{Case, MachineInfo, Report, desk::runtime, show};
use crate::{
    client::{Client, Failure},
    output::Output,
    testbed::{Cancel, Testbed, TestbedSpec},
};

/// Runs with `--quick`.
const QUICK: u32 = 5;

/// Machines kept ready, of each kind: a bench starts its clock when they are there and nothing else is being made.
const POOL: usize = 2;

/// Pause between two looks at the pool.
const LOOK: Duration = Duration::from_millis(50);

/// A machine is idle once it has done nothing for so long.
const IDLE: Duration = Duration::from_secs(1);

/// Longest wait for the first reply.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Warm,
    Cold,
}

/// Runs the bench.
///
/// # Errors
/// What keeps it from running.
pub fn run(runs: u32, quick: bool, memory: Size, output: Output) -> Result<(), Failure> {
    let runs = if quick { runs.min(QUICK) } else { runs }.max(1);
    let cancel = crate::testbed::cli::cancel_on_signals().map_err(Failure::new)?;
    let dir = std::env::temp_dir().join(format!("kage-bench-{}", std::process::id()));
    let binary = std::env::current_exe().map_err(Failure::new)?;
    let spec =
        TestbedSpec { hosts: 1, devices: 1, image_memory: Some(memory), ..TestbedSpec::new(dir, binary) };
    output.progress("making a host and a device");
    let testbed = Testbed::scoped(spec, &cancel).map_err(Failure::new)?;
    let report = measure(&testbed, runs, memory, output, &cancel)?;
    output.result(&report, show)
}

fn measure(
    testbed: &Testbed,
    runs: u32,
    memory: Size,
    output: Output,
    cancel: &Cancel,
) -> Result<Report, Failure> {
    let status = testbed.status().map_err(Failure::new)?;
    let (Some(host), Some(device)) = (status.hosts.first(), status.devices.first()) else {
        return Err(Failure::new("the testbed has no host or no device"));
    };
    let params = json!({ "memory_bytes": memory.0 });
    let mut cases = Vec::new();
    for (kind, name) in [(Kind::Warm, "start_warm"), (Kind::Cold, "start_cold")] {
        let (mut first_replies, mut answers) = (Vec::new(), Vec::new());
        for number in 0..runs {
            cancel.check().map_err(Failure::new)?;
            settled(&host.socket, cancel)?;
            let user = format!("{name}-{number}");
            let (socket, to) = (host.socket.clone(), device.name.clone());
            let measured = testbed.within(&to, move || one(&socket, &user, kind)).map_err(Failure::new)??;
            first_replies.push(measured.first_reply_ms);
            answers.push(measured.started_ms);
        }
        output.progress(format!("{name}: {runs} logins"));
        cases.push(Case::of(name, params.clone(), "ms", first_replies));
        cases.push(Case::of(&format!("{name}_seen_by_host"), params.clone(), "ms", answers));
    }
    let (socket, to) = (host.socket.clone(), device.name.clone());
    let idle = testbed.within(&to, move || idle(&socket)).map_err(Failure::new)??;
    cases.push(Case::of("login_again", params.clone(), "ms", idle.again_ms));
    cases.push(Case::of("idle_pss", params, "KiB", vec![idle.pss_kib]));
    Ok(Report { machine: MachineInfo::here(), cases })
}

struct Measured {
    first_reply_ms: f64,
    started_ms: f64,
}

fn login(
    runtime: &tokio::runtime::Runtime,
    client: &Client,
    user: &str,
    kind: Kind,
) -> Result<LoginReply, Failure> {
    let request = LoginRequest { cold: kind == Kind::Cold, ..LoginRequest::default() };
    let call = Call::new(Method::PUT, format!("/v1/images/{user}")).json(&request);
    Ok(runtime.block_on(client.call(&call))?)
}

/// Waits until the pools are full again.
fn settled(socket: &Path, cancel: &Cancel) -> Result<(), Failure> {
    let (runtime, client) = (runtime()?, Client::at(socket));
    let until = Instant::now() + PATIENCE;
    loop {
        cancel.check().map_err(Failure::new)?;
        let ready: Ready = runtime.block_on(client.call(&Call::new(Method::GET, "/readyz")))?;
        if ready.warm_logins >= POOL && ready.warm_shells >= POOL {
            // The last one was just made: let the process that made it come to rest.
            std::thread::sleep(LOOK);
            return Ok(());
        }
        if Instant::now() > until {
            return Err(Failure::new("the pool of warm machines does not fill; see the host's log"));
        }
        std::thread::sleep(LOOK);
    }
}

/// One login by a user who was never here, seen from the device's namespace.
fn one(socket: &Path, user: &str, kind: Kind) -> Result<Measured, Failure> {
    let (runtime, client) = (runtime()?, Client::at(socket));
    let begun = Instant::now();
    let reply = login(&runtime, &client, user, kind)?;
    first_reply(reply.address)?;
    let first_reply_ms = begun.elapsed().as_secs_f64() * 1e3;
    let stop = Call::new(Method::POST, format!("/v1/images/{user}/stop"));
    let _: ImageView = runtime.block_on(client.call(&stop))?;
    Ok(Measured { first_reply_ms, started_ms: reply.started_ms })
}

/// Opens TCP's echo and waits for one byte.
fn first_reply(address: Ipv6Addr) -> Result<(), Failure> {
    let to = SocketAddr::from((address, 7));
    let mut stream =
        TcpStream::connect_timeout(&to, PATIENCE).map_err(|error| Failure::new(format!("{to}: {error}")))?;
    let mut byte = [0x6b];
    stream
        .set_nodelay(true)
        .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
        .and_then(|()| stream.write_all(&byte))
        .and_then(|()| stream.read_exact(&mut byte))
        .map_err(|error| Failure::new(format!("{to}: {error}")))
}

struct Idle {
    again_ms: Vec<f64>,
    pss_kib: f64,
}

/// What an idle machine costs, and a login that finds it.
fn idle(socket: &Path) -> Result<Idle, Failure> {
    let (runtime, client) = (runtime()?, Client::at(socket));
    let reply = login(&runtime, &client, "idle", Kind::Warm)?;
    first_reply(reply.address)?;
    std::thread::sleep(IDLE);
    let view: ImageView = runtime.block_on(client.call(&Call::new(Method::GET, "/v1/images/idle")))?;
    let pid =
        view.pid.ok_or_else(|| Failure::new("the daemon does not say which process holds the machine"))?;
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))
        .map_err(|error| Failure::new(format!("/proc/{pid}/smaps: {error}")))?;
    let mut again_ms = Vec::new();
    for _ in 0..20 {
        let begun = Instant::now();
        login(&runtime, &client, "idle", Kind::Warm)?;
        again_ms.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    let stop = Call::new(Method::POST, "/v1/images/idle/stop");
    let _: ImageView = runtime.block_on(client.call(&stop))?;
    #[expect(clippy::cast_precision_loss, reason = "kibibytes of one process")]
    let pss_kib = pss_beside_memory(&smaps) as f64;
    Ok(Idle { again_ms, pss_kib })
}

/// Proportional set size in KiB of all mappings but the machine's own memory and disk (`proc_pid_smaps(5)`).
fn pss_beside_memory(smaps: &str) -> u64 {
    let (mut sum, mut counts) = (0, true);
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if first.contains('-') && !first.ends_with(':') {
            counts = !(line.contains("memfd:kage-memory") || line.contains(".disk"));
        } else if let Some(rest) = line.strip_prefix("Pss:")
            && counts
        {
            sum += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_own_memory_is_no_cost_of_the_process() {
        let smaps = "55-56 r-xp 00 08:01 1 /usr/bin/kage\nRss: 100 kB\nPss: 40 kB\n\
                     7f-80 rw-s 00 00:01 2 /memfd:kage-memory (deleted)\nPss: 65536 kB\n\
                     81-82 rw-p 00 00:00 0 [stack]\nPss: 8 kB\nPss_Dirty: 8 kB\n";
        assert_eq!(pss_beside_memory(smaps), 48);
    }
}

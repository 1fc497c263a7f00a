//! `kage bench drain`: a host with many machines is emptied: how long that takes, the longest gap of any of them, and
//! whether one is lost.
//!
//! Every machine has an open TCP connection from a device, with bytes echoed before; it counts as lost unless bytes are
//! echoed on the same connection after the drain, and as lost too where it did not move.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use clap::Args;
use http::Method;
use kage_host::{
    api::types::{DrainProgress, DrainReport, DrainRequest, LoginReply, LoginRequest, MoveReport, Operation},
    http::Call,
    units::{Rate, Size},
};
use serde_json::json;

use super::{Case, MachineInfo, Report, desk::runtime, show};
use crate::{
    client::{Client, Failure},
    operation::follow,
    output::{Output, Status},
    testbed::{Cancel, LinkShape, Testbed, TestbedSpec},
};

/// Port of a machine's TCP echo service.
const ECHO: u16 = 7;

/// Longest wait for an echo.
const PATIENCE: Duration = Duration::from_secs(5);

/// Images with `--quick`.
const QUICK: u16 = 20;

/// How long a login may take.
const LOGIN: Duration = Duration::from_secs(30);

/// `kage bench drain`.
#[derive(Clone, Debug, Args)]
pub struct DrainBenchArgs {
    /// Machines on the host that is emptied
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=500))]
    pub images: u16,
    /// Hosts, that one included
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=20))]
    pub hosts: u16,
    /// Moves at once [default: the daemon's]
    #[arg(long, value_name = "N")]
    pub parallel: Option<u16>,
    /// Rate of each host's link to the others (default: unlimited)
    #[arg(long, value_name = "RATE")]
    pub link: Option<Rate>,
    /// Memory of the machines
    #[arg(long, default_value = "16MiB", value_name = "SIZE")]
    pub memory: Size,
    /// Fewer machines
    #[arg(long)]
    pub quick: bool,
}

/// Runs the bench.
///
/// # Errors
/// What keeps it from running; a machine or a connection that was lost.
pub fn run_command(args: &DrainBenchArgs, output: Output) -> Result<(), Failure> {
    let cancel = crate::testbed::cli::cancel_on_signals().map_err(Failure::new)?;
    let cases = run(args, output, &cancel)?;
    let lost = cases.iter().find(|case| case.name == "drain_lost").map_or(0.0, |case| case.max);
    output.result(&Report { machine: MachineInfo::here(), cases }, show)?;
    if lost > 0.0 { Err(Failure::new(format!("{lost} machines or connections were lost"))) } else { Ok(()) }
}

/// Measures a drain on a testbed of its own.
///
/// # Errors
/// What keeps it from running.
pub fn run(args: &DrainBenchArgs, output: Output, cancel: &Cancel) -> Result<Vec<Case>, Failure> {
    let images = if args.quick { args.images.min(QUICK) } else { args.images };
    let dir = std::env::temp_dir().join(format!("kage-bench-drain-{}", std::process::id()));
    let binary = std::env::current_exe().map_err(Failure::new)?;
    let spec = TestbedSpec {
        hosts: args.hosts,
        devices: 1,
        image_memory: Some(args.memory),
        link: LinkShape { rate: args.link, ..LinkShape::default() },
        ..TestbedSpec::new(dir, binary)
    };
    output.progress(format!("making {} hosts and a device", args.hosts));
    let testbed = Testbed::scoped(spec, cancel).map_err(Failure::new)?;
    let (client, connections) = log_in(&testbed, images, output, cancel)?;
    let report = drain(&client, args, output)?;
    let dead = connections.into_iter().filter_map(|mut stream| echo(&mut stream, b"after").err()).count();
    let stay = report.images.iter().filter(|image| image.outcome != "handed_over");
    for image in stay.clone() {
        output.warn(format!(
            "{} {}: {}",
            image.user,
            image.outcome,
            image.reason.as_deref().unwrap_or("no reason given")
        ));
    }
    let params = json!({
        "images": images, "hosts": args.hosts, "memory_bytes": args.memory.0, "parallel": args.parallel,
        "link": args.link,
    });
    let of = |figure: fn(&MoveReport) -> f64| {
        report.images.iter().filter_map(|image| image.report.as_ref()).map(figure).collect::<Vec<_>>()
    };
    let case = |name: &str, unit, figures| Case::of(name, params.clone(), unit, figures);
    #[expect(clippy::cast_precision_loss, reason = "a count of machines")]
    let lost = (stay.count() + dead) as f64;
    Ok(vec![
        case("drain_total", "ms", vec![report.total_ms]),
        case("drain_gap", "ms", of(|report| report.gap_ms)),
        case("drain_blackout", "ms", of(|report| report.blackout_ms)),
        case("drain_move", "ms", of(|report| report.total_ms)),
        #[expect(clippy::cast_precision_loss, reason = "shown in KiB")]
        case("drain_wire", "KiB", of(|report| report.bytes_wire as f64 / 1024.0)),
        case("drain_lost", "machines", vec![lost]),
    ])
}

/// Logs users in at the first host, and opens a connection to each one's machine.
fn log_in(
    testbed: &Testbed,
    images: u16,
    output: Output,
    cancel: &Cancel,
) -> Result<(Client, Vec<TcpStream>), Failure> {
    let status = testbed.status().map_err(Failure::new)?;
    let (Some(host), Some(device)) = (status.hosts.first(), status.devices.first()) else {
        return Err(Failure::new("the testbed has no host or no device"));
    };
    let (runtime, client) = (runtime()?, Client::at(&host.socket));
    let mut told = Status::new(output, Duration::from_secs(1), Duration::from_secs(5));
    let mut connections = Vec::with_capacity(images.into());
    for number in 0..images {
        cancel.check().map_err(Failure::new)?;
        told.say(|| format!("{number} of {images} machines run"));
        let request = LoginRequest { at: Some(host.name.to_string()), ..LoginRequest::default() };
        let call =
            Call::new(Method::PUT, format!("/v1/images/drain-{number}")).json(&request).patience(LOGIN);
        let login: LoginReply = runtime.block_on(client.call(&call))?;
        let to = SocketAddr::from((login.address, ECHO));
        let open = move || TcpStream::connect_timeout(&to, PATIENCE);
        let stream = testbed.within(&device.name, open).map_err(Failure::new)?;
        let mut stream = stream.map_err(|error| Failure::new(format!("echo of drain-{number}: {error}")))?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(Failure::new)?;
        echo(&mut stream, b"before")
            .map_err(|error| Failure::new(format!("echo of drain-{number}: {error}")))?;
        connections.push(stream);
    }
    told.end();
    Ok((client, connections))
}

fn drain(client: &Client, args: &DrainBenchArgs, output: Output) -> Result<DrainReport, Failure> {
    let request = DrainRequest { parallel: args.parallel, ..DrainRequest::default() };
    let mut told = Status::new(output, Duration::ZERO, Duration::from_secs(2));
    let report = runtime()?.block_on(async {
        let call = Call::new(Method::POST, "/v1/hosts/h1/drain").json(&request);
        let begun: Operation = client.call(&call).await?;
        let progress = |progress: &serde_json::Value| {
            if let Ok(progress) = serde_json::from_value::<DrainProgress>(progress.clone()) {
                told.say(|| format!("{} of {} machines moved", progress.moved, progress.images));
            }
            None
        };
        follow(client, begun, output, progress).await
    });
    told.end();
    report
}

/// Has a machine echo some bytes.
fn echo(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes)?;
    let mut answer = vec![0; bytes.len()];
    stream.read_exact(&mut answer)?;
    if answer == bytes { Ok(()) } else { Err(std::io::Error::other("other bytes came back")) }
}

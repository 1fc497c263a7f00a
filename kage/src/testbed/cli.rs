//! `kage testbed …` as a command.

use std::{path::PathBuf, process::Command, thread, time::Duration};

use clap::Subcommand;
use kage_host::units::{Rate, Size, Span};

use super::{Cancel, DEFAULT_DIR, LinkShape, Testbed, TestbedError, TestbedSpec, TestbedStatus};

/// What to do with a testbed.
#[derive(Clone, Debug, Subcommand)]
pub enum TestbedCommand {
    /// Make hosts, access points and devices as network namespaces here, and start the hosts' daemons
    #[command(after_help = "Example: kage testbed up --hosts 3 --link 50mbit --delay 5ms")]
    Up {
        /// Edge hosts h1…, with one access point each (ap-1…)
        #[arg(long, default_value_t = 3, value_name = "N")]
        hosts: u16,
        /// User devices d1…, at ap-1…
        #[arg(long, default_value_t = 2, value_name = "M")]
        devices: u16,
        /// Rate of each host's link to the others, both ways (default: unlimited)
        #[arg(long, value_name = "RATE")]
        link: Option<Rate>,
        /// Delay between any two hosts, one way
        #[arg(long, value_name = "TIME")]
        delay: Option<Span>,
        /// Share of frames between hosts that is lost, as 0.1% or 0.001
        #[arg(long, value_name = "SHARE", value_parser = parse_share)]
        loss: Option<u32>,
        /// MTU of the links between hosts
        #[arg(long, default_value_t = 1500, value_name = "BYTES")]
        mtu: u32,
        /// Give images and devices IPv4 addresses too: 10.77.0.0/24 and 10.78.0.0/24
        #[arg(long)]
        ipv4: bool,
        /// Memory of new images
        #[arg(long, value_name = "SIZE")]
        image_memory: Option<Size>,
        /// Which testbed
        #[command(flatten)]
        place: Place,
    },
    /// Remove every trace of the testbed, also of one that was interrupted
    #[command(after_help = "Example: kage testbed down")]
    Down {
        /// Which testbed
        #[command(flatten)]
        place: Place,
    },
    /// Show hosts, devices and how to send accounting
    #[command(after_help = "Example: kage testbed status -o json")]
    Status {
        /// Which testbed
        #[command(flatten)]
        place: Place,
    },
    /// Carry a device to another access point: link, then the accounting Start its access point would send
    #[command(after_help = "Example: kage testbed move d1 ap-2")]
    Move {
        /// The device
        device: String,
        /// The access point
        ap: String,
        /// Only the link: nobody is told
        #[arg(long)]
        silent: bool,
        /// Which testbed
        #[command(flatten)]
        place: Place,
    },
    /// Run a command in the network namespace of a host or device
    #[command(after_help = "Example: kage testbed exec d1 -- ssh alice@fd4b:6167:6500::100:0:1")]
    Exec {
        /// Host or device
        name: String,
        /// Which testbed
        #[command(flatten)]
        place: Place,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<std::ffi::OsString>,
    },
}

/// Which testbed.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    /// Directory of the testbed
    #[arg(long, default_value = DEFAULT_DIR, env = "KAGE_TESTBED_DIR", value_name = "DIR")]
    pub dir: PathBuf,
}

/// Reads a share of frames as parts in a million.
fn parse_share(text: &str) -> Result<u32, String> {
    let cure = || format!("{text:?} is no share; write it as 0.1% or 0.001");
    let (number, unit) = match text.strip_suffix('%') {
        Some(percent) => (percent, 10_000.0),
        None => (text, 1_000_000.0),
    };
    let share: f64 = number.trim().parse().map_err(|_| cure())?;
    let ppm = (share * unit).round();
    if (0.0..=1_000_000.0).contains(&ppm) { Ok(ppm as u32) } else { Err(cure()) }
}

/// Does it. Output is one JSON object with `json`, else text, on stdout; nothing with `quiet`.
///
/// # Errors
/// [`TestbedError`], whose [`exit_code`](TestbedError::exit_code) the command ends with.
pub fn run(command: TestbedCommand, json: bool, quiet: bool) -> Result<(), TestbedError> {
    match command {
        TestbedCommand::Up { hosts, devices, link, delay, loss, mtu, ipv4, image_memory, place } => {
            let binary = std::env::current_exe()
                .map_err(|source| TestbedError::System { doing: "finding this program", source })?;
            let delay = delay.map_or(Duration::ZERO, Span::duration);
            let link = LinkShape { rate: link, delay, loss_ppm: loss.unwrap_or(0) };
            let spec = TestbedSpec {
                hosts,
                devices,
                link,
                mtu,
                ipv4,
                image_memory,
                ..TestbedSpec::new(place.dir, binary)
            };
            let cancel = cancel_on_signals()?;
            let testbed = Testbed::up(spec, &cancel)?;
            show(&testbed.status()?, json, quiet);
        }
        TestbedCommand::Down { place } => Testbed::remove(&place.dir)?,
        TestbedCommand::Status { place } => show(&Testbed::open(&place.dir)?.status()?, json, quiet),
        TestbedCommand::Move { device, ap, silent, place } => {
            let moved = Testbed::open(&place.dir)?.move_device(&device, &ap, silent)?;
            if json {
                print_json(&moved);
            } else if !quiet {
                let answered = moved.accounting.as_ref().map_or_else(
                    || "silently".to_owned(),
                    |accounting| format!("accounting answered after {:.1} ms", accounting.response_ms),
                );
                println!(
                    "{} {} → {} ({}): link after {:.1} ms, {answered}; {} frames still came by the old link",
                    moved.device, moved.from, moved.to, moved.host, moved.link_ms, moved.frames_by_old_link
                );
            }
        }
        TestbedCommand::Exec { name, place, command } => {
            let testbed = Testbed::open(&place.dir)?;
            if let Some((program, arguments)) = command.split_first() {
                return Err(testbed.exec(&name, Command::new(program).args(arguments)));
            }
        }
    }
    Ok(())
}

/// Has ^C and SIGTERM undo what is being made, instead of leaving half of it.
pub(crate) fn cancel_on_signals() -> Result<Cancel, TestbedError> {
    let failed = |source| TestbedError::System { doing: "preparing for ^C", source };
    let cancel = Cancel::new().map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let signalled = cancel.clone();
    let mut terminated = {
        let _inside = runtime.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(failed)?
    };
    let mut interrupted = {
        let _inside = runtime.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt()).map_err(failed)?
    };
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! { _ = terminated.recv() => {}, _ = interrupted.recv() => {} }
        });
        signalled.cancel();
    });
    Ok(cancel)
}

fn show(status: &TestbedStatus, json: bool, quiet: bool) {
    if json {
        print_json(status);
        return;
    }
    if quiet {
        return;
    }
    println!("testbed in {}", status.dir.display());
    for host in &status.hosts {
        println!(
            "  {:<5} {:<22} {:<10} {}",
            host.name,
            host.netns,
            host.aps.join(","),
            host.socket.display()
        );
    }
    for device in &status.devices {
        println!("  {:<5} {:<22} {:<10} {}", device.name, device.netns, device.ap, device.address);
    }
    println!("  accounting: UDP port {} of each host, secret {}", status.radius.port, status.radius.secret);
}

fn print_json(value: &impl serde::Serialize) {
    match serde_json::to_string(value) {
        Ok(text) => println!("{text}"),
        Err(error) => tracing::error!(%error, "cannot write JSON"),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Top {
        #[command(subcommand)]
        command: TestbedCommand,
    }

    #[test]
    fn the_documented_command_lines_are_read() {
        let parse = |line: &str| Top::try_parse_from(line.split(' ')).map(|top| top.command);
        let line = "testbed up --hosts 4 --devices 1 --link 50mbit --delay 5ms --loss 0.1% --dir /tmp/x";
        let Ok(TestbedCommand::Up { hosts: 4, devices: 1, link, delay, loss, place, .. }) = parse(line)
        else {
            panic!("not read");
        };
        assert_eq!((link, loss), (Some(Rate(50_000_000)), Some(1000)));
        assert_eq!((delay.map(Span::duration), place.dir), (Some(Duration::from_millis(5)), "/tmp/x".into()));
        let Ok(TestbedCommand::Exec { name, command, .. }) = parse("testbed exec d1 -- ssh -p 22 alice@::1")
        else {
            panic!("not read");
        };
        assert_eq!((name.as_str(), command.len()), ("d1", 4));
        assert!(matches!(
            parse("testbed move d1 ap-2 --silent"),
            Ok(TestbedCommand::Move { silent: true, .. })
        ));
        for bad in
            ["testbed exec d1", "testbed up --link 50", "testbed up --loss 2", "testbed up --delay fast"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}

//! A link with a delay, made in user space: a process that holds both ends as taps and carries frames over late.
//!
//! Frames keep their vnet header on the way, so that partial checksums and large segments cross as they would a
//! veth. The whole delay lies on the way from a host to the core, so that it is paid once between any two hosts.
//! The kernel's `netem` would do the same where it is built in.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
};

use super::{
    TestbedError,
    layout::Layout,
    namespace,
    notify::{self, poll_until},
};

/// Name of the hidden command that runs this.
pub const COMMAND: &str = "testbed-delay";

/// Longest frame with its vnet header: a large segment of 64 KiB.
const MAX_FRAME_BYTES: usize = (64 << 10) + 128;
/// Bytes under way in one direction: 100 ms at 5 Gbit/s. Beyond, frames are dropped as at any full queue.
const MAX_UNDER_WAY_BYTES: usize = 64 << 20;
/// Frames that a tap keeps for this process.
const TAP_QUEUE_FRAMES: u32 = 4096;
/// As good as for ever.
const FAR: Duration = Duration::from_secs(3600);

/// What the process is told.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct Args {
    /// One-way delay in microseconds.
    #[arg(long)]
    delay_us: u64,
    /// The namespace between the hosts.
    #[arg(long)]
    core: String,
    /// PORT=NAMESPACE: joins PORT in the core to eth0 in that namespace.
    #[arg(long = "link", value_parser = parse_link)]
    links: Vec<(String, String)>,
}

fn parse_link(text: &str) -> Result<(String, String), String> {
    let (port, netns) = text.split_once('=').ok_or("write PORT=NAMESPACE")?;
    Ok((port.to_owned(), netns.to_owned()))
}

impl Args {
    /// One link for every host of a testbed.
    pub(super) fn of(layout: &Layout, delay: Duration) -> Self {
        Self {
            delay_us: u64::try_from(delay.as_micros()).unwrap_or(u64::MAX),
            core: layout.core.clone(),
            links: layout.hosts.iter().map(|host| (host.port(), host.netns.clone())).collect(),
        }
    }

    /// The command line that is parsed into this.
    pub(super) fn to_arguments(&self) -> Vec<String> {
        let mut arguments =
            vec!["--delay-us".into(), self.delay_us.to_string(), "--core".into(), self.core.clone()];
        for (port, netns) in &self.links {
            arguments.extend(["--link".into(), format!("{port}={netns}")]);
        }
        arguments
    }
}

/// Joins the links, says that it is ready, and carries frames until it is ended.
///
/// # Errors
/// If a tap cannot be made, or one vanishes.
pub fn run(args: &Args) -> Result<(), TestbedError> {
    let delay = Duration::from_micros(args.delay_us);
    let mut directions = Vec::new();
    for (port, netns) in &args.links {
        let core = Arc::new(open(&args.core, port)?);
        let host = Arc::new(open(netns, "eth0")?);
        directions.push((Arc::clone(&host), Arc::clone(&core), delay));
        directions.push((core, host, Duration::ZERO));
    }
    let carriers: Vec<_> = directions
        .into_iter()
        .map(|(from, to, delay)| thread::spawn(move || carry(&from, &to, delay)))
        .collect();
    notify::ready();
    for carrier in carriers {
        carrier
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("a carrying thread has panicked")))
            .map_err(|source| TestbedError::System { doing: "carrying frames", source })?;
    }
    Ok(())
}

fn open(netns: &str, name: &str) -> Result<OwnedFd, TestbedError> {
    let failed = |cause: String| TestbedError::Link(format!("{name} in {netns}: {cause}"));
    let tap = namespace::within(netns, || kage_fabric::open_tap(name))?
        .map_err(|error| failed(error.to_string()))?;
    kage_fabric::set_offload(&tap, true, true).map_err(|error| failed(error.to_string()))?;
    super::network::ip(netns, &[&format!("link set {name} txqueuelen {TAP_QUEUE_FRAMES}")])?;
    Ok(tap)
}

/// Frames under way in one direction, in order, each with the time it arrives.
#[derive(Default)]
struct Line {
    frames: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
}

impl Line {
    fn first_due(&self) -> Option<Instant> {
        self.frames.front().map(|(due, _)| *due)
    }

    fn push(&mut self, due: Instant, frame: &[u8]) {
        if self.bytes + frame.len() <= MAX_UNDER_WAY_BYTES {
            self.bytes += frame.len();
            self.frames.push_back((due, frame.to_vec()));
        }
    }

    fn pop_due(&mut self, now: Instant) -> Option<Vec<u8>> {
        let (_, frame) = self.frames.pop_front_if(|(due, _)| *due <= now)?;
        self.bytes -= frame.len();
        Some(frame)
    }
}

fn carry(from: &OwnedFd, to: &OwnedFd, delay: Duration) -> io::Result<()> {
    let mut line = Line::default();
    let mut buffer = vec![0; MAX_FRAME_BYTES];
    loop {
        let wake = line.first_due().unwrap_or_else(|| Instant::now() + FAR);
        if poll_until(&mut [PollFd::new(from, PollFlags::IN)], wake)? > 0 {
            take_in(from, &mut line, &mut buffer, delay)?;
        }
        while let Some(frame) = line.pop_due(Instant::now()) {
            deliver(to, &frame)?;
        }
    }
}

/// Takes in what has been sent, but not for so long that a frame under way is late.
fn take_in(from: &OwnedFd, line: &mut Line, buffer: &mut [u8], delay: Duration) -> io::Result<()> {
    loop {
        let length = match rustix::io::read(from, &mut *buffer) {
            Ok(length) => length,
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let now = Instant::now();
        line.push(now + delay, &buffer[..length]);
        if line.first_due().is_some_and(|due| due <= now) {
            return Ok(());
        }
    }
}

/// An interface that is down takes no frames: they are lost, as on a cut line.
fn deliver(to: &OwnedFd, frame: &[u8]) -> io::Result<()> {
    match rustix::io::retry_on_intr(|| rustix::io::write(to, frame)) {
        Ok(_) | Err(Errno::IO | Errno::AGAIN | Errno::INVAL | Errno::NOBUFS | Errno::NOMEM) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn the_command_line_says_what_was_meant() {
        let args = Args {
            delay_us: 5000,
            core: "core".into(),
            links: vec![("p1".into(), "h1".into()), ("p2".into(), "h2".into())],
        };
        let line = [COMMAND.to_owned()].into_iter().chain(args.to_arguments());
        assert_eq!(Command::parse_from(line).args, args);
        assert!(
            Command::try_parse_from([COMMAND, "--delay-us", "1", "--core", "c", "--link", "p1"]).is_err()
        );
    }
}

//! One run of a compiler: module in, code and reasons out, no longer than somebody waits for it.

use std::{
    io::{self, Read, Write},
    os::fd::AsFd,
    process::{Child, Command, ExitStatus, Stdio},
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::turns::left;

/// Bytes read or written in one go.
const CHUNK: usize = 64 << 10;
/// Most bytes of reasons kept.
const MAX_REASON: usize = 4 << 10;

/// How a run ended.
pub enum Ended {
    /// By itself.
    Itself {
        /// How.
        status: ExitStatus,
        /// What it wrote.
        code: Vec<u8>,
        /// What it said.
        reason: String,
    },
    /// Whoever asked has gone; so has it.
    Unwanted,
    /// It was ended, for the time it took.
    Late,
    /// It was ended, for what it wrote.
    TooLarge,
}

/// A process that ends with its owner.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Once it has been waited for, this signals nobody.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a compiler on a module, as long as the other end of `asker` is there, `until` at most, for `most` bytes of code.
///
/// # Errors
/// The system's.
pub fn run(
    command: &mut Command,
    wasm: &[u8],
    asker: &impl AsFd,
    until: Instant,
    most: usize,
) -> io::Result<Ended> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Killed(command.spawn()?);
    let ended = pidfd_open(Pid::from_child(&child.0), PidfdFlags::empty())?;
    let (mut stdin, mut stdout, mut stderr) =
        (child.0.stdin.take(), child.0.stdout.take(), child.0.stderr.take());
    for pipe in
        [stdin.as_ref().map(AsFd::as_fd), stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)]
    {
        pipe.map_or(Ok(()), |pipe| rustix::io::ioctl_fionbio(pipe, true))?;
    }
    let (mut wasm, mut code, mut reason) = (wasm, Vec::new(), Vec::new());
    let mut has_ended = false;
    while !has_ended || stdout.is_some() || stderr.is_some() {
        let Some(left) = left(until) else { return Ok(Ended::Late) };
        let mut polled = vec![PollFd::new(asker, PollFlags::RDHUP)];
        if !has_ended {
            polled.push(PollFd::new(&ended, PollFlags::IN));
        }
        if let Some(stdin) = &stdin {
            polled.push(PollFd::new(stdin, PollFlags::OUT));
        }
        for pipe in [stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)].into_iter().flatten()
        {
            polled.push(PollFd::from_borrowed_fd(pipe, PollFlags::IN));
        }
        match poll(&mut polled, Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !polled[0].revents().is_empty() {
            return Ok(Ended::Unwanted);
        }
        has_ended = has_ended || !polled[1].revents().is_empty();
        drop(polled);
        // It may refuse the module and end before it has read all.
        if give(&mut stdin, &mut wasm).is_err() {
            stdin = None;
        }
        take(&mut stdout, &mut code, most + 1)?;
        take(&mut stderr, &mut reason, MAX_REASON + CHUNK)?;
        reason.truncate(MAX_REASON);
        if code.len() > most {
            return Ok(Ended::TooLarge);
        }
    }
    let status = child.0.wait()?;
    Ok(Ended::Itself { status, code, reason: String::from_utf8_lossy(&reason).trim().to_owned() })
}

/// Writes what fits, and closes after the last byte.
fn give(pipe: &mut Option<impl Write>, bytes: &mut &[u8]) -> io::Result<()> {
    while let Some(open) = pipe {
        if bytes.is_empty() {
            *pipe = None;
            return Ok(());
        }
        match open.write(bytes.get(..CHUNK.min(bytes.len())).unwrap_or_default()) {
            Ok(count) => *bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads what is there, while `into` has fewer than `most` bytes; at its end the pipe is closed.
fn take(pipe: &mut Option<impl Read>, into: &mut Vec<u8>, most: usize) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    while let Some(open) = pipe {
        match open.read(&mut buffer) {
            Ok(0) => *pipe = None,
            Ok(count) => into.extend(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if into.len() >= most {
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, time::Duration};

    use super::*;

    /// A shell in the compiler's place.
    fn run(script: &str, wasm: &[u8], asker: &UnixStream, patience: Duration) -> Ended {
        let mut command = Command::new("sh");
        super::run(command.args(["-c", script]), wasm, asker, Instant::now() + patience, 1 << 20).unwrap()
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn what_goes_in_and_comes_out_is_whole() {
        let (asker, _other) = UnixStream::pair().unwrap();
        let wasm: Vec<u8> = (0..900_000_u32).map(|at| at as u8).collect();
        let Ended::Itself { status, code, reason } = run("echo why >&2; cat", &wasm, &asker, LONG) else {
            panic!("ended")
        };
        assert!(status.success() && code == wasm && reason == "why");
        // A reason cut in the middle of a character is still a reason.
        let script = "printf xx >&2; for i in $(seq 3000); do printf 'x\\303\\244'; done >&2; exit 1";
        let Ended::Itself { status, reason, .. } = run(script, &wasm, &asker, LONG) else { panic!("ended") };
        assert_eq!(status.code(), Some(1));
        assert!(reason.starts_with("xxxäxä") && reason.len() >= MAX_REASON);
    }

    #[test]
    fn nothing_runs_that_nobody_wants_or_that_goes_on_for_ever() {
        let begun = Instant::now();
        let (asker, other) = UnixStream::pair().unwrap();
        assert!(matches!(run("exec sleep 60", b"", &asker, Duration::from_millis(20)), Ended::Late));
        assert!(matches!(
            run("exec >&- 2>&-; exec sleep 60", b"", &asker, Duration::from_millis(20)),
            Ended::Late
        ));
        assert!(matches!(run("exec cat /dev/zero", b"", &asker, LONG), Ended::TooLarge));
        drop(other);
        assert!(matches!(run("exec sleep 60", b"", &asker, LONG), Ended::Unwanted));
        assert!(begun.elapsed() < LONG);
    }
}

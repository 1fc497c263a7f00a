//! Waiting for programs to be ready (`sd_notify(3)`), and for the user to change their mind.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixDatagram,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd},
    io::Errno,
};

use super::TestbedError;

/// Ends a lengthy call from another thread.
#[derive(Clone, Debug)]
pub struct Cancel(Arc<OwnedFd>);

impl Cancel {
    /// One that nobody has used yet.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Ends the calls that were given this, now and later.
    pub fn cancel(&self) {
        // The counter cannot overflow by ones; a full one is as good as a set one.
        let _ = rustix::io::write(&*self.0, &1_u64.to_ne_bytes());
    }

    /// Fails once cancelled.
    ///
    /// # Errors
    /// [`TestbedError::Cancelled`].
    pub fn check(&self) -> Result<(), TestbedError> {
        self.wait_until(Instant::now())
    }

    /// Waits until then, and fails as soon as it is cancelled.
    ///
    /// # Errors
    /// [`TestbedError::Cancelled`].
    pub fn wait_until(&self, deadline: Instant) -> Result<(), TestbedError> {
        match poll_until(&mut [PollFd::new(&*self.0, PollFlags::IN)], deadline) {
            Ok(0) => Ok(()),
            Ok(_) => Err(TestbedError::Cancelled),
            Err(source) => Err(TestbedError::System { doing: "polling", source }),
        }
    }
}

impl AsFd for Cancel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of the descriptors is ready, or until `deadline`; says how many are.
pub fn poll_until(fds: &mut [PollFd<'_>], deadline: Instant) -> io::Result<usize> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match rustix::event::poll(fds, Some(&timeout)) {
            Ok(ready) => return Ok(ready),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Where a program says that it is ready; its path goes into the program's `NOTIFY_SOCKET`.
#[derive(Debug)]
pub struct Readiness {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Readiness {
    /// Makes the socket.
    pub fn bind(path: &Path) -> Result<Self, TestbedError> {
        let failed = |source| TestbedError::File { path: path.into(), source };
        if let Err(error) = fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(failed(error));
        }
        let socket = UnixDatagram::bind(path).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        Ok(Self { socket, path: path.into() })
    }

    /// Whether the program has said by now that it is ready.
    pub fn is_ready(&self) -> bool {
        let mut message = [0; 1024];
        while let Ok(length) = self.socket.recv(&mut message) {
            if message[..length].split(|&byte| byte == b'\n').any(|line| line == b"READY=1") {
                return true;
            }
        }
        false
    }
}

impl AsFd for Readiness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Readiness {
    fn drop(&mut self) {
        // Left behind it is one file that `down` removes.
        let _ = fs::remove_file(&self.path);
    }
}

/// Says that this process is ready, if somebody waits for that.
pub fn ready() {
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET")
        && let Ok(socket) = UnixDatagram::unbound()
    {
        // Nobody may be there any more.
        let _ = socket.send_to(b"READY=1", path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_ready_line_counts() {
        let path = std::env::temp_dir().join(format!("kage-notify-{}", std::process::id()));
        let readiness = Readiness::bind(&path).unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        assert!(!readiness.is_ready());
        sender.send_to(b"STATUS=READY=1", &path).unwrap();
        assert!(!readiness.is_ready());
        sender.send_to(b"STATUS=up\nREADY=1\n", &path).unwrap();
        assert!(readiness.is_ready());
        drop(readiness);
        assert!(!path.exists());
    }

    #[test]
    fn a_cancelled_call_stays_cancelled() {
        let cancel = Cancel::new().unwrap();
        cancel.check().unwrap();
        cancel.clone().cancel();
        for _ in 0..2 {
            assert!(matches!(cancel.check(), Err(TestbedError::Cancelled)));
        }
        let hours = Instant::now() + std::time::Duration::from_secs(36_000);
        assert!(matches!(cancel.wait_until(hours), Err(TestbedError::Cancelled)));
    }
}

//! Socket options and waiting.

use std::{
    net::TcpStream,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{SockRef, TcpKeepalive};

use super::LinkError;

/// Unacknowledged data for so long means the peer is dead; an idle link notices as soon, by its
/// probes (both measured: 4.1 to 4.3 s after the interface went down). A handover's own timeouts are
/// longer: the link is to say first that the peer is gone.
pub(in crate::link) const USER_TIMEOUT: Duration = Duration::from_secs(4);

/// An idle link is probed after one second and given up after three lost probes more.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_PROBES: u32 = 3;

/// Unsent bytes in the kernel above which a bulk link takes no more: what is queued when the switch
/// comes is blackout. 16 KiB is one TLS record, 2.6 ms at 50 Mbit/s.
const UNSENT_BYTES: u32 = 16 << 10;

/// Plaintext encrypted before it is written: one `writev` of a few records that stay in the cache.
pub(super) const WRITE_BYTES: usize = 64 << 10;

/// Options every link has.
pub(super) fn tune(stream: &TcpStream) -> Result<(), LinkError> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_INTERVAL)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    Ok(())
}

/// Keeps what the kernel holds unsent small.
pub(super) fn keep_queue_short(stream: &TcpStream) -> Result<(), LinkError> {
    SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES)?;
    Ok(())
}

/// What a socket is ready for. Errors count as both: the next call reports them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    pub(super) readable: bool,
    pub(super) writable: bool,
}

/// Waits until the socket is ready for what is asked.
pub(super) fn wait(
    stream: &TcpStream,
    readable: bool,
    writable: bool,
    deadline: Option<Instant>,
) -> Result<Ready, LinkError> {
    let mut events = PollFlags::empty();
    events.set(PollFlags::IN, readable);
    events.set(PollFlags::OUT, writable);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        let mut fds = [PollFd::new(stream, events)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Err(LinkError::Timeout),
            Ok(_) => {
                let seen = fds[0].revents();
                let failed = seen.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL);
                return Ok(Ready {
                    readable: failed || seen.contains(PollFlags::IN),
                    writable: failed || seen.contains(PollFlags::OUT),
                });
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(LinkError::Io(error.into())),
        }
    }
}

/// Waits until there is something to read.
pub(super) fn wait_readable(stream: &TcpStream, deadline: Option<Instant>) -> Result<(), LinkError> {
    wait(stream, true, false, deadline).map(|_| ())
}

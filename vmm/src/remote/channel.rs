//! The control socket of one VMM process: one question at a time, each with its answer.
//!
//! An answer that comes too late would be taken for the next question's. So a connection on which anything went wrong is
//! closed, and the next question opens another, which replaces it at the VMM's end. What the VMM did of the question
//! that failed has to be asked. A VMM that may wait for a page of its memory is waited for as long as it lives.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use kage_machine::control::{MAX_PACKET, Reply, Request, decode, encode};
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
        sockopt::{Timeout, set_socket_timeout, socket_peercred},
    },
    process::{Pid, getpid},
};

use crate::packet;

/// How long a VMM may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn seqpacket() -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

pub(super) struct Channel {
    connection: Mutex<Connection>,
    /// Who must be at the other end.
    peer: Pid,
    patience: Duration,
}

struct Connection {
    socket: Option<OwnedFd>,
    buffer: Vec<u8>,
}

impl Channel {
    /// Connects to the process `peer`, or to whoever listens (it says so anew once it runs, so the credentials of a
    /// listening socket are its own).
    pub(super) fn open(path: &Path, peer: Option<Pid>) -> io::Result<Self> {
        let socket = dial(path, ANSWER_TIMEOUT)?;
        let peer = match peer {
            Some(peer) => peer,
            None => {
                let peer = socket_peercred(&socket)?.pid;
                // Before it says so anew the credentials are those of whoever bound the socket: this daemon.
                if peer == getpid() {
                    return Err(io::Error::other("its process has not begun"));
                }
                peer
            }
        };
        let connection = Connection { socket: Some(socket), buffer: vec![0; MAX_PACKET] };
        Ok(Self { connection: Mutex::new(connection), peer, patience: ANSWER_TIMEOUT })
    }

    /// The process at the other end.
    pub(super) const fn peer(&self) -> Pid {
        self.peer
    }

    /// Asks, and waits for the answer, while `excused` without limit; what is seen when there is none.
    pub(super) fn call(
        &self,
        path: &Path,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
        excused: impl Fn() -> bool,
    ) -> Result<(Reply, Vec<OwnedFd>), String> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let Connection { socket, buffer } = &mut *connection;
        let open = match socket.take() {
            Some(open) => open,
            None => self.again(path).map_err(|error| format!("{}: {error}", path.display()))?,
        };
        let answer =
            ask(&open, buffer, request, descriptors, excused).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => format!("it has not answered for {} s", self.patience.as_secs()),
                _ => error.to_string(),
            })?;
        *socket = Some(open);
        Ok(answer)
    }

    fn again(&self, path: &Path) -> io::Result<OwnedFd> {
        let socket = dial(path, self.patience)?;
        if socket_peercred(&socket)?.pid != self.peer {
            return Err(io::Error::other("another process listens there"));
        }
        Ok(socket)
    }

    /// To a test's own threads.
    #[cfg(test)]
    pub(super) fn for_test(path: &Path, patience: Duration) -> io::Result<Self> {
        let connection = Connection { socket: Some(dial(path, patience)?), buffer: vec![0; MAX_PACKET] };
        Ok(Self { connection: Mutex::new(connection), peer: getpid(), patience })
    }
}

/// Connects. A process that does not run takes no connection either: the time limit is set before.
fn dial(path: &Path, patience: Duration) -> io::Result<OwnedFd> {
    let socket = seqpacket()?;
    set_socket_timeout(&socket, Timeout::Recv, Some(patience))?;
    set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Err(Errno::AGAIN) => Err(io::Error::other("its process takes no connection")),
        other => Ok(other.map(|()| socket)?),
    }
}

fn ask(
    socket: &OwnedFd,
    buffer: &mut [u8],
    request: &Request,
    descriptors: &[BorrowedFd<'_>],
    excused: impl Fn() -> bool,
) -> io::Result<(Reply, Vec<OwnedFd>)> {
    packet::send(socket.as_fd(), &encode(request), descriptors)?;
    let mut was_excused = excused();
    loop {
        match packet::receive(socket.as_fd(), buffer, RecvFlags::empty()) {
            Ok(packet) if packet.bytes.is_empty() => {
                return Err(io::Error::other("it closed its control socket"));
            }
            Ok(packet) => {
                let reply = decode(&packet.bytes).map_err(io::Error::other)?;
                return Ok((reply, packet.descriptors));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // What it waited for may have come a moment ago.
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock
                    && std::mem::replace(&mut was_excused, excused()) => {}
            Err(error) => return Err(error),
        }
    }
}

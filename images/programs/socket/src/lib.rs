//! TCP servers for programs in a machine: listening sockets by WasmEdge's extension of WASI preview 1, and a loop that
//! serves any number of connections from one thread.
//!
//! Functions that preview 1 lacks (`sock_open`, `sock_bind`, `sock_listen`, `sock_accept` of two arguments) stand in its
//! own module, `wasi_snapshot_preview1`; what follows is preview 1 alone.

mod raw;
mod serve;

use std::{
    fs::File,
    io,
    net::Ipv6Addr,
    os::fd::{AsRawFd, FromRawFd},
};

pub use serve::{Flow, OUTPUT, Protocol, serve};

/// A listening socket.
pub struct Listener(File);

/// A connection.
pub struct Stream(File);

fn done(errno: u32) -> io::Result<()> {
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno as i32)) }
}

/// Reads and writes of `file` return at once.
fn never_wait(file: &File) -> io::Result<()> {
    const NONBLOCK: u16 = 4;
    // SAFETY: takes no pointers.
    done(unsafe { raw::fd_fdstat_set_flags(file.as_raw_fd() as u32, NONBLOCK) }.into())
}

impl Listener {
    /// Listens on a port of an address; of `::`, on every address of the machine.
    ///
    /// # Errors
    /// The machine's reason: the port is taken, no socket is left.
    pub fn bind(address: Ipv6Addr, port: u16) -> io::Result<Self> {
        const INET6: u8 = 2;
        const STREAM: u8 = 2;
        const BACKLOG: u32 = 16;
        let mut fd = 0;
        // SAFETY: `fd` is valid for writes.
        done(unsafe { raw::sock_open(INET6, STREAM, &raw mut fd) })?;
        // SAFETY: a descriptor just opened, that nobody else has.
        let file = unsafe { File::from_raw_fd(fd as i32) };
        let mut octets = address.octets();
        let mut buffer = raw::Address { bytes: octets.as_mut_ptr(), length: octets.len() };
        // SAFETY: the buffer describes 16 bytes that live until the call returns.
        done(unsafe { raw::sock_bind(fd, &raw mut buffer, port.into()) })?;
        // SAFETY: takes no pointers.
        done(unsafe { raw::sock_listen(fd, BACKLOG) })?;
        never_wait(&file)?;
        Ok(Self(file))
    }

    /// The next connection, if one waits.
    fn accept(&self) -> io::Result<Option<Stream>> {
        let mut fd = 0;
        // SAFETY: `fd` is valid for writes.
        match done(unsafe { raw::sock_accept(self.0.as_raw_fd() as u32, &raw mut fd) }) {
            Ok(()) => {
                // SAFETY: a descriptor just opened, that nobody else has.
                let file = unsafe { File::from_raw_fd(fd as i32) };
                never_wait(&file)?;
                Ok(Some(Stream(file)))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

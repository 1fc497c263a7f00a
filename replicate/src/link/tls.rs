//! TLS 1.3 over TCP, both sides with a certificate of the site.
//!
//! ```text
//! connect:        TCP → TLS (server's certificate carries the expected name) → Hello → Hello | Refusal
//! from_accepted:  TLS (client's certificate from the site's CA) → Hello, whose name its
//!                 certificate carries → welcome | refuse
//! ```
//! The socket is non-blocking and waited for with `poll`, so that every wait has its deadline and a
//! send that blocks still hears a refusal.
//!
//! Deliberately not here: TLS 1.2, session resumption and tickets (a certificate is checked on every
//! link, and links are few), accepting and ALPN dispatch (the daemon's listener).

mod identity;
mod socket;

use std::{
    collections::VecDeque,
    io::{self, BufRead, IoSlice, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use kage_machine::HostName;
use kage_wire::{Frame, FrameDecoder, Hello, Kind, Purpose, Refusal};
use rustls::{ClientConnection, Connection, ServerConnection, server::ParsedCertificate};

use super::{Link, LinkError, admit};
pub use identity::{ALPN, TlsError, TlsIdentity};
use identity::{classify, server_name};
pub(super) use socket::USER_TIMEOUT as GONE_AFTER;

/// Longest wait for a handshake and a hello.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// A peer that takes no byte for so long has stalled. Above [`socket::USER_TIMEOUT`], so that a
/// dead peer is told apart from one that does not read.
const STALL_TIMEOUT: Duration = Duration::from_secs(6);

/// Ciphertext read per call.
const INBOX_BYTES: usize = 64 << 10;

/// Frames kept that arrived while this side was sending; more stay in the socket.
const MAX_PENDING: usize = 16;

/// A link over TLS.
pub struct TlsLink {
    stream: TcpStream,
    tls: Connection,
    decoder: FrameDecoder,
    pending: VecDeque<Frame>,
    inbox: Box<[u8]>,
    /// The part of the inbox that TLS has not taken yet.
    unread: std::ops::Range<usize>,
    ended: bool,
    spin: Duration,
    peer: HostName,
}

impl std::fmt::Debug for TlsLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsLink").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// Opens a link to `peer` at `addr`.
///
/// # Errors
/// [`LinkError`]: unreachable, a certificate without that name, a refusal, no common version.
pub fn connect(
    addr: SocketAddr,
    peer: &HostName,
    identity: &TlsIdentity,
    hello: &Hello,
    timeout: Duration,
) -> Result<TlsLink, LinkError> {
    let deadline = Instant::now() + timeout;
    let stream =
        TcpStream::connect_timeout(&addr, timeout).map_err(|source| LinkError::Connect { addr, source })?;
    let tls = ClientConnection::new(identity.client_config(), server_name(peer)?).map_err(classify)?;
    let mut link = TlsLink::new(stream, tls.into(), peer.clone())?;
    link.handshake(deadline)?;
    link.send(&hello.to_frame())?;
    let answer = Hello::from_frame(&link.recv(Some(deadline))?)?;
    if answer.host != *peer {
        return Err(LinkError::Name { claimed: answer.host });
    }
    link.settle(hello.purpose)?;
    Ok(link)
}

/// Accepts one connection and reads its hello: the daemon's listener without the rest of the daemon.
///
/// # Errors
/// [`LinkError`].
pub fn accept(listener: &TcpListener, identity: &TlsIdentity) -> Result<(TlsLink, Hello), LinkError> {
    let (stream, _) = listener.accept()?;
    let tls = ServerConnection::new(identity.server_config(&[ALPN])).map_err(classify)?;
    TlsLink::from_accepted(stream, tls)
}

impl TlsLink {
    /// Takes over an accepted connection, finishing its handshake if need be, and reads the peer's
    /// hello. Answer it with [`Self::welcome`] or [`Self::refuse`]. What cannot be answered with
    /// either is refused here.
    ///
    /// # Errors
    /// [`LinkError`]; the peer has been told.
    pub fn from_accepted(stream: TcpStream, tls: ServerConnection) -> Result<(Self, Hello), LinkError> {
        let deadline = Instant::now() + HELLO_TIMEOUT;
        // The name is the hello's once its certificate has been checked against it.
        let nobody: HostName = "unknown".parse().map_err(|_| LinkError::Closed)?;
        let mut link = Self::new(stream, tls.into(), nobody)?;
        link.handshake(deadline)?;
        match link.read_hello(deadline) {
            Ok(hello) => {
                link.peer = hello.host.clone();
                link.settle(hello.purpose)?;
                Ok((link, hello))
            }
            Err(error) => {
                if let Some(refusal) = error.as_refusal() {
                    link.refuse(&refusal);
                }
                Err(error)
            }
        }
    }

    fn read_hello(&mut self, deadline: Instant) -> Result<Hello, LinkError> {
        let hello = Hello::from_frame(&self.recv(Some(deadline))?)?;
        let name = server_name(&hello.host)?;
        let certificate = self.tls.peer_certificates().and_then(<[_]>::first);
        let certificate =
            certificate.ok_or(LinkError::Certificate(rustls::Error::NoCertificatesPresented))?;
        let carries = ParsedCertificate::try_from(certificate)
            .and_then(|parsed| rustls::client::verify_server_name(&parsed, &name));
        if carries.is_err() {
            return Err(LinkError::Name { claimed: hello.host });
        }
        Ok(hello)
    }

    /// Answers the peer's hello: the link is open.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn welcome(&mut self, own: HostName, purpose: Purpose) -> Result<(), LinkError> {
        self.send(&Hello::new(own, purpose).to_frame())
    }

    /// Tells the peer why not and ends the link; waits a moment for the peer to have read it.
    pub fn refuse(mut self, refusal: &Refusal) {
        let until = Instant::now() + Duration::from_millis(500);
        if self.send(&refusal.to_frame()).is_err() {
            return;
        }
        self.tls.send_close_notify();
        let _ = self.flush();
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        // Closing with bytes unread would reset the connection and could take the refusal with it.
        while !self.ended && Instant::now() < until {
            match (&self.stream).read(&mut self.inbox) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if socket::wait_readable(&self.stream, Some(until)).is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }

    fn new(stream: TcpStream, mut tls: Connection, peer: HostName) -> Result<Self, LinkError> {
        socket::tune(&stream)?;
        tls.set_buffer_limit(Some(socket::WRITE_BYTES));
        Ok(Self {
            stream,
            tls,
            decoder: FrameDecoder::new(),
            pending: VecDeque::new(),
            inbox: vec![0; INBOX_BYTES].into_boxed_slice(),
            unread: 0..0,
            ended: false,
            spin: Duration::ZERO,
            peer,
        })
    }

    /// Sets what a link's purpose asks of its socket.
    fn settle(&mut self, purpose: Purpose) -> Result<(), LinkError> {
        match purpose {
            Purpose::Bulk { .. } | Purpose::Mirror => socket::keep_queue_short(&self.stream)?,
            Purpose::Switch | Purpose::Directory => {}
        }
        Ok(())
    }

    fn handshake(&mut self, deadline: Instant) -> Result<(), LinkError> {
        while self.tls.is_handshaking() {
            self.flush()?;
            if !self.tls.is_handshaking() {
                break;
            }
            if self.pump()? {
                continue;
            }
            if self.ended {
                return Err(LinkError::Closed);
            }
            socket::wait_readable(&self.stream, Some(deadline))?;
        }
        self.flush()?;
        match self.tls.alpn_protocol() {
            Some(ALPN) => Ok(()),
            _ => Err(LinkError::Tls(rustls::Error::NoApplicationProtocol)),
        }
    }

    /// Writes what TLS has for the socket.
    fn flush(&mut self) -> Result<(), LinkError> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut &self.stream) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait_writable()?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.last_words(error)),
            }
        }
        Ok(())
    }

    /// Waits until the socket takes bytes; listens meanwhile.
    fn wait_writable(&mut self) -> Result<(), LinkError> {
        let deadline = Instant::now() + STALL_TIMEOUT;
        loop {
            let listen = !self.ended && self.pending.len() < MAX_PENDING;
            let ready = match socket::wait(&self.stream, listen, true, Some(deadline)) {
                Err(LinkError::Timeout) => return Err(LinkError::Stalled),
                ready => ready?,
            };
            if ready.readable && listen && self.pump()? {
                self.check_refused()?;
            }
            if ready.writable {
                return Ok(());
            }
        }
    }

    /// A peer that refuses sends why and closes; the failed write must not hide that.
    fn last_words(&mut self, error: io::Error) -> LinkError {
        while !self.ended && matches!(self.pump(), Ok(true)) {}
        match self.check_refused() {
            Err(refused) => refused,
            Ok(()) if is_disconnect(&error) => LinkError::Closed,
            Ok(()) => lost(error),
        }
    }

    fn check_refused(&mut self) -> Result<(), LinkError> {
        match self.pending.iter().find(|frame| frame.kind == Kind::Refusal) {
            Some(frame) => Err(LinkError::Refused(Refusal::from_body(&frame.body))),
            None => Ok(()),
        }
    }

    /// Reads once from the socket and decodes; whether anything was read.
    fn pump(&mut self) -> Result<bool, LinkError> {
        if self.unread.is_empty() {
            match (&self.stream).read(&mut self.inbox) {
                Ok(0) => {
                    self.ended = true;
                    return Ok(false);
                }
                Ok(count) => self.unread = 0..count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
                Err(error) if is_disconnect(&error) => {
                    self.ended = true;
                    return Ok(false);
                }
                Err(error) => return Err(lost(error)),
            }
        }
        // TLS takes nothing after the peer's end.
        while !self.unread.is_empty() && !self.ended {
            let taken = self.tls.read_tls(&mut &self.inbox[self.unread.clone()])?;
            self.unread.start += taken;
            if let Err(error) = self.tls.process_new_packets() {
                // The alert that says why.
                let _ = self.tls.write_tls(&mut &self.stream);
                return Err(classify(error));
            }
            self.decode()?;
        }
        Ok(true)
    }

    /// Moves plaintext from TLS to frames.
    fn decode(&mut self) -> Result<(), LinkError> {
        loop {
            let mut reader = self.tls.reader();
            let bytes = match reader.fill_buf() {
                Ok([]) => {
                    self.ended = true;
                    return Ok(());
                }
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let (taken, frame) = self.decoder.feed(bytes)?;
            reader.consume(taken);
            self.pending.extend(frame);
        }
    }
}

fn is_disconnect(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset)
}

fn lost(error: io::Error) -> LinkError {
    use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
    match error.kind() {
        TimedOut | HostUnreachable | NetworkUnreachable => LinkError::Gone,
        _ => LinkError::Io(error),
    }
}

impl Link for TlsLink {
    fn send(&mut self, frame: &Frame) -> Result<(), LinkError> {
        let header = frame.header()?;
        let (mut header, mut body) = (&header[..], &frame.body[..]);
        while !header.is_empty() || !body.is_empty() {
            let taken = self.tls.writer().write_vectored(&[IoSlice::new(header), IoSlice::new(body)])?;
            let of_header = taken.min(header.len());
            header = &header[of_header..];
            body = &body[taken - of_header..];
            self.flush()?;
        }
        Ok(())
    }

    fn recv(&mut self, deadline: Option<Instant>) -> Result<Frame, LinkError> {
        let spin_until = (self.spin > Duration::ZERO).then(|| {
            let until = Instant::now() + self.spin;
            deadline.map_or(until, |deadline| deadline.min(until))
        });
        loop {
            if let Some(frame) = self.pending.pop_front() {
                return admit(frame);
            }
            // An accepted connection may hold plaintext from its handshake's last read.
            self.decode()?;
            if !self.pending.is_empty() || self.pump()? {
                continue;
            }
            if self.ended {
                return Err(if self.decoder.is_at_boundary() {
                    LinkError::Closed
                } else {
                    LinkError::Truncated
                });
            }
            self.flush()?;
            if spin_until.is_some_and(|until| Instant::now() < until) {
                // Whoever shares this CPU may be the one waited for.
                std::thread::yield_now();
                continue;
            }
            socket::wait_readable(&self.stream, deadline)?;
        }
    }

    fn set_spin(&mut self, spin: Duration) {
        self.spin = spin;
    }

    fn peer(&self) -> &HostName {
        &self.peer
    }
}

#[cfg(test)]
mod tests;

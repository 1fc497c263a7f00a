//! Sockets as programs know them: opened first, then bound, connected or listening.
//!
//! ```text
//! stream:    Fresh ─connect─▶ Connecting ─▶ Connected        datagram:  Fresh ─bind, send, connect─▶ Bound
//!              └────listen──▶ Listening ─accept─▶ a Connected one
//! ```
//!
//! Every one is listed with its VID, and counted: a process may have so many, and all processes together.

use alloc::rc::Rc;
use core::{
    cell::{Cell, RefCell},
    task::{Context, Poll, ready},
};

use smoltcp::{
    socket::udp::UdpMetadata,
    wire::{IpEndpoint, IpListenEndpoint},
};

use super::{
    Buffers, Listener, Stream, UdpSocket,
    table::{self, Record},
    tcp::{ConnectError, free_port},
};
use crate::vid;

/// Sockets of a process.
const MAX_OF_PROCESS: usize = 128;
/// Sockets of all processes together.
const MAX_OF_ALL: usize = 384;
/// What a connection of a program may hold.
const BUFFERS: Buffers = Buffers { receive: 32 << 10, send: 32 << 10, backlog: 1 };
/// Connections that wait to be accepted.
const MAX_BACKLOG: usize = 16;

/// Why a socket does not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SocketError {
    /// The address or port is used by another socket.
    #[error("address in use")]
    InUse,
    /// Not an address of this machine, or none that can be reached.
    #[error("address not available")]
    NotAvailable,
    /// It is connected.
    #[error("already connected")]
    Connected,
    /// It is not connected.
    #[error("not connected")]
    NotConnected,
    /// The other end does not listen.
    #[error("connection refused")]
    Refused,
    /// The other end is gone.
    #[error("connection reset")]
    Reset,
    /// Nothing more is sent.
    #[error("broken pipe")]
    Broken,
    /// A datagram that is too long.
    #[error("message too long")]
    TooLong,
    /// A datagram without a destination.
    #[error("destination address required")]
    NoDestination,
    /// Too many sockets.
    #[error("too many sockets")]
    TooMany,
    /// No memory for its buffers.
    #[error("no buffer space")]
    NoRoom,
    /// Not for this kind of socket, or not any more.
    #[error("invalid argument")]
    Invalid,
}

impl From<ConnectError> for SocketError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Unreachable => Self::NotAvailable,
            ConnectError::NoRoom => Self::NoRoom,
        }
    }
}

enum State {
    Fresh,
    Connecting(Stream),
    Connected(Stream),
    Listening(Listener),
    Bound(UdpSocket),
}

/// A socket.
pub struct Socket {
    state: RefCell<State>,
    record: Rc<Record>,
    stream: bool,
    /// Where a datagram socket sends, and what alone it hears.
    peer: Cell<Option<IpEndpoint>>,
    /// Nothing more is read.
    deaf: Cell<bool>,
    /// How a connection failed that nobody waited for.
    error: Cell<Option<SocketError>>,
}

/// What was received.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Bytes taken.
    pub count: usize,
    /// Bytes of the datagram were cut off.
    pub cut: bool,
    /// Where it came from.
    pub from: Option<IpEndpoint>,
}

impl Socket {
    /// Opens a socket for a process.
    ///
    /// # Errors
    /// [`SocketError::TooMany`].
    pub fn open(stream: bool, pid: u32) -> Result<Self, SocketError> {
        Self::may_be_another(Some(pid))?;
        Ok(Self::with(State::Fresh, Record::new(stream, Some(pid)), stream))
    }

    fn may_be_another(pid: Option<u32>) -> Result<(), SocketError> {
        let (own, all) = table::counts(pid);
        let fits = own < MAX_OF_PROCESS && all < MAX_OF_ALL && vid::has_room();
        if fits { Ok(()) } else { Err(SocketError::TooMany) }
    }

    fn with(state: State, record: Rc<Record>, stream: bool) -> Self {
        Self {
            state: RefCell::new(state),
            record,
            stream,
            peer: Cell::new(None),
            deaf: Cell::new(false),
            error: Cell::new(None),
        }
    }

    /// TCP, not UDP.
    pub fn is_stream(&self) -> bool {
        self.stream
    }

    /// It listens.
    pub fn is_listening(&self) -> bool {
        matches!(*self.state.borrow(), State::Listening(_))
    }

    /// Bytes of its buffers, for receiving and for sending.
    pub const fn buffers() -> (usize, usize) {
        (BUFFERS.receive, BUFFERS.send)
    }

    /// How a connection failed that nobody waited for; once.
    pub fn take_error(&self) -> Option<SocketError> {
        self.error.take()
    }

    /// Binds it to an address and a port; port 0: a free one.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn bind(&self, mut to: IpListenEndpoint) -> Result<(), SocketError> {
        let mut state = self.state.borrow_mut();
        if !matches!(*state, State::Fresh) || self.record.bound().port != 0 {
            return Err(SocketError::Invalid);
        }
        if to.addr.is_some_and(|address| !super::is_own(address)) {
            return Err(SocketError::NotAvailable);
        }
        if to.port == 0 {
            to.port = free_port(self.stream, to.addr)?;
        }
        if table::is_used(self.stream, to) {
            return Err(SocketError::InUse);
        }
        if self.stream {
            self.record.bind(to);
        } else {
            *state = State::Bound(UdpSocket::open(to, Rc::clone(&self.record)).ok_or(SocketError::NoRoom)?);
        }
        Ok(())
    }

    /// Accepts connections from now on; up to about `backlog` wait.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn listen(&self, backlog: u32) -> Result<(), SocketError> {
        let mut state = self.state.borrow_mut();
        match *state {
            State::Listening(_) => return Ok(()),
            State::Fresh if self.stream => {}
            _ => return Err(SocketError::Invalid),
        }
        let mut at = self.record.bound();
        if at.port == 0 {
            at.port = free_port(true, at.addr)?;
        }
        let backlog = usize::try_from(backlog).unwrap_or(MAX_BACKLOG).clamp(1, MAX_BACKLOG);
        let buffers = Buffers { backlog, ..BUFFERS };
        *state = State::Listening(Listener::new(at, buffers, Rc::clone(&self.record)));
        Ok(())
    }

    /// Ready with the next connection.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn poll_accept(&self, context: &mut Context<'_>) -> Poll<Result<Self, SocketError>> {
        let mut state = self.state.borrow_mut();
        let State::Listening(listener) = &mut *state else { return Poll::Ready(Err(SocketError::Invalid)) };
        ready!(listener.poll_waiting(context));
        Self::may_be_another(self.record.pid())?;
        let stream = ready!(listener.poll_accept(context));
        let record = stream.record();
        Poll::Ready(Ok(Self::with(State::Connected(stream), record, true)))
    }

    /// Starts a connection, or says how the one that was started stands. A datagram socket only notes the address.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn poll_connect(&self, context: &mut Context<'_>, to: IpEndpoint) -> Poll<Result<(), SocketError>> {
        if !self.stream {
            let bound = self.bind_datagram();
            self.peer.set(Some(to));
            return Poll::Ready(bound);
        }
        let mut state = self.state.borrow_mut();
        match &mut *state {
            State::Fresh => {
                let started = Stream::start(to, self.record.bound(), BUFFERS, Rc::clone(&self.record));
                *state = State::Connecting(started?);
            }
            State::Connecting(_) => {}
            State::Connected(_) => return Poll::Ready(Err(SocketError::Connected)),
            State::Listening(_) | State::Bound(_) => return Poll::Ready(Err(SocketError::Invalid)),
        }
        Self::settle(&mut state, context)
    }

    /// Ready once a connection that is being made is there, or never will be.
    fn settle(state: &mut State, context: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        match core::mem::replace(state, State::Fresh) {
            State::Connecting(mut stream) => match stream.poll_connected(context) {
                Poll::Pending => {
                    *state = State::Connecting(stream);
                    Poll::Pending
                }
                Poll::Ready(Ok(())) => {
                    *state = State::Connected(stream);
                    Poll::Ready(Ok(()))
                }
                Poll::Ready(Err(_)) => Poll::Ready(Err(SocketError::Refused)),
            },
            other => {
                *state = other;
                Poll::Ready(Ok(()))
            }
        }
    }

    /// [`Socket::settle`] for who wants to know only whether the wait is over; a failure is kept.
    fn settled(&self, context: &mut Context<'_>) -> Poll<()> {
        let settled = ready!(Self::settle(&mut self.state.borrow_mut(), context));
        if let Err(error) = settled {
            self.error.set(Some(error));
        }
        Poll::Ready(())
    }

    fn bind_datagram(&self) -> Result<(), SocketError> {
        let fresh = matches!(*self.state.borrow(), State::Fresh);
        if fresh { self.bind(IpListenEndpoint::default()) } else { Ok(()) }
    }

    /// Receives; 0 bytes of a stream are its end. With `peek` what is received stays.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn poll_receive(
        &self,
        context: &mut Context<'_>,
        into: &mut [u8],
        peek: bool,
    ) -> Poll<Result<Received, SocketError>> {
        let end = Received { count: 0, cut: false, from: None };
        if self.deaf.get() {
            return Poll::Ready(Ok(end));
        }
        ready!(self.settled(context));
        match &mut *self.state.borrow_mut() {
            State::Connected(stream) => {
                let read =
                    if peek { stream.poll_peek(context, into) } else { stream.poll_read(context, into) };
                let from = stream.peer();
                read.map(|read| match read {
                    Ok(count) => Ok(Received { count, cut: false, from }),
                    Err(_) => Err(SocketError::Reset),
                })
            }
            State::Bound(socket) => {
                let received = ready!(socket.poll_receive(context, into, peek, self.peer.get()));
                let (count, length, from) = received;
                Poll::Ready(Ok(Received { count, cut: count < length, from: Some(from) }))
            }
            State::Fresh if !self.stream => Poll::Ready(Err(SocketError::Invalid)),
            State::Fresh | State::Connecting(_) | State::Listening(_) => {
                Poll::Ready(Err(self.error.take().unwrap_or(SocketError::NotConnected)))
            }
        }
    }

    /// Sends what there is room for, or a whole datagram, to where it is connected or to `to`.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn poll_send(
        &self,
        context: &mut Context<'_>,
        bytes: &[u8],
        to: Option<IpEndpoint>,
    ) -> Poll<Result<usize, SocketError>> {
        if !self.stream {
            self.bind_datagram()?;
        }
        ready!(self.settled(context));
        match &mut *self.state.borrow_mut() {
            State::Connected(stream) => {
                stream.poll_write(context, bytes).map(|sent| sent.map_err(|_| SocketError::Broken))
            }
            State::Bound(socket) => {
                let to = to.or(self.peer.get()).ok_or(SocketError::NoDestination)?;
                if to.port == 0 {
                    return Poll::Ready(Err(SocketError::Invalid));
                }
                // The stack takes neither a datagram between two families nor one that is longer than a packet.
                let bound = socket.local().addr;
                if bound.is_some_and(|address| address.version() != to.addr.version()) {
                    return Poll::Ready(Err(SocketError::NotAvailable));
                }
                if bytes.len() > super::largest_datagram(to.addr) {
                    return Poll::Ready(Err(SocketError::TooLong));
                }
                let mut meta = UdpMetadata::from(to);
                // Sent from the address it is bound to, if it is bound to one.
                meta.local_address = socket.local().addr;
                match ready!(socket.poll_send(context, bytes, meta)) {
                    Some(()) => Poll::Ready(Ok(bytes.len())),
                    None => Poll::Ready(Err(SocketError::TooLong)),
                }
            }
            State::Fresh | State::Connecting(_) | State::Listening(_) => {
                Poll::Ready(Err(self.error.take().unwrap_or(SocketError::NotConnected)))
            }
        }
    }

    /// Reads, or sends, no more.
    ///
    /// # Errors
    /// [`SocketError::NotConnected`].
    pub fn shutdown(&self, reading: bool, sending: bool) -> Result<(), SocketError> {
        let mut state = self.state.borrow_mut();
        let State::Connected(stream) = &mut *state else { return Err(SocketError::NotConnected) };
        if sending {
            stream.end_sending();
        }
        if reading {
            self.deaf.set(true);
        }
        Ok(())
    }

    /// Ready when reading or accepting would not wait: about how many bytes, and whether the other end is gone.
    pub fn poll_readable(&self, context: &mut Context<'_>) -> Poll<(usize, bool)> {
        if self.deaf.get() {
            return Poll::Ready((0, true));
        }
        ready!(self.settled(context));
        match &mut *self.state.borrow_mut() {
            State::Connected(stream) => {
                stream.poll_readable(context).map(|count| (count.unwrap_or(0), count.is_none()))
            }
            State::Listening(listener) => listener.poll_waiting(context).map(|_| (1, false)),
            State::Bound(socket) => socket.poll_readable(context).map(|count| (count, false)),
            State::Fresh | State::Connecting(_) => Poll::Ready((0, true)),
        }
    }

    /// Ready when sending would not wait: about how many bytes, and whether the other end is gone.
    pub fn poll_writable(&self, context: &mut Context<'_>) -> Poll<(usize, bool)> {
        ready!(self.settled(context));
        match &mut *self.state.borrow_mut() {
            State::Connected(stream) => {
                stream.poll_writable(context).map(|room| (room.unwrap_or(0), room.is_none()))
            }
            State::Bound(socket) => socket.poll_writable(context).map(|()| (1, false)),
            State::Fresh if !self.stream => Poll::Ready((1, false)),
            State::Fresh | State::Connecting(_) | State::Listening(_) => Poll::Ready((0, true)),
        }
    }

    /// This end; without an address: every address of the machine.
    pub fn local(&self) -> IpListenEndpoint {
        match &*self.state.borrow() {
            State::Connecting(stream) | State::Connected(stream) => {
                stream.local().map_or(self.record.bound(), Into::into)
            }
            State::Bound(socket) => socket.local(),
            State::Fresh | State::Listening(_) => self.record.bound(),
        }
    }

    /// The other end.
    ///
    /// # Errors
    /// [`SocketError::NotConnected`].
    pub fn peer(&self) -> Result<IpEndpoint, SocketError> {
        match &*self.state.borrow() {
            State::Connected(stream) => stream.peer(),
            State::Bound(_) => self.peer.get(),
            State::Fresh | State::Connecting(_) | State::Listening(_) => None,
        }
        .ok_or(SocketError::NotConnected)
    }
}

//! TCP streams.

use alloc::{rc::Rc, vec::Vec};
use core::{
    future::{Future, poll_fn},
    net::Ipv6Addr,
    pin::Pin,
    task::{Context, Poll, ready},
};

use smoltcp::{
    iface::SocketHandle,
    socket::tcp::{self, CongestionControl, State},
    time::Duration,
    wire::{IpAddress, IpEndpoint, IpListenEndpoint},
};

use super::{
    STACK,
    table::{Record, is_used},
};
use crate::{heap, memory, time::Sleep};

/// A peer that acknowledges nothing for so long is gone. Long, because a user's laptop sleeps in a lift.
const SILENCE: Duration = Duration::from_secs(900);
/// An idle connection asks for a sign of life this often.
const KEEP_ALIVE: Duration = Duration::from_secs(75);
/// How often a listener without memory for another connection looks again.
const SHORT_OF_MEMORY: core::time::Duration = core::time::Duration::from_millis(500);
/// Longest wait for a peer to take part in closing a connection.
const LINGER: core::time::Duration = core::time::Duration::from_secs(30);
/// Longest wait for an answer to a connection's first segment.
const CONNECT: Duration = Duration::from_secs(20);
/// Ports for sockets that ask for none (RFC 6335 §6).
const EPHEMERAL_FIRST: u16 = 49152;
const EPHEMERAL_COUNT: u16 = 16384;
/// Memory that the kernel's own listeners leave to others. Those of programs leave more, so that a user still gets in.
const LEFT: usize = 1 << 20;

/// What the connections of a port may hold.
#[derive(Clone, Copy)]
pub struct Buffers {
    /// Bytes received and not read.
    pub receive: usize,
    /// Bytes written and not acknowledged.
    pub send: usize,
    /// Sockets that wait for a connection.
    pub backlog: usize,
}

/// The connection is closed by the peer, reset, or never was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

/// Why there is no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectError {
    /// There is no way to that address from this one.
    Unreachable,
    /// Every port is used, or there is no memory.
    NoRoom,
}

/// Accepts connections at one port.
pub struct Listener {
    at: IpListenEndpoint,
    buffers: Buffers,
    waiting: Vec<SocketHandle>,
    /// While there is too little memory for enough sockets that wait.
    look_again: Option<Sleep>,
    record: Rc<Record>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut stack = STACK.get();
        for handle in self.waiting.drain(..) {
            drop(stack.sockets.remove(handle));
        }
    }
}

fn fresh(buffers: Buffers) -> tcp::Socket<'static> {
    let mut socket = tcp::Socket::new(
        tcp::SocketBuffer::new(heap::buffer(buffers.receive)),
        tcp::SocketBuffer::new(heap::buffer(buffers.send)),
    );
    socket.set_nagle_enabled(false);
    socket.set_congestion_control(CongestionControl::Reno);
    socket.set_ack_delay(None);
    socket
}

/// Whether there is memory for the buffers of a socket of the process, or of the kernel.
fn has_room(bytes: usize, pid: Option<u32>) -> bool {
    match pid {
        Some(_) => memory::kernel_room(bytes),
        None => memory::heap_free_bytes() >= bytes + LEFT,
    }
}

impl Listener {
    /// Listens at a port of all addresses of the image.
    pub fn bind(port: u16, buffers: Buffers) -> Self {
        Self::new(port.into(), buffers, Record::new(true, None))
    }

    /// Listens at an address, as the socket that `record` lists.
    pub fn new(at: IpListenEndpoint, buffers: Buffers, record: Rc<Record>) -> Self {
        record.bind(at);
        let mut listener = Self { at, buffers, waiting: Vec::new(), look_again: None, record };
        listener.fill();
        listener
    }

    /// Makes sockets that wait, as long as there is memory for them: a flood of connections must not take the
    /// machine's last. Returns whether there are enough.
    fn fill(&mut self) -> bool {
        let Buffers { receive, send, backlog } = self.buffers;
        while self.waiting.len() < backlog {
            if !has_room(receive + send, self.record.pid()) {
                return false;
            }
            let mut socket = fresh(self.buffers);
            // A new socket is closed and the port is not 0, the only two reasons to refuse.
            let _ = socket.listen(self.at);
            self.waiting.push(STACK.get().sockets.add(socket));
        }
        true
    }

    /// The next connection.
    pub async fn accept(&mut self) -> Stream {
        poll_fn(|context| self.poll_accept(context)).await
    }

    /// Ready with the next connection.
    pub fn poll_accept(&mut self, context: &mut Context<'_>) -> Poll<Stream> {
        let index = ready!(self.poll_waiting(context));
        let record = Record::new(true, self.record.pid());
        let stream = Stream { handle: self.waiting.remove(index), record, abrupt: false };
        stream.record.open(stream.handle);
        stream.with(|socket| {
            socket.set_timeout(Some(SILENCE));
            socket.set_keep_alive(Some(KEEP_ALIVE));
        });
        self.fill();
        Poll::Ready(stream)
    }

    /// Ready when a connection waits, with its place among the sockets that wait.
    pub fn poll_waiting(&mut self, context: &mut Context<'_>) -> Poll<usize> {
        if self.fill() {
            self.look_again = None;
        } else {
            let sleep = self.look_again.insert(crate::time::sleep(SHORT_OF_MEMORY));
            if Pin::new(sleep).poll(context).is_ready() {
                context.waker().wake_by_ref();
            }
        }
        let mut stack = STACK.get();
        for (index, &handle) in self.waiting.iter().enumerate() {
            let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
            match socket.state() {
                State::Listen | State::SynReceived => {}
                State::Closed => {
                    let _ = socket.listen(self.at);
                }
                _ => return Poll::Ready(index),
            }
            socket.register_recv_waker(context.waker());
            socket.register_send_waker(context.waker());
        }
        Poll::Pending
    }
}

/// One connection. Dropping it closes it in order, and what was written still leaves, unless it is [abrupt].
///
/// [abrupt]: Stream::set_abrupt
pub struct Stream {
    handle: SocketHandle,
    record: Rc<Record>,
    abrupt: bool,
}

/// A port of its own for a socket that asked for none.
///
/// # Errors
/// [`ConnectError::NoRoom`].
pub fn free_port(stream: bool, address: Option<IpAddress>) -> Result<u16, ConnectError> {
    let start = crate::random::number() as u16 % EPHEMERAL_COUNT;
    (0..EPHEMERAL_COUNT)
        .map(|step| EPHEMERAL_FIRST + (start + step) % EPHEMERAL_COUNT)
        .find(|&port| {
            let taken = |socket: &smoltcp::socket::Socket<'_>| match socket {
                smoltcp::socket::Socket::Tcp(socket) => {
                    socket.local_endpoint().is_some_and(|local| local.port == port)
                }
                _ => false,
            };
            !is_used(stream, IpListenEndpoint { addr: address, port })
                && !STACK.get().sockets.iter().any(|(_, socket)| taken(socket))
        })
        .ok_or(ConnectError::NoRoom)
}

impl Stream {
    /// Connects to a port of another machine or of the gateway.
    ///
    /// # Errors
    /// [`Closed`]: refused, no answer in time, or no memory for the buffers.
    pub async fn connect(address: Ipv6Addr, port: u16, buffers: Buffers) -> Result<Self, Closed> {
        let to = IpEndpoint { addr: address.into(), port };
        let started = Self::start(to, IpListenEndpoint::default(), buffers, Record::new(true, None));
        let mut stream = started.map_err(|_| Closed)?;
        poll_fn(|context| stream.poll_connected(context)).await?;
        Ok(stream)
    }

    /// Starts a connection from `local`, as the socket that `record` lists. Of `local`, what is not given is chosen.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn start(
        to: IpEndpoint,
        local: IpListenEndpoint,
        buffers: Buffers,
        record: Rc<Record>,
    ) -> Result<Self, ConnectError> {
        if !memory::kernel_room(buffers.receive + buffers.send) {
            return Err(ConnectError::NoRoom);
        }
        let port = if local.port == 0 { free_port(true, local.addr)? } else { local.port };
        let mut socket = fresh(buffers);
        socket.set_timeout(Some(CONNECT));
        let mut stack = STACK.get();
        let stack = &mut *stack;
        socket
            .connect(stack.interface.context(), to, IpListenEndpoint { port, ..local })
            .map_err(|_| ConnectError::Unreachable)?;
        let handle = stack.sockets.add(socket);
        record.open(handle);
        Ok(Self { handle, record, abrupt: false })
    }

    /// Whether dropping it resets it: the other end is to stop at once what it does for this one.
    pub fn set_abrupt(&mut self, abrupt: bool) {
        self.abrupt = abrupt;
    }

    /// Ready once the connection is there, or never will be.
    pub fn poll_connected(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        self.with(|socket| match socket.state() {
            State::SynSent | State::SynReceived => {
                socket.register_send_waker(context.waker());
                Poll::Pending
            }
            State::Closed => Poll::Ready(Err(Closed)),
            _ => {
                socket.set_timeout(Some(SILENCE));
                socket.set_keep_alive(Some(KEEP_ALIVE));
                Poll::Ready(Ok(()))
            }
        })
    }

    /// Sends no more; what was written still leaves.
    pub fn end_sending(&mut self) {
        self.with(tcp::Socket::close);
    }

    /// Ready when there is something to read, with how much; `None` when nothing more will come.
    pub fn poll_readable(&mut self, context: &mut Context<'_>) -> Poll<Option<usize>> {
        self.with(|socket| match socket.recv_queue() {
            0 if socket.may_recv() => {
                socket.register_recv_waker(context.waker());
                Poll::Pending
            }
            0 => Poll::Ready(None),
            count => Poll::Ready(Some(count)),
        })
    }

    /// Ready when there is room to write, with how much; `None` when nothing will be sent any more.
    pub fn poll_writable(&mut self, context: &mut Context<'_>) -> Poll<Option<usize>> {
        self.with(|socket| match socket.send_capacity() - socket.send_queue() {
            _ if !socket.may_send() => Poll::Ready(None),
            0 => {
                socket.register_send_waker(context.waker());
                Poll::Pending
            }
            room => Poll::Ready(Some(room)),
        })
    }

    /// Looks at received bytes and leaves them there.
    pub fn poll_peek(&mut self, context: &mut Context<'_>, into: &mut [u8]) -> Poll<Result<usize, Closed>> {
        self.with(|socket| match socket.peek_slice(into) {
            Ok(0) if !into.is_empty() => {
                socket.register_recv_waker(context.waker());
                Poll::Pending
            }
            Ok(count) => Poll::Ready(Ok(count)),
            Err(tcp::RecvError::Finished) => Poll::Ready(Ok(0)),
            Err(tcp::RecvError::InvalidState) => Poll::Ready(Err(Closed)),
        })
    }

    /// How it is listed.
    pub fn record(&self) -> Rc<Record> {
        Rc::clone(&self.record)
    }

    /// This end.
    pub fn local(&self) -> Option<IpEndpoint> {
        self.with(|socket| socket.local_endpoint())
    }

    fn with<R>(&self, act: impl FnOnce(&mut tcp::Socket<'static>) -> R) -> R {
        act(STACK.get().sockets.get_mut::<tcp::Socket>(self.handle))
    }

    /// Polls for received bytes; `Ok(0)` means the peer sends no more.
    pub fn poll_read(&mut self, context: &mut Context<'_>, into: &mut [u8]) -> Poll<Result<usize, Closed>> {
        let record = &self.record;
        self.with(|socket| match socket.recv_slice(into) {
            Ok(0) if !into.is_empty() => {
                socket.register_recv_waker(context.waker());
                Poll::Pending
            }
            Ok(count) => {
                record.count_received(count);
                Poll::Ready(Ok(count))
            }
            Err(tcp::RecvError::Finished) => Poll::Ready(Ok(0)),
            Err(tcp::RecvError::InvalidState) => Poll::Ready(Err(Closed)),
        })
    }

    /// Polls for room to send; returns the bytes taken.
    pub fn poll_write(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Closed>> {
        let record = &self.record;
        self.with(|socket| match socket.send_slice(bytes) {
            Ok(0) if !bytes.is_empty() => {
                socket.register_send_waker(context.waker());
                Poll::Pending
            }
            Ok(count) => {
                record.count_sent(count);
                Poll::Ready(Ok(count))
            }
            Err(_) => Poll::Ready(Err(Closed)),
        })
    }

    /// Polls for received bytes and has `take` use some where they lie; `Ok(None)` means the peer sends no more.
    /// `take` says how many it used and must not use the network.
    pub fn poll_take<R>(
        &mut self,
        context: &mut Context<'_>,
        take: impl FnOnce(&[u8]) -> (usize, R),
    ) -> Poll<Result<Option<R>, Closed>> {
        let record = &self.record;
        self.with(|socket| {
            if socket.may_recv() && !socket.can_recv() {
                socket.register_recv_waker(context.waker());
                return Poll::Pending;
            }
            let taken = socket.recv(|bytes| {
                let (count, result) = take(bytes);
                record.count_received(count);
                (count, result)
            });
            match taken {
                Ok(result) => Poll::Ready(Ok(Some(result))),
                Err(tcp::RecvError::Finished) => Poll::Ready(Ok(None)),
                Err(tcp::RecvError::InvalidState) => Poll::Ready(Err(Closed)),
            }
        })
    }

    /// Polls for room to send and has `fill` write into it; returns what it wrote. `fill` must not use the network.
    pub fn poll_fill(
        &mut self,
        context: &mut Context<'_>,
        fill: impl FnOnce(&mut [u8]) -> usize,
    ) -> Poll<Result<usize, Closed>> {
        let record = &self.record;
        self.with(|socket| {
            if socket.may_send() && !socket.can_send() {
                socket.register_send_waker(context.waker());
                return Poll::Pending;
            }
            let filled = socket.send(|room| {
                let count = fill(room);
                record.count_sent(count);
                (count, count)
            });
            Poll::Ready(filled.map_err(|_| Closed))
        })
    }

    /// Reads; `Ok(0)` means the peer sends no more.
    ///
    /// # Errors
    /// [`Closed`].
    pub async fn read(&mut self, into: &mut [u8]) -> Result<usize, Closed> {
        poll_fn(|context| self.poll_read(context, into)).await
    }

    /// Writes everything.
    ///
    /// # Errors
    /// [`Closed`].
    pub async fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), Closed> {
        while !bytes.is_empty() {
            let count = poll_fn(|context| self.poll_write(context, bytes)).await?;
            bytes = &bytes[count..];
        }
        Ok(())
    }

    /// The other end.
    pub fn peer(&self) -> Option<IpEndpoint> {
        self.with(|socket| socket.remote_endpoint())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let handle = self.handle;
        // Listed until it is closed at the other end, too.
        let record = Rc::clone(&self.record);
        let abrupt = self.abrupt;
        self.with(|socket| if abrupt { socket.abort() } else { socket.close() });
        // The socket must outlive the closing handshake, but not for ever.
        crate::executor::spawn("close", async move {
            let mut limit = crate::time::sleep(LINGER);
            poll_fn(|context| {
                let mut stack = STACK.get();
                let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
                // A reset has left once the socket no longer knows the other end.
                match socket.state() {
                    State::TimeWait => return Poll::Ready(()),
                    State::Closed if socket.remote_endpoint().is_none() => return Poll::Ready(()),
                    _ => {}
                }
                // What still arrives has no reader; room for it lets the peer come to its own end.
                let _ = socket.recv(|bytes| (bytes.len(), ()));
                socket.register_recv_waker(context.waker());
                socket.register_send_waker(context.waker());
                drop(stack);
                Pin::new(&mut limit).poll(context)
            })
            .await;
            let socket = STACK.get().sockets.remove(handle);
            drop((socket, record));
        });
    }
}

//! TCP streams.

use alloc::vec::Vec;
use core::{
    future::{Future, poll_fn},
    net::Ipv6Addr,
    pin::Pin,
    task::{Context, Poll},
};

use smoltcp::{
    iface::SocketHandle,
    socket::tcp::{self, CongestionControl, State},
    time::Duration,
    wire::{IpAddress, IpEndpoint},
};

use super::{STACK, table::Traffic};
use crate::{heap, memory, vid::Vid};

/// A peer that acknowledges nothing for so long is gone. Long, because a user's laptop sleeps in a lift.
const SILENCE: Duration = Duration::from_secs(900);
/// A peer that does not answer for so long is not there.
const CONNECTING: Duration = Duration::from_secs(20);
/// An idle connection asks for a sign of life this often.
const KEEP_ALIVE: Duration = Duration::from_secs(75);
/// How often a listener without memory for another connection looks again.
const SHORT_OF_MEMORY: core::time::Duration = core::time::Duration::from_millis(500);
/// Longest wait for a peer to take part in closing a connection.
const LINGER: core::time::Duration = core::time::Duration::from_secs(30);
/// Memory a listener leaves to others.
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

/// Accepts connections at one port.
pub struct Listener {
    vid: Vid,
    port: u16,
    buffers: Buffers,
    waiting: Vec<SocketHandle>,
}

impl Listener {
    /// Listens at a port of all addresses of the image.
    pub fn bind(port: u16, buffers: Buffers) -> Self {
        let vid = STACK.get().named.add_listener(port);
        let mut listener = Self { vid, port, buffers, waiting: Vec::new() };
        listener.fill();
        listener
    }

    /// Makes sockets that wait, as long as there is memory for them: a flood of connections must not take the
    /// machine's last. Returns whether there are enough.
    fn fill(&mut self) -> bool {
        let Buffers { receive, send, backlog } = self.buffers;
        while self.waiting.len() < backlog {
            if memory::heap_free_bytes() < receive + send + LEFT {
                return false;
            }
            let mut socket = tcp::Socket::new(
                tcp::SocketBuffer::new(heap::buffer(receive)),
                tcp::SocketBuffer::new(heap::buffer(send)),
            );
            socket.set_nagle_enabled(false);
            socket.set_congestion_control(CongestionControl::Reno);
            socket.set_ack_delay(None);
            // A new socket is closed and the port is not 0, the only two reasons to refuse.
            let _ = socket.listen(self.port);
            self.waiting.push(STACK.get().sockets.add(socket));
        }
        true
    }

    /// The next connection.
    pub async fn accept(&mut self) -> Stream {
        let mut look_again = None;
        let handle = poll_fn(|context| {
            if self.fill() {
                look_again = None;
            } else {
                let sleep = look_again.insert(crate::time::sleep(SHORT_OF_MEMORY));
                if Pin::new(sleep).poll(context).is_ready() {
                    context.waker().wake_by_ref();
                }
            }
            let mut stack = STACK.get();
            for (index, &handle) in self.waiting.iter().enumerate() {
                let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
                match socket.state() {
                    State::Listen | State::SynReceived => {
                        socket.register_recv_waker(context.waker());
                        socket.register_send_waker(context.waker());
                    }
                    State::Closed => {
                        let _ = socket.listen(self.port);
                        socket.register_recv_waker(context.waker());
                        socket.register_send_waker(context.waker());
                    }
                    _ => {
                        drop(stack);
                        return Poll::Ready(self.waiting.remove(index));
                    }
                }
            }
            Poll::Pending
        })
        .await;
        self.fill();
        {
            let mut stack = STACK.get();
            stack.named.add(handle);
            let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
            socket.set_timeout(Some(SILENCE));
            socket.set_keep_alive(Some(KEEP_ALIVE));
        }
        Stream { handle }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut stack = STACK.get();
        stack.named.remove_listener(self.vid);
        for handle in self.waiting.drain(..) {
            drop(stack.sockets.remove(handle));
        }
    }
}

/// One connection. Dropping it closes it in order: what was written still leaves.
pub struct Stream {
    handle: SocketHandle,
}

impl Stream {
    /// Connects to a port of another machine or of the gateway.
    ///
    /// # Errors
    /// [`Closed`]: refused, no answer in time, or no memory for the buffers.
    pub async fn connect(address: Ipv6Addr, port: u16, buffers: Buffers) -> Result<Self, Closed> {
        if memory::heap_free_bytes() < buffers.receive + buffers.send + LEFT {
            return Err(Closed);
        }
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(heap::buffer(buffers.receive)),
            tcp::SocketBuffer::new(heap::buffer(buffers.send)),
        );
        socket.set_nagle_enabled(false);
        socket.set_congestion_control(CongestionControl::Reno);
        socket.set_ack_delay(None);
        socket.set_timeout(Some(CONNECTING));
        let stream = {
            let mut stack = STACK.get();
            let stack = &mut *stack;
            let local = super::free_port(&stack.sockets);
            let connected =
                socket.connect(stack.interface.context(), (IpAddress::from(address), port), local);
            connected.map_err(|_| Closed)?;
            let handle = stack.sockets.add(socket);
            stack.named.add(handle);
            Self { handle }
        };
        poll_fn(|context| {
            stream.with(|socket, _| match socket.state() {
                State::SynSent | State::SynReceived => {
                    socket.register_recv_waker(context.waker());
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
        })
        .await?;
        Ok(stream)
    }

    fn with<R>(&self, act: impl FnOnce(&mut tcp::Socket<'static>, &mut Traffic) -> R) -> R {
        let mut stack = STACK.get();
        let stack = &mut *stack;
        act(stack.sockets.get_mut::<tcp::Socket>(self.handle), stack.named.traffic(self.handle))
    }

    /// Polls for received bytes; `Ok(0)` means the peer sends no more.
    pub fn poll_read(&mut self, context: &mut Context<'_>, into: &mut [u8]) -> Poll<Result<usize, Closed>> {
        self.with(|socket, traffic| match socket.recv_slice(into) {
            Ok(0) if !into.is_empty() => {
                socket.register_recv_waker(context.waker());
                Poll::Pending
            }
            Ok(count) => {
                traffic.received += count as u64;
                Poll::Ready(Ok(count))
            }
            Err(tcp::RecvError::Finished) => Poll::Ready(Ok(0)),
            Err(tcp::RecvError::InvalidState) => Poll::Ready(Err(Closed)),
        })
    }

    /// Polls for room to send; returns the bytes taken.
    pub fn poll_write(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Closed>> {
        self.with(|socket, traffic| match socket.send_slice(bytes) {
            Ok(0) if !bytes.is_empty() => {
                socket.register_send_waker(context.waker());
                Poll::Pending
            }
            Ok(count) => {
                traffic.sent += count as u64;
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
        self.with(|socket, traffic| {
            if socket.may_recv() && !socket.can_recv() {
                socket.register_recv_waker(context.waker());
                return Poll::Pending;
            }
            let taken = socket.recv(|bytes| {
                let (count, result) = take(bytes);
                traffic.received += count as u64;
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
        self.with(|socket, traffic| {
            if socket.may_send() && !socket.can_send() {
                socket.register_send_waker(context.waker());
                return Poll::Pending;
            }
            let filled = socket.send(|room| {
                let count = fill(room);
                traffic.sent += count as u64;
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
        self.with(|socket, _| socket.remote_endpoint())
    }

    /// Its identity.
    #[allow(dead_code, reason = "for programs")]
    pub fn vid(&self) -> Vid {
        STACK.get().named.vid(self.handle)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let handle = self.handle;
        STACK.get().sockets.get_mut::<tcp::Socket>(handle).close();
        // The socket must outlive the closing handshake, but not for ever.
        crate::executor::spawn("close", async move {
            let mut limit = crate::time::sleep(LINGER);
            poll_fn(|context| {
                let mut stack = STACK.get();
                let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
                if matches!(socket.state(), State::Closed | State::TimeWait) {
                    return Poll::Ready(());
                }
                // What still arrives has no reader; room for it lets the peer come to its own end.
                let _ = socket.recv(|bytes| (bytes.len(), ()));
                socket.register_recv_waker(context.waker());
                socket.register_send_waker(context.waker());
                drop(stack);
                Pin::new(&mut limit).poll(context)
            })
            .await;
            let mut stack = STACK.get();
            stack.named.remove(handle);
            drop(stack.sockets.remove(handle));
        });
    }
}

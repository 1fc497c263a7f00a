//! TCP streams.

use alloc::vec::Vec;
use core::{
    future::poll_fn,
    task::{Context, Poll},
};

use smoltcp::{
    iface::SocketHandle,
    socket::tcp::{self, CongestionControl, State},
    wire::IpEndpoint,
};

use super::STACK;

/// Bytes of a connection's receive and send buffers.
const RECEIVE: usize = 128 << 10;
const SEND: usize = 256 << 10;
/// Sockets that wait for a connection at one port.
const BACKLOG: usize = 4;

/// The connection is closed by the peer, reset, or never was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

fn new_socket() -> SocketHandle {
    let buffer = |bytes| tcp::SocketBuffer::new(alloc::vec![0; bytes]);
    let mut socket = tcp::Socket::new(buffer(RECEIVE), buffer(SEND));
    socket.set_nagle_enabled(false);
    socket.set_congestion_control(CongestionControl::Reno);
    socket.set_ack_delay(None);
    STACK.get().sockets.add(socket)
}

/// Accepts connections at one port.
pub struct Listener {
    port: u16,
    waiting: Vec<SocketHandle>,
}

impl Listener {
    /// Listens at a port of all addresses of the image.
    pub fn bind(port: u16) -> Self {
        let mut listener = Self { port, waiting: Vec::new() };
        listener.fill();
        listener
    }

    fn fill(&mut self) {
        while self.waiting.len() < BACKLOG {
            let handle = new_socket();
            // A new socket is closed and the port is not 0, the only two reasons to refuse.
            let _ = STACK.get().sockets.get_mut::<tcp::Socket>(handle).listen(self.port);
            self.waiting.push(handle);
        }
    }

    /// The next connection.
    pub async fn accept(&mut self) -> Stream {
        let handle = poll_fn(|context| {
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
        Stream { handle }
    }
}

/// One connection. Dropping it closes it in order: what was written still leaves.
pub struct Stream {
    handle: SocketHandle,
}

impl Stream {
    fn with<R>(&self, act: impl FnOnce(&mut tcp::Socket<'static>) -> R) -> R {
        act(STACK.get().sockets.get_mut::<tcp::Socket>(self.handle))
    }

    /// Polls for received bytes; `Ok(0)` means the peer sends no more.
    pub fn poll_read(&mut self, context: &mut Context<'_>, into: &mut [u8]) -> Poll<Result<usize, Closed>> {
        self.with(|socket| match socket.recv_slice(into) {
            Ok(0) if !into.is_empty() => {
                socket.register_recv_waker(context.waker());
                Poll::Pending
            }
            Ok(count) => Poll::Ready(Ok(count)),
            Err(tcp::RecvError::Finished) => Poll::Ready(Ok(0)),
            Err(tcp::RecvError::InvalidState) => Poll::Ready(Err(Closed)),
        })
    }

    /// Polls for room to send; returns the bytes taken.
    pub fn poll_write(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Closed>> {
        self.with(|socket| match socket.send_slice(bytes) {
            Ok(0) if !bytes.is_empty() => {
                socket.register_send_waker(context.waker());
                Poll::Pending
            }
            Ok(count) => Poll::Ready(Ok(count)),
            Err(_) => Poll::Ready(Err(Closed)),
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

    /// Room in the send buffer.
    pub fn send_room(&self) -> usize {
        self.with(|socket| socket.send_capacity() - socket.send_queue())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let handle = self.handle;
        STACK.get().sockets.get_mut::<tcp::Socket>(handle).close();
        // The socket must outlive the closing handshake.
        crate::executor::spawn("close", async move {
            let limit = crate::time::now() + core::time::Duration::from_secs(30);
            loop {
                let open = {
                    let mut stack = STACK.get();
                    let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
                    !matches!(socket.state(), State::Closed | State::TimeWait)
                };
                if !open || crate::time::now() >= limit {
                    break;
                }
                poll_fn(|context| {
                    let mut stack = STACK.get();
                    let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
                    if matches!(socket.state(), State::Closed | State::TimeWait) || crate::time::now() >= limit {
                        return Poll::Ready(());
                    }
                    socket.register_recv_waker(context.waker());
                    socket.register_send_waker(context.waker());
                    crate::executor::wake_at(limit, context.waker());
                    Poll::Pending
                })
                .await;
            }
            STACK.get().sockets.remove(handle);
        });
    }
}

/// One row of what `sockets` shows.
pub struct Connection {
    /// `listen`, `established`, …
    pub state: State,
    /// This end.
    pub local: Option<IpEndpoint>,
    /// The other end.
    pub remote: Option<IpEndpoint>,
    /// Port listened at, when there is no other end.
    pub port: u16,
}

/// All TCP sockets.
pub fn connections() -> Vec<Connection> {
    let stack = STACK.get();
    stack
        .sockets
        .iter()
        .filter_map(|(_, socket)| match socket {
            smoltcp::socket::Socket::Tcp(socket) => Some(Connection {
                state: socket.state(),
                local: socket.local_endpoint(),
                remote: socket.remote_endpoint(),
                port: socket.listen_endpoint().port,
            }),
            _ => None,
        })
        .collect()
}

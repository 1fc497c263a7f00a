//! UDP sockets.

use alloc::rc::Rc;
use core::{
    future::poll_fn,
    task::{Context, Poll},
};

use smoltcp::{
    iface::SocketHandle,
    socket::udp::{self, PacketBuffer, PacketMetadata, SendError, UdpMetadata},
    wire::{IpEndpoint, IpListenEndpoint},
};

use super::{STACK, table::Record};
use crate::memory;

const PACKETS: usize = 64;
const BYTES: usize = 128 << 10;

/// A socket bound to a port of all addresses of the image.
pub struct Socket {
    handle: SocketHandle,
    record: Rc<Record>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        let socket = STACK.get().sockets.remove(self.handle);
        drop(socket);
    }
}

impl Socket {
    /// Binds a port.
    pub fn bind(port: u16) -> Self {
        Self::new(port.into(), Record::new(false, None))
    }

    /// Binds an address as the socket that `record` lists, if there is memory.
    pub fn open(at: IpListenEndpoint, record: Rc<Record>) -> Option<Self> {
        memory::kernel_room(2 * BYTES).then(|| Self::new(at, record))
    }

    /// Binds an address, as the socket that `record` lists.
    pub fn new(at: IpListenEndpoint, record: Rc<Record>) -> Self {
        let buffer =
            || PacketBuffer::new(alloc::vec![PacketMetadata::EMPTY; PACKETS], crate::heap::buffer(BYTES));
        let mut socket = udp::Socket::new(buffer(), buffer());
        // A new socket is not open and the port is not 0, the only two reasons to refuse.
        let _ = socket.bind(at);
        let handle = STACK.get().sockets.add(socket);
        record.open(handle);
        Self { handle, record }
    }

    /// The next datagram: its bytes in `into` and where it came from, with the address it was sent to.
    pub async fn receive(&mut self, into: &mut [u8]) -> (usize, UdpMetadata) {
        poll_fn(|context| {
            let mut stack = STACK.get();
            let socket = stack.sockets.get_mut::<udp::Socket>(self.handle);
            match socket.recv_slice(into) {
                Ok(received) => {
                    self.record.count_received(received.0);
                    Poll::Ready(received)
                }
                Err(_) => {
                    socket.register_recv_waker(context.waker());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Sends a datagram; one that finds no room is lost, as datagrams are.
    pub fn send(&mut self, bytes: &[u8], to: UdpMetadata) {
        let mut answer = to;
        answer.meta = Default::default();
        let sent = STACK.get().sockets.get_mut::<udp::Socket>(self.handle).send_slice(bytes, answer);
        if sent.is_ok() {
            self.record.count_sent(bytes.len());
        }
    }

    /// The next datagram, cut to what `into` holds: bytes taken, the datagram's length, where it came from. With
    /// `peek` it stays. What `from` does not want is dropped.
    pub fn poll_receive(
        &self,
        context: &mut Context<'_>,
        into: &mut [u8],
        peek: bool,
        from: Option<IpEndpoint>,
    ) -> Poll<(usize, usize, IpEndpoint)> {
        let mut stack = STACK.get();
        let socket = stack.sockets.get_mut::<udp::Socket>(self.handle);
        loop {
            let other = match socket.peek() {
                Ok((_, meta)) => from.is_some_and(|from| from != meta.endpoint),
                Err(_) => {
                    socket.register_recv_waker(context.waker());
                    return Poll::Pending;
                }
            };
            if other {
                let _ = socket.recv();
                continue;
            }
            let found = if peek {
                socket.peek().map(|(bytes, meta)| (bytes, meta.endpoint))
            } else {
                socket.recv().map(|(bytes, meta)| (bytes, meta.endpoint))
            };
            let Ok((bytes, endpoint)) = found else { continue };
            let count = bytes.len().min(into.len());
            into[..count].copy_from_slice(&bytes[..count]);
            if !peek {
                self.record.count_received(bytes.len());
            }
            return Poll::Ready((count, bytes.len(), endpoint));
        }
    }

    /// Sends a datagram; `Pending` while there is no room, `None` when it can never be sent.
    pub fn poll_send(&self, context: &mut Context<'_>, bytes: &[u8], to: UdpMetadata) -> Poll<Option<()>> {
        let mut stack = STACK.get();
        let socket = stack.sockets.get_mut::<udp::Socket>(self.handle);
        if bytes.len() > socket.payload_send_capacity() {
            return Poll::Ready(None);
        }
        match socket.send_slice(bytes, to) {
            Ok(()) => {
                self.record.count_sent(bytes.len());
                Poll::Ready(Some(()))
            }
            Err(SendError::BufferFull) => {
                socket.register_send_waker(context.waker());
                Poll::Pending
            }
            Err(SendError::Unaddressable) => Poll::Ready(None),
        }
    }

    /// Ready when a datagram is there, with its length.
    pub fn poll_readable(&self, context: &mut Context<'_>) -> Poll<usize> {
        let mut stack = STACK.get();
        let socket = stack.sockets.get_mut::<udp::Socket>(self.handle);
        match socket.peek() {
            Ok((bytes, _)) => Poll::Ready(bytes.len()),
            Err(_) => {
                socket.register_recv_waker(context.waker());
                Poll::Pending
            }
        }
    }

    /// Ready when there is room for a datagram.
    pub fn poll_writable(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut stack = STACK.get();
        let socket = stack.sockets.get_mut::<udp::Socket>(self.handle);
        if socket.can_send() {
            return Poll::Ready(());
        }
        socket.register_send_waker(context.waker());
        Poll::Pending
    }

    /// What it is bound to.
    pub fn local(&self) -> IpListenEndpoint {
        STACK.get().sockets.get_mut::<udp::Socket>(self.handle).endpoint()
    }
}

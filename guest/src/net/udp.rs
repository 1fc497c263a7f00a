//! UDP sockets.

use core::{future::poll_fn, task::Poll};

use smoltcp::{
    iface::SocketHandle,
    socket::udp::{self, PacketBuffer, PacketMetadata, UdpMetadata},
};

use super::STACK;

const PACKETS: usize = 64;
const BYTES: usize = 128 << 10;

/// A socket bound to a port of all addresses of the image.
pub struct Socket {
    handle: SocketHandle,
}

impl Socket {
    /// Binds a port.
    pub fn bind(port: u16) -> Self {
        let buffer =
            || PacketBuffer::new(alloc::vec![PacketMetadata::EMPTY; PACKETS], crate::heap::buffer(BYTES));
        let mut socket = udp::Socket::new(buffer(), buffer());
        // A new socket is not open and the port is not 0, the only two reasons to refuse.
        let _ = socket.bind(port);
        let mut stack = STACK.get();
        let handle = stack.sockets.add(socket);
        stack.named.add(handle);
        Self { handle }
    }

    /// The next datagram: its bytes in `into` and where it came from, with the address it was sent to.
    pub async fn receive(&mut self, into: &mut [u8]) -> (usize, UdpMetadata) {
        poll_fn(|context| {
            let mut stack = STACK.get();
            let stack = &mut *stack;
            let socket = stack.sockets.get_mut::<udp::Socket>(self.handle);
            match socket.recv_slice(into) {
                Ok(received) => {
                    stack.named.traffic(self.handle).received += received.0 as u64;
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
        let mut stack = STACK.get();
        if stack.sockets.get_mut::<udp::Socket>(self.handle).send_slice(bytes, answer).is_ok() {
            stack.named.traffic(self.handle).sent += bytes.len() as u64;
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let mut stack = STACK.get();
        stack.named.remove(self.handle);
        drop(stack.sockets.remove(self.handle));
    }
}

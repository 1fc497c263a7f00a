//! One session channel: its windows, its unread data, and which of its ends is still open.
//!
//! ```text
//! received:  open ──EOF──▶ ended ──┐          sent:  open ──eof()──▶ ended ──┐
//!              └──────CLOSE────────┴─▶ gone            └──close()────────────┴─▶ closed
//! ```
//! The channel is removed when CLOSE went both ways. Not here: messages' bytes, which `connection` reads and writes.

use crate::buffer::Buffer;
use crate::config::MAX_PACKET;
use crate::error::Error;

/// Least room in the output that is worth a packet of its own when more data waits.
const WORTHWHILE: usize = 1024;

/// A channel that both sides agreed to.
#[derive(Debug)]
pub struct Channel {
    /// The peer's number for it.
    pub peer: u32,
    /// Bytes the peer still takes.
    send_window: u32,
    /// Most data in a packet the peer takes.
    send_packet: u32,
    /// Bytes the peer may still send.
    receive_window: u32,
    /// What that was at first.
    full_window: u32,
    /// Read by the program, but not yet granted to the peer again.
    consumed: u32,
    unread: Buffer,
    /// A program was asked for.
    pub asked: bool,
    /// The peer sent EOF.
    pub peer_ended: bool,
    /// We sent EOF.
    pub ended: bool,
    /// We sent CLOSE.
    pub closed: bool,
}

impl Channel {
    /// Starts with the windows both sides stated.
    pub fn new(peer: u32, send_window: u32, send_packet: u32, receive_window: u32) -> Self {
        Self {
            peer,
            send_window,
            send_packet: send_packet.min(MAX_PACKET),
            receive_window,
            full_window: receive_window,
            consumed: 0,
            unread: Buffer::default(),
            asked: false,
            peer_ended: false,
            ended: false,
            closed: false,
        }
    }

    /// Data that arrived and was not read.
    pub fn unread(&self) -> &[u8] {
        self.unread.bytes()
    }

    /// Takes in data from the peer; `kept` is false for a stream nobody reads. Whether there is something to read.
    ///
    /// # Errors
    /// More than the window or a packet allows, or data after EOF.
    pub fn receive(&mut self, id: u32, data: &[u8], kept: bool) -> Result<bool, Error> {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let Some(window) =
            self.receive_window.checked_sub(length).filter(|_| length <= MAX_PACKET && !self.peer_ended)
        else {
            return Err(Error::WindowExceeded { channel: id });
        };
        self.receive_window = window;
        // Once CLOSE is sent no program reads any more.
        if kept && !self.closed {
            self.unread.back().extend_from_slice(data);
            return Ok(!data.is_empty());
        }
        self.consumed = self.consumed.saturating_add(length);
        Ok(false)
    }

    /// Forgets `count` bytes of unread data.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.unread.len());
        self.unread.consume(count);
        self.consumed = self.consumed.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
    }

    /// What to grant the peer now, if that is worth a message: half the window.
    pub fn take_adjustment(&mut self) -> Option<u32> {
        if self.consumed < self.full_window.div_ceil(2) || self.peer_ended || self.closed {
            return None;
        }
        let granted = core::mem::take(&mut self.consumed);
        self.receive_window = self.receive_window.saturating_add(granted);
        Some(granted)
    }

    /// The peer takes `count` bytes more.
    ///
    /// # Errors
    /// A window beyond 2³²−1 (RFC 4254 §5.2).
    pub fn widen(&mut self, id: u32, count: u32) -> Result<(), Error> {
        self.send_window =
            self.send_window.checked_add(count).ok_or(Error::WindowOverflow { channel: id })?;
        Ok(())
    }

    /// How much of `wanted` bytes go into the next packet, with `room` bytes of output left.
    pub fn portion(&self, wanted: usize, room: usize) -> usize {
        if self.ended || self.closed || room < wanted.min(WORTHWHILE) {
            return 0;
        }
        let most = self.send_window.min(self.send_packet) as usize;
        wanted.min(most).min(room)
    }

    /// Bytes the peer's window takes now.
    pub fn send_window(&self) -> usize {
        if self.ended || self.closed { 0 } else { self.send_window as usize }
    }

    /// Accounts for data sent, at most a [`Channel::portion`].
    pub fn spend(&mut self, count: usize) {
        self.send_window = self.send_window.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_peer_that_ignores_its_window_is_caught() {
        let mut channel = Channel::new(0, 0, 0, 10);
        assert_eq!(channel.receive(3, &[0; 10], true), Ok(true));
        assert_eq!(channel.receive(3, &[0; 1], true), Err(Error::WindowExceeded { channel: 3 }));
        let mut wide = Channel::new(0, 0, 0, 1 << 20);
        let packet = alloc::vec![0; MAX_PACKET as usize + 1];
        assert_eq!(wide.receive(3, &packet, true), Err(Error::WindowExceeded { channel: 3 }));
        wide.peer_ended = true;
        assert_eq!(wide.receive(3, &[0], true), Err(Error::WindowExceeded { channel: 3 }));
    }

    #[test]
    fn a_window_is_granted_again_only_as_the_program_reads() {
        let mut channel = Channel::new(0, 0, 0, 10);
        channel.receive(3, &[0; 8], true).expect("fits");
        assert_eq!(channel.take_adjustment(), None);
        channel.consume(4);
        assert_eq!(channel.take_adjustment(), None);
        channel.consume(100);
        assert_eq!(channel.take_adjustment(), Some(8));
        assert_eq!(channel.receive_window, 10);
    }

    #[test]
    fn a_window_beyond_32_bits_is_refused() {
        let mut channel = Channel::new(0, u32::MAX - 1, 100, 10);
        assert_eq!(channel.widen(3, 1), Ok(()));
        assert_eq!(channel.widen(3, 1), Err(Error::WindowOverflow { channel: 3 }));
    }

    proptest! {
        #[test]
        fn the_peer_is_never_sent_more_than_it_granted(
            steps in prop::collection::vec((0u32..5000, 0usize..5000, 0usize..5000), 0..50), packet in 1u32..3000,
        ) {
            let mut channel = Channel::new(0, 0, packet, 10);
            let (mut granted, mut sent) = (0usize, 0);
            for (grant, wanted, room) in steps {
                channel.widen(0, grant).expect("far below 32 bits");
                granted += grant as usize;
                let portion = channel.portion(wanted, room);
                prop_assert!(portion <= wanted && portion <= room && portion <= packet as usize);
                channel.spend(portion);
                sent += portion;
                prop_assert!(sent <= granted);
            }
        }
    }
}

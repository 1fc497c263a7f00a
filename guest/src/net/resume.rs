//! Has every connection send its oldest unacknowledged segment again after a move.
//!
//! What left during the switch may be lost, and smoltcp would wait a second or more before it tries again. It has
//! no call for that, but it has one sure sign of a loss: three duplicate acknowledgements (RFC 5681 §3.2). So the
//! last header that each peer sent is kept, and after a move it is received three times more, without its data. A
//! connection that waits for nothing does not mind. The price is that of a lost segment: half the congestion window.

use alloc::collections::{BTreeMap, VecDeque};

use smoltcp::{
    phy::{Device, DeviceCapabilities},
    time::Instant,
};

use crate::virtio::net::{Net, Received, Sending};

const ETHERNET: usize = 14;
const IPV6: usize = 40;
const TCP: usize = 20;
const HEADERS: usize = ETHERNET + IPV6 + TCP;
/// Duplicates that make a loss.
const DUPLICATES: usize = 3;
/// Connections whose headers are kept. When there are more, all are forgotten, and those in use come back with
/// their next segment.
const MOST: usize = 64;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// A connection as frames name it: both addresses, both ports.
type Name = [u8; 36];

/// The network device, with the last header of each connection's peer.
pub struct Port {
    /// The device.
    pub net: Net,
    headers: BTreeMap<Name, [u8; HEADERS]>,
    again: VecDeque<[u8; HEADERS]>,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]))
}

impl Port {
    /// Wraps the device.
    pub const fn new(net: Net) -> Self {
        Self { net, headers: BTreeMap::new(), again: VecDeque::new() }
    }

    /// Receives each peer's last acknowledgement three times more.
    pub fn repeat_acknowledgements(&mut self) {
        for header in self.headers.values() {
            self.again.extend([*header; DUPLICATES]);
        }
    }

    /// Forgets every connection.
    pub fn forget(&mut self) {
        self.headers.clear();
        self.again.clear();
    }

    fn note(headers: &mut BTreeMap<Name, [u8; HEADERS]>, frame: &[u8]) {
        let Some(seen) = frame.first_chunk::<HEADERS>() else { return };
        let (ip, tcp) = (&seen[ETHERNET..ETHERNET + IPV6], &seen[ETHERNET + IPV6..]);
        if seen[12..14] != [0x86, 0xdd] || ip[6] != 6 {
            return;
        }
        let mut name = [0; 36];
        name[..32].copy_from_slice(&ip[8..40]);
        name[32..].copy_from_slice(&tcp[..4]);
        let flags = tcp[13];
        if flags & RST != 0 {
            headers.remove(&name);
            return;
        }
        if flags & (SYN | ACK) != ACK {
            return;
        }
        if headers.len() >= MOST && !headers.contains_key(&name) {
            headers.clear();
        }
        let acknowledged = word(tcp, 8);
        let before = headers.get(&name).map(|header| word(header, ETHERNET + IPV6 + 8));
        if before.is_some_and(|before| (acknowledged.wrapping_sub(before) as i32) < 0) {
            return;
        }
        let payload =
            usize::from(u16::from_be_bytes([ip[4], ip[5]])).saturating_sub(usize::from(tcp[12] >> 4) * 4);
        let next = word(tcp, 4).wrapping_add(payload as u32).wrapping_add(u32::from(flags & FIN));
        let mut header = *seen;
        header[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&(TCP as u16).to_be_bytes());
        let tcp = &mut header[ETHERNET + IPV6..];
        tcp[4..8].copy_from_slice(&next.to_be_bytes());
        tcp[12] = (TCP as u8 / 4) << 4;
        tcp[13] = ACK;
        headers.insert(name, header);
    }

    /// Forgets connections that `lives` does not know.
    pub fn retain(&mut self, lives: impl Fn(&Name) -> bool) {
        self.headers.retain(|name, _| lives(name));
    }
}

/// The name a peer's frames give a connection.
pub fn name(remote: (&[u8; 16], u16), local: (&[u8; 16], u16)) -> Name {
    let mut name = [0; 36];
    name[..16].copy_from_slice(remote.0);
    name[16..32].copy_from_slice(local.0);
    name[32..34].copy_from_slice(&remote.1.to_be_bytes());
    name[34..].copy_from_slice(&local.1.to_be_bytes());
    name
}

impl Device for Port {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, now: Instant) -> Option<(Received, Sending<'_>)> {
        if let Some(header) = self.again.front().copied() {
            let sending = self.net.transmit(now)?;
            self.again.pop_front();
            return Some((Received::made(&header), sending));
        }
        if self.net.has_own() {
            return self.net.receive_own();
        }
        let (received, sending) = self.net.receive(now)?;
        Self::note(&mut self.headers, received.frame());
        Some((received, sending))
    }

    fn transmit(&mut self, now: Instant) -> Option<Sending<'_>> {
        self.net.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.net.capabilities()
    }
}

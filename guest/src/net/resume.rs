//! Has every connection send its oldest unacknowledged segment again after a move.
//!
//! What left during the switch may be lost, and smoltcp would wait a second or more before it tries again. It has
//! no call for that, but it has one sure sign of a loss: three duplicate acknowledgements (RFC 5681 §3.2). So the
//! last header that each peer sent is kept, and after a move it is received three times more, without its data. A
//! connection that waits for nothing does not mind. The price is that of a lost segment: half the congestion window.

use alloc::collections::{BTreeMap, VecDeque};

use core::net::Ipv4Addr;

use smoltcp::{
    phy::{Device, DeviceCapabilities},
    time::Instant,
    wire::{IpAddress, IpEndpoint},
};

use super::gateway::Gateway;
use crate::virtio::net::{Net, Received, Sending};

const ETHERNET: usize = 14;
const IPV6: usize = 40;
const IPV4: usize = 20;
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

/// A connection as frames name it: both addresses, both ports. IPv4 addresses are mapped ones.
type Name = [u8; 36];

/// Headers of an acknowledgement.
#[derive(Clone, Copy)]
struct Header {
    bytes: [u8; HEADERS],
    /// Where TCP's begins.
    tcp: usize,
}

impl Header {
    fn frame(&self) -> &[u8] {
        self.bytes.get(..self.tcp + TCP).unwrap_or_default()
    }
}

/// The network device, with the last header of each connection's peer and what the gateway announces.
pub struct Port {
    /// The device.
    pub net: Net,
    gateway: Gateway,
    headers: BTreeMap<Name, Header>,
    again: VecDeque<Header>,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]))
}

impl Port {
    /// Wraps the device.
    pub fn new(net: Net) -> Self {
        Self { net, gateway: Gateway::new(false), headers: BTreeMap::new(), again: VecDeque::new() }
    }

    /// Announces the gateway to a stack that knows nothing yet.
    pub fn introduce(&mut self, ipv4: bool) {
        self.gateway = Gateway::new(ipv4);
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

    fn note(headers: &mut BTreeMap<Name, Header>, frame: &[u8]) {
        let Some(seen) = Seen::of(frame) else { return };
        let flags = seen.tcp[13];
        if flags & RST != 0 {
            headers.remove(&seen.name);
            return;
        }
        if flags & (SYN | ACK) != ACK {
            return;
        }
        if headers.len() >= MOST && !headers.contains_key(&seen.name) {
            headers.clear();
        }
        let acknowledged = word(seen.tcp, 8);
        let before = headers.get(&seen.name).map(|header| word(&header.bytes, header.tcp + 8));
        if before.is_some_and(|before| (acknowledged.wrapping_sub(before) as i32) < 0) {
            return;
        }
        headers.insert(seen.name, seen.bare());
    }

    /// Forgets connections that `lives` does not know.
    pub fn retain(&mut self, lives: impl Fn(&Name) -> bool) {
        self.headers.retain(|name, _| lives(name));
    }
}

/// A received TCP segment.
struct Seen<'a> {
    name: Name,
    /// Ethernet and IP.
    link: &'a [u8],
    tcp: &'a [u8; TCP],
    /// Bytes behind TCP's header.
    payload: usize,
}

impl<'a> Seen<'a> {
    fn of(frame: &'a [u8]) -> Option<Self> {
        let ip = frame.get(ETHERNET..)?;
        let word =
            |at: usize| ip.get(at..at + 2).map(|word| usize::from(u16::from_be_bytes([word[0], word[1]])));
        let mut name = [0; 36];
        let (header, length) = match frame.get(12..ETHERNET)? {
            [0x86, 0xdd] if *ip.get(6)? == 6 => {
                name[..32].copy_from_slice(ip.get(8..40)?);
                (IPV6, word(4)?)
            }
            // Options are rare, and a connection whose peer uses them waits for its own timer.
            [0x08, 0x00] if ip.get(9) == Some(&6) && ip.first() == Some(&0x45) && word(6)? & 0x3fff == 0 => {
                let mapped =
                    |at: usize| Some(Ipv4Addr::from(*ip.get(at..)?.first_chunk::<4>()?).to_ipv6_mapped());
                name[..16].copy_from_slice(&mapped(12)?.octets());
                name[16..32].copy_from_slice(&mapped(16)?.octets());
                (IPV4, word(2)?.checked_sub(IPV4)?)
            }
            _ => return None,
        };
        let (link, rest) = frame.split_at_checked(ETHERNET + header)?;
        let tcp = rest.first_chunk::<TCP>()?;
        name[32..].copy_from_slice(&tcp[..4]);
        Some(Self { name, link, tcp, payload: length.saturating_sub(usize::from(tcp[12] >> 4) * 4) })
    }

    /// The acknowledgement that its sender would send next, without data or options.
    fn bare(&self) -> Header {
        let mut header = Header { bytes: [0; HEADERS], tcp: self.link.len() };
        let (link, tcp) = header.bytes.split_at_mut(self.link.len());
        link.copy_from_slice(self.link);
        let ip = &mut link[ETHERNET..];
        if ip.len() == IPV6 {
            ip[4..6].copy_from_slice(&(TCP as u16).to_be_bytes());
        } else {
            ip[2..4].copy_from_slice(&((IPV4 + TCP) as u16).to_be_bytes());
            ip[10..12].fill(0);
            let words = ip.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
            let sum: u32 = words.sum();
            let sum = (sum & 0xffff) + (sum >> 16);
            ip[10..12].copy_from_slice(&(!(((sum & 0xffff) + (sum >> 16)) as u16)).to_be_bytes());
        }
        let next =
            word(self.tcp, 4).wrapping_add(self.payload as u32).wrapping_add(u32::from(self.tcp[13] & FIN));
        let tcp = &mut tcp[..TCP];
        tcp.copy_from_slice(self.tcp);
        tcp[4..8].copy_from_slice(&next.to_be_bytes());
        tcp[12] = (TCP as u8 / 4) << 4;
        tcp[13] = ACK;
        header
    }
}

/// The name a peer's frames give a connection.
pub fn name(remote: IpEndpoint, local: IpEndpoint) -> Name {
    let octets = |address: IpAddress| match address {
        IpAddress::Ipv6(address) => address.octets(),
        IpAddress::Ipv4(address) => address.to_ipv6_mapped().octets(),
    };
    let mut name = [0; 36];
    name[..16].copy_from_slice(&octets(remote.addr));
    name[16..32].copy_from_slice(&octets(local.addr));
    name[32..34].copy_from_slice(&remote.port.to_be_bytes());
    name[34..].copy_from_slice(&local.port.to_be_bytes());
    name
}

impl Device for Port {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, now: Instant) -> Option<(Received, Sending<'_>)> {
        if self.net.has_room()
            && let Some(frame) = self.gateway.announce(now)
        {
            let received = Received::made(frame);
            return Some((received, self.net.answer()?));
        }
        if let Some(header) = self.again.front().copied() {
            let sending = self.net.answer()?;
            self.again.pop_front();
            return Some((Received::made(header.frame()), sending));
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

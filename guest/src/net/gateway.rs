//! The gateway, told to the stack before it asks.
//!
//! Whatever leaves the machine goes to the gateway, whose address and hardware address are the same on every host.
//! smoltcp would ask for the latter, drop what it answers to while it waits, be silent for a second after each question
//! (of IPv4 and IPv6 together), and forget it after a minute. So the stack receives, before anything else and again
//! before it forgets, the announcements that a gateway could send: an ARP reply (RFC 826) and an unsolicited neighbour
//! advertisement (RFC 4861 §7.2.6).

use alloc::vec::Vec;

use kage_abi::{GATEWAY, GATEWAY_MAC, GATEWAY_V4, GUEST_LINK_LOCAL, GUEST_LINK_LOCAL_V4, GUEST_MAC};
use smoltcp::{
    phy::ChecksumCapabilities,
    time::{Duration, Instant},
    wire::{
        ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
        Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv4Address, Ipv6Address, Ipv6Packet, Ipv6Repr,
        NdiscNeighborFlags, NdiscRepr, RawHardwareAddress,
    },
};

/// How often: smoltcp forgets after a minute.
const AGAIN: Duration = Duration::from_secs(20);

/// Announcements of the gateway and when they are due.
pub struct Gateway {
    next: Instant,
    /// Of those that are due, the first not yet received.
    pending: usize,
    /// With IPv4, the ARP reply; the advertisement.
    frames: Vec<Vec<u8>>,
}

impl Gateway {
    /// To a machine with an IPv4 address or without.
    pub fn new(ipv4: bool) -> Self {
        let frames: Vec<Vec<u8>> = ipv4.then(arp_reply).into_iter().chain([advertisement()]).collect();
        Self { next: Instant::ZERO, pending: frames.len(), frames }
    }

    /// The next announcement that is due at `now`.
    pub fn announce(&mut self, now: Instant) -> Option<&[u8]> {
        if now >= self.next {
            (self.next, self.pending) = (now + AGAIN, 0);
        }
        let frame = self.frames.get(self.pending)?;
        self.pending += 1;
        Some(frame)
    }
}

fn framed(protocol: EthernetProtocol, length: usize, emit: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let ethernet = EthernetRepr {
        src_addr: EthernetAddress(GATEWAY_MAC),
        dst_addr: EthernetAddress(GUEST_MAC),
        ethertype: protocol,
    };
    let mut bytes = alloc::vec![0; ethernet.buffer_len() + length];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes);
    ethernet.emit(&mut frame);
    emit(frame.payload_mut());
    bytes
}

fn arp_reply() -> Vec<u8> {
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(GATEWAY_MAC),
        source_protocol_addr: Ipv4Address::from(GATEWAY_V4),
        target_hardware_addr: EthernetAddress(GUEST_MAC),
        target_protocol_addr: Ipv4Address::from(GUEST_LINK_LOCAL_V4),
    };
    framed(EthernetProtocol::Arp, reply.buffer_len(), |bytes| {
        reply.emit(&mut ArpPacket::new_unchecked(bytes));
    })
}

fn advertisement() -> Vec<u8> {
    let (from, to) = (Ipv6Address::from(GATEWAY), Ipv6Address::from(GUEST_LINK_LOCAL));
    let advert = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
        flags: NdiscNeighborFlags::ROUTER | NdiscNeighborFlags::OVERRIDE,
        target_addr: from,
        lladdr: Some(RawHardwareAddress::from(EthernetAddress(GATEWAY_MAC))),
    });
    let ip = Ipv6Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Icmpv6,
        payload_len: advert.buffer_len(),
        // RFC 4861 §7.1.2: any other was forwarded.
        hop_limit: 255,
    };
    framed(EthernetProtocol::Ipv6, ip.buffer_len() + advert.buffer_len(), |bytes| {
        let mut packet = Ipv6Packet::new_unchecked(bytes);
        ip.emit(&mut packet);
        let mut icmp = Icmpv6Packet::new_unchecked(packet.payload_mut());
        advert.emit(&from, &to, &mut icmp, &ChecksumCapabilities::default());
    })
}

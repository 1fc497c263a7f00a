//! The network device as smoltcp sees one.
//!
//! Checksums of TCP are left to the device when sending, and checked here when receiving unless the
//! host already vouches for them (virtio 1.2 §5.1.6).

use alloc::{collections::VecDeque, vec::Vec};
use core::net::Ipv6Addr;

use kage_abi::{GUEST_MAC, device};
use smoltcp::{
    phy::{
        Checksum, ChecksumCapabilities, Device as PhyDevice, DeviceCapabilities, Medium, RxToken, TxToken,
    },
    time::Instant,
};

use super::{
    Device, Queue,
    queue::{Part, forever},
};

const HEADER: usize = 12;
const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO6: u64 = 1 << 8;
const MRG_RXBUF: u64 = 1 << 15;
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

/// Bytes of a buffer. Two share a page, so that small traffic dirties few pages.
const BUFFER: usize = 2048;
/// Receive buffers: room for two large frames.
const RECEIVE: u16 = 128;
const TRANSMIT: u16 = 64;

/// Frames from this machine to itself that wait.
const LOOPED: usize = 128;
/// Frames from this machine to itself in one poll of the stack, which is not to take longer than others can wait.
const OWN: usize = 64;
const ETHERNET: usize = 14;
const IPV6: usize = 40;
/// Bytes of an IPv4 header without options.
const IPV4: usize = 20;
/// Bytes of a TCP header without options.
const TCP_HEADER: usize = 20;
/// TCP's number in an IP header.
const TCP: u8 = 6;

/// The network device.
pub struct Net {
    queues: [Queue; 2],
    mtu: usize,
    /// Receive buffer of each descriptor.
    receive: Vec<*mut u8>,
    transmit: Vec<*mut u8>,
    free: Vec<usize>,
    sending: Vec<Option<usize>>,
    frame: Vec<u8>,
    /// Frames from this machine to itself.
    looped: VecDeque<Vec<u8>>,
    /// How many of them may still come in this poll of the stack.
    own: usize,
}

impl Net {
    /// Starts the device.
    pub fn start() -> Self {
        let mut queues = [Queue::new(RECEIVE), Queue::new(TRANSMIT)];
        Device::start(device::NET, 1, CSUM | GUEST_CSUM | GUEST_TSO6 | MRG_RXBUF, &mut queues);
        let carve = |count: u16| {
            let base = forever(BUFFER * usize::from(count));
            // SAFETY: each offset lies in the allocation just made.
            (0..usize::from(count)).map(move |index| unsafe { base.add(index * BUFFER) })
        };
        let mut net = Self {
            queues,
            mtu: 1280,
            receive: alloc::vec![core::ptr::null_mut(); usize::from(RECEIVE)],
            transmit: carve(TRANSMIT).collect(),
            free: (0..usize::from(TRANSMIT)).rev().collect(),
            sending: alloc::vec![None; usize::from(TRANSMIT)],
            frame: Vec::new(),
            looped: VecDeque::new(),
            own: OWN,
        };
        for buffer in carve(RECEIVE) {
            net.offer(buffer);
        }
        net
    }

    /// Sets the largest IP packet.
    pub fn set_mtu(&mut self, mtu: usize) {
        self.mtu = mtu.clamp(1280, BUFFER - HEADER - ETHERNET);
    }

    /// Largest IP packet.
    pub const fn mtu(&self) -> usize {
        self.mtu
    }

    fn offer(&mut self, buffer: *mut u8) {
        let part = Part { address: buffer as u64, length: BUFFER as u32, writable: true };
        if let Some(index) = self.queues[0].push(&[part]) {
            self.receive[usize::from(index)] = buffer;
        }
    }

    /// Fills both rings with nonsense.
    pub fn spoil_rings(&mut self) {
        self.queues.iter_mut().for_each(Queue::spoil);
    }

    /// Whether a frame could be sent now.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether frames wait to be sent at the next door, or to be received here.
    pub fn is_sending(&self) -> bool {
        self.free.len() < usize::from(TRANSMIT) || !self.looped.is_empty()
    }

    /// Whether frames from this machine to itself wait.
    pub fn has_own(&self) -> bool {
        !self.looped.is_empty() && self.own > 0
    }

    /// The next frame from this machine to itself, if there is room for an answer too.
    pub fn receive_own(&mut self) -> Option<(Received, Sending<'_>)> {
        if self.free.is_empty() {
            return None;
        }
        let frame = self.looped.pop_front()?;
        self.own = self.own.saturating_sub(1);
        Some((Received::made(&frame), Sending(self)))
    }

    /// A place for an answer, if there is room.
    pub fn answer(&mut self) -> Option<Sending<'_>> {
        (!self.free.is_empty()).then_some(Sending(self))
    }

    /// Takes back buffers of frames that have left. To be called before each poll of the stack.
    pub fn reclaim(&mut self) {
        self.own = OWN;
        while let Some((head, _)) = self.queues[1].pop() {
            if let Some(buffer) = self.sending[usize::from(head)].take() {
                self.free.push(buffer);
            }
        }
    }

    /// The next received frame with its header in `frame`; false when there is none.
    fn take_frame(&mut self) -> bool {
        loop {
            self.frame.clear();
            let mut left = 1u16;
            let mut first = true;
            while left > 0 {
                let Some((head, length)) = self.queues[0].pop() else { return false };
                let buffer = self.receive[usize::from(head)];
                let length = (length as usize).min(BUFFER);
                // SAFETY: the buffer was offered for `head`, holds `BUFFER` bytes and is the driver's again.
                let bytes = unsafe { core::slice::from_raw_parts(buffer, length) };
                self.frame.extend_from_slice(bytes);
                self.offer(buffer);
                if first {
                    left =
                        if length >= HEADER { u16::from_le_bytes([bytes[10], bytes[11]]).max(1) } else { 1 };
                    first = false;
                }
                left -= 1;
            }
            if self.frame.len() > HEADER
                && !self.frame.get(HEADER..).is_some_and(is_loopback)
                && (self.frame[0] & (NEEDS_CSUM | DATA_VALID) != 0
                    || tcp_checksum_holds(&self.frame[HEADER..]))
            {
                return true;
            }
        }
    }
}

/// Whether a frame is IPv6 from or to `::1`: never from outside, and never to leave.
fn is_loopback(frame: &[u8]) -> bool {
    let end = |at: usize| frame.get(at..at + 16) == Some(&Ipv6Addr::LOCALHOST.octets()[..]);
    frame.get(12..ETHERNET) == Some(&[0x86, 0xdd]) && (end(ETHERNET + 8) || end(ETHERNET + 24))
}

fn sum(bytes: &[u8], mut total: u64) -> u64 {
    let mut chunks = bytes.chunks_exact(4);
    for chunk in &mut chunks {
        total += u64::from(u32::from_be_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]));
    }
    let mut last = [0; 4];
    last[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    total + u64::from(u32::from_be_bytes(last))
}

fn fold(mut total: u64) -> u16 {
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// Where TCP lies in a frame that has it directly behind an IP header, and how long it is by that header.
fn tcp_of(frame: &[u8]) -> Option<(usize, usize)> {
    let ip = frame.get(ETHERNET..)?;
    let word = |at: usize| ip.get(at..at + 2).map(|word| usize::from(u16::from_be_bytes([word[0], word[1]])));
    let (header, length) = match frame[12..ETHERNET] {
        [0x86, 0xdd] if *ip.get(6)? == TCP => (IPV6, word(4)?),
        // A fragment's checksum is the whole packet's.
        [0x08, 0x00] if *ip.get(9)? == TCP && word(6)? & 0x3fff == 0 => {
            let header = usize::from(ip[0] & 0xf) * 4;
            (header, word(2)?.checked_sub(header)?)
        }
        _ => return None,
    };
    (length >= TCP_HEADER && ip.len() >= header + TCP_HEADER && header >= IPV4)
        .then_some((ETHERNET + header, length))
}

/// Sum of TCP's pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1), not folded, for TCP at `at` of `length` bytes.
fn pseudo_header(frame: &[u8], at: usize, length: usize) -> u64 {
    let addresses = if frame[12] == 0x86 { 32 } else { 8 };
    let from = if frame[12] == 0x86 { at - addresses } else { ETHERNET + IPV4 - addresses };
    sum(&frame[from..from + addresses], length as u64 + u64::from(TCP))
}

fn tcp_checksum_holds(frame: &[u8]) -> bool {
    tcp_of(frame).is_none_or(|(at, length)| {
        let tcp = frame.get(at..at + length);
        tcp.is_some_and(|tcp| fold(sum(tcp, pseudo_header(frame, at, length))) == 0xffff)
    })
}

/// A frame to read.
pub struct Received(Vec<u8>);

impl Received {
    /// A frame that did not come from the device.
    pub fn made(frame: &[u8]) -> Self {
        let mut whole = alloc::vec![0; HEADER];
        whole.extend_from_slice(frame);
        Self(whole)
    }

    /// The frame.
    pub fn frame(&self) -> &[u8] {
        &self.0[HEADER..]
    }
}

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.frame())
    }
}

/// A place for a frame to send.
pub struct Sending<'a>(&'a mut Net);

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let net = self.0;
        let Some(index) = net.free.pop() else {
            return f(&mut alloc::vec![0; length]);
        };
        let length = length.min(BUFFER - HEADER);
        let buffer = net.transmit[index];
        // SAFETY: the buffer is free, so the driver alone has it, and it holds `BUFFER` bytes.
        let bytes = unsafe { core::slice::from_raw_parts_mut(buffer, HEADER + length) };
        bytes[..HEADER].fill(0);
        let result = f(&mut bytes[HEADER..]);
        if is_loopback(&bytes[HEADER..]) {
            // Where too many wait one is lost, as it may be anywhere.
            if net.looped.len() < LOOPED {
                // It was meant for the gateway, as everything is that is not on the link.
                bytes[HEADER..HEADER + 6].copy_from_slice(&GUEST_MAC);
                net.looped.push_back(bytes[HEADER..].to_vec());
            }
            net.free.push(index);
            return result;
        }
        if let Some((at, tcp)) = tcp_of(&bytes[HEADER..]) {
            let partial = fold(pseudo_header(&bytes[HEADER..], at, tcp)).to_be_bytes();
            bytes[HEADER + at + 16..HEADER + at + 18].copy_from_slice(&partial);
            bytes[0] = NEEDS_CSUM;
            bytes[6..8].copy_from_slice(&(at as u16).to_le_bytes());
            bytes[8..10].copy_from_slice(&16u16.to_le_bytes());
        }
        let part = Part { address: buffer as u64, length: (HEADER + length) as u32, writable: false };
        match net.queues[1].push(&[part]) {
            Some(head) => net.sending[usize::from(head)] = Some(index),
            None => net.free.push(index),
        }
        result
    }
}

impl PhyDevice for Net {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        if self.free.is_empty() || !self.take_frame() {
            return None;
        }
        let frame = core::mem::take(&mut self.frame);
        Some((Received(frame), Sending(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        // Nothing is made while it might be lost on the way to this machine itself.
        (!self.free.is_empty() && self.looped.len() < LOOPED).then_some(Sending(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + ETHERNET;
        capabilities.checksum = ChecksumCapabilities::default();
        capabilities.checksum.tcp = Checksum::None;
        capabilities
    }
}

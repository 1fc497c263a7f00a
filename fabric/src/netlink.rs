//! A blocking rtnetlink socket: one request, one answer, two system calls.
//!
//! The kernel answers a route request before `send` returns, so `recv` never sleeps. The socket belongs to the
//! network namespace in which it was opened, whatever the caller's thread moves into later.

use std::os::fd::OwnedFd;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType},
};

use crate::sys;

/// A request to the kernel's routing tables failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket to the kernel.
    #[error("cannot talk to the kernel's routing: {0}")]
    Socket(#[source] Errno),
    /// The kernel said no.
    #[error("the kernel refused: {}{}", detail.as_deref().map(|text| format!("{text}: ")).unwrap_or_default(), reason(*.errno))]
    Refused {
        /// Why.
        errno: Errno,
        /// The kernel's own words, where it has any.
        detail: Option<String>,
    },
    /// An answer that is no answer: a bug here or in the kernel.
    #[error("the kernel's answer cannot be read: {0}")]
    Answer(String),
}

impl NetlinkError {
    /// The kernel's error number, if it was the kernel that refused.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            Self::Socket(_) | Self::Answer(_) => None,
        }
    }
}

fn reason(errno: Errno) -> String {
    match errno {
        Errno::PERM => "operation not permitted; run as root or with CAP_NET_ADMIN".into(),
        Errno::OPNOTSUPP => {
            "operation not supported; the kernel lacks a module (vxlan, bridge, tun or ipv6)".into()
        }
        other => std::io::Error::from(other).to_string(),
    }
}

/// Largest answer: the kernel fills at most 32 KiB per `recv` of a dump.
const ANSWER_BYTES: usize = 32 << 10;
/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;

/// One open socket.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        // NETLINK_ROUTE is protocol 0.
        let family = AddressFamily::NETLINK;
        let fd = rustix::net::socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, None)
            .map_err(NetlinkError::Socket)?;
        sys::want_extended_acknowledgements(&fd).map_err(NetlinkError::Socket)?;
        Ok(Self { fd, sequence: 0, buffer: vec![0; ANSWER_BYTES] })
    }

    /// Has the kernel carry out a request.
    pub fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.send(message, NLM_F_ACK | flags)?;
        self.answers(false, |_| Ok(()))
    }

    /// Asks for one object.
    pub fn get(&mut self, message: RouteNetlinkMessage) -> Result<RouteNetlinkMessage, NetlinkError> {
        self.send(message, NLM_F_ACK)?;
        let mut found = None;
        self.answers(false, |answer| {
            found = Some(answer);
            Ok(())
        })?;
        found.ok_or_else(|| NetlinkError::Answer("nothing but an acknowledgement".into()))
    }

    /// Asks for all objects of a kind.
    pub fn dump(
        &mut self,
        message: RouteNetlinkMessage,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> Result<(), NetlinkError> {
        self.send(message, NLM_F_DUMP)?;
        self.answers(true, |answer| {
            each(answer);
            Ok(())
        })
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let length = message.buffer_len();
        message.serialize(&mut self.buffer[..length]);
        rustix::io::retry_on_intr(|| rustix::net::send(&self.fd, &self.buffer[..length], SendFlags::empty()))
            .map_err(NetlinkError::Socket)?;
        Ok(())
    }

    /// Reads answers to the last request until its acknowledgement, or until the end of a dump.
    fn answers(
        &mut self,
        dump: bool,
        mut each: impl FnMut(RouteNetlinkMessage) -> Result<(), NetlinkError>,
    ) -> Result<(), NetlinkError> {
        loop {
            let fd = &self.fd;
            let buffer = &mut self.buffer;
            let (length, _) =
                rustix::io::retry_on_intr(|| rustix::net::recv(fd, &mut buffer[..], RecvFlags::empty()))
                    .map_err(NetlinkError::Socket)?;
            let mut rest = &self.buffer[..length];
            while !rest.is_empty() {
                let (message, next) = split(rest)?;
                rest = next;
                if field(message, 8) != self.sequence {
                    continue;
                }
                match u16::from_ne_bytes([message[4], message[5]]) {
                    NLMSG_ERROR => return acknowledgement(message),
                    NLMSG_DONE if dump => return Ok(()),
                    NLMSG_DONE => {}
                    _ => each(parse(message)?)?,
                }
            }
        }
    }
}

fn parse(message: &[u8]) -> Result<RouteNetlinkMessage, NetlinkError> {
    let parsed = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message)
        .map_err(|error| NetlinkError::Answer(error.to_string()))?;
    match parsed.payload {
        NetlinkPayload::InnerMessage(inner) => Ok(inner),
        other => Err(NetlinkError::Answer(format!("message type {}", other.message_type()))),
    }
}

/// The first message of several, and the rest (RFC 3549 §2.2).
fn split(bytes: &[u8]) -> Result<(&[u8], &[u8]), NetlinkError> {
    let cut = || NetlinkError::Answer("cut short".into());
    if bytes.len() < HEADER_BYTES {
        return Err(cut());
    }
    let length = field(bytes, 0) as usize;
    let message = bytes.get(..length).filter(|message| message.len() >= HEADER_BYTES).ok_or_else(cut)?;
    let next = length.next_multiple_of(4).min(bytes.len());
    Ok((message, &bytes[next..]))
}

/// Reads `struct nlmsgerr`: the error, then the header of the request, then attributes with the kernel's words.
fn acknowledgement(message: &[u8]) -> Result<(), NetlinkError> {
    if message.len() < HEADER_BYTES + 4 {
        return Err(NetlinkError::Answer("cut short".into()));
    }
    let code = field(message, HEADER_BYTES) as i32;
    if code == 0 {
        return Ok(());
    }
    /// The error is followed by the request's header alone, not by all of the request.
    const CAPPED: u16 = 0x100;
    const ATTRIBUTE_MESSAGE: u16 = 1;
    let flags = u16::from_ne_bytes([message[6], message[7]]);
    let mut detail = None;
    if message.len() >= HEADER_BYTES + 4 + HEADER_BYTES {
        let request =
            if flags & CAPPED != 0 { HEADER_BYTES } else { field(message, HEADER_BYTES + 4) as usize };
        let mut rest = message.get(HEADER_BYTES + 4 + request.next_multiple_of(4)..).unwrap_or_default();
        while rest.len() >= 4 {
            let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
            let Some(value) = rest.get(4..length) else { break };
            if u16::from_ne_bytes([rest[2], rest[3]]) == ATTRIBUTE_MESSAGE {
                let text = value.strip_suffix(&[0]).unwrap_or(value);
                detail = Some(String::from_utf8_lossy(text).into_owned());
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
    Err(NetlinkError::Refused { errno: Errno::from_raw_os_error(-code), detail })
}

fn field(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

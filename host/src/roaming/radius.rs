//! RADIUS accounting packets as bytes: parse, represent, emit (RFC 2865 §3–5, RFC 2866 §3–5).
//!
//! ```text
//!  0      1            2        4                20
//!  | code | identifier | length | authenticator  | attributes: (type, length, value)*
//! ```
//!
//! [`Packet`] is a validated view of foreign bytes; [`Accounting`] is what Kage reads from or writes into an
//! Accounting-Request. Nothing here allocates more than one packet's length, and no input panics.
//!
//! Deliberately not here: sockets, retransmission and what a report means (sessions, roaming decisions).
//! Message-Authenticator is not checked: RFC 2866's request authenticator already covers the whole packet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use md5::{Digest, Md5};

#[cfg(test)]
mod tests;

/// Shortest packet: the header (RFC 2865 §3).
pub const MIN_PACKET_BYTES: usize = 20;
/// Longest packet (RFC 2865 §3).
pub const MAX_PACKET_BYTES: usize = 4096;
/// Longest value of an attribute: its length octet counts itself and the type.
pub const MAX_VALUE_BYTES: usize = 253;

/// Code of an Accounting-Request (RFC 2866 §4.1).
pub const ACCOUNTING_REQUEST: u8 = 4;
/// Code of an Accounting-Response (RFC 2866 §4.2).
pub const ACCOUNTING_RESPONSE: u8 = 5;

/// Attribute types that Kage reads or writes.
pub mod attribute {
    /// User-Name (RFC 2865 §5.1).
    pub const USER_NAME: u8 = 1;
    /// NAS-IP-Address (RFC 2865 §5.4).
    pub const NAS_IP_ADDRESS: u8 = 4;
    /// Framed-IP-Address (RFC 2865 §5.8).
    pub const FRAMED_IP_ADDRESS: u8 = 8;
    /// Class (RFC 2865 §5.25).
    pub const CLASS: u8 = 25;
    /// Called-Station-Id (RFC 2865 §5.30).
    pub const CALLED_STATION_ID: u8 = 30;
    /// Calling-Station-Id (RFC 2865 §5.31).
    pub const CALLING_STATION_ID: u8 = 31;
    /// NAS-Identifier (RFC 2865 §5.32).
    pub const NAS_IDENTIFIER: u8 = 32;
    /// Proxy-State, copied unmodified into the answer (RFC 2865 §5.33).
    pub const PROXY_STATE: u8 = 33;
    /// Acct-Status-Type (RFC 2866 §5.1).
    pub const ACCT_STATUS_TYPE: u8 = 40;
    /// Acct-Delay-Time in seconds (RFC 2866 §5.2).
    pub const ACCT_DELAY_TIME: u8 = 41;
    /// Acct-Input-Octets, the lower 32 bits (RFC 2866 §5.3).
    pub const ACCT_INPUT_OCTETS: u8 = 42;
    /// Acct-Output-Octets, the lower 32 bits (RFC 2866 §5.4).
    pub const ACCT_OUTPUT_OCTETS: u8 = 43;
    /// Acct-Session-Id (RFC 2866 §5.5).
    pub const ACCT_SESSION_ID: u8 = 44;
    /// Acct-Session-Time in seconds (RFC 2866 §5.7).
    pub const ACCT_SESSION_TIME: u8 = 46;
    /// Acct-Multi-Session-Id (RFC 2866 §5.11).
    pub const ACCT_MULTI_SESSION_ID: u8 = 50;
    /// Acct-Input-Gigawords, the upper 32 bits (RFC 2869 §5.1).
    pub const ACCT_INPUT_GIGAWORDS: u8 = 52;
    /// Acct-Output-Gigawords, the upper 32 bits (RFC 2869 §5.2).
    pub const ACCT_OUTPUT_GIGAWORDS: u8 = 53;
    /// Event-Timestamp in seconds since 1970 (RFC 2869 §5.3).
    pub const EVENT_TIMESTAMP: u8 = 55;
    /// Chargeable-User-Identity (RFC 4372 §2.2).
    pub const CHARGEABLE_USER_IDENTITY: u8 = 89;
    /// NAS-IPv6-Address (RFC 3162 §2.1).
    pub const NAS_IPV6_ADDRESS: u8 = 95;
    /// Framed-IPv6-Address (RFC 6911 §3.1).
    pub const FRAMED_IPV6_ADDRESS: u8 = 168;
}

/// Bytes that are no RADIUS packet, or a report that cannot be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RadiusError {
    /// Fewer octets than a header, or than the header's length field says.
    #[error("packet is cut short: {got} octets of {expected}")]
    Truncated {
        /// Octets that arrived.
        got: usize,
        /// Octets needed at least.
        expected: usize,
    },
    /// The length field is outside 20…4096.
    #[error("length field {0} is outside 20…4096")]
    Length(usize),
    /// An attribute's length is below 2 or reaches beyond the packet.
    #[error("attribute {kind} at octet {offset} has a length that does not fit")]
    AttributeLength {
        /// The attribute's type.
        kind: u8,
        /// Where it starts in the packet.
        offset: usize,
    },
    /// An attribute's value is not of the form that its type asks for.
    #[error("attribute {kind} has a malformed value")]
    AttributeValue {
        /// The attribute's type.
        kind: u8,
    },
    /// The packet is not an Accounting-Request.
    #[error("code {0} is not Accounting-Request (4)")]
    Code(u8),
    /// Acct-Status-Type is absent, so nobody can tell what is reported.
    #[error("Acct-Status-Type is missing")]
    NoStatus,
    /// A value is too long to be written, or too many are.
    #[error("attribute {kind} does not fit into a packet")]
    TooLong {
        /// The attribute's type.
        kind: u8,
    },
}

/// A packet whose length and attribute lengths have been checked.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    bytes: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Checks header and attribute lengths. Octets beyond the length field are padding and ignored (RFC 2865 §3).
    ///
    /// # Errors
    /// If the bytes are shorter than they say, or an attribute does not fit.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, RadiusError> {
        let length = match bytes.get(..MIN_PACKET_BYTES) {
            Some(header) => usize::from(u16::from_be_bytes([header[2], header[3]])),
            None => return Err(RadiusError::Truncated { got: bytes.len(), expected: MIN_PACKET_BYTES }),
        };
        if !(MIN_PACKET_BYTES..=MAX_PACKET_BYTES).contains(&length) {
            return Err(RadiusError::Length(length));
        }
        let bytes =
            bytes.get(..length).ok_or(RadiusError::Truncated { got: bytes.len(), expected: length })?;
        let mut offset = MIN_PACKET_BYTES;
        while offset < length {
            let kind = bytes[offset];
            let size = bytes.get(offset + 1).copied().map_or(0, usize::from);
            if size < 2 || offset + size > length {
                return Err(RadiusError::AttributeLength { kind, offset });
            }
            offset += size;
        }
        Ok(Self { bytes })
    }

    /// What the packet is: [`ACCOUNTING_REQUEST`], [`ACCOUNTING_RESPONSE`] or something else.
    #[must_use]
    pub fn code(&self) -> u8 {
        self.bytes[0]
    }

    /// The number that pairs an answer with its request.
    #[must_use]
    pub fn identifier(&self) -> u8 {
        self.bytes[1]
    }

    /// The authenticator as it stands in the packet, unchecked.
    #[must_use]
    pub fn authenticator(&self) -> [u8; 16] {
        let mut authenticator = [0; 16];
        authenticator.copy_from_slice(&self.bytes[4..MIN_PACKET_BYTES]);
        authenticator
    }

    /// All attributes in order, as (type, value).
    pub fn attributes(&self) -> impl Iterator<Item = (u8, &'a [u8])> {
        let mut rest = &self.bytes[MIN_PACKET_BYTES..];
        std::iter::from_fn(move || {
            let (&kind, &size) = (rest.first()?, rest.get(1)?);
            let value = rest.get(2..usize::from(size))?;
            rest = &rest[usize::from(size)..];
            Some((kind, value))
        })
    }

    /// The first value of an attribute.
    #[must_use]
    pub fn attribute(&self, kind: u8) -> Option<&'a [u8]> {
        self.attributes().find(|&(found, _)| found == kind).map(|(_, value)| value)
    }

    /// Whether the request authenticator was made with this secret (RFC 2866 §3).
    #[must_use]
    pub fn is_request_of(&self, secret: &[u8]) -> bool {
        same(&self.authenticator(), &digest(self.bytes, &[0; 16], secret))
    }

    /// Whether this is the answer to the request with that identifier and authenticator, made with this secret.
    #[must_use]
    pub fn answers(&self, request: &Packet<'_>, secret: &[u8]) -> bool {
        self.code() == ACCOUNTING_RESPONSE
            && self.identifier() == request.identifier()
            && same(&self.authenticator(), &digest(self.bytes, &request.authenticator(), secret))
    }

    /// The Accounting-Response to this request: its identifier and its Proxy-State attributes.
    #[must_use]
    pub fn response(&self, secret: &[u8]) -> Vec<u8> {
        let mut bytes = header(ACCOUNTING_RESPONSE, self.identifier());
        for (kind, value) in self.attributes().filter(|&(kind, _)| kind == attribute::PROXY_STATE) {
            bytes.extend([kind, value.len() as u8 + 2]);
            bytes.extend(value);
        }
        sign(&mut bytes, &self.authenticator(), secret);
        bytes
    }
}

/// What an Accounting-Request reports (RFC 2866 §5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// A user's service begins.
    Start,
    /// A user's service ends.
    Stop,
    /// A session still stands.
    InterimUpdate,
    /// The access point starts; every session it had is over.
    AccountingOn,
    /// The access point goes away; every session it had is over.
    AccountingOff,
    /// A value that Kage does not act on; answered and counted.
    Other(u32),
}

impl Status {
    /// The status of an Acct-Status-Type value.
    #[must_use]
    pub fn from_value(value: u32) -> Self {
        match value {
            1 => Self::Start,
            2 => Self::Stop,
            3 => Self::InterimUpdate,
            7 => Self::AccountingOn,
            8 => Self::AccountingOff,
            other => Self::Other(other),
        }
    }

    /// The Acct-Status-Type value.
    #[must_use]
    pub fn value(self) -> u32 {
        match self {
            Self::Start => 1,
            Self::Stop => 2,
            Self::InterimUpdate => 3,
            Self::AccountingOn => 7,
            Self::AccountingOff => 8,
            Self::Other(value) => value,
        }
    }
}

/// Addresses of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceAddresses {
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// Its IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
}

impl DeviceAddresses {
    /// Those known, IPv6 first.
    pub fn iter(self) -> impl Iterator<Item = IpAddr> {
        self.ipv6.map(IpAddr::V6).into_iter().chain(self.ipv4.map(IpAddr::V4))
    }

    /// These, and those of `other` where these are not known.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self { ipv6: self.ipv6.or(other.ipv6), ipv4: self.ipv4.or(other.ipv4) }
    }
}

/// The attributes of one Accounting-Request that Kage understands; where one is repeated the first counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accounting {
    /// Acct-Status-Type.
    pub status: Status,
    /// User-Name; may be an anonymous outer identity.
    pub user_name: Option<String>,
    /// Chargeable-User-Identity: opaque, but stable per user.
    pub chargeable_user_identity: Option<Vec<u8>>,
    /// Class: opaque, as the authentication server gave it.
    pub class: Option<Vec<u8>>,
    /// Calling-Station-Id: the device, usually its MAC address.
    pub calling_station_id: Option<String>,
    /// Called-Station-Id: usually the access point's MAC address and network name.
    pub called_station_id: Option<String>,
    /// NAS-Identifier: the access point's name.
    pub nas_identifier: Option<String>,
    /// NAS-IPv6-Address: the access point's address.
    pub nas_ipv6_address: Option<Ipv6Addr>,
    /// NAS-IP-Address: the access point's IPv4 address.
    pub nas_ip_address: Option<Ipv4Addr>,
    /// Acct-Session-Id.
    pub session_id: Option<String>,
    /// Acct-Multi-Session-Id.
    pub multi_session_id: Option<String>,
    /// Event-Timestamp, seconds since 1970.
    pub event_timestamp: Option<u32>,
    /// Acct-Delay-Time, seconds the access point has been trying to send this.
    pub delay_seconds: Option<u32>,
    /// Acct-Session-Time, seconds since the session began.
    pub session_seconds: Option<u32>,
    /// Octets from the device so far: Acct-Input-Octets and -Gigawords.
    pub input_octets: Option<u64>,
    /// Octets to the device so far: Acct-Output-Octets and -Gigawords.
    pub output_octets: Option<u64>,
    /// Framed-IPv6-Address: the device's address.
    pub framed_ipv6_address: Option<Ipv6Addr>,
    /// Framed-IP-Address: the device's IPv4 address.
    pub framed_ip_address: Option<Ipv4Addr>,
}

impl Accounting {
    /// A report of which only the status is known.
    #[must_use]
    pub fn new(status: Status) -> Self {
        Self {
            status,
            user_name: None,
            chargeable_user_identity: None,
            class: None,
            calling_station_id: None,
            called_station_id: None,
            nas_identifier: None,
            nas_ipv6_address: None,
            nas_ip_address: None,
            session_id: None,
            multi_session_id: None,
            event_timestamp: None,
            delay_seconds: None,
            session_seconds: None,
            input_octets: None,
            output_octets: None,
            framed_ipv6_address: None,
            framed_ip_address: None,
        }
    }

    /// The device's addresses, as far as they are told.
    #[must_use]
    pub fn device(&self) -> DeviceAddresses {
        DeviceAddresses { ipv6: self.framed_ipv6_address, ipv4: self.framed_ip_address }
    }

    /// Octets of the session so far, both ways, if they are told.
    #[must_use]
    pub fn octets(&self) -> Option<u64> {
        match (self.input_octets, self.output_octets) {
            (None, None) => None,
            (input, output) => Some(input.unwrap_or(0).saturating_add(output.unwrap_or(0))),
        }
    }

    /// Reads a report. Check [`Packet::is_request_of`] first.
    ///
    /// # Errors
    /// If it is another kind of packet, has no status, or a known attribute is malformed.
    pub fn from_packet(packet: &Packet<'_>) -> Result<Self, RadiusError> {
        if packet.code() != ACCOUNTING_REQUEST {
            return Err(RadiusError::Code(packet.code()));
        }
        let status = number(packet, attribute::ACCT_STATUS_TYPE)?.ok_or(RadiusError::NoStatus)?;
        let counter = |low, high| -> Result<_, RadiusError> {
            let (low, high) = (number(packet, low)?, number(packet, high)?);
            Ok(low.or(high).map(|_| u64::from(high.unwrap_or(0)) << 32 | u64::from(low.unwrap_or(0))))
        };
        Ok(Self {
            status: Status::from_value(status),
            user_name: text(packet, attribute::USER_NAME)?,
            chargeable_user_identity: opaque(packet, attribute::CHARGEABLE_USER_IDENTITY),
            class: opaque(packet, attribute::CLASS),
            calling_station_id: text(packet, attribute::CALLING_STATION_ID)?,
            called_station_id: text(packet, attribute::CALLED_STATION_ID)?,
            nas_identifier: text(packet, attribute::NAS_IDENTIFIER)?,
            nas_ipv6_address: ipv6(packet, attribute::NAS_IPV6_ADDRESS)?,
            nas_ip_address: number(packet, attribute::NAS_IP_ADDRESS)?.map(Ipv4Addr::from),
            session_id: text(packet, attribute::ACCT_SESSION_ID)?,
            multi_session_id: text(packet, attribute::ACCT_MULTI_SESSION_ID)?,
            event_timestamp: number(packet, attribute::EVENT_TIMESTAMP)?,
            delay_seconds: number(packet, attribute::ACCT_DELAY_TIME)?,
            session_seconds: number(packet, attribute::ACCT_SESSION_TIME)?,
            input_octets: counter(attribute::ACCT_INPUT_OCTETS, attribute::ACCT_INPUT_GIGAWORDS)?,
            output_octets: counter(attribute::ACCT_OUTPUT_OCTETS, attribute::ACCT_OUTPUT_GIGAWORDS)?,
            framed_ipv6_address: ipv6(packet, attribute::FRAMED_IPV6_ADDRESS)?,
            framed_ip_address: number(packet, attribute::FRAMED_IP_ADDRESS)?.map(Ipv4Addr::from),
        })
    }

    /// The Accounting-Request of this report. The packet is the same for the same arguments, so a
    /// retransmission is the same bytes again (RFC 2866 §4.1: new attributes need a new identifier).
    ///
    /// # Errors
    /// If a value or the whole is too long.
    pub fn encode(&self, identifier: u8, secret: &[u8]) -> Result<Vec<u8>, RadiusError> {
        let mut bytes = header(ACCOUNTING_REQUEST, identifier);
        for (kind, value) in self.values() {
            if value.len() > MAX_VALUE_BYTES || bytes.len() + 2 + value.len() > MAX_PACKET_BYTES {
                return Err(RadiusError::TooLong { kind });
            }
            bytes.extend([kind, value.len() as u8 + 2]);
            bytes.extend(value);
        }
        sign(&mut bytes, &[0; 16], secret);
        Ok(bytes)
    }

    /// The attributes that are known, in the order in which they are written.
    fn values(&self) -> impl Iterator<Item = (u8, Vec<u8>)> + use<> {
        let text = |text: &Option<String>| text.clone().map(String::into_bytes);
        let opaque = |bytes: &Option<Vec<u8>>| bytes.clone();
        let number = |number: Option<u32>| number.map(|number| number.to_be_bytes().to_vec());
        let ipv4 = |address: Option<Ipv4Addr>| number(address.map(u32::from));
        let ipv6 = |address: Option<Ipv6Addr>| address.map(|address| address.octets().to_vec());
        let low = |octets: Option<u64>| number(octets.map(|octets| octets as u32));
        // Gigawords are there only once the counter has wrapped (RFC 2869 §5.1).
        let high =
            |octets: Option<u64>| number(octets.map(|octets| (octets >> 32) as u32).filter(|high| *high > 0));
        [
            (attribute::ACCT_STATUS_TYPE, number(Some(self.status.value()))),
            (attribute::USER_NAME, text(&self.user_name)),
            (attribute::CHARGEABLE_USER_IDENTITY, opaque(&self.chargeable_user_identity)),
            (attribute::CLASS, opaque(&self.class)),
            (attribute::CALLING_STATION_ID, text(&self.calling_station_id)),
            (attribute::CALLED_STATION_ID, text(&self.called_station_id)),
            (attribute::NAS_IDENTIFIER, text(&self.nas_identifier)),
            (attribute::NAS_IPV6_ADDRESS, ipv6(self.nas_ipv6_address)),
            (attribute::NAS_IP_ADDRESS, ipv4(self.nas_ip_address)),
            (attribute::ACCT_SESSION_ID, text(&self.session_id)),
            (attribute::ACCT_MULTI_SESSION_ID, text(&self.multi_session_id)),
            (attribute::EVENT_TIMESTAMP, number(self.event_timestamp)),
            (attribute::ACCT_DELAY_TIME, number(self.delay_seconds)),
            (attribute::ACCT_SESSION_TIME, number(self.session_seconds)),
            (attribute::ACCT_INPUT_OCTETS, low(self.input_octets)),
            (attribute::ACCT_INPUT_GIGAWORDS, high(self.input_octets)),
            (attribute::ACCT_OUTPUT_OCTETS, low(self.output_octets)),
            (attribute::ACCT_OUTPUT_GIGAWORDS, high(self.output_octets)),
            (attribute::FRAMED_IPV6_ADDRESS, ipv6(self.framed_ipv6_address)),
            (attribute::FRAMED_IP_ADDRESS, ipv4(self.framed_ip_address)),
        ]
        .into_iter()
        .filter_map(|(kind, value)| Some((kind, value?)))
    }
}

fn opaque(packet: &Packet<'_>, kind: u8) -> Option<Vec<u8>> {
    packet.attribute(kind).map(<[u8]>::to_vec)
}

fn text(packet: &Packet<'_>, kind: u8) -> Result<Option<String>, RadiusError> {
    packet
        .attribute(kind)
        .map(|value| String::from_utf8(value.to_vec()).map_err(|_| RadiusError::AttributeValue { kind }))
        .transpose()
}

fn number(packet: &Packet<'_>, kind: u8) -> Result<Option<u32>, RadiusError> {
    packet
        .attribute(kind)
        .map(|value| {
            value.try_into().map(u32::from_be_bytes).map_err(|_| RadiusError::AttributeValue { kind })
        })
        .transpose()
}

fn ipv6(packet: &Packet<'_>, kind: u8) -> Result<Option<Ipv6Addr>, RadiusError> {
    packet
        .attribute(kind)
        .map(|value| {
            <[u8; 16]>::try_from(value).map(Ipv6Addr::from).map_err(|_| RadiusError::AttributeValue { kind })
        })
        .transpose()
}

fn header(code: u8, identifier: u8) -> Vec<u8> {
    let mut bytes = vec![0; MIN_PACKET_BYTES];
    bytes[0] = code;
    bytes[1] = identifier;
    bytes
}

/// Writes length and authenticator. `bytes` is at most [`MAX_PACKET_BYTES`] long.
fn sign(bytes: &mut [u8], authenticator: &[u8; 16], secret: &[u8]) {
    let length = (bytes.len() as u16).to_be_bytes();
    bytes[2..4].copy_from_slice(&length);
    let authenticator = digest(bytes, authenticator, secret);
    bytes[4..MIN_PACKET_BYTES].copy_from_slice(&authenticator);
}

/// A request of any attributes, signed: what somebody who has the secret can send.
#[cfg(test)]
pub(super) fn signed(mut bytes: Vec<u8>, secret: &[u8]) -> Vec<u8> {
    sign(&mut bytes, &[0; 16], secret);
    bytes
}

/// MD5 over code, identifier, length, `authenticator`, attributes and secret.
fn digest(bytes: &[u8], authenticator: &[u8; 16], secret: &[u8]) -> [u8; 16] {
    let mut hash = Md5::new();
    hash.update(&bytes[..4]);
    hash.update(authenticator);
    hash.update(&bytes[MIN_PACKET_BYTES..]);
    hash.update(secret);
    hash.finalize().into()
}

/// Compares in a time that does not depend on where the two differ.
fn same(left: &[u8; 16], right: &[u8; 16]) -> bool {
    left.iter().zip(right).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
}

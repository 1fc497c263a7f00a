//! Message numbers and reason codes of the SSH protocol (RFC 4250 §4).

/// Transport: the sender leaves.
pub const DISCONNECT: u8 = 1;
/// Transport: to be ignored.
pub const IGNORE: u8 = 2;
/// Transport: a message was not understood.
pub const UNIMPLEMENTED: u8 = 3;
/// Transport: text for a log.
pub const DEBUG: u8 = 4;
/// Transport: asks for a service.
pub const SERVICE_REQUEST: u8 = 5;
/// Transport: a service is granted.
pub const SERVICE_ACCEPT: u8 = 6;
/// Transport: extensions the sender knows (RFC 8308).
pub const EXT_INFO: u8 = 7;
/// Key exchange: algorithms offered.
pub const KEXINIT: u8 = 20;
/// Key exchange: what the sender sends next is under the new keys.
pub const NEWKEYS: u8 = 21;
/// Key exchange: the client's ephemeral key (RFC 5656 §7.1).
pub const KEX_ECDH_INIT: u8 = 30;
/// Key exchange: the host's key, ephemeral key and signature.
pub const KEX_ECDH_REPLY: u8 = 31;
/// Authentication: an attempt.
pub const USERAUTH_REQUEST: u8 = 50;
/// Authentication: an attempt failed.
pub const USERAUTH_FAILURE: u8 = 51;
/// Authentication: the user is in.
pub const USERAUTH_SUCCESS: u8 = 52;
/// Authentication: this key would be accepted.
pub const USERAUTH_PK_OK: u8 = 60;
/// Connection: a request outside any channel.
pub const GLOBAL_REQUEST: u8 = 80;
/// Connection: a global request succeeded.
pub const REQUEST_SUCCESS: u8 = 81;
/// Connection: a global request failed.
pub const REQUEST_FAILURE: u8 = 82;
/// Connection: opens a channel.
pub const CHANNEL_OPEN: u8 = 90;
/// Connection: a channel is open.
pub const CHANNEL_OPEN_CONFIRMATION: u8 = 91;
/// Connection: a channel is refused.
pub const CHANNEL_OPEN_FAILURE: u8 = 92;
/// Connection: more data may be sent on a channel.
pub const CHANNEL_WINDOW_ADJUST: u8 = 93;
/// Connection: data on a channel.
pub const CHANNEL_DATA: u8 = 94;
/// Connection: data of another stream on a channel.
pub const CHANNEL_EXTENDED_DATA: u8 = 95;
/// Connection: no more data from the sender.
pub const CHANNEL_EOF: u8 = 96;
/// Connection: the sender is done with a channel.
pub const CHANNEL_CLOSE: u8 = 97;
/// Connection: a request on a channel.
pub const CHANNEL_REQUEST: u8 = 98;
/// Connection: a channel's request succeeded.
pub const CHANNEL_SUCCESS: u8 = 99;
/// Connection: a channel's request failed.
pub const CHANNEL_FAILURE: u8 = 100;

/// The extended data type of stderr (RFC 4254 §5.2).
pub const EXTENDED_STDERR: u32 = 1;

/// Why a channel is refused (RFC 4254 §5.1).
pub mod open_failure {
    /// Not allowed here.
    pub const ADMINISTRATIVELY_PROHIBITED: u32 = 1;
    /// No such type of channel.
    pub const UNKNOWN_CHANNEL_TYPE: u32 = 3;
    /// Too many channels.
    pub const RESOURCE_SHORTAGE: u32 = 4;
}

/// Why one side ends the connection (RFC 4253 §11.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Reason {
    /// Something was sent that has no place in the protocol.
    ProtocolError = 2,
    /// No algorithms in common, or a bad key exchange.
    KeyExchangeFailed = 3,
    /// A record's tag was wrong.
    MacError = 5,
    /// A service that is not offered.
    ServiceNotAvailable = 7,
    /// The other side speaks no SSH 2.
    ProtocolVersionNotSupported = 8,
    /// The application ends it.
    ByApplication = 11,
    /// Too many attempts to authenticate.
    NoMoreAuthMethodsAvailable = 14,
}

//! What ends a connection: the peer's fault, as it is told to the peer and to the owner of the connection.

use alloc::string::String;

use crate::cipher::BadTag;
use crate::message::Reason;
use crate::wire::Truncated;

/// Why a connection was ended by this side. A `DISCONNECT` with [`Error::reason`] is in the output by then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The first line is no SSH 2 identification.
    #[error("the peer speaks no SSH 2")]
    NotSsh,
    /// A record's length is out of bounds.
    #[error("a record of {length} bytes; {limit} are allowed")]
    RecordLength {
        /// Its length field.
        length: u32,
        /// The most allowed.
        limit: u32,
    },
    /// A record's padding is longer than the record, or too short.
    #[error("a record's padding is out of bounds")]
    Padding,
    /// A record was damaged.
    #[error(transparent)]
    BadTag(#[from] BadTag),
    /// A key was about to be used for too many records.
    #[error("the peer did not renew the keys in time")]
    WornKeys,
    /// A message was malformed.
    #[error(transparent)]
    Truncated(#[from] Truncated),
    /// A message came where it has no place.
    #[error("message {number} has no place here: {context}")]
    Unexpected {
        /// Its number.
        number: u8,
        /// What was expected, or is going on.
        context: &'static str,
    },
    /// The peer offers no algorithm that is known here.
    #[error("no common {kind}; the peer offers {offered}")]
    NoCommonAlgorithm {
        /// What for.
        kind: &'static str,
        /// The peer's list, cut.
        offered: String,
    },
    /// The peer's ephemeral key gives a shared secret anyone knows.
    #[error("the peer's ephemeral key is invalid")]
    EphemeralKey,
    /// A service other than authentication or connection.
    #[error("no such service")]
    Service,
    /// Too many attempts to authenticate.
    #[error("too many authentication failures")]
    TooManyAttempts,
    /// More data than a channel's window allows, or a larger packet than its maximum.
    #[error("more data than channel {channel} allows")]
    WindowExceeded {
        /// The channel.
        channel: u32,
    },
    /// A window grew beyond 2³²−1.
    #[error("the window of channel {channel} overflows")]
    WindowOverflow {
        /// The channel.
        channel: u32,
    },
    /// A message for a channel that does not exist, or has been closed by the peer.
    #[error("there is no channel {channel}")]
    NoSuchChannel {
        /// The number used.
        channel: u32,
    },
    /// Too many requests while a key exchange holds the answers back.
    #[error("too many requests during a key exchange")]
    Flood,
    /// The connection had ended before.
    #[error("the connection is closed")]
    Closed,
}

impl Error {
    /// The reason code told to the peer.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NotSsh => Reason::ProtocolVersionNotSupported,
            Self::BadTag(_) => Reason::MacError,
            Self::NoCommonAlgorithm { .. } | Self::EphemeralKey | Self::WornKeys => Reason::KeyExchangeFailed,
            Self::Service => Reason::ServiceNotAvailable,
            Self::TooManyAttempts => Reason::NoMoreAuthMethodsAvailable,
            Self::RecordLength { .. }
            | Self::Padding
            | Self::Truncated(_)
            | Self::Unexpected { .. }
            | Self::WindowExceeded { .. }
            | Self::WindowOverflow { .. }
            | Self::NoSuchChannel { .. }
            | Self::Flood
            | Self::Closed => Reason::ProtocolError,
        }
    }
}

//! The first frame of either side: who speaks, what for, and in which protocol versions.
//!
//! ```text
//! 0  [u8; 4]  "KAGE"
//! 4  u16      lowest protocol version spoken
//! 6  u16      highest protocol version spoken
//! 8  postcard {host name, purpose}, laid out as the highest version both speak says
//! ```
//! The first eight bytes never change, so that builds without a common version can still say so.

pub use kage_machine::HandoverId;
use kage_machine::HostName;
use serde::{Deserialize, Serialize};

use crate::{Frame, Kind, bytes::Cursor, refusal::Refusal, refusal::RefusalCode};

/// Lowest protocol version this build speaks.
pub const MIN_VERSION: u16 = 4;
/// Highest protocol version this build speaks.
pub const MAX_VERSION: u16 = 4;

const MAGIC: [u8; 4] = *b"KAGE";

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Control of a handover; its first message says which.
    Switch,
    /// The page stream of a handover whose switch link is open.
    Bulk {
        /// As announced on the switch link.
        handover: HandoverId,
    },
    /// Requests to the directory this host serves.
    Directory,
    /// A mirror: its first message says of what.
    Mirror,
}

/// A hello of a version this build speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Lowest version the sender speaks.
    pub min_version: u16,
    /// Highest version the sender speaks.
    pub max_version: u16,
    /// The sender; its certificate must carry the name.
    pub host: HostName,
    /// What the link is for.
    pub purpose: Purpose,
}

/// Why a hello is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Something else speaks on that port.
    #[error("the peer does not speak kage")]
    Magic,
    /// No common version.
    #[error(
        "the peer speaks protocol versions {min} to {max}, this host {MIN_VERSION} to {MAX_VERSION}; upgrade the older one"
    )]
    Version {
        /// Lowest the peer speaks.
        min: u16,
        /// Highest the peer speaks.
        max: u16,
    },
    /// Cut short, too long, or not a hello.
    #[error("the peer's hello is damaged")]
    Damaged,
    /// A frame of another kind came first.
    #[error("the peer began with a {0:?} frame instead of a hello")]
    Kind(Kind),
}

impl From<&HelloError> for Refusal {
    fn from(error: &HelloError) -> Self {
        let code = match error {
            HelloError::Version { .. } => RefusalCode::Version,
            HelloError::Magic | HelloError::Damaged | HelloError::Kind(_) => RefusalCode::Protocol,
        };
        Self::new(code, error.to_string())
    }
}

#[derive(Serialize, Deserialize)]
struct BodyV1 {
    host: HostName,
    purpose: Purpose,
}

impl Hello {
    /// This build's hello.
    #[must_use]
    pub const fn new(host: HostName, purpose: Purpose) -> Self {
        Self { min_version: MIN_VERSION, max_version: MAX_VERSION, host, purpose }
    }

    /// The highest version both speak.
    #[must_use]
    pub fn version(&self) -> u16 {
        self.max_version.min(MAX_VERSION)
    }

    /// As a frame.
    #[must_use]
    pub fn to_frame(&self) -> Frame {
        let mut body = MAGIC.to_vec();
        body.extend_from_slice(&self.min_version.to_le_bytes());
        body.extend_from_slice(&self.max_version.to_le_bytes());
        let tail = BodyV1 { host: self.host.clone(), purpose: self.purpose };
        // Neither maps nor sequences of unknown length: writing into a growing vector cannot fail.
        Frame::new(Kind::Hello, postcard::to_extend(&tail, body).unwrap_or_default())
    }

    /// From the first frame of a link.
    ///
    /// # Errors
    /// [`HelloError`]; answer it with its [`Refusal`].
    pub fn from_frame(frame: &Frame) -> Result<Self, HelloError> {
        if frame.kind != Kind::Hello {
            return Err(HelloError::Kind(frame.kind));
        }
        let mut cursor = Cursor::new(&frame.body);
        if cursor.array().map_err(|_| HelloError::Damaged)? != MAGIC {
            return Err(HelloError::Magic);
        }
        let min_version = cursor.u16().map_err(|_| HelloError::Damaged)?;
        let max_version = cursor.u16().map_err(|_| HelloError::Damaged)?;
        if min_version > max_version {
            return Err(HelloError::Damaged);
        }
        if min_version > MAX_VERSION || max_version < MIN_VERSION {
            return Err(HelloError::Version { min: min_version, max: max_version });
        }
        let (tail, rest): (BodyV1, _) =
            postcard::take_from_bytes(cursor.rest()).map_err(|_| HelloError::Damaged)?;
        if !rest.is_empty() {
            return Err(HelloError::Damaged);
        }
        Ok(Self { min_version, max_version, host: tail.host, purpose: tail.purpose })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello(purpose: Purpose) -> Hello {
        Hello::new("h1".parse().unwrap(), purpose)
    }

    #[test]
    fn golden_bytes() {
        assert_eq!(hello(Purpose::Switch).to_frame().body, *b"KAGE\x04\0\x04\0\x02h1\0");
        let bulk = hello(Purpose::Bulk { handover: HandoverId([9; 16]) }).to_frame().body;
        assert_eq!(bulk[..12], *b"KAGE\x04\0\x04\0\x02h1\x01");
        assert_eq!(bulk[12..], [9; 16]);
        assert_eq!(hello(Purpose::Directory).to_frame().body, *b"KAGE\x04\0\x04\0\x02h1\x02");
        assert_eq!(hello(Purpose::Mirror).to_frame().body, *b"KAGE\x04\0\x04\0\x02h1\x03");
    }

    #[test]
    fn truncation_at_every_byte_is_refused() {
        let body = hello(Purpose::Bulk { handover: HandoverId([1; 16]) }).to_frame().body;
        for end in 0..body.len() {
            let frame = Frame::new(Kind::Hello, body[..end].to_vec());
            assert_eq!(Hello::from_frame(&frame), Err(HelloError::Damaged), "cut at {end}");
        }
    }

    #[test]
    fn unknown_versions_are_refused_whatever_follows_them() {
        let frame = Frame::new(Kind::Hello, b"KAGE\x07\0\x09\0\xff\xff".to_vec());
        let error = Hello::from_frame(&frame).unwrap_err();
        assert_eq!(error, HelloError::Version { min: 7, max: 9 });
        assert_eq!(Refusal::from(&error).code, RefusalCode::Version);
    }

    #[test]
    fn a_newer_peer_that_still_speaks_ours_is_met_in_ours() {
        let mut newer = hello(Purpose::Switch);
        newer.max_version = 9;
        let read = Hello::from_frame(&newer.to_frame()).unwrap();
        assert_eq!(read.version(), MAX_VERSION);
    }

    #[test]
    fn other_speakers_are_refused() {
        let frame = Frame::new(Kind::Hello, b"GET / HTTP/1.1".to_vec());
        assert_eq!(Hello::from_frame(&frame), Err(HelloError::Magic));
        let frame = Frame::new(Kind::Directory, Vec::new());
        assert_eq!(Hello::from_frame(&frame), Err(HelloError::Kind(Kind::Directory)));
    }

    #[test]
    fn a_name_no_host_may_have_is_refused() {
        let frame = Frame::new(Kind::Hello, b"KAGE\x04\0\x04\0\x02/x\0".to_vec());
        assert_eq!(Hello::from_frame(&frame), Err(HelloError::Damaged));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(tail in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut body = b"KAGE\x04\0\x04\0".to_vec();
            body.extend(&tail);
            let _ = Hello::from_frame(&Frame::new(Kind::Hello, body));
            let _ = Hello::from_frame(&Frame::new(Kind::Hello, tail));
        }
    }
}

//! A refusal as data, so that the other side and its user learn why.

use serde::{Deserialize, Serialize};

use crate::{Frame, FrameError, Kind};

/// Longest detail, in bytes.
pub const MAX_DETAIL: usize = 1024;

/// What kind of refusal it is; decides what the refused side may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalCode {
    /// No common protocol version: one of the hosts must be upgraded.
    Version,
    /// The certificate does not carry the name claimed.
    Name,
    /// The purpose is not served here, or not now.
    Purpose,
    /// What was sent is not what the protocol says.
    Protocol,
    /// The pages applied are not the pages announced.
    Mismatch,
    /// The directory's record does not name the peer for this.
    NotEntitled,
    /// No room, cordoned, or shutting down.
    Unavailable,
    /// Stopped on request.
    Cancelled,
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("peer refuses: {detail}")]
pub struct Refusal {
    /// What kind of refusal.
    pub code: RefusalCode,
    /// In words, for a person.
    pub detail: String,
}

impl Refusal {
    /// A refusal; a detail above [`MAX_DETAIL`] is cut.
    #[must_use]
    pub fn new(code: RefusalCode, detail: impl Into<String>) -> Self {
        let mut detail = detail.into();
        detail.truncate(detail.floor_char_boundary(MAX_DETAIL));
        Self { code, detail }
    }

    /// As a frame.
    #[must_use]
    pub fn to_frame(&self) -> Frame {
        // A plain enum and a string: writing them into a growing vector cannot fail.
        Frame::new(Kind::Refusal, postcard::to_allocvec(self).unwrap_or_default())
    }

    /// From a frame's body. An unreadable refusal is still one.
    #[must_use]
    pub fn from_body(body: &[u8]) -> Self {
        match postcard::from_bytes::<Self>(body) {
            Ok(refusal) => Self::new(refusal.code, refusal.detail),
            Err(_) => Self::new(RefusalCode::Protocol, "for a reason this host cannot read"),
        }
    }
}

impl From<FrameError> for Refusal {
    fn from(error: FrameError) -> Self {
        Self::new(RefusalCode::Protocol, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let refusal = Refusal::new(RefusalCode::Mismatch, "no");
        assert_eq!(refusal.to_frame().body, [4, 2, b'n', b'o']);
        assert_eq!(Refusal::from_body(&[4, 2, b'n', b'o']), refusal);
    }

    #[test]
    fn truncation_at_every_byte_is_still_a_refusal() {
        let body = Refusal::new(RefusalCode::Name, "some words").to_frame().body;
        for end in 0..body.len() {
            assert_eq!(Refusal::from_body(&body[..end]).code, RefusalCode::Protocol, "cut at {end}");
        }
    }

    proptest! {
        #[test]
        fn details_fit_a_frame(detail in "\\PC{0,1500}") {
            let refusal = Refusal::new(RefusalCode::Purpose, detail);
            let frame = refusal.to_frame();
            prop_assert!(frame.emit().is_ok());
            prop_assert_eq!(Refusal::from_body(&frame.body), refusal);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Refusal::from_body(&bytes);
        }
    }
}

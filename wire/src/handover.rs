//! Messages of one handover, on its switch link.
//!
//! ```text
//! source                                   target
//!   Prepare            ──────────────────▶  makes a shell, or takes the mirror it has
//!                      ◀──────────────────  Ready + what it holds already | Failed
//!   Probe              ──────────────────▶
//!                      ◀──────────────────  Probed            (any number, before the switch)
//!   Switch + last epoch ─────────────────▶  restores, runs with its gate shut
//!                      ◀──────────────────  Started | Failed
//!   Released           ──────────────────▶  opens its gate, claims the record
//!                      ◀──────────────────  Running
//!   Cancel             ──────────────────▶  drops everything  (only before Switch)
//!
//!   Inquire            ──────────────────▶                    (first message of a new link)
//!                      ◀──────────────────  Holds | HoldsNothing
//!
//! owner                                    follower             (on a link of its own: a mirror)
//!   Follow             ──────────────────▶  makes a shell, or takes the mirror it has
//!                      ◀──────────────────  Ready + what it holds already | Failed
//!   epochs             ──────────────────▶
//! ```
//! Body of a frame: u32 length of the message, the message in postcard, then what travels with it as
//! it is: the last epoch's pages behind [`Message::Switch`], a [`crate::Held`] behind [`Message::Ready`],
//! nothing behind the others. Strings, the saved state and the list are capped when read. What each message commits its sender to is `kage-migrate`'s.

use kage_machine::{BaseHash, Geometry, HandoverId, Term, UserName, state::MAX_STATE_BYTES};
use serde::{Deserialize, Serialize};

use crate::{Frame, Kind, bytes::Cursor, have::MAX_HELD};

/// Longest reason in words, in bytes.
pub const MAX_REASON: usize = 1024;

/// Longest message, without what travels behind it.
pub const MAX_MESSAGE: usize = MAX_STATE_BYTES + 1024;

/// Most bytes of a last epoch behind a switch message.
pub const MAX_LAST_EPOCH: usize = Kind::Handover.max_body() as usize - MAX_MESSAGE - 4;

/// Nanoseconds of a host's `CLOCK_MONOTONIC`.
pub type ClockNs = u64;

/// What the source asks the target to make ready for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// Whose image.
    pub user: UserName,
    /// The source's term.
    pub term: Term,
    /// Which attempt.
    pub handover: HandoverId,
    /// The machine's page space.
    pub geometry: Geometry,
    /// The base it runs on.
    pub base: BaseHash,
    /// Longest time the whole handover may take, in milliseconds: the target gives up after it.
    pub timeout_ms: u32,
    /// Digest of the mirror that the target has of it as far as the source knows, if any.
    pub expects: Option<u128>,
}

/// What an owner asks of a host that is to keep a mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Follow {
    /// Whose image.
    pub user: UserName,
    /// The owner's term.
    pub term: Term,
    /// The machine's page space.
    pub geometry: Geometry,
    /// The base it runs on.
    pub base: BaseHash,
    /// Digest of the mirror that is there already as far as the owner knows, if any.
    pub expects: Option<u128>,
}

/// The state of the paused machine, complete with the last epoch that travels behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// The pause, on the *target's* clock as well as the source can tell.
    pub paused_at_ns: ClockNs,
    /// [`kage_machine::SavedState::encode`].
    pub state: Vec<u8>,
    /// BLAKE3 of all pages in order, where that was asked for.
    pub memory_hash: Option<[u8; 32]>,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Source: make a shell for this machine.
    Prepare(Prepare),
    /// Source: what is your clock?
    Probe {
        /// The source's clock, to be sent back.
        sent_ns: ClockNs,
    },
    /// Source: run this with your gate shut.
    Switch(Switch),
    /// Source: irrevocably, the right is yours.
    Released,
    /// Source: nothing was or will be offered.
    Cancel,
    /// Source's daemon, on a new link: what do you hold of this?
    Inquire {
        /// Whose image.
        user: UserName,
        /// The source's term.
        term: Term,
        /// Which attempt.
        handover: HandoverId,
        /// And, irrevocably, the right is yours.
        released: bool,
    },
    /// Target or follower: shell, tap and layout are there; pages may come. Behind it travels what is held already.
    Ready {
        /// What is held is what was expected: nothing travels behind it.
        as_expected: bool,
    },
    /// Target: the answer to a probe.
    Probed {
        /// The probe's.
        sent_ns: ClockNs,
        /// The target's clock in between.
        clock_ns: ClockNs,
    },
    /// Target: holds nothing of it and never will.
    Failed {
        /// Why, for a person.
        reason: String,
    },
    /// Target: runs with its gate shut.
    Started {
        /// Its first entry, on its own clock.
        at_ns: ClockNs,
        /// When the switch message was here, on the same clock.
        received_ns: ClockNs,
        /// When its pages were applied.
        applied_ns: ClockNs,
        /// When its state was restored.
        restored_ns: ClockNs,
    },
    /// Target: owns it in the directory.
    Running {
        /// Under this term.
        term: Term,
    },
    /// Target's daemon: holds a copy, or a claim.
    Holds,
    /// Target's daemon: holds nothing, and refuses everything of this term from now on.
    HoldsNothing,
    /// Owner: keep a mirror of this; the epochs follow on this link.
    Follow(Follow),
}

/// Why a body is no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// A frame of another kind.
    #[error("a {0:?} frame came where a handover message belongs")]
    Kind(Kind),
    /// Ends too early.
    #[error("handover message is cut short")]
    Short,
    /// Above its limits.
    #[error("handover message of {bytes} bytes is above the limit of {MAX_MESSAGE}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Not a message.
    #[error("handover message is damaged: {0}")]
    Damaged(&'static str),
}

impl Message {
    /// As a frame, with nothing behind it.
    #[must_use]
    pub fn to_frame(&self) -> Frame {
        self.to_frame_with(&[])
    }

    /// As a frame, with what travels behind it.
    #[must_use]
    pub fn to_frame_with(&self, behind: &[u8]) -> Frame {
        // Plain enums, strings and byte vectors: writing them into a growing vector cannot fail.
        let mut body = Vec::with_capacity(behind.len() + 8192);
        body.extend_from_slice(&[0; 4]);
        let mut body = postcard::to_extend(&self.capped(), body).unwrap_or_default();
        if let Some((length, message)) = body.split_first_chunk_mut::<4>() {
            *length = (message.len() as u32).to_le_bytes();
        }
        body.extend_from_slice(behind);
        Frame::new(Kind::Handover, body)
    }

    fn capped(&self) -> std::borrow::Cow<'_, Self> {
        use std::borrow::Cow;
        match self {
            Self::Failed { reason } if reason.len() > MAX_REASON => {
                let mut reason = reason.clone();
                reason.truncate(reason.floor_char_boundary(MAX_REASON));
                Cow::Owned(Self::Failed { reason })
            }
            other => Cow::Borrowed(other),
        }
    }

    /// From a frame; returns the message and what travels behind it.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn from_frame(frame: &Frame) -> Result<(Self, &[u8]), MessageError> {
        if frame.kind != Kind::Handover {
            return Err(MessageError::Kind(frame.kind));
        }
        let mut cursor = Cursor::new(&frame.body);
        let length = cursor.u32().map_err(|_| MessageError::Short)? as usize;
        if length > MAX_MESSAGE {
            return Err(MessageError::TooLong { bytes: length });
        }
        let message = cursor.take(length).map_err(|_| MessageError::Short)?;
        let behind = cursor.rest();
        let (message, left): (Self, _) =
            postcard::take_from_bytes(message).map_err(|_| MessageError::Damaged("not a message"))?;
        if !left.is_empty() {
            return Err(MessageError::Damaged("bytes follow it"));
        }
        match &message {
            Self::Failed { reason } if reason.len() > MAX_REASON => {
                Err(MessageError::Damaged("its reason is too long"))
            }
            Self::Switch(switch) if switch.state.len() > MAX_STATE_BYTES => {
                Err(MessageError::Damaged("its state is too long"))
            }
            Self::Ready { as_expected: true } if !behind.is_empty() => {
                Err(MessageError::Damaged("bytes travel behind it"))
            }
            Self::Ready { .. } if behind.len() > MAX_HELD => {
                Err(MessageError::Damaged("what is held is too long"))
            }
            Self::Switch(_) | Self::Ready { .. } => Ok((message, behind)),
            _ if !behind.is_empty() => Err(MessageError::Damaged("bytes travel behind it")),
            _ => Ok((message, behind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn samples() -> Vec<Message> {
        let user: UserName = "alice".parse().unwrap();
        let (term, handover) = (Term(5), HandoverId([7; 16]));
        vec![
            Message::Prepare(Prepare {
                user: user.clone(),
                term,
                handover,
                geometry: Geometry { memory_pages: 4096, disk_pages: 0 },
                base: BaseHash([8; 32]),
                timeout_ms: 30_000,
                expects: None,
            }),
            Message::Probe { sent_ns: 300 },
            Message::Switch(Switch { paused_at_ns: 9, state: vec![1, 2, 3], memory_hash: None }),
            Message::Released,
            Message::Cancel,
            Message::Inquire { user: user.clone(), term, handover, released: true },
            Message::Ready { as_expected: false },
            Message::Follow(Follow {
                user: user.clone(),
                term,
                geometry: Geometry { memory_pages: 4096, disk_pages: 7 },
                base: BaseHash([8; 32]),
                expects: Some(u128::MAX),
            }),
            Message::Probed { sent_ns: 300, clock_ns: 301 },
            Message::Failed { reason: "no".into() },
            Message::Started { at_ns: 4, received_ns: 1, applied_ns: 2, restored_ns: 3 },
            Message::Running { term },
            Message::Holds,
            Message::HoldsNothing,
        ]
    }

    #[test]
    fn every_message_comes_back() {
        for message in samples() {
            let carries = matches!(message, Message::Switch(_) | Message::Ready { as_expected: false });
            let behind: &[u8] = if carries { &[9, 9] } else { &[] };
            let frame = message.to_frame_with(behind);
            assert_eq!(Message::from_frame(&frame), Ok((message, behind)));
        }
    }

    #[test]
    fn messages_keep_their_bytes() {
        let bodies: Vec<_> = samples().iter().map(|message| message.to_frame().body).collect();
        assert_eq!(bodies[0][..12], [63, 0, 0, 0, 0, 5, b'a', b'l', b'i', b'c', b'e', 5]);
        assert_eq!(bodies[0][28..31], [0x80, 0x20, 0]);
        assert_eq!(bodies[0][31..63], [8; 32]);
        assert_eq!(bodies[0][63..], [0xb0, 0xea, 1, 0]);
        assert_eq!(bodies[1], [3, 0, 0, 0, 1, 0xac, 2]);
        assert_eq!(bodies[2], [7, 0, 0, 0, 2, 9, 3, 1, 2, 3, 0]);
        for (index, tag) in [(3, 3), (4, 4), (12, 11), (13, 12)] {
            assert_eq!(bodies[index], [1, 0, 0, 0, tag]);
        }
        assert_eq!(bodies[6], [2, 0, 0, 0, 6, 0]);
        assert_eq!(bodies[7][4], 13);
        assert_eq!(bodies[7][bodies[7].len() - 20..][..2], [1, 0xff]);
        assert_eq!(bodies[9], [4, 0, 0, 0, 8, 2, b'n', b'o']);
        assert_eq!(bodies[10], [5, 0, 0, 0, 9, 4, 1, 2, 3]);
    }

    #[test]
    fn truncation_at_every_byte_is_refused() {
        for message in samples() {
            let frame = message.to_frame();
            for end in 0..frame.body.len() {
                let cut = Frame::new(Kind::Handover, frame.body[..end].to_vec());
                assert!(Message::from_frame(&cut).is_err(), "{message:?} cut at {end}");
            }
        }
    }

    #[test]
    fn what_is_above_its_limit_is_refused() {
        let mut long = Message::Ready { as_expected: false }.to_frame().body;
        long[..4].copy_from_slice(&(MAX_MESSAGE as u32 + 1).to_le_bytes());
        assert!(matches!(
            Message::from_frame(&Frame::new(Kind::Handover, long)),
            Err(MessageError::TooLong { .. })
        ));
        let behind = Message::Released.to_frame_with(&[1]);
        assert_eq!(Message::from_frame(&behind), Err(MessageError::Damaged("bytes travel behind it")));
        let most = Message::Ready { as_expected: false }.to_frame_with(&vec![1; MAX_HELD]);
        assert!(Message::from_frame(&most).is_ok() && most.emit().is_ok());
        let more = Message::Ready { as_expected: false }.to_frame_with(&vec![1; MAX_HELD + 1]);
        assert_eq!(Message::from_frame(&more), Err(MessageError::Damaged("what is held is too long")));
        let wordy = Message::Failed { reason: "é".repeat(MAX_REASON) }.to_frame();
        let Ok((Message::Failed { reason }, _)) = Message::from_frame(&wordy) else { panic!() };
        assert!(reason.len() <= MAX_REASON);
        let other = Frame::new(Kind::Pages, vec![]);
        assert_eq!(Message::from_frame(&other), Err(MessageError::Kind(Kind::Pages)));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Message::from_frame(&Frame::new(Kind::Handover, body));
        }
    }
}

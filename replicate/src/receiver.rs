//! The follower's end of a page stream.
//!
//! Pages are applied as they arrive; the end of an epoch is acknowledged only once the digest of
//! everything held is the one the owner announced. Whatever arrives, nothing outside the machine's
//! geometry is touched and nothing panics; after an error the replica is of no further use.

use std::{sync::Arc, time::Instant};

use kage_machine::{Epoch, Memory, PageIndex};
use kage_wire::{
    BatchError, EpochMark, Frame, Have, Held, Kind, Refusal, RefusalCode, delta,
    pages::{Batch, split_last_epoch},
};

use crate::{
    codec::{Content, DecodeError, Decoder},
    courtesy,
    digest::DigestTable,
    link::{Link, LinkError},
    store::{ElsewhereError, Mirror},
};

/// Why a page stream ended.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The link; [`LinkError::Closed`] is the owner's regular end.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A batch that is none.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A page the machine does not have.
    #[error("{index:?} lies outside a machine of {pages} pages")]
    Index {
        /// The page.
        index: PageIndex,
        /// Pages of the machine.
        pages: u32,
    },
    /// A block that is missing at the owner and cannot be so here.
    #[error(transparent)]
    Elsewhere(#[from] ElsewhereError),
    /// Epochs never go back.
    #[error("epoch {} after epoch {}", found.0, current.0)]
    Epoch {
        /// The epoch of what arrived.
        found: Epoch,
        /// The latest one before.
        current: Epoch,
    },
    /// What was applied is not what was announced.
    #[error("applied {held:?} where {announced:?} was announced")]
    Mismatch {
        /// What the owner says must be held.
        announced: EpochMark,
        /// What is held.
        held: EpochMark,
    },
}

impl From<BatchError> for ReceiveError {
    fn from(error: BatchError) -> Self {
        Self::Decode(error.into())
    }
}

impl ReceiveError {
    /// What to tell the owner, where it may still listen.
    #[must_use]
    pub fn as_refusal(&self) -> Option<Refusal> {
        match self {
            Self::Link(error) => error.as_refusal(),
            Self::Mismatch { .. } => Some(Refusal::new(RefusalCode::Mismatch, self.to_string())),
            Self::Elsewhere(ElsewhereError::Refused(_)) => {
                Some(Refusal::new(RefusalCode::Unavailable, self.to_string()))
            }
            Self::Decode(_)
            | Self::Index { .. }
            | Self::Epoch { .. }
            | Self::Elsewhere(ElsewhereError::NoBlock(_)) => {
                Some(Refusal::new(RefusalCode::Protocol, self.to_string()))
            }
        }
    }
}

/// Applies one owner's page stream to a mirror.
#[derive(Debug)]
pub struct Receiver {
    mirror: Mirror,
    decoder: Decoder,
    epoch: Epoch,
    /// Records since the last mark.
    records: u32,
}

impl Receiver {
    /// A replica in `memory`, as [`Mirror::new`] makes it: empty but for what is held of the disk.
    #[must_use]
    pub fn new(memory: Arc<dyn Memory>) -> Self {
        Self::over(Mirror::new(memory))
    }

    /// What is held.
    #[must_use]
    pub const fn mirror(&self) -> &Mirror {
        &self.mirror
    }

    /// Goes on from a mirror that was filled otherwise.
    #[must_use]
    pub fn over(mirror: Mirror) -> Self {
        Self { mirror, decoder: Decoder::new(), epoch: Epoch(0), records: 0 }
    }

    /// What is held, page by page; the machine's pages are its own from now on.
    #[must_use]
    pub fn into_digests(self) -> DigestTable {
        self.mirror.into_digests()
    }

    /// What of the disk the owner need not send; for [`crate::Sender::knowing`].
    #[must_use]
    pub fn have(&self) -> Have {
        self.mirror.have()
    }

    /// What the owner need not send; for [`crate::Sender::holding`].
    #[must_use]
    pub fn held(&self) -> Held {
        self.mirror.held()
    }

    /// Makes ready for another stream, which goes on from what is held: whatever the last one ended in.
    pub fn begin_anew(&mut self) {
        self.mirror.begin_anew();
        (self.decoder, self.epoch, self.records) = (Decoder::new(), Epoch(0), 0);
    }

    /// Receives until the next end of an epoch and acknowledges it. On an error of the owner's
    /// making the owner is told.
    ///
    /// # Errors
    /// [`ReceiveError`]; after [`LinkError::Timeout`] it can be called again.
    pub fn receive_epoch(
        &mut self,
        link: &mut dyn Link,
        deadline: Option<Instant>,
    ) -> Result<EpochMark, ReceiveError> {
        let outcome = self.receive(link, deadline);
        if let Err(error) = &outcome
            && let Some(refusal) = error.as_refusal()
        {
            // The link may be gone already; the error says more than a second one would.
            let _ = link.send(&refusal.to_frame());
        }
        outcome
    }

    fn receive(&mut self, link: &mut dyn Link, deadline: Option<Instant>) -> Result<EpochMark, ReceiveError> {
        loop {
            let frame = link.recv(deadline)?;
            if let Some(mark) = self.apply(&frame)? {
                link.send(&Frame::new(Kind::EpochAck, mark.emit().to_vec()))?;
                return Ok(mark);
            }
        }
    }

    /// Applies one frame of the stream; returns what to acknowledge at the end of an epoch.
    ///
    /// # Errors
    /// [`ReceiveError`].
    pub fn apply(&mut self, frame: &Frame) -> Result<Option<EpochMark>, ReceiveError> {
        match frame.kind {
            Kind::Pages => self.apply_batch(&frame.body).map(|()| None),
            Kind::EpochEnd => {
                let mark = EpochMark::parse(&frame.body)?;
                self.settle(mark).map(Some)
            }
            Kind::Hello | Kind::Refusal | Kind::Handover | Kind::Directory | Kind::EpochAck => {
                Err(LinkError::Unexpected(frame.kind).into())
            }
        }
    }

    /// Applies the last epoch as [`crate::Sender::encode_last`] made it. The replica is whole when
    /// this succeeds.
    ///
    /// # Errors
    /// [`ReceiveError`].
    pub fn apply_last(&mut self, bytes: &[u8]) -> Result<EpochMark, ReceiveError> {
        let (mark, batches) = split_last_epoch(bytes)?;
        for batch in batches {
            self.apply_batch(batch)?;
        }
        self.settle(mark)
    }

    fn apply_batch(&mut self, bytes: &[u8]) -> Result<(), ReceiveError> {
        let batch = Batch::parse(bytes)?;
        self.advance(batch.epoch)?;
        let Self { mirror, decoder, records, .. } = self;
        decoder.decode(&batch, |index, content| {
            *records = records.saturating_add(1);
            if records.is_multiple_of(courtesy::PAGES as u32) {
                courtesy::let_others_run();
            }
            let inside = match content {
                Content::Zero => mirror.zero(batch.epoch, index),
                Content::Bytes(bytes) => mirror.write(batch.epoch, index, bytes),
                Content::Elsewhere(digest) => {
                    mirror.elsewhere(batch.epoch, index, digest)?;
                    true
                }
                Content::Delta(delta) => {
                    let mut bytes = mirror.read(index);
                    delta::apply(&mut bytes, delta).map_err(|_| DecodeError::Page { index })?;
                    mirror.write(batch.epoch, index, &bytes)
                }
            };
            if inside { Ok(()) } else { Err(ReceiveError::Index { index, pages: mirror.geometry().pages() }) }
        })
    }

    fn advance(&mut self, epoch: Epoch) -> Result<(), ReceiveError> {
        if epoch < self.epoch {
            return Err(ReceiveError::Epoch { found: epoch, current: self.epoch });
        }
        self.epoch = epoch;
        Ok(())
    }

    /// Compares what is held with what was announced.
    fn settle(&mut self, announced: EpochMark) -> Result<EpochMark, ReceiveError> {
        self.advance(announced.epoch)?;
        let records = std::mem::take(&mut self.records);
        let held = EpochMark { epoch: announced.epoch, records, digest: self.mirror.digest() };
        if held == announced { Ok(held) } else { Err(ReceiveError::Mismatch { announced, held }) }
    }
}

//! Passing the writer's role on: both descriptors and a few kilobytes, without reading the log.

use twox_hash::XxHash3_64;

use crate::{
    Backing, Index, OpenError, Store, Tuning,
    checkpoint::{LogPoint, PiecePoint},
    codec::{Fields, Put},
    index::{Entry, Word},
    layout::Superblock,
    segments::Segments,
    store::Stats,
};

const MAGIC: u64 = u64::from_le_bytes(*b"kagedst1");

/// What the next writer must know beyond log and index.
///
/// 24 bytes for each block written since the last commit, 4 for each free segment, 12 for each written
/// since the last checkpoint, and 300.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    life: u64,
    log: LogPoint,
    durable: u64,
    settling: u64,
    settled: u64,
    unsynced: u64,
    uncovered: u64,
    piece: PiecePoint,
    durable_piece: PiecePoint,
    uncommitted: bool,
    free: Vec<u32>,
    used: Vec<(u32, u64)>,
    pending: Vec<(u32, Entry)>,
}

/// A state that cannot be resumed from; opening the log anew can.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The bytes are no state, or were harmed on the way.
    #[error("these bytes are no state of a disk's writer")]
    Harmed,
    /// The state is another store's.
    #[error("the state belongs to another store")]
    OtherStore,
    /// State, index and log contradict each other.
    #[error("the state does not fit the index: {what}")]
    Contradiction {
        /// What does not fit.
        what: String,
    },
}

impl State {
    /// The state as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.put_u64(MAGIC);
        for field in [self.life, self.durable, self.settling, self.settled, self.unsynced, self.uncovered] {
            bytes.put_u64(field);
        }
        bytes.put_u64(u64::from(self.uncommitted));
        let LogPoint { segment, offset, sequence, chain, commit } = self.log;
        bytes.put_u32(segment);
        bytes.put_u32(offset);
        for field in [sequence, chain, commit] {
            bytes.put_u64(field);
        }
        for point in [&self.piece, &self.durable_piece] {
            let PiecePoint { generation, number, index, end, whole, checksum, sequence } = *point;
            bytes.put_u32(index);
            for field in [generation, number, end, whole, checksum, sequence] {
                bytes.put_u64(field);
            }
        }
        for length in [self.free.len(), self.used.len(), self.pending.len()] {
            bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        }
        self.free.iter().for_each(|segment| bytes.put_u32(*segment));
        for (segment, sequence) in &self.used {
            bytes.put_u32(*segment);
            bytes.put_u64(*sequence);
        }
        for (block, entry) in &self.pending {
            bytes.put_u32(*block);
            bytes.put_u64(entry.word.0);
            bytes.put_u64(entry.digest);
        }
        bytes.put_u64(XxHash3_64::oneshot(&bytes));
        bytes
    }

    /// Reads a state back.
    ///
    /// # Errors
    /// The bytes are none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let harmed = StateError::Harmed;
        let (body, checksum) = bytes.split_last_chunk().ok_or(harmed.clone())?;
        if u64::from_le_bytes(*checksum) != XxHash3_64::oneshot(body) {
            return Err(harmed);
        }
        Self::decode(&mut Fields::new(body)).ok_or(harmed)
    }

    fn decode(fields: &mut Fields<'_>) -> Option<Self> {
        if fields.u64()? != MAGIC {
            return None;
        }
        let (life, durable, settling, settled) = (fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?);
        let (unsynced, uncovered) = (fields.u64()?, fields.u64()?);
        let uncommitted = fields.u64()? != 0;
        let log = LogPoint {
            segment: fields.u32()?,
            offset: fields.u32()?,
            sequence: fields.u64()?,
            chain: fields.u64()?,
            commit: fields.u64()?,
        };
        let mut point = || {
            Some(PiecePoint {
                index: fields.u32()?,
                generation: fields.u64()?,
                number: fields.u64()?,
                end: fields.u64()?,
                whole: fields.u64()?,
                checksum: fields.u64()?,
                sequence: fields.u64()?,
            })
        };
        let (piece, durable_piece) = (point()?, point()?);
        let [free, used, pending] =
            [fields.u32()?, fields.u32()?, fields.u32()?].map(|length| length as usize);
        let free = fields.list(free, 4, Fields::u32)?;
        let used = fields.list(used, 12, |fields| Some((fields.u32()?, fields.u64()?)))?;
        let pending = fields.list(pending, 20, |fields| {
            Some((fields.u32()?, Entry { word: Word(fields.u64()?), digest: fields.u64()? }))
        })?;
        fields.is_empty().then_some(Self {
            life,
            log,
            durable,
            settling,
            settled,
            unsynced,
            uncovered,
            piece,
            durable_piece,
            uncommitted,
            free,
            used,
            pending,
        })
    }
}

impl<B: Backing> Store<B> {
    /// Gives the role of the writer away, at once: nothing is synced or written.
    #[must_use]
    pub fn into_parts(self) -> (B, Index, State) {
        let state = State {
            life: self.life,
            log: self.log,
            durable: self.durable,
            settling: self.settling,
            settled: self.settled,
            unsynced: self.unsynced,
            uncovered: self.uncovered,
            piece: self.piece,
            durable_piece: self.durable_piece,
            uncommitted: self.uncommitted,
            free: self.segments.free_list(),
            used: self.segments.uncovered(self.durable_piece.sequence),
            pending: self.pending.iter().map(|(block, entry)| (block, *entry)).collect(),
        };
        (self.backing, self.index, state)
    }

    /// Becomes the writer where [`Store::into_parts`] left off; reads the index and two sectors of the log.
    ///
    /// # Errors
    /// State, index and log do not belong together, or the backing fails.
    pub fn resume(
        backing: B,
        index: Index,
        identity: [u8; 16],
        state: &State,
        tuning: Tuning,
    ) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { doing: "reading the log", source };
        let superblock = Superblock::read(&backing).map_err(io)?.ok_or(crate::RecoveryError::NotAStore)?;
        if superblock.identity != identity {
            return Err(OpenError::OtherIdentity);
        }
        if superblock.life != state.life {
            return Err(StateError::OtherStore.into());
        }
        let contradiction = |what: String| OpenError::from(StateError::Contradiction { what });
        let geometry = superblock.geometry;
        if state.log.segment >= geometry.segments || state.log.offset > geometry.segment_bytes {
            return Err(contradiction(format!("the log ends at {:?}", state.log)));
        }
        let slots = geometry.slot_bytes();
        if [state.piece, state.durable_piece].iter().any(|piece| piece.end > slots || piece.whole > piece.end)
        {
            return Err(contradiction("a checkpoint lies outside its slot".into()));
        }
        let written = backing.length().map_err(io)?;
        let segments = Segments::new(geometry, written);
        let mut store = Self::assemble(backing, index, superblock, tuning, state.log, segments)?;
        (store.durable, store.unsynced, store.uncovered) = (state.durable, state.unsynced, state.uncovered);
        (store.settling, store.settled) = (state.settling, state.settled);
        (store.piece, store.durable_piece) = (state.piece, state.durable_piece);
        store.uncommitted = state.uncommitted;
        for (block, entry) in &state.pending {
            if !store.pending.mark(*block, *entry) {
                return Err(contradiction(format!("block {block} is named twice, or outside the disk")));
            }
        }
        store.occupy_all_but(&state.free);
        store
            .count_segments(&state.used)
            .map_err(|at| contradiction(format!("a block lies at byte {at}, outside the log")))?;
        if store.segments.free_list().len() != state.free.len() {
            return Err(contradiction("a free segment holds blocks".into()));
        }
        store.stats = Stats::default();
        store.tell();
        Ok(store)
    }

    fn occupy_all_but(&mut self, free: &[u32]) {
        let mut is_free = vec![false; self.geometry.segments as usize];
        for segment in free {
            if let Some(known) = is_free.get_mut(*segment as usize) {
                *known = true;
            }
        }
        for (segment, free) in (0..).zip(is_free) {
            if !free {
                self.segments.occupy(segment, false, 0);
            }
        }
    }
}

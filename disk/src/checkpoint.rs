//! Checkpoints of the index, so that opening reads a bounded part of the log.
//!
//! Two slots lie before the log. A slot holds a whole index (piece 0) and behind it pieces that say what
//! changed since the piece before; when those outgrow the whole, a new whole goes to the other slot.
//! A piece says up to which record it holds, and is written only once all of those are synced, so
//! opening takes the newest whole piece and replays the log behind it. A piece that is not whole is as
//! if it had not been written: nothing it would have allowed to be reused has been.
//!
//! Each piece has two layers: the state of the last commit, and what was written since.
//!
//! ```text
//! sector: magic u64 · life u64 · generation u64 · number u64 · index u32 · segment u32 · offset u32 · 0 u32
//!         · sequence u64 · chain u64 · commit u64 · counts 4 × u32 · body bytes u64
//!         · previous u64 · body digest u64 · checksum u64
//! body:   committed blocks (block u32 · word u64 · digest u64), committed ranges (first u32 · count u32
//!         · word u32), then both of the uncommitted layer
//! ```

use std::io::{self, IoSlice};

use twox_hash::XxHash3_64;

use crate::{
    Backing, Geometry, SECTOR_BYTES,
    codec::{Fields, Put},
    index::{Entry, Word},
    record::BlockRange,
};

const MAGIC: u64 = u64::from_le_bytes(*b"kageckp1");
const HEADER_FIELDS_BYTES: usize = 112;
const DATA_BYTES: usize = 20;
const RANGE_BYTES: usize = 12;

/// Where the log stands behind some record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct LogPoint {
    /// Segment and byte in it where the next record goes.
    pub(crate) segment: u32,
    pub(crate) offset: u32,
    /// Sequence and checksum of the last record.
    pub(crate) sequence: u64,
    pub(crate) chain: u64,
    /// Number of the last commit.
    pub(crate) commit: u64,
}

/// Where the checkpoint stands behind some piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PiecePoint {
    pub(crate) generation: u64,
    /// Counts pieces over the life of the store.
    pub(crate) number: u64,
    /// Place in its slot; 0 is a whole index.
    pub(crate) index: u32,
    /// Byte of its slot where the next piece goes.
    pub(crate) end: u64,
    /// Bytes of the whole index that the slot begins with.
    pub(crate) whole: u64,
    pub(crate) checksum: u64,
    /// Last record that the piece covers.
    pub(crate) sequence: u64,
}

impl PiecePoint {
    pub(crate) fn slot(&self) -> usize {
        usize::from(!self.generation.is_multiple_of(2))
    }
}

/// Blocks of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Layer {
    pub(crate) data: Vec<(u32, Entry)>,
    pub(crate) ranges: Vec<BlockRange>,
}

impl Layer {
    pub(crate) fn push(&mut self, block: u32, entry: Entry) {
        if entry.word.position().is_some() {
            self.data.push((block, entry));
            return;
        }
        match self.ranges.last_mut() {
            Some(last) if last.word == entry.word && last.first.checked_add(last.count) == Some(block) => {
                last.count += 1;
            }
            _ => self.ranges.push(BlockRange { first: block, count: 1, word: entry.word }),
        }
    }

    fn encode(&self, into: &mut Vec<u8>) {
        for (block, entry) in &self.data {
            into.put_u32(*block);
            into.put_u64(entry.word.0);
            into.put_u64(entry.digest);
        }
        for range in &self.ranges {
            into.put_u32(range.first);
            into.put_u32(range.count);
            into.put_u32(u32::try_from(range.word.0).unwrap_or(0));
        }
    }

    fn decode(fields: &mut Fields<'_>, data: u32, ranges: u32) -> Option<Self> {
        let data = fields.list(usize::try_from(data).ok()?, DATA_BYTES, |fields| {
            let block = fields.u32()?;
            Some((block, Entry { word: Word(fields.u64()?), digest: fields.u64()? }))
        })?;
        let ranges = fields.list(usize::try_from(ranges).ok()?, RANGE_BYTES, |fields| {
            let (first, count) = (fields.u32()?, fields.u32()?);
            Some(BlockRange { first, count, word: Word(u64::from(fields.u32()?)) })
        })?;
        Some(Self { data, ranges })
    }

    /// Calls `each` with every block of the layer that the disk has.
    pub(crate) fn for_each(&self, blocks: u64, mut each: impl FnMut(u32, Entry)) {
        for (block, entry) in &self.data {
            if u64::from(*block) < blocks {
                each(*block, *entry);
            }
        }
        for range in &self.ranges {
            let end = u64::from(range.first).saturating_add(u64::from(range.count)).min(blocks);
            for block in range.first..u32::try_from(end).unwrap_or(u32::MAX) {
                each(block, Entry { word: range.word, digest: 0 });
            }
        }
    }
}

/// What one piece says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) log: LogPoint,
    pub(crate) committed: Layer,
    pub(crate) uncommitted: Layer,
}

impl Piece {
    fn encode(&self, life: u64, at: &PiecePoint, previous: u64) -> (Vec<u8>, u64) {
        let mut body = Vec::new();
        self.committed.encode(&mut body);
        self.uncommitted.encode(&mut body);
        let count = |list: usize| u32::try_from(list).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(SECTOR_BYTES);
        for field in [MAGIC, life, at.generation, at.number] {
            bytes.put_u64(field);
        }
        for field in [at.index, self.log.segment, self.log.offset, 0] {
            bytes.put_u32(field);
        }
        for field in [self.log.sequence, self.log.chain, self.log.commit] {
            bytes.put_u64(field);
        }
        for layer in [&self.committed, &self.uncommitted] {
            bytes.put_u32(count(layer.data.len()));
            bytes.put_u32(count(layer.ranges.len()));
        }
        for field in [body.len() as u64, previous, XxHash3_64::oneshot(&body)] {
            bytes.put_u64(field);
        }
        let checksum = XxHash3_64::oneshot(&bytes);
        bytes.put_u64(checksum);
        bytes.resize(SECTOR_BYTES, 0);
        bytes.append(&mut body);
        bytes.resize(bytes.len().next_multiple_of(SECTOR_BYTES), 0);
        (bytes, checksum)
    }
}

/// Writes `piece` behind `previous`, or as a new whole where `previous` says to; does not sync.
///
/// Returns `None` where the slot has no room for it and a whole index must be written.
pub(crate) fn append(
    backing: &impl Backing,
    geometry: &Geometry,
    life: u64,
    previous: &PiecePoint,
    piece: &Piece,
) -> io::Result<Option<PiecePoint>> {
    let mut point = PiecePoint {
        index: previous.index + 1,
        number: previous.number + 1,
        sequence: piece.log.sequence,
        ..*previous
    };
    let (bytes, checksum) = piece.encode(life, &point, previous.checksum);
    let length = bytes.len() as u64;
    if previous.end - previous.whole + length > previous.whole.max(MIN_CHANGES)
        || previous.end + length > geometry.slot_bytes()
    {
        return Ok(None);
    }
    backing.write_at(geometry.slot_at(point.slot()) + previous.end, &[IoSlice::new(&bytes)])?;
    point.end += length;
    point.checksum = checksum;
    Ok(Some(point))
}

/// Changes may always take this many bytes before a whole index is written anew.
const MIN_CHANGES: u64 = 16 << 10;

/// Writes a whole index to the slot that `previous` does not use; does not sync.
pub(crate) fn begin(
    backing: &impl Backing,
    geometry: &Geometry,
    life: u64,
    previous: &PiecePoint,
    piece: &Piece,
) -> io::Result<PiecePoint> {
    let mut point = PiecePoint {
        generation: previous.generation + 1,
        number: previous.number + 1,
        index: 0,
        end: 0,
        whole: 0,
        checksum: 0,
        sequence: piece.log.sequence,
    };
    let (bytes, checksum) = piece.encode(life, &point, 0);
    let length = bytes.len() as u64;
    if length > geometry.slot_bytes() {
        return Err(io::Error::other(format!("an index of {length} bytes outgrows its slot")));
    }
    backing.write_at(geometry.slot_at(point.slot()), &[IoSlice::new(&bytes)])?;
    (point.end, point.whole, point.checksum) = (length, length, checksum);
    Ok(point)
}

/// Reads the piece that lies at byte `at` of a slot, if a whole one does.
fn read_piece(
    backing: &impl Backing,
    geometry: &Geometry,
    life: u64,
    slot: usize,
    at: u64,
) -> io::Result<Option<(PiecePoint, u64, Piece)>> {
    let room = geometry.slot_bytes().saturating_sub(at);
    if room < SECTOR_BYTES as u64 {
        return Ok(None);
    }
    let mut header = [0; SECTOR_BYTES];
    backing.read_at(geometry.slot_at(slot) + at, &mut header)?;
    let Some((mut point, previous, log, counts, length, digest)) = decode_header(&header, life) else {
        return Ok(None);
    };
    let body_room = room - SECTOR_BYTES as u64;
    let Some(length) = usize::try_from(length).ok().filter(|length| *length as u64 <= body_room) else {
        return Ok(None);
    };
    let mut body = vec![0; length];
    backing.read_at(geometry.slot_at(slot) + at + SECTOR_BYTES as u64, &mut body)?;
    if XxHash3_64::oneshot(&body) != digest || point.slot() != slot {
        return Ok(None);
    }
    point.end = at + (SECTOR_BYTES + length).next_multiple_of(SECTOR_BYTES) as u64;
    let mut fields = Fields::new(&body);
    let [data, ranges, uncommitted_data, uncommitted_ranges] = counts;
    let layers = Layer::decode(&mut fields, data, ranges).zip(Layer::decode(
        &mut fields,
        uncommitted_data,
        uncommitted_ranges,
    ));
    Ok(layers
        .filter(|_| fields.is_empty())
        .map(|(committed, uncommitted)| (point, previous, Piece { log, committed, uncommitted })))
}

type Header = (PiecePoint, u64, LogPoint, [u32; 4], u64, u64);

fn decode_header(bytes: &[u8], life: u64) -> Option<Header> {
    let mut fields = Fields::new(bytes);
    if fields.u64()? != MAGIC || fields.u64()? != life {
        return None;
    }
    let (generation, number, index) = (fields.u64()?, fields.u64()?, fields.u32()?);
    let (segment, offset, _) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let log =
        LogPoint { segment, offset, sequence: fields.u64()?, chain: fields.u64()?, commit: fields.u64()? };
    let counts = [fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?];
    let (length, previous, digest, checksum) = (fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?);
    let whole = XxHash3_64::oneshot(bytes.get(..HEADER_FIELDS_BYTES)?) == checksum;
    let point = PiecePoint { generation, number, index, end: 0, whole: 0, checksum, sequence: log.sequence };
    whole.then_some((point, previous, log, counts, length, digest))
}

/// Reads the newest checkpoint: its pieces, oldest first, and where it ends.
///
/// # Errors
/// Those of the medium.
pub(crate) fn load(
    backing: &impl Backing,
    geometry: &Geometry,
    life: u64,
) -> io::Result<Option<(PiecePoint, Vec<Piece>)>> {
    let first = read_piece(backing, geometry, life, 0, 0)?;
    let second = read_piece(backing, geometry, life, 1, 0)?;
    let newest = [first, second]
        .into_iter()
        .flatten()
        .filter(|(point, ..)| point.index == 0)
        .max_by_key(|(point, ..)| point.generation);
    let Some((mut point, _, piece)) = newest else { return Ok(None) };
    point.whole = point.end;
    let mut pieces = vec![piece];
    while let Some((next, previous, piece)) = read_piece(backing, geometry, life, point.slot(), point.end)? {
        let follows = next.generation == point.generation
            && next.number == point.number + 1
            && next.index == point.index + 1
            && previous == point.checksum;
        if !follows {
            break;
        }
        point = PiecePoint { whole: point.whole, ..next };
        pieces.push(piece);
    }
    Ok(Some((point, pieces)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SimulatedDisk;

    fn piece(sequence: u64, blocks: u32) -> Piece {
        let mut committed = Layer::default();
        for block in 0..blocks {
            let word = if block % 3 == 0 { Word::at(1 << 30, 5) } else { Word::MISSING };
            committed.push(block, Entry { word, digest: 5 });
        }
        let log = LogPoint { segment: 1, offset: 512, sequence, chain: 8, commit: 9 };
        Piece { log, uncommitted: committed.clone(), committed }
    }

    #[test]
    fn the_newest_whole_pieces_load_and_a_torn_one_is_as_if_never_written() {
        let geometry = Geometry { blocks: 400, segment_bytes: 64 << 10, segments: 8 };
        let disk = SimulatedDisk::new();
        assert_eq!(load(&disk, &geometry, 7).unwrap(), None);
        let first = begin(&disk, &geometry, 7, &PiecePoint::default(), &piece(1, 400)).unwrap();
        let second = append(&disk, &geometry, 7, &first, &piece(2, 9)).unwrap().unwrap();
        let loaded = load(&disk, &geometry, 7).unwrap().unwrap();
        assert_eq!(loaded, (second, vec![piece(1, 400), piece(2, 9)]));
        assert_eq!(load(&disk, &geometry, 8).unwrap(), None, "another store's");

        let third = begin(&disk, &geometry, 7, &second, &piece(3, 400)).unwrap();
        assert_ne!(third.slot(), second.slot());
        assert_eq!(load(&disk, &geometry, 7).unwrap().unwrap(), (third, vec![piece(3, 400)]));
        disk.corrupt(geometry.slot_at(third.slot()) + 600, 1);
        assert_eq!(load(&disk, &geometry, 7).unwrap().unwrap().0, second);
        disk.corrupt(geometry.slot_at(second.slot()) + first.end + 10, 1);
        assert_eq!(load(&disk, &geometry, 7).unwrap().unwrap().0, first);
    }

    #[test]
    fn changes_end_where_a_whole_index_is_due() {
        let geometry = Geometry { blocks: 400, segment_bytes: 64 << 10, segments: 8 };
        let disk = SimulatedDisk::new();
        let mut point = begin(&disk, &geometry, 7, &PiecePoint::default(), &piece(1, 400)).unwrap();
        let mut count = 0;
        while let Some(next) = append(&disk, &geometry, 7, &point, &piece(2, 9)).unwrap() {
            point = next;
            count += 1;
        }
        assert!(point.end <= point.whole + MIN_CHANGES && count > 10, "{count} {point:?}");
    }
}

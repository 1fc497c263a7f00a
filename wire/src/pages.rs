//! Batches of pages, and the mark that ends an epoch.
//!
//! ```text
//! batch                                   record
//! 0   u64  epoch                          0  u32  page index
//! 8   u16  records                        4  u8   encoding   [`Encoding`]
//! 10  u8   compression  0 none, 1 zstd    5  u8   reserved   0
//! 11  u8   reserved     0                 6  u16  length     bytes of data
//! 12  u32  bytes of all records           8  data
//! 16  records, compressed as one if said
//! ```
//! Integers are little-endian. Compression of a whole batch finds what pages have in common and
//! costs one call; a record's own encoding allows each page its best. On a thin link records are
//! raw or deltas inside a compressed batch.
//!
//! The last epoch of a handover travels inside the switch message: an [`EpochMark`], then any
//! number of batches, each with its length as u32 before it ([`split_last_epoch`]).

use kage_machine::{Epoch, PAGE_SIZE, PageIndex};

use crate::bytes::{Cursor, Short};

/// Bytes before a batch's records.
pub const BATCH_HEADER: usize = 16;
/// Bytes before a record's data.
pub const RECORD_HEADER: usize = 8;
/// Most bytes of records in a batch, uncompressed. 64 pages: large enough that a frame's fixed cost
/// (about 10 µs) is below 5 % of its copying, small enough that a cancelled or paced stream stops
/// within one.
pub const MAX_RECORDS_BYTES: usize = 64 * (PAGE_SIZE + RECORD_HEADER);
/// Most records in a batch: zero pages have no data, so bytes alone would not bound the work.
pub const MAX_RECORDS: usize = 4096;

/// How a page is written in its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// All zeros; no data.
    Zero = 0,
    /// The page itself.
    Raw = 1,
    /// One LZ4 block that unpacks to exactly a page.
    Lz4 = 2,
    /// What differs from the page the receiver holds ([`crate::delta`]).
    Delta = 3,
    /// A block of the disk that its sender misses too: the digest of its bytes, u64.
    Elsewhere = 4,
}

impl Encoding {
    fn from_code(code: u8) -> Option<Self> {
        [Self::Zero, Self::Raw, Self::Lz4, Self::Delta, Self::Elsewhere].get(usize::from(code)).copied()
    }

    /// Whether data of that length can be a page in this encoding.
    const fn allows(self, length: usize) -> bool {
        match self {
            Self::Zero => length == 0,
            Self::Raw => length == PAGE_SIZE,
            Self::Lz4 | Self::Delta => length > 0 && length < PAGE_SIZE,
            Self::Elsewhere => length == size_of::<u64>(),
        }
    }
}

/// How a batch's records are compressed as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Compression {
    /// Not at all.
    None = 0,
    /// One zstd frame.
    Zstd = 1,
}

/// Why bytes are no batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Ends within a header or a record.
    #[error("page batch is cut short")]
    Short,
    /// More bytes than its records.
    #[error("page batch has {0} bytes after its last record")]
    Trailing(usize),
    /// Above the limits of a batch.
    #[error("page batch of {records} records and {bytes} bytes is above the limits")]
    TooLarge {
        /// Records declared.
        records: usize,
        /// Bytes declared.
        bytes: usize,
    },
    /// Reserved bytes are not zero, or a code is unknown.
    #[error("page batch with unknown code {code} for its {what}")]
    Code {
        /// What the code is for.
        what: &'static str,
        /// The code found.
        code: u8,
    },
    /// Data no page can have in that encoding.
    #[error("{encoding:?} record of {length} bytes for {index:?}")]
    Length {
        /// The record's page.
        index: PageIndex,
        /// The record's encoding.
        encoding: Encoding,
        /// Bytes of data.
        length: usize,
    },
}

impl From<Short> for BatchError {
    fn from(_: Short) -> Self {
        Self::Short
    }
}

/// Collects records and then emits one batch.
#[derive(Debug)]
pub struct BatchWriter {
    epoch: Epoch,
    records: usize,
    bytes: Vec<u8>,
}

impl BatchWriter {
    /// An empty batch.
    #[must_use]
    pub fn new(epoch: Epoch) -> Self {
        let mut writer = Self { epoch, records: 0, bytes: Vec::new() };
        writer.restart(Vec::new());
        writer
    }

    fn restart(&mut self, mut buffer: Vec<u8>) {
        self.records = 0;
        buffer.clear();
        buffer.resize(BATCH_HEADER, 0);
        self.bytes = buffer;
    }

    /// Gives a buffer back that [`Self::finish`] returned: fresh memory costs a page fault per page.
    /// Does nothing once the next batch has records.
    pub fn reuse(&mut self, buffer: Vec<u8>) {
        if self.records == 0 && buffer.capacity() > self.bytes.capacity() {
            self.restart(buffer);
        }
    }

    /// Records so far.
    #[must_use]
    pub const fn records(&self) -> usize {
        self.records
    }

    /// Bytes of records so far.
    #[must_use]
    pub fn record_bytes(&self) -> &[u8] {
        &self.bytes[BATCH_HEADER..]
    }

    /// Whether a raw page still fits.
    #[must_use]
    pub const fn has_room(&self) -> bool {
        self.records < MAX_RECORDS
            && self.bytes.len() + RECORD_HEADER + PAGE_SIZE <= BATCH_HEADER + MAX_RECORDS_BYTES
    }

    /// Adds a record; the caller has asked [`Self::has_room`] and chosen an encoding that allows
    /// that length.
    pub fn push(&mut self, index: PageIndex, encoding: Encoding, data: &[u8]) {
        debug_assert!(encoding.allows(data.len()) && self.has_room());
        self.records += 1;
        self.bytes.extend_from_slice(&index.0.to_le_bytes());
        self.bytes.extend_from_slice(&[encoding as u8, 0]);
        self.bytes.extend_from_slice(&(data.len() as u16).to_le_bytes());
        self.bytes.extend_from_slice(data);
    }

    /// Emits the batch and starts the next one. With `compressed`, that is what
    /// [`Self::record_bytes`] were compressed to.
    #[must_use]
    pub fn finish(&mut self, compressed: Option<&[u8]>) -> Vec<u8> {
        let (records, length) = (self.records, self.bytes.len() - BATCH_HEADER);
        let mut header = [0; BATCH_HEADER];
        header[..8].copy_from_slice(&self.epoch.0.to_le_bytes());
        header[8..10].copy_from_slice(&(records as u16).to_le_bytes());
        header[10] = if compressed.is_some() { Compression::Zstd as u8 } else { Compression::None as u8 };
        header[12..].copy_from_slice(&(length as u32).to_le_bytes());
        match compressed {
            Some(data) => {
                let mut batch = Vec::with_capacity(BATCH_HEADER + data.len());
                batch.extend_from_slice(&header);
                batch.extend_from_slice(data);
                self.bytes.truncate(BATCH_HEADER);
                self.records = 0;
                batch
            }
            None => {
                self.bytes[..BATCH_HEADER].copy_from_slice(&header);
                let batch = std::mem::take(&mut self.bytes);
                self.restart(Vec::new());
                batch
            }
        }
    }
}

/// A batch whose header was checked; its records may still be compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch<'a> {
    /// The epoch its pages belong to.
    pub epoch: Epoch,
    /// How many records it has.
    pub records: usize,
    /// How [`Self::data`] is compressed.
    pub compression: Compression,
    /// Bytes of records once decompressed; at most [`MAX_RECORDS_BYTES`].
    pub length: usize,
    /// Records, compressed or not.
    pub data: &'a [u8],
}

impl<'a> Batch<'a> {
    /// Checks a batch's header.
    ///
    /// # Errors
    /// [`BatchError`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BatchError> {
        let mut cursor = Cursor::new(bytes);
        let epoch = Epoch(cursor.u64()?);
        let records = usize::from(cursor.u16()?);
        let compression = match cursor.u8()? {
            0 => Compression::None,
            1 => Compression::Zstd,
            code => return Err(BatchError::Code { what: "compression", code }),
        };
        let reserved = cursor.u8()?;
        if reserved != 0 {
            return Err(BatchError::Code { what: "reserved byte", code: reserved });
        }
        let length = cursor.u32()? as usize;
        if records > MAX_RECORDS || length > MAX_RECORDS_BYTES {
            return Err(BatchError::TooLarge { records, bytes: length });
        }
        Ok(Self { epoch, records, compression, length, data: cursor.rest() })
    }
}

/// One page as received. Its index is not checked against a geometry here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// The page.
    pub index: PageIndex,
    /// How it is written.
    pub encoding: Encoding,
    /// The page so written.
    pub data: &'a [u8],
}

/// Reads the records of a batch; ends after the first error.
#[derive(Debug)]
pub struct BatchReader<'a> {
    cursor: Cursor<'a>,
    left: usize,
}

impl std::fmt::Debug for Cursor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes left", self.rest().len())
    }
}

impl<'a> BatchReader<'a> {
    /// Over `records` records in `data`, which is not compressed (any more).
    #[must_use]
    pub const fn new(records: usize, data: &'a [u8]) -> Self {
        Self { cursor: Cursor::new(data), left: records }
    }

    fn record(&mut self) -> Result<Record<'a>, BatchError> {
        let index = PageIndex(self.cursor.u32()?);
        let code = self.cursor.u8()?;
        let encoding = Encoding::from_code(code).ok_or(BatchError::Code { what: "encoding", code })?;
        let reserved = self.cursor.u8()?;
        if reserved != 0 {
            return Err(BatchError::Code { what: "reserved byte", code: reserved });
        }
        let length = usize::from(self.cursor.u16()?);
        if !encoding.allows(length) {
            return Err(BatchError::Length { index, encoding, length });
        }
        Ok(Record { index, encoding, data: self.cursor.take(length)? })
    }
}

impl<'a> Iterator for BatchReader<'a> {
    type Item = Result<Record<'a>, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            let trailing = self.cursor.rest().len();
            self.cursor = Cursor::new(&[]);
            return (trailing > 0).then_some(Err(BatchError::Trailing(trailing)));
        }
        self.left -= 1;
        let record = self.record();
        if record.is_err() {
            (self.left, self.cursor) = (0, Cursor::new(&[]));
        }
        Some(record)
    }
}

/// What a receiver holds after an epoch: announced by the sender, confirmed by the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochMark {
    /// The epoch that ends.
    pub epoch: Epoch,
    /// Records of this epoch.
    pub records: u32,
    /// Digest of every page held, not only of this epoch's.
    pub digest: u128,
}

impl EpochMark {
    /// Bytes of a mark: epoch u64, records u32, digest u128.
    pub const BYTES: usize = 28;

    /// As bytes.
    #[must_use]
    pub fn emit(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.records.to_le_bytes());
        bytes[12..].copy_from_slice(&self.digest.to_le_bytes());
        bytes
    }

    /// From exactly [`Self::BYTES`] bytes.
    ///
    /// # Errors
    /// [`BatchError::Short`] or [`BatchError::Trailing`].
    pub fn parse(bytes: &[u8]) -> Result<Self, BatchError> {
        let mut cursor = Cursor::new(bytes);
        let mark = Self::read(&mut cursor)?;
        match cursor.rest().len() {
            0 => Ok(mark),
            trailing => Err(BatchError::Trailing(trailing)),
        }
    }

    fn read(cursor: &mut Cursor<'_>) -> Result<Self, BatchError> {
        Ok(Self { epoch: Epoch(cursor.u64()?), records: cursor.u32()?, digest: cursor.u128()? })
    }
}

/// Appends a batch to a last epoch that began with an [`EpochMark`].
pub fn append_to_last_epoch(buffer: &mut Vec<u8>, batch: &[u8]) {
    buffer.extend_from_slice(&(batch.len() as u32).to_le_bytes());
    buffer.extend_from_slice(batch);
}

/// Splits a last epoch into its mark and its batches' bytes.
///
/// # Errors
/// [`BatchError`].
pub fn split_last_epoch(bytes: &[u8]) -> Result<(EpochMark, Vec<&[u8]>), BatchError> {
    let mut cursor = Cursor::new(bytes);
    let mark = EpochMark::read(&mut cursor)?;
    let mut batches = Vec::new();
    while !cursor.rest().is_empty() {
        let length = cursor.u32()? as usize;
        batches.push(cursor.take(length)?);
    }
    Ok((mark, batches))
}

#[cfg(test)]
mod tests;

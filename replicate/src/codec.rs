//! How pages are written into batches, and which way pays at a link's speed.
//!
//! A page of which the receiver holds a known version goes as what differs, where that is less than
//! half. For all others there are three schemes: pages as they are; each page by LZ4; a batch of pages by zstd at level 1. The
//! choice is [`choose`]: the scheme that needs the least time per byte of memory when encoding and
//! sending follow each other. [`Chooser`] measures what the schemes cost and gain on this content.
//!
//! Measured (Xeon with AVX-512, release build, CPU time; MiB/s of memory and ratio; `examples/throughput.rs`
//! prints the table again):
//!
//! | content | LZ4 encode, ratio | zstd encode, ratio | decode LZ4, zstd |
//! | --- | --- | --- | --- |
//! | text | 340, 0.49 | 215, 0.18 | 1,100, 640 |
//! | random 32-bit words | 235, 0.81 | 170, 0.54 | 1,400, 530 |
//! | both | 270, 0.65 | 180, 0.40 | 1,200, 530 |
//! | noise | 1,500, 1.00 | 1,500, 1.00 | – |
//!
//! So below some 1 Gbit/s zstd pays, above it nothing does; LZ4 has a niche between the two where
//! content suits it. A digest of a page costs 0.6 µs, finding it zero 0.1 µs.

use kage_machine::{PAGE_SIZE, PageBytes, PageIndex};
use kage_wire::{
    BatchError, BatchReader, BatchWriter, Encoding, delta,
    pages::{Batch, Compression, MAX_RECORDS_BYTES},
};
use zstd::zstd_safe::{
    CCtx, CParameter, InBuffer, OutBuffer, ResetDirective, zstd_sys::ZSTD_EndDirective as EndDirective,
};

use crate::{
    courtesy,
    pace::{Meter, Rate},
};

/// How non-zero pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// As they are.
    Raw,
    /// Each by LZ4.
    Lz4,
    /// The whole batch by zstd, level 1.
    Zstd,
}

/// What a scheme costs and gains.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Bytes of memory encoded per second.
    pub encode: Rate,
    /// Bytes on the wire per byte of memory.
    pub ratio: f64,
}

impl Cost {
    /// Seconds per byte of memory at a link's rate. Encoding and sending hardly overlap: the kernel
    /// is allowed less unsent data than a batch has.
    fn seconds(self, link: Rate) -> f64 {
        1.0 / self.encode.as_bytes_per_s() + self.ratio / link.as_bytes_per_s()
    }
}

/// The scheme that moves memory fastest over a link. Equal ones: the simpler.
#[must_use]
pub fn choose(link: Rate, lz4: Cost, zstd: Cost) -> Scheme {
    let raw = 1.0 / link.as_bytes_per_s();
    let (lz4, zstd) = (lz4.seconds(link), zstd.seconds(link));
    if raw <= lz4 && raw <= zstd {
        Scheme::Raw
    } else if lz4 <= zstd {
        Scheme::Lz4
    } else {
        Scheme::Zstd
    }
}

/// What is assumed before anything was measured: the table's row of both.
const LZ4_PRIOR: Cost = Cost { encode: Rate::bytes_per_s(280e6), ratio: 0.65 };
const ZSTD_PRIOR: Cost = Cost { encode: Rate::bytes_per_s(190e6), ratio: 0.4 };

/// Measurements fade over so many bytes: content changes from one part of memory to the next.
const COST_WINDOW: u64 = 8 << 20;

/// Every so many batches a compressing scheme is tried that was not chosen, since only trying
/// tells what it would gain on this content. At 32 that costs 5 % where it is a bad one.
const TRY_EVERY: u32 = 32;

/// Measures the schemes and chooses one per batch.
#[derive(Clone, Debug)]
pub struct Chooser {
    lz4: Measured,
    zstd: Measured,
    batches: u32,
}

#[derive(Clone, Debug)]
struct Measured {
    prior: Cost,
    speed: Meter,
    /// Wire bytes over memory bytes.
    gain: Option<f64>,
}

impl Measured {
    fn new(prior: Cost) -> Self {
        Self { prior, speed: Meter::new(COST_WINDOW), gain: None }
    }

    fn cost(&self) -> Cost {
        Cost {
            encode: self.speed.rate().unwrap_or(self.prior.encode),
            ratio: self.gain.unwrap_or(self.prior.ratio),
        }
    }

    fn record(&mut self, raw: u64, wire: u64, took: std::time::Duration) {
        self.speed.record(raw, took);
        let ratio = wire as f64 / raw as f64;
        let fade = (-(raw as f64) / COST_WINDOW as f64).exp();
        self.gain = Some(self.gain.map_or(ratio, |old| old * fade + ratio * (1.0 - fade)));
    }
}

impl Default for Chooser {
    fn default() -> Self {
        Self { lz4: Measured::new(LZ4_PRIOR), zstd: Measured::new(ZSTD_PRIOR), batches: 0 }
    }
}

impl Chooser {
    /// The scheme for the next batch.
    pub fn next(&mut self, link: Rate) -> Scheme {
        self.batches = self.batches.wrapping_add(1);
        let best = self.best(link);
        if !self.batches.is_multiple_of(TRY_EVERY) {
            return best;
        }
        match best {
            Scheme::Lz4 => Scheme::Zstd,
            Scheme::Zstd => Scheme::Lz4,
            Scheme::Raw if (self.batches / TRY_EVERY).is_multiple_of(2) => Scheme::Lz4,
            Scheme::Raw => Scheme::Zstd,
        }
    }

    /// The scheme that is best as far as is known.
    #[must_use]
    pub fn best(&self, link: Rate) -> Scheme {
        choose(link, self.lz4.cost(), self.zstd.cost())
    }

    /// Counts a batch: bytes of non-zero pages, bytes on the wire, and the time encoding took.
    pub fn record(&mut self, scheme: Scheme, raw: u64, wire: u64, took: std::time::Duration) {
        if raw == 0 {
            return;
        }
        match scheme {
            Scheme::Raw => {}
            Scheme::Lz4 => self.lz4.record(raw, wire, took),
            Scheme::Zstd => self.zstd.record(raw, wire, took),
        }
    }

    /// Bytes on the wire per byte of non-zero memory at a link's rate.
    #[must_use]
    pub fn ratio(&self, link: Rate) -> f64 {
        match self.best(link) {
            Scheme::Raw => 1.0,
            Scheme::Lz4 => self.lz4.cost().ratio,
            Scheme::Zstd => self.zstd.cost().ratio,
        }
    }
}

/// Longest delta: a page changed in more than half is better compressed, which a delta in a batch
/// without compression is not.
const DELTA_LIMIT: usize = PAGE_SIZE / 2;

/// Writes pages into batches.
pub struct Encoder {
    delta: Vec<u8>,
    lz4: Box<[u8]>,
    // None where its memory could not be had: batches then go as they are.
    zstd: Option<CCtx<'static>>,
    packed: Vec<u8>,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Encoder")
    }
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Encoder {
    /// An encoder with its buffers.
    #[must_use]
    pub fn new() -> Self {
        Self {
            delta: Vec::new(),
            lz4: vec![0; lz4_flex::block::get_maximum_output_size(PAGE_SIZE)].into_boxed_slice(),
            zstd: compressor(),
            packed: Vec::new(),
        }
    }

    /// Adds a page that is not zero; `base` is the version the receiver holds, if known. Returns the
    /// bytes a scheme has to work on: less than a page for a delta.
    pub fn push(
        &mut self,
        writer: &mut BatchWriter,
        scheme: Scheme,
        index: PageIndex,
        bytes: &PageBytes,
        base: Option<&PageBytes>,
    ) -> usize {
        if let Some(base) = base
            && delta::encode(base, bytes, DELTA_LIMIT, &mut self.delta)
        {
            writer.push(index, Encoding::Delta, &self.delta);
            return self.delta.len();
        }
        if scheme == Scheme::Lz4
            && let Ok(length) = lz4_flex::block::compress_into(bytes, &mut self.lz4)
            && length < PAGE_SIZE
        {
            writer.push(index, Encoding::Lz4, &self.lz4[..length]);
        } else {
            writer.push(index, Encoding::Raw, bytes);
        }
        PAGE_SIZE
    }

    /// Ends the batch.
    pub fn finish(&mut self, writer: &mut BatchWriter, scheme: Scheme) -> Vec<u8> {
        let length = writer.record_bytes().len();
        if scheme == Scheme::Zstd
            && let Some(zstd) = &mut self.zstd
        {
            self.packed.resize(zstd::zstd_safe::compress_bound(length), 0);
            if let Some(packed) = pack(zstd, writer.record_bytes(), &mut self.packed)
                && packed < length
            {
                return writer.finish(Some(&self.packed[..packed]));
            }
        }
        writer.finish(None)
    }
}

fn compressor() -> Option<CCtx<'static>> {
    let mut zstd = CCtx::try_create()?;
    zstd.set_parameter(CParameter::CompressionLevel(1)).ok()?;
    Some(zstd)
}

/// Compresses records into a buffer, with pauses in which others may run. Returns the bytes written; none where that
/// fails.
fn pack(zstd: &mut CCtx<'static>, records: &[u8], into: &mut [u8]) -> Option<usize> {
    zstd.reset(ResetDirective::SessionOnly).ok()?;
    zstd.set_pledged_src_size(Some(records.len() as u64)).ok()?;
    let mut output = OutBuffer::around(into);
    let mut pieces = records.chunks(courtesy::BYTES).peekable();
    while let Some(piece) = pieces.next() {
        let mut input = InBuffer::around(piece);
        let is_last = pieces.peek().is_none();
        let then = if is_last { EndDirective::ZSTD_e_end } else { EndDirective::ZSTD_e_continue };
        loop {
            let before = (input.pos(), output.pos());
            let left = zstd.compress_stream2(&mut output, &mut input, then).ok()?;
            if input.pos() == piece.len() && (left == 0 || !is_last) {
                break;
            }
            if (input.pos(), output.pos()) == before {
                return None;
            }
        }
        courtesy::let_others_run();
    }
    Some(output.pos())
}

/// Why a batch cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// It is no batch.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A page does not unpack to a page.
    #[error("{index:?} does not unpack to a page")]
    Page {
        /// The page.
        index: PageIndex,
    },
    /// The records do not unpack to their declared length.
    #[error("page batch does not unpack to the {length} bytes it declares")]
    Records {
        /// Bytes declared.
        length: usize,
    },
    /// No memory to unpack in.
    #[error("no memory to unpack page batches")]
    Memory,
}

/// A page as received.
#[derive(Debug)]
pub enum Content<'a> {
    /// All zeros.
    Zero,
    /// These bytes.
    Bytes(&'a PageBytes),
    /// What differs from the page held, as [`kage_wire::delta`] reads it; not checked yet.
    Delta(&'a [u8]),
    /// A block of the disk with this digest, which its sender does not have.
    Elsewhere(u64),
}

/// Reads pages out of batches.
pub struct Decoder {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    records: Vec<u8>,
    page: Box<PageBytes>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decoder")
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder with its buffers.
    #[must_use]
    pub fn new() -> Self {
        Self {
            zstd: zstd::bulk::Decompressor::new().ok(),
            records: Vec::new(),
            page: Box::new([0; PAGE_SIZE]),
        }
    }

    /// Gives every page of a checked batch to `each`, in order; stops at the first error.
    ///
    /// # Errors
    /// [`DecodeError`] as `E`, or what `each` returned. Pages before it have been given.
    pub fn decode<E: From<DecodeError>>(
        &mut self,
        batch: &Batch<'_>,
        mut each: impl FnMut(PageIndex, Content<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let records = match batch.compression {
            Compression::None if batch.data.len() == batch.length => batch.data,
            Compression::None => return Err(DecodeError::Records { length: batch.length }.into()),
            Compression::Zstd => {
                let zstd = self.zstd.as_mut().ok_or(DecodeError::Memory)?;
                self.records.resize(MAX_RECORDS_BYTES, 0);
                // Batch::parse has checked the length against MAX_RECORDS_BYTES.
                let into = &mut self.records[..batch.length];
                if !matches!(zstd.decompress_to_buffer(batch.data, into), Ok(got) if got == batch.length) {
                    return Err(DecodeError::Records { length: batch.length }.into());
                }
                &self.records[..batch.length]
            }
        };
        for record in BatchReader::new(batch.records, records) {
            let record = record.map_err(DecodeError::from)?;
            let damaged = DecodeError::Page { index: record.index };
            match record.encoding {
                Encoding::Delta => each(record.index, Content::Delta(record.data))?,
                Encoding::Zero => each(record.index, Content::Zero)?,
                Encoding::Elsewhere => {
                    let digest = record.data.try_into().map_err(|_| damaged)?;
                    each(record.index, Content::Elsewhere(u64::from_le_bytes(digest)))?;
                }
                Encoding::Raw => {
                    let bytes = record.data.try_into().map_err(|_| damaged)?;
                    each(record.index, Content::Bytes(bytes))?;
                }
                Encoding::Lz4 => match lz4_flex::block::decompress_into(record.data, &mut self.page[..]) {
                    Ok(PAGE_SIZE) => each(record.index, Content::Bytes(&self.page))?,
                    _ => return Err(damaged.into()),
                },
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

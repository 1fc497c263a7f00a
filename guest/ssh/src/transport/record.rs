//! Records: one message each, padded, numbered, and encrypted once keys are there (RFC 4253 §6).
//!
//! [`Opener`] gathers the peer's bytes until a record is whole, checks and decrypts it; [`Sealer`] does the reverse
//! into an output buffer, in place. Both count what their keys were used for. Not here: what messages mean, and when
//! keys change.

use alloc::vec::Vec;

use crate::cipher::{ChaChaPoly, LENGTH, TAG};
use crate::error::Error;
use crate::random::Random;

/// Largest `packet_length` accepted (RFC 4253 §6.1): 32 KiB of channel data and its headers fit.
pub const MAX_LENGTH: u32 = 35_000;
/// Both lengths without the MAC are multiples of this (RFC 4253 §6).
const BLOCK: usize = 8;
const MIN_PADDING: usize = 4;
/// Bytes before the payload: `packet_length` and `padding_length`.
const PREFIX: usize = LENGTH + 1;
/// Records one key may see; at 2³² a nonce would come again.
const MAX_RECORDS: u64 = 1 << 31;

/// How much a key was used.
#[derive(Debug, Default, Clone, Copy)]
pub struct Usage {
    /// Records under the current key.
    pub records: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Usage {
    fn count(&mut self, bytes: usize) -> Result<(), Error> {
        self.records += 1;
        self.bytes += bytes as u64;
        if self.records >= MAX_RECORDS { Err(Error::WornKeys) } else { Ok(()) }
    }
}

/// One direction's cipher, sequence number and usage.
#[derive(Default)]
struct Keys {
    cipher: Option<ChaChaPoly>,
    sequence: u32,
    usage: Usage,
}

impl Keys {
    fn change(&mut self, cipher: ChaChaPoly, restart: bool) {
        self.cipher = Some(cipher);
        self.usage = Usage::default();
        if restart {
            self.sequence = 0;
        }
    }

    fn next(&mut self, bytes: usize) -> Result<u32, Error> {
        self.usage.count(bytes)?;
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(1);
        Ok(sequence)
    }
}

/// The payload of a record that arrived, and its number.
#[derive(Debug)]
pub struct Opened {
    buffer: Vec<u8>,
    end: usize,
    /// The record's sequence number.
    pub sequence: u32,
}

impl Opened {
    /// The message; never empty.
    pub fn payload(&self) -> &[u8] {
        self.buffer.get(PREFIX..self.end).unwrap_or_default()
    }
}

/// The receiving side.
#[derive(Default)]
pub struct Opener {
    keys: Keys,
    buffer: Vec<u8>,
    /// The current record's size with everything, once its length field is there.
    size: Option<usize>,
}

impl Opener {
    /// Uses a new key from the next record on; `restart` numbers records from 0 again (strict key exchange).
    pub fn change_keys(&mut self, cipher: ChaChaPoly, restart: bool) {
        self.keys.change(cipher, restart);
    }

    /// What the current key was used for.
    pub fn usage(&self) -> Usage {
        self.keys.usage
    }

    /// Gives a record's memory back for the next one.
    pub fn recycle(&mut self, opened: Opened) {
        if self.buffer.is_empty() {
            self.buffer = opened.buffer;
            self.buffer.clear();
        }
    }

    /// Takes from the front of `bytes` what the current record still needs; the record, if that completes it.
    ///
    /// # Errors
    /// A length out of bounds, a wrong tag, impossible padding, or a worn-out key.
    pub fn take(&mut self, bytes: &mut &[u8]) -> Result<Option<Opened>, Error> {
        let size = match self.size {
            Some(size) => size,
            None => {
                self.gather(bytes, LENGTH);
                let Some(field) = self.buffer.first_chunk::<LENGTH>().copied() else { return Ok(None) };
                let size = self.size_of(field)?;
                self.size = Some(size);
                size
            }
        };
        self.gather(bytes, size);
        if self.buffer.len() < size {
            return Ok(None);
        }
        self.size = None;
        self.open(size).map(Some)
    }

    fn gather(&mut self, bytes: &mut &[u8], wanted: usize) {
        let missing = wanted.saturating_sub(self.buffer.len());
        let (taken, rest) = bytes.split_at_checked(missing).unwrap_or((bytes, &[]));
        self.buffer.extend_from_slice(taken);
        *bytes = rest;
    }

    fn size_of(&self, field: [u8; LENGTH]) -> Result<usize, Error> {
        let (length, outside, tag) = match &self.keys.cipher {
            Some(cipher) => (cipher.length(self.keys.sequence, field), 0, TAG),
            None => (u32::from_be_bytes(field), LENGTH, 0),
        };
        let body = length as usize;
        if length > MAX_LENGTH || body < 1 + MIN_PADDING || !(body + outside).is_multiple_of(BLOCK) {
            return Err(Error::RecordLength { length, limit: MAX_LENGTH });
        }
        Ok(LENGTH + body + tag)
    }

    fn open(&mut self, size: usize) -> Result<Opened, Error> {
        let sequence = self.keys.next(size)?;
        let mut buffer = core::mem::take(&mut self.buffer);
        if let Some(cipher) = &self.keys.cipher
            && let Some((record, tag)) = buffer.split_last_chunk_mut::<TAG>()
        {
            cipher.open(sequence, record, tag)?;
            buffer.truncate(size - TAG);
        }
        let padding = usize::from(buffer.get(LENGTH).copied().unwrap_or_default());
        let end = buffer.len().checked_sub(padding).filter(|end| padding >= MIN_PADDING && *end > PREFIX);
        let Some(end) = end else { return Err(Error::Padding) };
        Ok(Opened { buffer, end, sequence })
    }
}

/// The sending side.
#[derive(Default)]
pub struct Sealer {
    keys: Keys,
}

impl Sealer {
    /// Uses a new key from the next record on; `restart` numbers records from 0 again (strict key exchange).
    pub fn change_keys(&mut self, cipher: ChaChaPoly, restart: bool) {
        self.keys.change(cipher, restart);
    }

    /// What the current key was used for.
    pub fn usage(&self) -> Usage {
        self.keys.usage
    }

    /// Appends one record to `out`, its payload written by `payload`, which only appends.
    ///
    /// # Errors
    /// A worn-out key; `out` is then as it was.
    pub fn seal(
        &mut self,
        out: &mut Vec<u8>,
        random: &mut dyn Random,
        payload: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), Error> {
        let start = out.len();
        out.extend_from_slice(&[0; PREFIX]);
        payload(out);
        let outside = if self.keys.cipher.is_some() { LENGTH } else { 0 };
        let used = out.len() - start - outside;
        let padding = MIN_PADDING + (BLOCK - (used + MIN_PADDING) % BLOCK) % BLOCK;
        let mut filling = [0; MIN_PADDING + BLOCK];
        let filling = filling.get_mut(..padding).unwrap_or_default();
        random.fill(filling);
        out.extend_from_slice(filling);

        let record = out.get_mut(start..).unwrap_or_default();
        let size = record.len();
        let length = u32::try_from(size - LENGTH).unwrap_or(u32::MAX);
        if let Some((field, [padding_field, ..])) = record.split_first_chunk_mut::<LENGTH>() {
            *field = length.to_be_bytes();
            *padding_field = padding as u8;
        }
        let sequence = match self.keys.next(size) {
            Ok(sequence) => sequence,
            Err(error) => {
                out.truncate(start);
                return Err(error);
            }
        };
        if let Some(cipher) = &self.keys.cipher {
            let tag = cipher.seal(sequence, record);
            out.extend_from_slice(&tag);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cipher::KEY;
    use proptest::prelude::*;

    fn pair(encrypted: bool) -> (Sealer, Opener) {
        let (mut sealer, mut opener) = (Sealer::default(), Opener::default());
        if encrypted {
            sealer.change_keys(ChaChaPoly::new(&[7; KEY]), false);
            opener.change_keys(ChaChaPoly::new(&[7; KEY]), false);
        }
        (sealer, opener)
    }

    fn sealed(sealer: &mut Sealer, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut random = |bytes: &mut [u8]| bytes.fill(0xaa);
        sealer.seal(&mut out, &mut random, |out| out.extend_from_slice(payload)).expect("fresh keys");
        out
    }

    #[test]
    fn a_plain_record_is_laid_out_as_rfc_4253_says() {
        let (mut sealer, _) = pair(false);
        assert_eq!(
            sealed(&mut sealer, &[21]),
            [0, 0, 0, 12, 10, 21, 170, 170, 170, 170, 170, 170, 170, 170, 170, 170]
        );
    }

    #[test]
    fn lengths_and_padding_out_of_bounds_are_refused() {
        let plain = |bytes: &[u8]| Opener::default().take(&mut &bytes[..]).map(|_| ());
        assert!(matches!(plain(&[0, 0, 0, 4, 0, 0, 0, 0]), Err(Error::RecordLength { .. })));
        assert!(matches!(plain(&[0xff; 8]), Err(Error::RecordLength { .. })));
        assert!(matches!(plain(&[0, 0, 0, 13]), Err(Error::RecordLength { .. })));
        let padding = |padding: u8| {
            let mut record = Vec::from([0, 0, 0, 12, padding]);
            record.resize(16, 0);
            plain(&record)
        };
        assert_eq!(padding(3), Err(Error::Padding));
        assert_eq!(padding(11), Err(Error::Padding), "no payload");
        assert_eq!(padding(255), Err(Error::Padding));
        assert_eq!(padding(10), Ok(()));
    }

    #[test]
    fn a_key_is_not_used_until_its_nonces_come_again() {
        let (mut sealer, _) = pair(true);
        sealer.keys.usage.records = MAX_RECORDS - 1;
        let mut out = Vec::from([1]);
        let mut random = |bytes: &mut [u8]| bytes.fill(0);
        assert_eq!(sealer.seal(&mut out, &mut random, |out| out.push(2)), Err(Error::WornKeys));
        assert_eq!(out, [1]);
    }

    #[test]
    fn a_restart_numbers_records_from_zero_on_both_sides() {
        let (mut sealer, mut opener) = pair(true);
        opener.take(&mut &sealed(&mut sealer, b"one")[..]).expect("opens");
        sealer.change_keys(ChaChaPoly::new(&[8; KEY]), true);
        opener.change_keys(ChaChaPoly::new(&[8; KEY]), true);
        let opened = opener.take(&mut &sealed(&mut sealer, b"two")[..]).expect("opens").expect("whole");
        assert_eq!((opened.sequence, opened.payload()), (0, &b"two"[..]));
    }

    proptest! {
        #[test]
        fn records_arrive_however_the_stream_is_cut(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 1..8),
            cut in 1usize..80, encrypted: bool,
        ) {
            let (mut sealer, mut opener) = pair(encrypted);
            let stream: Vec<u8> = payloads.iter().flat_map(|payload| sealed(&mut sealer, payload)).collect();
            let mut arrived = Vec::new();
            for mut chunk in stream.chunks(cut) {
                while !chunk.is_empty() {
                    if let Some(opened) = opener.take(&mut chunk).expect("nothing was damaged") {
                        arrived.push(opened.payload().to_vec());
                        opener.recycle(opened);
                    }
                }
            }
            prop_assert_eq!(arrived, payloads);
        }

        #[test]
        fn garbage_never_panics_and_never_grows_the_buffer(bytes in prop::collection::vec(any::<u8>(), 0..500), encrypted: bool) {
            let (_, mut opener) = pair(encrypted);
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                match opener.take(&mut rest) {
                    Ok(Some(opened)) => prop_assert!(!opened.payload().is_empty()),
                    Ok(None) => {}
                    Err(_) => break,
                }
            }
            prop_assert!(opener.buffer.len() <= bytes.len());
        }
    }
}

//! The record layer's cipher, `chacha20-poly1305@openssh.com` (OpenSSH's PROTOCOL.chacha20poly1305).
//!
//! A record is `length (4, encrypted with the header key) ∥ body (encrypted with the main key) ∥ tag (16)`. The tag
//! covers both ciphertexts; its one-time key is the first half of the main key stream's block 0, the body starts at
//! block 1. The nonce is the record's sequence number, so a key must never see 2³² records; `transport` sees to it.
//!
//! The length is decrypted before its tag can be checked: callers treat it as a guess that only bounds how much to
//! wait for. No body byte is decrypted before the tag was compared, in constant time.

use chacha20::ChaCha20Legacy;
use chacha20::cipher::{KeyIvInit, StreamCipher};
use poly1305::Poly1305;
use poly1305::universal_hash::KeyInit;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Bytes of the tag at a record's end.
pub const TAG: usize = 16;
/// Bytes of the length field at a record's start.
pub const LENGTH: usize = 4;
/// Bytes of key material one direction needs.
pub const KEY: usize = 64;

/// A record's tag did not match: the bytes were damaged, or written by someone without the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a record's authentication tag is wrong")]
pub struct BadTag;

/// The keys of one direction.
pub struct ChaChaPoly {
    main: Zeroizing<[u8; 32]>,
    header: Zeroizing<[u8; 32]>,
}

impl ChaChaPoly {
    /// Takes the 64 bytes that key exchange derived for this direction: main key, then header key.
    pub fn new(material: &[u8; KEY]) -> Self {
        let mut keys = Self { main: Zeroizing::new([0; 32]), header: Zeroizing::new([0; 32]) };
        let (main, header) = material.split_at(32);
        keys.main.copy_from_slice(main);
        keys.header.copy_from_slice(header);
        keys
    }

    /// Decrypts a record's length field, not yet authenticated.
    pub fn length(&self, sequence: u32, field: [u8; LENGTH]) -> u32 {
        let mut length = field;
        stream(&self.header, sequence).apply_keystream(&mut length);
        u32::from_be_bytes(length)
    }

    /// Checks and decrypts in place a record's body, given as ciphertext `length ∥ body` and its tag.
    ///
    /// # Errors
    /// [`BadTag`]; `record` is then still the ciphertext.
    pub fn open(&self, sequence: u32, record: &mut [u8], tag: &[u8; TAG]) -> Result<(), BadTag> {
        let mut main = stream(&self.main, sequence);
        let expected = one_time(&mut main).compute_unpadded(record);
        if !bool::from(expected.as_slice().ct_eq(tag)) {
            return Err(BadTag);
        }
        if let Some(body) = record.get_mut(LENGTH..) {
            main.apply_keystream(body);
        }
        Ok(())
    }

    /// Encrypts in place a record given as plain `length ∥ body` and returns its tag.
    pub fn seal(&self, sequence: u32, record: &mut [u8]) -> [u8; TAG] {
        let mut main = stream(&self.main, sequence);
        let authenticator = one_time(&mut main);
        if let Some((length, body)) = record.split_first_chunk_mut::<LENGTH>() {
            stream(&self.header, sequence).apply_keystream(length);
            main.apply_keystream(body);
        }
        authenticator.compute_unpadded(record).into()
    }
}

/// The key stream of one record; the nonce is its sequence number as a big-endian 64-bit integer.
fn stream(key: &[u8; 32], sequence: u32) -> ChaCha20Legacy {
    ChaCha20Legacy::new(key.into(), &u64::from(sequence).to_be_bytes().into())
}

/// Takes block 0 off the main key stream: its first half is the record's authenticator key, its second is not used.
fn one_time(main: &mut ChaCha20Legacy) -> Poly1305 {
    let mut key = Zeroizing::new([0; 32]);
    main.apply_keystream(&mut key[..]);
    main.apply_keystream(&mut Zeroizing::new([0; 32])[..]);
    Poly1305::new((&*key).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn keys() -> ChaChaPoly {
        let mut material = [0; KEY];
        for (index, byte) in material.iter_mut().enumerate() {
            *byte = index as u8;
        }
        ChaChaPoly::new(&material)
    }

    /// Written from the primitives, one block at a time, to pin down block numbers, key halves and byte order.
    #[test]
    fn a_record_is_laid_out_as_openssh_documents_it() {
        let mut record = Vec::from([0, 0, 0, 8, 4, 2, 0, 0, 0, 0, 0, 0]);
        let plain = record.clone();
        let tag = keys().seal(7, &mut record);

        let main: [u8; 32] = core::array::from_fn(|index| index as u8);
        let header: [u8; 32] = core::array::from_fn(|index| 32 + index as u8);
        let nonce = [0, 0, 0, 0, 0, 0, 0, 7];
        let mut header_stream = [0; 64];
        ChaCha20Legacy::new(&header.into(), &nonce.into()).apply_keystream(&mut header_stream);
        let mut main_stream = [0; 128];
        ChaCha20Legacy::new(&main.into(), &nonce.into()).apply_keystream(&mut main_stream);
        let expected: Vec<u8> = plain
            .iter()
            .zip(header_stream[..4].iter().chain(&main_stream[64..]))
            .map(|(plain, key)| plain ^ key)
            .collect();
        assert_eq!(record, expected);
        let one_time: [u8; 32] = main_stream[..32].try_into().expect("32 bytes");
        let expected_tag: [u8; TAG] = Poly1305::new(&one_time.into()).compute_unpadded(&record).into();
        assert_eq!(tag, expected_tag);
    }

    proptest! {
        #[test]
        fn what_was_sealed_opens_and_any_flipped_bit_is_refused(
            body in prop::collection::vec(any::<u8>(), 1..200), sequence: u32, flip: prop::sample::Index,
        ) {
            let keys = keys();
            let mut record = Vec::from((body.len() as u32).to_be_bytes());
            record.extend_from_slice(&body);
            let mut tag = keys.seal(sequence, &mut record);
            let field = *record.first_chunk().expect("length field");
            prop_assert_eq!(keys.length(sequence, field), body.len() as u32);

            let mut good = record.clone();
            prop_assert_eq!(keys.open(sequence, &mut good, &tag), Ok(()));
            prop_assert_eq!(&good[LENGTH..], &body[..]);

            let bit = flip.index((record.len() + TAG) * 8);
            match record.get_mut(bit / 8) {
                Some(byte) => *byte ^= 1 << (bit % 8),
                None => tag[bit / 8 - record.len()] ^= 1 << (bit % 8),
            }
            prop_assert_eq!(keys.open(sequence, &mut record, &tag), Err(BadTag));
        }
    }
}

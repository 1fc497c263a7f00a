//! Keys that sign images: ed25519 (RFC 8032), written as 64 hexadecimal digits.

use std::{fmt, fs, io, path::Path, str::FromStr};

use ed25519_dalek::{Signature, VerifyingKey};

/// A text is no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no image key: ed25519: and 64 hexadecimal digits")]
pub struct KeyError(String);

/// Who may have signed an image.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PublicKey(pub(crate) [u8; 32]);

const PREFIX: &str = "ed25519:";

impl PublicKey {
    pub(crate) fn verifies(&self, bytes: &[u8], signature: &[u8; 64]) -> bool {
        // Strict: keys of small order, with which one signature fits many messages, are refused.
        VerifyingKey::from_bytes(&self.0)
            .is_ok_and(|key| key.verify_strict(bytes, &Signature::from_bytes(signature)).is_ok())
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let error = || KeyError(text.chars().take(80).collect());
        let digits = text.trim().strip_prefix(PREFIX).ok_or_else(error)?;
        unhex(digits).map(Self).ok_or_else(error)
    }
}

/// Signs images.
pub struct SigningKey(pub(crate) ed25519_dalek::SigningKey);

impl SigningKey {
    /// The key of a seed, which must be secret and random.
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(ed25519_dalek::SigningKey::from_bytes(seed))
    }

    /// What others need to check its signatures.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }

    /// Reads a key's file: its seed in hexadecimal.
    ///
    /// # Errors
    /// The file cannot be read, or holds no key.
    pub fn read(path: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(path)?;
        let no_key =
            || io::Error::new(io::ErrorKind::InvalidData, "no image key: 64 hexadecimal digits are wanted");
        Ok(Self::from_seed(&unhex(text.trim()).ok_or_else(no_key)?))
    }

    /// What [`read`](Self::read) reads.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!("{}\n", hex(&self.0.to_bytes()))
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(digits: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if digits.len() != 64 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(digits.get(at..at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_read_as_they_were_written() {
        let key = SigningKey::from_seed(&[7; 32]);
        assert_eq!(key.public().to_string().parse(), Ok(key.public()));
        for bad in ["", "ed25519:", "ed25519:zz", &"a".repeat(64), &format!("ed25519:{}é", "a".repeat(62))] {
            assert!(bad.parse::<PublicKey>().is_err(), "{bad}");
        }
    }
}

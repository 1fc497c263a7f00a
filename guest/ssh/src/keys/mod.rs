//! Keys: who may log in, and which host this is.
//!
//! [`PublicKey`] is a user's key, [`authorized_keys`] reads a file of them, [`HostKey`] signs key exchanges. All of
//! it also runs on the host, where a key file is checked before a machine is made of it. Not here: private user
//! keys and passwords (there are none), and certificates.

mod authorized;
mod base64;
mod host;
mod rsa;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use p256::ecdsa::signature::Verifier as _;
use sha2::{Digest as _, Sha256, Sha512};

use crate::wire::{self, Reader, Truncated};
use rsa::{Hash, RsaKey};

pub use authorized::{AuthorizedKey, KeyFileError, MAX_KEYS, authorized_keys};
pub use host::HostKey;

/// Names of the signature algorithms users may prove their keys with, for `server-sig-algs`.
pub const SIGNATURE_ALGORITHMS: &[&str] =
    &["ssh-ed25519", "ecdsa-sha2-nistp256", "rsa-sha2-512", "rsa-sha2-256"];

/// Longest key blob that is looked at: an RSA key of 8192 bits has 1,047 bytes.
const MAX_BLOB: usize = 2048;

/// Why some text or bytes are not a usable public key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A private key was given.
    #[error("this is a private key; give the public one (the file that ends in .pub)")]
    Private,
    /// A public key in another tool's format.
    #[error("this is not OpenSSH's format; convert it with `ssh-keygen -i -f FILE`")]
    OtherFormat,
    /// Text that has no resemblance to a key.
    #[error("this is no SSH public key; expected a line such as `ssh-ed25519 AAAA… comment`")]
    NotAKey,
    /// A restriction before the key, which would be lost.
    #[error("options before a key (`{option}`) are not supported; give the key alone")]
    Options {
        /// The start of the options.
        option: String,
    },
    /// A key type that cannot be used here.
    #[error("keys of type {found} are not supported; use ssh-ed25519, ecdsa-sha2-nistp256 or ssh-rsa")]
    Unsupported {
        /// The type stated.
        found: String,
    },
    /// The key's base64 does not decode, or ends early.
    #[error("the {algorithm} key is damaged or cut short")]
    Damaged {
        /// The type stated.
        algorithm: String,
    },
    /// The type before the key is not the type inside it.
    #[error("the line says {stated}, the key itself says {found}")]
    Mismatch {
        /// The type before the base64.
        stated: String,
        /// The type inside it.
        found: String,
    },
    /// A well-formed key that protects nothing.
    #[error("the {algorithm} key is weak or invalid (RSA needs 2048 to 8192 bits)")]
    Weak {
        /// The type of key.
        algorithm: &'static str,
    },
}

/// A signature does not belong to the key and message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the signature is wrong")]
pub struct BadSignature;

/// A user's public key.
#[derive(Clone)]
pub struct PublicKey {
    blob: Vec<u8>,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Ed25519(ed25519_dalek::VerifyingKey),
    EcdsaP256(Box<p256::ecdsa::VerifyingKey>),
    Rsa(RsaKey),
}

impl Kind {
    fn algorithm(&self) -> &'static str {
        match self {
            Self::Ed25519(_) => "ssh-ed25519",
            Self::EcdsaP256(_) => "ecdsa-sha2-nistp256",
            Self::Rsa(_) => "ssh-rsa",
        }
    }
}

impl PublicKey {
    /// Parses a key as SSH messages carry it (RFC 4253 §6.6, RFC 5656 §3.1, RFC 8709 §4).
    ///
    /// # Errors
    /// [`KeyError`]: an unsupported type, a damaged blob, or a key that protects nothing.
    pub fn from_blob(blob: &[u8]) -> Result<Self, KeyError> {
        let mut reader = Reader::new(blob.get(..MAX_BLOB).unwrap_or(blob));
        let name = reader.string().map_err(|Truncated| KeyError::NotAKey)?;
        let damaged = |_: Truncated| KeyError::Damaged { algorithm: shown(name) };
        let kind = match name {
            b"ssh-ed25519" => {
                let weak = KeyError::Weak { algorithm: "ssh-ed25519" };
                let point = <&[u8; 32]>::try_from(reader.string().map_err(damaged)?)
                    .map_err(|_| damaged(Truncated))?;
                match ed25519_dalek::VerifyingKey::from_bytes(point) {
                    Ok(key) if !key.is_weak() => Kind::Ed25519(key),
                    _ => return Err(weak),
                }
            }
            b"ecdsa-sha2-nistp256" => {
                let curve = reader.string().map_err(damaged)?;
                let point = reader.string().map_err(damaged)?;
                match p256::ecdsa::VerifyingKey::from_sec1_bytes(point) {
                    Ok(key) if curve == b"nistp256" => Kind::EcdsaP256(Box::new(key)),
                    _ => return Err(KeyError::Weak { algorithm: "ecdsa-sha2-nistp256" }),
                }
            }
            b"ssh-rsa" => {
                let exponent = reader.string().map_err(damaged)?;
                let modulus = reader.string().map_err(damaged)?;
                Kind::Rsa(RsaKey::new(exponent, modulus).ok_or(KeyError::Weak { algorithm: "ssh-rsa" })?)
            }
            other => return Err(KeyError::Unsupported { found: shown(other) }),
        };
        if !reader.is_empty() {
            return Err(damaged(Truncated));
        }
        Ok(Self { blob: blob.to_vec(), kind })
    }

    /// The key's type, such as `ssh-ed25519`.
    pub fn algorithm(&self) -> &'static str {
        self.kind.algorithm()
    }

    /// The key as SSH messages carry it.
    pub fn blob(&self) -> &[u8] {
        &self.blob
    }

    /// The key as `authorized_keys` and `known_hosts` have it: type and base64.
    pub fn to_line(&self) -> String {
        line(self.algorithm(), &self.blob)
    }

    /// The fingerprint `ssh-keygen -l` prints.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.blob)
    }

    /// Whether signatures of the named algorithm are made by keys of this type.
    pub fn signs_with(&self, algorithm: &[u8]) -> bool {
        match &self.kind {
            Kind::Ed25519(_) => algorithm == b"ssh-ed25519",
            Kind::EcdsaP256(_) => algorithm == b"ecdsa-sha2-nistp256",
            Kind::Rsa(_) => rsa_hash(algorithm).is_some(),
        }
    }

    /// Checks an SSH signature blob (`string algorithm ∥ string signature`) over `message`.
    ///
    /// # Errors
    /// [`BadSignature`] for anything but this key's signature with the stated algorithm.
    pub fn verify(&self, algorithm: &[u8], message: &[u8], signature: &[u8]) -> Result<(), BadSignature> {
        let mut reader = Reader::new(signature);
        let stated = reader.string().map_err(|Truncated| BadSignature)?;
        let signature = reader.string().map_err(|Truncated| BadSignature)?;
        if stated != algorithm || !self.signs_with(algorithm) || !reader.is_empty() {
            return Err(BadSignature);
        }
        let good = match &self.kind {
            Kind::Ed25519(key) => ed25519_dalek::Signature::from_slice(signature)
                .is_ok_and(|signature| key.verify_strict(message, &signature).is_ok()),
            Kind::EcdsaP256(key) => {
                let mut numbers = Reader::new(signature);
                let (r, s) = (numbers.string(), numbers.string());
                match (r.ok().and_then(scalar), s.ok().and_then(scalar)) {
                    (Some(r), Some(s)) if numbers.is_empty() => p256::ecdsa::Signature::from_scalars(r, s)
                        .is_ok_and(|s| key.verify(message, &s).is_ok()),
                    _ => false,
                }
            }
            Kind::Rsa(key) => match rsa_hash(algorithm) {
                Some(Hash::Sha256) => key.verify(Hash::Sha256, &Sha256::digest(message), signature),
                Some(Hash::Sha512) => key.verify(Hash::Sha512, &Sha512::digest(message), signature),
                None => false,
            },
        };
        if good { Ok(()) } else { Err(BadSignature) }
    }
}

impl PartialEq for PublicKey {
    fn eq(&self, other: &Self) -> bool {
        self.blob == other.blob
    }
}

impl Eq for PublicKey {}

impl fmt::Debug for PublicKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "PublicKey({} {})", self.algorithm(), self.fingerprint())
    }
}

/// SHA-1 (`ssh-rsa` as a signature) is not among them.
fn rsa_hash(algorithm: &[u8]) -> Option<Hash> {
    match algorithm {
        b"rsa-sha2-256" => Some(Hash::Sha256),
        b"rsa-sha2-512" => Some(Hash::Sha512),
        _ => None,
    }
}

/// An mpint as a P-256 scalar's 32 bytes.
fn scalar(mpint: &[u8]) -> Option<[u8; 32]> {
    let digits = match mpint {
        [0, digits @ ..] => digits,
        digits => digits,
    };
    let mut bytes = [0; 32];
    let start = bytes.len().checked_sub(digits.len())?;
    bytes.get_mut(start..)?.copy_from_slice(digits);
    Some(bytes)
}

fn line(algorithm: &str, blob: &[u8]) -> String {
    format!("{algorithm} {}", base64::encode(blob))
}

fn fingerprint(blob: &[u8]) -> String {
    format!("SHA256:{}", base64::encode_unpadded(&Sha256::digest(blob)))
}

/// Foreign bytes, cut and cleaned, for an error message.
fn shown(bytes: &[u8]) -> String {
    const SHOWN: usize = 40;
    String::from_utf8_lossy(bytes.get(..SHOWN).unwrap_or(bytes))
        .chars()
        .map(|character| if character.is_control() { '?' } else { character })
        .collect()
}

/// Appends an ed25519 public key as a blob.
fn put_ed25519(out: &mut Vec<u8>, point: &[u8; 32]) {
    wire::put_string(out, b"ssh-ed25519");
    wire::put_string(out, point);
}

#[cfg(test)]
mod tests;

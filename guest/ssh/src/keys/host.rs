//! The key that proves which machine answers.

use alloc::string::String;
use alloc::vec::Vec;

use ed25519_dalek::{Signer as _, SigningKey};

use super::{fingerprint, line, put_ed25519};
use crate::wire;

/// A host's ed25519 key pair, made of a seed that belongs to the image and travels with it.
#[derive(Clone)]
pub struct HostKey {
    key: SigningKey,
}

impl HostKey {
    /// The name of its algorithm.
    pub const ALGORITHM: &'static str = "ssh-ed25519";

    /// Derives the pair (RFC 8032 §5.1.5) from 32 secret bytes.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self { key: SigningKey::from_bytes(seed) }
    }

    /// The public key as SSH messages carry it.
    pub fn blob(&self) -> Vec<u8> {
        let mut blob = Vec::new();
        put_ed25519(&mut blob, self.key.verifying_key().as_bytes());
        blob
    }

    /// The public key as `known_hosts` has it after the host's name: type and base64.
    pub fn to_line(&self) -> String {
        line(Self::ALGORITHM, &self.blob())
    }

    /// The fingerprint a client shows at its first connection.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.blob())
    }

    /// Signs an exchange hash; the result is an SSH signature blob.
    pub(crate) fn sign(&self, message: &[u8]) -> Vec<u8> {
        let mut signature = Vec::new();
        wire::put_string(&mut signature, Self::ALGORITHM.as_bytes());
        wire::put_string(&mut signature, &self.key.sign(message).to_bytes());
        signature
    }
}

impl core::fmt::Debug for HostKey {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(formatter, "HostKey({})", self.fingerprint())
    }
}

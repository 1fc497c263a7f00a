//! Randomness of a generation: nothing is drawn before the first, and a new one starts from fresh bytes.

use chacha20::{
    ChaCha20,
    cipher::{KeyIvInit, StreamCipher},
};

use crate::local::Local;

static STREAM: Local<ChaCha20> = Local::new();

/// Starts the stream of a generation from its seed and what the entropy device gave.
pub fn reseed(seed: [u8; 32], more: [u8; 32]) {
    let mut key = seed;
    for (byte, other) in key.iter_mut().zip(more) {
        *byte ^= other;
    }
    STREAM.set(ChaCha20::new(&key.into(), &[0u8; 12].into()));
}

/// Fills with random bytes.
///
/// # Panics
/// Before the first generation: a machine without one must draw nothing.
pub fn fill(bytes: &mut [u8]) {
    bytes.fill(0);
    STREAM.get().apply_keystream(bytes);
}

/// A random number.
pub fn number() -> u64 {
    let mut bytes = [0; 8];
    fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

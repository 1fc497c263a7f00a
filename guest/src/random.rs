//! Randomness of a generation: nothing is drawn before the first, and a new one starts from fresh bytes.

use chacha20::{
    ChaCha20,
    cipher::{KeyIvInit, StreamCipher},
};

use crate::local::Local;

/// Bytes drawn with one key; a stream would end after 256 GiB.
const KEYED: usize = 1 << 20;

/// What is drawn from.
struct Stream {
    cipher: ChaCha20,
    /// Bytes until the next key.
    left: usize,
}

impl Stream {
    fn new(key: [u8; 32]) -> Self {
        Self { cipher: ChaCha20::new(&key.into(), &[0u8; 12].into()), left: KEYED }
    }

    /// Mixes `bytes` with the stream, which gives itself another key now and then: so what was drawn cannot be found
    /// again from what is kept.
    fn apply(&mut self, bytes: &mut [u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.left == 0 {
                let mut key = [0; 32];
                self.cipher.apply_keystream(&mut key);
                *self = Self::new(key);
            }
            let (now, later) = rest.split_at_mut(rest.len().min(self.left));
            self.cipher.apply_keystream(now);
            self.left -= now.len();
            rest = later;
        }
    }
}

static STREAM: Local<Stream> = Local::new();

/// Starts the stream of a generation from its seed and what the entropy device gave.
pub fn reseed(seed: [u8; 32], more: [u8; 32]) {
    let mut key = seed;
    for (byte, other) in key.iter_mut().zip(more) {
        *byte ^= other;
    }
    STREAM.set(Stream::new(key));
}

/// Fills with random bytes.
///
/// # Panics
/// Before the first generation: a machine without one must draw nothing.
pub fn fill(bytes: &mut [u8]) {
    bytes.fill(0);
    STREAM.get().apply(bytes);
}

/// A random number.
pub fn number() -> u64 {
    let mut bytes = [0; 8];
    fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

//! The byte stream of HTTP's `/stream`: any host tool can compute the same bytes, and their hash.
//!
//! Words of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014),
//! little-endian, the seed being the generator's first state.

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of splitmix64.
#[must_use]
pub const fn finalise(state: u64) -> u64 {
    let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// The stream of a seed, from its first byte on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    state: u64,
    /// The word that was begun.
    word: [u8; 8],
    /// Bytes used of it; 8 when none is left.
    used: usize,
}

impl Stream {
    /// Starts at the first byte.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { state: seed, word: [0; 8], used: 8 }
    }

    fn next(&mut self) -> [u8; 8] {
        self.state = self.state.wrapping_add(GAMMA);
        finalise(self.state).to_le_bytes()
    }

    /// Writes the next bytes of the stream.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        let begun = (8 - self.used).min(bytes.len());
        let (head, rest) = bytes.split_at_mut(begun);
        head.copy_from_slice(&self.word[self.used..self.used + begun]);
        self.used += begun;
        let mut words = rest.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.next());
        }
        let tail = words.into_remainder();
        if !tail.is_empty() {
            self.word = self.next();
            self.used = tail.len();
            tail.copy_from_slice(&self.word[..tail.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first outputs of splitmix64 for the seed 1234567, as its authors' implementation gives them.
    #[test]
    fn the_words_are_those_of_splitmix64() {
        let mut bytes = [0; 40];
        Stream::new(1_234_567).fill(&mut bytes);
        let words: [u64; 5] = core::array::from_fn(|at| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * at..8 * at + 8]);
            u64::from_le_bytes(word)
        });
        let expected = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ];
        assert_eq!(words, expected);
    }

    #[test]
    fn the_stream_is_the_same_however_it_is_cut() {
        let mut whole = [0; 257];
        Stream::new(7).fill(&mut whole);
        for step in 1..40 {
            let mut cut = [0; 257];
            let mut stream = Stream::new(7);
            cut.chunks_mut(step).for_each(|piece| stream.fill(piece));
            assert_eq!(cut, whole, "in pieces of {step}");
        }
    }
}

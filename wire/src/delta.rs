//! What differs between two versions of a page.
//!
//! ```text
//! run, any number of them, ascending and not touching
//! 0  u16  first word      of 512 words of 8 bytes
//! 2  u16  words, at least 1
//! 4  the words as they are now
//! ```
//! Integers are little-endian. Words and not bytes: comparing is what a delta costs, and a run's
//! header is cheaper than a word in between.

use kage_machine::{PAGE_SIZE, PageBytes};

const WORD: usize = 8;
const WORDS: usize = PAGE_SIZE / WORD;

/// Data that is no delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page delta is damaged")]
pub struct DamagedDelta;

/// Writes to `out` what makes `new` of `old`; false where that would be longer than `limit`, and
/// `out` is then of no use. Equal pages have no delta.
#[must_use]
pub fn encode(old: &PageBytes, new: &PageBytes, limit: usize, out: &mut Vec<u8>) -> bool {
    out.clear();
    let differs = |word: usize| {
        let at = word * WORD..(word + 1) * WORD;
        old[at.clone()] != new[at]
    };
    let mut word = 0;
    while word < WORDS {
        // Most of a page is the same: skip that in larger steps.
        let block = word * WORD..((word + 8) * WORD).min(PAGE_SIZE);
        if word.is_multiple_of(8) && old[block.clone()] == new[block] {
            word += 8;
            continue;
        }
        if !differs(word) {
            word += 1;
            continue;
        }
        let first = word;
        while word < WORDS && differs(word) {
            word += 1;
        }
        if out.len() + 4 + (word - first) * WORD > limit {
            return false;
        }
        out.extend_from_slice(&(first as u16).to_le_bytes());
        out.extend_from_slice(&((word - first) as u16).to_le_bytes());
        out.extend_from_slice(&new[first * WORD..word * WORD]);
    }
    !out.is_empty()
}

/// Makes the new version of the old one.
///
/// # Errors
/// [`DamagedDelta`]; the page may then be partly changed.
pub fn apply(page: &mut PageBytes, mut delta: &[u8]) -> Result<(), DamagedDelta> {
    let mut free = 0;
    while let Some((head, rest)) = delta.split_first_chunk::<4>() {
        let first = usize::from(u16::from_le_bytes([head[0], head[1]]));
        let count = usize::from(u16::from_le_bytes([head[2], head[3]]));
        if first < free || count == 0 {
            return Err(DamagedDelta);
        }
        let words = page.get_mut(first * WORD..(first + count) * WORD).ok_or(DamagedDelta)?;
        let (bytes, rest) = rest.split_at_checked(count * WORD).ok_or(DamagedDelta)?;
        words.copy_from_slice(bytes);
        // Two runs that touch would be one.
        free = first + count + 1;
        delta = rest;
    }
    if delta.is_empty() { Ok(()) } else { Err(DamagedDelta) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn golden_bytes() {
        let (old, mut new, mut out) = ([0; PAGE_SIZE], [0; PAGE_SIZE], Vec::new());
        assert!(!encode(&old, &new, 100, &mut out));
        new[8] = 7;
        new[4095] = 9;
        assert!(encode(&old, &new, 100, &mut out));
        assert_eq!(out, [1, 0, 1, 0, 7, 0, 0, 0, 0, 0, 0, 0, 255, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        assert!(!encode(&old, &new, 23, &mut out));
    }

    #[test]
    fn truncation_at_every_byte_is_refused_except_between_runs() {
        let delta = [1, 0, 1, 0, 7, 0, 0, 0, 0, 0, 0, 0, 255, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 9];
        for end in 0..=delta.len() {
            let result = apply(&mut [0; PAGE_SIZE], &delta[..end]);
            assert_eq!(result.is_ok(), [0, 12, 24].contains(&end), "cut at {end}");
        }
    }

    #[test]
    fn runs_outside_the_page_or_out_of_order_are_refused() {
        let run = |first: u16, count: u16| {
            let mut run = [first.to_le_bytes(), count.to_le_bytes()].concat();
            run.resize(4 + usize::from(count) * WORD, 1);
            run
        };
        assert_eq!(apply(&mut [0; PAGE_SIZE], &run(511, 1)), Ok(()));
        for delta in [run(511, 2), run(512, 1), run(65_535, 1), run(0, 0), run(0, 513)] {
            assert_eq!(apply(&mut [0; PAGE_SIZE], &delta), Err(DamagedDelta));
        }
        for second in [0, 4, 5] {
            let delta = [run(3, 2), run(second, 1)].concat();
            assert_eq!(apply(&mut [0; PAGE_SIZE], &delta), Err(DamagedDelta), "{second}");
        }
        assert_eq!(apply(&mut [0; PAGE_SIZE], &[run(3, 2), run(6, 1)].concat()), Ok(()));
    }

    proptest! {
        #[test]
        fn a_delta_makes_the_new_page_of_the_old_one(
            seed in any::<u8>(),
            writes in prop::collection::vec((0usize..PAGE_SIZE, 1usize..200, any::<u8>()), 0..12),
        ) {
            let old: PageBytes = std::array::from_fn(|at| (at as u8).wrapping_mul(seed));
            let mut new = old;
            for (at, length, value) in writes {
                let end = (at + length).min(PAGE_SIZE);
                new[at..end].fill(value);
            }
            let mut out = Vec::new();
            let fits = encode(&old, &new, PAGE_SIZE * 2, &mut out);
            prop_assert_eq!(fits, old != new);
            let mut page = old;
            prop_assert_eq!(apply(&mut page, &out), Ok(()));
            prop_assert!(page == new);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = apply(&mut [0; PAGE_SIZE], &bytes);
        }
    }
}

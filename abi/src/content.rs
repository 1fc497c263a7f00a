//! What `dirty` fills memory with: pages like those of real machines, the same on every run.
//!
//! A mixed page is made of runs: zeros, text, random words, and copies of random words elsewhere, of which real
//! memory has many. The shares were tuned so that 64 MiB as one piece compress to 21.7 MB by zstd at level 1 and
//! to 25.9 MB by lz4 (page by page 28.0 and 28.5 MB); to measure again, compress the pages 0 to 16,383.

use crate::stream::finalise;

/// Words of a page.
pub const PAGE_WORDS: usize = 512;

/// Kinds of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// 56 % zero bytes, the rest text and random words; 3 % of the pages all zero.
    Mixed,
    /// Zeros.
    Zero,
    /// Random words.
    Random,
}

impl Content {
    /// The content of that name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "mixed" => Some(Self::Mixed),
            "zero" => Some(Self::Zero),
            "random" => Some(Self::Random),
            _ => None,
        }
    }
}

/// A number's fixed, well-spread image.
#[must_use]
pub const fn mix(number: u64) -> u64 {
    finalise(number.wrapping_add(0x9e37_79b9_7f4a_7c15))
}

/// The page rewritten at a turn, of the first `set`. Each turn is mixed, so that the order has no pattern a tracker
/// could follow.
#[must_use]
pub const fn turn_page(turn: u64, set: u64) -> u64 {
    mix(turn) % set
}

/// Where the `word`th word rewritten at a turn is in its page, and what it becomes.
#[must_use]
pub const fn turn_word(turn: u64, word: u64) -> (usize, u64) {
    (mix(turn ^ word << 40) as usize % PAGE_WORDS, mix(turn.wrapping_mul(31) ^ word))
}

/// Pages of a thousand that are all zero.
const ZERO_PAGES: u64 = 30;
/// Shares of the runs in the other pages, of a thousand.
const ZERO_RUNS: u64 = 632;
const TEXT_RUNS: u64 = 168;
/// Runs of 1,024 that repeat random words of a page before, too far away for lz4 to see and near enough for zstd.
const COPIES: u64 = 140;
/// Pages between two such copies.
const COPY_DISTANCE: u64 = 24;
/// Words of a text, of sixteen, that are no common ones but names and numbers.
const NAMES: u64 = 4;
/// Words of a run.
const RUN: usize = 32;

/// Words of text, eight letters each with their space.
const WORDS: [&[u8; 8]; 64] = [
    b"machine ",
    b"follows ",
    b"the user",
    b" of all ",
    b"network ",
    b"packet: ",
    b"address ",
    b"pointer ",
    b"struct {",
    b"return 0",
    b";\n    if",
    b" (value ",
    b"!= null)",
    b" {\n     ",
    b"length =",
    b" count; ",
    b"<p>Some ",
    b"text</p>",
    b"href=\"/i",
    b"ndex.htm",
    b"class=\"m",
    b"content-",
    b"error: n",
    b"ot found",
    b"2026-01-",
    b"info: st",
    b"arted in",
    b" 12 ms\n ",
    b"\"name\": ",
    b"\"value\":",
    b"[1, 2, 3",
    b"], true ",
    b"kernel: ",
    b"memory a",
    b"t page 0",
    b"x0040100",
    b"session ",
    b"closed b",
    b"y remote",
    b" host,  ",
    b"and then",
    b" another",
    b" line is",
    b" written",
    b" to the ",
    b"journal ",
    b"because ",
    b"it was  ",
    b"public s",
    b"tatic vo",
    b"id main(",
    b"String[]",
    b" args) {",
    b"printf(\"",
    b"%s\\n\", n",
    b"ame);\n  ",
    b"for (int",
    b" i = 0; ",
    b"i < n; +",
    b"+i) {\n  ",
    b"sum += a",
    b"[i];\n   ",
    b"}\n else ",
    b"continue",
];

/// Fills page number `page`.
pub fn fill_page(content: Content, page: u64, words: &mut [u64; PAGE_WORDS]) {
    let seed = mix(page ^ 0x6b61_6765 << 32);
    match content {
        Content::Zero => words.fill(0),
        Content::Random => {
            for (index, word) in words.iter_mut().enumerate() {
                *word = mix(seed ^ index as u64);
            }
        }
        Content::Mixed if seed % 1000 < ZERO_PAGES => words.fill(0),
        Content::Mixed => {
            for (run, words) in words.chunks_mut(RUN).enumerate() {
                let own = mix(seed.wrapping_add(run as u64));
                let again = mix((page % COPY_DISTANCE) << 8 | run as u64);
                fill_run(if own >> 32 & 0x3ff < COPIES { again | 1 << 63 } else { own & !(1 << 63) }, words);
            }
        }
    }
}

/// Eight letters as rare words have them.
fn name(pick: u64) -> u64 {
    const LETTERS: &[u8; 32] = b"eeetaoinshrdlucmfwypvbgkjq0123 _";
    let letter = |at: usize| LETTERS[(pick >> (5 * at) & 31) as usize];
    u64::from_le_bytes(core::array::from_fn(letter))
}

fn fill_run(seed: u64, words: &mut [u64]) {
    match seed % 1000 {
        share if seed >> 63 == 0 && share < ZERO_RUNS => words.fill(0),
        share if seed >> 63 == 0 && share < ZERO_RUNS + TEXT_RUNS => {
            for (index, word) in words.iter_mut().enumerate() {
                let pick = mix(seed ^ (index as u64) << 32);
                *word = if pick >> 60 < NAMES {
                    name(pick)
                } else {
                    u64::from_le_bytes(*WORDS[(pick % WORDS.len() as u64) as usize])
                };
            }
        }
        _ => {
            for (index, word) in words.iter_mut().enumerate() {
                *word = mix(seed ^ index as u64);
            }
        }
    }
}

//! What the guest does in ring 3: it keeps a heartbeat, and rewrites words as Kage's `dirty` does.
//!
//! The same pages in the same order, the same words, the same debt that is forgiven; the clock is the processor's own
//! counter. A beat is noted when a quarter of a millisecond has gone by since the last, as Kage's kernel does; the
//! guest looks after every page. It never idles, since a machine monitor that is to wake it up would add to its gaps.
//!
//! Gaps are kept by *slots* of time, so that what was before a move can be told from what belongs to it.

use iced_x86::{IcedError, code_asm::*};
use kage_abi::{
    DOOR_INTERVAL_NS, HEARTBEAT_INTERVAL_NS,
    content::{PAGE_WORDS, turn_page, turn_word},
};

use super::firmware::{FIGURES, ORDERS, PAGES, SLOTS};

/// Slots there are; the last one takes all that comes later.
pub const SLOT_COUNT: u64 = 4096;
/// Length of a slot.
const SLOT_NS: u64 = 50_000_000;
/// Words rewritten in a page.
const WORDS: u32 = 8;
/// Rewriting that was missed and is made up for, as in `dirty`.
const DEBT: u64 = 2_000;
/// Constants of splitmix64, as in [`kage_abi::content::mix`].
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
const FIRST: u64 = 0xbf58_476d_1ce4_e5b9;
const SECOND: u64 = 0x94d0_49bb_1331_11eb;

/// Where figures are, from [`FIGURES`] on, in bytes.
const BEATS: i32 = 0;
const LAST: i32 = 8;
const BEGAN: i32 = 16;
const TURNS: i32 = 24;

/// What it is to do, in ticks of its clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// Ticks of a second.
    pub ticks_per_second: u64,
    /// Pages rewritten a second; zero if there are none to rewrite.
    pub rate: u64,
    /// Pages that are rewritten: the first ones.
    pub working_set: u64,
}

impl Orders {
    /// Ticks of so many nanoseconds.
    fn ticks(&self, nanoseconds: u64) -> u64 {
        (u128::from(self.ticks_per_second) * u128::from(nanoseconds) / 1_000_000_000) as u64
    }

    /// Ticks of a slot.
    pub fn slot_ticks(&self) -> u64 {
        self.ticks(SLOT_NS).max(1)
    }

    /// As they are in the guest's memory.
    pub fn words(&self) -> [u64; 7] {
        [
            self.ticks_per_second.max(1),
            self.rate,
            self.working_set.max(1),
            self.ticks(HEARTBEAT_INTERVAL_NS),
            self.ticks(DOOR_INTERVAL_NS),
            DEBT.max(self.rate / 100),
            self.slot_ticks(),
        ]
    }
}

/// An order's place in memory, by its number in [`Orders::words`].
fn order(number: i32) -> AsmMemoryOperand {
    qword_ptr(r13 + number * 8)
}

/// The program, to run at `address`.
///
/// `r8` is now, `r9` the last beat, `r10` the pages rewritten, `r11` those and the ones forgiven, `r12` the start.
///
/// # Errors
/// None: the code is the same each time.
pub fn assemble(address: u64) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut look = a.create_label();
    let mut work = a.create_label();
    let mut idle = a.create_label();
    let mut back = a.create_label();
    a.mov(r13d, ORDERS as u32)?;
    a.mov(r14d, FIGURES as u32)?;
    read_clock(&mut a, r9)?;
    a.mov(r12, r9)?;
    a.mov(qword_ptr(r14 + BEGAN), r9)?;
    a.xor(r10d, r10d)?;
    a.xor(r11d, r11d)?;

    a.set_label(&mut look)?;
    read_clock(&mut a, r8)?;
    a.mov(rdi, r8)?;
    a.sub(rdi, r9)?;
    a.js(back)?;
    a.cmp(rdi, order(3))?;
    a.jb(work)?;
    beat(&mut a)?;

    a.set_label(&mut work)?;
    owed(&mut a, idle)?;
    rewrite(&mut a)?;
    a.inc(r10)?;
    a.inc(r11)?;
    a.mov(qword_ptr(r14 + TURNS), r10)?;
    a.jmp(look)?;

    a.set_label(&mut idle)?;
    a.pause()?;
    a.jmp(look)?;

    // The clock may have been set back by a move to another processor.
    a.set_label(&mut back)?;
    a.mov(r9, r8)?;
    a.jmp(work)?;
    a.assemble(address)
}

/// Puts the time into a register.
fn read_clock(a: &mut CodeAssembler, into: AsmRegister64) -> Result<(), IcedError> {
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.mov(into, rax)
}

/// Notes a beat after a gap of `rdi`.
fn beat(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut shorter = a.create_label();
    let mut quick = a.create_label();
    a.mov(rax, r8)?;
    a.sub(rax, r12)?;
    a.xor(edx, edx)?;
    a.div(order(6))?;
    a.mov(ecx, (SLOT_COUNT - 1) as u32)?;
    a.cmp(rax, rcx)?;
    a.cmova(rax, rcx)?;
    a.shl(rax, 4)?;
    a.lea(rcx, qword_ptr(rax + SLOTS as i32))?;
    a.cmp(rdi, qword_ptr(rcx))?;
    a.jbe(shorter)?;
    a.mov(qword_ptr(rcx), rdi)?;
    a.set_label(&mut shorter)?;
    a.cmp(rdi, order(4))?;
    a.jbe(quick)?;
    a.sub(rdi, order(3))?;
    a.add(qword_ptr(rcx + 8), rdi)?;
    a.set_label(&mut quick)?;
    a.mov(r9, r8)?;
    a.mov(qword_ptr(r14 + LAST), r8)?;
    a.inc(qword_ptr(r14 + BEATS))
}

/// Goes on if a page is due, and forgives what is too much to make up for.
fn owed(a: &mut CodeAssembler, otherwise: CodeLabel) -> Result<(), IcedError> {
    let mut little = a.create_label();
    a.mov(rax, r8)?;
    a.sub(rax, r12)?;
    a.mul(order(1))?;
    a.div(order(0))?;
    a.sub(rax, r11)?;
    a.jle(otherwise)?;
    a.sub(rax, order(5))?;
    a.jle(little)?;
    a.add(r11, rax)?;
    a.set_label(&mut little)
}

/// Rewrites the page that is `r10`'s turn, as [`rewritten`] does.
fn rewrite(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut word = a.create_label();
    a.mov(rax, r10)?;
    mix(a)?;
    a.xor(edx, edx)?;
    a.div(order(2))?;
    a.shl(rdx, 12)?;
    a.lea(rsi, qword_ptr(rdx + PAGES as i32))?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut word)?;
    a.mov(rax, rcx)?;
    a.shl(rax, 40)?;
    a.xor(rax, r10)?;
    mix(a)?;
    a.and(eax, 511)?;
    a.lea(rdi, qword_ptr(rsi + rax * 8))?;
    a.imul_3(rax, r10, 31)?;
    a.xor(rax, rcx)?;
    mix(a)?;
    a.mov(qword_ptr(rdi), rax)?;
    a.inc(ecx)?;
    a.cmp(ecx, WORDS as i32)?;
    a.jb(word)
}

/// What memory becomes after so many turns; `pages` as it was filled.
pub fn rewritten(pages: &mut [u8], orders: &Orders, turns: u64) {
    for turn in 0..turns {
        let page = turn_page(turn, orders.working_set) as usize * PAGE_WORDS;
        for word in 0..u64::from(WORDS) {
            let (at, becomes) = turn_word(turn, word);
            let first = (page + at) * 8;
            pages[first..first + 8].copy_from_slice(&becomes.to_le_bytes());
        }
    }
}

/// [`kage_abi::content::mix`] of `rax`, by way of `rdx` and `rbx`.
fn mix(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rbx, GAMMA)?;
    a.add(rax, rbx)?;
    for (shift, factor) in [(30, FIRST), (27, SECOND)] {
        a.mov(rdx, rax)?;
        a.shr(rdx, shift)?;
        a.xor(rax, rdx)?;
        a.mov(rbx, factor)?;
        a.imul_2(rax, rbx)?;
    }
    a.mov(rdx, rax)?;
    a.shr(rdx, 31)?;
    a.xor(rax, rdx)
}

#[cfg(test)]
mod tests {
    use kage_abi::content::mix;

    use super::*;

    const ORDERS: Orders = Orders { ticks_per_second: 2_000_000_000, rate: 500_000, working_set: 30 };

    #[test]
    fn orders_are_in_ticks() {
        assert_eq!(ORDERS.words(), [2_000_000_000, 500_000, 30, 500_000, 2_000_000, 5_000, 100_000_000]);
        // Nothing divides by zero, whatever is left out.
        let none = Orders::default().words();
        assert!([none[0], none[2], none[6]].iter().all(|divisor| *divisor > 0));
    }

    #[test]
    fn memory_is_rewritten_turn_by_turn() {
        let mut pages = vec![0; 30 * PAGE_WORDS * 8];
        rewritten(&mut pages, &ORDERS, 1);
        let words: Vec<u64> =
            pages.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
        let page = mix(0) as usize % 30 * PAGE_WORDS;
        assert_eq!(words[page + mix(3 << 40) as usize % PAGE_WORDS], mix(3));
        assert_eq!(words.iter().filter(|word| **word != 0).count(), 8);
        assert!(
            words.iter().enumerate().all(|(at, word)| *word == 0 || at / PAGE_WORDS * PAGE_WORDS == page)
        );
    }
}

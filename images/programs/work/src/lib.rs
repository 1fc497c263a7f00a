//! Work to measure processors with, and [`files`] with: the same source runs in a process of a machine and natively on its
//! host.
//!
//! Each function does `rounds` of its work on data of its own and returns a number that depends on all of it, so that
//! nothing can be left out and both sides can be compared.

pub mod files;

/// A kind of work.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// What it is called.
    pub name: &'static str,
    /// Rounds that take about a second.
    pub rounds: u32,
    /// Does it.
    pub run: fn(u32) -> u64,
}

/// Every kind.
pub const ALL: [Work; 4] = [
    Work { name: "sha256", rounds: 1_000, run: sha256 },
    Work { name: "n-body", rounds: 4_000_000, run: n_body },
    Work { name: "sort", rounds: 120, run: sort },
    Work { name: "byte-code", rounds: 18_000_000, run: byte_code },
];

/// A sequence that looks random: xorshift64* (Vigna, 2016).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// The first 32 bits of the fractional parts of the `root`th roots of the first primes (FIPS 180-4 §4.2.2, §5.3.3).
const fn fractions<const N: usize>(cube: bool) -> [u32; N] {
    let (mut found, mut candidate) = ([0; N], 2u128);
    let mut count = 0;
    while count < N {
        let mut divisor = 2;
        while divisor * divisor <= candidate && candidate % divisor != 0 {
            divisor += 1;
        }
        if divisor * divisor > candidate {
            // The root times 2³², by bisection on integers.
            let (mut low, mut high) = (0u128, 1 << 40);
            while high - low > 1 {
                let middle = (low + high) / 2;
                let (power, wanted) = if cube {
                    (middle * middle * middle, candidate << 96)
                } else {
                    (middle * middle, candidate << 64)
                };
                if power <= wanted { low = middle } else { high = middle }
            }
            found[count] = low as u32;
            count += 1;
        }
        candidate += 1;
    }
    found
}

const K: [u32; 64] = fractions(true);
const START: [u32; 8] = fractions(false);

/// SHA-256 (FIPS 180-4 §6.2.2) of 64 KiB, over and over.
pub fn sha256(rounds: u32) -> u64 {
    let mut numbers = Numbers(1);
    let data: Vec<u8> = (0..64 << 10).map(|_| numbers.next() as u8).collect();
    let mut state = START;
    for _ in 0..rounds {
        for block in data.chunks_exact(64) {
            compress(&mut state, block);
        }
    }
    u64::from(state[0]) << 32 | u64::from(state[7])
}

fn compress(state: &mut [u32; 8], block: &[u8]) {
    let mut words = [0u32; 64];
    for (word, bytes) in words.iter_mut().zip(block.chunks_exact(4)) {
        *word = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    for at in 16..64 {
        let (a, b) = (words[at - 15], words[at - 2]);
        let low = a.rotate_right(7) ^ a.rotate_right(18) ^ a >> 3;
        let high = b.rotate_right(17) ^ b.rotate_right(19) ^ b >> 10;
        words[at] = words[at - 16].wrapping_add(low).wrapping_add(words[at - 7]).wrapping_add(high);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for (word, constant) in words.iter().zip(K) {
        let choice = e & f ^ !e & g;
        let sum = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let first = h.wrapping_add(sum).wrapping_add(choice).wrapping_add(constant).wrapping_add(*word);
        let majority = a & b ^ a & c ^ b & c;
        let second = (a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22)).wrapping_add(majority);
        (h, g, f, e) = (g, f, e, d.wrapping_add(first));
        (d, c, b, a) = (c, b, a, first.wrapping_add(second));
    }
    for (old, new) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *old = old.wrapping_add(new);
    }
}

/// Position, velocity and mass of a body.
#[derive(Clone, Copy)]
struct Body {
    at: [f64; 3],
    speed: [f64; 3],
    mass: f64,
}

/// Five bodies that attract each other, one step of time a round.
pub fn n_body(rounds: u32) -> u64 {
    let mut numbers = Numbers(2);
    let mut part = || (numbers.next() >> 11) as f64 / (1u64 << 53) as f64;
    let mut bodies = [(); 5].map(|()| Body {
        at: [part() * 30.0, part() * 30.0, part() * 30.0],
        speed: [part() - 0.5, part() - 0.5, part() - 0.5],
        mass: part(),
    });
    for _ in 0..rounds {
        for first in 0..bodies.len() {
            for second in first + 1..bodies.len() {
                let (a, b) = (bodies[first], bodies[second]);
                let way = [a.at[0] - b.at[0], a.at[1] - b.at[1], a.at[2] - b.at[2]];
                let square = way[0] * way[0] + way[1] * way[1] + way[2] * way[2] + 0.01;
                let force = 0.001 / (square * square.sqrt());
                for axis in 0..3 {
                    bodies[first].speed[axis] -= way[axis] * b.mass * force;
                    bodies[second].speed[axis] += way[axis] * a.mass * force;
                }
            }
        }
        for body in &mut bodies {
            for axis in 0..3 {
                body.at[axis] += 0.001 * body.speed[axis];
            }
        }
    }
    // Rounded: the last bits are nobody's promise.
    bodies.iter().map(|body| (body.at[0] * 1e6) as i64 as u64).fold(0, u64::wrapping_add)
}

/// Sorts 100,000 numbers.
pub fn sort(rounds: u32) -> u64 {
    let mut numbers = Numbers(3);
    let mut sum = 0u64;
    let mut data = vec![0u64; 100_000];
    for _ in 0..rounds {
        data.fill_with(|| numbers.next());
        data.sort_unstable();
        sum = sum.wrapping_mul(31).wrapping_add(data[data.len() / 3]);
    }
    sum
}

/// Instructions of a small machine with a stack.
#[derive(Clone, Copy)]
enum Op {
    Push,
    Load,
    Store,
    Add,
    Multiply,
    Mix,
    Decrement,
    JumpIfNot,
    End,
}

const OPS: [Op; 9] =
    [Op::Push, Op::Load, Op::Store, Op::Add, Op::Multiply, Op::Mix, Op::Decrement, Op::JumpIfNot, Op::End];

/// A loop of ten instructions in byte code, interpreted.
pub fn byte_code(rounds: u32) -> u64 {
    // x = mix(x * 7 + y); y = y + x; until the count is down.
    let code: [u8; 19] = [1, 0, 0, 7, 4, 1, 1, 3, 5, 2, 0, 1, 0, 6, 2, 7, 0, 8, 0];
    let mut variables = [1u64, 2, u64::from(rounds)];
    let mut stack = [0u64; 16];
    let (mut top, mut at) = (0usize, 0usize);
    loop {
        let op = OPS[usize::from(code[at])];
        at += 1;
        match op {
            Op::Push => {
                stack[top & 15] = u64::from(code[at]);
                (top, at) = (top + 1, at + 1);
            }
            Op::Load => {
                stack[top & 15] = variables[usize::from(code[at])];
                (top, at) = (top + 1, at + 1);
            }
            Op::Store => {
                top -= 1;
                variables[usize::from(code[at])] = stack[top & 15];
                at += 1;
            }
            Op::Add => {
                top -= 1;
                stack[(top - 1) & 15] = stack[(top - 1) & 15].wrapping_add(stack[top & 15]);
            }
            Op::Multiply => {
                top -= 1;
                stack[(top - 1) & 15] = stack[(top - 1) & 15].wrapping_mul(stack[top & 15]);
            }
            Op::Mix => {
                let value = stack[(top - 1) & 15];
                stack[(top - 1) & 15] = value ^ value.rotate_left(17) ^ value >> 9;
            }
            Op::Decrement => {
                top -= 1;
                variables[1] = variables[1].wrapping_add(stack[top & 15]);
                let variable = &mut variables[usize::from(code[at])];
                *variable = variable.wrapping_sub(1);
                stack[top & 15] = *variable;
                (top, at) = (top + 1, at + 1);
            }
            Op::JumpIfNot => {
                top -= 1;
                at = if stack[top & 15] == 0 { at + 1 } else { usize::from(code[at]) };
            }
            Op::End => return variables[0] ^ variables[1],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_are_those_of_the_standard() {
        assert_eq!((K[0], K[63]), (0x428a_2f98, 0xc671_78f2));
        assert_eq!((START[0], START[7]), (0x6a09_e667, 0x5be0_cd19));
        let mut state = START;
        // FIPS 180-4, "abc", one block.
        let mut block = [0; 64];
        block[..4].copy_from_slice(b"abc\x80");
        block[63] = 24;
        compress(&mut state, &block);
        assert_eq!((state[0], state[7]), (0xba78_16bf, 0xf200_15ad));
    }

    #[test]
    fn every_kind_of_work_depends_on_its_rounds() {
        for work in ALL {
            assert_ne!((work.run)(3), (work.run)(4), "{}", work.name);
            assert_eq!((work.run)(3), (work.run)(3), "{}", work.name);
        }
    }

    #[test]
    fn the_interpreter_computes_what_its_program_says() {
        let (mut x, mut y) = (1u64, 2u64);
        for _ in 0..100 {
            let value = x.wrapping_mul(7).wrapping_add(y);
            x = value ^ value.rotate_left(17) ^ value >> 9;
            y = y.wrapping_add(x);
        }
        assert_eq!(byte_code(100), x ^ y);
    }
}

//! RSA signature verification, PKCS #1 v1.5 with SHA-256 or SHA-512 (RFC 8017 §8.2.2, RFC 8332).
//!
//! Only verification: nothing here is secret, so nothing needs constant time. The modular power is a Montgomery
//! ladder over 64-bit limbs (Koç, Acar, Kaliski: CIOS). Sizes are capped when the key is parsed.

use alloc::vec;
use alloc::vec::Vec;

/// Moduli below this are factored by hobbyists; OpenSSH wants 1024, NIST 2048.
const MIN_BITS: usize = 2048;
/// Bounds the work of one verification: 2 ms at this size on the development machine's soft-float code.
const MAX_BITS: usize = 8192;

/// An RSA public key whose numbers can be computed with.
#[derive(Clone)]
pub struct RsaKey {
    /// Little-endian limbs, odd, the top one not 0.
    modulus: Vec<u64>,
    exponent: u64,
    /// −modulus⁻¹ mod 2⁶⁴.
    inverse: u64,
    /// Length of the modulus, and so of a signature, in bytes.
    bytes: usize,
}

/// Which hash a signature is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// `rsa-sha2-256`
    Sha256,
    /// `rsa-sha2-512`
    Sha512,
}

impl RsaKey {
    /// Takes big-endian exponent and modulus as an `ssh-rsa` blob holds them; none for a key not to be trusted.
    pub fn new(exponent: &[u8], modulus: &[u8]) -> Option<Self> {
        let exponent = unsigned(exponent)?;
        let modulus = unsigned(modulus)?;
        let bits = modulus.len().checked_mul(8)?.checked_sub(modulus.first()?.leading_zeros() as usize)?;
        if !(MIN_BITS..=MAX_BITS).contains(&bits) || exponent.len() > 8 {
            return None;
        }
        let exponent = exponent.iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let limbs = limbs(modulus, modulus.len().div_ceil(8));
        let lowest = *limbs.first()?;
        if lowest & 1 == 0 || exponent & 1 == 0 || exponent < 3 {
            return None;
        }
        // Newton: each round doubles the number of right bits, from 3 to 96.
        let mut inverse = lowest;
        for _ in 0..5 {
            inverse = inverse.wrapping_mul(2u64.wrapping_sub(lowest.wrapping_mul(inverse)));
        }
        Some(Self { modulus: limbs, exponent, inverse: inverse.wrapping_neg(), bytes: modulus.len() })
    }

    /// Whether `signature` is this key's over a message with the given digest.
    pub fn verify(&self, hash: Hash, digest: &[u8], signature: &[u8]) -> bool {
        if signature.len() > self.bytes {
            return false;
        }
        let signature = limbs(signature, self.modulus.len());
        if !less(&signature, &self.modulus) {
            return false;
        }
        encoded(hash, digest, self.bytes)
            .is_some_and(|expected| limbs(&expected, self.modulus.len()) == self.power(&signature))
    }

    /// `base` to the public exponent, modulo the modulus.
    fn power(&self, base: &[u64]) -> Vec<u64> {
        let base = self.multiply(base, &self.radix_squared());
        let mut result = base.clone();
        for bit in (0..self.exponent.ilog2()).rev() {
            result = self.multiply(&result, &result);
            if self.exponent >> bit & 1 == 1 {
                result = self.multiply(&result, &base);
            }
        }
        let mut one = vec![0; self.modulus.len()];
        if let Some(lowest) = one.first_mut() {
            *lowest = 1;
        }
        self.multiply(&result, &one)
    }

    /// R² mod modulus with R = 2^(64·limbs), by doubling.
    fn radix_squared(&self) -> Vec<u64> {
        let mut value = vec![0; self.modulus.len()];
        if let Some(lowest) = value.first_mut() {
            *lowest = 1;
        }
        for _ in 0..self.modulus.len() * 128 {
            let mut carry = 0;
            for limb in &mut value {
                let next = *limb >> 63;
                *limb = *limb << 1 | carry;
                carry = next;
            }
            if carry == 1 || !less(&value, &self.modulus) {
                subtract(&mut value, &self.modulus);
            }
        }
        value
    }

    /// Montgomery product a·b·R⁻¹ mod modulus.
    fn multiply(&self, a: &[u64], b: &[u64]) -> Vec<u64> {
        let mut value = vec![0u64; self.modulus.len()];
        let mut top = 0u64;
        for digit in a {
            let (sum, carry) = multiply_add(&mut value, b, *digit, top);
            let factor = value.first().copied().unwrap_or(0).wrapping_mul(self.inverse);
            let (sum, over) = {
                let (low, over) = multiply_add(&mut value, &self.modulus, factor, sum);
                (low, carry + over)
            };
            // The lowest limb is now 0: shift down by one limb.
            value.rotate_left(1);
            if let Some(last) = value.last_mut() {
                *last = sum;
            }
            top = over;
        }
        if top != 0 || !less(&value, &self.modulus) {
            subtract(&mut value, &self.modulus);
        }
        value
    }
}

/// `value += factor · other`, then adds `top` to what was carried out; gives that sum's low limb and carry.
fn multiply_add(value: &mut [u64], other: &[u64], factor: u64, top: u64) -> (u64, u64) {
    let mut carry = 0u64;
    for (limb, other) in value.iter_mut().zip(other) {
        let product = u128::from(*other) * u128::from(factor) + u128::from(*limb) + u128::from(carry);
        *limb = product as u64;
        carry = (product >> 64) as u64;
    }
    let (sum, over) = top.overflowing_add(carry);
    (sum, u64::from(over))
}

fn subtract(value: &mut [u64], other: &[u64]) {
    let mut borrow = false;
    for (limb, other) in value.iter_mut().zip(other) {
        let (difference, first) = limb.overflowing_sub(*other);
        let (difference, second) = difference.overflowing_sub(u64::from(borrow));
        *limb = difference;
        borrow = first || second;
    }
}

fn less(a: &[u64], b: &[u64]) -> bool {
    a.iter().rev().lt(b.iter().rev())
}

/// Big-endian bytes to `count` little-endian limbs.
fn limbs(bytes: &[u8], count: usize) -> Vec<u64> {
    let mut limbs: Vec<u64> = bytes
        .rchunks(8)
        .map(|chunk| chunk.iter().fold(0, |limb, byte| limb << 8 | u64::from(*byte)))
        .collect();
    limbs.resize(count.max(limbs.len()), 0);
    limbs
}

/// An mpint's digits without leading zeros; none for a negative one.
fn unsigned(mpint: &[u8]) -> Option<&[u8]> {
    if mpint.first().is_some_and(|top| top & 0x80 != 0) {
        return None;
    }
    let start = mpint.iter().position(|byte| *byte != 0)?;
    mpint.get(start..)
}

/// EMSA-PKCS1-v1_5: `00 01 ff… 00 DigestInfo digest`.
fn encoded(hash: Hash, digest: &[u8], length: usize) -> Option<Vec<u8>> {
    let info: &[u8] = match hash {
        Hash::Sha256 => b"\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20",
        Hash::Sha512 => b"\x30\x51\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x03\x05\x00\x04\x40",
    };
    let filling = length.checked_sub(3 + info.len() + digest.len())?;
    let mut message = vec![0x00, 0x01];
    message.resize(2 + filling, 0xff);
    message.push(0x00);
    message.extend_from_slice(info);
    message.extend_from_slice(digest);
    Some(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_that_protect_nothing_are_refused() {
        let modulus = |bytes: usize| {
            let mut modulus = vec![0xc5; bytes];
            modulus.insert(0, 0);
            modulus
        };
        assert!(RsaKey::new(&[1, 0, 1], &modulus(256)).is_some());
        assert!(RsaKey::new(&[1, 0, 1], &modulus(255)).is_none(), "too short");
        assert!(RsaKey::new(&[1, 0, 1], &modulus(1025)).is_none(), "too long");
        assert!(RsaKey::new(&[1], &modulus(256)).is_none(), "exponent 1");
        assert!(RsaKey::new(&[2], &modulus(256)).is_none(), "even exponent");
        assert!(RsaKey::new(&[], &modulus(256)).is_none(), "no exponent");
        assert!(RsaKey::new(&[1, 0, 1], &[]).is_none(), "no modulus");
        assert!(RsaKey::new(&[1, 0, 1], &vec![0xc5; 256]).is_none(), "negative");
    }

    proptest! {
        /// (2^k)^e mod n with n = 2^2048 − d for small d is computable by hand: 2^(k·e) = 2^(k·e mod 2048)·d^(…).
        #[test]
        fn powers_agree_with_repeated_multiplication(seed: [u8; 32], exponent in 1u64..20) {
            let exponent = exponent * 2 + 1;
            let modulus: Vec<u8> = (0..256).map(|i| seed[i % 32].wrapping_add(i as u8) | u8::from(i == 255) | if i == 0 { 0x80 } else { 0 }).collect();
            let mut positive = vec![0];
            positive.extend(&modulus);
            let key = RsaKey::new(&exponent.to_be_bytes(), &positive).expect("a 2048-bit odd modulus");
            let mut base = limbs(&seed, key.modulus.len());
            base[20] = u64::from_le_bytes(seed[..8].try_into().expect("8"));
            let r2 = key.radix_squared();
            let mont = key.multiply(&base, &r2);
            let mut product = mont.clone();
            for _ in 1..exponent {
                product = key.multiply(&product, &mont);
            }
            let mut one = vec![0; key.modulus.len()];
            one[0] = 1;
            prop_assert_eq!(key.power(&base), key.multiply(&product, &one));
            prop_assert_eq!(key.multiply(&mont, &one), base, "to Montgomery form and back");
        }

        #[test]
        fn verifying_garbage_never_panics(signature in prop::collection::vec(any::<u8>(), 0..300), digest in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut modulus = vec![0xc5; 256];
            modulus.insert(0, 0);
            let key = RsaKey::new(&[1, 0, 1], &modulus).expect("a key");
            prop_assert!(!key.verify(Hash::Sha256, &digest, &signature));
        }
    }
}

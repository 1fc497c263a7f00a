//! CPU baselines: what an image may rely on, so that it can move to any host that has it.
//!
//! The levels are those of the x86-64 psABI (§3.1.1); level 3 is AVX2, BMI and FMA.

use std::arch::x86_64::__cpuid_count;

use kvm_bindings::CpuId;

/// The one baseline of this build.
pub const BASELINE_V3: u8 = 3;

/// XCR0 of every guest: x87, SSE, AVX.
pub const XCR0: u64 = 0b111;

struct Feature {
    leaf: u32,
    /// 0 eax, 1 ebx, 2 ecx, 3 edx.
    register: u8,
    bit: u8,
    name: &'static str,
}

const fn feature(leaf: u32, register: u8, bit: u8, name: &'static str) -> Feature {
    Feature { leaf, register, bit, name }
}

/// What level 3 and the guest's page tables need (SDM vol. 2, CPUID).
const REQUIRED: [Feature; 26] = [
    feature(1, 3, 0, "fpu"),
    feature(1, 3, 8, "cx8"),
    feature(1, 3, 15, "cmov"),
    feature(1, 3, 23, "mmx"),
    feature(1, 3, 24, "fxsr"),
    feature(1, 3, 25, "sse"),
    feature(1, 3, 26, "sse2"),
    feature(1, 2, 0, "sse3"),
    feature(1, 2, 9, "ssse3"),
    feature(1, 2, 12, "fma"),
    feature(1, 2, 13, "cx16"),
    feature(1, 2, 19, "sse4.1"),
    feature(1, 2, 20, "sse4.2"),
    feature(1, 2, 22, "movbe"),
    feature(1, 2, 23, "popcnt"),
    feature(1, 2, 26, "xsave"),
    feature(1, 2, 28, "avx"),
    feature(1, 2, 29, "f16c"),
    feature(7, 1, 3, "bmi1"),
    feature(7, 1, 5, "avx2"),
    feature(7, 1, 8, "bmi2"),
    feature(0x8000_0001, 2, 0, "lahf_lm"),
    feature(0x8000_0001, 2, 5, "lzcnt"),
    feature(0x8000_0001, 3, 20, "nx"),
    feature(0x8000_0001, 3, 29, "lm"),
    feature(1, 3, 6, "pae"),
];

/// Leaves of which a guest sees the baseline and nothing else, so that all hosts look the same to it.
const MASKED_LEAVES: [u32; 3] = [1, 7, 0x8000_0001];

/// Whether this CPU has a feature. Asked of the CPU and not of `KVM_GET_SUPPORTED_CPUID`: ring 3 runs
/// natively under every KVM, and software-virtualised ones list only what their ring 0 emulates.
fn host_has(feature: &Feature) -> bool {
    let highest = __cpuid_count(feature.leaf & 0x8000_0000, 0).eax;
    if feature.leaf > highest {
        return false;
    }
    let leaf = __cpuid_count(feature.leaf, 0);
    [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx][usize::from(feature.register & 3)] & 1 << feature.bit != 0
}

fn register(entry: &mut kvm_bindings::kvm_cpuid_entry2, register: u8) -> &mut u32 {
    match register {
        0 => &mut entry.eax,
        1 => &mut entry.ebx,
        2 => &mut entry.ecx,
        _ => &mut entry.edx,
    }
}

/// Cuts what the host supports down to the baseline.
///
/// # Errors
/// The list of features this host lacks.
pub fn restrict(mut supported: CpuId) -> Result<CpuId, String> {
    let mut missing: Vec<_> =
        REQUIRED.iter().filter(|feature| !host_has(feature)).map(|feature| feature.name).collect();
    let components = supported.as_slice().iter().find(|entry| entry.function == 0xd && entry.index == 0);
    if components.is_none_or(|entry| u64::from(entry.eax) & XCR0 != XCR0) {
        missing.push("avx state");
    }
    if !missing.is_empty() {
        return Err(format!("this CPU lacks features of baseline v3: {}", missing.join(" ")));
    }
    for entry in supported.as_mut_slice() {
        if !MASKED_LEAVES.contains(&entry.function) {
            continue;
        }
        let registers: &[u8] = if entry.function == 7 { &[1, 2, 3] } else { &[2, 3] };
        for &at in registers {
            let mask = if entry.index == 0 {
                REQUIRED
                    .iter()
                    .filter(|feature| feature.leaf == entry.function && feature.register == at)
                    .fold(0, |mask, feature| mask | 1 << feature.bit)
            } else {
                0
            };
            *register(entry, at) = mask;
        }
    }
    Ok(supported)
}

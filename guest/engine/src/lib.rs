//! The settings that compiler and machine share: code compiled by one runs in the other only if they agree on all.
//!
//! ```text
//! compiler (host):  Config::new → configure → compile_for_machine → Engine::precompile_module → bytes
//! machine (guest):  Config::new → configure → run_here + memories of its own → Module::deserialize_raw
//! ```
//! Code has no bounds checks, no fuel and no epochs: a memory is 4 GiB of address space with a guard behind it, every
//! trap but a stack overflow is a fault, and the machine is interrupted from outside. Instructions are those of
//! x86-64-v3 whatever the host that compiles: a machine moves between hosts in mid-computation.
//!
//! Off, and why: garbage collection and exceptions (they need a collector in the machine), threads and shared
//! memories (a machine has one vCPU), 64-bit and several memories (they need bounds checks, or more address space).
#![no_std]

use wasmtime::{Config, Error, ModuleVersionStrategy, WasmFeatures};

/// What compiled code is made for; goes into it, and code that names another is refused. Changes with every setting
/// in this crate and with wasmtime.
pub const ENGINE: &str = "wasmtime-48.0.8/kage-1/x86-64-v3";

/// Target of the code.
pub const TARGET: &str = "x86_64-unknown-none";

/// Address space of a memory, before its guard.
pub const MEMORY_RESERVATION: u64 = 4 << 30;
/// Address space behind a memory where every access faults: an access of a 32-bit index with a constant offset below
/// this needs no check.
pub const MEMORY_GUARD: u64 = 2 << 30;

/// Stack that a program's code may use; checked by every function, so that its overflow is a trap.
pub const WASM_STACK: usize = 512 << 10;

/// CPU features that code uses, as the code generator calls them, and as the machine is asked for them. All are in
/// x86-64-v3, which every host of the site must have. Without SSE4.1 rounding would be calls with a float ABI that
/// this target does not have, and silently wrong.
pub const FEATURES: [(&str, &str); 11] = [
    ("has_sse3", "sse3"),
    ("has_ssse3", "ssse3"),
    ("has_sse41", "sse4.1"),
    ("has_sse42", "sse4.2"),
    ("has_popcnt", "popcnt"),
    ("has_avx", "avx"),
    ("has_avx2", "avx2"),
    ("has_fma", "fma"),
    ("has_bmi1", "bmi1"),
    ("has_bmi2", "bmi2"),
    ("has_lzcnt", "lzcnt"),
];

/// Sets everything that both sides must agree on.
///
/// # Errors
/// The engine knows no [`TARGET`], which no build of it should do.
pub fn configure(config: &mut Config) -> Result<(), Error> {
    config.target(TARGET)?;
    config.module_version(ModuleVersionStrategy::Custom(ENGINE.into()))?;
    config
        .signals_based_traps(true)
        .memory_reservation(MEMORY_RESERVATION)
        .memory_reservation_for_growth(0)
        .memory_guard_size(MEMORY_GUARD)
        .memory_may_move(false)
        .guard_before_linear_memory(false)
        .memory_init_cow(false)
        .table_lazy_init(true)
        .consume_fuel(false)
        .epoch_interruption(false)
        .native_unwind_info(false)
        .generate_address_map(false)
        .debug_info(false)
        .concurrency_support(false)
        .shared_memory(false)
        .relaxed_simd_deterministic(true)
        .max_wasm_stack(WASM_STACK);
    // Whatever the crate's features in this build would have made of them.
    config.wasm_features(WasmFeatures::all(), false);
    config.wasm_features(features(), true);
    Ok(())
}

/// What modules may use; the compiler names by it what a module asks beyond.
#[must_use]
pub const fn features() -> WasmFeatures {
    WasmFeatures::MUTABLE_GLOBAL
        .union(WasmFeatures::FLOATS)
        .union(WasmFeatures::BULK_MEMORY)
        .union(WasmFeatures::EXTENDED_CONST)
        .union(WasmFeatures::MULTI_VALUE)
        .union(WasmFeatures::REFERENCE_TYPES)
        .union(WasmFeatures::RELAXED_SIMD)
        .union(WasmFeatures::SATURATING_FLOAT_TO_INT)
        .union(WasmFeatures::SIGN_EXTENSION)
        .union(WasmFeatures::SIMD)
        .union(WasmFeatures::TAIL_CALL)
}

/// Fixes the instructions that compiled code may use, whatever the compiler itself runs on.
#[cfg(feature = "compiler")]
#[expect(unsafe_code, reason = "the engine trusts its caller to know the target")]
pub fn compile_for_machine(config: &mut Config) {
    for (flag, _) in FEATURES {
        // SAFETY: the machine that runs the code has the feature: it is in the baseline that a host is checked for
        // before it starts or takes a machine.
        unsafe { config.cranelift_flag_enable(flag) };
    }
}

/// Lets the engine run the code of [`TARGET`] here.
///
/// # Safety
/// The CPU has all of [`FEATURES`], and no function that compiled code calls takes or returns floats.
#[expect(unsafe_code, reason = "the engine trusts its caller to know the target")]
pub unsafe fn run_here(config: &mut Config) {
    // SAFETY: the caller's promise.
    unsafe { config.detect_host_feature(has_feature) };
    // SAFETY: the caller's promise.
    unsafe { config.x86_float_abi_ok(true) };
}

fn has_feature(name: &str) -> Option<bool> {
    Some(FEATURES.iter().any(|(_, feature)| *feature == name))
}

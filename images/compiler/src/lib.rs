//! Compiles WebAssembly for a machine, on the host, ahead of time.
//!
//! `module → check → split bulk operations → compile → code`. A pure function of the module and of the engine's
//! settings (crate `kage-engine`, which the machine has too): the same module gives the same bytes on every host.
//!
//! Modules may come from anyone. What is refused is refused with its reason; what the code generator cannot bear
//! (a panic, time or memory without end) is the caller's to contain, by running this in a process with limits.
//! Imports are not looked at: only the machine knows what it offers.

use kage_engine as engine;
use kage_split::split;
use wasmparser::{
    BinaryReaderError, CompositeInnerType, Encoding, ExternalKind, Parser, Payload, TypeRef, Validator,
};

/// Largest module compiled.
pub const MAX_BYTES: usize = 32 << 20;

/// Why a module is not compiled.
#[derive(Debug)]
pub enum CompileError {
    /// More bytes than [`MAX_BYTES`].
    TooLarge,
    /// Other bytes altogether.
    NotWasm,
    /// A component instead of a module.
    Component,
    /// A module that is no program.
    NoStart,
    /// Cut short, malformed, or using what the engine does not offer.
    Invalid(BinaryReaderError),
    /// The code generator refuses it.
    Engine(wasmtime::Error),
}

impl std::error::Error for CompileError {}

impl std::fmt::Display for CompileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TooLarge => write!(f, "too large: more than {} MiB", MAX_BYTES >> 20),
            Self::NotWasm => f.write_str("not a WebAssembly module"),
            Self::Component => f.write_str("a WebAssembly component; build a module, for wasm32-wasip1"),
            Self::NoStart => {
                f.write_str("no program: it exports no function _start without parameters and results")
            }
            Self::Invalid(cause) => {
                write!(f, "not a valid module: {} (at byte {:#x})", cause.message(), cause.offset())
            }
            Self::Engine(cause) => write!(f, "cannot be compiled: {cause:#}"),
        }
    }
}

/// Compiles a module.
///
/// # Errors
/// [`CompileError`].
pub fn compile(wasm: &[u8]) -> Result<Vec<u8>, CompileError> {
    check(wasm)?;
    let split = split(wasm).map_err(CompileError::Invalid)?;
    let mut config = wasmtime::Config::new();
    engine::configure(&mut config).map_err(CompileError::Engine)?;
    engine::compile_for_machine(&mut config);
    let engine = wasmtime::Engine::new(&config).map_err(CompileError::Engine)?;
    engine.precompile_module(&split).map_err(CompileError::Engine)
}

fn check(wasm: &[u8]) -> Result<(), CompileError> {
    if wasm.len() > MAX_BYTES {
        return Err(CompileError::TooLarge);
    }
    if !wasm.starts_with(b"\0asm") {
        return Err(CompileError::NotWasm);
    }
    if let Some(Ok(Payload::Version { encoding: Encoding::Component, .. })) =
        Parser::new(0).parse_all(wasm).next()
    {
        return Err(CompileError::Component);
    }
    Validator::new_with_features(engine::features()).validate_all(wasm).map_err(CompileError::Invalid)?;
    if has_start(wasm).map_err(CompileError::Invalid)? { Ok(()) } else { Err(CompileError::NoStart) }
}

/// Whether a valid module can be started: a function of its own, `() -> ()`, exported as `_start`. The machine would
/// find out only after it has made an instance, for nothing.
fn has_start(wasm: &[u8]) -> Result<bool, BinaryReaderError> {
    let (mut types, mut functions, mut imported, mut start) = (Vec::new(), Vec::new(), 0, None);
    for payload in Parser::new(0).parse_all(wasm) {
        match payload? {
            Payload::TypeSection(section) => {
                for group in section {
                    for ty in group?.into_types() {
                        let plain = match &ty.composite_type.inner {
                            CompositeInnerType::Func(ty) => ty.params().is_empty() && ty.results().is_empty(),
                            _ => false,
                        };
                        types.push(plain);
                    }
                }
            }
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    if matches!(import?.ty, TypeRef::Func(_) | TypeRef::FuncExact(_)) {
                        imported += 1;
                    }
                }
            }
            Payload::FunctionSection(section) => functions = section.into_iter().collect::<Result<_, _>>()?,
            Payload::ExportSection(section) => {
                for export in section {
                    let export = export?;
                    if export.name == "_start" && export.kind == ExternalKind::Func {
                        start = Some(export.index);
                    }
                }
            }
            _ => {}
        }
    }
    let ty = start.and_then(|start: u32| functions.get(start.checked_sub(imported)? as usize));
    Ok(ty.and_then(|ty: &u32| types.get(*ty as usize)) == Some(&true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_started_is_refused() {
        let refused = |wat: &str| match check(&wat::parse_str(wat).unwrap()) {
            Ok(()) => false,
            Err(CompileError::NoStart) => true,
            Err(error) => panic!("{wat}: {error}"),
        };
        assert!(!refused(r#"(module (import "a" "b" (func)) (func (export "_start")))"#));
        for none in [
            "(module)",
            r#"(module (memory 512) (data (i32.const 0) "x"))"#,
            r#"(module (func (export "_start") (param i32)))"#,
            r#"(module (func (export "_start") (result i32) i32.const 1))"#,
            r#"(module (func (export "_initialize")))"#,
            r#"(module (global (export "_start") i32 (i32.const 1)))"#,
            r#"(module (import "a" "b" (func $f)) (export "_start" (func $f)))"#,
        ] {
            assert!(refused(none), "{none}");
        }
    }
}

//! Whether a module is a program.

use wasmparser::{BinaryReaderError, CompositeInnerType, ExternalKind, Parser, Payload, TypeRef};

/// Whether a valid module can be started: a function of its own, `() -> ()`, exported as `_start`. The machine would
/// find out only after it has made an instance, for nothing.
pub fn has_start(wasm: &[u8]) -> Result<bool, BinaryReaderError> {
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
    fn only_a_function_of_its_own_starts_a_module() {
        let starts = |wat: &str| has_start(&wat::parse_str(wat).unwrap()).unwrap();
        assert!(starts(r#"(module (import "a" "b" (func)) (func (export "_start")))"#));
        for none in [
            "(module)",
            r#"(module (memory 512) (data (i32.const 0) "x"))"#,
            r#"(module (func (export "_start") (param i32)))"#,
            r#"(module (func (export "_start") (result i32) i32.const 1))"#,
            r#"(module (func (export "_initialize")))"#,
            r#"(module (global (export "_start") i32 (i32.const 1)))"#,
            r#"(module (import "a" "b" (func $f)) (export "_start" (func $f)))"#,
        ] {
            assert!(!starts(none), "{none}");
        }
    }
}

//! Splitting bulk operations changes nothing that a program can see.
//!
//! Random modules and calls run in an interpreter, as they are and split, and must agree after every call:
//! in its result or trap, and in all of memory.

use kage_split::{PIECE, split};
use proptest::prelude::*;
use wasmi::{Engine, Global, Instance, Module, Mutability, Store, TrapCode, Val};

const PIECE_BYTES: u32 = PIECE.cast_unsigned();
/// Where else something may happen: pages.
const PAGE: u32 = 64 << 10;
/// Longest data segment of the modules here: two are more than is copied in one go.
const SEGMENT: usize = 3 * PAGE as usize + 17;

/// A module with every operation as an export.
#[derive(Clone, Debug)]
struct Shape {
    pages: u32,
    passive: usize,
    active: Vec<(u32, usize)>,
    start: bool,
    base: u32,
}

fn wat(shape: &Shape) -> String {
    let bytes = |seed: usize, length: usize| -> String {
        (0..length).map(|at| format!("\\{:02x}", (at * 7 + seed * 31 + at / 251) & 255)).collect()
    };
    let active: String = shape
        .active
        .iter()
        .enumerate()
        .map(|(seed, (at, length))| {
            format!("(data (i32.add (global.get $base) (i32.const {at})) \"{}\")", bytes(seed, *length))
        })
        .collect();
    let start = if shape.start { "(start $begin)" } else { "" };
    format!(
        r#"(module
            (import "host" "base" (global $base i32))
            (memory (export "memory") {pages} 200)
            (data $passive "{passive}")
            {active}
            {start}
            (func $begin (i32.store8 (i32.const 1) (i32.add (i32.load8_u (i32.const 1)) (i32.const 3))))
            (func (export "fill") (param i32 i32 i32) local.get 0 local.get 1 local.get 2 memory.fill)
            (func (export "copy") (param i32 i32 i32)
                (block $out
                    local.get 0 local.get 1 local.get 2 memory.copy
                    (br_if $out (i32.eqz (local.get 2)))
                    (memory.fill (i32.const 3) (i32.const 9) (i32.const 5))))
            (func (export "init") (param i32 i32 i32) local.get 0 local.get 1 local.get 2 memory.init $passive)
            (func (export "constant") (param i32 i32 i32) local.get 0 local.get 1 i32.const 70000 memory.copy)
            (func (export "small") (param i32 i32 i32) local.get 0 local.get 1 i32.const 1024 memory.copy)
            (func (export "active") (param i32 i32 i32) {first})
            (func (export "drop") (param i32 i32 i32) data.drop $passive)
            (func (export "grow") (param i32 i32 i32)
                (drop (memory.grow (i32.and (local.get 0) (i32.const 3)))))
        )"#,
        pages = shape.pages,
        passive = bytes(99, shape.passive),
        first =
            if shape.active.is_empty() { "" } else { "local.get 0 local.get 1 local.get 2 memory.init 1" },
    )
}

struct Run {
    store: Store<()>,
    instance: Option<Instance>,
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Trap(Option<TrapCode>),
}

impl Run {
    fn new(engine: &Engine, wasm: &[u8], base: u32) -> (Self, Outcome) {
        let module = Module::new(engine, wasm).unwrap();
        let mut store = Store::new(engine, ());
        let base = Global::new(&mut store, Val::I32(base.cast_signed()), Mutability::Const);
        match Instance::new(&mut store, &module, &[base.into()]) {
            Ok(instance) => (Self { store, instance: Some(instance) }, Outcome::Done),
            Err(error) => (Self { store, instance: None }, Outcome::Trap(error.as_trap_code())),
        }
    }

    fn call(&mut self, name: &str, operands: (u32, u32, u32)) -> Outcome {
        let Some(instance) = self.instance else { return Outcome::Trap(None) };
        let function = instance.get_typed_func::<(u32, u32, u32), ()>(&mut self.store, name).unwrap();
        match function.call(&mut self.store, operands) {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Trap(Some(error.as_trap_code().unwrap())),
        }
    }

    fn memory(&mut self) -> Vec<u8> {
        let Some(instance) = self.instance else { return Vec::new() };
        let memory = instance.get_memory(&mut self.store, "memory").unwrap();
        memory.data(&self.store).to_vec()
    }
}

/// Addresses and lengths where something happens: about the ends of memory, segment and pieces, and where 32 bits wrap.
fn operand() -> impl Strategy<Value = u32> {
    let near = |to: u32| (0..9_u32).prop_map(move |by| to.wrapping_add(by).wrapping_sub(4));
    prop_oneof![
        4 => 0..12 * PAGE,
        2 => 0..4 * PIECE_BYTES,
        2 => (0..13_u32).prop_flat_map(move |pages| near(pages * PAGE)),
        2 => (0..4_u32).prop_flat_map(move |pieces| near(pieces * PIECE_BYTES)),
        1 => near(SEGMENT as u32),
        1 => near(0),
        1 => any::<u32>(),
    ]
}

fn shape() -> impl Strategy<Value = Shape> {
    (
        1..12_u32,
        prop_oneof![0..40_usize, SEGMENT - 3..=SEGMENT],
        prop::collection::vec((0..9 * PAGE, prop_oneof![0..100_usize, SEGMENT - 9..=SEGMENT]), 0..4),
        any::<bool>(),
        0..300_u32,
    )
        .prop_map(|(pages, passive, active, start, base)| Shape { pages, passive, active, start, base })
}

fn call() -> impl Strategy<Value = (&'static str, (u32, u32, u32))> {
    let name = prop_oneof![
        4 => Just("fill"), 8 => Just("copy"), 4 => Just("init"), 1 => Just("constant"), 1 => Just("small"),
        1 => Just("active"), 1 => Just("drop"), 1 => Just("grow"),
    ];
    (name, (operand(), operand(), operand()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]
    #[test]
    fn a_split_module_does_what_it_did(shape in shape(), calls in prop::collection::vec(call(), 1..30)) {
        let engine = Engine::default();
        let wasm = wat::parse_str(wat(&shape)).unwrap();
        let changed = split(&wasm).unwrap();
        let (mut before, outcome) = Run::new(&engine, &wasm, shape.base);
        let (mut after, same) = Run::new(&engine, &changed, shape.base);
        prop_assert_eq!(outcome, same, "instantiation");
        prop_assert!(before.memory() == after.memory(), "instantiation");
        for (name, operands) in calls {
            prop_assert_eq!(before.call(name, operands), after.call(name, operands), "{} {:?}", name, operands);
            prop_assert!(before.memory() == after.memory(), "{name} {operands:?}");
        }
    }
}

#[test]
fn no_piece_is_longer_than_allowed() {
    // Every bulk operation left in a split module has a constant length, or stands in an added function behind a test.
    let shape =
        Shape { pages: 9, passive: SEGMENT, active: vec![(0, SEGMENT), (5, SEGMENT)], start: true, base: 0 };
    let wasm = wat::parse_str(wat(&shape)).unwrap();
    let changed = split(&wasm).unwrap();
    let original = bulk_operations(&wasm);
    let left = bulk_operations(&changed);
    assert_eq!(original.len(), 9);
    assert_eq!(original.iter().sum::<usize>(), 7);
    // Of the original functions only the one with a small constant length, and the fill of five bytes.
    assert_eq!(left[..9], [0, 0, 1, 0, 0, 1, 0, 0, 0]);
}

/// Bulk operations per function.
fn bulk_operations(wasm: &[u8]) -> Vec<usize> {
    use wasmparser::{Operator, Parser, Payload};
    let mut functions = Vec::new();
    for payload in Parser::new(0).parse_all(wasm) {
        if let Payload::CodeSectionEntry(body) = payload.unwrap() {
            let bulk = body.get_operators_reader().unwrap().into_iter().filter(|operator| {
                matches!(
                    operator.as_ref().unwrap(),
                    Operator::MemoryFill { .. } | Operator::MemoryCopy { .. } | Operator::MemoryInit { .. }
                )
            });
            functions.push(bulk.count());
        }
    }
    functions
}

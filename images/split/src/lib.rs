//! Splits bulk operations, so that none holds the processor for long.
//!
//! The engine carries out `memory.fill`, `memory.copy` and `memory.init` in one call of the kernel's that nothing
//! interrupts, whatever their length. Here each that may be longer than [`PIECE`] becomes a call of a function added to
//! the module. It fills and copies with vectors, in the program's own code, which can be interrupted anywhere; what a
//! segment holds only the engine can read, so that is copied in pieces. Active data segments of a module with more than
//! [`ACTIVE`] bytes of them become passive ones that a start function copies in the same way.
//!
//! Nothing a program can observe changes. The specification checks the bounds of the whole before the first byte is
//! written: a probe of length zero at the end of each range traps exactly where the whole operation would. Where
//! `address + length` wraps round, the whole operation is carried out as it stands. Copies go downward where the
//! destination lies above the source.
//!
//! Operations on tables are left as they are: a table has few elements, by the machine's bound on it.
//!
//! The rewrite is on bytes: what it does not replace is copied as it was, and functions, types and segments keep their
//! indices, since what is added comes last. Custom sections (names, debugging) are left out. The input must be valid.

use std::{borrow::Cow, collections::BTreeMap, ops::Range};

use wasm_encoder::{
    BlockType, CodeSection, DataSection, Encode as _, Function, InstructionSink, MemArg, Module, RawSection,
    SectionId, StartSection, ValType,
};
use wasmparser::{
    BinaryReaderError, CodeSectionReader, DataKind, DataSectionReader, FunctionBody, Operator, Parser,
    Payload, TypeRef,
};

/// Bytes left to the engine: so few that a program which does nothing else is still found in its own code by every
/// second or third alarm. With pieces of 64 KiB it was not found for seconds.
pub const PIECE: i32 = 1 << 10;

/// Bytes done in a round of a loop: four vectors.
const ROUND: i32 = 64;

/// Bytes of active data segments up to which an instance is filled in one go.
pub const ACTIVE: u64 = 256 << 10;

/// An operation that is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Bulk {
    Fill,
    Copy,
    Init { segment: u32 },
}

impl Bulk {
    /// The operation to split, if `operator` is one: not if `before` it a length that fits a piece was pushed.
    /// Operations on other memories than the first do not occur in a valid module.
    fn of(before: Option<&Operator<'_>>, operator: &Operator<'_>) -> Option<Self> {
        if matches!(before, Some(Operator::I32Const { value: 0..=PIECE })) {
            return None;
        }
        match *operator {
            Operator::MemoryFill { mem: 0 } => Some(Self::Fill),
            Operator::MemoryCopy { dst_mem: 0, src_mem: 0 } => Some(Self::Copy),
            Operator::MemoryInit { data_index, mem: 0 } => Some(Self::Init { segment: data_index }),
            _ => None,
        }
    }

    fn emit(self, code: &mut InstructionSink<'_>) {
        match self {
            Self::Fill => code.memory_fill(0),
            Self::Copy => code.memory_copy(0, 0),
            Self::Init { segment } => code.memory_init(0, segment),
        };
    }

    /// Whether the second operand is an address, moving on with the first.
    fn moves_source(self) -> bool {
        !matches!(self, Self::Fill)
    }
}

/// What a first look at the module found.
#[derive(Default)]
struct Survey<'a> {
    sections: Vec<(u8, Range<usize>)>,
    types: u32,
    imported_functions: u32,
    functions: u32,
    bodies: Vec<FunctionBody<'a>>,
    /// Operations used, with the index of the function that does each.
    used: BTreeMap<Bulk, u32>,
    start: Option<u32>,
    data: Option<DataSectionReader<'a>>,
    data_segments: u32,
    active_bytes: u64,
    has_data_count: bool,
}

impl<'a> Survey<'a> {
    fn of(wasm: &'a [u8]) -> Result<Self, BinaryReaderError> {
        let mut found = Self::default();
        for payload in Parser::new(0).parse_all(wasm) {
            let payload = payload?;
            match &payload {
                Payload::TypeSection(types) => found.types = types.count(),
                Payload::ImportSection(imports) => {
                    for import in imports.clone().into_imports() {
                        if matches!(import?.ty, TypeRef::Func(_) | TypeRef::FuncExact(_)) {
                            found.imported_functions += 1;
                        }
                    }
                }
                Payload::FunctionSection(functions) => found.functions = functions.count(),
                Payload::StartSection { func, .. } => found.start = Some(*func),
                Payload::DataCountSection { .. } => found.has_data_count = true,
                Payload::DataSection(data) => {
                    found.data_segments = data.count();
                    for segment in data.clone() {
                        let segment = segment?;
                        if matches!(segment.kind, DataKind::Active { .. }) {
                            found.active_bytes += segment.data.len() as u64;
                        }
                    }
                    found.data = Some(data.clone());
                }
                Payload::CodeSectionStart { range, .. } => {
                    let section = wasm.get(range.clone()).unwrap_or_default();
                    for body in CodeSectionReader::new(wasmparser::BinaryReader::new(section, range.start))? {
                        found.survey_body(body?)?;
                    }
                }
                _ => {}
            }
            if let Some((id, range)) = payload.as_section()
                && id != SectionId::Custom as u8
            {
                found.sections.push((id, range));
            }
        }
        Ok(found)
    }

    fn survey_body(&mut self, body: FunctionBody<'a>) -> Result<(), BinaryReaderError> {
        let mut operators = body.get_operators_reader()?;
        let mut before = None;
        while !operators.eof() {
            let operator = operators.read()?;
            if let Some(bulk) = Bulk::of(before.as_ref(), &operator) {
                self.used.insert(bulk, 0);
            }
            before = Some(operator);
        }
        self.bodies.push(body);
        Ok(())
    }

    /// Whether active segments are copied by a start function. There is a body to add one to in every program.
    fn starts_with_data(&self) -> bool {
        self.active_bytes > ACTIVE && !self.bodies.is_empty()
    }
}

/// Splits the bulk operations of a valid module.
///
/// # Errors
/// The module cannot be read, which a valid one can.
pub fn split(wasm: &[u8]) -> Result<Vec<u8>, BinaryReaderError> {
    let mut survey = Survey::of(wasm)?;
    let active = match &survey.data {
        Some(data) if survey.starts_with_data() => active_segments(data)?,
        _ => Vec::new(),
    };
    for segment in active.iter().filter(|segment| segment.length > PIECE.cast_unsigned()) {
        survey.used.insert(Bulk::Init { segment: segment.index }, 0);
    }
    let first_added = survey.imported_functions + survey.functions;
    for (added, function) in survey.used.values_mut().enumerate() {
        *function = first_added + added as u32;
    }
    let start_function = first_added + survey.used.len() as u32;
    let mut module = Module::new();
    let mut has_start = active.is_empty();
    for (id, range) in &survey.sections {
        if !has_start && is_after_start(*id) {
            module.section(&StartSection { function_index: start_function });
            has_start = true;
        }
        let old = wasm.get(range.clone()).unwrap_or_default();
        let grown = |added: u32, entries: &[u8]| grow(old, added, entries);
        if *id == SectionId::Type as u8 {
            module.section(&RawSection { id: *id, data: &grown(2, &TYPES)? });
        } else if *id == SectionId::Function as u8 {
            let mut entries = Vec::new();
            for _ in &survey.used {
                survey.types.encode(&mut entries);
            }
            let mut added = survey.used.len() as u32;
            if !active.is_empty() {
                (survey.types + 1).encode(&mut entries);
                added += 1;
            }
            module.section(&RawSection { id: *id, data: &grown(added, &entries)? });
        } else if *id == SectionId::Start as u8 && !active.is_empty() {
            // Replaced; the new one calls it.
        } else if *id == SectionId::Code as u8 {
            if !active.is_empty() && !survey.has_data_count {
                module.section(&wasm_encoder::DataCountSection { count: survey.data_segments });
            }
            module.section(&code(wasm, &survey, &active)?);
        } else if *id == SectionId::Data as u8 && !active.is_empty() {
            module.section(&passive(survey.data.clone())?);
        } else {
            module.section(&RawSection { id: *id, data: old });
        }
    }
    Ok(module.finish())
}

/// `(i32, i32, i32) -> ()` and `() -> ()`.
const TYPES: [u8; 9] = [0x60, 3, 0x7f, 0x7f, 0x7f, 0, 0x60, 0, 0];

/// Order of sections: … start, element, data count, code, data.
fn is_after_start(id: u8) -> bool {
    [SectionId::Start, SectionId::Element, SectionId::DataCount, SectionId::Code, SectionId::Data]
        .iter()
        .any(|later| *later as u8 == id)
}

/// A section that is a vector, with more entries at its end.
fn grow(section: &[u8], added: u32, entries: &[u8]) -> Result<Vec<u8>, BinaryReaderError> {
    let mut reader = wasmparser::BinaryReader::new(section, 0);
    let count = reader.read_var_u32()?;
    let mut grown = Vec::with_capacity(section.len() + entries.len() + 5);
    (count + added).encode(&mut grown);
    grown.extend(section.get(reader.original_position()..).unwrap_or_default());
    grown.extend(entries);
    Ok(grown)
}

fn code(wasm: &[u8], survey: &Survey<'_>, active: &[Active<'_>]) -> Result<CodeSection, BinaryReaderError> {
    let mut code = CodeSection::new();
    for body in &survey.bodies {
        code.raw(&split_body(wasm, body, &survey.used)?);
    }
    for bulk in survey.used.keys() {
        code.function(&pieces(*bulk));
    }
    if !active.is_empty() {
        code.raw(&start(active, &survey.used, survey.start));
    }
    Ok(code)
}

/// The body with calls in place of bulk operations, everything else byte by byte as it was.
fn split_body<'a>(
    wasm: &'a [u8],
    body: &FunctionBody<'_>,
    functions: &BTreeMap<Bulk, u32>,
) -> Result<Cow<'a, [u8]>, BinaryReaderError> {
    let range = body.range();
    let mut replaced = Vec::new();
    let mut copied = range.start;
    let mut operators = body.get_operators_reader()?;
    let mut before = None;
    while !operators.eof() {
        let (operator, at) = operators.read_with_offset()?;
        if let Some(function) = Bulk::of(before.as_ref(), &operator).and_then(|bulk| functions.get(&bulk)) {
            replaced.extend(wasm.get(copied..at).unwrap_or_default());
            InstructionSink::new(&mut replaced).call(*function);
            copied = operators.original_position();
        }
        before = Some(operator);
    }
    let rest = wasm.get(copied..range.end).unwrap_or_default();
    if replaced.is_empty() {
        return Ok(Cow::Borrowed(rest));
    }
    replaced.extend(rest);
    Ok(Cow::Owned(replaced))
}

const TO: u32 = 0;
const FROM: u32 = 1;
const LENGTH: u32 = 2;
const VECTOR: u32 = 3;

/// The function that does `bulk`: parameters as the operation's operands.
fn pieces(bulk: Bulk) -> Function {
    let mut function = Function::new([(1, ValType::V128)]);
    let code = &mut function.instructions();
    code.local_get(LENGTH).i32_const(PIECE).i32_gt_u().if_(BlockType::Empty);
    // An end that wraps round is left to the operation itself.
    end(code, TO).local_get(TO).i32_lt_u();
    if bulk.moves_source() {
        end(code, FROM).local_get(FROM).i32_lt_u().i32_or();
    }
    code.if_(BlockType::Empty);
    operands(code, LENGTH);
    bulk.emit(code);
    code.return_().end();
    // Traps if any byte of it lies outside.
    end(code, TO);
    if bulk.moves_source() {
        end(code, FROM);
    } else {
        code.i32_const(0);
    }
    code.i32_const(0);
    bulk.emit(code);
    match bulk {
        Bulk::Fill => {
            code.local_get(FROM).i8x16_splat().local_set(VECTOR);
            upward(code, ROUND, |code| {
                for part in parts() {
                    code.local_get(TO).local_get(VECTOR).v128_store(part);
                }
            });
        }
        Bulk::Copy => {
            code.local_get(TO).local_get(FROM).i32_gt_u().if_(BlockType::Empty);
            downward(code);
            code.else_();
            upward(code, ROUND, |code| {
                round(code, |code, operand| _ = code.local_get(operand));
                advance(code, FROM, ROUND);
            });
            code.end();
        }
        Bulk::Init { .. } => upward(code, PIECE, |code| {
            operands_of(code, PIECE);
            bulk.emit(code);
            advance(code, FROM, PIECE);
        }),
    }
    code.end();
    operands(code, LENGTH);
    bulk.emit(code);
    code.end();
    function
}

/// Where the vectors of a round lie.
fn parts() -> impl DoubleEndedIterator<Item = MemArg> {
    (0..ROUND.cast_unsigned() / 16).map(|part| MemArg {
        offset: u64::from(part) * 16,
        align: 0,
        memory_index: 0,
    })
}

/// Copies a round: loads all of it before it stores any, so that overlapping ranges do not matter.
fn round(code: &mut InstructionSink<'_>, address: impl Fn(&mut InstructionSink<'_>, u32)) {
    for part in parts() {
        address(code, TO);
        address(code, FROM);
        code.v128_load(part);
    }
    for part in parts().rev() {
        code.v128_store(part);
    }
}

fn advance(code: &mut InstructionSink<'_>, address: u32, bytes: i32) {
    code.local_get(address).i32_const(bytes).i32_add().local_set(address);
}

fn end<'a, 'b>(code: &'a mut InstructionSink<'b>, of: u32) -> &'a mut InstructionSink<'b> {
    code.local_get(of).local_get(LENGTH).i32_add()
}

fn operands(code: &mut InstructionSink<'_>, length: u32) {
    code.local_get(TO).local_get(FROM).local_get(length);
}

fn operands_of(code: &mut InstructionSink<'_>, length: i32) {
    code.local_get(TO).local_get(FROM).i32_const(length);
}

/// `step` after step of so many bytes from the low end, until no more than a piece is left.
fn upward(code: &mut InstructionSink<'_>, bytes: i32, step: impl FnOnce(&mut InstructionSink<'_>)) {
    code.loop_(BlockType::Empty);
    step(code);
    advance(code, TO, bytes);
    code.local_get(LENGTH).i32_const(bytes).i32_sub().local_tee(LENGTH);
    code.i32_const(PIECE).i32_gt_u().br_if(0).end();
}

/// Copies round after round from the high end, until no more than a piece is left.
fn downward(code: &mut InstructionSink<'_>) {
    code.loop_(BlockType::Empty);
    code.local_get(LENGTH).i32_const(ROUND).i32_sub().local_set(LENGTH);
    round(code, |code, operand| _ = end(code, operand));
    code.local_get(LENGTH).i32_const(PIECE).i32_gt_u().br_if(0).end();
}

/// An active data segment.
struct Active<'a> {
    index: u32,
    /// The instructions that compute its address, without the final `end`.
    offset: &'a [u8],
    length: u32,
}

fn active_segments<'a>(data: &DataSectionReader<'a>) -> Result<Vec<Active<'a>>, BinaryReaderError> {
    let mut active = Vec::new();
    for (index, segment) in data.clone().into_iter().enumerate() {
        let segment = segment?;
        if let DataKind::Active { offset_expr, .. } = segment.kind {
            let mut reader = offset_expr.get_binary_reader();
            let length = reader.bytes_remaining();
            let offset = reader.read_bytes(length)?;
            let offset = offset.strip_suffix(&[0x0b]).unwrap_or(offset);
            active.push(Active { index: index as u32, offset, length: segment.data.len() as u32 });
        }
    }
    Ok(active)
}

/// The same segments, all passive.
fn passive(data: Option<DataSectionReader<'_>>) -> Result<DataSection, BinaryReaderError> {
    let mut section = DataSection::new();
    for segment in data.into_iter().flatten() {
        section.passive(segment?.data.iter().copied());
    }
    Ok(section)
}

/// What instantiation would have done: every active segment in order, then the module's own start function.
fn start(active: &[Active<'_>], functions: &BTreeMap<Bulk, u32>, then: Option<u32>) -> Vec<u8> {
    let mut body = vec![0]; // no locals
    for segment in active {
        let bulk = Bulk::Init { segment: segment.index };
        body.extend(segment.offset);
        let mut code = InstructionSink::new(&mut body);
        code.i32_const(0).i32_const(segment.length.cast_signed());
        match functions.get(&bulk) {
            Some(function) => {
                code.call(*function);
            }
            None => bulk.emit(&mut code),
        }
        code.data_drop(segment.index);
    }
    let mut code = InstructionSink::new(&mut body);
    if let Some(function) = then {
        code.call(function);
    }
    code.end();
    body
}

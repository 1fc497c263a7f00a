//! Upcalls: the host interrupts process code and has it call the kernel, to preempt it or because it faulted.
//!
//! ```text
//! process code ──alarm or fault──▶ host: RIP = kage_upcall_entry ──▶ registers onto the process's stack
//!      ▲                                                                     │ handler: may switch stacks,
//!      └─────────────────── registers back, as if nothing had been ──────────┘ or never come back
//! ```
//!
//! Only code in the published ranges is interrupted, never the kernel: so an upcall finds the kernel's state whole
//! and nothing of it borrowed. An upcall takes less than 1,200 bytes of the process's stack for the registers, and
//! then what its handler takes. All vector state the host gives (x87, SSE, AVX) is kept.

use core::{arch::naked_asm, mem::offset_of, ops::Range};

use kage_abi::{BootPage, CODE_RANGES, CodeRange, MEMORY, offset, upcall, window};

use super::{BOOT, Ordering, SERVED};
use crate::local::Local;

/// XSAVE area of x87, SSE and AVX (SDM vol. 1 §13.4): legacy region, header, upper halves.
const XSAVE_BYTES: usize = 512 + 64 + 256;
/// What is saved: state components 0 to 2.
const XSAVE_COMPONENTS: u32 = 0b111;

/// Registers of interrupted code. What the handler changes here is what the code goes on with.
#[repr(C)]
#[derive(Debug)]
pub struct SavedRegisters {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rax: u64,
    pub rflags: u64,
    pub rip: u64,
}

/// Why an upcall comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The code has run long enough.
    Preempt,
    /// An instruction of it faulted.
    Fault {
        /// Exception vector (SDM vol. 3 §6.3.1).
        vector: u32,
        /// Error code, or 0.
        error: u64,
        /// What a page fault touched.
        address: u64,
    },
}

/// One upcall.
pub struct Upcall<'a> {
    /// Why it comes.
    pub kind: Kind,
    /// The code it interrupts.
    pub frame: &'a mut SavedRegisters,
}

static HANDLER: Local<fn(&mut Upcall<'_>)> = Local::new();

/// Names the function that upcalls go to. It runs on the stack of the code it interrupts; when it returns, that code
/// goes on. It may as well leave to another place for good.
pub fn set_handler(handler: fn(&mut Upcall<'_>)) {
    HANDLER.set(handler);
}

/// Publishes the entry. Until ranges of code are published too, there are no upcalls.
pub fn start() {
    set_handler(|upcall| panic!("an upcall without a handler: {:?} at {:#x}", upcall.kind, upcall.frame.rip));
    set_code_ranges(&[]);
    // SAFETY: as in `door`.
    unsafe { (&raw mut (*BOOT).upcall_entry).write_volatile(kage_upcall_entry as *const () as u64) }
}

/// Publishes the code of base programs that upcalls may interrupt, in addition to that in code windows.
///
/// # Panics
/// With more ranges than the boot page has room for.
pub fn set_code_ranges(ranges: &[Range<usize>]) {
    let mut all = [CodeRange::default(); CODE_RANGES];
    all[0] = CodeRange { start: window::CODE, end: window::END };
    for (to, range) in all[1..][..ranges.len()].iter_mut().zip(ranges) {
        *to = CodeRange { start: range.start as u64, end: range.end as u64 };
    }
    // SAFETY: as in `door`.
    unsafe { (&raw mut (*BOOT).code_ranges).write_volatile(all) }
}

/// Where the host continues interrupted code. Nothing but the instruction pointer has changed, which is in the boot
/// page. The addresses fit 32 bits, so they are absolute.
#[unsafe(naked)]
extern "C" fn kage_upcall_entry() {
    naked_asm!(
        "lea rsp, [rsp - 128]",
        "push qword ptr [{rip}]",
        "pushfq",
        "cld",
        "push rax",
        "push rcx",
        "push rdx",
        "push rbx",
        "push rbp",
        "push rsi",
        "push rdi",
        "push r8",
        "push r9",
        "push r10",
        "push r11",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov rbx, rsp",
        "mov rdi, rsp",
        "sub rsp, {xsave}",
        "and rsp, -64",
        // XRSTOR wants the header's unused parts zero, and XSAVE does not write them (SDM vol. 1 §13.7).
        "xor eax, eax",
        "mov [rsp + 512], rax",
        "mov [rsp + 520], rax",
        "mov [rsp + 528], rax",
        "mov [rsp + 536], rax",
        "mov [rsp + 544], rax",
        "mov [rsp + 552], rax",
        "mov [rsp + 560], rax",
        "mov [rsp + 568], rax",
        "mov eax, {components}",
        "xor edx, edx",
        "xsave64 [rsp]",
        "call {handle}",
        "mov eax, {components}",
        "xor edx, edx",
        "xrstor64 [rsp]",
        "mov rsp, rbx",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop r11",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rdi",
        "pop rsi",
        "pop rbp",
        "pop rbx",
        "pop rdx",
        "pop rcx",
        "pop rax",
        "popfq",
        "ret 128",
        rip = const MEMORY + offset::BOOT + offset_of!(BootPage, upcall) as u64
            + offset_of!(kage_abi::Upcall, rip) as u64,
        xsave = const XSAVE_BYTES,
        components = const XSAVE_COMPONENTS,
        handle = sym handle,
    )
}

extern "C" fn handle(frame: &mut SavedRegisters) {
    // SAFETY: as in `door`; the record stays until the next upcall, and none comes while the kernel runs.
    let record = unsafe { (&raw const (*BOOT).upcall).read_volatile() };
    let kind = match record.kind {
        upcall::FAULT => {
            Kind::Fault { vector: record.vector, error: record.error_code, address: record.address }
        }
        _ => {
            SERVED.store(true, Ordering::Relaxed);
            Kind::Preempt
        }
    };
    let handler = *HANDLER.get();
    handler(&mut Upcall { kind, frame });
}

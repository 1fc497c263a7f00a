//! Upcalls: how process code is interrupted, and how its faults reach the guest's kernel.
//!
//! Process code runs in ring 3 like the kernel, in ranges that the kernel publishes. An alarm that finds the vCPU in
//! one, and a fault that comes from one, continue the vCPU at the kernel's entry for upcalls, all other registers as
//! they were; the boot page says why. Anywhere else an alarm leaves word that the kernel has been at work for long
//! enough ([`BootPage::late`]), and a fault ends the machine. An alarm's
//! upcall delivers what a door would, so that the kernel need not knock before it goes on.
//!
//! Nothing here is state: all of it lies in the guest's memory and moves with it.

use kage_abi::{self as abi, BootPage, CodeRange, FaultRecord, Upcall, offset, selector, upcall};
use vm_memory::{Bytes, GuestAddress};

use crate::dirty::GuestMemory;

/// First address that no 48-bit process may use.
const TOP: u64 = 1 << 47;
/// Flags that a process may set for itself: CF PF AF ZF SF DF OF (SDM vol. 1 §3.4.3).
const PROCESS_FLAGS: u64 = 0xcd5;
/// The flag that is always set.
const FIXED_FLAG: u64 = 2;

/// Where a vCPU goes on after a fault of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// The kernel's entry.
    pub rip: u64,
    /// Stack pointer at the fault.
    pub rsp: u64,
    /// Flags at the fault.
    pub rflags: u64,
    /// RAX at the fault, which the stub has overwritten.
    pub rax: u64,
}

fn boot(field: usize) -> GuestAddress {
    GuestAddress(abi::MEMORY + offset::BOOT + field as u64)
}

/// Words of the guest's memory; zeros where there is none.
fn words<const N: usize>(memory: &GuestMemory, at: GuestAddress) -> [u64; N] {
    let mut all = [0; N];
    for (index, word) in all.iter_mut().enumerate() {
        let mut bytes = [0; 8];
        if memory.read_slice(&mut bytes, GuestAddress(at.0 + index as u64 * 8)).is_ok() {
            *word = u64::from_le_bytes(bytes);
        }
    }
    all
}

/// Whether the vCPU is in the stubs that note a fault: it can neither be saved there nor interrupted.
pub fn in_fault_stub(rip: u64) -> bool {
    (abi::KERNEL..abi::PARK).contains(&rip)
}

/// The kernel's entry for upcalls, if code at `rip` may be interrupted by one.
fn entry_for(memory: &GuestMemory, rip: u64) -> Option<u64> {
    let [entry] = words(memory, boot(std::mem::offset_of!(BootPage, upcall_entry)));
    if entry == 0 || entry >= TOP {
        return None;
    }
    const RANGE: usize = size_of::<CodeRange>();
    (0..abi::CODE_RANGES).find_map(|range| {
        let field = std::mem::offset_of!(BootPage, code_ranges) + range * RANGE;
        let [start, end] = words(memory, boot(field));
        (start..end).contains(&rip).then_some(entry)
    })
}

fn write(memory: &GuestMemory, record: Upcall) {
    let mut bytes = [0; size_of::<Upcall>()];
    let mut put = |at: usize, what: &[u8]| bytes[at..at + what.len()].copy_from_slice(what);
    put(std::mem::offset_of!(Upcall, kind), &record.kind.to_le_bytes());
    put(std::mem::offset_of!(Upcall, vector), &record.vector.to_le_bytes());
    put(std::mem::offset_of!(Upcall, rip), &record.rip.to_le_bytes());
    put(std::mem::offset_of!(Upcall, error_code), &record.error_code.to_le_bytes());
    put(std::mem::offset_of!(Upcall, address), &record.address.to_le_bytes());
    // The boot page lies in memory by construction.
    let _ = memory.write_slice(&bytes, boot(std::mem::offset_of!(BootPage, upcall)));
}

/// Interrupts code at `rip`; returns where the vCPU goes on, or `None` when that code is not to be interrupted.
pub fn preempt(memory: &GuestMemory, rip: u64) -> Option<u64> {
    let entry = entry_for(memory, rip)?;
    write(memory, Upcall { kind: upcall::PREEMPT, rip, ..Upcall::default() });
    Some(entry)
}

/// Takes the fault that the stub noted to the kernel; `None` when it is the kernel's own.
pub fn fault(memory: &GuestMemory) -> Option<Continuation> {
    let at = |field: usize| GuestAddress(abi::MEMORY + offset::FAULT + field as u64);
    let word = |field: usize| words::<1>(memory, at(field))[0];
    let rip = word(std::mem::offset_of!(FaultRecord, rip));
    if word(std::mem::offset_of!(FaultRecord, cs)) != u64::from(selector::USER_CODE) {
        return None;
    }
    let entry = entry_for(memory, rip)?;
    write(
        memory,
        Upcall {
            kind: upcall::FAULT,
            vector: u32::try_from(word(std::mem::offset_of!(FaultRecord, vector))).unwrap_or(u32::MAX),
            rip,
            error_code: word(std::mem::offset_of!(FaultRecord, error_code)),
            address: word(std::mem::offset_of!(FaultRecord, address)),
        },
    );
    Some(Continuation {
        rip: entry,
        rsp: word(std::mem::offset_of!(FaultRecord, rsp)),
        rflags: word(std::mem::offset_of!(FaultRecord, rflags)) & PROCESS_FLAGS | FIXED_FLAG,
        rax: word(std::mem::offset_of!(FaultRecord, rax)),
    })
}

//! The machine as seen from ring 3: entry, fault stubs, the boot page, the door, [`upcall`]s.
#![expect(unsafe_code, reason = "entry point, port access and the mailbox shared with the VMM")]

pub mod upcall;

use core::{
    arch::{asm, global_asm},
    sync::atomic::{AtomicBool, Ordering},
};

use kage_abi::{
    BootPage, Config, DOOR_INTERVAL_NS, FaultRecord, HEARTBEAT_INTERVAL_NS, LogRing, MAP_RANGES, MEMORY,
    MapRange, VECTOR_PANIC, call, offset, resources::Resources, status,
};

// Fault stubs run in ring 0 on the exception stack: they note what happened and knock at the door for good. The host
// ends the machine, or takes the vCPU back to ring 3 for an upcall: so they leave all registers but RAX as they were.
global_asm!(
    r#"
    .section .fault_stubs, "ax", @progbits
    .macro fault_stub vector, has_code
        .balign 16
        .if \has_code == 0
            push 0
        .endif
        push \vector
        jmp fault_common
    .endm
    fault_stub 0, 0
    fault_stub 1, 0
    fault_stub 2, 0
    fault_stub 3, 0
    fault_stub 4, 0
    fault_stub 5, 0
    fault_stub 6, 0
    fault_stub 7, 0
    fault_stub 8, 1
    fault_stub 9, 0
    fault_stub 10, 1
    fault_stub 11, 1
    fault_stub 12, 1
    fault_stub 13, 1
    fault_stub 14, 1
    fault_stub 15, 0
    fault_stub 16, 0
    fault_stub 17, 1
    fault_stub 18, 0
    fault_stub 19, 0
    fault_stub 20, 0
    fault_stub 21, 1
    fault_stub 22, 0
    fault_stub 23, 0
    fault_stub 24, 0
    fault_stub 25, 0
    fault_stub 26, 0
    fault_stub 27, 0
    fault_stub 28, 0
    fault_stub 29, 1
    fault_stub 30, 1
    fault_stub 31, 0
    .balign 16

    .section .park, "ax", @progbits
    1:  out {door}, al
        jmp 1b

    .section .fault_common, "ax", @progbits
    fault_common:
        push rax
        mov rax, [rsp + 8]
        mov [{fault} + 0], rax
        mov rax, [rsp + 16]
        mov [{fault} + 8], rax
        mov rax, [rsp + 24]
        mov [{fault} + 16], rax
        mov rax, [rsp + 48]
        mov [{fault} + 24], rax
        mov [{fault} + 32], rbp
        mov rax, [rsp + 40]
        mov [{fault} + 40], rax
        mov rax, cr2
        mov [{fault} + 48], rax
        mov rax, [rsp + 32]
        mov [{fault} + 56], rax
        mov rax, [rsp]
        mov [{fault} + 64], rax
        mov eax, {call}
    2:  out {door}, al
        jmp 2b
    "#,
    door = const kage_abi::DOOR_PORT,
    fault = const MEMORY + offset::FAULT,
    call = const call::FAULT,
);

unsafe extern "C" {
    static kage_heap_start: u8;
}

const BOOT: *mut BootPage = (MEMORY + offset::BOOT) as *mut BootPage;
const RESOURCES: *mut Resources = (MEMORY + offset::RESOURCES) as *mut Resources;

/// What the host said at the last door.
#[derive(Clone, Copy)]
pub struct Mail {
    /// Guest monotonic time in nanoseconds.
    pub now_ns: u64,
    /// Wall clock, nanoseconds since 1970.
    pub wall_ns: u64,
    /// 0 until the first one is given.
    pub generation: u64,
    /// Resumes on another host so far.
    pub moves: u32,
    /// Version of the config page.
    pub config_version: u32,
    /// A heartbeat is wanted.
    pub heartbeat_on: bool,
    /// Round of the heartbeat's figures.
    pub heartbeat_round: u32,
    /// Counts requests to make all files safe.
    pub sync_wanted: u32,
}

/// An upcall has served the machine since it last knocked.
static SERVED: AtomicBool = AtomicBool::new(false);
/// Something was left for the host since then.
static QUEUED: AtomicBool = AtomicBool::new(false);

/// Notes that something waits for the host: the next door is a real one.
pub fn note_queued() {
    QUEUED.store(true, Ordering::Relaxed);
}

/// Knocks: everything queued leaves, everything that arrived is delivered, `deadline_ns` is how long the host
/// may wait for something to arrive (0: not at all).
pub fn door(deadline_ns: u64) -> Mail {
    let served = SERVED.swap(false, Ordering::Relaxed);
    let queued = QUEUED.swap(false, Ordering::Relaxed);
    if deadline_ns == 0 && served && !queued {
        return mail();
    }
    // SAFETY: the boot page is mapped read-write for the machine's whole life and the host touches it only
    // while the vCPU is out of guest mode, which is exactly during the `out`.
    unsafe {
        (&raw mut (*BOOT).deadline_ns).write_volatile(deadline_ns);
        asm!("out {door}, al", door = const kage_abi::DOOR_PORT, in("al") call::KNOCK, options(nostack, preserves_flags));
    }
    mail()
}

/// Has the host interrupt process code, or not, from the next door on: when it has run for as long as two doors may
/// lie apart. Wanted while there is any process, running or not: one that something wakes runs at once.
pub fn set_preempt(on: bool) {
    let beating = mail().heartbeat_on || crate::kernel::pulse_is_on();
    let interval = if beating { HEARTBEAT_INTERVAL_NS } else { DOOR_INTERVAL_NS };
    let micros = if on { (interval / 1000) as u32 } else { 0 };
    // SAFETY: as in `door`.
    unsafe { (&raw mut (*BOOT).preempt_us).write_volatile(micros) }
}

/// Whether an alarm has found the kernel at work since the last door or upcall.
pub fn is_late() -> bool {
    // SAFETY: as in `door`; the host sets it between two runs of the vCPU, whatever code is interrupted by that.
    unsafe { (&raw const (*BOOT).late).read_volatile() != 0 }
}

/// Tells the host of the frame table.
pub fn set_frame_table(at: usize) {
    // SAFETY: as in `door`.
    unsafe { (&raw mut (*BOOT).frame_table).write_volatile(at as u64) }
}

/// Tells the host that no frame below `frame` is mapped in a window.
pub fn set_first_frame(frame: u32) {
    // SAFETY: as in `door`.
    unsafe { (&raw mut (*BOOT).first_frame).write_volatile(frame) }
}

/// Names the frames that [`map`] is to map.
pub fn set_map(ranges: &[MapRange; MAP_RANGES], count: usize) {
    // SAFETY: as in `door`.
    unsafe {
        (&raw mut (*BOOT).map).write_volatile(*ranges);
        (&raw mut (*BOOT).map_count).write_volatile(count as u32);
    }
}

/// Has the host map the frames that were named as the frame table says; false when it has no page for another page
/// table.
pub fn map() -> bool {
    // SAFETY: as in `door`.
    unsafe {
        asm!("out {door}, al", door = const kage_abi::DOOR_PORT, in("al") call::MAP, options(nostack, preserves_flags));
        (&raw const (*BOOT).map_status).read_volatile() == kage_abi::map_status::DONE
    }
}

/// Has the host forget all mappings of windows and make those that the frame table holds; false when it has not
/// enough pages for their page tables.
pub fn rebuild() -> bool {
    // SAFETY: as in `door`.
    unsafe {
        asm!("out {door}, al", door = const kage_abi::DOOR_PORT, in("al") call::REBUILD, options(nostack, preserves_flags));
        (&raw const (*BOOT).map_status).read_volatile() == kage_abi::map_status::DONE
    }
}

/// Reads the mailbox without knocking.
pub fn mail() -> Mail {
    // SAFETY: as in `door`.
    let page = unsafe { BOOT.read_volatile() };
    Mail {
        now_ns: page.now_ns,
        wall_ns: page.wall_ns,
        generation: page.generation,
        moves: page.moves,
        config_version: page.config_version,
        heartbeat_on: page.heartbeat_on != 0,
        heartbeat_round: page.heartbeat_round,
        sync_wanted: page.sync_wanted,
    }
}

/// Sets the status the host sees.
pub fn set_status(status: u32) {
    // SAFETY: as in `door`.
    unsafe { (&raw mut (*BOOT).guest_status).write_volatile(status) }
}

/// Publishes the heartbeat's figures.
pub fn publish_heartbeat(figures: kage_abi::Heartbeat) {
    // SAFETY: as in `door`.
    unsafe { (&raw mut (*BOOT).heartbeat).write_volatile(figures) }
}

/// Answers a request to make all files safe.
pub fn publish_sync(request: u32, status: u32) {
    note_queued();
    // SAFETY: as in `door`.
    unsafe {
        (&raw mut (*BOOT).sync_status).write_volatile(status);
        (&raw mut (*BOOT).sync_done).write_volatile(request);
    }
}

/// Takes the generation's seed and erases it from the mailbox.
pub fn take_seed() -> [u8; 32] {
    // SAFETY: as in `door`.
    unsafe {
        let seed = (&raw const (*BOOT).seed).read_volatile();
        (&raw mut (*BOOT).seed).write_volatile([0; 32]);
        seed
    }
}

/// The config page.
pub fn config() -> &'static Config {
    // SAFETY: mapped for ever, plain bytes for which every pattern is valid, written by the host only before
    // the first generation.
    unsafe { &*((MEMORY + offset::CONFIG) as *const Config) }
}

/// The resources record.
pub fn resources() -> Resources {
    // SAFETY: the record's page is mapped read-write for the machine's whole life, and the host touches it only
    // while the vCPU is out of guest mode.
    unsafe { RESOURCES.read_volatile() }
}

/// Sets the index given out next.
pub fn set_next_index(index: u64) {
    // SAFETY: as in `resources`.
    unsafe { (&raw mut (*RESOURCES).next_index).write_volatile(index) }
}

/// Tells the host where the table that answers request `round` lies. It is to stay there until it is taken.
pub fn publish_resources(round: u32, table: &[u8]) {
    note_queued();
    // SAFETY: as in `resources`.
    unsafe {
        (&raw mut (*RESOURCES).address).write_volatile(table.as_ptr() as u64);
        (&raw mut (*RESOURCES).length).write_volatile(table.len() as u32);
        (&raw mut (*RESOURCES).published).write_volatile(round);
    }
}

/// First and one-past-last address of the memory behind the kernel's data, whole pages.
pub fn free_range() -> (usize, usize) {
    ((&raw const kage_heap_start) as usize, MEMORY as usize + memory_bytes() as usize)
}

/// Bytes of memory the machine has.
pub fn memory_bytes() -> u64 {
    // SAFETY: as in `door`.
    unsafe { (&raw const (*BOOT).memory_bytes).read_volatile() }
}

/// Appends to the log ring.
pub fn log_bytes(text: &[u8]) {
    let ring = (MEMORY + offset::LOG) as *mut LogRing;
    for &byte in text {
        // SAFETY: the ring is mapped for ever, the index is reduced to its size, and nothing else in this
        // single-threaded guest holds a reference to it.
        unsafe {
            let written = (&raw const (*ring).written).read();
            let at = (written % kage_abi::LOG_BYTES as u64) as usize;
            (&raw mut (*ring).text).cast::<u8>().add(at).write(byte);
            (&raw mut (*ring).written).write(written + 1);
        }
    }
}

/// Leaves a panic's message where the host finds it and stops.
pub fn fail(message: &[u8]) -> ! {
    let record = (MEMORY + offset::FAULT) as *mut FaultRecord;
    let (rsp, rbp): (u64, u64);
    let length = message.len().min(kage_abi::PANIC_MESSAGE_MAX);
    // SAFETY: reads two registers.
    unsafe { asm!("mov {0}, rsp", "mov {1}, rbp", out(reg) rsp, out(reg) rbp, options(nomem, nostack)) };
    // SAFETY: the record's page is mapped for ever and nothing refers to it; `length` is capped to its size.
    unsafe {
        (&raw mut (*record).vector).write(VECTOR_PANIC);
        (&raw mut (*record).rip).write(fail as *const () as u64);
        (&raw mut (*record).rsp).write(rsp);
        (&raw mut (*record).rbp).write(rbp);
        (&raw mut (*record).message).cast::<u8>().copy_from_nonoverlapping(message.as_ptr(), length);
        (&raw mut (*record).message_length).write(length as u64);
    }
    set_status(status::FAILED);
    loop {
        door(u64::MAX);
    }
}

/// Where the machine starts: ring 3, stack set by the host, no state.
#[unsafe(no_mangle)]
extern "C" fn kage_start() -> ! {
    crate::kernel::run()
}

//! The contract between guest and VMM: memory map, boot page, door, versions.
//!
//! Layouts are asserted at compile time, so that guest and host cannot drift apart silently; any
//! change of one raises [`ABI_VERSION`].
//!
//! ```text
//!  guest address
//!  0x0100_0000  base slot, read-only, the same sealed file for all images of a host
//!    +0x0000      GDT            (supervisor)
//!    +0x1000      IDT            (supervisor)
//!    +0x2000      TSS with I/O bitmap (supervisor)
//!    +0x3000      index of what follows the kernel (r--), see [`index`]
//!    +0x4000      kernel: fault stubs, park stub, code (r-x), constants (r--)
//!    …            programs of the image (r-x), its files and their index (r--)
//!    …            page tables    (not mapped in the guest)
//!  0x1000_0000  read-write slot: the machine's memory
//!    +0x0_0000    boot page      +0x0_1000  config (4 pages)   +0x0_5000 fault record
//!    +0x0_8000    exception stack (8 KiB, guard below)
//!    +0x1_0000    log ring (64 KiB)
//!    +0x2_1000    stack (256 KiB, guard below)
//!    +0x6_2000    resources record (1 page)
//!    +0x7_0000    .data, .bss, frame table, heap upwards, frames of processes from the end downwards
//!  0xa000_0000  page tables of the windows: the VMM's own, not mapped in the guest, never sent
//!  0xd000_0000  virtio-mmio, one page a device, never backed by memory
//!  0x80_0000_0000  windows: frames of the machine's memory mapped a second time, see [`window`]
//! ```
//!
//! Deliberately not here: anything of virtio that its specification fixes.
#![no_std]

pub mod content;
pub mod index;
pub mod resources;
pub mod stream;

/// Version of everything in this crate; a kernel built for another is refused.
pub const ABI_VERSION: u32 = 3;

/// Bytes in a page.
pub const PAGE: u64 = 4096;

/// First address of the read-only base slot.
pub const BASE: u64 = 0x0100_0000;
/// Largest base slot.
pub const BASE_MAX: u64 = 0x0800_0000;
/// Global descriptor table.
pub const GDT: u64 = BASE;
/// Interrupt descriptor table.
pub const IDT: u64 = BASE + 0x1000;
/// Task state segment; the I/O bitmap starts at [`TSS_IO_MAP`] within it, limit 0xfff.
pub const TSS: u64 = BASE + 0x2000;
/// Offset of the I/O permission bitmap in the TSS.
pub const TSS_IO_MAP: u16 = 0x68;
/// First byte of the kernel's code.
pub const KERNEL: u64 = BASE + 0x4000;
/// Exception vectors that have a stub; stub `n` is at `KERNEL + n * FAULT_STUB_BYTES`.
pub const FAULT_STUBS: u64 = 32;
/// Bytes of one fault stub.
pub const FAULT_STUB_BYTES: u64 = 16;
/// What the stubs run on into: the last code that runs in ring 0.
pub const FAULT_COMMON: u64 = KERNEL + FAULT_STUBS * FAULT_STUB_BYTES;
/// Most bytes of it.
pub const FAULT_COMMON_BYTES: u64 = 0x100;
/// Two instructions that knock at the door for ever and touch no memory: what a shell runs to get warm.
pub const PARK: u64 = FAULT_COMMON + FAULT_COMMON_BYTES;

/// First address of the machine's memory.
pub const MEMORY: u64 = 0x1000_0000;
/// Offsets within the machine's memory.
pub mod offset {
    /// [`super::BootPage`].
    pub const BOOT: u64 = 0;
    /// [`super::Config`].
    pub const CONFIG: u64 = 0x1000;
    /// [`super::FaultRecord`].
    pub const FAULT: u64 = 0x5000;
    /// Low end of the exception stack; the pages below it are absent.
    pub const FAULT_STACK: u64 = 0x8000;
    /// High end of the exception stack.
    pub const FAULT_STACK_TOP: u64 = 0xa000;
    /// [`super::LogRing`].
    pub const LOG: u64 = 0x1_0000;
    /// Low end of the stack; the page below it is absent.
    pub const STACK: u64 = 0x2_1000;
    /// High end of the stack.
    pub const STACK_TOP: u64 = 0x6_1000;
    /// [`super::resources::Resources`].
    pub const RESOURCES: u64 = 0x6_2000;
    /// Bytes kept for it.
    pub const RESOURCES_BYTES: u64 = 0x1000;
    /// Where the kernel's own data starts.
    pub const DATA: u64 = 0x7_0000;
}

/// First guest-physical address of the windows' page tables.
pub const TABLES: u64 = 0xa000_0000;

/// Pages of the windows' page tables that a machine of `memory_bytes` gets: 1/8 of its pages. A process of 256 KiB,
/// the smallest there is any use for, takes three of them.
#[must_use]
pub const fn table_pages(memory_bytes: u64) -> u64 {
    memory_bytes / PAGE / 8
}

/// Windows: virtual space of processes. Any frame of the machine's memory can be mapped at any page of one.
///
/// Each region is whole entries of the root table, which point to fixed pages at [`TABLES`]: entry
/// `window::MEMORY >> 39` to the first of them, and so on.
pub mod window {
    /// First address of all.
    pub const FIRST: u64 = MEMORY;
    /// Linear memories.
    pub const MEMORY: u64 = 1 << 39;
    /// 4 GiB that an index of 32 bits reaches, and as much that an offset of 32 bits adds: no access needs a check.
    pub const MEMORY_STRIDE: u64 = 8 << 30;
    /// How many there are.
    pub const MEMORY_COUNT: u64 = (STACK - MEMORY) / MEMORY_STRIDE;
    /// Stacks.
    pub const STACK: u64 = 17 << 39;
    /// Bytes of one, its guard included.
    pub const STACK_STRIDE: u64 = 4 << 20;
    /// How many there are.
    pub const STACK_COUNT: u64 = (CODE - STACK) / STACK_STRIDE;
    /// Code that arrived after the image was built. The only region whose pages can be executable.
    pub const CODE: u64 = 18 << 39;
    /// Bytes of one.
    pub const CODE_STRIDE: u64 = 256 << 20;
    /// How many there are.
    pub const CODE_COUNT: u64 = (END - CODE) / CODE_STRIDE;
    /// One past the last address of all.
    pub const END: u64 = 19 << 39;
    /// Entries of the root table, and fixed pages at [`super::TABLES`].
    pub const ROOT_ENTRIES: u64 = (END - FIRST) >> 39;
}

/// Entries of the frame table, one for each page of the machine's memory: where it is mapped in a window.
///
/// Bits 12 to 46 are the virtual page; those not named here are 0 in an entry with [`PRESENT`](frame::PRESENT) set,
/// and the guest's own in others.
pub mod frame {
    /// Mapped. The host ignores other entries.
    pub const PRESENT: u64 = 1;
    /// Writable, never together with [`EXECUTABLE`].
    pub const WRITABLE: u64 = 1 << 1;
    /// Executable; in the code region alone.
    pub const EXECUTABLE: u64 = 1 << 2;
    /// The virtual page.
    pub const ADDRESS: u64 = 0x0000_7fff_ffff_f000;
}

/// First address of the virtio-mmio pages.
pub const MMIO: u64 = 0xd000_0000;
/// Devices, in slot order.
pub mod device {
    /// virtio-net.
    pub const NET: usize = 0;
    /// virtio-blk.
    pub const BLOCK: usize = 1;
    /// virtio-rng.
    pub const ENTROPY: usize = 2;
    /// How many there are.
    pub const COUNT: usize = 3;
}

/// Port whose write is the door; the byte written is one of [`call`].
pub const DOOR_PORT: u16 = 0x5a;

/// What is asked for at the door.
pub mod call {
    /// Deliver what arrived, send what is queued, wait, tell the time.
    pub const KNOCK: u8 = 0;
    /// Map the frames of [`BootPage::map`](super::BootPage::map) as the frame table says. Nothing is delivered.
    pub const MAP: u8 = 1;
    /// Forget all mappings of windows and make those that the frame table holds. Nothing is delivered.
    pub const REBUILD: u8 = 2;
    /// From the fault stubs: [`FaultRecord`](super::FaultRecord) is written, the host decides how to go on.
    pub const FAULT: u8 = 3;
}

/// Most [`MapRange`]s of one request.
pub const MAP_RANGES: usize = 32;
/// Most frames of one request.
pub const MAP_FRAMES: u64 = 4096;

/// What became of [`call::MAP`] or [`call::REBUILD`], in [`BootPage::map_status`].
pub mod map_status {
    /// Everything asked for is mapped.
    pub const DONE: u32 = 0;
    /// No page is left for another page table: some of it is not mapped.
    pub const NO_TABLE: u32 = 1;
}

/// Longest time between two doors of a guest with runnable work.
pub const DOOR_INTERVAL_NS: u64 = 1_000_000;
/// The same while a heartbeat is on.
pub const HEARTBEAT_INTERVAL_NS: u64 = 250_000;

/// Selectors of the flat 64-bit segments in the GDT.
pub mod selector {
    /// Supervisor code, used by the fault stubs alone.
    pub const KERNEL_CODE: u16 = 0x08;
    /// Supervisor data.
    pub const KERNEL_DATA: u16 = 0x10;
    /// User data, RPL 3.
    pub const USER_DATA: u16 = 0x1b;
    /// User code, RPL 3.
    pub const USER_CODE: u16 = 0x23;
    /// Task state segment (16 bytes).
    pub const TSS: u16 = 0x28;
}

/// Link-layer address of every guest.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x6b, 0x61, 0x67, 0x65, 0x02];
/// Link-layer address of the gateway on every tap and access-point bridge.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x6b, 0x61, 0x67, 0x65, 0x01];
/// `fe80::1`, the gateway on every tap and access-point bridge.
pub const GATEWAY: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
/// `fe80::2`, every guest's link-local address.
pub const GUEST_LINK_LOCAL: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];

/// `169.254.0.1`, the gateway for IPv4 on every tap and access-point bridge (RFC 3927).
pub const GATEWAY_V4: [u8; 4] = [169, 254, 0, 1];
/// `169.254.0.2`, every guest's link-local IPv4 address, where it has one of its own.
pub const GUEST_LINK_LOCAL_V4: [u8; 4] = [169, 254, 0, 2];

/// What the guest says it is doing, in [`BootPage::guest_status`].
pub mod status {
    /// Setting up devices and heap.
    pub const BOOTING: u32 = 0;
    /// Ready, waiting for its first generation; has drawn no randomness and opened no network.
    pub const AWAITING_GENERATION: u32 = 1;
    /// Serving.
    pub const RUNNING: u32 = 2;
    /// Stopped by a fault or a panic; [`super::FaultRecord`] says why.
    pub const FAILED: u32 = 3;
}

/// First word of a boot page: "kage-abi".
pub const BOOT_MAGIC: u64 = u64::from_le_bytes(*b"kage-abi");

/// The mailbox: first page of the machine's memory. One side writes each field; both sides read it
/// only between two runs of the vCPU, except the logs and counters a daemon shows.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BootPage {
    /// Host: [`BOOT_MAGIC`].
    pub magic: u64,
    /// Host: [`ABI_VERSION`].
    pub abi_version: u32,
    /// Guest: one of [`status`].
    pub guest_status: u32,
    /// Host: bytes of memory.
    pub memory_bytes: u64,
    /// Guest: guest time until which it may sleep; 0 = come back at once, `u64::MAX` = until something arrives.
    pub deadline_ns: u64,
    /// Host, at each door: guest monotonic time.
    pub now_ns: u64,
    /// Host, at each door: wall clock, nanoseconds since 1970.
    pub wall_ns: u64,
    /// Host: changed by every first start, clone and rollback; 0 = none given yet.
    pub generation: u64,
    /// Host: fresh random bytes of this generation. The guest erases them once it has seeded itself.
    pub seed: [u8; 32],
    /// Host: counts changes of [`Config`].
    pub config_version: u32,
    /// Host: counts resumes on another host; the guest then retransmits at once.
    pub moves: u32,
    /// Host: a heartbeat every [`HEARTBEAT_INTERVAL_NS`] is wanted.
    pub heartbeat_on: u32,
    /// Host: changed to start the heartbeat's figures anew.
    pub heartbeat_round: u32,
    /// Guest: figures of the heartbeat.
    pub heartbeat: Heartbeat,
    /// Guest: where an upcall goes; 0 = nowhere yet.
    pub upcall_entry: u64,
    /// Guest: code that upcalls may interrupt. Ranges that end where they start are empty.
    pub code_ranges: [CodeRange; CODE_RANGES],
    /// Host, before each upcall: why it comes.
    pub upcall: Upcall,
    /// Guest: address of the frame table, one word for each page of memory; 0 = none, no window is mapped.
    pub frame_table: u64,
    /// Guest: no frame below this one is mapped, so that the host need not look.
    pub first_frame: u32,
    /// Guest: process code that runs so many microseconds is interrupted; 0 = never.
    pub preempt_us: u32,
    /// Host: one of [`map_status`].
    pub map_status: u32,
    /// Guest: how many of `map` are used.
    pub map_count: u32,
    /// Guest: frames to be mapped. Set before the frame table says where: a host that makes the tables anew while
    /// they have no room for all leaves these out.
    pub map: [MapRange; MAP_RANGES],
    /// Host: 1 from an alarm that interrupted nothing, since the kernel ran, to the next door or upcall: others have
    /// waited for long enough.
    pub late: u32,
    /// Host: counts requests to make all files safe on the disk, before a machine is stopped for good.
    pub sync_wanted: u32,
    /// Guest: the request that `sync_status` answers.
    pub sync_done: u32,
    /// Guest: one of [`sync_status`].
    pub sync_status: u32,
}

/// What became of a request to make files safe, in [`BootPage::sync_status`].
pub mod sync_status {
    /// Everything done before the request is on the disk, or there is no disk.
    pub const DONE: u32 = 0;
    /// The disk failed, or cannot be written; the log says why.
    pub const FAILED: u32 = 1;
}

/// How many [`BootPage::code_ranges`] there are.
pub const CODE_RANGES: usize = 4;

/// Half-open range of code addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CodeRange {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// Kinds of an [`Upcall`].
pub mod upcall {
    /// The process has run for [`preempt_us`](super::BootPage::preempt_us). As at a door, what was queued has left,
    /// what arrived is delivered, and the time is told.
    pub const PREEMPT: u32 = 1;
    /// An instruction of the process faulted.
    pub const FAULT: u32 = 2;
}

/// Why process code was interrupted. All registers but the instruction pointer are as it left them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Upcall {
    /// One of [`upcall`].
    pub kind: u32,
    /// Exception vector of a fault (SDM vol. 3 §6.3.1).
    pub vector: u32,
    /// Interrupted or faulting instruction.
    pub rip: u64,
    /// Error code of a fault.
    pub error_code: u64,
    /// CR2 of a page fault.
    pub address: u64,
}

/// Frames `first` to `first + count`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapRange {
    /// First page of memory.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// Figures of the heartbeat since its round began, in door time.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Heartbeat {
    /// The round these belong to.
    pub round: u32,
    /// Explicit padding.
    pub _pad: u32,
    /// Beats.
    pub beats: u64,
    /// Time of the last beat.
    pub last_ns: u64,
    /// Longest difference between two beats.
    pub longest_ns: u64,
    /// Sum of (difference − interval) over differences above 1 ms.
    pub stall_ns: u64,
}

/// Most bytes of authorised keys an image carries.
pub const AUTHORIZED_KEYS_MAX: usize = 12 << 10;
/// Most bytes of a user's name.
pub const USER_MAX: usize = 64;

/// Identity and network of the image, written by the VMM before the first generation.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    /// The image's own address (its VID).
    pub address: [u8; 16],
    /// Length of the prefix all of whose addresses are the image's.
    pub prefix_length: u8,
    /// Explicit padding.
    pub _pad: u8,
    /// Largest IP packet.
    pub mtu: u16,
    /// Bytes used of `user`.
    pub user_length: u16,
    /// Bytes used of `authorized_keys`.
    pub authorized_keys_length: u16,
    /// Name of the user.
    pub user: [u8; USER_MAX],
    /// Seed of the ed25519 host key.
    pub host_key_seed: [u8; 32],
    /// Lines as in OpenSSH's `authorized_keys`.
    pub authorized_keys: [u8; AUTHORIZED_KEYS_MAX],
    /// The image's IPv4 address; all zeros: none.
    pub ipv4: [u8; 4],
    /// Explicit padding.
    pub _pad2: [u8; 4],
}

impl Config {
    /// The image's IPv4 address, if it has one.
    #[must_use]
    pub fn ipv4(&self) -> Option<[u8; 4]> {
        Some(self.ipv4).filter(|address| *address != [0; 4])
    }
}

/// Most bytes of a panic's message.
pub const PANIC_MESSAGE_MAX: usize = 1024;
/// [`FaultRecord::vector`] of a panic.
pub const VECTOR_PANIC: u64 = 256;

/// What the fault stub or the panic handler left.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FaultRecord {
    /// Exception vector (SDM vol. 3 §6.3.1), or [`VECTOR_PANIC`].
    pub vector: u64,
    /// Error code, or 0.
    pub error_code: u64,
    /// Faulting instruction.
    pub rip: u64,
    /// Stack pointer at the fault.
    pub rsp: u64,
    /// Frame pointer at the fault.
    pub rbp: u64,
    /// Flags at the fault.
    pub rflags: u64,
    /// CR2.
    pub address: u64,
    /// Code segment at the fault.
    pub cs: u64,
    /// RAX at the fault; the stub leaves all other registers as they were.
    pub rax: u64,
    /// Bytes used of `message`.
    pub message_length: u64,
    /// A panic's message.
    pub message: [u8; PANIC_MESSAGE_MAX],
}

/// Bytes of log text kept.
pub const LOG_BYTES: usize = (64 << 10) - 64;

/// The guest's log: `written` counts all bytes ever, the text's last [`LOG_BYTES`] are kept.
#[repr(C)]
pub struct LogRing {
    /// Bytes ever written.
    pub written: u64,
    /// Keeps the text on its own cache line.
    pub _pad: [u64; 7],
    /// Byte `n` of the log is at `n % LOG_BYTES`.
    pub text: [u8; LOG_BYTES],
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<BootPage>() == 544);
    assert!(size_of::<BootPage>() as u64 <= PAGE);
    assert!(offset_of!(BootPage, deadline_ns) == 24);
    assert!(offset_of!(BootPage, now_ns) == 32);
    assert!(offset_of!(BootPage, seed) == 56);
    assert!(offset_of!(BootPage, heartbeat) == 104);
    assert!(offset_of!(BootPage, upcall_entry) == 144);
    assert!(offset_of!(BootPage, code_ranges) == 152);
    assert!(offset_of!(BootPage, upcall) == 216);
    assert!(offset_of!(BootPage, frame_table) == 248);
    assert!(offset_of!(BootPage, map_status) == 264);
    assert!(offset_of!(BootPage, map) == 272);
    assert!(offset_of!(BootPage, late) == 528);
    assert!(offset_of!(BootPage, sync_wanted) == 532);
    assert!(size_of::<Upcall>() == 32);
    assert!(offset_of!(FaultRecord, rax) == 64);
    assert!(size_of::<Config>() == 24 + USER_MAX + 32 + AUTHORIZED_KEYS_MAX + 8);
    assert!(size_of::<Config>() as u64 <= offset::FAULT - offset::CONFIG);
    assert!(size_of::<FaultRecord>() as u64 <= PAGE);
    assert!(size_of::<LogRing>() == 64 << 10);
    assert!(offset::LOG + size_of::<LogRing>() as u64 <= offset::STACK - PAGE);
    assert!(offset::STACK_TOP < offset::RESOURCES);
    assert!(offset::RESOURCES + offset::RESOURCES_BYTES <= offset::DATA);
    assert!((DOOR_PORT as u64) / 8 + (TSS_IO_MAP as u64) < PAGE);
    assert!(MEMORY.is_multiple_of(2 << 20));
    assert!(TABLES >= MEMORY + (2 << 30));
    assert!(MMIO >= TABLES + table_pages(2 << 30) * PAGE);
    assert!(window::MEMORY_COUNT == 1024);
    assert!(window::ROOT_ENTRIES == 18);
    assert!(window::ROOT_ENTRIES * 8 < table_pages(16 << 20));
    assert!(window::END - 1 <= frame::ADDRESS | (PAGE - 1));
};

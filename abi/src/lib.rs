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
//!    +0x4000      kernel: fault stubs, park stub, code (r-x), constants (r--)
//!    …            page tables    (not mapped in the guest)
//!  0x1000_0000  read-write slot: the machine's memory
//!    +0x0_0000    boot page      +0x0_1000  config (4 pages)   +0x0_5000 fault record
//!    +0x0_8000    exception stack (8 KiB, guard below)
//!    +0x1_0000    log ring (64 KiB)
//!    +0x2_1000    stack (256 KiB, guard below)
//!    +0x6_2000    resources record (1 page)
//!    +0x7_0000    .data, .bss, heap to the end of memory
//!  0xd000_0000  virtio-mmio, one page a device, never backed by memory
//! ```
//!
//! Deliberately not here: anything of virtio that its specification fixes.
#![no_std]

pub mod content;
pub mod resources;
pub mod stream;

/// Version of everything in this crate; a kernel built for another is refused.
pub const ABI_VERSION: u32 = 1;

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
/// Two instructions that knock at the door for ever and touch no memory: what a shell runs to get warm.
pub const PARK: u64 = KERNEL + FAULT_STUBS * FAULT_STUB_BYTES;

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

/// Port whose write is the door.
pub const DOOR_PORT: u16 = 0x5a;

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
    assert!(size_of::<BootPage>() == 144);
    assert!(offset_of!(BootPage, deadline_ns) == 24);
    assert!(offset_of!(BootPage, now_ns) == 32);
    assert!(offset_of!(BootPage, seed) == 56);
    assert!(offset_of!(BootPage, heartbeat) == 104);
    assert!(size_of::<Config>() == 24 + USER_MAX + 32 + AUTHORIZED_KEYS_MAX);
    assert!(size_of::<Config>() as u64 <= offset::FAULT - offset::CONFIG);
    assert!(size_of::<FaultRecord>() as u64 <= PAGE);
    assert!(size_of::<LogRing>() == 64 << 10);
    assert!(offset::LOG + size_of::<LogRing>() as u64 <= offset::STACK - PAGE);
    assert!(offset::STACK_TOP < offset::RESOURCES);
    assert!(offset::RESOURCES + offset::RESOURCES_BYTES <= offset::DATA);
    assert!((DOOR_PORT as u64) / 8 + (TSS_IO_MAP as u64) < PAGE);
    assert!(MEMORY.is_multiple_of(2 << 20));
    assert!(MMIO >= MEMORY + (2 << 30));
};

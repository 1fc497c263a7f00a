//! The functions a machine offers, as they are.

/// A buffer for an address.
#[repr(C)]
pub struct Address {
    pub bytes: *mut u8,
    pub length: usize,
}

/// Something to wait for (`typenames.witx`, `subscription`), of the kind "a descriptor can be read or written".
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Subscription {
    pub user: u64,
    /// 1: can be read, 2: can be written.
    pub tag: u8,
    pub _pad: [u8; 7],
    pub fd: u32,
    pub _rest: [u32; 7],
}

/// What happened (`event`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Event {
    pub user: u64,
    pub errno: u16,
    pub tag: u8,
    pub _pad: [u8; 5],
    pub bytes: u64,
    pub flags: u16,
    pub _rest: [u16; 3],
}

const _: () = assert!(size_of::<Subscription>() == 48 && size_of::<Event>() == 32);

#[link(wasm_import_module = "wasi_snapshot_preview1")]
unsafe extern "C" {
    pub fn sock_open(family: u8, kind: u8, fd: *mut u32) -> u32;
    pub fn sock_bind(fd: u32, address: *mut Address, port: u32) -> u32;
    pub fn sock_listen(fd: u32, backlog: u32) -> u32;
    pub fn sock_accept(fd: u32, new: *mut u32) -> u32;
    pub fn fd_fdstat_set_flags(fd: u32, flags: u16) -> u16;
    pub fn poll_oneoff(
        wanted: *const Subscription,
        events: *mut Event,
        count: usize,
        found: *mut usize,
    ) -> u16;
}

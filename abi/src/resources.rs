//! What guest and host tell each other about the machine's resources: the record at [`crate::offset::RESOURCES`],
//! and the table of processes, files and sockets that the guest writes when the host asks for it.
//!
//! ```text
//!  host                                     guest
//!  wanted += 1, wakes the door   ─────▶     builds the table in memory of its own, in pieces
//!                                ◀─────     address, length, then published = wanted, knocks
//!  copies the table between runs
//!  of the vCPU, then taken = wanted ─────▶  frees it
//! ```
//!
//! Indices of VIDs: the host gives a range, `first_index..limit_index`, with each generation, and raises the limit
//! while the machine runs; the guest gives them out in order. A range is kept in the directory before it is given,
//! so that a machine restarted from nothing starts behind everything that may ever have been given out.

pub mod table;
#[cfg(test)]
mod tests;

/// The record. Each field has one writer; both sides read it only between two runs of the vCPU, or, where a daemon
/// shows a number, as it is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Resources {
    /// Host, with a generation: the least index that may be given out from then on.
    pub first_index: u64,
    /// Host: the least index that may not be given out yet.
    pub limit_index: u64,
    /// Guest: the index given out next; 0 before the first generation.
    pub next_index: u64,
    /// Host: counts requests for the table.
    pub wanted: u32,
    /// Guest: the request that the table answers.
    pub published: u32,
    /// Guest: guest-physical address of the table.
    pub address: u64,
    /// Guest: its bytes.
    pub length: u32,
    /// Host: the last request whose table was taken.
    pub taken: u32,
}

/// Largest index of a VID, which has 36 bits for it.
pub const INDEX_MAX: u64 = (1 << 36) - 1;

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<Resources>() == 48);
    assert!(offset_of!(Resources, limit_index) == 8);
    assert!(offset_of!(Resources, next_index) == 16);
    assert!(offset_of!(Resources, wanted) == 24);
    assert!(offset_of!(Resources, address) == 32);
    assert!(size_of::<Resources>() as u64 <= crate::offset::RESOURCES_BYTES);
};

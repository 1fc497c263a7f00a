//! Bytes between two hosts. No I/O here: parse, represent, emit.
//!
//! A link carries [`frame::Frame`]s. Its first frame in either direction is a [`hello::Hello`] or a
//! [`refusal::Refusal`]; what follows depends on the hello's purpose:
//!
//! ```text
//! Switch      Handover*                         control of one handover, both ways
//! Bulk        Pages* EpochEnd → EpochAck, …     page stream of one handover or mirror
//! Directory   Directory → Directory, …          request and reply
//! ```
//!
//! Invariants: whatever bytes arrive, a decoder returns a value or a typed error; it never panics,
//! and never reserves more memory than bytes that arrived plus a fixed amount.
//!
//! Deliberately not here: sockets, keys, compression (`kage-replicate`), what a message means.

pub mod delta;
pub mod frame;
pub mod handover;
pub mod have;
pub mod hello;
pub mod pages;
pub mod refusal;

mod bytes;

pub use frame::{Frame, FrameDecoder, FrameError, Kind};
pub use have::{Have, HaveError, Held};
pub use hello::{HandoverId, Hello, HelloError, Purpose};
pub use pages::{BatchError, BatchReader, BatchWriter, Encoding, EpochMark};
pub use refusal::{Refusal, RefusalCode};

//! Images: what a machine is started from.
//!
//! - [`ImageFile`]: the file: header, kernel, hash. [`ImageFile::embedded`] is the default one.
//! - [`Base`]: the read-only slot every machine of a memory size shares: descriptor tables, kernel, page tables.
//! - [`Symbols`]: names for addresses, so that a guest's fault reads as a backtrace.

mod base;
mod file;
mod symbols;

pub use base::{Base, BaseError, DataSegment};
pub use file::{ImageError, ImageFile};
pub use symbols::Symbols;

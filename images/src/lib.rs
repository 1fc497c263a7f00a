//! Images: what a machine is started from.
//!
//! - [`ImageFile`]: manifest, kernel, programs, files; as a signed file. [`ImageFile::embedded`] is the default one.
//! - [`assemble`]: makes one from a directory with a [`Manifest`].
//! - [`Base`]: the read-only slot every machine of an image and a memory size shares: descriptor tables, kernel,
//!   programs, files, page tables.
//! - [`compiler`]: the program that makes code of WebAssembly, in a process of its own.
//! - [`Symbols`]: names for addresses, so that a guest's fault reads as a backtrace.

mod assemble;
mod base;
pub mod compiler;
mod content;
mod embedded;
mod file;
mod keys;
mod manifest;
mod symbols;

pub use assemble::{AssembleError, assemble};
pub use base::{Base, BaseError, DataSegment};
pub use file::{FileEntry, ImageError, ImageFile, Node, Program, Trust};
pub use keys::{KeyError, PublicKey, SigningKey};
pub use manifest::{Limits, Manifest, ManifestError, Restart, Service};
pub use symbols::Symbols;

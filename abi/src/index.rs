//! What the base slot holds beside the kernel: programs and files of the image, with an index at [`ADDRESS`].
//!
//! All of it is a pure function of the image, read-only for the guest; programs are executable and start at a page's
//! start. Addresses are the guest's; texts are UTF-8 without an end mark.
//!
//! ```text
//! ADDRESS      Index ──▶ [Program] ──▶ names, code (r-x)
//!                    ──▶ [File]    ──▶ paths, content (r--); parents come first
//!                    ──▶ [Service] ──▶ words
//! ```

use crate::{BASE, PAGE};

/// Page of the [`Index`].
pub const ADDRESS: u64 = BASE + 0x3000;

/// First word of an index: "kagebase".
pub const MAGIC: u64 = u64::from_le_bytes(*b"kagebase");

/// Bytes or entries in the base slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// First address; 0 with nothing.
    pub address: u64,
    /// How many.
    pub count: u64,
}

/// The page at [`ADDRESS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Index {
    /// [`MAGIC`].
    pub magic: u64,
    /// All code of programs.
    pub code: Span,
    /// What the code was compiled for.
    pub engine: Span,
    /// Name of the image.
    pub name: Span,
    /// [`Program`]s.
    pub programs: Span,
    /// [`File`]s.
    pub files: Span,
    /// [`Service`]s.
    pub services: Span,
    /// Most processes at a time; 0 = the machine's own.
    pub processes: u64,
    /// Most bytes of memory of a process; 0 = the machine's own.
    pub process_bytes: u64,
}

/// A name that a program has. A program of several names has an entry for each, its first name first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// The name.
    pub name: Span,
    /// The program's first name.
    pub first: Span,
    /// Its code.
    pub code: Span,
}

/// Kinds of a [`File`].
pub mod kind {
    /// A directory.
    pub const DIRECTORY: u64 = 0;
    /// A file, `content` what it holds.
    pub const FILE: u64 = 1;
    /// A symbolic link, `content` where it leads.
    pub const LINK: u64 = 2;
}

/// A file, directory or link.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct File {
    /// Absolute path.
    pub path: Span,
    /// What it holds.
    pub content: Span,
    /// One of [`kind`].
    pub kind: u64,
}

/// When a service is started again.
pub mod restart {
    /// Not at all.
    pub const NEVER: u64 = 0;
    /// When it ended with another exit code than 0, or was killed.
    pub const ON_FAILURE: u64 = 1;
    /// Whenever it ended.
    pub const ALWAYS: u64 = 2;
}

/// A program started with the machine.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: Span,
    /// Name of the program and its arguments, each ended by a zero byte.
    pub words: Span,
    /// `NAME=value`, each ended by a zero byte.
    pub environment: Span,
    /// One of [`restart`].
    pub restart: u64,
    /// Most bytes of memory; 0 = as any process.
    pub memory_bytes: u64,
}

const _: () = {
    use core::mem::size_of;
    assert!(size_of::<Span>() == 16);
    assert!(size_of::<Index>() == 120);
    assert!(size_of::<Index>() as u64 <= PAGE);
    assert!(size_of::<Program>() == 48);
    assert!(size_of::<File>() == 40);
    assert!(size_of::<Service>() == 64);
};

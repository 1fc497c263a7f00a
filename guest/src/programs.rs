//! What came with the image: programs, files, services, limits.
//!
//! All of it lies in the base slot, which this host and every other one that the machine goes to built from the same
//! image; so addresses are for life and nothing here is checked twice.
#![expect(unsafe_code, reason = "reads the base slot")]

use core::{ops::Range, slice};

use kage_abi::index::{self, File, Index, Program, Service, Span, kind, restart};

use crate::fs;

fn index() -> &'static Index {
    // SAFETY: the page is mapped, never written, and holds an index: the host lays it with the kernel.
    unsafe { &*(index::ADDRESS as *const Index) }
}

fn entries<T>(span: Span) -> &'static [T] {
    if span.count == 0 {
        return &[];
    }
    // SAFETY: a span of the index has so many entries at an aligned address, in pages that are never written.
    unsafe { slice::from_raw_parts(span.address as *const T, span.count as usize) }
}

fn text(span: Span) -> &'static str {
    core::str::from_utf8(entries(span)).unwrap_or_default()
}

/// The first name and the code of the program called `name`.
pub fn find(name: &str) -> Option<(&'static str, &'static [u8])> {
    let programs: &[Program] = entries(index().programs);
    let found = programs.iter().find(|program| text(program.name) == name)?;
    Some((text(found.first), entries(found.code)))
}

/// Where the code of all programs lies.
pub fn code_range() -> Range<usize> {
    let code = index().code;
    code.address as usize..(code.address + code.count) as usize
}

/// The image's files, parents first.
pub fn files() -> impl Iterator<Item = (&'static str, fs::Base)> {
    entries::<File>(index().files).iter().map(|file| {
        let what = match file.kind {
            kind::FILE => fs::Base::File(entries(file.content)),
            kind::LINK => fs::Base::Link(text(file.content)),
            _ => fs::Base::Directory,
        };
        (text(file.path), what)
    })
}

/// What the image allows processes.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// Most processes at a time.
    pub processes: Option<usize>,
    /// Most bytes of memory of a process.
    pub process_bytes: Option<usize>,
}

/// The image's limits, where it has any.
pub fn allowed() -> Allowed {
    let some = |limit: u64| (limit > 0).then_some(limit as usize);
    let index = index();
    Allowed { processes: some(index.processes), process_bytes: some(index.process_bytes) }
}

/// When a service is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// Not at all.
    Never,
    /// When it failed.
    OnFailure,
    /// Whenever it ended.
    Always,
}

/// A program to start with the machine.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Its name.
    pub name: &'static str,
    /// When to start it again.
    pub restart: Restart,
    /// Most bytes of memory, if not as any process.
    pub memory_bytes: Option<usize>,
    words: &'static str,
    environment: &'static str,
}

impl Start {
    /// Name of the program, then its arguments.
    pub fn words(&self) -> impl Iterator<Item = &'static str> {
        self.words.split_terminator('\0')
    }

    /// `NAME=value`.
    pub fn environment(&self) -> impl Iterator<Item = &'static str> {
        self.environment.split_terminator('\0')
    }
}

/// The programs to start with the machine.
pub fn services() -> impl Iterator<Item = Start> {
    entries::<Service>(index().services).iter().map(|service| Start {
        name: text(service.name),
        restart: match service.restart {
            restart::ALWAYS => Restart::Always,
            restart::ON_FAILURE => Restart::OnFailure,
            _ => Restart::Never,
        },
        memory_bytes: (service.memory_bytes > 0).then_some(service.memory_bytes as usize),
        words: text(service.words),
        environment: text(service.environment),
    })
}

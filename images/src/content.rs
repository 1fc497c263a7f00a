//! Lays programs, files and services of an image into the base slot, with the index the guest reads.
//!
//! ```text
//! programs, each from a page's start │ content of files │ index entries and texts
//! ```
//! Programs are executable for the guest, the rest is read-only; see `kage_abi::index`.

use kage_abi::{
    self as abi,
    index::{self, File, Index, Program, Service, Span, kind, restart},
};

use crate::{
    ImageFile,
    file::Node,
    manifest::{Manifest, Restart},
};

const PAGE: usize = abi::PAGE as usize;

/// Programs, files and index as they lie in the base slot.
pub struct Laid {
    /// Content from the given address on: whole pages.
    pub bytes: Vec<u8>,
    /// Bytes at the start that are executable: whole pages.
    pub executable: usize,
    /// The index page's content.
    pub index: Vec<u8>,
}

/// Lays the content of `image` out from `address` on, a page's start.
pub fn lay(image: &ImageFile, address: u64) -> Laid {
    let mut to = Layout { address, bytes: Vec::new() };
    let codes: Vec<Span> = image.programs().iter().map(|program| to.pages(program.code())).collect();
    let executable = to.bytes.len();
    let manifest = image.manifest();

    let mut programs = Vec::new();
    for (program, code) in image.programs().iter().zip(codes) {
        let aliases = manifest.programs.iter().find(|entry| entry.name == program.name());
        let first = to.text(program.name());
        programs.push(Program { name: first, first, code });
        for alias in aliases.iter().flat_map(|entry| &entry.aliases) {
            programs.push(Program { name: to.text(alias), first, code });
        }
    }
    let files: Vec<File> = image.files().iter().map(|file| entry(&mut to, &file.path, &file.node)).collect();
    let services = services(&mut to, manifest);
    let engine = to.text(image.engine());
    let name = to.text(&manifest.name);
    let code = if executable == 0 { Span::default() } else { Span { address, count: executable as u64 } };
    let index = Index {
        magic: index::MAGIC,
        code,
        engine,
        name,
        programs: to.entries(programs.iter().map(|at| words(&[at.name, at.first, at.code], &[]))),
        files: to.entries(files.iter().map(|at| words(&[at.path, at.content], &[at.kind]))),
        services: to.entries(
            services
                .iter()
                .map(|at| words(&[at.name, at.words, at.environment], &[at.restart, at.memory_bytes])),
        ),
        processes: manifest.limits.processes.unwrap_or_default().into(),
        process_bytes: manifest.limits.process_memory.unwrap_or_default(),
    };
    let spans = [index.code, index.engine, index.name, index.programs, index.files, index.services];
    let mut page = index.magic.to_le_bytes().to_vec();
    page.extend(words(&spans, &[index.processes, index.process_bytes]));
    to.align(PAGE);
    Laid { bytes: to.bytes, executable, index: page }
}

fn entry(to: &mut Layout, path: &str, node: &Node) -> File {
    let path = to.text(path);
    let (content, kind) = match node {
        Node::Directory => (Span::default(), kind::DIRECTORY),
        Node::File(bytes) => (to.text(bytes), kind::FILE),
        Node::Link(target) => (to.text(target), kind::LINK),
    };
    File { path, content, kind }
}

fn services(to: &mut Layout, manifest: &Manifest) -> Vec<Service> {
    let ended = |words: &mut dyn Iterator<Item = &String>| -> String {
        words.flat_map(|word| [word.as_str(), "\0"]).collect()
    };
    manifest
        .services
        .iter()
        .map(|service| {
            let words = ended(&mut std::iter::once(&service.program).chain(&service.arguments));
            let environment = ended(&mut service.environment.iter());
            Service {
                name: to.text(&service.name),
                words: to.text(&words),
                environment: to.text(&environment),
                restart: match service.restart {
                    Restart::Never => restart::NEVER,
                    Restart::OnFailure => restart::ON_FAILURE,
                    Restart::Always => restart::ALWAYS,
                },
                memory_bytes: service.memory.unwrap_or_default(),
            }
        })
        .collect()
}

/// The little-endian form of an entry: its spans, then its numbers.
fn words(spans: &[Span], numbers: &[u64]) -> Vec<u8> {
    let spans = spans.iter().flat_map(|span| [span.address, span.count]);
    spans.chain(numbers.iter().copied()).flat_map(u64::to_le_bytes).collect()
}

struct Layout {
    address: u64,
    bytes: Vec<u8>,
}

impl Layout {
    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    fn put(&mut self, bytes: &[u8], count: usize) -> Span {
        if count == 0 {
            return Span::default();
        }
        let address = self.address + self.bytes.len() as u64;
        self.bytes.extend(bytes);
        Span { address, count: count as u64 }
    }

    fn text(&mut self, bytes: impl AsRef<[u8]>) -> Span {
        self.put(bytes.as_ref(), bytes.as_ref().len())
    }

    fn pages(&mut self, bytes: &[u8]) -> Span {
        let span = self.put(bytes, bytes.len());
        self.align(PAGE);
        span
    }

    fn entries(&mut self, entries: impl Iterator<Item = Vec<u8>>) -> Span {
        self.align(8);
        let entries: Vec<Vec<u8>> = entries.collect();
        self.put(&entries.concat(), entries.len())
    }
}

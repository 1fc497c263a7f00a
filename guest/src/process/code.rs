//! Programs: where they are found, and their code while it is used.
//!
//! A program of the image is compiled when the image is built, and its code lies in the base slot. Any other is a
//! WebAssembly file of the machine: the host compiles it ([`compile`](super::compile)), and the code is kept while a
//! process runs it and a little longer, so that a program run again and again is compiled once.
#![expect(unsafe_code, reason = "runs code it was given")]

use alloc::{
    collections::{BTreeMap, VecDeque},
    format,
    rc::Rc,
    string::String,
    vec::Vec,
};
use core::{
    fmt,
    future::poll_fn,
    ptr::NonNull,
    task::{Context, Poll, Waker},
};

use wasmtime::{InstancePre, Module, Store, UnknownImportError};

use super::{
    State,
    compile::{self, CompileError, Compiled},
    engine, wasi,
};
use crate::{
    fs::{self, FileError, Handle, OpenOptions},
    heap,
    local::Local,
    memory::{self, PAGE},
    programs,
    vid::Vid,
};

/// Programs from files that are kept though no process runs them.
const KEPT: usize = 4;
/// Files compiled at a time: each takes buffers for its connection, and a host takes four of a machine.
const AT_A_TIME: usize = 3;
/// What every module starts with.
const MAGIC: &[u8; 4] = b"\0asm";
/// Where a command starts.
const START: &str = "_start";
/// Kernel's heap that what the engine has made must leave: neither what it keeps of a module nor what an instance takes
/// of the heap is known before, only that it is less than the code as a rule.
const LEFT: usize = heap::RESERVE / 4;

/// Why a program cannot be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// The file.
    File(FileError),
    /// Not WebAssembly.
    NotAProgram,
    /// The service that compiles.
    Compile(CompileError),
    /// Imports something that there is not.
    Import(String),
    /// The engine does not take the code.
    Code(String),
    /// Too little memory.
    NoMemory,
}

impl fmt::Display for LoadError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(error) => error.fmt(formatter),
            Self::NotAProgram => formatter.write_str("not a WebAssembly module"),
            Self::Compile(error) => error.fmt(formatter),
            Self::Import(name) => write!(formatter, "imports {name}, which this machine does not have"),
            Self::Code(text) => formatter.write_str(text),
            Self::NoMemory => formatter.write_str("not enough memory to load it"),
        }
    }
}

/// Code that processes run.
pub struct Program {
    before: InstancePre<State>,
    /// Code that is not in the image. Behind what refers to it: fields are dropped in order.
    _code: Option<Compiled>,
}

impl Program {
    fn new(code: NonNull<[u8]>, held: Option<Compiled>) -> Result<Self, LoadError> {
        if !memory::kernel_room(code.len()) {
            return Err(LoadError::NoMemory);
        }
        // SAFETY: the bytes come from the compiler that belongs to this engine, by the image or by the host, and
        // say so; they are mapped readable and executable, unchanged, for as long as the program lives.
        let module = engine::with(|engine, _| unsafe { Module::deserialize_raw(engine, code) });
        let module = module.map_err(|error| LoadError::Code(format!("{error:#}")))?;
        let before = engine::with(|_, linker| {
            wasi::fit(linker, &module)?;
            linker.instantiate_pre(&module)
        });
        let before = before.map_err(|error| match error.downcast_ref::<UnknownImportError>() {
            Some(import) => LoadError::Import(format!("`{}` of `{}`", import.name(), import.module())),
            None => LoadError::Code(format!("{error:#}")),
        })?;
        if memory::heap_free_bytes() < LEFT {
            return Err(LoadError::NoMemory);
        }
        Ok(Self { before, _code: held })
    }

    /// Pages that its memory takes at least.
    pub fn least_pages(&self) -> usize {
        let bytes = self.before.module().resources_required().max_initial_memory_size.unwrap_or(0);
        usize::try_from(bytes).unwrap_or(usize::MAX).div_ceil(PAGE)
    }

    /// Makes an instance and runs it to its end.
    ///
    /// # Errors
    /// A trap, an exit, or why it could not start.
    pub(super) fn call(&self, store: &mut Store<State>) -> Result<(), wasmtime::Error> {
        let instance = self.before.instantiate(&mut *store)?;
        if memory::heap_free_bytes() < LEFT {
            return Err(wasmtime::Error::msg("the machine has no memory left for its variables"));
        }
        let start = instance.get_typed_func::<(), ()>(&mut *store, START)?;
        start.call(store, ())
    }
}

/// A file as it was when it was compiled.
#[derive(Clone, PartialEq, Eq)]
struct Version {
    vid: Vid,
    size: u64,
    changed: core::time::Duration,
}

#[derive(Default)]
struct Cache {
    /// Programs of the image, by name.
    base: BTreeMap<&'static str, Rc<Program>>,
    /// Programs of files, the last used first.
    files: VecDeque<(Version, Rc<Program>)>,
    /// Files that are being compiled.
    compiling: Vec<Version>,
    /// Who waits for a turn.
    waiters: Vec<Waker>,
}

static CACHE: Local<Cache> = Local::new();

pub(super) fn start() {
    CACHE.set(Cache::default());
}

/// What a command's name leads to.
pub enum Found {
    /// A program of the image.
    Base(&'static str, &'static [u8]),
    /// A file, by its absolute path.
    File(String),
}

/// Looks a command up: a path as it is, a name in the directories of `search`, also with `.wasm` behind it.
pub fn find(name: &str, directory: &str, search: &str) -> Option<Found> {
    if name.contains('/') {
        let path = fs::resolve(directory, name);
        let base = path.strip_prefix("/bin/").and_then(programs::find);
        return base.map(|(name, code)| Found::Base(name, code)).or_else(|| file(path));
    }
    search.split(':').filter(|at| !at.is_empty()).find_map(|at| {
        let path = fs::resolve(directory, &format!("{at}/{name}"));
        let base = path.strip_prefix("/bin/").and_then(programs::find);
        base.map(|(name, code)| Found::Base(name, code))
            .or_else(|| file(format!("{path}.wasm")))
            .or_else(|| file(path))
    })
}

fn file(path: String) -> Option<Found> {
    let is_file = fs::stat(&path).is_ok_and(|facts| facts.kind == fs::Kind::File);
    is_file.then_some(Found::File(path))
}

/// Loads a program.
///
/// # Errors
/// [`LoadError`].
pub async fn load(found: Found) -> Result<Rc<Program>, LoadError> {
    match found {
        Found::Base(name, code) => {
            let kept = CACHE.get().base.get(name).cloned();
            if let Some(program) = kept {
                return Ok(program);
            }
            let program = Rc::new(Program::new(NonNull::from(code), None)?);
            CACHE.get().base.insert(name, Rc::clone(&program));
            Ok(program)
        }
        Found::File(path) => load_file(&path).await,
    }
}

async fn load_file(path: &str) -> Result<Rc<Program>, LoadError> {
    let handle = fs::open(path, OpenOptions::default()).map_err(LoadError::File)?;
    let facts = handle.stat().map_err(LoadError::File)?;
    if facts.kind == fs::Kind::Directory {
        return Err(LoadError::File(FileError::IsDirectory));
    }
    let version = Version { vid: facts.vid, size: facts.size, changed: facts.times.changed };
    if let Some(program) = kept(&version) {
        return Ok(program);
    }
    let mut magic = [0; MAGIC.len()];
    let count = handle.read_at(0, &mut magic).await.map_err(LoadError::File)?;
    if count < magic.len() || magic != *MAGIC {
        return Err(LoadError::NotAProgram);
    }
    // Others may want the same file, or have others compiled: one compiles it for all, and not too many compile.
    let turn = match poll_fn(|context| poll_turn(context, &version)).await {
        Turned::Compiled(program) => return Ok(program),
        Turned::Turn(turn) => turn,
    };
    let compiled = compile_file(&handle, facts.size).await?;
    let code = NonNull::slice_from_raw_parts(
        NonNull::new(compiled.window.base() as *mut u8).ok_or(LoadError::NoMemory)?,
        compiled.length,
    );
    let program = Rc::new(Program::new(code, Some(compiled))?);
    let old = {
        let mut cache = CACHE.get();
        cache.files.push_front((version, Rc::clone(&program)));
        let kept = KEPT.min(cache.files.len());
        cache.files.split_off(kept)
    };
    // Outside of the cache's borrow: frees windows.
    drop((old, turn));
    Ok(program)
}

/// The right to have a file compiled. The next gets it when it is dropped, in whatever way that comes.
struct Turn(Version);

enum Turned {
    Turn(Turn),
    /// It has been compiled meanwhile.
    Compiled(Rc<Program>),
}

impl Drop for Turn {
    fn drop(&mut self) {
        let waiters = {
            let mut cache = CACHE.get();
            cache.compiling.retain(|version| *version != self.0);
            core::mem::take(&mut cache.waiters)
        };
        waiters.into_iter().for_each(Waker::wake);
    }
}

fn poll_turn(context: &Context<'_>, version: &Version) -> Poll<Turned> {
    if let Some(program) = kept(version) {
        return Poll::Ready(Turned::Compiled(program));
    }
    let mut cache = CACHE.get();
    if cache.compiling.len() < AT_A_TIME && !cache.compiling.contains(version) {
        cache.compiling.push(version.clone());
        return Poll::Ready(Turned::Turn(Turn(version.clone())));
    }
    if !cache.waiters.iter().any(|waker| waker.will_wake(context.waker())) {
        cache.waiters.push(context.waker().clone());
    }
    Poll::Pending
}

/// A program that is loaded already; it is the last used one then.
fn kept(version: &Version) -> Option<Rc<Program>> {
    let mut cache = CACHE.get();
    let at = cache.files.iter().position(|(kept, _)| kept == version)?;
    let entry = cache.files.remove(at)?;
    let program = Rc::clone(&entry.1);
    cache.files.push_front(entry);
    Some(program)
}

async fn compile_file(handle: &Handle, size: u64) -> Result<Compiled, LoadError> {
    let read = async |offset, into: &mut [u8]| handle.read_at(offset, into).await.ok();
    compile::compile(size, read).await.map_err(LoadError::Compile)
}

/// Frees the code of files that no process runs, so that its memory can be used.
pub fn forget_unused() {
    let old = {
        let files = &mut CACHE.get().files;
        let (used, old): (VecDeque<_>, VecDeque<_>) =
            core::mem::take(files).into_iter().partition(|(_, program)| Rc::strong_count(program) > 1);
        *files = used;
        old
    };
    drop(old);
}

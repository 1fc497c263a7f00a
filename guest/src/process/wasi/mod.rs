//! WASI preview 1 (`wasi_snapshot_preview1`), and sockets beyond it.
//!
//! - [`call`]: a program's memory, checked; outcomes; waiting. [`errno`]: what a program is told.
//! - [`descriptor`]: what is open. [`basic`], [`fd`], [`path`], [`poll`], [`sock`]: the functions.
//!
//! A call runs on its process's fiber and may wait there. It holds no borrow of the kernel's state then, and counts what
//! it does, so that others run in between ([`call::finish`]). What a program passes is never trusted, and what a
//! program can make the kernel keep is bounded: descriptors, vectors, subscriptions, names; and the kernel keeps it only
//! while its heap has enough for everybody else ([`call::room`]).
//!
//! A program sees the whole machine: the preopened directories are `/` and, as `.`, the working directory. Rights are
//! kept as the specification says; they are a program's own safety, not the machine's.

mod basic;
mod call;
mod descriptor;
mod errno;
mod fd;
mod path;
mod poll;
mod sock;

use alloc::{rc::Rc, string::String, vec::Vec};
use wasmtime::{Error, Linker, Memory, Module};

use super::{Spec, State};
use crate::{
    fs::{self, Handle, OpenOptions},
    shell::stdio::{Input, Output},
};
use call::{Call, finish};
use descriptor::{Descriptor, Directory, Object, Table};

/// The module that programs import from.
const PREVIEW1: &str = "wasi_snapshot_preview1";

/// What a process has open.
pub struct Context {
    arguments: Vec<String>,
    environment: Vec<String>,
    table: Table,
    /// The program's memory, once it was looked for.
    memory: Option<Memory>,
}

impl Context {
    /// Opens what a new process starts with: standard input, output and error, then `/` and `.`.
    pub fn new(spec: &Spec) -> Self {
        let mut table = Table::default();
        let output = |output: Output| match output {
            Output::File(named) => Descriptor::new(Object::File(Rc::clone(&named.file))),
            other => Descriptor::new(Object::Output(other)),
        };
        let input = match spec.stdio.input.clone() {
            Input::File(named) => Descriptor::new(Object::File(Rc::clone(&named.file))),
            other => Descriptor::new(Object::Input(other)),
        };
        let directory = |handle: Handle, name: &str, working| {
            let preopen = Some(String::from(name));
            Descriptor::new(Object::Directory(Directory { handle, preopen, working }))
        };
        let options = OpenOptions { directory: true, ..OpenOptions::default() };
        // A working directory that is gone leaves the root alone.
        let working = fs::open(&spec.directory, options).ok();
        let descriptors = [input, output(spec.stdio.output.clone()), output(spec.stdio.error.clone())]
            .into_iter()
            .chain([directory(Handle::root(), "/", false)])
            .chain(working.map(|handle| directory(handle.unconfined(), ".", true)));
        for descriptor in descriptors {
            // A new table has room.
            let _ = table.add(descriptor);
        }
        Self {
            arguments: basic::clean(&spec.arguments),
            environment: basic::clean(&spec.environment),
            table,
            memory: None,
        }
    }
}

/// Names functions for the linker: each gets the call and its parameters, and its outcome becomes an error number.
macro_rules! functions {
    ($linker:ident: $($module:ident::$name:ident($($parameter:ident: $type:ty),*);)*) => {$(
        $linker.func_wrap(PREVIEW1, stringify!($name), |mut call: Call<'_>, $($parameter: $type),*| {
            finish($module::$name(&mut call, $($parameter),*))
        })?;
    )*};
}
use functions;

/// Names the functions that a program may import.
///
/// # Errors
/// A name given twice.
pub fn add_to_linker(linker: &mut Linker<State>) -> Result<(), Error> {
    functions! { linker:
        basic::args_get(list: u32, buffer: u32);
        basic::args_sizes_get(count: u32, bytes: u32);
        basic::environ_get(list: u32, buffer: u32);
        basic::environ_sizes_get(count: u32, bytes: u32);
        basic::clock_res_get(clock: u32, resolution: u32);
        basic::clock_time_get(clock: u32, precision: u64, into: u32);
        basic::random_get(buffer: u32, length: u32);
        basic::sched_yield();
        basic::proc_raise(signal: u32);
        fd::fd_advise(fd: u32, offset: u64, length: u64, advice: u32);
        fd::fd_allocate(fd: u32, offset: u64, length: u64);
        fd::fd_close(fd: u32);
        fd::fd_datasync(fd: u32);
        fd::fd_fdstat_get(fd: u32, into: u32);
        fd::fd_fdstat_set_flags(fd: u32, flags: u32);
        fd::fd_fdstat_set_rights(fd: u32, base: u64, inheriting: u64);
        fd::fd_filestat_get(fd: u32, into: u32);
        fd::fd_filestat_set_size(fd: u32, size: u64);
        fd::fd_filestat_set_times(fd: u32, accessed: u64, modified: u64, flags: u32);
        fd::fd_pread(fd: u32, vectors: u32, count: u32, offset: u64, into: u32);
        fd::fd_prestat_get(fd: u32, into: u32);
        fd::fd_prestat_dir_name(fd: u32, name: u32, length: u32);
        fd::fd_pwrite(fd: u32, vectors: u32, count: u32, offset: u64, into: u32);
        fd::fd_read(fd: u32, vectors: u32, count: u32, into: u32);
        fd::fd_readdir(fd: u32, buffer: u32, length: u32, cookie: u64, into: u32);
        fd::fd_renumber(fd: u32, to: u32);
        fd::fd_seek(fd: u32, offset: i64, whence: u32, into: u32);
        fd::fd_sync(fd: u32);
        fd::fd_tell(fd: u32, into: u32);
        fd::fd_write(fd: u32, vectors: u32, count: u32, into: u32);
        path::path_create_directory(fd: u32, path: u32, length: u32);
        path::path_filestat_get(fd: u32, lookup: u32, path: u32, length: u32, into: u32);
        path::path_filestat_set_times(
            fd: u32, lookup: u32, path: u32, length: u32, accessed: u64, modified: u64, flags: u32
        );
        path::path_link(
            fd: u32, lookup: u32, path: u32, length: u32, new_fd: u32, new_path: u32, new_length: u32
        );
        path::path_open(
            fd: u32, lookup: u32, path: u32, length: u32, open: u32, base: u64, inheriting: u64, flags: u32, into: u32
        );
        path::path_readlink(fd: u32, path: u32, length: u32, buffer: u32, room: u32, into: u32);
        path::path_remove_directory(fd: u32, path: u32, length: u32);
        path::path_rename(fd: u32, path: u32, length: u32, new_fd: u32, new_path: u32, new_length: u32);
        path::path_symlink(target: u32, target_length: u32, fd: u32, path: u32, length: u32);
        path::path_unlink_file(fd: u32, path: u32, length: u32);
        poll::poll_oneoff(subscriptions: u32, events: u32, count: u32, into: u32);
    }
    linker.func_wrap(PREVIEW1, "proc_exit", |status: u32| -> Result<(), Error> {
        Err(basic::proc_exit(status))
    })?;
    sock::add_to_linker(linker)
}

/// Fits the linker to a module: some functions of sockets have several forms, told apart by their types. To be called
/// before each instantiation.
///
/// # Errors
/// None in practice.
pub fn fit(linker: &mut Linker<State>, module: &Module) -> Result<(), Error> {
    sock::fit(linker, module)
}

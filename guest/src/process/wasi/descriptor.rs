//! What a program has open: descriptors, their rights and flags.

use alloc::{collections::BTreeMap, rc::Rc, string::String};
use core::cell::Cell;

use super::{call::Outcome, errno::Errno};
use crate::{
    fs::{Handle, Kind, OpenFile},
    memory,
    net::socket::Socket,
    shell::stdio::{Input, Output},
};

/// Descriptors of a process.
const MAX_DESCRIPTORS: usize = 1024;
/// Most that one takes of the kernel's heap, beside a socket's buffers.
const DESCRIPTOR_BYTES: usize = 1024;

/// Rights (`typenames.witx`, `rights`).
#[allow(missing_docs)]
pub mod rights {
    pub const FD_DATASYNC: u64 = 1;
    pub const FD_READ: u64 = 1 << 1;
    pub const FD_SEEK: u64 = 1 << 2;
    pub const FD_FDSTAT_SET_FLAGS: u64 = 1 << 3;
    pub const FD_SYNC: u64 = 1 << 4;
    pub const FD_TELL: u64 = 1 << 5;
    pub const FD_WRITE: u64 = 1 << 6;
    pub const FD_ADVISE: u64 = 1 << 7;
    pub const FD_ALLOCATE: u64 = 1 << 8;
    pub const PATH_CREATE_DIRECTORY: u64 = 1 << 9;
    pub const PATH_CREATE_FILE: u64 = 1 << 10;
    pub const PATH_LINK_SOURCE: u64 = 1 << 11;
    pub const PATH_LINK_TARGET: u64 = 1 << 12;
    pub const PATH_OPEN: u64 = 1 << 13;
    pub const FD_READDIR: u64 = 1 << 14;
    pub const PATH_READLINK: u64 = 1 << 15;
    pub const PATH_RENAME_SOURCE: u64 = 1 << 16;
    pub const PATH_RENAME_TARGET: u64 = 1 << 17;
    pub const PATH_FILESTAT_GET: u64 = 1 << 18;
    pub const PATH_FILESTAT_SET_SIZE: u64 = 1 << 19;
    pub const PATH_FILESTAT_SET_TIMES: u64 = 1 << 20;
    pub const FD_FILESTAT_GET: u64 = 1 << 21;
    pub const FD_FILESTAT_SET_SIZE: u64 = 1 << 22;
    pub const FD_FILESTAT_SET_TIMES: u64 = 1 << 23;
    pub const PATH_SYMLINK: u64 = 1 << 24;
    pub const PATH_REMOVE_DIRECTORY: u64 = 1 << 25;
    pub const PATH_UNLINK_FILE: u64 = 1 << 26;
    pub const POLL_FD_READWRITE: u64 = 1 << 27;
    pub const SOCK_SHUTDOWN: u64 = 1 << 28;
    pub const SOCK_ACCEPT: u64 = 1 << 29;

    /// What can be done with a pipe or a terminal, read or written.
    pub const STREAM: u64 = FD_FDSTAT_SET_FLAGS | FD_FILESTAT_GET | POLL_FD_READWRITE;
    /// What can be done with a file.
    pub const FILE: u64 = STREAM
        | FD_DATASYNC
        | FD_READ
        | FD_SEEK
        | FD_SYNC
        | FD_TELL
        | FD_WRITE
        | FD_ADVISE
        | FD_ALLOCATE
        | FD_FILESTAT_SET_SIZE
        | FD_FILESTAT_SET_TIMES;
    /// What can be done with a directory.
    pub const DIRECTORY: u64 = FD_DATASYNC
        | FD_FDSTAT_SET_FLAGS
        | FD_SYNC
        | PATH_CREATE_DIRECTORY
        | PATH_CREATE_FILE
        | PATH_LINK_SOURCE
        | PATH_LINK_TARGET
        | PATH_OPEN
        | FD_READDIR
        | PATH_READLINK
        | PATH_RENAME_SOURCE
        | PATH_RENAME_TARGET
        | PATH_FILESTAT_GET
        | PATH_FILESTAT_SET_SIZE
        | PATH_FILESTAT_SET_TIMES
        | FD_FILESTAT_GET
        | FD_FILESTAT_SET_TIMES
        | PATH_SYMLINK
        | PATH_REMOVE_DIRECTORY
        | PATH_UNLINK_FILE;
    /// What can be done with a socket.
    pub const SOCKET: u64 = STREAM | FD_READ | FD_WRITE | SOCK_SHUTDOWN | SOCK_ACCEPT;
}

/// Flags of a descriptor (`typenames.witx`, `fdflags`).
pub mod flags {
    /// Writes go to the end.
    pub const APPEND: u16 = 1;
    /// Nothing waits.
    pub const NONBLOCK: u16 = 4;
    /// All there are; those about synchrony are kept and change nothing, since a write is where it belongs at once.
    pub const ALL: u16 = 31;
}

/// File types (`typenames.witx`, `filetype`).
pub mod filetype {
    /// A pipe.
    pub const UNKNOWN: u8 = 0;
    /// A terminal.
    pub const CHARACTER_DEVICE: u8 = 2;
    /// A directory.
    pub const DIRECTORY: u8 = 3;
    /// A file.
    pub const REGULAR_FILE: u8 = 4;
    /// A UDP socket.
    pub const SOCKET_DGRAM: u8 = 5;
    /// A TCP socket.
    pub const SOCKET_STREAM: u8 = 6;
    /// A link.
    pub const SYMBOLIC_LINK: u8 = 7;

    /// The type of an inode.
    pub const fn of(kind: super::Kind) -> u8 {
        match kind {
            super::Kind::Directory => DIRECTORY,
            super::Kind::File => REGULAR_FILE,
            super::Kind::Link => SYMBOLIC_LINK,
        }
    }
}

/// An open directory.
pub struct Directory {
    /// The directory.
    pub handle: Handle,
    /// The name it was given to the program by.
    pub preopen: Option<String>,
    /// It stands for both the working directory and the root; see [`super::path`].
    pub working: bool,
}

/// What a descriptor is open on.
pub enum Object {
    /// A pipe or a terminal to read from.
    Input(Input),
    /// A pipe or a terminal to write to.
    Output(Output),
    /// A file.
    File(Rc<OpenFile>),
    /// A directory.
    Directory(Directory),
    /// A socket.
    Socket(Socket),
}

impl Object {
    /// Its type.
    pub fn filetype(&self) -> u8 {
        match self {
            Self::Input(Input::Terminal(_)) | Self::Output(Output::Terminal(_)) => filetype::CHARACTER_DEVICE,
            Self::Input(_) | Self::Output(_) => filetype::UNKNOWN,
            Self::File(_) => filetype::REGULAR_FILE,
            Self::Directory(_) => filetype::DIRECTORY,
            Self::Socket(socket) if socket.is_stream() => filetype::SOCKET_STREAM,
            Self::Socket(_) => filetype::SOCKET_DGRAM,
        }
    }

    /// The rights that make sense for it.
    pub const fn rights(&self) -> u64 {
        match self {
            Self::Input(_) => rights::STREAM | rights::FD_READ,
            Self::Output(_) => rights::STREAM | rights::FD_WRITE,
            Self::File(_) => rights::FILE,
            Self::Directory(_) => rights::DIRECTORY,
            Self::Socket(_) => rights::SOCKET,
        }
    }
}

/// One descriptor.
pub struct Descriptor {
    /// What it is open on.
    pub object: Object,
    flags: Cell<u16>,
    base: Cell<u64>,
    inheriting: Cell<u64>,
}

impl Descriptor {
    /// With all rights that make sense.
    pub fn new(object: Object) -> Self {
        let base = object.rights();
        let inheriting = if matches!(object, Object::Directory(_)) { u64::MAX } else { 0 };
        Self::limited(object, base, inheriting)
    }

    /// With those of `base` that make sense.
    pub fn limited(object: Object, base: u64, inheriting: u64) -> Self {
        let base = base & object.rights();
        let inheriting = inheriting & (rights::FILE | rights::DIRECTORY);
        Self { object, flags: Cell::new(0), base: Cell::new(base), inheriting: Cell::new(inheriting) }
    }

    /// Its flags.
    pub fn flags(&self) -> u16 {
        match &self.object {
            Object::File(file) if file.append.get() => self.flags.get() | flags::APPEND,
            _ => self.flags.get(),
        }
    }

    /// Sets its flags.
    pub fn set_flags(&self, flags: u16) {
        if let Object::File(file) = &self.object {
            file.append.set(flags & flags::APPEND != 0);
        }
        self.flags.set(flags & !flags::APPEND);
    }

    /// Whether it waits.
    pub fn blocks(&self) -> bool {
        self.flags.get() & flags::NONBLOCK == 0
    }

    /// Its rights, and those of what is opened through it.
    pub fn rights(&self) -> (u64, u64) {
        (self.base.get(), self.inheriting.get())
    }

    /// Gives rights up.
    pub fn drop_rights(&self, base: u64, inheriting: u64) -> Outcome {
        let (now, later) = self.rights();
        if base & !now != 0 || inheriting & !later != 0 {
            return Err(Errno::NotCapable.into());
        }
        self.base.set(base);
        self.inheriting.set(inheriting);
        Ok(())
    }

    /// Whether it has all of `wanted`. Reading and writing is asked for as a file's mode is elsewhere.
    pub fn require(&self, wanted: u64) -> Outcome {
        match wanted & !self.base.get() {
            0 => Ok(()),
            lacking if lacking & (rights::FD_READ | rights::FD_WRITE) != 0 => Err(Errno::BadF.into()),
            _ => Err(Errno::NotCapable.into()),
        }
    }

    /// The file.
    pub fn file(&self, wanted: u64) -> Outcome<&OpenFile> {
        match &self.object {
            Object::File(file) => self.require(wanted).map(|()| &**file),
            Object::Directory(_) => Err(Errno::IsDir.into()),
            Object::Input(_) | Object::Output(_) | Object::Socket(_) => Err(Errno::SPipe.into()),
        }
    }

    /// The directory.
    pub fn directory(&self, wanted: u64) -> Outcome<&Directory> {
        match &self.object {
            Object::Directory(directory) => self.require(wanted).map(|()| directory),
            _ => Err(Errno::NotDir.into()),
        }
    }

    /// The socket.
    pub fn socket(&self) -> Outcome<&Socket> {
        match &self.object {
            Object::Socket(socket) => Ok(socket),
            _ => Err(Errno::NotSock.into()),
        }
    }
}

/// The descriptors of a process.
#[derive(Default)]
pub struct Table(BTreeMap<u32, Rc<Descriptor>>);

impl Table {
    /// The descriptor of a number. It lives as long as a call uses it, whatever becomes of the number.
    pub fn get(&self, number: u32) -> Outcome<Rc<Descriptor>> {
        Ok(self.0.get(&number).cloned().ok_or(Errno::BadF)?)
    }

    /// Gives a descriptor the lowest free number.
    pub fn add(&mut self, descriptor: Descriptor) -> Outcome<u32> {
        self.has_room()?;
        let taken = self.0.keys();
        let number = (0u32..).zip(taken).find(|(free, taken)| free != *taken);
        let number = number.map_or(self.0.len() as u32, |(free, _)| free);
        self.0.insert(number, Rc::new(descriptor));
        Ok(number)
    }

    /// Whether another may be opened.
    pub fn has_room(&self) -> Outcome {
        if self.0.len() >= MAX_DESCRIPTORS {
            return Err(Errno::MFile.into());
        }
        if memory::kernel_room(DESCRIPTOR_BYTES) { Ok(()) } else { Err(Errno::NFile.into()) }
    }

    /// Closes a number.
    pub fn remove(&mut self, number: u32) -> Outcome<Rc<Descriptor>> {
        Ok(self.0.remove(&number).ok_or(Errno::BadF)?)
    }

    /// Moves a descriptor to another open number, which is closed.
    pub fn renumber(&mut self, from: u32, to: u32) -> Outcome<Option<Rc<Descriptor>>> {
        if !self.0.contains_key(&to) {
            return Err(Errno::BadF.into());
        }
        if from == to {
            return Ok(None);
        }
        let moved = self.remove(from)?;
        Ok(self.0.insert(to, moved))
    }
}

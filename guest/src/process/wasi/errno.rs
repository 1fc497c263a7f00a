//! Preview 1's error numbers, and what of the kernel's errors becomes which.

use crate::{fs::FileError, shell::Failure};

/// Why a call failed, as the program is told (`typenames.witx`, `errno`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Errno {
    /// The address or port is used by another socket.
    AddrInUse = 3,
    /// Not an address of this machine.
    AddrNotAvail = 4,
    /// No such address family here.
    AfNoSupport = 5,
    /// It would have to wait.
    Again = 6,
    /// Not an open descriptor, or not open for this.
    BadF = 8,
    /// Nobody listens there.
    ConnRefused = 14,
    /// The connection was reset.
    ConnReset = 15,
    /// No destination was given.
    DestAddrReq = 17,
    /// There is something of that name.
    Exist = 20,
    /// A pointer outside the program's memory.
    Fault = 21,
    /// A file would be too large.
    FBig = 22,
    /// A path that is not UTF-8.
    IlSeq = 25,
    /// The connection is being made.
    InProgress = 26,
    /// An argument that makes no sense.
    Inval = 28,
    /// The disk failed.
    Io = 29,
    /// It is connected.
    IsConn = 30,
    /// A directory where a file is wanted.
    IsDir = 31,
    /// Links that lead to links.
    Loop = 32,
    /// Too many descriptors.
    MFile = 33,
    /// A datagram that is too long.
    MsgSize = 35,
    /// A name that is too long.
    NameTooLong = 37,
    /// Too many files or sockets in the machine.
    NFile = 41,
    /// No memory for a socket.
    NoBufs = 42,
    /// There is no such thing.
    NoEnt = 44,
    /// No memory in the kernel.
    NoMem = 48,
    /// No such option of a socket.
    NoProtoOpt = 50,
    /// No space left.
    NoSpc = 51,
    /// Not connected.
    NotConn = 53,
    /// Not a directory.
    NotDir = 54,
    /// The directory holds something.
    NotEmpty = 55,
    /// Not a socket.
    NotSock = 57,
    /// Not supported.
    NotSup = 58,
    /// Not permitted.
    Perm = 63,
    /// Nobody reads.
    Pipe = 64,
    /// No such protocol.
    ProtoNoSupport = 66,
    /// Files cannot be changed.
    RoFs = 69,
    /// A pipe or a socket, which has no position.
    SPipe = 70,
    /// The descriptor does not have that right, or the path leads out of it.
    NotCapable = 76,
}

impl From<FileError> for Errno {
    fn from(error: FileError) -> Self {
        match error {
            FileError::NotFound => Self::NoEnt,
            FileError::IsDirectory => Self::IsDir,
            FileError::NotDirectory => Self::NotDir,
            FileError::Exists => Self::Exist,
            FileError::NotEmpty => Self::NotEmpty,
            FileError::Full => Self::NoSpc,
            FileError::TooMany => Self::NFile,
            FileError::TooLarge => Self::FBig,
            FileError::NameTooLong => Self::NameTooLong,
            FileError::Loop => Self::Loop,
            FileError::Invalid => Self::Inval,
            FileError::Damaged => Self::Io,
            FileError::ReadOnly => Self::RoFs,
            FileError::NotReady => Self::Again,
            FileError::Outside | FileError::Refused => Self::Perm,
        }
    }
}

impl From<Failure> for Errno {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Broken => Self::Pipe,
            Failure::File(_, error) => error.into(),
            // What the shell says of arguments does not come from pipes, terminals and files.
            _ => Self::Inval,
        }
    }
}

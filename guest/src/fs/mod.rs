//! The machine's files: a tree of inodes in memory.
//!
//! - [`tree`]: the namespace: inodes, directories, links, and who has what open; [`walk`]: from paths to inodes.
//! - [`store`]: what files hold. Nothing else knows how, so that another store can take its place.
//! - [`handle`]: what programs hold: a [`Handle`] keeps its inode alive, whatever happens to its names.
//!
//! Every inode has a VID for life. Inodes come from two layers: the image's read-only tree, whose bytes are shared
//! with every machine of the host, and what the machine wrote; a chunk is copied at the first write to it. Everything
//! is bounded: bytes, inodes, names, paths. A file's own time of reading is not kept: a read writes nothing, and what
//! is not written need not move.
//!
//! Not here: owners and permissions (a machine has one user), locks, devices.

mod handle;
mod store;
mod tree;
mod walk;

pub use handle::{Handle, OpenFile, OpenOptions};
pub use tree::{Facts, Kind, Row};
pub use walk::resolve;

use alloc::{format, vec::Vec};

use crate::local::Local;
use tree::Tree;

/// Inodes, the image's included.
pub const MAX_NODES: usize = 16 << 10;
/// Names in all directories: a file may have several.
pub const MAX_NAMES: usize = 2 * MAX_NODES;
/// Longest name.
pub const MAX_NAME: usize = 255;
/// Longest path.
pub const MAX_PATH: usize = 4096;
/// Longest file; most of one that long is a hole.
const MAX_LENGTH: u64 = 1 << 40;
/// Most of memory that files may hold: one part in this many.
const SHARE: u64 = 2;

/// Why a file cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// There is no such file or directory.
    #[error("no such file or directory")]
    NotFound,
    /// A directory where a file is wanted.
    #[error("is a directory")]
    IsDirectory,
    /// A file where a directory is wanted.
    #[error("is not a directory")]
    NotDirectory,
    /// There is something of that name.
    #[error("exists")]
    Exists,
    /// A directory that is removed or replaced holds something.
    #[error("directory is not empty")]
    NotEmpty,
    /// No room for more bytes.
    #[error("no space left")]
    Full,
    /// No room for another file or directory.
    #[error("too many files")]
    TooMany,
    /// An offset or a length beyond every file.
    #[error("file too large")]
    TooLarge,
    /// A name or a path that is too long.
    #[error("name too long")]
    NameTooLong,
    /// Links that lead to links without end.
    #[error("too many levels of links")]
    Loop,
    /// A path that leads out of the directory it starts in.
    #[error("leads outside")]
    Outside,
    /// A file where a link is wanted, a directory moved into itself, a name that stands for a directory already.
    #[error("invalid argument")]
    Invalid,
    /// A directory that is always there, a second name for a directory.
    #[error("not permitted")]
    Refused,
}

static FILES: Local<Tree> = Local::new();

/// What the image's read-only tree holds at a path.
#[derive(Clone, Copy)]
pub enum Base {
    /// A directory.
    Directory,
    /// A file of these bytes.
    File(&'static [u8]),
    /// A link to a path.
    Link(&'static str),
}

/// Makes the tree of a new machine: the image's, in which parents come first, then what every machine has.
pub fn start(user: &str, memory: u64, base: impl Iterator<Item = (&'static str, Base)>) {
    FILES.set(Tree::new(memory / SHARE));
    let root = Handle::root();
    for (path, what) in base {
        // An image that holds more than a machine takes is refused when it is built, and a name in it that cannot
        // be made is missing here, not fatal.
        let made = match what {
            Base::Directory => root.make_directory(path),
            Base::File(bytes) => root.place(path, bytes),
            Base::Link(target) => root.make_link(target, path),
        };
        if let Err(error) = made
            && error != FileError::Exists
        {
            crate::log!("image file {path}: {error}");
        }
    }
    let home = format!("/home/{user}");
    for directory in ["/etc", "/home", home.as_str(), "/tmp"] {
        let _ = make_directory(directory);
    }
    let motd = format!("This is {user}'s machine. It follows you; type `help` for what it can do.\n");
    for (path, text) in [("/etc/motd", motd.as_str()), ("/etc/hostname", "kage\n")] {
        if stat(path).is_err() {
            let _ = append(path, text.as_bytes());
        }
    }
}

/// Opens what is at an absolute path.
///
/// # Errors
/// [`FileError`].
pub fn open(path: &str, options: OpenOptions) -> Result<Handle, FileError> {
    Handle::root().open(path, options)
}

/// Appends, making the file if there is none. All of it or, when there is no room, a part.
///
/// # Errors
/// [`FileError`].
pub fn append(path: &str, bytes: &[u8]) -> Result<(), FileError> {
    let file = open(path, OpenOptions { create: true, ..OpenOptions::default() })?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let (_, count) = file.append(rest)?;
        rest = rest.get(count..).unwrap_or_default();
    }
    Ok(())
}

/// Makes a directory.
///
/// # Errors
/// [`FileError`].
pub fn make_directory(path: &str) -> Result<(), FileError> {
    Handle::root().make_directory(path)
}

/// Removes a file or an empty directory.
///
/// # Errors
/// [`FileError`].
pub fn remove(path: &str) -> Result<(), FileError> {
    let root = Handle::root();
    match root.unlink(path) {
        Err(FileError::IsDirectory) => root.remove_directory(path),
        other => other,
    }
}

/// Gives a file or a directory another path.
///
/// # Errors
/// [`FileError`].
pub fn rename(from: &str, to: &str) -> Result<(), FileError> {
    let root = Handle::root();
    root.rename(from, &root, to)
}

/// What a path is, links followed.
///
/// # Errors
/// [`FileError`].
pub fn stat(path: &str) -> Result<Facts, FileError> {
    Handle::root().stat_at(path, true)
}

/// The next inodes from number `from` on, at most `most`, for the resource table. A row's number plus one is
/// where the next page starts.
pub fn rows(from: u64, most: usize) -> Vec<Row> {
    FILES.get().rows(from, most)
}

/// Bytes that files hold, and may hold.
pub fn usage() -> (u64, u64) {
    FILES.get().usage()
}

//! The machine's files: a tree of inodes in memory, kept on the disk if the machine has one.
//!
//! - [`tree`]: the namespace: inodes, directories, links, and who has what open; [`walk`]: from paths to inodes.
//! - [`store`], [`content`]: what files hold, a cache over the disk; [`map`]: where it lies there; [`load`]: reads of it.
//! - [`handle`]: what programs hold: a [`Handle`] keeps its inode alive, whatever happens to its names.
//! - [`format`]: what lies on the disk; [`items`], [`records`], [`space`], [`volume`]: the same in memory, with what is
//!   to be written; [`commit`]: the writing; [`mount`] and [`image`]: how the tree begins; [`check`]: whether all fits together.
//!
//! The namespace is wholly in memory: what asks only for it is done at once. What reads or writes bytes may wait: for
//! the disk, or because too much has yet to be written. Nobody waits for a mount but who needs files ([`ready`]).
//!
//! **What a crash leaves**: all files as they were at one instant, which lies behind the last [`sync_all`] that
//! returned and at most some seconds back.
//!
//! Every inode has a VID for life. Inodes come from two layers: the image's read-only tree, whose bytes are shared
//! with every machine of the host, and what the machine wrote. Everything is bounded: bytes, inodes, names, paths. A
//! file's own time of reading is not kept: a read writes nothing, and what is not written need not move.
//!
//! Not here: owners, locks, devices, and any use of mode bits but to keep them (a machine has one user).

mod check;
mod commit;
mod content;
mod format;
mod handle;
mod image;
mod items;
mod load;
mod map;
mod mount;
mod records;
mod space;
mod store;
mod tree;
mod volume;
mod wait;
mod walk;

pub use check::check;
pub use commit::sync_all;
pub use handle::{Handle, OpenFile, OpenOptions};
pub use tree::{Facts, Kind, Row};
pub use walk::resolve;

use alloc::{rc::Rc, vec::Vec};
use core::{future::poll_fn, task::Poll};

use crate::{executor, local::Local, log, virtio::block};
use format::LEAST_BLOCKS;
use image::Image;
use store::Store;
use tree::Tree;

/// Inodes, the image's included.
pub const MAX_NODES: usize = 64 << 10;
/// Names in all directories: a file may have several, as many as its item on the disk has room for.
pub const MAX_NAMES: usize = 2 * MAX_NODES;
/// Longest name.
pub const MAX_NAME: usize = 255;
/// Longest path.
pub const MAX_PATH: usize = 4096;
/// Longest path that a link leads to: with a name it fits in a metadata block.
pub const MAX_TARGET: usize = 3072;
/// Longest file; most of one that long is a hole.
const MAX_LENGTH: u64 = 1 << 40;
/// Most of memory that files may hold without a disk: one part in this many.
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
    /// The disk does not give the bytes, or did not take them.
    #[error("input/output error")]
    Damaged,
    /// Nothing can be changed; the log says why.
    #[error("read-only file system")]
    ReadOnly,
    /// The disk is still being mounted.
    #[error("files are not ready yet")]
    NotReady,
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

/// Makes the tree of a machine: what is on the disk, over the image's, in which parents come first, and what every
/// machine has. Without a disk it is there at once, else once [`ready`] says so.
pub fn start(user: &str, memory: u64, base: impl Iterator<Item = (&'static str, Base)>) {
    let image = Image { user: user.into(), memory, base: base.collect() };
    let blocks = block::blocks();
    if blocks < LEAST_BLOCKS {
        if blocks > 0 {
            log!("files: a disk of {blocks} blocks is too small to be used");
        }
        let mut tree = Tree::new(Store::new(memory / SHARE, None));
        image.furnish_memory(&mut tree);
        FILES.set(tree);
        return;
    }
    FILES.set(Tree::empty(Store::new(0, None)));
    executor::spawn("files", async move {
        mount::mount(image).await;
        commit::keep().await;
    });
}

/// Takes over a tree whose mount is done.
fn install(tree: Tree) {
    let mut old = core::mem::replace(&mut *FILES.get(), tree);
    old.mounted.wake();
}

/// Returns once there are files.
pub async fn ready() {
    poll_fn(|context| {
        let mut tree = FILES.get();
        if !tree.mounting {
            return Poll::Ready(());
        }
        tree.mounted.add(context);
        Poll::Pending
    })
    .await;
}

/// Opens what is at an absolute path.
///
/// # Errors
/// [`FileError`].
pub fn open(path: &str, options: OpenOptions) -> Result<Handle, FileError> {
    Handle::root().open(path, options)
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

/// Bytes that files hold, and may hold: on the disk, or in memory where there is none.
pub fn usage() -> (u64, u64) {
    FILES.get().store.usage()
}

/// How the files are kept.
#[derive(Clone, Debug)]
pub struct State {
    /// On a disk, not in memory alone.
    pub disk: bool,
    /// Why nothing can be changed, if so.
    pub read_only: Option<Rc<str>>,
    /// Inodes.
    pub inodes: usize,
    /// Bytes of files in memory, and the most there may be.
    pub cached: (u64, u64),
    /// Bytes of files that no commit has begun to write.
    pub dirty: u64,
    /// Commits since the disk was made.
    pub commits: u64,
    /// Metadata blocks in use.
    pub records: usize,
}

/// How the files are kept.
pub fn state() -> State {
    let tree = FILES.get();
    let store = &tree.store;
    let volume = store.volume.as_ref();
    State {
        disk: volume.is_some(),
        read_only: store.read_only.clone(),
        inodes: tree.inodes(),
        cached: store.cached(),
        dirty: volume.map_or(0, |volume| u64::from(volume.dirty) * block::BLOCK as u64),
        commits: volume.map_or(0, |volume| volume.superblock.sequence),
        records: volume.map_or(0, |volume| volume.records.full()),
    }
}

/// Drops some of what is in memory and can be read again, since memory is short.
pub fn drop_some() {
    FILES.get().store.drop_some();
}

/// Gives up what damage has cost and lets files be written again; false when there is no disk that could be.
pub fn repair() -> bool {
    FILES.get().repair()
}

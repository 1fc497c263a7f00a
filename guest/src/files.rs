//! The machine's files: a tree in memory.
//!
//! Content lies in chunks, so that a growing file is never copied. Everything is bounded: bytes, names, entries.
//! Paths given here are absolute; [`resolve`] makes them so. Not here: permissions, links, times.

use alloc::{
    collections::BTreeMap,
    string::{String, ToString},
    vec::Vec,
};
use core::fmt;

use crate::{
    heap,
    local::Local,
    memory,
    vid::{self, Kind, Vid},
};

const CHUNK: usize = 16 << 10;
/// Bytes in all files together.
const MAX_BYTES: usize = 16 << 20;
/// Files and directories.
const MAX_ENTRIES: usize = 4096;
/// Longest path.
const MAX_PATH: usize = 1024;

/// Why a file cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileError {
    /// There is no such file or directory.
    NotFound,
    /// A directory where a file is wanted.
    IsDirectory,
    /// A file where a directory is wanted.
    NotDirectory,
    /// There is something of that name.
    Exists,
    /// A directory that is removed holds something.
    NotEmpty,
    /// No room.
    Full,
    /// A path that is too long, or a directory that is always there.
    Refused,
}

impl fmt::Display for FileError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NotFound => "no such file or directory",
            Self::IsDirectory => "is a directory",
            Self::NotDirectory => "is not a directory",
            Self::Exists => "exists",
            Self::NotEmpty => "directory is not empty",
            Self::Full => "no space left",
            Self::Refused => "not permitted",
        })
    }
}

/// What `stat` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// A directory, not a file.
    pub directory: bool,
    /// Bytes of a file, entries of a directory.
    pub size: usize,
    /// Its identity.
    pub vid: Vid,
}

enum Body {
    Directory,
    File { chunks: Vec<Vec<u8>>, length: usize },
}

struct Node {
    vid: Vid,
    body: Body,
}

struct Tree {
    nodes: BTreeMap<String, Node>,
    bytes: usize,
}

static TREE: Local<Tree> = Local::new();

/// Makes the tree of a new machine.
pub fn start(user: &str) {
    TREE.set(Tree { nodes: BTreeMap::new(), bytes: 0 });
    let home = alloc::format!("/home/{user}");
    let mut tree = TREE.get();
    for directory in ["/", "/etc", "/home", home.as_str(), "/tmp"] {
        // A new tree is not full, and parents come first.
        let _ = tree.add(directory, Body::Directory);
    }
    drop(tree);
    let motd = alloc::format!("This is {user}'s machine. It follows you; type `help` for what it can do.\n");
    for (path, text) in [("/etc/motd", motd.as_str()), ("/etc/hostname", "kage\n")] {
        let _ = append(path, text.as_bytes());
    }
}

/// Makes `path` absolute from `base`, without `.` and `..`.
pub fn resolve(base: &str, path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let base = if path.starts_with('/') { "" } else { base };
    for part in base.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    let mut whole = String::from("/");
    whole.push_str(&parts.join("/"));
    whole
}

fn parent(path: &str) -> &str {
    match path.rsplit_once('/') {
        Some(("", _)) | None => "/",
        Some((parent, _)) => parent,
    }
}

impl Tree {
    fn add(&mut self, path: &str, body: Body) -> Result<(), FileError> {
        if path.len() > MAX_PATH {
            return Err(FileError::Refused);
        }
        if self.nodes.len() >= MAX_ENTRIES {
            return Err(FileError::Full);
        }
        if path != "/" {
            match self.nodes.get(parent(path)) {
                None => return Err(FileError::NotFound),
                Some(Node { body: Body::File { .. }, .. }) => return Err(FileError::NotDirectory),
                Some(Node { body: Body::Directory, .. }) => {}
            }
        }
        let vid = vid::next(Kind::File);
        self.nodes.insert(path.to_string(), Node { vid, body });
        Ok(())
    }

    fn file(&mut self, path: &str) -> Result<(&mut Vec<Vec<u8>>, &mut usize), FileError> {
        match self.nodes.get_mut(path).map(|node| &mut node.body) {
            None => Err(FileError::NotFound),
            Some(Body::Directory) => Err(FileError::IsDirectory),
            Some(Body::File { chunks, length }) => Ok((chunks, length)),
        }
    }

    fn children<'a>(&'a self, path: &'a str) -> impl Iterator<Item = (&'a str, &'a Node)> {
        let from = if path == "/" { "/".to_string() } else { alloc::format!("{path}/") };
        let skip = from.len();
        self.nodes
            .range(from.clone()..)
            .take_while(move |(name, _)| name.starts_with(&from))
            .map(move |(name, node)| (&name[skip..], node))
            .filter(|(name, _)| !name.is_empty() && !name.contains('/'))
    }
}

/// Appends, making the file if there is none.
///
/// # Errors
/// [`FileError`]; nothing is appended then.
pub fn append(path: &str, bytes: &[u8]) -> Result<(), FileError> {
    let mut tree = TREE.get();
    let tree = &mut *tree;
    if tree.bytes + bytes.len() > MAX_BYTES
        || memory::heap_free_bytes() < bytes.len() + CHUNK + heap::RESERVE / 2
    {
        return Err(FileError::Full);
    }
    if !tree.nodes.contains_key(path) {
        tree.add(path, Body::File { chunks: Vec::new(), length: 0 })?;
    }
    let (chunks, length) = tree.file(path)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        if chunks.last().is_none_or(|chunk| chunk.len() == CHUNK) {
            chunks.push(Vec::new());
        }
        let Some(chunk) = chunks.last_mut() else { return Err(FileError::Full) };
        let (now, later) = rest.split_at(rest.len().min(CHUNK - chunk.len()));
        chunk.extend_from_slice(now);
        rest = later;
    }
    *length += bytes.len();
    tree.bytes += bytes.len();
    Ok(())
}

/// Empties a file, or makes an empty one.
///
/// # Errors
/// [`FileError`].
pub fn truncate(path: &str) -> Result<(), FileError> {
    let mut tree = TREE.get();
    if !tree.nodes.contains_key(path) {
        return tree.add(path, Body::File { chunks: Vec::new(), length: 0 });
    }
    let (chunks, length) = tree.file(path)?;
    chunks.clear();
    let freed = core::mem::take(length);
    tree.bytes -= freed;
    Ok(())
}

/// Reads from `offset`; 0 at the end.
///
/// # Errors
/// [`FileError`].
pub fn read(path: &str, offset: usize, into: &mut [u8]) -> Result<usize, FileError> {
    let mut tree = TREE.get();
    let (chunks, _) = tree.file(path)?;
    let Some(bytes) = chunks.get(offset / CHUNK).and_then(|chunk| chunk.get(offset % CHUNK..)) else {
        return Ok(0);
    };
    let count = bytes.len().min(into.len());
    into[..count].copy_from_slice(&bytes[..count]);
    Ok(count)
}

/// Makes a directory.
///
/// # Errors
/// [`FileError`].
pub fn make_directory(path: &str) -> Result<(), FileError> {
    let mut tree = TREE.get();
    if tree.nodes.contains_key(path) {
        return Err(FileError::Exists);
    }
    tree.add(path, Body::Directory)
}

/// Removes a file or an empty directory.
///
/// # Errors
/// [`FileError`].
pub fn remove(path: &str) -> Result<(), FileError> {
    let mut tree = TREE.get();
    let freed = match tree.nodes.get(path).map(|node| &node.body) {
        None => return Err(FileError::NotFound),
        Some(Body::File { length, .. }) => *length,
        Some(Body::Directory) if path == "/" => return Err(FileError::Refused),
        Some(Body::Directory) if tree.children(path).next().is_some() => return Err(FileError::NotEmpty),
        Some(Body::Directory) => 0,
    };
    tree.nodes.remove(path);
    tree.bytes -= freed;
    Ok(())
}

/// Names in a directory, in order; a file lists itself.
///
/// # Errors
/// [`FileError::NotFound`].
pub fn list(path: &str) -> Result<Vec<(String, Facts)>, FileError> {
    let tree = TREE.get();
    let node = tree.nodes.get(path).ok_or(FileError::NotFound)?;
    match node.body {
        Body::File { .. } => Ok(alloc::vec![(path.to_string(), facts(&tree, path, node))]),
        Body::Directory => Ok(tree
            .children(path)
            .map(|(name, node)| (name.to_string(), facts(&tree, &resolve(path, name), node)))
            .collect()),
    }
}

/// What a path is.
///
/// # Errors
/// [`FileError::NotFound`].
pub fn stat(path: &str) -> Result<Facts, FileError> {
    let tree = TREE.get();
    let node = tree.nodes.get(path).ok_or(FileError::NotFound)?;
    Ok(facts(&tree, path, node))
}

fn facts(tree: &Tree, path: &str, node: &Node) -> Facts {
    match node.body {
        Body::Directory => Facts { directory: true, size: tree.children(path).count(), vid: node.vid },
        Body::File { length, .. } => Facts { directory: false, size: length, vid: node.vid },
    }
}

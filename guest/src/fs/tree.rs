//! The namespace: inodes, the directories that name them, and who has what open.
//!
//! An inode lives as long as a name or a handle leads to it. A directory has one name at most, a file several.
//! Entries of a directory carry a number that only grows, so that reading one in pieces neither misses nor repeats
//! an entry, whatever is added and removed meanwhile.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    string::String,
    vec::Vec,
};
use core::{ops::Bound, time::Duration};

use super::{
    FileError, MAX_NAME, MAX_NAMES, MAX_NODES, MAX_PATH,
    store::{Number, Store},
};
use crate::{
    memory, time,
    vid::{self, Vid},
};

/// Most that an inode and its name take of the kernel's heap.
const NODE_BYTES: usize = 2048;
/// First number of a directory's entries; the two before are `.` and `..`.
pub const FIRST_ENTRY: u64 = 2;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A file.
    File,
    /// A link to a path.
    Link,
}

/// Times of an inode, since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Last read, as set by programs; reading does not change it.
    pub accessed: Duration,
    /// Last change of its content.
    pub modified: Duration,
    /// Last change of anything.
    pub changed: Duration,
}

/// What `stat` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its identity.
    pub vid: Vid,
    /// What it is.
    pub kind: Kind,
    /// Bytes of a file or a link, entries of a directory.
    pub size: u64,
    /// Names that lead to it.
    pub links: u32,
    /// Its times.
    pub times: Times,
}

/// A row of the list of inodes.
#[derive(Clone, Debug)]
pub struct Row {
    /// What `stat` tells.
    pub facts: Facts,
    /// One of its paths; none for a file that only programs still hold, and none longer than a path may be.
    pub path: Option<String>,
}

/// An entry of a directory.
pub struct Entry {
    /// Where reading goes on after it.
    pub next: u64,
    /// Its name.
    pub name: Rc<str>,
    /// The inode's number.
    pub number: Number,
    /// What it is.
    pub kind: Kind,
}

#[derive(Default)]
pub(super) struct Directory {
    names: BTreeMap<Rc<str>, (u64, Number)>,
    order: BTreeMap<u64, Rc<str>>,
    next: u64,
}

impl Directory {
    fn insert(&mut self, name: &str, number: Number) -> Rc<str> {
        let name: Rc<str> = Rc::from(name);
        let entry = self.next.max(FIRST_ENTRY);
        self.next = entry + 1;
        if let Some((old, _)) = self.names.insert(Rc::clone(&name), (entry, number)) {
            self.order.remove(&old);
        }
        self.order.insert(entry, Rc::clone(&name));
        name
    }

    fn remove(&mut self, name: &str) {
        if let Some((entry, _)) = self.names.remove(name) {
            self.order.remove(&entry);
        }
    }
}

pub(super) enum Body {
    Directory(Directory),
    File,
    Link(Rc<str>),
}

struct Node {
    vid: Vid,
    body: Body,
    /// A name that leads here: the directory and the name in it. The root is its own parent.
    at: Option<(Number, Rc<str>)>,
    /// Its other names.
    others: BTreeSet<(Number, Rc<str>)>,
    links: u32,
    opens: u32,
    times: Times,
}

impl Node {
    /// Notes a name that leads here.
    fn note(&mut self, directory: Number, name: Rc<str>) {
        self.links += 1;
        if let Some(before) = self.at.replace((directory, name)) {
            self.others.insert(before);
        }
    }

    /// Forgets a name that led here.
    fn forget(&mut self, directory: Number, name: &str) {
        self.links = self.links.saturating_sub(1);
        if self.at.as_ref().is_some_and(|(at, known)| *at == directory && **known == *name) {
            self.at = self.others.pop_first();
        } else {
            self.others.remove(&(directory, Rc::from(name)));
        }
    }
}

/// All inodes.
pub struct Tree {
    nodes: BTreeMap<Number, Node>,
    root: Number,
    /// Entries of all directories.
    names: usize,
    pub(super) store: Store,
}

impl Tree {
    /// A tree with an empty root, whose files hold at most `bytes` bytes.
    pub fn new(bytes: u64) -> Self {
        let mut tree = Self { nodes: BTreeMap::new(), root: 0, names: 0, store: Store::new(bytes) };
        tree.root = tree.add(Body::Directory(Directory::default()));
        if let Some(root) = tree.nodes.get_mut(&tree.root) {
            root.links = 1;
            root.at = Some((tree.root, Rc::from("")));
        }
        tree
    }

    /// The root's number.
    pub const fn root(&self) -> Number {
        self.root
    }

    /// Bytes held, and the most there may be.
    pub const fn usage(&self) -> (u64, u64) {
        self.store.usage()
    }

    fn node(&self, number: Number) -> Result<&Node, FileError> {
        self.nodes.get(&number).ok_or(FileError::NotFound)
    }

    fn node_mut(&mut self, number: Number) -> Result<&mut Node, FileError> {
        self.nodes.get_mut(&number).ok_or(FileError::NotFound)
    }

    fn directory(&self, number: Number) -> Result<&Directory, FileError> {
        match &self.node(number)?.body {
            Body::Directory(directory) => Ok(directory),
            Body::File | Body::Link(_) => Err(FileError::NotDirectory),
        }
    }

    fn directory_mut(&mut self, number: Number) -> Result<&mut Directory, FileError> {
        match &mut self.node_mut(number)?.body {
            Body::Directory(directory) => Ok(directory),
            Body::File | Body::Link(_) => Err(FileError::NotDirectory),
        }
    }

    /// What an inode is.
    pub fn kind(&self, number: Number) -> Result<Kind, FileError> {
        Ok(match self.node(number)?.body {
            Body::Directory(_) => Kind::Directory,
            Body::File => Kind::File,
            Body::Link(_) => Kind::Link,
        })
    }

    /// Where a link leads.
    pub fn target(&self, number: Number) -> Result<Rc<str>, FileError> {
        match &self.node(number)?.body {
            Body::Link(target) => Ok(Rc::clone(target)),
            Body::Directory(_) | Body::File => Err(FileError::Invalid),
        }
    }

    /// The inode of a name.
    pub fn find(&self, directory: Number, name: &str) -> Result<Option<Number>, FileError> {
        Ok(self.directory(directory)?.names.get(name).map(|(_, number)| *number))
    }

    /// The directory that a directory lies in; a removed one lies nowhere.
    pub fn parent(&self, directory: Number) -> Result<Number, FileError> {
        self.node(directory)?.at.as_ref().map(|(parent, _)| *parent).ok_or(FileError::NotFound)
    }

    fn add(&mut self, body: Body) -> Number {
        let vid = vid::next(vid::Kind::File);
        let now = time::wall();
        if matches!(body, Body::File) {
            self.store.create(vid.index(), &[]);
        }
        let times = Times { accessed: now, modified: now, changed: now };
        self.nodes.insert(
            vid.index(),
            Node { vid, body, at: None, others: BTreeSet::new(), links: 0, opens: 0, times },
        );
        vid.index()
    }

    /// Makes an inode and names it.
    pub fn make(&mut self, directory: Number, name: &str, body: Body) -> Result<Number, FileError> {
        self.nameable(directory, name)?;
        if self.directory(directory)?.names.contains_key(name) {
            return Err(FileError::Exists);
        }
        if self.nodes.len() >= MAX_NODES || !vid::has_room() {
            return Err(FileError::TooMany);
        }
        self.has_room()?;
        let number = self.add(body);
        self.name(directory, name, number);
        Ok(number)
    }

    /// Whether there may be another name.
    fn has_room(&self) -> Result<(), FileError> {
        if self.names >= MAX_NAMES {
            return Err(FileError::TooMany);
        }
        if memory::kernel_room(NODE_BYTES) { Ok(()) } else { Err(FileError::Full) }
    }

    /// Whether a name may be added to a directory: that is one, has a name itself, and the name is not too long.
    fn nameable(&self, directory: Number, name: &str) -> Result<(), FileError> {
        if name.len() > MAX_NAME {
            return Err(FileError::NameTooLong);
        }
        self.directory(directory)?;
        if self.node(directory)?.links == 0 { Err(FileError::NotFound) } else { Ok(()) }
    }

    fn name(&mut self, directory: Number, name: &str, number: Number) {
        let Ok(entries) = self.directory_mut(directory) else { return };
        let name = entries.insert(name, number);
        self.names += 1;
        if let Ok(node) = self.node_mut(number) {
            node.note(directory, name);
        }
        self.touch(directory);
        self.change(number);
    }

    fn unname(&mut self, directory: Number, name: &str, number: Number) {
        self.forget(directory, name, number);
        self.touch(directory);
        self.change(number);
        self.reap(number);
    }

    /// Removes a name, and leaves the inode even if it has no other.
    fn forget(&mut self, directory: Number, name: &str, number: Number) {
        if let Ok(entries) = self.directory_mut(directory) {
            entries.remove(name);
            self.names = self.names.saturating_sub(1);
        }
        if let Ok(node) = self.node_mut(number) {
            node.forget(directory, name);
        }
    }

    /// Forgets an inode to which nothing leads.
    fn reap(&mut self, number: Number) {
        if self.nodes.get(&number).is_some_and(|node| node.links == 0 && node.opens == 0) {
            self.nodes.remove(&number);
            self.store.remove(number);
        }
    }

    /// Counts a handle.
    pub fn open(&mut self, number: Number) -> Result<(), FileError> {
        self.node_mut(number)?.opens += 1;
        Ok(())
    }

    /// Counts a handle less.
    pub fn close(&mut self, number: Number) {
        if let Ok(node) = self.node_mut(number) {
            node.opens = node.opens.saturating_sub(1);
        }
        self.reap(number);
    }

    /// Gives a file another name.
    pub fn link(&mut self, number: Number, directory: Number, name: &str) -> Result<(), FileError> {
        self.nameable(directory, name)?;
        if self.kind(number)? == Kind::Directory {
            return Err(FileError::Refused);
        }
        if self.directory(directory)?.names.contains_key(name) {
            return Err(FileError::Exists);
        }
        self.has_room()?;
        self.name(directory, name, number);
        Ok(())
    }

    /// Removes a name of a file or a link.
    pub fn unlink(&mut self, directory: Number, name: &str) -> Result<(), FileError> {
        let number = self.find(directory, name)?.ok_or(FileError::NotFound)?;
        if self.kind(number)? == Kind::Directory {
            return Err(FileError::IsDirectory);
        }
        self.unname(directory, name, number);
        Ok(())
    }

    /// Removes an empty directory.
    pub fn remove_directory(&mut self, directory: Number, name: &str) -> Result<(), FileError> {
        let number = self.find(directory, name)?.ok_or(FileError::NotFound)?;
        if !self.directory(number)?.names.is_empty() {
            return Err(FileError::NotEmpty);
        }
        self.unname(directory, name, number);
        Ok(())
    }

    /// Gives what a name leads to another name, in place of what had that.
    pub fn rename(
        &mut self,
        (from, old): (Number, &str),
        (to, new): (Number, &str),
    ) -> Result<(), FileError> {
        let number = self.find(from, old)?.ok_or(FileError::NotFound)?;
        self.nameable(to, new)?;
        let moves_directory = self.kind(number)? == Kind::Directory;
        if moves_directory && self.lies_in(to, number) {
            return Err(FileError::Invalid);
        }
        if let Some(replaced) = self.find(to, new)? {
            if replaced == number {
                return Ok(());
            }
            match (moves_directory, self.kind(replaced)?) {
                (true, Kind::Directory) => self.remove_directory(to, new)?,
                (true, Kind::File | Kind::Link) => return Err(FileError::NotDirectory),
                (false, Kind::Directory) => return Err(FileError::IsDirectory),
                (false, Kind::File | Kind::Link) => self.unlink(to, new)?,
            }
        }
        // Named anew first, so that it never goes without.
        self.name(to, new, number);
        self.forget(from, old, number);
        self.touch(from);
        Ok(())
    }

    /// Whether a directory is `ancestor` or lies below it.
    fn lies_in(&self, directory: Number, ancestor: Number) -> bool {
        let mut at = directory;
        loop {
            if at == ancestor {
                return true;
            }
            match self.parent(at) {
                Ok(parent) if parent != at => at = parent,
                _ => return false,
            }
        }
    }

    /// Entries of a directory from number `from` on, `.` and `..` first, until `take` has enough.
    pub fn entries(
        &self,
        directory: Number,
        from: u64,
        mut take: impl FnMut(&Entry) -> bool,
    ) -> Result<(), FileError> {
        let entries = self.directory(directory)?;
        // What lies in a removed directory's place is itself.
        let parent = self.parent(directory).unwrap_or(directory);
        for (number, name, at) in [(directory, ".", 0), (parent, "..", 1)] {
            let entry = Entry { next: at + 1, name: Rc::from(name), number, kind: Kind::Directory };
            if from <= at && !take(&entry) {
                return Ok(());
            }
        }
        for (at, name) in entries.order.range((Bound::Included(from), Bound::Unbounded)) {
            let Some((_, number)) = entries.names.get(name) else { continue };
            let kind = self.kind(*number)?;
            if !take(&Entry { next: at + 1, name: Rc::clone(name), number: *number, kind }) {
                break;
            }
        }
        Ok(())
    }

    /// What `stat` tells.
    pub fn facts(&self, number: Number) -> Result<Facts, FileError> {
        let node = self.node(number)?;
        let (kind, size) = match &node.body {
            Body::Directory(directory) => (Kind::Directory, directory.names.len() as u64),
            Body::File => (Kind::File, self.store.length(number)),
            Body::Link(target) => (Kind::Link, target.len() as u64),
        };
        Ok(Facts { vid: node.vid, kind, size, links: node.links, times: node.times })
    }

    /// Notes a change of content.
    pub fn touch(&mut self, number: Number) {
        let now = time::wall();
        if let Ok(node) = self.node_mut(number) {
            node.times.modified = now;
            node.times.changed = now;
        }
    }

    fn change(&mut self, number: Number) {
        let now = time::wall();
        if let Ok(node) = self.node_mut(number) {
            node.times.changed = now;
        }
    }

    /// Sets the times that are given.
    pub fn set_times(
        &mut self,
        number: Number,
        accessed: Option<Duration>,
        modified: Option<Duration>,
    ) -> Result<(), FileError> {
        let times = &mut self.node_mut(number)?.times;
        times.accessed = accessed.unwrap_or(times.accessed);
        times.modified = modified.unwrap_or(times.modified);
        times.changed = time::wall();
        Ok(())
    }

    /// A path of an inode, if names lead to it and it is not too long.
    pub fn path(&self, number: Number) -> Option<String> {
        let mut parts: Vec<&str> = Vec::new();
        let (mut at, mut length) = (number, 0);
        while at != self.root {
            let (parent, name) = self.node(at).ok()?.at.as_ref()?;
            parts.push(name);
            length += name.len() + 1;
            if length > MAX_PATH {
                return None;
            }
            at = *parent;
        }
        let mut path = String::from(if parts.is_empty() { "/" } else { "" });
        for part in parts.iter().rev() {
            path.push('/');
            path.push_str(part);
        }
        Some(path)
    }

    /// Inodes from a number on, at most `most`.
    pub fn rows(&self, from: u64, most: usize) -> Vec<Row> {
        let nodes = self.nodes.range(from..).take(most);
        nodes
            .filter_map(|(&number, _)| {
                let facts = self.facts(number).ok()?;
                Some(Row { facts, path: self.path(number) })
            })
            .collect()
    }
}

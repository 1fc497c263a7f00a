//! The namespace: inodes, the directories that name them, and who has what open.
//!
//! An inode lives as long as a name or a handle leads to it. A directory has one name at most, a file several.
//! Entries of a directory carry a number that only grows, so that reading one in pieces neither misses nor repeats
//! an entry, whatever is added and removed meanwhile.

use alloc::{collections::BTreeMap, rc::Rc, string::String, vec::Vec};
use core::{ops::Bound, time::Duration};

use super::{
    FileError, MAX_NAME, MAX_NAMES, MAX_NODES, MAX_PATH,
    format::{PathHash, ROOM, node_bytes},
    store::{Number, Store},
    wait::Waiters,
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
    /// Mode bits, as others have them; nothing here asks for them.
    pub mode: u16,
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
    pub names: BTreeMap<Rc<str>, (u64, Number)>,
    order: BTreeMap<u64, Rc<str>>,
    next: u64,
}

impl Directory {
    pub fn insert(&mut self, name: Rc<str>, number: Number) {
        let entry = self.next.max(FIRST_ENTRY);
        self.next = entry + 1;
        if let Some((old, _)) = self.names.insert(Rc::clone(&name), (entry, number)) {
            self.order.remove(&old);
        }
        self.order.insert(entry, name);
    }

    pub fn remove(&mut self, name: &str) {
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

pub(super) struct Node {
    pub vid: Vid,
    pub body: Body,
    /// The names that lead here: directories and the names in them. The root has none.
    pub names: Vec<(Number, Rc<str>)>,
    pub opens: u32,
    pub mode: u16,
    pub times: Times,
    /// Where it comes from in the image.
    pub base: Option<PathHash>,
    /// The metadata block that holds it; 0 = none yet.
    pub home: u32,
}

/// Mode bits of what is made.
pub(super) const fn default_mode(body: &Body) -> u16 {
    match body {
        Body::Directory(_) => 0o755,
        Body::File => 0o644,
        Body::Link(_) => 0o777,
    }
}

/// All inodes.
pub struct Tree {
    pub(super) nodes: BTreeMap<Number, Node>,
    root: Number,
    /// Entries of all directories.
    pub(super) names: usize,
    pub(super) store: Store,
    /// What is on the disk is not known yet.
    pub(super) mounting: bool,
    /// Who waits until it is.
    pub(super) mounted: Waiters,
}

impl Tree {
    /// A tree whose root is still to be made.
    pub fn empty(store: Store) -> Self {
        Self { nodes: BTreeMap::new(), root: 0, names: 0, store, mounting: true, mounted: Waiters::new() }
    }

    /// A tree with an empty root.
    pub fn new(store: Store) -> Self {
        let mut tree = Self::empty(store);
        tree.mounting = false;
        tree.root = tree.add(Body::Directory(Directory::default()));
        tree.mark(tree.root);
        tree
    }

    /// Says which inode is the root.
    pub fn set_root(&mut self, root: Number) {
        self.root = root;
    }

    /// The root's number.
    pub const fn root(&self) -> Number {
        self.root
    }

    pub(super) fn node(&self, number: Number) -> Result<&Node, FileError> {
        self.nodes.get(&number).ok_or(FileError::NotFound)
    }

    pub(super) fn node_mut(&mut self, number: Number) -> Result<&mut Node, FileError> {
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
        if directory == self.root {
            return Ok(directory);
        }
        self.node(directory)?.names.first().map(|(parent, _)| *parent).ok_or(FileError::NotFound)
    }

    fn add(&mut self, body: Body) -> Number {
        // A disk that could only be read may hold identities that this machine gives out.
        let vid = loop {
            let vid = vid::next(vid::Kind::File);
            if !self.nodes.contains_key(&vid.index()) {
                break vid;
            }
        };
        let now = time::wall();
        if matches!(body, Body::File) {
            self.store.create(vid.index(), &[]);
        }
        let times = Times { accessed: now, modified: now, changed: now };
        let mode = default_mode(&body);
        let node = Node { vid, body, names: Vec::new(), opens: 0, mode, times, base: None, home: 0 };
        self.nodes.insert(vid.index(), node);
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
        let target = if let Body::Link(target) = &body { target.len() } else { 0 };
        self.room_for(node_bytes([name].into_iter(), target))?;
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
        self.store.writable()?;
        if name.len() > MAX_NAME {
            return Err(FileError::NameTooLong);
        }
        self.directory(directory)?;
        if self.is_named(directory) { Ok(()) } else { Err(FileError::NotFound) }
    }

    /// Whether any name leads to an inode.
    pub fn is_named(&self, number: Number) -> bool {
        number == self.root || self.node(number).is_ok_and(|node| !node.names.is_empty())
    }

    fn name(&mut self, directory: Number, name: &str, number: Number) {
        let Ok(entries) = self.directory_mut(directory) else { return };
        let name: Rc<str> = Rc::from(name);
        entries.insert(Rc::clone(&name), number);
        self.names += 1;
        if let Ok(node) = self.node_mut(number) {
            if node.names.is_empty() {
                node.names.reserve_exact(1);
            }
            node.names.push((directory, name));
        }
        self.touch(directory);
        self.change(number);
        let bytes = self.item_bytes(number, None);
        if let Some(volume) = &mut self.store.volume {
            volume.mark(number, bytes);
        }
    }

    pub(super) fn unname(&mut self, directory: Number, name: &str, number: Number) {
        self.forget(directory, name, number);
        self.touch(directory);
        self.change(number);
        if !self.is_named(number) {
            self.lose(number);
        }
        self.reap(number);
    }

    /// Removes a name, and leaves the inode even if it has no other.
    fn forget(&mut self, directory: Number, name: &str, number: Number) {
        if let Ok(entries) = self.directory_mut(directory) {
            entries.remove(name);
            self.names = self.names.saturating_sub(1);
        }
        if let Ok(node) = self.node_mut(number) {
            node.names.retain(|(at, known)| (*at, &**known) != (directory, name));
        }
    }

    /// Forgets an inode to which nothing leads.
    fn reap(&mut self, number: Number) {
        let nothing = |node: &Node| node.names.is_empty() && node.opens == 0;
        if number != self.root && self.nodes.get(&number).is_some_and(nothing) {
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
        let bytes = self.item_bytes(number, Some(name));
        if bytes > ROOM {
            return Err(FileError::TooMany);
        }
        self.has_room()?;
        self.room_for(bytes)?;
        self.name(directory, name, number);
        Ok(())
    }

    /// Removes a name of a file or a link.
    pub fn unlink(&mut self, directory: Number, name: &str) -> Result<(), FileError> {
        self.store.writable()?;
        let number = self.find(directory, name)?.ok_or(FileError::NotFound)?;
        if self.kind(number)? == Kind::Directory {
            return Err(FileError::IsDirectory);
        }
        self.unname(directory, name, number);
        Ok(())
    }

    /// Removes an empty directory.
    pub fn remove_directory(&mut self, directory: Number, name: &str) -> Result<(), FileError> {
        self.store.writable()?;
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
        let bytes = self.item_bytes(number, Some(new));
        if new.len() > old.len() {
            if bytes > ROOM {
                return Err(FileError::TooMany);
            }
            self.room_for(bytes)?;
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
        let links = node.names.len() as u32 + u32::from(number == self.root);
        Ok(Facts { vid: node.vid, kind, size, links, mode: node.mode, times: node.times })
    }

    /// Notes a change of content.
    pub fn touch(&mut self, number: Number) {
        let now = time::wall();
        if let Ok(node) = self.node_mut(number) {
            node.times.modified = now;
            node.times.changed = now;
        }
        self.mark(number);
    }

    fn change(&mut self, number: Number) {
        let now = time::wall();
        if let Ok(node) = self.node_mut(number) {
            node.times.changed = now;
        }
        self.mark(number);
    }

    /// Sets the times that are given.
    pub fn set_times(
        &mut self,
        number: Number,
        accessed: Option<Duration>,
        modified: Option<Duration>,
    ) -> Result<(), FileError> {
        self.store.writable()?;
        let times = &mut self.node_mut(number)?.times;
        times.accessed = accessed.unwrap_or(times.accessed);
        times.modified = modified.unwrap_or(times.modified);
        times.changed = time::wall();
        self.mark(number);
        Ok(())
    }

    /// Sets the mode bits.
    pub fn set_mode(&mut self, number: Number, mode: u16) -> Result<(), FileError> {
        self.store.writable()?;
        self.node_mut(number)?.mode = mode & 0o7777;
        self.change(number);
        Ok(())
    }

    /// A path of an inode, if names lead to it and it is not too long.
    pub fn path(&self, number: Number) -> Option<String> {
        let mut parts: Vec<&str> = Vec::new();
        let (mut at, mut length) = (number, 0);
        while at != self.root {
            let (parent, name) = self.node(at).ok()?.names.first()?;
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

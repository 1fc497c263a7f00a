//! The image's tree under what is on the disk; [`super::format`] says what belongs to whom.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    rc::Rc,
    string::String,
    vec::Vec,
};

use super::{
    Base, FileError,
    format::{Key, PathHash, path_hash},
    store::Number,
    tree::{Body, Directory, Kind, Tree},
};
use crate::{executor, log};

/// What a machine's tree is made from.
pub struct Image {
    /// The user's name, as it may stand in a path.
    pub user: String,
    /// Memory of the machine.
    pub memory: u64,
    /// The image's files, parents first.
    pub base: Vec<(&'static str, Base)>,
}

/// A file of the image, in estimated nanoseconds.
const COST: u64 = 2_000;

impl Image {
    /// Puts the image's files in their places, and what every machine has; a fresh machine is greeted.
    pub async fn furnish(&self, tree: &mut Tree, fresh: bool) {
        let mut merge = Merge::new(tree);
        for (path, what) in &self.base {
            merge.place(tree, path, *what);
            executor::work(COST).await;
        }
        merge.finish(tree);
        self.provide(tree, fresh);
    }

    /// The same for a machine that has no disk to wait for.
    pub fn furnish_memory(&self, tree: &mut Tree) {
        let mut merge = Merge::new(tree);
        for (path, what) in &self.base {
            merge.place(tree, path, *what);
        }
        self.provide(tree, true);
    }

    fn provide(&self, tree: &mut Tree, fresh: bool) {
        let root = tree.root();
        for (at, name) in [("/", "etc"), ("/", "home"), ("/home", self.user.as_str()), ("/", "tmp")] {
            if let Ok(found) = tree.walk((root, root), at, true)
                && let Some(directory) = found.number
            {
                // What is in its way is the user's.
                let _ = tree.make(directory, name, Body::Directory(Directory::default()));
            }
        }
        let user = &self.user;
        let motd = format!("This is {user}'s machine. It follows you; type `help` for what it can do.\n");
        for (name, text) in [("motd", motd.as_str()), ("hostname", "kage\n")] {
            if !fresh {
                break;
            }
            let Ok(Some(etc)) = tree.find(root, "etc") else { break };
            if let Ok(number) = tree.make(etc, name, Body::File) {
                tree.store.fill(number, text.as_bytes());
                tree.touch(number);
            }
        }
    }
}

/// Finds what an image's paths lead to.
struct Merge {
    bound: BTreeMap<PathHash, Number>,
    /// Those that this image has.
    seen: BTreeSet<PathHash>,
}

impl Merge {
    fn new(tree: &Tree) -> Self {
        let bound = tree.nodes.iter().filter_map(|(&number, node)| Some((node.base?, number)));
        Self { bound: bound.collect(), seen: BTreeSet::new() }
    }

    fn place(&mut self, tree: &mut Tree, path: &str, what: Base) {
        let hash = path_hash(path);
        self.seen.insert(hash);
        if tree.store.volume.as_ref().is_some_and(|volume| volume.removed.contains_key(&hash)) {
            return;
        }
        if let Some(&number) = self.bound.get(&hash) {
            adopt(tree, number, what);
            return;
        }
        match self.make(tree, path, what) {
            Ok(number) => {
                self.bound.insert(hash, number);
            }
            // An image that holds more than a machine takes is refused when it is built, and a name in it that cannot
            // be made is missing here, not fatal.
            Err(error) => log!("image file {path}: {error}"),
        }
    }

    fn make(&self, tree: &mut Tree, path: &str, what: Base) -> Result<Number, FileError> {
        let (parent, name) = path.rsplit_once('/').ok_or(FileError::Invalid)?;
        let directory = match parent {
            "" => tree.root(),
            parent => *self.bound.get(&path_hash(parent)).ok_or(FileError::NotFound)?,
        };
        if let Some(number) = tree.find(directory, name)? {
            let both = matches!(what, Base::Directory) && tree.kind(number)? == Kind::Directory;
            return if both { Ok(number) } else { Err(FileError::Exists) };
        }
        let body = match what {
            Base::Directory => Body::Directory(Directory::default()),
            Base::File(_) => Body::File,
            Base::Link(target) => Body::Link(Rc::from(target)),
        };
        if !super::format::is_name(name) {
            return Err(FileError::Invalid);
        }
        let number = tree.make(directory, name, body)?;
        if let Base::File(bytes) = what {
            tree.store.create(number, bytes);
        }
        if let Some(node) = tree.nodes.get_mut(&number) {
            node.base = Some(path_hash(path));
        }
        Ok(number)
    }

    /// Takes leave of what an older image had.
    fn finish(self, tree: &mut Tree) {
        let old = self.bound.iter().filter(|(hash, _)| !self.seen.contains(*hash));
        let mut old: Vec<(usize, Number)> =
            old.map(|(_, &number)| (tree.path(number).map_or(0, |path| path.len()), number)).collect();
        // What lies in a directory before the directory.
        old.sort_unstable_by_key(|(length, _)| core::cmp::Reverse(*length));
        for (_, number) in old {
            let keep = match tree.kind(number) {
                Ok(Kind::File) => tree.store.contents.get(&number).is_some_and(|content| content.own),
                Ok(Kind::Directory) => tree.facts(number).is_ok_and(|facts| facts.size > 0),
                Ok(Kind::Link) | Err(_) => false,
            };
            if keep {
                unbind(tree, number);
            } else {
                tree.drop_base(number);
            }
        }
        let Some(volume) = &mut tree.store.volume else { return };
        volume.removed.retain(|hash, removed| {
            let keep = self.seen.contains(hash);
            if !keep && removed.home != 0 {
                volume.gone.push((removed.home, Key::node(removed.index)));
            }
            keep
        });
    }
}

/// Makes an inode the machine's own.
fn unbind(tree: &mut Tree, number: Number) {
    if let Some(node) = tree.nodes.get_mut(&number) {
        node.base = None;
    }
    tree.mark(number);
}

/// Has an inode that comes from the image be what this image says.
fn adopt(tree: &mut Tree, number: Number, what: Base) {
    let Some(node) = tree.nodes.get_mut(&number) else { return };
    match (&mut node.body, what) {
        (Body::Directory(_), Base::Directory) => {}
        (Body::Link(target), Base::Link(new)) => {
            if **target != *new {
                *target = Rc::from(new);
                tree.mark(number);
            }
        }
        (Body::File, Base::File(bytes)) => {
            let Some(content) = tree.store.contents.get_mut(&number).filter(|content| !content.own) else {
                return;
            };
            content.lower = bytes;
            if content.length != bytes.len() as u64 {
                content.length = bytes.len() as u64;
                tree.touch(number);
            }
        }
        // What the new image has there finds its name taken.
        (Body::Directory(_) | Body::Link(_) | Body::File, _) => unbind(tree, number),
    }
}

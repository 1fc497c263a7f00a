//! What programs hold.

use alloc::rc::Rc;
use core::{cell::Cell, time::Duration};

use super::{
    FILES, FileError, MAX_PATH,
    store::Number,
    tree::{Body, Directory, Entry, Facts, Kind, Tree},
    walk::Found,
};

/// How something is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// A file is made where there is nothing.
    pub create: bool,
    /// With `create`: there must be nothing.
    pub exclusive: bool,
    /// A file is emptied.
    pub truncate: bool,
    /// It must be a directory.
    pub directory: bool,
    /// A link is opened itself, not what it leads to; only possible where there is none.
    pub no_follow: bool,
}

/// An open file or directory: it stays, whatever becomes of its names.
#[derive(Debug)]
pub struct Handle {
    number: Number,
    /// Paths that start here lead below this directory only.
    ceiling: Number,
}

impl Drop for Handle {
    fn drop(&mut self) {
        FILES.get().close(self.number);
    }
}

/// Walks, and acts on what was found.
fn found<R>(
    start: &Handle,
    path: &str,
    follow: bool,
    act: impl FnOnce(&mut Tree, Found) -> Result<R, FileError>,
) -> Result<R, FileError> {
    let mut tree = FILES.get();
    let found = tree.walk(start.origin(), path, follow)?;
    act(&mut tree, found)
}

impl Handle {
    /// The root.
    pub fn root() -> Self {
        let mut tree = FILES.get();
        let root = tree.root();
        // The root is always there.
        let _ = tree.open(root);
        Self { number: root, ceiling: root }
    }

    fn origin(&self) -> (Number, Number) {
        (self.number, self.ceiling)
    }

    /// Lets paths that start here lead anywhere.
    pub fn unconfined(mut self) -> Self {
        self.ceiling = FILES.get().root();
        self
    }

    /// Opens what is at a path that starts here.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn open(&self, path: &str, options: OpenOptions) -> Result<Self, FileError> {
        let follow = !(options.no_follow || options.create && options.exclusive);
        found(self, path, follow, |tree, found| {
            let number = match found.number {
                Some(_) if options.create && options.exclusive => return Err(FileError::Exists),
                Some(number) => number,
                None if !options.create => return Err(FileError::NotFound),
                None if found.slash || options.directory => return Err(FileError::IsDirectory),
                None => {
                    let name = found.name(FileError::IsDirectory)?;
                    tree.make(found.directory, name, Body::File)?
                }
            };
            match tree.kind(number)? {
                Kind::Link => return Err(FileError::Loop),
                Kind::File if options.directory => return Err(FileError::NotDirectory),
                Kind::Directory if options.create || options.truncate => return Err(FileError::IsDirectory),
                Kind::File if options.truncate => {
                    tree.store.truncate(number, 0)?;
                    tree.touch(number);
                }
                Kind::File | Kind::Directory => {}
            }
            tree.open(number)?;
            Ok(Self { number, ceiling: number })
        })
    }

    /// Makes a file of the image's bytes.
    pub(super) fn place(&self, path: &str, bytes: &'static [u8]) -> Result<(), FileError> {
        found(self, path, true, |tree, found| {
            let number = tree.make(found.directory, found.name(FileError::Exists)?, Body::File)?;
            tree.store.create(number, bytes);
            Ok(())
        })
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn make_directory(&self, path: &str) -> Result<(), FileError> {
        self.make(path, Body::Directory(Directory::default()), true)
    }

    /// Makes a link to `target`, which need not exist.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn make_link(&self, target: &str, path: &str) -> Result<(), FileError> {
        match target.len() {
            0 => Err(FileError::NotFound),
            length if length > MAX_PATH => Err(FileError::NameTooLong),
            _ if target.contains('\0') => Err(FileError::Invalid),
            _ => self.make(path, Body::Link(Rc::from(target)), false),
        }
    }

    fn make(&self, path: &str, body: Body, slash: bool) -> Result<(), FileError> {
        // The name is made, so a link of that name is in the way, wherever it leads.
        let bare = path.trim_end_matches('/');
        let bare = if bare.is_empty() { path } else { bare };
        found(self, bare, false, |tree, found| {
            if found.number.is_some() {
                return Err(FileError::Exists);
            }
            if !slash && bare.len() != path.len() {
                return Err(FileError::NotFound);
            }
            tree.make(found.directory, found.name(FileError::Exists)?, body)?;
            Ok(())
        })
    }

    /// Where the link at a path leads.
    ///
    /// # Errors
    /// [`FileError::Invalid`] when it is no link.
    pub fn read_link(&self, path: &str) -> Result<Rc<str>, FileError> {
        found(self, path, false, |tree, found| tree.target(found.number()?))
    }

    /// Gives the file at a path another name, at a path that starts at `other`.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn link(&self, path: &str, follow: bool, other: &Self, to: &str) -> Result<(), FileError> {
        let mut tree = FILES.get();
        let number = tree.walk(self.origin(), path, follow)?.number()?;
        let found = tree.walk(other.origin(), to, false)?;
        if found.number.is_some() {
            return Err(FileError::Exists);
        }
        if found.slash {
            return Err(FileError::NotFound);
        }
        tree.link(number, found.directory, found.name(FileError::Exists)?)
    }

    /// Removes a name of a file or a link.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn unlink(&self, path: &str) -> Result<(), FileError> {
        found(self, path, false, |tree, found| {
            found.number()?;
            tree.unlink(found.directory, found.name(FileError::IsDirectory)?)
        })
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn remove_directory(&self, path: &str) -> Result<(), FileError> {
        let bare = path.trim_end_matches('/');
        let bare = if bare.is_empty() { path } else { bare };
        found(self, bare, false, |tree, found| {
            let number = found.number()?;
            if number == tree.root() {
                return Err(FileError::Refused);
            }
            tree.remove_directory(found.directory, found.name(FileError::Invalid)?)
        })
    }

    /// Gives what is at a path another path, which starts at `other`.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn rename(&self, path: &str, other: &Self, to: &str) -> Result<(), FileError> {
        let mut tree = FILES.get();
        let old = tree.walk(self.origin(), path, false)?;
        let number = old.number()?;
        let new = tree.walk(other.origin(), to, false)?;
        if (new.slash || old.slash) && tree.kind(number)? != Kind::Directory {
            return Err(FileError::NotDirectory);
        }
        let name = old.name(FileError::Invalid)?;
        tree.rename((old.directory, name), (new.directory, new.name(FileError::Invalid)?))
    }

    /// What is at a path.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn stat_at(&self, path: &str, follow: bool) -> Result<Facts, FileError> {
        found(self, path, follow, |tree, found| tree.facts(found.number()?))
    }

    /// Sets times of what is at a path.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn set_times_at(
        &self,
        path: &str,
        follow: bool,
        accessed: Option<Duration>,
        modified: Option<Duration>,
    ) -> Result<(), FileError> {
        found(self, path, follow, |tree, found| tree.set_times(found.number()?, accessed, modified))
    }

    /// What this is.
    ///
    /// # Errors
    /// None while it is held.
    pub fn stat(&self) -> Result<Facts, FileError> {
        FILES.get().facts(self.number)
    }

    /// Sets its times.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn set_times(&self, accessed: Option<Duration>, modified: Option<Duration>) -> Result<(), FileError> {
        FILES.get().set_times(self.number, accessed, modified)
    }

    /// Entries of this directory from number `from` on, until `take` has enough. It must not use files.
    ///
    /// # Errors
    /// [`FileError::NotDirectory`].
    pub fn entries(&self, from: u64, take: impl FnMut(&Entry) -> bool) -> Result<(), FileError> {
        FILES.get().entries(self.number, from, take)
    }

    /// Reads from `offset`; 0 at the end.
    ///
    /// # Errors
    /// [`FileError::IsDirectory`].
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<usize, FileError> {
        let tree = FILES.get();
        match tree.kind(self.number)? {
            Kind::File => Ok(tree.store.read(self.number, offset, into)),
            Kind::Directory => Err(FileError::IsDirectory),
            Kind::Link => Err(FileError::Invalid),
        }
    }

    /// Writes at `offset` and returns how much, less than all only when there is no room for the rest.
    ///
    /// # Errors
    /// [`FileError`]; nothing was written then.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<usize, FileError> {
        self.change(|tree, number| tree.store.write(number, offset, bytes))
    }

    /// Writes at the end; returns where that was, and how much was written.
    ///
    /// # Errors
    /// [`FileError`]; nothing was written then.
    pub fn append(&self, bytes: &[u8]) -> Result<(u64, usize), FileError> {
        self.change(|tree, number| {
            let end = tree.store.length(number);
            Ok((end, tree.store.write(number, end, bytes)?))
        })
    }

    /// Sets the length.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn truncate(&self, length: u64) -> Result<(), FileError> {
        self.change(|tree, number| tree.store.truncate(number, length))
    }

    fn change<R>(&self, act: impl FnOnce(&mut Tree, Number) -> Result<R, FileError>) -> Result<R, FileError> {
        let mut tree = FILES.get();
        match tree.kind(self.number)? {
            Kind::File => {
                let result = act(&mut tree, self.number)?;
                tree.touch(self.number);
                Ok(result)
            }
            Kind::Directory => Err(FileError::IsDirectory),
            Kind::Link => Err(FileError::Invalid),
        }
    }
}

/// An open file with a position, which all who share it move.
#[derive(Debug)]
pub struct OpenFile {
    /// The file.
    pub handle: Handle,
    /// The next byte.
    pub offset: Cell<u64>,
    /// Every write goes to the end.
    pub append: Cell<bool>,
}

impl OpenFile {
    /// Starts at the first byte.
    pub const fn new(handle: Handle, append: bool) -> Self {
        Self { handle, offset: Cell::new(0), append: Cell::new(append) }
    }

    /// Reads on; 0 at the end.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn read(&self, into: &mut [u8]) -> Result<usize, FileError> {
        let count = self.handle.read_at(self.offset.get(), into)?;
        self.offset.set(self.offset.get() + count as u64);
        Ok(count)
    }

    /// Writes on, and returns how much.
    ///
    /// # Errors
    /// [`FileError`]; nothing was written then.
    pub fn write(&self, bytes: &[u8]) -> Result<usize, FileError> {
        let (at, count) = if self.append.get() {
            self.handle.append(bytes)?
        } else {
            (self.offset.get(), self.handle.write_at(self.offset.get(), bytes)?)
        };
        self.offset.set(at + count as u64);
        Ok(count)
    }
}

//! What programs hold.

use alloc::rc::Rc;
use core::{
    cell::Cell,
    future::poll_fn,
    task::{Context, Poll, ready},
    time::Duration,
};

use super::{
    FILES, FileError, MAX_TARGET,
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
                    tree.store.writable()?;
                    tree.store.cut(number, 0)?;
                    tree.touch(number);
                }
                Kind::File | Kind::Directory => {}
            }
            tree.open(number)?;
            Ok(Self { number, ceiling: number })
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
            length if length > MAX_TARGET => Err(FileError::NameTooLong),
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

    /// Sets its mode bits.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn set_mode(&self, mode: u16) -> Result<(), FileError> {
        FILES.get().set_mode(self.number, mode)
    }

    /// Entries of this directory from number `from` on, until `take` has enough. It must not use files.
    ///
    /// # Errors
    /// [`FileError::NotDirectory`].
    pub fn entries(&self, from: u64, take: impl FnMut(&Entry) -> bool) -> Result<(), FileError> {
        FILES.get().entries(self.number, from, take)
    }

    /// Reads from `offset`; 0 only at the end, and fewer than wanted where the rest has to be waited for.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn poll_read_at(
        &self,
        context: &Context<'_>,
        offset: u64,
        into: &mut [u8],
    ) -> Poll<Result<usize, FileError>> {
        let mut tree = FILES.get();
        match tree.kind(self.number)? {
            Kind::File => tree.store.poll_read(context, self.number, offset, into),
            Kind::Directory => Poll::Ready(Err(FileError::IsDirectory)),
            Kind::Link => Poll::Ready(Err(FileError::Invalid)),
        }
    }

    /// Reads from `offset`: all that is wanted, or up to the end, or up to what cannot be read.
    ///
    /// # Errors
    /// [`FileError`]; nothing was read then.
    pub async fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<usize, FileError> {
        let mut done = 0;
        loop {
            let rest = into.get_mut(done..).unwrap_or_default();
            let read =
                poll_fn(|context| self.poll_read_at(context, offset.saturating_add(done as u64), rest));
            match read.await {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
            if done == into.len() {
                break;
            }
        }
        Ok(done)
    }

    /// Writes at `offset`, or at the end where that is `None`; returns where that was and how much was written, less
    /// than all where the rest has to wait or finds no room.
    ///
    /// # Errors
    /// [`FileError`]; nothing was written then.
    pub fn poll_write_at(
        &self,
        context: &Context<'_>,
        offset: Option<u64>,
        bytes: &[u8],
    ) -> Poll<Result<(u64, usize), FileError>> {
        self.poll_change(|tree, number| {
            let offset = offset.unwrap_or_else(|| tree.store.length(number));
            tree.store.poll_write(context, number, offset, bytes).map_ok(|count| (offset, count))
        })
    }

    /// Writes at `offset` and returns how much, less than all only when there is no room for the rest.
    ///
    /// # Errors
    /// [`FileError`]; nothing was written then.
    pub async fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<usize, FileError> {
        let mut done = 0;
        loop {
            let rest = bytes.get(done..).unwrap_or_default();
            let at = offset.saturating_add(done as u64);
            match poll_fn(|context| self.poll_write_at(context, Some(at), rest)).await {
                Ok((_, count)) => done += count,
                Err(_) if done > 0 => return Ok(done),
                Err(error) => return Err(error),
            }
            if done == bytes.len() {
                return Ok(done);
            }
        }
    }

    /// Writes at the end; returns where that was, and how much was written. Another writer may come between two parts
    /// only where one of them had to wait.
    ///
    /// # Errors
    /// [`FileError`]; nothing was written then.
    pub async fn append(&self, bytes: &[u8]) -> Result<(u64, usize), FileError> {
        let (at, mut done) = poll_fn(|context| self.poll_write_at(context, None, bytes)).await?;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match poll_fn(|context| self.poll_write_at(context, None, rest)).await {
                Ok((_, count)) => done += count,
                Err(_) => break,
            }
        }
        Ok((at, done))
    }

    /// Sets the length.
    ///
    /// # Errors
    /// [`FileError`].
    pub async fn truncate(&self, length: u64) -> Result<(), FileError> {
        let cut = |context: &Context<'_>| {
            self.poll_change(|tree, number| tree.store.poll_truncate(context, number, length))
        };
        poll_fn(|context| cut(context)).await
    }

    fn poll_change<R>(
        &self,
        act: impl FnOnce(&mut Tree, Number) -> Poll<Result<R, FileError>>,
    ) -> Poll<Result<R, FileError>> {
        let mut tree = FILES.get();
        match tree.kind(self.number)? {
            Kind::File => {
                tree.store.writable()?;
                let result = ready!(act(&mut tree, self.number))?;
                tree.touch(self.number);
                Poll::Ready(Ok(result))
            }
            Kind::Directory => Poll::Ready(Err(FileError::IsDirectory)),
            Kind::Link => Poll::Ready(Err(FileError::Invalid)),
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

    /// Reads on, what is in memory; 0 only at the end.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn poll_read(&self, context: &Context<'_>, into: &mut [u8]) -> Poll<Result<usize, FileError>> {
        let count = ready!(self.handle.poll_read_at(context, self.offset.get(), into))?;
        self.offset.set(self.offset.get() + count as u64);
        Poll::Ready(Ok(count))
    }

    /// Reads on, all that is wanted or up to the end.
    ///
    /// # Errors
    /// [`FileError`].
    pub async fn read(&self, into: &mut [u8]) -> Result<usize, FileError> {
        let count = self.handle.read_at(self.offset.get(), into).await?;
        self.offset.set(self.offset.get() + count as u64);
        Ok(count)
    }

    fn place(&self) -> Option<u64> {
        Some(self.offset.get()).filter(|_| !self.append.get())
    }

    /// Writes on, and returns how much: less than all where the rest has to wait.
    ///
    /// # Errors
    /// [`FileError`]; nothing was written then.
    pub fn poll_write(&self, context: &Context<'_>, bytes: &[u8]) -> Poll<Result<usize, FileError>> {
        let (at, count) = ready!(self.handle.poll_write_at(context, self.place(), bytes))?;
        self.offset.set(at + count as u64);
        Poll::Ready(Ok(count))
    }

    /// Writes on, and returns how much, less than all only when there is no room for the rest.
    ///
    /// # Errors
    /// [`FileError`]; nothing was written then.
    pub async fn write(&self, bytes: &[u8]) -> Result<usize, FileError> {
        let (at, count) = match self.place() {
            None => self.handle.append(bytes).await?,
            Some(at) => (at, self.handle.write_at(at, bytes).await?),
        };
        self.offset.set(at + count as u64);
        Ok(count)
    }
}

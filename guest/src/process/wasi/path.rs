//! Functions on paths.
//!
//! A path starts in a directory and does not lead out of it. The working directory is different: the C library that
//! programs are made with passes it absolute paths too, without their first slash, because its name `.` and the
//! root's name `/` mean the same to it. So there a path may lead anywhere, and one whose first name is not in the
//! working directory, but is in the root, starts in the root.

use alloc::{rc::Rc, string::String};

use super::{
    call::{Call, Guest, Outcome, parts},
    descriptor::{Descriptor, Directory, Object, flags, rights},
    errno::Errno,
    fd::{put_facts, wanted_times},
};
use crate::{
    executor,
    fs::{Handle, Kind, MAX_PATH, OpenFile, OpenOptions},
};

/// Walking a byte of a path, in estimated nanoseconds: a name and a slash take some hundred.
const WALK_COST: u64 = 50;
/// Lookup flag: a last name that is a link is followed.
const FOLLOW: u32 = 1;

/// What a path's last name is wanted for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    /// To be found.
    Find,
    /// To be made, perhaps.
    Make,
}

/// A directory and a path from it.
struct Place {
    descriptor: Rc<Descriptor>,
    /// In place of the descriptor's directory.
    root: Option<Handle>,
    path: String,
}

impl Place {
    fn new(call: &mut Call<'_>, right: u64, fd: u32, (at, length): (u32, u32), last: Last) -> Outcome<Self> {
        let descriptor = call.data().wasi.table.get(fd)?;
        let directory = descriptor.directory(right)?;
        let path = parts(call)?.0.text(at, length, MAX_PATH)?;
        if path.starts_with('/') {
            return Err(Errno::Perm.into());
        }
        executor::charge(path.len() as u64 * WALK_COST);
        let root = (directory.working && starts_in_root(directory, &path, last)).then(Handle::root);
        Ok(Self { descriptor, root, path })
    }

    fn start(&self) -> Outcome<&Handle> {
        match (&self.root, &self.descriptor.object) {
            (Some(root), _) => Ok(root),
            (None, Object::Directory(directory)) => Ok(&directory.handle),
            (None, _) => Err(Errno::NotDir.into()),
        }
    }
}

fn starts_in_root(directory: &Directory, path: &str, last: Last) -> bool {
    let mut names = path.split('/').filter(|name| !name.is_empty() && *name != ".");
    let Some(first) = names.next().filter(|name| *name != "..") else { return false };
    let alone = names.next().is_none();
    !(alone && last == Last::Make)
        && directory.handle.stat_at(first, false).is_err()
        && Handle::root().stat_at(first, false).is_ok()
}

pub fn path_create_directory(call: &mut Call<'_>, fd: u32, path: u32, length: u32) -> Outcome {
    let place = Place::new(call, rights::PATH_CREATE_DIRECTORY, fd, (path, length), Last::Make)?;
    Ok(place.start()?.make_directory(&place.path)?)
}

pub fn path_filestat_get(
    call: &mut Call<'_>,
    fd: u32,
    lookup: u32,
    path: u32,
    length: u32,
    into: u32,
) -> Outcome {
    let place = Place::new(call, rights::PATH_FILESTAT_GET, fd, (path, length), Last::Find)?;
    let facts = place.start()?.stat_at(&place.path, lookup & FOLLOW != 0)?;
    put_facts(&mut parts(call)?.0, into, &facts)
}

#[expect(clippy::too_many_arguments, reason = "the specification's parameters")]
pub fn path_filestat_set_times(
    call: &mut Call<'_>,
    fd: u32,
    lookup: u32,
    path: u32,
    length: u32,
    accessed: u64,
    modified: u64,
    flags: u32,
) -> Outcome {
    let place = Place::new(call, rights::PATH_FILESTAT_SET_TIMES, fd, (path, length), Last::Find)?;
    let (accessed, modified) = wanted_times(accessed, modified, flags)?;
    Ok(place.start()?.set_times_at(&place.path, lookup & FOLLOW != 0, accessed, modified)?)
}

#[expect(clippy::too_many_arguments, reason = "the specification's parameters")]
pub fn path_link(
    call: &mut Call<'_>,
    fd: u32,
    lookup: u32,
    path: u32,
    length: u32,
    new_fd: u32,
    new_path: u32,
    new_length: u32,
) -> Outcome {
    let old = Place::new(call, rights::PATH_LINK_SOURCE, fd, (path, length), Last::Find)?;
    let new = Place::new(call, rights::PATH_LINK_TARGET, new_fd, (new_path, new_length), Last::Make)?;
    if lookup & FOLLOW != 0 {
        return Err(Errno::Inval.into());
    }
    Ok(old.start()?.link(&old.path, false, new.start()?, &new.path)?)
}

/// Flags to open with (`typenames.witx`, `oflags`).
struct Open(u32);

impl Open {
    const CREATE: u32 = 1;
    const DIRECTORY: u32 = 2;
    const EXCLUSIVE: u32 = 4;
    const TRUNCATE: u32 = 8;

    const fn has(&self, flag: u32) -> bool {
        self.0 & flag != 0
    }

    /// The rights needed to open so.
    const fn rights(&self) -> u64 {
        let mut rights = rights::PATH_OPEN;
        if self.has(Self::CREATE) {
            rights |= rights::PATH_CREATE_FILE;
        }
        if self.has(Self::TRUNCATE) {
            rights |= rights::PATH_FILESTAT_SET_SIZE;
        }
        rights
    }
}

#[expect(clippy::too_many_arguments, reason = "the specification's parameters")]
pub fn path_open(
    call: &mut Call<'_>,
    fd: u32,
    lookup: u32,
    path: u32,
    length: u32,
    open: u32,
    base: u64,
    inheriting: u64,
    flags: u32,
    into: u32,
) -> Outcome {
    let open = Open(open);
    let flags = u16::try_from(flags).ok().filter(|flags| flags & !flags::ALL == 0).ok_or(Errno::Inval)?;
    let last = if open.has(Open::CREATE) { Last::Make } else { Last::Find };
    let place = Place::new(call, open.rights(), fd, (path, length), last)?;
    if open.0 > 15 || open.has(Open::CREATE) && open.has(Open::DIRECTORY) {
        return Err(Errno::Inval.into());
    }
    call.data().wasi.table.has_room()?;
    // The number is written last; that it can be is asked for before anything is made.
    parts(call)?.0.put_u32(into, u32::MAX)?;
    let options = OpenOptions {
        create: open.has(Open::CREATE),
        exclusive: open.has(Open::EXCLUSIVE),
        truncate: open.has(Open::TRUNCATE),
        directory: open.has(Open::DIRECTORY),
        no_follow: lookup & FOLLOW == 0,
    };
    let handle = place.start()?.open(&place.path, options)?;
    let (_, inherited) = place.descriptor.rights();
    let object = match handle.stat()?.kind {
        Kind::Directory if base & rights::FD_WRITE != 0 => return Err(Errno::IsDir.into()),
        Kind::Directory => Object::Directory(Directory { handle, preopen: None, working: false }),
        Kind::File | Kind::Link => Object::File(Rc::new(OpenFile::new(handle, false))),
    };
    let descriptor = Descriptor::limited(object, base & inherited, inheriting & inherited);
    descriptor.set_flags(flags);
    let (mut guest, state) = parts(call)?;
    let number = state.wasi.table.add(descriptor)?;
    guest.put_u32(into, number)
}

pub fn path_readlink(
    call: &mut Call<'_>,
    fd: u32,
    path: u32,
    length: u32,
    buffer: u32,
    room: u32,
    into: u32,
) -> Outcome {
    let place = Place::new(call, rights::PATH_READLINK, fd, (path, length), Last::Find)?;
    let target = place.start()?.read_link(&place.path)?;
    let mut guest: Guest<'_> = parts(call)?.0;
    let bytes = target.as_bytes();
    let bytes = bytes.get(..room as usize).unwrap_or(bytes);
    guest.put_bytes(buffer, bytes)?;
    guest.put_u32(into, bytes.len() as u32)
}

pub fn path_remove_directory(call: &mut Call<'_>, fd: u32, path: u32, length: u32) -> Outcome {
    let place = Place::new(call, rights::PATH_REMOVE_DIRECTORY, fd, (path, length), Last::Find)?;
    Ok(place.start()?.remove_directory(&place.path)?)
}

pub fn path_rename(
    call: &mut Call<'_>,
    fd: u32,
    path: u32,
    length: u32,
    new_fd: u32,
    new_path: u32,
    new_length: u32,
) -> Outcome {
    let old = Place::new(call, rights::PATH_RENAME_SOURCE, fd, (path, length), Last::Find)?;
    let new = Place::new(call, rights::PATH_RENAME_TARGET, new_fd, (new_path, new_length), Last::Make)?;
    Ok(old.start()?.rename(&old.path, new.start()?, &new.path)?)
}

pub fn path_symlink(
    call: &mut Call<'_>,
    target: u32,
    target_length: u32,
    fd: u32,
    path: u32,
    length: u32,
) -> Outcome {
    let place = Place::new(call, rights::PATH_SYMLINK, fd, (path, length), Last::Make)?;
    let target = parts(call)?.0.text(target, target_length, MAX_PATH)?;
    if target.starts_with('/') {
        return Err(Errno::Perm.into());
    }
    Ok(place.start()?.make_link(&target, &place.path)?)
}

pub fn path_unlink_file(call: &mut Call<'_>, fd: u32, path: u32, length: u32) -> Outcome {
    let place = Place::new(call, rights::PATH_UNLINK_FILE, fd, (path, length), Last::Find)?;
    Ok(place.start()?.unlink(&place.path)?)
}

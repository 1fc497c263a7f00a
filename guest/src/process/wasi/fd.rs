//! Functions on descriptors.

use alloc::{rc::Rc, vec::Vec};
use core::{ops::Range, time::Duration};

use super::{
    basic::nanoseconds,
    call::{Call, Guest, Outcome, PIECE, Stop, copied, parts, room, wait, worked},
    descriptor::{Descriptor, Directory, Object, filetype, flags, rights},
    errno::Errno,
};
use crate::{
    fs::{self, Facts, OpenFile},
    process::{
        Signal, State,
        fiber::{self, Killed},
    },
    time,
};

/// Kinds of advice there are.
const ADVICES: u32 = 6;
/// Bytes of a directory entry before its name.
const DIRENT: usize = 24;
/// Entries of a directory read in one go, and the estimated nanoseconds for one.
const ENTRIES: usize = 64;
const ENTRY_COST: u64 = 200;

fn descriptor(call: &Call<'_>, fd: u32) -> Outcome<Rc<Descriptor>> {
    call.data().wasi.table.get(fd)
}

pub fn fd_advise(call: &mut Call<'_>, fd: u32, offset: u64, length: u64, advice: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    if matches!(descriptor.object, Object::Directory(_)) {
        return Err(Errno::BadF.into());
    }
    descriptor.file(rights::FD_ADVISE)?;
    if advice >= ADVICES || offset.checked_add(length).is_none() {
        return Err(Errno::Inval.into());
    }
    Ok(())
}

pub fn fd_allocate(call: &mut Call<'_>, fd: u32, offset: u64, length: u64) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    if matches!(descriptor.object, Object::Directory(_)) {
        return Err(Errno::BadF.into());
    }
    let file = descriptor.file(rights::FD_ALLOCATE | rights::FD_WRITE)?;
    let end = offset.checked_add(length).ok_or(Errno::FBig)?;
    if length == 0 {
        return Err(Errno::Inval.into());
    }
    if file.handle.stat()?.size < end {
        fiber::block_on(file.handle.truncate(end))??;
    }
    Ok(())
}

pub fn fd_close(call: &mut Call<'_>, fd: u32) -> Outcome {
    call.data_mut().wasi.table.remove(fd).map(drop)
}

pub fn fd_datasync(call: &mut Call<'_>, fd: u32) -> Outcome {
    sync(call, fd, rights::FD_DATASYNC)
}

pub fn fd_sync(call: &mut Call<'_>, fd: u32) -> Outcome {
    sync(call, fd, rights::FD_SYNC)
}

/// Returns once what was written, by whomever, is safe on the disk.
fn sync(call: &Call<'_>, fd: u32, right: u64) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    match descriptor.object {
        Object::File(_) | Object::Directory(_) => descriptor.require(right)?,
        Object::Input(_) | Object::Output(_) | Object::Socket(_) => return Err(Errno::Inval.into()),
    }
    Ok(fiber::block_on(fs::sync_all())??)
}

pub fn fd_fdstat_get(call: &mut Call<'_>, fd: u32, into: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let (base, inheriting) = descriptor.rights();
    let mut bytes = [0; 24];
    bytes[0] = descriptor.object.filetype();
    bytes[2..4].copy_from_slice(&descriptor.flags().to_le_bytes());
    bytes[8..16].copy_from_slice(&base.to_le_bytes());
    bytes[16..].copy_from_slice(&inheriting.to_le_bytes());
    parts(call)?.0.put_bytes(into, &bytes)
}

pub fn fd_fdstat_set_flags(call: &mut Call<'_>, fd: u32, flags: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    descriptor.require(rights::FD_FDSTAT_SET_FLAGS)?;
    let flags = u16::try_from(flags).ok().filter(|flags| flags & !flags::ALL == 0).ok_or(Errno::Inval)?;
    descriptor.set_flags(flags);
    Ok(())
}

pub fn fd_fdstat_set_rights(call: &mut Call<'_>, fd: u32, base: u64, inheriting: u64) -> Outcome {
    descriptor(call, fd)?.drop_rights(base, inheriting)
}

/// Writes a `filestat`.
pub fn put_facts(guest: &mut Guest<'_>, at: u32, facts: &Facts) -> Outcome {
    let times = &facts.times;
    let mut bytes = [0; 64];
    let words = [
        (0, 1),
        (8, facts.vid.index()),
        (16, u64::from(filetype::of(facts.kind))),
        (24, u64::from(facts.links)),
        (32, facts.size),
        (40, nanoseconds(times.accessed)),
        (48, nanoseconds(times.modified)),
        (56, nanoseconds(times.changed)),
    ];
    for (at, word) in words {
        bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
    guest.put_bytes(at, &bytes)
}

pub fn fd_filestat_get(call: &mut Call<'_>, fd: u32, into: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    descriptor.require(rights::FD_FILESTAT_GET)?;
    let facts = match &descriptor.object {
        Object::File(file) => file.handle.stat()?,
        Object::Directory(directory) => directory.handle.stat()?,
        Object::Input(_) | Object::Output(_) | Object::Socket(_) => {
            let mut bytes = [0; 64];
            bytes[16] = descriptor.object.filetype();
            bytes[24] = 1;
            return parts(call)?.0.put_bytes(into, &bytes);
        }
    };
    put_facts(&mut parts(call)?.0, into, &facts)
}

pub fn fd_filestat_set_size(call: &mut Call<'_>, fd: u32, size: u64) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    if matches!(descriptor.object, Object::Directory(_)) {
        return Err(Errno::BadF.into());
    }
    let file = descriptor.file(rights::FD_FILESTAT_SET_SIZE)?;
    // As a file that is not open for writing elsewhere.
    descriptor.require(rights::FD_WRITE).map_err(|_| Errno::Inval)?;
    Ok(fiber::block_on(file.handle.truncate(size))??)
}

/// The times that `fstflags` ask to set, and what to.
pub fn wanted_times(
    accessed: u64,
    modified: u64,
    flags: u32,
) -> Outcome<(Option<Duration>, Option<Duration>)> {
    let one = |given: u64, set: u32, now: u32| match (flags & set != 0, flags & now != 0) {
        (true, true) => Err(Errno::Inval),
        (true, false) => Ok(Some(Duration::from_nanos(given))),
        (false, true) => Ok(Some(time::wall())),
        (false, false) => Ok(None),
    };
    if flags & !15 != 0 {
        return Err(Errno::Inval.into());
    }
    Ok((one(accessed, 1, 2)?, one(modified, 4, 8)?))
}

pub fn fd_filestat_set_times(
    call: &mut Call<'_>,
    fd: u32,
    accessed: u64,
    modified: u64,
    flags: u32,
) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    descriptor.require(rights::FD_FILESTAT_SET_TIMES)?;
    let (accessed, modified) = wanted_times(accessed, modified, flags)?;
    match &descriptor.object {
        Object::File(file) => Ok(file.handle.set_times(accessed, modified)?),
        Object::Directory(directory) => Ok(directory.handle.set_times(accessed, modified)?),
        Object::Input(_) | Object::Output(_) | Object::Socket(_) => Err(Errno::Inval.into()),
    }
}

pub fn fd_prestat_get(call: &mut Call<'_>, fd: u32, into: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let name = preopen(&descriptor)?;
    let mut guest = parts(call)?.0;
    guest.put_u32(into, 0)?;
    guest.put_u32(into.checked_add(4).ok_or(Errno::Fault)?, name.len() as u32)
}

pub fn fd_prestat_dir_name(call: &mut Call<'_>, fd: u32, at: u32, length: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let name = preopen(&descriptor)?;
    if name.len() > length as usize {
        return Err(Errno::NameTooLong.into());
    }
    parts(call)?.0.put_bytes(at, name.as_bytes())
}

fn preopen(descriptor: &Descriptor) -> Outcome<&str> {
    match &descriptor.object {
        Object::Directory(directory) => Ok(directory.preopen.as_deref().ok_or(Errno::BadF)?),
        _ => Err(Errno::BadF.into()),
    }
}

/// Reads a file in pieces, from its own position or from a given one.
fn read_file(
    guest: &mut Guest<'_>,
    parts: &[Range<usize>],
    mut read: impl FnMut(&mut [u8]) -> Outcome<usize>,
) -> Outcome<usize> {
    let mut total = 0;
    for part in parts {
        for piece in guest.part_mut(part).chunks_mut(PIECE) {
            let count = read(piece)?;
            total += count;
            copied(count)?;
            if count < piece.len() {
                return Ok(total);
            }
        }
    }
    Ok(total)
}

/// Writes a file in pieces. What stops it is told only when nothing was written.
fn write_file(
    guest: &Guest<'_>,
    parts: &[Range<usize>],
    mut write: impl FnMut(&[u8]) -> Outcome<usize>,
) -> Outcome<usize> {
    let mut total = 0;
    for part in parts {
        for piece in guest.part(part).chunks(PIECE) {
            let count = match write(piece) {
                Ok(count) => count,
                Err(_) if total > 0 => return Ok(total),
                Err(stop) => return Err(stop),
            };
            total += count;
            copied(count)?;
            if count < piece.len() {
                return Ok(total);
            }
        }
    }
    Ok(total)
}

fn first_piece(vectors: &[Range<usize>]) -> Range<usize> {
    vectors.first().map_or(0..0, |part| part.start..part.start + part.len().min(PIECE))
}

pub fn fd_read(call: &mut Call<'_>, fd: u32, vectors: u32, count: u32, into: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    readable(&descriptor)?;
    let (mut guest, _) = parts(call)?;
    let vectors = guest.vectors(vectors, count)?;
    let read = match &descriptor.object {
        Object::File(file) => {
            read_file(&mut guest, &vectors, |piece| Ok(fiber::block_on(file.read(piece))??))?
        }
        Object::Input(_) | Object::Socket(_) if vectors.is_empty() => 0,
        Object::Input(input) => {
            let piece = guest.part_mut(&first_piece(&vectors));
            wait(descriptor.blocks(), |context| input.poll_read(context, piece).map_err(Into::into))?
        }
        Object::Socket(socket) => {
            let piece = guest.part_mut(&first_piece(&vectors));
            let received = wait(descriptor.blocks(), |context| {
                socket.poll_receive(context, piece, false).map_err(Into::into)
            });
            received?.count
        }
        Object::Output(_) | Object::Directory(_) => return Err(Errno::BadF.into()),
    };
    copied(read)?;
    guest.put_u32(into, read as u32)
}

fn readable(descriptor: &Descriptor) -> Outcome {
    match descriptor.object {
        Object::Directory(_) => Err(Errno::IsDir.into()),
        _ => descriptor.require(rights::FD_READ),
    }
}

fn writable(descriptor: &Descriptor) -> Outcome {
    match descriptor.object {
        Object::Directory(_) => Err(Errno::BadF.into()),
        _ => descriptor.require(rights::FD_WRITE),
    }
}

pub fn fd_write(call: &mut Call<'_>, fd: u32, vectors: u32, count: u32, into: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    writable(&descriptor)?;
    let (mut guest, state) = parts(call)?;
    let vectors = guest.vectors(vectors, count)?;
    let written = match &descriptor.object {
        Object::File(file) => write_file(&guest, &vectors, |piece| Ok(fiber::block_on(file.write(piece))??))?,
        Object::Output(output) => {
            // Short texts go as one, as they would elsewhere: what several write together is not torn.
            let gathered;
            let bytes = match &vectors[..] {
                [one] => guest.part(one),
                several => {
                    gathered = gather(&guest, several, PIECE)?;
                    &gathered
                }
            };
            let bytes = &bytes[..bytes.len().min(PIECE)];
            let mut sent = 0;
            while sent < bytes.len() {
                let wrote = wait(descriptor.blocks(), |context| {
                    output.poll_write(context, &bytes[sent..]).map_err(Into::into)
                });
                match wrote {
                    Ok(count) => sent += count,
                    Err(Stop::Errno(Errno::Pipe)) => return Err(nobody_reads(state)),
                    Err(Stop::Errno(_)) if sent > 0 => break,
                    Err(stop) => return Err(stop),
                }
            }
            sent
        }
        Object::Socket(socket) => {
            let bytes = gather(&guest, &vectors, PIECE)?;
            wait(descriptor.blocks(), |context| socket.poll_send(context, &bytes, None).map_err(Into::into))?
        }
        Object::Input(_) | Object::Directory(_) => return Err(Errno::BadF.into()),
    };
    copied(written)?;
    guest.put_u32(into, written as u32)
}

/// Ends a program whose output nobody reads any more, as SIGPIPE does: few look for that themselves.
fn nobody_reads(state: &State) -> Stop {
    state.process.kill(Signal::Pipe);
    Killed.into()
}

/// Collects parts of memory, up to `most` bytes.
pub fn gather(guest: &Guest<'_>, parts: &[Range<usize>], most: usize) -> Outcome<Vec<u8>> {
    let length = parts.iter().map(ExactSizeIterator::len).sum::<usize>().min(most);
    room(length)?;
    let mut bytes = Vec::with_capacity(length);
    for part in parts {
        let part = guest.part(part);
        bytes.extend_from_slice(&part[..part.len().min(most - bytes.len())]);
    }
    Ok(bytes)
}

/// A file to be read or written at an offset; what has no position says so.
fn at_offset(descriptor: &Descriptor, right: u64) -> Outcome<&OpenFile> {
    match &descriptor.object {
        Object::Directory(_) if right & rights::FD_WRITE != 0 => Err(Errno::BadF.into()),
        _ => descriptor.file(right | rights::FD_SEEK),
    }
}

pub fn fd_pread(call: &mut Call<'_>, fd: u32, vectors: u32, count: u32, offset: u64, into: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let file = at_offset(&descriptor, rights::FD_READ)?;
    let (mut guest, _) = parts(call)?;
    let vectors = guest.vectors(vectors, count)?;
    let mut at = offset;
    let read = read_file(&mut guest, &vectors, |piece| {
        let count = fiber::block_on(file.handle.read_at(at, piece))??;
        at = at.saturating_add(count as u64);
        Ok(count)
    })?;
    guest.put_u32(into, read as u32)
}

pub fn fd_pwrite(call: &mut Call<'_>, fd: u32, vectors: u32, count: u32, offset: u64, into: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let file = at_offset(&descriptor, rights::FD_WRITE)?;
    let (mut guest, _) = parts(call)?;
    let vectors = guest.vectors(vectors, count)?;
    let mut at = offset;
    let written = write_file(&guest, &vectors, |piece| {
        // A file open for appending is appended to here too, as on Linux.
        let count = if file.append.get() {
            fiber::block_on(file.handle.append(piece))??.1
        } else {
            fiber::block_on(file.handle.write_at(at, piece))??
        };
        at = at.saturating_add(count as u64);
        Ok(count)
    })?;
    guest.put_u32(into, written as u32)
}

pub fn fd_readdir(call: &mut Call<'_>, fd: u32, buffer: u32, length: u32, cookie: u64, into: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let directory = descriptor.directory(rights::FD_READDIR)?;
    let (mut guest, _) = parts(call)?;
    let whole = guest.bytes_mut(buffer, length)?;
    let (mut used, mut from) = (0, cookie);
    // In pieces, and only less than asked for at the end: that is how a program knows it.
    loop {
        let (filled, next, more) = fill_entries(directory, from, whole.get_mut(used..).unwrap_or_default())?;
        used += filled;
        from = next;
        worked(ENTRIES as u64 * ENTRY_COST)?;
        if !more {
            break;
        }
    }
    guest.put_u32(into, used as u32)
}

/// Fills `room` with some entries from number `from` on. Returns the bytes filled, where reading goes on, and whether
/// there may be more entries and room for them.
fn fill_entries(directory: &Directory, from: u64, mut room: &mut [u8]) -> Outcome<(usize, u64, bool)> {
    let (mut used, mut next, mut count) = (0, from, 0);
    directory.handle.entries(from, |entry| {
        let name = entry.name.as_bytes();
        let mut head = [0; DIRENT];
        head[..8].copy_from_slice(&entry.next.to_le_bytes());
        head[8..16].copy_from_slice(&entry.number.to_le_bytes());
        head[16..20].copy_from_slice(&(name.len() as u32).to_le_bytes());
        head[20] = filetype::of(entry.kind);
        for bytes in [&head[..], name] {
            let length = bytes.len().min(room.len());
            let (now, later) = core::mem::take(&mut room).split_at_mut(length);
            now.copy_from_slice(&bytes[..length]);
            room = later;
            used += length;
        }
        next = entry.next;
        count += 1;
        count < ENTRIES && !room.is_empty()
    })?;
    Ok((used, next, count == ENTRIES && !room.is_empty()))
}

pub fn fd_renumber(call: &mut Call<'_>, fd: u32, to: u32) -> Outcome {
    call.data_mut().wasi.table.renumber(fd, to).map(drop)
}

pub fn fd_seek(call: &mut Call<'_>, fd: u32, offset: i64, whence: u32, into: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    if matches!(descriptor.object, Object::Directory(_)) {
        return Err(Errno::BadF.into());
    }
    // Asking where it is takes less than going there.
    let right = if offset == 0 && whence == 1 { rights::FD_TELL } else { rights::FD_SEEK };
    let file = descriptor.file(right)?;
    let from = match whence {
        0 => 0,
        1 => file.offset.get(),
        2 => file.handle.stat()?.size,
        _ => return Err(Errno::Inval.into()),
    };
    let to = from.checked_add_signed(offset).filter(|&to| i64::try_from(to).is_ok()).ok_or(Errno::Inval)?;
    file.offset.set(to);
    parts(call)?.0.put_u64(into, to)
}

pub fn fd_tell(call: &mut Call<'_>, fd: u32, into: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    if matches!(descriptor.object, Object::Directory(_)) {
        return Err(Errno::BadF.into());
    }
    let offset = descriptor.file(rights::FD_TELL)?.offset.get();
    parts(call)?.0.put_u64(into, offset)
}

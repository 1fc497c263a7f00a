//! What requests do.

use alloc::{collections::BTreeMap, format, string::String, vec::Vec};
use core::time::Duration;

use super::packet::{
    Attributes, Fields, Malformed, Status, kind, long_name, put_bytes, put_facts, put_u32, put_u64,
};
use crate::fs::{self, Facts, FileError, Handle, Kind, OpenOptions};

/// Longest request.
const MAX_PACKET: usize = 256 << 10;
/// Bytes read or written by one request.
const MAX_DATA: u32 = 64 << 10;
/// Output that must leave before another request is looked at.
const MAX_OUTPUT: usize = 128 << 10;
/// Files and directories open at a time.
const MAX_HANDLES: usize = 64;
/// Bytes of names in one reply.
const MAX_NAMES: usize = 32 << 10;
/// Buffers beyond this are given back once they are empty.
const KEPT: usize = 64 << 10;
/// The protocol's version.
const VERSION: u32 = 3;
/// The extensions there are, and their versions.
const EXTENSIONS: [(&str, &str); 7] = [
    ("posix-rename@openssh.com", "1"),
    ("hardlink@openssh.com", "1"),
    ("fsync@openssh.com", "1"),
    ("lsetstat@openssh.com", "1"),
    ("limits@openssh.com", "1"),
    ("expand-path@openssh.com", "1"),
    ("statvfs@openssh.com", "2"),
];

/// How a file is opened (§6.3).
mod open {
    pub const WRITE: u32 = 2;
    pub const APPEND: u32 = 4;
    pub const CREATE: u32 = 8;
    pub const TRUNCATE: u32 = 16;
    pub const EXCLUSIVE: u32 = 32;
}

/// What a client has open.
enum Open {
    File { handle: Handle, append: bool },
    Directory { handle: Handle, next: u64 },
}

/// Why a request is not done.
enum Refused {
    Malformed,
    Unsupported,
    NoHandle,
    TooManyHandles,
    Eof,
    File(FileError),
}

impl From<Malformed> for Refused {
    fn from(Malformed: Malformed) -> Self {
        Self::Malformed
    }
}

impl From<FileError> for Refused {
    fn from(error: FileError) -> Self {
        Self::File(error)
    }
}

/// One session.
pub struct Server {
    home: String,
    /// What of a request has arrived, its length included.
    input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    open: BTreeMap<u32, Open>,
    next: u32,
    /// A whole request has arrived and is not answered yet.
    whole: bool,
    broken: bool,
}

impl Server {
    /// A session whose relative paths start at `home`.
    pub fn new(home: &str) -> Self {
        Self {
            home: home.into(),
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            open: BTreeMap::new(),
            next: 0,
            whole: false,
            broken: false,
        }
    }

    /// Takes bytes, up to the end of a request, which [`Server::answer`] then answers; none while one is there or much
    /// output waits.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        if self.broken || self.whole || self.output().len() > MAX_OUTPUT {
            return 0;
        }
        let mut taken = 0;
        loop {
            let wanted = match self.input.first_chunk::<4>() {
                None => 4,
                Some(length) => {
                    let length = u32::from_be_bytes(*length) as usize;
                    if length == 0 || length > MAX_PACKET {
                        self.broken = true;
                        return bytes.len();
                    }
                    4 + length
                }
            };
            let lacking = wanted.saturating_sub(self.input.len());
            if lacking == 0 {
                break;
            }
            let rest = bytes.get(taken..).unwrap_or_default();
            let now = rest.get(..lacking).unwrap_or(rest);
            if now.is_empty() {
                return taken;
            }
            self.input.extend_from_slice(now);
            taken += now.len();
        }
        self.whole = true;
        taken
    }

    /// Answers the request that is there, if one is.
    pub async fn answer(&mut self) {
        if !core::mem::take(&mut self.whole) {
            return;
        }
        let mut packet = core::mem::take(&mut self.input);
        self.packet(packet.get(4..).unwrap_or_default()).await;
        packet.clear();
        if packet.capacity() <= KEPT {
            self.input = packet;
        }
    }

    /// Bytes for the client.
    pub fn output(&self) -> &[u8] {
        self.output.get(self.sent..).unwrap_or_default()
    }

    /// Forgets output that was sent.
    pub fn sent(&mut self, count: usize) {
        self.sent += count;
        if self.sent >= self.output.len() {
            self.sent = 0;
            self.output.clear();
            if self.output.capacity() > KEPT {
                self.output = Vec::new();
            }
        }
    }

    /// Whether the client sent what is no request: nothing it sends can be understood any more.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Adds a packet whose content `fill` writes.
    fn reply(&mut self, kind: u8, fill: impl FnOnce(&mut Vec<u8>)) {
        let start = self.output.len();
        put_u32(&mut self.output, 0);
        self.output.push(kind);
        fill(&mut self.output);
        let length = (self.output.len() - start - 4) as u32;
        if let Some(place) = self.output.get_mut(start..start + 4) {
            place.copy_from_slice(&length.to_be_bytes());
        }
    }

    fn status(&mut self, id: u32, status: Status, text: &str) {
        self.reply(kind::STATUS, |out| {
            put_u32(out, id);
            put_u32(out, status as u32);
            put_bytes(out, text.as_bytes());
            put_bytes(out, b"en");
        });
    }

    async fn packet(&mut self, packet: &[u8]) {
        let mut fields = Fields(packet);
        let Ok(number) = fields.u8() else { return };
        if number == kind::INIT {
            return self.reply(kind::VERSION, |out| {
                put_u32(out, VERSION);
                for (name, version) in EXTENSIONS {
                    put_bytes(out, name.as_bytes());
                    put_bytes(out, version.as_bytes());
                }
            });
        }
        let Ok(id) = fields.u32() else {
            self.broken = true;
            return;
        };
        let refused = match self.request(number, id, &mut fields).await {
            Ok(true) => return,
            Ok(false) => return self.status(id, Status::Ok, "done"),
            Err(refused) => refused,
        };
        match refused {
            Refused::Malformed => self.status(id, Status::BadMessage, "bad message"),
            Refused::Unsupported => self.status(id, Status::Unsupported, "not supported"),
            Refused::NoHandle => self.status(id, Status::Failure, "no such handle"),
            Refused::TooManyHandles => self.status(id, Status::Failure, "too many open files"),
            Refused::Eof => self.status(id, Status::Eof, "end of file"),
            Refused::File(error) => {
                let status = match error {
                    FileError::NotFound => Status::NoSuchFile,
                    FileError::Refused | FileError::Outside | FileError::ReadOnly => Status::Denied,
                    _ => Status::Failure,
                };
                self.status(id, status, &format!("{error}"));
            }
        }
    }

    /// Makes a path absolute.
    fn path(&self, fields: &mut Fields<'_>) -> Result<String, Refused> {
        Ok(fs::resolve(&self.home, fields.text()?))
    }

    fn handle(&mut self, fields: &mut Fields<'_>) -> Result<(u32, &mut Open), Refused> {
        let name = fields.bytes()?;
        let number = <[u8; 4]>::try_from(name).map(u32::from_be_bytes).map_err(|_| Refused::NoHandle)?;
        let open = self.open.get_mut(&number).ok_or(Refused::NoHandle)?;
        Ok((number, open))
    }

    fn add(&mut self, id: u32, open: Open) -> Result<bool, Refused> {
        let number = self.next;
        self.next = number.wrapping_add(1);
        self.open.insert(number, open);
        self.reply(kind::HANDLE, |out| {
            put_u32(out, id);
            put_bytes(out, &number.to_be_bytes());
        });
        Ok(true)
    }

    fn name(&mut self, id: u32, name: &str) -> Result<bool, Refused> {
        self.reply(kind::NAME, |out| {
            put_u32(out, id);
            put_u32(out, 1);
            put_bytes(out, name.as_bytes());
            put_bytes(out, name.as_bytes());
            put_u32(out, 0);
        });
        Ok(true)
    }

    fn attributes(&mut self, id: u32, facts: &Facts) -> Result<bool, Refused> {
        self.reply(kind::ATTRS, |out| {
            put_u32(out, id);
            put_facts(out, facts);
        });
        Ok(true)
    }

    /// Does a request; whether it was answered, or only done.
    async fn request(&mut self, number: u8, id: u32, fields: &mut Fields<'_>) -> Result<bool, Refused> {
        let root = Handle::root();
        match number {
            kind::OPEN => return self.open_file(id, fields),
            kind::CLOSE => {
                let (number, _) = self.handle(fields)?;
                self.open.remove(&number);
            }
            kind::READ => return self.read(id, fields).await,
            kind::WRITE => {
                let (_, open) = self.handle(fields)?;
                let (offset, bytes) = (fields.u64()?, fields.bytes()?);
                let Open::File { handle, append } = open else { return Err(FileError::IsDirectory.into()) };
                let mut done = 0;
                while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
                    done += if *append {
                        handle.append(rest).await?.1
                    } else {
                        handle.write_at(offset.saturating_add(done as u64), rest).await?
                    };
                }
            }
            kind::STAT | kind::LSTAT => {
                let facts = root.stat_at(&self.path(fields)?, number == kind::STAT)?;
                return self.attributes(id, &facts);
            }
            kind::FSTAT => {
                let (_, open) = self.handle(fields)?;
                let (Open::File { handle, .. } | Open::Directory { handle, .. }) = open;
                let facts = handle.stat()?;
                return self.attributes(id, &facts);
            }
            kind::SETSTAT => {
                let path = self.path(fields)?;
                change(&fs::open(&path, OpenOptions::default())?, fields.attributes()?).await?;
            }
            kind::FSETSTAT => {
                let (_, open) = self.handle(fields)?;
                let (Open::File { handle, .. } | Open::Directory { handle, .. }) = open;
                change(handle, fields.attributes()?).await?;
            }
            kind::OPENDIR => {
                let path = self.path(fields)?;
                self.has_room()?;
                let options = OpenOptions { directory: true, ..OpenOptions::default() };
                return self.add(id, Open::Directory { handle: fs::open(&path, options)?, next: 0 });
            }
            kind::READDIR => return self.read_directory(id, fields),
            kind::REMOVE => root.unlink(&self.path(fields)?)?,
            kind::MKDIR => root.make_directory(&self.path(fields)?)?,
            kind::RMDIR => root.remove_directory(&self.path(fields)?)?,
            kind::REALPATH => {
                let path = self.path(fields)?;
                return self.name(id, &path);
            }
            kind::RENAME => {
                let (from, to) = (self.path(fields)?, self.path(fields)?);
                // This version's rename replaces nothing.
                if root.stat_at(&to, false).is_ok() {
                    return Err(FileError::Exists.into());
                }
                root.rename(&from, &root, &to)?;
            }
            kind::READLINK => {
                let target = root.read_link(&self.path(fields)?)?;
                return self.name(id, &target);
            }
            kind::SYMLINK => {
                // As OpenSSH has it, the other way round than the draft: the target first.
                let target = fields.text()?;
                root.make_link(target, &self.path(fields)?)?;
            }
            kind::EXTENDED => return self.extended(id, fields).await,
            _ => return Err(Refused::Unsupported),
        }
        Ok(false)
    }

    fn has_room(&self) -> Result<(), Refused> {
        if self.open.len() >= MAX_HANDLES { Err(Refused::TooManyHandles) } else { Ok(()) }
    }

    fn open_file(&mut self, id: u32, fields: &mut Fields<'_>) -> Result<bool, Refused> {
        let path = self.path(fields)?;
        let flags = fields.u32()?;
        let attributes = fields.attributes()?;
        self.has_room()?;
        let fresh = flags & open::CREATE != 0 && fs::stat(&path).is_err();
        let options = OpenOptions {
            create: flags & open::CREATE != 0,
            exclusive: flags & open::EXCLUSIVE != 0,
            truncate: flags & open::TRUNCATE != 0,
            ..OpenOptions::default()
        };
        let handle = fs::open(&path, options)?;
        if handle.stat()?.kind == Kind::Directory && flags & open::WRITE != 0 {
            return Err(FileError::IsDirectory.into());
        }
        if let Some(mode) = attributes.mode.filter(|_| fresh) {
            handle.set_mode(mode)?;
        }
        self.add(id, Open::File { handle, append: flags & open::APPEND != 0 })
    }

    async fn read(&mut self, id: u32, fields: &mut Fields<'_>) -> Result<bool, Refused> {
        let (_, open) = self.handle(fields)?;
        let (offset, length) = (fields.u64()?, fields.u32()?);
        let Open::File { handle, .. } = open else { return Err(FileError::IsDirectory.into()) };
        let mut bytes = alloc::vec![0; length.min(MAX_DATA) as usize];
        let count = handle.read_at(offset, &mut bytes).await?;
        if count == 0 && length > 0 {
            return Err(Refused::Eof);
        }
        self.reply(kind::DATA, |out| {
            put_u32(out, id);
            put_bytes(out, bytes.get(..count).unwrap_or_default());
        });
        Ok(true)
    }

    fn read_directory(&mut self, id: u32, fields: &mut Fields<'_>) -> Result<bool, Refused> {
        let (_, open) = self.handle(fields)?;
        let Open::Directory { handle, next } = open else { return Err(FileError::NotDirectory.into()) };
        let mut found = Vec::new();
        let mut bytes = 0;
        handle.entries(*next, |entry| {
            bytes += 2 * entry.name.len() + 128;
            found.push((entry.next, entry.name.clone()));
            bytes < MAX_NAMES
        })?;
        let Some((last, _)) = found.last() else { return Err(Refused::Eof) };
        *next = *last;
        // One that was removed since is left out.
        let facts: Vec<_> = found
            .into_iter()
            .filter_map(|(_, name)| {
                let facts = if &*name == ".." { handle.stat() } else { handle.stat_at(&name, false) };
                facts.ok().map(|facts| (name, facts))
            })
            .collect();
        let user = self.home.rsplit('/').next().unwrap_or_default();
        let lines: Vec<_> = facts.iter().map(|(name, facts)| long_name(facts, user, name)).collect();
        self.reply(kind::NAME, |out| {
            put_u32(out, id);
            put_u32(out, facts.len() as u32);
            for ((name, facts), line) in facts.iter().zip(&lines) {
                put_bytes(out, name.as_bytes());
                put_bytes(out, line.as_bytes());
                put_facts(out, facts);
            }
        });
        Ok(true)
    }

    async fn extended(&mut self, id: u32, fields: &mut Fields<'_>) -> Result<bool, Refused> {
        let root = Handle::root();
        match fields.text()? {
            "posix-rename@openssh.com" => {
                let (from, to) = (self.path(fields)?, self.path(fields)?);
                root.rename(&from, &root, &to)?;
            }
            "hardlink@openssh.com" => {
                let (from, to) = (self.path(fields)?, self.path(fields)?);
                root.link(&from, false, &root, &to)?;
            }
            "fsync@openssh.com" => {
                self.handle(fields)?;
                fs::sync_all().await?;
            }
            "lsetstat@openssh.com" => {
                let path = self.path(fields)?;
                let (accessed, modified) = times(fields.attributes()?);
                root.set_times_at(&path, false, accessed, modified)?;
            }
            "limits@openssh.com" => {
                self.reply(kind::EXTENDED_REPLY, |out| {
                    put_u32(out, id);
                    for limit in [MAX_PACKET as u64, MAX_DATA.into(), MAX_DATA.into(), MAX_HANDLES as u64] {
                        put_u64(out, limit);
                    }
                });
                return Ok(true);
            }
            "expand-path@openssh.com" => {
                let path = fields.text()?;
                let inside = path.strip_prefix('~').filter(|rest| rest.is_empty() || rest.starts_with('/'));
                let path = match inside {
                    Some(rest) => fs::resolve(&self.home, rest.trim_start_matches('/')),
                    None => fs::resolve(&self.home, path),
                };
                return self.name(id, &path);
            }
            "statvfs@openssh.com" => {
                root.stat_at(&self.path(fields)?, true)?;
                let (used, limit) = fs::usage();
                let free = limit.saturating_sub(used);
                self.reply(kind::EXTENDED_REPLY, |out| {
                    put_u32(out, id);
                    const BLOCK: u64 = 4096;
                    let blocks = [limit / BLOCK, free / BLOCK, free / BLOCK];
                    let (files, names) = (fs::MAX_NODES as u64, fs::MAX_NAME as u64);
                    let rest = [files, files, files, 0, 0, names];
                    for field in [BLOCK, BLOCK].into_iter().chain(blocks).chain(rest) {
                        put_u64(out, field);
                    }
                });
                return Ok(true);
            }
            _ => return Err(Refused::Unsupported),
        }
        Ok(false)
    }
}

fn times(attributes: Attributes) -> (Option<Duration>, Option<Duration>) {
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    let times = attributes.times;
    (times.map(|(accessed, _)| seconds(accessed)), times.map(|(_, modified)| seconds(modified)))
}

async fn change(handle: &Handle, attributes: Attributes) -> Result<(), Refused> {
    if let Some(size) = attributes.size {
        handle.truncate(size).await?;
    }
    if let Some(mode) = attributes.mode {
        handle.set_mode(mode)?;
    }
    if attributes.times.is_some() {
        let (accessed, modified) = times(attributes);
        handle.set_times(accessed, modified)?;
    }
    Ok(())
}

//! Bytes of requests and replies.

use alloc::{string::String, vec::Vec};

use crate::fs::{Facts, Kind};

/// Kinds of packets (§3).
#[allow(missing_docs)]
pub mod kind {
    pub const INIT: u8 = 1;
    pub const VERSION: u8 = 2;
    pub const OPEN: u8 = 3;
    pub const CLOSE: u8 = 4;
    pub const READ: u8 = 5;
    pub const WRITE: u8 = 6;
    pub const LSTAT: u8 = 7;
    pub const FSTAT: u8 = 8;
    pub const SETSTAT: u8 = 9;
    pub const FSETSTAT: u8 = 10;
    pub const OPENDIR: u8 = 11;
    pub const READDIR: u8 = 12;
    pub const REMOVE: u8 = 13;
    pub const MKDIR: u8 = 14;
    pub const RMDIR: u8 = 15;
    pub const REALPATH: u8 = 16;
    pub const STAT: u8 = 17;
    pub const RENAME: u8 = 18;
    pub const READLINK: u8 = 19;
    pub const SYMLINK: u8 = 20;
    pub const STATUS: u8 = 101;
    pub const HANDLE: u8 = 102;
    pub const DATA: u8 = 103;
    pub const NAME: u8 = 104;
    pub const ATTRS: u8 = 105;
    pub const EXTENDED: u8 = 200;
    pub const EXTENDED_REPLY: u8 = 201;
}

/// How a request went (§7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Nothing more to read.
    Eof = 1,
    /// There is no such file.
    NoSuchFile = 2,
    /// Not permitted.
    Denied = 3,
    /// Something else; the text says what.
    Failure = 4,
    /// A request that makes no sense.
    BadMessage = 5,
    /// A request that is not known.
    Unsupported = 8,
}

/// A request ends too early, or holds what is no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Reads a request's fields.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (now, later) = self.0.split_at_checked(count).ok_or(Malformed)?;
        self.0 = later;
        Ok(now)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_| Malformed)
    }

    /// A byte.
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_be_bytes)
    }

    /// 32 bits.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    /// 64 bits.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    /// Bytes after their length.
    pub fn bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let length = self.u32()?;
        self.take(usize::try_from(length).map_err(|_| Malformed)?)
    }

    /// A text after its length. Names here are UTF-8.
    pub fn text(&mut self) -> Result<&'a str, Malformed> {
        core::str::from_utf8(self.bytes()?).map_err(|_| Malformed)
    }

    /// Attributes.
    pub fn attributes(&mut self) -> Result<Attributes, Malformed> {
        let flags = self.u32()?;
        let mut attributes = Attributes::default();
        if flags & attribute::SIZE != 0 {
            attributes.size = Some(self.u64()?);
        }
        if flags & attribute::OWNER != 0 {
            self.u64()?;
        }
        if flags & attribute::PERMISSIONS != 0 {
            attributes.mode = Some(self.u32()? as u16 & 0o7777);
        }
        if flags & attribute::TIMES != 0 {
            attributes.times = Some((self.u32()?, self.u32()?));
        }
        if flags & attribute::EXTENDED != 0 {
            for _ in 0..self.u32()? {
                self.bytes()?;
                self.bytes()?;
            }
        }
        Ok(attributes)
    }
}

/// Flags of attributes (§5).
mod attribute {
    pub const SIZE: u32 = 1;
    pub const OWNER: u32 = 2;
    pub const PERMISSIONS: u32 = 4;
    pub const TIMES: u32 = 8;
    pub const EXTENDED: u32 = 0x8000_0000;
}

/// What of a file's attributes a client may set. Owners there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Its length.
    pub size: Option<u64>,
    /// Its mode bits.
    pub mode: Option<u16>,
    /// Last read and last written, seconds since 1970.
    pub times: Option<(u32, u32)>,
}

/// Writes 32 bits.
pub fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

/// Writes 64 bits.
pub fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}

/// Writes bytes after their length.
pub fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_u32(out, bytes.len() as u32);
    out.extend_from_slice(bytes);
}

/// Kind and mode bits as others have them.
fn mode(facts: &Facts) -> u32 {
    let kind = match facts.kind {
        Kind::Directory => 0o040_000,
        Kind::File => 0o100_000,
        Kind::Link => 0o120_000,
    };
    kind | u32::from(facts.mode)
}

/// Writes a file's attributes.
pub fn put_facts(out: &mut Vec<u8>, facts: &Facts) {
    put_u32(out, attribute::SIZE | attribute::OWNER | attribute::PERMISSIONS | attribute::TIMES);
    put_u64(out, if facts.kind == Kind::Directory { 0 } else { facts.size });
    put_u64(out, 0);
    put_u32(out, mode(facts));
    for time in [facts.times.accessed, facts.times.modified] {
        put_u32(out, u32::try_from(time.as_secs()).unwrap_or(u32::MAX));
    }
}

/// A line about a file as `ls -l` has it.
pub fn long_name(facts: &Facts, user: &str, name: &str) -> String {
    let mut mode = String::from(match facts.kind {
        Kind::Directory => "d",
        Kind::File => "-",
        Kind::Link => "l",
    });
    for (bit, letter) in (0..9).rev().zip("rwxrwxrwx".chars()) {
        mode.push(if facts.mode >> bit & 1 == 1 { letter } else { '-' });
    }
    let modified = facts.times.modified.as_secs();
    let (year, month, day) = date(modified / 86_400);
    let (hour, minute) = (modified / 3600 % 24, modified / 60 % 60);
    alloc::format!(
        "{mode} {:>4} {user:<8} {user:<8} {:>8} {year}-{month:02}-{day:02} {hour:02}:{minute:02} {name}",
        facts.links,
        facts.size,
    )
}

/// Year, month and day of a day since 1970, in the Gregorian calendar.
fn date(days: u64) -> (u64, u64, u64) {
    // Years from March on, so that the leap day is the last one, counted from 0000-03-01.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let first = (153 * month + 2) / 5;
    let month_of_year = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month_of_year <= 2), month_of_year, day - first + 1)
}

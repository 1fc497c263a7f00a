//! What a store's log lies on: a file, or anything that reads, writes, syncs and punches like one.

use std::{
    fs::File,
    io::{self, IoSlice},
    os::unix::fs::FileExt,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::{Errno, pwritev},
};

/// A flat array of bytes, as long as what was written to it; the rest reads as zeros.
///
/// `&self` throughout: a writer and any number of readers work on one backing at the same time.
pub trait Backing {
    /// Reads `into.len()` bytes from `at`; what was never written, or lies behind the end, reads as zeros.
    ///
    /// # Errors
    /// Those of the medium.
    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes all of `parts`, one behind the other, from `at`.
    ///
    /// # Errors
    /// Those of the medium; any part of the bytes may then have been written.
    fn write_at(&self, at: u64, parts: &[IoSlice<'_>]) -> io::Result<()>;

    /// Returns once everything written before survives a power cut.
    ///
    /// # Errors
    /// Those of the medium. What was written since the last sync may then be lost, whatever a later call says.
    fn sync(&self) -> io::Result<()>;

    /// Gives back the space of `length` bytes from `at`, which read as zeros from then on.
    ///
    /// # Errors
    /// Those of the medium.
    fn punch(&self, at: u64, length: u64) -> io::Result<()>;

    /// Sets space aside for `length` bytes from `at`, so that writing them cannot fail for want of it.
    ///
    /// # Errors
    /// `StorageFull` where the medium has no room.
    fn reserve(&self, at: u64, length: u64) -> io::Result<()> {
        let _ = (at, length);
        Ok(())
    }

    /// Bytes up to the end.
    ///
    /// # Errors
    /// Those of the medium.
    fn length(&self) -> io::Result<u64>;
}

/// A sparse file.
///
/// Written through the page cache: readers of other processes see a write at once, and `sync` is
/// `fdatasync(2)`.
impl Backing for File {
    fn read_at(&self, mut at: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            match FileExt::read_at(self, into, at) {
                Ok(0) => {
                    into.fill(0);
                    break;
                }
                Ok(count) => {
                    at += count as u64;
                    into = into.get_mut(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write_at(&self, mut at: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let mut written = loop {
            match pwritev(self, parts, at) {
                Ok(count) => break count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        if written == total {
            return Ok(());
        }
        // Rare (a signal, a nearly full file system): the rest goes part by part.
        for part in parts {
            let skip = written.min(part.len());
            written -= skip;
            at += skip as u64;
            let rest = part.get(skip..).unwrap_or_default();
            self.write_all_at(rest, at)?;
            at += rest.len() as u64;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn punch(&self, at: u64, length: u64) -> io::Result<()> {
        Ok(fallocate(self, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, length)?)
    }

    fn reserve(&self, at: u64, length: u64) -> io::Result<()> {
        match fallocate(self, FallocateFlags::empty(), at, length) {
            // A file system that cannot set space aside finds out while writing.
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl<B: Backing + ?Sized> Backing for std::sync::Arc<B> {
    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        (**self).read_at(at, into)
    }

    fn write_at(&self, at: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        (**self).write_at(at, parts)
    }

    fn sync(&self) -> io::Result<()> {
        (**self).sync()
    }

    fn punch(&self, at: u64, length: u64) -> io::Result<()> {
        (**self).punch(at, length)
    }

    fn reserve(&self, at: u64, length: u64) -> io::Result<()> {
        (**self).reserve(at, length)
    }

    fn length(&self) -> io::Result<u64> {
        (**self).length()
    }
}

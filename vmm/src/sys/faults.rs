//! Page faults of one process that another answers (userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst).
//!
//! The process whose memory it is makes the descriptor, since it is bound to that address space, and keeps it: with
//! the last one closed, what is missing would be zeros. Whoever has a duplicate hears of faults and fills pages.

use std::{
    io,
    mem::size_of,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use kage_machine::{PAGE_SIZE, PageBytes};
use rustix::{
    io::Errno,
    mm::{UserfaultfdFlags, userfaultfd},
};
use vmm_sys_util::{
    ioctl::{ioctl_with_mut_ref, ioctl_with_ref},
    ioctl_ior_nr, ioctl_iowr_nr,
};

const UFFDIO: u32 = 0xaa;
/// The interface's only version.
const UFFD_API: u64 = 0xaa;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MODE_MISSING: u64 = 1;
/// `UFFD_FEATURE_MISSING_SHMEM`.
const MISSING_SHMEM: u64 = 1 << 5;
/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;
/// Bytes of `struct uffd_msg`; the address is its third word.
const MESSAGE: usize = 32;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Span {
    start: u64,
    length: u64,
}

impl Span {
    const fn of(range: &Range<u64>) -> Self {
        Self { start: range.start, length: range.end.saturating_sub(range.start) }
    }
}

#[repr(C)]
struct Register {
    span: Span,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zero {
    span: Span,
    mode: u64,
    zeroed: i64,
}

ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0, Register);
ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFDIO, 1, Span);
ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 2, Span);
ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 3, Copy);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFDIO, 4, Zero);

/// The faults of a process; addresses are that process's.
#[derive(Debug)]
pub struct Faults(OwnedFd);

impl Faults {
    /// Those of this process, of its system calls too.
    ///
    /// # Errors
    /// Those of `userfaultfd(2)`: without privilege it is not permitted; a kernel that cannot hear of faults in shared
    /// memory.
    pub fn of_this_process() -> io::Result<OwnedFd> {
        // SAFETY: nothing of this process is registered, and what is will be by whoever answers its faults.
        let file = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }?;
        let mut api = Api { api: UFFD_API, features: MISSING_SHMEM, ioctls: 0 };
        // SAFETY: the ioctl takes exactly this structure.
        done(unsafe { ioctl_with_mut_ref(&file, UFFDIO_API(), &mut api) })?;
        Ok(file)
    }

    /// Takes a duplicate.
    pub const fn new(file: OwnedFd) -> Self {
        Self(file)
    }

    /// Hears of every touch of an absent page in these whole pages from here on.
    ///
    /// # Errors
    /// Those of `UFFDIO_REGISTER`.
    pub fn register(&self, range: &Range<u64>) -> io::Result<()> {
        let mut register = Register { span: Span::of(range), mode: MODE_MISSING, ioctls: 0 };
        // SAFETY: the ioctl takes exactly this structure, and refuses what is not mapped.
        done(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_REGISTER(), &mut register) })
    }

    /// Leaves absent pages to the kernel again, and wakes who waits.
    ///
    /// # Errors
    /// Those of `UFFDIO_UNREGISTER`.
    pub fn unregister(&self, range: &Range<u64>) -> io::Result<()> {
        // SAFETY: the ioctl takes exactly this structure.
        done(unsafe { ioctl_with_ref(&self.0, UFFDIO_UNREGISTER(), &Span::of(range)) })
    }

    /// Fills an absent page and wakes who waits for it. False: it was not absent; who waits is woken too.
    ///
    /// # Errors
    /// Those of `UFFDIO_COPY`; `ESRCH` once the process is gone.
    pub fn copy(&self, at: u64, bytes: &PageBytes) -> io::Result<bool> {
        self.fill(at, || {
            let from = bytes.as_ptr() as u64;
            let mut copy = Copy { to: at, from, length: PAGE_SIZE as u64, mode: 0, copied: 0 };
            // SAFETY: the ioctl takes exactly this structure; it reads a page from `bytes`, which outlives it.
            done(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_COPY(), &mut copy) })
        })
    }

    /// As [`Self::copy`], with zeros.
    ///
    /// # Errors
    /// As there.
    pub fn zero(&self, at: u64) -> io::Result<bool> {
        self.fill(at, || {
            let span = Span { start: at, length: PAGE_SIZE as u64 };
            let mut zero = Zero { span, mode: 0, zeroed: 0 };
            // SAFETY: the ioctl takes exactly this structure.
            done(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_ZEROPAGE(), &mut zero) })
        })
    }

    fn fill(&self, at: u64, mut attempt: impl FnMut() -> io::Result<()>) -> io::Result<bool> {
        loop {
            match attempt() {
                Ok(()) => return Ok(true),
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => break,
                // The process's mappings are about to change.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err(error),
            }
        }
        let span = Span { start: at, length: PAGE_SIZE as u64 };
        // SAFETY: the ioctl takes exactly this structure.
        done(unsafe { ioctl_with_ref(&self.0, UFFDIO_WAKE(), &span) })?;
        Ok(false)
    }

    /// The address of the next fault, none when nothing waits.
    ///
    /// # Errors
    /// Those of `read(2)`.
    pub fn next(&self) -> io::Result<Option<u64>> {
        let mut message = [0; MESSAGE];
        match rustix::io::read(&self.0, &mut message) {
            Ok(MESSAGE) if message[0] == EVENT_PAGEFAULT => {
                let (words, _) = message.as_chunks::<{ size_of::<u64>() }>();
                Ok(Some(u64::from_le_bytes(words[2])))
            }
            Ok(_) => Err(io::Error::other("an event that nobody asked for")),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Faults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

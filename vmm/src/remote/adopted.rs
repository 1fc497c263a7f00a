//! Machines that an earlier daemon left, and what of their processes' word is checked.
//!
//! An adopted process runs hostile code behind its jail: whoever maps a file that is shorter than said, or becomes so,
//! is killed at the first touch of what is missing.

use std::{io, os::fd::OwnedFd, path::Path};

use kage_disk::Index;
use kage_machine::{
    Geometry, MachineError, PAGE_SIZE,
    control::{CONTROL_VERSION, Made, Reply, Request},
};
use rustix::fs::{
    FileType, MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, major, memfd_create,
    minor,
};

use super::{RemoteMachine, gone, refused};
use crate::users::User;

/// Device number of `/dev/net/tun` (Linux's devices.txt).
const TUN: (u32, u32) = (10, 200);

impl RemoteMachine {
    /// Connects to a VMM process that is already there: a daemon that was restarted takes it over. `None` when
    /// nobody listens at `path`.
    ///
    /// # Errors
    /// [`MachineError`] when somebody listens and does not answer, or in another version.
    pub fn adopt(path: &Path) -> Result<Option<Self>, MachineError> {
        let mut machine = match Self::connect(path, None) {
            Ok(machine) => machine,
            Err(error) if is_nobody(&error) => return Ok(None),
            Err(error) => return Err(gone(error.to_string())),
        };
        match machine.take_over() {
            Ok(()) => Ok(Some(machine)),
            Err(error) => {
                // It is no child of this process, and stays as it is.
                machine.ended = true;
                let reason = format!("process {}: {error}", machine.process_id().as_raw_nonzero());
                Err(MachineError::Refused { reason })
            }
        }
    }

    /// Asks a process who it is.
    fn take_over(&mut self) -> Result<(), MachineError> {
        let (reply, descriptors) = self.call(&Request::Hello { version: CONTROL_VERSION }, &[])?;
        let Reply::Hello { version, phase, machine: made, label } = reply else {
            return Err(MachineError::Refused { reason: format!("unexpected answer {reply:?}") });
        };
        if version != CONTROL_VERSION {
            return Err(MachineError::Refused {
                reason: format!(
                    "the machine speaks control version {version}, this daemon {CONTROL_VERSION}"
                ),
            });
        }
        (self.phase, self.label) = (phase, label);
        if let Some(made) = made {
            let wrong = |what| MachineError::Refused { reason: format!("its process hands out {what}") };
            let received = Received::check(&made, descriptors).map_err(wrong)?;
            self.map(made.geometry, received.memory, &received.control)?;
            if self.is_short() {
                return Err(refused("pages of its memory are missing, and the daemon that had them is gone"));
            }
            if let Some((log, index)) = received.disk {
                self.adopt_disk(log, index)?;
            }
            (self.base, self.tap) = (made.base, received.tap);
        }
        self.user = User::of(self.process_id());
        Ok(())
    }
}

/// Whether a socket has no process behind it; any other error may hide one.
fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
}

/// A file in memory whose size nobody can change.
pub(super) fn shared_file(name: &str, bytes: u64) -> io::Result<OwnedFd> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// What came with an adopted machine's hello.
#[derive(Debug)]
pub(super) struct Received {
    pub memory: OwnedFd,
    pub control: OwnedFd,
    /// Log and index.
    pub disk: Option<(OwnedFd, OwnedFd)>,
    pub tap: Option<OwnedFd>,
}

impl Received {
    /// Takes the descriptors for what the hello says they are, when they can be that.
    pub(super) fn check(made: &Made, descriptors: Vec<OwnedFd>) -> Result<Self, &'static str> {
        let Made { geometry, disk, tap, .. } = *made;
        let of_bytes = |pages: u32| u64::from(pages) * PAGE_SIZE as u64;
        Geometry::from_bytes(of_bytes(geometry.memory_pages), of_bytes(geometry.disk_pages))
            .map_err(|_| "a size no machine has")?;
        if descriptors.len() != 2 + 2 * usize::from(disk) + usize::from(tap) {
            return Err("another number of descriptors than it says");
        }
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or("too few descriptors");
        let received = Self {
            memory: next()?,
            control: next()?,
            disk: if disk { Some((next()?, next()?)) } else { None },
            tap: tap.then(&mut next).transpose()?,
        };
        if !keeps_size(&received.memory, geometry.memory_bytes()) {
            return Err("memory of another size");
        }
        if !keeps_size(&received.control, PAGE_SIZE as u64) {
            return Err("a control page of another size");
        }
        // The log is read and never mapped.
        let index_bytes = Index::bytes_for(u64::from(geometry.disk_pages));
        if received
            .disk
            .as_ref()
            .is_some_and(|(log, index)| size(log).is_none() || !keeps_size(index, index_bytes))
        {
            return Err("a disk that is none, or of another size");
        }
        if received.tap.as_ref().is_some_and(|tap| !is_tap(tap)) {
            return Err("a tap that is none");
        }
        Ok(received)
    }
}

/// Bytes of a plain file.
fn size(file: &OwnedFd) -> Option<u64> {
    let stat = fstat(file).ok()?;
    let plain = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    u64::try_from(stat.st_size).ok().filter(|_| plain)
}

fn keeps_size(file: &OwnedFd, bytes: u64) -> bool {
    let sealed = fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    sealed && size(file) == Some(bytes)
}

fn is_tap(file: &OwnedFd) -> bool {
    fstat(file).is_ok_and(|stat| {
        let device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
        device && (major(stat.st_rdev), minor(stat.st_rdev)) == TUN
    })
}

#[cfg(test)]
mod tests {
    use kage_machine::BaseHash;

    use super::*;

    const GEOMETRY: Geometry = Geometry { memory_pages: 4096, disk_pages: 2 };

    fn made(geometry: Geometry, disk: bool, tap: bool) -> Made {
        Made { geometry, base: BaseHash::default(), disk, tap }
    }

    fn file(pages: u32) -> OwnedFd {
        shared_file("test", u64::from(pages) * PAGE_SIZE as u64).unwrap()
    }

    fn unsealed(pages: u32) -> OwnedFd {
        let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, u64::from(pages) * PAGE_SIZE as u64).unwrap();
        file
    }

    fn index(blocks: u64) -> OwnedFd {
        Index::memory(blocks).unwrap()
    }

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn what_is_as_said_is_taken() {
        let files = vec![file(4096), file(1), unsealed(0), index(2)];
        let received = Received::check(&made(GEOMETRY, true, false), files);
        assert!(received.is_ok_and(|received| received.disk.is_some() && received.tap.is_none()));
        if let Ok(tap) = std::fs::File::open("/dev/net/tun") {
            let received =
                Received::check(&made(GEOMETRY, false, true), vec![file(4096), file(1), tap.into()]);
            assert!(received.is_ok_and(|received| received.disk.is_none() && received.tap.is_some()));
        }
    }

    #[test]
    fn what_would_kill_whoever_maps_it_is_refused() {
        let huge = Geometry { memory_pages: u32::MAX, disk_pages: u32::MAX };
        for (geometry, disk, tap, files) in [
            (huge, false, false, vec![file(4096), file(1)]),
            (Geometry { memory_pages: 0, disk_pages: 0 }, false, false, vec![file(0), file(1)]),
            (GEOMETRY, false, false, vec![file(4095), file(1)]),
            (GEOMETRY, false, false, vec![unsealed(4096), file(1)]),
            (GEOMETRY, false, false, vec![file(4096), file(0)]),
            (GEOMETRY, false, false, vec![file(4096), unsealed(1)]),
            (GEOMETRY, false, false, vec![null(), file(1)]),
            (GEOMETRY, true, false, vec![file(4096), file(1), unsealed(2)]),
            (GEOMETRY, true, false, vec![file(4096), file(1), unsealed(2), index(1)]),
            (GEOMETRY, true, false, vec![file(4096), file(1), unsealed(2), unsealed(3)]),
            (GEOMETRY, true, false, vec![file(4096), file(1), null(), index(2)]),
            (GEOMETRY, false, true, vec![file(4096), file(1), null()]),
            (GEOMETRY, true, true, vec![file(4096), file(1), file(2)]),
            (GEOMETRY, false, false, vec![file(4096), file(1), file(2)]),
            (GEOMETRY, false, false, vec![file(4096)]),
            (GEOMETRY, false, false, vec![]),
        ] {
            let count = files.len();
            let result = Received::check(&made(geometry, disk, tap), files);
            assert!(result.is_err(), "{geometry:?} {disk} {tap} with {count} descriptors");
        }
    }
}

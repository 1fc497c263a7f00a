//! Hands the guest's table of resources to the daemon, beside the control socket and in any state of a move.
//!
//! ```text
//!  daemon                            VMM                              guest
//!  number, empty memfd  ─────▶  wanted += 1, wakes the door  ─────▶  builds the table, publishes
//!                               copies it into the memfd, a piece a door
//!                       ◀─────  number, length
//! ```
//!
//! The connection is one end of a socket pair, so that whoever asks need not hold the machine, and hears at once
//! when its process has ended. What comes through it is the guest's and the VMM's word: the memfd is sealed at its
//! size, and what is in it is looked at by [`kage_abi::resources::table::read`].

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Mutex,
    time::{Duration, Instant},
};

use kage_abi::{
    self as abi, offset,
    resources::{Resources, table},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair},
};
use vm_memory::{Bytes, GuestAddress};

use crate::{dirty::GuestMemory, packet};

/// Most bytes copied at one door, about 0.1 ms.
const PIECE: usize = 256 << 10;
/// Bytes of a request: its number.
const ASKED: usize = 4;
/// Bytes of an answer: the request's number and the table's length.
const ANSWERED: usize = 8;

/// The VMM's end.
#[derive(Default)]
pub struct Answering {
    socket: Option<OwnedFd>,
    pending: Option<Pending>,
}

/// A request that is not answered yet.
struct Pending {
    number: [u8; 4],
    into: OwnedFd,
    round: u32,
    /// Where the table lies, how long it is, and how much of it is copied.
    found: Option<(u64, usize, usize)>,
}

fn field(at: usize) -> GuestAddress {
    GuestAddress(abi::MEMORY + offset::RESOURCES + at as u64)
}

fn word<const N: usize>(memory: &GuestMemory, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    // The record lies in memory by construction; a failed read leaves zeros.
    let _ = memory.read_slice(&mut bytes, field(at));
    bytes
}

impl Answering {
    /// Uses a connection; an older one is given up.
    pub fn attach(&mut self, socket: OwnedFd) {
        *self = Self { socket: Some(socket), pending: None };
    }

    /// What to wait on.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Takes in a request, if one waits. True: the guest has news.
    pub fn hear(&mut self, memory: &GuestMemory) -> bool {
        let Some(socket) = &self.socket else { return false };
        let mut buffer = [0; ASKED + 1];
        let packet = match packet::receive(socket.as_fd(), &mut buffer, RecvFlags::DONTWAIT) {
            Ok(packet) if packet.bytes.is_empty() => {
                *self = Self::default();
                return false;
            }
            Ok(packet) => packet,
            Err(_) => return false,
        };
        let number = <[u8; ASKED]>::try_from(packet.bytes);
        let (Ok(number), Some(into)) = (number, packet.descriptors.into_iter().next()) else { return false };
        let wanted = std::mem::offset_of!(Resources, wanted);
        let round = u32::from_le_bytes(word(memory, wanted)).wrapping_add(1);
        let _ = memory.write_slice(&round.to_le_bytes(), field(wanted));
        self.pending = Some(Pending { number, into, round, found: None });
        true
    }

    /// Goes on with the request, between two runs of the vCPU.
    pub fn serve(&mut self, memory: &GuestMemory) {
        let Some(pending) = &mut self.pending else { return };
        let published = u32::from_le_bytes(word(memory, std::mem::offset_of!(Resources, published)));
        if published != pending.round {
            return;
        }
        let (address, length, copied) = *pending.found.get_or_insert_with(|| {
            let address = u64::from_le_bytes(word(memory, std::mem::offset_of!(Resources, address)));
            let length = u32::from_le_bytes(word(memory, std::mem::offset_of!(Resources, length)));
            (address, (length as usize).min(table::MAX), 0)
        });
        let mut piece = vec![0; PIECE.min(length - copied)];
        let from = GuestAddress(address.saturating_add(copied as u64));
        let read = memory.read_slice(&mut piece, from).is_ok();
        let written = read && rustix::io::pwrite(&pending.into, &piece, copied as u64) == Ok(piece.len());
        let copied = copied + piece.len();
        pending.found = Some((address, length, copied));
        if written && copied < length {
            return;
        }
        // A table that lies nowhere is an empty one, which no reader takes for a table.
        let length = if written { length as u32 } else { 0 };
        let mut answer = [0; ANSWERED];
        answer[..4].copy_from_slice(&pending.number);
        answer[4..].copy_from_slice(&length.to_le_bytes());
        if let Some(socket) = &self.socket {
            let _ = packet::send(socket.as_fd(), &answer, &[]);
        }
        let taken = std::mem::offset_of!(Resources, taken);
        let _ = memory.write_slice(&pending.round.to_le_bytes(), field(taken));
        self.pending = None;
    }
}

/// Why there is no table.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The process has ended: the machine is elsewhere, or nowhere.
    #[error("the machine has ended here")]
    Gone,
    /// Nothing came in time: the machine is held, or does not answer.
    #[error("the machine has not answered for {0:?}")]
    TimedOut(Duration),
    /// This host cannot ask.
    #[error("asking the machine: {0}")]
    Io(#[from] io::Error),
}

/// The daemon's end. Whoever asks waits for whoever asked before.
#[derive(Debug)]
pub struct Inspector {
    inner: Mutex<(OwnedFd, u32)>,
}

impl Inspector {
    /// A connection: this end, and the one for the VMM.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (own, other) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self { inner: Mutex::new((own, 0)) }, other))
    }

    /// The machine's table as it is now, not looked at yet.
    ///
    /// # Errors
    /// [`InspectError`].
    pub fn table(&self, patience: Duration) -> Result<Vec<u8>, InspectError> {
        let deadline = Instant::now() + patience;
        let mut inner = self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (socket, number) = &mut *inner;
        *number = number.wrapping_add(1);
        let file = memfd_create("kage-table", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(io::Error::from)?;
        ftruncate(&file, table::MAX as u64).map_err(io::Error::from)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(io::Error::from)?;
        match packet::send(socket.as_fd(), &number.to_le_bytes(), &[file.as_fd()]) {
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => return Err(InspectError::Gone),
            sent => sent?,
        }
        let length = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let time = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut polled = [PollFd::new(socket, PollFlags::IN)];
            match poll(&mut polled, Some(&time)) {
                Ok(0) => return Err(InspectError::TimedOut(patience)),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(io::Error::from(error).into()),
                Ok(_) => {}
            }
            let mut buffer = [0; ANSWERED + 1];
            match packet::receive(socket.as_fd(), &mut buffer, RecvFlags::DONTWAIT) {
                Ok(packet) if packet.bytes.is_empty() => return Err(InspectError::Gone),
                Ok(packet) => {
                    let mut words = packet.bytes.chunks_exact(4);
                    let mut word = || words.next().and_then(|word| word.try_into().ok());
                    // An answer to an earlier request, which nobody waits for any more, is passed over.
                    if let (Some(answered), Some(length)) = (word(), word())
                        && u32::from_le_bytes(answered) == *number
                    {
                        break u32::from_le_bytes(length) as usize;
                    }
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::ECONNRESET)) => {
                    return Err(InspectError::Gone);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        };
        let mut bytes = vec![0; length.min(table::MAX)];
        std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::from(file), &mut bytes, 0)?;
        Ok(bytes)
    }
}

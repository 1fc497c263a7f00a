//! Identities of the machine's resources: one counter for processes, files and sockets.
//!
//! The counter is guest memory, so a move does not disturb it. The host gives the range it may use with each
//! generation ([`kage_abi::resources`]); a machine that starts from nothing, or goes back to an older state, starts
//! behind everything its predecessor may have given out. An index is therefore never given out twice.

use core::{fmt, net::Ipv6Addr};

use kage_abi::resources::INDEX_MAX;

use crate::{arch, executor};

/// Indices that only the kernel's own connections get.
const OWN: u64 = 4096;
/// Making a resource, in estimated nanoseconds. More than it takes: so that the host, which looks every few seconds,
/// raises the limit long before any loop of a program comes near it.
const COST: u64 = 40_000;

/// What a VID names. The numbers are those in its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A process.
    Process = 1,
    /// A file or directory.
    File = 2,
    /// A listener, a connection, a datagram socket.
    Socket = 3,
}

/// A resource's identity for its whole life. Shown as the address it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vid {
    kind: Kind,
    index: u64,
}

impl Vid {
    /// Its index, one no other resource of this machine has or had, of whatever kind.
    pub const fn index(self) -> u64 {
        self.index
    }

    /// The VID as an address of the image's prefix.
    pub fn address(self) -> Ipv6Addr {
        let image = u128::from_be_bytes(arch::config().address) & !((1 << 40) - 1);
        Ipv6Addr::from(image | (self.kind as u128) << 36 | u128::from(self.index))
    }
}

impl fmt::Display for Vid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address().fmt(formatter)
    }
}

/// Takes over the range that came with a generation.
pub fn start() {
    let record = arch::resources();
    arch::set_next_index(record.next_index.max(record.first_index));
}

/// The identity that a resource was given before, when it was written to the disk.
pub const fn again(kind: Kind, index: u64) -> Vid {
    Vid { kind, index }
}

/// The index that is given out next.
pub fn upcoming() -> u64 {
    arch::resources().next_index
}

/// Has indices before `next` not be given out any more, since the disk says that they were; false when the host has
/// not set so many aside for this machine.
pub fn resume(next: u64) -> bool {
    let record = arch::resources();
    let ours = next <= record.limit_index;
    if ours {
        arch::set_next_index(record.next_index.max(next));
    }
    ours
}

/// Whether there is an identity for what a program or a user wants to make; accounts for making it. The host raises the limit long before it is
/// reached; while it cannot, because the directory is away or the machine is moving, and for ever once nearly all 2³⁶
/// are used, nothing more is made.
pub fn has_room() -> bool {
    executor::charge(COST);
    let record = arch::resources();
    record.next_index.saturating_add(OWN) < record.limit_index.min(INDEX_MAX - OWN)
}

/// The identity of a new resource. Whoever makes one at another's wish asks [`has_room`] first.
///
/// For the kernel's own some are left, far more than come in while the host cannot raise the limit. Were they used up
/// too, the machine would stand still here: an identity used twice would be worse.
///
/// # Panics
/// After 2³⁶ resources.
pub fn next(kind: Kind) -> Vid {
    let mut record = arch::resources();
    assert!(record.next_index <= INDEX_MAX, "every index of this image is used");
    while record.next_index >= record.limit_index {
        arch::door(u64::MAX);
        record = arch::resources();
    }
    arch::set_next_index(record.next_index + 1);
    Vid { kind, index: record.next_index }
}

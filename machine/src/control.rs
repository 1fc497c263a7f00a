//! Messages between the daemon and one VMM process.
//!
//! One `SOCK_SEQPACKET` connection; each packet is one postcard value, descriptors ride along. The
//! daemon asks, the VMM answers each request with one [`Reply`]. The VMM listens, so that a restarted
//! daemon connects again and takes its machines over; a newer connection replaces the older.
//!
//! Both ends are the same program, so there is one version: a daemon asks for it first
//! ([`Request::Hello`]) and ends machines it cannot speak to only on an operator's word.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{
    Geometry, PageSet,
    machine::{BaseHash, HostInstant, OutputMark, PauseCause},
};

/// Version of these messages.
pub const CONTROL_VERSION: u16 = 6;

/// Largest packet: a bitmap of the largest page space, and the rest.
pub const MAX_PACKET: usize = 192 << 10;

/// What a VMM needs before it can hold a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Size of memory and disk.
    pub geometry: Geometry,
    /// Bytes of the base slot.
    pub base_bytes: u64,
    /// Its hash, kept for whoever adopts the machine.
    pub base: BaseHash,
    /// First instruction.
    pub entry: u64,
    /// Root of the page tables.
    pub page_table_root: u64,
    /// User and group to become, after which no privilege is left; `None` keeps the caller's (tests).
    pub jail: Option<u32>,
}

/// Identity given to a machine before its first generation; see `abi::Config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Name of the user.
    pub user: String,
    /// The image's address.
    pub address: [u8; 16],
    /// Length of the image's prefix.
    pub prefix_length: u8,
    /// The image's IPv4 address, if it has one.
    pub ipv4: Option<[u8; 4]>,
    /// Largest IP packet.
    pub mtu: u16,
    /// Seed of the host key.
    pub host_key_seed: [u8; 32],
    /// Lines as in OpenSSH's `authorized_keys`.
    pub authorized_keys: String,
}

/// What the daemon asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Who are you; answered by [`Reply::Hello`], once the machine is set up with memory, control page and what
    /// [`Made`] names as descriptors.
    Hello {
        /// The daemon's [`CONTROL_VERSION`].
        version: u16,
    },
    /// Become a shell; answered by [`Reply::Ready`]. Descriptors: kvm, base, memory, control page.
    Setup(Setup),
    /// Use a tap. Descriptor: the tap, or none to detach.
    AttachTap,
    /// Use a disk of the size set up. Descriptors: its log, the index's memory, the connection on which the answer
    /// and all that concerns the disk comes.
    AttachDisk {
        /// Whose log it must be.
        identity: [u8; 16],
        /// Where there is no log yet, another host has every block.
        disk_elsewhere: bool,
    },
    /// Speak of the disk on another connection from here on. Descriptor: the connection.
    AttachDiskLine,
    /// Words of the daemon's own, kept for whoever adopts the machine.
    Label(Vec<u8>),
    /// Start the kernel from its first instruction, gate open.
    Boot,
    /// Give identity and a first (or new) generation.
    Generation {
        /// Identity, or `None` to keep the one there.
        identity: Option<Identity>,
        /// 32 fresh random bytes.
        seed: [u8; 32],
        /// Indices of VIDs it may give out.
        indices: Range<u64>,
    },
    /// Answer requests for the table of resources on a connection of their own. Descriptor: the connection.
    AttachInspector,
    /// Raise the index that may not be given out yet.
    RaiseIndices {
        /// The limit from now on; a lower one changes nothing.
        limit: u64,
    },
    /// Take a saved state ([`crate::SavedState::encode`]).
    Restore {
        /// The encoded state.
        state: Vec<u8>,
        /// The source's pause on this host's clock.
        paused_at: HostInstant,
        /// The machine comes from another host: count a move.
        moved: bool,
    },
    /// Run a restored machine; answered by [`Reply::Started`].
    Run {
        /// Whether its output may leave.
        gate_open: bool,
    },
    /// Let output leave.
    OpenGate,
    /// Let what was queued up to there leave through a gate that is shut.
    LetOut(OutputMark),
    /// Pages written since the last harvest; answered by [`Reply::Dirty`].
    Harvest,
    /// Stop; answered by [`Reply::Paused`].
    Pause {
        /// What for.
        cause: PauseCause,
    },
    /// Run on after a pause, gate as before; answered by [`Reply::Started`].
    Resume,
    /// Be a shell again: a paused machine that has no label was nobody's. What its memory holds is the daemon's to
    /// wipe.
    Forget,
    /// Never run again; stored in the control page before it is answered.
    Release,
    /// Turn the heartbeat on or off and start its figures anew.
    Heartbeat {
        /// Wanted.
        on: bool,
    },
    /// Figures; answered by [`Reply::Status`].
    Status,
    /// End the process.
    End,
}

/// Where a VMM process stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Nothing set up.
    Empty,
    /// Set up and warm, no state.
    Shell,
    /// Has a state, has not run.
    Restored,
    /// Runs.
    Running {
        /// Whether its output may leave.
        gate_open: bool,
    },
    /// Stopped; may run on.
    Paused,
    /// Stopped for ever.
    Released,
}

/// What a machine consists of. Disk (its log and the index's memory) and tap come as descriptors, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// Its page space.
    pub geometry: Geometry,
    /// Its base.
    pub base: BaseHash,
    /// Whether a disk is attached.
    pub disk: bool,
    /// Whether a tap is.
    pub tap: bool,
}

/// Counters of a machine's network device since this process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetCounters {
    /// Frames to the tap.
    pub sent_frames: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames from the tap.
    pub received_frames: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames a full tap did not take.
    pub dropped_frames: u64,
}

/// What the VMM answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// Not done; the machine is as it was.
    Refused {
        /// Why.
        reason: String,
    },
    /// To [`Request::Hello`].
    Hello {
        /// The VMM's [`CONTROL_VERSION`].
        version: u16,
        /// Where it stands.
        phase: Phase,
        /// What it consists of, once set up.
        machine: Option<Made>,
        /// The last [`Request::Label`].
        label: Vec<u8>,
    },
    /// To [`Request::Setup`].
    Ready {
        /// Where the memory is mapped in the process. The descriptor of its page faults comes with it, where this
        /// host has such.
        memory_at: u64,
    },
    /// To [`Request::Harvest`].
    Dirty(PageSet),
    /// To [`Request::Pause`].
    Paused {
        /// Encoded state.
        state: Vec<u8>,
        /// Pages written since the last harvest.
        dirty: PageSet,
        /// When the vCPU stopped.
        at: HostInstant,
        /// Up to where its output was queued.
        output: OutputMark,
    },
    /// To [`Request::Run`].
    Started {
        /// When the vCPU was entered.
        at: HostInstant,
        /// Whether its output may leave.
        gate_open: bool,
    },
    /// To [`Request::Status`].
    Status {
        /// Where it stands.
        phase: Phase,
        /// Network counters.
        net: NetCounters,
        /// Entries into the vCPU.
        doors: u64,
    },
}

/// Layout of the control page shared by daemon and VMM: what must survive either of them.
pub mod control_page {
    /// Offset of a byte that is 1 once the machine is released.
    pub const RELEASED: usize = 0;
    /// Offset of a byte that is 1 while pages of the memory are missing: the daemon sets and clears it. A guest that does
    /// not knock meanwhile may wait for one.
    pub const MISSING: usize = 1;
    /// Offset of the failure text's length, 2 bytes little-endian.
    pub const FAILURE_LENGTH: usize = 2;
    /// Offset of the failure text.
    pub const FAILURE: usize = 4;
    /// Most bytes of failure text.
    pub const FAILURE_MAX: usize = 1000;
}

/// Encodes a message.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Growing a vector cannot fail, and these types have no maps or unsized sequences.
    postcard::to_stdvec(message).unwrap_or_default()
}

/// A packet was not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a control message")]
pub struct NotAMessage;

/// Decodes a message.
///
/// # Errors
/// [`NotAMessage`].
pub fn decode<'a, T: Deserialize<'a>>(packet: &'a [u8]) -> Result<T, NotAMessage> {
    postcard::from_bytes(packet).map_err(|_| NotAMessage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_round_trip_and_garbage_is_refused() {
        let reply = Reply::Paused {
            state: vec![1, 2],
            dirty: PageSet::full(130),
            at: HostInstant { ns: 9 },
            output: OutputMark(7),
        };
        assert_eq!(decode::<Reply>(&encode(&reply)), Ok(reply));
        assert_eq!(decode::<Request>(&[0xff, 0xff]), Err(NotAMessage));
    }

    #[test]
    fn a_harvest_of_the_largest_page_space_fits_a_packet() {
        let pages = ((Geometry::MAX_MEMORY + Geometry::MAX_DISK) / 4096) as u32;
        assert!(encode(&Reply::Dirty(PageSet::full(pages))).len() < MAX_PACKET);
    }
}

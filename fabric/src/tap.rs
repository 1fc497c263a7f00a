//! Taps as descriptors: opening one, and giving back the frames that its machine no longer reads.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use kage_abi::{GATEWAY_MAC, GUEST_MAC};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
};

use crate::sys;

/// Bytes of vnet header before every frame of a tap: `struct virtio_net_hdr_v1` (virtio 1.2 §5.1.6).
pub const VNET_HEADER_BYTES: usize = 12;

/// Longest frame a tap hands out: a large receive of 64 KiB, its Ethernet header, its vnet header.
const MAX_FRAME_BYTES: usize = (64 << 10) + 14 + 64;
const ETHERNET_BYTES: usize = 14;
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
/// Shortest Ethernet frame with an IPv6 header.
const MIN_IPV6_FRAME_BYTES: usize = ETHERNET_BYTES + 40;
/// Shortest Ethernet frame with an IPv4 header.
const MIN_IPV4_FRAME_BYTES: usize = ETHERNET_BYTES + 20;

/// A tap could not be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No `/dev/net/tun`.
    #[error("/dev/net/tun: no such device; load the module tun, or give the container /dev/net/tun")]
    NoTun,
    /// Not allowed.
    #[error("tap {name}: operation not permitted; run as root or with CAP_NET_ADMIN")]
    Permission {
        /// The tap.
        name: String,
    },
    /// Another process holds it.
    #[error("tap {name} is held by another process; a machine still runs on it")]
    Busy {
        /// The tap.
        name: String,
    },
    /// Anything else.
    #[error("tap {name}: {doing}: {source}")]
    Io {
        /// The tap.
        name: String,
        /// What failed.
        doing: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Opens a tap, which is made if it is not there and vanishes with its last descriptor.
pub fn open(name: &str) -> Result<OwnedFd, TapError> {
    let failed = |doing, errno: Errno| TapError::Io { name: name.into(), doing, source: errno.into() };
    let fd = sys::open_tap(name).map_err(|errno| match errno {
        Errno::NOENT | Errno::NXIO | Errno::NODEV => TapError::NoTun,
        Errno::PERM | Errno::ACCESS => TapError::Permission { name: name.into() },
        Errno::BUSY => TapError::Busy { name: name.into() },
        other => failed("cannot be made", other),
    })?;
    sys::set_vnet_header(&fd, VNET_HEADER_BYTES as i32).map_err(|errno| failed("vnet header", errno))?;
    sys::set_offload(&fd, 0).map_err(|errno| failed("offloads", errno))?;
    Ok(fd)
}

/// Says whether the reader of a tap takes frames with partial checksums and TCP segments longer than the MTU.
///
/// # Errors
/// If the descriptor is no tap.
pub fn set_offload(tap: impl AsFd, checksum: bool, large_receive: bool) -> io::Result<()> {
    let mut features = 0;
    if checksum {
        features |= libc::TUN_F_CSUM;
        if large_receive {
            features |= libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
        }
    }
    Ok(sys::set_offload(tap, features)?)
}

/// What became of the frames left in a tap's queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Written back for the kernel to forward.
    pub forwarded: u64,
    /// Written back in vain: the kernel did not take them.
    pub lost: u64,
    /// Addressed to the link alone (multicast, link-local, not IP): of no use elsewhere.
    pub link_only: u64,
}

impl std::ops::AddAssign for Drained {
    fn add_assign(&mut self, other: Self) {
        self.forwarded += other.forwarded;
        self.lost += other.lost;
        self.link_only += other.link_only;
    }
}

/// Reads the frames left in a tap's queue and writes them back into the tap as if the machine had sent them, so
/// that the kernel forwards them by the machine's new route. The route must have been changed before, and the
/// machine must no longer read.
///
/// A frame keeps its vnet header: the kernel takes back its own partial checksums and large segments. One hop is
/// counted off its hop limit, as it would be on any path through this host.
///
/// Stops when the queue is empty, or after `limit` frames: with the route still pointing here each frame would come
/// back for ever.
///
/// # Errors
/// If the tap cannot be read. Frames already written back stay so.
pub fn drain(tap: impl AsFd, limit: u64) -> io::Result<Drained> {
    let tap = tap.as_fd();
    let header = usize::try_from(sys::vnet_header(tap)?).unwrap_or(VNET_HEADER_BYTES);
    let mut drained = Drained::default();
    let mut buffer = vec![0; MAX_FRAME_BYTES + header];
    for _ in 0..limit {
        let length = match rustix::io::read(tap, &mut buffer) {
            Ok(length) => length,
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let frame = &mut buffer[..length];
        if !turn_around(frame.get_mut(header..).unwrap_or_default()) {
            drained.link_only += 1;
            continue;
        }
        match rustix::io::retry_on_intr(|| rustix::io::write(tap, frame)) {
            Ok(_) => drained.forwarded += 1,
            Err(_) => drained.lost += 1,
        }
    }
    Ok(drained)
}

/// Drains until no frame has come for `quiet`, or until `deadline`: packets that were being forwarded while the
/// route changed still land in the old queue a moment later.
///
/// # Errors
/// As [`drain`].
pub fn drain_until_quiet(tap: impl AsFd, quiet: Duration, deadline: Instant) -> io::Result<Drained> {
    let tap = tap.as_fd();
    let mut drained = Drained::default();
    loop {
        drained += drain(tap, QUEUE_FRAMES_PER_ROUND)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(drained);
        }
        let wait = Timespec::try_from(quiet.min(left)).map_err(io::Error::other)?;
        let mut poll = [PollFd::new(&tap, PollFlags::IN)];
        match rustix::event::poll(&mut poll, Some(&wait)) {
            Ok(0) => return Ok(drained),
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A round of draining ends after this many frames and looks at the clock.
const QUEUE_FRAMES_PER_ROUND: u64 = 1024;

/// Makes a frame to the machine one from it. False if it is of use on this link alone.
fn turn_around(frame: &mut [u8]) -> bool {
    if frame.len() < MIN_IPV4_FRAME_BYTES || frame[0] & 1 != 0 {
        return false;
    }
    let (multicast, link_local) = match [frame[12], frame[13]] {
        ETHERTYPE_IPV6 if frame.len() >= MIN_IPV6_FRAME_BYTES => {
            let destination = &frame[ETHERNET_BYTES + 24..MIN_IPV6_FRAME_BYTES];
            (destination[0] == 0xff, destination[0] == 0xfe && destination[1] & 0xc0 == 0x80)
        }
        ETHERTYPE_IPV4 => {
            let destination = &frame[ETHERNET_BYTES + 16..MIN_IPV4_FRAME_BYTES];
            (destination[0] >= 224, destination[..2] == [169, 254])
        }
        _ => return false,
    };
    if multicast || link_local {
        return false;
    }
    frame[..6].copy_from_slice(&GATEWAY_MAC);
    frame[6..12].copy_from_slice(&GUEST_MAC);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(destination: std::net::Ipv6Addr) -> Vec<u8> {
        let mut frame = vec![0; MIN_IPV6_FRAME_BYTES];
        frame[..6].copy_from_slice(&GUEST_MAC);
        frame[6..12].copy_from_slice(&GATEWAY_MAC);
        frame[12..14].copy_from_slice(&ETHERTYPE_IPV6);
        frame[38..54].copy_from_slice(&destination.octets());
        frame
    }

    #[test]
    fn a_frame_to_the_machine_is_turned_around() {
        let mut unicast = frame("fd4b:6167:6500::700:0:1".parse().unwrap());
        assert!(turn_around(&mut unicast));
        assert_eq!(unicast[..6], GATEWAY_MAC);
        assert_eq!(unicast[6..12], GUEST_MAC);
    }

    #[test]
    fn frames_of_the_link_stay_on_it() {
        for address in ["fe80::2", "febf::2", "ff02::1", "ff02::1:ff00:2"] {
            assert!(!turn_around(&mut frame(address.parse().unwrap())), "{address}");
        }
        let whole = frame("fd4b:6167:6500::700:0:1".parse().unwrap());
        for length in 0..whole.len() {
            assert!(!turn_around(&mut whole[..length].to_vec()), "{length}");
        }
        let mut ipv4 = vec![0; MIN_IPV4_FRAME_BYTES];
        ipv4[12..14].copy_from_slice(&ETHERTYPE_IPV4);
        for (destination, turned) in
            [([10, 77, 0, 5], true), ([169, 254, 0, 2], false), ([224, 0, 0, 1], false), ([255; 4], false)]
        {
            ipv4[30..34].copy_from_slice(&destination);
            assert_eq!(turn_around(&mut ipv4.clone()), turned, "{destination:?}");
        }
        let mut arp = whole.clone();
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        assert!(!turn_around(&mut arp));
    }
}

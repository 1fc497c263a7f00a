//! The few system calls that no crate wraps: tap ioctls and one socket option.

#![expect(unsafe_code, reason = "tap devices are made by ioctl, and rustix has no NETLINK_EXT_ACK")]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

/// Turns a tap's descriptor into the tap `name`, which has no packet information header but a vnet header.
pub fn open_tap(name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    // SAFETY: all-zero bytes are a valid `ifreq`: it is plain integers, arrays and a union of those.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::NAMETOOLONG);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is; the descriptor is open.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(fd)
}

/// Sets the bytes of vnet header before every frame.
pub fn set_vnet_header(tap: impl AsFd, bytes: i32) -> Result<(), Errno> {
    // SAFETY: TUNSETVNETHDRSZ reads one `int`; the descriptor is open for the borrow.
    check(unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) })
}

/// The bytes of vnet header before every frame.
pub fn vnet_header(tap: impl AsFd) -> Result<i32, Errno> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TUNGETVNETHDRSZ writes one `int`, which `bytes` is; the descriptor is open for the borrow.
    check(unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), libc::TUNGETVNETHDRSZ, &raw mut bytes) })?;
    Ok(bytes)
}

/// Says which offloads the reader of a tap can take (`TUN_F_*`).
pub fn set_offload(tap: impl AsFd, features: libc::c_uint) -> Result<(), Errno> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value; the descriptor is open for the borrow.
    check(unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(features)) })
}

/// Asks the kernel to explain its refusals in words.
pub fn want_extended_acknowledgements(socket: impl AsFd) -> Result<(), Errno> {
    let on: libc::c_int = 1;
    for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
        // SAFETY: the option's value is one `int`, `on`, of the length given; the socket is open for the borrow.
        check(unsafe {
            libc::setsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_NETLINK,
                option,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        })?;
    }
    Ok(())
}

fn check(result: libc::c_int) -> Result<(), Errno> {
    if result < 0 {
        return Err(std::io::Error::last_os_error()
            .raw_os_error()
            .map_or(Errno::IO, Errno::from_raw_os_error));
    }
    Ok(())
}

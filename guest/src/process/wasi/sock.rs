//! Sockets: preview 1's functions, and those that open, bind, connect and listen, as WasmEdge has them in the same
//! module (`docs/programs.md`, `images/include/kage_socket.h`).
//!
//! Three functions have several forms: [`fit`] links the one that a module's import has the type of.

use alloc::{rc::Rc, vec::Vec};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::{IpAddress, IpEndpoint, IpListenEndpoint};
use wasmtime::{Error, ExternType, FuncType, Linker, Module};

use super::{
    PREVIEW1,
    call::{Call, Guest, Outcome, PIECE, copied, finish, parts, room, wait},
    descriptor::{Descriptor, Object, flags, rights},
    errno::Errno,
    fd::gather,
    functions,
};
use crate::{
    net::socket::{Received, Socket, SocketError},
    process::State,
};

/// Flags of receiving (`typenames.witx`, `riflags`).
const PEEK: u32 = 1;
const WAIT_ALL: u32 = 2;
/// Flag of what was received (`roflags`): a part was cut off.
const CUT: u16 = 1;

/// Address families.
const INET4: u8 = 1;
const INET6: u8 = 2;
/// Kinds of socket.
const DATAGRAM: u32 = 1;
const STREAM: u32 = 2;
/// An address in a buffer of this size carries its family in front, in 16 bits.
const WITH_FAMILY: u32 = 128;

impl From<SocketError> for Errno {
    fn from(error: SocketError) -> Self {
        match error {
            SocketError::InUse => Self::AddrInUse,
            SocketError::NotAvailable => Self::AddrNotAvail,
            SocketError::Connected => Self::IsConn,
            SocketError::NotConnected => Self::NotConn,
            SocketError::Refused => Self::ConnRefused,
            SocketError::Reset => Self::ConnReset,
            SocketError::Broken => Self::Pipe,
            SocketError::TooLong => Self::MsgSize,
            SocketError::NoDestination => Self::DestAddrReq,
            SocketError::TooMany => Self::NFile,
            SocketError::NoRoom => Self::NoBufs,
            SocketError::Invalid => Self::Inval,
        }
    }
}

impl From<SocketError> for super::call::Stop {
    fn from(error: SocketError) -> Self {
        Self::Errno(error.into())
    }
}

/// Names the functions that have one form.
pub fn add_to_linker(linker: &mut Linker<State>) -> Result<(), Error> {
    functions! { linker:
        own::sock_recv(fd: u32, vectors: u32, count: u32, flags: u32, into: u32, flags_into: u32);
        own::sock_send(fd: u32, vectors: u32, count: u32, flags: u32, into: u32);
        own::sock_shutdown(fd: u32, how: u32);
        own::sock_open(family: u32, kind: u32, into: u32);
        own::sock_bind(fd: u32, address: u32, port: u32);
        own::sock_listen(fd: u32, backlog: u32);
        own::sock_connect(fd: u32, address: u32, port: u32);
        own::sock_send_to(fd: u32, vectors: u32, count: u32, address: u32, port: u32, flags: u32, into: u32);
        own::sock_getsockopt(fd: u32, level: u32, name: u32, value: u32, size: u32);
        own::sock_setsockopt(fd: u32, level: u32, name: u32, value: u32, size: u32);
        own::sock_getaddrinfo(
            node: u32, node_length: u32, service: u32, service_length: u32, hint: u32, list: u32, most: u32, count: u32
        );
    }
    Ok(())
}

/// This module, as [`functions`] names it.
mod own {
    pub use super::*;
}

/// Links the form of each function that a module imports; the first form is preview 1's, or the older one.
pub fn fit(linker: &mut Linker<State>, module: &Module) -> Result<(), Error> {
    let parameters = |name: &str| {
        let mut imports = module.imports();
        let import = imports.find(|import| import.module() == PREVIEW1 && import.name() == name)?;
        let ExternType::Func(kind) = import.ty() else { return None };
        Some(FuncType::params(&kind).len())
    };
    linker.allow_shadowing(true);
    if parameters("sock_accept") == Some(2) {
        linker.func_wrap(PREVIEW1, "sock_accept", |mut call: Call<'_>, fd: u32, into: u32| {
            finish(sock_accept(&mut call, fd, 0, into))
        })?;
    } else {
        linker.func_wrap(PREVIEW1, "sock_accept", |mut call: Call<'_>, fd: u32, flags: u32, into: u32| {
            finish(sock_accept(&mut call, fd, flags, into))
        })?;
    }
    if parameters("sock_recv_from") == Some(7) {
        linker.func_wrap(
            PREVIEW1,
            "sock_recv_from",
            |mut call: Call<'_>,
             fd: u32,
             vectors: u32,
             count: u32,
             address: u32,
             flags: u32,
             into: u32,
             flags_into: u32| {
                finish(sock_recv_from(
                    &mut call,
                    fd,
                    (vectors, count),
                    address,
                    flags,
                    None,
                    (into, flags_into),
                ))
            },
        )?;
    } else {
        linker.func_wrap(
            PREVIEW1,
            "sock_recv_from",
            |mut call: Call<'_>,
             fd: u32,
             vectors: u32,
             count: u32,
             address: u32,
             flags: u32,
             port: u32,
             into: u32,
             flags_into: u32| {
                let port = Some(port);
                finish(sock_recv_from(
                    &mut call,
                    fd,
                    (vectors, count),
                    address,
                    flags,
                    port,
                    (into, flags_into),
                ))
            },
        )?;
    }
    for (name, end) in [("sock_getlocaladdr", End::Local), ("sock_getpeeraddr", End::Peer)] {
        if parameters(name) == Some(3) {
            linker.func_wrap(
                PREVIEW1,
                name,
                move |mut call: Call<'_>, fd: u32, address: u32, port: u32| {
                    finish(address_of(&mut call, end, fd, address, None, port))
                },
            )?;
        } else {
            linker.func_wrap(
                PREVIEW1,
                name,
                move |mut call: Call<'_>, fd: u32, address: u32, family: u32, port: u32| {
                    finish(address_of(&mut call, end, fd, address, Some(family), port))
                },
            )?;
        }
    }
    linker.allow_shadowing(false);
    Ok(())
}

fn descriptor(call: &Call<'_>, fd: u32) -> Outcome<Rc<Descriptor>> {
    call.data().wasi.table.get(fd)
}

/// An address and a port as programs pass them: a pointer to a buffer and its size.
fn read_address(guest: &Guest<'_>, at: u32) -> Outcome<Option<IpAddress>> {
    let (buffer, size) = (guest.u32(at)?, guest.u32(at.checked_add(4).ok_or(Errno::Fault)?)?);
    let (buffer, size) = match size {
        WITH_FAMILY => {
            let at = buffer.checked_add(2).ok_or(Errno::Fault)?;
            let family = guest.u16(buffer)?;
            (at, if family == u16::from(INET4) { 4 } else { 16 })
        }
        size => (buffer, size),
    };
    let address = match guest.bytes(buffer, size)? {
        bytes @ [_, _, _, _] => IpAddr::from(<[u8; 4]>::try_from(bytes).unwrap_or_default()),
        bytes if bytes.len() == 16 => IpAddr::from(<[u8; 16]>::try_from(bytes).unwrap_or_default()),
        _ => return Err(Errno::Inval.into()),
    };
    Ok((!address.is_unspecified()).then_some(()).map(|()| ours(address)).transpose()?)
}

/// An address as the network knows it. The loopback's is IPv6's; others of IPv4 are only for machines that have one.
fn ours(address: IpAddr) -> Result<IpAddress, Errno> {
    match address {
        IpAddr::V4(address) if address.is_loopback() => Ok(IpAddress::Ipv6(Ipv6Addr::LOCALHOST)),
        IpAddr::V6(address) => match address.to_ipv4_mapped() {
            Some(mapped) => ours(IpAddr::V4(mapped)),
            None => Ok(IpAddress::Ipv6(address)),
        },
        IpAddr::V4(address) => crate::net::ipv4(address).ok_or(Errno::AddrNotAvail),
    }
}

fn port(number: u32) -> Outcome<u16> {
    Ok(u16::try_from(number).map_err(|_| Errno::Inval)?)
}

/// Writes an address into a buffer that a program gave by a pointer and a size; returns its family as numbered in
/// addresses.
fn put_address(guest: &mut Guest<'_>, at: u32, address: Option<IpAddress>) -> Outcome<u8> {
    let (buffer, size) = (guest.u32(at)?, guest.u32(at.checked_add(4).ok_or(Errno::Fault)?)?);
    let octets: Vec<u8> = match address.map(IpAddr::from) {
        None => Ipv6Addr::UNSPECIFIED.octets().to_vec(),
        Some(IpAddr::V4(address)) => address.octets().to_vec(),
        Some(IpAddr::V6(address)) => address.octets().to_vec(),
    };
    let family = if octets.len() == 4 { INET4 } else { INET6 };
    if size < octets.len() as u32 {
        return Err(Errno::Inval.into());
    }
    let mut at = buffer;
    if size >= WITH_FAMILY {
        guest.put_u16(buffer, u16::from(family))?;
        at = buffer.checked_add(2).ok_or(Errno::Fault)?;
    }
    guest.put_bytes(at, &octets)?;
    Ok(family)
}

pub fn sock_open(call: &mut Call<'_>, family: u32, kind: u32, into: u32) -> Outcome {
    if family != u32::from(INET4) && family != u32::from(INET6) {
        return Err(Errno::AfNoSupport.into());
    }
    if kind != DATAGRAM && kind != STREAM {
        return Err(Errno::ProtoNoSupport.into());
    }
    let (mut guest, state) = parts(call)?;
    guest.put_u32(into, u32::MAX)?;
    state.wasi.table.has_room()?;
    let socket = Socket::open(kind == STREAM, state.process.pid())?;
    let number = state.wasi.table.add(Descriptor::new(Object::Socket(socket)))?;
    guest.put_u32(into, number)
}

pub fn sock_bind(call: &mut Call<'_>, fd: u32, address: u32, number: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let socket = descriptor.socket()?;
    let (guest, _) = parts(call)?;
    let to = IpListenEndpoint { addr: read_address(&guest, address)?, port: port(number)? };
    Ok(socket.bind(to)?)
}

pub fn sock_listen(call: &mut Call<'_>, fd: u32, backlog: u32) -> Outcome {
    Ok(descriptor(call, fd)?.socket()?.listen(backlog)?)
}

fn sock_accept(call: &mut Call<'_>, fd: u32, flags: u32, into: u32) -> Outcome {
    let listener = descriptor(call, fd)?;
    let socket = listener.socket()?;
    listener.require(rights::SOCK_ACCEPT)?;
    let flags = u16::try_from(flags).ok().filter(|flags| flags & !flags::ALL == 0).ok_or(Errno::Inval)?;
    let (mut guest, state) = parts(call)?;
    guest.put_u32(into, u32::MAX)?;
    state.wasi.table.has_room()?;
    let accepted = wait(listener.blocks(), |context| socket.poll_accept(context).map_err(Into::into))?;
    let descriptor = Descriptor::new(Object::Socket(accepted));
    descriptor.set_flags(flags);
    let number = state.wasi.table.add(descriptor)?;
    guest.put_u32(into, number)
}

pub fn sock_connect(call: &mut Call<'_>, fd: u32, address: u32, number: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let socket = descriptor.socket()?;
    let (guest, _) = parts(call)?;
    let addr = read_address(&guest, address)?.unwrap_or(IpAddress::Ipv6(Ipv6Addr::LOCALHOST));
    let port = port(number)?;
    if port == 0 {
        return Err(Errno::Inval.into());
    }
    let to = IpEndpoint { addr, port };
    match wait(descriptor.blocks(), |context| socket.poll_connect(context, to).map_err(Into::into)) {
        Err(super::call::Stop::Errno(Errno::Again)) => Err(Errno::InProgress.into()),
        outcome => outcome,
    }
}

fn receive(
    descriptor: &Descriptor,
    guest: &mut Guest<'_>,
    vectors: &[core::ops::Range<usize>],
    flags: u32,
) -> Outcome<Received> {
    let socket = descriptor.socket()?;
    descriptor.require(rights::FD_READ)?;
    if flags & !(PEEK | WAIT_ALL) != 0 {
        return Err(Errno::NotSup.into());
    }
    let peek = flags & PEEK != 0;
    let total: usize = vectors.iter().map(core::iter::ExactSizeIterator::len).sum();
    room(total.min(PIECE))?;
    let mut buffer = alloc::vec![0; total.min(PIECE)];
    let wanted = buffer.len();
    let mut received = Received { count: 0, cut: false, from: None };
    loop {
        let into = buffer.get_mut(received.count..).unwrap_or_default();
        let part =
            wait(descriptor.blocks(), |context| socket.poll_receive(context, into, peek).map_err(Into::into));
        match part {
            Ok(part) => {
                let more = part.count > 0;
                received = Received { count: received.count + part.count, ..part };
                let whole = flags & WAIT_ALL != 0 && socket.is_stream() && !peek;
                if !(whole && more && received.count < wanted) {
                    break;
                }
            }
            Err(super::call::Stop::Errno(_)) if received.count > 0 => break,
            Err(stop) => return Err(stop),
        }
    }
    let mut rest = buffer.get(..received.count).unwrap_or_default();
    for part in vectors {
        let into = guest.part_mut(part);
        let (now, later) = rest.split_at(rest.len().min(into.len()));
        if let Some(into) = into.get_mut(..now.len()) {
            into.copy_from_slice(now);
        }
        rest = later;
    }
    copied(received.count)?;
    Ok(received)
}

pub fn sock_recv(
    call: &mut Call<'_>,
    fd: u32,
    vectors: u32,
    count: u32,
    flags: u32,
    into: u32,
    flags_into: u32,
) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let (mut guest, _) = parts(call)?;
    let vectors = guest.vectors(vectors, count)?;
    let received = receive(&descriptor, &mut guest, &vectors, flags)?;
    guest.put_u32(into, received.count as u32)?;
    guest.put_u16(flags_into, if received.cut { CUT } else { 0 })
}

fn sock_recv_from(
    call: &mut Call<'_>,
    fd: u32,
    (vectors, count): (u32, u32),
    address: u32,
    flags: u32,
    port: Option<u32>,
    (into, flags_into): (u32, u32),
) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let (mut guest, _) = parts(call)?;
    let vectors = guest.vectors(vectors, count)?;
    let received = receive(&descriptor, &mut guest, &vectors, flags)?;
    put_address(&mut guest, address, received.from.map(|from| from.addr))?;
    if let Some(port) = port {
        guest.put_u32(port, received.from.map_or(0, |from| u32::from(from.port)))?;
    }
    guest.put_u32(into, received.count as u32)?;
    guest.put_u16(flags_into, if received.cut { CUT } else { 0 })
}

fn send(
    call: &mut Call<'_>,
    fd: u32,
    (vectors, count): (u32, u32),
    to: impl FnOnce(&Guest<'_>) -> Outcome<Option<IpEndpoint>>,
    into: u32,
) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let socket = descriptor.socket()?;
    descriptor.require(rights::FD_WRITE)?;
    let (mut guest, _) = parts(call)?;
    let vectors = guest.vectors(vectors, count)?;
    let to = to(&guest)?;
    let bytes = gather(&guest, &vectors, PIECE)?;
    let sent =
        wait(descriptor.blocks(), |context| socket.poll_send(context, &bytes, to).map_err(Into::into))?;
    copied(sent)?;
    guest.put_u32(into, sent as u32)
}

pub fn sock_send(call: &mut Call<'_>, fd: u32, vectors: u32, count: u32, flags: u32, into: u32) -> Outcome {
    if flags != 0 {
        return Err(Errno::NotSup.into());
    }
    send(call, fd, (vectors, count), |_| Ok(None), into)
}

#[expect(clippy::too_many_arguments, reason = "the extension's parameters")]
pub fn sock_send_to(
    call: &mut Call<'_>,
    fd: u32,
    vectors: u32,
    count: u32,
    address: u32,
    number: u32,
    flags: u32,
    into: u32,
) -> Outcome {
    if flags != 0 {
        return Err(Errno::NotSup.into());
    }
    let to = |guest: &Guest<'_>| {
        let addr = read_address(guest, address)?.unwrap_or(IpAddress::Ipv6(Ipv6Addr::LOCALHOST));
        Ok(Some(IpEndpoint { addr, port: port(number)? }))
    };
    send(call, fd, (vectors, count), to, into)
}

pub fn sock_shutdown(call: &mut Call<'_>, fd: u32, how: u32) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let socket = descriptor.socket()?;
    descriptor.require(rights::SOCK_SHUTDOWN)?;
    if how == 0 || how > 3 {
        return Err(Errno::Inval.into());
    }
    Ok(socket.shutdown(how & 1 != 0, how & 2 != 0)?)
}

/// Which end's address is asked for.
#[derive(Clone, Copy)]
enum End {
    Local,
    Peer,
}

fn address_of(
    call: &mut Call<'_>,
    end: End,
    fd: u32,
    address: u32,
    family: Option<u32>,
    port: u32,
) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let socket = descriptor.socket()?;
    let endpoint: IpListenEndpoint = match end {
        End::Local => socket.local(),
        End::Peer => socket.peer()?.into(),
    };
    let (mut guest, _) = parts(call)?;
    let found = put_address(&mut guest, address, endpoint.addr)?;
    if let Some(family) = family {
        // Here, and only here, families are numbered by the protocol's version.
        guest.put_u32(family, if found == INET4 { 4 } else { 6 })?;
    }
    guest.put_u32(port, u32::from(endpoint.port))
}

/// Options of a socket (level 0).
mod option {
    pub const REUSEADDR: u32 = 0;
    pub const TYPE: u32 = 1;
    pub const ERROR: u32 = 2;
    pub const BROADCAST: u32 = 4;
    pub const SNDBUF: u32 = 5;
    pub const RCVBUF: u32 = 6;
    pub const KEEPALIVE: u32 = 7;
    pub const LINGER: u32 = 9;
    pub const RCVTIMEO: u32 = 11;
    pub const SNDTIMEO: u32 = 12;
    pub const ACCEPTCONN: u32 = 13;
}

pub fn sock_getsockopt(
    call: &mut Call<'_>,
    fd: u32,
    level: u32,
    name: u32,
    value: u32,
    size: u32,
) -> Outcome {
    let descriptor = descriptor(call, fd)?;
    let socket = descriptor.socket()?;
    if level != 0 {
        return Err(Errno::NoProtoOpt.into());
    }
    let (receive, send) = Socket::buffers();
    let found = match name {
        option::REUSEADDR => 1,
        option::TYPE if socket.is_stream() => STREAM,
        option::TYPE => DATAGRAM,
        option::ERROR => socket.take_error().map_or(0, |error| Errno::from(error) as u32),
        option::SNDBUF => send as u32,
        option::RCVBUF => receive as u32,
        option::KEEPALIVE => u32::from(socket.is_stream()),
        option::ACCEPTCONN => u32::from(socket.is_listening()),
        option::BROADCAST => 0,
        _ => return Err(Errno::NoProtoOpt.into()),
    };
    let (mut guest, _) = parts(call)?;
    if guest.u32(size)? < 4 {
        return Err(Errno::Inval.into());
    }
    guest.put_u32(value, found)?;
    guest.put_u32(size, 4)
}

/// What may be set is what is so anyway; buffers have the size they have.
pub fn sock_setsockopt(
    call: &mut Call<'_>,
    fd: u32,
    level: u32,
    name: u32,
    value: u32,
    size: u32,
) -> Outcome {
    descriptor(call, fd)?.socket()?;
    parts(call)?.0.bytes(value, size)?;
    if level != 0 {
        return Err(Errno::NoProtoOpt.into());
    }
    match name {
        option::REUSEADDR
        | option::BROADCAST
        | option::SNDBUF
        | option::RCVBUF
        | option::KEEPALIVE
        | option::LINGER => Ok(()),
        // Waiting with a limit is poll_oneoff's.
        option::RCVTIMEO | option::SNDTIMEO => {
            let (guest, _) = parts(call)?;
            if guest.bytes(value, size)?.iter().all(|byte| *byte == 0) {
                Ok(())
            } else {
                Err(Errno::NotSup.into())
            }
        }
        _ => Err(Errno::NoProtoOpt.into()),
    }
}

/// Addresses given as such, `localhost` and nothing: there is no resolver. Each result's parts lie where the program
/// has made room for them, in a list of `addrinfo`.
#[expect(clippy::too_many_arguments, reason = "the extension's parameters")]
pub fn sock_getaddrinfo(
    call: &mut Call<'_>,
    node: u32,
    node_length: u32,
    service: u32,
    service_length: u32,
    hint: u32,
    list: u32,
    most: u32,
    count: u32,
) -> Outcome {
    const LONGEST: usize = 256;
    let (mut guest, _) = parts(call)?;
    let node = guest.text(node, node_length, LONGEST)?;
    let service = guest.text(service, service_length, LONGEST)?;
    let (node, service) = (node.trim_end_matches('\0'), service.trim_end_matches('\0'));
    let family = guest.u8(hint.checked_add(2).ok_or(Errno::Fault)?)?;
    let address = match node {
        "" if family == INET4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        "" => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        "localhost" if family == INET4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
        "localhost" => IpAddr::V6(Ipv6Addr::LOCALHOST),
        text => text.parse::<IpAddr>().map_err(|_| Errno::NoEnt)?,
    };
    let port = match service {
        "" => 0,
        "http" => 80,
        "https" => 443,
        "ssh" => 22,
        text => text.parse::<u16>().map_err(|_| Errno::NoEnt)?,
    };
    let matches = family == 0 || (family == INET4) == address.is_ipv4();
    if most == 0 || !matches {
        return guest.put_u32(count, 0);
    }
    let field = |at: u32, offset: u32| at.checked_add(offset).ok_or(Errno::Fault);
    let entry = guest.u32(list)?;
    let socket_address = guest.u32(field(entry, 12)?)?;
    let data = guest.u32(field(socket_address, 8)?)?;
    let mut bytes = Vec::from(port.to_be_bytes());
    let family = match address {
        IpAddr::V4(address) => {
            bytes.extend_from_slice(&address.octets());
            INET4
        }
        IpAddr::V6(address) => {
            // As in `sockaddr_in6` behind its family: port, flow, address.
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&address.octets());
            INET6
        }
    };
    guest.put_bytes(data, &bytes)?;
    guest.put_u8(socket_address, family)?;
    guest.put_u32(field(socket_address, 4)?, bytes.len() as u32)?;
    guest.put_u8(field(entry, 2)?, family)?;
    guest.put_u32(field(entry, 8)?, 16)?;
    guest.put_u32(field(entry, 20)?, 0)?;
    guest.put_u32(field(entry, 24)?, 0)?;
    guest.put_u32(count, 1)
}

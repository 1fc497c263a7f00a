//! TCP and UDP of the machine: smoltcp behind async streams.
//!
//! The whole stack lives in guest memory, so its connections move with it. After a move the host has
//! nothing to tell but that there was one ([`resume`]).

mod gateway;
mod resume;
pub mod socket;
mod table;
mod tcp;
mod udp;

pub use table::{Entry, Protocol, entries};
pub use tcp::{Buffers, Closed, Listener, Stream};
pub use udp::Socket as UdpSocket;

use alloc::collections::BTreeSet;
use core::time::Duration;

use kage_abi::{Config, GATEWAY, GATEWAY_V4, GUEST_LINK_LOCAL, GUEST_LINK_LOCAL_V4, GUEST_MAC};
use smoltcp::{
    iface::{Interface, SocketSet},
    socket::AnySocket,
    time::Instant,
    wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, Ipv4Address, Ipv6Address},
};

use crate::{local::Local, virtio::net::Net};
use resume::Port;

struct Stack {
    device: Port,
    interface: Interface,
    sockets: SocketSet<'static>,
}

static STACK: Local<Stack> = Local::new();

fn instant(now: Duration) -> Instant {
    Instant::from_micros(now.as_micros() as i64)
}

fn interface(device: &mut Port, config: &Config, now: Duration) -> Interface {
    let mut settings = smoltcp::iface::Config::new(HardwareAddress::Ethernet(EthernetAddress(GUEST_MAC)));
    settings.random_seed = crate::random::number();
    device.net.set_mtu(usize::from(config.mtu));
    device.introduce(config.ipv4().is_some());
    let mut interface = Interface::new(settings, device, instant(now));
    interface.update_ip_addrs(|addresses| {
        let own = IpCidr::new(Ipv6Address::from(config.address).into(), 128);
        let local = IpCidr::new(Ipv6Address::from(GUEST_LINK_LOCAL).into(), 64);
        let _ = addresses.push(own);
        let _ = addresses.push(local);
        if let Some(ipv4) = config.ipv4() {
            let link = IpCidr::new(Ipv4Address::from(GUEST_LINK_LOCAL_V4).into(), 30);
            let _ = addresses.push(IpCidr::new(Ipv4Address::from(ipv4).into(), 32));
            let _ = addresses.push(link);
        }
    });
    let _ = interface.routes_mut().add_default_ipv6_route(Ipv6Address::from(GATEWAY));
    if config.ipv4().is_some() {
        let _ = interface.routes_mut().add_default_ipv4_route(Ipv4Address::from(GATEWAY_V4));
    }
    // Every address of the image's prefix is its own; the fabric routes only that prefix here.
    interface.set_any_ip(true);
    interface
}

/// Whether an address is one of the machine's own.
pub fn is_own(address: IpAddress) -> bool {
    let config = crate::arch::config();
    let address = match address {
        IpAddress::Ipv6(address) => address,
        IpAddress::Ipv4(address) => return config.ipv4() == Some(address.octets()) || address.is_loopback(),
    };
    let length = u32::from(config.prefix_length.min(128));
    let prefix = |address: u128| address.checked_shr(128 - length).unwrap_or(0);
    prefix(u128::from(address)) == prefix(u128::from_be_bytes(config.address))
        || address.octets() == GUEST_LINK_LOCAL
        || address.is_loopback()
}

/// Most bytes of a datagram to an address: it is one packet.
pub fn largest_datagram(to: IpAddress) -> usize {
    let header = match to {
        IpAddress::Ipv6(_) => 40,
        IpAddress::Ipv4(_) => 20,
    };
    STACK.get().device.net.mtu() - header - 8
}

/// An IPv4 address, if the machine has one itself.
pub fn ipv4(address: Ipv4Address) -> Option<IpAddress> {
    crate::arch::config().ipv4().map(|_| IpAddress::Ipv4(address))
}

/// Opens the network with the image's addresses and a fresh seed for sequence numbers.
pub fn open(device: Net, config: &Config, now: Duration) {
    let mut device = Port::new(device);
    let interface = interface(&mut device, config, now);
    table::start();
    STACK.set(Stack { device, interface, sockets: SocketSet::new(alloc::vec::Vec::new()) });
}

/// Starts again after a change of generation: every connection is reset, and sequence numbers come from
/// a new seed.
pub fn reopen(config: &Config, now: Duration) {
    let mut stack = STACK.get();
    let stack = &mut *stack;
    for (_, socket) in stack.sockets.iter_mut() {
        if let Some(socket) = smoltcp::socket::tcp::Socket::downcast_mut(socket)
            && socket.is_active()
        {
            socket.abort();
        }
    }
    stack.interface.poll(instant(now), &mut stack.device, &mut stack.sockets);
    stack.device.forget();
    stack.interface = interface(&mut stack.device, config, now);
}

/// Handles what arrived and queues what is to leave.
pub fn poll(now: Duration) {
    let mut stack = STACK.get();
    let stack = &mut *stack;
    stack.device.net.reclaim();
    stack.interface.poll(instant(now), &mut stack.device, &mut stack.sockets);
}

/// Sends again what may have been lost in a move.
pub fn moved() {
    let mut stack = STACK.get();
    let stack = &mut *stack;
    let live: BTreeSet<_> = stack
        .sockets
        .iter()
        .filter_map(|(_, socket)| {
            let socket = smoltcp::socket::tcp::Socket::downcast(socket)?;
            let (local, remote) = (socket.local_endpoint()?, socket.remote_endpoint()?);
            Some(resume::name(remote, local))
        })
        .collect();
    stack.device.retain(|name| live.contains(name));
    stack.device.repeat_acknowledgements();
}

/// When the stack is to be polled next, if nothing arrives before.
pub fn next_poll(now: Duration) -> Option<Duration> {
    let mut stack = STACK.get();
    let stack = &mut *stack;
    if stack.device.net.is_sending() {
        return Some(Duration::ZERO);
    }
    let at = stack.interface.poll_at(instant(now), &stack.sockets)?;
    Some(Duration::from_micros(at.total_micros().max(0) as u64))
}

/// Fills the device's rings with nonsense: what the host makes of it is its test.
pub fn spoil_rings() {
    STACK.get().device.net.spoil_rings();
}

//! Routes as netlink requests.
//!
//! All of Kage's routes carry [`PROTOCOL`] and [`METRIC`], so that they can be told from an operator's. There is at
//! most one per prefix: a request with `NLM_F_REPLACE` swaps the one entry of that metric in place, under the
//! table's lock, whether or not old and new have a gateway (the kernel's `fib6_add_rt2node`). Readers see one or the
//! other. An IPv4 destination has the same IPv6 gateways (RTA_VIA, RFC 8950), so that there is one set of neighbours.

use std::net::{IpAddr, Ipv6Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
        RouteVia,
    },
};
use rustix::io::Errno;

use crate::netlink::{NetlinkError, Socket};

/// Marks routes as Kage's; unassigned in `/etc/iproute2/rt_protos`. ('K')
pub const PROTOCOL: u8 = 0x4b;
/// Priority of routes to images and devices: the kernel's default for IPv6.
pub const METRIC: u32 = 1024;
/// Priority of the site's own "unreachable": the least.
pub const UNREACHABLE_METRIC: u32 = u32::MAX;

/// A destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    /// First address.
    pub address: IpAddr,
    /// Bits that count.
    pub length: u8,
}

/// Where frames to a destination go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Interface.
    pub index: u32,
    /// Gateway on it; `None` where the destination itself is there.
    pub gateway: Option<Ipv6Addr>,
}

/// Sets the one route to a destination, in one step.
pub fn replace(socket: &mut Socket, to: Prefix, via: NextHop) -> Result<(), NetlinkError> {
    let mut message = message(to, RouteType::Unicast, METRIC);
    message.attributes.push(RouteAttribute::Oif(via.index));
    message.attributes.extend(via.gateway.map(|gateway| match to.address {
        IpAddr::V6(_) => RouteAttribute::Gateway(RouteAddress::Inet6(gateway)),
        IpAddr::V4(_) => RouteAttribute::Via(RouteVia::Inet6(gateway)),
    }));
    if to.address.is_ipv4() && via.gateway.is_none() {
        message.header.scope = RouteScope::Link;
    }
    socket.request(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Answers packets to a destination that no other route serves with "unreachable", instead of passing them on.
pub fn refuse(socket: &mut Socket, to: Prefix) -> Result<(), NetlinkError> {
    let message = message(to, RouteType::Unreachable, UNREACHABLE_METRIC);
    socket.request(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Removes a destination's route, if there is one of ours.
pub fn remove(socket: &mut Socket, to: Prefix) -> Result<(), NetlinkError> {
    let message = message(to, RouteType::Unspec, METRIC);
    match socket.request(RouteNetlinkMessage::DelRoute(message), 0) {
        Err(error) if error.errno() == Some(Errno::SRCH) => Ok(()),
        result => result,
    }
}

/// All routes to images and devices that are Kage's.
pub fn list(socket: &mut Socket) -> Result<Vec<(Prefix, NextHop)>, NetlinkError> {
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet6, AddressFamily::Inet] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        socket.dump(RouteNetlinkMessage::GetRoute(request), |answer| {
            let RouteNetlinkMessage::NewRoute(route) = answer else { return };
            if route.header.protocol == RouteProtocol::Other(PROTOCOL)
                && route.header.kind == RouteType::Unicast
            {
                routes.extend(describe(&route));
            }
        })?;
    }
    Ok(routes)
}

fn describe(route: &RouteMessage) -> Option<(Prefix, NextHop)> {
    let (mut address, mut index, mut gateway) = (None, None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet6(found)) => address = Some(IpAddr::V6(*found)),
            RouteAttribute::Destination(RouteAddress::Inet(found)) => address = Some(IpAddr::V4(*found)),
            RouteAttribute::Gateway(RouteAddress::Inet6(found))
            | RouteAttribute::Via(RouteVia::Inet6(found)) => gateway = Some(*found),
            RouteAttribute::Oif(found) => index = Some(*found),
            _ => {}
        }
    }
    let prefix = Prefix { address: address?, length: route.header.destination_prefix_length };
    Some((prefix, NextHop { index: index?, gateway }))
}

fn message(to: Prefix, kind: RouteType, metric: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    let (family, address) = match to.address {
        IpAddr::V6(address) => (AddressFamily::Inet6, RouteAddress::Inet6(address)),
        IpAddr::V4(address) => (AddressFamily::Inet, RouteAddress::Inet(address)),
    };
    message.header.address_family = family;
    message.header.destination_prefix_length = to.length;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.header.scope = RouteScope::Universe;
    message.header.kind = kind;
    message.attributes.push(RouteAttribute::Destination(address));
    message.attributes.push(RouteAttribute::Priority(metric));
    message
}

//! Links, addresses and neighbours as netlink requests. Each does nothing where what it asks for is already so.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{
        BridgeStpState, InfoBridge, InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo,
        LinkMessage,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
};
use rustix::io::Errno;

use crate::netlink::{NetlinkError, Socket};

/// What a tap has carried since it was made, seen from the machine behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapCounters {
    /// Frames the machine has read; those still in its queue are not counted yet.
    pub to_machine: u64,
    /// Frames dropped because the machine's queue was full, or nobody held the tap.
    pub to_machine_dropped: u64,
    /// Frames the machine sent.
    pub from_machine: u64,
    /// Frames of the machine that the host's kernel dropped or found malformed.
    pub from_machine_dropped: u64,
}

/// A link as the kernel describes it; only what Kage asks about.
#[derive(Clone, Debug)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its MTU.
    pub mtu: u32,
    /// What it carried.
    pub counters: TapCounters,
    vxlan: Option<Vxlan>,
}

/// Identity of a VXLAN device: where these differ the device is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// VXLAN network identifier.
    pub id: u32,
    /// UDP port, both ends.
    pub port: u16,
    /// Outer source address.
    pub local: IpAddr,
    /// Index of the underlay interface.
    pub underlay: u32,
}

/// What a link is set to.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// MAC address.
    pub mac: [u8; 6],
    /// MTU in bytes.
    pub mtu: u32,
    /// Frames that wait for the reader of a tap; the kernel's default if `None`.
    pub queue: Option<u32>,
}

/// Finds a link by name.
pub fn find(socket: &mut Socket, name: &str) -> Result<Option<Link>, NetlinkError> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.into()));
    match socket.get(RouteNetlinkMessage::GetLink(message)) {
        Ok(RouteNetlinkMessage::NewLink(link)) => Ok(Some(describe(&link))),
        Ok(other) => Err(NetlinkError::Answer(format!("{other:?} where a link was asked for"))),
        Err(error) if error.errno() == Some(Errno::NODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

fn describe(message: &LinkMessage) -> Link {
    let mut link =
        Link { index: message.header.index, mtu: 0, counters: TapCounters::default(), vxlan: None };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Stats64(stats) => {
                link.counters = TapCounters {
                    to_machine: stats.tx_packets,
                    to_machine_dropped: stats.tx_dropped,
                    from_machine: stats.rx_packets,
                    from_machine_dropped: stats.rx_dropped + stats.rx_errors,
                };
            }
            LinkAttribute::LinkInfo(infos) => link.vxlan = infos.iter().find_map(vxlan_of),
            _ => {}
        }
    }
    link
}

fn vxlan_of(info: &LinkInfo) -> Option<Vxlan> {
    let LinkInfo::Data(InfoData::Vxlan(data)) = info else { return None };
    let (mut id, mut port, mut local, mut underlay) = (None, None, None, None);
    for item in data {
        match *item {
            InfoVxlan::Id(value) => id = Some(value),
            InfoVxlan::Port(value) => port = Some(value),
            InfoVxlan::Local(address) => local = Some(IpAddr::V4(address)),
            InfoVxlan::Local6(address) => local = Some(IpAddr::V6(address)),
            InfoVxlan::Link(value) => underlay = Some(value),
            _ => {}
        }
    }
    Some(Vxlan { id: id?, port: port?, local: local?, underlay: underlay? })
}

/// Makes a VXLAN device that learns nothing: who is where is told by [`forwarding_entry`]. A device of that name
/// with another identity is replaced.
pub fn ensure_vxlan(socket: &mut Socket, name: &str, identity: Vxlan) -> Result<u32, NetlinkError> {
    if let Some(link) = find(socket, name)? {
        if link.vxlan == Some(identity) {
            return Ok(link.index);
        }
        delete(socket, name)?;
    }
    let local = match identity.local {
        IpAddr::V4(address) => InfoVxlan::Local(address),
        IpAddr::V6(address) => InfoVxlan::Local6(address),
    };
    let data = vec![
        InfoVxlan::Id(identity.id),
        InfoVxlan::Link(identity.underlay),
        local,
        InfoVxlan::Port(identity.port),
        InfoVxlan::Learning(false),
        InfoVxlan::Ttl(64),
    ];
    create(socket, name, InfoKind::Vxlan, InfoData::Vxlan(data))
}

/// Makes a bridge without spanning tree and without multicast snooping: nobody queries on an access network of
/// ours, and a snooping bridge without a querier forgets who wants neighbour solicitations.
pub fn ensure_bridge(socket: &mut Socket, name: &str) -> Result<u32, NetlinkError> {
    if let Some(link) = find(socket, name)? {
        return Ok(link.index);
    }
    let data = vec![
        InfoBridge::StpState(BridgeStpState::Disabled),
        InfoBridge::ForwardDelay(0),
        InfoBridge::MulticastSnooping(false),
    ];
    create(socket, name, InfoKind::Bridge, InfoData::Bridge(data))
}

fn create(socket: &mut Socket, name: &str, kind: InfoKind, data: InfoData) -> Result<u32, NetlinkError> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.into()));
    message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)]));
    socket.request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)?;
    let link = find(socket, name)?;
    link.map(|link| link.index).ok_or_else(|| NetlinkError::Answer(format!("{name} vanished when made")))
}

/// Sets MAC, MTU and queue length.
pub fn configure(socket: &mut Socket, index: u32, settings: Settings) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::Address(settings.mac.to_vec()));
    message.attributes.push(LinkAttribute::Mtu(settings.mtu));
    message.attributes.extend(settings.queue.map(LinkAttribute::TxQueueLen));
    socket.request(RouteNetlinkMessage::SetLink(message), 0)
}

/// Brings a link up.
pub fn up(socket: &mut Socket, index: u32) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    socket.request(RouteNetlinkMessage::SetLink(message), 0)
}

/// Removes a link, if it is there.
pub fn delete(socket: &mut Socket, name: &str) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.into()));
    match socket.request(RouteNetlinkMessage::DelLink(message), 0) {
        Err(error) if error.errno() == Some(Errno::NODEV) => Ok(()),
        result => result,
    }
}

/// Gives a link a link-local address at once, without duplicate address detection: every gateway has the same.
pub fn ensure_link_local(socket: &mut Socket, index: u32, address: Ipv6Addr) -> Result<(), NetlinkError> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.prefix_len = 64;
    message.header.index = index;
    message.header.scope = AddressScope::Link;
    message.header.flags = AddressHeaderFlags::Nodad | AddressHeaderFlags::Permanent;
    message.attributes.push(AddressAttribute::Address(IpAddr::V6(address)));
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Permanent));
    socket.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Gives a link the gateway's IPv4 address, which is the same on all of them. Its network is what makes the kernel
/// answer a guest that asks for it from its own link-local address, whatever `rp_filter` says.
pub fn ensure_ipv4(socket: &mut Socket, index: u32, address: Ipv4Addr) -> Result<(), NetlinkError> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = 30;
    message.header.index = index;
    message.header.scope = AddressScope::Link;
    message.attributes.push(AddressAttribute::Local(IpAddr::V4(address)));
    message.attributes.push(AddressAttribute::Address(IpAddr::V4(address)));
    socket.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Pins a neighbour's MAC address.
pub fn neighbour(
    socket: &mut Socket,
    index: u32,
    address: Ipv6Addr,
    mac: [u8; 6],
) -> Result<(), NetlinkError> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)));
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    socket.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Tells a VXLAN device at which underlay address a MAC address is.
pub fn forwarding_entry(
    socket: &mut Socket,
    index: u32,
    mac: [u8; 6],
    underlay: IpAddr,
) -> Result<(), NetlinkError> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.flags = NeighbourFlags::Own;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    let destination = match underlay {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    };
    message.attributes.push(NeighbourAttribute::Destination(destination));
    socket.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
}

//! The handle on a host's network: what exists, and where things go.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use kage_abi::{GATEWAY, GATEWAY_MAC, GATEWAY_V4, GUEST_LINK_LOCAL, GUEST_MAC};
use kage_machine::{HostName, SitePrefix, Vid, identity::ApName};
use rustix::io::Errno;

use crate::{
    link::{self, Settings, TapCounters, Vxlan},
    names,
    netlink::{NetlinkError, Socket},
    route::{self, NextHop, Prefix},
    sysctl::{self, SysctlError},
    tap::{self, TapError},
};

/// What the tunnel adds to a packet: IPv6 40, UDP 8, VXLAN 8, inner Ethernet 14.
pub const TUNNEL_BYTES: u32 = 70;
/// Least MTU of a guest: IPv6's own minimum (RFC 8200 §5).
pub const MIN_GUEST_MTU: u32 = 1280;
/// Frames that wait in a tap while its machine is paused: at 10 Gbit/s of full frames 5 ms, at 1 kHz 4 s.
const TAP_QUEUE_FRAMES: u32 = 4096;

/// What a host's fabric is built from.
#[derive(Clone, Debug)]
pub struct FabricSpec {
    /// This host.
    pub host: HostName,
    /// The site's prefix, in which all VIDs lie.
    pub prefix: SitePrefix,
    /// The interface towards the other hosts.
    pub underlay: String,
    /// This host's address on it.
    pub underlay_address: IpAddr,
    /// VXLAN network identifier, the same on every host.
    pub vxlan_id: u32,
    /// VXLAN's UDP port, the same on every host.
    pub vxlan_port: u16,
    /// Some images have an IPv4 address.
    pub ipv4: bool,
    /// Addresses of this network that no image has are answered with "unreachable".
    pub ipv4_pool: Option<(Ipv4Addr, u8)>,
}

/// The network could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// The kernel refused a request.
    #[error("{doing}: {source}")]
    Netlink {
        /// What was asked.
        doing: String,
        /// The refusal.
        source: NetlinkError,
    },
    /// A kernel setting cannot be changed.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// A tap cannot be made.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The configuration names an interface that is not there.
    #[error("network.underlay = {0:?}: no such interface on this host; `ip link` lists them")]
    NoUnderlay(String),
    /// The underlay is too narrow.
    #[error(
        "underlay {underlay} has an MTU of {mtu}: {guest} for guests after {TUNNEL_BYTES} bytes of tunnel, less than \
         IPv6's {MIN_GUEST_MTU}; raise it to at least {} on every host", MIN_GUEST_MTU + TUNNEL_BYTES
    )]
    Mtu {
        /// The interface.
        underlay: String,
        /// Its MTU.
        mtu: u32,
        /// What would be left.
        guest: i64,
    },
    /// A route names a host whose underlay address is not known.
    #[error("no route through host {0}: its underlay address is not known here yet")]
    UnknownPeer(HostName),
    /// Two hosts' names have the same fingerprint.
    #[error("hosts {0} and {1} have the same address on the tunnel; rename one of them")]
    PeerCollision(HostName, HostName),
    /// An underlay address of the other family.
    #[error(
        "host {host} has the underlay address {address}, but this host's is {own}: one family on all hosts"
    )]
    Family {
        /// The peer.
        host: HostName,
        /// Its address.
        address: IpAddr,
        /// This host's address.
        own: IpAddr,
    },
    /// An interface is not there (any more).
    #[error("interface {0} does not exist")]
    NoInterface(String),
}

/// A route of Kage's as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// First address.
    pub address: IpAddr,
    /// 88 for an image, 128 or 32 for one address of an image or a device.
    pub length: u8,
    /// Where it leads.
    pub hop: Hop,
}

/// Where a route leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hop {
    /// To a tap or an access-point bridge of this host.
    Local {
        /// Index of the interface.
        index: u32,
    },
    /// Through the tunnel to a known peer.
    Host(HostName),
    /// Through the tunnel to nobody known.
    Unknown(Ipv6Addr),
}

/// A host's network. Shared between threads by reference; each call is short and blocking.
#[derive(Debug)]
pub struct Fabric {
    spec: FabricSpec,
    underlay: u32,
    guest_mtu: u32,
    /// For routes alone: a flip waits for nothing else.
    routes: Mutex<Socket>,
    control: Mutex<Socket>,
    /// Indices of interfaces made here, so that a flip need not ask for them.
    indices: Mutex<HashMap<String, u32>>,
    peers: Mutex<HashMap<HostName, IpAddr>>,
}

impl Fabric {
    /// Connects to the kernel and looks at the underlay. Changes nothing.
    ///
    /// # Errors
    /// If the underlay is missing or too narrow.
    pub fn open(spec: FabricSpec) -> Result<Self, FabricError> {
        let open = || Socket::open().map_err(netlink("opening a netlink socket"));
        let (routes, mut control) = (open()?, open()?);
        let underlay = link::find(&mut control, &spec.underlay)
            .map_err(netlink(format!("interface {}", spec.underlay)))?
            .ok_or_else(|| FabricError::NoUnderlay(spec.underlay.clone()))?;
        let guest = i64::from(underlay.mtu) - i64::from(TUNNEL_BYTES);
        let guest_mtu = u32::try_from(guest)
            .ok()
            .filter(|&mtu| mtu >= MIN_GUEST_MTU)
            .ok_or_else(|| FabricError::Mtu { underlay: spec.underlay.clone(), mtu: underlay.mtu, guest })?;
        Ok(Self {
            spec,
            underlay: underlay.index,
            guest_mtu,
            routes: Mutex::new(routes),
            control: Mutex::new(control),
            indices: Mutex::default(),
            peers: Mutex::default(),
        })
    }

    /// The MTU of every guest, tap, access-point bridge and the tunnel.
    #[must_use]
    pub fn guest_mtu(&self) -> u32 {
        self.guest_mtu
    }

    /// Turns on forwarding, makes the tunnel, and has packets to images nobody runs answered with "unreachable".
    ///
    /// # Errors
    /// If the kernel refuses a part; the parts made stay.
    pub fn setup(&self) -> Result<(), FabricError> {
        // A forwarding host ignores router advertisements unless told twice, and would lose its default route.
        if sysctl::get(&self.spec.underlay, "accept_ra")? == "1" {
            sysctl::set(&self.spec.underlay, "accept_ra", "2")?;
        }
        sysctl::set("all", "forwarding", "1")?;
        if self.spec.ipv4 {
            sysctl::set_v4("all", "forwarding", "1")?;
        }
        let identity = Vxlan {
            id: self.spec.vxlan_id,
            port: self.spec.vxlan_port,
            local: self.spec.underlay_address,
            underlay: self.underlay,
        };
        let name = names::OVERLAY;
        let index = link::ensure_vxlan(&mut self.control(), name, identity)
            .map_err(netlink(format!("making the tunnel {name}")))?;
        let mac = names::overlay_mac(&self.spec.host);
        let settings = Settings { mac, mtu: self.guest_mtu, queue: None };
        self.bring_up(name, index, settings, names::overlay_address(&self.spec.host))?;
        for refused in self.refused() {
            route::refuse(&mut self.routes(), refused)
                .map_err(netlink(format!("making {} unreachable by default", refused.address)))?;
        }
        Ok(())
    }

    /// Tells where a peer is. A peer that moved is followed.
    ///
    /// # Errors
    /// If its name collides with another host's, its address is of another family, or the kernel refuses.
    pub fn set_peer(&self, host: &HostName, underlay: IpAddr) -> Result<(), FabricError> {
        let own = self.spec.underlay_address;
        if own.is_ipv4() != underlay.is_ipv4() {
            return Err(FabricError::Family { host: host.clone(), address: underlay, own });
        }
        let (address, mac) = (names::overlay_address(host), names::overlay_mac(host));
        let mut peers = lock(&self.peers);
        for other in peers.keys().chain([&self.spec.host]).filter(|&other| other != host) {
            if names::overlay_address(other) == address || names::overlay_mac(other) == mac {
                return Err(FabricError::PeerCollision(host.clone(), other.clone()));
            }
        }
        let index = self.index(names::OVERLAY)?;
        let mut socket = self.control();
        link::forwarding_entry(&mut socket, index, mac, underlay)
            .and_then(|()| link::neighbour(&mut socket, index, address, mac))
            .map_err(netlink(format!("tunnel to host {host} at {underlay}")))?;
        peers.insert(host.clone(), underlay);
        Ok(())
    }

    /// Makes a tap for a machine, configured, up, with the guest pinned as its only neighbour, and opens it.
    /// The descriptor is non-blocking; the tap lasts until the last copy of it is closed.
    ///
    /// # Errors
    /// If another process holds it, or the kernel refuses.
    pub fn create_tap(&self, name: &str) -> Result<OwnedFd, FabricError> {
        let fd = tap::open(name)?;
        lock(&self.indices).remove(name);
        self.configure_tap(name)?;
        Ok(fd)
    }

    /// Makes an existing tap as [`create_tap`](Self::create_tap) makes it: for adopting one that a machine holds.
    ///
    /// # Errors
    /// If there is none of that name, or the kernel refuses.
    pub fn configure_tap(&self, name: &str) -> Result<(), FabricError> {
        let index = self.index(name)?;
        let settings = Settings { mac: GATEWAY_MAC, mtu: self.guest_mtu, queue: Some(TAP_QUEUE_FRAMES) };
        self.bring_up(name, index, settings, Ipv6Addr::from(GATEWAY))?;
        link::neighbour(&mut self.control(), index, Ipv6Addr::from(GUEST_LINK_LOCAL), GUEST_MAC)
            .map_err(netlink(format!("tap {name}: pinning the guest's address")))
    }

    /// Removes a tap, if it is there, whoever holds it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete_tap(&self, name: &str) -> Result<(), FabricError> {
        self.delete_link(name)
    }

    /// What a tap has carried and dropped since it was made.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn tap_counters(&self, name: &str) -> Result<TapCounters, FabricError> {
        link::find(&mut self.control(), name)
            .map_err(netlink(format!("interface {name}")))?
            .map(|link| link.counters)
            .ok_or_else(|| FabricError::NoInterface(name.into()))
    }

    /// Makes the bridge of an access point, to which its devices are attached, and names it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn ensure_ap_bridge(&self, ap: &ApName) -> Result<String, FabricError> {
        let name = names::ap_bridge(ap);
        let index = link::ensure_bridge(&mut self.control(), &name)
            .map_err(netlink(format!("making the bridge {name} of access point {ap}")))?;
        let settings = Settings { mac: GATEWAY_MAC, mtu: self.guest_mtu, queue: None };
        self.bring_up(&name, index, settings, Ipv6Addr::from(GATEWAY))?;
        Ok(name)
    }

    /// Sends an image's packets to its tap here.
    ///
    /// # Errors
    /// If the tap is not there, or the kernel refuses.
    pub fn route_image_to_tap(&self, image: Vid, tap: &str) -> Result<(), FabricError> {
        self.route(image_prefix(image), tap, Some(Ipv6Addr::from(GUEST_LINK_LOCAL)))
    }

    /// Sends an image's packets through the tunnel to the host where it runs.
    ///
    /// # Errors
    /// If the host is not known, or the kernel refuses.
    pub fn route_image_to_host(&self, image: Vid, host: &HostName) -> Result<(), FabricError> {
        self.route(image_prefix(image), names::OVERLAY, Some(self.peer(host)?))
    }

    /// Removes an image's route, if there is one: its packets are answered with "unreachable".
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn unroute_image(&self, image: Vid) -> Result<(), FabricError> {
        self.unroute(image_prefix(image))
    }

    /// Sends packets to an image's IPv4 address to its tap here.
    ///
    /// # Errors
    /// If the tap is not there, or the kernel refuses.
    pub fn route_ipv4_to_tap(&self, address: Ipv4Addr, tap: &str) -> Result<(), FabricError> {
        self.route(one_address(address.into()), tap, Some(Ipv6Addr::from(GUEST_LINK_LOCAL)))
    }

    /// Sends packets to an image's IPv4 address through the tunnel to the host where it runs.
    ///
    /// # Errors
    /// If the host is not known, or the kernel refuses.
    pub fn route_ipv4_to_host(&self, address: Ipv4Addr, host: &HostName) -> Result<(), FabricError> {
        self.route(one_address(address.into()), names::OVERLAY, Some(self.peer(host)?))
    }

    /// Removes the route to an image's IPv4 address, if there is one.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn unroute_ipv4(&self, address: Ipv4Addr) -> Result<(), FabricError> {
        self.unroute(one_address(address.into()))
    }

    /// Sends a device's packets to the access-point bridge here at which it is.
    ///
    /// # Errors
    /// If the bridge is not there, or the kernel refuses.
    pub fn route_device_local(&self, device: IpAddr, bridge: &str) -> Result<(), FabricError> {
        self.route(one_address(device), bridge, None)
    }

    /// Sends a device's packets through the tunnel to the host where it is attached.
    ///
    /// # Errors
    /// If the host is not known, or the kernel refuses.
    pub fn route_device_to_host(&self, device: IpAddr, host: &HostName) -> Result<(), FabricError> {
        self.route(one_address(device), names::OVERLAY, Some(self.peer(host)?))
    }

    /// Removes a device's route, if there is one.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn unroute_device(&self, device: IpAddr) -> Result<(), FabricError> {
        self.unroute(one_address(device))
    }

    /// Every route of Kage's: for a restarted daemon to compare with what it knows.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn image_and_device_routes(&self) -> Result<Vec<Route>, FabricError> {
        let overlay = self.index(names::OVERLAY)?;
        let found = route::list(&mut self.control()).map_err(netlink("listing routes"))?;
        let peers = lock(&self.peers);
        let hop = |hop: NextHop| match hop.gateway {
            Some(gateway) if hop.index == overlay => peers
                .keys()
                .find(|host| names::overlay_address(host) == gateway)
                .map_or(Hop::Unknown(gateway), |host| Hop::Host(host.clone())),
            _ => Hop::Local { index: hop.index },
        };
        Ok(found
            .into_iter()
            .map(|(to, via)| Route { address: to.address, length: to.length, hop: hop(via) })
            .collect())
    }

    fn route(&self, to: Prefix, interface: &str, gateway: Option<Ipv6Addr>) -> Result<(), FabricError> {
        let result =
            route::replace(&mut self.routes(), to, NextHop { index: self.index(interface)?, gateway });
        let stale = |error: &NetlinkError| matches!(error.errno(), Some(Errno::NODEV | Errno::NETUNREACH));
        let result = match result {
            // The interface may have been made anew by somebody else, with another index.
            Err(error) if stale(&error) => {
                lock(&self.indices).remove(interface);
                let index = self.index(interface)?;
                route::replace(&mut self.routes(), to, NextHop { index, gateway })
            }
            result => result,
        };
        result.map_err(netlink(format!("route to {}/{} through {interface}", to.address, to.length)))
    }

    fn unroute(&self, to: Prefix) -> Result<(), FabricError> {
        route::remove(&mut self.routes(), to)
            .map_err(netlink(format!("removing the route to {}/{}", to.address, to.length)))
    }

    fn peer(&self, host: &HostName) -> Result<Ipv6Addr, FabricError> {
        if !lock(&self.peers).contains_key(host) {
            return Err(FabricError::UnknownPeer(host.clone()));
        }
        Ok(names::overlay_address(host))
    }

    /// Gives an interface its settings and its one address. The kernel must not invent a second address from the
    /// MAC, wait for duplicates of an address every gateway has, or listen to router advertisements of a guest.
    fn bring_up(
        &self,
        name: &str,
        index: u32,
        settings: Settings,
        address: Ipv6Addr,
    ) -> Result<(), FabricError> {
        for (key, value) in
            [("addr_gen_mode", "1"), ("accept_dad", "0"), ("accept_ra", "0"), ("accept_redirects", "0")]
        {
            sysctl::set(name, key, value)?;
        }
        if self.spec.ipv4 {
            // While a machine moves its packets come from where its route does not lead yet. The kernel then asks for
            // some route to them, and for an address of the interface.
            sysctl::set_v4(name, "rp_filter", "2")?;
        }
        let mut socket = self.control();
        link::configure(&mut socket, index, settings)
            .and_then(|()| link::up(&mut socket, index))
            .and_then(|()| link::ensure_link_local(&mut socket, index, address))
            .map_err(netlink(format!("bringing up {name}")))?;
        if self.spec.ipv4 {
            link::ensure_ipv4(&mut socket, index, Ipv4Addr::from(GATEWAY_V4))
                .map_err(netlink(format!("giving {name} its IPv4 address")))?;
        }
        lock(&self.indices).insert(name.into(), index);
        Ok(())
    }

    fn delete_link(&self, name: &str) -> Result<(), FabricError> {
        lock(&self.indices).remove(name);
        link::delete(&mut self.control(), name).map_err(netlink(format!("removing {name}")))
    }

    fn index(&self, name: &str) -> Result<u32, FabricError> {
        if let Some(&index) = lock(&self.indices).get(name) {
            return Ok(index);
        }
        let found = link::find(&mut self.control(), name).map_err(netlink(format!("interface {name}")))?;
        let index = found.ok_or_else(|| FabricError::NoInterface(name.into()))?.index;
        lock(&self.indices).insert(name.into(), index);
        Ok(index)
    }

    /// Networks whose addresses lead nowhere unless a route says otherwise.
    fn refused(&self) -> impl Iterator<Item = Prefix> {
        let first =
            Vid::new(self.spec.prefix, kage_machine::ImageNumber(0), kage_machine::identity::Kind::Image, 0);
        let site = Prefix { address: first.address().into(), length: 48 };
        let pool = self.spec.ipv4_pool.map(|(address, length)| Prefix { address: address.into(), length });
        std::iter::once(site).chain(pool)
    }

    fn routes(&self) -> MutexGuard<'_, Socket> {
        lock(&self.routes)
    }

    fn control(&self) -> MutexGuard<'_, Socket> {
        lock(&self.control)
    }
}

fn image_prefix(image: Vid) -> Prefix {
    Prefix { address: image.image_prefix().into(), length: Vid::IMAGE_PREFIX_LENGTH }
}

fn one_address(address: IpAddr) -> Prefix {
    Prefix { address, length: if address.is_ipv4() { 32 } else { 128 } }
}

/// No holder of these locks leaves its value half changed, so a panic elsewhere spoils nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn netlink(doing: impl Into<String>) -> impl FnOnce(NetlinkError) -> FabricError {
    move |source| FabricError::Netlink { doing: doing.into(), source }
}

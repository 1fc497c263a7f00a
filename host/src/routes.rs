//! Which routes this host has to have, from the directory's records. Pure, except [`apply`].

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use kage_directory::{ApRecord, DeviceRecord, HostRecord, ImageRecord, Wanted};
use kage_machine::{HostName, ImageNumber, SitePrefix, Term, UserName, Vid, identity::ApName};

use crate::machines::{Addresses, Net, Via};

/// The routes of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Tunnel ends of the other hosts.
    pub peers: BTreeMap<HostName, IpAddr>,
    /// Where the /88 of each image goes, by its VID.
    pub images: BTreeMap<Ipv6Addr, (Vid, Via)>,
    /// Where IPv4 addresses of images go, and whose each is. An address can go from one image to another.
    pub ipv4: BTreeMap<Ipv4Addr, (Vid, Via)>,
    /// Where each device's address goes.
    pub devices: BTreeMap<IpAddr, Via>,
    /// The owner's term of each image, by its VID, whether or not it has a route.
    pub terms: BTreeMap<Ipv6Addr, Term>,
}

/// What the directory says.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// All hosts.
    pub hosts: BTreeMap<HostName, HostRecord>,
    /// All images.
    pub images: BTreeMap<UserName, ImageRecord>,
    /// All devices with a route of their own.
    pub devices: BTreeMap<IpAddr, DeviceRecord>,
    /// All access points; no route depends on them.
    pub aps: BTreeMap<ApName, ApRecord>,
}

/// The table that `me` must have. An image owned here goes to its tap; whether there is a tap is the
/// lifecycle's business, and so is the route while a handover stands between `me` and another host. Without `ipv4`
/// nothing of IPv4 is routed here. What a device reports as its address never leads away from a host or an image.
#[must_use]
pub fn desired(records: &Records, me: &HostName, prefix: SitePrefix, ipv4: bool) -> Table {
    let mut table = Table::default();
    let mut taken = BTreeSet::new();
    for (name, host) in &records.hosts {
        taken.extend([host.underlay, host.advertise.ip()]);
        if name != me {
            table.peers.insert(name.clone(), host.underlay);
        }
    }
    for image in records.images.values() {
        let vid = Vid::of_image(prefix, image.number);
        taken.extend(image.ipv4.map(IpAddr::V4));
        table.terms.insert(vid.address(), image.term);
        let via = if image.owner == *me {
            (image.wanted == Wanted::Running).then_some(Via::Tap)
        } else {
            table.peers.contains_key(&image.owner).then(|| Via::Host(image.owner.clone()))
        };
        let Some(via) = via else { continue };
        if let Some(address) = image.ipv4.filter(|_| ipv4) {
            table.ipv4.insert(address, (vid, via.clone()));
        }
        table.images.insert(vid.address(), (vid, via));
    }
    for (address, device) in &records.devices {
        if taken.contains(address) || (address.is_ipv4() && !ipv4) {
            continue;
        }
        if device.host == *me {
            table.devices.insert(*address, Via::Ap(device.ap.clone()));
        } else if table.peers.contains_key(&device.host) {
            table.devices.insert(*address, Via::Host(device.host.clone()));
        }
    }
    table
}

/// Images whose routes are left alone for now, because this host's lifecycle is changing them: until the
/// directory shows at least that term, or, without one, until the lifecycle says so.
pub type Held = BTreeMap<Ipv6Addr, Option<Term>>;

fn is_held(held: &Held, wanted: &Table, address: Ipv6Addr) -> bool {
    match held.get(&address) {
        None => false,
        Some(None) => true,
        Some(Some(term)) => wanted.terms.get(&address).is_none_or(|seen| seen < term),
    }
}

/// Whether a route was set; says why not.
fn set(what: &str, result: Result<(), String>) -> bool {
    match result {
        Ok(()) => true,
        Err(reason) => {
            tracing::warn!(what, reason, "a route was not set");
            false
        }
    }
}

/// Brings the network from `now` to `wanted` and returns what it has then: what failed stays as it was,
/// so that the next call tries again. Routes of images in `held` are not touched.
pub fn apply(net: &dyn Net, now: &Table, wanted: &Table, held: &Held) -> Table {
    let mut have = now.clone();
    have.terms.clone_from(&wanted.terms);
    for (host, underlay) in &wanted.peers {
        if have.peers.get(host) != Some(underlay) && set("peer", net.peer(host, *underlay)) {
            have.peers.insert(host.clone(), *underlay);
        }
    }
    for (address, (vid, via)) in &wanted.images {
        let there = have.images.get(address) == Some(&(*vid, via.clone()));
        if !is_held(held, wanted, *address) && !there && set("image", net.route_image(*vid, via)) {
            have.images.insert(*address, (*vid, via.clone()));
        }
    }
    for (address, (vid, _)) in &now.images {
        if !wanted.images.contains_key(address)
            && !is_held(held, wanted, *address)
            && set("image", net.forget_image(*vid))
        {
            have.images.remove(address);
        }
    }
    for (address, (vid, via)) in &wanted.ipv4 {
        let there = have.ipv4.get(address) == Some(&(*vid, via.clone()));
        if !is_held(held, wanted, vid.address())
            && !there
            && set("image", net.route_ipv4(*address, *vid, via))
        {
            have.ipv4.insert(*address, (*vid, via.clone()));
        }
    }
    for (address, (vid, _)) in &now.ipv4 {
        if !wanted.ipv4.contains_key(address)
            && !is_held(held, wanted, vid.address())
            && set("image", net.forget_ipv4(*address))
        {
            have.ipv4.remove(address);
        }
    }
    for (address, via) in &wanted.devices {
        if have.devices.get(address) != Some(via) && set("device", net.route_device(*address, via)) {
            have.devices.insert(*address, via.clone());
        }
    }
    for address in now.devices.keys() {
        if !wanted.devices.contains_key(address) && set("device", net.forget_device(*address)) {
            have.devices.remove(address);
        }
    }
    have
}

/// The routes this host has, kept by whoever changes them.
pub struct Keeper {
    net: std::sync::Arc<dyn Net>,
    /// Whether IPv4 addresses are routed here at all.
    ipv4: bool,
    inner: std::sync::Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    table: Table,
    /// As the directory was last seen; nothing is forgotten before that.
    wanted: Option<Table>,
    held: Held,
    left: Left,
}

/// Routes that a daemon before set, and of which nothing is known but where they begin.
#[derive(Default)]
struct Left {
    images: BTreeMap<Ipv6Addr, Vid>,
    /// Of devices, and IPv4 ones of images.
    addresses: BTreeSet<IpAddr>,
}

impl Left {
    fn of(routes: Vec<(IpAddr, u8)>, prefix: SitePrefix) -> Self {
        let mut left = Self::default();
        for (address, length) in routes {
            match address {
                IpAddr::V6(address) if length == Vid::IMAGE_PREFIX_LENGTH => {
                    let number = (u128::from(address) >> (128 - u32::from(length))) as u64;
                    let vid = Vid::of_image(prefix, ImageNumber(number));
                    if vid.image_prefix() == address {
                        left.images.insert(vid.address(), vid);
                    }
                }
                IpAddr::V6(_) if length == 128 => {
                    left.addresses.insert(address);
                }
                IpAddr::V4(_) if length == 32 => {
                    left.addresses.insert(address);
                }
                _ => {}
            }
        }
        left
    }

    /// Forgets those that nothing wants. The others are set anew like any that is not known to be there.
    fn clear(&mut self, net: &dyn Net, wanted: &Table, held: &Held) {
        self.images.retain(|address, vid| {
            let wants = wanted.images.contains_key(address);
            !wants && (is_held(held, wanted, *address) || !set("image", net.forget_image(*vid)))
        });
        let of_image =
            |address: &IpAddr| matches!(address, IpAddr::V4(address) if wanted.ipv4.contains_key(address));
        self.addresses.retain(|address| {
            let wants = wanted.devices.contains_key(address) || of_image(address);
            // Whose an IPv4 address is cannot be told by it: it stays while any image is being changed.
            let stays = address.is_ipv4() && !held.is_empty();
            !wants && (stays || !set("device", net.forget_device(*address)))
        });
    }
}

impl Kept {
    fn apply(&mut self, net: &dyn Net) {
        let (held, Some(wanted)) = (&self.held, &self.wanted) else { return };
        self.left.clear(net, wanted, held);
        self.table = apply(net, &self.table, wanted, held);
        let over = |address: &Ipv6Addr| !is_held(held, wanted, *address);
        let settled: Vec<_> = self.held.keys().copied().filter(over).collect();
        for address in settled {
            self.held.remove(&address);
        }
    }
}

impl Keeper {
    /// Begins with the routes that a daemon before left: what the directory does not want is forgotten once it is
    /// followed.
    #[must_use]
    pub fn new(net: std::sync::Arc<dyn Net>, prefix: SitePrefix, ipv4: bool) -> Self {
        let left = net.routes().unwrap_or_else(|reason| {
            tracing::warn!(reason, "routes of an earlier daemon may stay");
            Vec::new()
        });
        let kept = Kept { left: Left::of(left, prefix), ..Kept::default() };
        Self { net, ipv4, inner: std::sync::Mutex::new(kept) }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Follows the directory.
    pub fn follow(&self, wanted: Table) {
        let mut kept = self.kept();
        kept.wanted = Some(wanted);
        kept.apply(&*self.net);
    }

    /// Leaves an image's route to the lifecycle until [`Keeper::let_go`].
    pub fn hold(&self, vid: Vid) {
        self.kept().held.insert(vid.address(), None);
    }

    /// The directory decides again, as soon as what was last seen of it is of `term` or later.
    pub fn let_go(&self, vid: Vid, term: Term) {
        let mut kept = self.kept();
        kept.held.insert(vid.address(), Some(term));
        kept.apply(&*self.net);
    }

    /// Sets an image's route now.
    ///
    /// # Errors
    /// In words.
    pub fn image(&self, image: Addresses, via: &Via) -> Result<(), String> {
        let Addresses { vid, ipv4 } = image;
        let mut kept = self.kept();
        self.net.route_image(vid, via)?;
        kept.left.images.remove(&vid.address());
        kept.table.images.insert(vid.address(), (vid, via.clone()));
        if let Some(ipv4) = ipv4.filter(|_| self.ipv4) {
            self.net.route_ipv4(ipv4, vid, via)?;
            kept.left.addresses.remove(&IpAddr::V4(ipv4));
            kept.table.ipv4.insert(ipv4, (vid, via.clone()));
        }
        Ok(())
    }

    /// Sets a device's route now.
    ///
    /// # Errors
    /// In words.
    pub fn device(&self, address: IpAddr, via: &Via) -> Result<(), String> {
        let mut kept = self.kept();
        self.net.route_device(address, via)?;
        kept.left.addresses.remove(&address);
        kept.table.devices.insert(address, via.clone());
        Ok(())
    }
}

#[cfg(test)]
mod tests;

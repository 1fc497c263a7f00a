//! Which routes this host has to have, from the directory's records. Pure, except [`apply`].

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use kage_directory::{DeviceRecord, HostRecord, ImageRecord, Wanted};
use kage_machine::{HostName, ImageNumber, SitePrefix, Term, UserName, Vid};

use crate::machines::{Addresses, Net, Via};

/// The routes of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Tunnel ends of the other hosts.
    pub peers: BTreeMap<HostName, IpAddr>,
    /// Where the /88 of each image, and its IPv4 address, go, by its VID.
    pub images: BTreeMap<Ipv6Addr, (Addresses, Via)>,
    /// Where each device's address goes.
    pub devices: BTreeMap<IpAddr, Via>,
    /// The owner's term of each image, by its VID, whether or not it has a route.
    pub terms: BTreeMap<Ipv6Addr, Term>,
}

/// What the directory says, as far as routes depend on it.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// All hosts.
    pub hosts: BTreeMap<HostName, HostRecord>,
    /// All images.
    pub images: BTreeMap<UserName, ImageRecord>,
    /// All devices with a route of their own.
    pub devices: BTreeMap<IpAddr, DeviceRecord>,
}

/// The table that `me` must have. An image owned here goes to its tap; whether there is a tap is the
/// lifecycle's business, and so is the route while a handover stands between `me` and another host.
#[must_use]
pub fn desired(records: &Records, me: &HostName, prefix: SitePrefix) -> Table {
    let mut table = Table::default();
    for (name, host) in &records.hosts {
        if name != me {
            table.peers.insert(name.clone(), host.underlay);
        }
    }
    for image in records.images.values() {
        let vid = Vid::of_image(prefix, image.number);
        let addresses = Addresses { vid, ipv4: image.ipv4 };
        table.terms.insert(vid.address(), image.term);
        if image.owner == *me {
            if image.wanted == Wanted::Running {
                table.images.insert(vid.address(), (addresses, Via::Tap));
            }
        } else if table.peers.contains_key(&image.owner) {
            table.images.insert(vid.address(), (addresses, Via::Host(image.owner.clone())));
        }
    }
    for (address, device) in &records.devices {
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
    for (address, (image, via)) in &wanted.images {
        let there = have.images.get(address);
        if is_held(held, wanted, *address) || there == Some(&(*image, via.clone())) {
            continue;
        }
        // An IPv4 address that it has no longer leads nowhere.
        if let Some((before, _)) = there
            && before.ipv4 != image.ipv4
            && before.ipv4.is_some()
        {
            set("image", net.forget_image(*before));
        }
        if set("image", net.route_image(*image, via)) {
            have.images.insert(*address, (*image, via.clone()));
        }
    }
    for (address, (image, _)) in &now.images {
        if !wanted.images.contains_key(address)
            && !is_held(held, wanted, *address)
            && set("image", net.forget_image(*image))
        {
            have.images.remove(address);
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
            let image = Addresses { vid: *vid, ipv4: None };
            !wants && (is_held(held, wanted, *address) || !set("image", net.forget_image(image)))
        });
        let of_image = |address: &IpAddr| {
            wanted.images.values().any(|(image, _)| image.ipv4.map(IpAddr::V4) == Some(*address))
        };
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
    pub fn new(net: std::sync::Arc<dyn Net>, prefix: SitePrefix) -> Self {
        let left = net.routes().unwrap_or_else(|reason| {
            tracing::warn!(reason, "routes of an earlier daemon may stay");
            Vec::new()
        });
        let kept = Kept { left: Left::of(left, prefix), ..Kept::default() };
        Self { net, inner: std::sync::Mutex::new(kept) }
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
        let mut kept = self.kept();
        self.net.route_image(image, via)?;
        kept.left.images.remove(&image.vid.address());
        if let Some(ipv4) = image.ipv4 {
            kept.left.addresses.remove(&IpAddr::V4(ipv4));
        }
        kept.table.images.insert(image.vid.address(), (image, via.clone()));
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

//! What the daemon asks of machines and of the network, as traits: the real ones are `kage-vmm` and
//! `kage-fabric` ([`crate::real`]), the tests' ones are simulated.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Range,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
};

use kage_directory::{ImageRecord, Profile};
use kage_machine::{
    Geometry, HostName, ImageNumber, Machine, SitePrefix, Term, UserName, Vid,
    disk::{Disk, DiskEvents},
    identity::ApName,
    page::GeometryError,
};
use kage_migrate::{Ticket, recover::Found, report::Drained};
use serde::{Deserialize, Serialize};

/// All that is needed to make a user's machine on any host.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineSpec {
    /// Whose it is.
    pub user: UserName,
    /// Its number.
    pub number: ImageNumber,
    /// Its identity and address.
    pub vid: Vid,
    /// Under which it is started here.
    pub term: Term,
    /// Indices of VIDs it may give out, for a start from nothing.
    pub indices: Range<u64>,
    /// Its IPv4 address, if it has one.
    pub ipv4: Option<Ipv4Addr>,
    /// Its page space.
    pub geometry: Geometry,
    /// What it starts from, its keys.
    pub profile: Profile,
    /// Largest IP packet of the fabric.
    pub mtu: u16,
    /// Where the log of its disk is kept on this host.
    pub disk: PathBuf,
    /// Where there is no log yet, another host has the disk: every block is missing, instead of zeros.
    pub disk_elsewhere: bool,
    /// Made on the spot even when one is ready.
    pub cold: bool,
}

impl MachineSpec {
    /// From the directory's record.
    ///
    /// # Errors
    /// When the record's sizes are outside what this host carries.
    pub fn of(
        user: &UserName,
        record: &ImageRecord,
        prefix: SitePrefix,
        mtu: u16,
        disks: &std::path::Path,
    ) -> Result<Self, GeometryError> {
        Ok(Self {
            user: user.clone(),
            number: record.number,
            vid: Vid::of_image(prefix, record.number),
            term: record.term,
            indices: record.indices.clone(),
            ipv4: record.ipv4,
            geometry: Geometry::from_bytes(record.profile.memory_bytes, record.profile.disk_bytes)?,
            profile: record.profile.clone(),
            mtu,
            disk: disks.join(format!("{}.log", record.number.0)),
            disk_elsewhere: record.disk_origin.is_some(),
            cold: false,
        })
    }

    /// Of a machine that is here already: from what its process keeps. What only a start needs is left empty.
    #[must_use]
    pub fn adopted(label: &Label, geometry: Geometry, prefix: SitePrefix, mtu: u16) -> Self {
        Self {
            user: label.user.clone(),
            number: label.number,
            vid: Vid::of_image(prefix, label.number),
            term: label.term,
            indices: 0..0,
            ipv4: label.ipv4,
            geometry,
            profile: Profile {
                image: label.image.clone(),
                memory_bytes: geometry.memory_bytes(),
                disk_bytes: geometry.disk_bytes(),
                host_key_seed: [0; 32],
                authorized_keys: Vec::new(),
            },
            mtu,
            disk: PathBuf::new(),
            disk_elsewhere: false,
            cold: false,
        }
    }

    /// What leads to it.
    #[must_use]
    pub const fn addresses(&self) -> Addresses {
        Addresses { vid: self.vid, ipv4: self.ipv4 }
    }

    /// What is kept with the machine's process for a daemon that adopts it.
    #[must_use]
    pub fn label(&self) -> Label {
        Label {
            user: self.user.clone(),
            number: self.number,
            term: self.term,
            ipv4: self.ipv4,
            image: self.profile.image.clone(),
            ticket: None,
        }
    }
}

/// A daemon's words about a machine, kept by the machine's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// Whose it is.
    pub user: UserName,
    /// Its number.
    pub number: ImageNumber,
    /// Under which it ran here.
    pub term: Term,
    /// Its IPv4 address, if it has one.
    pub ipv4: Option<Ipv4Addr>,
    /// The image it is made from.
    pub image: String,
    /// The handover it came by, until its right is settled.
    pub ticket: Option<Ticket>,
}

impl Label {
    /// Whether all of it is about this user's machine.
    #[must_use]
    pub fn is_of(&self, user: &UserName) -> bool {
        self.user == *user && self.ticket.as_ref().is_none_or(|ticket| ticket.user == *user)
    }
}

/// Called from any thread, once, with what was seen of the end of a machine's process.
pub type OnEnd = Box<dyn FnOnce(String) + Send>;

/// Reads a machine's table of resources, whoever holds the machine.
pub trait Inspect: Send + Sync {
    /// The table as it is now, not looked at yet; blocks.
    ///
    /// # Errors
    /// [`NoTable`].
    fn table(&self, patience: std::time::Duration) -> Result<Vec<u8>, NoTable>;
}

/// Why there is no table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoTable {
    /// The machine has ended here; it may be at another host.
    #[error("the machine has ended here")]
    Gone,
    /// It is held, or does not answer.
    #[error("the machine does not answer: {0}")]
    Silent(String),
}

/// A machine on this host.
pub trait Hosted: Machine {
    /// The way to its table of resources; `None` when there is none.
    fn inspector(&self) -> Option<Arc<dyn Inspect>>;
    /// Its disk; `None` when it has none.
    fn disk(&self) -> Option<Arc<dyn Disk>>;
    /// From now on tells of its disk; also of reads that wait already.
    fn watch_disk(&mut self, events: Arc<dyn DiskEvents>);
    /// Where it stands.
    fn found(&mut self) -> Found;
    /// Its process.
    fn pid(&self) -> Option<u32>;
    /// From now on tells of its process's end; also of one that has been.
    fn watch(&mut self, on_end: OnEnd);
    /// Why the guest failed, if it did; its process ends then, its memory can still be read.
    fn failure(&self) -> Option<String>;
    /// Counts the bytes and frames it moved and dropped so far.
    fn dropped_frames(&mut self) -> u64;
    /// Turns the heartbeat on or off and starts its figures anew.
    ///
    /// # Errors
    /// As any call to a machine.
    fn heartbeat(&mut self, on: bool) -> Result<(), kage_machine::MachineError>;
    /// Lets the guest give out VIDs up to `limit`.
    ///
    /// # Errors
    /// As any call to a machine.
    fn raise_indices(&mut self, limit: u64) -> Result<(), kage_machine::MachineError>;
    /// The guest's log, with a symbolised backtrace when it has failed.
    fn logs(&self) -> String;
    /// Takes the tap it uses, when it was adopted with one.
    fn take_tap(&mut self) -> Option<OwnedFd>;
    /// The machine as handover and replication see it.
    fn as_machine(&mut self) -> &mut dyn Machine;
    /// Renames its label: it now runs under another term.
    ///
    /// # Errors
    /// As any call to a machine.
    fn relabel(&mut self, label: &Label) -> Result<(), kage_machine::MachineError>;
}

/// The log of a disk, as a host keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskLog {
    /// Its file.
    pub path: PathBuf,
    /// The image's identity, which is the disk's too.
    pub vid: Vid,
    /// Blocks of the disk.
    pub blocks: u32,
}

/// What an earlier daemon left of a user's machine.
pub enum Adopted {
    /// Its process answers.
    Machine {
        /// What the daemon before said of it.
        label: Label,
        /// Where it stands.
        found: Found,
        /// The machine.
        machine: Box<dyn Hosted>,
    },
    /// Its process is there and cannot be used, for this reason: it may run, so nobody may start another.
    Unreachable(String),
}

/// Makes machines.
pub trait Machines: Send + Sync {
    /// Starts a machine from its template with identity, keys and a new generation; its output leaves.
    ///
    /// # Errors
    /// In words, with the cure.
    fn start(&self, spec: &MachineSpec, tap: OwnedFd) -> Result<Box<dyn Hosted>, String>;
    /// Makes a shell for a machine that comes from another host.
    ///
    /// # Errors
    /// In words, with the cure.
    fn shell(&self, spec: &MachineSpec, tap: OwnedFd) -> Result<Box<dyn Hosted>, String>;
    /// The machines that an earlier daemon left running.
    fn adopt(&self) -> Vec<(UserName, Adopted)>;
    /// What there is of one user's machine that could not be reached; `None` once its process is gone.
    fn adopt_one(&self, user: &UserName) -> Option<Adopted>;
    /// Whether it is able to make machines of an image, and if not, why; returns the page space that new ones get, of
    /// `least` or what the image needs, whichever is more.
    ///
    /// # Errors
    /// In words, with the cure.
    fn check(&self, image: &str, least: Geometry) -> Result<Geometry, String>;
    /// Opens a disk that no machine has, for this process alone; `None` where there is no log. Dropped, it is closed.
    ///
    /// # Errors
    /// In words: it is no log, another disk's, damaged, or somebody has it open.
    fn open_disk(&self, log: &DiskLog) -> Result<Option<Box<dyn Disk>>, String>;
    /// Machines that wait for a login, and shells that wait for an arrival.
    fn ready(&self) -> (usize, usize);
}

/// Where packets to an address go from this host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Via {
    /// To the image's tap here.
    Tap,
    /// To the access point's bridge here.
    Ap(ApName),
    /// Through the tunnel to a host.
    Host(HostName),
}

/// What leads to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Its VID, and with it its /88.
    pub vid: Vid,
    /// Its IPv4 address, if it has one.
    pub ipv4: Option<Ipv4Addr>,
}

/// Makes taps and routes. All calls are idempotent.
pub trait Net: Send + Sync {
    /// Largest IP packet of a guest.
    fn mtu(&self) -> u16;
    /// Opens the image's tap, made when missing.
    ///
    /// # Errors
    /// In words, with the cure.
    fn tap(&self, image: ImageNumber) -> Result<OwnedFd, String>;
    /// Removes the image's tap.
    ///
    /// # Errors
    /// In words.
    fn remove_tap(&self, image: ImageNumber) -> Result<(), String>;
    /// Makes a peer's tunnel end known.
    ///
    /// # Errors
    /// In words.
    fn peer(&self, host: &HostName, underlay: IpAddr) -> Result<(), String>;
    /// Sets where an image's /88 goes.
    ///
    /// # Errors
    /// In words.
    fn route_image(&self, vid: Vid, via: &Via) -> Result<(), String>;
    /// Forgets it.
    ///
    /// # Errors
    /// In words.
    fn forget_image(&self, vid: Vid) -> Result<(), String>;
    /// Sets where an image's IPv4 address goes.
    ///
    /// # Errors
    /// In words.
    fn route_ipv4(&self, address: Ipv4Addr, vid: Vid, via: &Via) -> Result<(), String>;
    /// Forgets it.
    ///
    /// # Errors
    /// In words.
    fn forget_ipv4(&self, address: Ipv4Addr) -> Result<(), String>;
    /// Sets where a device's address goes.
    ///
    /// # Errors
    /// In words.
    fn route_device(&self, address: IpAddr, via: &Via) -> Result<(), String>;
    /// Forgets it.
    ///
    /// # Errors
    /// In words.
    fn forget_device(&self, address: IpAddr) -> Result<(), String>;
    /// The routes there are: the first address and length of each image's /88, each device's /128 or
    /// /32, each image's /32.
    ///
    /// # Errors
    /// In words.
    fn routes(&self) -> Result<Vec<(IpAddr, u8)>, String>;
    /// Sends on, by the route as it is now, what a machine that no longer runs here has not read from its tap.
    fn drain(&self, tap: &OwnedFd) -> Drained;
    /// Frames to the machine that its tap has dropped since it was made.
    fn tap_drops(&self, image: ImageNumber) -> u64;
    /// Sends packets to a machine until it answers one.
    ///
    /// # Errors
    /// In words, when it has not answered in time.
    fn first_answer(&self, address: Ipv6Addr, patience: std::time::Duration) -> Result<(), String>;
    /// Makes an access point's bridge, where it is this host's.
    ///
    /// # Errors
    /// In words.
    fn access_point(&self, ap: &ApName, bridge: Option<&str>) -> Result<(), String>;
}

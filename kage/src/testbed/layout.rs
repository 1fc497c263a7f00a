//! What a testbed consists of: names, addresses and paths. Pure, apart from finding the directory.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    path::{Path, PathBuf},
    time::Duration,
};

use kage_host::units::{Rate, Size, Span};
use kage_machine::{HostName, UserName, identity::ApName};

use super::{TestbedError, state::State};

/// The site prefix of every testbed.
pub const PREFIX: &str = "fd4b:6167:6500::/48";
/// First half of the hosts' underlay addresses.
const UNDERLAY: [u16; 4] = [0xfd4b, 0x6167, 0x6501, 0];
/// First half of the devices' addresses.
const DEVICES: [u16; 4] = [0xfd4b, 0x6167, 0x65ff, 0];
/// Where images' IPv4 addresses come from.
pub const IPV4_POOL: &str = "10.77.0.0/24";
/// Where daemons meet.
pub const PEER_PORT: u16 = 7701;
/// Where daemons take accounting.
pub const RADIUS_PORT: u16 = 1813;
/// Users in the order of their devices; beyond these, `user10` has d10 and so on.
const USERS: [&str; 9] = ["alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan"];
/// Most hosts, and most devices.
const MOST: u16 = 200;
/// Longest directory: a unix socket's path has 107 characters, and daemons keep sockets some levels below.
const LONGEST_DIR: usize = 60;

/// What every host's link to the core is like.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LinkShape {
    /// Rate, each way; unlimited if `None`.
    pub rate: Option<Rate>,
    /// One way between any two hosts.
    pub delay: Duration,
    /// Frames lost of a million, between any two hosts.
    pub loss_ppm: u32,
}

/// What to make.
#[derive(Clone, Debug)]
pub struct TestbedSpec {
    /// Where it keeps its files.
    pub dir: PathBuf,
    /// Edge hosts, with one access point each.
    pub hosts: u16,
    /// User devices.
    pub devices: u16,
    /// Links between hosts.
    pub link: LinkShape,
    /// MTU of the links between hosts.
    pub mtu: u32,
    /// Memory of images; the daemon's default if `None`.
    pub image_memory: Option<Size>,
    /// Whether images and devices have IPv4 addresses.
    pub ipv4: bool,
    /// How long after a Stop machines are kept; the daemon's default if `None`.
    pub logout_grace: Option<Span>,
    /// Mirrors of each machine; the daemon's default if `None`. With 0 a machine leaves nothing where it goes away.
    pub followers: Option<u8>,
    /// The program that is the daemon (`kage`).
    pub binary: PathBuf,
    /// Whether to start daemons: without, it is a network only.
    pub daemons: bool,
}

impl TestbedSpec {
    /// Three hosts and two devices on unshaped links, in a directory.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, binary: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            hosts: 3,
            devices: 2,
            link: LinkShape::default(),
            mtu: 1500,
            image_memory: None,
            ipv4: false,
            logout_grace: None,
            followers: None,
            binary: binary.into(),
            daemons: true,
        }
    }
}

/// An edge host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostLayout {
    /// `h1`…
    pub name: HostName,
    /// From 1.
    pub number: u16,
    /// Its network namespace.
    pub netns: String,
    /// Its address among hosts.
    pub underlay: Ipv6Addr,
    /// Its access point.
    pub ap: ApName,
}

/// A user's device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceLayout {
    /// `d1`…
    pub name: String,
    /// From 1.
    pub number: u16,
    /// Its network namespace.
    pub netns: String,
    /// Its address, the same everywhere.
    pub address: Ipv6Addr,
    /// Its IPv4 address, in a testbed that has them.
    pub ipv4: Ipv4Addr,
    /// Whose it is.
    pub user: UserName,
    /// Its MAC address, the same everywhere.
    pub mac: [u8; 6],
}

/// All names, addresses and paths of one testbed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The directory, absolute.
    pub dir: PathBuf,
    /// What marks its namespaces and processes.
    pub id: String,
    /// The namespace between the hosts.
    pub core: String,
    /// Edge hosts.
    pub hosts: Vec<HostLayout>,
    /// Devices.
    pub devices: Vec<DeviceLayout>,
}

impl Layout {
    /// The layout of a new testbed.
    pub fn new(spec: &TestbedSpec) -> Result<Self, TestbedError> {
        for (what, number, least) in [("--hosts", spec.hosts, 1), ("--devices", spec.devices, 0)] {
            if !(least..=MOST).contains(&number) {
                return Err(TestbedError::Number { what, number, least, most: MOST });
            }
        }
        std::fs::create_dir_all(&spec.dir)
            .map_err(|error| TestbedError::Dir { dir: spec.dir.clone(), cause: error.to_string() })?;
        Self::of_size(canonical(&spec.dir)?, spec.hosts, spec.devices)
    }

    /// The layout of one that was made before.
    pub fn of_state(dir: PathBuf, state: &State) -> Result<Self, TestbedError> {
        Self::of_size(dir, state.host_count(), state.device_count())
    }

    fn of_size(dir: PathBuf, hosts: u16, devices: u16) -> Result<Self, TestbedError> {
        let refuse = |cause: String| TestbedError::Dir { dir: dir.clone(), cause };
        if dir.as_os_str().len() > LONGEST_DIR {
            return Err(refuse(format!(
                "longer than {LONGEST_DIR} characters, too long for the sockets in it; choose a shorter --dir"
            )));
        }
        if !dir.to_str().is_some_and(|text| text.chars().all(|c| !c.is_control() && c != '"' && c != '\\')) {
            return Err(refuse(
                "has characters that no configuration file can hold; choose another --dir".into(),
            ));
        }
        let id = id(&dir);
        let named = |error: kage_machine::identity::NameError| refuse(error.to_string());
        let hosts = (1..=hosts)
            .map(|number| {
                Ok(HostLayout {
                    name: format!("h{number}").parse().map_err(named)?,
                    number,
                    netns: format!("kage-{id}-h{number}"),
                    underlay: address(UNDERLAY, number),
                    ap: format!("ap-{number}").parse().map_err(named)?,
                })
            })
            .collect::<Result<_, TestbedError>>()?;
        let devices = (1..=devices)
            .map(|number| {
                let user = USERS
                    .get(usize::from(number) - 1)
                    .map_or_else(|| format!("user{number}"), ToString::to_string);
                let [high, low] = number.to_be_bytes();
                Ok(DeviceLayout {
                    name: format!("d{number}"),
                    number,
                    netns: format!("kage-{id}-d{number}"),
                    address: address(DEVICES, number),
                    ipv4: Ipv4Addr::new(10, 78, 0, number as u8),
                    user: user.parse().map_err(named)?,
                    mac: [0x02, 0x6b, 0x61, 0x64, high, low],
                })
            })
            .collect::<Result<_, TestbedError>>()?;
        Ok(Self { core: format!("kage-{id}-core"), id, dir, hosts, devices })
    }

    /// A host by name.
    pub fn host(&self, name: &str) -> Result<&HostLayout, TestbedError> {
        self.hosts.iter().find(|host| host.name.as_str() == name).ok_or_else(|| self.unknown(name))
    }

    /// A device by name.
    pub fn device(&self, name: &str) -> Result<&DeviceLayout, TestbedError> {
        self.devices.iter().find(|device| device.name == name).ok_or_else(|| self.unknown(name))
    }

    /// The host of an access point.
    pub fn host_of_ap(&self, ap: &str) -> Result<&HostLayout, TestbedError> {
        self.hosts.iter().find(|host| host.ap.as_str() == ap).ok_or_else(|| TestbedError::UnknownAp {
            name: ap.chars().take(80).collect(),
            known: listed(self.hosts.iter().map(|host| host.ap.as_str())),
        })
    }

    /// The namespace of a host or device.
    pub fn namespace_of(&self, name: &str) -> Result<String, TestbedError> {
        self.host(name)
            .map(|host| host.netns.clone())
            .or_else(|_| self.device(name).map(|device| device.netns.clone()))
    }

    /// The host and access point where a device is at first.
    pub fn first_ap(&self, device: &DeviceLayout) -> Result<&HostLayout, TestbedError> {
        let index = (usize::from(device.number) - 1) % self.hosts.len().max(1);
        self.hosts.get(index).ok_or(TestbedError::NoHosts)
    }

    /// The site's files.
    pub fn site(&self) -> PathBuf {
        self.dir.join("site")
    }

    /// A host's files.
    pub fn host_dir(&self, host: &HostName) -> PathBuf {
        self.dir.join(host.as_str())
    }

    /// A host's configuration.
    pub fn config(&self, host: &HostName) -> PathBuf {
        self.host_dir(host).join("host.toml")
    }

    /// What a host's daemon prints.
    pub fn log(&self, host: &HostName) -> PathBuf {
        self.host_dir(host).join("log")
    }

    /// A host's directory of sockets.
    pub fn run_dir(&self, host: &HostName) -> PathBuf {
        self.host_dir(host).join("run")
    }

    /// A host's API socket, as the daemon names it.
    pub fn socket(&self, host: &HostName) -> PathBuf {
        self.run_dir(host).join("host.sock")
    }

    fn unknown(&self, name: &str) -> TestbedError {
        let hosts = self.hosts.iter().map(|host| host.name.as_str());
        let devices = self.devices.iter().map(|device| device.name.as_str());
        TestbedError::UnknownName {
            name: name.chars().take(80).collect(),
            known: listed(hosts.chain(devices)),
        }
    }
}

impl HostLayout {
    /// Where its daemon meets others.
    pub fn advertise(&self) -> SocketAddr {
        SocketAddr::V6(SocketAddrV6::new(self.underlay, PEER_PORT, 0, 0))
    }

    /// Its port in the core namespace.
    pub fn port(&self) -> String {
        format!("p{}", self.number)
    }

    /// Where its access point stands: 50 m apart on a line.
    pub fn position_m(&self) -> [f64; 2] {
        [f64::from(self.number - 1) * 50.0, 0.0]
    }
}

/// A few names as text.
fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.collect();
    match names.as_slice() {
        [] => "none".into(),
        [first, .., last] if names.len() > 12 => format!("{first} … {last}"),
        _ => names.join(", "),
    }
}

fn address(prefix: [u16; 4], number: u16) -> Ipv6Addr {
    let [a, b, c, d] = prefix;
    // Written in decimal, so that host 10 is ::10.
    let decimal = format!("{number}");
    let last = u16::from_str_radix(&decimal, 16).unwrap_or(number);
    Ipv6Addr::new(a, b, c, d, 0, 0, 0, last)
}

/// The directory as one absolute path, so that every way to write it means the same testbed. It need not exist,
/// but its parent must.
pub fn canonical(dir: &Path) -> Result<PathBuf, TestbedError> {
    let error = |error: std::io::Error| TestbedError::Dir { dir: dir.into(), cause: error.to_string() };
    if let Ok(found) = dir.canonicalize() {
        return Ok(found);
    }
    let dir = std::path::absolute(dir).map_err(error)?;
    match (dir.parent(), dir.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize().map_err(error)?.join(name)),
        _ => Err(TestbedError::Dir { dir, cause: "is no directory for a testbed".into() }),
    }
}

/// What marks the namespaces and processes of the testbed in a directory: 32 bits of FNV-1a, folded.
pub fn id(dir: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let hash = dir.as_os_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{:08x}", (hash >> 32) as u32 ^ hash as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(hosts: u16, devices: u16) -> Layout {
        Layout::of_size("/run/kage-testbed".into(), hosts, devices).unwrap()
    }

    #[test]
    fn names_and_addresses_are_as_documented() {
        let layout = layout(3, 10);
        let h2 = layout.host("h2").unwrap();
        assert_eq!(h2.underlay.to_string(), "fd4b:6167:6501::2");
        assert_eq!(h2.advertise().to_string(), "[fd4b:6167:6501::2]:7701");
        assert_eq!(h2.netns, format!("kage-{}-h2", layout.id));
        assert_eq!(layout.host_of_ap("ap-2").unwrap(), h2);
        let d10 = layout.device("d10").unwrap();
        assert_eq!((d10.address.to_string().as_str(), d10.user.as_str()), ("fd4b:6167:65ff::10", "user10"));
        assert_eq!(layout.device("d1").unwrap().user.as_str(), "alice");
        assert_eq!(layout.first_ap(d10).unwrap().ap.as_str(), "ap-1");
        assert_eq!(h2.position_m(), [50.0, 0.0]);
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        let layout = layout(2, 1);
        assert!(layout.host("d1").is_err());
        let error = layout.namespace_of("h3").unwrap_err();
        assert_eq!(error.to_string(), "no host or device \"h3\" in this testbed; there are h1, h2, d1");
        assert_eq!(error.exit_code(), 3);
        assert_eq!(layout.host_of_ap("h1").unwrap_err().exit_code(), 3);
    }

    #[test]
    fn directories_that_cannot_work_are_refused() {
        for dir in [format!("/{}", "x".repeat(80)), "/tmp/a\"b".into(), "/tmp/a\nb".into()] {
            assert!(Layout::of_size(dir.into(), 1, 1).is_err());
        }
    }

    #[test]
    fn every_directory_has_its_own_identity() {
        assert_ne!(id(Path::new("/run/kage-testbed")), id(Path::new("/run/kage-testbee")));
        assert_eq!(id(Path::new("/run/kage-testbed")).len(), 8);
    }
}

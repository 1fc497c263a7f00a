//! A testbed's record (`state.json`), its lock, and what is shown of it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::{
    TestbedError, TestbedSpec,
    layout::{Layout, RADIUS_PORT},
    process::Process,
};

const VERSION: u32 = 1;
const FILE: &str = "state.json";
const LOCK: &str = "lock";

/// What is known of a testbed beyond its layout.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    version: u32,
    hosts: u16,
    /// The daemon's program.
    pub binary: PathBuf,
    /// Whether everything was made; if not, only `down` can help.
    pub complete: bool,
    /// Daemons by host.
    pub daemons: BTreeMap<String, Process>,
    /// Where devices are, by name.
    pub devices: BTreeMap<String, Attachment>,
    /// Accounting sessions so far.
    pub sessions: u32,
    device_count: u16,
    /// MTU of devices and access points.
    pub access_mtu: u32,
    /// Whether images and devices have IPv4 addresses.
    #[serde(default)]
    pub ipv4: bool,
}

/// Where a device is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attachment {
    /// The access point.
    pub ap: String,
    /// Number of the interface in the device: every move makes the next one.
    pub link: u32,
}

impl State {
    /// The record of a testbed that is being made.
    pub fn new(layout: &Layout, spec: &TestbedSpec) -> Self {
        Self {
            version: VERSION,
            hosts: layout.hosts.len() as u16,
            binary: spec.binary.clone(),
            complete: false,
            daemons: BTreeMap::new(),
            devices: BTreeMap::new(),
            sessions: 0,
            device_count: layout.devices.len() as u16,
            access_mtu: spec.mtu.saturating_sub(kage_fabric::TUNNEL_BYTES),
            ipv4: spec.ipv4,
        }
    }

    /// Reads the record, if there is one.
    pub fn read(dir: &Path) -> Result<Option<Self>, TestbedError> {
        let path = dir.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(TestbedError::File { path, source }),
        };
        let state: Self = serde_json::from_str(&text)
            .map_err(|error| TestbedError::State { path: path.clone(), cause: error.to_string() })?;
        if state.version != VERSION {
            let cause = format!("is of version {}, not {VERSION}", state.version);
            return Err(TestbedError::State { path, cause });
        }
        Ok(Some(state))
    }

    /// Writes the record, whole or not at all.
    pub fn write(&self, dir: &Path) -> Result<(), TestbedError> {
        let (path, new) = (dir.join(FILE), dir.join("state.json.new"));
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| TestbedError::State { path: path.clone(), cause: error.to_string() })?;
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|source| TestbedError::File { path, source })
    }

    /// Hosts it was made with.
    pub fn host_count(&self) -> u16 {
        self.hosts
    }

    /// Devices it was made with.
    pub fn device_count(&self) -> u16 {
        self.device_count
    }
}

/// Removes a testbed's files, and its directory if nothing else is in it.
pub fn remove_files(dir: &Path) -> Result<(), TestbedError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(TestbedError::File { path: dir.into(), source }),
    };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        let host = name.strip_prefix('h').is_some_and(|rest| rest.parse::<u16>().is_ok());
        let removed = if host || name == "site" {
            fs::remove_dir_all(&path)
        } else if name.starts_with(FILE) {
            fs::remove_file(&path)
        } else {
            continue;
        };
        removed.map_err(|source| TestbedError::File { path, source })?;
    }
    Ok(())
}

/// Held while a testbed is being changed; given back when dropped, or when the process ends.
#[derive(Debug)]
pub struct Lock {
    file: File,
    dir: PathBuf,
}

impl Lock {
    /// Waits for no one: who comes second is told so.
    pub fn now(dir: &Path) -> Result<Self, TestbedError> {
        Self::take(dir, FlockOperation::NonBlockingLockExclusive)
    }

    /// Waits until nobody else changes the testbed.
    pub fn wait(dir: &Path) -> Result<Self, TestbedError> {
        Self::take(dir, FlockOperation::LockExclusive)
    }

    fn take(dir: &Path, operation: FlockOperation) -> Result<Self, TestbedError> {
        let path = dir.join(LOCK);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| TestbedError::File { path: path.clone(), source })?;
        match rustix::io::retry_on_intr(|| rustix::fs::flock(&file, operation)) {
            Ok(()) => Ok(Self { file, dir: dir.into() }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(TestbedError::Locked(dir.into())),
            Err(errno) => Err(TestbedError::File { path, source: errno.into() }),
        }
    }

    /// Removes the lock and the directory, if that is empty then.
    pub fn remove(self) {
        // Others that opened the file meanwhile hold a lock on nothing; they will find no testbed.
        let _ = fs::remove_file(self.dir.join(LOCK));
        let _ = fs::remove_dir(&self.dir);
        drop(self.file);
    }
}

/// What `kage testbed status` shows.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Its directory.
    pub dir: PathBuf,
    /// Edge hosts.
    pub hosts: Vec<HostStatus>,
    /// Devices.
    pub devices: Vec<DeviceStatus>,
    /// How to send accounting.
    pub radius: RadiusStatus,
}

/// An edge host.
#[derive(Clone, Debug, Serialize)]
pub struct HostStatus {
    /// `h1`…
    pub name: String,
    /// Its network namespace.
    pub netns: String,
    /// Its daemon's API.
    pub socket: PathBuf,
    /// Its access points.
    pub aps: Vec<String>,
}

/// A device.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceStatus {
    /// `d1`…
    pub name: String,
    /// Its network namespace.
    pub netns: String,
    /// Its address.
    pub address: Ipv6Addr,
    /// Its IPv4 address, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Ipv4Addr>,
    /// The access point where it is.
    pub ap: String,
}

/// How to send accounting to any host's daemon.
#[derive(Clone, Debug, Serialize)]
pub struct RadiusStatus {
    /// UDP port in the host's namespace.
    pub port: u16,
    /// Shared secret.
    pub secret: String,
}

impl Status {
    /// Puts layout and record together.
    pub fn new(layout: &Layout, state: &State) -> Self {
        let hosts = layout.hosts.iter().map(|host| HostStatus {
            name: host.name.to_string(),
            netns: host.netns.clone(),
            socket: layout.socket(&host.name),
            aps: vec![host.ap.to_string()],
        });
        let devices = layout.devices.iter().map(|device| DeviceStatus {
            name: device.name.clone(),
            netns: device.netns.clone(),
            address: device.address,
            ipv4: state.ipv4.then_some(device.ipv4),
            ap: state.devices.get(&device.name).map(|at| at.ap.clone()).unwrap_or_default(),
        });
        Self {
            dir: layout.dir.clone(),
            hosts: hosts.collect(),
            devices: devices.collect(),
            radius: RadiusStatus {
                port: RADIUS_PORT,
                secret: super::site::secret(layout).unwrap_or_default(),
            },
        }
    }
}

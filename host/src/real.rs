//! The real machines and the real network: `kage-vmm` and `kage-fabric` behind [`crate::machines`]'s traits.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use kage_fabric::{Fabric, FabricSpec, drain_until_quiet, names};
use kage_images::{Base, ImageError, ImageFile, Symbols, Trust};
use kage_machine::{
    BaseHash, Geometry, HostInstant, HostName, ImageNumber, Machine, MachineError, Memory, Missing,
    OutputMark, PageSet, PauseCause, Paused, SavedState, Started, UserName, Vid,
    control::{Identity, Phase},
    disk::{Disk, DiskEvents},
    identity::ApName,
};
use kage_migrate::{recover::Found, report::Drained};
use kage_vmm::{
    inspect::{InspectError, Inspector},
    pool::{Pool, PoolSpec},
    remote::{RemoteMachine, Spawn},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{
    compile::Compiler,
    config::Config,
    disks::LogDisk,
    machines::{Adopted, DiskLog, Hosted, Inspect, Label, MachineSpec, Machines, Net, NoTable, OnEnd, Via},
};

/// Name of the image that is part of this program.
const BUILT_IN: &str = "default";

/// Clones of a template kept waiting.
const LOGINS: usize = 2;
/// Empty machines kept waiting.
const SHELLS: usize = 2;

/// First of the users and groups that VMM processes become: a range no distribution gives out.
const JAIL: u32 = 0x6b61_0000;

/// VXLAN network identifier of a site: "kag".
const VXLAN_ID: u32 = 0x6b_61_67;
/// UDP port of VXLAN (RFC 7348 §5).
const VXLAN_PORT: u16 = 4789;

/// Longest that a disk takes to open: its log's tail is read, and synced.
const DISK_OPENS: Duration = Duration::from_secs(30);

/// A tap on which no frame has come for so long after its route went elsewhere is drained …
const DRAIN_QUIET: Duration = Duration::from_millis(5);
/// … and any tap after so long.
const DRAIN_LONGEST: Duration = Duration::from_millis(100);

/// Port of a machine's UDP echo service.
const ECHO_PORT: u16 = 7;
/// Pause between two packets to a machine that has not answered yet.
const KNOCK: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000 };

/// Machines on KVM, out of pools.
pub struct VmmMachines {
    sockets: PathBuf,
    images: PathBuf,
    trust: Trust,
    compiler: Arc<Compiler>,
    spawn: Spawn,
    /// By image name and page space. Held for a look only: a template boots under its place's own lock.
    pools: Mutex<BTreeMap<(String, u32, u32), Arc<PoolPlace>>>,
    /// Those that machines are made of, as they were first read: a file exchanged meanwhile is another image, which
    /// must not come under the same name.
    files: Mutex<BTreeMap<String, ImageFile>>,
    /// What adopted machines of an image and page space have as their base, and their kernels' names.
    kernels: Mutex<BTreeMap<(String, u32, u32), (BaseHash, Arc<Symbols>)>>,
}

/// Where the pool of one image and page space is, once its template has booted.
#[derive(Default)]
struct PoolPlace {
    booting: Mutex<()>,
    entry: OnceLock<Arc<PoolEntry>>,
}

struct PoolEntry {
    pool: Pool,
    symbols: Arc<Symbols>,
}

impl VmmMachines {
    /// Machines of a host; `compiler` learns the engines of their images.
    ///
    /// # Errors
    /// When this program or a directory cannot be found.
    pub fn new(config: &Config, compiler: Arc<Compiler>) -> Result<Self, String> {
        let program =
            std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
        let sockets = config.host.run_dir.join("vmm");
        let images = images_dir(&config.host.state_dir);
        for dir in [&sockets, &images] {
            std::fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        }
        let spawn = Spawn { program, arguments: vec!["vmm".into(), "--fd".into()], jail: Some(JAIL) };
        let trust = config.image.trust();
        Ok(Self {
            sockets,
            images,
            trust,
            compiler,
            spawn,
            pools: Mutex::default(),
            files: Mutex::default(),
            kernels: Mutex::default(),
        })
    }

    /// Fills the pool of an image, so that the first login finds it warm.
    ///
    /// # Errors
    /// When the image does not boot.
    pub fn warm(&self, image: &str, geometry: Geometry) -> Result<(), String> {
        self.pool(image, geometry).map(|_| ())
    }

    fn pool(&self, image: &str, geometry: Geometry) -> Result<Arc<PoolEntry>, String> {
        let key = (image.to_owned(), geometry.memory_pages, geometry.disk_pages);
        let place = self.places().entry(key).or_default().clone();
        if let Some(entry) = place.entry.get() {
            return Ok(entry.clone());
        }
        let _booting = place.booting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = place.entry.get() {
            return Ok(entry.clone());
        }
        let file = self.file(image)?;
        let spec = PoolSpec {
            spawn: self.spawn.clone(),
            socket_dir: self.sockets.clone(),
            geometry,
            logins: LOGINS,
            shells: SHELLS,
        };
        let pool = Pool::start(spec, &file).map_err(|error| error.to_string())?;
        let entry = Arc::new(PoolEntry { pool, symbols: Arc::new(Symbols::of(file.kernel())) });
        self.files().entry(image.to_owned()).or_insert(file);
        Ok(place.entry.get_or_init(|| entry).clone())
    }

    fn places(&self) -> MutexGuard<'_, BTreeMap<(String, u32, u32), Arc<PoolPlace>>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<String, ImageFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An image as it is used here, or would be.
    fn file(&self, image: &str) -> Result<ImageFile, String> {
        if let Some(file) = self.files().get(image) {
            return Ok(file.clone());
        }
        self.load(image)
    }

    /// Names for the addresses of an adopted machine's kernel: none, when the image of that name is another one by now.
    fn symbols(&self, label: Option<&Label>, machine: &RemoteMachine) -> Arc<Symbols> {
        let named = label
            .ok_or_else(|| "it does not say its image".to_owned())
            .and_then(|label| self.kernel(&label.image, machine.memory().geometry()));
        match named {
            Ok((base, symbols)) if base == machine.base() => symbols,
            other => {
                let reason = other.err().unwrap_or_else(|| "its image has changed".to_owned());
                tracing::debug!(reason, "an adopted machine's log has no names");
                Arc::default()
            }
        }
    }

    /// The hash of an image's base, and its kernel's names. Reading the image also teaches the compile service what its
    /// machines may ask for.
    fn kernel(&self, image: &str, geometry: Geometry) -> Result<(BaseHash, Arc<Symbols>), String> {
        let key = (image.to_owned(), geometry.memory_pages, geometry.disk_pages);
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kernels.get(&key) {
            return Ok(known.clone());
        }
        let file = self.file(image)?;
        let base = Base::build(&file, geometry).map_err(|error| error.to_string())?.hash();
        let found = (base, Arc::new(Symbols::of(file.kernel())));
        kernels.insert(key, found.clone());
        Ok(found)
    }

    /// An image by its name: `default` is built in, others are files.
    fn load(&self, image: &str) -> Result<ImageFile, String> {
        if image == BUILT_IN {
            return Ok(ImageFile::embedded());
        }
        // A name is no path: it comes from users.
        if image.is_empty() || image.contains(['/', '\0']) || image.starts_with('.') {
            return Err(format!("{image:?} is no image's name"));
        }
        let path = self.images.join(format!("{image}.kage"));
        let file = ImageFile::read(&path, &self.trust).map_err(|error| match error {
            ImageError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => format!(
                "this host has no image {image:?}; copy its file to {} (`kage image ls` shows what is there)",
                path.display()
            ),
            error => format!("image {image}: {error}"),
        })?;
        self.compiler
            .add(file.engine(), file.compiler())
            .map_err(|error| format!("image {image}: {error}"))?;
        Ok(file)
    }

    fn socket(&self, user: &UserName) -> PathBuf {
        self.sockets.join(format!("user-{user}.sock"))
    }

    /// Gives a machine out of a pool its disk, tap and name. A machine that arrives needs its disk open: what it brings
    /// is written there. One that starts here does not wait for that.
    fn dress(
        &self,
        mut machine: RemoteMachine,
        symbols: Arc<Symbols>,
        spec: &MachineSpec,
        tap: &OwnedFd,
        arriving: bool,
    ) -> Result<VmmMachine, String> {
        let dressed = (|| {
            let disk = |error: MachineError| format!("{}: {error}", spec.disk.display());
            if spec.geometry.disk_pages > 0 {
                let log =
                    open_disk(&spec.disk).map_err(|error| format!("{}: {error}", spec.disk.display()))?;
                machine.attach_disk(log, disk_identity(spec.vid), spec.disk_elsewhere).map_err(disk)?;
            }
            machine.attach_tap(tap.as_fd()).map_err(|error| error.to_string())?;
            let path = self.socket(&spec.user);
            machine.move_socket(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            if arriving {
                machine.wait_disk(DISK_OPENS).and_then(|()| machine.hold_disk()).map_err(disk)
            } else {
                Ok(())
            }
        })();
        match dressed {
            Ok(()) => Ok(VmmMachine::new(machine, symbols)),
            Err(reason) => {
                machine.end();
                Err(reason)
            }
        }
    }
}

/// Whose a disk's log is: an image's, by its identity.
#[must_use]
pub fn disk_identity(vid: Vid) -> [u8; 16] {
    vid.address().octets()
}

/// Gives a machine the label with which it outlives its daemon. The last step: a machine that lost its daemon earlier ends,
/// and is never adopted half made.
fn labelled(mut machine: VmmMachine, spec: &MachineSpec) -> Result<Box<dyn Hosted>, String> {
    match machine.relabel(&spec.label()) {
        Ok(()) => Ok(Box::new(machine)),
        Err(error) => {
            machine.end();
            Err(error.to_string())
        }
    }
}

/// Whose machine listens at a socket; nobody's where a pool's machine waits: this daemon's, or one that ended with its
/// daemon.
fn user_of(socket: &Path) -> Option<UserName> {
    socket.file_name()?.to_str()?.strip_prefix("user-")?.strip_suffix(".sock")?.parse().ok()
}

/// Where a host keeps the files of its images.
#[must_use]
pub fn images_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("images")
}

/// Opens the log of an image's disk, or makes a blank file for it. What an earlier stay left there is what a machine
/// that comes back need not bring.
fn open_disk(path: &Path) -> io::Result<OwnedFd> {
    let file = std::fs::File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    Ok(file.into())
}

fn label_bytes(label: &Label) -> Vec<u8> {
    // Writing into a growing vector cannot fail for these types.
    postcard::to_stdvec(label).unwrap_or_default()
}

impl Machines for VmmMachines {
    fn start(&self, spec: &MachineSpec, tap: OwnedFd) -> Result<Box<dyn Hosted>, String> {
        let entry = self.pool(&spec.profile.image, spec.geometry)?;
        let made = if spec.cold { entry.pool.make_login() } else { entry.pool.take_login() };
        let mut machine =
            self.dress(made.map_err(|error| error.to_string())?, entry.symbols.clone(), spec, &tap, false)?;
        let identity = Identity {
            user: spec.user.to_string(),
            address: spec.vid.address().octets(),
            prefix_length: Vid::IMAGE_PREFIX_LENGTH,
            ipv4: spec.ipv4.map(|address| address.octets()),
            mtu: spec.mtu,
            host_key_seed: spec.profile.host_key_seed,
            authorized_keys: spec.profile.authorized_keys.iter().map(|key| format!("{key}\n")).collect(),
        };
        let mut seed = [0; 32];
        crate::init::random(&mut seed);
        if let Err(error) = machine.machine.give_generation(Some(identity), seed, spec.indices.clone()) {
            machine.machine.end();
            return Err(error.to_string());
        }
        labelled(machine, spec)
    }

    fn shell(&self, spec: &MachineSpec, tap: OwnedFd) -> Result<Box<dyn Hosted>, String> {
        let entry = self.pool(&spec.profile.image, spec.geometry)?;
        let machine = entry.pool.take_shell().map_err(|error| error.to_string())?;
        labelled(self.dress(machine, entry.symbols.clone(), spec, &tap, true)?, spec)
    }

    fn adopt(&self) -> Vec<(UserName, Adopted)> {
        let Ok(entries) = std::fs::read_dir(&self.sockets) else { return Vec::new() };
        let users = entries.filter_map(|entry| user_of(&entry.ok()?.path()));
        users.filter_map(|user| self.adopt_one(&user).map(|adopted| (user, adopted))).collect()
    }

    fn adopt_one(&self, user: &UserName) -> Option<Adopted> {
        let path = self.socket(user);
        let machine = match RemoteMachine::adopt(&path) {
            Ok(Some(machine)) => machine,
            Ok(None) => {
                tracing::debug!(path = %path.display(), "nobody to adopt");
                let _ = std::fs::remove_file(&path);
                return None;
            }
            Err(error) => {
                tracing::warn!(%user, %error, "a machine cannot be adopted");
                return Some(Adopted::Unreachable(error.to_string()));
            }
        };
        let label = postcard::from_bytes::<Label>(machine.label()).ok();
        let symbols = self.symbols(label.as_ref(), &machine);
        let mut machine = VmmMachine::new(machine, symbols);
        // Hostile code may have got hold of the process: what it says of itself must fit where it listens.
        match label.filter(|label| label.is_of(user)) {
            Some(label) => {
                let found = machine.found();
                Some(Adopted::Machine { label, found, machine: Box::new(machine) })
            }
            None => {
                tracing::error!(%user, pid = machine.pid(), "a process that says it is not this user's is ended");
                machine.end();
                None
            }
        }
    }

    fn check(&self, image: &str, least: Geometry) -> Result<Geometry, String> {
        // An image that is in use has been read.
        let file = self.file(image)?;
        let needs = file.manifest().geometry().map_err(|error| format!("image {image}: {error}"))?;
        let geometry = Geometry {
            memory_pages: least.memory_pages.max(needs.memory_pages),
            disk_pages: least.disk_pages.max(needs.disk_pages),
        };
        // One with a pool has run on this machine's KVM: opening that takes milliseconds.
        let key = (image.to_owned(), geometry.memory_pages, geometry.disk_pages);
        if self.places().get(&key).is_some_and(|place| place.entry.get().is_some()) {
            return Ok(geometry);
        }
        Base::build(&file, geometry).map_err(|error| format!("image {image}: {error}"))?;
        std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map(|_| geometry)
            .map_err(|error| format!("/dev/kvm: {error}; `kage doctor` says how to get it"))
    }

    fn open_disk(&self, log: &DiskLog) -> Result<Option<Box<dyn Disk>>, String> {
        let opened = LogDisk::open(log).map_err(|error| format!("{}: {error}", log.path.display()))?;
        Ok(opened.map(|disk| Box::new(disk) as Box<dyn Disk>))
    }

    fn ready(&self) -> (usize, usize) {
        let places = self.places();
        let entries = places.values().filter_map(|place| place.entry.get());
        entries.map(|entry| entry.pool.ready()).fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1))
    }
}

/// A machine in its VMM process.
struct VmmMachine {
    machine: RemoteMachine,
    symbols: Arc<Symbols>,
    inspector: Option<Arc<Inspector>>,
}

impl VmmMachine {
    fn new(mut machine: RemoteMachine, symbols: Arc<Symbols>) -> Self {
        let inspector = match machine.inspector() {
            Ok(inspector) => Some(Arc::new(inspector)),
            Err(error) => {
                tracing::warn!(%error, "a machine's resources cannot be read");
                None
            }
        };
        Self { machine, symbols, inspector }
    }
}

impl Inspect for Inspector {
    fn table(&self, patience: Duration) -> Result<Vec<u8>, NoTable> {
        Self::table(self, patience).map_err(|error| match error {
            InspectError::Gone => NoTable::Gone,
            error => NoTable::Silent(error.to_string()),
        })
    }
}

impl Hosted for VmmMachine {
    fn inspector(&self) -> Option<Arc<dyn Inspect>> {
        self.inspector.clone().map(|inspector| inspector as Arc<dyn Inspect>)
    }

    fn disk(&self) -> Option<Arc<dyn Disk>> {
        self.machine.disk()
    }

    fn watch_disk(&mut self, events: Arc<dyn DiskEvents>) {
        if let Err(error) = self.machine.watch_disk(events) {
            tracing::error!(%error, "what a machine's disk lacks will not be heard");
        }
    }

    fn found(&mut self) -> Found {
        if !self.machine.is_alive() {
            return Found::None;
        }
        if self.machine.is_released() {
            return Found::Released;
        }
        let phase = self.machine.status().map_or_else(|_| self.machine.phase(), |(phase, ..)| phase);
        match phase {
            Phase::Empty | Phase::Shell | Phase::Restored => Found::Shell,
            Phase::Running { gate_open: true } => Found::Running,
            Phase::Running { gate_open: false } => Found::Gated,
            Phase::Paused => Found::Paused,
            Phase::Released => Found::Released,
        }
    }

    fn pid(&self) -> Option<u32> {
        u32::try_from(self.machine.process_id().as_raw_nonzero().get()).ok()
    }

    fn watch(&mut self, on_end: OnEnd) {
        let ended = match self.machine.exit_descriptor() {
            Ok(ended) => ended,
            Err(error) => {
                tracing::error!(%error, "a machine's end will not be seen");
                return;
            }
        };
        let wait = move || {
            let mut polled = [PollFd::new(&ended, PollFlags::IN)];
            while matches!(poll(&mut polled, None), Err(Errno::INTR)) {}
            on_end("its VMM process ended".to_owned());
        };
        let thread = std::thread::Builder::new().name("kage-watch".to_owned()).stack_size(128 << 10);
        if let Err(error) = thread.spawn(wait) {
            tracing::error!(%error, "a machine's end will not be seen");
        }
    }

    fn failure(&self) -> Option<String> {
        self.machine.failure()
    }

    fn dropped_frames(&mut self) -> u64 {
        self.machine.status().map_or(0, |(_, net, _)| net.dropped_frames)
    }

    fn heartbeat(&mut self, on: bool) -> Result<(), MachineError> {
        self.machine.set_heartbeat(on)
    }

    fn raise_indices(&mut self, limit: u64) -> Result<(), MachineError> {
        self.machine.raise_indices(limit)
    }

    fn logs(&self) -> String {
        self.machine.logs(&self.symbols)
    }

    fn take_tap(&mut self) -> Option<OwnedFd> {
        self.machine.take_tap()
    }

    fn as_machine(&mut self) -> &mut dyn Machine {
        self
    }

    fn relabel(&mut self, label: &Label) -> Result<(), MachineError> {
        self.machine.set_label(label_bytes(label))
    }
}

impl Machine for VmmMachine {
    fn memory(&self) -> Arc<dyn Memory> {
        self.machine.memory()
    }
    fn base(&self) -> BaseHash {
        self.machine.base()
    }
    fn harvest(&mut self) -> Result<PageSet, MachineError> {
        self.machine.harvest()
    }
    fn pause(&mut self, cause: PauseCause) -> Result<Paused, MachineError> {
        self.machine.pause(cause)
    }
    fn resume(&mut self) -> Result<(), MachineError> {
        self.machine.resume()
    }
    fn restore(&mut self, state: &SavedState, paused_at: HostInstant) -> Result<(), MachineError> {
        self.machine.restore(state, paused_at)
    }
    fn run_gated(&mut self) -> Result<Started, MachineError> {
        self.machine.run_gated()
    }
    fn open_gate(&mut self) -> Result<(), MachineError> {
        self.machine.open_gate()
    }
    fn miss(&mut self, pages: &PageSet) -> Result<Arc<dyn Missing>, MachineError> {
        self.machine.miss(pages)
    }
    fn checkpoint(&mut self, copy: &mut dyn FnMut(&PageSet)) -> Result<Paused, MachineError> {
        self.machine.checkpoint(copy)
    }
    fn let_out(&mut self, output: OutputMark) -> Result<(), MachineError> {
        self.machine.let_out(output)
    }
    fn release(&mut self) -> Result<(), MachineError> {
        self.machine.release()
    }
    fn end(&mut self) {
        self.machine.end();
    }
}

/// The kernel's network.
pub struct FabricNet {
    fabric: Fabric,
}

impl FabricNet {
    /// Looks at the underlay and makes the tunnel.
    ///
    /// # Errors
    /// In words, with the cure.
    pub fn open(config: &Config) -> Result<Self, String> {
        let spec = FabricSpec {
            host: config.host.name.clone(),
            prefix: config.network.prefix,
            underlay: config.network.underlay.clone(),
            underlay_address: config.peer.advertise.ip(),
            vxlan_id: VXLAN_ID,
            vxlan_port: VXLAN_PORT,
            ipv4: config.uses_ipv4(),
            ipv4_pool: config.network.ipv4.map(|pool| (pool.address(), pool.length())),
        };
        let fabric = Fabric::open(spec).map_err(|error| error.to_string())?;
        fabric.setup().map_err(|error| error.to_string())?;
        Ok(Self { fabric })
    }

    fn said<T>(result: Result<T, kage_fabric::FabricError>) -> Result<T, String> {
        result.map_err(|error| error.to_string())
    }
}

impl Net for FabricNet {
    fn mtu(&self) -> u16 {
        u16::try_from(self.fabric.guest_mtu()).unwrap_or(u16::MAX)
    }

    fn tap(&self, image: ImageNumber) -> Result<OwnedFd, String> {
        Self::said(self.fabric.create_tap(&names::tap(image)))
    }

    fn remove_tap(&self, image: ImageNumber) -> Result<(), String> {
        Self::said(self.fabric.delete_tap(&names::tap(image)))
    }

    fn peer(&self, host: &HostName, underlay: IpAddr) -> Result<(), String> {
        Self::said(self.fabric.set_peer(host, underlay))
    }

    fn route_image(&self, vid: Vid, via: &Via) -> Result<(), String> {
        Self::said(match via {
            Via::Tap => self.fabric.route_image_to_tap(vid, &names::tap(vid.image())),
            Via::Host(host) => self.fabric.route_image_to_host(vid, host),
            Via::Ap(ap) => return Err(format!("an image is not reached by access point {ap}")),
        })
    }

    fn forget_image(&self, vid: Vid) -> Result<(), String> {
        Self::said(self.fabric.unroute_image(vid))
    }

    fn route_ipv4(&self, address: Ipv4Addr, vid: Vid, via: &Via) -> Result<(), String> {
        Self::said(match via {
            Via::Tap => self.fabric.route_ipv4_to_tap(address, &names::tap(vid.image())),
            Via::Host(host) => self.fabric.route_ipv4_to_host(address, host),
            Via::Ap(ap) => return Err(format!("an image is not reached by access point {ap}")),
        })
    }

    fn forget_ipv4(&self, address: Ipv4Addr) -> Result<(), String> {
        Self::said(self.fabric.unroute_ipv4(address))
    }

    fn route_device(&self, address: IpAddr, via: &Via) -> Result<(), String> {
        Self::said(match via {
            Via::Ap(ap) => {
                let bridge = self.fabric.ensure_ap_bridge(ap).map_err(|error| error.to_string())?;
                self.fabric.route_device_local(address, &bridge)
            }
            Via::Host(host) => self.fabric.route_device_to_host(address, host),
            Via::Tap => return Err("a device has no tap".to_owned()),
        })
    }

    fn forget_device(&self, address: IpAddr) -> Result<(), String> {
        Self::said(self.fabric.unroute_device(address))
    }

    fn access_point(&self, ap: &ApName, _bridge: Option<&str>) -> Result<(), String> {
        Self::said(self.fabric.ensure_ap_bridge(ap)).map(|_| ())
    }

    fn routes(&self) -> Result<Vec<(IpAddr, u8)>, String> {
        let found = Self::said(self.fabric.image_and_device_routes())?;
        Ok(found.into_iter().map(|route| (route.address, route.length)).collect())
    }

    fn drain(&self, tap: &OwnedFd) -> Drained {
        match drain_until_quiet(tap, DRAIN_QUIET, Instant::now() + DRAIN_LONGEST) {
            Ok(drained) => Drained {
                forwarded_frames: drained.forwarded,
                // Each may be overtaken by a frame that took the new route at once.
                reordered_frames: drained.forwarded,
                lost_frames: drained.lost,
            },
            Err(error) => {
                tracing::warn!(%error, "what a tap still held was not sent on");
                Drained::default()
            }
        }
    }

    fn tap_drops(&self, image: ImageNumber) -> u64 {
        self.fabric.tap_counters(&names::tap(image)).map_or(0, |counters| counters.to_machine_dropped)
    }

    fn first_answer(&self, address: Ipv6Addr, patience: Duration) -> Result<(), String> {
        let failed = |error: io::Error| format!("cannot send to {address}: {error}");
        let socket = UdpSocket::bind("[::]:0").map_err(failed)?;
        socket.connect(SocketAddr::from((address, ECHO_PORT))).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let deadline = Instant::now() + patience;
        let mut buffer = [0; 64];
        loop {
            // "Connection refused" and "unreachable" are answers of a moment; the machine may just be starting.
            let _ = socket.send(b"kage");
            let mut polled = [PollFd::new(&socket, PollFlags::IN)];
            // The time limit of a receive counts in ticks of the kernel; that of a poll does not.
            let _ = poll(&mut polled, Some(&KNOCK));
            match socket.recv(&mut buffer) {
                Ok(_) => return Ok(()),
                Err(_) if Instant::now() < deadline => {}
                Err(_) => {
                    return Err(format!(
                        "the machine at {address} has not answered for {patience:?}; see `kage logs`"
                    ));
                }
            }
        }
    }
}

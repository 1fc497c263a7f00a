//! Machines and a network for tests of the daemon.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kage_directory::Profile;
use kage_machine::{
    BaseHash, Geometry, Gone, HostInstant, HostName, ImageNumber, Machine, MachineError, Memory, PageBytes,
    PageIndex, PageSet, PauseCause, Paused, SavedState, Started, UserName, Vid, identity::ApName,
};
use kage_migrate::{recover::Found, report::Drained};

use crate::machines::{Adopted, Hosted, Inspect, Label, MachineSpec, Machines, Net, NoTable, OnEnd, Via};

/// A profile.
pub fn profile() -> Profile {
    Profile {
        image: "default".into(),
        memory_bytes: 16 << 20,
        disk_bytes: 0,
        host_key_seed: [7; 32],
        authorized_keys: Vec::new(),
    }
}

/// Records what it is asked; fails on demand.
#[derive(Default)]
pub struct FakeNet {
    calls: Mutex<Vec<String>>,
    failing: Mutex<BTreeSet<&'static str>>,
    left: Mutex<Vec<(IpAddr, u8)>>,
}

impl FakeNet {
    /// The next call of this kind fails.
    pub fn fail_next(&self, what: &'static str) {
        self.failing.lock().unwrap().insert(what);
    }

    /// As if a daemon before had set this route.
    pub fn leave(&self, address: Ipv6Addr, length: u8) {
        self.left.lock().unwrap().push((address.into(), length));
    }

    /// What was asked so far.
    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    fn call(&self, what: &'static str, text: String) -> Result<(), String> {
        if self.failing.lock().unwrap().remove(what) {
            return Err(format!("{what} fails as told"));
        }
        self.calls.lock().unwrap().push(format!("{what} {text}"));
        Ok(())
    }
}

impl Net for FakeNet {
    fn mtu(&self) -> u16 {
        1430
    }
    fn tap(&self, image: ImageNumber) -> Result<OwnedFd, String> {
        self.call("tap", image.0.to_string())?;
        Ok(std::fs::File::open("/dev/null").map_err(|error| error.to_string())?.into())
    }
    fn remove_tap(&self, image: ImageNumber) -> Result<(), String> {
        self.call("remove_tap", image.0.to_string())
    }
    fn peer(&self, host: &HostName, underlay: IpAddr) -> Result<(), String> {
        self.call("peer", format!("{host} {underlay}"))
    }
    fn route_image(&self, vid: Vid, via: &Via) -> Result<(), String> {
        self.call("image", format!("{vid} {via:?}"))
    }
    fn forget_image(&self, vid: Vid) -> Result<(), String> {
        self.call("forget_image", vid.to_string())
    }
    fn route_ipv4(&self, address: Ipv4Addr, vid: Vid, via: &Via) -> Result<(), String> {
        self.call("ipv4", format!("{address} {vid} {via:?}"))
    }
    fn forget_ipv4(&self, address: Ipv4Addr) -> Result<(), String> {
        self.call("forget_ipv4", address.to_string())
    }
    fn route_device(&self, address: IpAddr, via: &Via) -> Result<(), String> {
        self.call("device", format!("{address} {via:?}"))
    }
    fn forget_device(&self, address: IpAddr) -> Result<(), String> {
        self.call("forget_device", address.to_string())
    }
    fn access_point(&self, ap: &ApName, _bridge: Option<&str>) -> Result<(), String> {
        self.call("ap", ap.to_string())
    }
    fn routes(&self) -> Result<Vec<(IpAddr, u8)>, String> {
        Ok(self.left.lock().unwrap().clone())
    }
    fn drain(&self, _tap: &OwnedFd) -> Drained {
        Drained { forwarded_frames: 2, ..Drained::default() }
    }
    fn tap_drops(&self, _image: ImageNumber) -> u64 {
        0
    }
    fn first_answer(&self, address: Ipv6Addr, _patience: Duration) -> Result<(), String> {
        self.call("answer", address.to_string())
    }
}

/// What outlives a daemon: the machines' processes.
#[derive(Default)]
pub struct FakeMachines {
    living: Mutex<BTreeMap<UserName, Arc<Process>>>,
    /// How many machines were ever started from their template.
    pub started: Mutex<u32>,
    /// What machines made here run on.
    pub base: Mutex<BaseHash>,
    /// The table of resources of machines made from now on; empty: none.
    pub table: Mutex<Vec<u8>>,
    /// Whether a daemon that adopts them gets no answer.
    pub silent: AtomicBool,
}

/// A process that stands for a VMM's.
pub struct Process {
    state: Mutex<ProcessState>,
    memory: Arc<FakeMemory>,
    base: BaseHash,
    table: Mutex<Vec<u8>>,
    at_end: Mutex<Option<AtEnd>>,
}

/// What a machine does in its last moment.
type AtEnd = Box<dyn FnOnce(&dyn Memory) + Send>;

struct ProcessState {
    found: Found,
    label: Option<Label>,
    on_end: Option<OnEnd>,
    failure: Option<String>,
    gone: Option<String>,
}

impl Process {
    fn new(spec: &MachineSpec, found: Found, base: BaseHash) -> Arc<Self> {
        let state =
            ProcessState { found, label: Some(spec.label()), on_end: None, failure: None, gone: None };
        Arc::new(Self {
            state: Mutex::new(state),
            memory: Arc::new(FakeMemory { geometry: spec.geometry, pages: Mutex::default() }),
            base,
            table: Mutex::default(),
            at_end: Mutex::default(),
        })
    }

    /// What the machine does before it is ended.
    pub fn at_end(&self, act: impl FnOnce(&dyn Memory) + Send + 'static) {
        *self.at_end.lock().unwrap() = Some(Box::new(act));
    }

    /// What the machine holds.
    pub fn memory(&self) -> Arc<dyn Memory> {
        self.memory.clone()
    }

    /// As if killed.
    pub fn kill(&self, reason: &str) {
        let on_end = {
            let mut state = self.state.lock().unwrap();
            state.gone = Some(reason.to_owned());
            state.on_end.take()
        };
        if let Some(on_end) = on_end {
            on_end(reason.to_owned());
        }
    }

    /// As if its guest panicked.
    pub fn fail(&self, reason: &str) {
        self.state.lock().unwrap().failure = Some(reason.to_owned());
        self.kill("its VMM process ended");
    }
}

impl FakeMachines {
    /// The process of a user's machine.
    pub fn process(&self, user: &str) -> Option<Arc<Process>> {
        let living = self.living.lock().unwrap();
        living
            .get(&user.parse::<UserName>().unwrap())
            .filter(|process| process.state.lock().unwrap().gone.is_none())
            .cloned()
    }

    /// As if the daemon that watched them had died.
    pub fn unwatch(&self) {
        for process in self.living.lock().unwrap().values() {
            process.state.lock().unwrap().on_end = None;
        }
    }

    fn make(&self, spec: &MachineSpec, found: Found) -> Box<dyn Hosted> {
        let process = Process::new(spec, found, *self.base.lock().unwrap());
        process.table.lock().unwrap().clone_from(&self.table.lock().unwrap());
        self.living.lock().unwrap().insert(spec.user.clone(), process.clone());
        Box::new(FakeMachine { process })
    }
}

impl Machines for FakeMachines {
    fn start(&self, spec: &MachineSpec, _tap: OwnedFd) -> Result<Box<dyn Hosted>, String> {
        *self.started.lock().unwrap() += 1;
        Ok(self.make(spec, Found::Running))
    }
    fn shell(&self, spec: &MachineSpec, _tap: OwnedFd) -> Result<Box<dyn Hosted>, String> {
        Ok(self.make(spec, Found::Shell))
    }
    fn adopt(&self) -> Vec<(UserName, Adopted)> {
        let users: Vec<_> = self.living.lock().unwrap().keys().cloned().collect();
        users.into_iter().filter_map(|user| self.adopt_one(&user).map(|adopted| (user, adopted))).collect()
    }
    fn adopt_one(&self, user: &UserName) -> Option<Adopted> {
        let process = self.process(user.as_str())?;
        if self.silent.load(Ordering::SeqCst) {
            return Some(Adopted::Unreachable("its process does not answer".to_owned()));
        }
        let state = process.state.lock().unwrap();
        let machine = Box::new(FakeMachine { process: process.clone() });
        Some(Adopted::Machine { label: state.label.clone().unwrap(), found: state.found, machine })
    }
    fn ready(&self) -> (usize, usize) {
        (0, 0)
    }

    fn check(&self, image: &str, least: Geometry) -> Result<Geometry, String> {
        match image {
            "default" => Ok(least),
            "roomy" => Ok(Geometry { memory_pages: least.memory_pages * 2, disk_pages: 512 }),
            _ => Err(format!("there is no image {image:?}")),
        }
    }
}

struct FakeMachine {
    process: Arc<Process>,
}

impl FakeMachine {
    fn step(&self, to: Found) -> Result<(), MachineError> {
        let mut state = self.process.state.lock().unwrap();
        match &state.gone {
            Some(reason) => Err(Gone { reason: reason.clone() }.into()),
            None => {
                state.found = to;
                Ok(())
            }
        }
    }
}

/// A table that never changes.
struct FakeTable(Vec<u8>);

impl Inspect for FakeTable {
    fn table(&self, _patience: Duration) -> Result<Vec<u8>, NoTable> {
        Ok(self.0.clone())
    }
}

struct FakeMemory {
    geometry: Geometry,
    pages: Mutex<BTreeMap<u32, Box<PageBytes>>>,
}

impl Memory for FakeMemory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    fn read(&self, page: PageIndex, into: &mut PageBytes) {
        match self.pages.lock().unwrap().get(&page.0) {
            Some(bytes) => *into = **bytes,
            None => into.fill(0),
        }
    }
    fn write(&self, page: PageIndex, bytes: &PageBytes) {
        self.pages.lock().unwrap().insert(page.0, Box::new(*bytes));
    }
    fn zero(&self, page: PageIndex) {
        self.pages.lock().unwrap().remove(&page.0);
    }
    fn populated(&self) -> PageSet {
        let mut set = PageSet::empty(self.geometry.pages());
        for page in self.pages.lock().unwrap().keys() {
            set.insert(PageIndex(*page));
        }
        set
    }
}

impl Machine for FakeMachine {
    fn memory(&self) -> Arc<dyn Memory> {
        self.process.memory.clone()
    }
    fn base(&self) -> BaseHash {
        self.process.base
    }
    fn harvest(&mut self) -> Result<PageSet, MachineError> {
        Ok(PageSet::empty(self.process.memory.geometry.pages()))
    }
    fn pause(&mut self, _cause: PauseCause) -> Result<Paused, MachineError> {
        self.step(Found::Paused)?;
        let state = SavedState {
            version: kage_machine::state::STATE_VERSION,
            cpu_baseline: 3,
            vcpu: Default::default(),
            devices: Vec::new(),
            clock: Default::default(),
        };
        Ok(Paused {
            state,
            dirty: PageSet::empty(self.process.memory.geometry.pages()),
            at: HostInstant { ns: 1 },
        })
    }
    fn resume(&mut self) -> Result<(), MachineError> {
        self.step(Found::Running)
    }
    fn restore(&mut self, _state: &SavedState, _paused_at: HostInstant) -> Result<(), MachineError> {
        self.step(Found::Shell)
    }
    fn run_gated(&mut self) -> Result<Started, MachineError> {
        self.step(Found::Gated)?;
        Ok(Started { at: HostInstant { ns: 2 } })
    }
    fn open_gate(&mut self) -> Result<(), MachineError> {
        self.step(Found::Running)
    }
    fn release(&mut self) -> Result<(), MachineError> {
        self.step(Found::Released)
    }
    fn end(&mut self) {
        if let Some(act) = self.process.at_end.lock().unwrap().take() {
            act(&*self.process.memory);
        }
        self.process.state.lock().unwrap().gone = Some("ended".to_owned());
    }
}

impl Hosted for FakeMachine {
    fn found(&mut self) -> Found {
        self.process.state.lock().unwrap().found
    }
    fn pid(&self) -> Option<u32> {
        Some(1)
    }
    fn watch(&mut self, on_end: OnEnd) {
        self.process.state.lock().unwrap().on_end = Some(on_end);
    }
    fn failure(&self) -> Option<String> {
        self.process.state.lock().unwrap().failure.clone()
    }
    fn dropped_frames(&mut self) -> u64 {
        0
    }
    fn heartbeat(&mut self, _on: bool) -> Result<(), MachineError> {
        Ok(())
    }
    fn inspector(&self) -> Option<Arc<dyn Inspect>> {
        let table = self.process.table.lock().unwrap().clone();
        (!table.is_empty()).then(|| Arc::new(FakeTable(table)) as Arc<dyn Inspect>)
    }
    fn raise_indices(&mut self, _limit: u64) -> Result<(), MachineError> {
        Ok(())
    }
    fn logs(&self) -> String {
        "fake\n".to_owned()
    }
    fn take_tap(&mut self) -> Option<OwnedFd> {
        std::fs::File::open("/dev/null").ok().map(OwnedFd::from)
    }
    fn as_machine(&mut self) -> &mut dyn Machine {
        self
    }
    fn relabel(&mut self, label: &Label) -> Result<(), MachineError> {
        self.process.state.lock().unwrap().label = Some(label.clone());
        Ok(())
    }
}

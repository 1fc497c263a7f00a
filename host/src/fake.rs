//! Machines and a network for tests of the daemon.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use kage_directory::Profile;
use kage_machine::{
    BaseHash, Geometry, Gone, HostInstant, HostName, ImageNumber, Machine, MachineError, Memory, Missing,
    OutputMark, PageBytes, PageIndex, PageSet, PauseCause, Paused, SavedState, Started, UserName, Vid,
    disk::{Block, Disk, DiskEvents, Fill, Scrubbed, block_digest},
    identity::ApName,
};
use kage_migrate::{recover::Found, report::Drained};

use crate::machines::{
    Adopted, DiskLog, Hosted, Inspect, Label, MachineSpec, Machines, Net, NoTable, OnEnd, Via,
};

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
    /// What is in the logs of this host's disks, by the number in each log's file.
    logs: Mutex<BTreeMap<String, Arc<FakeLog>>>,
}

/// A process that stands for a VMM's.
pub struct Process {
    state: Mutex<ProcessState>,
    memory: Arc<FakeMemory>,
    base: BaseHash,
    table: Mutex<Vec<u8>>,
    at_end: Mutex<Option<AtEnd>>,
    disk: Option<Arc<FakeDisk>>,
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
    fn new(spec: &MachineSpec, found: Found, base: BaseHash, disk: Option<FakeDisk>) -> Arc<Self> {
        let state =
            ProcessState { found, label: Some(spec.label()), on_end: None, failure: None, gone: None };
        Arc::new(Self {
            state: Mutex::new(state),
            memory: Arc::new(FakeMemory { geometry: spec.geometry, pages: Mutex::default() }),
            base,
            table: Mutex::default(),
            at_end: Mutex::default(),
            disk: disk.map(Arc::new),
        })
    }

    fn alive(&self) -> Result<(), Gone> {
        match &self.state.lock().unwrap().gone {
            Some(reason) => Err(Gone { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// What the machine does before it is ended.
    pub fn at_end(&self, act: impl FnOnce(&dyn Memory) + Send + 'static) {
        *self.at_end.lock().unwrap() = Some(Box::new(act));
    }

    /// What the guest reads and writes.
    pub fn disk(&self) -> Arc<FakeDisk> {
        self.disk.clone().unwrap()
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
        self.close_disk(reason);
        if let Some(on_end) = on_end {
            on_end(reason.to_owned());
        }
    }

    fn close_disk(&self, reason: &str) {
        if let Some(disk) = &self.disk {
            disk.close(reason);
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

    /// Whether a user's machine runs here: a mirror's shell does not.
    pub fn runs(&self, user: &str) -> bool {
        self.process(user).is_some_and(|process| process.state.lock().unwrap().found != Found::Shell)
    }

    /// As if the daemon that watched them had died.
    pub fn unwatch(&self) {
        for process in self.living.lock().unwrap().values() {
            process.state.lock().unwrap().on_end = None;
            if let Some(disk) = &process.disk {
                disk.unwatch();
            }
        }
    }

    /// What the file at a path holds, made when there is none.
    fn log(&self, path: &std::path::Path, make: impl FnOnce() -> FakeLog) -> Arc<FakeLog> {
        let mut logs = self.logs.lock().unwrap();
        match std::fs::read_to_string(path).ok().and_then(|name| logs.get(&name).cloned()) {
            Some(log) => log,
            None => {
                let (name, log) = (format!("{}-{}", path.display(), logs.len()), Arc::new(make()));
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, &name).unwrap();
                logs.insert(name, log.clone());
                log
            }
        }
    }

    fn make(&self, spec: &MachineSpec, found: Found) -> Box<dyn Hosted> {
        let blocks = spec.geometry.disk_pages;
        let disk = (blocks > 0).then(|| {
            let log = self.log(&spec.disk, || FakeLog::new(blocks, spec.disk_elsewhere));
            FakeDisk::open(&log)
        });
        let process = Process::new(spec, found, *self.base.lock().unwrap(), disk);
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
    fn open_disk(&self, log: &DiskLog) -> Result<Option<Box<dyn Disk>>, String> {
        let Ok(name) = std::fs::read_to_string(&log.path) else { return Ok(None) };
        let Some(log) = self.logs.lock().unwrap().get(&name).cloned() else { return Ok(None) };
        if log.open.load(Ordering::SeqCst) {
            return Err("another process has it open".to_owned());
        }
        Ok(Some(Box::new(FakeDisk::open(&log))))
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
        self.process.alive()?;
        self.process.state.lock().unwrap().found = to;
        Ok(())
    }

    fn paused(&self) -> Paused {
        let state = SavedState {
            version: kage_machine::state::STATE_VERSION,
            cpu_baseline: 3,
            vcpu: Default::default(),
            devices: Vec::new(),
            clock: Default::default(),
        };
        Paused {
            state,
            dirty: PageSet::empty(self.process.memory.geometry.pages()),
            at: HostInstant { ns: 1 },
            output: OutputMark::default(),
        }
    }
}

/// Pages that a machine lacks whose guest never touches any.
struct FakeMissing {
    process: Arc<Process>,
    left: Mutex<PageSet>,
}

impl Missing for FakeMissing {
    fn wanted(&self, until: Instant) -> Result<Option<PageIndex>, Gone> {
        loop {
            self.process.alive()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            std::thread::sleep(left.min(Duration::from_millis(5)));
        }
    }
    fn bring(&self, page: PageIndex, bytes: &PageBytes) -> Result<bool, Gone> {
        self.process.alive()?;
        let missing = self.left.lock().unwrap().remove(page);
        if missing {
            self.process.memory.write(page, bytes);
        }
        Ok(missing)
    }
    fn left(&self) -> PageSet {
        self.left.lock().unwrap().clone()
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
        Ok(self.paused())
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
    fn miss(&mut self, pages: &PageSet) -> Result<Arc<dyn Missing>, MachineError> {
        self.process.alive()?;
        pages.iter().for_each(|page| self.process.memory.zero(page));
        Ok(Arc::new(FakeMissing { process: self.process.clone(), left: Mutex::new(pages.clone()) }))
    }
    fn checkpoint(&mut self, copy: &mut dyn FnMut(&PageSet)) -> Result<Paused, MachineError> {
        self.process.alive()?;
        let paused = self.paused();
        copy(&paused.dirty);
        Ok(paused)
    }
    fn let_out(&mut self, _output: OutputMark) -> Result<(), MachineError> {
        Ok(self.process.alive()?)
    }
    fn release(&mut self) -> Result<(), MachineError> {
        self.step(Found::Released)
    }
    fn end(&mut self) {
        if let Some(act) = self.process.at_end.lock().unwrap().take() {
            act(&*self.process.memory);
        }
        self.process.state.lock().unwrap().gone = Some("ended".to_owned());
        self.process.close_disk("ended");
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
    fn disk(&self) -> Option<Arc<dyn Disk>> {
        self.process.disk.clone().map(|disk| disk as Arc<dyn Disk>)
    }
    fn watch_disk(&mut self, events: Arc<dyn DiskEvents>) {
        if let Some(disk) = &self.process.disk {
            disk.watch(events);
        }
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

/// What is in the log of a disk.
pub struct FakeLog {
    blocks: Mutex<Vec<FakeBlock>>,
    open: AtomicBool,
}

#[derive(Clone, Default)]
enum FakeBlock {
    #[default]
    Zeros,
    Held(u64, Box<PageBytes>),
    Missing(Option<u64>),
}

impl FakeLog {
    fn new(blocks: u32, missing: bool) -> Self {
        let block = if missing { FakeBlock::Missing(None) } else { FakeBlock::Zeros };
        Self { blocks: Mutex::new(vec![block; blocks as usize]), open: AtomicBool::new(false) }
    }
}

/// A disk over a log that nobody else has open: a machine that gets one which somebody has panics.
pub struct FakeDisk {
    log: Arc<FakeLog>,
    state: Mutex<FakeDiskState>,
    answered: Condvar,
}

#[derive(Default)]
struct FakeDiskState {
    closed: Option<String>,
    events: Option<Arc<dyn DiskEvents>>,
    waiting: BTreeSet<u32>,
    unavailable: BTreeSet<u32>,
    deaf: Option<String>,
    synced: u32,
    flushed: u32,
    scrubbed: u32,
}

impl FakeDisk {
    /// Over a log of its own.
    pub fn zeros(blocks: u32) -> Self {
        Self::open(&Arc::new(FakeLog::new(blocks, false)))
    }

    fn open(log: &Arc<FakeLog>) -> Self {
        assert!(!log.open.swap(true, Ordering::SeqCst), "a log is opened twice");
        Self { log: log.clone(), state: Mutex::default(), answered: Condvar::new() }
    }

    fn close(&self, reason: &str) {
        let mut state = self.state.lock().unwrap();
        if state.closed.is_none() {
            state.closed = Some(reason.to_owned());
            self.log.open.store(false, Ordering::SeqCst);
            self.answered.notify_all();
        }
    }

    fn watch(&self, events: Arc<dyn DiskEvents>) {
        let waiting: Vec<u32> = {
            let mut state = self.state.lock().unwrap();
            state.events = Some(events.clone());
            state.waiting.iter().copied().collect()
        };
        if !waiting.is_empty() {
            events.needed(&waiting);
        }
    }

    fn unwatch(&self) {
        self.state.lock().unwrap().events = None;
    }

    /// The guest writes a block.
    pub fn put(&self, block: u32, bytes: &PageBytes) {
        let held = FakeBlock::Held(block_digest(bytes), Box::new(*bytes));
        self.log.blocks.lock().unwrap()[block as usize] = held;
    }

    /// A block goes missing.
    pub fn lose(&self, block: u32, digest: Option<u64>) {
        self.log.blocks.lock().unwrap()[block as usize] = FakeBlock::Missing(digest);
    }

    /// A block's bytes change on the medium.
    pub fn harm(&self, block: u32) {
        match &mut self.log.blocks.lock().unwrap()[block as usize] {
            FakeBlock::Held(_, bytes) => bytes[7] ^= 1,
            _ => panic!("nothing to harm"),
        }
    }

    /// The guest will not sync.
    pub fn deafen(&self, reason: &str) {
        self.state.lock().unwrap().deaf = Some(reason.to_owned());
    }

    /// How often the guest was told to sync.
    pub fn synced(&self) -> u32 {
        self.state.lock().unwrap().synced
    }

    /// The guest reads a block, and waits for it; `None`: an I/O error.
    pub fn get(&self, block: u32) -> Option<PageBytes> {
        let mut bytes = [0; kage_machine::PAGE_SIZE];
        let mut asked = false;
        loop {
            if !matches!(self.read(block, &mut bytes), Block::Missing(_)) {
                return Some(bytes);
            }
            let mut state = self.state.lock().unwrap();
            if state.closed.is_some() || (asked && state.unavailable.remove(&block)) {
                return None;
            }
            state.waiting.insert(block);
            if !std::mem::replace(&mut asked, true) {
                state.unavailable.remove(&block);
                let events = state.events.clone();
                drop(state);
                if let Some(events) = events {
                    events.needed(&[block]);
                }
                continue;
            }
            let (state, _) = self.answered.wait_timeout(state, Duration::from_millis(10)).unwrap();
            drop(state);
        }
    }
}

impl Drop for FakeDisk {
    fn drop(&mut self) {
        self.close("dropped");
    }
}

impl Disk for FakeDisk {
    fn blocks(&self) -> u32 {
        self.log.blocks.lock().unwrap().len() as u32
    }
    fn block(&self, block: u32) -> Block {
        match self.log.blocks.lock().unwrap().get(block as usize) {
            None | Some(FakeBlock::Zeros) => Block::Zeros,
            Some(FakeBlock::Held(digest, _)) => Block::Held(*digest),
            Some(FakeBlock::Missing(digest)) => Block::Missing(*digest),
        }
    }
    fn read(&self, block: u32, into: &mut PageBytes) -> Block {
        match self.log.blocks.lock().unwrap().get(block as usize) {
            None | Some(FakeBlock::Zeros) => {
                into.fill(0);
                Block::Zeros
            }
            Some(FakeBlock::Held(digest, bytes)) if block_digest(bytes) == *digest => {
                *into = **bytes;
                Block::Held(*digest)
            }
            Some(FakeBlock::Held(digest, _)) => Block::Missing(Some(*digest)),
            Some(FakeBlock::Missing(digest)) => Block::Missing(*digest),
        }
    }
    fn fill(&self, fills: &[(u32, Fill)]) -> Result<(), MachineError> {
        let mut state = self.state.lock().unwrap();
        if let Some(reason) = &state.closed {
            return Err(Gone { reason: reason.clone() }.into());
        }
        let mut blocks = self.log.blocks.lock().unwrap();
        for (number, fill) in fills {
            let block = &mut blocks[*number as usize];
            match (&*block, fill) {
                (FakeBlock::Missing(expected), Fill::Bytes(bytes))
                    if expected.is_none_or(|expected| expected == block_digest(bytes)) =>
                {
                    *block = FakeBlock::Held(block_digest(bytes), bytes.clone());
                }
                (FakeBlock::Held(digest, _), Fill::Bytes(bytes)) if *digest == block_digest(bytes) => {
                    *block = FakeBlock::Held(*digest, bytes.clone());
                }
                (FakeBlock::Missing(_), Fill::Zeros) => *block = FakeBlock::Zeros,
                (FakeBlock::Missing(None), Fill::Expect(digest)) => {
                    *block = FakeBlock::Missing(Some(*digest))
                }
                (_, Fill::Unavailable) if state.waiting.remove(number) => {
                    state.unavailable.insert(*number);
                }
                _ => {}
            }
        }
        self.answered.notify_all();
        Ok(())
    }
    fn flush(&self) -> Result<(), MachineError> {
        self.state.lock().unwrap().flushed += 1;
        Ok(())
    }
    fn scrub(&self, _budget_bytes: u64) -> Result<Scrubbed, MachineError> {
        // A step looks at 100 blocks.
        let mut state = self.state.lock().unwrap();
        let first = state.scrubbed;
        let mut found = Scrubbed::default();
        for block in first..self.blocks().min(first + 100) {
            let mut bytes = [0; kage_machine::PAGE_SIZE];
            if let Block::Held(_) = self.block(block) {
                found.checked_bytes += kage_machine::PAGE_SIZE as u64;
                if matches!(self.read(block, &mut bytes), Block::Missing(_)) {
                    found.corrupt.push(block);
                }
            }
        }
        state.scrubbed = first + 100;
        found.done = state.scrubbed >= self.blocks();
        if found.done {
            state.scrubbed = 0;
        }
        Ok(found)
    }
    fn sync_guest(&self, _patience: Duration) -> Result<(), MachineError> {
        let mut state = self.state.lock().unwrap();
        state.synced += 1;
        match &state.deaf {
            Some(reason) => Err(MachineError::Refused { reason: reason.clone() }),
            None => Ok(()),
        }
    }
}

//! The real deciders over a simulated clock, network, directory and machines, by seed.
//!
//! An image walks over three hosts while daemons, machines and the directory die and links are cut. After
//! every event: never two copies emitting. At every switch: the target's memory is the source's, and its disk block
//! by block by digest, whatever an earlier stay left there. Always: a block that the owner misses is held by some
//! host. When the faults have ended: one copy emits at its owner, nothing was doubled or lost, guest time is true,
//! and the image was started anew only if a machine's process died.
//!
//! A failure prints its seed; `KAGE_SEED=n` plays that one alone, with its events.

mod deciders;
mod directory;
mod disks;
mod faults;
mod network;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use kage_directory::{ImageRecord, Profile, Wanted};
use kage_machine::{
    Epoch, Geometry, HandoverId, HostInstant, HostName, ImageNumber, Machine, PAGE_SIZE, PageBytes, PageSet,
    PauseCause, Paused, SavedState, Term, UserName,
    control::Phase,
    disk::{Block, block_digest},
    sim::{Outside, SimDisk, SimSpec, SimVmm, digests},
};
use kage_migrate::{
    Cause, Ticket,
    converge::{Goal, Round, Stubborn},
    ownership::{Change, Standing},
    recover::{Found, Recovery, Scene, ran_here, recover},
    source::{self, Patience, Source, SourceEvent, ToTarget},
    target::{self, Target, TargetEvent, TargetOutcome, TargetState, ToSource},
};
use kage_replicate::{Receiver, Sender};
use kage_wire::Have;

const HOSTS: usize = 3;
const MS: u64 = 1_000_000;
const GEOMETRY: Geometry = Geometry { memory_pages: 32, disk_pages: 16 };

/// Waits, as the drivers have them.
const SWITCH: u64 = 2_000 * MS;
const POLL: u64 = 200 * MS;
const DEADLINE: u64 = 10_000 * MS;
const ANSWER: u64 = 500 * MS;

struct Random(u64);

impl Random {
    /// splitmix64
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    SourceDaemon,
    TargetDaemon,
    SourceVm,
    TargetVm,
    BothDaemons,
    SourceVmAndDaemon,
    Link,
    Partition,
    Directory,
}

const FAULTS: [Fault; 9] = [
    Fault::SourceDaemon,
    Fault::TargetDaemon,
    Fault::SourceVm,
    Fault::TargetVm,
    Fault::BothDaemons,
    Fault::SourceVmAndDaemon,
    Fault::Link,
    Fault::Partition,
    Fault::Directory,
];

/// Most bytes of a round; more than there are.
const CAP: usize = 1 << 20;

#[derive(Clone)]
enum Message {
    Prepare(Ticket),
    Round(Vec<u8>),
    Ack,
    Switch(Box<Offer>),
    Say(ToTarget),
    Answer(ToSource, Have),
}

#[derive(Clone)]
struct Offer {
    pages: Vec<u8>,
    state: SavedState,
    /// On the simulation's own clock.
    paused_at: u64,
    contents: Vec<PageBytes>,
    blocks: Vec<Block>,
}

struct Connection {
    ends: [usize; 2],
    up: bool,
    /// What arrives later than this is lost.
    cut_at: u64,
    /// Delivery is in order, per receiving end.
    last: [u64; 2],
}

enum Ask {
    Swap(Change),
    Read,
}

enum Tell {
    Swapped,
    Record,
    Away,
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum Waiting {
    Nothing,
    Ack,
    Reply(u64),
}

struct Running<D, A, E> {
    ticket: Ticket,
    decider: D,
    work: VecDeque<A>,
    inbox: VecDeque<E>,
    waiting: Waiting,
    connection: Option<usize>,
    token: u64,
    /// The record as this run's driver read it last; what was read to begin the run does not count.
    seen: Option<(u64, ImageRecord)>,
    begun: u64,
    dirty: Option<PageSet>,
    sender: Option<Sender>,
    receiver: Option<Receiver>,
    epoch: Epoch,
    paused: Option<(Paused, u64)>,
    offer: Option<Box<Offer>>,
    answers: VecDeque<(usize, u64)>,
}

impl<D, A, E> Running<D, A, E> {
    fn new(ticket: Ticket, decider: D, actions: Vec<A>, begun: u64) -> Self {
        Self {
            ticket,
            decider,
            work: actions.into(),
            inbox: VecDeque::new(),
            waiting: Waiting::Nothing,
            connection: None,
            token: 0,
            seen: None,
            begun,
            dirty: None,
            sender: None,
            receiver: None,
            epoch: Epoch(0),
            paused: None,
            offer: None,
            answers: VecDeque::new(),
        }
    }
}

type AsSource = Running<Source, source::Action, SourceEvent>;
type AsTarget = Running<Target, target::Action, TargetEvent>;

#[derive(Default)]
struct Daemon {
    incarnation: u64,
    source: Option<AsSource>,
    target: Option<AsTarget>,
    refused: Option<Term>,
}

struct Host {
    name: HostName,
    daemon: Option<Daemon>,
    vmm: Option<SimVmm>,
    /// What machines that were here left, and what the one that is here uses.
    disk: SimDisk,
    /// Kept by the machine's process.
    label: Option<Ticket>,
    /// Kept with the disk: of the last machine from another host whose gate was opened here.
    ran: Option<Ticket>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    Source,
    Target,
}

enum Event {
    Step { host: usize, incarnation: u64, role: Role },
    Deliver { connection: usize, to: usize, message: Message },
    Lost { connection: usize, host: usize },
    Wake { host: usize, incarnation: u64, role: Role, token: u64 },
    Directory { id: u64, host: usize, role: Role, ask: Ask, seen: Option<u64>, next: Option<ImageRecord> },
    Told { id: u64, host: usize, role: Role, tell: Tell, now: Option<(u64, ImageRecord)> },
    Asked { id: u64, from: usize, to: usize, ticket: Ticket, released: bool },
    Answered { id: u64, host: usize, held: Option<bool> },
    Supervise { host: usize, incarnation: u64 },
    Strike(Fault),
    Restart(usize),
    DirectoryUp,
    Heal,
    Move,
}

struct Sim {
    now: u64,
    clock: Arc<AtomicU64>,
    random: Random,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: HashMap<u64, Event>,
    serial: u64,
    hosts: Vec<Host>,
    record: ImageRecord,
    revision: u64,
    directory_up: bool,
    partitioned: bool,
    connections: Vec<Connection>,
    outside: Outside,
    generation: u64,
    vmms: u64,
    vm_died: bool,
    moves_left: u32,
    handover: u128,
    steps: u64,
    /// At which step of the handovers something strikes.
    strike_at: Option<(u64, Fault)>,
    /// Source and target of the handover under way.
    current: [usize; 2],
    faults_over: bool,
    outcomes: BTreeMap<String, u32>,
    trace: bool,
    born_ns: u64,
}

fn user() -> UserName {
    "alice".parse().unwrap()
}

impl Sim {
    fn new(seed: u64, moves: u32, trace: bool) -> Self {
        let clock = Arc::new(AtomicU64::new(1_000 * MS));
        let hosts: Vec<_> = ["a", "b", "c"]
            .iter()
            .map(|name| Host {
                name: name.parse().unwrap(),
                daemon: Some(Daemon::default()),
                vmm: None,
                disk: SimDisk::new(GEOMETRY.disk_pages),
                label: None,
                ran: None,
            })
            .collect();
        let record = ImageRecord {
            term: Term(1),
            owner: hosts[0].name.clone(),
            intent: None,
            backup: None,
            wanted: Wanted::Running,
            number: ImageNumber(1),
            indices: ImageRecord::FIRST_INDICES,
            ipv4: None,
            disk_origin: None,
            profile: Profile {
                image: String::new(),
                memory_bytes: 0,
                disk_bytes: 0,
                host_key_seed: [0; 32],
                authorized_keys: vec![],
            },
        };
        let mut sim = Self {
            now: 1_000 * MS,
            clock,
            random: Random(seed),
            queue: BinaryHeap::new(),
            events: HashMap::new(),
            serial: 0,
            hosts,
            record,
            revision: 1,
            directory_up: true,
            partitioned: false,
            connections: Vec::new(),
            outside: Outside::default(),
            generation: 0,
            vmms: 0,
            vm_died: false,
            moves_left: moves,
            handover: 0,
            steps: 0,
            strike_at: None,
            current: [0, 1],
            faults_over: false,
            outcomes: BTreeMap::new(),
            trace,
            born_ns: 0,
        };
        sim.fill_disks();
        sim.start(0);
        for host in 0..HOSTS {
            sim.at(100 * MS, Event::Supervise { host, incarnation: 0 });
        }
        sim.at(MS, Event::Move);
        sim
    }

    fn note(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>12.3} {}", self.now as f64 / MS as f64, text());
        }
    }

    fn at(&mut self, delay: u64, event: Event) {
        self.serial += 1;
        self.queue.push(Reverse((self.now + delay, self.serial)));
        self.events.insert(self.serial, event);
    }

    /// Every host's clock has its own origin.
    fn host_clock(&self, host: usize) -> kage_machine::sim::Clock {
        let clock = self.clock.clone();
        let offset = offset(host);
        Arc::new(move || HostInstant { ns: clock.load(Ordering::Relaxed) + offset })
    }

    fn spec(&mut self) -> SimSpec {
        self.vmms += 1;
        SimSpec { geometry: GEOMETRY, vmm: self.vmms, working_set: 12, writes_per_tick: 1, cpu_baseline: 3 }
    }

    fn start(&mut self, host: usize) {
        self.generation += 1;
        let spec = self.spec();
        let (clock, seed, disk) = (self.host_clock(host), self.random.next(), self.hosts[host].disk.clone());
        self.hosts[host].vmm =
            Some(SimVmm::started_on(disk, spec, clock, self.outside.clone(), self.generation, seed));
        self.hosts[host].label = None;
        self.born_ns = self.now;
    }

    fn phase(&self, host: usize) -> Option<Phase> {
        self.hosts[host].vmm.as_ref().and_then(SimVmm::phase)
    }

    fn found(&self, host: usize) -> Found {
        match self.phase(host) {
            None | Some(Phase::Empty) => Found::None,
            Some(Phase::Shell | Phase::Restored) => Found::Shell,
            Some(Phase::Running { gate_open: true }) => Found::Running,
            Some(Phase::Running { gate_open: false }) => Found::Gated,
            Some(Phase::Paused) => Found::Paused,
            Some(Phase::Released) => Found::Released,
        }
    }

    fn end_vm(&mut self, host: usize) {
        if let Some(vmm) = self.hosts[host].vmm.take() {
            vmm.kill();
        }
        self.hosts[host].label = None;
    }

    fn index(&self, name: &HostName) -> usize {
        self.hosts.iter().position(|host| host.name == *name).unwrap()
    }

    fn delay(&mut self) -> u64 {
        let base = 50_000 + self.random.below(400_000);
        // A lost segment is sent again.
        if self.random.chance(2) { base + 200 * MS } else { base }
    }

    fn handle(&mut self, event: Event) {
        let alive = |sim: &Self, host: usize, incarnation: u64| {
            sim.hosts[host].daemon.as_ref().is_some_and(|daemon| daemon.incarnation == incarnation)
        };
        match event {
            Event::Step { host, incarnation, role } => {
                if alive(self, host, incarnation) {
                    self.step(host, role);
                }
            }
            Event::Wake { host, incarnation, role, token } => {
                if alive(self, host, incarnation) {
                    self.wake(host, role, token);
                }
            }
            Event::Deliver { connection, to, message } => self.deliver(connection, to, message),
            Event::Lost { connection, host } => self.lost(connection, host),
            event @ Event::Directory { .. } => self.directory(event),
            Event::Told { id, host, role, tell, now } => self.told(id, host, role, &tell, now),
            Event::Asked { id, from, to, ticket, released } => self.asked(id, from, to, &ticket, released),
            Event::Answered { id, host, held } => self.answered(id, host, held),
            Event::Supervise { host, incarnation } => {
                if alive(self, host, incarnation) {
                    self.supervise(host);
                }
            }
            Event::Strike(fault) => {
                if !self.faults_over {
                    self.strike(fault);
                }
            }
            Event::Restart(host) => {
                let incarnation = self.serial;
                self.hosts[host].daemon = Some(Daemon { incarnation, ..Daemon::default() });
                self.supervise(host);
            }
            Event::DirectoryUp => self.directory_up = true,
            Event::Heal => self.partitioned = false,
            Event::Move => self.begin_move(),
        }
    }

    fn wake(&mut self, host: usize, role: Role, token: u64) {
        match role {
            Role::Source => {
                let Some(run) = source_of(&mut self.hosts[host]).filter(|run| run.token == token) else {
                    return;
                };
                run.inbox.push_back(SourceEvent::Timeout);
            }
            Role::Target => {
                let Some(run) = target_of(&mut self.hosts[host]).filter(|run| run.token == token) else {
                    return;
                };
                run.inbox.push_back(TargetEvent::Timeout);
            }
        }
        self.go_on(host, role);
    }

    fn emitters(&self) -> usize {
        (0..HOSTS).filter(|&host| self.phase(host) == Some(Phase::Running { gate_open: true })).count()
    }

    fn run_until(&mut self, time: u64) {
        while let Some(&Reverse((at, id))) = self.queue.peek() {
            if at > time {
                break;
            }
            self.queue.pop();
            self.now = at;
            self.clock.store(at, Ordering::Relaxed);
            if let Some(event) = self.events.remove(&id) {
                self.handle(event);
            }
            assert!(self.emitters() <= 1, "two copies emit");
        }
        self.now = time;
        self.clock.store(time, Ordering::Relaxed);
    }

    /// Ends the faults, lets everything come back, and checks what is left.
    fn settle(&mut self) {
        self.faults_over = true;
        self.moves_left = 0;
        let end = self.now + 30_000 * MS;
        self.run_until(end);
        assert_eq!(self.emitters(), 1, "nobody emits");
        let owner = self.index(&self.record.owner.clone());
        assert_eq!(self.found(owner), Found::Running, "the owner does not run it");
        assert_eq!(self.record.intent, None, "an intent stands open");
        for host in &self.hosts {
            let daemon = host.daemon.as_ref().expect("a daemon is down");
            assert!(daemon.source.is_none() && daemon.target.is_none(), "{} is still at work", host.name);
        }
        self.check_missing(owner);
        let vmm = self.hosts[owner].vmm.clone().unwrap();
        vmm.catch_up();
        assert_eq!(self.outside.check(), Ok(()), "output was doubled or lost");
        assert!(self.vm_died || self.generation == 1, "started anew though no machine died");
        let (truth, guest) = (self.now - self.born_ns, vmm.guest_time().as_nanos() as u64);
        assert!(truth.abs_diff(guest) < 20_000 * MS, "guest time {guest} instead of {truth}");
        if self.outcomes.keys().all(|outcome| outcome == "handed_over") && !self.vm_died {
            assert!(truth.abs_diff(guest) < MS, "guest time {guest} instead of {truth}");
        }
    }
}

/// Where a host's clock begins.
fn offset(host: usize) -> u64 {
    [0, 77_000 * MS, 5_000 * MS][host]
}

fn source_of(host: &mut Host) -> Option<&mut AsSource> {
    host.daemon.as_mut().and_then(|daemon| daemon.source.as_mut())
}

fn target_of(host: &mut Host) -> Option<&mut AsTarget> {
    host.daemon.as_mut().and_then(|daemon| daemon.target.as_mut())
}

/// Plays one run; a panic names what to play again.
fn play(what: &str, seed: u64, run: impl FnOnce(&mut Sim)) -> BTreeMap<String, u32> {
    let trace = std::env::var("KAGE_SEED").is_ok();
    let mut sim = Sim::new(seed, 0, trace);
    let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        run(&mut sim);
        sim.settle();
    }));
    if let Err(panic) = played {
        println!("failed: {what}, seed {seed}; KAGE_SEED={seed} plays it alone");
        std::panic::resume_unwind(panic);
    }
    sim.outcomes
}

fn seeds(count: u64) -> std::ops::Range<u64> {
    match std::env::var("KAGE_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..count,
    }
}

fn walk(sim: &mut Sim, moves: u32, faults: u64) {
    sim.moves_left = moves;
    for _ in 0..faults {
        let (at, which) = (sim.random.below(4_000 * MS), sim.random.below(FAULTS.len() as u64));
        sim.at(at, Event::Strike(FAULTS[which as usize]));
    }
    let end = sim.now + 8_000 * MS;
    sim.run_until(end);
}

fn add(all: &mut BTreeMap<String, u32>, more: BTreeMap<String, u32>) {
    for (outcome, count) in more {
        *all.entry(outcome).or_default() += count;
    }
}

#[test]
fn each_fault_at_each_step_of_a_handover_leaves_one_copy() {
    let mut outcomes = BTreeMap::new();
    for fault in FAULTS {
        // A handover takes some 35 steps on both sides together.
        for step in 1..45 {
            for seed in seeds(4) {
                let what = format!("{fault:?} at step {step}");
                let more = play(&what, seed, |sim| {
                    sim.strike_at = Some((step, fault));
                    walk(sim, 2, 0);
                });
                add(&mut outcomes, more);
            }
        }
    }
    println!("{outcomes:?}");
    for outcome in ["handed_over", "kept", "restarted"] {
        assert!(
            outcomes.contains_key(outcome) || seeds(2).count() == 1,
            "{outcome} never came: {outcomes:?}"
        );
    }
}

#[test]
fn walks_under_random_faults_end_with_one_copy() {
    let count = if cfg!(debug_assertions) { 1_500 } else { 10_000 };
    let mut outcomes = BTreeMap::new();
    for seed in seeds(count) {
        add(&mut outcomes, play("a walk", seed, |sim| walk(sim, 6, seed % 6)));
    }
    println!("{count} seeds: {outcomes:?}");
}

#[test]
fn an_undisturbed_walk_hands_over_every_time_in_true_time() {
    for seed in seeds(50) {
        let outcomes = play("undisturbed", seed, |sim| {
            // No late or lost request either.
            sim.faults_over = true;
            walk(sim, 10, 0);
        });
        assert_eq!(outcomes.keys().collect::<Vec<_>>(), ["handed_over"]);
    }
}

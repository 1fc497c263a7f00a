//! Both drivers against each other: simulated machines, links in memory, an embedded directory.

mod disks;
mod inquiries;
mod mirrors;
mod recovery;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use kage_directory::{
    Changes, Directory, DirectoryError, Embedded, Entry, ImageRecord, Listing, Records, Revision, Transport,
};
use kage_machine::{
    Geometry, HandoverId, HostName, Machine, Memory, Term, UserName,
    control::Phase,
    sim::{Call, Mishap, Outside, SimDisk, SimMachine, SimSpec, SimVmm},
};
use kage_replicate::{
    Link,
    link::memory::{self, Fault},
};
use kage_wire::{
    Purpose,
    handover::{Follow, Prepare},
};

use super::{
    Control, Limits, now,
    source::{self, SourceSide, SourceSpec},
    target::{MirrorSide, TargetHost, TargetSide, Targets},
};
use crate::{
    Cause, Outcome, Report, Ticket,
    converge::{Goal, Stubborn},
    ownership::tests::record,
    recover::{Found, Recovery, Scene, recover},
    report::Drained,
    target::TargetOutcome,
};

const GEOMETRY: Geometry = Geometry { memory_pages: 256, disk_pages: 16 };

/// A directory whose calls can be made to go wrong.
struct Flaky {
    inner: Embedded,
    down: AtomicBool,
    /// Counts swaps down; at zero that one goes wrong.
    until_fault: AtomicU32,
    /// Whether the swap that goes wrong applies nevertheless.
    applies: AtomicBool,
    /// How many calls after it fail too.
    outage: AtomicU32,
}

impl Flaky {
    fn check(&self) -> Result<(), DirectoryError> {
        let left = self.outage.load(Ordering::SeqCst);
        if self.down.load(Ordering::SeqCst) || left > 0 && self.until_fault.load(Ordering::SeqCst) == 0 {
            self.outage.store(left.saturating_sub(1), Ordering::SeqCst);
            return Err(DirectoryError::Unreachable { reason: "down".into() });
        }
        Ok(())
    }
}

impl Directory for Flaky {
    fn get(&self, key: &str) -> Result<Option<Entry>, DirectoryError> {
        self.check()?;
        self.inner.get(key)
    }

    fn list(&self, prefix: &str) -> Result<Listing, DirectoryError> {
        self.check()?;
        self.inner.list(prefix)
    }

    fn compare_and_swap(
        &self,
        key: &str,
        expected: Revision,
        value: Option<&[u8]>,
    ) -> Result<Revision, DirectoryError> {
        self.check()?;
        if self.until_fault.load(Ordering::SeqCst) > 0 && self.until_fault.fetch_sub(1, Ordering::SeqCst) == 1
        {
            if self.applies.load(Ordering::SeqCst) {
                self.inner.compare_and_swap(key, expected, value)?;
            }
            return Err(DirectoryError::Unreachable { reason: "answer lost".into() });
        }
        self.inner.compare_and_swap(key, expected, value)
    }

    fn watch(&self, prefix: &str, after: Revision, timeout: Duration) -> Result<Changes, DirectoryError> {
        self.check()?;
        self.inner.watch(prefix, after, timeout)
    }
}

/// One host: at most one machine.
struct Host {
    name: HostName,
    vmm: Mutex<Option<SimVmm>>,
    /// What machines left here, and what one that is here uses.
    disk: SimDisk,
    world: Arc<World>,
    mishap: Mutex<Option<(Call, Mishap)>>,
    refuses: AtomicBool,
    doubts: Mutex<Vec<String>>,
    cpu_baseline: AtomicU32,
}

struct World {
    directory: Arc<Flaky>,
    outside: Outside,
    generation: AtomicU64,
    vmms: AtomicU64,
    writes: u32,
}

impl Host {
    fn spec(&self) -> SimSpec {
        SimSpec {
            geometry: GEOMETRY,
            vmm: self.world.vmms.fetch_add(1, Ordering::SeqCst),
            working_set: 60,
            writes_per_tick: self.world.writes,
            cpu_baseline: self.cpu_baseline.load(Ordering::SeqCst) as u8,
        }
    }

    fn start(&self) {
        let generation = self.world.generation.fetch_add(1, Ordering::SeqCst) + 1;
        let vmm = SimVmm::started_on(
            self.disk.clone(),
            self.spec(),
            Arc::new(now),
            self.world.outside.clone(),
            generation,
            7 + generation,
        );
        *self.vmm.lock().unwrap() = Some(vmm);
    }

    fn vmm(&self) -> Option<SimVmm> {
        self.vmm.lock().unwrap().clone().filter(SimVmm::is_alive)
    }

    fn found(&self) -> Found {
        match self.vmm().and_then(|vmm| vmm.phase()) {
            None | Some(Phase::Empty) => Found::None,
            Some(Phase::Shell | Phase::Restored) => Found::Shell,
            Some(Phase::Running { gate_open: true }) => Found::Running,
            Some(Phase::Running { gate_open: false }) => Found::Gated,
            Some(Phase::Paused) => Found::Paused,
            Some(Phase::Released) => Found::Released,
        }
    }
}

struct AsTarget {
    host: Arc<Host>,
    machine: SimMachine,
}

impl TargetHost for Arc<Host> {
    fn prepare(
        &self,
        _: &Ticket,
        request: &Prepare,
        mirror: Option<Box<dyn MirrorSide>>,
    ) -> Result<Box<dyn TargetSide>, String> {
        if let Some(shelf) = mirror.and_then(|mirror| mirror.into_any().downcast::<Shelf>().ok()) {
            *self.vmm.lock().unwrap() = Some(shelf.machine.vmm().clone());
            return Ok(Box::new(AsTarget { host: self.clone(), machine: shelf.machine.vmm().handle() }));
        }
        if self.refuses.load(Ordering::SeqCst) {
            return Err("cordoned".into());
        }
        assert_eq!(request.geometry, GEOMETRY);
        let vmm = SimVmm::shell_on(self.disk.clone(), self.spec(), Arc::new(now), self.world.outside.clone());
        vmm.set_mishap(*self.mishap.lock().unwrap());
        *self.vmm.lock().unwrap() = Some(vmm.clone());
        Ok(Box::new(AsTarget { host: self.clone(), machine: vmm.handle() }))
    }

    fn follow(
        &self,
        _: &HostName,
        request: &Follow,
        kept: Option<Box<dyn MirrorSide>>,
    ) -> Result<Box<dyn MirrorSide>, String> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err("cordoned".into());
        }
        assert_eq!(request.geometry, GEOMETRY);
        Ok(kept.unwrap_or_else(|| {
            let vmm =
                SimVmm::shell_on(self.disk.clone(), self.spec(), Arc::new(now), self.world.outside.clone());
            Box::new(Shelf { machine: vmm.handle() })
        }))
    }

    fn owned_by(&self, host: &HostName, _: &UserName, _: Term) -> Result<(), String> {
        if *host == self.name { Err("it is this host's own".to_owned()) } else { Ok(()) }
    }

    fn holds(&self, _: &UserName) -> bool {
        !matches!(self.found(), Found::None | Found::Shell)
    }
}

/// A mirror's shell.
struct Shelf {
    machine: SimMachine,
}

impl MirrorSide for Shelf {
    fn memory(&self) -> Arc<dyn Memory> {
        self.machine.memory()
    }

    fn into_any(self: Box<Self>) -> Box<dyn std::any::Any + Send> {
        self
    }
}

impl TargetSide for AsTarget {
    fn machine(&mut self) -> &mut dyn Machine {
        &mut self.machine
    }

    fn target_started(&mut self) {}

    fn target_running(&mut self) {}

    fn restart(&mut self) {
        self.host.start();
    }

    fn in_doubt(&mut self, cause: &Cause) {
        self.host.doubts.lock().unwrap().push(cause.to_string());
    }

    fn ended(self: Box<Self>, _: &Ticket, outcome: &TargetOutcome) {
        if matches!(outcome, TargetOutcome::Nothing(_)) {
            assert!(!self.machine.vmm().is_alive() || self.host.found() == Found::Shell);
        }
    }
}

/// What goes wrong with the links of a handover.
#[derive(Clone, Copy, Debug, Default)]
struct Cuts {
    /// Switch link, by what the source sends.
    switch_source: Option<Fault>,
    /// Switch link, by what the target sends.
    switch_target: Option<Fault>,
    bulk_source: Option<Fault>,
    bulk_target: Option<Fault>,
    /// No new link can be opened once one was cut.
    partition: bool,
}

struct AsSource {
    host: Arc<Host>,
    machine: Option<SimMachine>,
    peer: Arc<Host>,
    targets: Arc<Targets>,
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
    cuts: Cuts,
    opened: u32,
}

impl SourceSide for AsSource {
    fn machine(&mut self) -> Option<&mut dyn Machine> {
        self.machine.as_mut().map(|machine| machine as &mut dyn Machine)
    }

    fn connect(&mut self, purpose: Purpose) -> Result<Box<dyn Link>, String> {
        if self.cuts.partition && self.opened >= 2 {
            return Err("no route to host".into());
        }
        self.opened += 1;
        let (mut here, mut there) = memory::pair(self.host.name.clone(), self.peer.name.clone());
        let (targets, peer) = (self.targets.clone(), self.peer.clone());
        let thread = match purpose {
            Purpose::Bulk { handover } => {
                here.set_fault(self.cuts.bulk_source);
                there.set_fault(self.cuts.bulk_target);
                thread::spawn(move || targets.attach_bulk(handover, Box::new(there)))
            }
            Purpose::Mirror => unreachable!("no part of a handover"),
            Purpose::Switch | Purpose::Directory => {
                if self.opened == 1 {
                    here.set_fault(self.cuts.switch_source);
                    there.set_fault(self.cuts.switch_target);
                }
                thread::spawn(move || targets.serve_switch(&peer, Box::new(there)))
            }
        };
        self.threads.lock().unwrap().push(thread);
        Ok(Box::new(here))
    }

    fn announced(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn source_released(&mut self) {}

    fn drain(&mut self) -> Drained {
        Drained { forwarded_frames: 3, ..Drained::default() }
    }

    fn restart(&mut self) {
        self.host.start();
    }

    fn in_doubt(&mut self, cause: &Cause) {
        self.host.doubts.lock().unwrap().push(cause.to_string());
        // What was away comes back once somebody noticed.
        self.host.world.directory.down.store(false, Ordering::SeqCst);
    }
}

struct Bench {
    world: Arc<World>,
    a: Arc<Host>,
    b: Arc<Host>,
    targets: Arc<Targets>,
    spec: SourceSpec,
    dir: std::path::PathBuf,
}

impl Drop for Bench {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.dir));
    }
}

impl Bench {
    fn new() -> Self {
        Self::with_writes(1)
    }

    fn with_writes(writes: u32) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("kage-migrate-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let directory = Arc::new(Flaky {
            inner: Embedded::open(&dir.join("directory.redb")).unwrap(),
            down: AtomicBool::new(false),
            until_fault: AtomicU32::new(0),
            applies: AtomicBool::new(false),
            outage: AtomicU32::new(0),
        });
        let user: UserName = "alice".parse().unwrap();
        directory.inner.swap::<ImageRecord>(&user, Revision::ABSENT, Some(&record())).unwrap();
        let world = Arc::new(World {
            directory: directory.clone(),
            outside: Outside::default(),
            generation: AtomicU64::new(0),
            vmms: AtomicU64::new(1),
            writes,
        });
        let host = |name: &str| {
            Arc::new(Host {
                name: name.parse().unwrap(),
                vmm: Mutex::default(),
                disk: SimDisk::new(GEOMETRY.disk_pages),
                world: world.clone(),
                mishap: Mutex::default(),
                refuses: AtomicBool::new(false),
                doubts: Mutex::default(),
                cpu_baseline: AtomicU32::new(3),
            })
        };
        let (a, b) = (host("a"), host("b"));
        disks::fill(&a.disk, &b.disk);
        a.start();
        let limits = Limits {
            switch: Duration::from_millis(150),
            poll: Duration::from_millis(10),
            answer: Duration::from_millis(300),
        };
        let targets = Arc::new(Targets::new(b.name.clone(), directory, limits));
        let ticket = Ticket {
            user,
            term: Term(5),
            handover: HandoverId([1; 16]),
            source: a.name.clone(),
            target: b.name.clone(),
        };
        let goal = Goal {
            blackout: Duration::from_millis(10),
            timeout: Duration::from_secs(10),
            stubborn: Stubborn::Switch,
        };
        let spec = SourceSpec { ticket, goal, bandwidth: None, verify: true, plain: false, limits };
        Self { world, a, b, targets, spec, dir }
    }

    fn side(&self, cuts: Cuts) -> AsSource {
        AsSource {
            host: self.a.clone(),
            machine: self.a.vmm().map(|vmm| vmm.handle()),
            peer: self.b.clone(),
            targets: self.targets.clone(),
            threads: Arc::default(),
            cuts,
            opened: 0,
        }
    }

    fn run(&self, cuts: Cuts) -> Report {
        self.run_with(cuts, &Control::default())
    }

    fn run_with(&self, cuts: Cuts, control: &Control) -> Report {
        let mut side = self.side(cuts);
        let threads = side.threads.clone();
        let report = source::run(&self.spec, &mut side, &*self.world.directory, control);
        drop(side);
        for thread in std::mem::take(&mut *threads.lock().unwrap()) {
            thread.join().unwrap();
        }
        self.world.directory.down.store(false, Ordering::SeqCst);
        report
    }

    fn record(&self) -> ImageRecord {
        self.world.directory.inner.read(&self.spec.ticket.user).unwrap().unwrap().record
    }

    /// Exactly one copy emits, at the owner, and nothing was doubled, lost or left open.
    fn check(&self, report: &Report, what: &str) {
        let emitted = self.world.outside.log().len();
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.world.outside.log().len() < emitted + 2 {
            assert!(Instant::now() < deadline, "{what}: nobody emits after {report:?}");
            for host in [&self.a, &self.b] {
                if let Some(vmm) = host.vmm() {
                    vmm.catch_up();
                }
            }
            thread::yield_now();
        }
        assert_eq!(self.world.outside.check(), Ok(()), "{what}: {report:?}");
        let record = self.record();
        assert_eq!(record.intent, None, "{what}: {report:?}");
        disks::check_nothing_lost(&self.a.disk, &self.b.disk, what);
        let (owner, other) =
            if record.owner == self.a.name { (&self.a, &self.b) } else { (&self.b, &self.a) };
        assert_eq!(owner.found(), Found::Running, "{what}: {report:?}");
        assert!(matches!(other.found(), Found::None), "{what}: {:?} {report:?}", other.found());
        let outcome = if *owner.name.as_str() == *"b" {
            Outcome::HandedOver
        } else if self.world.generation.load(Ordering::SeqCst) > 1 {
            Outcome::Restarted
        } else {
            Outcome::KeptHere
        };
        let restarted_there = report.outcome == Outcome::HandedOver && outcome == Outcome::HandedOver;
        assert!(restarted_there || report.outcome == outcome, "{what}: {report:?}");
        if report.outcome != Outcome::HandedOver {
            assert!(report.reason.is_some(), "{what}: {report:?}");
        }
    }
}

#[test]
fn a_machine_is_handed_over_with_every_page_and_every_number() {
    let bench = Bench::new();
    let report = bench.run(Cuts::default());
    assert_eq!((report.outcome, report.reason.as_deref()), (Outcome::HandedOver, None));
    bench.check(&report, "no fault");
    assert_eq!((report.term, bench.record().term), (Term(6), Term(6)));
    assert!(report.rounds >= 1 && report.pages_sent > 50 && report.bytes_wire > 0, "{report:?}");
    assert!(report.blackout_ms > 0.0 && report.total_ms > report.blackout_ms, "{report:?}");
    assert_eq!(report.forwarded_frames, 6, "drained at the release and at the end");
    let names: Vec<_> = report.phases.iter().map(|phase| phase.name.as_str()).collect();
    assert_eq!(names, ["prepare", "copy", "switch", "settle", "drain"]);
    assert_eq!(bench.world.generation.load(Ordering::SeqCst), 1);
}

#[test]
fn a_busy_machine_is_handed_over_too() {
    let bench = Bench::with_writes(20);
    let report = bench.run(Cuts::default());
    assert_eq!(report.outcome, Outcome::HandedOver, "{report:?}");
    bench.check(&report, "busy");
}

#[test]
fn a_link_cut_at_any_frame_leaves_one_copy_with_its_connections() {
    let mut outcomes = [0; 2];
    for frames in 0..26 {
        for (side, partition) in [(0, false), (1, false), (2, false), (3, false), (0, true), (1, true)] {
            let fault = Some(Fault::CutAfter { frames });
            let cuts = match side {
                0 => Cuts { switch_source: fault, partition, ..Cuts::default() },
                1 => Cuts { switch_target: fault, partition, ..Cuts::default() },
                2 => Cuts { bulk_source: fault, ..Cuts::default() },
                _ => Cuts { bulk_target: fault, ..Cuts::default() },
            };
            let bench = Bench::new();
            let report = bench.run(cuts);
            let what = format!("{cuts:?}");
            bench.check(&report, &what);
            assert_eq!(bench.world.generation.load(Ordering::SeqCst), 1, "{what}: {report:?}");
            outcomes[usize::from(report.outcome == Outcome::HandedOver)] += 1;
        }
    }
    assert!(outcomes[0] > 20 && outcomes[1] > 20, "{outcomes:?}");
}

#[test]
fn frames_truncated_or_corrupted_leave_one_copy_with_its_connections() {
    for frame in 0..24 {
        for byte in [0, 5, 9, 13, 40] {
            let fault = if byte % 2 == 0 {
                Fault::Corrupt { frame, byte }
            } else {
                Fault::Truncate { frame, keep: byte }
            };
            let sides = [
                Cuts { switch_source: Some(fault), ..Cuts::default() },
                Cuts { switch_target: Some(fault), ..Cuts::default() },
                Cuts { bulk_source: Some(fault), ..Cuts::default() },
            ];
            let cuts = sides[frame as usize % 3];
            let bench = Bench::new();
            let report = bench.run(cuts);
            let what = format!("{cuts:?}");
            bench.check(&report, &what);
            assert_eq!(bench.world.generation.load(Ordering::SeqCst), 1, "{what}: {report:?}");
        }
    }
}

#[test]
fn a_directory_that_fails_at_any_swap_settles_when_it_is_back() {
    for swap in 1..4 {
        for applies in [false, true] {
            for outage in [0, 5] {
                for cut in [None, Some(Fault::CutAfter { frames: 12 }), Some(Fault::CutAfter { frames: 13 })]
                {
                    let bench = Bench::new();
                    let directory = &bench.world.directory;
                    directory.applies.store(applies, Ordering::SeqCst);
                    directory.outage.store(outage, Ordering::SeqCst);
                    directory.until_fault.store(swap, Ordering::SeqCst);
                    let report = bench.run(Cuts { switch_target: cut, ..Cuts::default() });
                    directory.until_fault.store(0, Ordering::SeqCst);
                    directory.outage.store(0, Ordering::SeqCst);
                    let what = format!("swap {swap}, applies {applies}, outage {outage}, {cut:?}");
                    // What could not be cleared is cleared by the owner's supervision.
                    bench.supervise();
                    bench.check(&report, &what);
                    assert_eq!(bench.world.generation.load(Ordering::SeqCst), 1, "{what}: {report:?}");
                }
            }
        }
    }
}

impl Bench {
    /// What the owner's daemon does with an image on which nobody is at work.
    fn supervise(&self) {
        let record = self.record();
        for host in [&self.a, &self.b] {
            let scene = Scene {
                me: &host.name,
                user: &self.spec.ticket.user,
                found: host.found(),
                label: None,
                record: Ok(Some(&record)),
            };
            match self.go_on(host, recover(&scene)) {
                Ok(()) | Err(Recovery::Nothing | Recovery::Keep) => {}
                Err(other) => panic!("{} {other:?}", host.name),
            }
        }
    }

    /// Goes on with an open handover; gives any other verdict back.
    fn go_on(&self, host: &Arc<Host>, verdict: Recovery) -> Result<(), Recovery> {
        match verdict {
            Recovery::Source(ticket, decider, actions) => {
                let spec = SourceSpec { ticket, ..self.spec.clone() };
                let mut side = self.side(Cuts::default());
                let directory = &*self.world.directory;
                source::resume(&spec, decider, actions, &mut side, directory, &Control::default());
                Ok(())
            }
            Recovery::Target(ticket, decider, actions) => {
                let machine = host.vmm().unwrap().handle();
                let side = AsTarget { host: host.clone(), machine };
                self.targets.resume(ticket, decider, actions, Box::new(side));
                Ok(())
            }
            other => Err(other),
        }
    }
}

#[test]
fn a_machine_that_refuses_or_dies_at_any_call_is_not_lost() {
    let calls = [
        Call::Harvest,
        Call::Pause,
        Call::Resume,
        Call::Release,
        Call::Restore,
        Call::RunGated,
        Call::OpenGate,
    ];
    for call in calls {
        for mishap in [Mishap::Refuse, Mishap::Die, Mishap::DieAfter] {
            let bench = Bench::new();
            let at_target = matches!(call, Call::Restore | Call::RunGated | Call::OpenGate);
            if at_target {
                *bench.b.mishap.lock().unwrap() = Some((call, mishap));
            } else {
                bench.a.vmm().unwrap().set_mishap(Some((call, mishap)));
            }
            if call == Call::Resume {
                // So that there is something to resume.
                *bench.b.mishap.lock().unwrap() = Some((Call::Restore, Mishap::Refuse));
            }
            let report = bench.run(Cuts::default());
            let what = format!("{call:?} {mishap:?}");
            let died = mishap != Mishap::Refuse;
            let alive = bench.world.generation.load(Ordering::SeqCst) == 1;
            let kept = report.outcome == Outcome::KeptHere;
            match call {
                Call::Harvest | Call::Pause if died => {
                    assert_eq!(report.outcome, Outcome::Restarted, "{what}")
                }
                Call::Harvest | Call::Pause => assert!(kept && alive, "{what}: {report:?}"),
                // One that cannot run on is as good as dead.
                Call::Resume => assert_eq!(report.outcome, Outcome::Restarted, "{what}"),
                // Its end does not matter any more: the target has it.
                Call::Release if died => assert!(report.outcome == Outcome::HandedOver && alive, "{what}"),
                Call::Release => assert!(alive, "{what}: {report:?}"),
                Call::Restore | Call::RunGated => assert!(kept && alive, "{what}: {report:?}"),
                // Released already: the target starts it anew.
                Call::OpenGate => assert!(!alive, "{what}: {report:?}"),
            }
            bench.check(&report, &what);
        }
    }
}

#[test]
fn a_target_that_refuses_says_why() {
    let bench = Bench::new();
    bench.b.refuses.store(true, Ordering::SeqCst);
    let report = bench.run(Cuts::default());
    assert_eq!(report.outcome, Outcome::KeptHere);
    assert_eq!(report.reason.as_deref(), Some("the target refused: cordoned"));
    bench.check(&report, "refused");
}

#[test]
fn a_cpu_that_lacks_a_feature_keeps_the_machine_at_home() {
    let bench = Bench::new();
    bench.b.cpu_baseline.store(2, Ordering::SeqCst);
    let report = bench.run(Cuts::default());
    assert_eq!(report.outcome, Outcome::KeptHere);
    assert!(report.reason.as_ref().unwrap().contains("CPU features"), "{report:?}");
    bench.check(&report, "older cpu");
}

#[test]
fn a_cancel_before_the_offer_keeps_the_machine() {
    let bench = Bench::new();
    let control = Control::default();
    control.cancel();
    let report = bench.run_with(Cuts::default(), &control);
    assert_eq!((report.outcome, report.reason.as_deref()), (Outcome::KeptHere, Some("cancelled")));
    bench.check(&report, "cancelled");
}

#[test]
fn a_directory_that_is_away_after_the_offer_is_in_doubt_until_it_is_back() {
    // The target's word that it started is lost, and so is the directory. Which frame carries that word differs from
    // run to run with the number of clock probes before it: every cut is tried, three times over.
    let doubted = (0..64).cycle().take(3 * 64).any(|frames| {
        let mut bench = Bench::new();
        bench.spec.goal.blackout = Duration::from_secs(5);
        let directory = &bench.world.directory;
        directory.outage.store(6, Ordering::SeqCst);
        directory.until_fault.store(2, Ordering::SeqCst);
        let cut = Some(Fault::CutAfter { frames });
        let report = bench.run(Cuts { switch_target: cut, partition: true, ..Cuts::default() });
        let doubts = |host: &Host| host.doubts.lock().unwrap().len();
        let doubted = doubts(&bench.a) + doubts(&bench.b) > 0;
        directory.until_fault.store(0, Ordering::SeqCst);
        directory.outage.store(0, Ordering::SeqCst);
        // A move given up early leaves what it could not clear to the owner's supervision.
        bench.supervise();
        bench.check(&report, "in doubt");
        doubted
    });
    assert!(doubted, "no cut left anybody in doubt");
}

/// Keeps the trait's object safety in the contract.
#[expect(dead_code, reason = "compiles or does not")]
fn sides_are_objects(_: &dyn SourceSide, _: &dyn TargetHost, _: &dyn TargetSide, _: &dyn Transport) {}

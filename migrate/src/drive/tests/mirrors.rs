//! Mirrors and the handovers they end in: real streams on both sides.

use kage_machine::{HostName, PageSet};
use kage_replicate::{EpochStats, Given, Mirrors, OwnerSide, Rate};

use super::*;

/// The owner of a running machine.
struct Owner {
    bench_user: UserName,
    host: Arc<Host>,
    peer: Arc<Host>,
    targets: Arc<Targets>,
    memory: Arc<dyn Memory>,
    machine: Mutex<SimMachine>,
    /// Somebody else holds the machine.
    held: AtomicBool,
    /// Breaks the next link after so many frames.
    cut: AtomicU64,
    sent: Mutex<Vec<EpochStats>>,
    links: AtomicU64,
}

impl OwnerSide for Owner {
    fn memory(&self) -> Option<Arc<dyn Memory>> {
        Some(self.memory.clone())
    }

    fn harvest(&self) -> Option<PageSet> {
        if self.held.load(Ordering::SeqCst) {
            return None;
        }
        self.machine.lock().unwrap().harvest().ok()
    }

    fn request(&self, expects: Option<u128>) -> Result<Follow, String> {
        let base = self.machine.lock().unwrap().base();
        Ok(Follow { user: self.bench_user.clone(), term: Term(5), geometry: GEOMETRY, base, expects })
    }

    fn connect(&self, _: &HostName) -> Result<Box<dyn Link>, String> {
        let (mut here, there) = memory::pair(self.host.name.clone(), self.peer.name.clone());
        let cut = self.cut.swap(0, Ordering::SeqCst);
        if cut > 0 {
            here.set_fault(Some(Fault::CutAfter { frames: cut }));
        }
        self.links.fetch_add(1, Ordering::SeqCst);
        let (targets, peer) = (self.targets.clone(), self.peer.clone());
        // Ends with the mirror, or with the test.
        thread::spawn(move || targets.serve_mirror(&peer, Box::new(there)));
        Ok(Box::new(here))
    }

    fn limit(&self) -> Option<Rate> {
        None
    }

    fn sent(&self, _: &HostName, stats: &EpochStats, _: Duration) {
        self.sent.lock().unwrap().push(*stats);
    }
}

struct Scene {
    bench: Bench,
    owner: Arc<Owner>,
    mirrors: Arc<Mirrors>,
    threads: Vec<JoinHandle<()>>,
}

fn until(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(Instant::now() < deadline, "{what} never came");
        thread::sleep(Duration::from_millis(1));
    }
}

impl Scene {
    fn new() -> Self {
        let bench = Bench::new();
        let machine = bench.a.vmm().unwrap().handle();
        let owner = Arc::new(Owner {
            bench_user: bench.spec.ticket.user.clone(),
            host: bench.a.clone(),
            peer: bench.b.clone(),
            targets: bench.targets.clone(),
            memory: machine.memory(),
            machine: Mutex::new(machine),
            held: AtomicBool::new(false),
            cut: AtomicU64::new(0),
            sent: Mutex::default(),
            links: AtomicU64::new(0),
        });
        Self { bench, owner, mirrors: Arc::default(), threads: Vec::new() }
    }

    fn want(&mut self) {
        for host in self.mirrors.want(std::slice::from_ref(&self.bench.b.name)) {
            let (mirrors, owner) = (self.mirrors.clone(), self.owner.clone());
            self.threads.push(thread::spawn(move || mirrors.run(&*owner, &host)));
        }
    }

    fn is_whole(&self) -> bool {
        self.mirrors.views().iter().any(|view| view.whole)
    }

    fn whole(&mut self) {
        self.want();
        until("a whole mirror", || self.is_whole());
    }

    /// What the mirror is, beside what was sent, between two epochs.
    fn compare(&self) -> bool {
        let (targets, user) = (self.bench.targets.clone(), self.owner.bench_user.clone());
        let (answer, answered) = std::sync::mpsc::channel();
        let asked = self.mirrors.ask(&self.bench.b.name, move |_, digest, _| {
            let found = targets.check_mirror(&user).map(|found| (found.digest, found.wrong_pages));
            let _ = answer.send((found, digest));
        });
        if !asked {
            return false;
        }
        let (found, sent) = answered.recv_timeout(Duration::from_secs(5)).unwrap();
        assert_eq!(found, Some((sent, 0)));
        true
    }

    /// Hands the machine over, as whoever holds it.
    fn hand_over(&self) -> Report {
        struct Holding<'a>(AsSource, &'a Mirrors, HostName);
        impl SourceSide for Holding<'_> {
            fn machine(&mut self) -> Option<&mut dyn Machine> {
                self.0.machine()
            }
            fn connect(&mut self, purpose: Purpose) -> Result<Box<dyn Link>, String> {
                self.0.connect(purpose)
            }
            fn announced(&mut self) -> Result<(), String> {
                Ok(())
            }
            fn mirror(&mut self) -> Option<Given> {
                self.1.give(&self.2)
            }
            fn harvested(&mut self, pages: &PageSet) {
                self.1.harvested(pages);
            }
            fn source_released(&mut self) {}
            fn drain(&mut self) -> Drained {
                Drained::default()
            }
            fn restart(&mut self) {
                self.0.restart();
            }
            fn in_doubt(&mut self, cause: &Cause) {
                self.0.in_doubt(cause);
            }
        }
        self.owner.held.store(true, Ordering::SeqCst);
        let side = self.bench.side(Cuts::default());
        let threads = side.threads.clone();
        let mut side = Holding(side, &self.mirrors, self.bench.b.name.clone());
        let bench = &self.bench;
        let report = source::run(&bench.spec, &mut side, &*bench.world.directory, &Control::default());
        drop(side);
        self.owner.held.store(false, Ordering::SeqCst);
        for thread in std::mem::take(&mut *threads.lock().unwrap()) {
            thread.join().unwrap();
        }
        report
    }

    fn end(self) {
        self.mirrors.stop(false);
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

#[test]
fn a_mirror_is_what_was_sent_at_any_rest() {
    let mut scene = Scene::new();
    scene.whole();
    let mut compared = 0;
    until("twenty comparisons", || {
        compared += u32::from(scene.compare());
        compared >= 20
    });
    scene.end();
}

#[test]
fn a_handover_to_a_mirror_sends_what_was_written_since() {
    let mut scene = Scene::new();
    scene.whole();
    let first: u64 = scene.owner.sent.lock().unwrap().iter().map(|stats| stats.pages).sum();
    let report = scene.hand_over();
    assert_eq!((report.outcome, report.replica_hit), (Outcome::HandedOver, crate::report::ReplicaHit::Full));
    assert!(report.pages_sent < first, "{} of {first} pages again", report.pages_sent);
    scene.bench.check(&report, "mirrored");
    assert!(!scene.bench.targets.mirrors(&scene.owner.bench_user), "it is the machine now");
    scene.end();
}

#[test]
fn a_handover_in_the_midst_of_a_first_copy_goes_on_from_it() {
    let mut scene = Scene::new();
    // After Follow and the first pages; there is no other link for two seconds.
    scene.owner.cut.store(2, Ordering::SeqCst);
    scene.want();
    let held =
        || scene.bench.targets.check_mirror(&scene.owner.bench_user).is_some_and(|found| found.pages > 0);
    until("some pages", held);
    assert!(!scene.is_whole());
    let report = scene.hand_over();
    assert_eq!(
        (report.outcome, report.replica_hit),
        (Outcome::HandedOver, crate::report::ReplicaHit::Partial)
    );
    scene.bench.check(&report, "half mirrored");
    scene.end();
}

#[test]
fn a_mirror_whose_link_is_lost_goes_on_from_what_it_holds() {
    let mut scene = Scene::new();
    // Follow, the pages, the end of the first epoch, and some more.
    scene.owner.cut.store(6, Ordering::SeqCst);
    scene.whole();
    let links = |scene: &Scene| scene.owner.links.load(Ordering::SeqCst);
    until("another link", || links(&scene) == 2 && scene.is_whole());
    assert!(scene.compare());
    let sent = scene.owner.sent.lock().unwrap().clone();
    let (first, again) = (sent[0].pages, sent.iter().map(|stats| stats.pages).sum::<u64>() - sent[0].pages);
    assert!(again < first, "{again} pages after {first}");
    scene.end();
}

#[test]
fn a_mirror_that_is_gone_costs_a_handover_nothing_but_itself() {
    let mut scene = Scene::new();
    scene.whole();
    scene.bench.targets.forget_mirror(&scene.owner.bench_user);
    let report = scene.hand_over();
    assert_eq!((report.outcome, report.replica_hit), (Outcome::HandedOver, crate::report::ReplicaHit::None));
    scene.bench.check(&report, "forgotten");
    scene.end();
}

#[test]
fn a_mirror_that_is_not_wanted_any_more_is_dropped_at_once() {
    let mut scene = Scene::new();
    scene.whole();
    assert_eq!(scene.mirrors.want(&[]), []);
    until("its end", || !scene.bench.targets.mirrors(&scene.owner.bench_user));
    // And one that is wanted again is made anew.
    scene.whole();
    assert!(scene.bench.targets.mirrors(&scene.owner.bench_user));
    scene.end();
}

#[test]
fn a_refused_mirror_is_asked_for_again() {
    let mut scene = Scene::new();
    scene.bench.b.refuses.store(true, Ordering::SeqCst);
    scene.want();
    let note = |scene: &Scene| scene.mirrors.views().iter().find_map(|view| view.note.clone());
    until("a refusal", || note(&scene).as_deref() == Some("cordoned"));
    scene.bench.b.refuses.store(false, Ordering::SeqCst);
    until("a whole mirror", || scene.is_whole());
    scene.end();
}

#[test]
fn what_a_former_owner_left_is_known_by_its_digest() {
    use kage_replicate::{
        Receiver,
        digest::{DigestTable, PageDigest},
        store::Mirror,
    };
    let mut scene = Scene::new();
    scene.owner.machine.lock().unwrap().harvest().unwrap();
    // Both hold what the machine was at one instant; what it writes since is harvested.
    let paused = scene.owner.machine.lock().unwrap().pause(kage_machine::PauseCause::Hold).unwrap();
    drop(paused);
    let vmm = SimVmm::shell_on(
        scene.bench.b.disk.clone(),
        scene.bench.b.spec(),
        Arc::new(now),
        scene.bench.world.outside.clone(),
    );
    let shelf = Box::new(Shelf { machine: vmm.handle() });
    let (mut held, mut mirror) = (DigestTable::new(GEOMETRY), Mirror::new(shelf.memory()));
    let mut bytes = [0; kage_machine::PAGE_SIZE];
    for page in (0..GEOMETRY.pages()).map(kage_machine::PageIndex) {
        match scene.owner.memory.read_block(page, &mut bytes) {
            kage_machine::disk::Block::Missing(Some(digest)) if page.0 >= GEOMETRY.memory_pages => {
                mirror.elsewhere(kage_machine::Epoch(0), page, digest).unwrap();
                held.set(page, PageDigest::of_block_digest(page, digest));
            }
            block if page.0 >= GEOMETRY.memory_pages => {
                assert!(mirror.write(kage_machine::Epoch(0), page, &bytes));
                held.set(page, PageDigest::of_block(page, block).unwrap());
            }
            _ => {
                scene.owner.memory.read(page, &mut bytes);
                assert!(mirror.write(kage_machine::Epoch(0), page, &bytes));
                held.set(page, PageDigest::of(page, &bytes));
            }
        }
    }
    scene.mirrors.begin_from(held, GEOMETRY);
    let (targets, user) = (scene.bench.targets.clone(), scene.owner.bench_user.clone());
    let kept = targets.keep(&user, shelf, Receiver::over(mirror)).unwrap();
    thread::spawn(move || kept(&targets));
    until("what was left", || scene.bench.targets.mirrors(&scene.owner.bench_user));
    scene.owner.machine.lock().unwrap().resume().unwrap();
    scene.whole();
    until("a comparison", || scene.compare());
    let sent: u64 =
        scene.owner.sent.lock().unwrap().iter().map(|stats| stats.pages + stats.pages_unchanged).sum();
    assert!(sent < 100, "{sent} pages were looked at of those that had not changed");
    scene.end();
}

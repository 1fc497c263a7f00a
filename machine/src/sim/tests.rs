use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use super::*;

fn spec(vmm: u64) -> SimSpec {
    SimSpec {
        geometry: Geometry { memory_pages: 64, disk_pages: 0 },
        vmm,
        working_set: 20,
        writes_per_tick: 2,
        cpu_baseline: 3,
    }
}

struct Time(Arc<AtomicU64>);

impl Time {
    fn new() -> Self {
        Self(Arc::new(AtomicU64::new(0)))
    }

    fn pass(&self, time: Duration) {
        self.0.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    fn clock(&self) -> Clock {
        let ns = self.0.clone();
        Arc::new(move || HostInstant { ns: ns.load(Ordering::Relaxed) })
    }
}

fn copy(from: &SimVmm, to: &SimVmm) {
    let memory = to.handle().memory();
    for (index, page) in from.contents().iter().enumerate() {
        memory.write(PageIndex(index as u32), page);
    }
}

#[test]
fn a_move_keeps_the_numbers_in_order_and_guest_time_true() {
    let (time, outside) = (Time::new(), Outside::default());
    let a = SimVmm::started(spec(1), time.clock(), outside.clone(), 1, 7);
    let b = SimVmm::shell(spec(2), time.clock(), outside.clone());
    time.pass(TICK * 10);
    let paused = a.handle().pause(PauseCause::Switch).unwrap();
    assert!(!paused.dirty.is_empty());
    copy(&a, &b);
    time.pass(TICK * 4);
    b.handle().restore(&paused.state, paused.at).unwrap();
    b.handle().run_gated().unwrap();
    time.pass(TICK * 5);
    b.catch_up();
    assert_eq!(outside.log().len(), 10, "nothing leaves a shut gate");
    a.handle().release().unwrap();
    b.handle().open_gate().unwrap();
    time.pass(TICK * 5);
    b.catch_up();
    assert_eq!(outside.log().len(), 20);
    assert_eq!(outside.check(), Ok(()));
    assert_eq!(b.guest_time(), TICK * 24);
}

#[test]
fn a_guest_uses_its_disk_and_what_it_writes_is_harvested() {
    let time = Time::new();
    let geometry = Geometry { memory_pages: 64, disk_pages: 8 };
    let disk = SimDisk::new(8);
    disk.leave_missing(7, Some(9));
    let spec = SimSpec { geometry, ..spec(1) };
    let vmm = SimVmm::started_on(disk.clone(), spec, time.clock(), Outside::default(), 1, 7);
    let before = disk.blocks();
    time.pass(TICK * 2000);
    let dirty = vmm.handle().harvest().unwrap();
    let memory = vmm.handle().memory();
    let mut changed = 0;
    for (block, (before, after)) in before.iter().zip(disk.blocks()).enumerate() {
        let page = PageIndex(64 + block as u32);
        assert!(*before == after || dirty.contains(page), "block {block}");
        assert_eq!(memory.populated().contains(page), after != Block::Zeros);
        assert_eq!(memory.block(page), after);
        changed += u32::from(*before != after);
    }
    assert!(changed > 0);
    assert_eq!(memory.block(PageIndex(71)), Block::Missing(Some(9)), "what is only read stays missing");
    assert!(memory.leave_missing(PageIndex(64), 5) && !memory.leave_missing(PageIndex(3), 5));
}

#[test]
fn a_released_machine_never_runs_again() {
    let time = Time::new();
    let a = SimVmm::started(spec(1), time.clock(), Outside::default(), 1, 7);
    let mut handle = a.handle();
    assert!(handle.release().is_err());
    handle.pause(PauseCause::Switch).unwrap();
    handle.release().unwrap();
    assert!(handle.resume().is_err() && handle.open_gate().is_err());
}

#[test]
fn two_emitting_copies_are_noticed() {
    let (time, outside) = (Time::new(), Outside::default());
    let a = SimVmm::started(spec(1), time.clock(), outside.clone(), 1, 7);
    let b = SimVmm::shell(spec(2), time.clock(), outside.clone());
    let paused = a.handle().pause(PauseCause::Switch).unwrap();
    copy(&a, &b);
    b.handle().restore(&paused.state, paused.at).unwrap();
    b.handle().run_gated().unwrap();
    b.handle().open_gate().unwrap();
    a.handle().resume().unwrap();
    time.pass(TICK);
    a.catch_up();
    b.catch_up();
    assert!(outside.check().is_err());
}

/// The set of those pages.
fn set(pages: impl IntoIterator<Item = u32>) -> PageSet {
    let mut set = PageSet::empty(64);
    pages.into_iter().for_each(|page| assert!(set.insert(PageIndex(page))));
    set
}

/// A machine that runs for a while, and a shell to which it goes without these pages; where they can be had.
fn half_moved(time: &Time, outside: &Outside, lacks: &PageSet) -> (SimVmm, SimVmm, Arc<dyn Missing>, Paused) {
    let a = SimVmm::started(spec(1), time.clock(), outside.clone(), 1, 7);
    let b = SimVmm::shell(spec(2), time.clock(), outside.clone());
    time.pass(TICK * 10);
    let paused = a.handle().pause(PauseCause::Switch).unwrap();
    copy(&a, &b);
    let missing = b.handle().miss(lacks).unwrap();
    b.handle().restore(&paused.state, paused.at).unwrap();
    b.handle().run_gated().unwrap();
    (a, b, missing, paused)
}

#[test]
fn a_guest_waits_for_each_page_that_it_touches_until_it_is_brought() {
    let (time, outside) = (Time::new(), Outside::default());
    let all = PageSet::full(64);
    let (a, b, missing, _) = half_moved(&time, &outside, &all);
    a.handle().release().unwrap();
    b.handle().open_gate().unwrap();
    let (pages, mut brought) = (a.contents(), PageSet::empty(64));
    let mut waited = 0;
    for _ in 0..200 {
        time.pass(TICK);
        while let Some(page) = missing.wanted(Instant::now()).unwrap() {
            assert_eq!(missing.wanted(Instant::now()).unwrap(), None, "named once");
            let before = outside.log().len();
            time.pass(TICK * 8);
            b.catch_up();
            assert_eq!(outside.log().len(), before, "it waits");
            assert!(missing.bring(page, &pages[page.0 as usize]).unwrap());
            assert!(brought.insert(page), "{page:?} twice");
            waited += 1;
        }
    }
    assert_eq!(waited, 21, "page 0 and the working set");
    assert!(outside.log().len() > 100);
    assert_eq!(outside.check(), Ok(()));
    // The rest; what it has written meanwhile stays.
    let before = b.contents();
    for page in missing.left().iter() {
        assert!(missing.bring(page, &pages[page.0 as usize]).unwrap());
    }
    assert!(!missing.bring(PageIndex(1), &[1; PAGE_SIZE]).unwrap());
    assert!(missing.left().is_empty() && b.missing().is_empty());
    for (index, (page, now)) in before.iter().zip(b.contents()).enumerate() {
        let kept = brought.contains(PageIndex(index as u32));
        assert!(now == if kept { *page } else { pages[index] }, "page {index}");
    }
    let untouched = b.handle().harvest().unwrap();
    assert!((21..64).all(|page| !untouched.contains(PageIndex(page))), "brought is not written");
}

#[test]
fn who_reads_a_missing_page_has_to_read_it_again() {
    let (time, outside) = (Time::new(), Outside::default());
    let (a, b, missing, _) = half_moved(&time, &outside, &set([40, 41, 42]));
    let (memory, pages) = (b.handle().memory(), a.contents());
    assert!(memory.populated().contains(PageIndex(40)));
    let mut bytes = [1; PAGE_SIZE];
    memory.read(PageIndex(40), &mut bytes);
    assert_eq!(bytes, [0; PAGE_SIZE]);
    assert!(b.handle().harvest().unwrap().is_empty());
    missing.bring(PageIndex(40), &pages[40]).unwrap();
    memory.write(PageIndex(41), &[9; PAGE_SIZE]);
    assert!(!missing.bring(PageIndex(41), &pages[41]).unwrap());
    assert_eq!(b.handle().harvest().unwrap(), set([40]));
    assert_eq!(missing.left(), set([42]));
    assert_eq!((b.contents()[40], b.contents()[41]), (pages[40], [9; PAGE_SIZE]));
}

#[test]
fn only_pages_of_a_shell_go_missing() {
    let (time, outside) = (Time::new(), Outside::default());
    let geometry = Geometry { memory_pages: 64, disk_pages: 8 };
    let a = SimVmm::shell(SimSpec { geometry, ..spec(1) }, time.clock(), outside.clone());
    assert!(a.handle().miss(&PageSet::full(72)).is_err());
    a.handle().miss(&PageSet::full(64)).unwrap();
    assert!(a.handle().miss(&PageSet::full(64)).is_err());
    let (_, b, missing, _) = half_moved(&time, &outside, &set([3]));
    assert!(b.handle().miss(&set([4])).is_err());
    b.kill();
    assert!(missing.wanted(Instant::now() + Duration::from_secs(9)).is_err());
    assert!(missing.bring(PageIndex(3), &[0; PAGE_SIZE]).is_err());
}

#[test]
fn a_state_that_is_not_of_the_instant_of_a_page_brought_later_never_runs() {
    let (time, outside) = (Time::new(), Outside::default());
    let (_, b, missing, _) = half_moved(&time, &outside, &set([0]));
    time.pass(TICK * 2);
    assert_eq!(missing.wanted(Instant::now()).unwrap(), Some(PageIndex(0)));
    missing.bring(PageIndex(0), &[1; PAGE_SIZE]).unwrap();
    assert!(!b.is_alive() && outside.log().len() == 10);
}

#[test]
fn a_checkpoint_lets_out_what_waited_in_it_and_leaves_the_gate_shut() {
    let (time, outside) = (Time::new(), Outside::default());
    let (_, b, _, _) = half_moved(&time, &outside, &set([]));
    let mut handle = b.handle();
    let mut read = 0;
    time.pass(TICK * 5);
    let memory = handle.memory();
    let first = handle.checkpoint(&mut |dirty| {
        read += dirty.iter().inspect(|&page| memory.read(page, &mut [0; PAGE_SIZE])).count();
    });
    let first = first.unwrap();
    assert!(read > 0 && read == first.dirty.len() as usize);
    assert_eq!(b.phase(), Some(Phase::Running { gate_open: false }));
    time.pass(TICK * 3);
    let second = handle.checkpoint(&mut |_| ()).unwrap();
    time.pass(TICK * 3);
    handle.let_out(first.output).unwrap();
    assert_eq!(outside.log().len(), 15);
    handle.let_out(second.output).unwrap();
    handle.let_out(first.output).unwrap();
    assert_eq!(outside.log().len(), 18, "a mark that lies behind changes nothing");
    handle.open_gate().unwrap();
    assert_eq!((outside.log().len(), outside.check()), (21, Ok(())));
}

#[test]
fn what_waited_in_a_checkpoint_leaves_where_the_machine_goes_on_from_it() {
    for let_out in [false, true] {
        let (time, outside) = (Time::new(), Outside::default());
        let (_, b, _, _) = half_moved(&time, &outside, &set([]));
        time.pass(TICK * 5);
        let c = SimVmm::shell(spec(3), time.clock(), outside.clone());
        let checkpoint = b.handle().checkpoint(&mut |_| copy(&b, &c)).unwrap();
        if let_out {
            b.handle().let_out(checkpoint.output).unwrap();
        }
        time.pass(TICK * 5);
        b.kill();
        c.handle().restore(&checkpoint.state, checkpoint.at).unwrap();
        c.handle().run_gated().unwrap();
        c.handle().open_gate().unwrap();
        time.pass(TICK);
        c.catch_up();
        let log: Vec<_> = outside.log().iter().map(|emission| emission.sequence).collect();
        assert!(log.ends_with(&[11, 12, 13, 14, 15, 16]), "{log:?}");
        assert_eq!((log.len(), outside.check()), (16 + 5 * usize::from(let_out), Ok(())));
    }
    // The same numbers from a machine that did not know of them are others.
    let (time, outside) = (Time::new(), Outside::default());
    let (a, b, _, _) = half_moved(&time, &outside, &set([]));
    time.pass(TICK * 5);
    b.handle().open_gate().unwrap();
    a.handle().resume().unwrap();
    time.pass(TICK);
    a.catch_up();
    assert!(outside.check().is_err());
}

#[test]
fn marks_wrap_around() {
    let (time, outside) = (Time::new(), Outside::default());
    let a = SimVmm::started(spec(1), time.clock(), outside.clone(), 1, 7);
    let b = SimVmm::shell(spec(2), time.clock(), outside.clone());
    for _ in 0..65_530 / 10 {
        time.pass(TICK * 10);
        a.catch_up();
    }
    let paused = a.handle().pause(PauseCause::Switch).unwrap();
    copy(&a, &b);
    b.handle().restore(&paused.state, paused.at).unwrap();
    b.handle().run_gated().unwrap();
    time.pass(TICK * 10);
    let checkpoint = b.handle().checkpoint(&mut |_| ()).unwrap();
    assert_eq!((paused.output, checkpoint.output), (OutputMark(65_530), OutputMark(4)));
    time.pass(TICK * 10);
    let before = outside.log().len();
    b.handle().let_out(paused.output).unwrap();
    assert_eq!(outside.log().len(), before);
    b.handle().let_out(checkpoint.output).unwrap();
    assert_eq!((outside.log().len(), outside.check()), (before + 10, Ok(())));
}

#[test]
fn pages_and_state_of_two_instants_are_refused() {
    let time = Time::new();
    let a = SimVmm::started(spec(1), time.clock(), Outside::default(), 1, 7);
    let b = SimVmm::shell(spec(2), time.clock(), Outside::default());
    copy(&a, &b);
    time.pass(TICK * 3);
    let paused = a.handle().pause(PauseCause::Switch).unwrap();
    assert!(matches!(b.handle().restore(&paused.state, paused.at), Err(MachineError::Refused { .. })));
}

#[test]
fn mishaps_happen_once_where_they_were_set() {
    let time = Time::new();
    let a = SimVmm::started(spec(1), time.clock(), Outside::default(), 1, 7);
    a.set_mishap(Some((Call::Pause, Mishap::Refuse)));
    assert!(a.handle().harvest().is_ok());
    assert!(a.handle().pause(PauseCause::Switch).is_err());
    assert!(a.handle().pause(PauseCause::Switch).is_ok());
    a.set_mishap(Some((Call::Release, Mishap::DieAfter)));
    assert!(matches!(a.handle().release(), Err(MachineError::Gone(_))));
    assert_eq!(a.phase(), None);
}

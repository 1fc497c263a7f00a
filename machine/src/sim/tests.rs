use std::sync::atomic::{AtomicU64, Ordering};

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

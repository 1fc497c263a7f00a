//! Who may ask what, and words that have no place.

use kage_wire::handover::Message;

use super::*;

impl Bench {
    /// What B answers a host that asks for this handover under some term; `None` is no answer.
    fn ask(&self, asker: &str, term: Term, released: bool) -> Option<Message> {
        let (mut here, there) = memory::pair(asker.parse().unwrap(), self.b.name.clone());
        let ticket = &self.spec.ticket;
        let (user, handover) = (ticket.user.clone(), ticket.handover);
        here.send(&Message::Inquire { user, term, handover, released }.to_frame()).unwrap();
        let (targets, peer) = (self.targets.clone(), self.b.clone());
        let serving = thread::spawn(move || targets.serve_switch(&peer, Box::new(there)));
        let answer = here.recv(Some(Instant::now() + Duration::from_secs(2))).ok();
        serving.join().unwrap();
        answer.map(|frame| Message::from_frame(&frame).unwrap().0)
    }
}

#[test]
fn nothing_held_binds() {
    let bench = Bench::new();
    assert_eq!(bench.ask("a", bench.spec.ticket.term, false), Some(Message::HoldsNothing));
    let report = bench.run(Cuts::default());
    assert_eq!(report.outcome, Outcome::KeptHere);
    assert_eq!(report.reason.as_deref(), Some("the target refused: term 5 was given up here"));
}

#[test]
fn a_host_that_is_not_the_owner_bars_nobody() {
    let bench = Bench::new();
    assert_eq!(bench.ask("c", Term(5), false), None, "it does not own the image");
    assert_eq!(bench.ask("a", Term(u64::MAX), false), None, "there is no such term");
    let report = bench.run(Cuts::default());
    assert_eq!(report.outcome, Outcome::HandedOver, "{report:?}");
    bench.check(&report, "after strangers asked");
}

#[test]
fn a_host_that_is_not_the_source_opens_no_gate() {
    let bench = Bench::new();
    bench.left(Found::Paused, Found::Gated);
    let ticket = bench.spec.ticket.clone();
    let machine = bench.b.vmm().unwrap().handle();
    let side = Box::new(AsTarget { host: bench.b.clone(), machine });
    // Its right cannot be settled: only a release could open the gate.
    bench.world.directory.down.store(true, Ordering::SeqCst);
    let scene = Scene {
        me: &bench.b.name,
        user: &ticket.user,
        found: Found::Gated,
        label: Some(&ticket),
        record: Err(()),
    };
    let Recovery::Target(_, decider, actions) = recover(&scene) else { panic!() };
    thread::scope(|scope| {
        scope.spawn(|| bench.targets.resume(ticket.clone(), decider, actions, side));
        while bench.b.doubts.lock().unwrap().is_empty() {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(bench.ask("c", ticket.term, true), None);
        assert_eq!(bench.b.found(), Found::Gated);
        bench.a.vmm().unwrap().handle().release().unwrap();
        assert_eq!(bench.ask("a", ticket.term, true), Some(Message::Holds));
        assert_eq!(bench.b.found(), Found::Running);
        bench.world.directory.down.store(false, Ordering::SeqCst);
    });
    assert_eq!(bench.record().owner, bench.b.name);
}

#[test]
fn noise_on_a_switch_link_harms_nobody() {
    let bench = Bench::new();
    for body in [vec![], vec![0; 4], vec![1, 0, 0, 0, 3], vec![255; 64]] {
        let mut side = bench.side(Cuts::default());
        let mut link = side.connect(Purpose::Switch).unwrap();
        link.send(&kage_wire::Frame::new(kage_wire::Kind::Handover, body)).unwrap();
        assert!(link.recv(Some(Instant::now() + Duration::from_secs(2))).is_err());
    }
    let mut side = bench.side(Cuts::default());
    let mut link = side.connect(Purpose::Bulk { handover: HandoverId([9; 16]) }).unwrap();
    assert!(link.recv(Some(Instant::now() + Duration::from_secs(2))).is_err());
    let report = bench.run(Cuts::default());
    bench.check(&report, "after noise");
}

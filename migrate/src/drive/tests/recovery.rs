//! What daemons do with what former ones left.

use super::*;

impl Bench {
    /// Lets the daemons of both hosts take over what former ones left, at the same time.
    fn adopt(&self, label: bool) {
        thread::scope(|scope| {
            for host in [&self.a, &self.b] {
                scope.spawn(move || {
                    for _ in 0..200 {
                        if self.settle_one(host, label) {
                            return;
                        }
                        thread::sleep(Duration::from_millis(2));
                    }
                    panic!("{} is not settled: {:?}", host.name, host.found());
                });
            }
        });
    }

    /// One look at what is found at a host; whether nothing is left to do.
    fn settle_one(&self, host: &Arc<Host>, label: bool) -> bool {
        let record = self.record();
        let label = (label && host.name == self.b.name).then_some(&self.spec.ticket);
        let found = host.found();
        let scene =
            Scene { me: &host.name, user: &self.spec.ticket.user, found, label, record: Ok(Some(&record)) };
        let verdict = match self.go_on(host, recover(&scene)) {
            Ok(()) => return false,
            Err(verdict) => verdict,
        };
        match verdict {
            Recovery::Source(..) | Recovery::Target(..) => unreachable!("gone on with above"),
            Recovery::Nothing | Recovery::Keep => record.intent.is_none(),
            Recovery::End => {
                host.vmm().unwrap().kill();
                false
            }
            Recovery::Start => {
                host.start();
                true
            }
            Recovery::Run => {
                let mut machine = host.vmm().unwrap().handle();
                if found == Found::Paused {
                    machine.resume().unwrap()
                } else {
                    machine.open_gate().unwrap()
                }
                false
            }
            Recovery::Wait => false,
        }
    }

    /// What crashed daemons left: A's machine as `a`, a copy of it at B as `b`, the intent open.
    pub(super) fn left(&self, a: Found, b: Found) {
        let directory = &self.world.directory.inner;
        let user = &self.spec.ticket.user;
        let current = directory.read::<ImageRecord>(user).unwrap().unwrap();
        let announced = crate::ownership::Change::Announce.apply(&current.record, &self.spec.ticket);
        directory.swap(user, current.revision, Some(&announced)).unwrap();
        let vmm = self.a.vmm().unwrap();
        let mut machine = vmm.handle();
        if a == Found::Running {
            return;
        }
        let paused = machine.pause(kage_machine::PauseCause::Switch).unwrap();
        if matches!(b, Found::Gated | Found::Running) {
            let shell = SimVmm::shell(self.b.spec(), Arc::new(now), self.world.outside.clone());
            let memory = shell.handle().memory();
            for (index, page) in vmm.contents().iter().enumerate() {
                memory.write(kage_machine::PageIndex(index as u32), page);
            }
            shell.handle().restore(&paused.state, paused.at).unwrap();
            shell.handle().run_gated().unwrap();
            if b == Found::Running {
                shell.handle().open_gate().unwrap();
            }
            *self.b.vmm.lock().unwrap() = Some(shell);
        }
        match a {
            Found::Released => machine.release().unwrap(),
            Found::None => vmm.kill(),
            _ => {}
        }
    }
}

#[test]
fn restarted_daemons_settle_whatever_they_find() {
    let cases = [
        // A, B, owner afterwards where that is certain, whether the connections live
        (Found::Running, Found::None, Some("a"), true),
        (Found::Paused, Found::None, Some("a"), true),
        (Found::Paused, Found::Gated, None, true),
        (Found::Released, Found::Gated, Some("b"), true),
        (Found::Released, Found::Running, Some("b"), true),
        (Found::Released, Found::None, Some("a"), false),
        (Found::None, Found::Gated, Some("b"), true),
        (Found::None, Found::Running, Some("b"), true),
        (Found::None, Found::None, Some("a"), false),
    ];
    for (a, b, owner, alive) in cases {
        for label in [true, false] {
            let bench = Bench::new();
            bench.left(a, b);
            bench.adopt(label);
            let what = format!("{a:?} {b:?} label {label}");
            let record = bench.record();
            assert!(owner.is_none_or(|owner| record.owner.as_str() == owner), "{what}: {record:?}");
            assert_eq!(record.intent, None, "{what}");
            assert_eq!(bench.world.generation.load(Ordering::SeqCst) == 1, alive, "{what}");
            let (owner, other) =
                if record.owner == bench.a.name { (&bench.a, &bench.b) } else { (&bench.b, &bench.a) };
            assert_eq!(owner.found(), Found::Running, "{what}");
            assert_eq!(other.found(), Found::None, "{what}");
            assert_eq!(bench.world.outside.check(), Ok(()), "{what}");
        }
    }
}

/// A daemon judges what it finds by a record; by the time its handover goes on, the target has claimed.
#[test]
fn a_claim_between_two_reads_of_the_record_is_never_taken_back() {
    for (a, b) in [(Found::Paused, Found::Running), (Found::None, Found::None)] {
        let bench = Bench::new();
        bench.left(a, b);
        let (user, directory) = (&bench.spec.ticket.user, &bench.world.directory);
        let found = directory.inner.read::<ImageRecord>(user).unwrap().unwrap();
        let scene = Scene { me: &bench.a.name, user, found: a, label: None, record: Ok(Some(&found.record)) };
        let Recovery::Source(ticket, decider, actions) = recover(&scene) else { panic!("{a:?}") };
        let claimed = crate::ownership::Change::Claim.apply(&found.record, &ticket);
        directory.inner.swap(user, found.revision, Some(&claimed)).unwrap();

        let spec = SourceSpec { ticket, ..bench.spec.clone() };
        let mut side = bench.side(Cuts::default());
        let report = source::resume(&spec, decider, actions, &mut side, &**directory, &Control::default());
        assert_eq!(bench.record(), claimed, "{a:?}: {report:?}");
        assert_eq!(report.outcome, Outcome::HandedOver, "{a:?}: {report:?}");
        assert_eq!(bench.a.found(), Found::None, "{a:?}: {report:?}");
        assert_eq!(bench.b.found(), b, "{a:?}: {report:?}");
        assert_eq!(bench.world.generation.load(Ordering::SeqCst), 1, "{a:?}: {report:?}");
    }
}

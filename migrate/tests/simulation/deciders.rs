//! Feeds the deciders and executes their actions, one a step, so that a fault can come between two.

use super::*;

impl Sim {
    /// Lets a decider take its next event, or its next action be executed, or wait.
    pub(crate) fn go_on(&mut self, host: usize, role: Role) {
        let step_delay = 5_000 + self.random.below(100_000);
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let incarnation = daemon.incarnation;
        // One pending step or timer at a time: a new token voids the one before.
        let (busy, idle) = match role {
            Role::Source => {
                let Some(run) = &mut daemon.source else { return };
                run.token += 1;
                (run.waiting != Waiting::Nothing, run.work.is_empty() && run.inbox.is_empty())
            }
            Role::Target => {
                let Some(run) = &mut daemon.target else { return };
                run.token += 1;
                (run.waiting != Waiting::Nothing, run.work.is_empty() && run.inbox.is_empty())
            }
        };
        if busy {
            return;
        }
        if !idle {
            return self.at(step_delay, Event::Step { host, incarnation, role });
        }
        self.wait(host, role, incarnation);
    }

    pub(crate) fn wait(&mut self, host: usize, role: Role, incarnation: u64) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let (patience, lost, token, begun) = match role {
            Role::Source => {
                let Some(run) = &daemon.source else { return };
                let lost = run.connection.is_none() && run.decider.listens();
                (run.decider.patience(), lost, run.token, run.begun)
            }
            Role::Target => {
                let Some(run) = &daemon.target else { return };
                let lost = run.connection.is_none() && run.decider.listens();
                (run.decider.patience(), lost, run.token, run.begun)
            }
        };
        if lost {
            match (role, source_of(&mut self.hosts[host])) {
                (Role::Source, Some(run)) => run.inbox.push_back(SourceEvent::LinkLost("cut".into())),
                _ => {
                    if let Some(run) = target_of(&mut self.hosts[host]) {
                        run.inbox.push_back(TargetEvent::LinkLost("cut".into()));
                    }
                }
            }
            return self.go_on(host, role);
        }
        let delay = match patience {
            Patience::Deadline => (begun + DEADLINE).saturating_sub(self.now),
            Patience::Switch if role == Role::Target => SWITCH * 3 / 2,
            Patience::Switch => SWITCH,
            Patience::Poll => POLL,
            Patience::Done => return self.finished(host, role),
            Patience::None => return,
        };
        self.at(delay, Event::Wake { host, incarnation, role, token });
    }

    pub(crate) fn finished(&mut self, host: usize, role: Role) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        match role {
            Role::Source => {
                let Some(run) = daemon.source.take() else { return };
                let Some((outcome, cause)) = run.decider.outcome() else { return };
                *self.outcomes.entry(outcome.to_string()).or_default() += 1;
                let cause = cause.clone();
                self.note(|| format!("source at {host}: {outcome}, {cause}"));
            }
            Role::Target => {
                let Some(run) = daemon.target.take() else { return };
                let outcome = run.decider.outcome().cloned();
                for (asker, id) in run.answers {
                    let held = !matches!(outcome, Some(TargetOutcome::Nothing(_)));
                    self.at(100_000, Event::Answered { id, host: asker, held: Some(held) });
                }
                self.hosts[host].label = None;
                self.note(|| format!("target at {host}: {outcome:?}"));
            }
        }
    }

    pub(crate) fn step(&mut self, host: usize, role: Role) {
        self.steps += 1;
        if let Some((step, fault)) = self.strike_at
            && step == self.steps
        {
            self.strike(fault);
            if self.hosts[host].daemon.is_none() {
                return;
            }
        }
        match role {
            Role::Source => self.step_source(host),
            Role::Target => self.step_target(host),
        }
        self.go_on(host, role);
    }

    pub(crate) fn step_source(&mut self, host: usize) {
        let Some(run) = source_of(&mut self.hosts[host]) else { return };
        if let Some(action) = run.work.pop_front() {
            let event = self.act_source(host, action);
            if let (Some(event), Some(run)) = (event, source_of(&mut self.hosts[host])) {
                run.inbox.push_front(event);
                // What an action brought counts before anything else does.
                self.take_source(host);
            }
        } else {
            self.take_source(host);
        }
    }

    pub(crate) fn take_source(&mut self, host: usize) {
        let Some(run) = source_of(&mut self.hosts[host]) else { return };
        let Some(event) = run.inbox.pop_front() else { return };
        let before = self.trace.then(|| format!("{:?} + {event:?}", run.decider.state));
        let (decider, actions) = run.decider.clone().step(event);
        run.work.extend(actions);
        let after = self.trace.then(|| format!("{:?} {:?}", decider.state, run.work));
        run.decider = decider;
        self.note(|| format!("source at {host}: {} -> {}", before.unwrap(), after.unwrap()));
    }

    pub(crate) fn step_target(&mut self, host: usize) {
        let Some(run) = target_of(&mut self.hosts[host]) else { return };
        if let Some(action) = run.work.pop_front() {
            let event = self.act_target(host, action);
            if let (Some(event), Some(run)) = (event, target_of(&mut self.hosts[host])) {
                run.inbox.push_front(event);
                self.take_target(host);
            }
        } else {
            self.take_target(host);
        }
    }

    pub(crate) fn take_target(&mut self, host: usize) {
        let Some(run) = target_of(&mut self.hosts[host]) else { return };
        let Some(event) = run.inbox.pop_front() else { return };
        let before = self.trace.then(|| format!("{:?} + {event:?}", run.decider.state));
        let (decider, actions) = run.decider.clone().step(event);
        run.work.extend(actions);
        let after = self.trace.then(|| format!("{:?} {:?}", decider.state, run.work));
        run.decider = decider;
        self.note(|| format!("target at {host}: {} -> {}", before.unwrap(), after.unwrap()));
    }

    pub(crate) fn act_source(&mut self, host: usize, action: source::Action) -> Option<SourceEvent> {
        use source::Action as Do;
        let machine = self.hosts[host].vmm.as_ref().map(SimVmm::handle);
        let gone = || Some(SourceEvent::MachineGone("killed".into()));
        let run = source_of(&mut self.hosts[host])?;
        let connection = run.connection;
        match action {
            Do::Prepare => {
                let ticket = run.ticket.clone();
                let to = self.index(&ticket.target);
                let connection = self.connect(host, to);
                source_of(&mut self.hosts[host])?.connection = connection;
                self.send(connection, host, Message::Prepare(ticket));
                None
            }
            Do::Say(message) => {
                self.send(connection, host, Message::Say(message));
                None
            }
            Do::Swap(change) => self.ask(host, Role::Source, Ask::Swap(change)),
            Do::Read => self.ask(host, Role::Source, Ask::Read),
            Do::SendRound => {
                let Some(mut machine) = machine else { return gone() };
                let memory = machine.memory();
                let pages = match run.dirty.take() {
                    Some(dirty) => dirty,
                    None => {
                        let Ok(mut pages) = machine.harvest() else { return gone() };
                        pages.union(&run.sender.as_mut().expect("ready before a round").due(&*memory));
                        pages
                    }
                };
                if connection.is_none() {
                    return Some(SourceEvent::RoundFailed(Cause::LinkLost("cut".into())));
                }
                run.waiting = Waiting::Ack;
                let round = encode(run, &*memory, &pages);
                self.send(connection, host, Message::Round(round));
                None
            }
            Do::Pause => match machine.map(|mut machine| machine.pause(PauseCause::Switch)) {
                Some(Ok(paused)) => {
                    run.dirty.get_or_insert_with(|| PageSet::empty(GEOMETRY.pages())).union(&paused.dirty);
                    run.paused = Some((paused, self.now));
                    Some(SourceEvent::Paused)
                }
                _ => gone(),
            },
            Do::Offer => {
                let (Some(machine), Some((paused, at))) = (machine, run.paused.clone()) else {
                    return gone();
                };
                let dirty = run.dirty.take().unwrap_or_else(|| PageSet::empty(GEOMETRY.pages()));
                if connection.is_none() {
                    return Some(SourceEvent::NotOffered(Cause::LinkLost("cut".into())));
                }
                let offer = Offer {
                    pages: encode(run, &*machine.memory(), &dirty),
                    state: paused.state,
                    paused_at: at,
                    contents: machine.vmm().contents(),
                    blocks: machine.vmm().disk().blocks(),
                };
                self.send(connection, host, Message::Switch(Box::new(offer)));
                Some(SourceEvent::OfferMade)
            }
            Do::Resume => match machine.map(|mut machine| machine.resume()) {
                Some(Ok(())) => Some(SourceEvent::Resumed),
                _ => gone(),
            },
            Do::Release => {
                if let Some(mut machine) = machine {
                    match machine.release() {
                        Ok(()) | Err(kage_machine::MachineError::Gone(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                Some(SourceEvent::ReleaseStored)
            }
            Do::Inquire { released } => {
                let ticket = run.ticket.clone();
                self.serial += 1;
                let id = self.serial;
                run.waiting = Waiting::Reply(id);
                let to = self.index(&ticket.target);
                let delay = self.delay();
                self.at(delay, Event::Asked { id, from: host, to, ticket, released });
                self.at(ANSWER, Event::Answered { id, host, held: None });
                None
            }
            Do::Drain => Some(SourceEvent::Drained),
            Do::EndMachine => {
                self.end_vm(host);
                None
            }
            Do::Restart => {
                self.end_vm(host);
                self.start(host);
                None
            }
            Do::FlipRoute | Do::ReportInDoubt(_) => None,
        }
    }

    pub(crate) fn act_target(&mut self, host: usize, action: target::Action) -> Option<TargetEvent> {
        use target::Action as Do;
        let machine = self.hosts[host].vmm.as_ref().map(SimVmm::handle);
        let run = target_of(&mut self.hosts[host])?;
        let connection = run.connection;
        match action {
            Do::MakeShell => {
                let ticket = run.ticket.clone();
                let spec = self.spec();
                let (disk, clock) = (self.hosts[host].disk.clone(), self.host_clock(host));
                let vmm = SimVmm::shell_on(disk, spec, clock, self.outside.clone());
                target_of(&mut self.hosts[host])?.receiver = Some(Receiver::new(vmm.handle().memory()));
                self.hosts[host].vmm = Some(vmm);
                self.hosts[host].label = Some(ticket);
                Some(TargetEvent::ShellReady)
            }
            Do::Say(message) => {
                let have = match message {
                    ToSource::Ready => run.receiver.as_ref().map(Receiver::have).unwrap_or_default(),
                    ToSource::Failed(_) | ToSource::Started | ToSource::Running => Have::default(),
                };
                self.send(connection, host, Message::Answer(message, have));
                None
            }
            Do::Start => {
                let (Some(offer), Some(mut machine)) = (run.offer.take(), machine) else {
                    return Some(TargetEvent::StartFailed("gone".into()));
                };
                let mut receiver = run.receiver.take().expect("a shell");
                receiver.apply_last(&offer.pages).expect("the last epoch applies");
                let (vmm, source) = (machine.vmm(), run.ticket.source.clone());
                assert!(vmm.contents() == offer.contents || !vmm.is_alive(), "memory differs at the switch");
                let blocks = vmm.disk().blocks();
                assert_eq!(digests(&blocks), digests(&offer.blocks), "the disk differs at the switch");
                self.check_missing(host);
                self.check_missing(self.index(&source));
                let paused_at = HostInstant { ns: offer.paused_at + offset(host) };
                match machine.restore(&offer.state, paused_at).and_then(|()| machine.run_gated()) {
                    Ok(_) => Some(TargetEvent::Started),
                    Err(error) => Some(TargetEvent::StartFailed(error.to_string())),
                }
            }
            Do::OpenGate => match machine.map(|mut machine| machine.open_gate()) {
                Some(Ok(())) => {
                    let ticket = run.ticket.clone();
                    self.hosts[host].ran = Some(ticket);
                    Some(TargetEvent::Opened)
                }
                _ => Some(TargetEvent::MachineGone("killed".into())),
            },
            Do::Swap(change) => self.ask(host, Role::Target, Ask::Swap(change)).map(|_| unreachable!()),
            Do::Read => self.ask(host, Role::Target, Ask::Read).map(|_| unreachable!()),
            Do::Answer { held } => {
                if let Some((asker, id)) = run.answers.pop_front() {
                    if !held {
                        let term = run.ticket.term;
                        self.refuse_term(host, term);
                    }
                    let delay = self.delay();
                    self.at(delay, Event::Answered { id, host: asker, held: Some(held) });
                }
                None
            }
            Do::EndMachine => {
                self.end_vm(host);
                None
            }
            Do::Restart => {
                self.end_vm(host);
                self.start(host);
                None
            }
            Do::ReportInDoubt(_) => None,
        }
    }

    pub(crate) fn refuse_term(&mut self, host: usize, term: Term) {
        if let Some(daemon) = &mut self.hosts[host].daemon {
            daemon.refused = daemon.refused.max(Some(term));
        }
    }
}

/// A round as it travels: those pages as they are now.
fn encode(run: &mut AsSource, memory: &dyn kage_machine::Memory, pages: &PageSet) -> Vec<u8> {
    run.epoch.0 += 1;
    let sender = run.sender.as_mut().expect("ready before a round");
    sender.encode_last(memory, pages, run.epoch, CAP).expect("a round fits").bytes
}

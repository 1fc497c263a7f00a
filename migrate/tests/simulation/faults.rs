//! Supervision, moves, and what strikes them.

use super::*;

impl Sim {
    pub(crate) fn supervise(&mut self, host: usize) {
        let incarnation = match &self.hosts[host].daemon {
            Some(daemon) => daemon.incarnation,
            None => return,
        };
        self.at(100 * MS, Event::Supervise { host, incarnation });
        let Some(daemon) = &self.hosts[host].daemon else { return };
        if daemon.source.is_some() || daemon.target.is_some() {
            return;
        }
        let answered = self.directory_up && (self.faults_over || !self.random.chance(2));
        let (me, user, record) = (self.hosts[host].name.clone(), user(), self.record.clone());
        let found = self.found(host);
        let label = self.hosts[host].label.clone().filter(|_| found == Found::Gated);
        let ran = self.hosts[host].ran.clone().filter(|_| answered && found == Found::None);
        if let Some(ran) = ran
            && let Some(change) = ran_here(&me, &record, &ran)
        {
            self.record = change.apply(&record, &ran);
            self.revision += 1;
            return self.note(|| format!("host {host} claims what ran here"));
        }
        let scene = Scene {
            me: &me,
            user: &user,
            found,
            label: label.as_ref(),
            record: if answered { Ok(Some(&record)) } else { Err(()) },
        };
        let verdict = recover(&scene);
        if found == Found::Running && record.owner == me {
            self.check_missing(host);
            if self.random.chance(30) {
                self.pull(host);
            }
        }
        if !matches!(verdict, Recovery::Nothing | Recovery::Keep | Recovery::Wait) {
            self.note(|| format!("host {host} finds {found:?}: {verdict:?}"));
        }
        let now = self.now;
        match verdict {
            Recovery::Nothing | Recovery::Keep | Recovery::Wait => {}
            Recovery::Run => {
                let Some(mut machine) = self.hosts[host].vmm.as_ref().map(SimVmm::handle) else { return };
                let done = if found == Found::Paused { machine.resume() } else { machine.open_gate() };
                done.unwrap();
            }
            Recovery::Start => {
                self.record.term = self.record.term.next();
                self.revision += 1;
                self.end_vm(host);
                self.start(host);
            }
            Recovery::End => self.end_vm(host),
            Recovery::Source(ticket, source, actions) => {
                self.current = [host, self.index(&ticket.target)];
                let run = AsSource::new(ticket, source, actions, now);
                if let Some(daemon) = &mut self.hosts[host].daemon {
                    daemon.source = Some(run);
                }
                self.go_on(host, Role::Source);
            }
            Recovery::Target(ticket, target, actions) => {
                let run = AsTarget::new(ticket, target, actions, now);
                if let Some(daemon) = &mut self.hosts[host].daemon {
                    daemon.target = Some(run);
                }
                self.go_on(host, Role::Target);
            }
        }
    }

    pub(crate) fn begin_move(&mut self) {
        let delay = 5 * MS + self.random.below(50 * MS);
        if self.moves_left == 0 {
            return;
        }
        self.at(delay, Event::Move);
        let owner = self.index(&self.record.owner.clone());
        let idle = self.hosts[owner]
            .daemon
            .as_ref()
            .is_some_and(|daemon| daemon.source.is_none() && daemon.target.is_none());
        if !idle || self.found(owner) != Found::Running || !self.directory_up {
            return;
        }
        let to = (owner + 1 + self.random.below(HOSTS as u64 - 1) as usize) % HOSTS;
        // A host still busy with the move before refuses; undisturbed, it is given the time.
        let busy = |daemon: &Daemon| daemon.source.is_some() || daemon.target.is_some();
        if self.faults_over && self.hosts[to].daemon.as_ref().is_none_or(busy) {
            return;
        }
        self.moves_left -= 1;
        self.current = [owner, to];
        self.handover += 1;
        let ticket = Ticket {
            user: user(),
            term: self.record.term,
            handover: HandoverId(self.handover.to_be_bytes()),
            source: self.hosts[owner].name.clone(),
            target: self.hosts[to].name.clone(),
        };
        let goal = Goal {
            blackout: Duration::from_millis(10),
            timeout: Duration::from_nanos(DEADLINE),
            stubborn: Stubborn::Switch,
        };
        self.note(|| format!("move {owner} -> {to}"));
        let (source, actions) = Source::begin(goal);
        let run = AsSource::new(ticket, source, actions, self.now);
        if let Some(daemon) = &mut self.hosts[owner].daemon {
            daemon.source = Some(run);
        }
        self.go_on(owner, Role::Source);
    }

    pub(crate) fn strike(&mut self, fault: Fault) {
        let [source, target] = self.current;
        self.note(|| format!("strike: {fault:?}"));
        match fault {
            Fault::SourceDaemon => self.crash(source),
            Fault::TargetDaemon => self.crash(target),
            Fault::BothDaemons => {
                self.crash(source);
                self.crash(target);
            }
            Fault::SourceVm => self.kill(source),
            Fault::TargetVm => self.kill(target),
            Fault::SourceVmAndDaemon => {
                self.kill(source);
                self.crash(source);
            }
            Fault::Link => (0..self.connections.len()).for_each(|id| self.cut(id, true)),
            Fault::Partition => {
                (0..self.connections.len()).for_each(|id| self.cut(id, false));
                self.partitioned = true;
                let heals = self.random.below(4_000 * MS);
                self.at(heals, Event::Heal);
            }
            Fault::Directory => {
                self.directory_up = false;
                let back = self.random.below(3_000 * MS);
                self.at(back, Event::DirectoryUp);
            }
        }
    }

    pub(crate) fn crash(&mut self, host: usize) {
        if self.hosts[host].daemon.take().is_some() {
            self.cut_all_of(host);
            let back = self.random.below(1_500 * MS);
            self.at(back, Event::Restart(host));
        }
    }

    pub(crate) fn kill(&mut self, host: usize) {
        if let Some(vmm) = &self.hosts[host].vmm {
            if matches!(vmm.phase(), Some(phase) if !matches!(phase, Phase::Shell | Phase::Released)) {
                self.vm_died = true;
            }
            vmm.kill();
        }
    }
}

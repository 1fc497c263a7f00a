//! Which steps a state allows, and what each leads to.

use super::*;

impl State {
    pub(super) fn steps(&self, steps: &mut Vec<Step>) {
        let faulty = self.faults > 0;
        for host in [A, B] {
            let Some(daemon) = &self.daemons[host] else {
                steps.push(Step::RestartDaemon(host));
                continue;
            };
            match daemon.work.first() {
                Some(work) => self.work_steps(host, work, steps),
                None => {
                    if !self.inbox[host].is_empty() {
                        steps.push(Step::Deliver(host));
                    }
                    self.waiting_steps(host, daemon, steps);
                }
            }
            if faulty {
                steps.push(Step::Crash(host));
            }
        }
        for host in [A, B] {
            if faulty && self.vms[host] != Vm::None {
                steps.push(Step::KillVm(host));
            }
        }
        steps.extend(self.late.iter().map(|swap| Step::ApplyLate(*swap)));
        if !self.directory_up {
            steps.push(Step::DirectoryUp);
        } else if faulty {
            steps.push(Step::DirectoryDown);
        }
        if faulty && self.linked {
            steps.push(Step::Cut);
        }
        // Whoever asks waits a while at most.
        if self.asking {
            steps.push(Step::InquiryLost);
        }
    }

    fn work_steps(&self, host: usize, work: &Work, steps: &mut Vec<Step>) {
        steps.push(Step::Work(host, Way::Well));
        if self.faults == 0 {
            return;
        }
        let swaps = matches!(
            work,
            Work::Source(source::Action::Swap(_)) | Work::Target(target::Action::Swap(_)) | Work::Start
        );
        if swaps && self.directory_up {
            steps.extend([Way::Lost, Way::Unanswered, Way::Late].map(|way| Step::Work(host, way)));
        }
        match work {
            Work::Source(source::Action::Read) | Work::Target(target::Action::Read) if self.directory_up => {
                steps.push(Step::Work(host, Way::Lost));
            }
            Work::Target(target::Action::MakeShell | target::Action::Start) => {
                steps.push(Step::Work(host, Way::Refused));
            }
            _ => {}
        }
    }

    fn waiting_steps(&self, host: usize, daemon: &Daemon, steps: &mut Vec<Step>) {
        let mut waits = None;
        let mut listens = false;
        if let Some(source) = &daemon.source {
            waits = Some(source.patience());
            listens |= source.listens() || matches!(source.state, SourceState::Converging(_));
        }
        if let Some(target) = daemon.target.as_ref().filter(|_| host == B) {
            waits = Some(target.patience());
            listens |= target.listens();
            let watched = matches!(
                target.state,
                TargetState::Mirroring
                    | TargetState::Ready
                    | TargetState::Gated
                    | TargetState::Claiming { alive: true }
                    | TargetState::Running
            );
            if watched && self.vms[B] == Vm::None {
                steps.push(Step::Notice(B));
            }
        }
        if matches!(waits, Some(Patience::Deadline | Patience::Switch | Patience::Poll)) && !self.asking {
            steps.push(Step::Timeout(host));
        }
        if listens && !self.linked {
            steps.push(Step::LinkLost(host));
        }
        if self.idle(host) {
            steps.push(Step::Supervise(host, true));
            if self.faults > 0 && self.directory_up {
                steps.push(Step::Supervise(host, false));
            }
        }
    }

    pub(super) fn after(&self, step: &Step) -> Self {
        let mut next = self.clone();
        if step.is_fault() {
            next.faults -= 1;
        }
        match step {
            Step::Work(host, way) => next.work(*host, *way),
            Step::Deliver(host) => next.deliver(*host),
            Step::LinkLost(host) => {
                next.inbox[*host].clear();
                if *host == A {
                    next.source(SourceEvent::LinkLost(String::new()));
                } else {
                    next.target(TargetEvent::LinkLost(String::new()));
                }
            }
            Step::Timeout(host) if *host == A => next.source(SourceEvent::Timeout),
            Step::Timeout(_) => next.target(TargetEvent::Timeout),
            Step::Supervise(host, answered) => next.supervise(*host, *answered),
            Step::Notice(_) => next.target(TargetEvent::MachineGone(String::new())),
            Step::ApplyLate(swap) => next.apply(*swap),
            Step::InquiryLost => {
                next.asking = false;
                next.source(SourceEvent::PeerSilent);
            }
            Step::RestartDaemon(host) => next.daemons[*host] = Some(Daemon::default()),
            Step::DirectoryUp => next.directory_up = true,
            Step::DirectoryDown => next.directory_up = false,
            Step::Crash(host) => {
                next.daemons[*host] = None;
                next.inbox[*host].clear();
                next.linked = false;
                if *host == A {
                    next.asking = false;
                }
            }
            Step::KillVm(host) => {
                next.vms[*host] = Vm::None;
                next.vm_died = true;
            }
            Step::Cut => next.linked = false,
        }
        next.tidy();
        next
    }

    /// Forgets what can no longer matter, so that equal situations are equal states.
    fn tidy(&mut self) {
        if !self.linked {
            for host in [A, B] {
                let listens = self.daemons[host].as_ref().is_some_and(|daemon| {
                    let source = daemon.source.as_ref().is_some_and(|source| source.outcome().is_none());
                    let target = daemon.target.as_ref().is_some_and(|target| target.outcome().is_none());
                    source || target || self.inbox[host].first() == Some(&Message::Prepare)
                });
                if !listens {
                    self.inbox[host].clear();
                }
            }
        }
    }
}

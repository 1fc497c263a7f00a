//! The ownership rules, explored exhaustively at small scope with the real deciders.
//!
//! Two hosts, a directory, one handover and everything that may follow it. Faults, at any step, up to a
//! budget: either daemon dies (its machine and control page live on), either machine's process dies, the
//! link is cut, the directory goes away, a swap applies without an answer, is lost, or applies late, an
//! inquiry is not answered, the target cannot start the machine.
//!
//! Checked in every reachable state: never two copies whose output can leave; the record never names
//! another host than the one that emits after a swap; no restart while a copy is alive; no restart at
//! all when no machine's process died. From every reachable state, without further faults, a state can
//! be reached in which exactly one copy emits, its host is the owner, and nothing is left open.

use std::{collections::HashMap, sync::LazyLock, time::Duration};

use kage_directory::{ImageRecord, Profile, Wanted};
use kage_machine::{HandoverId, HostName, ImageNumber, Term, UserName};
use kage_migrate::{
    Cause, Ticket,
    converge::{Goal, Round, Stubborn},
    ownership::{Change, Standing},
    recover::{Found, Recovery, Scene, recover},
    source::{self, Patience, Source, SourceEvent, SourceState, ToTarget},
    target::{self, Target, TargetEvent, TargetOutcome, TargetState, ToSource},
};
use stateright::{Checker, Model, Property};

const A: usize = 0;
const B: usize = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Vm {
    None,
    Shell,
    Gated,
    Running,
    Paused,
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Record {
    revision: u8,
    term: u8,
    owner: usize,
    announced: bool,
}

/// A swap as the directory receives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Swap {
    Announce,
    Clear,
    TakeBack,
    Claim,
    Start(usize),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Work {
    Source(source::Action),
    Target(target::Action),
    /// Swap to the next term, then start anew.
    Start,
    /// Run what is paused or gated here.
    Run,
    End,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Daemon {
    source: Option<Source>,
    target: Option<Target>,
    work: Vec<Work>,
    /// The revision its driver has read; a run begins without one.
    seen: Option<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Message {
    Prepare,
    Copy,
    Offer,
    Say(ToTarget),
    Ack,
    Answer(ToSource),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    record: Record,
    directory_up: bool,
    /// Swaps without an answer that may still apply; all expect the current revision.
    late: Vec<Swap>,
    daemons: [Option<Daemon>; 2],
    vms: [Vm; 2],
    linked: bool,
    inbox: [Vec<Message>; 2],
    /// Whether A waits for the answer to an inquiry.
    asking: bool,
    faults: u8,
    vm_died: bool,
    restarted: bool,
    restarted_over_a_copy: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// Execute the next piece of work, in one of the ways it can go.
    Work(usize, Way),
    Deliver(usize),
    LinkLost(usize),
    Timeout(usize),
    Supervise(usize, bool),
    Notice(usize),
    ApplyLate(Swap),
    InquiryLost,
    RestartDaemon(usize),
    DirectoryUp,
    Crash(usize),
    KillVm(usize),
    Cut,
    DirectoryDown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Way {
    Well,
    /// Swap or read: lost on the way there.
    Lost,
    /// Swap: applied, its answer lost.
    Unanswered,
    /// Swap: no answer; applies later.
    Late,
    /// Start or shell: refused.
    Refused,
}

impl Step {
    fn is_fault(&self) -> bool {
        match self {
            Self::Work(_, way) => *way != Way::Well,
            Self::Supervise(_, answered) => !answered,
            Self::Crash(_) | Self::KillVm(_) | Self::Cut | Self::DirectoryDown => true,
            _ => false,
        }
    }
}

struct Handover {
    faults: u8,
}

static HOSTS: LazyLock<[HostName; 2]> = LazyLock::new(|| ["a".parse().unwrap(), "b".parse().unwrap()]);
static USER: LazyLock<UserName> = LazyLock::new(|| "alice".parse().unwrap());
static TICKET: LazyLock<Ticket> = LazyLock::new(|| Ticket {
    user: USER.clone(),
    term: Term(0),
    handover: HandoverId([1; 16]),
    source: HOSTS[A].clone(),
    target: HOSTS[B].clone(),
});

impl Record {
    fn full(self) -> ImageRecord {
        let plain = ImageRecord {
            term: Term(self.term.into()),
            owner: HOSTS[self.owner].clone(),
            intent: None,
            backup: None,
            wanted: Wanted::Running,
            number: ImageNumber(1),
            profile: Profile {
                image: String::new(),
                memory_bytes: 0,
                disk_bytes: 0,
                host_key_seed: [0; 32],
                authorized_keys: vec![],
            },
        };
        if self.announced { Change::Announce.apply(&plain, &TICKET) } else { plain }
    }

    fn standing(self) -> Standing {
        Standing::of(Some(&self.full()), &TICKET)
    }

    /// Applies a swap through the real change.
    fn apply(&mut self, swap: Swap) {
        let change = match swap {
            Swap::Announce => Change::Announce,
            Swap::Clear => Change::Clear,
            Swap::TakeBack => Change::TakeBack,
            Swap::Claim => Change::Claim,
            Swap::Start(_) => {
                self.term += 1;
                self.revision += 1;
                self.announced = false;
                return;
            }
        };
        let next = change.apply(&self.full(), &TICKET);
        self.term = next.term.0 as u8;
        self.owner = usize::from(next.owner == HOSTS[B]);
        self.announced = next.intent.is_some();
        self.revision += 1;
    }
}

fn swap_of(change: Change) -> Swap {
    match change {
        Change::Announce => Swap::Announce,
        Change::Clear => Swap::Clear,
        Change::TakeBack => Swap::TakeBack,
        Change::Claim => Swap::Claim,
    }
}

/// What the directory answered.
enum Told {
    Swapped,
    Record,
    Away,
}

impl State {
    fn swap(&mut self, host: usize, swap: Swap, way: Way) -> Told {
        if !self.directory_up {
            return Told::Away;
        }
        let expected = self.daemons[host].as_ref().and_then(|daemon| daemon.seen);
        let fits = expected == Some(self.record.revision);
        match way {
            Way::Lost | Way::Refused => Told::Away,
            Way::Well if !fits => {
                self.see(host);
                Told::Record
            }
            Way::Well => {
                self.apply(swap);
                self.see(host);
                Told::Swapped
            }
            Way::Unanswered => {
                if fits {
                    self.apply(swap);
                }
                Told::Away
            }
            Way::Late => {
                if fits && !self.late.contains(&swap) {
                    self.late.push(swap);
                    self.late.sort_unstable();
                }
                Told::Away
            }
        }
    }

    fn apply(&mut self, swap: Swap) {
        self.record.apply(swap);
        self.late.clear();
    }

    fn see(&mut self, host: usize) {
        let revision = self.record.revision;
        if let Some(daemon) = &mut self.daemons[host] {
            daemon.seen = Some(revision);
        }
    }

    fn source(&mut self, event: SourceEvent) {
        let Some(daemon) = &mut self.daemons[A] else { return };
        let Some(source) = daemon.source.take() else { return };
        let (source, actions) = source.step(event);
        daemon.source = Some(source);
        daemon.work.extend(actions.into_iter().map(Work::Source));
    }

    fn target(&mut self, event: TargetEvent) {
        let Some(daemon) = &mut self.daemons[B] else { return };
        let Some(target) = daemon.target.take() else { return };
        let (target, actions) = target.step(event);
        daemon.target = Some(target);
        daemon.work.extend(actions.into_iter().map(Work::Target));
    }

    fn send(&mut self, to: usize, message: Message) {
        if self.linked && self.daemons[to].is_some() {
            self.inbox[to].push(message);
        }
    }

    fn start_anew(&mut self, host: usize) {
        let alive = |vm: Vm| matches!(vm, Vm::Gated | Vm::Running | Vm::Paused);
        self.restarted = true;
        // A gated copy that has lost its claim may still wait to learn so; it can never emit.
        let emits_or_may = |vm: Vm| vm == Vm::Running || alive(vm) && host == A && self.record.owner != A;
        self.restarted_over_a_copy |= alive(self.vms[host]) || emits_or_may(self.vms[1 - host]);
        self.vms[host] = Vm::Running;
    }

    fn do_source(&mut self, action: source::Action, way: Way) {
        use source::Action as Do;
        match action {
            Do::Prepare => self.send(B, Message::Prepare),
            Do::Say(message) => self.send(B, Message::Say(message)),
            Do::Swap(change) => {
                let event = match self.swap(A, swap_of(change), way) {
                    Told::Swapped => SourceEvent::Swapped,
                    Told::Record => SourceEvent::Record(self.record.standing()),
                    Told::Away => SourceEvent::DirectoryAway(String::new()),
                };
                self.source(event);
            }
            Do::Read => {
                let event = if way == Way::Well && self.directory_up {
                    self.see(A);
                    SourceEvent::Record(self.record.standing())
                } else {
                    SourceEvent::DirectoryAway(String::new())
                };
                self.source(event);
            }
            Do::SendRound => match self.vms[A] {
                Vm::None => self.source(SourceEvent::MachineGone(String::new())),
                _ if self.linked => self.send(B, Message::Copy),
                _ => self.source(SourceEvent::RoundFailed(Cause::LinkLost(String::new()))),
            },
            Do::Pause => {
                let event = if self.vms[A] == Vm::None {
                    SourceEvent::MachineGone(String::new())
                } else {
                    self.vms[A] = Vm::Paused;
                    SourceEvent::Paused
                };
                self.source(event);
            }
            Do::Offer => {
                let event = if self.linked {
                    self.send(B, Message::Offer);
                    SourceEvent::OfferMade
                } else {
                    SourceEvent::NotOffered(String::new())
                };
                self.source(event);
            }
            Do::Resume => {
                let event = if self.vms[A] == Vm::Paused {
                    self.vms[A] = Vm::Running;
                    SourceEvent::Resumed
                } else {
                    SourceEvent::MachineGone(String::new())
                };
                self.source(event);
            }
            Do::Release => {
                if self.vms[A] == Vm::Paused {
                    self.vms[A] = Vm::Released;
                }
                self.source(SourceEvent::ReleaseStored);
            }
            Do::Inquire { released } => {
                self.asking = true;
                let held = !matches!(self.vms[B], Vm::None | Vm::Shell);
                let answering = |work: &Work| matches!(work, Work::Target(target::Action::Answer { .. }));
                match &self.daemons[B] {
                    // Still busy with an inquiry that A no longer waits for.
                    Some(daemon) if daemon.work.iter().any(answering) => {
                        self.asking = false;
                        self.source(SourceEvent::PeerSilent);
                    }
                    None => {
                        self.asking = false;
                        self.source(SourceEvent::PeerSilent);
                    }
                    Some(daemon) if daemon.target.is_some() => {
                        self.target(TargetEvent::Inquired { released });
                    }
                    Some(_) => {
                        self.asking = false;
                        self.source(if held {
                            SourceEvent::PeerHolds
                        } else {
                            SourceEvent::PeerHoldsNothing
                        });
                    }
                }
            }
            Do::Drain => self.source(SourceEvent::Drained),
            Do::EndMachine => self.vms[A] = Vm::None,
            Do::Restart => self.start_anew(A),
            Do::FlipRoute | Do::ReportInDoubt(_) => {}
        }
    }

    fn do_target(&mut self, action: target::Action, way: Way) {
        use target::Action as Do;
        match action {
            Do::MakeShell => {
                let event = if way == Way::Refused || self.vms[B] != Vm::None {
                    TargetEvent::ShellRefused(String::new())
                } else {
                    self.vms[B] = Vm::Shell;
                    TargetEvent::ShellReady
                };
                self.target(event);
            }
            Do::Say(message) => self.send(A, Message::Answer(message)),
            Do::Start => {
                let event = match (way, self.vms[B]) {
                    (Way::Well, Vm::Shell) => {
                        self.vms[B] = Vm::Gated;
                        TargetEvent::Started
                    }
                    _ => TargetEvent::StartFailed(String::new()),
                };
                self.target(event);
            }
            Do::OpenGate => {
                let event = if self.vms[B] == Vm::Gated {
                    self.vms[B] = Vm::Running;
                    TargetEvent::Opened
                } else {
                    TargetEvent::MachineGone(String::new())
                };
                self.target(event);
            }
            Do::Swap(change) => {
                let event = match self.swap(B, swap_of(change), way) {
                    Told::Swapped => TargetEvent::Swapped,
                    Told::Record => TargetEvent::Record(self.record.standing()),
                    Told::Away => TargetEvent::DirectoryAway(String::new()),
                };
                self.target(event);
            }
            Do::Read => {
                let event = if way == Way::Well && self.directory_up {
                    self.see(B);
                    TargetEvent::Record(self.record.standing())
                } else {
                    TargetEvent::DirectoryAway(String::new())
                };
                self.target(event);
            }
            Do::Answer { held } => {
                if std::mem::take(&mut self.asking) {
                    self.source(if held { SourceEvent::PeerHolds } else { SourceEvent::PeerHoldsNothing });
                }
            }
            Do::EndMachine => self.vms[B] = Vm::None,
            Do::Restart => self.start_anew(B),
            Do::ReportInDoubt(_) => {}
        }
    }

    fn work(&mut self, host: usize, way: Way) {
        let Some(daemon) = &mut self.daemons[host] else { return };
        if daemon.work.is_empty() {
            return;
        }
        match daemon.work.remove(0) {
            Work::Source(action) => self.do_source(action, way),
            Work::Target(action) => self.do_target(action, way),
            Work::Start => {
                if matches!(self.swap(host, Swap::Start(host), way), Told::Swapped) {
                    self.vms[host] = Vm::None;
                    self.start_anew(host);
                }
            }
            Work::Run => {
                if matches!(self.vms[host], Vm::Paused | Vm::Gated) {
                    self.vms[host] = Vm::Running;
                }
            }
            Work::End => self.vms[host] = Vm::None,
        }
    }

    fn deliver(&mut self, host: usize) {
        let message = self.inbox[host].remove(0);
        match message {
            Message::Prepare => {
                let held = self.vms[B] != Vm::None;
                let (target, actions) = if held { Target::refuse(String::new()) } else { Target::begin() };
                if let Some(daemon) = &mut self.daemons[B] {
                    daemon.target = Some(target);
                    daemon.seen = None;
                    daemon.work.extend(actions.into_iter().map(Work::Target));
                }
            }
            Message::Copy => {
                self.target(TargetEvent::CopyHeld);
                self.send(A, Message::Ack);
            }
            Message::Offer => self.target(TargetEvent::Offered),
            Message::Say(ToTarget::Cancel) => self.target(TargetEvent::Cancelled),
            Message::Say(ToTarget::Released) => self.target(TargetEvent::Released),
            Message::Ack => self.source(SourceEvent::RoundSent(Round::default())),
            Message::Answer(ToSource::Ready) => self.source(SourceEvent::TargetReady),
            Message::Answer(ToSource::Failed(why)) => {
                self.source(SourceEvent::TargetFailed(Cause::TargetFailed(why)));
            }
            Message::Answer(ToSource::Started) => self.source(SourceEvent::TargetStarted),
            Message::Answer(ToSource::Running) => self.source(SourceEvent::TargetRunning),
        }
    }

    fn supervise(&mut self, host: usize, answered: bool) {
        let full = self.record.full();
        let found = match self.vms[host] {
            Vm::None => Found::None,
            Vm::Shell => Found::Shell,
            Vm::Gated => Found::Gated,
            Vm::Running => Found::Running,
            Vm::Paused => Found::Paused,
            Vm::Released => Found::Released,
        };
        let answered = answered && self.directory_up;
        let recovery = recover(&Scene {
            me: &HOSTS[host],
            user: &USER,
            found,
            label: (host == B).then_some(&*TICKET),
            record: if answered { Ok(Some(&full)) } else { Err(()) },
        });
        if answered {
            self.see(host);
        }
        let Some(daemon) = &mut self.daemons[host] else { return };
        match recovery {
            Recovery::Nothing | Recovery::Keep | Recovery::Wait => {}
            Recovery::Run => daemon.work.push(Work::Run),
            Recovery::Start => daemon.work.push(Work::Start),
            Recovery::End => daemon.work.push(Work::End),
            Recovery::Source(_, source, actions) => {
                daemon.source = Some(source);
                daemon.seen = None;
                daemon.work.extend(actions.into_iter().map(Work::Source));
            }
            Recovery::Target(_, target, actions) => {
                daemon.target = Some(target);
                daemon.seen = None;
                daemon.work.extend(actions.into_iter().map(Work::Target));
            }
        }
    }

    fn idle(&self, host: usize) -> bool {
        self.daemons[host].as_ref().is_some_and(|daemon| {
            daemon.work.is_empty()
                && daemon.source.as_ref().is_none_or(|source| source.outcome().is_some())
                && daemon.target.as_ref().is_none_or(|target| target.outcome().is_some())
        })
    }

    fn emitters(&self) -> usize {
        self.vms.iter().filter(|vm| **vm == Vm::Running).count()
    }

    fn settled(&self) -> bool {
        self.emitters() == 1
            && self.vms[self.record.owner] == Vm::Running
            && self.vms[1 - self.record.owner] == Vm::None
            && !self.record.announced
            && self.idle(A)
            && self.idle(B)
    }

    fn steps(&self, steps: &mut Vec<Step>) {
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

    fn after(&self, step: &Step) -> Self {
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

impl Model for Handover {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let goal = Goal {
            blackout: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            stubborn: Stubborn::Keep,
        };
        let (source, actions) = Source::begin(goal);
        let daemon = Daemon {
            source: Some(source),
            work: actions.into_iter().map(Work::Source).collect(),
            ..Daemon::default()
        };
        vec![State {
            record: Record { revision: 0, term: 0, owner: A, announced: false },
            directory_up: true,
            late: vec![],
            daemons: [Some(daemon), Some(Daemon::default())],
            vms: [Vm::Running, Vm::None],
            linked: true,
            inbox: [vec![], vec![]],
            asking: false,
            faults: self.faults,
            vm_died: false,
            restarted: false,
            restarted_over_a_copy: false,
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        state.steps(steps);
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let next = state.after(&step);
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two copies emit", |_, state: &State| state.emitters() <= 1),
            Property::always(
                "who emits without the record is the one it was released to",
                |_, state: &State| {
                    let a = state.vms[A] != Vm::Running || state.record.owner == A;
                    let b = state.vms[B] != Vm::Running || state.record.owner == B || state.record.announced;
                    a && b
                },
            ),
            Property::always("no copy is replaced while it lives", |_, state: &State| {
                !state.restarted_over_a_copy
            }),
            Property::always("connections die only with a machine", |_, state: &State| {
                !state.restarted || state.vm_died
            }),
            Property::sometimes("handed over", |_, state: &State| {
                state.settled() && state.record.owner == B && state.vms[B] == Vm::Running
            }),
            Property::sometimes("taken back", |_, state: &State| {
                state.settled() && state.record.owner == A && state.record.term == 2 && !state.restarted
            }),
            Property::sometimes("claimed without a release", |_, state: &State| {
                state.record.owner == B && state.vms[A] == Vm::Paused && state.vms[B] == Vm::Running
            }),
            Property::sometimes("restarted at the target", |_, state: &State| {
                let restarted = |target: &Target| {
                    matches!(target.state, TargetState::Finished(TargetOutcome::Restarted(_)))
                };
                state.daemons[B].as_ref().and_then(|daemon| daemon.target.as_ref()).is_some_and(restarted)
            }),
        ]
    }
}

fn budget() -> u8 {
    if cfg!(debug_assertions) { 3 } else { 5 }
}

#[test]
fn never_two_copies_emit_whatever_dies() {
    let checker = Handover { faults: budget() }.checker().threads(2).spawn_dfs().join();
    println!("{} states, {} unique", checker.state_count(), checker.unique_state_count());
    checker.assert_properties();
}

/// Every reachable state leads, without further faults, to one running copy at its owner.
#[test]
fn no_image_stays_silent_once_everything_is_back() {
    let model = Handover { faults: budget().min(4) };
    let mut index: HashMap<State, usize> = HashMap::new();
    let mut states = model.init_states();
    let mut parents: Vec<Vec<usize>> = vec![vec![]];
    index.insert(states[0].clone(), 0);
    let mut steps = Vec::new();
    let mut next = 0;
    while next < states.len() {
        let state = states[next].clone();
        steps.clear();
        model.actions(&state, &mut steps);
        for step in steps.drain(..) {
            let fault = step.is_fault();
            let Some(after) = model.next_state(&state, step) else { continue };
            let id = *index.entry(after).or_insert_with_key(|after| {
                states.push(after.clone());
                parents.push(vec![]);
                states.len() - 1
            });
            if !fault {
                parents[id].push(next);
            }
        }
        next += 1;
    }
    let mut leads: Vec<bool> = states.iter().map(State::settled).collect();
    let mut found: Vec<usize> = (0..states.len()).filter(|id| leads[*id]).collect();
    while let Some(id) = found.pop() {
        for &parent in &parents[id] {
            if !std::mem::replace(&mut leads[parent], true) {
                found.push(parent);
            }
        }
    }
    let stuck = leads.iter().position(|leads| !leads);
    println!("{} states", states.len());
    assert!(stuck.is_none(), "silent for ever: {:#?}", stuck.map(|id| &states[id]));
}

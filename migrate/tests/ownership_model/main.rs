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

mod daemons;
mod steps;

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
            indices: ImageRecord::FIRST_INDICES,
            ipv4: None,
            disk_origin: None,
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

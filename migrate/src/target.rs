//! The target's decider: takes a machine from another host, and settles its right to run it.
//!
//! ```text
//! Preparing ─▶ Mirroring ─▶ Ready ─▶ Starting ─▶ Gated ─▶ Opening ─▶ Running ─▶ Finished(Owner)
//!     │            │          │         │          │ ╲       ▲          (unconfirmed until the
//!     ▼            ▼          ▼         ▼          │  ▼      │           record says (N+1, target))
//!  Finished(Nothing) ◀────────┴─────────┴──────────┘ Claiming
//!          ▲                                            │ source has taken back
//!          └────────────────────────────────────────────┘
//! ```
//!
//! Commit point: the gate opens at the first of the source's `released` and the target's own swap to
//! (N+1, target). No clock decides.
//!
//! Rules the states keep:
//! - "Failed" and "nothing held" are said only after the machine has ended, and never while a claim is
//!   unanswered: they bind.
//! - `Claiming` keeps the gate shut until the directory has answered, or the source releases.
//! - A claim is a swap on the revision at which the record was read with this handover's intent.
//!
//! Pure: no clock, no I/O.

#[cfg(test)]
mod tests;

use crate::{
    outcome::Cause,
    ownership::{Change, Standing},
    source::Patience,
};

/// What the target tells the source.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ToSource {
    /// Shell, tap and layout are there; send pages.
    Ready,
    /// Will not take it or could not start it; holds nothing of it and never will.
    Failed(String),
    /// Runs it with its gate shut.
    Started,
    /// Owns it in the directory.
    Running,
}

/// What the target's driver is to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Make a shell of the announced geometry, with its tap: [`TargetEvent::ShellReady`] or
    /// [`TargetEvent::ShellRefused`].
    MakeShell,
    /// Send a message on the switch link.
    Say(ToSource),
    /// Apply the switch message and run with the gate shut: [`TargetEvent::Started`] or
    /// [`TargetEvent::StartFailed`].
    Start,
    /// Let output leave, set routes, announce: [`TargetEvent::Opened`] or [`TargetEvent::MachineGone`].
    OpenGate,
    /// Swap the record on the revision last read: [`TargetEvent::Swapped`], [`TargetEvent::Record`],
    /// [`TargetEvent::DirectoryAway`].
    Swap(Change),
    /// Read the record.
    Read,
    /// Answer the source's inquiry on its new link.
    Answer {
        /// Whether a copy, or a claim to one, is held.
        held: bool,
    },
    /// End the machine's process.
    EndMachine,
    /// Start the image anew; its swap is done.
    Restart,
    /// Tell the user that it is not settled.
    ReportInDoubt(Cause),
}

/// What the target's driver reports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TargetEvent {
    /// The shell is there.
    ShellReady,
    /// There will be none.
    ShellRefused(String),
    /// The first whole copy of the pages is here.
    CopyHeld,
    /// Pages could not be applied.
    CopyFailed(String),
    /// The switch message is here.
    Offered,
    /// The machine runs, gate shut.
    Started,
    /// It does not.
    StartFailed(String),
    /// Source: the right is yours.
    Released,
    /// Source: nothing was or will be offered.
    Cancelled,
    /// The switch link is of no further use.
    LinkLost(String),
    /// The source asks on a new link what is held.
    Inquired {
        /// And says that the right is the target's.
        released: bool,
    },
    /// The gate is open.
    Opened,
    /// The machine's process is gone.
    MachineGone(String),
    /// The swap applied.
    Swapped,
    /// The record as it is now.
    Record(Standing),
    /// No answer; a swap may or may not have applied.
    DirectoryAway(String),
    /// The state's [`Patience`] is over.
    Timeout,
}

/// How the target's side ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TargetOutcome {
    /// Owns and runs it.
    Owner,
    /// Owns it and starts it anew.
    Restarted(Cause),
    /// Holds nothing.
    Nothing(Cause),
}

/// Where the target stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TargetState {
    /// A shell is being made.
    Preparing,
    /// Pages arrive; no whole copy yet.
    Mirroring,
    /// A whole copy is here and kept fresh.
    Ready,
    /// The state is being restored.
    Starting,
    /// Runs, gate shut; the right is not settled.
    Gated,
    /// As `Gated`; the directory is being asked for (N+1, target).
    Claiming {
        /// Whether its machine still lives.
        alive: bool,
    },
    /// The gate is being opened.
    Opening {
        /// Whether the record says (N+1, target).
        confirmed: bool,
    },
    /// Runs; the record does not say so yet.
    Running,
    /// The right is the target's, but its machine is gone; the record does not say so yet.
    Reviving(Cause),
    /// Over.
    Finished(TargetOutcome),
}

/// The target's side of one handover.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Where it stands.
    pub state: TargetState,
}

type Next = (TargetState, Vec<Action>);

impl Target {
    /// Begins at the source's request.
    #[must_use]
    pub fn begin() -> (Self, Vec<Action>) {
        (Self { state: TargetState::Preparing }, vec![Action::MakeShell])
    }

    /// Refuses the source's request.
    #[must_use]
    pub fn refuse(why: String) -> (Self, Vec<Action>) {
        let cause = Cause::TargetRefused(why.clone());
        let state = TargetState::Finished(TargetOutcome::Nothing(cause));
        (Self { state }, vec![Action::Say(ToSource::Failed(why))])
    }

    /// How long to wait in this state.
    #[must_use]
    pub const fn patience(&self) -> Patience {
        match &self.state {
            TargetState::Mirroring | TargetState::Ready => Patience::Deadline,
            TargetState::Gated => Patience::Switch,
            TargetState::Claiming { .. } | TargetState::Running | TargetState::Reviving(_) => Patience::Poll,
            TargetState::Finished(_) => Patience::Done,
            TargetState::Preparing | TargetState::Starting | TargetState::Opening { .. } => Patience::None,
        }
    }

    /// Whether a lost link matters here; it is reported again in every such state.
    #[must_use]
    pub const fn listens(&self) -> bool {
        matches!(self.state, TargetState::Mirroring | TargetState::Ready | TargetState::Gated)
    }

    /// How it ended, once it has.
    #[must_use]
    pub const fn outcome(&self) -> Option<&TargetOutcome> {
        match &self.state {
            TargetState::Finished(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// Takes one event in.
    #[must_use]
    pub fn step(self, event: TargetEvent) -> (Self, Vec<Action>) {
        let (state, actions) = match self.state {
            TargetState::Preparing => preparing(event),
            TargetState::Mirroring => copying(TargetState::Mirroring, event),
            TargetState::Ready => copying(TargetState::Ready, event),
            TargetState::Starting => starting(event),
            TargetState::Gated => gated(event),
            TargetState::Claiming { alive } => claiming(alive, event),
            TargetState::Opening { confirmed } => opening(confirmed, event),
            TargetState::Running => running(event),
            TargetState::Reviving(cause) => reviving(cause, event),
            TargetState::Finished(outcome) => finished(outcome, event),
        };
        (Self { state }, actions)
    }
}

/// Ends with nothing held.
fn nothing(cause: Cause) -> Next {
    (TargetState::Finished(TargetOutcome::Nothing(cause)), vec![Action::EndMachine])
}

/// Ends with nothing held and says so, which binds: the machine ends first.
fn failed(why: String) -> Next {
    let cause = Cause::TargetFailed(why.clone());
    (
        TargetState::Finished(TargetOutcome::Nothing(cause)),
        vec![Action::EndMachine, Action::Say(ToSource::Failed(why))],
    )
}

fn preparing(event: TargetEvent) -> Next {
    use TargetEvent as E;
    match event {
        E::ShellReady => (TargetState::Mirroring, vec![Action::Say(ToSource::Ready)]),
        E::ShellRefused(why) => (
            TargetState::Finished(TargetOutcome::Nothing(Cause::TargetRefused(why.clone()))),
            vec![Action::Say(ToSource::Failed(why))],
        ),
        E::Inquired { .. } => {
            let (state, mut actions) = nothing(Cause::DaemonRestarted);
            actions.push(Action::Answer { held: false });
            (state, actions)
        }
        // The driver makes the shell at once; a lost link is reported again in the next state.
        E::CopyHeld
        | E::CopyFailed(_)
        | E::Offered
        | E::Started
        | E::StartFailed(_)
        | E::Released
        | E::Cancelled
        | E::LinkLost(_)
        | E::Opened
        | E::MachineGone(_)
        | E::Swapped
        | E::Record(_)
        | E::DirectoryAway(_)
        | E::Timeout => (TargetState::Preparing, vec![]),
    }
}

fn copying(state: TargetState, event: TargetEvent) -> Next {
    use TargetEvent as E;
    match event {
        E::CopyHeld => (TargetState::Ready, vec![]),
        E::CopyFailed(why) => failed(why),
        E::Offered if state == TargetState::Ready => (TargetState::Starting, vec![Action::Start]),
        E::Offered => failed("the switch came before a whole copy".into()),
        E::Cancelled => nothing(Cause::Cancelled),
        E::LinkLost(detail) => nothing(Cause::LinkLost(detail)),
        E::Timeout => nothing(Cause::TimedOut("receiving pages")),
        E::MachineGone(detail) => failed(detail),
        E::Inquired { .. } => {
            let (state, mut actions) = nothing(Cause::DaemonRestarted);
            actions.push(Action::Answer { held: false });
            (state, actions)
        }
        E::ShellReady
        | E::ShellRefused(_)
        | E::Started
        | E::StartFailed(_)
        | E::Released
        | E::Opened
        | E::Swapped
        | E::Record(_)
        | E::DirectoryAway(_) => (state, vec![]),
    }
}

fn starting(event: TargetEvent) -> Next {
    use TargetEvent as E;
    match event {
        E::Started => (TargetState::Gated, vec![Action::Say(ToSource::Started)]),
        E::StartFailed(why) | E::MachineGone(why) => failed(why),
        E::Inquired { .. } => (TargetState::Starting, vec![Action::Answer { held: true }]),
        // The driver starts at once; a lost link is reported again in the next state.
        E::ShellReady
        | E::ShellRefused(_)
        | E::CopyHeld
        | E::CopyFailed(_)
        | E::Offered
        | E::Released
        | E::Cancelled
        | E::LinkLost(_)
        | E::Opened
        | E::Swapped
        | E::Record(_)
        | E::DirectoryAway(_)
        | E::Timeout => (TargetState::Starting, vec![]),
    }
}

fn gated(event: TargetEvent) -> Next {
    use TargetEvent as E;
    let claiming = TargetState::Claiming { alive: true };
    match event {
        E::Released => (TargetState::Opening { confirmed: false }, vec![Action::OpenGate]),
        E::Inquired { released: true } => {
            (TargetState::Opening { confirmed: false }, vec![Action::OpenGate, Action::Answer { held: true }])
        }
        E::Inquired { released: false } => (claiming, vec![Action::Answer { held: true }, Action::Read]),
        E::LinkLost(_) | E::Timeout => (claiming, vec![Action::Read]),
        E::MachineGone(detail) => failed(detail),
        E::ShellReady
        | E::ShellRefused(_)
        | E::CopyHeld
        | E::CopyFailed(_)
        | E::Offered
        | E::Started
        | E::StartFailed(_)
        | E::Cancelled
        | E::Opened
        | E::Swapped
        | E::Record(_)
        | E::DirectoryAway(_) => (TargetState::Gated, vec![]),
    }
}

fn claiming(alive: bool, event: TargetEvent) -> Next {
    use TargetEvent as E;
    let gone = || Cause::MachineGone("while its right was not settled".into());
    match event {
        E::Record(Standing::Announced) => {
            (TargetState::Claiming { alive }, vec![Action::Swap(Change::Claim)])
        }
        E::Swapped | E::Record(Standing::Claimed) if alive => {
            (TargetState::Opening { confirmed: true }, vec![Action::OpenGate])
        }
        E::Swapped | E::Record(Standing::Claimed) => {
            (TargetState::Finished(TargetOutcome::Restarted(gone())), vec![Action::Restart])
        }
        E::Record(Standing::Owned | Standing::TakenBack | Standing::Elsewhere) => {
            nothing(Cause::OwnershipLost)
        }
        E::DirectoryAway(detail) => {
            let doubt = Cause::DirectoryAway(detail);
            (TargetState::Claiming { alive }, vec![Action::ReportInDoubt(doubt)])
        }
        E::Timeout => (TargetState::Claiming { alive }, vec![Action::Read]),
        E::Released if alive => (TargetState::Opening { confirmed: false }, vec![Action::OpenGate]),
        E::Inquired { released: true } if alive => {
            (TargetState::Opening { confirmed: false }, vec![Action::OpenGate, Action::Answer { held: true }])
        }
        E::Released => (TargetState::Reviving(gone()), vec![Action::Read]),
        // A claim may be unanswered: it cannot say that it holds nothing.
        E::Inquired { .. } => (TargetState::Claiming { alive }, vec![Action::Answer { held: true }]),
        E::MachineGone(_) => (TargetState::Claiming { alive: false }, vec![Action::EndMachine]),
        E::ShellReady
        | E::ShellRefused(_)
        | E::CopyHeld
        | E::CopyFailed(_)
        | E::Offered
        | E::Started
        | E::StartFailed(_)
        | E::Cancelled
        | E::LinkLost(_)
        | E::Opened => (TargetState::Claiming { alive }, vec![]),
    }
}

fn opening(confirmed: bool, event: TargetEvent) -> Next {
    use TargetEvent as E;
    match event {
        E::Opened if confirmed => owner(),
        E::Opened => (TargetState::Running, vec![Action::Read]),
        E::MachineGone(detail) if confirmed => (
            TargetState::Finished(TargetOutcome::Restarted(Cause::MachineGone(detail))),
            vec![Action::EndMachine, Action::Restart],
        ),
        E::MachineGone(detail) => {
            (TargetState::Reviving(Cause::MachineGone(detail)), vec![Action::EndMachine, Action::Read])
        }
        // A claim asked for before the release came.
        E::Swapped | E::Record(Standing::Claimed) => (TargetState::Opening { confirmed: true }, vec![]),
        E::Inquired { .. } => (TargetState::Opening { confirmed }, vec![Action::Answer { held: true }]),
        E::ShellReady
        | E::ShellRefused(_)
        | E::CopyHeld
        | E::CopyFailed(_)
        | E::Offered
        | E::Started
        | E::StartFailed(_)
        | E::Released
        | E::Cancelled
        | E::LinkLost(_)
        | E::Record(_)
        | E::DirectoryAway(_)
        | E::Timeout => (TargetState::Opening { confirmed }, vec![]),
    }
}

fn running(event: TargetEvent) -> Next {
    use TargetEvent as E;
    match event {
        E::Swapped | E::Record(Standing::Claimed) => owner(),
        E::Record(Standing::Announced) => (TargetState::Running, vec![Action::Swap(Change::Claim)]),
        // Cannot be after a release; if it is, the record decides.
        E::Record(Standing::Owned | Standing::TakenBack | Standing::Elsewhere) => {
            nothing(Cause::OwnershipLost)
        }
        E::Timeout => (TargetState::Running, vec![Action::Read]),
        E::MachineGone(detail) => {
            (TargetState::Reviving(Cause::MachineGone(detail)), vec![Action::EndMachine, Action::Read])
        }
        E::Inquired { .. } => (TargetState::Running, vec![Action::Answer { held: true }]),
        // The right is settled; only the record lags.
        E::DirectoryAway(_)
        | E::ShellReady
        | E::ShellRefused(_)
        | E::CopyHeld
        | E::CopyFailed(_)
        | E::Offered
        | E::Started
        | E::StartFailed(_)
        | E::Released
        | E::Cancelled
        | E::LinkLost(_)
        | E::Opened => (TargetState::Running, vec![]),
    }
}

fn reviving(cause: Cause, event: TargetEvent) -> Next {
    use TargetEvent as E;
    match event {
        E::Swapped | E::Record(Standing::Claimed) => {
            (TargetState::Finished(TargetOutcome::Restarted(cause)), vec![Action::Restart])
        }
        E::Record(Standing::Announced) => (TargetState::Reviving(cause), vec![Action::Swap(Change::Claim)]),
        E::Record(Standing::Owned | Standing::TakenBack | Standing::Elsewhere) => {
            nothing(Cause::OwnershipLost)
        }
        E::DirectoryAway(detail) => {
            let doubt = Cause::DirectoryAway(detail);
            (TargetState::Reviving(cause), vec![Action::ReportInDoubt(doubt)])
        }
        E::Timeout => (TargetState::Reviving(cause), vec![Action::Read]),
        E::Inquired { .. } => (TargetState::Reviving(cause), vec![Action::Answer { held: true }]),
        E::ShellReady
        | E::ShellRefused(_)
        | E::CopyHeld
        | E::CopyFailed(_)
        | E::Offered
        | E::Started
        | E::StartFailed(_)
        | E::Released
        | E::Cancelled
        | E::LinkLost(_)
        | E::Opened
        | E::MachineGone(_) => (TargetState::Reviving(cause), vec![]),
    }
}

fn finished(outcome: TargetOutcome, event: TargetEvent) -> Next {
    let actions = match (&event, &outcome) {
        (TargetEvent::Inquired { .. }, TargetOutcome::Nothing(_)) => vec![Action::Answer { held: false }],
        (TargetEvent::Inquired { .. }, TargetOutcome::Owner | TargetOutcome::Restarted(_)) => {
            vec![Action::Answer { held: true }]
        }
        _ => vec![],
    };
    (TargetState::Finished(outcome), actions)
}

fn owner() -> Next {
    (TargetState::Finished(TargetOutcome::Owner), vec![Action::Say(ToSource::Running)])
}

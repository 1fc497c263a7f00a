//! The source's decider: gives a running machine to another host, or keeps it.
//!
//! ```text
//! Preparing ─▶ Announcing ─▶ Converging ─▶ Switching ─▶ Offered ─▶ Releasing ─▶ Released ─▶ Draining ─▶ Finished
//!     │            │             │            │           │ ╲                      │
//!     │            ▼             ▼            ▼           │  ▼ silence, lost link   ▼ peer holds nothing
//!     │         Closing ◀────────┴──────── Resuming ◀─────┤ TakingBack         Restarting ─▶ Finished(Restarted)
//!     ▼            ▼                          ▲           │  │  │ ▲                  ▲
//!  Finished(KeptHere)                         └───────────┴──┘  │ machine gone ──────┘
//!                                         target: nothing held  ▼ target has claimed: Draining
//! ```
//!
//! Commit point: the release stored by [`Action::Release`]. Before it only the source may take the image
//! back; after it the source's copy never runs again.
//!
//! Rules the states keep:
//! - From the offer on the machine is resumed only after the target said, on the link of the offer, that
//!   it holds nothing (it says so before it has asked the directory for anything), or after a
//!   swap of the record to (N+2, source).
//! - `TakingBack` never releases: once the directory was asked, its answer settles it.
//! - `Released` restarts the image only after the target said that it holds nothing, and a swap.
//!
//! Pure: no clock, no I/O. The driver executes [`Action`]s in order and reports what came of each.

#[cfg(test)]
mod tests;

use crate::{
    converge::{Convergence, Goal, Round, Verdict},
    outcome::{Cause, Outcome},
    ownership::{Change, Standing},
};

/// What the source tells the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ToTarget {
    /// Drop everything: nothing was or will be offered.
    Cancel,
    /// The right is yours.
    Released,
}

/// What the source's driver is to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Send the request to prepare; [`SourceEvent::RoundFailed`] where the machine cannot be sent at all.
    Prepare,
    /// Send a message.
    Say(ToTarget),
    /// Swap the record on the revision last read: [`SourceEvent::Swapped`], [`SourceEvent::Record`]
    /// when that has changed or nothing was read yet, [`SourceEvent::DirectoryAway`].
    Swap(Change),
    /// Read the record: [`SourceEvent::Record`] or [`SourceEvent::DirectoryAway`].
    Read,
    /// Harvest and send: [`SourceEvent::RoundSent`], [`SourceEvent::RoundFailed`], [`SourceEvent::MachineGone`].
    SendRound,
    /// [`SourceEvent::Paused`], [`SourceEvent::PauseRefused`], [`SourceEvent::MachineGone`].
    Pause,
    /// Send last epoch and state: [`SourceEvent::OfferMade`] once a byte of the switch message may have
    /// left, else [`SourceEvent::NotOffered`].
    Offer,
    /// Run on: [`SourceEvent::Resumed`] or [`SourceEvent::MachineGone`].
    Resume,
    /// Store that the right is given away: [`SourceEvent::ReleaseStored`] (a machine whose process is
    /// gone counts), or [`SourceEvent::ReleaseRefused`].
    Release,
    /// Ask the target's daemon on a new link what it holds: [`SourceEvent::PeerHolds`],
    /// [`SourceEvent::PeerHoldsNothing`], [`SourceEvent::PeerSilent`].
    Inquire {
        /// Also tell it that the right is its.
        released: bool,
    },
    /// Point the kernel's route at the target.
    FlipRoute,
    /// Send on what is left in the tap's queue: [`SourceEvent::Drained`].
    Drain,
    /// End the machine's process.
    EndMachine,
    /// Start the image anew; its swap is done.
    Restart,
    /// Tell the user that it is not settled.
    ReportInDoubt(Cause),
}

/// What the source's driver reports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// Target: shell, tap and layout are there.
    TargetReady,
    /// Target: will not take it, or could not start it; holds nothing of it and never will.
    TargetFailed(Cause),
    /// Target: runs it with its gate shut.
    TargetStarted,
    /// Target: owns it in the directory.
    TargetRunning,
    /// The switch link is of no further use.
    LinkLost(String),
    /// A round was sent and acknowledged.
    RoundSent(Round),
    /// A round was not acknowledged, or none can be.
    RoundFailed(Cause),
    /// The machine is paused.
    Paused,
    /// The machine runs on.
    PauseRefused(String),
    /// The switch message may have left.
    OfferMade,
    /// Nothing of the switch message has left.
    NotOffered(Cause),
    /// The machine runs on.
    Resumed,
    /// Stored; it never runs again.
    ReleaseStored,
    /// Not stored.
    ReleaseRefused(String),
    /// The machine's process is gone.
    MachineGone(String),
    /// The swap applied.
    Swapped,
    /// The record as it is now.
    Record(Standing),
    /// No answer; a swap may or may not have applied.
    DirectoryAway(String),
    /// Asked: it holds a copy.
    PeerHolds,
    /// Asked: it holds none, and refuses everything of this term from now on.
    PeerHoldsNothing,
    /// Asked: no answer.
    PeerSilent,
    /// The tap's queue is empty.
    Drained,
    /// The user cancels.
    Cancel,
    /// The state's [`Patience`] is over.
    Timeout,
}

/// How long a state waits before [`SourceEvent::Timeout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// The driver answers at once.
    None,
    /// Until the time given to the whole handover is over.
    Deadline,
    /// For the other side's next word around the switch.
    Switch,
    /// Until the directory or the peer is asked again.
    Poll,
    /// It is over.
    Done,
}

/// Where the source stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// The target makes a shell.
    Preparing,
    /// The intent is being recorded.
    Announcing,
    /// Rounds of dirty pages.
    Converging(Convergence),
    /// Paused, nothing offered.
    Switching,
    /// The target may run it, gate shut.
    Offered,
    /// The release is being stored.
    Releasing,
    /// The right is given away.
    Released {
        /// Whether the switch link may still bring the target's word.
        linked: bool,
        /// Whether the target may be told so: a restarted daemon without its machine does not know
        /// whether it had asked the directory before.
        given: bool,
    },
    /// The directory was asked for (N+2, source).
    TakingBack(Cause),
    /// The machine is being resumed.
    Resuming {
        /// Why it was kept.
        cause: Cause,
        /// Whether the record says (N+2, source).
        taken_back: bool,
    },
    /// No copy is left; the directory is asked for (N+2, source).
    Restarting(Cause),
    /// Kept; the intent is being cleared.
    Closing(Cause),
    /// Handed over; frames in the tap are sent on.
    Draining(Cause),
    /// Over.
    Finished(Outcome, Cause),
}

/// The source's side of one handover.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// What was asked.
    pub goal: Goal,
    /// Where it stands.
    pub state: SourceState,
}

/// What a step leads to.
type Next = (SourceState, Vec<Action>);

impl Source {
    /// Begins a handover of a running machine whose record was just read.
    #[must_use]
    pub fn begin(goal: Goal) -> (Self, Vec<Action>) {
        (Self { goal, state: SourceState::Preparing }, vec![Action::Prepare])
    }

    /// Goes on in a given state after a restart of the daemon ([`crate::recover`]).
    #[must_use]
    pub(crate) fn resume_in(state: SourceState, actions: Vec<Action>) -> (Self, Vec<Action>) {
        let goal = Goal {
            blackout: std::time::Duration::ZERO,
            timeout: std::time::Duration::ZERO,
            stubborn: crate::converge::Stubborn::Keep,
        };
        (Self { goal, state }, actions)
    }

    /// How long to wait in this state.
    #[must_use]
    pub const fn patience(&self) -> Patience {
        match &self.state {
            SourceState::Preparing => Patience::Deadline,
            SourceState::Offered | SourceState::Released { linked: true, .. } => Patience::Switch,
            SourceState::Released { linked: false, .. }
            | SourceState::TakingBack(_)
            | SourceState::Restarting(_) => Patience::Poll,
            SourceState::Finished(..) => Patience::Done,
            SourceState::Announcing
            | SourceState::Converging(_)
            | SourceState::Switching
            | SourceState::Releasing
            | SourceState::Resuming { .. }
            | SourceState::Closing(_)
            | SourceState::Draining(_) => Patience::None,
        }
    }

    /// Whether a lost link matters here; it is reported again in every such state.
    #[must_use]
    pub const fn listens(&self) -> bool {
        matches!(
            self.state,
            SourceState::Preparing | SourceState::Offered | SourceState::Released { linked: true, .. }
        )
    }

    /// How it ended, once it has.
    #[must_use]
    pub const fn outcome(&self) -> Option<(Outcome, &Cause)> {
        match &self.state {
            SourceState::Finished(outcome, cause) => Some((*outcome, cause)),
            _ => None,
        }
    }

    /// Takes one event in.
    #[must_use]
    pub fn step(self, event: SourceEvent) -> (Self, Vec<Action>) {
        let goal = self.goal;
        let (state, actions) = match self.state {
            SourceState::Preparing => preparing(event),
            SourceState::Announcing => announcing(event),
            SourceState::Converging(rule) => converging(rule, &goal, event),
            SourceState::Switching => switching(event),
            SourceState::Offered => offered(event),
            SourceState::Releasing => releasing(event),
            SourceState::Released { linked, given } => released(linked, given, event),
            SourceState::TakingBack(cause) => taking_back(cause, event),
            SourceState::Resuming { cause, taken_back } => resuming(cause, taken_back, event),
            SourceState::Restarting(cause) => restarting(cause, event),
            SourceState::Closing(cause) => closing(cause, event),
            SourceState::Draining(cause) => draining(cause, event),
            SourceState::Finished(outcome, cause) => (SourceState::Finished(outcome, cause), vec![]),
        };
        (Self { goal, state }, actions)
    }
}

fn preparing(event: SourceEvent) -> Next {
    use SourceEvent as E;
    let kept = |cause| (SourceState::Finished(Outcome::KeptHere, cause), vec![Action::Say(ToTarget::Cancel)]);
    match event {
        E::TargetReady => (SourceState::Announcing, vec![Action::Swap(Change::Announce)]),
        E::TargetFailed(cause) => (SourceState::Finished(Outcome::KeptHere, cause), vec![]),
        E::RoundFailed(cause) => kept(cause),
        E::LinkLost(detail) => (SourceState::Finished(Outcome::KeptHere, Cause::LinkLost(detail)), vec![]),
        E::Cancel => kept(Cause::Cancelled),
        E::Timeout => kept(Cause::TimedOut("waiting for the target to prepare")),
        E::MachineGone(detail) => restart_unoffered(detail),
        E::TargetStarted
        | E::TargetRunning
        | E::RoundSent(_)
        | E::Paused
        | E::PauseRefused(_)
        | E::OfferMade
        | E::NotOffered(_)
        | E::Resumed
        | E::ReleaseStored
        | E::ReleaseRefused(_)
        | E::Swapped
        | E::Record(_)
        | E::DirectoryAway(_)
        | E::PeerHolds
        | E::PeerHoldsNothing
        | E::PeerSilent
        | E::Drained => (SourceState::Preparing, vec![]),
    }
}

fn announcing(event: SourceEvent) -> Next {
    use SourceEvent as E;
    match event {
        E::Swapped | E::Record(Standing::Announced) => {
            (SourceState::Converging(Convergence::default()), vec![Action::SendRound])
        }
        E::Record(Standing::Owned) => (SourceState::Announcing, vec![Action::Swap(Change::Announce)]),
        E::Record(Standing::TakenBack) => (
            SourceState::Finished(Outcome::KeptHere, Cause::OwnershipLost),
            vec![Action::Say(ToTarget::Cancel)],
        ),
        E::Record(Standing::Claimed | Standing::Elsewhere) => fenced(),
        // The swap may have applied or may yet: Closing clears it if the directory answers.
        E::DirectoryAway(detail) => close(Cause::DirectoryAway(detail)),
        E::MachineGone(detail) => restart_unoffered(detail),
        // The driver answers the swap at once; a lost link or a cancel is found by the next action.
        E::TargetReady
        | E::TargetFailed(_)
        | E::TargetStarted
        | E::TargetRunning
        | E::LinkLost(_)
        | E::RoundSent(_)
        | E::RoundFailed(_)
        | E::Paused
        | E::PauseRefused(_)
        | E::OfferMade
        | E::NotOffered(_)
        | E::Resumed
        | E::ReleaseStored
        | E::ReleaseRefused(_)
        | E::PeerHolds
        | E::PeerHoldsNothing
        | E::PeerSilent
        | E::Drained
        | E::Cancel
        | E::Timeout => (SourceState::Announcing, vec![]),
    }
}

fn converging(rule: Convergence, goal: &Goal, event: SourceEvent) -> Next {
    use SourceEvent as E;
    match event {
        E::RoundSent(round) => {
            let (rule, verdict) = rule.after(&round, goal);
            match verdict {
                Verdict::Round => (SourceState::Converging(rule), vec![Action::SendRound]),
                Verdict::Switch => (SourceState::Switching, vec![Action::Pause]),
                Verdict::GiveUp(why) => close(Cause::NotConverging(why)),
            }
        }
        E::RoundFailed(cause) | E::TargetFailed(cause) => close(cause),
        E::LinkLost(detail) => close(Cause::LinkLost(detail)),
        E::Cancel => close(Cause::Cancelled),
        E::Timeout => close(Cause::TimedOut("copying pages")),
        E::MachineGone(detail) => restart_unoffered(detail),
        E::TargetReady
        | E::TargetStarted
        | E::TargetRunning
        | E::Paused
        | E::PauseRefused(_)
        | E::OfferMade
        | E::NotOffered(_)
        | E::Resumed
        | E::ReleaseStored
        | E::ReleaseRefused(_)
        | E::Swapped
        | E::Record(_)
        | E::DirectoryAway(_)
        | E::PeerHolds
        | E::PeerHoldsNothing
        | E::PeerSilent
        | E::Drained => (SourceState::Converging(rule), vec![]),
    }
}

fn switching(event: SourceEvent) -> Next {
    use SourceEvent as E;
    match event {
        E::Paused => (SourceState::Switching, vec![Action::Offer]),
        E::PauseRefused(detail) => close(Cause::MachineRefused(detail)),
        E::MachineGone(detail) => restart_unoffered(detail),
        E::OfferMade => (SourceState::Offered, vec![]),
        E::NotOffered(cause) => (SourceState::Resuming { cause, taken_back: false }, vec![Action::Resume]),
        E::TargetReady
        | E::TargetFailed(_)
        | E::TargetStarted
        | E::TargetRunning
        | E::LinkLost(_)
        | E::RoundSent(_)
        | E::RoundFailed(_)
        | E::Resumed
        | E::ReleaseStored
        | E::ReleaseRefused(_)
        | E::Swapped
        | E::Record(_)
        | E::DirectoryAway(_)
        | E::PeerHolds
        | E::PeerHoldsNothing
        | E::PeerSilent
        | E::Drained
        | E::Cancel
        | E::Timeout => (SourceState::Switching, vec![]),
    }
}

fn offered(event: SourceEvent) -> Next {
    use SourceEvent as E;
    let take_back = |cause| (SourceState::TakingBack(cause), vec![Action::Swap(Change::TakeBack)]);
    match event {
        E::TargetStarted => (SourceState::Releasing, vec![Action::Release]),
        E::TargetFailed(cause) => (SourceState::Resuming { cause, taken_back: false }, vec![Action::Resume]),
        // It has claimed by a swap of its own.
        E::TargetRunning => handed_over(Cause::TimedOut("waiting for the target to start")),
        E::LinkLost(detail) => take_back(Cause::LinkLost(detail)),
        E::Timeout => take_back(Cause::TimedOut("waiting for the target to start")),
        // Too late to cancel: the target may already run it.
        E::Cancel
        | E::TargetReady
        | E::RoundSent(_)
        | E::RoundFailed(_)
        | E::Paused
        | E::PauseRefused(_)
        | E::OfferMade
        | E::NotOffered(_)
        | E::Resumed
        | E::ReleaseStored
        | E::ReleaseRefused(_)
        | E::MachineGone(_)
        | E::Swapped
        | E::Record(_)
        | E::DirectoryAway(_)
        | E::PeerHolds
        | E::PeerHoldsNothing
        | E::PeerSilent
        | E::Drained => (SourceState::Offered, vec![]),
    }
}

fn releasing(event: SourceEvent) -> Next {
    use SourceEvent as E;
    match event {
        E::ReleaseStored | E::MachineGone(_) => (
            SourceState::Released { linked: true, given: true },
            // What waits in the tap has waited for the whole blackout: sent on at once, and what a racing
            // packet left there once more at the end.
            vec![Action::Say(ToTarget::Released), Action::FlipRoute, Action::Drain],
        ),
        E::ReleaseRefused(detail) => {
            (SourceState::TakingBack(Cause::MachineRefused(detail)), vec![Action::Swap(Change::TakeBack)])
        }
        E::TargetReady
        | E::TargetFailed(_)
        | E::TargetStarted
        | E::TargetRunning
        | E::LinkLost(_)
        | E::RoundSent(_)
        | E::RoundFailed(_)
        | E::Paused
        | E::PauseRefused(_)
        | E::OfferMade
        | E::NotOffered(_)
        | E::Resumed
        | E::Swapped
        | E::Record(_)
        | E::DirectoryAway(_)
        | E::PeerHolds
        | E::PeerHoldsNothing
        | E::PeerSilent
        | E::Drained
        | E::Cancel
        | E::Timeout => (SourceState::Releasing, vec![]),
    }
}

fn released(linked: bool, given: bool, event: SourceEvent) -> Next {
    use SourceEvent as E;
    match event {
        E::TargetRunning => (SourceState::Draining(Cause::Done), vec![Action::Drain]),
        E::LinkLost(_) | E::Timeout => (SourceState::Released { linked: false, given }, vec![Action::Read]),
        E::Record(Standing::Claimed | Standing::Elsewhere) => {
            (SourceState::Draining(Cause::Done), vec![Action::FlipRoute, Action::Drain])
        }
        // Whatever the record says of the source, the target may hold an open gate until it denies it.
        E::Record(Standing::Owned | Standing::Announced | Standing::TakenBack) => {
            (SourceState::Released { linked: false, given }, vec![Action::Inquire { released: given }])
        }
        E::DirectoryAway(detail) => (
            SourceState::Released { linked: false, given },
            vec![Action::Inquire { released: given }, Action::ReportInDoubt(Cause::DirectoryAway(detail))],
        ),
        E::PeerHoldsNothing => (
            SourceState::Restarting(Cause::NothingHeld),
            vec![Action::EndMachine, Action::Swap(Change::TakeBack)],
        ),
        // It could not go on: a released machine is gone in any case.
        E::TargetFailed(cause) => {
            (SourceState::Restarting(cause), vec![Action::EndMachine, Action::Swap(Change::TakeBack)])
        }
        E::PeerSilent => (
            SourceState::Released { linked: false, given },
            vec![Action::ReportInDoubt(Cause::LinkLost("the target does not answer".into()))],
        ),
        E::PeerHolds
        | E::TargetReady
        | E::TargetStarted
        | E::RoundSent(_)
        | E::RoundFailed(_)
        | E::Paused
        | E::PauseRefused(_)
        | E::OfferMade
        | E::NotOffered(_)
        | E::Resumed
        | E::ReleaseStored
        | E::ReleaseRefused(_)
        | E::MachineGone(_)
        | E::Swapped
        | E::Drained
        | E::Cancel => (SourceState::Released { linked, given }, vec![]),
    }
}

fn taking_back(cause: Cause, event: SourceEvent) -> Next {
    use SourceEvent as E;
    match event {
        E::Swapped | E::Record(Standing::TakenBack) => {
            (SourceState::Resuming { cause, taken_back: true }, vec![Action::Resume])
        }
        E::Record(Standing::Owned | Standing::Announced) => {
            (SourceState::TakingBack(cause), vec![Action::Swap(Change::TakeBack)])
        }
        E::Record(Standing::Claimed | Standing::Elsewhere) => handed_over(cause),
        // Said before it asked the directory for anything, so nothing of its can apply any more.
        E::TargetFailed(cause) => (SourceState::Resuming { cause, taken_back: false }, vec![Action::Resume]),
        E::DirectoryAway(detail) => {
            let doubt = Cause::DirectoryAway(detail);
            (SourceState::TakingBack(cause), vec![Action::ReportInDoubt(doubt)])
        }
        E::Timeout => (SourceState::TakingBack(cause), vec![Action::Read]),
        // Asked is asked: the directory decides, whatever the target says now.
        E::TargetStarted
        | E::TargetRunning
        | E::TargetReady
        | E::LinkLost(_)
        | E::RoundSent(_)
        | E::RoundFailed(_)
        | E::Paused
        | E::PauseRefused(_)
        | E::OfferMade
        | E::NotOffered(_)
        | E::Resumed
        | E::ReleaseStored
        | E::ReleaseRefused(_)
        | E::MachineGone(_)
        | E::PeerHolds
        | E::PeerHoldsNothing
        | E::PeerSilent
        | E::Drained
        | E::Cancel => (SourceState::TakingBack(cause), vec![]),
    }
}

fn resuming(cause: Cause, taken_back: bool, event: SourceEvent) -> Next {
    use SourceEvent as E;
    match event {
        E::Resumed if taken_back => (SourceState::Finished(Outcome::KeptHere, cause), vec![]),
        E::Resumed => (SourceState::Closing(cause), vec![Action::Swap(Change::Clear)]),
        E::MachineGone(detail) if taken_back => (
            SourceState::Finished(Outcome::Restarted, Cause::MachineGone(detail)),
            vec![Action::EndMachine, Action::Restart],
        ),
        E::MachineGone(detail) => (
            SourceState::Restarting(Cause::MachineGone(detail)),
            vec![Action::EndMachine, Action::Swap(Change::TakeBack)],
        ),
        E::TargetReady
        | E::TargetFailed(_)
        | E::TargetStarted
        | E::TargetRunning
        | E::LinkLost(_)
        | E::RoundSent(_)
        | E::RoundFailed(_)
        | E::Paused
        | E::PauseRefused(_)
        | E::OfferMade
        | E::NotOffered(_)
        | E::ReleaseStored
        | E::ReleaseRefused(_)
        | E::Swapped
        | E::Record(_)
        | E::DirectoryAway(_)
        | E::PeerHolds
        | E::PeerHoldsNothing
        | E::PeerSilent
        | E::Drained
        | E::Cancel
        | E::Timeout => (SourceState::Resuming { cause, taken_back }, vec![]),
    }
}

fn restarting(cause: Cause, event: SourceEvent) -> Next {
    use SourceEvent as E;
    match event {
        E::Swapped | E::Record(Standing::TakenBack) => {
            (SourceState::Finished(Outcome::Restarted, cause), vec![Action::Restart])
        }
        E::Record(Standing::Owned | Standing::Announced) => {
            (SourceState::Restarting(cause), vec![Action::Swap(Change::TakeBack)])
        }
        E::Record(Standing::Claimed | Standing::Elsewhere) => handed_over(cause),
        E::DirectoryAway(detail) => {
            let doubt = Cause::DirectoryAway(detail);
            (SourceState::Restarting(cause), vec![Action::ReportInDoubt(doubt)])
        }
        E::Timeout => (SourceState::Restarting(cause), vec![Action::Read]),
        E::TargetReady
        | E::TargetFailed(_)
        | E::TargetStarted
        | E::TargetRunning
        | E::LinkLost(_)
        | E::RoundSent(_)
        | E::RoundFailed(_)
        | E::Paused
        | E::PauseRefused(_)
        | E::OfferMade
        | E::NotOffered(_)
        | E::Resumed
        | E::ReleaseStored
        | E::ReleaseRefused(_)
        | E::MachineGone(_)
        | E::PeerHolds
        | E::PeerHoldsNothing
        | E::PeerSilent
        | E::Drained
        | E::Cancel => (SourceState::Restarting(cause), vec![]),
    }
}

fn closing(cause: Cause, event: SourceEvent) -> Next {
    use SourceEvent as E;
    match event {
        // An intent that could not be cleared stays until the owner's next handover or start replaces it.
        E::Swapped | E::Record(Standing::Owned | Standing::TakenBack) | E::DirectoryAway(_) => {
            (SourceState::Finished(Outcome::KeptHere, cause), vec![])
        }
        E::Record(Standing::Announced) => (SourceState::Closing(cause), vec![Action::Swap(Change::Clear)]),
        E::Record(Standing::Claimed | Standing::Elsewhere) => fenced(),
        E::TargetReady
        | E::TargetFailed(_)
        | E::TargetStarted
        | E::TargetRunning
        | E::LinkLost(_)
        | E::RoundSent(_)
        | E::RoundFailed(_)
        | E::Paused
        | E::PauseRefused(_)
        | E::OfferMade
        | E::NotOffered(_)
        | E::Resumed
        | E::ReleaseStored
        | E::ReleaseRefused(_)
        | E::MachineGone(_)
        | E::PeerHolds
        | E::PeerHoldsNothing
        | E::PeerSilent
        | E::Drained
        | E::Cancel
        | E::Timeout => (SourceState::Closing(cause), vec![]),
    }
}

fn draining(cause: Cause, event: SourceEvent) -> Next {
    use SourceEvent as E;
    match event {
        E::Drained => (SourceState::Finished(Outcome::HandedOver, cause), vec![Action::EndMachine]),
        E::TargetReady
        | E::TargetFailed(_)
        | E::TargetStarted
        | E::TargetRunning
        | E::LinkLost(_)
        | E::RoundSent(_)
        | E::RoundFailed(_)
        | E::Paused
        | E::PauseRefused(_)
        | E::OfferMade
        | E::NotOffered(_)
        | E::Resumed
        | E::ReleaseStored
        | E::ReleaseRefused(_)
        | E::MachineGone(_)
        | E::Swapped
        | E::Record(_)
        | E::DirectoryAway(_)
        | E::PeerHolds
        | E::PeerHoldsNothing
        | E::PeerSilent
        | E::Cancel
        | E::Timeout => (SourceState::Draining(cause), vec![]),
    }
}

/// Nothing was offered: tell the target to drop what it has, clear the intent.
fn close(cause: Cause) -> Next {
    (SourceState::Closing(cause), vec![Action::Say(ToTarget::Cancel), Action::Swap(Change::Clear)])
}

/// The machine died before anything was offered: no copy exists anywhere.
fn restart_unoffered(detail: String) -> Next {
    (
        SourceState::Restarting(Cause::MachineGone(detail)),
        vec![Action::Say(ToTarget::Cancel), Action::EndMachine, Action::Swap(Change::TakeBack)],
    )
}

/// The target owns it without a release: the copy here is the one that goes.
fn handed_over(cause: Cause) -> Next {
    (SourceState::Draining(cause), vec![Action::FlipRoute, Action::Drain])
}

/// Another host owns an image that still ran here.
fn fenced() -> Next {
    (
        SourceState::Finished(Outcome::HandedOver, Cause::OwnershipLost),
        vec![Action::EndMachine, Action::Say(ToTarget::Cancel), Action::FlipRoute],
    )
}

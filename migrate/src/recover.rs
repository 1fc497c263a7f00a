//! What a daemon does with an image when it starts, adopts a machine, or finds nobody at work on it.
//!
//! Machines outlive their daemon. What is left after a crash is the record, the machine's own phase
//! (with its control page), and the ticket the daemon kept in the machine's label.

use kage_directory::ImageRecord;
use kage_machine::{HostName, UserName};

use crate::{
    outcome::Cause,
    ownership::{Change, Ticket},
    source::{self, Source, SourceState},
    target::{self, Target, TargetState},
};

/// What of an image is found on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Found {
    /// No machine.
    None,
    /// A shell, or a state that never ran: no copy yet.
    Shell,
    /// Runs; its output may leave.
    Running,
    /// Runs with its gate shut: restored here, right not settled.
    Gated,
    /// Paused and not released.
    Paused,
    /// Released: it never runs again.
    Released,
}

/// What is to be done with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Nothing here, nothing to do.
    Nothing,
    /// It runs and may.
    Keep,
    /// It is paused or gated and its host owns it: run it, gate open.
    Run,
    /// This host owns it and no machine is left: swap to the next term, then start it anew.
    Start,
    /// Another host owns it: end the machine here.
    End,
    /// Nothing can be decided before the directory answers; the machine stays as it is.
    Wait,
    /// Go on with an open handover as its source.
    Source(Ticket, Source, Vec<source::Action>),
    /// Go on with an open handover as its target.
    Target(Ticket, Target, Vec<target::Action>),
}

/// One image at one host, as a starting or idle daemon sees it.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// This host.
    pub me: &'a HostName,
    /// Whose image.
    pub user: &'a UserName,
    /// What is found here of it.
    pub found: Found,
    /// The ticket that a machine taken from another host carries.
    pub label: Option<&'a Ticket>,
    /// Its record; `Err` while the directory does not answer.
    pub record: Result<Option<&'a ImageRecord>, ()>,
}

/// Decides for one image on which no decider of this daemon is at work.
#[must_use]
pub fn recover(scene: &Scene<'_>) -> Recovery {
    let Scene { me, found, .. } = *scene;
    // A gated copy settles its right with or without the directory: the source may release.
    if let (Found::Gated, Some(ticket)) = (found, scene.label)
        && ticket.target == *me
    {
        return claim(ticket.clone(), vec![target::Action::Read]);
    }
    let Ok(record) = scene.record else {
        return match found {
            Found::Running => Recovery::Keep,
            Found::Shell => Recovery::End,
            Found::None | Found::Gated | Found::Paused | Found::Released => Recovery::Wait,
        };
    };
    let Some(record) = record else {
        return if found == Found::None { Recovery::Nothing } else { Recovery::End };
    };
    if let Some(ticket) = open_handover(scene.user, record) {
        if ticket.source == *me {
            return as_source(ticket, found);
        }
        if ticket.target == *me {
            return as_target(ticket, found);
        }
    }
    match (record.owner == *me, found) {
        (false, Found::None) => Recovery::Nothing,
        (false, _) | (true, Found::Shell) => Recovery::End,
        (true, Found::Running) => Recovery::Keep,
        (true, Found::Paused | Found::Gated) => Recovery::Run,
        (true, Found::None | Found::Released) => Recovery::Start,
    }
}

/// The handover a record announces.
#[must_use]
pub fn open_handover(user: &UserName, record: &ImageRecord) -> Option<Ticket> {
    record.intent.as_ref().map(|intent| Ticket {
        user: user.clone(),
        term: record.term,
        handover: intent.handover,
        source: record.owner.clone(),
        target: intent.target.clone(),
    })
}

/// What a host owes to a machine from another host that ran here, gate open, and is gone: `ran` is its ticket, kept with
/// the disk. What it wrote since is on this disk and nowhere else, so the source must not start its own again: the
/// record is claimed, and then looked at anew ([`recover`] starts it).
#[must_use]
pub fn ran_here(me: &HostName, record: &ImageRecord, ran: &Ticket) -> Option<Change> {
    let open = open_handover(&ran.user, record)?;
    (open == *ran && ran.target == *me).then_some(Change::Claim)
}

fn claim(ticket: Ticket, actions: Vec<target::Action>) -> Recovery {
    Recovery::Target(ticket, Target { state: TargetState::Claiming { alive: true } }, actions)
}

fn as_source(ticket: Ticket, found: Found) -> Recovery {
    use source::Action::{Inquire, Swap};
    let (state, action) = match found {
        // A machine is paused before it is offered, and resumed only once it is the source's again.
        Found::Running => (SourceState::Closing(Cause::DaemonRestarted), Swap(Change::Clear)),
        Found::Paused => (SourceState::TakingBack(Cause::DaemonRestarted), Swap(Change::TakeBack)),
        Found::Released => (SourceState::Released { linked: false, given: true }, Inquire { released: true }),
        // It may have released before it died, and it may have asked for a take-back.
        Found::None => (SourceState::Released { linked: false, given: false }, Inquire { released: false }),
        Found::Shell => return Recovery::End,
        Found::Gated => return Recovery::Run,
    };
    let (source, actions) = Source::resume_in(state, vec![action]);
    Recovery::Source(ticket, source, actions)
}

fn as_target(ticket: Ticket, found: Found) -> Recovery {
    match found {
        Found::Gated => claim(ticket, vec![target::Action::Swap(Change::Claim)]),
        // Its gate opened, so the right was settled; only the record lags.
        Found::Running => Recovery::Target(
            ticket,
            Target { state: TargetState::Running },
            vec![target::Action::Swap(Change::Claim)],
        ),
        Found::None => Recovery::Nothing,
        Found::Shell | Found::Paused | Found::Released => Recovery::End,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::tests::{record, ticket};

    fn decide(me: &str, found: Found, record: Result<Option<&ImageRecord>, ()>) -> Recovery {
        let (me, user) = (me.parse().unwrap(), "alice".parse().unwrap());
        recover(&Scene { me: &me, user: &user, found, label: None, record })
    }

    #[test]
    fn without_an_intent_the_owner_decides() {
        let owned = record();
        for (me, found, expected) in [
            ("a", Found::None, Recovery::Start),
            ("a", Found::Running, Recovery::Keep),
            ("a", Found::Paused, Recovery::Run),
            ("a", Found::Gated, Recovery::Run),
            ("a", Found::Shell, Recovery::End),
            ("a", Found::Released, Recovery::Start),
            ("b", Found::None, Recovery::Nothing),
            ("b", Found::Running, Recovery::End),
            ("b", Found::Gated, Recovery::End),
        ] {
            assert_eq!(decide(me, found, Ok(Some(&owned))), expected, "{me} {found:?}");
        }
    }

    #[test]
    fn without_a_directory_only_what_runs_runs_on() {
        assert_eq!(decide("a", Found::Running, Err(())), Recovery::Keep);
        assert_eq!(decide("a", Found::Paused, Err(())), Recovery::Wait);
        assert_eq!(decide("b", Found::Gated, Err(())), Recovery::Wait);
    }

    #[test]
    fn what_ran_here_and_is_gone_is_claimed() {
        let announced = Change::Announce.apply(&record(), &ticket());
        let asked = |me: &str, ran: &Ticket| ran_here(&me.parse().unwrap(), &announced, ran);
        assert_eq!(asked("b", &ticket()), Some(Change::Claim));
        assert_eq!(asked("a", &ticket()), None);
        let earlier = Ticket { handover: kage_machine::HandoverId([9; 16]), ..ticket() };
        assert_eq!(asked("b", &earlier), None);
        assert_eq!(ran_here(&"b".parse().unwrap(), &record(), &ticket()), None);
    }

    #[test]
    fn an_open_intent_is_settled_by_what_is_found() {
        let announced = Change::Announce.apply(&record(), &ticket());
        let state = |me, found| match decide(me, found, Ok(Some(&announced))) {
            Recovery::Source(_, source, _) => format!("{:?}", source.state),
            Recovery::Target(_, target, _) => format!("{:?}", target.state),
            other => format!("{other:?}"),
        };
        assert_eq!(state("a", Found::Running), "Closing(DaemonRestarted)");
        assert_eq!(state("a", Found::Paused), "TakingBack(DaemonRestarted)");
        assert_eq!(state("a", Found::Released), "Released { linked: false, given: true }");
        assert_eq!(state("a", Found::None), "Released { linked: false, given: false }");
        assert_eq!(state("b", Found::Gated), "Claiming { alive: true }");
        assert_eq!(state("b", Found::Running), "Running");
        assert_eq!(state("b", Found::None), "Nothing");
        assert_eq!(state("b", Found::Shell), "End");
    }
}

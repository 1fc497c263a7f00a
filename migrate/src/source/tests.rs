//! The source's rules under any sequence of events, and its straight path.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::converge::Stubborn;

fn goal() -> Goal {
    Goal { blackout: Duration::from_secs(1), timeout: Duration::from_secs(1), stubborn: Stubborn::Keep }
}

/// Every event there is; the compiler of [`Source::step`] knows when one is added.
fn events() -> Vec<SourceEvent> {
    use SourceEvent as E;
    let text = String::new;
    let mut events = vec![
        E::TargetReady,
        E::TargetFailed(Cause::TargetFailed(text())),
        E::TargetStarted,
        E::TargetRunning,
        E::LinkLost(text()),
        E::RoundSent(Round::default()),
        E::RoundFailed(Cause::LinkLost(text())),
        E::Paused,
        E::PauseRefused(text()),
        E::OfferMade,
        E::NotOffered(Cause::LinkLost(text())),
        E::Resumed,
        E::ReleaseStored,
        E::ReleaseRefused(text()),
        E::MachineGone(text()),
        E::Swapped,
        E::DirectoryAway(text()),
        E::PeerHolds,
        E::PeerHoldsNothing,
        E::PeerSilent,
        E::Drained,
        E::Cancel,
        E::Timeout,
    ];
    let standings =
        [Standing::Owned, Standing::Announced, Standing::TakenBack, Standing::Claimed, Standing::Elsewhere];
    events.extend(standings.map(E::Record));
    events
}

fn run(events: &[SourceEvent]) -> (Source, Vec<Action>) {
    let (mut source, mut done) = Source::begin(goal());
    for event in events {
        let (next, actions) = source.step(event.clone());
        source = next;
        done.extend(actions);
    }
    (source, done)
}

#[test]
fn the_straight_path() {
    use SourceEvent as E;
    let (source, actions) = run(&[
        E::TargetReady,
        E::Swapped,
        E::RoundSent(Round::default()),
        E::Paused,
        E::OfferMade,
        E::TargetStarted,
        E::ReleaseStored,
        E::TargetRunning,
        E::Drained,
    ]);
    assert_eq!(source.outcome(), Some((Outcome::HandedOver, &Cause::Done)));
    assert_eq!(
        actions,
        [
            Action::Prepare,
            Action::Swap(Change::Announce),
            Action::SendRound,
            Action::Pause,
            Action::Offer,
            Action::Release,
            Action::Say(ToTarget::Released),
            Action::FlipRoute,
            Action::Drain,
            Action::Drain,
            Action::EndMachine,
        ]
    );
}

#[test]
fn a_cancel_counts_before_the_offer_and_not_after() {
    use SourceEvent as E;
    let offered = [E::TargetReady, E::Swapped, E::RoundSent(Round::default()), E::Paused, E::OfferMade];
    for end in 0..offered.len() {
        let mut events = offered[..end].to_vec();
        events.push(E::Cancel);
        let state = run(&events).0.state;
        let kept = matches!(state, SourceState::Finished(Outcome::KeptHere, Cause::Cancelled));
        let closing = matches!(state, SourceState::Closing(Cause::Cancelled));
        // A driver in the middle of a call reports the cancel after it.
        let busy = matches!(state, SourceState::Announcing | SourceState::Switching);
        assert!(kept || closing || busy, "{end}: {state:?}");
    }
    let mut events = offered.to_vec();
    events.push(E::Cancel);
    assert_eq!(run(&events).0.state, SourceState::Offered);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn no_sequence_of_events_breaks_the_rules(picks in prop::collection::vec(0..28usize, 0..60)) {
        let all = events();
        let (mut source, _) = Source::begin(goal());
        let (mut offered, mut released, mut asked, mut may_resume) = (false, false, false, true);
        let mut may_restart = false;
        for pick in picks {
            let event = all[pick % all.len()].clone();
            let over = source.outcome().is_some();
            // Asked for is not yet stored; a process that is gone never runs again either.
            if source.state == SourceState::Releasing
                && matches!(event, SourceEvent::ReleaseStored | SourceEvent::MachineGone(_))
            {
                released = true;
            }
            if offered && matches!(event, SourceEvent::TargetFailed(_)) {
                may_resume = true;
            }
            if matches!(event, SourceEvent::Swapped | SourceEvent::Record(Standing::TakenBack)) {
                may_resume = true;
                may_restart = true;
            }
            let (next, actions) = source.step(event);
            source = next;
            prop_assert!(!over || actions.is_empty(), "acts after its end");
            for action in actions {
                match action {
                    Action::Offer => (offered, may_resume) = (true, true),
                    Action::Release => prop_assert!(!asked, "releases after it asked to take back"),
                    Action::Say(ToTarget::Released) => prop_assert!(released, "gives away what is not stored"),
                    Action::Say(ToTarget::Cancel) => prop_assert!(!released, "cancels what it released"),
                    Action::Swap(Change::TakeBack) => asked = true,
                    Action::Resume => prop_assert!(may_resume && !released, "runs what may run elsewhere"),
                    Action::Restart => prop_assert!(may_restart, "starts anew without a swap"),
                    _ => {}
                }
                if source.state == SourceState::Offered {
                    may_resume = false;
                }
            }
        }
    }
}

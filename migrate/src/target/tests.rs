//! The target's rules under any sequence of events, and its straight path.

use proptest::prelude::*;

use super::*;

fn events() -> Vec<TargetEvent> {
    use TargetEvent as E;
    let text = String::new;
    let mut events = vec![
        E::ShellReady,
        E::ShellRefused(text()),
        E::CopyHeld,
        E::CopyFailed(text()),
        E::Offered,
        E::Started,
        E::StartFailed(text()),
        E::Released,
        E::Cancelled,
        E::LinkLost(text()),
        E::Inquired { released: false },
        E::Inquired { released: true },
        E::Opened,
        E::MachineGone(text()),
        E::Swapped,
        E::DirectoryAway(text()),
        E::Timeout,
    ];
    let standings =
        [Standing::Owned, Standing::Announced, Standing::TakenBack, Standing::Claimed, Standing::Elsewhere];
    events.extend(standings.map(E::Record));
    events
}

fn run(events: &[TargetEvent]) -> (Target, Vec<Action>) {
    let (mut target, mut done) = Target::begin();
    for event in events {
        let (next, actions) = target.step(event.clone());
        target = next;
        done.extend(actions);
    }
    (target, done)
}

#[test]
fn the_straight_path() {
    use TargetEvent as E;
    let (target, actions) = run(&[
        E::ShellReady,
        E::CopyHeld,
        E::Offered,
        E::Started,
        E::Released,
        E::Opened,
        E::Record(Standing::Announced),
        E::Swapped,
    ]);
    assert_eq!(target.outcome(), Some(&TargetOutcome::Owner));
    assert_eq!(
        actions,
        [
            Action::MakeShell,
            Action::Say(ToSource::Ready),
            Action::Start,
            Action::Say(ToSource::Started),
            Action::OpenGate,
            Action::Read,
            Action::Swap(Change::Claim),
            Action::Say(ToSource::Running),
        ]
    );
}

#[test]
fn a_switch_before_a_whole_copy_is_refused() {
    let (target, actions) = run(&[TargetEvent::ShellReady, TargetEvent::Offered]);
    assert!(matches!(target.outcome(), Some(TargetOutcome::Nothing(_))));
    assert!(matches!(actions[..], [.., Action::EndMachine, Action::Say(ToSource::Failed(_))]));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn no_sequence_of_events_breaks_the_rules(picks in prop::collection::vec(0..22usize, 0..60)) {
        let all = events();
        let (mut target, _) = Target::begin();
        // Whether the right is settled, a claim may be unanswered, the machine was ended.
        let (mut right, mut claimed, mut ended) = (false, false, false);
        for pick in picks {
            let event = all[pick % all.len()].clone();
            let over = target.outcome().is_some();
            match event {
                TargetEvent::Released | TargetEvent::Inquired { released: true } => right = true,
                TargetEvent::Swapped | TargetEvent::Record(Standing::Claimed) => right = true,
                // The record decides against it, whatever was asked.
                TargetEvent::Record(Standing::Owned | Standing::TakenBack | Standing::Elsewhere) => {
                    claimed = false;
                }
                _ => {}
            }
            let (next, actions) = target.step(event);
            target = next;
            for action in actions {
                prop_assert!(!over || matches!(action, Action::Answer { .. }), "acts after its end");
                match action {
                    Action::OpenGate => prop_assert!(right && !ended, "emits without the right"),
                    Action::Swap(Change::Claim) => claimed = true,
                    Action::Swap(_) => prop_assert!(false, "changes what is the source's"),
                    Action::Say(ToSource::Failed(_)) | Action::Answer { held: false } => {
                        prop_assert!(!claimed, "denies what it may have claimed");
                    }
                    Action::EndMachine => ended = true,
                    Action::Restart => prop_assert!(right, "starts anew without the right"),
                    _ => {}
                }
            }
        }
    }
}

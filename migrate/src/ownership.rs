//! What the directory's record of an image means for one handover, and the changes it may undergo.
//!
//! ```text
//!            announce              claim (target)
//! (N, A) ──────────────▶ (N, A, →B) ───────────▶ (N+1, B)
//!    ▲                        │
//!    └──────── clear ─────────┤ take back (source, not released; restart)
//!                             └────────────────▶ (N+2, A)
//! ```
//! Every change is one compare-and-swap on the revision at which the record was read, so of a claim
//! and a take-back exactly one applies, and neither can apply to a later handover's record. Term N+1
//! is never the source's: the target may have labelled epochs with it.

use kage_directory::{ImageRecord, Intent};
use kage_machine::{HandoverId, HostName, Term, UserName};
use serde::{Deserialize, Serialize};

/// One attempt to hand one image over. The daemon keeps the target's in its machine's label, so that
/// a restarted daemon knows what it adopted.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ticket {
    /// Whose image.
    pub user: UserName,
    /// The source's term, N.
    pub term: Term,
    /// Which attempt.
    pub handover: HandoverId,
    /// The owner, A.
    pub source: HostName,
    /// Who is to become owner, B.
    pub target: HostName,
}

/// Where a record stands, as seen from one handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// (N, A), and no intent or another attempt's.
    Owned,
    /// (N, A, intent B): this handover is announced and undecided.
    Announced,
    /// (above N, A): the source has taken the image back, or started it anew.
    TakenBack,
    /// (above N, B): the target has claimed it.
    Claimed,
    /// Neither's any more: moved on or deleted. Whoever still holds a copy ends it.
    Elsewhere,
}

impl Standing {
    /// Reads a record's standing; `None` is a deleted record.
    #[must_use]
    pub fn of(record: Option<&ImageRecord>, ticket: &Ticket) -> Self {
        let Some(record) = record else { return Self::Elsewhere };
        let ours = |intent: &Intent| intent.handover == ticket.handover && intent.target == ticket.target;
        match (record.term.cmp(&ticket.term), &record.owner) {
            (std::cmp::Ordering::Less, _) => Self::Elsewhere,
            (std::cmp::Ordering::Equal, owner) if *owner == ticket.source => {
                if record.intent.as_ref().is_some_and(ours) { Self::Announced } else { Self::Owned }
            }
            (std::cmp::Ordering::Equal, _) => Self::Elsewhere,
            (std::cmp::Ordering::Greater, owner) if *owner == ticket.source => Self::TakenBack,
            (std::cmp::Ordering::Greater, owner) if *owner == ticket.target => Self::Claimed,
            (std::cmp::Ordering::Greater, _) => Self::Elsewhere,
        }
    }
}

/// A change of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// Source: (N, A) → (N, A, intent B). Replaces a former attempt's intent: the owner knows that
    /// none of its own is alive.
    Announce,
    /// Source: drops the intent after a handover that was kept.
    Clear,
    /// Source, only when it has not released: → (N+2, A).
    TakeBack,
    /// Target: → (N+1, B).
    Claim,
}

impl Change {
    /// The record after the change.
    #[must_use]
    pub fn apply(self, record: &ImageRecord, ticket: &Ticket) -> ImageRecord {
        let mut record = record.clone();
        record.intent = None;
        match self {
            Self::Announce => {
                record.intent = Some(Intent { target: ticket.target.clone(), handover: ticket.handover });
            }
            Self::Clear => {}
            Self::TakeBack => {
                record.term = ticket.term.next().next();
                record.owner = ticket.source.clone();
            }
            Self::Claim => {
                record.term = ticket.term.next();
                record.owner = ticket.target.clone();
            }
        }
        record
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use kage_directory::{Profile, Wanted};
    use kage_machine::ImageNumber;

    pub(crate) fn ticket() -> Ticket {
        Ticket {
            user: "alice".parse().unwrap(),
            term: Term(5),
            handover: HandoverId([1; 16]),
            source: "a".parse().unwrap(),
            target: "b".parse().unwrap(),
        }
    }

    pub(crate) fn record() -> ImageRecord {
        ImageRecord {
            term: Term(5),
            owner: "a".parse().unwrap(),
            intent: None,
            backup: None,
            wanted: Wanted::Running,
            number: ImageNumber(1),
            indices: ImageRecord::FIRST_INDICES,
            ipv4: None,
            disk_origin: None,
            profile: Profile {
                image: "default".into(),
                memory_bytes: 16 << 20,
                disk_bytes: 0,
                host_key_seed: [0; 32],
                authorized_keys: vec![],
            },
        }
    }

    #[test]
    fn each_change_leads_to_its_standing() {
        let (ticket, owned) = (ticket(), record());
        let announced = Change::Announce.apply(&owned, &ticket);
        for (record, standing) in [
            (Some(&owned), Standing::Owned),
            (Some(&announced), Standing::Announced),
            (Some(&Change::Clear.apply(&announced, &ticket)), Standing::Owned),
            (Some(&Change::TakeBack.apply(&announced, &ticket)), Standing::TakenBack),
            (Some(&Change::Claim.apply(&announced, &ticket)), Standing::Claimed),
            (None, Standing::Elsewhere),
        ] {
            assert_eq!(Standing::of(record, &ticket), standing);
        }
    }

    #[test]
    fn each_change_names_its_owner() {
        let (ticket, claimed) = (ticket(), Change::Claim.apply(&record(), &ticket()));
        assert_eq!((claimed.term, &claimed.owner), (Term(6), &ticket.target));
        let back = Change::TakeBack.apply(&claimed, &ticket);
        assert_eq!((back.term, &back.owner), (Term(7), &ticket.source));
    }

    #[test]
    fn another_attempts_intent_is_not_this_ones() {
        let other = Ticket { handover: HandoverId([2; 16]), ..ticket() };
        let announced = Change::Announce.apply(&record(), &other);
        assert_eq!(Standing::of(Some(&announced), &ticket()), Standing::Owned);
        let later = ImageRecord { term: Term(7), ..announced };
        assert_eq!(Standing::of(Some(&later), &ticket()), Standing::TakenBack);
    }

    #[test]
    fn an_image_that_moved_on_is_elsewhere() {
        let moved = ImageRecord { term: Term(9), owner: "c".parse().unwrap(), ..record() };
        assert_eq!(Standing::of(Some(&moved), &ticket()), Standing::Elsewhere);
        let older = ImageRecord { term: Term(4), ..record() };
        assert_eq!(Standing::of(Some(&older), &ticket()), Standing::Elsewhere);
    }
}

//! How a handover ended, and why.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a handover ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Outcome {
    /// The target owns the image and runs it.
    #[serde(rename = "handed_over")]
    HandedOver,
    /// The source owns the image and its machine ran on, connections alive.
    #[serde(rename = "kept")]
    KeptHere,
    /// Not settled yet: paused at the source, gated at the target, nothing lost.
    #[serde(rename = "in_doubt")]
    InDoubt,
    /// No copy was left; the image starts anew from its disk, with a new generation.
    #[serde(rename = "restarted")]
    Restarted,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HandedOver => "handed_over",
            Self::KeptHere => "kept",
            Self::InDoubt => "in_doubt",
            Self::Restarted => "restarted",
        })
    }
}

/// Why a handover ended as it did, where that was not as asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Cause {
    /// Nothing went wrong.
    #[error("done")]
    Done,
    /// The caller cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// It took longer than it was given.
    #[error("timed out while {0}")]
    TimedOut(&'static str),
    /// The target would not take it.
    #[error("the target refused: {0}")]
    TargetRefused(String),
    /// The target could not start it, and holds nothing of it.
    #[error("the target failed: {0}")]
    TargetFailed(String),
    /// The link to the peer was lost.
    #[error("link to the peer lost: {0}")]
    LinkLost(String),
    /// The directory did not answer.
    #[error("{0}")]
    DirectoryAway(String),
    /// Its disk is at another host, and which blocks it has is not known yet.
    #[error("the list of its disk's blocks is still being fetched")]
    DiskUnknown,
    /// Memory changes faster than it can be sent.
    #[error("not converging: {0}")]
    NotConverging(String),
    /// The machine's process ended.
    #[error("the machine's process is gone: {0}")]
    MachineGone(String),
    /// The machine did not do what it was asked.
    #[error("the machine refused: {0}")]
    MachineRefused(String),
    /// Another host has become owner.
    #[error("ownership lost to another host")]
    OwnershipLost,
    /// The peer holds nothing of it.
    #[error("the peer holds no copy")]
    NothingHeld,
    /// Its daemon ended in the middle and was started again.
    #[error("the daemon was restarted during the handover")]
    DaemonRestarted,
}

/// Whether the reason of a handover that came to nothing lies with its target or the way there, so that another one may take
/// the machine: as [`Cause`] puts it.
#[must_use]
pub fn blames_target(reason: &str) -> bool {
    let blames = [
        "the target refused: ",
        "the target failed: ",
        "link to the peer lost: ",
        "timed out while waiting for the target",
        "the peer holds no copy",
    ];
    blames.iter().any(|words| reason.starts_with(words))
}

/// Whether it is that the caller cancelled it: as [`Cause`] puts it.
#[must_use]
pub fn is_cancelled(reason: &str) -> bool {
    reason == Cause::Cancelled.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_tells_whose_it_is() {
        let why = || "h2 is away".to_owned();
        for (cause, target) in [
            (Cause::Done, false),
            (Cause::Cancelled, false),
            (Cause::TimedOut("copying pages"), false),
            (Cause::TimedOut("waiting for the target to prepare"), true),
            (Cause::NothingHeld, true),
            (Cause::TargetRefused(why()), true),
            (Cause::TargetFailed(why()), true),
            (Cause::LinkLost(why()), true),
            (Cause::DirectoryAway(why()), false),
            (Cause::DiskUnknown, false),
            (Cause::NotConverging(why()), false),
            (Cause::MachineGone(why()), false),
            (Cause::MachineRefused(why()), false),
            (Cause::OwnershipLost, false),
            (Cause::DaemonRestarted, false),
        ] {
            assert_eq!(blames_target(&cause.to_string()), target, "{cause}");
            assert_eq!(is_cancelled(&cause.to_string()), cause == Cause::Cancelled, "{cause}");
        }
    }
}

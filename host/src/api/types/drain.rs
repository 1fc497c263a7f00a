//! Hosts that are to take no images, and that are emptied.

use kage_machine::{HostName, UserName};
use serde::{Deserialize, Serialize};

use super::MoveReport;
use crate::units::{Rate, Span};

/// Answer to `cordon` and `uncordon`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cordon {
    /// Which host.
    pub host: HostName,
    /// Whether new images are kept away from it now.
    pub cordoned: bool,
    /// Whether that was otherwise before.
    pub changed: bool,
}

/// Body of `POST /v1/hosts/{host}/drain`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DrainRequest {
    /// Moves at once.
    pub parallel: Option<u16>,
    /// Most that all of them together may take of the link.
    pub bandwidth: Option<Rate>,
    /// Longest pause of a machine aimed at.
    pub blackout: Option<Span>,
    /// Longest move of one machine.
    pub timeout: Option<Span>,
}

/// How far a drain is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DrainProgress {
    /// `drain`; `cancel` once it was asked to stop.
    pub phase: String,
    /// Machines that were to go, those that are gone and those that stay included.
    pub images: u64,
    /// Gone.
    pub moved: u64,
    /// Of which it is known that they stay.
    pub stay: u64,
    /// On their way.
    pub moving: u64,
    /// Since it began.
    pub elapsed_ms: u64,
    /// How much longer it takes, by the bytes of the machines that are gone; absent before the first is.
    pub eta_ms: Option<u64>,
}

/// What became of one machine in a drain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrainedImage {
    /// Whose.
    pub user: UserName,
    /// The host that has it now; for one that stays the last that was tried.
    pub to: Option<HostName>,
    /// As of a move; `left`: it went by itself, or somebody moved or stopped it; `failed`: nothing of it could be moved.
    pub outcome: String,
    /// Why it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Hosts that were tried.
    pub tries: u32,
    /// The last move's report, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<MoveReport>,
}

/// What came of a drain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrainReport {
    /// Which host.
    pub host: HostName,
    /// Whether it is cordoned.
    pub cordoned: bool,
    /// Whether it was cancelled.
    pub cancelled: bool,
    /// Machines that run elsewhere now.
    pub moved: u64,
    /// Machines that are here still.
    pub stay: u64,
    /// From the request to the last report.
    pub total_ms: f64,
    /// Longest pause of a machine.
    pub worst_blackout_ms: f64,
    /// Longest gap in a machine's heartbeat.
    pub worst_gap_ms: f64,
    /// Bytes on the wire.
    pub bytes_wire: u64,
    /// Each machine, in the order in which they ended.
    pub images: Vec<DrainedImage>,
    /// Users whose machines are stopped: their disks are here still, and go where they log in.
    pub stopped: Vec<UserName>,
}

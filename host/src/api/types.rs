//! What the API speaks, as JSON. Field names are the contract of `kage … -o json`.

mod drain;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use kage_machine::{
    Epoch, HostName, Term, UserName,
    identity::{ApName, Kind},
};
use serde::{Deserialize, Serialize};

pub use drain::{Cordon, DrainProgress, DrainReport, DrainRequest, DrainedImage};

use crate::{
    config::Mode,
    units::{Rate, Span},
};

/// What a machine is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Being started.
    Starting,
    /// Serving.
    Running,
    /// Serving while its state goes to another host.
    Moving,
    /// Held.
    Paused,
    /// Whether this copy may go on is not known yet; see `note`.
    InDoubt,
    /// Its disk and identity are kept.
    #[default]
    Stopped,
    /// The guest has failed; see `note` and the logs.
    Failed,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 7] = [
        Self::Starting,
        Self::Running,
        Self::Moving,
        Self::Paused,
        Self::InDoubt,
        Self::Stopped,
        Self::Failed,
    ];

    /// The name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Moving => "moving",
            Self::Paused => "paused",
            Self::InDoubt => "in_doubt",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }
}

impl std::str::FromStr for State {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|state| state.name() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|state| state.name()).collect();
            format!("{text:?} is no state; choose one of {}", names.join(", "))
        })
    }
}

/// What a copy of an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaKind {
    /// Kept nearly fresh, page by page.
    Mirror,
    /// One whole epoch.
    Checkpoint,
}

/// A copy of an image at another host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Replica {
    /// Where.
    pub host: HostName,
    /// What it is.
    pub kind: ReplicaKind,
    /// `term.epoch` of a checkpoint.
    pub watermark: Option<String>,
    /// Age of its oldest difference.
    pub lag_ms: f64,
    /// Bytes it lacks.
    pub missing_bytes: u64,
    /// If handover came now: how long nobody would run the machine.
    #[serde(default)]
    pub handover_ms: f64,
    /// If handover came now: bytes on the wire.
    #[serde(default)]
    pub handover_bytes: u64,
}

/// Where mirrors of an image are to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MirrorsRequest {
    /// At exactly these hosts; absent: where the user may be next.
    pub hosts: Option<Vec<HostName>>,
}

/// A mirror beside what was sent to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorCheck {
    /// Where.
    pub host: HostName,
    /// The last epoch that was acknowledged.
    pub epoch: Epoch,
    /// Digest of everything sent, in hexadecimal.
    pub owner_digest: String,
    /// Digest of everything the mirror claims to hold.
    pub mirror_digest: String,
    /// The latest epoch in which something of it was written.
    pub mirror_epoch: Epoch,
    /// Pages that are not what it claims, read one by one.
    pub scrubbed_wrong_pages: u32,
}

/// A mirror as its own host finds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorState {
    /// The latest epoch in which something of it was written.
    pub epoch: Epoch,
    /// Digest of everything it claims to hold, in hexadecimal.
    pub digest: String,
    /// Pages that are not what it claims.
    pub wrong_pages: u32,
}

/// One image, in `kage ls` and `kage show`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageView {
    /// Its user.
    pub user: UserName,
    /// Its identity.
    pub vid: Ipv6Addr,
    /// Its address: the same as the VID.
    pub address: Ipv6Addr,
    /// Its IPv4 address, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Ipv4Addr>,
    /// Its SSH host key, as `known_hosts` has it: type and base64.
    #[serde(default)]
    pub host_key: String,
    /// Its owner.
    pub host: HostName,
    /// The owner's term.
    pub term: Term,
    /// What it is doing.
    pub state: State,
    /// Size of its memory.
    pub memory_bytes: u64,
    /// Its disk, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskView>,
    /// Bytes that no copy elsewhere has.
    pub dirty_bytes: u64,
    /// Copies elsewhere.
    pub replicas: Vec<Replica>,
    /// The process that holds the machine, at its owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Operation under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// Why it is as it is, where that is not plain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// What of an image's disk is at its owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskView {
    /// Its size.
    pub bytes: u64,
    /// Bytes that its owner holds; absent for a stopped image at which nobody has looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_bytes: Option<u64>,
    /// Bytes that are still elsewhere, or nowhere; those of which it is not known yet whether they are zeros count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_bytes: Option<u64>,
    /// Bytes fetched from other hosts so far.
    pub pulled_bytes: u64,
    /// The host that has what is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<HostName>,
}

/// What a scrub found; result of `POST /v1/images/{user}/scrub`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// Whose disk.
    pub user: UserName,
    /// Bytes of the log that were read.
    pub checked_bytes: u64,
    /// Blocks of 4 KiB whose bytes were not what had been written.
    pub corrupt_blocks: u64,
    /// Those of them that another host still had.
    pub repaired_blocks: u64,
    /// Those of them that no host has.
    pub lost_blocks: u64,
    /// The first 1,024 of the lost blocks.
    pub lost: Vec<u32>,
    /// Files that had lost blocks, where somebody asked the machine.
    #[serde(default)]
    pub files: Vec<String>,
}

impl ScrubReport {
    /// Nothing was looked at yet.
    #[must_use]
    pub fn of(user: &UserName) -> Self {
        Self {
            user: user.clone(),
            checked_bytes: 0,
            corrupt_blocks: 0,
            repaired_blocks: 0,
            lost_blocks: 0,
            lost: Vec::new(),
            files: Vec::new(),
        }
    }
}

/// Body of `POST /v1/images/{user}/give`, by the host that asks for the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GiveRequest {
    /// The asking host.
    pub to: HostName,
}

/// Answer to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// The term under which the asking host is the owner now; absent: the image stays, for it is no longer stopped, or
    /// parts of its disk are elsewhere still.
    pub term: Option<Term>,
}

/// Body of `PUT /v1/images/{user}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoginRequest {
    /// An access point or a host to start near; absent: the host asked.
    pub at: Option<String>,
    /// A line as in OpenSSH's `authorized_keys`.
    pub key: Option<String>,
    /// Name of the image file.
    pub image: Option<String>,
    /// Make the machine on the spot, as if no pool were ready: what a cold start costs.
    pub cold: bool,
}

/// Answer to a login or a start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoginReply {
    /// The user.
    pub user: UserName,
    /// The image's identity.
    pub vid: Ipv6Addr,
    /// Its address.
    pub address: Ipv6Addr,
    /// Its IPv4 address, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Ipv4Addr>,
    /// Where it runs.
    pub host: HostName,
    /// What it is doing.
    pub state: State,
    /// From the request to the machine's first answer to a packet.
    pub started_ms: f64,
    /// Whether it was running before.
    pub found: bool,
    /// Bytes of its disk that were not here yet; those of which it is not known yet whether they are zeros count.
    #[serde(default)]
    pub disk_missing_bytes: u64,
    /// Bytes of its disk that were fetched before this answer.
    #[serde(default)]
    pub disk_pulled_bytes: u64,
    /// What else to know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Body of `POST /v1/images/{user}/migrate`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MigrateRequest {
    /// The target; absent: any other host.
    pub to: Option<HostName>,
    /// How.
    pub mode: Option<Mode>,
    /// Longest pause aimed at.
    pub blackout: Option<Span>,
    /// Longest move.
    pub timeout: Option<Span>,
    /// Most it may take of the link.
    pub bandwidth: Option<Rate>,
    /// Only say what would be done.
    pub dry_run: bool,
    /// After a switch with pages missing: do not stream back to the source.
    pub no_reverse: bool,
    /// Hash all memory and disk at both ends within the pause, and keep the machine where they differ.
    pub verify: bool,
    /// Send pages as they are, to see what encoding gains.
    pub plain: bool,
}

pub use kage_migrate::{
    Outcome as MoveOutcome, Report as MoveReport,
    report::{Phase as PhaseView, ReplicaHit},
};

/// How far a move is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MoveProgress {
    /// `wait`: for another move of the machine; then as the phases of a report.
    pub phase: String,
    /// While it copies: how far that is.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyProgress>,
}

/// How far the copying before the switch is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CopyProgress {
    /// Which round, from 1.
    pub round: u32,
    /// Pages of it that were looked at.
    pub pages_done: u64,
    /// Pages of it.
    pub pages_total: u64,
    /// Bytes on the wire so far, of all rounds.
    pub bytes_wire: u64,
    /// Bytes per second of this round.
    pub bytes_per_s: u64,
    /// Pages that were written during the round before; absent in the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_pages: Option<u64>,
    /// Since the request.
    pub elapsed_ms: u64,
    /// How much longer the copying takes; absent where it does not converge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_ms: Option<u64>,
}

impl From<&kage_migrate::report::Moving> for CopyProgress {
    fn from(moving: &kage_migrate::report::Moving) -> Self {
        let ms = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate")]
        let bytes_per_s = moving.bytes_per_s as u64;
        Self {
            round: moving.round,
            pages_done: moving.pages_done,
            pages_total: moving.pages_total,
            bytes_wire: moving.bytes_wire,
            bytes_per_s,
            dirty_pages: moving.dirty_pages,
            elapsed_ms: ms(moving.elapsed),
            eta_ms: moving.left.map(ms),
        }
    }
}

/// Answer to a dry run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MovePlan {
    /// Whose image.
    pub user: UserName,
    /// The source.
    pub from: HostName,
    /// The target.
    pub to: HostName,
    /// How.
    pub mode: String,
    /// Whether the target answers.
    pub reachable: bool,
    /// Pages that may hold something.
    pub pages: u64,
    /// Bytes of them.
    pub bytes_raw: u64,
    /// Whether the target has a mirror, which makes most of them unnecessary.
    pub replica_hit: ReplicaHit,
    /// Pages in all rounds and the pause.
    pub pages_to_send: u64,
    /// Pages in the pause.
    pub pages_at_switch: u64,
    /// Rounds before the switch.
    pub rounds: u32,
    /// Bytes on the wire.
    pub bytes_wire: u64,
    /// From the request to the last page.
    pub total_ms: f64,
    /// Nobody runs the machine for so long.
    pub blackout_ms: f64,
    /// Whether it would be handed over; else see `reason`.
    pub converges: bool,
    /// Why it would be kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Pages that the machine writes per second, one that is written twice counted twice.
    pub dirty_pages_per_s: f64,
    /// Different pages that it writes in the long run.
    pub working_set_pages: f64,
    /// What a page takes on the wire.
    pub bytes_per_page: f64,
    /// What the link carries, or the cap.
    pub bytes_per_s: f64,
    /// Until the target answers.
    pub rtt_ms: f64,
    /// Fields that are assumed, for they could not be measured.
    pub assumed: Vec<String>,
    /// Always set, so that nobody takes a plan for a report.
    pub dry_run: bool,
}

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Under way.
    Running,
    /// Ended; `result` says how.
    Done,
    /// Ended with an error.
    Failed,
    /// Ended because somebody asked.
    Cancelled,
}

/// A long operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Operation {
    /// `HOST:NUMBER`.
    pub id: String,
    /// What it does.
    pub kind: String,
    /// For whom; absent where it is a host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserName>,
    /// Where it stands.
    pub state: OperationState,
    /// How far it is, as its kind tells.
    pub progress: serde_json::Value,
    /// What came of it.
    pub result: Option<serde_json::Value>,
    /// What went wrong.
    pub error: Option<super::error::ErrorBody>,
}

/// A host, in `kage hosts`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostView {
    /// Its name.
    pub name: HostName,
    /// Where its peers connect.
    pub advertise: SocketAddr,
    /// Whether its daemon answers.
    pub up: bool,
    /// Whether new images are kept away.
    pub cordoned: bool,
    /// Images it owns.
    pub images: u64,
    /// Access points that belong to it.
    pub aps: Vec<ApName>,
}

/// Answer of `/v1/operator`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatorView {
    /// Where this host has the operator's public key, which every machine started here lets in; the private half is
    /// looked for beside it.
    pub key_file: Option<PathBuf>,
}

/// An access point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ApView {
    /// Its name.
    pub id: ApName,
    /// NAS identifier.
    pub nas: String,
    /// Its host.
    pub host: HostName,
    /// Where it stands.
    pub position_m: [f64; 2],
    /// `l2` or `route`.
    pub mobility: String,
}

/// Body of `POST /v1/roam`: what an Accounting-Start would report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoamRequest {
    /// Who.
    pub user: UserName,
    /// Where to.
    pub ap: ApName,
    /// The device's address, where it has a route of its own.
    #[serde(default)]
    pub device: Option<IpAddr>,
    /// The caller wants the move it starts to be over when it is answered.
    #[serde(default)]
    pub wait: bool,
    /// How long ago that was.
    #[serde(default)]
    pub age_ms: u64,
    /// When that was, in milliseconds since 1970, as a former owner of the machine tells the next; counts before `age_ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_ms: Option<u64>,
}

/// Answer to a roam.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoamReply {
    /// Who.
    pub user: UserName,
    /// Where to.
    pub ap: ApName,
    /// The host that belongs to it.
    pub host: HostName,
    /// What follows.
    pub action: RoamAction,
    /// The move that was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// The move's report, where the caller waited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<MoveReport>,
}

/// What a roam leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoamAction {
    /// The machine is there already.
    Stays,
    /// It moves.
    Moves,
    /// It is stopped and stays so.
    Stopped,
}

/// Where a user may be next; answer of `/v1/images/{user}/prediction`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PredictionView {
    /// Who.
    pub user: UserName,
    /// The access point where the user is, if that is known.
    pub at: Option<ApName>,
    /// Access points, the likeliest first.
    pub next: Vec<NextView>,
    /// Hosts other than the access point's, the likeliest first.
    pub hosts: Vec<HostChance>,
    /// How much longer the user will be there, in seconds: half of the times less than that.
    pub left_s: Option<f64>,
    /// How many of the last changes of access point were scored.
    pub window: u32,
    /// The share of them that was first in the forecast just before.
    pub hit1: f64,
    /// The share that was among the first three.
    pub hit3: f64,
}

/// An access point where a user may be next.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NextView {
    /// Which.
    pub ap: ApName,
    /// Its host.
    pub host: HostName,
    /// How likely.
    pub probability: f64,
}

/// A host where a user may be next.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostChance {
    /// Which.
    pub host: HostName,
    /// How likely.
    pub probability: f64,
}

/// The log of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogView {
    /// The text.
    pub text: String,
    /// Where the next read goes on.
    pub next: u64,
    /// Whether text before this is lost.
    pub truncated: bool,
}

/// A process of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessView {
    /// Its identity.
    pub vid: Ipv6Addr,
    /// Its name.
    pub name: String,
    /// `running` or `waiting`.
    pub state: String,
    /// Its number within the machine.
    pub pid: u32,
    /// Time it had the vCPU.
    pub cpu_ms: u64,
    /// Memory it holds.
    pub memory_bytes: u64,
}

/// A file of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileView {
    /// Its identity.
    pub vid: Ipv6Addr,
    /// The last part of its path.
    pub name: String,
    /// `file`, `directory` or `link`.
    pub state: String,
    /// Its path.
    pub path: String,
    /// Bytes of content.
    pub bytes: u64,
    /// Hosts that hold a copy beside the owner.
    pub replicas: Vec<HostName>,
}

/// A socket of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketView {
    /// Its identity.
    pub vid: Ipv6Addr,
    /// What it serves, or its protocol and port.
    pub name: String,
    /// `listen`, `established` and the other states of TCP; `open` for UDP.
    pub state: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// This end; `[::]` is every address of the image.
    pub local: String,
    /// The other end, if it has one.
    pub remote: Option<String>,
    /// Bytes received.
    pub bytes_in: u64,
    /// Bytes sent.
    pub bytes_out: u64,
}

/// What a machine consists of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Whose machine.
    pub user: UserName,
    /// The host that has looked: its owner.
    pub host: HostName,
    /// Under which term.
    pub term: Term,
    /// Processes; left out unless asked for, as the others.
    #[serde(default)]
    pub processes: Vec<ProcessView>,
    /// Files.
    #[serde(default)]
    pub files: Vec<FileView>,
    /// Sockets.
    #[serde(default)]
    pub sockets: Vec<SocketView>,
    /// How many more there are, for which the table had no room.
    pub omitted: u32,
}

/// Where something is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// What was asked for.
    pub vid: Ipv6Addr,
    /// What it is.
    pub kind: Kind,
    /// Name of a process or socket, path of a file, user of an image.
    pub name: String,
    /// Whose it is.
    pub user: UserName,
    /// The host it is on.
    pub host: HostName,
    /// Under which term.
    pub term: Term,
}

/// Body of `POST /v1/images/{user}/pulse`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PulseRequest {
    /// Whether the heartbeat goes on; either way its figures start anew.
    pub on: bool,
}

/// What the heartbeat saw since its figures were started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pulse {
    /// Beats.
    pub beats: u64,
    /// Longest time between two.
    pub gap_ms: f64,
    /// Sum of what gaps above 1 ms were too long.
    pub stall_ms: f64,
    /// Frames that this host dropped of the machine's, since the machine is here.
    pub dropped_frames: u64,
}

/// Answer of `/readyz`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// This host.
    pub host: HostName,
    /// Whether it can do everything.
    pub ready: bool,
    /// What it lacks.
    pub lacks: Vec<String>,
    /// Machines that wait for a login.
    pub warm_logins: usize,
    /// Empty machines that wait for one from another host.
    pub warm_shells: usize,
    /// Memory that nobody has, as far as its kernel says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_available_bytes: Option<u64>,
}

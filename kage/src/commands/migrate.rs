//! `migrate roam`.

use std::time::Duration;

use http::Method;
use kage_host::{
    api::{
        error::{Code, ErrorBody},
        types::{
            MigrateRequest, MoveOutcome, MovePlan, MoveProgress, MoveReport, Operation, OperationState,
            RoamAction, RoamReply, RoamRequest,
        },
    },
    http::Call,
};
use kage_machine::{UserName, identity::ApName};
use serde::Serialize;

use crate::{
    cli::MigrateArgs,
    client::{Client, Failure},
    operation::{ended, follow, seconds},
    output::{Output, Status, bytes},
};

/// How long a roam with its move may take.
const ROAM: Duration = Duration::from_secs(90);

/// Nothing is said of a move before.
const PATIENCE: Duration = Duration::from_millis(400);
/// Between two words of how far it is: looks come every second at least.
const SELDOM: Duration = Duration::from_millis(900);

/// `kage migrate`.
pub async fn migrate(client: Client, args: MigrateArgs, output: Output) -> Result<(), Failure> {
    if args.cancel {
        return cancel(client, &args.user, output).await;
    }
    let request = MigrateRequest {
        to: args.host,
        mode: args.mode.map(Into::into),
        blackout: args.blackout,
        timeout: args.timeout,
        bandwidth: args.bandwidth,
        dry_run: args.dry_run,
        no_reverse: args.no_reverse,
        verify: args.verify,
        plain: args.plain,
    };
    let call = Call::new(Method::POST, format!("/v1/images/{}/migrate", args.user)).json(&request);
    if args.dry_run {
        let plan: MovePlan = client.call(&call).await?;
        return output.result(&plan, planned);
    }
    let operation: Operation = client.call(&call).await?;
    let mut status = Status::new(output, PATIENCE, SELDOM);
    let mut phase = String::new();
    let followed = follow(&client, operation, output, |progress| {
        let progress: MoveProgress = serde_json::from_value(progress.clone()).unwrap_or_default();
        status.say(|| so_far(&args.user, &progress));
        let is_new = args.verbose && progress.phase != phase;
        phase.clone_from(&progress.phase);
        is_new.then(|| serde_json::json!({ "phase": phase }).to_string())
    });
    let report: Result<MoveReport, Failure> = followed.await;
    status.end();
    let report = report?;
    output.result(&report, line)?;
    verdict(&report)
}

/// A plan in some lines.
fn planned(plan: &MovePlan) -> String {
    let MovePlan { user, from, to, .. } = plan;
    let mut lines = vec![
        format!(
            "{user} would go from {from} to {to}: {} pages, {} before encoding, about {} on the wire",
            plan.pages_to_send,
            bytes(plan.bytes_raw),
            bytes(plan.bytes_wire)
        ),
        format!(
            "in {} rounds and about {:.1} s, with a blackout of about {:.1} ms for {} pages; replica hit: {:?}",
            plan.rounds,
            plan.total_ms / 1e3,
            plan.blackout_ms,
            plan.pages_at_switch,
            plan.replica_hit
        ),
        format!(
            "it writes {:.0} pages a second, {:.0} in all; the link carries {:.1} Mbit/s",
            plan.dirty_pages_per_s,
            plan.working_set_pages,
            plan.bytes_per_s / 125e3
        ),
    ];
    if !plan.reachable {
        lines.push(format!("{to} does not answer: it would stay at {from}"));
    }
    lines.extend(plan.reason.as_ref().map(|reason| format!("it would stay at {from}: {reason}")));
    if !plan.assumed.is_empty() {
        lines.push(format!("assumed, not measured: {}", plan.assumed.join(", ")));
    }
    lines.join("\n")
}

/// The exit code a report stands for.
fn verdict(report: &MoveReport) -> Result<(), Failure> {
    let reason = report.reason.as_deref().unwrap_or("no reason given");
    match report.outcome {
        MoveOutcome::HandedOver => Ok(()),
        MoveOutcome::KeptHere if reason.contains("timed out") || reason.contains("not converging") => {
            let message = format!("{} stays at {}: {reason}", report.user, report.from);
            Err(ErrorBody::new(Code::TimedOut, message).into())
        }
        MoveOutcome::KeptHere => {
            Err(Failure::new(format!("{} stays at {}: {reason}", report.user, report.from)))
        }
        MoveOutcome::InDoubt => {
            let message = format!("{} is paused until it is known who owns it: {reason}", report.user);
            Err(ErrorBody::new(Code::OwnershipLost, message).into())
        }
        MoveOutcome::Restarted => Err(Failure::new(format!("{} was started again: {reason}", report.user))),
    }
}

/// A report in one line.
fn line(report: &MoveReport) -> String {
    format!(
        "{} {} → {}  {}  total {:.1} ms  blackout {:.2} ms  gap {:.2} ms  {} on the wire  {} rounds  {} pages at the switch  lost {}",
        report.user,
        report.from,
        report.to,
        report.outcome,
        report.total_ms,
        report.blackout_ms,
        report.gap_ms,
        bytes(report.bytes_wire),
        report.rounds,
        report.pages_at_switch,
        report.lost_frames,
    )
}

/// How far a move is, in one line.
fn so_far(user: &UserName, progress: &MoveProgress) -> String {
    let phase = &progress.phase;
    let Some(copy) = &progress.copy else { return format!("{user}: {phase}") };
    let dirty = copy.dirty_pages.map_or_else(String::new, |pages| format!(", {pages} were dirty"));
    let left = copy
        .eta_ms
        .map_or_else(|| ", no end in sight".to_owned(), |eta| format!(", about {} left", seconds(eta)));
    format!(
        "{user}: {phase}, round {}, {} of {} pages, {} sent, {}/s{dirty}{left}",
        copy.round,
        copy.pages_done,
        copy.pages_total,
        bytes(copy.bytes_wire),
        bytes(copy.bytes_per_s),
    )
}

/// Answer of `kage migrate USER --cancel`.
#[derive(Debug, Serialize)]
struct Cancelled {
    user: UserName,
    /// Whether all of them came to nothing for that.
    cancelled: bool,
    /// Moves, as they ended.
    moves: Vec<Operation>,
}

async fn cancel(client: Client, user: &UserName, output: Output) -> Result<(), Failure> {
    let call = Call::new(Method::DELETE, format!("/v1/images/{user}/migrate"));
    let begun: Vec<Operation> = client.call(&call).await?;
    let mut moves = Vec::with_capacity(begun.len());
    for operation in begun {
        // A second ^C leaves the waiting alone: it is cancelled already.
        moves.push(ended(&client, operation, output, false, |_| None).await?);
    }
    let cancelled = moves.iter().all(|operation| operation.state == OperationState::Cancelled);
    let answer = Cancelled { user: user.clone(), cancelled, moves };
    output.result(&answer, |answer| answer.moves.iter().map(end_of).collect::<Vec<_>>().join("\n"))?;
    let late = answer.moves.iter().find(|operation| operation.state != OperationState::Cancelled);
    late.map_or(Ok(()), |operation| Err(Failure::new(format!("too late: {}", end_of(operation)))))
}

/// How a move ended, in one line.
fn end_of(operation: &Operation) -> String {
    let report = operation.result.clone().and_then(|report| serde_json::from_value(report).ok());
    match (report, &operation.error) {
        (Some(report), _) => match &report {
            MoveReport { outcome: MoveOutcome::HandedOver, .. } => line(&report),
            MoveReport { user, from, reason, outcome, .. } => {
                format!("{user} {outcome} at {from}: {}", reason.as_deref().unwrap_or("no reason given"))
            }
        },
        (None, Some(error)) => format!("{}: {error}", operation.id),
        (None, None) => format!("{} ended without a report", operation.id),
    }
}

/// `kage roam`.
pub async fn roam(
    client: Client,
    user: UserName,
    ap: ApName,
    wait: bool,
    output: Output,
) -> Result<(), Failure> {
    let request = RoamRequest { user, ap, device: None, wait, age_ms: 0, at_ms: None };
    let call = Call::new(Method::POST, "/v1/roam").json(&request).patience(ROAM);
    let reply: RoamReply = client.call(&call).await?;
    output.result(&reply, |reply| match (reply.action, &reply.report) {
        (RoamAction::Moves, Some(report)) => line(report),
        (RoamAction::Moves, None) => format!("{} moves to {}", reply.user, reply.host),
        (RoamAction::Stays, _) => format!("{} is at {} already", reply.user, reply.host),
        (RoamAction::Stopped, _) => format!("{} is stopped; `kage login {0}` starts it", reply.user),
    })?;
    reply.report.as_ref().map_or(Ok(()), verdict)
}

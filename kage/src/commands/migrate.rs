//! `migrate roam`.

use std::time::Duration;

use http::Method;
use kage_host::{
    api::{
        error::{Code, ErrorBody},
        types::{
            ImageView, MigrateRequest, MoveOutcome, MovePlan, MoveReport, Operation, RoamAction, RoamReply,
            RoamRequest,
        },
    },
    http::Call,
};
use kage_machine::{UserName, identity::ApName};

use crate::{
    cli::MigrateArgs,
    client::{Client, Failure},
    operation::follow,
    output::{Output, bytes},
};

/// How long a roam with its move may take.
const ROAM: Duration = Duration::from_secs(90);

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
    };
    let call = Call::new(Method::POST, format!("/v1/images/{}/migrate", args.user)).json(&request);
    if args.dry_run {
        let plan: MovePlan = client.call(&call).await?;
        return output.result(&plan, |plan| {
            let (from, to, size) = (&plan.from, &plan.to, bytes(plan.bytes_raw));
            format!(
                "{} would go from {from} to {to}: {} pages, {size} before encoding",
                plan.user, plan.pages
            )
        });
    }
    let operation: Operation = client.call(&call).await?;
    let mut said = serde_json::Value::Null;
    let progress = |progress: &serde_json::Value| {
        let is_new = args.verbose && *progress != said;
        said = progress.clone();
        is_new.then(|| progress.to_string())
    };
    let report: MoveReport = follow(&client, operation, output, progress).await?;
    output.result(&report, line)?;
    verdict(&report)
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

async fn cancel(client: Client, user: &UserName, output: Output) -> Result<(), Failure> {
    let view: ImageView = client.call(&Call::new(Method::GET, format!("/v1/images/{user}"))).await?;
    let id = view
        .operation
        .ok_or_else(|| ErrorBody::new(Code::NotFound, format!("no move of {user}'s machine is under way")))?;
    let operation: Operation =
        client.call(&Call::new(Method::DELETE, format!("/v1/operations/{id}"))).await?;
    output.result(&operation, |operation| format!("operation {} is being cancelled", operation.id))
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

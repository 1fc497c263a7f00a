//! `host-drain`.

use std::time::Duration;

use http::Method;
use kage_host::{
    api::types::{DrainProgress, DrainReport, DrainRequest, Operation},
    http::Call,
};

use crate::{
    cli::DrainArgs,
    client::{Client, Failure},
    operation::{follow, seconds},
    output::{Output, Status, bytes, table},
};

/// Between two words of how far it is.
const TELL: Duration = Duration::from_secs(1);

/// `kage host-drain`.
pub async fn drain(client: Client, args: DrainArgs, output: Output) -> Result<(), Failure> {
    let DrainArgs { host, parallel, bandwidth, blackout, timeout } = args;
    let request = DrainRequest { parallel, bandwidth, blackout, timeout };
    let call = Call::new(Method::POST, format!("/v1/hosts/{host}/drain")).json(&request);
    let begun: Operation = client.call(&call).await?;
    let mut status = Status::new(output, Duration::ZERO, TELL);
    let followed = follow(&client, begun, output, |progress| {
        if let Ok(progress) = serde_json::from_value::<DrainProgress>(progress.clone()) {
            status.say(|| line(&progress));
        }
        None
    });
    let report: Result<DrainReport, Failure> = followed.await;
    status.end();
    let report = report?;
    output.result(&report, text)?;
    match report.stay {
        0 if report.cancelled => Err(Failure::new(format!("the drain of {host} was cancelled"))),
        0 => Ok(()),
        stay => Err(Failure::new(format!("{stay} of {} machines run on at {host}", report.images.len()))),
    }
}

fn line(progress: &DrainProgress) -> String {
    let DrainProgress { images, moved, stay, moving, eta_ms, .. } = progress;
    let stay = if *stay > 0 { format!(", {stay} stay") } else { String::new() };
    let left = eta_ms.map_or_else(String::new, |eta| format!(", about {} left", seconds(eta)));
    format!("{}: {moved} of {images} gone, {moving} moving{stay}{left}", progress.phase)
}

fn text(report: &DrainReport) -> String {
    let rows: Vec<_> = report
        .images
        .iter()
        .map(|image| {
            let ms = |figure: Option<f64>| figure.map(|ms| format!("{ms:.2} ms")).unwrap_or_default();
            let moved = image.report.as_ref();
            vec![
                image.user.to_string(),
                image.to.as_ref().map(ToString::to_string).unwrap_or_default(),
                image.outcome.clone(),
                ms(moved.map(|report| report.blackout_ms)),
                ms(moved.map(|report| report.gap_ms)),
                image.reason.clone().unwrap_or_default(),
            ]
        })
        .collect();
    let mut lines = vec![table(&["USER", "TO", "OUTCOME", "BLACKOUT", "GAP", "REASON"], &rows)];
    lines.push(format!(
        "{} of {} machines left {} in {:.1} s, {} on the wire; longest gap {:.2} ms",
        report.moved,
        report.images.len(),
        report.host,
        report.total_ms / 1e3,
        bytes(report.bytes_wire),
        report.worst_gap_ms
    ));
    if !report.stopped.is_empty() {
        let users: Vec<_> = report.stopped.iter().map(ToString::to_string).collect();
        lines.push(format!(
            "stopped, with their disks at {}: {}; `kage login` elsewhere takes one along",
            report.host,
            users.join(", ")
        ));
    }
    if !report.cordoned {
        lines.push(format!("{} is not cordoned any more", report.host));
    }
    lines.join("\n")
}

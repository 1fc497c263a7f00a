//! `login logout stop start ls show`.

use std::time::Duration;

use http::Method;
use kage_host::{
    api::{
        error::{Code, ErrorBody},
        types::{DiskView, ImageView, LoginReply, LoginRequest, ReplicaKind},
    },
    http::Call,
    lifecycle::check_key,
};
use kage_machine::UserName;

use crate::{
    cli::LoginArgs,
    client::{Client, Failure},
    output::{Output, bytes, table},
};

/// How long a start may take.
const START: Duration = Duration::from_secs(40);

fn path(user: &UserName, action: &str) -> String {
    format!("/v1/images/{user}{action}")
}

/// `kage login`.
pub async fn login(client: Client, args: LoginArgs, output: Output) -> Result<(), Failure> {
    let key = match &args.key {
        None => None,
        Some(file) => {
            let text = std::fs::read_to_string(file)
                .map_err(|error| Failure::usage(format!("--key {}: {error}", file.display())))?;
            let key = check_key(&text)
                .map_err(|error| Failure::usage(format!("--key {}: {error}", file.display())))?;
            Some(key)
        }
    };
    let request = LoginRequest { at: args.at, key, image: args.image, cold: false };
    let call = Call::new(Method::PUT, path(&args.user, "")).json(&request).patience(START);
    let reply: LoginReply = cancellable(&client, &args.user, client.call(&call)).await?;
    if let Some(note) = &reply.note {
        output.progress(note);
    }
    let verb = if reply.found { "found at" } else { "started at" };
    output.progress(format!("{} {verb} {} after {:.1} ms", reply.user, reply.host, reply.started_ms));
    if reply.disk_missing_bytes > 0 {
        let (pulled, missing) = (bytes(reply.disk_pulled_bytes), bytes(reply.disk_missing_bytes));
        output.progress(format!("its disk follows: {pulled} so far, at most {missing} to come"));
    }
    output.result(&reply, |reply| reply.address.to_string())
}

/// Waits for a start; ^C stops what it started.
async fn cancellable(
    client: &Client,
    user: &UserName,
    start: impl Future<Output = Result<LoginReply, ErrorBody>>,
) -> Result<LoginReply, Failure> {
    tokio::pin!(start);
    tokio::select! {
        reply = &mut start => Ok(reply?),
        _ = tokio::signal::ctrl_c() => {
            // The daemon goes on with it; only what this command has started is stopped again.
            if let Ok(reply) = start.await && !reply.found {
                let _: Result<ImageView, _> = client.call(&Call::new(Method::POST, path(user, "/stop"))).await;
            }
            Err(ErrorBody::new(Code::Cancelled, "cancelled").into())
        }
    }
}

/// `kage start`.
pub async fn start(client: Client, user: UserName, output: Output) -> Result<(), Failure> {
    let call = Call::new(Method::POST, path(&user, "/start")).patience(START);
    let reply = cancellable(&client, &user, client.call(&call)).await?;
    output.progress(format!("{user} {} at {}", if reply.found { "runs" } else { "started" }, reply.host));
    output.result(&reply, |reply| reply.address.to_string())
}

/// `kage logout`.
pub async fn logout(client: Client, user: UserName, output: Output) -> Result<(), Failure> {
    let view: ImageView = client.call(&Call::new(Method::DELETE, path(&user, ""))).await?;
    output.progress(format!("{user} is logged out; disk and identity are kept at {}", view.host));
    unsynced(&view, output);
    output.result(&view, |_| String::new())
}

/// `kage stop`.
pub async fn stop(client: Client, user: UserName, output: Output) -> Result<(), Failure> {
    let view: ImageView = client.call(&Call::new(Method::POST, path(&user, "/stop"))).await?;
    output.progress(format!("{user} is stopped at {}", view.host));
    unsynced(&view, output);
    output.result(&view, |_| String::new())
}

/// Says what went wrong while a machine was stopped, also to those who want no progress.
fn unsynced(view: &ImageView, output: Output) {
    if let Some(note) = &view.note {
        output.warn(note);
    }
}

/// `kage ls`.
pub async fn ls(client: Client, output: Output) -> Result<(), Failure> {
    let views: Vec<ImageView> = client.call(&Call::new(Method::GET, "/v1/images")).await?;
    output.result(&views, |views| {
        let rows: Vec<_> = views.iter().map(row).collect();
        table(&["USER", "ADDRESS", "HOST", "TERM", "STATE", "MEMORY", "DISK", "REPLICAS", "NOTE"], &rows)
    })
}

fn row(view: &ImageView) -> Vec<String> {
    vec![
        view.user.to_string(),
        view.address.to_string(),
        view.host.to_string(),
        view.term.0.to_string(),
        view.state.name().to_owned(),
        bytes(view.memory_bytes),
        view.disk.as_ref().map_or_else(|| "-".to_owned(), held_of),
        view.replicas.len().to_string(),
        view.note.clone().unwrap_or_default(),
    ]
}

/// How much of a disk is in use, or how large it is where nobody has looked.
fn held_of(disk: &DiskView) -> String {
    match (disk.held_bytes, disk.missing_bytes) {
        (Some(held), Some(missing)) if missing > 0 => format!("{}+{}", bytes(held), bytes(missing)),
        (Some(held), _) => bytes(held),
        (None, _) => format!("of {}", bytes(disk.bytes)),
    }
}

fn disk_line(disk: &DiskView) -> String {
    let mut line = format!("disk      {}", bytes(disk.bytes));
    if let Some(held) = disk.held_bytes {
        line.push_str(&format!(", {} held", bytes(held)));
    }
    if let (Some(missing), Some(origin)) = (disk.missing_bytes.filter(|missing| *missing > 0), &disk.origin) {
        line.push_str(&format!(", {} still at {origin}", bytes(missing)));
    }
    if disk.pulled_bytes > 0 {
        line.push_str(&format!(", {} fetched", bytes(disk.pulled_bytes)));
    }
    line
}

/// `kage show`.
pub async fn show(client: Client, user: UserName, output: Output) -> Result<(), Failure> {
    let view: ImageView = client.call(&Call::new(Method::GET, path(&user, ""))).await?;
    output.result(&view, |view| {
        let mut lines = vec![
            format!("user      {}", view.user),
            format!("address   {}", view.address),
            format!("ipv4      {}", view.ipv4.map_or_else(|| "-".into(), |address| address.to_string())),
            format!("host      {}", view.host),
            format!("term      {}", view.term.0),
            format!("state     {}", view.state.name()),
            format!("memory    {}", bytes(view.memory_bytes)),
            view.disk.as_ref().map_or_else(|| "disk      -".to_owned(), disk_line),
            format!("at risk   {}", bytes(view.dirty_bytes)),
        ];
        for replica in &view.replicas {
            let kind = match replica.kind {
                ReplicaKind::Mirror => "mirror",
                ReplicaKind::Checkpoint => "checkpoint",
            };
            let (lag, missing) = (replica.lag_ms, bytes(replica.missing_bytes));
            lines.push(format!("replica   {kind} at {}, {lag:.0} ms behind, lacks {missing}", replica.host));
        }
        lines.extend(view.operation.as_ref().map(|operation| format!("moving    operation {operation}")));
        lines.extend(view.note.as_ref().map(|note| format!("note      {note}")));
        lines.join("\n")
    })
}

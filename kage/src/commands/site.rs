//! `init hosts`.

use http::Method;
use kage_host::{
    api::types::{Cordon, HostView},
    http::Call,
    init::{self, HostSpec},
};
use kage_machine::HostName;
use serde::Serialize;

use crate::{
    cli::InitArgs,
    client::{Client, Failure},
    output::{Output, table},
};

/// Answer of `kage init`.
#[derive(Debug, Serialize)]
struct Made {
    dir: std::path::PathBuf,
    ca: std::path::PathBuf,
    operator_key: std::path::PathBuf,
    radius_secret: std::path::PathBuf,
    hosts: Vec<MadeHost>,
    created: Vec<std::path::PathBuf>,
}

#[derive(Debug, Serialize)]
struct MadeHost {
    name: kage_machine::HostName,
    tls_dir: std::path::PathBuf,
    config: Option<std::path::PathBuf>,
}

/// `kage init`.
pub fn init(args: &InitArgs, output: Output) -> Result<(), Failure> {
    let hosts = args.host.iter().map(|text| host(text)).collect::<Result<Vec<_>, _>>()?;
    let site = init::site(&args.dir, &hosts).map_err(Failure::new)?;
    let made = Made {
        ca: site.ca(),
        operator_key: site.operator_key(),
        radius_secret: site.radius_secret(),
        hosts: hosts
            .iter()
            .map(|host| MadeHost {
                name: host.name.clone(),
                tls_dir: site.tls_dir(&host.name),
                config: host.advertise.map(|_| site.config(&host.name)),
            })
            .collect(),
        created: site.created.clone(),
        dir: site.dir.clone(),
    };
    output.progress(if made.created.is_empty() {
        "everything was there; nothing was changed"
    } else {
        "made:"
    });
    output.result(&made, |made| {
        made.created.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join("\n")
    })
}

/// Reads `NAME` or `NAME=ADDRESS:PORT`.
fn host(text: &str) -> Result<HostSpec, Failure> {
    let refuse = |cause: String| Failure::usage(format!("--host {text}: {cause}"));
    let (name, address) = text.split_once('=').map_or((text, None), |(name, address)| (name, Some(address)));
    let name = name.parse().map_err(|error: kage_machine::identity::NameError| refuse(error.to_string()))?;
    let advertise = address
        .map(|address| {
            address
                .parse()
                .map_err(|_| refuse(format!("{address:?} is no address; write it as [2001:db8::a]:7701")))
        })
        .transpose()?;
    Ok(HostSpec { name, advertise })
}

/// `kage host-cordon`, `kage host-uncordon`.
pub async fn cordon(client: Client, host: HostName, cordon: bool, output: Output) -> Result<(), Failure> {
    let verb = if cordon { "cordon" } else { "uncordon" };
    let answer: Cordon = client.call(&Call::new(Method::POST, format!("/v1/hosts/{host}/{verb}"))).await?;
    output.result(&answer, |answer| {
        let Cordon { host, cordoned, changed } = answer;
        let is = if *cordoned { "gets no new images" } else { "takes new images" };
        format!("{host} {is}{}", if *changed { "" } else { ", as before" })
    })
}

/// `kage hosts`.
pub async fn hosts(client: Client, output: Output) -> Result<(), Failure> {
    let views: Vec<HostView> = client.call(&Call::new(Method::GET, "/v1/hosts")).await?;
    output.result(&views, |views| {
        let rows: Vec<_> = views
            .iter()
            .map(|view| {
                let state = match (view.up, view.cordoned) {
                    (false, true) => "down, cordoned",
                    (false, false) => "down",
                    (true, true) => "cordoned",
                    (true, false) => "up",
                };
                let aps: Vec<_> = view.aps.iter().map(ToString::to_string).collect();
                vec![
                    view.name.to_string(),
                    view.advertise.to_string(),
                    state.to_owned(),
                    view.images.to_string(),
                    aps.join(","),
                ]
            })
            .collect();
        table(&["HOST", "ADDRESS", "STATE", "IMAGES", "ACCESS POINTS"], &rows)
    })
}

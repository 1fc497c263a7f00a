//! `ps files sockets where`.

use std::net::Ipv6Addr;

use http::Method;
use kage_host::{
    api::types::{FileView, Place, ProcessView, Resources, SocketView},
    http::Call,
};
use kage_machine::{UserName, identity::Kind};

use crate::{
    client::{Client, Failure},
    output::{Output, bytes, shown, table},
};

async fn read(client: &Client, user: &UserName, kind: Kind, output: Output) -> Result<Resources, Failure> {
    let path = format!("/v1/images/{user}/resources?kind={}", kind.name());
    let resources: Resources = client.call(&Call::new(Method::GET, path)).await?;
    if resources.omitted > 0 {
        output.warn(format!("{} more resources are left out", resources.omitted));
    }
    Ok(resources)
}

/// `kage ps`.
pub async fn processes(client: Client, user: UserName, output: Output) -> Result<(), Failure> {
    let resources = read(&client, &user, Kind::Process, output).await?;
    output.result(&resources.processes, |processes| {
        let row = |process: &ProcessView| {
            vec![
                process.vid.to_string(),
                process.pid.to_string(),
                process.state.clone(),
                process.cpu_ms.to_string(),
                bytes(process.memory_bytes),
                process.name.clone(),
            ]
        };
        let rows: Vec<_> = processes.iter().map(row).collect();
        table(&["VID", "PID", "STATE", "CPU MS", "MEMORY", "NAME"], &rows)
    })
}

/// `kage files`.
pub async fn files(client: Client, user: UserName, output: Output) -> Result<(), Failure> {
    let resources = read(&client, &user, Kind::File, output).await?;
    output.result(&resources.files, |files| {
        let row = |file: &FileView| {
            vec![
                file.vid.to_string(),
                file.state.clone(),
                bytes(file.bytes),
                file.replicas.len().to_string(),
                file.path.clone(),
            ]
        };
        let rows: Vec<_> = files.iter().map(row).collect();
        table(&["VID", "STATE", "SIZE", "REPLICAS", "PATH"], &rows)
    })
}

/// `kage sockets`.
pub async fn sockets(client: Client, user: UserName, output: Output) -> Result<(), Failure> {
    let resources = read(&client, &user, Kind::Socket, output).await?;
    output.result(&resources.sockets, |sockets| {
        let row = |socket: &SocketView| {
            vec![
                socket.vid.to_string(),
                socket.name.clone(),
                socket.protocol.clone(),
                socket.state.clone(),
                socket.local.clone(),
                socket.remote.clone().unwrap_or_else(|| "-".into()),
                bytes(socket.bytes_in),
                bytes(socket.bytes_out),
            ]
        };
        let rows: Vec<_> = sockets.iter().map(row).collect();
        table(&["VID", "NAME", "PROTOCOL", "STATE", "LOCAL", "REMOTE", "IN", "OUT"], &rows)
    })
}

/// `kage where`.
pub async fn find(client: Client, vid: Ipv6Addr, output: Output) -> Result<(), Failure> {
    let place: Place = client.call(&Call::new(Method::GET, format!("/v1/where/{vid}"))).await?;
    output.progress(format!("{} {} of {}'s machine", place.kind.name(), shown(&place.name), place.user));
    output.result(&place, |place| place.host.to_string())
}

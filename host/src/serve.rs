//! The daemon's sockets: the unix socket of the API, and the one port for peers.
//!
//! ```text
//! peer port ─ TLS, both certificates ─┬─ ALPN http/1.1 ─▶ the API
//!                                     └─ ALPN kage/1 ─ Hello ─┬─ Directory ─▶ a thread, while this host serves it
//!                                                             ├─ Switch, Bulk ─▶ the handover's target
//!                                                             └─ Mirror ─▶ the same, long before
//! ```
//! Orderly end: on SIGTERM the sockets close and the daemon returns; machines, taps and routes stay.

use std::{io, path::Path, sync::Arc, time::Duration};

use kage_directory::Directory;
use kage_replicate::link::{ALPN, TlsLink};
use kage_wire::Purpose;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio_rustls::TlsAcceptor;

use crate::{api, lifecycle::Daemon, links, tls};

/// Longest wait for a peer's handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Peers that may be in their handshake at once.
const HANDSHAKES: usize = 64;

/// Opens the unix socket of the API; a socket that nobody listens to is replaced.
///
/// # Errors
/// When the directory cannot be made, or another daemon listens.
pub async fn open_unix(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        tokio::fs::create_dir_all(dir).await?;
    }
    if tokio::net::UnixStream::connect(path).await.is_ok() {
        let message = format!("another daemon listens at {}; stop it first", path.display());
        return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
    }
    match tokio::fs::remove_file(path).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    tokio::fs::set_permissions(path, owner_only).await?;
    Ok(listener)
}

/// Serves the API on the unix socket; runs until dropped.
///
/// # Errors
/// When the socket fails.
pub async fn serve_unix(daemon: Arc<Daemon>, listener: UnixListener) -> io::Result<()> {
    axum::serve(listener, api::router(daemon)).await
}

/// Serves peers; runs until dropped. `embedded` is the directory, when this host serves it.
pub async fn serve_peers(daemon: Arc<Daemon>, listener: TcpListener, embedded: Option<Arc<dyn Directory>>) {
    let acceptor = TlsAcceptor::from(daemon.peers.identity().server());
    let router = api::router(daemon.clone());
    let slots = Arc::new(tokio::sync::Semaphore::new(HANDSHAKES));
    loop {
        // The semaphore is never closed.
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, mostly: others will be closed soon.
                tracing::warn!(%error, "a peer was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (acceptor, router, daemon, embedded) =
            (acceptor.clone(), router.clone(), daemon.clone(), embedded.clone());
        tokio::spawn(async move {
            let handshake = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await;
            drop(slot);
            match handshake {
                Ok(Ok(stream)) if stream.get_ref().1.alpn_protocol() == Some(ALPN) => {
                    let (stream, tls) = stream.into_inner();
                    if let Err(error) = take_link(stream, tls, daemon, embedded) {
                        tracing::warn!(%error, "a link was not taken");
                    }
                }
                Ok(Ok(stream)) => {
                    let peer = tls::peer_name(stream.get_ref().1.peer_certificates());
                    let router = match peer {
                        Some(peer) => router.layer(axum::Extension(api::Peer(peer))),
                        None => router,
                    };
                    serve_http(stream, router).await;
                }
                Ok(Err(error)) => tracing::debug!(%error, "a peer's handshake failed"),
                Err(_) => tracing::debug!("a peer's handshake took too long"),
            }
        });
    }
}

/// Serves `/metrics` and nothing else, in the clear; runs until dropped.
pub async fn serve_metrics(daemon: Arc<Daemon>, listener: TcpListener) {
    if let Err(error) = axum::serve(listener, api::metrics_router(daemon)).await {
        tracing::error!(%error, "the socket for figures failed");
    }
}

async fn serve_http(stream: tokio_rustls::server::TlsStream<TcpStream>, router: axum::Router) {
    let service = hyper_util::service::TowerToHyperService::new(router);
    let io = hyper_util::rt::TokioIo::new(stream);
    if let Err(error) = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await {
        tracing::debug!(%error, "a peer's API connection ended");
    }
}

/// Hands a link to a thread of its own.
fn take_link(
    stream: TcpStream,
    tls: rustls::ServerConnection,
    daemon: Arc<Daemon>,
    embedded: Option<Arc<dyn Directory>>,
) -> io::Result<()> {
    let stream = stream.into_std()?;
    std::thread::Builder::new().name("kage-link".to_owned()).spawn(move || {
        let (link, hello) = match TlsLink::from_accepted(stream, tls) {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a link was refused");
                return;
            }
        };
        match hello.purpose {
            Purpose::Directory => links::serve_directory(link, &daemon.me, embedded.as_deref()),
            Purpose::Switch | Purpose::Bulk { .. } | Purpose::Mirror => {
                daemon.take_handover_link(link, hello.purpose)
            }
        }
    })?;
    Ok(())
}

//! `kage host`: puts the daemon together from its configuration and runs it until it is told to end.

use std::{
    io,
    net::SocketAddr,
    os::{linux::net::SocketAddrExt, unix::net::SocketAddr as UnixAddress},
    path::Path,
    sync::Arc,
    time::Duration,
};

use kage_directory::Directory;
use kage_images::compiler::service::PORT;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

use crate::{
    api::error::ErrorBody,
    compile::{self, Cache, Compiler},
    config::Config,
    lifecycle::{AGAIN, Daemon, Parts, blocking},
    links,
    machines::Net,
    peers::Peers,
    real::{FabricNet, VmmMachines, images_dir},
    roaming, serve,
    tls::Identity,
};

/// Longest the daemon says it is not ready because the directory's host does not answer yet.
const DIRECTORY_PATIENCE: Duration = Duration::from_secs(5);

/// Longest wait for tasks at the end.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Runs the daemon of a configuration file until SIGTERM or SIGINT. Machines, taps and routes stay.
///
/// # Errors
/// What keeps it from starting, with the cure.
pub fn run(path: &Path) -> Result<(), ErrorBody> {
    let config = Config::load(path).map_err(ErrorBody::bad_request)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("kage-host")
        .build()
        .map_err(ErrorBody::failed)?;
    let result = runtime.block_on(serve(config));
    runtime.shutdown_timeout(LAST_WORDS);
    result
}

async fn serve(config: Config) -> Result<(), ErrorBody> {
    let failed = |what: String| move |error: io::Error| ErrorBody::failed(format!("{what}: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(ErrorBody::failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ErrorBody::failed)?;

    let identity = Identity::load(&config.peer.tls_dir, &config.host.name).map_err(ErrorBody::bad_request)?;
    // The socket first: it keeps a second daemon away from the first one's machines.
    let socket = config.socket();
    let unix = serve::open_unix(&socket).await.map_err(failed(socket.display().to_string()))?;
    let listener = listen(config.peer.listen).await?;
    let embedded = config.serves_directory();
    let directory = links::open_directory(&config, &identity).map_err(ErrorBody::failed)?;
    let net: Arc<dyn Net> = Arc::new(FabricNet::open(&config).map_err(ErrorBody::failed)?);
    let code = compile::directory(&config.host.state_dir);
    let cache =
        Cache::open(code.clone(), config.image.code_cache.0).map_err(failed(code.display().to_string()))?;
    let engines =
        compile::engines(&config.host.state_dir, images_dir(&config.host.state_dir), config.image.trust());
    let compiler = Arc::new(Compiler::new(cache, engines).map_err(failed("the compiler".to_owned()))?);
    let machines = Arc::new(VmmMachines::new(&config, compiler.clone()).map_err(ErrorBody::failed)?);
    let served: Option<Arc<dyn Directory>> = embedded.then(|| directory.clone());
    let parts = Parts { config, directory, machines: machines.clone(), net, peers: Peers::new(identity) };
    let daemon = Daemon::new(parts)?;

    if let Err(error) = compile::serve(compiler) {
        tracing::error!(%error, port = PORT, "machines here cannot have modules compiled");
    }
    let adopting = daemon.clone();
    blocking(move || {
        adopting.adopt();
        Ok(())
    })
    .await?;
    // Before, a machine that is here would be taken for none, and started a second time.
    let api = daemon.clone();
    tokio::spawn(async move {
        if let Err(error) = serve::serve_unix(api, unix).await {
            tracing::error!(%error, "the API's socket failed");
        }
    });
    tokio::spawn(serve::serve_peers(daemon.clone(), listener, served));
    if let Some(address) = daemon.config.api.listen {
        tokio::spawn(serve::serve_peers(daemon.clone(), listen(address).await?, None));
    }
    if let Some(address) = daemon.config.telemetry.prometheus {
        tokio::spawn(serve::serve_metrics(daemon.clone(), listen(address).await?));
    }
    let starting = daemon.clone();
    blocking(move || {
        for ap in starting.config.aps.iter().filter(|ap| ap.host == starting.me) {
            starting.net.access_point(&ap.id, ap.bridge.as_deref()).map_err(ErrorBody::failed)?;
        }
        Ok(())
    })
    .await?;
    if let Some(radius) = &daemon.config.radius {
        roaming::listener::spawn(daemon.clone(), radius).await?;
    }
    let warming = daemon.clone();
    let warm = tokio::task::spawn_blocking(move || {
        let image = &warming.config.image;
        let result = image.geometry().map_err(|error| error.to_string());
        if let Err(reason) = result.and_then(|geometry| machines.warm(&image.default, geometry)) {
            tracing::error!(reason, "no machine can be started here; `kage doctor` says more");
        }
    });
    tokio::spawn(daemon.clone().keep_indices());
    let joining = tokio::spawn(join(daemon.clone()));
    // Machines can be started once the pool is warm; a directory that is away is reported, not waited for.
    let _ = warm.await;
    let _ = tokio::time::timeout(DIRECTORY_PATIENCE, joining).await;
    notify("READY=1");
    tracing::info!(host = %daemon.me, socket = %socket.display(), "ready");

    tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    notify("STOPPING=1");
    tracing::info!(host = %daemon.me, "ends; machines run on");
    let _ = tokio::fs::remove_file(&socket).await;
    blocking(move || {
        daemon.predictions.write();
        Ok(())
    })
    .await
}

/// Publishes this host, follows the directory, starts what is missing; again until the directory answers.
async fn join(daemon: Arc<Daemon>) {
    let follower = daemon.clone();
    // Routes of machines that run on must not wait for anything else.
    let spawned = std::thread::Builder::new().name("kage-follow".to_owned()).spawn(move || follower.follow());
    if let Err(error) = spawned {
        tracing::error!(%error, "the directory is not followed");
    }
    let mut said = false;
    loop {
        let publisher = daemon.clone();
        let publish = move || {
            publisher.publish()?;
            publisher.reserve_number();
            Ok(())
        };
        let joined = match blocking(publish).await {
            Ok(()) => daemon.start_missing().await,
            Err(error) => Err(error),
        };
        match joined {
            Ok(()) => {
                tokio::spawn(Daemon::supervise(Arc::downgrade(&daemon)));
                tokio::spawn(Daemon::look_ahead(Arc::downgrade(&daemon)));
                return;
            }
            Err(error) => {
                if !said {
                    tracing::warn!(%error, "the directory is awaited");
                    said = true;
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, ErrorBody> {
    TcpListener::bind(address).await.map_err(|error| {
        ErrorBody::failed(format!("cannot listen at {address}: {error}; see [peer] and [api]"))
    })
}

/// Tells whoever started the daemon how it is (`sd_notify(3)`); nobody may have asked.
fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = std::os::unix::net::UnixDatagram::unbound().and_then(|socket| {
        let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str());
        match bytes.strip_prefix(b"@") {
            Some(name) => {
                let address = <UnixAddress as SocketAddrExt>::from_abstract_name(name)?;
                socket.send_to_addr(state.as_bytes(), &address)
            }
            None => socket.send_to(state.as_bytes(), &path),
        }
    });
    if let Err(error) = sent {
        tracing::warn!(%error, "nobody was told: {state}");
    }
}

//! Links of frames between daemons: the directory at another host, and taking in what peers open.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use kage_directory::{Directory, Transport, remote::Request};
use kage_machine::HostName;
use kage_replicate::link::{Link, LinkError, TlsLink, recv_kind, tls};
use kage_wire::{Frame, Hello, Kind, Purpose, Refusal, RefusalCode};

use crate::tls::Identity;

/// Longest wait for a connection to the directory's host.
const CONNECT: Duration = Duration::from_secs(2);

/// Links kept: one for requests, one held by a watch, some for bursts.
const KEPT: usize = 4;

/// Carries directory requests to the host that advertises an address. Each call has a link of its own, so
/// that a watch holds nobody up; links are kept for the next call.
pub struct DirectoryLinks {
    identity: Identity,
    address: SocketAddr,
    host: Mutex<Option<HostName>>,
    idle: Mutex<Vec<TlsLink>>,
}

impl DirectoryLinks {
    /// To the host that advertises `address`; connects when first called.
    #[must_use]
    pub fn new(identity: Identity, address: SocketAddr) -> Self {
        Self { identity, address, host: Mutex::default(), idle: Mutex::default() }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<TlsLink>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name of the host there; asked once.
    fn host(&self) -> Result<HostName, String> {
        let mut host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        match &*host {
            Some(host) => Ok(host.clone()),
            None => {
                let found = self.identity.who_is(self.address, CONNECT).map_err(|error| error.to_string())?;
                Ok(host.insert(found).clone())
            }
        }
    }

    fn connect(&self) -> Result<TlsLink, String> {
        let host = self.host()?;
        let hello = Hello::new(self.identity.name().clone(), Purpose::Directory);
        tls::connect(self.address, &host, self.identity.links(), &hello, CONNECT)
            .map_err(|error| format!("{host} at {}: {error}", self.address))
    }

    /// A kept link on which nothing has arrived and which has not ended, or a new one.
    fn take(&self) -> Result<TlsLink, String> {
        while let Some(mut link) = { self.idle().pop() } {
            if matches!(link.recv(Some(Instant::now())), Err(LinkError::Timeout)) {
                return Ok(link);
            }
        }
        self.connect()
    }

    fn ask(link: &mut TlsLink, request: &[u8], patience: Duration) -> Result<Vec<u8>, LinkError> {
        link.send(&Frame::new(Kind::Directory, request.to_vec()))?;
        Ok(recv_kind(link, Kind::Directory, Some(Instant::now() + patience))?.body)
    }
}

impl Transport for DirectoryLinks {
    fn call(&self, request: &[u8], patience: Duration) -> Result<Vec<u8>, String> {
        let mut link = self.take()?;
        let mut answer = Self::ask(&mut link, request, patience);
        if answer.as_ref().is_err_and(|error| !matches!(error, LinkError::Timeout)) && only_reads(request) {
            // A kept link may have ended unseen. What changes nothing is asked again.
            link = self.connect()?;
            answer = Self::ask(&mut link, request, patience);
        }
        // An answer that comes too late must not be taken for the next question's: the link is dropped.
        let answer = answer.map_err(|error| error.to_string())?;
        let mut idle = self.idle();
        if idle.len() < KEPT {
            idle.push(link);
        }
        Ok(answer)
    }
}

fn only_reads(request: &[u8]) -> bool {
    match postcard::from_bytes::<Request>(request).ok() {
        Some(Request::Get { .. } | Request::List { .. } | Request::Watch { .. }) => true,
        Some(Request::Swap { .. }) | None => false,
    }
}

/// Answers directory requests on a link until the peer closes it.
pub fn serve_directory(mut link: TlsLink, me: &HostName, directory: Option<&dyn Directory>) {
    let Some(directory) = directory else {
        let detail = format!("host {me} does not serve the directory; see endpoints in [cluster]");
        link.refuse(&Refusal::new(RefusalCode::Purpose, detail));
        return;
    };
    if let Err(error) = link.welcome(me.clone(), Purpose::Directory) {
        tracing::debug!(%error, "a directory link ended");
        return;
    }
    loop {
        let request = match recv_kind(&mut link, Kind::Directory, None) {
            Ok(frame) => frame,
            Err(LinkError::Closed) => return,
            Err(error) => {
                tracing::debug!(%error, peer = %link.peer(), "a directory link ended");
                if let Some(refusal) = error.as_refusal() {
                    link.refuse(&refusal);
                }
                return;
            }
        };
        let reply = kage_directory::serve(directory, &request.body);
        if let Err(error) = link.send(&Frame::new(Kind::Directory, reply)) {
            tracing::debug!(%error, peer = %link.peer(), "a directory link ended");
            return;
        }
    }
}

/// The directory of a site as this host reaches it: its own, or the one at its first endpoint.
///
/// # Errors
/// When the own store cannot be opened.
pub fn open_directory(
    config: &crate::config::Config,
    identity: &Identity,
) -> Result<Arc<dyn Directory>, String> {
    match config.cluster.endpoints.first() {
        Some(address) if !config.serves_directory() => {
            let links = DirectoryLinks::new(identity.clone(), *address);
            Ok(Arc::new(kage_directory::Remote::new(links, Duration::from_secs(2))))
        }
        _ => {
            let path = config.host.state_dir.join("directory.redb");
            std::fs::create_dir_all(&config.host.state_dir)
                .map_err(|error| format!("state_dir {}: {error}", config.host.state_dir.display()))?;
            let store = kage_directory::Embedded::open(&path)
                .map_err(|error| format!("{}: {error}; is another daemon using it?", path.display()))?;
            Ok(Arc::new(store))
        }
    }
}

//! Calls to other daemons' HTTP APIs over mutual TLS, with connections kept for the next call.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kage_machine::HostName;
use tokio_rustls::TlsConnector;

use crate::{
    api::error::ErrorBody,
    http::{Answer, Call, Connection},
    tls::{self, Identity},
};

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(2);

/// Idle connections kept to each host.
const KEPT: usize = 4;

/// All peers.
pub struct Peers {
    identity: Identity,
    idle: Mutex<BTreeMap<HostName, Vec<Connection>>>,
}

impl Peers {
    /// Calls as `identity`.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        Self { identity, idle: Mutex::default() }
    }

    /// Who this host is to its peers.
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    fn idle(&self) -> MutexGuard<'_, BTreeMap<HostName, Vec<Connection>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls a host's API.
    ///
    /// # Errors
    /// `Unreachable` when it is down; what it answers otherwise is in the answer.
    pub async fn call(&self, host: &HostName, address: SocketAddr, call: &Call) -> Result<Answer, ErrorBody> {
        let kept = self.idle().get_mut(host).and_then(|connections| {
            connections.retain(Connection::is_open);
            connections.pop()
        });
        let mut connection = match kept {
            Some(connection) => connection,
            None => self.connect(host, address).await?,
        };
        let answer = match connection.call(call).await {
            Err(error) if error.code == crate::api::error::Code::Unreachable && call.repeatable => {
                // A kept connection may have ended unseen; what changes nothing is asked again.
                connection = self.connect(host, address).await?;
                connection.call(call).await
            }
            other => other,
        };
        let answer = answer.map_err(|error| match error.code {
            crate::api::error::Code::Unreachable => ErrorBody::host_down(host, error.message),
            _ => ErrorBody::new(error.code, format!("host {host}: {}", error.message)),
        })?;
        let mut idle = self.idle();
        let connections = idle.entry(host.clone()).or_default();
        if connections.len() < KEPT && connection.is_open() {
            connections.push(connection);
        }
        Ok(answer)
    }

    async fn connect(&self, host: &HostName, address: SocketAddr) -> Result<Connection, ErrorBody> {
        let down = |cause: String| ErrorBody::host_down(host, cause);
        let work = async {
            let stream =
                tokio::net::TcpStream::connect(address).await.map_err(|error| down(error.to_string()))?;
            stream.set_nodelay(true).map_err(|error| down(error.to_string()))?;
            let stream = TlsConnector::from(self.identity.http())
                .connect(tls::any_name(), stream)
                .await
                .map_err(|error| down(error.to_string()))?;
            let name = tls::peer_name(stream.get_ref().1.peer_certificates());
            if name.as_ref() != Some(host) {
                let name = name.map_or_else(|| "nobody".to_owned(), |name| name.to_string());
                return Err(down(format!("the certificate at {address} is for {name}")));
            }
            Connection::over(stream).await.map_err(|error| down(error.to_string()))
        };
        tokio::time::timeout(CONNECT, work)
            .await
            .unwrap_or_else(|_| Err(down(format!("no connection to {address}"))))
    }
}

//! Talking to a daemon: which one, and how.

use std::{
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use http::Method;
use http_body_util::BodyExt;
use kage_host::{
    api::error::{Code, ErrorBody},
    events::Event,
    http::{Call, Connection, unix},
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::de::DeserializeOwned;

use crate::cli::Common;

/// Where sockets are unless told otherwise.
const RUN: &str = "/run/kage";

/// Name of a daemon's socket.
const SOCKET: &str = "host.sock";

/// How a command failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What `kage` ends with.
    pub exit: u8,
    /// For people; nothing is printed when it is empty.
    pub message: String,
}

impl Failure {
    /// A failure of the general kind.
    pub fn new(message: impl std::fmt::Display) -> Self {
        Self { exit: 1, message: message.to_string() }
    }

    /// A failure of what was typed.
    pub fn usage(message: impl std::fmt::Display) -> Self {
        Self { exit: 2, message: message.to_string() }
    }
}

impl From<ErrorBody> for Failure {
    fn from(error: ErrorBody) -> Self {
        Self { exit: error.code.exit(), message: error.message }
    }
}

/// The daemon of this command.
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// The daemon that the options and the environment name.
    ///
    /// # Errors
    /// When none or several could be meant.
    pub fn find(common: &Common) -> Result<Self, Failure> {
        if let Some(socket) =
            common.socket.clone().or_else(|| std::env::var_os("KAGE_SOCKET").map(PathBuf::from))
        {
            return Ok(Self { socket });
        }
        let run = std::env::var_os("KAGE_RUN").map_or_else(|| PathBuf::from(RUN), PathBuf::from);
        only_socket(&run).map(|socket| Self { socket })
    }

    /// A daemon whose socket is known.
    pub fn at(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// Moves this thread into the network of the daemon's host, which alone has routes to machines: with a testbed,
    /// or a daemon in a namespace of its own, not the one of the command.
    ///
    /// # Errors
    /// When it is another one and may not be entered.
    pub fn enter_network(&self) -> Result<(), Failure> {
        let failed = |error: std::io::Error| {
            Failure::new(format!(
                "{}: the network namespace of its daemon cannot be entered: {error}; run this as root, or there",
                self.socket.display()
            ))
        };
        let stream = std::os::unix::net::UnixStream::connect(&self.socket).map_err(failed)?;
        let daemon =
            rustix::net::sockopt::socket_peercred(&stream).map_err(|errno| failed(errno.into()))?.pid;
        let path = format!("/proc/{}/ns/net", daemon.as_raw_nonzero());
        // Whoever may not look can only hope that it is the same.
        let Ok(theirs) = std::fs::metadata(&path) else { return Ok(()) };
        let ours = std::fs::metadata("/proc/self/ns/net").map_err(failed)?;
        if (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()) {
            return Ok(());
        }
        let network = std::fs::File::open(&path).map_err(failed)?;
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|errno| failed(errno.into()))
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// When nobody listens.
    pub async fn connect(&self) -> Result<Connection, Failure> {
        Ok(unix(&self.socket).await?)
    }

    /// Makes one call.
    ///
    /// # Errors
    /// What the daemon says.
    pub async fn call<T: DeserializeOwned>(&self, call: &Call) -> Result<T, ErrorBody> {
        unix(&self.socket).await?.call(call).await?.into_value()
    }

    /// Hands every event of the daemon's after a number to `take`, those to come as well, until that fails or the
    /// daemon ends; returns which.
    pub async fn follow(&self, after: u64, mut take: impl FnMut(&Event) -> Result<(), Failure>) -> Failure {
        let body = async {
            let mut connection = self.connect().await?;
            let call = Call::new(Method::GET, format!("/v1/events?after={after}"));
            Ok::<_, Failure>((connection.open(&call).await?.into_body(), connection))
        };
        // The connection ends with its handle.
        let (mut body, _connection) = match body.await {
            Ok(open) => open,
            Err(failure) => return failure,
        };
        let mut pending = Vec::new();
        loop {
            match body.frame().await {
                Some(Ok(frame)) => {
                    pending.extend_from_slice(frame.data_ref().map_or(&[][..], |data| &data[..]))
                }
                Some(Err(error)) => return Failure::new(format!("the daemon has ended: {error}")),
                None => {
                    let message = "the daemon has ended; its machines run on";
                    return ErrorBody::new(Code::Unreachable, message).into();
                }
            }
            // Events are separated by empty lines; the data is on one line.
            while let Some(end) = pending.windows(2).position(|pair| pair == b"\n\n") {
                let block: Vec<u8> = pending.drain(..end + 2).collect();
                let text = String::from_utf8_lossy(&block);
                for data in text.lines().filter_map(|line| line.strip_prefix("data: ")) {
                    let taken =
                        serde_json::from_str(data).map_err(Failure::new).and_then(|event| take(&event));
                    if let Err(failure) = taken {
                        return failure;
                    }
                }
            }
        }
    }
}

/// The socket in a run directory, or in the only directory below it that has one.
fn only_socket(run: &Path) -> Result<PathBuf, Failure> {
    let own = run.join(SOCKET);
    if own.exists() {
        return Ok(own);
    }
    let entries = std::fs::read_dir(run).into_iter().flatten().filter_map(Result::ok);
    let mut found: Vec<PathBuf> = entries
        .flat_map(|entry| [entry.path().join(SOCKET), entry.path().join("run").join(SOCKET)])
        .filter(|path| path.exists())
        .collect();
    found.sort();
    match found.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(Failure::new(format!(
            "no daemon's socket under {}; start one with `kage host -c host.toml`, or name it with --socket",
            run.display()
        ))),
        several => {
            let names: Vec<_> = several.iter().map(|path| path.display().to_string()).collect();
            Err(Failure::usage(format!(
                "several daemons run here; choose one with --socket: {}",
                names.join(", ")
            )))
        }
    }
}

/// Whether an error is one that waiting longer would not have cured.
#[must_use]
pub fn is_timeout(error: &ErrorBody) -> bool {
    error.code == Code::TimedOut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_only_socket_is_found_and_several_are_listed() {
        let run = std::env::temp_dir().join(format!("kage-client-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&run);
        assert_eq!(only_socket(&run).unwrap_err().exit, 1);
        std::fs::create_dir_all(run.join("h1")).unwrap();
        std::fs::create_dir_all(run.join("h2/run")).unwrap();
        std::fs::write(run.join("h1/host.sock"), "").unwrap();
        assert_eq!(only_socket(&run).unwrap(), run.join("h1/host.sock"));
        std::fs::write(run.join("h2/run/host.sock"), "").unwrap();
        let failure = only_socket(&run).unwrap_err();
        assert!(failure.exit == 2 && failure.message.contains("h2/run/host.sock"), "{failure:?}");
        std::fs::write(run.join("host.sock"), "").unwrap();
        assert_eq!(only_socket(&run).unwrap(), run.join("host.sock"));
        std::fs::remove_dir_all(&run).unwrap();
    }
}

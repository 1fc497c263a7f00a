//! What can go wrong with a testbed, in words and exit codes.

use std::{io, path::PathBuf};

use kage_host::{config::ConfigError, init::InitError, roaming::radius::RadiusError};

/// A testbed could not be made, used or removed.
#[derive(Debug, thiserror::Error)]
pub enum TestbedError {
    /// Nothing is there.
    #[error("no testbed in {}; `kage testbed up --dir {}` makes one", .0.display(), .0.display())]
    Absent(PathBuf),
    /// One is there already.
    #[error("a testbed is up in {}; `kage testbed down --dir {}` removes it", .0.display(), .0.display())]
    Exists(PathBuf),
    /// Another command works on it.
    #[error("another command is changing the testbed in {}; wait until it is done", .0.display())]
    Locked(PathBuf),
    /// A directory that cannot hold sockets, or cannot be made.
    #[error("{}: {cause}", dir.display())]
    Dir {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        cause: String,
    },
    /// Numbers of hosts or devices that make no testbed.
    #[error("{what} {number} is refused; use {least} to {most}")]
    Number {
        /// Of what.
        what: &'static str,
        /// How many.
        number: u16,
        /// At least.
        least: u16,
        /// At most.
        most: u16,
    },
    /// No hosts at all.
    #[error("a testbed needs at least one host")]
    NoHosts,
    /// A link that cannot be made.
    #[error("{0}")]
    Link(String),
    /// No host or device of that name.
    #[error("no host or device {name:?} in this testbed; there are {known}")]
    UnknownName {
        /// As given.
        name: String,
        /// All there are.
        known: String,
    },
    /// No access point of that name.
    #[error("no access point {name:?} in this testbed; there are {known}")]
    UnknownAp {
        /// As given.
        name: String,
        /// All there are.
        known: String,
    },
    /// A program is not installed.
    #[error("{program} is not installed; apt-get install {package}")]
    Tool {
        /// Its name.
        program: &'static str,
        /// Debian's package.
        package: &'static str,
    },
    /// A tool said no.
    #[error("{command}: {message}")]
    Command {
        /// What was run.
        command: String,
        /// What it said.
        message: String,
    },
    /// A program could not be run.
    #[error("{program}: {source}")]
    Program {
        /// Its name.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A namespace could not be entered, or a thread for it not be made.
    #[error("network namespace {name}: {source}; run as root, or `kage testbed down` and `up` again")]
    Namespace {
        /// Its name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A file of the testbed.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The record is not one of this version.
    #[error("{}: {cause}; `kage testbed down` removes this testbed", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// The site's certificates.
    #[error(transparent)]
    Init(#[from] InitError),
    /// The configuration written for a host is refused by the daemon's own reader: a bug here.
    #[error("generated configuration: {0}")]
    Config(#[from] ConfigError),
    /// A daemon ended instead of starting.
    #[error("the daemon of {host} ended at start ({outcome}); {} says:\n{log_tail}", log.display())]
    DaemonEnded {
        /// Which.
        host: String,
        /// Its exit status.
        outcome: String,
        /// Its log.
        log: PathBuf,
        /// The last of it.
        log_tail: String,
    },
    /// A daemon did not get ready in time.
    #[error("the daemon of {host} is not ready after {seconds} s; {} says:\n{log_tail}", log.display())]
    DaemonSlow {
        /// Which.
        host: String,
        /// How long it had.
        seconds: u64,
        /// Its log.
        log: PathBuf,
        /// The last of it.
        log_tail: String,
    },
    /// A daemon is not running.
    #[error("the daemon of {0} is not running")]
    NoDaemon(String),
    /// A process does not end.
    #[error("process {0} does not end, not even by SIGKILL")]
    Undying(u32),
    /// A namespace's processes or other system facts.
    #[error("{doing}: {source}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// An accounting packet that cannot be written.
    #[error("accounting: {0}")]
    Radius(#[from] RadiusError),
    /// Nobody answered accounting.
    #[error("host {host} did not answer accounting for {device} at {ap} within {seconds} s")]
    NoAnswer {
        /// The access point's host.
        host: String,
        /// The device.
        device: String,
        /// The access point.
        ap: String,
        /// How long it had.
        seconds: u64,
    },
    /// Not root.
    #[error("a testbed is made of network namespaces: run as root (sudo kage testbed …)")]
    Permission,
    /// ^C.
    #[error("cancelled; everything made so far is removed")]
    Cancelled,
}

impl TestbedError {
    /// The exit code of a command that ends with it: 1 failed, 2 usage, 3 not found, 5 timed out.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Absent(_) | Self::UnknownName { .. } | Self::UnknownAp { .. } => 3,
            Self::Number { .. } | Self::NoHosts | Self::Link(_) => 2,
            Self::NoAnswer { .. } | Self::DaemonSlow { .. } => 5,
            _ => 1,
        }
    }
}

//! OpenSSH's client, as benches and the demonstration use it: a key of their own, nothing of the caller's configuration.

use std::{
    net::Ipv6Addr,
    path::{Path, PathBuf},
    process::Command,
};

use crate::client::Failure;

/// A key pair in a directory, and the host keys that were seen with it.
pub struct Key(PathBuf);

impl Key {
    /// The one of a user, made or not.
    fn of(dir: &Path, user: &str) -> Self {
        Self(dir.join(format!("{user}_ed25519")))
    }

    /// Removes what [`Key::make`] made for a user.
    pub fn remove(dir: &Path, user: &str) {
        Self::of(dir, user).forget();
    }

    /// Makes one in a directory.
    ///
    /// # Errors
    /// When `ssh-keygen` is not there or makes none.
    pub fn make(dir: &Path, user: &str) -> Result<Self, Failure> {
        let key = Self::of(dir, user);
        key.forget();
        let mut command = Command::new("ssh-keygen");
        command.args(["-q", "-t", "ed25519", "-N", "", "-C", user, "-f"]).arg(&key.0);
        let status = command.status().map_err(|error| {
            Failure::new(format!("ssh-keygen: {error}; `apt-get install openssh-client`"))
        })?;
        if status.success() { Ok(key) } else { Err(Failure::new("ssh-keygen made no key")) }
    }

    /// Its public half, as in `authorized_keys`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn line(&self) -> Result<String, Failure> {
        let path = self.0.with_extension("pub");
        std::fs::read_to_string(&path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
    }

    /// The client, about to log in to a machine.
    #[must_use]
    pub fn ssh(&self, user: &str, address: Ipv6Addr) -> Command {
        let mut command = Command::new("ssh");
        command.args(["-F", "/dev/null", "-i"]).arg(&self.0);
        for option in [
            "IdentitiesOnly=yes",
            "BatchMode=yes",
            "StrictHostKeyChecking=accept-new",
            "ConnectTimeout=10",
            "LogLevel=ERROR",
        ] {
            command.args(["-o", option]);
        }
        command.arg("-o").arg(format!("UserKnownHostsFile={}", self.0.with_extension("known").display()));
        command.arg(format!("{user}@{address}"));
        command
    }

    fn forget(&self) {
        for path in [self.0.clone(), self.0.with_extension("pub"), self.0.with_extension("known")] {
            // What is not there need not be removed.
            let _ = std::fs::remove_file(path);
        }
    }
}

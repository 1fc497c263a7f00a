//! A user's machine as the operator reaches it: by OpenSSH's client, with the operator's key, and only where the
//! machine proves the host key that its record in the directory stands for.
//!
//! The connection is one to the machine's own address, so it survives moves as any of the user's does.

use std::{
    ffi::OsStr,
    net::Ipv6Addr,
    path::{Path, PathBuf},
    process::Command,
};

use http::Method;
use kage_host::{
    api::types::{ImageView, OperatorView, State},
    http::Call,
    lifecycle::check_key,
};
use kage_machine::UserName;

use crate::client::{Client, Failure};

/// Options of every connection. A machine says nothing for as long as a move takes at most, and not for longer.
const OPTIONS: [&str; 14] = [
    "BatchMode=yes",
    "ClearAllForwardings=yes",
    "ConnectTimeout=10",
    "ForwardAgent=no",
    "GlobalKnownHostsFile=/dev/null",
    "HostKeyAlgorithms=ssh-ed25519",
    "IdentitiesOnly=yes",
    "IdentityAgent=none",
    "LogLevel=ERROR",
    "ServerAliveCountMax=6",
    "ServerAliveInterval=10",
    "StrictHostKeyChecking=yes",
    "UpdateHostKeys=no",
    "UserKnownHostsFile=none",
];

/// How to reach a user's machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    user: UserName,
    address: Ipv6Addr,
    /// Type and base64.
    host_key: String,
    /// The operator's private key.
    key: PathBuf,
}

impl Machine {
    /// Asks the daemon. `key` is the operator's private key where the host's configuration does not say it.
    ///
    /// # Errors
    /// When there is no such user, the machine is not running, or there is no private key.
    pub async fn find(client: &Client, user: &UserName, key: Option<PathBuf>) -> Result<Self, Failure> {
        let view: ImageView = client.call(&Call::new(Method::GET, format!("/v1/images/{user}"))).await?;
        if matches!(view.state, State::Stopped | State::Failed) {
            return Err(Failure::new(format!(
                "{user}'s machine is {}; `kage login {user}` starts it",
                view.state.name()
            )));
        }
        let key = match key {
            Some(key) => key,
            None => {
                let view: OperatorView = client.call(&Call::new(Method::GET, "/v1/operator")).await?;
                private_key(view.key_file.as_deref())?
            }
        };
        // ssh's own word for it comes late, and does not say what to do.
        std::fs::File::open(&key).map_err(|error| {
            Failure::new(format!("{}: {error}; name the operator's private key with --key", key.display()))
        })?;
        Ok(Self { user: user.clone(), address: view.address, host_key: host_key(&view)?, key })
    }

    /// OpenSSH's client with `options` of its own, about to run a line, or a subsystem where they say so.
    pub fn ssh(&self, options: &[&str], line: &OsStr) -> Command {
        let mut command = Command::new("ssh");
        command.args(["-F", "none", "-e", "none", "-i"]).arg(&self.key);
        for option in OPTIONS {
            command.args(["-o", option]);
        }
        // Not a file that ^C would leave behind. ssh takes words apart without a shell, and the key has none but these.
        command.arg("-o").arg(format!("KnownHostsCommand=/bin/echo %H {}", self.host_key));
        command.args(options).arg("-l").arg(self.user.as_str()).arg("--");
        command.arg(self.address.to_string()).arg(line);
        command
    }

    /// Whose it is.
    #[must_use]
    pub const fn user(&self) -> &UserName {
        &self.user
    }
}

/// The private half beside the public one.
fn private_key(public: Option<&Path>) -> Result<PathBuf, Failure> {
    let public = public.ok_or_else(|| {
        Failure::new(
            "this host lets no operator in: set operator_key_file in [image] to a key of `kage init`, \
             and start the machine again",
        )
    })?;
    if public.extension() != Some(OsStr::new("pub")) {
        return Err(Failure::new(format!(
            "{}: the private key beside it has no known name; name it with --key",
            public.display()
        )));
    }
    Ok(public.with_extension(""))
}

/// A machine's host key, checked: it becomes a part of a command.
fn host_key(view: &ImageView) -> Result<String, Failure> {
    let refused =
        || Failure::new(format!("{} does not say the host key of {}'s machine", view.host, view.user));
    let line = check_key(&view.host_key).map_err(|_| refused())?;
    let mut words = line.split_ascii_whitespace();
    match (words.next(), words.next(), words.next()) {
        (Some(kind), Some(key), None) => Ok(format!("{kind} {key}")),
        _ => Err(refused()),
    }
}

/// A command as one line for the machine's shell: a single word is one already, several arrive as they are.
#[must_use]
pub fn shell_line(words: &[std::ffi::OsString]) -> std::ffi::OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    if let [line] = words {
        return line.clone();
    }
    let mut line = Vec::new();
    for word in words {
        if !line.is_empty() {
            line.push(b' ');
        }
        let bytes = word.as_bytes();
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_./:=,+@%".contains(byte);
        if !bytes.is_empty() && bytes.iter().all(plain) {
            line.extend_from_slice(bytes);
        } else {
            line.push(b'\'');
            for &byte in bytes {
                if byte == b'\'' { line.extend_from_slice(br"'\''") } else { line.push(byte) }
            }
            line.push(b'\'');
        }
    }
    std::ffi::OsString::from_vec(line)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";

    fn view(host_key: &str) -> ImageView {
        serde_json::from_value(serde_json::json!({
            "user": "alice", "vid": "fd00::1", "address": "fd00::1", "host_key": host_key, "host": "h1", "term": 1,
            "state": "running", "memory_bytes": 0, "dirty_bytes": 0, "replicas": [],
        }))
        .unwrap()
    }

    #[test]
    fn only_what_is_a_host_key_becomes_part_of_a_command() {
        assert_eq!(host_key(&view(KEY)).unwrap(), KEY);
        for bad in ["", "ssh-ed25519", "ssh-rsa AAAA", &format!("{KEY} x"), &format!("{KEY}\n{KEY}")] {
            assert!(host_key(&view(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_host_key_is_pinned_and_nothing_else_is_believed() {
        let machine = Machine {
            user: "alice".parse().unwrap(),
            address: "fd00::1".parse().unwrap(),
            host_key: KEY.into(),
            key: "/etc/kage/operator".into(),
        };
        let command = machine.ssh(&["-T"], OsStr::new("uptime"));
        let words: Vec<_> = command.get_args().map(|word| word.to_str().unwrap().to_owned()).collect();
        for wanted in
            ["StrictHostKeyChecking=yes", "UserKnownHostsFile=none", "GlobalKnownHostsFile=/dev/null"]
        {
            assert!(words.iter().any(|word| word == wanted), "{wanted}");
        }
        assert!(words.contains(&format!("KnownHostsCommand=/bin/echo %H {KEY}")));
        assert_eq!(words[words.len() - 6..], ["-T", "-l", "alice", "--", "fd00::1", "uptime"]);
    }

    #[test]
    fn the_private_key_lies_beside_the_public_one() {
        let beside = |public: &str| private_key(Some(Path::new(public)));
        assert_eq!(beside("/etc/kage/operator.pub").unwrap(), Path::new("/etc/kage/operator"));
        assert!(beside("/etc/kage/operator").unwrap_err().message.contains("--key"));
        assert!(private_key(None).unwrap_err().message.contains("operator_key_file"));
    }

    #[test]
    fn words_arrive_as_they_were_typed() {
        let line = |words: &[&str]| {
            let words: Vec<_> = words.iter().map(OsString::from).collect();
            shell_line(&words).into_string().unwrap()
        };
        assert_eq!(line(&["echo x > /tmp/y; sync"]), "echo x > /tmp/y; sync");
        assert_eq!(line(&["ls", "-l", "/tmp"]), "ls -l /tmp");
        assert_eq!(line(&["echo", "a b", "", "$HOME;", "it's"]), r"echo 'a b' '' '$HOME;' 'it'\''s'");
    }
}

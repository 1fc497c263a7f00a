//! A user at a device of a testbed, logged in to a machine: where programs in it are started and timed from.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
};

use http::Method;
use kage_host::{
    api::types::{LoginReply, LoginRequest},
    http::Call,
};

use crate::{
    client::{Client, Failure},
    ssh::Key,
    testbed::Testbed,
};

/// The user.
pub const USER: &str = "bench";

/// A user who is logged in, at a device.
pub struct Desk<'a> {
    pub(super) testbed: &'a Testbed,
    pub(super) client: Client,
    device: String,
    key: Key,
    login: LoginReply,
}

impl<'a> Desk<'a> {
    /// Logs in at the testbed's first device.
    ///
    /// # Errors
    /// When the testbed has no host or device, or the login fails.
    pub fn login(testbed: &'a Testbed) -> Result<Self, Failure> {
        let status = testbed.status().map_err(Failure::new)?;
        let (Some(host), Some(device)) = (status.hosts.first(), status.devices.first()) else {
            return Err(Failure::new("the testbed has no host or no device"));
        };
        let key = Key::make(testbed.dir(), USER)?;
        let client = Client::at(&host.socket);
        let request = LoginRequest { key: Some(key.line()?), ..LoginRequest::default() };
        let login = Call::new(Method::PUT, format!("/v1/images/{USER}")).json(&request);
        let login = runtime()?.block_on(client.call(&login))?;
        Ok(Self { testbed, device: device.name.clone(), client, key, login })
    }

    fn ssh(&self, line: &str) -> Command {
        let mut command = self.key.ssh(USER, self.login.address);
        // A machine that has ended says nothing more.
        command.args(["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=2", line]);
        command
    }

    /// Runs a line and returns what it prints.
    ///
    /// # Errors
    /// When it fails.
    pub fn say(&self, line: &str) -> Result<String, Failure> {
        let output = self
            .testbed
            .output(&self.device, self.ssh(line).stdin(Stdio::null()).stderr(Stdio::piped()))
            .map_err(Failure::new)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(Failure::new(format!("{line}: {}: {}", output.status, said.trim())));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts a line.
    ///
    /// # Errors
    /// When there is no ssh.
    pub fn spawn(&self, line: &str) -> Result<Running, Failure> {
        let mut command = self.ssh(line);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        self.testbed.spawn(&self.device, &mut command).map(Running).map_err(Failure::new)
    }
}

impl Drop for Desk<'_> {
    fn drop(&mut self) {
        Key::remove(self.testbed.dir(), USER);
    }
}

/// A session that is ended with this.
pub struct Running(pub(super) Child);

impl Running {
    /// Writes, and reads up to a line.
    ///
    /// # Errors
    /// When the session ends before.
    pub fn ask(&mut self, text: &str, until: &str) -> Result<(), Failure> {
        let Some((stdin, stdout)) = self.0.stdin.as_mut().zip(self.0.stdout.as_mut()) else {
            return Err(Failure::new("ssh has no input or output"));
        };
        stdin.write_all(text.as_bytes()).map_err(Failure::new)?;
        stdin.flush().map_err(Failure::new)?;
        // One byte at a time: what comes after the line is the next one's.
        for line in BufReader::with_capacity(1, stdout).lines() {
            if line.map_err(Failure::new)? == until {
                return Ok(());
            }
        }
        Err(Failure::new(format!("the session ended before {until:?}")))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A runtime on this thread.
///
/// # Errors
/// When the kernel gives none.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)
}

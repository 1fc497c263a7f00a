//! A user at a device of a testbed, logged in to a machine: where programs in it are started and timed from.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
};

use http::Method;
use kage_host::{
    api::types::{LoginReply, LoginRequest, MigrateRequest, Operation},
    http::Call,
};

use serde::de::DeserializeOwned;

use crate::{
    client::{Client, Failure},
    operation::follow,
    output::Output,
    ssh::Key,
    testbed::Testbed,
};

/// The user.
pub const USER: &str = "bench";

/// A user who is logged in, at a device.
pub struct Desk<'a> {
    pub(super) testbed: &'a Testbed,
    /// The testbed's first host, wherever the machine is.
    pub(super) client: Client,
    /// Whose machine it is.
    pub(super) user: String,
    pub(super) device: String,
    pub(super) login: LoginReply,
    key: Key,
}

impl<'a> Desk<'a> {
    /// Logs in at the testbed's first device.
    ///
    /// # Errors
    /// When the testbed has no host or device, or the login fails.
    pub fn login(testbed: &'a Testbed) -> Result<Self, Failure> {
        let status = testbed.status().map_err(Failure::new)?;
        let device =
            status.devices.first().ok_or_else(|| Failure::new("the testbed has no host or no device"))?;
        Self::login_as(testbed, USER, &device.name, None)
    }

    /// Logs a user in from a device, to a machine near the access point or host `at`, or at the first host.
    ///
    /// # Errors
    /// When the testbed has no host, or the login fails.
    pub fn login_as(
        testbed: &'a Testbed,
        user: &str,
        device: &str,
        at: Option<&str>,
    ) -> Result<Self, Failure> {
        let status = testbed.status().map_err(Failure::new)?;
        let host =
            status.hosts.first().ok_or_else(|| Failure::new("the testbed has no host or no device"))?;
        let key = Key::make(testbed.dir(), user)?;
        let client = Client::at(&host.socket);
        let request =
            LoginRequest { key: Some(key.line()?), at: at.map(str::to_owned), ..LoginRequest::default() };
        let login = Call::new(Method::PUT, format!("/v1/images/{user}")).json(&request);
        let login = runtime()?.block_on(client.call(&login))?;
        let (user, device) = (user.to_owned(), device.to_owned());
        Ok(Self { testbed, client, user, device, login, key })
    }

    /// Moves the machine, and returns the report.
    ///
    /// # Errors
    /// When the daemon refuses; a move that failed has a report.
    pub fn migrate<T: DeserializeOwned>(
        &self,
        request: &MigrateRequest,
        output: Output,
    ) -> Result<T, Failure> {
        let call = Call::new(Method::POST, format!("/v1/images/{}/migrate", self.user)).json(request);
        runtime()?.block_on(async {
            let operation: Operation = self.client.call(&call).await?;
            follow(&self.client, operation, output, |_| None).await
        })
    }

    fn ssh(&self, line: &str) -> Command {
        let mut command = self.key.ssh(&self.user, self.login.address);
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
        self.start(self.ssh(line))
    }

    /// Starts a line on a terminal: what is written to it is typed, so that `\x03` interrupts. An empty line is the
    /// machine's shell.
    ///
    /// # Errors
    /// When there is no ssh.
    pub fn spawn_on_terminal(&self, line: &str) -> Result<Running, Failure> {
        let mut command = self.key.ssh(&self.user, self.login.address);
        command.args(["-tt", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]);
        if !line.is_empty() {
            command.arg(line);
        }
        self.start(command)
    }

    fn start(&self, mut command: Command) -> Result<Running, Failure> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        self.testbed.spawn(&self.device, &mut command).map(Running).map_err(Failure::new)
    }
}

impl Drop for Desk<'_> {
    fn drop(&mut self) {
        Key::remove(self.testbed.dir(), &self.user);
    }
}

/// A session that is ended with this.
pub struct Running(pub(super) Child);

impl Running {
    /// Writes.
    ///
    /// # Errors
    /// When the session has ended.
    pub fn write(&mut self, text: &str) -> Result<(), Failure> {
        let stdin = self.0.stdin.as_mut().ok_or_else(|| Failure::new("ssh has no input"))?;
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).map_err(Failure::new)
    }

    /// Reads up to a line that holds `what`, and returns it without what ends it.
    ///
    /// # Errors
    /// When the session ends before.
    pub fn line_with(&mut self, what: &str) -> Result<String, Failure> {
        let stdout = self.0.stdout.as_mut().ok_or_else(|| Failure::new("ssh has no output"))?;
        // One byte at a time: what comes after the line is the next one's.
        for line in BufReader::with_capacity(1, stdout).lines() {
            let line = line.map_err(Failure::new)?;
            if line.contains(what) {
                return Ok(line.trim_end().to_owned());
            }
        }
        Err(Failure::new(format!("the session ended before {what:?}")))
    }

    /// Writes, and reads up to a line.
    ///
    /// # Errors
    /// When the session ends before.
    pub fn ask(&mut self, text: &str, until: &str) -> Result<(), Failure> {
        self.write(text)?;
        let stdout = self.0.stdout.as_mut().ok_or_else(|| Failure::new("ssh has no output"))?;
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

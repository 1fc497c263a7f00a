//! Edge hosts, access points and user devices as network namespaces of this machine.
//!
//! ```text
//!   d1 ── kb-ap-1 ─ h1 ─eth0─┐                     ┌─eth0─ h2 ─ kb-ap-2 ── d2
//!        (access)            p1 ── br0 (core) ── p2         (access)
//!                            └ tbf both ways, nft loss; with a delay: two taps and a forwarding process
//! ```
//!
//! [`Testbed::up`] makes the namespaces, a site with certificates and one `host.toml` per host, starts a
//! `kage host` in each, and attaches device dN to access point N. [`Testbed::down`] removes every trace of it, also
//! of one that was interrupted at any point: namespaces carry the testbed's identity in their names and processes
//! in their environment, so that no record is needed to find them.
//!
//! Layout of a testbed's directory: `state.json`, `lock`, `site/` (authority, operator's key, RADIUS secret), and
//! for every host `hN/{host.toml,log,state/,run/}`.
//!
//! Deliberately not here: users' machines. A testbed is a place; `kage demo`, benches and tests do things in it.

pub mod cli;
pub mod delay;

mod access;
mod daemon;
mod error;
mod layout;
mod namespace;
mod network;
mod notify;
mod process;
mod site;
mod state;

use std::{
    net::Ipv6Addr,
    ops::Deref,
    path::{Path, PathBuf},
    process::{Child, Command, Output},
};

pub use access::{Accounted, Moved};
pub use error::TestbedError;
pub use layout::{LinkShape, TestbedSpec};
pub use notify::Cancel;
pub(crate) use notify::poll_until;
pub use state::{DeviceStatus, HostStatus, RadiusStatus, Status as TestbedStatus};

use kage_host::roaming::radius::Status;
use layout::Layout;
use state::{Lock, State};

/// Where a testbed is unless told otherwise.
pub const DEFAULT_DIR: &str = "/run/kage-testbed";

/// A testbed that is up.
#[derive(Debug)]
pub struct Testbed {
    layout: Layout,
}

impl Testbed {
    /// Makes a testbed. If that fails, or is cancelled, what was made is removed.
    ///
    /// # Errors
    /// If there is one in that directory already, a tool is missing, or a part cannot be made.
    pub fn up(spec: TestbedSpec, cancel: &Cancel) -> Result<Self, TestbedError> {
        let layout = Layout::new(&spec)?;
        let lock = Lock::now(&layout.dir)?;
        if let Some(state) = State::read(&layout.dir)? {
            if state.complete {
                return Err(TestbedError::Exists(layout.dir));
            }
            take_down(&layout.dir)?;
        }
        let built = build(&layout, &spec, cancel);
        if let Err(error) = built {
            // The first error is the one that matters; what `take_down` could not remove, `down` will.
            let _ = take_down(&layout.dir);
            lock.remove();
            return Err(error);
        }
        Ok(Self { layout })
    }

    /// Makes a testbed that is taken down when dropped.
    ///
    /// # Errors
    /// As [`Testbed::up`].
    pub fn scoped(spec: TestbedSpec, cancel: &Cancel) -> Result<ScopedTestbed, TestbedError> {
        Self::up(spec, cancel).map(|testbed| ScopedTestbed(Some(testbed)))
    }

    /// Finds the testbed of a directory.
    ///
    /// # Errors
    /// If there is none.
    pub fn open(dir: &Path) -> Result<Self, TestbedError> {
        let dir = layout::canonical(dir)?;
        match State::read(&dir)? {
            Some(state) if state.complete => Ok(Self { layout: Layout::of_state(dir, &state)? }),
            _ => Err(TestbedError::Absent(dir)),
        }
    }

    /// Removes every trace of the testbed of a directory, if there is one, even half of one.
    ///
    /// # Errors
    /// If something resists.
    pub fn remove(dir: &Path) -> Result<(), TestbedError> {
        if !dir.exists() {
            return match layout::canonical(dir) {
                Ok(dir) => sweep(&dir),
                // Without a parent directory there has never been a testbed there.
                Err(_) => Ok(()),
            };
        }
        let dir = layout::canonical(dir)?;
        let lock = Lock::wait(&dir)?;
        take_down(&dir)?;
        lock.remove();
        Ok(())
    }

    /// Removes every trace of it.
    ///
    /// # Errors
    /// If something resists.
    pub fn down(self) -> Result<(), TestbedError> {
        Self::remove(&self.layout.dir)
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.layout.dir
    }

    /// The operator's private SSH key.
    #[must_use]
    pub fn operator_key(&self) -> PathBuf {
        self.layout.site().join("operator")
    }

    /// What there is.
    ///
    /// # Errors
    /// If its record cannot be read.
    pub fn status(&self) -> Result<TestbedStatus, TestbedError> {
        Ok(TestbedStatus::new(&self.layout, &self.state()?))
    }

    /// Carries a device to another access point: first the link, then, unless `silent`, the accounting Start that
    /// the access point sends. The old link stays until nothing comes by it any more, at most a second.
    ///
    /// # Errors
    /// If there is no such device or access point, or nobody answers the Start.
    pub fn move_device(&self, device: &str, ap: &str, silent: bool) -> Result<Moved, TestbedError> {
        access::move_device(&self.layout, device, ap, silent)
    }

    /// Sends the accounting report of the access point where a device is, and waits for its answer.
    ///
    /// # Errors
    /// If there is no such device, or nobody answers.
    pub fn account(&self, device: &str, status: Status) -> Result<Accounted, TestbedError> {
        access::account_now(&self.layout, device, status)
    }

    /// Whose a device is.
    ///
    /// # Errors
    /// If there is no such device.
    pub fn user_of(&self, device: &str) -> Result<String, TestbedError> {
        Ok(self.layout.device(device)?.user.to_string())
    }

    /// Starts a program in the namespace of a host or device. In a host's, `KAGE_SOCKET` names its daemon.
    ///
    /// # Errors
    /// If there is no such namespace or program.
    pub fn spawn(&self, name: &str, command: &mut Command) -> Result<Child, TestbedError> {
        self.prepare(name, command)?;
        let program = command.get_program().to_string_lossy().into_owned();
        namespace::within(&self.layout.namespace_of(name)?, || command.spawn())?
            .map_err(|source| TestbedError::Program { program, source })
    }

    /// Runs a program in the namespace of a host or device and waits for its end.
    ///
    /// # Errors
    /// As [`Testbed::spawn`].
    pub fn output(&self, name: &str, command: &mut Command) -> Result<Output, TestbedError> {
        self.prepare(name, command)?;
        let program = command.get_program().to_string_lossy().into_owned();
        namespace::within(&self.layout.namespace_of(name)?, || command.output())?
            .map_err(|source| TestbedError::Program { program, source })
    }

    /// Runs something of this process in the namespace of a host or device: sockets opened there belong there.
    ///
    /// # Errors
    /// If there is no such namespace.
    pub fn within<T: Send>(&self, name: &str, job: impl FnOnce() -> T + Send) -> Result<T, TestbedError> {
        namespace::within(&self.layout.namespace_of(name)?, job)
    }

    /// Becomes a program in the namespace of a host or device. Returns only if that fails.
    #[must_use]
    pub fn exec(&self, name: &str, command: &mut Command) -> TestbedError {
        let entered = self
            .prepare(name, command)
            .and_then(|()| self.layout.namespace_of(name))
            .and_then(|namespace| namespace::enter(&namespace));
        match entered {
            Ok(()) => {
                let program = command.get_program().to_string_lossy().into_owned();
                let source = std::os::unix::process::CommandExt::exec(command);
                TestbedError::Program { program, source }
            }
            Err(error) => error,
        }
    }

    /// Cuts or mends a host's link to the others.
    ///
    /// # Errors
    /// If there is no such host.
    pub fn set_link(&self, host: &str, up: bool) -> Result<(), TestbedError> {
        network::set_link(&self.layout, self.layout.host(host)?, up)
    }

    /// The process of a host's daemon.
    ///
    /// # Errors
    /// If there is no such host, or its daemon has ended.
    pub fn daemon(&self, host: &str) -> Result<u32, TestbedError> {
        let name = &self.layout.host(host)?.name;
        daemon::running(&self.state()?, name.as_str())
    }

    /// All processes of its hosts: daemons, machines, and what they started.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn processes(&self) -> Result<Vec<u32>, TestbedError> {
        process::marked(&self.layout.id)
    }

    /// A host's address among hosts.
    ///
    /// # Errors
    /// If there is no such host.
    pub fn underlay(&self, host: &str) -> Result<Ipv6Addr, TestbedError> {
        Ok(self.layout.host(host)?.underlay)
    }

    /// Kills a host's daemon with SIGKILL, and it alone: its machines run on.
    ///
    /// # Errors
    /// If there is no such host.
    pub fn kill_daemon(&self, host: &str) -> Result<(), TestbedError> {
        let name = &self.layout.host(host)?.name;
        daemon::kill(&self.state()?, name.as_str())
    }

    /// Starts a host's daemon again and waits until it is ready.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_daemon(&self, host: &str, cancel: &Cancel) -> Result<(), TestbedError> {
        let lock = Lock::wait(&self.layout.dir)?;
        let mut state = self.state()?;
        let host = self.layout.host(host)?;
        let started = daemon::start(&self.layout, &mut state, &[host], cancel);
        drop(lock);
        started
    }

    fn state(&self) -> Result<State, TestbedError> {
        State::read(&self.layout.dir)?.ok_or_else(|| TestbedError::Absent(self.layout.dir.clone()))
    }

    fn prepare(&self, name: &str, command: &mut Command) -> Result<(), TestbedError> {
        if let Ok(host) = self.layout.host(name) {
            command.env("KAGE_SOCKET", self.layout.socket(&host.name));
        } else {
            self.layout.device(name)?;
        }
        Ok(())
    }
}

/// A testbed that is taken down when dropped.
#[derive(Debug)]
pub struct ScopedTestbed(Option<Testbed>);

impl ScopedTestbed {
    /// Lets it stay up.
    #[must_use]
    pub fn keep(mut self) -> Option<Testbed> {
        self.0.take()
    }
}

impl Deref for ScopedTestbed {
    type Target = Testbed;
    fn deref(&self) -> &Testbed {
        match &self.0 {
            Some(testbed) => testbed,
            None => unreachable!("only `keep` takes it, and that consumes the whole"),
        }
    }
}

impl Drop for ScopedTestbed {
    fn drop(&mut self) {
        if let Some(testbed) = self.0.take()
            && let Err(error) = testbed.down()
        {
            tracing::warn!(%error, "the testbed was not removed");
        }
    }
}

fn build(layout: &Layout, spec: &TestbedSpec, cancel: &Cancel) -> Result<(), TestbedError> {
    network::check_tools(spec)?;
    let mut state = State::new(layout, spec);
    state.write(&layout.dir)?;
    site::write(layout, spec)?;
    cancel.check()?;
    network::build(layout, spec, cancel)?;
    let (first, rest) = layout.hosts.split_first().ok_or(TestbedError::NoHosts)?;
    if spec.daemons {
        // The first host serves the directory that the others look for when they start.
        daemon::start(layout, &mut state, &[first], cancel)?;
        daemon::start(layout, &mut state, &rest.iter().collect::<Vec<_>>(), cancel)?;
    }
    access::attach_all(layout, &mut state, spec.daemons)?;
    cancel.check()?;
    state.complete = true;
    state.write(&layout.dir)
}

fn take_down(dir: &Path) -> Result<(), TestbedError> {
    sweep(dir)?;
    state::remove_files(dir)
}

/// Ends the processes and removes the namespaces of the testbed of `dir`.
fn sweep(dir: &Path) -> Result<(), TestbedError> {
    let id = layout::id(dir);
    process::end_all(&id)?;
    namespace::remove_all(&id)
}

#[cfg(test)]
mod tests;

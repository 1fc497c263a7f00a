//! Machines made ready before they are wanted.
//!
//! A *template* is a machine booted once, up to where it waits for its first generation: it has no
//! identity, no randomness, no open network. A *login* is a clone of it in a process of its own, warm
//! and waiting; a *shell* is an empty machine for one that comes from another host.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::AsFd,
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use kage_abi::status;
use kage_images::{Base, BaseError, ImageFile, Symbols};
use kage_machine::{
    Geometry, HostInstant, Machine, MachineError, PAGE_SIZE, PageBytes, PageIndex, PauseCause, SavedState,
    control::Identity,
};

use crate::remote::{BaseFile, RemoteMachine, Spawn};

/// Longest boot of a template.
const BOOT_LIMIT: Duration = Duration::from_secs(10);

/// How long nothing must have been taken before the pool refills: making a machine takes a few
/// milliseconds of a CPU, which a machine that was just taken, for a login or a handover, needs itself.
const QUIET: Duration = Duration::from_millis(500);

/// What a pool keeps ready.
#[derive(Clone, Debug)]
pub struct PoolSpec {
    /// How VMM processes are started.
    pub spawn: Spawn,
    /// Where control sockets lie.
    pub socket_dir: PathBuf,
    /// Size of the machines.
    pub geometry: Geometry,
    /// Clones of the template kept waiting.
    pub logins: usize,
    /// Empty machines kept waiting.
    pub shells: usize,
}

/// Why there is no pool or no machine from it.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// `/dev/kvm` cannot be used.
    #[error("/dev/kvm: {0}; load the kvm module and let this user read and write the device")]
    Kvm(#[source] io::Error),
    /// The image's kernel does not fit.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// Files or directories.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// A machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The template did not come up.
    #[error("the image does not boot: {reason}\n{log}")]
    Boot {
        /// What was seen.
        reason: String,
        /// The guest's log.
        log: String,
    },
}

/// Where the next process listens, until its machine is somebody's. One count for all pools of a daemon, which may
/// share a directory.
fn next_socket(spec: &PoolSpec) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    spec.socket_dir.join(format!("pool-{}-{number}.sock", std::process::id()))
}

/// A machine booted up to its first generation.
struct Template {
    pages: Vec<(PageIndex, Box<PageBytes>)>,
    state: SavedState,
    paused_at: HostInstant,
}

struct Shared {
    spec: PoolSpec,
    kvm: File,
    base: BaseFile,
    template: Template,
    ready: Mutex<Ready>,
    wanted: Condvar,
}

#[derive(Default)]
struct Ready {
    logins: VecDeque<RemoteMachine>,
    shells: VecDeque<RemoteMachine>,
    closed: bool,
    last_take: Option<Instant>,
}

impl Ready {
    /// How long the refill is still to wait.
    fn disturbed_for(&self) -> Option<Duration> {
        QUIET.checked_sub(self.last_take?.elapsed()).filter(|left| !left.is_zero())
    }
}

/// A pool and the thread that refills it.
pub struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    /// Boots the template of an image and starts filling the pool.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn start(spec: PoolSpec, image: &ImageFile) -> Result<Self, PoolError> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").map_err(PoolError::Kvm)?;
        let io = |what: String| move |source| PoolError::Io { what, source };
        std::fs::create_dir_all(&spec.socket_dir).map_err(io(spec.socket_dir.display().to_string()))?;
        let base = BaseFile::new(Base::build(image, spec.geometry)?).map_err(io("base slot".into()))?;
        let path = next_socket(&spec);
        let mut machine = RemoteMachine::spawn(&spec.spawn, &path, kvm.as_fd(), &base, spec.geometry)?;
        let template = boot_template(&mut machine, image);
        machine.end();
        let shared = Arc::new(Shared {
            spec,
            kvm,
            base,
            template: template?,
            ready: Mutex::default(),
            wanted: Condvar::new(),
        });
        let worker = Arc::clone(&shared);
        thread::Builder::new()
            .name("pool".into())
            .spawn(move || refill(&worker))
            .map_err(io("pool thread".into()))?;
        Ok(Self { shared })
    }

    /// Size of the machines.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.shared.spec.geometry
    }

    /// Pages of the template that are not zero: what each login copies.
    #[must_use]
    pub fn template_pages(&self) -> usize {
        self.shared.template.pages.len()
    }

    /// A warm machine that waits for identity and generation; made on the spot when none is ready.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn take_login(&self) -> Result<RemoteMachine, PoolError> {
        let ready = self.shared.take(|ready| ready.logins.pop_front());
        ready.map_or_else(|| self.shared.make_login(), Ok)
    }

    /// A machine cloned from the template on the spot, ready or not: what a cold start costs.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn make_login(&self) -> Result<RemoteMachine, PoolError> {
        self.shared.make_login()
    }

    /// An empty machine to restore into; made on the spot when none is ready.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn take_shell(&self) -> Result<RemoteMachine, PoolError> {
        let ready = self.shared.take(|ready| ready.shells.pop_front());
        ready.map_or_else(|| self.shared.make_shell(), Ok)
    }

    /// Logins and shells that wait now.
    #[must_use]
    pub fn ready(&self) -> (usize, usize) {
        let ready = self.lock();
        (ready.logins.len(), ready.shells.len())
    }

    /// Waits until the pool is full.
    pub fn wait_full(&self) {
        let spec = &self.shared.spec;
        let full = |ready: &mut Ready| ready.logins.len() < spec.logins || ready.shells.len() < spec.shells;
        drop(self.shared.wanted.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, Ready> {
        self.shared.lock()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut ready = self.lock();
        ready.closed = true;
        let Ready { logins, shells, .. } = &mut *ready;
        logins.iter_mut().chain(shells).for_each(Machine::end);
        self.shared.wanted.notify_all();
    }
}

/// The identity of a machine that only rehearses.
fn nobody() -> Identity {
    Identity {
        user: "nobody".to_owned(),
        address: [0; 16],
        prefix_length: 128,
        ipv4: None,
        mtu: 1280,
        host_key_seed: [0; 32],
        authorized_keys: String::new(),
    }
}

/// Waits until the guest says that it has come so far.
fn wait_for(machine: &mut RemoteMachine, status: u32) -> Result<(), String> {
    let limit = Instant::now() + BOOT_LIMIT;
    // Each status is answered at a door, so this advances with the guest.
    while machine.guest_status() != status {
        match machine.status() {
            Ok(_) if Instant::now() < limit => {}
            Ok(_) => return Err("it did not get ready in time".to_owned()),
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(())
}

fn boot_template(machine: &mut RemoteMachine, image: &ImageFile) -> Result<Template, PoolError> {
    machine.boot()?;
    wait_for(machine, status::AWAITING_GENERATION)
        .map_err(|reason| PoolError::Boot { reason, log: machine.logs(&Symbols::of(image.kernel())) })?;
    let paused = machine.pause(PauseCause::Hold)?;
    let memory = machine.memory();
    let mut pages = Vec::new();
    for index in memory.populated().iter() {
        let mut bytes = Box::new([0; PAGE_SIZE]);
        memory.read(index, &mut bytes);
        if bytes.iter().any(|&byte| byte != 0) {
            pages.push((index, bytes));
        }
    }
    Ok(Template { pages, state: paused.state, paused_at: paused.at })
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Ready> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, from: impl FnOnce(&mut Ready) -> Option<RemoteMachine>) -> Option<RemoteMachine> {
        let mut ready = self.lock();
        ready.last_take = Some(Instant::now());
        let taken = from(&mut ready);
        self.wanted.notify_all();
        taken
    }

    /// A shell for whoever waits for it now.
    fn make_shell(&self) -> Result<RemoteMachine, PoolError> {
        self.empty()
    }

    /// A login for whoever waits for it now.
    fn make_login(&self) -> Result<RemoteMachine, PoolError> {
        self.started(self.empty()?)
    }

    /// A shell to keep.
    fn rehearsed_shell(&self) -> Result<RemoteMachine, PoolError> {
        let machine = self.rehearsed()?;
        let memory = machine.memory();
        memory.populated().iter().for_each(|index| memory.zero(index));
        Ok(machine)
    }

    /// A process in which a clone of the template has taken its first steps, as nobody and with its output shut
    /// in. What it left in memory is still there. KVM has then mapped the kernel's pages in this process, which is
    /// most of what a first answer waits for: 5 ms without, 2 ms with it on a PVM host.
    fn rehearsed(&self) -> Result<RemoteMachine, PoolError> {
        let mut machine = self.empty()?;
        self.copy_template(&machine);
        machine.restore_encoded(&self.template.state, self.template.paused_at, false)?;
        machine.run(false)?;
        machine.give_generation(Some(nobody()), [0; 32], 1..1 << 16)?;
        wait_for(&mut machine, status::RUNNING)
            .map_err(|reason| PoolError::Boot { reason, log: machine.logs(&Symbols::default()) })?;
        machine.pause(PauseCause::Hold)?;
        machine.forget()?;
        Ok(machine)
    }

    /// Writes the template's pages.
    fn copy_template(&self, machine: &RemoteMachine) {
        let memory = machine.memory();
        self.template.pages.iter().for_each(|(index, bytes)| memory.write(*index, bytes));
    }

    fn empty(&self) -> Result<RemoteMachine, PoolError> {
        let Self { spec, kvm, base, .. } = self;
        Ok(RemoteMachine::spawn(&spec.spawn, &next_socket(spec), kvm.as_fd(), base, spec.geometry)?)
    }

    /// A login to keep.
    fn rehearsed_login(&self) -> Result<RemoteMachine, PoolError> {
        let machine = self.rehearsed()?;
        let memory = machine.memory();
        // Zeros and no holes: the login will want these pages again.
        memory.populated().iter().for_each(|index| memory.write(index, &[0; PAGE_SIZE]));
        self.started(machine)
    }

    /// Makes a clone of the template out of an empty machine.
    fn started(&self, mut machine: RemoteMachine) -> Result<RemoteMachine, PoolError> {
        self.copy_template(&machine);
        machine.restore_encoded(&self.template.state, self.template.paused_at, false)?;
        machine.run(true)?;
        Ok(machine)
    }
}

/// Keeps the pool full until it is dropped. A failure is told and ends refilling until the next demand.
fn refill(shared: &Shared) {
    loop {
        let (login, shell) = {
            let mut ready = shared.lock();
            while let (false, Some(left)) = (ready.closed, ready.disturbed_for()) {
                ready = shared.wanted.wait_timeout(ready, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            if ready.closed {
                return;
            }
            (ready.logins.len() < shared.spec.logins, ready.shells.len() < shared.spec.shells)
        };
        let made = if shell {
            shared.rehearsed_shell().map(|machine| shared.lock().shells.push_back(machine))
        } else if login {
            shared.rehearsed_login().map(|machine| shared.lock().logins.push_back(machine))
        } else {
            Ok(())
        };
        let pause = match made {
            Ok(()) => !(login || shell),
            Err(error) => {
                eprintln!("kage: cannot fill the pool: {error}");
                true
            }
        };
        shared.wanted.notify_all();
        if pause {
            let ready = shared.lock();
            // A take between the look above and here is seen by its time.
            if ready.closed || ready.disturbed_for().is_some() {
                continue;
            }
            drop(shared.wanted.wait(ready).unwrap_or_else(PoisonError::into_inner));
        }
    }
}

//! The life of images on this host: login, start, stop, death, adoption.
//!
//! ```text
//!            login/start                    migrate
//!  stopped ─────────────▶ starting ─▶ running ─────▶ moving ─▶ (another host's)
//!     ▲                                 │  ▲            │
//!     └──────────── stop ───────────────┘  └── kept ────┘
//!                                       │
//!              guest failed ─▶ failed   └ process ended ─▶ starting (restarted)
//! ```
//!
//! One [`Image`] per user with anything here; whoever changes it holds its slot. Everything that blocks
//! (directory, machines, routes) runs on blocking threads. What to do is decided in [`decide`].
//!
//! Invariants:
//! - A machine that is stopped goes to the host where its user logs in: [`give`].
//! - A machine is started only after a swap made this host its record's owner under a new term.
//! - A daemon that ends leaves machines, taps and routes alone; the next one adopts them.

mod adopt;
pub mod decide;
mod follow;
mod give;
mod ipv4;
mod keys;
mod start;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use kage_directory::{Directory, ImageRecord, Records as _, Versioned, Wanted};
use kage_machine::{HostName, ImageNumber, Memory, Term, UserName, Vid};
use kage_migrate::drive::{Limits, target::Targets};
use tokio::{runtime::Handle, sync::watch};

use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{ImageView, State},
    },
    config::Config,
    disks::{self, ImageDisk},
    events::Events,
    machines::{Hosted, Inspect, MachineSpec, Machines, Net},
    metrics::Metrics,
    mirrors::{Departures, ImageMirrors},
    moves::following::Following,
    operations::Operations,
    peers::Peers,
    prediction::Predictions,
    routes::{Keeper, Records},
};

pub use keys::check_key;
pub use start::{How, Login};

/// Pause before the directory is asked again after it did not answer.
pub(crate) const AGAIN: std::time::Duration = std::time::Duration::from_millis(500);

/// The daemon's parts that outlive any request.
pub struct Daemon {
    /// Its configuration.
    pub config: Config,
    /// This host.
    pub me: HostName,
    /// The site's directory.
    pub directory: Arc<dyn Directory>,
    /// Makes machines.
    pub machines: Arc<dyn Machines>,
    /// Makes taps.
    pub net: Arc<dyn Net>,
    /// Sets routes.
    pub routes: Keeper,
    /// Calls other daemons.
    pub peers: Peers,
    /// What happened.
    pub events: Events,
    /// What is under way.
    pub operations: Operations,
    /// Figures.
    pub metrics: Metrics,
    /// The directory's records as last seen.
    pub seen: watch::Sender<Arc<Records>>,
    /// Where blocking threads hand their work back.
    pub runtime: Handle,
    /// Keys that enter every machine.
    operator_keys: Vec<String>,
    /// Handovers to this host.
    pub targets: Targets,
    /// Handovers from this host.
    pub leaving: Departures,
    spare_number: Mutex<Option<ImageNumber>>,
    /// Questions for resources that are waited for.
    pub asked: Arc<tokio::sync::Semaphore>,
    /// What disks may take of this host.
    pub disk_limits: disks::Limits,
    /// What is known of where users go.
    pub predictions: Predictions,
    images: Mutex<BTreeMap<UserName, Arc<Image>>>,
    /// What the last move to a host found its link to carry, in bytes per second.
    link_rates: Mutex<BTreeMap<HostName, f64>>,
}

/// What a daemon is made of.
pub struct Parts {
    /// Its configuration.
    pub config: Config,
    /// The site's directory.
    pub directory: Arc<dyn Directory>,
    /// Makes machines.
    pub machines: Arc<dyn Machines>,
    /// Makes taps and routes.
    pub net: Arc<dyn Net>,
    /// Calls other daemons.
    pub peers: Peers,
}

/// A user's image as far as it is on this host.
pub struct Image {
    /// Whose it is.
    pub user: UserName,
    /// Held by whoever changes it.
    pub slot: Arc<tokio::sync::Mutex<Slot>>,
    status: Mutex<Status>,
    /// Its disk here.
    pub disk: ImageDisk,
    /// Its mirrors elsewhere, while it runs here.
    pub mirrors: ImageMirrors,
    /// Held by whoever waits for its table of resources.
    pub asking: Arc<tokio::sync::Mutex<()>>,
    /// How it follows its user.
    pub following: Following,
    /// Bumped at every change of status.
    pub changed: watch::Sender<u64>,
}

/// What only the holder may touch.
#[derive(Default)]
pub struct Slot {
    /// The machine, while there is one here.
    pub machine: Option<Box<dyn Hosted>>,
    /// What it was made of.
    pub spec: Option<MachineSpec>,
    /// Its tap, to send on what is left in it after a move.
    pub tap: Option<std::os::fd::OwnedFd>,
    /// The handover by which the machine came, until its right is settled.
    pub ticket: Option<kage_migrate::Ticket>,
    /// Why a machine that an earlier daemon left cannot be reached; it may run, so no other is made here.
    pub unreachable: Option<String>,
    /// Counts machines of this image here, so that a late word of one's end is not taken for the next one's.
    pub incarnation: u64,
    /// Restarts so far.
    pub restarts: decide::Restarts,
}

/// What anybody may read.
#[derive(Clone, Default)]
pub struct Status {
    /// What it is doing.
    pub state: State,
    /// Under which term it is here.
    pub term: Term,
    /// Why it is as it is.
    pub note: Option<String>,
    /// The operation under way.
    pub operation: Option<String>,
    /// Its memory, to read logs and figures from.
    pub memory: Option<Arc<dyn Memory>>,
    /// The way to its table of resources.
    pub inspector: Option<Arc<dyn Inspect>>,
    /// Its process.
    pub pid: Option<u32>,
    /// From which index on its machine wants more; 0 as long as nobody has looked.
    pub index_limit: u64,
}

impl Image {
    fn new(user: UserName) -> Self {
        Self {
            user,
            slot: Arc::default(),
            status: Mutex::default(),
            disk: ImageDisk::default(),
            mirrors: ImageMirrors::default(),
            asking: Arc::default(),
            following: Following::default(),
            changed: watch::Sender::new(0),
        }
    }

    /// The status now.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the status.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.send_modify(|count| *count += 1);
    }

    /// Sets state and note.
    pub fn set(&self, state: State, note: Option<String>) {
        self.update(|status| {
            status.state = state;
            status.note = note;
        });
    }
}

/// Runs `work` on a blocking thread.
///
/// # Errors
/// Its own, or that it panicked.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ErrorBody> + Send + 'static,
) -> Result<T, ErrorBody> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ErrorBody::failed(format!("a task of the daemon ended: {error}; see its log"))),
    }
}

impl Daemon {
    /// Puts a daemon together; nothing runs yet.
    ///
    /// # Errors
    /// When the operator's key cannot be read.
    pub fn new(parts: Parts) -> Result<Arc<Self>, ErrorBody> {
        let Parts { config, directory, machines, net, peers } = parts;
        let me = config.host.name.clone();
        let operator_keys = match &config.image.operator_key_file {
            Some(path) => vec![keys::read_key(path)?],
            None => Vec::new(),
        };
        Ok(Arc::new(Self {
            routes: Keeper::new(net.clone(), config.network.prefix, config.uses_ipv4()),
            events: Events::new(me.clone()),
            operations: Operations::new(me.clone()),
            metrics: Metrics::default(),
            seen: watch::Sender::new(Arc::default()),
            runtime: Handle::current(),
            spare_number: Mutex::default(),
            asked: Arc::new(tokio::sync::Semaphore::new(crate::resources::ASKED)),
            disk_limits: disks::Limits::default(),
            predictions: Predictions::new(&config.host.state_dir),
            images: Mutex::default(),
            link_rates: Mutex::default(),
            targets: Targets::new(me.clone(), directory.clone(), Limits::default()),
            leaving: Departures::default(),
            operator_keys,
            config,
            me,
            directory,
            machines,
            net,
            peers,
        }))
    }

    fn images(&self) -> MutexGuard<'_, BTreeMap<UserName, Arc<Image>>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the last move to a host found its link to carry, in bytes per second.
    #[must_use]
    pub fn link_rate(&self, host: &HostName) -> Option<f64> {
        self.link_rates.lock().unwrap_or_else(PoisonError::into_inner).get(host).copied()
    }

    /// Takes in what a link carried.
    pub(crate) fn link_carried(&self, host: &HostName, bytes_per_s: f64) {
        self.link_rates.lock().unwrap_or_else(PoisonError::into_inner).insert(host.clone(), bytes_per_s);
    }

    /// The image of a user on this host, made when missing.
    #[must_use]
    pub fn image(&self, user: &UserName) -> Arc<Image> {
        self.images().entry(user.clone()).or_insert_with(|| Arc::new(Image::new(user.clone()))).clone()
    }

    /// The image of a user, when there is anything of it here.
    #[must_use]
    pub fn known(&self, user: &UserName) -> Option<Arc<Image>> {
        self.images().get(user).cloned()
    }

    /// Images on this host.
    #[must_use]
    pub fn local(&self) -> Vec<Arc<Image>> {
        self.images().values().cloned().collect()
    }

    /// The identity of an image.
    #[must_use]
    pub fn vid(&self, record: &ImageRecord) -> Vid {
        Vid::of_image(self.config.network.prefix, record.number)
    }

    /// Reads an image's record; blocks.
    ///
    /// # Errors
    /// When the directory does not answer.
    pub fn record(&self, user: &UserName) -> Result<Option<Versioned<ImageRecord>>, ErrorBody> {
        let started = Instant::now();
        let record = self.directory.read::<ImageRecord>(user);
        self.metrics.observe("kage_directory_seconds", &[("op", "read")], started.elapsed());
        Ok(record?)
    }

    /// Reads a record that must be there.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub fn existing(&self, user: &UserName) -> Result<Versioned<ImageRecord>, ErrorBody> {
        self.record(user)?.ok_or_else(|| ErrorBody::no_user(user))
    }

    /// Swaps an image's record.
    ///
    /// # Errors
    /// As the directory.
    pub fn swap(
        &self,
        user: &UserName,
        expected: kage_directory::Revision,
        record: &ImageRecord,
    ) -> Result<kage_directory::Revision, kage_directory::DirectoryError> {
        let started = Instant::now();
        let result = self.directory.swap(user, expected, Some(record));
        self.metrics.observe("kage_directory_seconds", &[("op", "swap")], started.elapsed());
        result
    }

    /// An image as this host sees it, with its disk; blocks.
    #[must_use]
    pub fn full_view(&self, user: &UserName, record: &ImageRecord) -> ImageView {
        let mut view = self.view(user, record);
        if record.owner == self.me {
            view.disk = self.disk_view(self.known(user).as_deref(), record);
        }
        view
    }

    /// An image as this host sees it, but for its disk. For the owner that is how it is.
    #[must_use]
    pub fn view(&self, user: &UserName, record: &ImageRecord) -> ImageView {
        let vid = self.vid(record).address();
        let mut view = ImageView {
            user: user.clone(),
            vid,
            address: vid,
            ipv4: record.ipv4,
            host_key: kage_ssh::keys::HostKey::from_seed(&record.profile.host_key_seed).to_line(),
            host: record.owner.clone(),
            term: record.term,
            state: match record.wanted {
                Wanted::Running => State::Running,
                Wanted::Stopped => State::Stopped,
            },
            memory_bytes: record.profile.memory_bytes,
            disk: None,
            dirty_bytes: 0,
            replicas: Vec::new(),
            pid: None,
            operation: None,
            note: None,
        };
        if record.owner != self.me {
            return view;
        }
        view.replicas = self.replicas(user);
        let copied = view.replicas.iter().map(|replica| replica.missing_bytes).min();
        match self.known(user).map(|image| image.status()) {
            Some(status) => {
                view.state = status.state;
                // The record was read before: what runs here by now may run under a later term.
                view.term = view.term.max(status.term);
                view.note = status.note;
                view.operation = status.operation;
                view.pid = status.pid;
                // Without a copy elsewhere everything that may hold something would be lost with this host.
                if let Some(memory) = status.memory {
                    let all = || u64::from(memory.populated().len()) * kage_machine::PAGE_SIZE as u64;
                    view.dirty_bytes = copied.unwrap_or_else(all);
                }
            }
            None if record.wanted == Wanted::Running => view.state = State::Starting,
            None => {}
        }
        view
    }

    /// The access point's or host's name as the host that belongs to it.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub fn place(&self, at: &str) -> Result<HostName, ErrorBody> {
        let seen = self.seen.borrow().clone();
        if let Ok(host) = at.parse::<HostName>()
            && (host == self.me || seen.hosts.contains_key(&host))
        {
            return Ok(host);
        }
        if let Ok(ap) = at.parse::<kage_machine::identity::ApName>() {
            if let Some(own) = self.config.aps.iter().find(|own| own.id == ap) {
                return Ok(own.host.clone());
            }
            if let Some(record) = self.directory.read::<kage_directory::ApRecord>(&ap)? {
                return Ok(record.record.host);
            }
        }
        Err(ErrorBody::new(
            Code::NotFound,
            format!("{at:?} is neither a host nor an access point; `kage hosts` lists both"),
        ))
    }

    /// Refuses what a machine that cannot be reached stands in the way of.
    fn reachable(image: &Image, slot: &Slot) -> Result<(), ErrorBody> {
        match &slot.unreachable {
            None => Ok(()),
            Some(reason) => Err(ErrorBody::new(
                Code::Busy,
                format!(
                    "a process of {}'s machine is held at this host, and cannot be reached: {reason}",
                    image.user
                ),
            )),
        }
    }

    /// Takes in that a machine's process has ended.
    fn ended(self: &Arc<Self>, user: UserName, incarnation: u64, seen: String) {
        let daemon = self.clone();
        self.runtime.spawn(async move { daemon.after_end(user, incarnation, seen).await });
    }
}

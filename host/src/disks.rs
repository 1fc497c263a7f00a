//! Where the blocks of disks are, and fetching those that are elsewhere.
//!
//! Every host that had an image keeps the log of its disk; the owner's is the current one, the others have what has
//! not changed since. A block is known by its digest, so that any of them may give it.
//!
//! ```text
//!          serve, pull, scrub               start, arrival
//! open ◀─────────────────────── free ───────────────────────▶ lent
//!  └──── idle, or lent ──────────▶ ▲ ◀──── process ended ──────┘
//! ```
//! - [`log`]: a log opened by the daemon itself, while no machine has it.
//! - [`peers`]: lists of digests and blocks for other hosts, and from them.
//! - [`pull`]: what is fetched when; [`fetch`]: from whom.
//! - [`scrub`]: looking for damage.
//!
//! **Whose log is current.** While `disk_origin` is set, the marker `N.since-T` says that the log `N.log` here belongs
//! to the stay that began with term T: what was here before is set aside as `N.old`, for its blocks by digest. The
//! marker is durable before a machine gets the log, and depends on nothing that a restart changes.
//!
//! **Giving away** ([`crate::lifecycle`]) never loses a block: a disk that is whole is given away with its owner as
//! origin. One of which nothing was ever here goes on with the origin it has, or back to it. Any other is only moved,
//! with its machine: blocks written since it came are here alone, and those that have not come are not. A disk that
//! was never made has no blocks, and no origin.
//!
//! # Invariants
//! 1. A log is opened here only while nobody else has it, and closed before a machine gets it.
//! 2. A host that is not the owner never changes its log but as the target of a handover.
//! 3. `disk_origin` is cleared only after a flush of a disk that lacks nothing.
//!
//! # Memory
//! A log that is open takes 16 bytes a block and as much again while it is written: 16 logs of 2 GiB 256 MiB at most.
//! A need is a bit of a map as large as the disk. A list of digests takes 8 bytes a block, blocks 256 KiB a question
//! and as much for its answer: [`QUESTIONS`] are asked and [`ANSWERS`] are answered at a time, 34 MiB with the lists.

mod fetch;
mod log;
mod peers;
mod pull;
mod scrub;
#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak},
    time::{Duration, Instant},
};

use kage_directory::ImageRecord;
use kage_machine::{
    Gone, ImageNumber, MachineError, PAGE_SIZE, PageBytes,
    disk::{Block, Disk, DiskEvents, Fill, Scrubbed},
};
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    api::{
        error::{Code, ErrorBody},
        types::DiskView,
    },
    lifecycle::{Daemon, Image},
    machines::{DiskLog, Hosted},
};

pub use log::LogDisk;
pub use peers::{BLOCKS, Wanted};

/// Logs that are open at a time.
const OPEN: usize = 16;

/// After so long without use a log is closed.
const IDLE: Duration = Duration::from_secs(30);

/// Questions to other hosts at a time.
pub const QUESTIONS: usize = 32;

/// Questions of other hosts answered at a time.
pub const ANSWERS: usize = 16;

/// What is shared by all disks of a host.
pub struct Limits {
    open: Arc<Semaphore>,
    questions: Semaphore,
    answers: Semaphore,
    /// Lists are long: one at a time.
    lists: Semaphore,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            open: Arc::new(Semaphore::new(OPEN)),
            questions: Semaphore::new(QUESTIONS),
            answers: Semaphore::new(ANSWERS),
            lists: Semaphore::new(1),
        }
    }
}

/// Longest wait for a mirror's process to end.
const GIVING_BACK: Duration = Duration::from_secs(2);

/// Who has the log of an image.
#[derive(Default)]
enum Place {
    #[default]
    Free,
    Open(Arc<OpenLog>),
    /// A machine's process, or the making of one.
    Lent(Option<Arc<dyn Disk>>),
    /// A mirror's shell, or the making of one.
    Mirror(Option<Arc<dyn Disk>>),
}

/// The disk of one image at this host.
#[derive(Default)]
pub struct ImageDisk {
    place: Mutex<Place>,
    /// A mirror has given it back.
    freed: Condvar,
    /// The log of an earlier stay.
    aside: Mutex<Option<Arc<OpenLog>>>,
    pulls: pull::Pulls,
    /// What it held when it was last looked at.
    known: Mutex<Option<Held>>,
    scrub: scrub::Turn,
}

/// What of a disk is here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Bytes of blocks that are held.
    pub held_bytes: u64,
    /// Bytes of blocks that are missing.
    pub missing_bytes: u64,
}

impl Held {
    fn of(disk: &dyn Disk) -> Self {
        let mut held = Self::default();
        for block in 0..disk.blocks() {
            match disk.block(block) {
                Block::Zeros => {}
                Block::Held(_) => held.held_bytes += PAGE_SIZE as u64,
                Block::Missing(_) => held.missing_bytes += PAGE_SIZE as u64,
            }
        }
        held
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ImageDisk {
    /// Closes the log here, for a machine that gets it; waits for a call that is under way. Not while a mirror has it.
    #[must_use]
    pub fn lend(&self) -> bool {
        let place = locked(&self.place);
        // One whose process is being ended.
        let waited =
            self.freed.wait_timeout_while(place, GIVING_BACK, |place| matches!(place, Place::Mirror(_)));
        let (mut place, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &*place {
            Place::Mirror(_) => return false,
            Place::Open(log) => log.close(),
            Place::Free | Place::Lent(_) => {}
        }
        self.pulls.forget();
        *place = Place::Lent(None);
        true
    }

    /// As [`Self::lend`], for the shell of a mirror: only while nobody has it.
    #[must_use]
    pub fn lend_to_mirror(&self) -> bool {
        let mut place = locked(&self.place);
        match &*place {
            Place::Lent(_) | Place::Mirror(_) => return false,
            Place::Open(log) => log.close(),
            Place::Free => {}
        }
        self.pulls.forget();
        *place = Place::Mirror(None);
        true
    }

    /// The mirror's shell has it.
    pub fn lent_to_mirror(&self, disk: Option<Arc<dyn Disk>>) {
        let mut place = locked(&self.place);
        if let Place::Mirror(_) = &*place {
            *place = Place::Mirror(disk);
        }
    }

    /// The shell of a mirror is to run its machine.
    pub fn mirror_arrives(&self) {
        let mut place = locked(&self.place);
        if let Place::Mirror(disk) = &*place {
            *place = Place::Lent(disk.clone());
        }
    }

    /// The mirror's process has ended.
    pub fn back_from_mirror(&self) {
        let mut place = locked(&self.place);
        if let Place::Mirror(disk) = &*place {
            if let Some(disk) = disk {
                *locked(&self.known) = Some(Held::of(&**disk));
            }
            *place = Place::Free;
            self.freed.notify_all();
        }
    }

    /// The machine has it.
    pub fn lent_to(&self, disk: Option<Arc<dyn Disk>>) {
        let mut place = locked(&self.place);
        if let Place::Open(log) = &*place {
            log.close();
        }
        *place = Place::Lent(disk);
    }

    /// The machine's process has ended. What it held is remembered.
    pub fn back(&self) {
        let mut place = locked(&self.place);
        if let Place::Lent(disk) = &*place {
            if let Some(disk) = disk {
                *locked(&self.known) = Some(Held::of(&**disk));
            }
            self.pulls.forget();
            *place = Place::Free;
        }
    }

    /// The disk, where a machine has it or it is open.
    fn here(&self) -> Option<Arc<dyn Disk>> {
        Self::in_place(&locked(&self.place))
    }

    fn in_place(place: &Place) -> Option<Arc<dyn Disk>> {
        match place {
            Place::Free | Place::Lent(None) | Place::Mirror(None) => None,
            Place::Lent(Some(disk)) | Place::Mirror(Some(disk)) => Some(disk.clone()),
            Place::Open(log) => Some(log.clone()),
        }
    }

    fn is_lent(&self) -> bool {
        matches!(&*locked(&self.place), Place::Lent(_))
    }

    /// What is held, as far as that is known without opening anything or waiting for anybody.
    fn held(&self) -> Option<Held> {
        let disk = self.place.try_lock().ok().and_then(|place| Self::in_place(&place));
        let held = disk.map(|disk| Held::of(&*disk));
        let mut known = locked(&self.known);
        *known = held.or(*known);
        *known
    }

    /// Bytes fetched from elsewhere since this daemon has had the image.
    #[must_use]
    pub fn pulled_bytes(&self) -> u64 {
        self.pulls.pulled_bytes()
    }

    /// Bytes of a disk that are missing right after a start. All of it, but what has come, as long as there is no list:
    /// the machine does not wait for its log, and whoever asks how it started does not either.
    #[must_use]
    pub fn missing_at_start(&self, record: &ImageRecord) -> u64 {
        match &record.disk_origin {
            None => 0,
            Some(_) if !self.pulls.is_listed() => {
                record.profile.disk_bytes.saturating_sub(self.pulled_bytes())
            }
            Some(_) => self.held().map_or(0, |held| held.missing_bytes),
        }
    }
}

/// A log that the daemon has opened: closed, it answers as a machine that is gone.
struct OpenLog {
    blocks: u32,
    disk: RwLock<Option<(Box<dyn Disk>, OwnedSemaphorePermit)>>,
    used: Mutex<Instant>,
}

impl OpenLog {
    fn new(disk: Box<dyn Disk>, room: OwnedSemaphorePermit) -> Arc<Self> {
        let blocks = disk.blocks();
        Arc::new(Self { blocks, disk: RwLock::new(Some((disk, room))), used: Mutex::new(Instant::now()) })
    }

    fn close(&self) {
        *self.disk.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn is_closed(&self) -> bool {
        self.disk.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn with<T>(&self, act: impl FnOnce(&dyn Disk) -> T) -> Option<T> {
        *locked(&self.used) = Instant::now();
        let disk = self.disk.read().unwrap_or_else(PoisonError::into_inner);
        disk.as_ref().map(|(disk, _)| act(&**disk))
    }

    fn tried<T>(&self, act: impl FnOnce(&dyn Disk) -> Result<T, MachineError>) -> Result<T, MachineError> {
        self.with(act).unwrap_or_else(|| Err(Gone { reason: "its log was given to a machine".into() }.into()))
    }
}

impl Disk for OpenLog {
    fn blocks(&self) -> u32 {
        self.blocks
    }
    fn block(&self, block: u32) -> Block {
        self.with(|disk| disk.block(block)).unwrap_or(Block::Missing(None))
    }
    fn read(&self, block: u32, into: &mut PageBytes) -> Block {
        self.with(|disk| disk.read(block, into)).unwrap_or(Block::Missing(None))
    }
    fn fill(&self, blocks: &[(u32, Fill)]) -> Result<(), MachineError> {
        self.tried(|disk| disk.fill(blocks))
    }
    fn flush(&self) -> Result<(), MachineError> {
        self.tried(|disk| disk.flush())
    }
    fn scrub(&self, budget_bytes: u64) -> Result<Scrubbed, MachineError> {
        self.tried(|disk| disk.scrub(budget_bytes))
    }
    fn sync_guest(&self, patience: Duration) -> Result<(), MachineError> {
        self.tried(|disk| disk.sync_guest(patience))
    }
}

/// What the daemon does about what it hears of a disk.
struct Listener {
    daemon: Weak<Daemon>,
    image: Weak<Image>,
    blocks: u32,
}

impl DiskEvents for Listener {
    fn needed(&self, blocks: &[u32]) {
        let (Some(daemon), Some(image)) = (self.daemon.upgrade(), self.image.upgrade()) else { return };
        image.disk.pulls.need(self.blocks, blocks);
        daemon.pull(&image);
    }

    fn corrupt(&self, block: u32) {
        self.needed(&[block]);
    }

    fn failed(&self, reason: &str) {
        let (Some(daemon), Some(image)) = (self.daemon.upgrade(), self.image.upgrade()) else { return };
        daemon.events.emit("disk_failed", Some(&image.user), json!({ "reason": reason }));
    }
}

impl Daemon {
    /// Where this host keeps logs.
    pub(crate) fn disks_dir(&self) -> PathBuf {
        self.config.host.state_dir.join("disks")
    }

    fn log_of(&self, record: &ImageRecord, ending: &str) -> DiskLog {
        DiskLog {
            path: self.disks_dir().join(format!("{}.{ending}", record.number.0)),
            vid: self.vid(record),
            blocks: u32::try_from(record.profile.disk_bytes / PAGE_SIZE as u64).unwrap_or(0),
        }
    }

    /// An image's disk as it is at this host; blocks. `None` where it has none, or nothing of it is here, or a machine
    /// is being made with it. What an earlier stay left at its owner is not the disk.
    ///
    /// # Errors
    /// When its log cannot be opened.
    pub(crate) fn disk(
        self: &Arc<Self>,
        image: &Arc<Image>,
        record: &ImageRecord,
    ) -> Result<Option<Arc<dyn Disk>>, ErrorBody> {
        if record.profile.disk_bytes == 0 || (record.owner == self.me && self.is_untouched(record)) {
            return Ok(None);
        }
        let mut place = locked(&image.disk.place);
        if let Place::Free = &*place
            && let Some(log) = self.open_log(image, &self.log_of(record, "log"))?
        {
            *place = Place::Open(log);
        }
        Ok(ImageDisk::in_place(&place))
    }

    /// The log of an earlier stay of an image at this host; blocks.
    fn aside(self: &Arc<Self>, image: &Arc<Image>, record: &ImageRecord) -> Option<Arc<dyn Disk>> {
        let mut aside = locked(&image.disk.aside);
        if aside.as_ref().is_none_or(|log| log.is_closed()) {
            // What it would have given comes from elsewhere then.
            *aside = self.open_log(image, &self.log_of(record, "old")).unwrap_or_else(|error| {
                tracing::debug!(%error, user = %image.user, "an old log is of no use");
                None
            });
        }
        aside.clone().map(|log| log as Arc<dyn Disk>)
    }

    fn open_log(
        self: &Arc<Self>,
        image: &Arc<Image>,
        log: &DiskLog,
    ) -> Result<Option<Arc<OpenLog>>, ErrorBody> {
        let room = self.disk_limits.open.clone().try_acquire_owned().map_err(|_| {
            ErrorBody::new(Code::Busy, format!("{OPEN} disks of stopped machines are open; try again"))
        })?;
        let Some(disk) = self.machines.open_disk(log).map_err(ErrorBody::failed)? else { return Ok(None) };
        let log = OpenLog::new(disk, room);
        let (holder, opened) = (Arc::downgrade(image), Arc::downgrade(&log));
        self.runtime.spawn(async move {
            while let Some(log) = opened.upgrade().filter(|log| !log.is_closed()) {
                let idle = locked(&log.used).elapsed();
                if idle >= IDLE {
                    let holder = holder.clone();
                    match tokio::task::spawn_blocking(move || close_idle(&holder, &log)).await {
                        Ok(false) => continue,
                        Ok(true) | Err(_) => return,
                    }
                }
                drop(log);
                tokio::time::sleep(IDLE - idle).await;
            }
        });
        Ok(Some(log))
    }

    /// Has nobody else take the log: a machine is to be made.
    pub(crate) fn lend_place(&self, image: &Image) -> Result<(), ErrorBody> {
        if image.disk.lend() {
            return Ok(());
        }
        let message = format!("a mirror of {}'s machine is being made at this host; try again", image.user);
        Err(ErrorBody::new(Code::Busy, message))
    }

    /// Before a machine of this record gets the log here: closes it, and sets aside what an earlier stay has left.
    /// One that arrives with its machine keeps that: every block is compared then. Blocks; the slot is held.
    pub(crate) fn lend_log(
        &self,
        image: &Image,
        record: &ImageRecord,
        arrives: bool,
    ) -> Result<(), ErrorBody> {
        self.lend_place(image)?;
        let Some(origin) = record.disk_origin.as_ref().filter(|_| record.profile.disk_bytes > 0) else {
            return Ok(());
        };
        let stay = Stay { dir: &self.disks_dir(), number: record.number };
        if !stay.has_begun(origin.since.0) {
            image.disk.pulls.begin();
        }
        let begun = stay.begin(origin.since.0, arrives);
        begun.map_err(|error| {
            image.disk.back();
            ErrorBody::failed(format!("{}: {error}", self.disks_dir().display()))
        })
    }

    /// Whether the log of a record's disk is here; one that cannot be looked at counts.
    pub(crate) fn has_log(&self, record: &ImageRecord) -> bool {
        log::existing(&self.log_of(record, "log").path).map_or(true, |found| found.is_some())
    }

    /// Whether of the disk of a record that came from elsewhere nothing was ever here; blocks.
    pub(crate) fn is_untouched(&self, record: &ImageRecord) -> bool {
        let stay = Stay { dir: &self.disks_dir(), number: record.number };
        record.disk_origin.as_ref().is_some_and(|origin| !stay.has_begun(origin.since.0))
    }

    /// Hears of a machine's disk from now on.
    pub(crate) fn listen_to_disk(self: &Arc<Self>, image: &Arc<Image>, machine: &mut dyn Hosted) {
        let disk = machine.disk();
        image.disk.lent_to(disk.clone());
        if let Some(disk) = disk {
            let listener = Listener {
                daemon: Arc::downgrade(self),
                image: Arc::downgrade(image),
                blocks: disk.blocks(),
            };
            machine.watch_disk(Arc::new(listener));
        }
    }

    /// What an image's owner says of its disk.
    pub(crate) fn disk_view(&self, image: Option<&Image>, record: &ImageRecord) -> Option<DiskView> {
        if record.profile.disk_bytes == 0 {
            return None;
        }
        let held = image.and_then(|image| image.disk.held());
        Some(DiskView {
            bytes: record.profile.disk_bytes,
            held_bytes: held.map(|held| held.held_bytes),
            missing_bytes: held.map(|held| held.missing_bytes),
            pulled_bytes: image.map_or(0, |image| image.disk.pulled_bytes()),
            origin: record.disk_origin.as_ref().map(|origin| origin.host.clone()),
        })
    }
}

/// Closes a log, unless somebody has come to use it; whether it is closed. One that is an image's is closed before its
/// place is free: whoever opens the file next finds nobody at it.
fn close_idle(image: &Weak<Image>, log: &Arc<OpenLog>) -> bool {
    let image = image.upgrade();
    let mut place = image.as_ref().map(|image| locked(&image.disk.place));
    if locked(&log.used).elapsed() < IDLE {
        return false;
    }
    if let (Some(image), Some(place)) = (&image, &mut place)
        && let Place::Open(open) = &**place
        && Arc::ptr_eq(open, log)
    {
        *locked(&image.disk.known) = Some(Held::of(&**log));
        log.close();
        **place = Place::Free;
    }
    log.close();
    true
}

/// The files that say which stay of an image a log belongs to.
struct Stay<'a> {
    dir: &'a Path,
    number: ImageNumber,
}

impl Stay<'_> {
    fn file(&self, ending: &str) -> PathBuf {
        self.dir.join(format!("{}.{ending}", self.number.0))
    }

    fn marker(&self, since: u64) -> PathBuf {
        self.file(&format!("since-{since}"))
    }

    fn has_begun(&self, since: u64) -> bool {
        self.marker(since).exists()
    }

    /// Makes the log here that of the stay since a term, unless it is already: whatever lies there is an earlier
    /// one's, and is set aside unless `kept`.
    fn begin(&self, since: u64, kept: bool) -> io::Result<()> {
        if self.has_begun(since) {
            return Ok(());
        }
        std::fs::create_dir_all(self.dir)?;
        let synced = || std::fs::File::open(self.dir).and_then(|dir| dir.sync_all());
        if !kept {
            match std::fs::rename(self.file("log"), self.file("old")) {
                // Durable first: a marker beside the old log would make it the current one.
                Ok(()) => synced()?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        std::fs::File::create(self.marker(since))?;
        synced()?;
        self.forget_markers(Some(since))
    }

    /// The disk is whole: what an earlier stay left is of no use any more.
    fn end(&self) -> io::Result<()> {
        match std::fs::remove_file(self.file("old")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.forget_markers(None)
    }

    fn forget_markers(&self, but: Option<u64>) -> io::Result<()> {
        let (prefix, kept) = (self.file("since-"), but.map(|since| self.marker(since)));
        let Some(prefix) = prefix.file_name().and_then(|name| name.to_str()) else { return Ok(()) };
        for entry in std::fs::read_dir(self.dir)? {
            let entry = entry?;
            let is_marker = entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix));
            if is_marker && Some(entry.path()) != kept {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

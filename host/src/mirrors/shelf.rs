//! A shell that keeps a mirror, until a handover has it run the machine.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use kage_directory::{ImageRecord, Wanted};
use kage_machine::{BaseHash, Epoch, HostName, Memory, PAGE_SIZE, PageIndex};
use kage_migrate::{drive::target::MirrorSide, recover::Found};
use kage_replicate::{Receiver, store::Mirror};
use kage_wire::handover::Follow;

use crate::{
    lifecycle::{Daemon, Image, Slot},
    machines::Hosted,
};

/// What stays free of a host's memory when mirrors take theirs: one part of so many.
const FREE_PART: u64 = 8;

/// A mirror's process, tap and log. Dropped, they are given back.
pub struct Shelf {
    image: Arc<Image>,
    /// None once a handover has taken it.
    parts: Option<Parts>,
    /// Cleared once the end of its process is nobody's business here any more.
    watched: Arc<AtomicBool>,
}

/// What a handover takes.
pub struct Parts {
    /// The shell.
    pub machine: Box<dyn Hosted>,
    /// Its tap.
    pub tap: Option<OwnedFd>,
}

impl MirrorSide for Shelf {
    fn memory(&self) -> Arc<dyn Memory> {
        match &self.parts {
            Some(parts) => parts.machine.memory(),
            None => Arc::new(Nothing),
        }
    }

    fn into_any(self: Box<Self>) -> Box<dyn std::any::Any + Send> {
        self
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        let Some(Parts { mut machine, tap }) = self.parts.take() else { return };
        self.watched.store(false, Ordering::SeqCst);
        machine.end();
        // The tap goes with the last who holds it. Never by its name: the image's next machine may have that by now.
        drop(tap);
        self.image.disk.back_from_mirror();
        tracing::debug!(user = %self.image.user, "a mirror is dropped");
    }
}

impl Shelf {
    /// Makes one; blocks. The slot is held and has no machine.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn make(
        daemon: &Arc<Daemon>,
        image: &Arc<Image>,
        record: &ImageRecord,
        _slot: &Slot,
    ) -> Result<Self, String> {
        let spec = daemon.spec(&image.user, record).map_err(|error| error.message)?;
        daemon.room_for(spec.geometry.memory_bytes())?;
        if !image.disk.lend_to_mirror() {
            return Err("something of it is still under way at this host; try again".to_owned());
        }
        let made = daemon.fresh_tap(spec.number).map_err(|error| error.message).and_then(|tap| {
            let kept = tap.try_clone().ok();
            Ok(Parts { machine: daemon.machines.shell(&spec, tap)?, tap: kept })
        });
        let mut parts = made.inspect_err(|_| image.disk.back_from_mirror())?;
        image.disk.lent_to_mirror(parts.machine.disk());
        let (watching, user) = (Arc::downgrade(daemon), image.user.clone());
        let watched = Arc::new(AtomicBool::new(true));
        let still = watched.clone();
        parts.machine.watch(Box::new(move |seen| {
            let Some(daemon) = watching.upgrade().filter(|_| still.load(Ordering::SeqCst)) else { return };
            let (held, user) = (daemon.clone(), user.clone());
            daemon.runtime.spawn_blocking(move || {
                tracing::debug!(%user, seen, "the process of a mirror has ended");
                held.targets.forget_mirror(&user);
            });
        }));
        Ok(Self { image: image.clone(), parts: Some(parts), watched })
    }

    /// From what was lent to a session.
    #[must_use]
    pub fn from_side(side: Box<dyn MirrorSide>) -> Option<Box<Self>> {
        side.into_any().downcast().ok()
    }

    /// For a handover; none where its process has ended or it runs on another base. The slot is held.
    #[must_use]
    pub fn into_parts(mut self: Box<Self>, base: BaseHash) -> Option<Parts> {
        if !self.is_of(base) {
            return None;
        }
        let parts = self.parts.take()?;
        self.watched.store(false, Ordering::SeqCst);
        self.image.disk.mirror_arrives();
        Some(parts)
    }

    fn is_of(&mut self, base: BaseHash) -> bool {
        let machine = self.parts.as_mut().map(|parts| &mut parts.machine);
        machine.is_some_and(|machine| machine.base() == base && machine.found() == Found::Shell)
    }
}

/// The page space of a shell that was taken.
struct Nothing;

impl Memory for Nothing {
    fn geometry(&self) -> kage_machine::Geometry {
        kage_machine::Geometry { memory_pages: 0, disk_pages: 0 }
    }
    fn read(&self, _page: PageIndex, into: &mut kage_machine::PageBytes) {
        into.fill(0);
    }
    fn write(&self, _page: PageIndex, _bytes: &kage_machine::PageBytes) {}
    fn zero(&self, _page: PageIndex) {}
    fn populated(&self) -> kage_machine::PageSet {
        kage_machine::PageSet::empty(0)
    }
}

impl Daemon {
    /// Whether this host has the memory for one more mirror.
    fn room_for(&self, bytes: u64) -> Result<(), String> {
        let Some((total, available)) = memory() else { return Ok(()) };
        // Those that are there take theirs as they are filled.
        let (mirrors, yet) = self.targets.all_mirrors();
        let available = available.saturating_sub(yet);
        if available.saturating_sub(bytes) >= total / FREE_PART {
            return Ok(());
        }
        Err(format!(
            "host {} has {mirrors} mirrors and {} MiB of memory left, of which {} MiB stay free",
            self.me,
            available >> 20,
            (total / FREE_PART) >> 20
        ))
    }

    /// Makes or keeps the shell of a mirror that an owner wants here; blocks.
    pub(crate) fn take_in_mirror(
        self: &Arc<Self>,
        owner: &HostName,
        request: &Follow,
        kept: Option<Box<dyn MirrorSide>>,
    ) -> Result<Box<dyn MirrorSide>, String> {
        if let Some(mut shelf) = kept.and_then(Shelf::from_side)
            && shelf.is_of(request.base)
        {
            return Ok(shelf);
        }
        let record = self.owned_by(owner, &request.user, request.term)?;
        if record.wanted == Wanted::Stopped || record.disk_origin.is_some() {
            return Err("its machine is stopped, or some of its disk is elsewhere".to_owned());
        }
        let image = self.image(&request.user);
        let slot = self.slot_for_arrival(&image)?;
        if slot.unreachable.is_some() || slot.machine.is_some() {
            return Err("this host holds a machine of it".to_owned());
        }
        let shelf = Shelf::make(self, &image, &record, &slot)?;
        if !shelf.parts.as_ref().is_some_and(|parts| parts.machine.base() == request.base) {
            return Err(format!("image {:?} is another build at host {}", record.profile.image, self.me));
        }
        if shelf.memory().geometry() != request.geometry {
            return Err("its size in the directory is another than its machine's".to_owned());
        }
        Ok(Box::new(shelf))
    }

    /// Keeps a machine that was just handed over as a mirror, from the memory it left; blocks. The slot is held, and its
    /// process has ended.
    ///
    /// # Errors
    /// Why not, in words.
    pub(crate) fn stay_as_mirror(
        self: &Arc<Self>,
        image: &Arc<Image>,
        slot: &Slot,
        left: &dyn Memory,
    ) -> Result<(), String> {
        let record = self.existing(&image.user).map_err(|error| error.message)?.record;
        if record.owner == self.me || record.wanted == Wanted::Stopped || record.disk_origin.is_some() {
            return Ok(());
        }
        let shelf = Shelf::make(self, image, &record, slot)?;
        if shelf.memory().geometry() != left.geometry() {
            return Err("its size was changed".to_owned());
        }
        let mut mirror = Mirror::new(shelf.memory());
        let mut bytes = [0; PAGE_SIZE];
        let memory_pages = left.geometry().memory_pages;
        for page in left.populated().iter().take_while(|page| page.0 < memory_pages) {
            left.read(page, &mut bytes);
            if !mirror.write(Epoch(0), page, &bytes) {
                return Err("its memory is larger than it says".to_owned());
            }
        }
        // Before the slot is free: the new owner waits for it.
        let kept = self.targets.keep(&image.user, Box::new(shelf), Receiver::over(mirror));
        let kept = kept.ok_or("something else of it is here")?;
        let daemon = self.clone();
        std::thread::Builder::new()
            .name("kage-kept".to_owned())
            .spawn(move || kept(&daemon.targets))
            .map(|_| ())
            .map_err(|error| error.to_string())
    }
}

/// This host's memory and what of it is available, in bytes.
pub fn memory() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    };
    Some((field("MemTotal")?, field("MemAvailable")?))
}

//! The daemon's handle on one VMM process.

mod adopted;
mod channel;
mod disk;
mod guest;
mod missing;
mod pages;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io,
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use kage_machine::{
    BaseHash, Geometry, Gone, HostInstant, Machine, MachineError, Memory, Missing, OutputMark, PAGE_SIZE,
    PageBytes, PageIndex, PageSet, PauseCause, Paused, SavedState, Started,
    control::{Identity, NetCounters, Phase, Reply, Request, Setup, control_page},
    disk::{Disk, DiskEvents},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create},
    io::Errno,
    net::{SocketAddrUnix, bind, listen},
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid},
};

use crate::{inspect::Inspector, sys::Mapping, users::User};
use adopted::shared_file;
use channel::{Channel, seqpacket};
use missing::{Heard, Lack};
use pages::Pages;

pub use disk::RemoteDisk;

/// Longest wait for a killed process to be gone: taking down 2 GiB takes some milliseconds.
const DEATH: Duration = Duration::from_secs(1);

/// A base slot in a sealed file, shared by all machines of a host that have its kernel and size.
#[derive(Debug)]
pub struct BaseFile {
    file: OwnedFd,
    hash: BaseHash,
    /// Its layout.
    pub base: kage_images::Base,
}

impl BaseFile {
    /// Writes and seals the file.
    ///
    /// # Errors
    /// Those of `memfd_create(2)` and writing.
    pub fn new(base: kage_images::Base) -> io::Result<Self> {
        let file = File::from(memfd_create("kage-base", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        io::Write::write_all(&mut &file, &base.bytes)?;
        let file = OwnedFd::from(file);
        fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Self { file, hash: base.hash(), base })
    }
}

/// How VMM processes are started.
#[derive(Clone, Debug)]
pub struct Spawn {
    /// The program, normally this one.
    pub program: PathBuf,
    /// Arguments before the descriptor's number: `["vmm", "--fd"]`.
    pub arguments: Vec<String>,
    /// First of 65,536 users and groups without rights, one of which each process becomes; `None`
    /// keeps the caller's (tests).
    pub jail: Option<u32>,
}

/// A VMM process and the machine in it.
pub struct RemoteMachine {
    channel: Channel,
    pid: OwnedFd,
    path: PathBuf,
    pages: Option<Arc<Pages>>,
    control: Option<Arc<Mapping>>,
    /// Its page faults, until pages of it are missing.
    heard: Option<Heard>,
    base: BaseHash,
    /// As an adopted machine's process gave it.
    tap: Option<OwnedFd>,
    label: Vec<u8>,
    phase: Phase,
    /// Which its process has become.
    user: Option<User>,
    ended: bool,
}

fn gone(reason: impl Into<String>) -> MachineError {
    MachineError::Gone(Gone { reason: reason.into() })
}

impl RemoteMachine {
    /// Starts a VMM process that listens at `path`, and makes it a shell of `geometry` without a disk.
    ///
    /// # Errors
    /// [`MachineError`] with what failed.
    pub fn spawn(
        spawn: &Spawn,
        path: &Path,
        kvm: BorrowedFd<'_>,
        base: &BaseFile,
        geometry: Geometry,
    ) -> Result<Self, MachineError> {
        let failed =
            |what: &str, error: io::Error| MachineError::Refused { reason: format!("{what}: {error}") };
        let listener = listen_at(path).map_err(|error| failed("control socket", error))?;
        let pid = start_process(spawn, &listener)
            .map_err(|error| failed(&spawn.program.display().to_string(), error))?;
        drop(listener);
        let refused = |error| gone(format!("{}: {error}", path.display()));
        let mut machine = Self::connect(path, Some(pid)).map_err(refused)?;
        let memory =
            shared_file("kage-memory", geometry.memory_bytes()).map_err(|error| failed("memory", error))?;
        let control =
            shared_file("kage-control", PAGE_SIZE as u64).map_err(|error| failed("control page", error))?;
        if let Some(first) = spawn.jail {
            let none = || MachineError::Refused { reason: "all users for machines are taken".into() };
            machine.user = Some(User::take(first).ok_or_else(none)?);
        }
        let setup = Setup {
            geometry,
            base_bytes: base.base.bytes.len() as u64,
            base: base.hash,
            entry: base.base.entry,
            page_table_root: base.base.page_table_root,
            jail: machine.user.as_ref().map(User::number),
        };
        machine.map(geometry, memory.try_clone().map_err(|error| failed("memory", error))?, &control)?;
        machine.base = base.hash;
        let pages = machine.pages.clone();
        for segment in &base.base.data {
            if let Some(pages) = &pages {
                pages.write_bytes(segment.offset as usize, &segment.bytes);
            }
        }
        let descriptors = [kvm, base.file.as_fd(), memory.as_fd(), control.as_fd()];
        match machine.call(&Request::Setup(setup), &descriptors)? {
            (Reply::Ready { memory_at }, descriptors) => {
                let heard = |faults| Heard { faults, at: memory_at };
                machine.heard = descriptors.into_iter().next().map(heard);
            }
            (Reply::Refused { reason }, _) => return Err(MachineError::Refused { reason }),
            (other, _) => return Err(unexpected(&other)),
        }
        machine.phase = Phase::Shell;
        Ok(machine)
    }

    /// Connects; the process is `pid`, or whoever listens.
    fn connect(path: &Path, pid: Option<Pid>) -> io::Result<Self> {
        let channel = Channel::open(path, pid)?;
        let pid = pidfd_open(channel.peer(), PidfdFlags::empty())?;
        Ok(Self {
            channel,
            pid,
            path: path.to_owned(),
            pages: None,
            control: None,
            heard: None,
            base: BaseHash::default(),
            tap: None,
            label: Vec::new(),
            phase: Phase::Empty,
            user: None,
            ended: false,
        })
    }

    fn map(&mut self, geometry: Geometry, memory: OwnedFd, control: &OwnedFd) -> Result<(), MachineError> {
        let failed = |error: io::Error| MachineError::Refused { reason: format!("map memory: {error}") };
        let mapping = Mapping::new(&memory, geometry.memory_bytes() as usize, true).map_err(failed)?;
        self.control = Some(Arc::new(Mapping::new(control, PAGE_SIZE, true).map_err(failed)?));
        self.pages = Some(Arc::new(Pages::new(geometry, mapping, memory)));
        Ok(())
    }

    fn call(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), MachineError> {
        let excused = || self.lack().is_some_and(|lack| lack.is_short());
        self.channel.call(&self.path, request, descriptors, excused).map_err(|seen| self.is_gone(&seen))
    }

    /// What of its memory is missing, if anything ever was.
    fn lack(&self) -> Option<&Arc<Lack>> {
        self.pages.as_ref()?.lack()
    }

    fn is_gone(&self, seen: &str) -> MachineError {
        match self.failure() {
            Some(reason) => MachineError::GuestFailed { reason },
            None => gone(seen),
        }
    }

    fn ask(&self, request: &Request) -> Result<Reply, MachineError> {
        match self.call(request, &[])?.0 {
            Reply::Refused { reason } => Err(MachineError::Refused { reason }),
            reply => Ok(reply),
        }
    }

    fn done(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<(), MachineError> {
        match self.call(request, descriptors)?.0 {
            Reply::Done | Reply::Started { .. } => Ok(()),
            Reply::Refused { reason } => Err(MachineError::Refused { reason }),
            other => Err(unexpected(&other)),
        }
    }

    /// The process's id.
    #[must_use]
    pub fn process_id(&self) -> Pid {
        self.channel.peer()
    }

    /// Where the machine stood when last asked.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// What a daemon wrote last.
    #[must_use]
    pub fn label(&self) -> &[u8] {
        &self.label
    }

    /// Takes the tap that an adopted machine uses.
    #[must_use]
    pub fn take_tap(&mut self) -> Option<OwnedFd> {
        self.tap.take()
    }

    /// Keeps words for whoever adopts the machine; a machine without them ends with its daemon.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn set_label(&mut self, label: Vec<u8>) -> Result<(), MachineError> {
        self.done(&Request::Label(label.clone()), &[])?;
        self.label = label;
        Ok(())
    }

    /// Moves the control socket to another path.
    ///
    /// # Errors
    /// Those of `rename(2)`.
    pub fn move_socket(&mut self, path: &Path) -> io::Result<()> {
        std::fs::rename(&self.path, path)?;
        path.clone_into(&mut self.path);
        Ok(())
    }

    /// Uses a tap, which must have virtio-net headers of 12 bytes.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn attach_tap(&mut self, tap: BorrowedFd<'_>) -> Result<(), MachineError> {
        self.done(&Request::AttachTap, &[tap])
    }

    /// Has the process open a disk's log of the geometry's size, or make it where the file is blank: every block is
    /// then zeros or, with `elsewhere`, missing. Returns before that is done, which [`RemoteMachine::wait_disk`] waits
    /// for; until it is, the guest's requests wait.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn attach_disk(
        &mut self,
        log: OwnedFd,
        identity: [u8; 16],
        elsewhere: bool,
    ) -> Result<(), MachineError> {
        let failed = |error: io::Error| MachineError::Refused { reason: format!("disk: {error}") };
        let pages = self.pages.clone().ok_or_else(|| refused("it has no memory yet"))?;
        let blocks = pages.geometry().disk_pages;
        let index = kage_disk::Index::memory(u64::from(blocks)).map_err(failed)?;
        let own = File::from(log.try_clone().map_err(failed)?);
        let (disk, line) =
            RemoteDisk::new(blocks, own, index.try_clone().map_err(failed)?).map_err(failed)?;
        let request = Request::AttachDisk { identity, disk_elsewhere: elsewhere };
        self.done(&request, &[log.as_fd(), index.as_fd(), line.as_fd()])?;
        pages.set_disk(Arc::new(disk));
        Ok(())
    }

    /// Uses the disk that an adopted machine has.
    fn adopt_disk(&self, log: OwnedFd, index: OwnedFd) -> Result<(), MachineError> {
        let failed = |error: io::Error| MachineError::Refused { reason: format!("disk: {error}") };
        let Some(pages) = &self.pages else { return Ok(()) };
        let (disk, line) = RemoteDisk::new(pages.geometry().disk_pages, log.into(), index).map_err(failed)?;
        self.done(&Request::AttachDiskLine, &[line.as_fd()])?;
        pages.set_disk(Arc::new(disk));
        Ok(())
    }

    /// Its disk, if it has one: also whoever does not hold the machine may use it.
    #[must_use]
    pub fn disk(&self) -> Option<Arc<dyn Disk>> {
        self.pages.as_ref()?.disk().map(|disk| disk as Arc<dyn Disk>)
    }

    /// Has what happens to its disk told from here on, and what has happened.
    ///
    /// # Errors
    /// When threads run out.
    pub fn watch_disk(&self, events: Arc<dyn DiskEvents>) -> io::Result<()> {
        match self.pages.as_ref().and_then(|pages| pages.disk()) {
            Some(disk) => disk.watch(events),
            None => Ok(()),
        }
    }

    /// Waits until its disk is open, if it has one.
    ///
    /// # Errors
    /// Refused with the reason when it cannot be opened, or is not in `patience`.
    pub fn wait_disk(&self, patience: Duration) -> Result<(), MachineError> {
        match self.pages.as_ref().and_then(|pages| pages.disk()) {
            Some(disk) => disk.wait_open(patience),
            None => Ok(()),
        }
    }

    /// Has nothing of its disk committed until its gate opens: a shell for a machine that its source may yet keep.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn hold_disk(&self) -> Result<(), MachineError> {
        match self.pages.as_ref().and_then(|pages| pages.disk()) {
            Some(disk) => disk.hold_commits(),
            None => Ok(()),
        }
    }

    /// Waits until what was written to its disk's pages is there.
    fn settle_disk(&self) -> Result<(), MachineError> {
        match self.pages.as_ref().and_then(|pages| pages.disk()) {
            Some(disk) => disk.settle(),
            None => Ok(()),
        }
    }

    /// Starts the kernel from its first instruction.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn boot(&mut self) -> Result<(), MachineError> {
        self.done(&Request::Boot, &[])?;
        self.phase = Phase::Running { gate_open: true };
        Ok(())
    }

    /// Gives identity, a new generation, and indices for VIDs.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn give_generation(
        &mut self,
        identity: Option<Identity>,
        seed: [u8; 32],
        indices: Range<u64>,
    ) -> Result<(), MachineError> {
        self.done(&Request::Generation { identity, seed, indices }, &[])
    }

    /// A way to ask for the guest's table of resources, whoever holds the machine. It replaces an older one.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn inspector(&mut self) -> Result<Inspector, MachineError> {
        let refused = |error: io::Error| MachineError::Refused { reason: format!("socket pair: {error}") };
        let (inspector, other) = Inspector::new().map_err(refused)?;
        self.done(&Request::AttachInspector, &[other.as_fd()])?;
        Ok(inspector)
    }

    /// Lets the guest give out VIDs up to `limit`, when it may not already.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn raise_indices(&mut self, limit: u64) -> Result<(), MachineError> {
        self.done(&Request::RaiseIndices { limit }, &[])
    }

    /// Takes a saved state; `moved` when it comes from another host.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn restore_encoded(
        &mut self,
        state: &SavedState,
        paused_at: HostInstant,
        moved: bool,
    ) -> Result<(), MachineError> {
        self.settle_disk()?;
        self.done(&Request::Restore { state: state.encode(), paused_at, moved }, &[])?;
        self.phase = Phase::Restored;
        Ok(())
    }

    /// Runs a restored machine.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn run(&mut self, gate_open: bool) -> Result<Started, MachineError> {
        self.settle_disk()?;
        match self.ask(&Request::Run { gate_open })? {
            Reply::Started { at, gate_open } => {
                self.phase = Phase::Running { gate_open };
                Ok(Started { at })
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Makes a paused machine without a label a shell again. Its memory is the caller's to wipe.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn forget(&mut self) -> Result<(), MachineError> {
        self.done(&Request::Forget, &[])?;
        self.phase = Phase::Shell;
        Ok(())
    }

    /// Turns the heartbeat on or off and starts its figures anew.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn set_heartbeat(&mut self, on: bool) -> Result<(), MachineError> {
        self.done(&Request::Heartbeat { on }, &[])
    }

    /// Network counters and number of doors.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn status(&mut self) -> Result<(Phase, NetCounters, u64), MachineError> {
        match self.ask(&Request::Status)? {
            Reply::Status { phase, net, doors } => {
                self.phase = phase;
                Ok((phase, net, doors))
            }
            other => Err(unexpected(&other)),
        }
    }

    /// A descriptor that becomes readable when the process ends.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn exit_descriptor(&self) -> io::Result<OwnedFd> {
        self.pid.try_clone()
    }

    /// Whether the process still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !self.has_ended_within(Duration::ZERO)
    }

    fn has_ended_within(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let mut polled = [PollFd::new(&self.pid, PollFlags::IN)];
            let left = deadline.saturating_duration_since(Instant::now());
            // A second fits.
            let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
            match poll(&mut polled, Some(&left)) {
                Err(Errno::INTR) => {}
                ready => return matches!(ready, Ok(1..)),
            }
        }
    }

    /// Whether the right to run was given away, as the control page says.
    #[must_use]
    pub fn is_released(&self) -> bool {
        let mut byte = [0];
        if let Some(control) = &self.control {
            control.read(control_page::RELEASED, &mut byte);
        }
        byte[0] != 0
    }

    /// Whether pages of its memory are missing, as the control page says.
    fn is_short(&self) -> bool {
        let mut byte = [0];
        if let Some(control) = &self.control {
            control.read(control_page::MISSING, &mut byte);
        }
        byte[0] != 0
    }

    /// Why the machine failed, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let control = self.control.as_ref()?;
        let mut length = [0; 2];
        control.read(control_page::FAILURE_LENGTH, &mut length);
        let length = usize::from(u16::from_le_bytes(length)).min(control_page::FAILURE_MAX);
        let mut text = vec![0; length];
        control.read(control_page::FAILURE, &mut text);
        (length > 0).then(|| String::from_utf8_lossy(&text).into_owned())
    }
}

fn refused(reason: &str) -> MachineError {
    MachineError::Refused { reason: reason.to_owned() }
}

fn unexpected(reply: &Reply) -> MachineError {
    MachineError::Refused { reason: format!("unexpected answer {reply:?}") }
}

impl Machine for RemoteMachine {
    fn memory(&self) -> Arc<dyn Memory> {
        match &self.pages {
            Some(pages) => Arc::clone(pages) as Arc<dyn Memory>,
            None => Arc::new(NoPages),
        }
    }

    fn base(&self) -> BaseHash {
        self.base
    }

    fn harvest(&mut self) -> Result<PageSet, MachineError> {
        match self.ask(&Request::Harvest)? {
            Reply::Dirty(set) if self.has_pages_of(&set) => Ok(self.with_late(set)),
            other => Err(unexpected(&other)),
        }
    }

    fn pause(&mut self, cause: PauseCause) -> Result<Paused, MachineError> {
        let error = match self.call(&Request::Pause { cause }, &[]) {
            Ok((Reply::Paused { state, dirty, at, output }, _)) if self.has_pages_of(&dirty) => {
                match SavedState::decode(&state) {
                    Ok(state) => {
                        self.phase = Phase::Paused;
                        return Ok(Paused { state, dirty: self.with_late(dirty), at, output });
                    }
                    Err(error) => MachineError::Refused { reason: error.to_string() },
                }
            }
            Ok((Reply::Refused { reason }, _)) => return Err(MachineError::Refused { reason }),
            Ok((other, _)) => unexpected(&other),
            Err(error) => error,
        };
        // It may have paused all the same.
        match self.run_on() {
            Ok(()) => Err(MachineError::Refused { reason: error.to_string() }),
            Err(_) => {
                self.end();
                Err(self.is_gone(&error.to_string()))
            }
        }
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        match self.ask(&Request::Resume)? {
            Reply::Started { gate_open, .. } => {
                self.phase = Phase::Running { gate_open };
                Ok(())
            }
            other => Err(unexpected(&other)),
        }
    }

    fn restore(&mut self, state: &SavedState, paused_at: HostInstant) -> Result<(), MachineError> {
        self.restore_encoded(state, paused_at, true)
    }

    fn run_gated(&mut self) -> Result<Started, MachineError> {
        self.run(false)
    }

    /// What was synced where it comes from is durable here before anybody hears of it. A disk that fails keeps the
    /// gate shut no longer than it takes to say so: the guest hears it too.
    fn open_gate(&mut self) -> Result<(), MachineError> {
        if self.phase == (Phase::Running { gate_open: false })
            && let Some(disk) = self.pages.as_ref().and_then(|pages| pages.disk())
        {
            // Of a disk that fails the guest hears, and a process that is gone opens no gate.
            let _ = disk.settle_commits();
        }
        self.done(&Request::OpenGate, &[])?;
        self.phase = Phase::Running { gate_open: true };
        Ok(())
    }

    fn miss(&mut self, pages: &PageSet) -> Result<Arc<dyn Missing>, MachineError> {
        let memory = self.pages.clone().ok_or_else(|| refused("it has no memory yet"))?;
        missing::check(pages, memory.geometry().memory_pages)?;
        if self.phase != Phase::Shell {
            return Err(refused("only a shell misses pages"));
        }
        if memory.lack().is_some() {
            return Err(refused("pages of it are missing already"));
        }
        let (Some(heard), Some(control)) = (self.heard.take(), self.control.clone()) else {
            return Err(refused(
                "its pages cannot be missing: this host lets no process hear of page faults (userfaultfd), or another \
                 daemon made it",
            ));
        };
        let populated = memory.populated();
        for page in pages.iter().filter(|&page| populated.contains(page)) {
            memory.punch(page).map_err(|error| refused(&format!("its pages cannot be missing: {error}")))?;
        }
        let pid = self.pid.try_clone().map_err(|error| refused(&error.to_string()))?;
        let lack = Arc::new(Lack::begin(heard, pid, control, pages)?);
        memory.set_lack(Arc::clone(&lack));
        Ok(lack)
    }

    fn let_out(&mut self, output: OutputMark) -> Result<(), MachineError> {
        self.done(&Request::LetOut(output), &[])
    }

    fn release(&mut self) -> Result<(), MachineError> {
        if let Some(control) = &self.control {
            control.write(control_page::RELEASED, &[1]);
        }
        self.phase = Phase::Released;
        self.done(&Request::Release, &[])
    }

    /// Returns once the process has ended, and with it let go of tap and disk; after [`DEATH`] without.
    fn end(&mut self) {
        if self.ended {
            return;
        }
        self.ended = true;
        let _ = pidfd_send_signal(&self.pid, Signal::KILL);
        let _ = std::fs::remove_file(&self.path);
        if self.has_ended_within(DEATH) {
            // One that is no child leaves no zombie either.
            let _ = waitid(WaitId::PidFd(self.pid.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
            self.user = None;
        } else {
            self.reap();
        }
    }
}

impl RemoteMachine {
    /// Whether a set from the VMM is one of this machine's pages.
    fn has_pages_of(&self, set: &PageSet) -> bool {
        let pages = self.pages.as_ref().map_or(0, |pages| pages.geometry().pages());
        set.is_well_formed() && set.pages() == pages
    }

    /// A set of written pages, with those that somebody read too early.
    fn with_late(&self, mut written: PageSet) -> PageSet {
        if let Some(lack) = self.lack() {
            written.union(&lack.take_late());
        }
        written
    }

    /// Has a machine run that was to be paused, wherever that failed.
    fn run_on(&mut self) -> Result<(), MachineError> {
        let before = self.phase;
        match self.status()?.0 {
            Phase::Paused if matches!(before, Phase::Running { .. }) => self.resume(),
            now if now == before => Ok(()),
            now => Err(gone(format!("it was {before:?} and is {now:?}"))),
        }
    }

    /// Waits for the process in the background, so that neither a zombie nor its user stays.
    fn reap(&mut self) {
        let user = self.user.take();
        let Ok(pid) = self.pid.try_clone() else { return };
        let wait = move || {
            let mut polled = [PollFd::new(&pid, PollFlags::IN)];
            while matches!(poll(&mut polled, None), Err(Errno::INTR)) {}
            // One that is no child leaves no zombie.
            let _ = waitid(WaitId::PidFd(pid.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
            drop(user);
        };
        let _ = std::thread::Builder::new().name("reaper".into()).stack_size(64 << 10).spawn(wait);
    }
}

impl Drop for RemoteMachine {
    /// Lets go of the process without ending it: one that belongs to a user waits for the next daemon.
    fn drop(&mut self) {
        if !self.ended {
            self.reap();
        }
    }
}

/// A shell whose memory is not mapped yet.
struct NoPages;

impl Memory for NoPages {
    fn geometry(&self) -> Geometry {
        Geometry { memory_pages: 0, disk_pages: 0 }
    }
    fn read(&self, _: PageIndex, into: &mut PageBytes) {
        into.fill(0);
    }
    fn write(&self, _: PageIndex, _: &PageBytes) {}
    fn zero(&self, _: PageIndex) {}
    fn populated(&self) -> PageSet {
        PageSet::empty(0)
    }
}

fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let _ = std::fs::remove_file(path);
    let listener = seqpacket()?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    listen(&listener, 4)?;
    rustix::io::ioctl_fionbio(&listener, true)?;
    Ok(listener)
}

/// Starts the program with the listener as its only inherited descriptor, in a session of its own, so that it
/// outlives the daemon.
#[expect(unsafe_code, reason = "hands a descriptor to a child between fork and exec")]
fn start_process(spawn: &Spawn, listener: &OwnedFd) -> io::Result<Pid> {
    use std::os::fd::AsRawFd;
    let number = listener.as_raw_fd();
    let mut command = Command::new(&spawn.program);
    command.args(&spawn.arguments).arg(number.to_string()).stdin(Stdio::null()).stdout(Stdio::null());
    // SAFETY: the child of the fork has the descriptor open; it is used there alone.
    let inherited = unsafe { BorrowedFd::borrow_raw(number) };
    let prepare = move || {
        rustix::io::fcntl_setfd(inherited, rustix::io::FdFlags::empty())?;
        rustix::process::setsid()?;
        Ok(())
    };
    // SAFETY: `prepare` makes two async-signal-safe system calls.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn()?;
    Pid::from_raw(child.id() as i32).ok_or_else(|| io::Error::other("no process id"))
}

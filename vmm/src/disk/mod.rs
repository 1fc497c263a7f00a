//! A machine's disk: a thread that alone writes the log, between the block device and the daemon.
//!
//! ```text
//!  block device ── requests ──▶ ┌────────┐ ── Need, Corrupt, Done … ──▶ daemon
//!               ◀─ completions ─│ worker │ ◀─ Set, Fill, Flush, Scrub ──
//!                               └───┬────┘
//!                     kage_disk::Store: log file, index that the daemon maps too
//!
//! Waiting ──attached──▶ Open ──a sync failed──▶ Failed
//!    └──────────it cannot be opened──────────────▶┘
//! ```
//!
//! Until the disk is open, requests wait in the guest's ring; once it has failed, all of them fail. A read of what is
//! missing or corrupt waits for the daemon, whichever one is there, and holds up nothing but writes of the same blocks.
//! While the machine does not run, no request is begun, and the daemon may set blocks.
//!
//! A flush that the daemon asks for does not come between the writes of a guest's commit: what it would make durable is
//! half a commit. It waits for the guest's own flush, for which the guest is asked.

pub mod line;
pub mod queue;
mod worker;

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
        mpsc::sync_channel,
    },
    thread,
};

use rustix::event::{EventfdFlags, eventfd};

use queue::Job;

/// Stack of the worker: opening a store and moving blocks keep what they have on the heap.
const STACK: usize = 256 << 10;

/// A request that was dealt with.
pub struct Done {
    /// Its number.
    pub number: u64,
    /// What a read got.
    pub bytes: Vec<u8>,
    /// Whether it was done.
    pub ok: bool,
}

/// A log and its index, to be opened.
pub struct Attach {
    /// The log.
    pub log: File,
    /// Memory of the index.
    pub index: OwnedFd,
    /// Whose the log must be.
    pub identity: [u8; 16],
    /// Where there is no log yet, every block is missing instead of zeros.
    pub elsewhere: bool,
    /// To the daemon.
    pub line: OwnedFd,
}

/// Where the disk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Standing {
    /// Not attached, or not open yet.
    Waiting,
    /// Open.
    Open,
    /// Of no use any more.
    Failed,
}

/// What passes between the device and the worker.
#[derive(Default)]
struct Exchange {
    attach: Option<Attach>,
    line: Option<OwnedFd>,
    jobs: Vec<(u64, Job)>,
    done: VecDeque<Done>,
    /// Blocks that changed otherwise than by the guest's requests.
    changed: Vec<u32>,
    /// The machine runs: requests may be begun.
    runs: bool,
    /// One that changes blocks is under way.
    busy: bool,
    /// The guest wrote since its last flush.
    unsettled: bool,
    /// Daemons' requests that the guest sync, not told it yet.
    syncs: Vec<u64>,
    /// The guest is to sync for nobody in particular.
    prompt: bool,
    /// The machine's right is settled: see [`line::Ask::Hold`].
    settled: bool,
    /// What became of those told: number and reason.
    synced: Vec<(u64, Result<(), String>)>,
}

struct Shared {
    exchange: Mutex<Exchange>,
    /// Nothing that changes blocks is under way.
    rests: Condvar,
    standing: AtomicU8,
    /// Something waits for the device.
    news: AtomicBool,
    device: OwnedFd,
    worker: OwnedFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Exchange> {
        self.exchange.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_device(&self) {
        self.news.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.device, &1u64.to_ne_bytes());
    }

    fn wake_worker(&self) {
        let _ = rustix::io::write(&self.worker, &1u64.to_ne_bytes());
    }

    fn set_standing(&self, standing: Standing) {
        self.standing.store(standing as u8, Ordering::Release);
        self.wake_device();
    }
}

fn event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)
}

/// The device's end.
pub struct Disk {
    shared: Arc<Shared>,
    attached: bool,
}

/// What came from the worker.
#[derive(Default)]
pub struct News {
    /// Requests dealt with.
    pub done: VecDeque<Done>,
    /// Blocks that changed otherwise.
    pub changed: Vec<u32>,
    /// The guest is to be told to sync, for these requests or, without any, for the worker itself.
    pub syncs: Option<Vec<u64>>,
}

impl Disk {
    /// A disk of so many blocks without a log, and its worker. One without blocks fails everything.
    ///
    /// # Errors
    /// When no event descriptor or thread can be made.
    pub fn new(blocks: u32) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            exchange: Mutex::default(),
            rests: Condvar::new(),
            standing: AtomicU8::new(if blocks == 0 { Standing::Failed } else { Standing::Waiting } as u8),
            news: AtomicBool::new(false),
            device: event()?,
            worker: event()?,
        });
        let worker = worker::Worker::new(Arc::clone(&shared), blocks);
        let (begun, has_begun) = sync_channel(1);
        thread::Builder::new().name("disk".into()).stack_size(STACK).spawn(move || {
            crate::sys::watchdog::block_in_this_thread();
            let _ = begun.send(());
            worker.run();
        })?;
        // The worker is past what a thread does at its start, so that the filter need not allow it.
        has_begun.recv().map_err(io::Error::other)?;
        Ok(Self { shared, attached: false })
    }

    /// Opens a log, or creates it where there is none; the answer goes to the daemon.
    ///
    /// # Errors
    /// When there is one already.
    pub fn attach(&mut self, attach: Attach) -> Result<(), &'static str> {
        if self.attached || self.standing() != Standing::Waiting {
            return Err("this machine has its disk, or has none");
        }
        self.attached = true;
        self.shared.lock().attach = Some(attach);
        self.shared.wake_worker();
        Ok(())
    }

    /// Speaks to another daemon from here on.
    pub fn attach_line(&self, line: OwnedFd) {
        self.shared.lock().line = Some(line);
        self.shared.wake_worker();
    }

    /// Where it stands.
    pub fn standing(&self) -> Standing {
        match self.shared.standing.load(Ordering::Acquire) {
            0 => Standing::Waiting,
            1 => Standing::Open,
            _ => Standing::Failed,
        }
    }

    /// Readable when there is news.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.shared.device.as_fd()
    }

    /// Hands requests over.
    pub fn ask(&self, jobs: Vec<(u64, Job)>) {
        if !jobs.is_empty() {
            self.shared.lock().jobs.extend(jobs);
            self.shared.wake_worker();
        }
    }

    /// What has come since last asked.
    pub fn news(&self) -> News {
        if !self.shared.news.swap(false, Ordering::AcqRel) {
            return News::default();
        }
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.shared.device, &mut count);
        let mut exchange = self.shared.lock();
        let prompt = std::mem::take(&mut exchange.prompt);
        let syncs = std::mem::take(&mut exchange.syncs);
        News {
            done: std::mem::take(&mut exchange.done),
            changed: std::mem::take(&mut exchange.changed),
            syncs: (prompt || !syncs.is_empty()).then_some(syncs),
        }
    }

    /// Lets requests be begun; `unfinished` says whether there are any.
    pub fn go(&self, unfinished: bool) {
        self.shared.lock().runs = true;
        if unfinished {
            self.shared.wake_worker();
        }
    }

    /// Lets no request be begun any more and waits for one that changes blocks. Whether the guest has written since
    /// its last flush.
    pub fn halt(&self) -> bool {
        let mut exchange = self.shared.lock();
        exchange.runs = false;
        let exchange = self
            .shared
            .rests
            .wait_while(exchange, |exchange| exchange.busy)
            .unwrap_or_else(PoisonError::into_inner);
        self.shared.news.store(true, Ordering::Release);
        exchange.unsettled
    }

    /// The machine's output may leave from here: so may its commits.
    pub fn settle(&self) {
        self.shared.lock().settled = true;
        self.shared.wake_worker();
    }

    /// Takes over whether the guest was in the midst of a commit where it comes from.
    pub fn set_unsettled(&self, unsettled: bool) {
        self.shared.lock().unsettled = unsettled;
    }

    /// Says what became of requests to sync.
    pub fn synced(&self, requests: Vec<u64>, result: &Result<(), String>) {
        if !requests.is_empty() {
            let answers = requests.into_iter().map(|request| (request, result.clone()));
            self.shared.lock().synced.extend(answers);
            self.shared.wake_worker();
        }
    }
}

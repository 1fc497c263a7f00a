//! The thread that writes a disk's log: it alone, as long as its process lives.

use std::{
    collections::{BTreeSet, VecDeque},
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, OnceLock},
};

use kage_disk::{
    BLOCK_BYTES, Geometry, Index, Initial, Known, OpenError, ReadError, Store, StoreError, Tuning, digest_of,
};
use kage_machine::{PAGE_SIZE, PageBytes};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{RecvFlags, SendFlags, send},
};

use super::{
    Attach, Done, Shared, Standing,
    line::{
        Ask, Asked, Content, Flush, Given, LINE_PACKET, MOST_BLOCKS, MOST_SCRUB, Tell, decode_asked, encode,
        reason,
    },
    queue::{Job, Queue, Task},
};
use crate::packet;

/// Bytes of blocks that one step of cleaning copies: what comes meanwhile waits for some milliseconds.
const CLEANED: u64 = 1 << 20;
/// Packets taken from the daemon before the guest has its turn again.
const HEARD: usize = 16;
/// Packets that wait for the daemon. One that takes none of so many is given up.
const UNSENT: usize = 4096;

/// What became of the log.
enum Log {
    None,
    Open(Box<Store<File>>),
    Failed(String),
}

/// The connection to the daemon.
struct Line {
    socket: OwnedFd,
    unsent: VecDeque<Vec<u8>>,
    /// Blocks it was asked for and has not given.
    needed: BTreeSet<u32>,
}

/// The worker.
pub(super) struct Worker {
    shared: Arc<Shared>,
    blocks: u32,
    log: Log,
    queue: Queue,
    line: Option<Line>,
    /// Daemons' flushes that wait for the guest's.
    deferred: Vec<u64>,
    /// Nothing is committed, and the guest's flushes wait: see [`Ask::Hold`].
    held: bool,
    waiting: Vec<Task>,
    /// Cleaning failed; it is tried again after the next write.
    tired: bool,
    buffer: Vec<u8>,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, blocks: u32) -> Self {
        Self {
            shared,
            blocks,
            log: Log::None,
            queue: Queue::default(),
            line: None,
            deferred: Vec::new(),
            held: false,
            waiting: Vec::new(),
            tired: false,
            buffer: vec![0; LINE_PACKET],
        }
    }

    /// Works until the process ends.
    pub(super) fn run(mut self) {
        loop {
            let more = self.turn();
            if self.wait(more).is_err() {
                self.fail("waiting for requests failed");
                return;
            }
        }
    }

    /// Waits until there is something to do; with `more`, only looks.
    fn wait(&self, more: bool) -> io::Result<()> {
        let mut polled = vec![PollFd::new(&self.shared.worker, PollFlags::IN)];
        if let Some(line) = &self.line {
            let unsent = if line.unsent.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            polled.push(PollFd::new(&line.socket, PollFlags::IN | unsent));
        }
        let timeout = more.then_some(Timespec { tv_sec: 0, tv_nsec: 0 });
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Does what there is to do; whether there is more.
    fn turn(&mut self) -> bool {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.shared.worker, &mut count);
        let (attach, line, jobs, synced, settled) = {
            let mut exchange = self.shared.lock();
            let jobs = std::mem::take(&mut exchange.jobs);
            let settled = std::mem::take(&mut exchange.settled);
            (
                exchange.attach.take(),
                exchange.line.take(),
                jobs,
                std::mem::take(&mut exchange.synced),
                settled,
            )
        };
        if let Some(attach) = attach {
            self.open(attach);
        }
        if let Some(socket) = line {
            self.greet(socket);
        }
        if settled {
            self.settled();
        }
        jobs.into_iter().for_each(|(number, job)| self.queue.push(number, job));
        for (ticket, result) in synced {
            // Who has the guest sync may be about to end it: see `Store::cover`.
            let covered = result.and_then(|()| {
                let covered = self.store()?.cover();
                self.said(covered)
            });
            self.tell(&Tell::Done { ticket, result: covered.map_err(reason) });
        }
        let heard = self.hear();
        self.perform();
        self.ask_for_missing();
        self.send();
        let cleaned = !heard && self.queue.is_empty() && self.clean();
        heard || cleaned
    }

    fn open(&mut self, attach: Attach) {
        let Attach { log, index, identity, elsewhere, line } = attach;
        self.line = Some(Line { socket: line, unsent: VecDeque::new(), needed: BTreeSet::new() });
        match open(log, &index, u64::from(self.blocks), identity, elsewhere) {
            Ok(store) => {
                self.tell(&Tell::opened(store.geometry()));
                self.log = Log::Open(Box::new(store));
                self.shared.set_standing(Standing::Open);
            }
            Err(error) => self.fail(error),
        }
    }

    /// Speaks to another daemon, which knows nothing of what the one before was told.
    fn greet(&mut self, socket: OwnedFd) {
        self.line = Some(Line { socket, unsent: VecDeque::new(), needed: BTreeSet::new() });
        self.deferred.clear();
        let standing = match &self.log {
            Log::None => None,
            Log::Open(store) => Some(Tell::opened(store.geometry())),
            Log::Failed(reason) => Some(Tell::Failed { reason: reason.clone() }),
        };
        if let Some(standing) = standing {
            self.tell(&standing);
        }
    }

    /// Gives the disk up: whatever waits for it fails.
    fn fail(&mut self, why: impl ToString) {
        let reason = reason(why);
        self.tell(&Tell::Failed { reason: reason.clone() });
        for ticket in std::mem::take(&mut self.deferred) {
            self.tell(&Tell::Done { ticket, result: Err(reason.clone()) });
        }
        self.log = Log::Failed(reason);
        let tasks = self.queue.take();
        let waiting = std::mem::take(&mut self.waiting);
        self.answer(tasks.into_iter().chain(waiting).map(failed));
        self.shared.set_standing(Standing::Failed);
    }

    /// Fails for good after an error behind which nothing is known of the medium.
    fn look_at(&mut self, error: &StoreError) {
        let broken = match (error, &mut self.log) {
            (StoreError::Broken, _) => true,
            // A flush with nothing to do says whether a sync has failed.
            (StoreError::Io { .. }, Log::Open(store)) => !store.is_usable(),
            _ => false,
        };
        if broken {
            self.fail(error);
        }
    }

    fn answer(&self, done: impl Iterator<Item = Done>) {
        let mut exchange = self.shared.lock();
        exchange.done.extend(done);
        exchange.busy = false;
        drop(exchange);
        self.shared.rests.notify_all();
        self.shared.wake_device();
    }

    /// Whether requests may be begun; notes that one is, which changes blocks.
    fn begin(&self, changes: bool) -> bool {
        let mut exchange = self.shared.lock();
        exchange.busy = exchange.runs && changes;
        if !exchange.runs {
            self.shared.rests.notify_all();
        }
        exchange.runs
    }

    /// Does the guest's requests, as far as they can be done.
    fn perform(&mut self) {
        loop {
            if !self.shared.lock().runs {
                return;
            }
            let mut tasks = self.queue.next();
            let Some(first) = tasks.first() else { return };
            let changes = first.job.changes();
            if !self.begin(changes) {
                tasks.into_iter().for_each(|task| self.queue.park(task));
                return;
            }
            if changes {
                self.change(tasks);
            } else if let Some(task) = tasks.pop() {
                match task.job {
                    Job::Flush => self.guest_flush(task),
                    _ => self.read(task),
                }
            }
        }
    }

    fn change(&mut self, tasks: Vec<Task>) {
        self.tired = false;
        let Log::Open(store) = &mut self.log else {
            self.answer(tasks.into_iter().map(failed));
            return;
        };
        let result = match tasks.as_slice() {
            [Task { job: Job::Discard(blocks), .. }] => {
                store.discard(u64::from(blocks.start)..u64::from(blocks.end))
            }
            tasks => write_all(store, tasks),
        };
        // A commit's discards are of what the commit before still needs.
        self.shared.lock().unsettled = true;
        let error = match result {
            Ok(()) => {
                self.answer(tasks.into_iter().map(|task| Done {
                    number: task.number,
                    bytes: Vec::new(),
                    ok: true,
                }));
                return;
            }
            Err(error) => error,
        };
        if tasks.len() > 1 && !matches!(error, StoreError::Broken) {
            // Some of them may fit alone.
            for task in tasks {
                if self.begin(true) {
                    self.change(vec![task]);
                } else {
                    self.queue.park(task);
                }
            }
            return;
        }
        self.look_at(&error);
        self.answer(tasks.into_iter().map(failed));
    }

    /// The machine is this host's: what waited to be committed is.
    fn settled(&mut self) {
        self.held = false;
        // They cover what came before them, so one commit answers them all.
        std::mem::take(&mut self.waiting).into_iter().for_each(|task| self.guest_flush(task));
    }

    fn guest_flush(&mut self, task: Task) {
        if self.held {
            self.waiting.push(task);
            return;
        }
        let Log::Open(store) = &mut self.log else {
            self.answer([failed(task)].into_iter());
            return;
        };
        match store.flush() {
            Ok(()) => {
                self.shared.lock().unsettled = false;
                self.answer([Done { number: task.number, bytes: Vec::new(), ok: true }].into_iter());
                for ticket in std::mem::take(&mut self.deferred) {
                    self.tell(&Tell::Done { ticket, result: Ok(()) });
                }
            }
            Err(error) => {
                self.look_at(&error);
                self.answer([failed(task)].into_iter());
            }
        }
    }

    fn read(&mut self, mut task: Task) {
        let Log::Open(store) = &mut self.log else {
            self.answer([failed(task)].into_iter());
            return;
        };
        let blocks = task.job.blocks();
        let mut bytes = vec![0; blocks.len() * PAGE_SIZE];
        let mut corrupt = Vec::new();
        if store.read(u64::from(blocks.start), &mut bytes).is_err() {
            for (block, into) in blocks.zip(bytes.chunks_exact_mut(PAGE_SIZE)) {
                match store.read(u64::from(block), into) {
                    Ok(()) => {}
                    Err(ReadError::Missing { .. }) => task.missing.push(block),
                    Err(_) => corrupt.push(block),
                }
            }
        }
        task.missing.extend(&corrupt);
        if !corrupt.is_empty() {
            self.tell(&Tell::Corrupt(corrupt));
        }
        if task.missing.is_empty() {
            self.answer([Done { number: task.number, bytes, ok: true }].into_iter());
        } else {
            self.queue.park(task);
        }
    }

    /// Asks the daemon for what reads wait for.
    fn ask_for_missing(&mut self) {
        let missing = self.queue.missing();
        let Some(line) = &mut self.line else { return };
        line.needed.retain(|block| missing.contains(block));
        let new: Vec<u32> = missing.difference(&line.needed).copied().collect();
        line.needed.extend(&new);
        for blocks in new.chunks(MOST_BLOCKS) {
            self.tell(&Tell::Need(blocks.to_vec()));
        }
    }

    fn tell(&mut self, tell: &Tell) {
        let Some(line) = &mut self.line else { return };
        line.unsent.push_back(encode(tell));
        if line.unsent.len() > UNSENT {
            self.line = None;
        }
    }

    fn send(&mut self) {
        let Some(line) = &mut self.line else { return };
        while let Some(packet) = line.unsent.front() {
            match send(&line.socket, packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) => drop(line.unsent.pop_front()),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                Err(_) => {
                    self.line = None;
                    return;
                }
            }
        }
    }

    /// Does what the daemon asks; whether more may wait.
    fn hear(&mut self) -> bool {
        for _ in 0..HEARD {
            let Some(line) = &self.line else { return false };
            let mut buffer = std::mem::take(&mut self.buffer);
            let packet = packet::receive(line.socket.as_fd(), &mut buffer, RecvFlags::DONTWAIT);
            self.buffer = buffer;
            match packet {
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
                {
                    return false;
                }
                Ok(packet) if !packet.bytes.is_empty() => match decode_asked(&packet.bytes) {
                    Some((asked, bytes)) => self.obey(asked, &bytes),
                    None => self.line = None,
                },
                Ok(_) | Err(_) => self.line = None,
            }
        }
        true
    }

    fn obey(&mut self, asked: Asked, bytes: &[&PageBytes]) {
        let Asked { ticket, ask } = asked;
        let result = match ask {
            Ask::Set(blocks) => self.set(&blocks, bytes),
            Ask::Fill(blocks) => self.fill(&blocks, bytes),
            Ask::Hold => {
                self.held = true;
                Ok(())
            }
            Ask::Flush(how) => {
                if how == Flush::Settled {
                    self.settled();
                }
                match self.flush(ticket, how) {
                    Some(result) => result,
                    None => return,
                }
            }
            Ask::Scrub { budget_bytes } => match self.scrub(ticket, budget_bytes) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Ask::Sync => {
                let mut exchange = self.shared.lock();
                if exchange.runs {
                    exchange.syncs.push(ticket);
                    drop(exchange);
                    self.shared.wake_device();
                    return;
                }
                Ok(())
            }
        };
        let result = result.map_err(reason);
        self.tell(&Tell::Done { ticket, result });
        self.send();
    }

    /// The store, where there is one.
    fn store(&mut self) -> Result<&mut Store<File>, String> {
        match &mut self.log {
            Log::Open(store) => Ok(store),
            Log::None => Err("the disk is not open yet".to_owned()),
            Log::Failed(reason) => Err(reason.clone()),
        }
    }

    /// Hands a failure on after looking at what it means.
    fn said<T>(&mut self, result: Result<T, StoreError>) -> Result<T, String> {
        result.map_err(|error| {
            self.look_at(&error);
            error.to_string()
        })
    }

    fn set(&mut self, blocks: &[(u32, Content)], bytes: &[&PageBytes]) -> Result<(), String> {
        if self.shared.lock().runs {
            return Err("the guest runs: its disk is its own".to_owned());
        }
        self.tired = false;
        let last = self.blocks;
        let store = self.store()?;
        let mut bytes = bytes.iter();
        let (mut written, mut zeros, mut elsewhere) = (Vec::new(), Vec::new(), Vec::new());
        for (block, content) in blocks.iter().copied() {
            match content {
                Content::Bytes => written.extend(bytes.next().map(|bytes| (u64::from(block), *bytes))),
                Content::Zeros => zeros.push(block),
                Content::Elsewhere(digest) => elsewhere.push((block, digest)),
            }
        }
        if blocks.iter().any(|(block, _)| *block >= last) {
            return Err("blocks outside the disk".to_owned());
        }
        let result = store
            .write_scattered(&written)
            .and_then(|()| store.discard_each(&zeros))
            .and_then(|()| store.leave_missing(&elsewhere));
        self.said(result)
    }

    fn fill(&mut self, blocks: &[(u32, Given)], bytes: &[&PageBytes]) -> Result<(), String> {
        self.tired = false;
        let mut bytes = bytes.iter();
        let (mut given, mut unavailable, mut refused) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        // Whatever is missing of a packet is one record, or two.
        let (mut written, mut zeros): (Vec<(u64, &PageBytes)>, Vec<u32>) = (Vec::new(), Vec::new());
        let mut changed = Vec::new();
        let result = blocks.iter().try_for_each(|(block, what)| {
            let store = self.store()?;
            let unknown = store.index().known(u64::from(*block)) == Known::Missing(None);
            let offered = match what {
                Given::Bytes => bytes.next().map(|bytes| (*bytes, digest_of(*bytes))),
                Given::Zeros => Some((&[0; PAGE_SIZE], zeros_digest())),
                Given::Expect(digest) => {
                    store.expect(u64::from(*block), *digest);
                    None
                }
                Given::Unavailable => {
                    unavailable.insert(*block);
                    None
                }
            };
            if let Some((bytes, digest)) = offered {
                match fits(store, *block, bytes, digest) {
                    Ok(Fits::Missing) if digest == zeros_digest() => zeros.push(*block),
                    Ok(Fits::Missing) => written.push((u64::from(*block), bytes)),
                    Ok(Fits::There) => {}
                    Ok(Fits::Not) => refused.push(*block),
                    Err(error) => self.said(Err(error))?,
                }
            }
            given.insert(*block);
            if unknown {
                changed.push(*block);
            }
            Ok(())
        });
        let result = result.and_then(|()| {
            let store = self.store()?;
            let filled = store.write_scattered(&written).and_then(|()| store.discard_each(&zeros));
            self.said(filled)
        });
        let given_up = self.queue.give_up(&unavailable);
        self.queue.retry(&given);
        let mut exchange = self.shared.lock();
        // What was not known when the machine's pages were told is told now.
        exchange.changed.extend(changed);
        exchange.done.extend(given_up.into_iter().map(failed));
        drop(exchange);
        self.shared.wake_device();
        result.and_then(|()| match refused.as_slice() {
            [] => Ok(()),
            [first, ..] => {
                Err(format!("{} blocks, {first} the first, are not those that are missing", refused.len()))
            }
        })
    }

    /// None: it waits for the guest's.
    fn flush(&mut self, ticket: u64, how: Flush) -> Option<Result<(), String>> {
        let mut exchange = self.shared.lock();
        if exchange.unsettled && how != Flush::Torn {
            exchange.prompt = true;
            drop(exchange);
            self.deferred.push(ticket);
            self.shared.wake_device();
            return None;
        }
        drop(exchange);
        let held = self.held;
        let flushed = match self.store() {
            Ok(_) if held => return Some(Err("the machine is not this host's yet".to_owned())),
            Ok(store) => store.flush(),
            Err(error) => return Some(Err(error)),
        };
        Some(self.said(flushed))
    }

    fn scrub(&mut self, ticket: u64, budget: u64) -> Result<(), String> {
        let scrubbed = self.store()?.scrub(budget.min(MOST_SCRUB));
        let found = self.said(scrubbed)?;
        let corrupt = found.corrupt.iter().filter_map(|block| u32::try_from(*block).ok()).collect();
        let (checked_bytes, done) = (found.checked_bytes, found.done);
        self.tell(&Tell::Scrubbed { ticket, checked_bytes, corrupt, done });
        Ok(())
    }

    /// Cleans a little when nothing else is to be done; whether there is more.
    fn clean(&mut self) -> bool {
        let Log::Open(store) = &mut self.log else { return false };
        if self.tired || !store.wants_cleaning() {
            return false;
        }
        match store.clean(CLEANED) {
            Ok(cleaned) => {
                self.tired = cleaned.copied_bytes == 0 && cleaned.freed == 0;
                !self.tired && cleaned.more
            }
            Err(error) => {
                self.tired = true;
                self.look_at(&error);
                false
            }
        }
    }
}

fn failed(task: Task) -> Done {
    Done { number: task.number, bytes: Vec::new(), ok: false }
}

/// Opens a log, or makes it where there is none.
fn open(
    log: File,
    index: &OwnedFd,
    blocks: u64,
    identity: [u8; 16],
    elsewhere: bool,
) -> Result<Store<File>, OpenError> {
    let io = |source| OpenError::Io { doing: "mapping the index", source };
    let index = Index::map(index, blocks, true).map_err(io)?;
    // While a machine arrives, the log may have to hold its disk beside that of the last commit.
    let geometry = Geometry::new(blocks, Geometry::log_bytes_for(2 * blocks))?;
    let blank = Store::is_blank(&log, &geometry);
    if blank.map_err(|source| OpenError::Io { doing: "reading the log", source })? {
        let initial = if elsewhere { Initial::Missing } else { Initial::Zeros };
        Store::create(log, index, identity, geometry, initial, Tuning::default())
    } else {
        Store::open(log, index, identity, Tuning::default())
    }
}

/// Writes all of some writes, none of whose blocks is another's.
fn write_all(store: &mut Store<File>, tasks: &[Task]) -> Result<(), StoreError> {
    let mut blocks: Vec<(u64, &[u8; BLOCK_BYTES])> = Vec::new();
    for task in tasks {
        if let Job::Write { first, bytes } = &task.job {
            let (whole, _) = bytes.as_chunks();
            blocks.extend((u64::from(*first)..).zip(whole));
        }
    }
    store.write_scattered(&blocks)
}

/// Digest of zeros, of which a disk that comes consists for the most part.
fn zeros_digest() -> u64 {
    static ZEROS: OnceLock<u64> = OnceLock::new();
    *ZEROS.get_or_init(|| digest_of(&[0; PAGE_SIZE]))
}

/// What offered bytes are to a block.
enum Fits {
    /// What is missing.
    Missing,
    /// What is there, which may have been put right just now.
    There,
    /// Not its own.
    Not,
}

/// Says whether bytes are what a block lacks; damage is put right.
fn fits(store: &mut Store<File>, block: u32, bytes: &PageBytes, digest: u64) -> Result<Fits, StoreError> {
    let at = u64::from(block);
    match store.index().known(at) {
        Known::Zeros => Ok(Fits::There),
        Known::Missing(_) if store.is_what_is_missing(at, digest) => Ok(Fits::Missing),
        Known::Missing(_) => Ok(Fits::Not),
        Known::Held(_) => {
            let mut held = [0; PAGE_SIZE];
            if store.read(at, &mut held).is_ok() {
                return Ok(Fits::There);
            }
            match store.repair(at, bytes) {
                Err(StoreError::NotThisBlock { .. }) => Ok(Fits::Not),
                repaired => repaired.map(|()| Fits::There),
            }
        }
    }
}

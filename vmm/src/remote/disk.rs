//! A machine's disk as its daemon has it: read through log and index, changed by asking the worker in its process.
//!
//! One thread reads the line and wakes whoever waits for an answer; another calls [`DiskEvents`], which may ask in
//! turn. The process at the other end runs hostile code: what it says is bounded by the disk's size, and nobody waits
//! for it without end.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use kage_disk::{Found, Geometry, Index, Known, Reader, digest_of};
use kage_machine::{
    Gone, MachineError, PAGE_SIZE, PageBytes,
    disk::{Block, Disk, DiskEvents, Fill, Scrubbed},
};
use rustix::net::{
    AddressFamily, RecvFlags, Shutdown, SocketFlags, SocketType, shutdown, socketpair,
    sockopt::{Timeout, set_socket_timeout},
};

use crate::{
    disk::line::{
        Ask, Asked, Content, Flush, Given, LINE_PACKET, MOST_BLOCKS, MOST_BYTES, Tell, decode, encode,
    },
    packet,
    process::host_now,
};

/// How long an answer may take: a flush of much on a slow medium.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a flush waits for a commit of the guest's that is half written.
const COMMIT: Duration = Duration::from_secs(3);
/// Stack of the threads.
const STACK: usize = 256 << 10;
/// Packets of blocks that are not answered.
const UNANSWERED: usize = 32;

/// Where the disk stands.
#[derive(Clone, Debug)]
enum Opening {
    /// Nothing was heard.
    Waiting,
    Open,
    Failed(String),
}

enum Answer {
    Done(Result<(), String>),
    Scrubbed(Scrubbed),
}

struct State {
    opening: Opening,
    /// The other end has closed.
    closed: bool,
    ticket: u64,
    /// Those that somebody waits for, with their answers.
    waiting: BTreeMap<u64, Option<Answer>>,
    /// Packets of blocks that are not answered.
    setting: BTreeSet<u64>,
    /// Why one of them was refused.
    unset: Option<String>,
    /// What the events' listener has not heard.
    needed: BTreeSet<u32>,
    corrupt: BTreeSet<u32>,
    failed: Option<String>,
    listener: Option<Arc<dyn DiskEvents>>,
    listens: bool,
}

/// Blocks that are not sent yet.
#[derive(Default)]
struct Gathered {
    blocks: Vec<(u32, Content)>,
    bytes: Vec<u8>,
    named: BTreeSet<u32>,
}

struct Inner {
    blocks: u32,
    line: OwnedFd,
    log: File,
    index: OwnedFd,
    /// What reads, once the worker has told the log's shape.
    reader: OnceLock<Reader<File>>,
    state: Mutex<State>,
    changed: Condvar,
    gathered: Mutex<Gathered>,
}

/// The disk of a machine in another process.
pub struct RemoteDisk {
    inner: Arc<Inner>,
}

fn refused(reason: impl Into<String>) -> MachineError {
    MachineError::Refused { reason: reason.into() }
}

fn gone() -> MachineError {
    MachineError::Gone(Gone { reason: "it has closed the connection of its disk".to_owned() })
}

impl RemoteDisk {
    /// The daemon's end for a disk of so many blocks, and the worker's.
    ///
    /// # Errors
    /// When descriptors or threads run out, or the index does not fit.
    pub(super) fn new(blocks: u32, log: File, index: OwnedFd) -> io::Result<(Self, OwnedFd)> {
        let (line, other) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&line, Timeout::Send, Some(PATIENCE))?;
        let state = State {
            opening: Opening::Waiting,
            closed: false,
            // Behind those of a daemon before: what was asked by that is still answered.
            ticket: host_now().ns,
            waiting: BTreeMap::new(),
            setting: BTreeSet::new(),
            unset: None,
            needed: BTreeSet::new(),
            corrupt: BTreeSet::new(),
            failed: None,
            listener: None,
            listens: false,
        };
        let inner = Arc::new(Inner {
            blocks,
            line,
            log,
            index,
            reader: OnceLock::new(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            gathered: Mutex::default(),
        });
        let hearing = Arc::clone(&inner);
        thread::Builder::new().name("disk-line".into()).stack_size(STACK).spawn(move || hearing.hear())?;
        Ok((Self { inner }, other))
    }

    /// Has events told from here on, those that came before included.
    ///
    /// # Errors
    /// When threads run out.
    pub fn watch(&self, events: Arc<dyn DiskEvents>) -> io::Result<()> {
        let mut state = self.inner.lock();
        state.listener = Some(events);
        if !std::mem::replace(&mut state.listens, true) {
            let telling = Arc::clone(&self.inner);
            thread::Builder::new()
                .name("disk-events".into())
                .stack_size(STACK)
                .spawn(move || telling.report())?;
        }
        drop(state);
        self.inner.changed.notify_all();
        Ok(())
    }

    /// Waits until the disk is open.
    ///
    /// # Errors
    /// Refused with the reason when it cannot be opened, or is not in `patience`.
    pub fn wait_open(&self, patience: Duration) -> Result<(), MachineError> {
        let waits = |state: &mut State| matches!(state.opening, Opening::Waiting) && !state.closed;
        let (state, _) = self
            .inner
            .changed
            .wait_timeout_while(self.inner.lock(), patience, waits)
            .unwrap_or_else(PoisonError::into_inner);
        match &state.opening {
            Opening::Open => Ok(()),
            Opening::Failed(reason) => Err(refused(format!("the disk: {reason}"))),
            Opening::Waiting if state.closed => Err(gone()),
            Opening::Waiting => Err(refused(format!("the disk is not open after {patience:?}"))),
        }
    }

    /// Has nothing committed until [`RemoteDisk::settle_commits`].
    ///
    /// # Errors
    /// As any call to a machine.
    pub fn hold_commits(&self) -> Result<(), MachineError> {
        let ticket = self.inner.ask(Ask::Hold, &[])?;
        self.inner.done(ticket, PATIENCE)
    }

    /// Lets commits be again, those that waited first, and makes everything durable: once the guest's commit that may
    /// be half written is whole, or at once when that takes long.
    ///
    /// # Errors
    /// As any call to a machine.
    pub fn settle_commits(&self) -> Result<(), MachineError> {
        self.settle()?;
        let settled = self.inner.ask(Ask::Flush(Flush::Settled), &[])?;
        match self.inner.answer(settled, COMMIT)? {
            Some(answer) => done(answer),
            None => {
                let torn = self.inner.ask(Ask::Flush(Flush::Torn), &[])?;
                self.inner.done(torn, PATIENCE)
            }
        }
    }

    /// Lets a block be something else, in some while: [`RemoteDisk::settle`] waits for it.
    pub(super) fn set(&self, block: u32, content: Content, bytes: Option<&PageBytes>) {
        let mut gathered = self.inner.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        let full = gathered.blocks.len() >= MOST_BLOCKS || gathered.bytes.len() >= MOST_BYTES * PAGE_SIZE;
        if full || gathered.named.contains(&block) {
            self.inner.send_gathered(&mut gathered);
        }
        gathered.named.insert(block);
        gathered.blocks.push((block, content));
        if let Some(bytes) = bytes {
            gathered.bytes.extend_from_slice(bytes);
        }
    }

    /// Waits until all that was set is so.
    ///
    /// # Errors
    /// Refused when some of it could not be, since last asked.
    pub fn settle(&self) -> Result<(), MachineError> {
        let mut gathered = self.inner.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.send_gathered(&mut gathered);
        drop(gathered);
        let mut state = self.inner.wait_for_sets(0);
        match state.unset.take() {
            Some(reason) => Err(refused(format!("the disk: {reason}"))),
            None => Ok(()),
        }
    }

    /// Waits only if something was set.
    fn look(&self) -> Option<&Reader<File>> {
        let unsent = !self.inner.gathered.lock().unwrap_or_else(PoisonError::into_inner).blocks.is_empty();
        if unsent || !self.inner.lock().setting.is_empty() {
            let mut gathered = self.inner.gathered.lock().unwrap_or_else(PoisonError::into_inner);
            self.inner.send_gathered(&mut gathered);
            drop(gathered);
            drop(self.inner.wait_for_sets(0));
        }
        if self.inner.reader.get().is_none() {
            // Until it is open the index says nothing.
            let late = self.wait_open(PATIENCE).is_err();
            let mut state = self.inner.lock();
            if late && matches!(state.opening, Opening::Waiting) {
                // Nobody waits so long twice. Should it open yet, it is open.
                state.opening = Opening::Failed("it is not open in time".to_owned());
            }
        }
        self.inner.reader.get()
    }

    /// Blocks that are not zeros, in order.
    pub(super) fn populated(&self, mut each: impl FnMut(u32)) {
        // Of a disk that could not be opened nothing is known, least of all that it is zeros.
        let reader = self.look();
        let is_some = |block: &u32| reader.is_none_or(|reader| known(reader, *block) != Block::Zeros);
        (0..self.inner.blocks).filter(is_some).for_each(&mut each);
    }
}

impl Drop for RemoteDisk {
    /// Ends the threads.
    fn drop(&mut self) {
        let _ = shutdown(&self.inner.line, Shutdown::Both);
        self.inner.close();
    }
}

/// What the index says. Zeros that were written are zeros, as on a host where they were not.
fn known(reader: &Reader<File>, block: u32) -> Block {
    let zeros = || {
        static ZEROS: OnceLock<u64> = OnceLock::new();
        *ZEROS.get_or_init(|| digest_of(&[0; PAGE_SIZE]))
    };
    match reader.index().known(u64::from(block)) {
        Known::Zeros => Block::Zeros,
        Known::Held(digest) if digest == zeros() => Block::Zeros,
        Known::Held(digest) => Block::Held(digest),
        Known::Missing(digest) => Block::Missing(digest),
    }
}

fn done(answer: Answer) -> Result<(), MachineError> {
    match answer {
        Answer::Done(result) => result.map_err(refused),
        Answer::Scrubbed(_) => Err(refused("another answer than asked for")),
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Reads the line until it ends.
    fn hear(&self) {
        let mut buffer = vec![0; LINE_PACKET];
        loop {
            match packet::receive(self.line.as_fd(), &mut buffer, RecvFlags::empty()) {
                Ok(packet) if packet.bytes.is_empty() => break,
                // What makes no sense is passed over: whoever waits for an answer waits in vain.
                Ok(packet) => decode(&packet.bytes).into_iter().for_each(|tell| self.take(tell)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.close();
    }

    fn take(&self, tell: Tell) {
        let mut state = self.lock();
        let mine = |blocks: Vec<u32>| blocks.into_iter().filter(|block| *block < self.blocks);
        match tell {
            Tell::Opened { blocks, segment_bytes, segments } => {
                let shape = Geometry { blocks, segment_bytes, segments };
                state.opening = match self.open(shape) {
                    Ok(()) => Opening::Open,
                    Err(error) => Opening::Failed(error.to_string()),
                };
            }
            Tell::Failed { reason } => {
                state.opening = Opening::Failed(reason.clone());
                state.failed = Some(reason);
            }
            Tell::Need(blocks) => state.needed.extend(mine(blocks)),
            Tell::Corrupt(blocks) => state.corrupt.extend(mine(blocks)),
            Tell::Done { ticket, result } => {
                if state.setting.remove(&ticket) {
                    if let Err(reason) = result {
                        state.unset.get_or_insert(reason);
                    }
                } else if let Some(answer) = state.waiting.get_mut(&ticket) {
                    *answer = Some(Answer::Done(result));
                }
            }
            Tell::Scrubbed { ticket, checked_bytes, corrupt, done } => {
                let corrupt = mine(corrupt).collect();
                if let Some(answer) = state.waiting.get_mut(&ticket) {
                    *answer = Some(Answer::Scrubbed(Scrubbed { checked_bytes, corrupt, done }));
                }
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    fn open(&self, shape: Geometry) -> io::Result<()> {
        if self.reader.get().is_some() {
            return Ok(());
        }
        let shape = shape.validated().map_err(io::Error::other)?;
        if shape.blocks != u64::from(self.blocks) {
            return Err(io::Error::other("the disk has another size"));
        }
        let index = Index::map(&self.index, shape.blocks, false)?;
        let _ = self.reader.set(Reader::new(self.log.try_clone()?, index, shape));
        Ok(())
    }

    /// Tells events until the line ends.
    fn report(&self) {
        let mut state = self.lock();
        loop {
            let listener = state.listener.clone();
            let idle = state.needed.is_empty() && state.corrupt.is_empty() && state.failed.is_none();
            match listener {
                Some(listener) if !idle => {
                    let (needed, corrupt, failed) = (
                        std::mem::take(&mut state.needed),
                        std::mem::take(&mut state.corrupt),
                        state.failed.take(),
                    );
                    drop(state);
                    corrupt.into_iter().for_each(|block| listener.corrupt(block));
                    if !needed.is_empty() {
                        listener.needed(&needed.into_iter().collect::<Vec<_>>());
                    }
                    if let Some(reason) = failed {
                        listener.failed(&reason);
                    }
                    state = self.lock();
                }
                _ if state.closed => return,
                _ => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn send(&self, ticket: u64, ask: Ask, bytes: &[u8]) -> Result<(), MachineError> {
        let mut packet = encode(&Asked { ticket, ask });
        packet.extend_from_slice(bytes);
        packet::send(self.line.as_fd(), &packet, &[]).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => refused("the disk's worker takes nothing"),
            _ => gone(),
        })
    }

    /// Asks; the answer is to be fetched.
    fn ask(&self, ask: Ask, bytes: &[u8]) -> Result<u64, MachineError> {
        let ticket = {
            let mut state = self.lock();
            if state.closed {
                return Err(gone());
            }
            state.ticket += 1;
            let ticket = state.ticket;
            state.waiting.insert(ticket, None);
            ticket
        };
        let sent = self.send(ticket, ask, bytes);
        if sent.is_err() {
            self.lock().waiting.remove(&ticket);
        }
        sent.map(|()| ticket)
    }

    /// The answer to a question; `None` when there was none in `patience`, and none is waited for any more.
    fn answer(&self, ticket: u64, patience: Duration) -> Result<Option<Answer>, MachineError> {
        let waits = |state: &mut State| matches!(state.waiting.get(&ticket), Some(None)) && !state.closed;
        let (mut state, _) = self
            .changed
            .wait_timeout_while(self.lock(), patience, waits)
            .unwrap_or_else(PoisonError::into_inner);
        match state.waiting.remove(&ticket) {
            Some(Some(answer)) => Ok(Some(answer)),
            _ if state.closed => Err(gone()),
            _ => Ok(None),
        }
    }

    fn done(&self, ticket: u64, patience: Duration) -> Result<(), MachineError> {
        match self.answer(ticket, patience)? {
            Some(answer) => done(answer),
            None => Err(refused(format!("the disk has not answered for {patience:?}"))),
        }
    }

    /// Waits until at most so many packets of blocks are not answered.
    fn wait_for_sets(&self, most: usize) -> MutexGuard<'_, State> {
        let waits = |state: &mut State| state.setting.len() > most && !state.closed;
        let (mut state, _) = self
            .changed
            .wait_timeout_while(self.lock(), PATIENCE, waits)
            .unwrap_or_else(PoisonError::into_inner);
        if state.setting.len() > most {
            state.setting.clear();
            state.unset.get_or_insert_with(|| "its worker does not answer".to_owned());
        }
        state
    }

    fn send_gathered(&self, gathered: &mut Gathered) {
        if gathered.blocks.is_empty() {
            return;
        }
        let Gathered { blocks, bytes, .. } = std::mem::take(gathered);
        let ticket = {
            let mut state = self.wait_for_sets(UNANSWERED);
            if state.closed || state.unset.is_some() {
                // Whoever settles hears why.
                state.unset.get_or_insert_with(|| "its process has gone".to_owned());
                return;
            }
            state.ticket += 1;
            let ticket = state.ticket;
            state.setting.insert(ticket);
            ticket
        };
        if let Err(error) = self.send(ticket, Ask::Set(blocks), &bytes) {
            let mut state = self.lock();
            state.setting.remove(&ticket);
            state.unset.get_or_insert(error.to_string());
        }
    }
}

impl Disk for RemoteDisk {
    fn blocks(&self) -> u32 {
        self.inner.blocks
    }

    fn block(&self, block: u32) -> Block {
        match self.look() {
            _ if block >= self.inner.blocks => Block::Zeros,
            Some(reader) => known(reader, block),
            None => Block::Missing(None),
        }
    }

    fn read(&self, block: u32, into: &mut PageBytes) -> Block {
        into.fill(0);
        let Some(reader) = self.look() else { return Block::Missing(None) };
        if block >= self.inner.blocks {
            return Block::Zeros;
        }
        match reader.block(u64::from(block), into) {
            Ok(Found::Zeros | Found::Data) => Block::of(into),
            Ok(Found::Missing | Found::Corrupt) | Err(_) => {
                into.fill(0);
                match reader.index().known(u64::from(block)) {
                    Known::Held(digest) => Block::Missing(Some(digest)),
                    Known::Missing(digest) => Block::Missing(digest),
                    Known::Zeros => Block::Zeros,
                }
            }
        }
    }

    fn fill(&self, blocks: &[(u32, Fill)]) -> Result<(), MachineError> {
        let mut tickets = Vec::new();
        let mut rest = blocks;
        while !rest.is_empty() {
            let mut with_bytes = 0;
            let fits = rest.iter().take(MOST_BLOCKS).take_while(|(_, fill)| {
                with_bytes += usize::from(matches!(fill, Fill::Bytes(_)));
                with_bytes <= MOST_BYTES
            });
            let count = fits.count();
            let (part, behind) = rest.split_at(count);
            let mut bytes = Vec::new();
            let given = part.iter().map(|(block, fill)| {
                let given = match fill {
                    Fill::Bytes(page) => {
                        bytes.extend_from_slice(page.as_slice());
                        Given::Bytes
                    }
                    Fill::Zeros => Given::Zeros,
                    Fill::Expect(digest) => Given::Expect(*digest),
                    Fill::Unavailable => Given::Unavailable,
                };
                (*block, given)
            });
            let ask = Ask::Fill(given.collect());
            let asked = self.inner.ask(ask, &bytes);
            let failed = asked.is_err();
            tickets.push(asked);
            if failed {
                break;
            }
            rest = behind;
        }
        // All are waited for, also behind one that was refused.
        let wait = |asked: Result<u64, _>| asked.and_then(|ticket| self.inner.done(ticket, PATIENCE));
        let answers: Vec<_> = tickets.into_iter().map(wait).collect();
        answers.into_iter().collect()
    }

    fn flush(&self) -> Result<(), MachineError> {
        self.settle()?;
        let ticket = self.inner.ask(Ask::Flush(Flush::Whole), &[])?;
        self.inner.done(ticket, PATIENCE)
    }

    fn scrub(&self, budget_bytes: u64) -> Result<Scrubbed, MachineError> {
        let ticket = self.inner.ask(Ask::Scrub { budget_bytes }, &[])?;
        match self.inner.answer(ticket, PATIENCE)? {
            Some(Answer::Scrubbed(scrubbed)) => Ok(scrubbed),
            Some(answer) => done(answer).and(Err(refused("another answer than asked for"))),
            None => Err(refused(format!("the disk has not answered for {PATIENCE:?}"))),
        }
    }

    fn sync_guest(&self, patience: Duration) -> Result<(), MachineError> {
        let begun = Instant::now();
        let ticket = self.inner.ask(Ask::Sync, &[])?;
        match self.inner.answer(ticket, patience)? {
            Some(answer) => done(answer),
            None => Err(refused(format!("the guest has not synced for {:?}", begun.elapsed()))),
        }
    }
}

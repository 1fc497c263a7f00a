//! A simulated disk: requests are done in any order, a flush is an atomic commit, a crash undoes what none committed.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    future::poll_fn,
    ops::Range,
    rc::Rc,
    task::{Poll, Waker},
};

use super::executor::random;

pub const BLOCK: usize = 4096;
pub const MOST_BLOCKS: usize = 256;
pub const MOST_PARTS: usize = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the disk failed")]
pub struct DiskError;

#[derive(Clone, Debug)]
pub struct Piece {
    bytes: Rc<Vec<u8>>,
    range: Range<usize>,
}

impl Piece {
    pub fn new(bytes: Rc<Vec<u8>>, range: Range<usize>) -> Self {
        let end = range.end.min(bytes.len());
        Self { range: range.start.min(end)..end, bytes }
    }

    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(self.range.clone()).unwrap_or_default()
    }
}

/// What lies on a disk; blocks that are not there read as zeros.
pub type Content = BTreeMap<u64, Vec<u8>>;

enum Work {
    Read(usize),
    Write(Vec<Piece>),
    Discard(u64),
    Flush,
}

struct Request {
    block: u64,
    work: Work,
    waker: Option<Waker>,
    done: Option<Result<Vec<u8>, DiskError>>,
}

/// Figures of a disk since it was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    pub reads: u64,
    pub blocks_read: u64,
    pub writes: u64,
    pub blocks_written: u64,
    pub flushes: u64,
    pub discarded: u64,
}

#[derive(Default)]
struct Disk {
    blocks: u64,
    discard_blocks: u64,
    now: Content,
    committed: Content,
    since: BTreeSet<u64>,
    requests: BTreeMap<u64, Request>,
    next: u64,
    bad: BTreeSet<u64>,
    /// Writes and flushes that still succeed.
    fails_after: Option<u64>,
    figures: Figures,
}

thread_local! {
    static DISK: RefCell<Disk> = RefCell::default();
}

/// Puts in a disk of zeros.
pub fn attach(blocks: u64, discard_blocks: u64) {
    DISK.set(Disk { blocks, discard_blocks, ..Disk::default() });
}

/// Puts in a disk with content.
pub fn attach_with(blocks: u64, content: Content) {
    DISK.set(Disk {
        blocks,
        discard_blocks: 1 << 20,
        now: content.clone(),
        committed: content,
        ..Disk::default()
    });
}

/// Takes the power: requests are gone, and so is what no flush has committed.
pub fn crash() -> Content {
    DISK.with_borrow_mut(|disk| {
        disk.requests.clear();
        for block in std::mem::take(&mut disk.since) {
            match disk.committed.get(&block) {
                Some(bytes) => disk.now.insert(block, bytes.clone()),
                None => disk.now.remove(&block),
            };
        }
        disk.now.clone()
    })
}

/// What lies on it now.
pub fn content() -> Content {
    DISK.with_borrow(|disk| disk.now.clone())
}

/// Has a block unreadable from now on, or readable again.
pub fn set_bad(block: u64, bad: bool) {
    DISK.with_borrow_mut(|disk| if bad { disk.bad.insert(block) } else { disk.bad.remove(&block) });
}

/// Has writes and flushes fail after so many more.
pub fn set_failing(after: Option<u64>) {
    DISK.with_borrow_mut(|disk| disk.fails_after = after);
}

pub fn figures() -> Figures {
    DISK.with_borrow(|disk| disk.figures)
}

/// Does one of the requests; false when there are none. A flush waits for those before it.
pub fn step() -> bool {
    let waker = DISK.with_borrow_mut(|disk| {
        let waiting: Vec<u64> =
            disk.requests.iter().filter(|(_, request)| request.done.is_none()).map(|(id, _)| *id).collect();
        if waiting.is_empty() {
            return None;
        }
        let id = waiting[random(waiting.len() as u64) as usize];
        let mut request = disk.requests.remove(&id).unwrap();
        request.done = Some(disk.perform(&request));
        let waker = request.waker.take();
        disk.requests.insert(id, request);
        Some(waker)
    });
    let Some(waker) = waker else { return false };
    waker.into_iter().for_each(Waker::wake);
    true
}

impl Disk {
    fn perform(&mut self, request: &Request) -> Result<Vec<u8>, DiskError> {
        if !matches!(request.work, Work::Read(_)) {
            match &mut self.fails_after {
                Some(0) => return Err(DiskError),
                Some(left) => *left -= 1,
                None => {}
            }
        }
        match &request.work {
            Work::Read(blocks) => {
                let range = request.block..request.block + *blocks as u64;
                assert!(range.end <= self.blocks, "a read behind the end");
                self.figures.reads += 1;
                self.figures.blocks_read += *blocks as u64;
                if self.bad.range(range.clone()).next().is_some() {
                    return Err(DiskError);
                }
                let zeros = vec![0; BLOCK];
                Ok(range.flat_map(|block| self.now.get(&block).unwrap_or(&zeros).clone()).collect())
            }
            Work::Write(pieces) => {
                let bytes: Vec<u8> = pieces.iter().flat_map(|piece| piece.bytes().iter().copied()).collect();
                assert!(
                    !bytes.is_empty() && bytes.len().is_multiple_of(BLOCK),
                    "{} bytes written",
                    bytes.len()
                );
                assert!(bytes.len() <= MOST_BLOCKS * BLOCK && pieces.len() <= MOST_PARTS);
                self.figures.writes += 1;
                for (block, bytes) in (request.block..).zip(bytes.chunks(BLOCK)) {
                    assert!(block < self.blocks, "a write behind the end");
                    self.figures.blocks_written += 1;
                    self.since.insert(block);
                    self.now.insert(block, bytes.to_vec());
                }
                Ok(Vec::new())
            }
            Work::Discard(count) => {
                assert!(*count > 0 && *count <= self.discard_blocks && request.block + count <= self.blocks);
                self.figures.discarded += count;
                for block in request.block..request.block + count {
                    self.since.insert(block);
                    self.now.remove(&block);
                }
                Ok(Vec::new())
            }
            Work::Flush => {
                self.figures.flushes += 1;
                for block in std::mem::take(&mut self.since) {
                    match self.now.get(&block) {
                        Some(bytes) => self.committed.insert(block, bytes.clone()),
                        None => self.committed.remove(&block),
                    };
                }
                Ok(Vec::new())
            }
        }
    }
}

async fn transfer(block: u64, work: Work) -> Result<Vec<u8>, DiskError> {
    let id = DISK.with_borrow_mut(|disk| {
        let id = disk.next;
        disk.next += 1;
        disk.requests.insert(id, Request { block, work, waker: None, done: None });
        id
    });
    poll_fn(|context| {
        DISK.with_borrow_mut(|disk| match disk.requests.get_mut(&id) {
            None => Poll::Ready(Err(DiskError)),
            Some(request) => match request.done.take() {
                Some(done) => {
                    disk.requests.remove(&id);
                    Poll::Ready(done)
                }
                None => {
                    request.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            },
        })
    })
    .await
}

pub fn blocks() -> u64 {
    DISK.with_borrow(|disk| disk.blocks)
}

pub fn discard_blocks() -> u64 {
    DISK.with_borrow(|disk| disk.discard_blocks)
}

pub async fn read(block: u64, mut into: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, DiskError> {
    let bytes: usize = into.iter().map(Vec::len).sum();
    assert!(bytes.is_multiple_of(BLOCK) && bytes <= MOST_BLOCKS * BLOCK && into.len() <= MOST_PARTS);
    let bytes = transfer(block, Work::Read(bytes / BLOCK)).await?;
    let mut at = 0;
    for part in &mut into {
        let length = part.len();
        part.copy_from_slice(&bytes[at..at + length]);
        at += length;
    }
    Ok(into)
}

pub async fn write(block: u64, pieces: Vec<Piece>) -> Result<(), DiskError> {
    transfer(block, Work::Write(pieces)).await.map(drop)
}

pub async fn discard(block: u64, count: u64) -> Result<(), DiskError> {
    transfer(block, Work::Discard(count)).await.map(drop)
}

pub async fn flush() -> Result<(), DiskError> {
    transfer(0, Work::Flush).await.map(drop)
}

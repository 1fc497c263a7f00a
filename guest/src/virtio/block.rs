//! The block device (virtio 1.2 §5.2): 4 KiB blocks, many requests at a time, each of up to 1 MiB in scattered parts.
//!
//! A request owns its buffers until the device has answered it, so whoever waits for it may go away at any time, and
//! a machine that moves meanwhile finds them in its memory. Requests may be answered in any order: who needs one
//! before another waits in between.

use super::{
    Device, Queue,
    queue::{Part, forever},
};
use crate::local::Local;
use alloc::{collections::BTreeMap, rc::Rc, vec::Vec};
use core::{
    future::poll_fn,
    ops::Range,
    task::{Context, Poll, Waker},
};
use kage_abi::device;

/// Bytes in a block.
pub const BLOCK: usize = 4096;
/// Most blocks of one request.
pub const MOST_BLOCKS: usize = 256;
/// Most parts of one request.
pub const MOST_PARTS: usize = 128;

const SECTORS: u64 = 8;
/// Requests under way at a time.
const SLOTS: usize = 32;
/// Descriptors: a few large requests, or every slot with some parts.
const DESCRIPTORS: u16 = 512;
/// Bytes of a slot: header (16), range to discard (16), status (1).
const SLOT: usize = 64;
const RANGE_AT: usize = 16;
const STATUS_AT: usize = 32;

const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_DISCARD: u32 = 11;

/// The device could not do it: for a read, that it has not got those bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the disk failed")]
pub struct DiskError;

/// Bytes to write, shared with whoever else holds them.
#[derive(Clone, Debug)]
pub struct Piece {
    bytes: Rc<Vec<u8>>,
    range: Range<usize>,
}

impl Piece {
    /// A range of some bytes, as far as they have it.
    pub fn new(bytes: Rc<Vec<u8>>, range: Range<usize>) -> Self {
        let end = range.end.min(bytes.len());
        Self { range: range.start.min(end)..end, bytes }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(self.range.clone()).unwrap_or_default()
    }
}

/// What the device reads or writes in guest memory.
enum Held {
    Nothing,
    Write(Vec<Piece>),
    Read(Vec<Vec<u8>>),
}

enum Slot {
    Free,
    Running(Held, Option<Waker>),
    /// Nobody waits for it any more; the device may still use the buffers.
    Abandoned {
        _held: Held,
    },
    Done(Held, u8),
}

struct Disk {
    queue: [Queue; 1],
    sectors: u64,
    /// Most blocks of one discard; 0 = there is none.
    discard_blocks: u64,
    memory: *mut u8,
    slots: Vec<Slot>,
    heads: BTreeMap<u16, usize>,
    waiting: Vec<Waker>,
}

static DISK: Local<Disk> = Local::new();

/// Starts the device.
pub fn start() {
    let mut queue = [Queue::new(DESCRIPTORS)];
    let (device, features) = Device::start(device::BLOCK, 2, FLUSH | DISCARD, &mut queue);
    let sectors = u64::from(device.config(0)) | u64::from(device.config(4)) << 32;
    let discard_blocks = if features & DISCARD == 0 { 0 } else { u64::from(device.config(36)) / SECTORS };
    DISK.set(Disk {
        queue,
        sectors,
        discard_blocks,
        memory: forever(SLOTS * SLOT),
        slots: (0..SLOTS).map(|_| Slot::Free).collect(),
        heads: BTreeMap::new(),
        waiting: Vec::new(),
    });
}

/// Blocks of the disk.
pub fn blocks() -> u64 {
    DISK.get().sectors / SECTORS
}

/// Most blocks that one [`discard`] takes; 0 when the device has none.
pub fn discard_blocks() -> u64 {
    DISK.get().discard_blocks
}

/// Collects completions; called after each door.
pub fn poll() {
    let mut wake = Vec::new();
    {
        let mut disk = DISK.get();
        let disk = &mut *disk;
        while let Some((head, _)) = disk.queue[0].pop() {
            let Some(number) = disk.heads.remove(&head) else { continue };
            let Some(slot) = disk.slots.get_mut(number) else { continue };
            // SAFETY: the slot's status byte lies in the slots' memory; the request is complete.
            let status = unsafe { disk.memory.add(number * SLOT + STATUS_AT).read_volatile() };
            match core::mem::replace(slot, Slot::Free) {
                Slot::Running(held, waker) => {
                    *slot = Slot::Done(held, status);
                    wake.extend(waker);
                }
                Slot::Abandoned { .. } | Slot::Free => wake.append(&mut disk.waiting),
                done @ Slot::Done(..) => *slot = done,
            }
        }
    }
    wake.into_iter().for_each(Waker::wake);
}

impl Disk {
    /// Queues a request if there is room; gives what it would hold back if there is none.
    fn push(&mut self, kind: u32, sector: u64, range: Option<u32>, held: Held) -> Result<usize, Held> {
        let count = match &held {
            Held::Nothing => usize::from(range.is_some()),
            Held::Write(pieces) => pieces.len(),
            Held::Read(buffers) => buffers.len(),
        };
        let free = self.slots.iter().position(|slot| matches!(slot, Slot::Free));
        let Some(number) = free.filter(|_| self.queue[0].room() >= count + 2) else { return Err(held) };
        // SAFETY: `number` < SLOTS, whose memory `start` took.
        let base = unsafe { self.memory.add(number * SLOT) };
        let mut header = [0; SLOT];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&(if range.is_some() { 0 } else { sector }).to_le_bytes());
        header[RANGE_AT..RANGE_AT + 8].copy_from_slice(&sector.to_le_bytes());
        header[RANGE_AT + 8..RANGE_AT + 12].copy_from_slice(&range.unwrap_or(0).to_le_bytes());
        header[STATUS_AT] = 0xff;
        // SAFETY: a free slot's memory is nobody's but the driver's.
        unsafe { base.copy_from_nonoverlapping(header.as_ptr(), SLOT) };
        let at = base as u64;
        let mut parts = Vec::with_capacity(count + 2);
        parts.push(Part { address: at, length: 16, writable: false });
        match &held {
            Held::Nothing if range.is_some() => {
                parts.push(Part { address: at + RANGE_AT as u64, length: 16, writable: false });
            }
            Held::Nothing => {}
            Held::Write(pieces) => parts.extend(pieces.iter().map(|piece| {
                let bytes = piece.bytes();
                Part { address: bytes.as_ptr() as u64, length: bytes.len() as u32, writable: false }
            })),
            Held::Read(buffers) => parts.extend(buffers.iter().map(|bytes| Part {
                address: bytes.as_ptr() as u64,
                length: bytes.len() as u32,
                writable: true,
            })),
        }
        parts.push(Part { address: at + STATUS_AT as u64, length: 1, writable: true });
        let Some(head) = self.queue[0].push(&parts) else { return Err(held) };
        self.heads.insert(head, number);
        self.slots[number] = Slot::Running(held, None);
        Ok(number)
    }
}

/// A request under way. Dropping it leaves the buffers to the device until it has done with them.
struct Flight(usize);

impl Flight {
    fn poll(&self, context: &Context<'_>) -> Poll<(Held, u8)> {
        let mut disk = DISK.get();
        let Some(slot) = disk.slots.get_mut(self.0) else { return Poll::Ready((Held::Nothing, 0xff)) };
        match core::mem::replace(slot, Slot::Free) {
            Slot::Done(held, status) => {
                let waiting = core::mem::take(&mut disk.waiting);
                waiting.into_iter().for_each(Waker::wake);
                Poll::Ready((held, status))
            }
            Slot::Running(held, _) => {
                *slot = Slot::Running(held, Some(context.waker().clone()));
                Poll::Pending
            }
            other => {
                *slot = other;
                Poll::Ready((Held::Nothing, 0xff))
            }
        }
    }
}

/// Waits for a slot, then for the answer.
async fn transfer(kind: u32, sector: u64, range: Option<u32>, held: Held) -> Result<Held, DiskError> {
    /// Lets go of a slot that nobody will look at again.
    struct Guard(Option<Flight>);
    impl Drop for Guard {
        fn drop(&mut self) {
            let Some(Flight(number)) = self.0 else { return };
            let mut disk = DISK.get();
            if let Some(slot) = disk.slots.get_mut(number) {
                *slot = match core::mem::replace(slot, Slot::Free) {
                    Slot::Running(held, _) => Slot::Abandoned { _held: held },
                    Slot::Done(..) | Slot::Free => Slot::Free,
                    abandoned @ Slot::Abandoned { .. } => abandoned,
                };
            }
            let waiting = core::mem::take(&mut disk.waiting);
            waiting.into_iter().for_each(Waker::wake);
        }
    }
    let mut held = Some(held);
    let flight = poll_fn(|context| {
        let mut disk = DISK.get();
        let Some(given) = held.take() else { return Poll::Pending };
        match disk.push(kind, sector, range, given) {
            Ok(number) => Poll::Ready(Flight(number)),
            Err(back) => {
                held = Some(back);
                disk.waiting.push(context.waker().clone());
                Poll::Pending
            }
        }
    })
    .await;
    let mut guard = Guard(Some(flight));
    let (held, status) = poll_fn(|context| match &guard.0 {
        Some(flight) => flight.poll(context),
        None => Poll::Ready((Held::Nothing, 0xff)),
    })
    .await;
    guard.0 = None;
    if status == 0 { Ok(held) } else { Err(DiskError) }
}

/// Reads blocks from `block` on into buffers, whose lengths together are whole blocks, [`MOST_BLOCKS`] at the most,
/// in [`MOST_PARTS`] at the most.
///
/// # Errors
/// [`DiskError`]: some block of them cannot be read.
pub async fn read(block: u64, into: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, DiskError> {
    match transfer(TYPE_IN, block * SECTORS, None, Held::Read(into)).await? {
        Held::Read(buffers) => Ok(buffers),
        Held::Nothing | Held::Write(_) => Err(DiskError),
    }
}

/// Writes blocks from `block` on; limits as for [`read`].
///
/// # Errors
/// [`DiskError`]: some of it may be written.
pub async fn write(block: u64, pieces: Vec<Piece>) -> Result<(), DiskError> {
    transfer(TYPE_OUT, block * SECTORS, None, Held::Write(pieces)).await.map(drop)
}

/// Has the device forget blocks, [`discard_blocks`] at the most: they read as zeros, or as they were.
///
/// # Errors
/// [`DiskError`].
pub async fn discard(block: u64, count: u64) -> Result<(), DiskError> {
    let sectors = u32::try_from(count * SECTORS).map_err(|_| DiskError)?;
    transfer(TYPE_DISCARD, block * SECTORS, Some(sectors), Held::Nothing).await.map(drop)
}

/// Returns once all that was answered before is safe on the host's disk, all of it at once: after a crash the disk
/// is as it was at the end of the last flush.
///
/// # Errors
/// [`DiskError`].
pub async fn flush() -> Result<(), DiskError> {
    transfer(TYPE_FLUSH, 0, None, Held::Nothing).await.map(drop)
}

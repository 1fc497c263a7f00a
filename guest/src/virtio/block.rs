//! The block device: 4 KiB blocks, one request at a time per caller.

use super::{
    Device, Queue,
    queue::{Part, forever},
};
use crate::local::Local;
use alloc::{collections::BTreeMap, vec::Vec};
use core::{
    future::poll_fn,
    task::{Poll, Waker},
};
use kage_abi::device;

/// Bytes in a block.
pub const BLOCK: usize = 4096;
const SECTORS: u64 = 8;
const SLOTS: usize = 8;

/// A transfer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskError;

struct Disk {
    queue: [Queue; 1],
    sectors: u64,
    /// Each slot: header (16), status (1), one block; laid out over two pages.
    slots: Vec<*mut u8>,
    free: Vec<usize>,
    running: BTreeMap<u16, (usize, Option<Waker>)>,
    done: BTreeMap<usize, u8>,
    waiting: Vec<Waker>,
}

static DISK: Local<Disk> = Local::new();

/// Starts the device.
pub fn start() {
    let mut queue = [Queue::new(32)];
    let (device, _) = Device::start(device::BLOCK, 2, 1 << 9, &mut queue);
    let sectors = u64::from(device.config(0)) | u64::from(device.config(4)) << 32;
    DISK.set(Disk {
        queue,
        sectors,
        slots: (0..SLOTS).map(|_| forever(2 * BLOCK)).collect(),
        free: (0..SLOTS).collect(),
        running: BTreeMap::new(),
        done: BTreeMap::new(),
        waiting: Vec::new(),
    });
}

/// Blocks of the disk.
pub fn blocks() -> u64 {
    DISK.get().sectors / SECTORS
}

/// Collects completions; called after each door.
pub fn poll() {
    let mut wake = Vec::new();
    {
        let mut disk = DISK.get();
        let disk = &mut *disk;
        while let Some((head, _)) = disk.queue[0].pop() {
            let Some((slot, waker)) = disk.running.remove(&head) else { continue };
            // SAFETY: the slot's status byte lies in its second page; the request is complete.
            let status = unsafe { disk.slots[slot].add(BLOCK + 16).read_volatile() };
            disk.done.insert(slot, status);
            wake.extend(waker);
        }
        if !disk.free.is_empty() {
            wake.append(&mut disk.waiting);
        }
    }
    wake.into_iter().for_each(Waker::wake);
}

async fn transfer(
    kind: u32,
    block: u64,
    write: Option<&[u8; BLOCK]>,
    mut read: Option<&mut [u8; BLOCK]>,
) -> Result<(), DiskError> {
    let slot = poll_fn(|context| {
        let mut disk = DISK.get();
        match disk.free.pop() {
            Some(slot) => Poll::Ready(slot),
            None => {
                disk.waiting.push(context.waker().clone());
                Poll::Pending
            }
        }
    })
    .await;
    let head = {
        let mut disk = DISK.get();
        let base = disk.slots[slot];
        let mut header = [0; 17];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&(block * SECTORS).to_le_bytes());
        header[16] = 0xff;
        // SAFETY: the slot is this caller's; it holds two pages.
        unsafe {
            base.add(BLOCK).copy_from_nonoverlapping(header.as_ptr(), 17);
            if let Some(bytes) = write {
                base.copy_from_nonoverlapping(bytes.as_ptr(), BLOCK);
            }
        }
        let at = base as u64;
        let header = Part { address: at + BLOCK as u64, length: 16, writable: false };
        let status = Part { address: at + BLOCK as u64 + 16, length: 1, writable: true };
        let data = Part { address: at, length: BLOCK as u32, writable: read.is_some() };
        let parts = [header, data, status];
        let head = if write.is_some() || read.is_some() {
            disk.queue[0].push(&parts)
        } else {
            disk.queue[0].push(&[header, status])
        };
        match head {
            Some(head) => {
                disk.running.insert(head, (slot, None));
                head
            }
            None => {
                disk.free.push(slot);
                return Err(DiskError);
            }
        }
    };
    let status = poll_fn(|context| {
        let mut disk = DISK.get();
        if let Some(status) = disk.done.remove(&slot) {
            return Poll::Ready(status);
        }
        if let Some((_, waker)) = disk.running.get_mut(&head) {
            *waker = Some(context.waker().clone());
        }
        Poll::Pending
    })
    .await;
    let mut disk = DISK.get();
    if let Some(bytes) = read.as_mut() {
        // SAFETY: the slot holds a page of data and the request is complete.
        unsafe { disk.slots[slot].copy_to_nonoverlapping(bytes.as_mut_ptr(), BLOCK) };
    }
    disk.free.push(slot);
    if status == 0 { Ok(()) } else { Err(DiskError) }
}

/// Reads a block.
///
/// # Errors
/// [`DiskError`].
pub async fn read(block: u64, into: &mut [u8; BLOCK]) -> Result<(), DiskError> {
    transfer(0, block, None, Some(into)).await
}

/// Writes a block.
///
/// # Errors
/// [`DiskError`].
pub async fn write(block: u64, bytes: &[u8; BLOCK]) -> Result<(), DiskError> {
    transfer(1, block, Some(bytes), None).await
}

/// Returns once everything written is safe on the host's disk.
///
/// # Errors
/// [`DiskError`].
pub async fn flush() -> Result<(), DiskError> {
    transfer(4, 0, None, None).await
}

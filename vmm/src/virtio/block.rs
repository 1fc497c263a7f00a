//! The block device (virtio 1.2 §5.2): requests go to the disk's worker, their completions are delivered at the door.
//!
//! Requests are whole blocks of 4 KiB and may be answered in any order. A save puts the unfinished ones back: into the
//! ring before the position from which they are taken again, which the driver has no more use for. They are
//! idempotent and are issued again at the target.

use std::{
    collections::{BTreeMap, VecDeque},
    os::fd::{BorrowedFd, OwnedFd},
};

use kage_machine::{PAGE_SIZE, state::VirtioState};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::mmio::{Misfit, Transport};
use crate::{
    dirty::GuestMemory,
    disk::{Attach, Disk, Done, News, Standing, queue::Job},
};

/// Device id.
pub const ID: u32 = 2;
/// Flush requests are understood, …
pub const FLUSH: u64 = 1 << 9;
/// … and discards.
pub const DISCARD: u64 = 1 << 13;
/// The configuration says how large a part may be, …
const SIZE_MAX: u64 = 1 << 1;
/// … how many there may be, …
const SEG_MAX: u64 = 1 << 2;
/// … and how large a block is.
const BLK_SIZE: u64 = 1 << 6;

const SECTOR: u64 = 512;
const SECTORS: u64 = PAGE_SIZE as u64 / SECTOR;
/// Largest transfer of one request.
const TRANSFER_MAX: usize = 1 << 20;
/// Most parts of one request, header and status not counted.
const PARTS_MAX: u32 = 254;
/// Requests the worker holds at a time.
const DEPTH: usize = 64;
/// Bytes of a range to discard (virtio 1.2 §5.2.6).
const RANGE: usize = 16;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;

const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// In the saved interrupt status, whose own bits are the lowest two: the guest has written since its last flush.
const UNSETTLED: u32 = 1 << 31;

/// A request that is not completed.
struct Pending {
    head: u16,
    buffers: Vec<(GuestAddress, u32)>,
    status_at: Option<GuestAddress>,
    /// Blocks that it changes.
    changes: std::ops::Range<u32>,
    /// It is a write, part of what the guest's next flush makes durable.
    writes: bool,
}

/// What is to be done with a request.
enum Parsed {
    /// The worker's.
    Work(Job),
    /// Answered at once.
    Answer(Vec<u8>, u8),
}

/// The block device.
pub struct Block {
    /// Its registers.
    pub transport: Transport,
    bytes: u64,
    disk: Disk,
    /// By the order in which they were taken.
    pending: BTreeMap<u64, Pending>,
    taken: u64,
    /// The guest is to sync, for these requests of a daemon's.
    syncs: Option<Vec<u64>>,
}

impl Block {
    /// A device of `bytes` bytes and its worker; until a disk is attached and open, requests wait in the ring.
    ///
    /// # Errors
    /// When no event descriptor or thread can be made.
    pub fn new(bytes: u64) -> std::io::Result<Self> {
        let blocks = u32::try_from(bytes / PAGE_SIZE as u64).map_err(std::io::Error::other)?;
        let features = FLUSH | DISCARD | SIZE_MAX | SEG_MAX | BLK_SIZE;
        let transport = Transport::new(ID, features, configuration(bytes), 1);
        let disk = Disk::new(blocks)?;
        Ok(Self { transport, bytes, disk, pending: BTreeMap::new(), taken: 0, syncs: None })
    }

    /// Opens a disk's log, or makes it.
    ///
    /// # Errors
    /// When there is one.
    pub fn attach(&mut self, attach: Attach) -> Result<(), &'static str> {
        self.disk.attach(attach)
    }

    /// Speaks of the disk to another daemon from here on.
    pub fn attach_line(&self, line: OwnedFd) {
        self.disk.attach_line(line);
    }

    /// Readable when there is something to serve.
    #[must_use]
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.disk.wake()
    }

    /// Requests taken and not completed.
    #[must_use]
    pub fn unfinished(&self) -> u16 {
        self.pending.len() as u16
    }

    /// The machine runs.
    pub fn go(&self) {
        self.disk.go(!self.pending.is_empty());
    }

    /// Its output may leave: so may what its disk is to keep.
    pub fn settle(&self) {
        self.disk.settle();
    }

    /// The machine stands: nothing of the disk changes any more by what it asked for. What is finished is delivered.
    /// Whether it has written since its last flush.
    pub fn halt(&mut self, memory: &GuestMemory, wrote: impl FnMut(u32)) -> bool {
        let unsettled = self.disk.halt();
        self.deliver(memory, wrote);
        unsettled || self.pending.values().any(|pending| pending.writes)
    }

    /// The device's state at a halt; the requests that are unfinished are put back.
    pub fn save(&self, memory: &GuestMemory, unsettled: bool) -> VirtioState {
        let count = self.unfinished();
        if let Some(queue) = self.transport.queues.first() {
            let first = queue.next_avail().wrapping_sub(count);
            for (place, pending) in (0..count).zip(self.pending.values()) {
                let slot = first.wrapping_add(place) % queue.size().max(1);
                let at = queue.avail_ring() + 4 + 2 * u64::from(slot);
                // A ring outside memory is the guest's own loss.
                let _ = memory.write_slice(&pending.head.to_le_bytes(), GuestAddress(at));
            }
        }
        let mut state = self.transport.save(count);
        state.interrupt_status |= if unsettled { UNSETTLED } else { 0 };
        state
    }

    /// Takes a saved state.
    ///
    /// # Errors
    /// As [`Transport::restore`].
    pub fn restore(&mut self, state: &VirtioState, memory: &GuestMemory) -> Result<(), Misfit> {
        let own = VirtioState { interrupt_status: state.interrupt_status & !UNSETTLED, ..state.clone() };
        self.transport.restore(&own, memory)?;
        self.disk.set_unsettled(state.interrupt_status & UNSETTLED != 0);
        Ok(())
    }

    /// Takes new requests, delivers completions; `wrote(block)` hears of each block that changed.
    /// Returns whether anything was delivered.
    pub fn serve(&mut self, memory: &GuestMemory, wrote: impl FnMut(u32)) -> bool {
        if !self.transport.is_live() {
            self.discard_news(wrote);
            return false;
        }
        let answered = self.take_requests(memory);
        self.deliver(memory, wrote) || answered
    }

    /// Whether the guest is to be told to sync, and for which requests of a daemon's.
    pub fn take_syncs(&mut self) -> Option<Vec<u64>> {
        self.syncs.take()
    }

    /// Says what became of them.
    pub fn synced(&self, requests: Vec<u64>, result: &Result<(), String>) {
        self.disk.synced(requests, result);
    }

    /// Takes note of what came for a driver that is gone.
    fn discard_news(&mut self, mut wrote: impl FnMut(u32)) {
        let News { done, changed, syncs } = self.disk.news();
        changed.into_iter().for_each(&mut wrote);
        for Done { number, .. } in done {
            self.pending.remove(&number).into_iter().flat_map(|pending| pending.changes).for_each(&mut wrote);
        }
        if let Some(syncs) = syncs {
            self.syncs.get_or_insert_default().extend(syncs);
        }
    }

    fn deliver(&mut self, memory: &GuestMemory, mut wrote: impl FnMut(u32)) -> bool {
        let News { done, changed, syncs } = self.disk.news();
        changed.into_iter().for_each(&mut wrote);
        if let Some(syncs) = syncs {
            self.syncs.get_or_insert_default().extend(syncs);
        }
        let mut delivered = false;
        for Done { number, bytes, ok } in done {
            if let Some(pending) = self.pending.remove(&number) {
                // One that failed may have changed some all the same.
                pending.changes.clone().for_each(&mut wrote);
                let status = if ok { STATUS_OK } else { STATUS_IO_ERROR };
                self.complete(memory, &pending, &bytes, status);
                delivered = true;
            }
        }
        delivered
    }

    /// Hands new requests to the worker; their completions wait for the next serve. Whether some were answered at
    /// once.
    pub(super) fn take_requests(&mut self, memory: &GuestMemory) -> bool {
        let standing = self.disk.standing();
        if standing == Standing::Waiting {
            return false;
        }
        let mut jobs = VecDeque::new();
        let mut answered = false;
        while self.pending.len() < DEPTH {
            let Some(queue) = self.transport.queues.first_mut() else { break };
            let Some(chain) = queue.pop_descriptor_chain(memory) else { break };
            let head = chain.head_index();
            let descriptors: Vec<_> = chain.map(|d| (d.addr(), d.len(), d.is_write_only())).collect();
            let (pending, parsed) = self.parse(memory, head, &descriptors);
            match parsed {
                Parsed::Work(_) if standing == Standing::Failed => {
                    self.complete(memory, &pending, &[], STATUS_IO_ERROR);
                    answered = true;
                }
                Parsed::Work(job) => {
                    self.taken += 1;
                    jobs.push_back((self.taken, job));
                    self.pending.insert(self.taken, pending);
                }
                Parsed::Answer(bytes, status) => {
                    self.complete(memory, &pending, &bytes, status);
                    answered = true;
                }
            }
            if !self.transport.is_live() {
                break;
            }
        }
        self.disk.ask(jobs.into());
        answered
    }

    /// Header, data, status byte (virtio 1.2 §5.2.6); everything else is answered with an error.
    fn parse(
        &self,
        memory: &GuestMemory,
        head: u16,
        descriptors: &[(GuestAddress, u32, bool)],
    ) -> (Pending, Parsed) {
        let pending = |status_at, buffers| Pending { head, buffers, status_at, changes: 0..0, writes: false };
        let refuse = |status_at, status| (pending(status_at, Vec::new()), Parsed::Answer(Vec::new(), status));
        let status_at = match descriptors.last() {
            Some(&(at, 1.., true)) => Some(at),
            _ => return refuse(None, STATUS_IO_ERROR),
        };
        let mut header = [0; 16];
        let readable = matches!(descriptors.first(), Some(&(at, 16.., false)) if memory.read_slice(&mut header, at).is_ok());
        if !readable {
            return refuse(status_at, STATUS_IO_ERROR);
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let data = descriptors.get(1..descriptors.len() - 1).unwrap_or_default();
        let length: u64 = data.iter().map(|&(_, length, _)| u64::from(length)).sum();
        let inward = data.iter().all(|&(_, _, writable)| !writable);
        let outward = data.iter().all(|&(_, _, writable)| writable);
        let buffers = || data.iter().map(|&(at, length, _)| (at, length)).collect();
        let fits = length <= TRANSFER_MAX as u64;
        let sector = u64::from_le_bytes(sector);
        let blocks = self.blocks(sector, length / SECTOR).filter(|_| fits && length.is_multiple_of(SECTOR));
        match (kind, blocks) {
            (TYPE_IN, Some(blocks)) if outward => {
                (pending(status_at, buffers()), Parsed::Work(Job::Read(blocks)))
            }
            (TYPE_OUT, Some(blocks)) if inward => match gather(memory, data, length as usize) {
                Some(bytes) => {
                    let job = Job::Write { first: blocks.start, bytes };
                    (
                        Pending { changes: blocks, writes: true, ..pending(status_at, Vec::new()) },
                        Parsed::Work(job),
                    )
                }
                None => refuse(status_at, STATUS_IO_ERROR),
            },
            (TYPE_DISCARD, _) if inward && length == RANGE as u64 => {
                match gather(memory, data, RANGE).and_then(|range| self.range(&range)) {
                    Some(blocks) => {
                        let changes = blocks.clone();
                        (
                            Pending { changes, writes: true, ..pending(status_at, Vec::new()) },
                            Parsed::Work(Job::Discard(blocks)),
                        )
                    }
                    None => refuse(status_at, STATUS_IO_ERROR),
                }
            }
            (TYPE_IN | TYPE_OUT | TYPE_DISCARD, _) => refuse(status_at, STATUS_IO_ERROR),
            (TYPE_FLUSH, _) => (pending(status_at, Vec::new()), Parsed::Work(Job::Flush)),
            (TYPE_GET_ID, _) if length >= 20 && fits && outward => {
                let bytes = b"kage\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
                (pending(status_at, buffers()), Parsed::Answer(bytes, STATUS_OK))
            }
            _ => refuse(status_at, STATUS_UNSUPPORTED),
        }
    }

    /// The blocks of so many sectors; none unless they are whole and of this disk.
    fn blocks(&self, sector: u64, count: u64) -> Option<std::ops::Range<u32>> {
        let end = sector.checked_add(count).filter(|end| *end <= self.bytes / SECTOR)?;
        let whole = sector.is_multiple_of(SECTORS) && count.is_multiple_of(SECTORS);
        let block = |sector: u64| u32::try_from(sector / SECTORS).ok();
        whole.then_some(block(sector)?..block(end)?)
    }

    /// The blocks of a range to discard.
    fn range(&self, range: &[u8]) -> Option<std::ops::Range<u32>> {
        let (sector, rest) = range.split_first_chunk()?;
        let (count, _) = rest.split_first_chunk()?;
        self.blocks(u64::from_le_bytes(*sector), u64::from(u32::from_le_bytes(*count)))
    }

    fn complete(&mut self, memory: &GuestMemory, pending: &Pending, bytes: &[u8], mut status: u8) {
        let mut rest = bytes;
        for &(address, length) in &pending.buffers {
            let (part, behind) = rest.split_at(rest.len().min(length as usize));
            if memory.write_slice(part, address).is_err() {
                status = STATUS_IO_ERROR;
            }
            rest = behind;
        }
        if let Some(at) = pending.status_at {
            let _ = memory.write_slice(&[status], at);
        }
        let length = (bytes.len() - rest.len()) as u32 + 1;
        let Some(queue) = self.transport.queues.first_mut() else { return };
        if queue.add_used(memory, pending.head, length).is_err() {
            self.transport.fail();
        }
    }
}

/// Copies what is to be written out of the guest's memory.
fn gather(memory: &GuestMemory, parts: &[(GuestAddress, u32, bool)], length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut rest = bytes.as_mut_slice();
    for &(address, length, _) in parts {
        let (part, behind) = rest.split_at_mut_checked(length as usize)?;
        memory.read_slice(part, address).ok()?;
        rest = behind;
    }
    rest.is_empty().then_some(bytes)
}

/// The configuration space (virtio 1.2 §5.2.4).
fn configuration(bytes: u64) -> Vec<u8> {
    let sectors = bytes / SECTOR;
    let most = u32::try_from(sectors).unwrap_or(u32::MAX) / SECTORS as u32 * SECTORS as u32;
    let mut space = sectors.to_le_bytes().to_vec();
    let mut put = |words: &[u32]| words.iter().for_each(|word| space.extend(word.to_le_bytes()));
    // size_max, seg_max, geometry, blk_size; topology, writeback and number of queues, which are not offered.
    put(&[TRANSFER_MAX as u32, PARTS_MAX, 0, PAGE_SIZE as u32, 0, 0, 0]);
    // Of a discard: most sectors, most ranges, alignment.
    put(&[most, 1, SECTORS as u32]);
    space
}

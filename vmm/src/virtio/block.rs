//! The block device (virtio 1.2 §5.2): requests go to one I/O worker in order, their completions are
//! delivered at the door.
//!
//! A worker that takes requests in order lets a save put the unfinished ones back by moving the ring's
//! position; they are idempotent and are issued again at the target.

use std::{
    collections::VecDeque,
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    thread,
};

use kage_machine::PAGE_SIZE;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::mmio::Transport;
use crate::{dirty::GuestMemory, sys::watchdog};

/// Device id.
pub const ID: u32 = 2;
/// Flush requests are understood.
pub const FLUSH: u64 = 1 << 9;

const SECTOR: u64 = 512;
/// Largest transfer of one request.
const TRANSFER_MAX: usize = 1 << 20;
/// Requests the worker holds at a time.
const DEPTH: usize = 64;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;

const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

enum Work {
    /// Uses another file from here on.
    Attach(File),
    Read {
        at: u64,
        length: usize,
    },
    Write {
        at: u64,
        bytes: Vec<u8>,
    },
    Flush,
    /// Answered without I/O, but in order with the others.
    Answer {
        bytes: Vec<u8>,
        status: u8,
    },
}

struct Finished {
    bytes: Vec<u8>,
    status: u8,
    /// Disk blocks written.
    written: Option<(u64, usize)>,
}

/// Where the answer of a request goes.
struct Pending {
    head: u16,
    buffers: Vec<(GuestAddress, u32)>,
    status_at: Option<GuestAddress>,
}

/// The block device.
pub struct Block {
    /// Its registers.
    pub transport: Transport,
    bytes: u64,
    work: SyncSender<Work>,
    finished: Receiver<Finished>,
    wake: OwnedFd,
    pending: VecDeque<Pending>,
}

impl Block {
    /// A device of `bytes` bytes and its worker; until a file is attached every transfer fails.
    ///
    /// # Errors
    /// When no event descriptor or thread can be made.
    pub fn new(bytes: u64) -> std::io::Result<Self> {
        let wake = rustix::event::eventfd(
            0,
            rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC,
        )?;
        let worker_wake = wake.try_clone()?;
        let (work, jobs) = sync_channel(DEPTH);
        let (done, finished) = sync_channel(DEPTH);
        let (begun, has_begun) = sync_channel(1);
        thread::Builder::new().name("disk".into()).stack_size(64 << 10).spawn(move || {
            watchdog::block_in_this_thread();
            let _ = begun.send(());
            let mut file = None;
            for job in jobs {
                if let Work::Attach(other) = job {
                    file = Some(other);
                    continue;
                }
                if done.send(perform(file.as_ref(), job)).is_err() {
                    return;
                }
                let _ = rustix::io::write(&worker_wake, &1u64.to_ne_bytes());
            }
        })?;
        // The worker is past what a thread does at its start, so that the filter need not allow it.
        has_begun.recv().map_err(std::io::Error::other)?;
        let capacity = (bytes / SECTOR).to_le_bytes().to_vec();
        let transport = Transport::new(ID, FLUSH, capacity, 1);
        Ok(Self { transport, bytes, work, finished, wake, pending: VecDeque::new() })
    }

    /// Uses a file from the next request on.
    ///
    /// # Errors
    /// When the worker is gone or too busy.
    pub fn attach(&self, file: File) -> std::io::Result<()> {
        self.work.try_send(Work::Attach(file)).map_err(|_| std::io::Error::other("the disk's worker is busy"))
    }

    /// Readable when a completion waits.
    #[must_use]
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Requests taken and not completed.
    #[must_use]
    pub fn unfinished(&self) -> u16 {
        self.pending.len() as u16
    }

    /// Takes new requests, delivers completions; `wrote(block)` hears of each 4 KiB block written.
    /// Returns whether anything was delivered.
    pub fn serve(&mut self, memory: &GuestMemory, mut wrote: impl FnMut(u32)) -> bool {
        if !self.transport.is_live() {
            return false;
        }
        self.take_requests(memory);
        let mut delivered = false;
        while let Ok(done) = self.finished.try_recv() {
            let mut count = [0; 8];
            let _ = rustix::io::read(&self.wake, &mut count);
            if let Some((at, length)) = done.written {
                let first = at / PAGE_SIZE as u64;
                let last = (at + length.max(1) as u64 - 1) / PAGE_SIZE as u64;
                (first..=last).for_each(|block| wrote(block as u32));
            }
            if let Some(pending) = self.pending.pop_front() {
                self.complete(memory, &pending, &done);
                delivered = true;
            }
        }
        delivered
    }

    /// Hands new requests to the worker; their completions wait for the next serve.
    pub(super) fn take_requests(&mut self, memory: &GuestMemory) {
        while self.pending.len() < DEPTH {
            let Some(chain) = self.transport.queues[0].pop_descriptor_chain(memory) else { return };
            let head = chain.head_index();
            let descriptors: Vec<_> = chain.map(|d| (d.addr(), d.len(), d.is_write_only())).collect();
            let (pending, work) = self.parse(memory, head, &descriptors);
            match self.work.try_send(work) {
                Ok(()) => self.pending.push_back(pending),
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                    let at = self.transport.queues[0].next_avail().wrapping_sub(1);
                    self.transport.queues[0].set_next_avail(at);
                    return;
                }
            }
        }
    }

    /// Header, data, status byte (virtio 1.2 §5.2.6); everything else is answered with an error.
    fn parse(
        &self,
        memory: &GuestMemory,
        head: u16,
        descriptors: &[(GuestAddress, u32, bool)],
    ) -> (Pending, Work) {
        let refuse = |status_at, status| {
            (Pending { head, buffers: Vec::new(), status_at }, Work::Answer { bytes: Vec::new(), status })
        };
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
        let at = u64::from_le_bytes(sector).saturating_mul(SECTOR);
        let data = descriptors.get(1..descriptors.len() - 1).unwrap_or_default();
        let length: usize = data.iter().map(|&(_, length, _)| length as usize).sum();
        let inside = length <= TRANSFER_MAX
            && (length as u64).is_multiple_of(SECTOR)
            && at.checked_add(length as u64).is_some_and(|end| end <= self.bytes);
        let buffers = || data.iter().map(|&(at, length, _)| (at, length)).collect();
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            TYPE_IN if inside && data.iter().all(|&(_, _, writable)| writable) => {
                (Pending { head, buffers: buffers(), status_at }, Work::Read { at, length })
            }
            TYPE_OUT if inside && data.iter().all(|&(_, _, writable)| !writable) => {
                let mut bytes = vec![0; length];
                let mut from = 0;
                for &(address, length, _) in data {
                    if memory.read_slice(&mut bytes[from..from + length as usize], address).is_err() {
                        return refuse(status_at, STATUS_IO_ERROR);
                    }
                    from += length as usize;
                }
                (Pending { head, buffers: Vec::new(), status_at }, Work::Write { at, bytes })
            }
            TYPE_IN | TYPE_OUT => refuse(status_at, STATUS_IO_ERROR),
            TYPE_FLUSH => (Pending { head, buffers: Vec::new(), status_at }, Work::Flush),
            TYPE_GET_ID if length >= 20 => {
                let bytes = b"kage\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
                (Pending { head, buffers: buffers(), status_at }, Work::Answer { bytes, status: STATUS_OK })
            }
            _ => refuse(status_at, STATUS_UNSUPPORTED),
        }
    }

    fn complete(&mut self, memory: &GuestMemory, pending: &Pending, done: &Finished) {
        let mut from = 0;
        let mut status = done.status;
        for &(address, length) in &pending.buffers {
            let take = (done.bytes.len() - from).min(length as usize);
            if memory.write_slice(&done.bytes[from..from + take], address).is_err() {
                status = STATUS_IO_ERROR;
            }
            from += take;
        }
        if let Some(at) = pending.status_at {
            let _ = memory.write_slice(&[status], at);
        }
        if self.transport.queues[0].add_used(memory, pending.head, from as u32 + 1).is_err() {
            self.transport.fail();
        }
    }
}

fn perform(file: Option<&File>, work: Work) -> Finished {
    let finish = |result: std::io::Result<()>, bytes, written| Finished {
        bytes,
        status: if result.is_ok() { STATUS_OK } else { STATUS_IO_ERROR },
        written,
    };
    match (work, file) {
        (Work::Read { at, length }, Some(file)) => {
            let mut bytes = vec![0; length];
            let result = file.read_exact_at(&mut bytes, at);
            finish(result, bytes, None)
        }
        (Work::Write { at, bytes }, Some(file)) => {
            let length = bytes.len();
            finish(file.write_all_at(&bytes, at), Vec::new(), Some((at, length)))
        }
        (Work::Flush, Some(file)) => finish(file.sync_data(), Vec::new(), None),
        (Work::Answer { bytes, status }, _) => Finished { bytes, status, written: None },
        (Work::Read { .. } | Work::Write { .. } | Work::Flush | Work::Attach(_), _) => {
            Finished { bytes: Vec::new(), status: STATUS_IO_ERROR, written: None }
        }
    }
}

//! The network device (virtio 1.2 §5.1) over a tap, and the gate behind which its output waits.
//!
//! While the gate is shut nothing is taken from the transmit ring: the ring itself is where output
//! waits, so waiting output is bounded, is part of memory, and moves with it. What was queued at a checkpoint may leave
//! through a gate that stays shut.

use std::{io, os::fd::OwnedFd, sync::atomic::Ordering};

use kage_machine::{OutputMark, control::NetCounters};
use virtio_queue::QueueT;
use vm_memory::Bytes;

use super::mmio::Transport;
use crate::dirty::GuestMemory;

/// Device id.
pub const ID: u32 = 1;
/// Checksums of sent frames may be left to the device.
pub const CSUM: u64 = 1;
/// Received frames may come with checksums left to the driver.
pub const GUEST_CSUM: u64 = 1 << 1;
/// The device knows the MTU.
pub const MTU: u64 = 1 << 3;
/// The device knows the address.
pub const MAC: u64 = 1 << 5;
/// Received TCP over IPv6 may come in large frames.
pub const GUEST_TSO6: u64 = 1 << 8;
/// Sent TCP over IPv6 may leave in large frames.
pub const HOST_TSO6: u64 = 1 << 12;
/// A received frame may span several buffers.
pub const MRG_RXBUF: u64 = 1 << 15;

/// `struct virtio_net_hdr` with `num_buffers`, which is also what the tap is told to use.
pub const HEADER: usize = 12;
/// Largest frame with its header.
const FRAME_MAX: usize = HEADER + 65_536 + 64;
/// Frames taken from the tap at one door, so that a flood cannot keep the guest from running.
const RECEIVE_BATCH: usize = 64;
/// Frames sent at one door.
const SEND_BATCH: u16 = 256;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// How many frames from `next` on lie before a mark in a ring of `size`. Both wrap around; a mark that lies behind, or
/// further ahead than the ring is long, has none.
const fn waiting(next: u16, mark: OutputMark, size: u16) -> u16 {
    let ahead = mark.0.wrapping_sub(next);
    if ahead <= size { ahead } else { 0 }
}

/// The network device.
pub struct Net {
    /// Its registers.
    pub transport: Transport,
    tap: Option<OwnedFd>,
    /// What it did.
    pub counters: NetCounters,
    /// The frame that leaves.
    out: Vec<u8>,
    /// The frame that arrives.
    buffer: Vec<u8>,
    /// Length of one that found no room in the guest.
    held: Option<usize>,
}

impl Net {
    /// A device without a tap.
    #[must_use]
    pub fn new() -> Self {
        let features = CSUM | GUEST_CSUM | MTU | MAC | GUEST_TSO6 | HOST_TSO6 | MRG_RXBUF;
        let mut config = kage_abi::GUEST_MAC.to_vec();
        config.extend([1, 0, 1, 0]); // link up, one queue pair
        config.extend(65_535u16.to_le_bytes()); // the image's MTU is in its own config page
        Self {
            transport: Transport::new(ID, features, config, 2),
            tap: None,
            counters: NetCounters::default(),
            out: vec![0; FRAME_MAX],
            buffer: vec![0; FRAME_MAX],
            held: None,
        }
    }

    /// Uses another tap, or none.
    pub fn attach(&mut self, tap: Option<OwnedFd>) {
        self.tap = tap;
    }

    /// The tap to wait on, when a frame from it could be delivered.
    #[must_use]
    pub fn tap(&self) -> Option<&OwnedFd> {
        if self.transport.is_live() { self.tap.as_ref() } else { None }
    }

    /// The tap it has, used or not.
    #[must_use]
    pub fn attached(&self) -> Option<&OwnedFd> {
        self.tap.as_ref()
    }

    /// Sends what the guest queued. A tap that is full drops and counts, as a NIC would.
    pub fn send(&mut self, memory: &GuestMemory) {
        self.send_most(memory, SEND_BATCH);
    }

    /// Sends what the guest had queued at a mark; nothing when that has left. Says how many frames.
    pub fn send_up_to(&mut self, memory: &GuestMemory, mark: OutputMark) -> u16 {
        let queue = &self.transport.queues[TRANSMIT];
        let frames = waiting(queue.next_avail(), mark, queue.size());
        self.send_most(memory, frames);
        frames
    }

    fn send_most(&mut self, memory: &GuestMemory, most: u16) {
        if !self.transport.is_live() {
            return;
        }
        for _ in 0..most {
            let Some(chain) = self.transport.queues[TRANSMIT].pop_descriptor_chain(memory) else { return };
            let head = chain.head_index();
            let mut length = 0;
            let mut fits = true;
            for descriptor in chain.readable() {
                let end = length + descriptor.len() as usize;
                fits = end <= FRAME_MAX
                    && memory.read_slice(&mut self.out[length..end], descriptor.addr()).is_ok();
                if !fits {
                    break;
                }
                length = end;
            }
            if fits && length > HEADER {
                self.emit(length);
            } else {
                self.counters.dropped_frames += 1;
            }
            if self.transport.queues[TRANSMIT].add_used(memory, head, 0).is_err() {
                self.transport.fail();
                return;
            }
        }
    }

    /// Up to where the guest has queued frames.
    #[must_use]
    pub fn queued(&self, memory: &GuestMemory) -> OutputMark {
        let queue = &self.transport.queues[TRANSMIT];
        let queued = queue.avail_idx(memory, Ordering::Acquire).map_or(queue.next_avail(), |index| index.0);
        OutputMark(queued)
    }

    fn emit(&mut self, length: usize) {
        let sent = self.tap.as_ref().is_some_and(|tap| rustix::io::write(tap, &self.out[..length]).is_ok());
        if sent {
            self.counters.sent_frames += 1;
            self.counters.sent_bytes += (length - HEADER) as u64;
        } else {
            self.counters.dropped_frames += 1;
        }
    }

    /// Delivers frames waiting in the tap; returns how many.
    pub fn receive(&mut self, memory: &GuestMemory) -> usize {
        if !self.transport.is_live() {
            return 0;
        }
        for delivered in 0..RECEIVE_BATCH {
            let length = match self.held.take() {
                Some(length) => length,
                None => match self.read_tap() {
                    Ok(length) => length,
                    Err(error) => {
                        // Its interface was removed: it is ready for ever, and nothing ever comes.
                        if error.raw_os_error() == Some(libc::EBADFD) {
                            self.tap = None;
                        }
                        return delivered;
                    }
                },
            };
            if !self.deliver(memory, length) {
                self.held = Some(length);
                return delivered;
            }
            self.counters.received_frames += 1;
            self.counters.received_bytes += (length - HEADER) as u64;
        }
        RECEIVE_BATCH
    }

    fn read_tap(&mut self) -> io::Result<usize> {
        let tap = self.tap.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let length = rustix::io::read(tap, &mut self.buffer[..])?;
        if length <= HEADER { Err(io::ErrorKind::InvalidData.into()) } else { Ok(length) }
    }

    /// Copies the frame in `buffer` into as many buffers of the guest as it needs. Returns false, and
    /// takes none, when the guest has too few.
    fn deliver(&mut self, memory: &GuestMemory, length: usize) -> bool {
        let queue = &mut self.transport.queues[RECEIVE];
        let start = queue.next_avail();
        let mut used = Vec::new();
        let mut first = None;
        let mut at = 0;
        while at < length {
            let Some(chain) = queue.pop_descriptor_chain(memory) else {
                queue.set_next_avail(start);
                return false;
            };
            let head = chain.head_index();
            let before = at;
            for descriptor in chain.writable() {
                let take = (length - at).min(descriptor.len() as usize);
                if memory.write_slice(&self.buffer[at..at + take], descriptor.addr()).is_err() {
                    break;
                }
                first.get_or_insert(descriptor.addr());
                at += take;
            }
            used.push((head, (at - before) as u32));
            if at == before || used.len() > usize::from(u8::MAX) {
                break; // a chain that takes nothing: give it back and drop the frame
            }
        }
        if let Some(first) = first {
            let buffers = used.len() as u16;
            // num_buffers is the header's last field (virtio 1.2 §5.1.6).
            if let Some(field) = first.0.checked_add(10) {
                let _ = memory.write_slice(&buffers.to_le_bytes(), vm_memory::GuestAddress(field));
            }
        }
        for (head, bytes) in used {
            if queue.add_used(memory, head, bytes).is_err() {
                self.transport.fail();
                break;
            }
        }
        true
    }

    /// Gives a frame that found no room back to the tap, addressed to the gateway, so that the kernel
    /// forwards it to wherever the machine is next.
    pub fn give_back_held(&mut self) {
        let Some(length) = self.held.take() else { return };
        if length >= HEADER + 12 {
            std::mem::swap(&mut self.buffer, &mut self.out);
            self.out[HEADER..HEADER + 6].copy_from_slice(&kage_abi::GATEWAY_MAC);
            self.out[HEADER + 6..HEADER + 12].copy_from_slice(&kage_abi::GUEST_MAC);
            self.out[10..12].fill(0);
            self.emit(length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_before_a_mark_are_counted_around_the_end_of_the_numbers() {
        for (next, mark, size, frames) in [
            (0, 0, 256, 0),
            (5, 9, 256, 4),
            (9, 5, 256, 0),
            (65_534, 3, 256, 5),
            (3, 65_534, 256, 0),
            (65_535, 0, 1, 1),
            (100, 356, 256, 256),
            (100, 357, 256, 0),
            (65_300, 20, 256, 256),
            (0, 5, 0, 0),
        ] {
            assert_eq!(waiting(next, OutputMark(mark), size), frames, "{next} {mark} {size}");
        }
    }
}

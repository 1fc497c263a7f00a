//! One contract for every device: serve a driver, save, restore, compare; and drivers that break the rules.

use std::{fs::File, num::NonZeroUsize, os::fd::OwnedFd};

use kage_machine::state::VirtioState;
use proptest::prelude::*;
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    pipe::{PipeFlags, pipe_with},
};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, bitmap::AtomicBitmap, mmap::MmapRegionBuilder};

use super::{block::Block, entropy::Entropy, mmio::Transport, net::Net};
use crate::dirty::GuestMemory;

const MEMORY: u64 = kage_abi::MEMORY;
const SIZE: u64 = 1 << 20;
const DESC: u64 = MEMORY;
const AVAIL: u64 = MEMORY + 0x1000;
const USED: u64 = MEMORY + 0x2000;
const DATA: u64 = MEMORY + 0x4000;
const QUEUE: u16 = 8;

fn memory() -> GuestMemory {
    let page = NonZeroUsize::new(4096).unwrap();
    let region = MmapRegionBuilder::new_with_bitmap(SIZE as usize, AtomicBitmap::new(SIZE as usize, page))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
        .build()
        .unwrap();
    GuestMemory::from_regions(vec![GuestRegionMmap::new(region, GuestAddress(MEMORY)).unwrap()]).unwrap()
}

fn register(device: &mut Transport, memory: &GuestMemory, offset: u64, value: u32) {
    device.write(offset, &value.to_le_bytes(), memory);
}

/// Brings a device up as a driver does; queue `index` gets its own pages.
fn start(device: &mut Transport, memory: &GuestMemory, queues: u32, features: u64) {
    for (half, word) in [(0, features as u32), (1, (features >> 32) as u32 | 1)] {
        register(device, memory, 0x24, half);
        register(device, memory, 0x20, word);
    }
    register(device, memory, 0x70, 1 | 2 | 8);
    for index in 0..queues {
        let shift = u64::from(index) * 0x1_0000;
        register(device, memory, 0x30, index);
        register(device, memory, 0x38, u32::from(QUEUE));
        for (at, address) in [(0x80, DESC), (0x90, AVAIL), (0xa0, USED)] {
            register(device, memory, at, (address + shift) as u32);
            register(device, memory, at + 4, 0);
        }
        register(device, memory, 0x44, 1);
    }
    register(device, memory, 0x70, 1 | 2 | 4 | 8);
    assert!(device.is_live());
}

/// Queues one chain of (address, length, writable) parts, as the `count`-th request.
fn push(memory: &GuestMemory, queue: u64, count: u16, parts: &[(u64, u32, bool)]) {
    let shift = queue * 0x1_0000;
    for (index, &(address, length, writable)) in parts.iter().enumerate() {
        let last = index + 1 == parts.len();
        let flags = u16::from(!last) | u16::from(writable) << 1;
        let at = DESC + shift + 16 * index as u64;
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(index as u16 + 1, GuestAddress(at + 14)).unwrap();
    }
    memory.write_obj(0u16, GuestAddress(AVAIL + shift + 4 + 2 * u64::from((count - 1) % QUEUE))).unwrap();
    memory.write_obj(count, GuestAddress(AVAIL + shift + 2)).unwrap();
}

fn used(memory: &GuestMemory, queue: u64) -> u16 {
    memory.read_obj(GuestAddress(USED + queue * 0x1_0000 + 2)).unwrap()
}

fn save_change_restore_compare(device: &mut Transport, fresh: &mut Transport, memory: &GuestMemory) {
    let saved = device.save(0);
    fresh.restore(&saved, memory).unwrap();
    assert_eq!(fresh.save(0), saved);
    register(device, memory, 0x70, 0);
    assert_ne!(device.save(0), saved);
    device.restore(&saved, memory).unwrap();
    assert_eq!(device.save(0), saved);
    let other = VirtioState { device_id: 99, ..saved.clone() };
    assert!(fresh.restore(&other, memory).is_err());
    let greedy = VirtioState { driver_features: u64::MAX, ..saved.clone() };
    assert!(fresh.restore(&greedy, memory).is_err());
    let mut outside = saved;
    outside.queues[0].desc = 0xdead_0000;
    assert!(fresh.restore(&outside, memory).is_err());
}

#[test]
fn every_device_is_the_same_after_save_and_restore() {
    let memory = memory();
    let (mut net, mut other) = (Net::new(), Net::new());
    start(&mut net.transport, &memory, 2, super::net::MRG_RXBUF);
    save_change_restore_compare(&mut net.transport, &mut other.transport, &memory);
    let (mut block, mut other) = (Block::new(1 << 20).unwrap(), Block::new(1 << 20).unwrap());
    start(&mut block.transport, &memory, 1, 0);
    save_change_restore_compare(&mut block.transport, &mut other.transport, &memory);
    let (mut entropy, mut other) = (Entropy::new(), Entropy::new());
    start(&mut entropy.transport, &memory, 1, 0);
    save_change_restore_compare(&mut entropy.transport, &mut other.transport, &memory);
}

fn disk(bytes: u64) -> OwnedFd {
    let file = memfd_create("disk", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, bytes).unwrap();
    file
}

/// Serves until `count` requests are completed; the worker's wake-up is waited for, not polled.
fn serve_until(block: &mut Block, memory: &GuestMemory, count: u16) -> Vec<u32> {
    let mut written = Vec::new();
    loop {
        block.serve(memory, |number| written.push(number));
        if used(memory, 0) == count {
            return written;
        }
        let mut polled =
            [rustix::event::PollFd::from_borrowed_fd(block.wake(), rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut polled, None).unwrap();
    }
}

fn block_request(memory: &GuestMemory, count: u16, kind: u32, sector: u64, length: u32, writable: bool) {
    memory.write_obj(kind, GuestAddress(DATA)).unwrap();
    memory.write_obj(sector, GuestAddress(DATA + 8)).unwrap();
    memory.write_obj(0xffu8, GuestAddress(DATA + 16)).unwrap();
    push(memory, 0, count, &[(DATA, 16, false), (DATA + 0x1000, length, writable), (DATA + 16, 1, true)]);
}

fn status(memory: &GuestMemory) -> u8 {
    memory.read_obj(GuestAddress(DATA + 16)).unwrap()
}

#[test]
fn a_block_written_is_read_back_and_told_to_the_tracker() {
    let memory = memory();
    let mut block = Block::new(1 << 20).unwrap();
    block.attach(File::from(disk(1 << 20))).unwrap();
    start(&mut block.transport, &memory, 1, 0);
    memory.write_slice(&[0xa5; 4096], GuestAddress(DATA + 0x1000)).unwrap();
    block_request(&memory, 1, 1, 24, 4096, false);
    assert_eq!((serve_until(&mut block, &memory, 1), status(&memory)), (vec![3], 0));
    memory.write_slice(&[0; 4096], GuestAddress(DATA + 0x1000)).unwrap();
    block_request(&memory, 2, 0, 24, 4096, true);
    assert_eq!((serve_until(&mut block, &memory, 2), status(&memory)), (vec![], 0));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(DATA + 0x1fff)).unwrap(), 0xa5);
}

#[test]
fn transfers_outside_the_disk_or_memory_are_errors_and_nothing_else() {
    let memory = memory();
    let mut block = Block::new(1 << 20).unwrap();
    block.attach(File::from(disk(1 << 20))).unwrap();
    start(&mut block.transport, &memory, 1, 0);
    let cases = [
        (0, 2048, 512, true),
        (0, u64::MAX, 512, true),
        (1, 0, 100, false),
        (0, 0, 512, false),
        (77, 0, 512, true),
    ];
    for (count, (kind, sector, length, writable)) in (1..).zip(cases) {
        block_request(&memory, count, kind, sector, length, writable);
        serve_until(&mut block, &memory, count);
        assert_ne!(status(&memory), 0, "case {count}");
    }
}

#[test]
fn requests_a_save_finds_unfinished_are_issued_again_after_a_restore() {
    let memory = memory();
    let mut block = Block::new(1 << 20).unwrap();
    start(&mut block.transport, &memory, 1, 0);
    block_request(&memory, 1, 1, 0, 4096, false);
    // Whether the worker is done by now does not matter: nothing of it was delivered.
    block.take_requests(&memory);
    assert_eq!(block.unfinished(), 1);
    let saved = block.transport.save(block.unfinished());
    assert_eq!((saved.queues[0].next_avail, saved.queues[0].next_used), (0, 0));
    let mut target = Block::new(1 << 20).unwrap();
    target.attach(File::from(disk(1 << 20))).unwrap();
    target.transport.restore(&saved, &memory).unwrap();
    assert_eq!((serve_until(&mut target, &memory, 1), status(&memory)), (vec![0], 0));
}

#[test]
fn output_waits_in_the_ring_until_it_is_sent() {
    let memory = memory();
    let mut net = Net::new();
    start(&mut net.transport, &memory, 2, 0);
    let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
    net.attach(Some(writer));
    push(&memory, 1, 1, &[(DATA, 12, false), (DATA + 0x100, 60, false)]);
    assert_eq!(used(&memory, 1), 0);
    net.send(&memory);
    assert_eq!((used(&memory, 1), net.counters.sent_frames), (1, 1));
    let mut frame = [0; 128];
    assert_eq!(rustix::io::read(&reader, &mut frame).unwrap(), 72);
}

#[test]
fn a_frame_spans_as_many_buffers_as_it_needs_and_says_so() {
    let memory = memory();
    let mut net = Net::new();
    start(&mut net.transport, &memory, 2, super::net::MRG_RXBUF);
    let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
    net.attach(Some(reader));
    let mut frame = vec![0; 12];
    frame.extend((0..100u8).cycle().take(300));
    rustix::io::write(&writer, &frame).unwrap();
    assert_eq!(net.receive(&memory), 0, "no buffer yet: the frame is held");
    for index in 0..2u64 {
        let at = DESC + 16 * index;
        memory.write_obj(DATA + 0x1000 * index, GuestAddress(at)).unwrap();
        memory.write_obj(256u32, GuestAddress(at + 8)).unwrap();
        memory.write_obj(2u16, GuestAddress(at + 12)).unwrap();
        memory.write_obj(index as u16, GuestAddress(AVAIL + 4 + 2 * index)).unwrap();
    }
    memory.write_obj(2u16, GuestAddress(AVAIL + 2)).unwrap();
    assert_eq!(net.receive(&memory), 1);
    assert_eq!(used(&memory, 0), 2);
    assert_eq!(memory.read_obj::<u16>(GuestAddress(DATA + 10)).unwrap(), 2);
    let mut got = vec![0; 312];
    memory.read_slice(&mut got[..256], GuestAddress(DATA)).unwrap();
    memory.read_slice(&mut got[256..], GuestAddress(DATA + 0x1000)).unwrap();
    assert_eq!(got[12..], frame[12..]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Rings full of nonsense: the devices end every serve, and nothing of the host is touched.
    #[test]
    fn rings_of_nonsense_never_hang_or_panic(words in prop::collection::vec(any::<u64>(), 512), rounds in 1usize..4) {
        let memory = memory();
        let mut net = Net::new();
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        net.attach(Some(reader));
        start(&mut net.transport, &memory, 2, super::net::MRG_RXBUF);
        let mut block = Block::new(1 << 20).unwrap();
        start(&mut block.transport, &memory, 1, 0);
        let mut entropy = Entropy::new();
        start(&mut entropy.transport, &memory, 1, 0);
        for (index, word) in words.iter().enumerate() {
            // Half of the addresses point into memory, so that chains get past the first check.
            let word = if index % 2 == 0 { MEMORY + word % SIZE } else { *word };
            for base in [DESC, DESC + 0x1_0000] {
                memory.write_obj(word, GuestAddress(base + 8 * (index as u64 % 2048))).unwrap();
            }
            memory.write_obj(*words.last().unwrap() as u16, GuestAddress(AVAIL + 2)).unwrap();
        }
        for _ in 0..rounds {
            rustix::io::write(&writer, &[1; 200]).unwrap();
            net.send(&memory);
            net.receive(&memory);
            block.serve(&memory, |_| {});
            entropy.serve(&memory);
        }
        for offset in (0..0x200).step_by(4) {
            let mut data = [0; 4];
            net.transport.read(offset, &mut data);
            net.transport.write(offset, &words[offset as usize % 512].to_le_bytes()[..4], &memory);
        }
    }
}

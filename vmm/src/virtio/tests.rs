//! One contract for every device: serve a driver, save, restore, compare; and drivers that break the rules.

use std::{
    fs::File,
    num::NonZeroUsize,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use kage_machine::state::VirtioState;
use proptest::prelude::*;
use rustix::{
    fs::{MemfdFlags, memfd_create},
    pipe::{PipeFlags, pipe_with},
};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, bitmap::AtomicBitmap, mmap::MmapRegionBuilder};

use kage_disk::{Geometry, Index, Initial, Store, Tuning};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, send, socketpair};

use super::{block::Block, entropy::Entropy, mmio::Transport, net::Net};
use crate::{
    dirty::GuestMemory,
    disk::{
        Attach,
        line::{Ask, Asked, Flush, LINE_PACKET, Tell, decode, encode},
    },
    packet,
};

const MEMORY: u64 = kage_abi::MEMORY;
const SIZE: u64 = 1 << 20;
const DESC: u64 = MEMORY;
const AVAIL: u64 = MEMORY + 0x1000;
const USED: u64 = MEMORY + 0x2000;
const DATA: u64 = MEMORY + 0x4000;
const QUEUE: u16 = 16;
const BLOCKS: u64 = 256;

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

/// Gives a device a disk in memory and has its machine run; returns the daemon's end of its line.
fn attach(block: &mut Block, log: File, elsewhere: bool) -> OwnedFd {
    let (daemon, line) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let index = Index::memory(BLOCKS).unwrap();
    block.attach(Attach { log, index, identity: [1; 16], elsewhere, line }).unwrap();
    block.go();
    daemon
}

fn log() -> File {
    File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap())
}

/// A device of 1 MiB that runs.
fn running() -> (Block, OwnedFd) {
    let mut block = Block::new(BLOCKS * 4096).unwrap();
    let line = attach(&mut block, log(), false);
    (block, line)
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
    let (mut block, _line) = running();
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
    let (mut block, _line) = running();
    start(&mut block.transport, &memory, 1, 0);
    let cases = [
        (0, 2048, 4096, true),
        (0, u64::MAX, 4096, true),
        (1, 0, 100, false),
        (1, 0, 512, false),
        (0, 1, 4096, true),
        (0, 0, 4096, false),
        (0, 0, 2 << 20, true),
        (11, 0, 8, false),
        (11, 0, 16, true),
        (77, 0, 4096, true),
    ];
    for (count, (kind, sector, length, writable)) in (1..).zip(cases) {
        block_request(&memory, count, kind, sector, length, writable);
        serve_until(&mut block, &memory, count);
        assert_ne!(status(&memory), 0, "case {count}");
    }
}

#[test]
fn what_is_discarded_reads_as_zeros_and_is_told_to_the_tracker() {
    let memory = memory();
    let (mut block, _line) = running();
    start(&mut block.transport, &memory, 1, 0);
    memory.write_slice(&[0xa5; 8192], GuestAddress(DATA + 0x1000)).unwrap();
    block_request(&memory, 1, 1, 24, 8192, false);
    assert_eq!((serve_until(&mut block, &memory, 1), status(&memory)), (vec![3, 4], 0));
    let range = [32u64.to_le_bytes(), 8u64.to_le_bytes()].concat();
    memory.write_slice(&range, GuestAddress(DATA + 0x1000)).unwrap();
    block_request(&memory, 2, 11, 0, 16, false);
    assert_eq!((serve_until(&mut block, &memory, 2), status(&memory)), (vec![4], 0));
    block_request(&memory, 3, 0, 24, 8192, true);
    assert_eq!((serve_until(&mut block, &memory, 3), status(&memory)), (vec![], 0));
    let read = |at| memory.read_obj::<u8>(GuestAddress(DATA + 0x1000 + at)).unwrap();
    assert_eq!((read(4095), read(4096), read(8191)), (0xa5, 0, 0));
    assert_eq!([36, 40, 44].map(|at| config(&mut block.transport, at)), [2048, 1, 8]);
    assert_eq!([8, 12, 20].map(|at| config(&mut block.transport, at)), [1 << 20, 254, 4096]);
}

fn config(device: &mut Transport, at: u64) -> u32 {
    let mut word = [0; 4];
    device.read(0x100 + at, &mut word);
    u32::from_le_bytes(word)
}

#[test]
fn requests_wait_in_the_ring_for_a_disk_and_fail_once_it_cannot_be_opened() {
    let memory = memory();
    let mut block = Block::new(1 << 20).unwrap();
    start(&mut block.transport, &memory, 1, 0);
    block_request(&memory, 1, 1, 0, 4096, false);
    assert!(!block.serve(&memory, |_| {}));
    assert_eq!(block.unfinished(), 0);
    let other = log();
    let index = Index::private(BLOCKS).unwrap();
    let geometry = Geometry::new(BLOCKS, Geometry::log_bytes_for(BLOCKS)).unwrap();
    let of = other.try_clone().unwrap();
    drop(Store::create(of, index, [2; 16], geometry, Initial::Zeros, Tuning::default()).unwrap());
    let _line = attach(&mut block, other, false);
    serve_until(&mut block, &memory, 1);
    assert_eq!(status(&memory), 1, "the log is another disk's");
}

#[test]
fn requests_a_save_finds_unfinished_are_issued_again_after_a_restore() {
    let memory = memory();
    // Every block is missing: a read waits, and what comes behind it does not.
    let mut block = Block::new(1 << 20).unwrap();
    let _line = attach(&mut block, log(), true);
    start(&mut block.transport, &memory, 1, 0);
    for (slot, (kind, sector)) in (0u64..).zip([(0u32, 0u64), (1, 8), (0, 16)]) {
        let at = DATA + 0x4000 * slot;
        memory.write_obj(kind, GuestAddress(at)).unwrap();
        memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
        let parts = [(at, 16, false), (at + 0x1000, 4096, kind == 0), (at + 16, 1, true)];
        // One chain of two descriptors' room: header, data, status.
        let table = DESC + 48 * slot;
        for (index, (address, length, writable)) in (0u64..).zip(parts) {
            let next = 3 * slot as u16 + index as u16 + 1;
            memory.write_obj(address, GuestAddress(table + 16 * index)).unwrap();
            memory.write_obj(length, GuestAddress(table + 16 * index + 8)).unwrap();
            let flags = u16::from(index < 2) | u16::from(writable) << 1;
            memory.write_obj(flags, GuestAddress(table + 16 * index + 12)).unwrap();
            memory.write_obj(next, GuestAddress(table + 16 * index + 14)).unwrap();
        }
        memory.write_obj(3 * slot as u16, GuestAddress(AVAIL + 4 + 2 * slot)).unwrap();
    }
    memory.write_obj(3u16, GuestAddress(AVAIL + 2)).unwrap();
    assert_eq!(serve_until(&mut block, &memory, 1), vec![1], "the write is done");
    let unsettled = block.halt(&memory, |_| {});
    assert!(unsettled, "it is not flushed");
    assert_eq!(block.unfinished(), 2);
    let saved = block.save(&memory, unsettled);
    assert_eq!((saved.queues[0].next_avail, saved.queues[0].next_used), (1, 1));
    let (mut target, _line) = running();
    target.restore(&saved, &memory).unwrap();
    serve_until(&mut target, &memory, 3);
    let heads = [0, 8, 16].map(|at| memory.read_obj::<u32>(GuestAddress(USED + 4 + at)).unwrap());
    assert_eq!(heads, [3, 0, 6], "the reads are done where they went, each once");
}

/// Asks the worker as a daemon, and waits for what it says to that.
fn ask(line: &OwnedFd, ticket: u64, ask: Ask) -> Result<(), String> {
    send(line, &encode(&Asked { ticket, ask }), SendFlags::empty()).unwrap();
    let mut buffer = vec![0; LINE_PACKET];
    loop {
        let packet = packet::receive(line.as_fd(), &mut buffer, RecvFlags::empty()).unwrap();
        match decode(&packet.bytes) {
            Some(Tell::Done { ticket: answered, result }) if answered == ticket => return result,
            Some(_) => {}
            None => panic!("the line has ended"),
        }
    }
}

/// First byte of a block for whoever opens a log now.
fn committed(log: &File, block: u64) -> u8 {
    let mut bytes = vec![0; log.metadata().unwrap().len() as usize];
    log.read_exact_at(&mut bytes, 0).unwrap();
    let copy = self::log();
    copy.write_all_at(&bytes, 0).unwrap();
    let index = Index::private(BLOCKS).unwrap();
    let store = Store::open(copy, index, [1; 16], Tuning::default()).unwrap();
    let mut held = [0; 4096];
    store.read(block, &mut held).unwrap();
    held[0]
}

#[test]
fn an_arriving_machine_commits_nothing_before_it_is_settled() {
    for by_gate in [false, true] {
        let memory = memory();
        let mut block = Block::new(BLOCKS * 4096).unwrap();
        let log = log();
        let line = attach(&mut block, log.try_clone().unwrap(), false);
        start(&mut block.transport, &memory, 1, 0);
        memory.write_slice(&[0xa5; 4096], GuestAddress(DATA + 0x1000)).unwrap();
        block_request(&memory, 1, 1, 24, 4096, false);
        serve_until(&mut block, &memory, 1);
        block_request(&memory, 2, 4, 0, 0, false);
        serve_until(&mut block, &memory, 2);
        assert_eq!((status(&memory), committed(&log, 3)), (0, 0xa5));
        assert_eq!(ask(&line, 1, Ask::Hold), Ok(()));
        memory.write_slice(&[0x5a; 4096], GuestAddress(DATA + 0x1000)).unwrap();
        block_request(&memory, 3, 1, 24, 4096, false);
        serve_until(&mut block, &memory, 3);
        block_request(&memory, 4, 4, 0, 0, false);
        block.serve(&memory, |_| {});
        // Not even in pieces; and by the second answer the worker has come by the guest's own flush.
        assert!(ask(&line, 2, Ask::Flush(Flush::Torn)).is_err());
        assert!(ask(&line, 3, Ask::Flush(Flush::Torn)).is_err());
        block.serve(&memory, |_| {});
        assert_eq!((used(&memory, 0), committed(&log, 3)), (3, 0xa5));
        if by_gate {
            block.settle();
        } else {
            assert_eq!(ask(&line, 4, Ask::Flush(Flush::Settled)), Ok(()));
        }
        serve_until(&mut block, &memory, 4);
        assert_eq!((status(&memory), committed(&log, 3)), (0, 0x5a));
    }
}

#[test]
fn a_daemons_flush_does_not_come_between_a_commits_discards_and_its_writes() {
    let memory = memory();
    let mut block = Block::new(BLOCKS * 4096).unwrap();
    let log = log();
    let line = attach(&mut block, log.try_clone().unwrap(), false);
    start(&mut block.transport, &memory, 1, 0);
    memory.write_slice(&[0xa5; 4096], GuestAddress(DATA + 0x1000)).unwrap();
    block_request(&memory, 1, 1, 24, 4096, false);
    serve_until(&mut block, &memory, 1);
    block_request(&memory, 2, 4, 0, 0, false);
    serve_until(&mut block, &memory, 2);
    let range = [24u64.to_le_bytes(), 8u64.to_le_bytes()].concat();
    memory.write_slice(&range, GuestAddress(DATA + 0x1000)).unwrap();
    block_request(&memory, 3, 11, 0, 16, false);
    serve_until(&mut block, &memory, 3);
    send(&line, &encode(&Asked { ticket: 1, ask: Ask::Flush(Flush::Whole) }), SendFlags::empty()).unwrap();
    // Answered behind it, and at once.
    assert_eq!(ask(&line, 2, Ask::Fill(Vec::new())), Ok(()));
    assert_eq!(committed(&log, 3), 0xa5);
    assert!(block.halt(&memory, |_| {}), "where the machine goes, it is still in the midst of it");
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

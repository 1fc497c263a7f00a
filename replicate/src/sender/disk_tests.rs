//! Disks: what an earlier stay left at the follower, what the owner misses, what is written meanwhile.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
};

use kage_machine::disk::block_digest;
use proptest::prelude::*;

use super::*;
use crate::{
    link::{MemoryLink, pair},
    receiver::{ReceiveError, Receiver},
    store::ElsewhereError,
    testing::{TestMemory, content},
};

const MEMORY: u32 = 20;
const BLOCKS: u32 = 40;

fn memory() -> TestMemory {
    TestMemory::new(MEMORY, BLOCKS)
}

fn page(block: u32) -> PageIndex {
    PageIndex(MEMORY + block)
}

/// One of a few contents, so that blocks are often equal; 0 is zeros.
fn bytes(which: u8) -> PageBytes {
    if which == 0 { [0; PAGE_SIZE] } else { content(3, u64::from(which)) }
}

fn digest(which: u8) -> u64 {
    block_digest(&bytes(which))
}

/// What a disk does with a block.
#[derive(Clone, Copy, Debug)]
enum Put {
    Bytes(u8),
    Missing(u8),
}

impl Put {
    fn to(self, memory: &TestMemory, block: u32) {
        match self {
            Self::Bytes(which) => memory.write(page(block), &bytes(which)),
            Self::Missing(which) => memory.lose(page(block), Some(digest(which))),
        }
    }

    fn which(self) -> u8 {
        match self {
            Self::Bytes(which) | Self::Missing(which) => which,
        }
    }
}

fn put() -> impl Strategy<Value = Put> {
    prop_oneof![4 => (0u8..6).prop_map(Put::Bytes), 1 => (0u8..6).prop_map(Put::Missing)]
}

fn disk() -> impl Strategy<Value = Vec<Put>> {
    prop::collection::vec(put(), BLOCKS as usize)
}

/// What happens to the owner's disk between two rounds.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u32, u8),
    /// A missing block comes.
    Pull(u32),
    /// A block is found damaged: it is missing now, its digest known.
    Damage(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..BLOCKS, 0u8..8).prop_map(|(block, which)| Step::Write(block, which)),
        1 => (0..BLOCKS).prop_map(Step::Pull),
        1 => (0..BLOCKS).prop_map(Step::Damage),
    ]
}

/// The owner's disk and what a guest wrote of it since the last round.
struct Owner {
    memory: TestMemory,
    truth: Vec<u8>,
    dirty: PageSet,
}

impl Owner {
    fn new(disk: &[Put]) -> Self {
        let memory = memory();
        (0..).zip(disk).for_each(|(block, put)| put.to(&memory, block));
        memory.write(PageIndex(3), &content(3, 99));
        let truth = disk.iter().map(|put| put.which()).collect();
        Self { memory, truth, dirty: PageSet::empty(MEMORY + BLOCKS) }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Write(block, which) => {
                self.memory.write(page(block), &bytes(which));
                self.truth[block as usize] = which;
                self.dirty.insert(page(block));
            }
            Step::Pull(block) => {
                if let Block::Missing(Some(_)) = self.memory.block(page(block)) {
                    self.memory.fill(page(block), &bytes(self.truth[block as usize]));
                }
            }
            Step::Damage(block) => {
                if let Block::Held(digest) = self.memory.block(page(block)) {
                    self.memory.lose(page(block), Some(digest));
                    self.dirty.insert(page(block));
                }
            }
        }
    }
}

/// The digest of a block, wherever its bytes are.
fn known(block: Block) -> u64 {
    match block {
        Block::Zeros => digest(0),
        Block::Held(digest) | Block::Missing(Some(digest)) => digest,
        Block::Missing(None) => panic!("not known"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_disk_over_any_leftovers_is_equal_at_the_end_and_only_what_differed_is_sent(
        disk in disk(),
        left in disk(),
        rounds in prop::collection::vec(prop::collection::vec(step(), 0..20), 0..4),
        rate in prop_oneof![Just(1e6), Just(5e9)],
    ) {
        let mut owner = Owner::new(&disk);
        let copy = Arc::new(memory());
        (0..).zip(&left).for_each(|(block, put)| put.to(&copy, block));
        let held: Vec<_> = copy.blocks();

        let mut receiver = Receiver::new(copy.clone());
        let have = Have::parse(receiver.have().as_bytes(), BLOCKS).unwrap();
        prop_assert!(have.iter().all(|(block, digest)| held[block as usize] == Block::Held(digest)));
        let mut sender = Sender::knowing(owner.memory.geometry(), &have);
        prop_assert_eq!(sender.digest(), receiver.mirror().digest());
        sender.link.record(1 << 30, Duration::from_secs_f64((1u64 << 30) as f64 / rate));

        // Blocks that may be sent: not held there as they are, or written since.
        let mut differ: BTreeSet<_> = (0..BLOCKS)
            .filter(|&block| match held[block as usize] {
                Block::Zeros | Block::Missing(_) => disk[block as usize].which() != 0,
                Block::Held(digest) => known(owner.memory.block(page(block))) != digest,
            })
            .collect();
        let first = sender.due(&owner.memory);
        prop_assert_eq!(owner.memory.reads.load(Ordering::Relaxed), 0, "a block was read to say what differs");
        let due: BTreeSet<_> = first.iter().filter(|page| page.0 >= MEMORY).map(|page| page.0 - MEMORY).collect();
        prop_assert_eq!(&due, &differ);

        let (mut pages, mut epoch, mut stats) = (first, Epoch(0), EpochStats::default());
        let mut most = differ.len() as u64;
        let (mut link, mut other) = links();
        for steps in rounds {
            epoch.0 += 1;
            let apply = std::thread::scope(|scope| {
                let follower = scope.spawn(|| receiver.receive_epoch(&mut other, None));
                let mut go_on = |_: &Progress| ControlFlow::Continue(());
                stats += sender.send_epoch(&mut link, &owner.memory, &pages, epoch, &mut go_on).unwrap();
                follower.join().unwrap()
            });
            prop_assert!(apply.is_ok());
            for step in steps {
                owner.take(step);
                if let Step::Write(block, _) = step {
                    differ.insert(block);
                    most += 1;
                }
            }
            pages = owner.dirty.take();
        }
        epoch.0 += 1;
        let last = sender.encode_last(&owner.memory, &pages, epoch, 1 << 20).unwrap();
        stats += last.stats;
        prop_assert_eq!(receiver.apply_last(&last.bytes).unwrap(), last.mark);

        for (block, (&which, found)) in (0..).zip(owner.truth.iter().zip(copy.blocks())) {
            prop_assert_eq!(known(found), digest(which), "block {}", block);
            // What was held is not given up where the owner misses it.
            if held[block as usize] == Block::Held(digest(which)) && !differ.contains(&block) {
                prop_assert_eq!(found, held[block as usize]);
            }
            if let Block::Held(_) = found {
                let mut here = [0; PAGE_SIZE];
                copy.read(page(block), &mut here);
                prop_assert!(here == bytes(which));
            }
        }
        prop_assert!(receiver.mirror().scrub().is_empty());
        prop_assert!(stats.disk_pages <= most, "{:?} where {} differed", stats, most);
        prop_assert!(owner.memory.reads.load(Ordering::Relaxed) <= stats.disk_pages + stats.pages_zero + stats.pages_elsewhere);
    }
}

fn links() -> (MemoryLink, MemoryLink) {
    pair("owner".parse().unwrap(), "follower".parse().unwrap())
}

/// Sends what is due as a last epoch.
fn send(sender: &mut Sender, from: &TestMemory, receiver: &mut Receiver, epoch: u64) -> EpochStats {
    let due = sender.due(from);
    let last = sender.encode_last(from, &due, Epoch(epoch), 1 << 20).unwrap();
    receiver.apply_last(&last.bytes).unwrap();
    last.stats
}

#[test]
fn a_host_that_held_the_disk_gets_what_changed() {
    let (owner, copy) = (memory(), Arc::new(memory()));
    for block in 0..BLOCKS {
        owner.write(page(block), &bytes(1 + block as u8));
        copy.write(page(block), &bytes(1 + block as u8));
    }
    owner.write(page(7), &bytes(100));
    owner.zero(page(8));
    let mut receiver = Receiver::new(copy.clone());
    let mut sender = Sender::knowing(owner.geometry(), &receiver.have());
    let stats = send(&mut sender, &owner, &mut receiver, 1);
    assert_eq!((stats.pages, stats.disk_pages, stats.pages_zero), (1, 1, 1));
    assert!(stats.bytes_wire < 4300 && stats.disk_bytes_wire <= stats.bytes_wire, "{stats:?}");
    assert_eq!(owner.reads.load(Ordering::Relaxed), 2);
    assert!(owner.contents() == copy.contents());
}

#[test]
fn a_block_missing_at_both_ends_costs_its_digest_and_one_that_comes_later_nothing() {
    let (owner, copy) = (memory(), Arc::new(memory()));
    for block in 0..BLOCKS {
        owner.lose(page(block), Some(digest(1)));
    }
    let mut receiver = Receiver::new(copy.clone());
    let mut sender = Sender::knowing(owner.geometry(), &receiver.have());
    let stats = send(&mut sender, &owner, &mut receiver, 1);
    assert_eq!((stats.pages, stats.pages_elsewhere), (0, BLOCKS.into()));
    assert!(stats.bytes_wire < u64::from(BLOCKS) * 16 + 100, "{stats:?}");
    assert!(copy.blocks().iter().all(|&block| block == Block::Missing(Some(digest(1)))));
    owner.fill(page(4), &bytes(1));
    assert!(sender.due(&owner).is_empty());
    assert!(receiver.have().is_empty(), "what is missing is not held");
}

#[test]
fn a_disk_that_is_not_known_yet_is_not_sent() {
    let (owner, copy) = (memory(), Arc::new(memory()));
    assert_eq!(find_unknown(&owner), Ok(()));
    owner.write(page(0), &bytes(1));
    owner.lose(page(5), None);
    assert_eq!(find_unknown(&owner), Err(UnknownBlock { page: page(5) }));
    let mut sender = Sender::new(owner.geometry());
    let due = sender.due(&owner);
    assert_eq!(
        sender.encode_last(&owner, &due, Epoch(1), 1 << 20).unwrap_err(),
        LastError::Unknown(UnknownBlock { page: page(5) })
    );
    assert_eq!(sender.digest(), 0, "nothing is changed");
    let (mut link, _other) = links();
    let mut go_on = |_: &Progress| ControlFlow::Continue(());
    let error = sender.send_epoch(&mut link, &owner, &due, Epoch(1), &mut go_on).unwrap_err();
    assert_eq!(error.to_string(), "the list of its disk's blocks is still being fetched");
    // Once it is, all is as ever.
    owner.lose(page(5), Some(digest(2)));
    let mut receiver = Receiver::new(copy);
    send(&mut Sender::new(owner.geometry()), &owner, &mut receiver, 1);
}

#[test]
fn what_was_sent_by_its_digest_is_no_base_for_a_delta() {
    let (owner, copy) = (memory(), Arc::new(memory()));
    let mut receiver = Receiver::new(copy.clone());
    let mut sender = Sender::knowing(owner.geometry(), &receiver.have());
    // On a thin link everything is kept for deltas.
    sender.link.record(1 << 20, Duration::from_secs(1));
    let (mut link, mut other) = links();
    let mut epoch = |sender: &mut Sender, receiver: &mut Receiver, number| {
        let mut pages = PageSet::empty(MEMORY + BLOCKS);
        pages.insert(page(1));
        std::thread::scope(|scope| {
            let follower = scope.spawn(|| receiver.receive_epoch(&mut other, None));
            let mut go_on = |_: &Progress| ControlFlow::Continue(());
            let stats = sender.send_epoch(&mut link, &owner, &pages, Epoch(number), &mut go_on).unwrap();
            follower.join().unwrap().unwrap();
            stats
        })
    };
    let mut bytes = content(3, 1);
    owner.write(page(1), &bytes);
    assert_eq!(epoch(&mut sender, &mut receiver, 1).disk_pages, 1);
    bytes[9] ^= 1;
    owner.write(page(1), &bytes);
    assert_eq!(epoch(&mut sender, &mut receiver, 2).pages_delta, 1);
    owner.lose(page(1), Some(digest(3)));
    assert_eq!(epoch(&mut sender, &mut receiver, 3).pages_elsewhere, 1);
    bytes[10] ^= 1;
    owner.write(page(1), &bytes);
    assert_eq!(epoch(&mut sender, &mut receiver, 4).pages_delta, 0);
    assert!(owner.contents() == copy.contents());
}

#[test]
fn what_cannot_be_elsewhere_is_refused_with_the_reason() {
    let refused = |copy: TestMemory, at: PageIndex| {
        let mut writer = BatchWriter::new(Epoch(1));
        writer.push(at, Encoding::Elsewhere, &digest(1).to_le_bytes());
        let frame = Frame::new(Kind::Pages, writer.finish(None));
        let mut receiver = Receiver::new(Arc::new(copy));
        let error = receiver.apply(&frame).unwrap_err();
        assert!(error.as_refusal().is_some());
        match error {
            ReceiveError::Elsewhere(error) => error,
            other => panic!("{other}"),
        }
    };
    for at in [PageIndex(3), PageIndex(MEMORY + BLOCKS)] {
        assert_eq!(refused(memory(), at), ElsewhereError::NoBlock(at));
    }
    let unable = || {
        let mut memory = memory();
        memory.leaves = false;
        memory
    };
    assert_eq!(refused(unable(), page(2)), ElsewhereError::Refused(page(2)));
    // Where it is held there is nothing to leave.
    let copy = unable();
    copy.write(page(2), &bytes(1));
    let mut receiver = Receiver::new(Arc::new(copy));
    let owner = memory();
    owner.lose(page(2), Some(digest(1)));
    let mut sender = Sender::new(owner.geometry());
    let due = sender.due(&owner);
    let last = sender.encode_last(&owner, &due, Epoch(1), 1 << 20).unwrap();
    receiver.apply_last(&last.bytes).unwrap();
}

#[test]
fn a_large_disk_costs_a_round_what_is_dirty() {
    // 1 GiB, held at both ends: a round of a few pages looks at these alone.
    struct Large(std::sync::atomic::AtomicU64);
    const DISK: u32 = 262_144;
    impl Memory for Large {
        fn geometry(&self) -> Geometry {
            Geometry { memory_pages: 16_384, disk_pages: DISK }
        }
        fn read(&self, page: PageIndex, into: &mut PageBytes) {
            into.fill(page.0 as u8);
        }
        fn write(&self, _: PageIndex, _: &PageBytes) {}
        fn zero(&self, _: PageIndex) {}
        fn populated(&self) -> PageSet {
            PageSet::full(self.geometry().pages())
        }
        fn block(&self, page: PageIndex) -> Block {
            self.0.fetch_add(1, Ordering::Relaxed);
            Block::Held(u64::from(page.0))
        }
    }
    let memory = Large(std::sync::atomic::AtomicU64::new(0));
    let start = Instant::now();
    let have = Have::of((0..DISK).map(|block| (block, u64::from(16_384 + block))));
    let have = Have::parse(have.as_bytes(), DISK).unwrap();
    let mut sender = Sender::knowing(memory.geometry(), &have);
    let seeded = start.elapsed();
    let due = sender.due(&memory);
    println!("seeded in {seeded:?}, {} due after {:?}", due.len(), start.elapsed());
    assert_eq!(due, PageSet::from_words(due.pages(), vec![u64::MAX; 256]));
    memory.0.store(0, Ordering::Relaxed);
    let mut few = PageSet::empty(due.pages());
    (0..20).for_each(|block| {
        few.insert(PageIndex(16_384 + block * 1000));
    });
    let start = Instant::now();
    for epoch in 0..20 {
        sender.encode_last(&memory, &few, Epoch(epoch), 1 << 20).unwrap();
    }
    println!("a round of 20 dirty pages: {:?}", start.elapsed() / 20);
    assert_eq!(memory.0.load(Ordering::Relaxed), 20 * 20);
}

#![allow(dead_code, reason = "each test file uses its part of the model")]
//! A disk as a plain vector, and a store that is held against it through everything that may happen.

use std::ops::Range;

use kage_disk::{
    BLOCK_BYTES, Geometry, Index, Initial, OpenError, Place, ReadError, Reader, Seeded, SimulatedDisk, State,
    Store, StoreError, Tuning,
};

pub const IDENTITY: [u8; 16] = *b"a disk of a test";

/// What happens to a disk.
#[derive(Debug, Clone)]
pub enum Op {
    Write(Range<u64>),
    Scatter(Vec<u64>),
    Discard(Range<u64>),
    Lose(Range<u64>),
    Fill(Range<u64>),
    Flush,
    Clean(u64),
    Scrub,
    Handover,
    TakeOver,
    Reopen,
    /// The power goes during the n-th operation of the medium from here.
    CutSoon(u64),
    /// Power off now, and on.
    Cut(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Missing,
    /// A stamp; 0 is zeros.
    Holds(u64),
}

type Disk = Vec<Block>;

pub fn bytes_of(stamp: u64) -> [u8; BLOCK_BYTES] {
    let mut bytes = [0; BLOCK_BYTES];
    for (place, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = if stamp == 0 { 0 } else { stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ place as u64 };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// A store, its medium, and what the disk must hold.
pub struct Harness {
    pub medium: SimulatedDisk,
    pub store: Option<Store<SimulatedDisk>>,
    tuning: Tuning,
    now: Disk,
    committed: Disk,
    /// State of a flush that did not return.
    attempted: Option<Disk>,
    stamp: u64,
    seed: u64,
    pub full: u64,
    pub cuts: u64,
}

impl Harness {
    pub fn new(geometry: Geometry, initial: Initial, tuning: Tuning, seed: u64) -> Self {
        let medium = SimulatedDisk::new();
        let index = Index::private(geometry.blocks).unwrap();
        let store = Store::create(medium.clone(), index, IDENTITY, geometry, initial, tuning).unwrap();
        let block = match initial {
            Initial::Zeros => Block::Holds(0),
            Initial::Missing => Block::Missing,
        };
        let disk = vec![block; geometry.blocks as usize];
        Self {
            medium,
            store: Some(store),
            tuning,
            now: disk.clone(),
            committed: disk,
            attempted: None,
            stamp: 0,
            seed,
            full: 0,
            cuts: 0,
        }
    }

    fn store(&mut self) -> &mut Store<SimulatedDisk> {
        self.store.as_mut().unwrap()
    }

    /// Does `op` to store and model; a failure for want of power cuts the power.
    pub fn step(&mut self, op: &Op) {
        match self.attempt(op) {
            Ok(()) => {}
            Err(StoreError::Full { .. }) => {
                self.full += 1;
                // A full disk stays usable: a flush gives back what the last commit alone needed.
                self.step(&Op::Flush);
            }
            Err(StoreError::Io { .. } | StoreError::Broken) => self.cut(),
            Err(error) => panic!("{op:?}: {error}"),
        }
    }

    fn fresh(&mut self, blocks: Range<u64>) -> (Vec<u8>, Vec<u64>) {
        let stamps = blocks.map(|_| self.next_stamp()).collect::<Vec<_>>();
        (stamps.iter().flat_map(|stamp| bytes_of(*stamp)).collect(), stamps)
    }

    fn next_stamp(&mut self) -> u64 {
        // Few stamps: the same bytes in the same place must not confuse a recovery.
        self.stamp += 1;
        if self.stamp.is_multiple_of(3) { self.stamp } else { 1 + self.stamp % 2 }
    }

    fn attempt(&mut self, op: &Op) -> Result<(), StoreError> {
        match op {
            Op::Write(blocks) => {
                let (bytes, stamps) = self.fresh(blocks.clone());
                self.store().write(blocks.start, &bytes)?;
                for (block, stamp) in blocks.clone().zip(stamps) {
                    self.now[block as usize] = Block::Holds(stamp);
                }
            }
            Op::Scatter(blocks) => {
                let stamps = blocks.iter().map(|_| self.next_stamp()).collect::<Vec<_>>();
                let bytes = stamps.iter().map(|stamp| bytes_of(*stamp)).collect::<Vec<_>>();
                let list = blocks.iter().copied().zip(&bytes).collect::<Vec<_>>();
                self.store().write_scattered(&list)?;
                for (block, stamp) in blocks.iter().zip(stamps) {
                    self.now[*block as usize] = Block::Holds(stamp);
                }
            }
            Op::Discard(blocks) => {
                self.store().discard(blocks.clone())?;
                self.now[as_usize(blocks)].fill(Block::Holds(0));
            }
            Op::Lose(blocks) => {
                self.store().mark_missing(blocks.clone())?;
                self.now[as_usize(blocks)].fill(Block::Missing);
            }
            Op::Fill(blocks) => {
                let (bytes, stamps) = self.fresh(blocks.clone());
                let filled = self.store().fill(blocks.start, &bytes);
                if matches!(filled, Err(StoreError::Full { .. })) {
                    // Some runs of missing blocks may have been filled.
                    self.adopt(blocks.clone(), &stamps);
                }
                let filled = filled?;
                let mut expected = 0;
                for (block, stamp) in blocks.clone().zip(stamps) {
                    let block = &mut self.now[block as usize];
                    if *block == Block::Missing {
                        *block = Block::Holds(stamp);
                        expected += 1;
                    }
                }
                assert_eq!(filled, expected);
            }
            Op::Flush => {
                self.attempted = Some(self.now.clone());
                self.store().flush()?;
                self.attempted = None;
                self.committed = self.now.clone();
            }
            Op::Clean(budget) => {
                self.store().clean(*budget)?;
            }
            Op::Scrub => {
                let found = self.store().scrub(256 << 10)?;
                assert_eq!((found.corrupt, found.damaged_records), (vec![], 0));
            }
            Op::Handover => {
                let (backing, index, state) = self.store.take().unwrap().into_parts();
                let state = State::from_bytes(&state.to_bytes()).unwrap();
                self.store = Some(Store::resume(backing, index, IDENTITY, &state, self.tuning).unwrap());
            }
            Op::TakeOver => {
                let index = Index::private(self.now.len() as u64).unwrap();
                self.store = None;
                match Store::take_over(self.medium.clone(), index, IDENTITY, self.tuning) {
                    Ok(store) => self.store = Some(store),
                    Err(error) => self.power_failed(&error),
                }
            }
            Op::Reopen => {
                self.store = None;
                self.reopen();
                self.now = self.committed.clone();
            }
            Op::CutSoon(count) => self.medium.cut_power_after(*count),
            Op::Cut(seed) => {
                self.seed = self.seed.wrapping_add(*seed);
                self.cut();
            }
        }
        Ok(())
    }

    fn adopt(&mut self, blocks: Range<u64>, stamps: &[u64]) {
        for (block, stamp) in blocks.zip(stamps) {
            let there = self.store().index().place(block) != Place::Missing;
            let block = &mut self.now[block as usize];
            if *block == Block::Missing && there {
                *block = Block::Holds(*stamp);
            }
        }
    }

    fn power_failed(&mut self, error: &OpenError) {
        let failed = matches!(error, OpenError::Io { .. } | OpenError::Store(_) | OpenError::Recovery(_));
        assert!(failed, "{error}");
        self.cut();
    }

    /// Power off and on, and the store opened anew: it must be at the last flush, or at one that was
    /// under way.
    pub fn cut(&mut self) {
        self.cuts += 1;
        self.store = None;
        self.medium.power_on(self.seed);
        self.seed = Seeded::new(self.seed).next_number();
        self.reopen();
    }

    fn reopen(&mut self) {
        let index = Index::private(self.now.len() as u64).unwrap();
        match Store::open(self.medium.clone(), index, IDENTITY, self.tuning) {
            Ok(store) => self.store = Some(store),
            Err(error) => {
                // Only a cut that was still to come may have struck.
                assert!(matches!(error, OpenError::Io { .. } | OpenError::Store(_)), "{error}");
                self.cut();
                return;
            }
        }
        let found = self.found();
        if let Some(attempted) = self.attempted.take()
            && found == attempted
        {
            self.committed = attempted;
        }
        assert_eq!(differences(&found, &self.committed), Vec::<String>::new(), "not the last flush");
        self.now = self.committed.clone();
        self.verify();
    }

    /// What the store holds.
    fn found(&mut self) -> Disk {
        let blocks = self.now.len();
        let store = self.store();
        let mut bytes = [0; BLOCK_BYTES];
        (0..blocks as u64)
            .map(|block| match store.read(block, &mut bytes) {
                Ok(()) => {
                    let word = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                    let stamp = word.wrapping_mul(0xf1de_83e1_9937_733d);
                    assert!(bytes == bytes_of(stamp), "block {block} holds no block that was ever written");
                    Block::Holds(stamp)
                }
                Err(ReadError::Missing { .. }) => Block::Missing,
                Err(error) => panic!("{error}"),
            })
            .collect()
    }

    /// Everything holds: contents, and the checker's invariants.
    pub fn verify(&mut self) {
        let found = self.found();
        assert_eq!(differences(&found, &self.now), Vec::<String>::new(), "not what was written");
        assert_eq!(self.store().check(), Vec::<String>::new());
    }

    /// A reader of this disk with an index of its own process.
    pub fn reader(&self, index: Index, geometry: Geometry) -> Reader<SimulatedDisk> {
        Reader::new(self.medium.clone(), index, geometry)
    }
}

fn as_usize(blocks: &Range<u64>) -> Range<usize> {
    blocks.start as usize..blocks.end as usize
}

fn differences(found: &Disk, expected: &Disk) -> Vec<String> {
    let pairs = found.iter().zip(expected).enumerate();
    pairs
        .filter(|(_, (found, expected))| found != expected)
        .map(|(block, (found, expected))| format!("block {block}: {found:?}, not {expected:?}"))
        .collect()
}

/// A small disk whose log turns over every few writes.
pub fn small(blocks: u64, segments: u32) -> Geometry {
    Geometry { blocks, segment_bytes: 32 << 10, segments }
}

/// Checkpoints, double syncs and cleaning at every turn.
pub fn eager() -> Tuning {
    Tuning {
        log_percent: 130,
        log_slack_bytes: 64 << 10,
        checkpoint_bytes: 96 << 10,
        checkpoint_records: 40,
        verify_bytes: 64 << 10,
    }
}

/// An operation as a busy machine's, drawn from `random`.
pub fn drawn(random: &mut Seeded, blocks: u64) -> Op {
    let mut range = |most: u64| {
        let first = random.below(blocks);
        first..(first + 1 + random.below(most)).min(blocks)
    };
    let (short, long) = (range(6), range(40));
    match random.below(40) {
        0..=14 => Op::Write(short),
        15..=17 => Op::Write(long),
        18..=21 => Op::Scatter((0..1 + random.below(8)).map(|_| random.below(blocks)).collect()),
        22..=24 => Op::Discard(short),
        25 => Op::Discard(long),
        26 => Op::Lose(short),
        27..=28 => Op::Fill(long),
        29..=35 => Op::Flush,
        36 => Op::Clean(128 << 10),
        37 => Op::Scrub,
        38 => Op::Handover,
        _ if random.below(3) == 0 => Op::TakeOver,
        _ => Op::Flush,
    }
}

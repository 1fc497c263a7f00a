use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::{Found, Known, OpenError, Reader, SECTOR_BYTES, Seeded, SimulatedDisk, record};

const IDENTITY: [u8; 16] = [1; 16];
const SHAPE: Geometry = Geometry { blocks: 100, segment_bytes: 32 << 10, segments: 40 };

fn bytes(stamp: u64) -> [u8; BLOCK_BYTES] {
    let mut bytes = [0; BLOCK_BYTES];
    let mut random = Seeded::new(stamp);
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next_number().to_le_bytes());
    }
    bytes[..8].copy_from_slice(&stamp.to_le_bytes());
    bytes
}

fn tuning() -> Tuning {
    Tuning { checkpoint_bytes: 200 << 10, log_slack_bytes: 128 << 10, ..Tuning::default() }
}

fn created(medium: &SimulatedDisk, shape: Geometry) -> Store<SimulatedDisk> {
    let index = Index::private(shape.blocks).unwrap();
    Store::create(medium.clone(), index, IDENTITY, shape, Initial::Zeros, tuning()).unwrap()
}

fn opened(medium: &SimulatedDisk, shape: Geometry) -> Result<Store<SimulatedDisk>, OpenError> {
    Store::open(medium.clone(), Index::private(shape.blocks).unwrap(), IDENTITY, tuning())
}

/// A disk with a past: written, overwritten, flushed, and one record behind the last flush.
fn with_a_past(medium: &SimulatedDisk) -> Store<SimulatedDisk> {
    let mut store = created(medium, SHAPE);
    let mut random = Seeded::new(5);
    for turn in 0..60 {
        for _ in 0..4 {
            let block = random.below(99);
            store.write(block, &bytes(turn * 1000 + block)).unwrap();
        }
        store.flush().unwrap();
    }
    store.write(99, &bytes(99)).unwrap();
    store
}

fn contents(store: &Store<SimulatedDisk>) -> Vec<Option<u64>> {
    let mut read = [0; BLOCK_BYTES];
    let mut stamp = |block| match store.read(block, &mut read) {
        Ok(()) => Some(u64::from_le_bytes(read[..8].try_into().unwrap())),
        Err(ReadError::Corrupt { .. }) => None,
        Err(error) => panic!("{error}"),
    };
    (0..SHAPE.blocks).map(&mut stamp).collect()
}

#[test]
fn any_flipped_byte_of_a_live_block_is_found_on_read_and_by_scrub_and_repaired() {
    let medium = SimulatedDisk::new();
    let mut store = with_a_past(&medium);
    let mut random = Seeded::new(6);
    let before = contents(&store);
    for block in 0..SHAPE.blocks {
        let Some(at) = store.index.word(block).and_then(Word::position) else { continue };
        for place in [0, BLOCK_BYTES as u64 - 1, random.below(BLOCK_BYTES as u64)] {
            medium.corrupt(at + place, 1 << random.below(8));
            let mut read = [0; BLOCK_BYTES];
            let found = store.read(block, &mut read);
            assert!(matches!(found, Err(ReadError::Corrupt { block: at }) if at == block), "{found:?}");
            let scrubbed = store.scrub(u64::MAX).unwrap();
            assert_eq!((scrubbed.corrupt, scrubbed.done), (vec![block], true));
            assert!(store.check().iter().any(|wrong| wrong.contains("corrupt")));
            let right = bytes(before[block as usize].unwrap());
            let wrong = bytes(1 << 40);
            assert!(matches!(store.repair(block, &wrong), Err(StoreError::NotThisBlock { .. })));
            store.repair(block, &right).unwrap();
            assert_eq!(store.scrub(u64::MAX).unwrap().corrupt, Vec::<u64>::new());
            if store.index.word(block).and_then(Word::position) != Some(at) {
                break;
            }
        }
    }
    assert_eq!(contents(&store), before);
    assert_eq!(store.check(), Vec::<String>::new());
}

#[test]
fn a_damaged_header_is_found_by_scrub_and_matters_no_more() {
    let mut headers = 0;
    for segment in 0..SHAPE.segments {
        let medium = SimulatedDisk::new();
        let mut store = with_a_past(&medium);
        if store.segments.live(segment).is_none() {
            continue;
        }
        let before = contents(&store);
        medium.corrupt(SHAPE.segment_at(segment) + 33, 4);
        headers += 1;
        let scrubbed = store.scrub(u64::MAX).unwrap();
        assert_eq!((scrubbed.damaged_records, scrubbed.corrupt), (1, vec![]), "segment {segment}");
        store.flush().unwrap();
        drop(store);
        assert_eq!(contents(&opened(&medium, SHAPE).unwrap()), before);
    }
    assert!(headers > 10);
}

#[test]
fn no_flipped_byte_lets_a_log_pass_for_an_older_state() {
    let first = SimulatedDisk::new();
    drop(with_a_past(&first));
    let end = first.length().unwrap();
    let (mut random, mut refused, mut whole) = (Seeded::new(8), 0, 0);
    for _ in 0..400 {
        let medium = SimulatedDisk::new();
        let store = with_a_past(&medium);
        let mut expected = contents(&store);
        expected[99] = Some(0);
        drop(store);
        // Headers and checkpoints are few bytes among many: half of the flips are in the first sectors.
        let sector = random.below(end / SECTOR_BYTES as u64);
        let at = sector * SECTOR_BYTES as u64 + random.below(SECTOR_BYTES as u64);
        medium.corrupt(at, 1 << random.below(8));
        match opened(&medium, SHAPE) {
            Ok(store) => {
                let found = contents(&store);
                let differ = found
                    .iter()
                    .zip(&expected)
                    .filter(|(found, expected)| found.is_some() && found != expected);
                assert_eq!(differ.count(), 0, "byte {at}");
                whole += 1;
            }
            Err(OpenError::Recovery(RecoveryError::Damaged { .. })) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(refused > 0 && whole > 200, "{refused} refused, {whole} whole");
}

#[test]
fn damage_to_the_last_commit_is_damage_once_that_is_covered() {
    let mut random = Seeded::new(11);
    for round in 0..40 {
        let medium = SimulatedDisk::new();
        let mut store = with_a_past(&medium);
        store.flush().unwrap();
        store.cover().unwrap();
        let before = contents(&store);
        let at = store.index.word(99).and_then(Word::position).unwrap();
        drop(store);
        // Within the block, or in the header before it.
        let place = if round % 4 == 0 { at - 1 - random.below(64) } else { at + random.below(4096) };
        medium.corrupt(place, 1 << random.below(8));
        let store = opened(&medium, SHAPE).unwrap();
        let mut expected = before;
        if place >= at {
            expected[99] = None;
        }
        assert_eq!(contents(&store), expected, "byte {place}, block at {at}");
    }
}

#[test]
fn corruption_survives_cleaning_as_corruption() {
    let medium = SimulatedDisk::new();
    let mut store = with_a_past(&medium);
    let at = store.index.word(98).and_then(Word::position).unwrap();
    medium.corrupt(at, 1);
    for turn in 0..300 {
        store.write(turn % 90, &bytes(turn)).unwrap();
        store.flush().unwrap();
    }
    store.evacuate(SHAPE.segment_of(at).unwrap()).unwrap();
    store.flush().unwrap();
    assert_ne!(store.index.word(98).and_then(Word::position), Some(at), "never cleaned");
    assert_eq!(store.scrub(u64::MAX).unwrap().corrupt, [98]);
    drop(store);
    assert_eq!(contents(&opened(&medium, SHAPE).unwrap())[98], None);
}

#[test]
fn a_full_disk_refuses_without_harm_and_goes_on_once_there_is_room() {
    let medium = SimulatedDisk::new();
    let shape = Geometry { blocks: 400, ..SHAPE };
    let mut store = created(&medium, shape);
    let written = (0..400).take_while(|block| store.write(*block, &bytes(*block)).is_ok()).count() as u64;
    assert!((200..400).contains(&written), "{written}");
    assert!(matches!(store.write(0, &bytes(1)), Err(StoreError::Full { .. })));
    assert_eq!(store.room_bytes(), 0);
    store.flush().unwrap();
    assert!(matches!(store.write(0, &bytes(1)), Err(StoreError::Full { .. })));
    assert_eq!(store.check(), Vec::<String>::new());
    for turn in 0..50 {
        store.discard(turn * 4..turn * 4 + 4).unwrap();
        store.flush().unwrap();
        for block in turn * 4..turn * 4 + 4 {
            store.write(block, &bytes(block)).unwrap();
        }
        store.flush().unwrap();
    }
    assert_eq!(store.check(), Vec::<String>::new());
    drop(store);
    assert_eq!(opened(&medium, shape).unwrap().check(), Vec::<String>::new());
}

#[test]
fn after_a_failed_sync_nothing_is_written_until_the_disk_is_opened_anew() {
    let medium = SimulatedDisk::new();
    let mut store = with_a_past(&medium);
    let before = contents(&store);
    medium.fail_syncs(true);
    assert!(matches!(store.flush(), Err(StoreError::Io { .. })));
    medium.fail_syncs(false);
    assert!(matches!(store.write(0, &bytes(1)), Err(StoreError::Broken)));
    assert!(matches!(store.flush(), Err(StoreError::Broken)));
    assert!(matches!(store.discard(0..1), Err(StoreError::Broken)));
    assert!(matches!(store.clean(1), Err(StoreError::Broken)));
    assert_eq!(contents(&store), before);
    drop(store);
    assert_eq!(contents(&opened(&medium, SHAPE).unwrap()), before, "the commit's record is whole");
}

#[test]
fn bytes_of_an_earlier_store_on_the_same_medium_are_not_taken_for_current() {
    let medium = SimulatedDisk::new();
    let mut store = created(&medium, SHAPE);
    store.write(3, &bytes(1)).unwrap();
    store.flush().unwrap();
    let (old, _, _) = store.into_parts();
    let mut log = vec![0; old.length().unwrap() as usize];
    old.read_at(0, &mut log).unwrap();
    let medium = SimulatedDisk::new();
    drop(created(&medium, SHAPE));
    // The new store's first record would go where the old one's lies.
    let at = SHAPE.segment_at(0) as usize;
    medium.write_at(at as u64, &[io::IoSlice::new(&log[at..])]).unwrap();
    assert!(record::decode(&log[at..]).is_some());
    assert_eq!(contents(&opened(&medium, SHAPE).unwrap()), vec![Some(0); 100]);
}

#[test]
fn digests_come_without_reading_and_headers_tell_where_the_store_stands() {
    let medium = SimulatedDisk::new();
    let mut store = created(&medium, SHAPE);
    store.write(3, &bytes(7)).unwrap();
    store.mark_missing(4..5).unwrap();
    medium.cut_power_after(0);
    assert_eq!(store.digest(3), Some(digest_of(&bytes(7))));
    assert_eq!(store.digest(5), Some(digest_of(&[0; BLOCK_BYTES])));
    assert_eq!((store.digest(4), store.digest(100)), (None, None));
    let told = store.index().header().unwrap();
    assert_eq!((told.sequence, told.commit, told.uncommitted, told.held_blocks), (2, 0, 2, 1));
    assert_eq!((store.identity(), store.commits(), store.geometry()), (IDENTITY, 0, SHAPE));
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let medium = SimulatedDisk::new();
    drop(created(&medium, SHAPE));
    let index = |blocks| Index::private(blocks).unwrap();
    let again = Store::create(medium.clone(), index(100), IDENTITY, SHAPE, Initial::Zeros, tuning());
    assert!(matches!(again, Err(OpenError::NotEmpty)));
    let other = Store::open(medium.clone(), index(100), [2; 16], tuning());
    assert!(matches!(other, Err(OpenError::OtherIdentity)));
    let small = Store::open(medium.clone(), index(99), IDENTITY, tuning());
    assert!(matches!(small, Err(OpenError::Index { blocks: 99 })));
    let empty = Store::open(SimulatedDisk::new(), index(100), IDENTITY, tuning());
    assert!(matches!(empty, Err(OpenError::Recovery(RecoveryError::NotAStore))));
    let mut store = opened(&medium, SHAPE).unwrap();
    assert!(matches!(store.write(99, &[0; 2 * BLOCK_BYTES]), Err(StoreError::OutOfRange { .. })));
    assert!(matches!(store.write(0, &[0; 5]), Err(StoreError::OutOfRange { .. })));
    assert!(matches!(store.discard(90..101), Err(StoreError::OutOfRange { .. })));
}

#[test]
fn a_state_that_was_harmed_or_contradicts_the_index_is_refused() {
    let medium = SimulatedDisk::new();
    let (log, index, state) = with_a_past(&medium).into_parts();
    let whole = state.to_bytes();
    for at in 0..whole.len() {
        let mut harmed = whole.clone();
        harmed[at] ^= 1;
        assert_eq!(State::from_bytes(&harmed), Err(StateError::Harmed));
        assert_eq!(State::from_bytes(&whole[..at]), Err(StateError::Harmed));
    }
    // A guest's VMM stored to the index: nothing panics, nothing outside the log is believed.
    for word in [2, 77 << 24, u64::MAX] {
        let before = index.entry(5).unwrap();
        index.set(5, Entry { word: Word(word), digest: 0 });
        let foreign = Index::private(100).unwrap();
        for block in 0..100 {
            foreign.set(block, index.entry(block).unwrap());
        }
        index.set(5, before);
        let reader = Reader::new(log.clone(), Index::private(100).unwrap(), SHAPE);
        reader.index().set(5, Entry { word: Word(word), digest: 0 });
        assert_eq!(reader.block(5, &mut [0; BLOCK_BYTES]).unwrap(), Found::Corrupt);
        let refused = Store::resume(log.clone(), foreign, IDENTITY, &state, tuning());
        assert!(matches!(refused, Err(OpenError::State(StateError::Contradiction { .. }))));
    }
    assert_eq!(Store::resume(log, index, IDENTITY, &state, tuning()).unwrap().check(), Vec::<String>::new());
}

#[test]
fn readers_never_see_a_torn_stale_or_foreign_block_while_the_writer_overwrites_and_cleans() {
    let medium = SimulatedDisk::new();
    let memory = Index::memory(SHAPE.blocks).unwrap();
    let index = Index::map(&memory, SHAPE.blocks, true).unwrap();
    let mut store = Store::create(medium.clone(), index, IDENTITY, SHAPE, Initial::Zeros, tuning()).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers = [1, 2].map(|seed| {
            let index = Index::map(&memory, SHAPE.blocks, false).unwrap();
            let reader = Reader::new(medium.clone(), index, SHAPE);
            let done = &done;
            scope.spawn(move || {
                let (mut random, mut reads) = (Seeded::new(seed), 0);
                let mut newest = vec![0; SHAPE.blocks as usize];
                let mut read = vec![0; 4 * BLOCK_BYTES];
                while !done.load(Ordering::Relaxed) {
                    let first = random.below(SHAPE.blocks - 3);
                    reader.read(first, &mut read).unwrap();
                    for (block, held) in (first..).zip(read.chunks_exact(BLOCK_BYTES)) {
                        let stamp = u64::from_le_bytes(held[..8].try_into().unwrap());
                        assert!(stamp == 0 || (stamp % 1000 == block && held == bytes(stamp)));
                        let newest = &mut newest[block as usize];
                        assert!(stamp >= *newest, "block {block} went back from {newest} to {stamp}");
                        *newest = stamp;
                        reads += 1;
                    }
                }
                reads
            })
        });
        let mut random = Seeded::new(9);
        for version in 1..4000 {
            let block = random.below(SHAPE.blocks);
            store.write(block, &bytes(version * 1000 + block)).unwrap();
            if version % 5 == 0 {
                store.flush().unwrap();
            }
        }
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            assert!(reader.join().unwrap() > 100);
        }
    });
    assert!(store.stats().cleaned_bytes > 0);
    assert_eq!(store.check(), Vec::<String>::new());
}

#[test]
fn what_is_missing_is_filled_with_what_is_expected_alone() {
    let medium = SimulatedDisk::new();
    let mut store = created(&medium, SHAPE);
    let (right, wrong) = (bytes(1), bytes(2));
    let known = |store: &Store<SimulatedDisk>, block| store.index.known(block);
    store.write(3, &right).unwrap();
    store.write(4, &right).unwrap();
    // One is held already under that digest, the other under another.
    store.leave_missing(&[(3, digest_of(&right)), (4, digest_of(&wrong)), (9, digest_of(&right))]).unwrap();
    assert_eq!(known(&store, 3), Known::Held(digest_of(&right)));
    assert_eq!(known(&store, 4), Known::Missing(Some(digest_of(&wrong))));
    assert_eq!(store.fill(4, &right).unwrap(), 0, "another's bytes");
    assert!(!store.expect(4, digest_of(&right)), "it is known");
    assert_eq!(store.fill(3, &[wrong, wrong].concat()).unwrap(), 1, "what is held stays");
    assert_eq!(known(&store, 4), Known::Held(digest_of(&wrong)));
    store.mark_missing(5..7).unwrap();
    assert_eq!(known(&store, 5), Known::Missing(None));
    assert!(store.expect(5, 77) && !store.expect(8, 77));
    assert!(!store.is_what_is_missing(5, 78) && store.is_what_is_missing(6, 78));
    store.flush().unwrap();
    assert_eq!(store.check(), Vec::<String>::new());
    // Expectations are gone with their writer; what is missing is not.
    let store = opened(&medium, SHAPE).unwrap();
    for block in [5, 6, 9] {
        assert_eq!(known(&store, block), Known::Missing(None), "block {block}");
    }
    assert!(matches!(
        opened(&medium, SHAPE).unwrap().leave_missing(&[(100, 1)]),
        Err(StoreError::OutOfRange { .. })
    ));
}

#[test]
fn a_creation_that_was_cut_short_leaves_a_blank() {
    let medium = SimulatedDisk::new();
    let store = created(&medium, SHAPE);
    drop(store);
    assert!(!Store::is_blank(&medium, &SHAPE).unwrap());
    // All but the superblock, which is written last.
    let cut = SimulatedDisk::new();
    let mut rest = vec![0; 64 << 10];
    medium.read_at(8192, &mut rest).unwrap();
    cut.write_at(8192, &[std::io::IoSlice::new(&rest)]).unwrap();
    assert!(Store::is_blank(&cut, &SHAPE).unwrap() && opened(&cut, SHAPE).is_err());
    let mut store = created(&cut, SHAPE);
    store.write(1, &bytes(1)).unwrap();
    store.flush().unwrap();
    assert_eq!(store.check(), Vec::<String>::new());
    assert_eq!(
        contents(&opened(&cut, SHAPE).unwrap())[1],
        Some(u64::from_le_bytes(bytes(1)[..8].try_into().unwrap()))
    );
}

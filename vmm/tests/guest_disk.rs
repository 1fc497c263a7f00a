//! The guest's file system on a simulated disk: what was synced is there after every crash, damage costs no more than
//! it must, and nothing on a disk can hurt the machine.

extern crate alloc;

#[path = "../../guest/src/fs/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fs;
mod kernel;
#[path = "../../guest/src/local.rs"]
#[allow(unsafe_code)]
mod local;

/// The log is kept for tests to look at.
#[macro_export]
macro_rules! log {
    ($($argument:tt)*) => { $crate::note(format!($($argument)*)) };
}

use std::{cell::RefCell, collections::BTreeMap, sync::MutexGuard};

use fs::{Base, FileError, Handle, Kind, OpenOptions};
use kernel::{
    disk::{self, BLOCK, Content},
    executor::{self, block_on, random},
    heap, memory, time, vid, virtio,
};

thread_local! {
    static LOG: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Keeps what the kernel said, for a test that fails.
pub fn note(line: String) {
    LOG.with_borrow_mut(|log| log.push(line));
}

fn logged(part: &str) -> bool {
    LOG.with_borrow(|log| log.iter().any(|line| line.contains(part)))
}

const IMAGE: [u8; 40_000] = {
    let mut bytes = [0; 40_000];
    let mut at = 0;
    while at < bytes.len() {
        bytes[at] = (at % 251) as u8;
        at += 1;
    }
    bytes
};
const OTHER_IMAGE: [u8; 30_000] = [0x5a; 30_000];

const BASE: [(&str, Base); 6] = [
    ("/bin", Base::Directory),
    ("/bin/big", Base::File(&IMAGE)),
    ("/bin/small", Base::File(b"small")),
    ("/bin/alias", Base::Link("big")),
    ("/share", Base::Directory),
    ("/share/text", Base::File(b"text")),
];

/// Boots a machine with the disk that is in.
fn boot() {
    boot_with(&BASE);
}

fn boot_with(base: &[(&'static str, Base)]) {
    let seed = random(1 << 40);
    executor::start();
    executor::seed(seed);
    fs::start("alice", 64 << 20, base.to_vec().into_iter());
    block_on(fs::ready());
}

/// A machine with a new disk of so many blocks.
fn machine(blocks: u64) -> MutexGuard<'static, ()> {
    let alone = kernel::alone();
    LOG.take();
    disk::attach(blocks, 1 << 20);
    boot();
    alone
}

/// Takes the power and boots anew.
fn crash() {
    let content = disk::crash();
    let blocks = disk::blocks();
    disk::attach_with(blocks, content);
    boot();
}

fn sync() {
    block_on(fs::sync_all()).unwrap();
}

#[track_caller]
fn all_is_well() {
    let wrong = block_on(fs::check(true));
    assert!(wrong.is_empty(), "{wrong:#?}");
}

const READ: OpenOptions =
    OpenOptions { create: false, exclusive: false, truncate: false, directory: false, no_follow: false };
const CREATE: OpenOptions = OpenOptions { create: true, ..READ };

fn read(path: &str) -> Result<Vec<u8>, FileError> {
    let handle = fs::open(path, READ)?;
    // A damaged disk may say anything of a file's length.
    let size = usize::try_from(handle.stat()?.size.min(64 << 20)).unwrap();
    let mut bytes = vec![0xee; size];
    let count = block_on(handle.read_at(0, &mut bytes))?;
    // What ends early has come to what cannot be read.
    if count < size { Err(FileError::Damaged) } else { Ok(bytes) }
}

fn write(path: &str, bytes: &[u8]) {
    let handle = fs::open(path, OpenOptions { truncate: true, ..CREATE }).unwrap();
    assert_eq!(block_on(handle.write_at(0, bytes)), Ok(bytes.len()), "{path}");
}

fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = std::iter::repeat_with(next).take(length.div_ceil(8)).flatten().collect();
    bytes.truncate(length);
    bytes
}

#[test]
fn what_was_synced_is_there_after_a_crash_and_identities_stay() {
    let _alone = machine(16_384);
    let long = pattern(3_000_000, 1);
    write("/home/alice/long", &long);
    fs::make_directory("/home/alice/d").unwrap();
    Handle::root().make_link("../long", "/home/alice/d/link").unwrap();
    let root = Handle::root();
    root.link("/home/alice/long", true, &root, "/home/alice/twin").unwrap();
    fs::open("/home/alice/long", READ).unwrap().set_mode(0o600).unwrap();
    let vid = fs::stat("/home/alice/long").unwrap().vid;
    sync();
    let facts = fs::stat("/home/alice/twin").unwrap();
    write("/home/alice/unsynced", b"x");
    all_is_well();
    crash();
    assert!(read("/home/alice/long").unwrap() == long);
    assert!(read("/home/alice/d/link").unwrap() == long);
    assert_eq!(fs::stat("/home/alice/twin").unwrap(), facts);
    assert_eq!((facts.vid, facts.links, facts.mode), (vid, 2, 0o600));
    assert_eq!(fs::stat("/home/alice/unsynced").unwrap_err(), FileError::NotFound);
    assert!(fs::open("/home/alice/n", CREATE).unwrap().stat().unwrap().vid > vid);
    all_is_well();
}

#[test]
fn what_nobody_syncs_is_written_before_long() {
    let _alone = machine(4096);
    write("/tmp/f", b"soon");
    // Only the clock is left to run.
    block_on(async { time::sleep_until(time::now() + std::time::Duration::from_secs(6)).await });
    executor::settle();
    crash();
    assert_eq!(read("/tmp/f").unwrap(), b"soon");
    all_is_well();
}

#[test]
fn an_idle_machine_does_nothing() {
    let _alone = machine(4096);
    sync();
    executor::settle();
    let before = disk::figures();
    // Nothing waits for a time: nothing is left that could run.
    assert!(executor::run(std::future::pending::<()>(), 1_000_000).is_none());
    assert_eq!(before, disk::figures());
    assert_eq!(block_on(fs::sync_all()), Ok(()));
    assert_eq!(before.flushes, disk::figures().flushes, "there was nothing to commit");
}

#[test]
fn the_image_lies_under_what_was_written_and_can_be_upgraded() {
    let _alone = machine(4096);
    let vid = fs::stat("/bin/small").unwrap().vid;
    let big = fs::open("/bin/big", READ).unwrap();
    block_on(big.write_at(20_000, b"here")).unwrap();
    let mut changed = IMAGE.to_vec();
    changed[20_000..20_004].copy_from_slice(b"here");
    fs::remove("/share/text").unwrap();
    fs::rename("/bin/alias", "/bin/other").unwrap();
    drop(big);
    sync();
    assert!(read("/bin/big").unwrap() == changed);
    all_is_well();
    crash();
    assert!(read("/bin/big").unwrap() == changed);
    assert_eq!(fs::stat("/share/text").unwrap_err(), FileError::NotFound);
    assert_eq!(fs::stat("/bin/alias").unwrap_err(), FileError::NotFound);
    assert_eq!(fs::stat("/bin/small").unwrap().vid, vid);
    all_is_well();
    sync();
    // Another image: what was changed stays as it is, the rest follows.
    let content = disk::crash();
    disk::attach_with(4096, content);
    let upgraded = [
        ("/bin", Base::Directory),
        ("/bin/big", Base::File(&OTHER_IMAGE)),
        ("/bin/small", Base::File(b"not so small")),
        ("/bin/new", Base::File(b"new")),
        ("/share", Base::Directory),
        ("/share/text", Base::File(b"other text")),
    ];
    boot_with(&upgraded);
    assert!(read("/bin/big").unwrap() == changed);
    assert_eq!(read("/bin/small").unwrap(), b"not so small");
    assert_eq!(fs::stat("/bin/small").unwrap().vid, vid);
    assert_eq!(read("/bin/new").unwrap(), b"new");
    assert_eq!(fs::stat("/share/text").unwrap_err(), FileError::NotFound);
    assert_eq!(fs::stat("/bin/other").unwrap_err(), FileError::NotFound, "the new image has no such link");
    all_is_well();
    sync();
    all_is_well();
    // And the old one again.
    crash();
    assert_eq!(read("/bin/small").unwrap(), b"small");
    assert_eq!(fs::stat("/bin/new").unwrap_err(), FileError::NotFound);
    assert!(read("/bin/big").unwrap() == changed);
    sync();
    all_is_well();
    crash();
    all_is_well();
}

#[test]
fn a_cut_file_of_the_image_keeps_what_is_left() {
    let _alone = machine(4096);
    let big = fs::open("/bin/big", READ).unwrap();
    block_on(big.truncate(10_001)).unwrap();
    sync();
    block_on(big.truncate(20_000)).unwrap();
    let mut expected = IMAGE[..10_001].to_vec();
    expected.resize(20_000, 0);
    assert!(read("/bin/big").unwrap() == expected);
    sync();
    drop(big);
    crash();
    assert!(read("/bin/big").unwrap() == expected);
    all_is_well();
}

#[test]
fn what_is_cached_has_a_bound_and_comes_back() {
    let _alone = machine(65_536);
    let bytes = pattern(48 << 20, 7);
    write("/tmp/big", &bytes);
    sync();
    let (cached, most) = fs::state().cached;
    assert!(cached <= most && most == 16 << 20, "{cached} of {most}");
    assert!(read("/tmp/big").unwrap() == bytes);
    let (cached, _) = fs::state().cached;
    assert!(cached <= most, "{cached} of {most}");
    let file = fs::open("/tmp/big", READ).unwrap();
    for _ in 0..500 {
        let at = random(48 << 20) as usize;
        let length = (random(9000) as usize).min(bytes.len() - at);
        let mut piece = vec![0; length];
        assert_eq!(block_on(file.read_at(at as u64, &mut piece)), Ok(length));
        assert!(piece == bytes[at..at + length]);
    }
    all_is_well();
}

#[test]
fn little_memory_slows_down_and_loses_nothing() {
    let _alone = machine(16_384);
    // The heap has room for next to nothing beyond what is kept for others.
    let bytes = pattern(2 << 20, 3);
    write("/tmp/f", &bytes);
    sync();
    memory::set_free_bytes(2 << 20);
    let file = fs::open("/tmp/f", READ).unwrap();
    assert_eq!(block_on(file.write_at(0, &[1; 100])), Ok(100), "in memory already");
    assert_eq!(block_on(file.write_at(3 << 20, &[1; 100])), Err(FileError::Full));
    memory::set_free_bytes(1 << 30);
    assert!(read("/tmp/f").unwrap()[100..] == bytes[100..]);
    all_is_well();
}

#[test]
fn a_block_that_cannot_be_read_costs_only_itself() {
    let _alone = machine(4096);
    let bytes = pattern(100_000, 4);
    write("/tmp/f", &bytes);
    sync();
    crash();
    let place =
        disk::content().into_iter().find(|(_, block)| block[..] == bytes[8 * BLOCK..9 * BLOCK]).unwrap().0;
    disk::set_bad(place, true);
    let file = fs::open("/tmp/f", READ).unwrap();
    let mut all = vec![0; 100_000];
    assert_eq!(block_on(file.read_at(0, &mut all)), Ok(8 * BLOCK));
    for _ in 0..2 {
        assert_eq!(block_on(file.read_at(8 * BLOCK as u64 + 5, &mut [0; 10])), Err(FileError::Damaged));
    }
    assert!(logged("/tmp/f: offset 32768 cannot be read"));
    assert_eq!(block_on(file.read_at(9 * BLOCK as u64, &mut all)), Ok(100_000 - 9 * BLOCK));
    assert!(all[..100_000 - 9 * BLOCK] == bytes[9 * BLOCK..]);
    let wrong = block_on(fs::check(true));
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert!(wrong[0].starts_with("/tmp/f: offset 32768"), "{wrong:?}");
    // What replaces it as a whole need not read it.
    assert_eq!(block_on(file.write_at(8 * BLOCK as u64 + 1, b"x")), Err(FileError::Damaged));
    assert_eq!(block_on(file.write_at(8 * BLOCK as u64, &[1; BLOCK])), Ok(BLOCK));
    assert_eq!(block_on(file.read_at(8 * BLOCK as u64, &mut [0; BLOCK])), Ok(BLOCK));
}

#[test]
fn a_disk_that_refuses_writes_is_told_and_left_alone() {
    let _alone = machine(4096);
    sync();
    disk::set_failing(Some(0));
    write("/tmp/f", b"x");
    assert_eq!(block_on(fs::sync_all()), Err(FileError::Damaged));
    disk::set_failing(None);
    sync();
    all_is_well();
    crash();
    assert_eq!(read("/tmp/f").unwrap(), b"x");
    disk::set_failing(Some(0));
    write("/tmp/g", b"y");
    for _ in 0..3 {
        assert!(block_on(fs::sync_all()).is_err());
    }
    assert_eq!(fs::make_directory("/tmp/d"), Err(FileError::ReadOnly));
    assert_eq!(read("/tmp/f").unwrap(), b"x");
    assert!(fs::state().read_only.is_some());
    disk::set_failing(None);
    assert!(fs::repair());
    sync();
    crash();
    assert_eq!(read("/tmp/g").unwrap(), b"y");
    all_is_well();
}

#[test]
fn a_commit_that_fails_halfway_is_made_again() {
    let _alone = machine(8192);
    for round in 0..60 {
        let file = fs::open("/tmp/f", CREATE).unwrap();
        let at = random(200_000);
        block_on(file.write_at(at, &pattern(30_000, round))).unwrap();
        if round % 7 == 3 {
            block_on(file.truncate(random(150_000))).unwrap();
        }
        let big = fs::open("/bin/big", READ).unwrap();
        if round == 20 {
            block_on(big.write_at(5, b"x")).unwrap();
        }
        disk::set_failing(Some(random(12)));
        let first = block_on(fs::sync_all());
        disk::set_failing(None);
        let expected = read("/tmp/f").unwrap();
        sync();
        assert!(read("/tmp/f").unwrap() == expected, "round {round}, {first:?}");
        all_is_well();
        drop((file, big));
        crash();
        assert!(read("/tmp/f").unwrap() == expected, "round {round}, {first:?}");
        all_is_well();
    }
}

#[test]
fn a_full_disk_says_so_and_can_be_emptied() {
    let _alone = machine(2048);
    let file = fs::open("/tmp/fill", CREATE).unwrap();
    let mut written = 0;
    let error = loop {
        match block_on(file.append(&pattern(100_000, written as u64))) {
            Ok((_, count)) => written += count,
            Err(error) => break error,
        }
    };
    assert_eq!(error, FileError::Full);
    assert!(written > 7 << 20, "{written}");
    sync();
    all_is_well();
    // What is there can be changed, and renamed, and goes on being there.
    assert_eq!(block_on(file.write_at(5, b"changed")), Ok(7));
    fs::rename("/tmp/fill", "/tmp/full").unwrap();
    let mut made = 0;
    while fs::make_directory(&format!("/tmp/d{made}")).is_ok() {
        made += 1;
        assert!(made < 10_000, "there is an end to it");
    }
    assert_eq!(fs::make_directory("/tmp/more"), Err(FileError::Full));
    sync();
    all_is_well();
    crash();
    drop(file);
    assert_eq!(read("/tmp/full").unwrap().len(), written);
    assert_eq!(&read("/tmp/full").unwrap()[5..12], b"changed");
    for number in 0..made {
        fs::remove(&format!("/tmp/d{number}")).unwrap();
    }
    let (used, _) = fs::usage();
    let file = fs::open("/tmp/full", READ).unwrap();
    block_on(file.truncate(1 << 20)).unwrap();
    assert!(fs::usage().0 + (6 << 20) < used);
    // At once, although what was freed is not to be used before a commit.
    assert_eq!(block_on(file.write_at(1 << 20, &pattern(5 << 20, 9))), Ok(5 << 20));
    fs::remove("/tmp/full").unwrap();
    drop(file);
    sync();
    all_is_well();
    assert!(fs::usage().0 < 1 << 20, "{:?}", fs::usage());
    assert!(disk::figures().discarded > 1000);
}

#[test]
fn holes_cost_nothing_and_stay_holes() {
    let _alone = machine(4096);
    let file = fs::open("/tmp/hole", CREATE).unwrap();
    let (used, _) = fs::usage();
    block_on(file.write_at(1 << 39, b"end")).unwrap();
    block_on(file.write_at(1 << 30, b"middle")).unwrap();
    assert_eq!(fs::usage().0 - used, 2 * BLOCK as u64);
    sync();
    drop(file);
    crash();
    let file = fs::open("/tmp/hole", READ).unwrap();
    assert_eq!(file.stat().unwrap().size, (1 << 39) + 3);
    let mut bytes = [1; 8];
    assert_eq!(block_on(file.read_at((1 << 39) - 4, &mut bytes)), Ok(7));
    assert_eq!(bytes, [0, 0, 0, 0, b'e', b'n', b'd', 1]);
    assert_eq!(block_on(file.read_at((1 << 30) - 1, &mut bytes[..7])), Ok(7));
    assert_eq!(&bytes[..7], b"\0middle");
    all_is_well();
}

#[test]
fn a_file_that_lost_its_name_is_gone_after_a_crash_and_whole_before() {
    let _alone = machine(16_384);
    let (used, _) = fs::usage();
    let bytes = pattern(9 << 20, 5);
    write("/tmp/f", &bytes);
    let file = fs::open("/tmp/f", READ).unwrap();
    fs::remove("/tmp/f").unwrap();
    sync();
    block_on(file.write_at(9 << 20, &bytes)).unwrap();
    sync();
    let mut piece = vec![0; 1000];
    block_on(file.read_at((9 << 20) + 777, &mut piece)).unwrap();
    assert!(piece == bytes[777..1777]);
    all_is_well();
    std::mem::forget(file);
    crash();
    assert!(fs::usage().0 <= used + (64 << 10), "{used} {:?}", fs::usage());
    all_is_well();
}

/// A machine whose disk has some of everything, synced and taken out.
fn furnished() -> Content {
    for directory in 0..5 {
        fs::make_directory(&format!("/home/alice/d{directory}")).unwrap();
        for file in 0..60u64 {
            write(&format!("/home/alice/d{directory}/f{file}"), &pattern(random(9000) as usize, file));
        }
    }
    let scattered = fs::open("/home/alice/scattered", CREATE).unwrap();
    for piece in 0..200 {
        block_on(scattered.write_at(piece * 3 * BLOCK as u64, b"here")).unwrap();
    }
    let big = fs::open("/bin/big", READ).unwrap();
    block_on(big.write_at(7, b"changed")).unwrap();
    fs::remove("/bin/small").unwrap();
    Handle::root().make_link("d0/f0", "/home/alice/link").unwrap();
    drop((scattered, big));
    sync();
    disk::crash()
}

/// Indices and paths of all files.
fn files() -> Vec<(u64, String)> {
    let rows = fs::rows(0, usize::MAX).into_iter();
    let files = rows.filter(|row| row.facts.kind == Kind::File);
    files.filter_map(|row| Some((row.facts.vid.index(), row.path?))).collect()
}

/// What all files hold, by their indices, and their names.
fn contents() -> BTreeMap<u64, (String, Result<Vec<u8>, FileError>)> {
    let name = |path: &str| path.rsplit('/').next().unwrap().to_owned();
    files().into_iter().map(|(index, path)| (index, (name(&path), read(&path)))).collect()
}

#[test]
fn every_metadata_block_can_lose_any_bit() {
    let _alone = machine(16_384);
    let whole = furnished();
    let before = contents();
    let records: Vec<u64> = whole
        .iter()
        .filter(|(at, block)| **at < 2 || block.starts_with(b"kmet"))
        .map(|(at, _)| *at)
        .collect();
    assert!(records.len() >= 10, "{}", records.len());
    let (mut lost, mut tried) = (0, 0);
    for &block in &records {
        for _ in 0..24 {
            let mut content = whole.clone();
            let at = if random(4) == 0 { random(64) } else { random(BLOCK as u64) } as usize;
            content.get_mut(&block).unwrap()[at] ^= 1 << random(8);
            disk::attach_with(16_384, content);
            LOG.take();
            boot();
            tried += 1;
            let now = contents();
            if block < 2 {
                assert_eq!(fs::state().read_only, None);
                assert!(now == before, "the other copy has it all");
                continue;
            }
            assert!(fs::state().read_only.is_some(), "block {block}, byte {at}");
            assert_eq!(fs::make_directory("/tmp/x"), Err(FileError::ReadOnly));
            // Whatever is found is as it was, or is read as damaged: never something else of the same name.
            let same = now.iter().filter(|(index, file)| before.get(*index) == Some(*file)).count();
            for (index, (name, bytes)) in &now {
                // One of the image's whose inode is lost is there anew.
                assert!(bytes.is_err() || before.get(index).is_none_or(|(_, was)| was == bytes), "{name}");
            }
            lost += before.len() - same;
            assert!(same + 60 > before.len(), "block {block}: {same} of {} are left", before.len());
            assert!(!block_on(fs::check(false)).is_empty());
        }
        // A repair makes the best of what is left.
        let mut content = whole.clone();
        content.get_mut(&block).unwrap()[100] ^= 1;
        disk::attach_with(16_384, content);
        boot();
        assert!(fs::repair());
        sync();
        all_is_well();
        write("/tmp/after", b"works");
        sync();
        crash();
        assert_eq!(fs::state().read_only, None);
        assert_eq!(read("/tmp/after").unwrap(), b"works");
        all_is_well();
    }
    println!(
        "{tried} flips in {} blocks; {lost} files lost in all, of {} each time",
        records.len(),
        before.len()
    );
}

#[test]
fn no_disk_harms_the_machine() {
    let _alone = machine(4096);
    let whole = furnished();
    let records: Vec<u64> = whole.keys().copied().filter(|at| whole[at].starts_with(b"kmet")).collect();
    for round in 0..400u64 {
        let mut content = whole.clone();
        match round % 4 {
            // Nothing but noise.
            0 => content = (0..64).map(|at| (at, pattern(BLOCK, round * 64 + at))).collect(),
            // Noise in metadata that says it is whole.
            1 | 2 => {
                for _ in 0..1 + random(40) {
                    let at = records[random(records.len() as u64) as usize];
                    let block = content.get_mut(&at).unwrap();
                    for _ in 0..1 + random(8) {
                        let place =
                            if random(2) == 0 { random(BLOCK as u64) } else { 32 + random(200) } as usize;
                        block[place] = random(256) as u8;
                    }
                    reseal(block);
                }
            }
            // A superblock that says anything.
            _ => {
                for at in 0..2 {
                    let block = content.get_mut(&at).unwrap();
                    for _ in 0..1 + random(4) {
                        let place = if random(2) == 0 { 16 + random(60) } else { 256 + random(40) } as usize;
                        block[place] = random(256) as u8;
                    }
                    reseal(block);
                }
            }
        }
        disk::attach_with(4096, content);
        LOG.take();
        boot();
        use_it(round);
        if fs::repair() {
            use_it(round);
            let _ = block_on(fs::sync_all());
        }
        let content = disk::crash();
        disk::attach_with(4096, content);
        boot();
        use_it(round);
    }
}

/// Makes a block's checksum right.
fn reseal(block: &mut [u8]) {
    let seed = block[..8].iter().fold(0, |seed: u64, &byte| seed << 8 | u64::from(byte));
    let sum = twox_hash::XxHash64::oneshot(seed, &block[16..]);
    block[8..16].copy_from_slice(&sum.to_le_bytes());
}

/// Does some of everything, without minding how it goes.
fn use_it(round: u64) {
    for (_, path) in files().into_iter().take(40) {
        if let Ok(file) = fs::open(&path, READ) {
            let _ = block_on(file.read_at(random(9000), &mut [0; 9000]));
            let _ = block_on(file.write_at(random(20_000), &pattern(random(9000) as usize, round)));
            let _ = block_on(file.truncate(random(20_000)));
        }
        if random(4) == 0 {
            let _ = fs::remove(&path);
        }
    }
    let _ = fs::rename("/home/alice", "/home/bob");
    let _ = fs::make_directory("/home/alice");
    let _ = fs::open("/lost+found", READ).map(|found| found.entries(0, |_| true));
    let _ = block_on(fs::check(true));
    let _ = block_on(fs::sync_all());
}

#[test]
fn newer_disks_are_left_alone() {
    let _alone = machine(4096);
    let whole = furnished();
    for (at, value, reason) in [(16, 9u8, "newer"), (20, 1, "unknown features"), (24, 1, "only reads")] {
        let mut content = whole.clone();
        for block in 0..2 {
            let block = content.get_mut(&block).unwrap();
            block[at] = value;
            reseal(block);
        }
        disk::attach_with(4096, content.clone());
        boot();
        let said = fs::state().read_only.unwrap();
        assert!(said.contains(reason), "{said}");
        assert_eq!(fs::stat("/home/alice/d0/f0").is_ok(), at == 24);
        assert_eq!(fs::make_directory("/x"), Err(FileError::ReadOnly));
        block_on(async { time::sleep_until(time::now() + std::time::Duration::from_secs(60)).await });
        assert!(disk::content() == content);
    }
    // A shorter disk, and one that has grown.
    disk::attach_with(2048, whole.clone().into_iter().filter(|(at, _)| *at < 2048).collect());
    boot();
    assert!(fs::state().read_only.unwrap().contains("fewer"));
    disk::attach_with(6000, whole);
    boot();
    assert_eq!(fs::usage().1, 6000 * BLOCK as u64);
    write("/tmp/more", &pattern(10 << 20, 1));
    sync();
    crash();
    all_is_well();
    assert_eq!(fs::stat("/tmp/more").unwrap().size, 10 << 20);
}

/// What a test does to the machine and to the model.
#[derive(Clone, Debug)]
enum Entry {
    Directory,
    File(Vec<u8>),
}

/// All there is below `/m`, by path.
type Model = BTreeMap<String, Entry>;

fn below<'a>(model: &'a Model, path: &str) -> Vec<&'a String> {
    let start = format!("{path}/");
    model.keys().filter(|other| other.starts_with(&start)).collect()
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').unwrap().0
}

/// Does something at random, to both; a file's reader and writer may be held open across steps.
fn random_step(model: &mut Model, open: &mut Vec<(Handle, String)>) {
    let part = || ["a", "b", "c"][random(3) as usize];
    let path = match random(3) {
        0 => format!("/m/{}", part()),
        1 => format!("/m/{}/{}", part(), part()),
        _ => format!("/m/{}/{}/{}", part(), part(), part()),
    };
    let in_directory = parent(&path) == "/m" || matches!(model.get(parent(&path)), Some(Entry::Directory));
    match random(16) {
        0..=6 => {
            let file = match fs::open(&path, CREATE) {
                Ok(file) => file,
                Err(_) => {
                    assert!(!in_directory || matches!(model.get(&path), Some(Entry::Directory)), "{path}");
                    return;
                }
            };
            let bytes = pattern(
                [random(300), random(20_000), random(200_000)][random(3) as usize] as usize,
                random(1 << 30),
            );
            let at = [0, random(400), random(70_000), 4096 * random(30)][random(4) as usize] as usize;
            let entry = model.entry(path.clone()).or_insert_with(|| Entry::File(Vec::new()));
            let Entry::File(content) = entry else { panic!("{path} is a directory") };
            assert_eq!(block_on(file.write_at(at as u64, &bytes)), Ok(bytes.len()));
            if !bytes.is_empty() {
                content.resize(content.len().max(at + bytes.len()), 0);
                content[at..at + bytes.len()].copy_from_slice(&bytes);
            }
            if random(8) == 0 {
                open.push((file, path));
            }
        }
        7 | 8 => {
            let Some(Entry::File(content)) = model.get_mut(&path) else { return };
            let length = [random(100_000), random(content.len() as u64 + 1), 0][random(3) as usize];
            let file = fs::open(&path, READ).unwrap();
            block_on(file.truncate(length)).unwrap();
            content.resize(length as usize, 0);
        }
        9 | 10 => {
            if fs::make_directory(&path).is_ok() {
                assert!(in_directory && model.insert(path, Entry::Directory).is_none());
            }
        }
        11 | 12 => match model.get(&path) {
            None => assert!(fs::remove(&path).is_err()),
            Some(Entry::Directory) if !below(model, &path).is_empty() => {
                assert_eq!(fs::remove(&path), Err(FileError::NotEmpty));
            }
            Some(_) => {
                fs::remove(&path).unwrap();
                model.remove(&path);
                open.retain(|(_, other)| *other != path);
            }
        },
        13 => {
            let to = format!("/m/{}", part());
            if fs::rename(&path, &to).is_ok() && path != to {
                let moved: Vec<String> = below(model, &path).into_iter().cloned().collect();
                let entry = model.remove(&path).expect("what was renamed was there");
                model.insert(to.clone(), entry);
                for old in moved {
                    let entry = model.remove(&old).unwrap();
                    model.insert(format!("{to}{}", &old[path.len()..]), entry);
                }
                open.clear();
            }
        }
        14 => {
            if !open.is_empty() {
                let (file, path) = open.swap_remove(random(open.len() as u64) as usize);
                let Some(Entry::File(content)) = model.get_mut(&path) else { return };
                let bytes = pattern(random(5000) as usize, random(1 << 30));
                assert_eq!(block_on(file.append(&bytes)), Ok((content.len() as u64, bytes.len())));
                content.extend_from_slice(&bytes);
            }
        }
        _ => {
            // Commits get on with their work, as far as they come.
            let _ = executor::run(std::future::pending::<()>(), 1 + random(6) as usize);
        }
    }
}

fn compare(model: &Model, when: &str) {
    let rows = fs::rows(0, usize::MAX);
    let mut paths: Vec<String> =
        rows.into_iter().filter_map(|row| row.path).filter(|path| path.starts_with("/m/")).collect();
    paths.sort();
    assert_eq!(paths, model.keys().cloned().collect::<Vec<_>>(), "{when}");
    for (path, entry) in model {
        match entry {
            Entry::Directory => assert_eq!(fs::stat(path).unwrap().kind, Kind::Directory, "{when}: {path}"),
            Entry::File(bytes) => {
                let real = read(path).unwrap();
                let differs = real.iter().zip(bytes).position(|(real, wanted)| real != wanted);
                assert!(
                    real == *bytes,
                    "{when}: {path}: {} and {} bytes, {differs:?}",
                    real.len(),
                    bytes.len()
                );
            }
        }
    }
}

/// A run of a machine through crashes: after each, everything is as it was at one instant at or behind the last sync.
fn live_through(seed: u64, crashes: usize) -> usize {
    disk::attach(4096, 64);
    executor::seed(seed);
    boot();
    fs::make_directory("/m").unwrap();
    sync();
    let mut model = Model::new();
    let mut later = 0;
    for crashed in 0..crashes {
        let mut open = Vec::new();
        // States since the last sync, the synced one first: a crash may leave any of them.
        let mut states = vec![model.clone()];
        for _ in 0..5 + random(60) {
            random_step(&mut model, &mut open);
            states.push(model.clone());
            if random(12) == 0 {
                sync();
                states = vec![model.clone()];
            } else if random(12) == 0 {
                // One that is asked for and interrupted.
                let _ = executor::run(fs::sync_all(), 1 + random(20) as usize);
            }
        }
        if random(3) == 0 {
            let wrong = block_on(fs::check(false));
            assert!(wrong.is_empty(), "seed {seed}, before crash {crashed}: {wrong:#?}");
            compare(&model, &format!("seed {seed}, before crash {crashed}"));
        }
        open.into_iter().for_each(std::mem::forget);
        crash();
        assert_eq!(fs::state().read_only, None, "seed {seed}, crash {crashed}: {:?}", LOG.take());
        let wrong = block_on(fs::check(true));
        assert!(wrong.is_empty(), "seed {seed}, crash {crashed}: {wrong:#?}");
        let found = states.iter().rposition(|state| {
            let rows = fs::rows(0, usize::MAX).into_iter();
            let count =
                rows.filter(|row| row.path.as_ref().is_some_and(|path| path.starts_with("/m/"))).count();
            count == state.len()
                && state.iter().all(|(path, entry)| match entry {
                    Entry::Directory => fs::stat(path).is_ok_and(|facts| facts.kind == Kind::Directory),
                    Entry::File(bytes) => read(path).is_ok_and(|real| real == *bytes),
                })
        });
        let Some(found) = found else {
            compare(&states[0], &format!("seed {seed}, crash {crashed}, as of the last sync"));
            panic!("seed {seed}, crash {crashed}: the files are as they never were");
        };
        later += usize::from(found > 0);
        model = states.swap_remove(found);
    }
    later
}

#[test]
fn after_every_crash_files_are_as_they_were_at_one_instant() {
    let _alone = machine(4096);
    let mut later = 0;
    for seed in 1..=60 {
        later += live_through(seed, 10);
    }
    println!("600 crashes; {later} left more than the last sync had");
    assert!(later > 50, "commits that nobody asked for are tried too: {later}");
}

#[test]
fn a_disk_with_more_metadata_than_memory_is_not_used() {
    let _alone = machine(16_384);
    let whole = furnished();
    disk::attach_with(16_384, whole.clone());
    memory::set_free_bytes(3 << 20);
    boot();
    let said = fs::state().read_only.unwrap();
    assert!(said.contains("memory"), "{said}");
    assert!(disk::content() == whole);
    memory::set_free_bytes(1 << 30);
    boot();
    assert_eq!(fs::state().read_only, None);
    all_is_well();
}

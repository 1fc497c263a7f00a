//! Measures the store beside a plain file on the same file system, under the same sync rule.
//!
//! `cargo run --release -p kage-disk --example figures [DIRECTORY [files|cleaning|opening]]`; writes some
//! 20 GiB in turn, takes two minutes, leaves nothing. Rates are the median of five rounds in which store and file take turns.

use std::{
    error::Error,
    fs::{File, OpenOptions, remove_file},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use kage_disk::{BLOCK_BYTES, Geometry, Index, Initial, Seeded, Store, Tuning};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const MIB: usize = 1 << 20;
const IDENTITY: [u8; 16] = [7; 16];
const ROUNDS: usize = 5;

fn noise(bytes: usize) -> Vec<u8> {
    let mut random = Seeded::new(1);
    (0..bytes / 8).flat_map(|_| random.next_number().to_le_bytes()).collect()
}

fn file(path: &Path) -> Outcome<File> {
    Ok(OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?)
}

fn store(path: &Path, geometry: Geometry) -> Outcome<Store<File>> {
    let index = Index::map(Index::memory(geometry.blocks)?, geometry.blocks, true)?;
    Ok(Store::create(file(path)?, index, IDENTITY, geometry, Initial::Zeros, Tuning::default())?)
}

fn geometry(disk_bytes: usize) -> Outcome<Geometry> {
    let blocks = (disk_bytes / BLOCK_BYTES) as u64;
    // Room for a second version of everything, as some loads overwrite the whole disk without a flush.
    Ok(Geometry::new(blocks, Geometry::log_bytes_for(blocks) * 2)?)
}

/// A disk that both store and plain file are.
trait Disk {
    fn put(&mut self, at: usize, bytes: &[u8]) -> Outcome;
    fn get(&mut self, at: usize, into: &mut [u8]) -> Outcome;
    fn sync(&mut self) -> Outcome;
}

impl Disk for File {
    fn put(&mut self, at: usize, bytes: &[u8]) -> Outcome {
        Ok(self.write_all_at(bytes, at as u64)?)
    }

    fn get(&mut self, at: usize, into: &mut [u8]) -> Outcome {
        Ok(self.read_exact_at(into, at as u64)?)
    }

    fn sync(&mut self) -> Outcome {
        Ok(self.sync_data()?)
    }
}

impl Disk for Store<File> {
    fn put(&mut self, at: usize, bytes: &[u8]) -> Outcome {
        Ok(self.write((at / BLOCK_BYTES) as u64, bytes)?)
    }

    fn get(&mut self, at: usize, into: &mut [u8]) -> Outcome {
        Ok(self.read((at / BLOCK_BYTES) as u64, into)?)
    }

    fn sync(&mut self) -> Outcome {
        Ok(self.flush()?)
    }
}

/// One way of using a disk.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    piece: usize,
    count: usize,
    random: bool,
    sync_each: bool,
    /// Onto a disk that is full already.
    filled: bool,
    read: bool,
}

const DISK: usize = 256 * MIB;

fn run(disk: &mut dyn Disk, load: Load, round: usize) -> Outcome<Duration> {
    let bytes = noise(MIB);
    if load.filled {
        for at in (0..DISK).step_by(MIB) {
            disk.put(at, &bytes)?;
        }
    }
    disk.sync()?;
    let mut random = Seeded::new(round as u64);
    let mut into = vec![0; load.piece];
    let begin = Instant::now();
    for turn in 0..load.count {
        let place = if load.random { random.below((DISK / load.piece) as u64) as usize } else { turn };
        let at = place * load.piece % DISK;
        if load.read {
            disk.get(at, &mut into)?;
        } else {
            disk.put(at, &bytes[..load.piece])?;
        }
        if load.sync_each {
            disk.sync()?;
        }
    }
    Ok(begin.elapsed())
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

fn beside_a_file(directory: &Path) -> Outcome {
    let load = Load {
        name: "",
        piece: MIB,
        count: 256,
        random: false,
        sync_each: false,
        filled: false,
        read: false,
    };
    let small = Load { piece: BLOCK_BYTES, count: 65536, ..load };
    let loads = [
        Load { name: "write 1 MiB sequential, new disk", ..load },
        Load { name: "write 1 MiB sequential, over old", filled: true, ..load },
        Load {
            name: "write 128 KiB sequential, over old",
            piece: MIB / 8,
            count: 2048,
            filled: true,
            ..load
        },
        Load { name: "write 4 KiB sequential, over old", filled: true, ..small },
        Load { name: "write 4 KiB random, over old", random: true, filled: true, ..small },
        Load {
            name: "write 1 MiB sequential, each synced",
            sync_each: true,
            count: 100,
            filled: true,
            ..load
        },
        Load {
            name: "write 4 KiB random, each synced",
            count: 1000,
            sync_each: true,
            random: true,
            filled: true,
            ..small
        },
        Load { name: "write 4 KiB sequential, each synced, new", count: 1000, sync_each: true, ..small },
        Load { name: "read 1 MiB sequential", filled: true, read: true, ..load },
        Load { name: "read 4 KiB random", random: true, filled: true, read: true, ..small },
    ];
    println!("{:42} {:>10} {:>10} {:>6}", "MB/s, median of 5", "store", "file", "ratio");
    for load in loads {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let (log, plain) = (directory.join("figures.log"), directory.join("figures.plain"));
            theirs.push(run(&mut file(&plain)?, load, round)?);
            remove_file(&plain)?;
            ours.push(run(&mut store(&log, geometry(DISK)?)?, load, round)?);
            remove_file(&log)?;
        }
        let rate = |seconds: f64| (load.count * load.piece) as f64 / 1e6 / seconds;
        let (ours, theirs) = (rate(median(ours)), rate(median(theirs)));
        println!("{:42} {ours:>10.1} {theirs:>10.1} {:>5.0}%", load.name, ours / theirs * 100.0);
    }
    Ok(())
}

/// Overwriting single blocks of a disk whose blocks take a share of its log.
struct Overwrites {
    percent: usize,
    /// Blocks written in one call, and so in one record.
    batch: usize,
    /// Nine in ten writes go to a tenth of the disk.
    hot: bool,
}

fn amplification(directory: &Path, load: &Overwrites) -> Outcome {
    let path = directory.join("figures.log");
    let log = 512 * MIB;
    let blocks = log * load.percent / 100 / BLOCK_BYTES;
    let geometry = Geometry::new(blocks as u64, log as u64)?;
    // Cleans only when the log is full: the cost of fullness, not of the allowance.
    let tuning = Tuning { log_slack_bytes: u64::MAX / 2, ..Tuning::default() };
    let index = Index::map(Index::memory(geometry.blocks)?, geometry.blocks, true)?;
    let mut store = Store::create(file(&path)?, index, IDENTITY, geometry, Initial::Zeros, tuning)?;
    let bytes = noise(MIB);
    for block in (0..blocks / 256 * 256).step_by(256) {
        store.write(block as u64, &bytes)?;
        if block % 4096 == 0 {
            store.flush()?;
        }
    }
    let mut random = Seeded::new(2);
    let piece: &[u8; BLOCK_BYTES] = bytes.first_chunk().ok_or("no block")?;
    let mut overwrite = |store: &mut Store<File>, count: usize| -> Outcome {
        for turn in 0..count / load.batch {
            let mut draw = || {
                let span = if load.hot && random.below(10) > 0 { blocks / 10 } else { blocks };
                (random.below(span as u64), piece)
            };
            let batch = (0..load.batch).map(|_| draw()).collect::<Vec<_>>();
            store.write_scattered(&batch)?;
            if turn % (1024 / load.batch) == 0 {
                store.flush()?;
            }
        }
        Ok(store.flush()?)
    };
    overwrite(&mut store, blocks * 2)?;
    let (before, begin) = (store.stats(), Instant::now());
    overwrite(&mut store, blocks * 2)?;
    let (after, taken) = (store.stats(), begin.elapsed());
    let user = (after.user_bytes - before.user_bytes) as f64;
    let share = |before: u64, after: u64| (after - before) as f64 / user;
    println!(
        "{} % full, {} 4 KiB overwrites, {} a record, flush per 4 MiB: log {:.2} of what was written, \
         of it cleaning {:.2}; checkpoints {:.3}; {:.0} MB/s",
        load.percent,
        if load.hot { "90/10 random" } else { "random" },
        load.batch,
        share(before.log_bytes, after.log_bytes),
        share(before.cleaned_bytes, after.cleaned_bytes),
        share(before.checkpoint_bytes, after.checkpoint_bytes),
        user / 1e6 / taken.as_secs_f64(),
    );
    drop(store);
    Ok(remove_file(&path)?)
}

fn opening(directory: &Path) -> Outcome {
    let path = directory.join("figures.log");
    let shape = geometry(1024 * MIB)?;
    let mut disk = store(&path, shape)?;
    let bytes = noise(MIB);
    for block in (0..shape.blocks).step_by(256) {
        disk.write(block, &bytes)?;
    }
    disk.flush()?;
    // As bad as it gets: 60 MiB of single blocks behind the last checkpoint.
    let mut random = Seeded::new(3);
    for _ in 0..2 * 32 * MIB / 4608 - 2000 {
        disk.write(random.below(shape.blocks), &bytes[..BLOCK_BYTES])?;
    }
    disk.flush()?;
    let begin = Instant::now();
    let (log, index, state) = disk.into_parts();
    let state = state.to_bytes();
    let given = begin.elapsed();
    let begin = Instant::now();
    let disk =
        Store::resume(log, index, IDENTITY, &kage_disk::State::from_bytes(&state)?, Tuning::default())?;
    let resumed = begin.elapsed();
    drop(disk);
    let mut opened = Vec::new();
    for _ in 0..ROUNDS {
        let index = Index::map(Index::memory(shape.blocks)?, shape.blocks, true)?;
        let log = OpenOptions::new().read(true).write(true).open(&path)?;
        let begin = Instant::now();
        let disk = Store::open(log, index, IDENTITY, Tuning::default())?;
        opened.push(begin.elapsed());
        drop(disk);
    }
    println!(
        "1 GiB disk, all written: open {:.1} ms; handover: give {given:.1?}, take {resumed:.1?}, {} bytes",
        median(opened) * 1e3,
        state.len()
    );
    let begin = Instant::now();
    let fresh = directory.join("figures.new");
    let index = Index::map(Index::memory(shape.blocks)?, shape.blocks, true)?;
    let disk = Store::create(file(&fresh)?, index, IDENTITY, shape, Initial::Missing, Tuning::default())?;
    println!("1 GiB disk, all missing: create {:.1?}", begin.elapsed());
    drop(disk);
    remove_file(&fresh)?;
    Ok(remove_file(&path)?)
}

fn main() -> Outcome {
    let directory = std::env::args_os().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let only = std::env::args().nth(2);
    let wanted = |part: &str| only.as_ref().is_none_or(|only| only == part);
    if wanted("files") {
        beside_a_file(&directory)?;
    }
    if wanted("cleaning") {
        for percent in [50, 67, 80] {
            amplification(&directory, &Overwrites { percent, batch: 1, hot: false })?;
            amplification(&directory, &Overwrites { percent, batch: 32, hot: false })?;
            amplification(&directory, &Overwrites { percent, batch: 32, hot: true })?;
        }
    }
    if wanted("opening") {
        opening(&directory)?;
    }
    Ok(())
}

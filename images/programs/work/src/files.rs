//! Work to measure file systems with: the same source runs in a process of a machine and natively on its host.
//!
//! Loads on one file read and write pieces of it, from front to back or in an order that looks random; what a read
//! finds depends on the writes alone, so that both sides can be compared. [`append`] is for crashes: what it has told is
//! on the disk, and [`verify`] says whether it is there.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use crate::Numbers;

/// When a load has what it wrote made safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// Never; a read, or a write that is as good as nothing after a crash.
    Never,
    /// Once, at the end, within the time that is taken.
    AtEnd,
    /// After so many pieces, and at the end.
    Every(u32),
}

/// What is done to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Each piece is read.
    Read,
    /// Each piece is written over what was there.
    Write,
    /// The same, into a file that was just made.
    WriteNew,
}

/// A way of using a file.
#[derive(Clone, Copy, Debug)]
pub struct FileLoad {
    /// What it is called.
    pub name: &'static str,
    /// Bytes read or written at once.
    pub piece_bytes: usize,
    /// Pieces, unless told otherwise.
    pub pieces: u32,
    /// In an order that looks random.
    pub random: bool,
    /// What is done.
    pub access: Access,
    /// When it is made safe.
    pub sync: Sync,
}

/// Bytes of the file.
pub const FILE_BYTES: usize = 128 * MIB;
/// Small files made and removed.
pub const SMALL_FILES: u32 = 10_000;

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;
/// Bytes of a small file.
const SMALL_BYTES: usize = 1000;
/// Small files of a directory.
const DIRECTORY: u32 = 500;

const LARGE: FileLoad = FileLoad {
    name: "seq-write",
    piece_bytes: MIB,
    pieces: (FILE_BYTES / MIB) as u32,
    random: false,
    access: Access::WriteNew,
    sync: Sync::Never,
};
const SMALL: FileLoad = FileLoad {
    name: "rand-write",
    piece_bytes: BLOCK,
    pieces: 8192,
    random: true,
    access: Access::Write,
    ..LARGE
};

/// Every load on one file, in an order in which each finds what it needs.
pub const FILE_LOADS: [FileLoad; 9] = [
    LARGE,
    FileLoad { name: "seq-write-synced", sync: Sync::AtEnd, ..LARGE },
    FileLoad {
        name: "seq-write-each-synced",
        sync: Sync::Every(1),
        access: Access::Write,
        pieces: 64,
        ..LARGE
    },
    FileLoad { name: "seq-read", access: Access::Read, ..LARGE },
    SMALL,
    FileLoad { name: "rand-write-synced", sync: Sync::AtEnd, ..SMALL },
    FileLoad { name: "rand-write-64-synced", sync: Sync::Every(64), pieces: 2048, ..SMALL },
    FileLoad { name: "rand-write-each-synced", sync: Sync::Every(1), pieces: 500, ..SMALL },
    FileLoad { name: "rand-read", access: Access::Read, ..SMALL },
];

/// What a load came to.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Of what was read or written.
    pub sum: u64,
    /// Bytes read or written, or files made or removed.
    pub count: u64,
    /// How long it took.
    pub seconds: f64,
}

/// Does a load to a file, which a load that reads or writes over must find as large as it is used.
///
/// # Errors
/// The file system's.
pub fn run(load: &FileLoad, path: &Path, pieces: u32) -> io::Result<Done> {
    let mut options = OpenOptions::new();
    match load.access {
        Access::Read => options.read(true),
        Access::Write => options.write(true),
        Access::WriteNew => options.write(true).create(true).truncate(true),
    };
    let mut file = options.open(path)?;
    let places = (FILE_BYTES / load.piece_bytes) as u64;
    // Another count is other content: what is written over a file then changes all of it that it meets.
    let (mut order, mut content) = (Numbers(4), Numbers(5 + u64::from(pieces)));
    let mut piece: Vec<u8> = (0..load.piece_bytes).map(|_| content.next() as u8).collect();
    let started = Instant::now();
    let mut sum = 0u64;
    for turn in 0..pieces {
        let place = if load.random { order.next() >> 16 } else { u64::from(turn) } % places;
        if load.random {
            file.seek(SeekFrom::Start(place * load.piece_bytes as u64))?;
        }
        if load.access == Access::Read {
            file.read_exact(&mut piece)?;
        } else {
            // Every block of every write is another.
            for (number, block) in piece.chunks_exact_mut(BLOCK).enumerate() {
                block[..8].copy_from_slice(&(u64::from(turn) << 20 | number as u64).to_le_bytes());
            }
            file.write_all(&piece)?;
        }
        for block in piece.chunks_exact(BLOCK) {
            let word = block[..8].try_into().map_or(0, u64::from_le_bytes);
            sum = sum.wrapping_mul(31).wrapping_add(word);
        }
        if matches!(load.sync, Sync::Every(count) if (turn + 1) % count == 0) {
            file.sync_all()?;
        }
    }
    if load.sync != Sync::Never {
        file.sync_all()?;
    }
    let seconds = started.elapsed().as_secs_f64();
    Ok(Done { sum, count: u64::from(pieces) * load.piece_bytes as u64, seconds })
}

fn small(directory: &Path, number: u32) -> PathBuf {
    directory.join(format!("{}/{number}", number / DIRECTORY))
}

/// Makes `count` small files below a directory that is not there.
///
/// # Errors
/// The file system's.
pub fn create(directory: &Path, count: u32) -> io::Result<Done> {
    let mut content = Numbers(6);
    let bytes: Vec<u8> = (0..SMALL_BYTES).map(|_| content.next() as u8).collect();
    let started = Instant::now();
    fs::create_dir(directory)?;
    for number in 0..count {
        let path = small(directory, number);
        if number % DIRECTORY == 0
            && let Some(parent) = path.parent()
        {
            fs::create_dir(parent)?;
        }
        let mut file = File::create(path)?;
        file.write_all(&bytes)?;
    }
    Ok(Done { sum: 0, count: count.into(), seconds: started.elapsed().as_secs_f64() })
}

/// Removes what [`create`] made.
///
/// # Errors
/// The file system's.
pub fn remove(directory: &Path, count: u32) -> io::Result<Done> {
    let started = Instant::now();
    for number in 0..count {
        fs::remove_file(small(directory, number))?;
    }
    for first in (0..count).step_by(DIRECTORY as usize) {
        if let Some(parent) = small(directory, first).parent() {
            fs::remove_dir(parent)?;
        }
    }
    fs::remove_dir(directory)?;
    Ok(Done { sum: 0, count: count.into(), seconds: started.elapsed().as_secs_f64() })
}

/// Has a file, and in a machine with it everything, made safe.
///
/// # Errors
/// The file system's.
pub fn sync(path: &Path) -> io::Result<Done> {
    let file = File::open(path)?;
    let started = Instant::now();
    file.sync_all()?;
    Ok(Done { sum: 0, count: 1, seconds: started.elapsed().as_secs_f64() })
}

/// Of every so many records one is a file of its own too.
const OWN_FILE: u64 = 16;

fn record(number: u64) -> String {
    let mut check = Numbers(number.wrapping_add(1));
    format!("{number} {:016x}", check.next())
}

/// Appends numbered records to `log` in a directory, behind those that are there, each synced before its number is
/// given to `told`; every sixteenth lies in a file of its own, too.
///
/// # Errors
/// The file system's, and `told`'s.
pub fn append(directory: &Path, mut told: impl FnMut(u64) -> io::Result<()>) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let path = directory.join("log");
    let mut number = match fs::read_to_string(&path) {
        Ok(text) => text.lines().count() as u64,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let mut log = OpenOptions::new().append(true).create(true).open(path)?;
    loop {
        if number.is_multiple_of(OWN_FILE) {
            fs::write(directory.join(number.to_string()), record(number))?;
        }
        log.write_all(format!("{}\n", record(number)).as_bytes())?;
        log.sync_all()?;
        told(number)?;
        number += 1;
    }
}

/// Counts the records that [`append`] left, each of which must be whole, in order, and there as a file of its own where
/// it has one.
///
/// # Errors
/// The file system's, and the first record that is not as it was written.
pub fn verify(directory: &Path) -> io::Result<u64> {
    let mut count = 0;
    for line in BufReader::new(File::open(directory.join("log"))?).lines() {
        let expected = record(count);
        if line? != expected {
            return Err(io::Error::other(format!("record {count} is not {expected:?}")));
        }
        if count.is_multiple_of(OWN_FILE)
            && fs::read_to_string(directory.join(count.to_string()))? != expected
        {
            return Err(io::Error::other(format!("the file of record {count} is not {expected:?}")));
        }
        count += 1;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("kage-work-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let path = directory("load");
        let [write, read] =
            ["seq-write", "seq-read"].map(|name| *FILE_LOADS.iter().find(|load| load.name == name).unwrap());
        let written = run(&write, &path, 3).unwrap();
        assert_eq!(run(&read, &path, 3).unwrap().sum, written.sum);
        assert_ne!(run(&read, &path, 2).unwrap().sum, written.sum);
        assert!(run(&read, &path, 4).is_err(), "there is no more");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn small_files_are_made_and_removed() {
        let path = directory("small");
        assert_eq!(create(&path, 501).unwrap().count, 501);
        assert_eq!(fs::metadata(path.join("1/500")).unwrap().len(), SMALL_BYTES as u64);
        remove(&path, 501).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn records_go_on_where_they_ended_and_a_wrong_one_is_found() {
        let path = directory("records");
        for last in [20, 40] {
            let told = |number: u64| if number < last { Ok(()) } else { Err(io::Error::other("enough")) };
            assert!(append(&path, told).is_err());
            assert_eq!(verify(&path).unwrap(), last + 1);
        }
        fs::write(path.join("32"), "32").unwrap();
        assert!(verify(&path).unwrap_err().to_string().contains("record 32"));
        fs::remove_dir_all(&path).unwrap();
    }
}

//! The log of a disk that no machine has, opened by the daemon.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kage_disk::{BLOCK_BYTES, Backing, Index, OpenError, Place, ReadError, Store, StoreError, Tuning};
use kage_machine::{
    MachineError, PageBytes,
    disk::{Block, Disk, Fill, Scrubbed, block_digest},
};
use rustix::fs::{FlockOperation, flock};

use super::peers::zeros_digest;
use crate::machines::DiskLog;

/// Why a log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file cannot be.
    #[error(transparent)]
    File(#[from] io::Error),
    /// Somebody else has it.
    #[error("another process has it open")]
    Taken,
    /// What is in it cannot be used.
    #[error(transparent)]
    Store(#[from] OpenError),
}

/// A disk whose one writer is this process.
pub struct LogDisk {
    blocks: u32,
    store: Mutex<Store<File>>,
    /// Digests of missing blocks, as far as they were told.
    expected: Mutex<BTreeMap<u32, u64>>,
}

impl LogDisk {
    /// Opens a log as it was at its last flush; `None` where there is none.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn open(log: &DiskLog) -> Result<Option<Self>, LogError> {
        let Some(file) = existing(&log.path)? else { return Ok(None) };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(LogError::Taken),
            Err(error) => return Err(LogError::File(error.into())),
        }
        let index = Index::private(u64::from(log.blocks))?;
        let store = Store::open(file, index, log.vid.address().octets(), Tuning::default())?;
        Ok(Some(Self { blocks: log.blocks, store: Mutex::new(store), expected: Mutex::default() }))
    }

    fn store(&self) -> MutexGuard<'_, Store<File>> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expected(&self) -> MutexGuard<'_, BTreeMap<u32, u64>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, store: &Store<File>, block: u32) -> Block {
        match store.index().place(u64::from(block)) {
            _ if block >= self.blocks => Block::Zeros,
            Place::Zeros => Block::Zeros,
            Place::Missing | Place::Unknown => Block::Missing(self.expected().get(&block).copied()),
            Place::At(_) => match store.digest(u64::from(block)) {
                None => Block::Missing(None),
                // Zeros that were written are zeros, as on a host where they were not.
                Some(digest) if digest == zeros_digest() => Block::Zeros,
                Some(digest) => Block::Held(digest),
            },
        }
    }

    /// Takes in one block's bytes, if they are what is missing or what has been damaged.
    fn take(&self, store: &mut Store<File>, block: u32, bytes: &PageBytes) -> Result<(), StoreError> {
        let digest = block_digest(bytes);
        match self.known(store, block) {
            Block::Missing(expected) if expected.is_none_or(|expected| expected == digest) => {
                store.fill(u64::from(block), bytes)?;
                self.expected().remove(&block);
                Ok(())
            }
            Block::Held(held) if held == digest => {
                let mut found = [0; BLOCK_BYTES];
                match store.read(u64::from(block), &mut found) {
                    Ok(()) => Ok(()),
                    Err(_) => store.repair(u64::from(block), bytes),
                }
            }
            Block::Missing(_) | Block::Held(_) | Block::Zeros => Ok(()),
        }
    }

    fn zero(&self, store: &mut Store<File>, first: u32, count: u32) -> Result<(), StoreError> {
        let last = first + count;
        let mut next = first;
        while next < last {
            let missing = |block: &u32| store.index().place(u64::from(*block)) == Place::Missing;
            let end = (next..last).take_while(missing).last().map_or(next, |last| last + 1);
            if end > next {
                store.discard(u64::from(next)..u64::from(end))?;
                self.expected().retain(|block, _| !(next..end).contains(block));
            }
            next = end + 1;
        }
        Ok(())
    }
}

/// The file of a log, where one was made: one whose making was cut short begins with zeros.
pub(super) fn existing(path: &Path) -> io::Result<Option<File>> {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut head = [0; 2 * BLOCK_BYTES];
    Backing::read_at(&file, 0, &mut head)?;
    Ok(Some(file).filter(|_| head.iter().any(|byte| *byte != 0)))
}

fn refused(error: StoreError) -> MachineError {
    MachineError::Refused { reason: error.to_string() }
}

impl Disk for LogDisk {
    fn blocks(&self) -> u32 {
        self.blocks
    }

    fn block(&self, block: u32) -> Block {
        self.known(&self.store(), block)
    }

    fn read(&self, block: u32, into: &mut PageBytes) -> Block {
        let store = self.store();
        match store.read(u64::from(block), into) {
            Ok(()) => Block::of(into),
            Err(ReadError::OutOfRange { .. }) => {
                into.fill(0);
                Block::Zeros
            }
            Err(_) => match self.known(&store, block) {
                Block::Held(digest) => Block::Missing(Some(digest)),
                other => other,
            },
        }
    }

    fn fill(&self, blocks: &[(u32, Fill)]) -> Result<(), MachineError> {
        let mut store = self.store();
        let mut zeros: Option<(u32, u32)> = None;
        for (block, fill) in blocks {
            // Zeros beside each other are one record.
            zeros = match (zeros, fill) {
                (Some((first, count)), Fill::Zeros) if first + count == *block => Some((first, count + 1)),
                (before, _) => {
                    if let Some((first, count)) = before {
                        self.zero(&mut store, first, count).map_err(refused)?;
                    }
                    matches!(fill, Fill::Zeros).then_some((*block, 1))
                }
            };
            match fill {
                Fill::Zeros | Fill::Unavailable => {}
                Fill::Bytes(bytes) => self.take(&mut store, *block, bytes).map_err(refused)?,
                Fill::Expect(digest) => {
                    if self.known(&store, *block) == Block::Missing(None) && *block < self.blocks {
                        self.expected().insert(*block, *digest);
                    }
                }
            }
        }
        if let Some((first, count)) = zeros {
            self.zero(&mut store, first, count).map_err(refused)?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), MachineError> {
        self.store().flush().map_err(refused)
    }

    fn scrub(&self, budget_bytes: u64) -> Result<Scrubbed, MachineError> {
        let found = self.store().scrub(budget_bytes).map_err(refused)?;
        let corrupt = found.corrupt.into_iter().filter_map(|block| u32::try_from(block).ok()).collect();
        Ok(Scrubbed { checked_bytes: found.checked_bytes, corrupt, done: found.done })
    }

    fn sync_guest(&self, _patience: Duration) -> Result<(), MachineError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use kage_disk::{Geometry, Initial};
    use kage_machine::{ImageNumber, PAGE_SIZE, Vid};

    use super::*;
    use crate::scratch::Scratch;

    const BLOCKS: u32 = 600;

    fn page(number: u8) -> PageBytes {
        [number; PAGE_SIZE]
    }

    fn log(scratch: &Scratch) -> DiskLog {
        let vid = Vid::of_image("fd4b:6167:6500::/48".parse().unwrap(), ImageNumber(7));
        DiskLog { path: scratch.path().join("7.log"), vid, blocks: BLOCKS }
    }

    fn create(log: &DiskLog, initial: Initial) -> Store<File> {
        std::fs::create_dir_all(log.path.parent().unwrap()).unwrap();
        let file = File::options().read(true).write(true).create_new(true).open(&log.path).unwrap();
        let index = Index::private(u64::from(BLOCKS)).unwrap();
        let geometry = Geometry::new(u64::from(BLOCKS), 64 << 20).unwrap();
        Store::create(file, index, log.vid.address().octets(), geometry, initial, Tuning::default()).unwrap()
    }

    #[test]
    fn what_is_missing_is_taken_once_and_only_what_is_expected() {
        let scratch = Scratch::new("log-fill");
        let log = log(&scratch);
        assert!(LogDisk::open(&log).unwrap().is_none());
        std::fs::create_dir_all(scratch.path()).unwrap();
        File::create(&log.path).unwrap().set_len(1 << 20).unwrap();
        assert!(LogDisk::open(&log).unwrap().is_none(), "not made to its end");
        std::fs::remove_file(&log.path).unwrap();
        drop(create(&log, Initial::Missing));
        let disk = LogDisk::open(&log).unwrap().unwrap();
        assert!(matches!(LogDisk::open(&log), Err(LogError::Taken)));
        let digest = block_digest(&page(1));
        let zeros = (10..BLOCKS).map(|block| (block, Fill::Zeros));
        let mut fills = vec![(0, Fill::Expect(digest)), (1, Fill::Bytes(Box::new(page(2))))];
        fills.extend(zeros);
        disk.fill(&fills).unwrap();
        assert_eq!((disk.block(0), disk.block(9)), (Block::Missing(Some(digest)), Block::Missing(None)));
        assert_eq!((disk.block(10), disk.block(BLOCKS)), (Block::Zeros, Block::Zeros));
        disk.fill(&[(0, Fill::Bytes(Box::new(page(3)))), (1, Fill::Zeros)]).unwrap();
        assert_eq!(disk.block(0), Block::Missing(Some(digest)), "not what it is said to be");
        assert_eq!(disk.block(1), Block::Held(block_digest(&page(2))), "no longer missing");
        disk.fill(&[(0, Fill::Bytes(Box::new(page(1))))]).unwrap();
        disk.flush().unwrap();
        drop(disk);
        let disk = LogDisk::open(&log).unwrap().unwrap();
        let mut bytes = [0; PAGE_SIZE];
        assert_eq!((disk.read(0, &mut bytes), bytes), (Block::Held(digest), page(1)));
    }

    #[test]
    fn damage_is_found_and_put_right() {
        use std::os::unix::fs::FileExt;
        let scratch = Scratch::new("log-damage");
        let log = log(&scratch);
        let mut store = create(&log, Initial::Zeros);
        store.write(5, &page(9)).unwrap();
        store.flush().unwrap();
        let Place::At(at) = store.index().place(5) else { panic!("not written") };
        drop(store);
        let disk = LogDisk::open(&log).unwrap().unwrap();
        File::options().write(true).open(&log.path).unwrap().write_all_at(&[1], at + 100).unwrap();
        let digest = block_digest(&page(9));
        let mut bytes = [0; PAGE_SIZE];
        assert_eq!(disk.read(5, &mut bytes), Block::Missing(Some(digest)));
        let mut found = Scrubbed::default();
        while !found.done {
            let step = disk.scrub(1 << 20).unwrap();
            found.corrupt.extend(step.corrupt);
            found.done = step.done;
        }
        assert_eq!(found.corrupt, [5]);
        disk.fill(&[(5, Fill::Bytes(Box::new(page(8))))]).unwrap();
        assert_eq!(disk.read(5, &mut bytes), Block::Missing(Some(digest)));
        disk.fill(&[(5, Fill::Bytes(Box::new(page(9))))]).unwrap();
        assert_eq!((disk.read(5, &mut bytes), bytes), (Block::Held(digest), page(9)));
    }
}

//! The log: every change as the request that made it, so that reading it is receiving it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use socket::Protocol as _;

use crate::{Store, resp};

/// Bytes read in one go.
const CHUNK: usize = 64 << 10;
/// A log is never written anew below this length.
const SHORT: u64 = 1 << 20;

/// Where changes are appended.
pub struct Log {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Log {
    /// Opens a log, made when missing, and fills an empty store with what it says.
    pub fn open(path: &Path, store: &mut Store) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let (mut input, mut chunk, mut read) = (Vec::new(), vec![0; CHUNK], 0);
        loop {
            let count = file.read(&mut chunk)?;
            if count == 0 {
                break;
            }
            read += count as u64;
            input.extend_from_slice(&chunk[..count]);
            let mut before = usize::MAX;
            while input.len() < before {
                before = input.len();
                let _ = store.receive(&mut (), &mut input, &mut Vec::new());
            }
        }
        // What was cut short by a kill in the middle of a write is left out.
        let bytes = read - input.len() as u64;
        file.set_len(bytes)?;
        Ok(Self { path: path.to_owned(), file, bytes })
    }

    /// Appends a change that the store has made; what has become twice as long as the store is written anew.
    pub fn append(&mut self, words: &[&[u8]], store: &Store) -> io::Result<()> {
        let entry = entry(words);
        self.file.write_all(&entry)?;
        self.bytes += entry.len() as u64;
        if self.bytes > SHORT + 2 * store.log_bytes() { self.shorten(store) } else { Ok(()) }
    }

    fn shorten(&mut self, store: &Store) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut file = OpenOptions::new().append(true).create_new(true).open(&new).or_else(|_| {
            fs::remove_file(&new)?;
            OpenOptions::new().append(true).create_new(true).open(&new)
        })?;
        let mut bytes = 0;
        for (key, value) in store.all() {
            let entry = entry(&[b"SET", key, value]);
            file.write_all(&entry)?;
            bytes += entry.len() as u64;
        }
        fs::rename(&new, &self.path)?;
        (self.file, self.bytes) = (file, bytes);
        Ok(())
    }
}

fn entry(words: &[&[u8]]) -> Vec<u8> {
    let mut entry = Vec::new();
    resp::array(&mut entry, words.len());
    words.iter().for_each(|word| resp::bulk(&mut entry, Some(word)));
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(store: &mut Store, key: &[u8], value: &[u8]) {
        let mut input = entry(&[b"SET", key, value]);
        store.receive(&mut (), &mut input, &mut Vec::new());
    }

    #[test]
    fn a_log_says_what_is_kept_and_not_much_more() {
        let dir = std::env::temp_dir().join(format!("kv-log-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("log");
        let opened = || {
            let mut store = Store::default();
            store.log = Some(Log::open(&path, &mut store).unwrap());
            store
        };
        let mut store = opened();
        set(&mut store, b"other", b"stays");
        for turn in 0..300_u32 {
            set(&mut store, b"key", &vec![turn as u8; 20_000]);
        }
        let length = fs::metadata(&path).unwrap().len();
        assert!(length <= SHORT + 60_300, "{length} bytes after 6 MB of changes");
        drop(store);
        // A kill in the middle of a write.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"*3\r\n$3\r\nSET\r\n$3").unwrap();
        let mut store = opened();
        assert_eq!(fs::metadata(&path).unwrap().len(), length);
        assert_eq!(store.get(b"key").unwrap(), vec![43; 20_000]);
        assert_eq!(store.get(b"other").unwrap(), b"stays");
        set(&mut store, b"key", b"last");
        drop(store);
        assert_eq!(opened().get(b"key").unwrap(), b"last");
        fs::remove_dir_all(&dir).unwrap();
    }
}

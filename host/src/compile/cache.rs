//! Code that was compiled before, in files named for the hash of what it was made from.
//!
//! ```text
//! 0  32  BLAKE3 of the code
//! 32 …   code
//! ```
//! A file that is damaged or cut short is as good as none. When all files together pass the bound, those go first that
//! have not been asked for longest, by the time of their last change, which finding one sets anew.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

/// A directory of code.
pub struct Cache {
    directory: PathBuf,
    most: u64,
    /// Held while files come and go.
    changing: Mutex<u64>,
}

impl Cache {
    /// The code in `directory`, at most `most` bytes of it.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(directory: PathBuf, most: u64) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        Ok(Self { directory, most, changing: Mutex::new(0) })
    }

    fn path(&self, key: &blake3::Hash) -> PathBuf {
        self.directory.join(key.to_hex().as_str())
    }

    /// The code kept under a key.
    #[must_use]
    pub fn find(&self, key: &blake3::Hash) -> Option<Vec<u8>> {
        let path = self.path(key);
        let mut bytes = fs::read(&path).ok()?;
        let hash: [u8; 32] = bytes.get(..32)?.try_into().ok()?;
        let code = bytes.split_off(32);
        if blake3::hash(&code) != hash {
            tracing::warn!(path = %path.display(), "kept code is damaged; it is made again");
            let _ = fs::remove_file(&path);
            return None;
        }
        if let Ok(file) = File::options().write(true).open(&path) {
            let _ = file.set_modified(SystemTime::now());
        }
        Some(code)
    }

    /// Keeps code; if it cannot, it will be made again.
    pub fn keep(&self, key: &blake3::Hash, code: &[u8]) {
        if let Err(error) = self.put(key, code) {
            tracing::warn!(%error, directory = %self.directory.display(), "code cannot be kept");
        }
    }

    fn put(&self, key: &blake3::Hash, code: &[u8]) -> io::Result<()> {
        let mut number = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        *number += 1;
        let length = code.len() as u64 + 32;
        if length > self.most {
            return Ok(());
        }
        let mut kept = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            if let Ok(facts) = entry.metadata() {
                kept.push((facts.modified()?, facts.len(), entry.path()));
            }
        }
        kept.sort();
        let mut total: u64 = kept.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in kept {
            if total + length <= self.most {
                break;
            }
            fs::remove_file(path)?;
            total -= bytes;
        }
        // Whole or not at all: a name appears once its content is there.
        let new = self.directory.join(format!("new-{}-{number}", std::process::id()));
        fs::write(&new, [blake3::hash(code).as_bytes(), code].concat())?;
        fs::rename(new, self.path(key))
    }
}

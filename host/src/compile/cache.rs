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
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
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
        // Of a daemon that ended in the middle of writing.
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("new-") {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self { directory, most, changing: Mutex::new(0) })
    }

    fn path(&self, key: &blake3::Hash) -> PathBuf {
        self.directory.join(key.to_hex().as_str())
    }

    /// The code kept under a key, as a file to be read on from where it is, and how many bytes it has. What is opened
    /// stays whole, also when its name goes meanwhile.
    #[must_use]
    pub fn find(&self, key: &blake3::Hash) -> Option<(File, u64)> {
        let path = self.path(key);
        let mut file = File::options().read(true).write(true).open(&path).ok()?;
        let Ok(length) = check(&mut file) else {
            tracing::warn!(path = %path.display(), "kept code is damaged; it is made again");
            let _ = fs::remove_file(&path);
            return None;
        };
        let _ = file.set_modified(SystemTime::now());
        Some((file, length))
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
        let written = File::create(&new)
            .and_then(|mut file| {
                file.write_all(blake3::hash(code).as_bytes())?;
                file.write_all(code)
            })
            .and_then(|()| fs::rename(&new, self.path(key)));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written
    }
}

/// Checks a file's code and stands at its first byte; how many there are.
fn check(file: &mut File) -> io::Result<u64> {
    let mut expected = [0; 32];
    file.read_exact(&mut expected)?;
    let mut hasher = blake3::Hasher::new();
    let length = io::copy(file, &mut hasher)?;
    if hasher.finalize() != expected {
        return Err(io::ErrorKind::InvalidData.into());
    }
    file.seek(SeekFrom::Start(32))?;
    Ok(length)
}

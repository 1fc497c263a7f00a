//! The compilers a host has: its own, those that images carry, those of the versions of this program before.
//!
//! A machine lives on when the daemon is exchanged for a newer one, and asks for code for the engine it was made with.
//! So each daemon leaves its own compiler to the next ones, and one that is asked for an engine it does not know looks
//! through the images registered with it.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use kage_images::{ImageFile, Trust, compiler};

/// Compilers of earlier versions kept: about 12 MiB each.
const KEPT: usize = 8;

/// A compiler, to be run out of memory.
pub struct Executable {
    /// Sealed.
    pub file: OwnedFd,
    /// Of its bytes.
    pub hash: blake3::Hash,
}

/// An image file as far as it shows that it is another one now.
type Seen = (PathBuf, u64, SystemTime);

/// The compilers of a host, by engine.
pub struct Engines {
    known: Mutex<BTreeMap<String, Arc<Executable>>>,
    /// Where earlier daemons left theirs.
    kept: PathBuf,
    images: PathBuf,
    trust: Trust,
    /// Image files looked through; held while looking.
    seen: Mutex<Vec<Seen>>,
}

impl Engines {
    /// Those left in `kept`, and of the trusted images in `images`.
    #[must_use]
    pub fn new(kept: PathBuf, images: PathBuf, trust: Trust) -> Self {
        Self { known: Mutex::default(), kept, images, trust, seen: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Executable>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one, unless there is one for its engine.
    ///
    /// # Errors
    /// No memory for the executable.
    pub fn add(&self, engine: &str, executable: &[u8]) -> io::Result<()> {
        let mut known = self.known();
        if engine.is_empty() || executable.is_empty() || known.contains_key(engine) {
            return Ok(());
        }
        let (file, hash) = (compiler::sealed(executable)?, blake3::hash(executable));
        known.insert(engine.to_owned(), Arc::new(Executable { file, hash }));
        Ok(())
    }

    /// The compiler for an engine, looked for where there may be one.
    pub fn find(&self, engine: &str) -> Option<Arc<Executable>> {
        if let Some(found) = self.known().get(engine) {
            return Some(found.clone());
        }
        let look = || -> io::Result<()> {
            if let Ok(executable) = fs::read(self.path(engine)) {
                return self.add(engine, &executable);
            }
            self.look_through_images()
        };
        if let Err(error) = look() {
            tracing::warn!(%error, engine, "a compiler was looked for in vain");
        }
        self.known().get(engine).cloned()
    }

    /// Learns the engines of image files that are new or changed: whoever asks for engines that nobody has costs a
    /// look at the directory.
    fn look_through_images(&self) -> io::Result<()> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = Vec::new();
        for entry in fs::read_dir(&self.images)? {
            let path = entry?.path();
            if path.extension().is_some_and(|end| end == "kage")
                && let Ok(facts) = fs::metadata(&path)
            {
                now.push((path, facts.len(), facts.modified()?));
            }
        }
        for (path, ..) in now.iter().filter(|file| !seen.contains(file)) {
            match ImageFile::read(path, &self.trust) {
                Ok(image) => self.add(image.engine(), image.compiler())?,
                Err(error) => tracing::debug!(%error, "no compiler"),
            }
        }
        *seen = now;
        Ok(())
    }

    /// An engine's name comes from machines: what it is made of is nothing for a path.
    fn path(&self, engine: &str) -> PathBuf {
        self.kept.join(blake3::hash(engine.as_bytes()).to_hex().as_str())
    }

    /// Leaves a compiler to later daemons; of many, the latest stay.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn keep(&self, engine: &str, executable: &[u8]) -> io::Result<()> {
        fs::create_dir_all(&self.kept)?;
        fs::set_permissions(&self.kept, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        let path = self.path(engine);
        if !fs::read(&path).is_ok_and(|kept| kept == executable) {
            let new = self.kept.join("new");
            fs::write(&new, executable)?;
            fs::rename(&new, &path)?;
        }
        fs::File::options().write(true).open(&path)?.set_modified(SystemTime::now())?;
        let mut all = fs::read_dir(&self.kept)?
            .map(|entry| entry.and_then(|entry| Ok((entry.metadata()?.modified()?, entry.path()))))
            .collect::<io::Result<Vec<_>>>()?;
        all.sort();
        let many = all.len().saturating_sub(KEPT);
        all.into_iter().take(many).try_for_each(|(_, path)| fs::remove_file(path))
    }
}

/// Where compilers are kept for later daemons.
#[must_use]
pub fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("compilers")
}

#[cfg(test)]
mod tests {
    use kage_images::{SigningKey, assemble};

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn a_later_daemon_has_the_compilers_of_earlier_ones_and_of_images() {
        let scratch = Scratch::new("engines");
        let dir = |name: &str| scratch.path().join(name);
        fs::create_dir_all(dir("images")).unwrap();
        let key = SigningKey::from_seed(&[5; 32]);
        let daemon = || Engines::new(dir("compilers"), dir("images"), Trust::Keys(vec![key.public()]));
        let earlier = daemon();
        for engine in ["wasmtime-46/x", "wasmtime-47/x", "../../etc"] {
            earlier.keep(engine, engine.as_bytes()).unwrap();
        }
        let later = daemon();
        for engine in ["wasmtime-46/x", "wasmtime-47/x", "../../etc"] {
            assert_eq!(later.find(engine).unwrap().hash, blake3::hash(engine.as_bytes()));
        }
        assert!(later.find(compiler::ENGINE).is_none());
        fs::create_dir_all(dir("made")).unwrap();
        fs::write(dir("made/image.toml"), "name = 'made'").unwrap();
        let image = assemble(&dir("made")).unwrap().encode(&key).unwrap();
        fs::write(dir("images/made.kage"), image).unwrap();
        fs::write(dir("images/other.kage"), "no image").unwrap();
        let found = later.find(compiler::ENGINE).expect("the image's");
        assert_eq!(found.hash, blake3::hash(compiler::executable()));
        assert!(later.find("wasmtime-1").is_none());
        assert_eq!(later.seen.lock().unwrap().len(), 2, "looked through once");
    }

    #[test]
    fn compilers_do_not_pile_up() {
        let scratch = Scratch::new("compilers");
        let engines = Engines::new(scratch.path().join("kept"), PathBuf::new(), Trust::Anyone);
        for number in 0..KEPT + 3 {
            engines.keep(&number.to_string(), b"x").unwrap();
        }
        assert_eq!(fs::read_dir(scratch.path().join("kept")).unwrap().count(), KEPT);
        assert!(engines.find(&(KEPT + 2).to_string()).is_some());
    }
}

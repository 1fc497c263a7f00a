//! Directories for tests.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A directory of a test, removed when the test ends.
pub struct Scratch(PathBuf);

impl Scratch {
    /// A fresh path under the system's temporary directory; not created.
    pub fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("kage-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        Self(dir)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

//! Compiling modules by the compiler that the build put into this program, or that an image carries.
//!
//! It runs as a process of its own, straight out of memory. What confines it is the caller's: `kage image build`
//! compiles what its user wrote, the daemon what anyone sent.

pub mod service;

use std::{
    io::{self, Read as _, Write as _},
    os::fd::{AsRawFd as _, OwnedFd},
    process::{Command, Stdio},
    thread,
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::embedded;

/// What the compiler in this program compiles for.
pub const ENGINE: &str = embedded::ENGINE;

/// Largest module; the compiler refuses larger ones too.
pub const MAX_MODULE: usize = 32 << 20;

/// Why a module is not compiled.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The compiler cannot be run.
    #[error("cannot run the compiler: {0}")]
    Run(#[from] io::Error),
    /// It says why.
    #[error("{0}")]
    Refused(String),
}

/// The compiler in this program, an executable.
#[must_use]
pub fn executable() -> &'static [u8] {
    embedded::COMPILER
}

/// An executable's bytes as a sealed file in memory, to be run by [`path`].
///
/// # Errors
/// No memory for it.
pub fn sealed(executable: &[u8]) -> io::Result<OwnedFd> {
    let file = memfd_create("kage-compile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = std::fs::File::from(file);
    file.write_all(executable)?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

/// Where this process and its children before they run something else find a descriptor's file.
#[must_use]
pub fn path(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Compiles a module by the compiler in this program, unconfined.
///
/// # Errors
/// [`CompileError`].
pub fn compile(wasm: &[u8]) -> Result<Vec<u8>, CompileError> {
    let executable = sealed(executable())?;
    let mut child = Command::new(path(&executable))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let mut code = Vec::new();
    let mut reason = Vec::new();
    thread::scope(|scope| {
        // It may refuse the module and end before it has read all.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(wasm)));
        scope.spawn(|| stderr.map(|stderr| stderr.take(64 << 10).read_to_end(&mut reason)));
        child.stdout.take().map_or(Ok(0), |mut stdout| stdout.read_to_end(&mut code))
    })?;
    if child.wait()?.success() {
        return Ok(code);
    }
    Err(CompileError::Refused(String::from_utf8_lossy(&reason).trim().to_owned()))
}

//! Running tools, and not running them where nothing changed.

use std::{
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Has cargo run the build again when `path` changes.
pub fn rerun_if_changed(path: &Path) {
    println!("cargo:rerun-if-changed={}", path.display());
}

/// Cargo for another workspace, without what this one was told.
pub fn cargo(workspace: &Path, target: &Path) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").expect("set by cargo"));
    cargo.current_dir(workspace).env("CARGO_TARGET_DIR", target);
    for name in [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_RUSTFLAGS",
    ] {
        cargo.env_remove(name);
    }
    cargo
}

/// Runs a tool and returns what it prints.
///
/// # Panics
/// When it is not there, or fails: the build cannot go on.
pub fn run(command: &mut Command) -> Vec<u8> {
    let name = format!("{command:?}");
    let short: String = name.chars().take(300).collect();
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .unwrap_or_else(|error| panic!("{short}: {error}; scripts/setup installs what the build needs"));
    assert!(
        output.status.success(),
        "{short}: {}; if a target or tool is missing, scripts/setup installs it",
        output.status
    );
    output.stdout
}

/// Makes `made` by `make` unless what it is made from is as it was: `inputs`, hashed.
pub fn unless_made(made: &Path, inputs: &impl Hash, make: impl FnOnce()) {
    let mut hasher = DefaultHasher::new();
    inputs.hash(&mut hasher);
    let stamp = PathBuf::from(format!("{}.stamp", made.display()));
    let now = format!("{:016x}", hasher.finish());
    if made.exists() && fs::read_to_string(&stamp).is_ok_and(|before| before == now) {
        return;
    }
    make();
    fs::write(&stamp, now).unwrap_or_else(|error| panic!("{}: {error}", stamp.display()));
}

/// Bytes of a file.
pub fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

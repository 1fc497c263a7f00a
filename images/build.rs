//! Builds the guest kernel for its own target and hands its path to the crate, which embeds it.

use std::{env, path::PathBuf, process::Command};

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let root = manifest.parent().expect("images/ lies in the workspace");
    let guest = root.join("guest");
    for path in [
        "guest/src",
        "guest/ssh/src",
        "guest/Cargo.toml",
        "guest/Cargo.lock",
        "guest/link.ld",
        "guest/build.rs",
        "abi/src",
    ] {
        println!("cargo:rerun-if-changed={}", root.join(path).display());
    }
    // One target directory for all profiles of the host: `<target>/<profile>/build/<crate>/out` lies four below it.
    let target = out.ancestors().nth(4).expect("OUT_DIR lies in the target directory").join("guest");
    let mut cargo = Command::new(env::var_os("CARGO").expect("set by cargo"));
    cargo.current_dir(&guest).args(["build", "--release", "--locked", "--target", "x86_64-unknown-none"]);
    cargo.arg("--target-dir").arg(&target);
    for name in [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_RUSTFLAGS",
    ] {
        cargo.env_remove(name);
    }
    let status = cargo.status().expect("cargo runs");
    assert!(
        status.success(),
        "the guest kernel does not build; if its target is missing: rustup target add x86_64-unknown-none"
    );
    let kernel = target.join("x86_64-unknown-none/release/kage-guest");
    println!("cargo:rustc-env=KAGE_GUEST_KERNEL={}", kernel.display());
}

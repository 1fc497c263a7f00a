//! Builds what an image is made of: the guest kernel, the compiler for user programs, and the programs of the default
//! image from their sources. Everything is embedded in the crate.
//!
//! Each part has a target directory of its own beside the host's, shared by all profiles of the host:
//! `<target>/{guest,compiler,programs}`. What is there and still right is not made again.

#[path = "build/programs.rs"]
mod programs;
#[path = "build/step.rs"]
mod step;

use std::{env, fs, path::PathBuf, thread};

use step::{cargo, rerun_if_changed, run};

/// Where things are.
pub struct Paths {
    /// The workspace.
    pub root: PathBuf,
    /// `images/`.
    pub images: PathBuf,
    /// The host's target directory.
    pub target: PathBuf,
}

fn main() {
    let images = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let root = images.parent().expect("images/ lies in the workspace").to_owned();
    // `<target>/<profile>/build/<crate>/out` lies four below it.
    let target = out.ancestors().nth(4).expect("OUT_DIR lies in the target directory").to_owned();
    let paths = Paths { root, images, target };
    for path in ["guest/src", "guest/ssh/src", "guest/engine", "abi/src"] {
        rerun_if_changed(&paths.root.join(path));
    }
    for path in ["Cargo.toml", "Cargo.lock", "link.ld", "build.rs", ".cargo", "ssh/Cargo.toml"] {
        rerun_if_changed(&paths.root.join("guest").join(path));
    }
    for path in [
        "build.rs",
        "build",
        "compiler/src",
        "split/src",
        "split/Cargo.toml",
        "compiler/Cargo.toml",
        "compiler/Cargo.lock",
        "compiler/.cargo",
        "programs",
        "default",
    ] {
        rerun_if_changed(&paths.images.join(path));
    }

    let (kernel, compiler, modules) = thread::scope(|scope| {
        let kernel = scope.spawn(|| build_kernel(&paths));
        let compiler = scope.spawn(|| build_compiler(&paths));
        let modules = programs::build(&paths);
        (
            kernel.join().expect("the kernel is built"),
            compiler.join().expect("the compiler is built"),
            modules,
        )
    });
    let mut engine = std::process::Command::new(&compiler);
    let engine = String::from_utf8(run(engine.arg("--engine"))).expect("an engine's name is a text");
    let programs = programs::compile(&paths, &compiler, modules);
    fs::write(out.join("embedded.rs"), embedded(&paths, &programs)).expect("OUT_DIR can be written");
    println!("cargo:rustc-env=KAGE_GUEST_KERNEL={}", kernel.display());
    println!("cargo:rustc-env=KAGE_COMPILER={}", compiler.display());
    println!("cargo:rustc-env=KAGE_ENGINE={}", engine.trim());
}

fn build_kernel(paths: &Paths) -> PathBuf {
    let target = paths.target.join("guest");
    let mut cargo = cargo(&paths.root.join("guest"), &target);
    run(cargo.args(["build", "--release", "--locked", "--target", "x86_64-unknown-none"]));
    target.join("x86_64-unknown-none/release/kage-guest")
}

fn build_compiler(paths: &Paths) -> PathBuf {
    let target = paths.target.join("compiler");
    let mut cargo = cargo(&paths.images.join("compiler"), &target);
    run(cargo.args(["build", "--release", "--locked", "--target", "x86_64-unknown-linux-gnu"]));
    target.join("x86_64-unknown-linux-gnu/release/kage-compile")
}

/// The source of tables that embed programs and files: `PROGRAMS`, `FILES` (no content: a directory).
fn embedded(paths: &Paths, programs: &[(String, PathBuf)]) -> String {
    let mut source = "pub static PROGRAMS: &[(&str, &[u8])] = &[\n".to_owned();
    for (name, code) in programs {
        source += &format!("    ({name:?}, include_bytes!({:?})),\n", code.display().to_string());
    }
    source += "];\npub static FILES: &[(&str, Option<&[u8]>)] = &[\n";
    let root = paths.images.join("default/files");
    let mut pending = vec![root.clone()];
    while let Some(directory) = pending.pop() {
        let mut entries: Vec<PathBuf> = fs::read_dir(&directory)
            .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
            .map(|entry| entry.expect("a directory can be read").path())
            .collect();
        entries.sort();
        for path in entries {
            let inside = format!("/{}", path.strip_prefix(&root).expect("lies below").display());
            if path.is_dir() {
                source += &format!("    ({inside:?}, None),\n");
                pending.push(path);
            } else {
                source +=
                    &format!("    ({inside:?}, Some(include_bytes!({:?}))),\n", path.display().to_string());
            }
        }
    }
    source + "];\n"
}

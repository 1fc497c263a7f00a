//! The programs of the default image, from their sources.
//!
//! C sources come out of crates (their checksums are in `programs/Cargo.lock`) and are compiled by Debian's clang with
//! its wasi-libc; Rust ones are a workspace of their own. All are stock WebAssembly with WASI preview 1; the compiler
//! for user programs makes code of them as it would of any other.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use crate::{
    Paths,
    step::{cargo, read, run, unless_made},
};

/// A program in C.
struct C {
    name: &'static str,
    /// The crate that carries its sources, with version.
    package: &'static str,
    /// Directory in it that `sources` and headers lie in.
    directory: &'static str,
    sources: &'static [&'static str],
    /// Directory of our own sources in `programs/`, all of it.
    own: &'static str,
    flags: &'static [&'static str],
    libraries: &'static [&'static str],
}

const C_PROGRAMS: [C; 2] = [
    C {
        name: "sqlite3",
        package: "sqlite3-src-0.7.1",
        directory: "source",
        sources: &["sqlite3.c", "shell.c"],
        own: "sqlite",
        flags: &[
            "-DSQLITE_WASI",
            "-DSQLITE_THREADSAFE=0",
            "-DSQLITE_OMIT_LOAD_EXTENSION",
            "-DSQLITE_OMIT_WAL",
            "-DSQLITE_NOHAVE_SYSTEM",
            "-DSQLITE_OMIT_POPEN",
            "-DSQLITE_DQS=0",
            "-DSQLITE_ENABLE_FTS5",
            "-DSQLITE_ENABLE_MATH_FUNCTIONS",
            "-D_WASI_EMULATED_GETPID",
            "-D_WASI_EMULATED_MMAN",
            "-D_WASI_EMULATED_PROCESS_CLOCKS",
            "-D_WASI_EMULATED_SIGNAL",
        ],
        libraries: &[
            "-lwasi-emulated-getpid",
            "-lwasi-emulated-mman",
            "-lwasi-emulated-process-clocks",
            "-lwasi-emulated-signal",
        ],
    },
    C {
        name: "js",
        package: "rquickjs-sys-0.14.0",
        directory: "quickjs",
        sources: &["quickjs.c", "libregexp.c", "libunicode.c", "dtoa.c", "quickjs-libc.c"],
        own: "js",
        flags: &["-D_GNU_SOURCE", "-D_WASI_EMULATED_PROCESS_CLOCKS", "-D_WASI_EMULATED_SIGNAL"],
        libraries: &["-lwasi-emulated-process-clocks", "-lwasi-emulated-signal"],
    },
];

const COMMON: [&str; 4] = ["--target=wasm32-wasi", "-O2", "-DNDEBUG", "-w"];
const LINK: [&str; 2] = ["-Wl,-z,stack-size=1048576", "-Wl,--strip-all"];

/// Programs in Rust: packages of the workspace `programs/`.
const RUST_PROGRAMS: [&str; 4] = ["tools", "httpd", "kv", "work"];

/// Builds all programs; returns their names and modules.
pub fn build(paths: &Paths) -> Vec<(String, PathBuf)> {
    let workspace = paths.images.join("programs");
    let target = paths.target.join("programs");
    let c = target.join("c");
    fs::create_dir_all(&c).expect("the target directory can be written");
    let metadata = run(cargo(&workspace, &target).args(["metadata", "--locked", "--format-version", "1"]));
    let metadata = String::from_utf8(metadata).expect("cargo prints text");
    thread::scope(|scope| {
        let compiled: Vec<_> = C_PROGRAMS
            .iter()
            .map(|program| {
                let from = package(&metadata, program.package).join(program.directory);
                let (own, c) = (workspace.join(program.own), &c);
                scope.spawn(move || (program.name.to_owned(), link(program, &from, &own, c)))
            })
            .collect();
        let mut cargo = cargo(&workspace, &target);
        cargo.args(["build", "--release", "--locked", "--target", "wasm32-wasip1"]);
        for package in RUST_PROGRAMS {
            cargo.args(["-p", package]);
        }
        run(&mut cargo);
        let rust = RUST_PROGRAMS.iter().map(|name| {
            ((*name).to_owned(), target.join("wasm32-wasip1/release").join(format!("{name}.wasm")))
        });
        let c = compiled.into_iter().map(|program| program.join().expect("a program in C is built"));
        rust.chain(c).collect()
    })
}

/// Compiles each module; returns names and code.
pub fn compile(paths: &Paths, compiler: &Path, modules: Vec<(String, PathBuf)>) -> Vec<(String, PathBuf)> {
    let directory = paths.target.join("programs/code");
    fs::create_dir_all(&directory).expect("the target directory can be written");
    let version = read(compiler);
    thread::scope(|scope| {
        let all: Vec<_> = modules
            .into_iter()
            .map(|(name, module)| {
                let code = directory.join(format!("{name}.cwasm"));
                let version = &version;
                scope.spawn(move || {
                    unless_made(&code, &(version, read(&module)), || {
                        let input = fs::File::open(&module).expect("a module can be read");
                        let mut compile = Command::new(compiler);
                        let made = run(compile.stdin(Stdio::from(input)));
                        fs::write(&code, made).expect("the target directory can be written");
                    });
                    (name, code)
                })
            })
            .collect();
        all.into_iter().map(|program| program.join().expect("a program is compiled")).collect()
    })
}

/// Where cargo keeps a package, by what it says of all: `"manifest_path":"…/package/Cargo.toml"`.
fn package(metadata: &str, package: &str) -> PathBuf {
    let end = format!("/{package}/Cargo.toml");
    metadata.split('"').find_map(|text| text.strip_suffix(&end)).map_or_else(
        || panic!("programs/Cargo.lock has no {package}"),
        |parent| Path::new(parent).join(package),
    )
}

fn link(program: &C, from: &Path, own: &Path, to: &Path) -> PathBuf {
    let mut sources: Vec<PathBuf> = program.sources.iter().map(|source| from.join(source)).collect();
    let mut scripts = Vec::new();
    for entry in fs::read_dir(own).unwrap_or_else(|error| panic!("{}: {error}", own.display())) {
        let path = entry.expect("a directory can be read").path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("c") => sources.push(path),
            Some("js") => scripts.push(path),
            _ => {}
        }
    }
    sources.sort();
    let headers = to.join(program.name);
    fs::create_dir_all(&headers).expect("the target directory can be written");
    for script in scripts {
        embed(&script, &headers);
    }
    let objects: Vec<PathBuf> = sources
        .iter()
        .map(|source| {
            let stem = source.file_stem().expect("a source has a name");
            let object = headers.join(stem).with_extension("o");
            let mut clang = Command::new("clang");
            clang.args(COMMON).args(program.flags).arg("-I").arg(from).arg("-I").arg(&headers);
            clang.arg("-c").arg(source).arg("-o").arg(&object);
            let ours = source.starts_with(own).then(|| (read(source), list(&headers, "h")));
            unless_made(&object, &(format!("{clang:?}"), ours), || drop(run(&mut clang)));
            object
        })
        .collect();
    let module = to.join(program.name).with_extension("wasm");
    let mut clang = Command::new("clang");
    clang.args(COMMON).args(LINK).args(&objects).args(program.libraries).arg("-o").arg(&module);
    run(&mut clang);
    module
}

/// A script as the text of a C header: `NAME.js` becomes `char NAME_js[]` in `NAME.h`.
fn embed(script: &Path, to: &Path) {
    let stem = script.file_stem().expect("a script has a name").to_string_lossy();
    let bytes: Vec<String> = read(script).iter().map(u8::to_string).collect();
    let header = to.join(format!("{stem}.h"));
    let text = format!("static const char {stem}_js[] = {{{},0}};\n", bytes.join(","));
    if fs::read_to_string(&header).is_ok_and(|before| before == text) {
        return;
    }
    fs::write(&header, text).expect("the target directory can be written");
}

fn list(directory: &Path, extension: &str) -> Vec<Vec<u8>> {
    let mut all: Vec<PathBuf> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    all.sort();
    all.iter().map(|path| read(path)).collect()
}

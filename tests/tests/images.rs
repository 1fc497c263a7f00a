//! Images of one's own on hosts, and modules that users bring to their machines.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use kage_tests::{Site, program, text};

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Builds an image of a manifest and one file; returns the image's file.
fn build(site: &Site, name: &str, key: &Path) -> PathBuf {
    let dir = site.dir().join(name);
    fs::create_dir_all(dir.join("files/etc")).unwrap();
    fs::write(dir.join("files/etc/greeting"), format!("hello from {name}\n")).unwrap();
    let manifest = format!("name = '{name}'\nmemory = '80MiB'\nfiles = 'files'\n[[program]]\nname = 'js'\n");
    fs::write(dir.join("image.toml"), manifest).unwrap();
    let file = dir.with_extension("kage");
    let mut command = Command::new(program());
    command.args(["image", "build"]).arg(&dir).arg("-o").arg(&file).arg("--key").arg(key);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    file
}

/// Puts an image file where a host looks for it.
fn register(site: &Site, host: &str, file: &Path) {
    let name = file.file_name().unwrap();
    fs::copy(file, site.dir().join(host).join("state/images").join(name)).unwrap();
}

fn run(site: &Site, address: &str, line: &str) -> Output {
    let child = site.start("d1", site.ssh("alice", address).arg(line).stdin(Stdio::null()));
    child.wait_with_output().unwrap()
}

#[test]
fn a_machine_moves_where_its_image_is() {
    let site = Site::up(1);
    let file = build(&site, "own", &site.dir().join("site/image.key"));
    register(&site, "h1", &file);
    register(&site, "h2", &file);
    let key = site.key("alice").with_extension("pub");
    let login = ["login", "alice", "--at", "ap-1", "--image", "own", "--key", key.to_str().unwrap()];
    let login = site.json("h1", &login);
    let address = text(&login, "address");
    assert_eq!(site.show("alice")["memory_bytes"], 80 << 20);
    for host in ["h2", "h1"] {
        let output = run(&site, address, "cat /etc/greeting; js -e '6 * 7'");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "hello from own\n42\n");
        assert_eq!(text(&site.migrate("alice", host), "outcome"), "handed_over");
    }
    let refused = site.kage("h1", &["migrate", "alice", "h3"]);
    assert!(!refused.status.success());
    assert!(said(&refused).contains("own"), "{}", said(&refused));
    assert_eq!(run(&site, address, "cat /etc/greeting").stdout, b"hello from own\n");
}

#[test]
fn images_that_are_not_there_or_not_trusted_start_nothing() {
    let site = Site::up(1);
    let missing = site.kage("h1", &["login", "alice", "--at", "ap-1", "--image", "none"]);
    assert!(!missing.status.success());
    assert!(said(&missing).contains("this host has no image \"none\""), "{}", said(&missing));
    let key = site.dir().join("stranger.key");
    fs::write(&key, format!("{}\n", "5".repeat(64))).unwrap();
    register(&site, "h1", &build(&site, "strange", &key));
    let refused = site.kage("h1", &["login", "alice", "--at", "ap-1", "--image", "strange"]);
    assert!(!refused.status.success());
    assert!(said(&refused).contains("not trusted here"), "{}", said(&refused));
    let listed =
        site.json("h1", &["image", "ls", "--dir", site.dir().join("h1/state/images").to_str().unwrap()]);
    assert_eq!(listed[0]["usable"], true, "{listed}");
    assert_eq!(listed[1]["usable"], false, "{listed}");
}

/// Prints `text` and leaves.
fn module(text: &str) -> Vec<u8> {
    let length = text.len();
    wat::parse_str(format!(
        r#"(module
          (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
          (memory (export "memory") 1)
          (data (i32.const 0) "\08\00\00\00\{length:02x}\00\00\00{text}")
          (func (export "_start") (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 64)))))"#
    ))
    .unwrap()
}

#[test]
fn modules_are_compiled_by_the_host_the_machine_is_on() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    let address = text(&login, "address");
    let bring = |name: &str, bytes: &[u8]| {
        let path = site.dir().join(name);
        fs::write(&path, bytes).unwrap();
        let mut scp = Command::new("scp");
        scp.arg("-i").arg(site.key("alice")).args(["-F", "/dev/null", "-o", "IdentitiesOnly=yes"]);
        scp.arg("-o").arg(format!("UserKnownHostsFile={}", site.dir().join("known_hosts").display()));
        scp.args(["-o", "StrictHostKeyChecking=accept-new", "-o", "BatchMode=yes", "-q"]);
        scp.arg(&path).arg(format!("alice@[{address}]:"));
        let output = site.start("d1", &mut scp).wait_with_output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    };
    let kept = |host: &str| fs::read_dir(site.dir().join(host).join("state/code")).unwrap().count();
    for (at, host) in ["h1", "h2"].into_iter().enumerate() {
        bring("hello.wasm", &module(&format!("hello at {host}")));
        let output = run(&site, address, "./hello.wasm");
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("hello at {host}"), "{}", said(&output));
        assert_eq!(kept(host), 1);
        if at == 0 {
            assert_eq!(text(&site.migrate("alice", "h2"), "outcome"), "handed_over");
        }
    }
    bring("bad.wasm", b"this is no module");
    let refused = run(&site, address, "./bad.wasm 2>&1");
    assert!(said(&refused).contains("not a WebAssembly module"), "{}", said(&refused));
    bring("cut.wasm", &module("x")[..40]);
    let refused = run(&site, address, "./cut.wasm 2>&1");
    assert!(said(&refused).contains("not a valid module"), "{}", said(&refused));
}

#[test]
fn the_compiler_can_do_nothing_but_compile() {
    let dir = std::env::temp_dir().join(format!("kage-confined-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let source = dir.join("intruder.c");
    fs::write(
        &source,
        r#"#include <fcntl.h>
           #include <stdio.h>
           #include <stdlib.h>
           #include <sys/socket.h>
           #include <unistd.h>
           int main(void) {
               char *large = malloc(4UL << 30);
               printf("file %d socket %d child %d large %d\n", open("/etc/passwd", O_RDONLY),
                      socket(AF_INET, SOCK_STREAM, 0), (int)fork(), large != NULL);
               return 0;
           }"#,
    )
    .unwrap();
    let intruder = dir.join("intruder");
    let built = Command::new("cc").arg("-static").arg("-o").arg(&intruder).arg(&source).status().unwrap();
    assert!(built.success());
    let mut command = Command::new(program());
    command.args(["compile-module", "--user", "1801584640", "--executable"]).arg(&intruder);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(said(&output), "file -1 socket -1 child -1 large 0\n");
    fs::remove_dir_all(&dir).unwrap();
}

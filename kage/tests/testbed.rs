//! `kage testbed` as users run it, with its daemons. Needs root and /dev/kvm.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use serde_json::Value;

/// A testbed directory of its own, and its removal.
struct Site {
    dir: PathBuf,
}

impl Site {
    fn new(name: &str) -> Self {
        Self { dir: std::env::temp_dir().join(format!("kage-cli-{}-{name}", std::process::id())) }
    }

    fn testbed(&self, arguments: &str) -> Output {
        let mut words = arguments.split(' ');
        let mut command = Command::new(env!("CARGO_BIN_EXE_kage"));
        command.args(["-o", "json", "testbed"]).args(words.next()).arg("--dir").arg(&self.dir).args(words);
        command.output().expect("kage runs")
    }

    fn json(&self, arguments: &str) -> Value {
        let output = self.testbed(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kage testbed {arguments}: {errors}");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{arguments}: {error}"))
    }

    fn text(&self, arguments: &str) -> String {
        let output = self.testbed(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kage testbed {arguments}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let output = self.testbed("down");
        if !std::thread::panicking() {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            assert!(!self.dir.exists(), "{} is left", self.dir.display());
        }
    }
}

fn namespaces() -> String {
    String::from_utf8_lossy(&Command::new("ip").args(["netns", "list"]).output().unwrap().stdout).into_owned()
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn the_testbed_shows_what_is_documented_and_vanishes() {
    let site = Site::new("shows");
    let up = site.json("up --hosts 2 --devices 1");
    assert_eq!(keys(&up), ["devices", "dir", "hosts", "radius"]);
    assert_eq!(keys(&up["hosts"][0]), ["aps", "name", "netns", "socket"]);
    assert_eq!(keys(&up["devices"][0]), ["address", "ap", "name", "netns"]);
    assert_eq!(keys(&up["radius"]), ["port", "secret"]);
    assert_eq!(up, site.json("status"));
    assert_eq!((&up["hosts"][1]["name"], &up["hosts"][1]["aps"][0]), (&"h2".into(), &"ap-2".into()));
    for host in up["hosts"].as_array().unwrap() {
        assert!(Path::new(host["socket"].as_str().unwrap()).exists(), "{host}");
        assert!(namespaces().contains(host["netns"].as_str().unwrap()), "{host}");
    }
    assert_eq!(site.testbed("up").status.code(), Some(1), "it is up already");

    let moved = site.json("move d1 ap-2");
    assert_eq!((&moved["from"], &moved["to"]), (&"ap-1".into(), &"ap-2".into()));
    assert_eq!(moved["accounting"]["transmissions"], 1);
    assert_eq!(site.json("status")["devices"][0]["ap"], "ap-2");
    assert_eq!(site.testbed("move d1 ap-9").status.code(), Some(3));
    assert_eq!(site.testbed("move d9 ap-1").status.code(), Some(3));

    let netns = up["hosts"][0]["netns"].as_str().unwrap().to_owned();
    assert!(site.testbed("down").status.success());
    assert!(!namespaces().contains(&netns));
    assert_eq!(site.testbed("status").status.code(), Some(3));
}

#[test]
fn a_command_in_a_namespace_keeps_its_status_and_its_terminal() {
    let site = Site::new("exec");
    site.json("up --hosts 1 --devices 1");
    assert_eq!(site.testbed("exec d1 -- sh -c exit\t42").status.code(), Some(42));
    let socket = site.text("exec h1 -- printenv KAGE_SOCKET");
    assert_eq!(socket.trim(), site.dir.canonicalize().unwrap().join("h1/run/host.sock").to_str().unwrap());
    assert!(site.text("exec d1 -- ip -6 addr").contains("fd4b:6167:65ff::1/128"));
    assert_eq!(site.testbed("exec d7 -- true").status.code(), Some(3));
    let line = format!("{} testbed exec --dir {} d1 -- tty", env!("CARGO_BIN_EXE_kage"), site.dir.display());
    let output =
        Command::new("script").args(["-qec", &line, "/dev/null"]).output().expect("script is installed");
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("/dev/pts/"), "{output:?}");
}

#[test]
fn a_delay_is_paid_once_between_hosts() {
    let site = Site::new("delay");
    site.json("up --hosts 2 --devices 0 --delay 10ms --link 100mbit");
    let output = site.text("exec h1 -- ping -c 20 -i 0.02 -q fd4b:6167:6501::2");
    let average: f64 = output.rsplit_once("= ").unwrap().1.split('/').nth(1).unwrap().parse().unwrap();
    // Twice 10 ms, and as much again for the first of 20, which waits for neighbour discovery.
    assert!((20.0..24.0).contains(&average), "{output}");
    assert!(output.contains(" 0% packet loss"), "{output}");
}

#[test]
fn an_interrupted_up_cleans_up() {
    let site = Site::new("interrupted");
    for after_ms in [20, 60, 150, 300] {
        let mut up = Command::new(env!("CARGO_BIN_EXE_kage"))
            .args(["testbed", "up", "--hosts", "6", "--devices", "6", "--delay", "1ms", "--dir"])
            .arg(&site.dir)
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(after_ms));
        Command::new("kill").args(["-INT", &up.id().to_string()]).status().unwrap();
        if up.wait().unwrap().success() {
            assert!(site.testbed("down").status.success(), "it was done already");
        }
        assert!(!site.dir.exists(), "{after_ms} ms: {} is left", site.dir.display());
    }
}

//! Bad input gets a clear error and loses nothing.

use std::{fs, process::Command};

use kage_tests::{Site, program, text};

/// Runs `kage` and expects it to fail with a code and words.
fn refused(site: &Site, arguments: &[&str], code: i32, words: &[&str]) {
    let output = site.kage("h1", arguments);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "kage {arguments:?}: {errors}");
    for word in words {
        assert!(errors.contains(word), "kage {arguments:?} does not say {word:?}: {errors}");
    }
    assert!(!errors.contains("panicked"), "{errors}");
}

#[test]
fn unknown_names_and_bad_keys_are_refused_and_the_machine_runs_on() {
    let site = Site::up(1);
    refused(&site, &["show", "nobody"], 3, &["nobody"]);
    refused(&site, &["migrate", "nobody", "h2"], 3, &["nobody"]);
    refused(&site, &["login", "alice", "--at", "ap-99"], 3, &["ap-99"]);
    let bad = site.dir().join("no-key");
    fs::write(&bad, "this is no key\n").unwrap();
    refused(&site, &["login", "alice", "--at", "ap-1", "--key", &bad.display().to_string()], 2, &["key"]);
    let login = site.login("alice", "ap-1");
    refused(&site, &["migrate", "alice", "h9"], 3, &["h9"]);
    refused(&site, &["migrate", "alice", "h2", "--mode", "postcopy"], 1, &["postcopy"]);
    refused(&site, &["roam", "alice", "ap-99"], 3, &["ap-99"]);
    refused(&site, &["login", "-rf"], 2, &[]);
    let address = text(&login, "address");
    assert!(site.output("d1", site.ssh("alice", address).arg("true")).unwrap().status.success());
}

#[test]
fn a_second_login_elsewhere_finds_the_same_machine() {
    let site = Site::up(1);
    let key = site.key("alice").with_extension("pub").display().to_string();
    let answers: Vec<_> = std::thread::scope(|scope| {
        let login = |host: &'static str, ap: &'static str| {
            let (site, key) = (&site, &key);
            scope.spawn(move || site.json(host, &["login", "alice", "--at", ap, "--key", key]))
        };
        let both = [login("h1", "ap-1"), login("h2", "ap-2")];
        both.into_iter().map(|login| login.join().unwrap()).collect()
    });
    assert_eq!(text(&answers[0], "vid"), text(&answers[1], "vid"));
    assert_eq!(text(&answers[0], "host"), text(&answers[1], "host"));
}

#[test]
fn a_host_that_is_down_is_named() {
    let site = Site::up(1);
    let login = site.login("alice", "ap-1");
    site.kill_daemon("h3").unwrap();
    let output = site.kage("h1", &["-o", "json", "migrate", "alice", "h3"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{errors}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a report");
    assert_eq!(text(&report, "outcome"), "kept", "{report}");
    let reason = text(&report, "reason");
    assert!(reason.contains("host h3"), "{reason:?} does not name the host");
    let address = text(&login, "address");
    assert!(site.output("d1", site.ssh("alice", address).arg("true")).unwrap().status.success());
}

#[test]
fn configurations_that_cannot_work_are_refused_with_file_and_cure() {
    let dir = std::env::temp_dir().join(format!("kage-config-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let site = Site::up(1);
    let good = fs::read_to_string(site.dir().join("h1/host.toml")).expect("the testbed writes host.toml");
    let cases = [
        ("memory = \"0\"", "memory"),
        ("memory = \"1KiB\"", "memory"),
        ("memory = \"1TiB\"", "memory"),
        ("prefix = \"fd00::/40\"", "prefix"),
        ("nonsense = 1", "nonsense"),
    ];
    for (line, word) in cases {
        let key = line.split(' ').next().unwrap();
        let section = if key == "prefix" { "[network]" } else { "[image]" };
        let kept: Vec<_> =
            good.lines().filter(|have| !have.trim_start().starts_with(&format!("{key} "))).collect();
        let text = kept.join("\n").replacen(section, &format!("{section}\n{line}"), 1);
        let file = dir.join("host.toml");
        fs::write(&file, text).unwrap();
        let output = Command::new(program()).arg("host").arg("-c").arg(&file).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{line} is taken");
        assert!(errors.contains("host.toml") && errors.contains(word), "{line}: {errors}");
    }
    fs::remove_dir_all(&dir).unwrap();
}

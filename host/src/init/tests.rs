use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::scratch::Scratch;

fn host(name: &str) -> HostSpec {
    HostSpec { name: name.parse().unwrap(), advertise: Some("[2001:db8::a]:7701".parse().unwrap()) }
}

fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(contents(&path));
        } else {
            all.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    all.sort();
    all
}

#[test]
fn a_second_call_adds_and_overwrites_nothing() {
    let dir = Scratch::new("init-twice");
    let made = site(dir.path(), &[host("a")]).unwrap();
    assert_eq!(made.created.len(), contents(dir.path()).len());
    let before = contents(dir.path());
    assert!(site(dir.path(), &[host("a")]).unwrap().created.is_empty());
    assert_eq!(contents(dir.path()), before);
    let more = site(dir.path(), &[host("a"), host("b")]).unwrap();
    assert!(more.created.iter().all(|path| path.starts_with(dir.path().join("b"))), "{:?}", more.created);
}

#[test]
fn private_files_are_for_their_owner_only() {
    let dir = Scratch::new("init-modes");
    let site = site(dir.path(), &[host("a")]).unwrap();
    let tls = site.tls_dir(&"a".parse().unwrap());
    for path in [site.operator_key(), site.radius_secret(), dir.path().join("ca.key"), tls.join("host.key")] {
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
    }
}

#[test]
fn half_a_pair_is_refused() {
    let dir = Scratch::new("init-half");
    let made = site(dir.path(), &[host("a")]).unwrap();
    fs::remove_file(made.tls_dir(&"a".parse().unwrap()).join("host.key")).unwrap();
    assert!(matches!(site(dir.path(), &[host("a")]), Err(InitError::Damaged { .. })));
    fs::write(dir.path().join("ca.key"), "nonsense").unwrap();
    assert!(matches!(site(dir.path(), &[host("b")]), Err(InitError::Damaged { .. })));
}

#[test]
fn a_name_that_fits_no_certificate_is_refused() {
    let dir = Scratch::new("init-name");
    let error = site(dir.path(), &[HostSpec { name: "a@b".parse().unwrap(), advertise: None }]).unwrap_err();
    assert!(matches!(error, InitError::Name(_)), "{error}");
}

#[test]
fn the_sample_configuration_is_accepted() {
    let dir = Scratch::new("init-sample");
    let site = site(dir.path(), &[host("a")]).unwrap();
    let config = crate::config::Config::load(&site.config(&"a".parse().unwrap())).unwrap();
    assert!(config.serves_directory());
}

#[test]
fn openssh_reads_the_operator_key() {
    let dir = Scratch::new("init-ssh");
    let site = site(dir.path(), &[]).unwrap();
    let output =
        std::process::Command::new("ssh-keygen").arg("-y").arg("-f").arg(site.operator_key()).output();
    // Where OpenSSH is not installed the format is still pinned by its magic.
    if let Ok(output) = output {
        let public = fs::read_to_string(site.operator_public()).unwrap();
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(public.starts_with(told.trim()) && !told.is_empty(), "{told} {public}");
    }
    let text = fs::read_to_string(site.operator_key()).unwrap();
    assert!(text.starts_with("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA"));
}

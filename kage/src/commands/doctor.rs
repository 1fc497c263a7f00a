//! `kage doctor`: what this machine has and lacks, with the cure for each lack.

use std::{fs, path::Path, process::Command};

use serde::Serialize;

use crate::{client::Failure, output::Output};

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub name: &'static str,
    /// Whether it is there.
    pub ok: bool,
    /// Whether machines run without it.
    pub needed: bool,
    /// What was found.
    pub found: String,
    /// What to do about it, when it is not there.
    pub cure: Option<String>,
}

/// Answer of `kage doctor`.
#[derive(Debug, Serialize)]
struct Diagnosis {
    ok: bool,
    findings: Vec<Finding>,
}

/// Effective capabilities, as bits of `capability.h`.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_NET_RAW: u32 = 13;

/// Runs the command.
pub fn run(output: Output) -> Result<(), Failure> {
    let findings = examine();
    let ok = findings.iter().all(|finding| finding.ok || !finding.needed);
    let diagnosis = Diagnosis { ok, findings };
    output.result(&diagnosis, |diagnosis| {
        let mut lines = Vec::new();
        for finding in &diagnosis.findings {
            let mark = match (finding.ok, finding.needed) {
                (true, _) => "ok     ",
                (false, true) => "MISSING",
                (false, false) => "without",
            };
            lines.push(format!("{mark}  {:<22} {}", finding.name, finding.found));
            lines.extend(finding.cure.as_ref().map(|cure| format!("{:9}{:<22} → {cure}", "", "")));
        }
        let verdict = if diagnosis.ok {
            "This machine can be an edge host."
        } else {
            "This machine cannot be an edge host yet."
        };
        lines.push(verdict.to_owned());
        lines.join("\n")
    })?;
    if ok { Ok(()) } else { Err(Failure { exit: 1, message: String::new() }) }
}

fn finding(name: &'static str, needed: bool, result: Result<String, String>, cure: &str) -> Finding {
    match result {
        Ok(found) => Finding { name, ok: true, needed, found, cure: None },
        Err(found) => Finding { name, ok: false, needed, found, cure: Some(cure.to_owned()) },
    }
}

fn examine() -> Vec<Finding> {
    let mut all = vec![
        finding("architecture", true, architecture(), "Kage runs on x86-64 only"),
        finding(
            "CPU level v3",
            true,
            cpu_level(),
            "use a CPU with AVX2, BMI and FMA (Intel Haswell, AMD Zen, or newer): every image expects them",
        ),
        finding(
            "/dev/kvm",
            true,
            device("/dev/kvm"),
            "load the module kvm_intel or kvm_amd (`modprobe kvm_intel`), let this user read and write /dev/kvm; in a VM: turn nested virtualisation on",
        ),
        finding(
            "/dev/net/tun",
            true,
            device("/dev/net/tun"),
            "`modprobe tun`; in a container: give it --device /dev/net/tun",
        ),
        finding(
            "userfaultfd",
            false,
            userfaultfd(),
            "`sysctl vm.unprivileged_userfaultfd=1`, or run as root: moves with pages after the switch need it",
        ),
        finding("memfd", true, memfd(), "use Linux 5.10 or newer"),
        finding("kernel", true, kernel(), "use Linux 5.10 or newer"),
    ];
    for (name, bit) in
        [("CAP_NET_ADMIN", CAP_NET_ADMIN), ("CAP_SYS_ADMIN", CAP_SYS_ADMIN), ("CAP_NET_RAW", CAP_NET_RAW)]
    {
        let needed = bit == CAP_NET_ADMIN;
        all.push(finding(
            name,
            needed,
            capability(bit),
            "run as root, or give the service AmbientCapabilities= for it",
        ));
    }
    all.push(finding(
        "namespaces",
        false,
        namespaces(),
        "`kage testbed` and `kage demo` need root and /run/netns",
    ));
    for (tool, package, needed_for) in [
        ("ip", "iproute2", "kage testbed"),
        ("tc", "iproute2", "kage testbed --link"),
        ("nft", "nftables", "kage testbed --loss"),
        ("ssh", "openssh-client", "kage demo"),
        ("curl", "curl", "scripts/demo"),
    ] {
        let cure = format!("`apt-get install {package}`; {needed_for} needs it");
        all.push(finding(tool_name(tool), false, program(tool), &cure));
    }
    all
}

const fn tool_name(tool: &'static str) -> &'static str {
    tool
}

fn architecture() -> Result<String, String> {
    let name = std::env::consts::ARCH;
    if name == "x86_64" { Ok(name.to_owned()) } else { Err(name.to_owned()) }
}

fn cpu_level() -> Result<String, String> {
    #[cfg(target_arch = "x86_64")]
    {
        let features = [
            ("avx2", std::arch::is_x86_feature_detected!("avx2")),
            ("bmi1", std::arch::is_x86_feature_detected!("bmi1")),
            ("bmi2", std::arch::is_x86_feature_detected!("bmi2")),
            ("fma", std::arch::is_x86_feature_detected!("fma")),
            ("lzcnt", std::arch::is_x86_feature_detected!("lzcnt")),
            ("movbe", std::arch::is_x86_feature_detected!("movbe")),
        ];
        let missing: Vec<_> = features.iter().filter(|(_, there)| !there).map(|(name, _)| *name).collect();
        if missing.is_empty() {
            Ok("all features".to_owned())
        } else {
            Err(format!("lacks {}", missing.join(", ")))
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    Err("not x86-64".to_owned())
}

fn device(path: &str) -> Result<String, String> {
    match fs::File::options().read(true).write(true).open(path) {
        Ok(_) => Ok("can be opened".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn userfaultfd() -> Result<String, String> {
    if Path::new("/dev/userfaultfd").exists() {
        return device("/dev/userfaultfd");
    }
    let unprivileged = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")
        .map_err(|error| format!("no kernel support ({error})"))?;
    if unprivileged.trim() == "1" {
        return Ok("for everybody".to_owned());
    }
    capability(19).map(|_| "with CAP_SYS_PTRACE".to_owned()).map_err(|_| "for root only".to_owned())
}

fn memfd() -> Result<String, String> {
    rustix::fs::memfd_create("kage-doctor", rustix::fs::MemfdFlags::CLOEXEC)
        .map(|_| "can be made".to_owned())
        .map_err(|error| error.to_string())
}

fn kernel() -> Result<String, String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").map_err(|error| error.to_string())?;
    let release = release.trim();
    if at_least(release, 5, 10) { Ok(release.to_owned()) } else { Err(release.to_owned()) }
}

fn at_least(release: &str, major: u32, minor: u32) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(found_major), Some(found_minor)) => (found_major, found_minor) >= (major, minor),
        _ => false,
    }
}

fn capability(bit: u32) -> Result<String, String> {
    let status = fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .ok_or("unknown")?;
    if effective & (1 << bit) != 0 { Ok("held".to_owned()) } else { Err("not held".to_owned()) }
}

fn namespaces() -> Result<String, String> {
    if !Path::new("/proc/self/ns/net").exists() {
        return Err("no network namespaces in this kernel".to_owned());
    }
    capability(CAP_SYS_ADMIN).map(|_| "can be made".to_owned())
}

fn program(name: &str) -> Result<String, String> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    let Some(path) = found else { return Err("not installed".to_owned()) };
    let version = Command::new(&path).arg("-V").output().ok();
    let text = version.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    let first = String::from_utf8_lossy(&text).lines().next().unwrap_or_default().trim().to_owned();
    Ok(if first.is_empty() { path.display().to_string() } else { first.chars().take(60).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lack_has_a_cure() {
        for finding in examine() {
            assert_eq!(finding.ok, finding.cure.is_none(), "{finding:?}");
        }
    }

    #[test]
    fn kernel_releases_are_compared_by_number() {
        assert!(at_least("6.1.0-18-amd64", 5, 10));
        assert!(at_least("5.10", 5, 10));
        assert!(!at_least("5.9.99", 5, 10));
        assert!(!at_least("nonsense", 5, 10));
    }
}

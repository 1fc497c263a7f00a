//! `kage bench files`: files in a machine.
//!
//! *Loads* run the same source as a process of a machine (WebAssembly) and natively in this program, in turns, under the
//! same sync rule; natively in the directory where the host keeps the machine's log, so on the same file system. The
//! machine has half as much memory as the file has bytes: what it reads comes from its disk, and the host's page cache
//! helps both. *Store*: the block store alone, in the same directory. *Handover*: what of a disk a move sends and what
//! that does to its blackout, where the target held the disk before.

use std::{
    fs,
    path::{Path, PathBuf},
};

use kage_host::{api::types::MigrateRequest, units::Size};
use kage_work::files::{self, Access, Done, FILE_LOADS, FileLoad, SMALL_FILES, Sync};
use serde_json::{Value, json};

use super::{Case, MachineInfo, Report, desk::Desk, show, store};
use crate::{
    client::Failure,
    output::Output,
    testbed::{Cancel, Testbed, TestbedSpec},
};

const QUICK: u32 = 2;
/// Half of the file that is read.
const MEMORY: Size = Size(64 << 20);
/// 4 KiB writes that make 1 % of 1 GiB.
const ONE_PERCENT: u32 = 2621;

/// Runs the bench.
///
/// # Errors
/// What keeps it from running.
pub fn run(runs: u32, quick: bool, output: Output) -> Result<(), Failure> {
    let runs = if quick { runs.min(QUICK) } else { runs }.max(1);
    let cancel = crate::testbed::cli::cancel_on_signals().map_err(Failure::new)?;
    let dir = std::env::temp_dir().join(format!("kage-bench-{}", std::process::id()));
    let binary = std::env::current_exe().map_err(Failure::new)?;
    let spec =
        TestbedSpec { hosts: 2, devices: 1, image_memory: Some(MEMORY), ..TestbedSpec::new(&dir, binary) };
    output.progress("making two hosts and a device");
    let testbed = Testbed::scoped(spec, &cancel).map_err(Failure::new)?;
    let desk = Desk::login(&testbed)?;
    if !desk.say("df")?.starts_with("disk ") {
        return Err(Failure::new("the machine has no disk; see `[image] disk` in the host's configuration"));
    }
    let beside = Beside::new(testbed.dir().join("h1/state/bench"))?;
    let mut cases = Vec::new();
    for load in &FILE_LOADS {
        cases.push(desk.load(&beside, load, runs, output, &cancel)?);
    }
    cases.extend(desk.small_files(&beside, runs, output, &cancel)?);
    cases.extend(desk.handovers(runs, output, &cancel)?);
    drop(desk);
    cases.extend(store::cases(&beside.dir, quick, output, &cancel)?);
    output.result(&Report { machine: MachineInfo::here(), cases }, show)
}

/// A directory of the host's, where its log lies.
struct Beside {
    dir: PathBuf,
    /// Its file system, as a peer is named.
    name: String,
}

impl Beside {
    fn new(dir: PathBuf) -> Result<Self, Failure> {
        fs::create_dir_all(&dir).map_err(|error| Failure::new(format!("{}: {error}", dir.display())))?;
        let name = format!("native, {}", file_system(&dir)?);
        Ok(Self { dir, name })
    }

    fn file(&self) -> PathBuf {
        self.dir.join("file")
    }
}

/// What kind of file system a directory is on (`statfs(2)`).
fn file_system(dir: &Path) -> Result<String, Failure> {
    let found =
        rustix::fs::statfs(dir).map_err(|error| Failure::new(format!("{}: {error}", dir.display())))?;
    let name = match found.f_type {
        0xef53 => "ext4",
        0x0102_1994 => "tmpfs",
        0x794c_7630 => "overlayfs",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        other => return Ok(format!("file system {other:#x}")),
    };
    Ok(name.to_owned())
}

/// What `work file …` printed.
fn done(said: &str) -> Option<Done> {
    let mut words = said.split_whitespace();
    let sum = u64::from_str_radix(words.next()?, 16).ok()?;
    Some(Done { sum, count: words.next()?.parse().ok()?, seconds: words.next()?.parse().ok()? })
}

/// So many a second.
fn rate(done: Done, unit: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let count = done.count as f64;
    count / unit / done.seconds.max(1e-9)
}

impl Desk<'_> {
    fn file_work(&self, what: &str) -> Result<Done, Failure> {
        let said = self.say(&format!("work file {what}"))?;
        done(&said).ok_or_else(|| Failure::new(format!("work file {what}: {said:?}")))
    }

    /// The same load here and there, in turns.
    fn load(
        &self,
        beside: &Beside,
        load: &FileLoad,
        runs: u32,
        output: Output,
        cancel: &Cancel,
    ) -> Result<Case, Failure> {
        let (mut inside, mut native) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            cancel.check().map_err(Failure::new)?;
            // What is left unwritten by the load before is not this one's.
            self.say("sync")?;
            rustix::fs::sync();
            let path = beside.file();
            let there = files::run(load, &path, load.pieces)
                .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
            let here = self.file_work(&format!("{} bench-file", load.name))?;
            if (here.sum, here.count) != (there.sum, there.count) {
                return Err(Failure::new(format!(
                    "{}: {here:?} in the machine, {there:?} natively",
                    load.name
                )));
            }
            inside.push(rate(here, 1e6));
            native.push(rate(there, 1e6));
        }
        output.progress(format!("{}: {runs} runs", load.name));
        let sync = match load.sync {
            Sync::Never => json!("never"),
            Sync::AtEnd => json!("once, at the end"),
            Sync::Every(1) => json!("after each"),
            Sync::Every(count) => json!(format!("after {count}")),
        };
        let params = json!({
            "request_bytes": load.piece_bytes, "requests": load.pieces, "file_bytes": files::FILE_BYTES,
            "synced": if load.access == Access::Read { Value::Null } else { sync },
        });
        let name = format!("file_{}", load.name.replace('-', "_"));
        Ok(Case::of(&name, params, "MB/s", inside).ahead_of(&beside.name, native))
    }

    /// Many small files made, synced and removed.
    fn small_files(
        &self,
        beside: &Beside,
        runs: u32,
        output: Output,
        cancel: &Cancel,
    ) -> Result<Vec<Case>, Failure> {
        let mut figures = [(); 3].map(|()| (Vec::new(), Vec::new()));
        let path = beside.dir.join("small");
        let failed = |error: std::io::Error| Failure::new(format!("{}: {error}", path.display()));
        for _ in 0..runs {
            cancel.check().map_err(Failure::new)?;
            let native = [
                files::create(&path, SMALL_FILES).map_err(failed)?,
                sync_time(&beside.dir)?,
                files::remove(&path, SMALL_FILES).map_err(failed)?,
            ];
            let inside = [
                self.file_work("create bench-small")?,
                self.file_work("sync bench-file")?,
                self.file_work("remove bench-small")?,
            ];
            self.say("sync")?;
            for ((inside_figures, native_figures), (inside, native)) in
                figures.iter_mut().zip(inside.into_iter().zip(native))
            {
                inside_figures.push(inside.seconds);
                native_figures.push(native.seconds);
            }
        }
        output.progress(format!("small files: {runs} runs"));
        let params = json!({ "files": SMALL_FILES });
        let names = ["small_files_create", "small_files_sync", "small_files_remove"];
        Ok(names
            .into_iter()
            .zip(figures)
            .map(|(name, (inside, native))| {
                Case::of(name, params.clone(), "s", inside).beside(&beside.name, native)
            })
            .collect())
    }

    /// Moves with 1 % of 1 GiB written since the target held the disk, beside moves with nothing written.
    fn handovers(&self, runs: u32, output: Output, cancel: &Cancel) -> Result<Vec<Case>, Failure> {
        self.file_work("seq-write-synced bench-file")?;
        // Each host gets to hold the disk.
        for host in ["h2", "h1"] {
            self.go(host, output)?;
        }
        let (mut written, mut idle) = (Moves::default(), Moves::default());
        for run in 0..runs {
            cancel.check().map_err(Failure::new)?;
            idle.push(&self.go("h2", output)?)?;
            self.file_work(&format!("rand-write-synced bench-file {}", ONE_PERCENT + run))?;
            written.push(&self.go("h1", output)?)?;
        }
        output.progress(format!("handovers: {runs} of each"));
        let params = json!({ "held_bytes": files::FILE_BYTES, "written_bytes": ONE_PERCENT * 4096 });
        let peer = "nothing written";
        Ok(vec![
            Case::of("handover_blackout", params.clone(), "ms", written.blackout_ms)
                .beside(peer, idle.blackout_ms),
            Case::of("handover_total", params.clone(), "ms", written.total_ms).beside(peer, idle.total_ms),
            Case::of("handover_wire", params.clone(), "MB", written.wire_mb).beside(peer, idle.wire_mb),
            Case::of("handover_disk_wire", params.clone(), "MB", written.disk_wire_mb),
            Case::of("handover_disk_blocks", params, "blocks", written.disk_blocks),
        ])
    }

    /// Moves the machine and returns the report.
    fn go(&self, host: &str, output: Output) -> Result<Value, Failure> {
        let to = host.parse().map_err(Failure::new)?;
        let request = MigrateRequest { to: Some(to), ..MigrateRequest::default() };
        let report: Value = self.migrate(&request, output)?;
        if report["outcome"] != "handed_over" {
            return Err(Failure::new(format!("the move to {host} failed: {report}")));
        }
        Ok(report)
    }
}

/// A sync of everything in a directory's file system, timed.
fn sync_time(dir: &Path) -> Result<Done, Failure> {
    let opened = fs::File::open(dir).map_err(|error| Failure::new(format!("{}: {error}", dir.display())))?;
    let begun = std::time::Instant::now();
    rustix::fs::syncfs(&opened).map_err(|error| Failure::new(format!("{}: {error}", dir.display())))?;
    Ok(Done { sum: 0, count: 0, seconds: begun.elapsed().as_secs_f64() })
}

/// Figures of moves.
#[derive(Default)]
struct Moves {
    blackout_ms: Vec<f64>,
    total_ms: Vec<f64>,
    wire_mb: Vec<f64>,
    /// What went for blocks of the disk; the load's compress well.
    disk_wire_mb: Vec<f64>,
    disk_blocks: Vec<f64>,
}

impl Moves {
    fn push(&mut self, report: &Value) -> Result<(), Failure> {
        let field = |name: &str| {
            report[name].as_f64().ok_or_else(|| Failure::new(format!("the move's report has no {name}")))
        };
        self.blackout_ms.push(field("blackout_ms")?);
        self.total_ms.push(field("total_ms")?);
        self.wire_mb.push(field("bytes_wire")? / 1e6);
        self.disk_wire_mb.push(field("disk_bytes_sent")? / 1e6);
        self.disk_blocks.push(field("disk_pages_sent")?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_load_prints_is_read_back() {
        let read = done("00000000000000ff 4096 0.250000 s\n").unwrap();
        assert_eq!((read.sum, read.count, read.seconds), (255, 4096, 0.25));
        assert!((rate(read, 1024.0) - 16.0).abs() < 1e-9);
        assert!(done("").is_none() && done("x 1 2 s").is_none());
    }

    #[test]
    fn file_systems_have_names() {
        assert!(!file_system(Path::new("/")).unwrap().is_empty());
        assert!(file_system(Path::new("/no/such/place")).is_err());
    }
}

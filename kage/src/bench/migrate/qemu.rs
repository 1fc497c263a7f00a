//! The peer of `kage bench migrate`: QEMU under KVM does the same work on links of the same shape, in the same run.
//!
//! ```text
//!   h1: qemu (source) ── tbf ── core ── tbf ── qemu (target) :h2
//!        guest in ring 3: heartbeat, rewriting           (a testbed's network, without daemons)
//! ```
//!
//! The guest has the same pages as a machine under `dirty W% R/s --content mixed`, made by the same function, and
//! rewrites the same words in the same order. What it sees of a move is what Kage's guest would: the longest gap
//! between two heartbeats and the sum of those above a millisecond, from the request to the last page and a second.
//! QEMU's own figure of its downtime is not used: it begins and ends inside QEMU.
//!
//! - [`firmware`]: from reset to ring 3, and the guest's memory.
//! - [`program`]: what the guest does.
//! - [`figures`]: what it noted.
//! - [`qmp`], [`process`]: QEMU from outside.
//!
//! Deliberately not here: Linux in the guest. Ring 0 is emulated on some hosts, and what it would do beside the load
//! is not what is compared.

mod figures;
mod firmware;
mod process;
mod program;
mod qmp;

use std::{
    fs,
    os::{fd::AsFd, unix::fs::DirBuilderExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use kage_abi::content::{Content, PAGE_WORDS, fill_page, turn_page};
use serde_json::{Value, json};

use crate::{
    client::Failure,
    testbed::{Cancel, LinkShape, Testbed, TestbedSpec},
};
use figures::{Gaps, Sample};
use firmware::{FIRMWARE_BYTES, MOST_MEMORY, PAGES, SLOTS};
pub use process::check_installed;
use process::{Contents, Qemu};
use program::{Orders, SLOT_COUNT};
use qmp::Event;

const SOURCE: &str = "h1";
const TARGET: &str = "h2";
/// Where the target listens.
const PORT: u16 = 4444;
/// A move that is not done by then never ends, unless its work allows it longer.
const LONGEST_MOVE: Duration = Duration::from_secs(60);
/// How long the load runs before a move is asked for.
const SETTLE: Duration = Duration::from_secs(1);
/// How long gaps count after the last page (SURFACE.md, `gap_ms`).
const AFTER: Duration = Duration::from_secs(1);
/// How long the guest's clock is compared with ours.
const CALIBRATION: Duration = Duration::from_secs(1);
/// A bandwidth that is not the limit, in bytes a second.
const NO_LIMIT: u64 = 10_000_000_000;
/// Time the tuned modes may stop the guest, in milliseconds.
const DOWNTIME_LIMIT_MS: u64 = 10;
/// Bytes not yet sent that tuned sources keep in a socket: more of them wait before the guest's last pages.
const NOT_SENT_LOWAT: u32 = 16 << 10;
/// Bytes of a page, and of memory that is compared at once.
const PAGE_BYTES: usize = PAGE_WORDS * 8;
const CHECKED_AT_ONCE: usize = 16 << 20;
const LOWAT_FILE: &str = "/proc/sys/net/ipv4/tcp_notsent_lowat";

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Its memory.
    pub memory_bytes: u64,
    /// Share of its pages that is rewritten.
    pub working_set_percent: u64,
    /// Pages rewritten a second, eight words each.
    pub pages_per_second: u64,
    /// How long a move of it may take where that is more than a minute.
    pub patience: Duration,
}

/// How QEMU is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tuning {
    /// Pre-copy as it comes, but for its limit of bandwidth.
    Defaults,
    /// Pre-copy through several streams, compressed by zstd; short stops, short queues.
    MultifdZstd,
    /// Pre-copy with compressed pages; short stops, short queues.
    Compress,
    /// Pre-copy that sends differences; short stops, short queues.
    Xbzrle,
    /// Post-copy from the start.
    Postcopy,
    /// Post-copy from the start, with a stream of its own for pages that are waited for; short queues.
    PostcopyPreempt,
}

impl Tuning {
    /// All there are.
    pub const ALL: [Self; 6] = [
        Self::Defaults,
        Self::MultifdZstd,
        Self::Compress,
        Self::Xbzrle,
        Self::Postcopy,
        Self::PostcopyPreempt,
    ];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Defaults => "defaults",
            Self::MultifdZstd => "multifd+zstd",
            Self::Compress => "compress",
            Self::Xbzrle => "xbzrle",
            Self::Postcopy => "postcopy",
            Self::PostcopyPreempt => "postcopy-preempt",
        }
    }

    /// What both sides must be able to do.
    const fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::Defaults => &["events"],
            Self::MultifdZstd => &["events", "multifd"],
            Self::Compress => &["events", "compress"],
            Self::Xbzrle => &["events", "xbzrle"],
            Self::Postcopy => &["events", "postcopy-ram"],
            Self::PostcopyPreempt => &["events", "postcopy-ram", "postcopy-preempt"],
        }
    }

    fn parameters(self, memory_bytes: u64) -> Value {
        let mut parameters = json!({ "max-bandwidth": NO_LIMIT });
        match self {
            Self::Defaults | Self::Compress | Self::Postcopy | Self::PostcopyPreempt => {}
            Self::MultifdZstd => parameters["multifd-compression"] = json!("zstd"),
            // As much as the guest has, so that no page lacks its former content.
            Self::Xbzrle => parameters["xbzrle-cache-size"] = json!(memory_bytes.next_power_of_two()),
        }
        if matches!(self, Self::MultifdZstd | Self::Compress | Self::Xbzrle) {
            parameters["downtime-limit"] = json!(DOWNTIME_LIMIT_MS);
        }
        parameters
    }

    const fn is_postcopy(self) -> bool {
        matches!(self, Self::Postcopy | Self::PostcopyPreempt)
    }

    const fn keeps_queue_short(self) -> bool {
        matches!(self, Self::MultifdZstd | Self::Compress | Self::Xbzrle | Self::PostcopyPreempt)
    }
}

/// What a move took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// From the request to the last page at the target.
    pub total_ms: f64,
    /// The longest gap the guest saw.
    pub gap_ms: f64,
    /// The sum of those above a millisecond.
    pub stall_ms: f64,
    /// What the source's host sent meanwhile.
    pub bytes_wire: u64,
}

/// How a move ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Run {
    /// The guest runs at the target.
    Moved(Figures),
    /// It does not, and why: that it never ends, or what QEMU says.
    GivenUp(String),
}

/// Moves a guest `runs` times, from a fresh start each time.
///
/// # Errors
/// When QEMU is missing or does not run, or when cancelled; nothing is left running.
pub fn measure(
    work: &Work,
    shape: &LinkShape,
    tuning: Tuning,
    runs: u32,
    cancel: &Cancel,
) -> Result<Vec<Run>, Failure> {
    check_installed()?;
    if !(4 << 20..=MOST_MEMORY).contains(&work.memory_bytes) {
        let most = MOST_MEMORY >> 20;
        return Err(Failure::new(format!(
            "the guest in QEMU has 4 to {most} MiB, not {} bytes",
            work.memory_bytes
        )));
    }
    let files = Files::make()?;
    let binary = std::env::current_exe().map_err(Failure::new)?;
    let spec = TestbedSpec {
        hosts: 2,
        devices: 0,
        link: shape.clone(),
        daemons: false,
        ..TestbedSpec::new(files.0.join("testbed"), binary)
    };
    let testbed = Testbed::scoped(spec, cancel).map_err(Failure::new)?;
    let lowat = if tuning.keeps_queue_short() { NOT_SENT_LOWAT } else { u32::MAX };
    testbed
        .within(SOURCE, || fs::write(LOWAT_FILE, lowat.to_string()))
        .map_err(Failure::new)?
        .map_err(|error| Failure::new(format!("{LOWAT_FILE}: {error}")))?;
    let peers = Peers { work: *work, tuning, testbed: &testbed, files: &files, cancel };
    peers.files.fill(work)?;
    let orders = peers.orders()?;
    (0..runs).map(|_| peers.run(&orders)).collect()
}

/// The guests' files, removed when dropped.
struct Files(PathBuf);

impl Files {
    fn make() -> Result<Self, Failure> {
        let dir = std::env::temp_dir().join(format!("kage-qemu-{}", std::process::id()));
        // Nobody else's: what is written there is written as root.
        let made = fs::DirBuilder::new().mode(0o700).create(&dir);
        made.map_err(|error| Failure::new(format!("{}: {error}", dir.display())))?;
        Ok(Self(dir))
    }

    fn low(&self) -> PathBuf {
        self.0.join("low")
    }

    fn pages(&self) -> PathBuf {
        self.0.join("pages")
    }

    /// Writes the firmware and what memory is filled with.
    fn fill(&self, work: &Work) -> Result<(), Failure> {
        let firmware = firmware::firmware().map_err(Failure::new)?;
        debug_assert_eq!(firmware.len(), FIRMWARE_BYTES);
        self.write(&self.0.join("firmware"), &firmware)?;
        let mut bytes = Vec::with_capacity((work.memory_bytes - PAGES) as usize);
        let mut page = [0; PAGE_WORDS];
        for number in 0..pages_of(work) {
            fill_page(Content::Mixed, number, &mut page);
            bytes.extend(page.iter().flat_map(|word| word.to_le_bytes()));
        }
        self.write(&self.pages(), &bytes)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), Failure> {
        fs::write(path, bytes).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // What is left lies in the directory for such things.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Pages that are filled: all but low memory.
fn pages_of(work: &Work) -> u64 {
    (work.memory_bytes - PAGES) / PAGE_BYTES as u64
}

/// What all runs have in common.
struct Peers<'a> {
    work: Work,
    tuning: Tuning,
    testbed: &'a Testbed,
    files: &'a Files,
    cancel: &'a Cancel,
}

impl Peers<'_> {
    /// The work in ticks of the guest's clock, which is compared with ours while the guest does nothing.
    fn orders(&self) -> Result<Orders, Failure> {
        let mut guest = self.source(&Orders { ticks_per_second: 1_000_000_000, ..Orders::default() })?;
        let begin = guest.until_beating(self.cancel)?;
        self.cancel.wait_until(Instant::now() + CALIBRATION).map_err(Failure::new)?;
        let ticks_per_second = begin
            .ticks_per_second(&guest.sample()?)
            .ok_or_else(|| Failure::new("the clock of the guest in QEMU goes back"))?;
        let working_set = pages_of(&self.work) * self.work.working_set_percent.min(100) / 100;
        let rate = if working_set == 0 { 0 } else { self.work.pages_per_second };
        Ok(Orders { ticks_per_second, rate, working_set })
    }

    fn source(&self, orders: &Orders) -> Result<Qemu, Failure> {
        let low = firmware::low_memory(self.work.memory_bytes, orders).map_err(Failure::new)?;
        let (path, pages) = (self.files.low(), self.files.pages());
        self.files.write(&path, &low)?;
        self.start(SOURCE, Some(Contents { low: &path, pages: &pages }))
    }

    fn start(&self, host: &str, contents: Option<Contents<'_>>) -> Result<Qemu, Failure> {
        Qemu::start(self.testbed, host, &self.files.0, self.work.memory_bytes, contents, self.cancel)
    }

    fn run(&self, orders: &Orders) -> Result<Run, Failure> {
        let mut source = self.source(orders)?;
        let mut target = self.start(TARGET, None)?;
        for side in [&mut source, &mut target] {
            let states: Vec<_> = self
                .tuning
                .capabilities()
                .iter()
                .map(|name| json!({ "capability": name, "state": true }))
                .collect();
            let set =
                side.execute("migrate-set-capabilities", json!({ "capabilities": states })).and_then(|_| {
                    side.execute("migrate-set-parameters", self.tuning.parameters(self.work.memory_bytes))
                });
            // A QEMU of another version need not have every setting.
            if let Err(refused) = set {
                self.cancel.check().map_err(Failure::new)?;
                return Ok(Run::GivenUp(refused.message));
            }
        }
        target.execute("migrate-incoming", json!({ "uri": format!("tcp:[::]:{PORT}") }))?;
        source.until_beating(self.cancel)?;
        self.cancel.wait_until(Instant::now() + SETTLE).map_err(Failure::new)?;

        let (before, sent) = (source.sample()?, source.sent()?);
        let requested = Instant::now();
        let done = match self.migrate(&mut source, &mut target, requested) {
            Ok(Ok(done)) => done,
            Ok(Err(reason)) => return Ok(Run::GivenUp(reason)),
            // One of them may have ended over it.
            Err(failure) => {
                self.cancel.check().map_err(Failure::new)?;
                return Ok(Run::GivenUp(failure.message));
            }
        };
        let bytes_wire = source.sent()?.saturating_sub(sent);
        drop(source);
        self.cancel.wait_until(done + AFTER).map_err(Failure::new)?;
        let gaps = self.gaps(orders, &mut target, &before)?;
        self.check(orders, &mut target)?;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Ok(Run::Moved(Figures {
            total_ms: ms(done - requested),
            gap_ms: ms(gaps.longest),
            stall_ms: ms(gaps.stall),
            bytes_wire,
        }))
    }

    /// Moves the guest; returns when the last page was at the target, or why it is not.
    fn migrate(
        &self,
        source: &mut Qemu,
        target: &mut Qemu,
        requested: Instant,
    ) -> Result<Result<Instant, String>, Failure> {
        let address = self.testbed.underlay(TARGET).map_err(Failure::new)?;
        source.execute("migrate", json!({ "uri": format!("tcp:[{address}]:{PORT}") }))?;
        if self.tuning.is_postcopy() {
            source.execute("migrate-start-postcopy", Value::Null)?;
        }
        let mut progress = Progress::default();
        loop {
            let fds = [source.qmp.as_fd(), target.qmp.as_fd()];
            let patience = LONGEST_MOVE.max(self.work.patience);
            if !qmp::wait(&fds, self.cancel, requested + patience).map_err(Failure::new)? {
                return Ok(Err(format!("not done after {} s", patience.as_secs())));
            }
            let now = Instant::now();
            for event in source.events()? {
                progress.source.note(&event);
            }
            for event in target.events()? {
                progress.target.note(&event);
            }
            match progress {
                Progress { source: Side::Failed, .. } | Progress { target: Side::Failed, .. } => {
                    let said = source.execute("query-migrate", Value::Null)?;
                    let why = said["error-desc"].as_str().unwrap_or("the migration failed");
                    return Ok(Err(why.to_owned()));
                }
                Progress { source: Side::Done, target: Side::Done } => return Ok(Ok(now)),
                Progress { source: Side::Busy, .. } | Progress { target: Side::Busy, .. } => {}
            }
        }
    }

    /// What the guest saw of the time since a sample at the source.
    fn gaps(&self, orders: &Orders, target: &mut Qemu, before: &Sample) -> Result<Gaps, Failure> {
        let after = target.sample()?;
        if after.beats <= before.beats || (orders.rate > 0 && after.turns <= before.turns) {
            return Err(Failure::new("the guest in QEMU does not run at the target"));
        }
        let slots = target.memory(SLOTS, SLOT_COUNT * 16)?;
        let gaps = Gaps::of(&slots, orders, before.began, before.last);
        Ok(gaps.and_hidden(before.hidden_until(&after, orders)))
    }

    /// Compares the guest's memory, byte by byte, with what Kage's load would have made of it.
    fn check(&self, orders: &Orders, target: &mut Qemu) -> Result<(), Failure> {
        target.execute("stop", Value::Null)?;
        let turns = target.sample()?.turns;
        let path = self.files.pages();
        let mut expected =
            fs::read(&path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
        program::rewritten(&mut expected, orders, turns);
        // The page it was stopped in may be half rewritten.
        let last = turn_page(turns, orders.working_set.max(1));
        for (number, expected) in expected.chunks(CHECKED_AT_ONCE).enumerate() {
            let first = (number * CHECKED_AT_ONCE) as u64;
            let found = target.memory(PAGES + first, expected.len() as u64)?;
            let pages = found.chunks(PAGE_BYTES).zip(expected.chunks(PAGE_BYTES));
            let wrong = (first / PAGE_BYTES as u64..)
                .zip(pages)
                .find(|(page, (found, expected))| *page != last && found != expected);
            if let Some((page, _)) = wrong {
                return Err(Failure::new(format!(
                    "page {page} of the guest in QEMU is not what {turns} turns make of it"
                )));
            }
        }
        Ok(())
    }
}

/// How far both sides are.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    source: Side,
    target: Side,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Side {
    #[default]
    Busy,
    Done,
    Failed,
}

impl Side {
    fn note(&mut self, event: &Event) {
        match event.migration() {
            Some("completed") => *self = Self::Done,
            Some("failed" | "cancelled" | "postcopy-paused") => *self = Self::Failed,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tuned_modes_differ_from_the_defaults_where_they_should() {
        let limit = |tuning: Tuning| tuning.parameters(64 << 20)["downtime-limit"].as_u64();
        assert_eq!(limit(Tuning::Defaults), None);
        assert_eq!(limit(Tuning::Postcopy), None);
        for tuning in [Tuning::MultifdZstd, Tuning::Compress, Tuning::Xbzrle] {
            assert_eq!(limit(tuning), Some(DOWNTIME_LIMIT_MS));
            assert!(tuning.keeps_queue_short() && !tuning.is_postcopy());
        }
        assert_eq!(Tuning::Xbzrle.parameters(100 << 20)["xbzrle-cache-size"], json!(128 << 20));
        for tuning in Tuning::ALL {
            assert!(tuning.capabilities().contains(&"events"));
            assert_eq!(tuning.parameters(64 << 20)["max-bandwidth"], json!(NO_LIMIT));
            assert_eq!(Tuning::ALL.iter().filter(|other| other.name() == tuning.name()).count(), 1);
        }
        assert!(!Tuning::Postcopy.keeps_queue_short() && Tuning::PostcopyPreempt.keeps_queue_short());
    }

    #[test]
    fn a_side_is_done_once_it_says_so() {
        let state = |status: &str| Event { name: "MIGRATION".into(), data: json!({ "status": status }) };
        let mut side = Side::default();
        for status in ["setup", "active", "device", "postcopy-active"] {
            side.note(&state(status));
            assert_eq!(side, Side::Busy);
        }
        side.note(&Event { name: "STOP".into(), data: Value::Null });
        side.note(&state("completed"));
        assert_eq!(side, Side::Done);
        side.note(&state("failed"));
        assert_eq!(side, Side::Failed);
    }
}

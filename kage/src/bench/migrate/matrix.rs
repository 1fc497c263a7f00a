//! Which moves are made: cases, and the sets of them. Pure.
//!
//! A case has six properties. By default one base case is taken and each property varied alone, and what tables of others'
//! figures have is added; every combination is far too much for one day.

use std::time::Duration;

use kage_host::{
    config::Mode,
    units::{Rate, Size},
};
use serde::Serialize;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// What a machine has and does: `dirty SET% WRITES/s --content mixed` in so much memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Memory of the machine.
    pub memory: Size,
    /// Share of it that is rewritten, in percent.
    pub set_percent: u8,
    /// How many pages a second are.
    pub writes_per_s: u32,
}

/// The link between the hosts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Its rate, each way; what the machine here gives if `None`.
    pub rate: Option<Rate>,
    /// One way.
    pub delay: Duration,
}

/// What the target holds of the machine when the move begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mirror {
    /// Nothing.
    None,
    /// What the machine left there when it went away, so long ago that most of its working set was rewritten since.
    Old,
    /// A mirror that its owner keeps in step.
    Fresh,
}

/// One kind of move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kind {
    /// The machine.
    pub work: Work,
    /// Between the hosts.
    pub link: Link,
    /// At the target.
    pub mirror: Mirror,
    /// How.
    pub mode: Mode,
}

/// A property of a case, to plot over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Of the machine.
    Memory,
    /// What of it is rewritten.
    Set,
    /// How fast.
    Writes,
    /// Its rate.
    Link,
    /// On the link.
    Delay,
    /// What the target holds.
    Mirror,
    /// How it is moved.
    Mode,
}

impl Axis {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Memory, Self::Set, Self::Writes, Self::Link, Self::Delay, Self::Mirror, Self::Mode];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Set => "working set",
            Self::Writes => "page writes",
            Self::Link => "link",
            Self::Delay => "delay, one way",
            Self::Mirror => "held at the target",
            Self::Mode => "mode",
        }
    }

    /// A case's place on it.
    pub fn of(self, kind: &Kind) -> String {
        match self {
            Self::Memory => memory(kind.work.memory),
            Self::Set => format!("{} %", kind.work.set_percent),
            Self::Writes => format!("{}/s", thousands(kind.work.writes_per_s)),
            Self::Link => link(kind.link.rate),
            Self::Delay => format!("{} ms", kind.link.delay.as_millis()),
            Self::Mirror => mirror(kind.mirror).to_owned(),
            Self::Mode => mode(kind.mode).to_owned(),
        }
    }

    /// The base case with this property alone varied, in order; the base case is among them.
    pub fn varied(self) -> Vec<Kind> {
        let base = BASE;
        match self {
            Self::Memory => MEMORIES.map(|memory| Kind { work: Work { memory, ..base.work }, ..base }).into(),
            Self::Set => {
                SETS.map(|set_percent| Kind { work: Work { set_percent, ..base.work }, ..base }).into()
            }
            Self::Writes => {
                WRITES.map(|writes_per_s| Kind { work: Work { writes_per_s, ..base.work }, ..base }).into()
            }
            Self::Link => RATES.map(|rate| Kind { link: Link { rate, ..base.link }, ..base }).into(),
            Self::Delay => DELAYS.map(|delay| Kind { link: Link { delay, ..base.link }, ..base }).into(),
            Self::Mirror => MIRRORS.map(|mirror| Kind { mirror, ..base }).into(),
            Self::Mode => MODES.map(|mode| Kind { mode, ..base }).into(),
        }
    }
}

const MEMORIES: [Size; 3] = [Size(64 * MIB), Size(256 * MIB), Size(1024 * MIB)];
const SETS: [u8; 2] = [5, 30];
const WRITES: [u32; 4] = [0, 500, 5_000, 50_000];
const RATES: [Option<Rate>; 5] =
    [Some(Rate(10_000_000)), FIFTY, Some(Rate(100_000_000)), Some(Rate(1_000_000_000)), None];
const FIFTY: Option<Rate> = Some(Rate(50_000_000));
const DELAYS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(10), Duration::from_millis(50)];
const MIRRORS: [Mirror; 3] = [Mirror::None, Mirror::Old, Mirror::Fresh];
const MODES: [Mode; 3] = [Mode::Auto, Mode::Precopy, Mode::Postcopy];

/// The case from which one property at a time is varied: the paper's machine and link.
pub const BASE: Kind = Kind {
    work: Work { memory: Size(64 * MIB), set_percent: 30, writes_per_s: 500 },
    link: Link { rate: FIFTY, delay: Duration::ZERO },
    mirror: Mirror::None,
    mode: Mode::Auto,
};

/// Working sets that the paper pages in after a move, in percent of the memory.
pub const PAGED_IN: [u8; 3] = [5, 10, 20];

/// The base case with another rate of writes.
const fn writing(writes_per_s: u32) -> Kind {
    Kind { work: Work { writes_per_s, ..BASE.work }, ..BASE }
}

/// Those that stand beside figures of others.
pub fn table() -> Vec<Kind> {
    let unshaped = Link { rate: None, ..BASE.link };
    let mut kinds = vec![
        BASE,
        writing(5_000),
        Kind { mirror: Mirror::Fresh, ..BASE },
        Kind { mirror: Mirror::Fresh, ..writing(5_000) },
        Kind { mode: Mode::Postcopy, ..BASE },
        Kind { link: unshaped, ..BASE },
        Kind { link: unshaped, ..writing(5_000) },
        Kind {
            work: Work { memory: Size(1024 * MIB), set_percent: 5, ..BASE.work },
            link: Link { rate: Some(Rate(1_000_000_000)), ..BASE.link },
            ..BASE
        },
        // The paper's replica is up to date but for the share of pages that is dirty.
        Kind { mirror: Mirror::Old, ..BASE },
    ];
    kinds.extend(PAGED_IN.into_iter().flat_map(paged_in));
    kinds
}

/// Moves after which a working set of that size is wanted at the target: brought before the switch, and after it.
pub fn paged_in(set_percent: u8) -> [Kind; 2] {
    let kind = Kind { work: Work { set_percent, ..BASE.work }, ..BASE };
    [kind, Kind { mode: Mode::Postcopy, ..kind }]
}

/// The base case, each property varied alone, and the table.
pub fn usual() -> Vec<Kind> {
    distinct(std::iter::once(BASE).chain(Axis::ALL.into_iter().flat_map(Axis::varied)).chain(table()))
}

/// A handful.
pub fn quick() -> Vec<Kind> {
    let unshaped = Link { rate: None, ..BASE.link };
    vec![
        BASE,
        writing(5_000),
        Kind { mirror: Mirror::Fresh, ..BASE },
        Kind { mirror: Mirror::Fresh, ..writing(5_000) },
        Kind { link: unshaped, ..BASE },
        Kind { link: unshaped, ..writing(5_000) },
    ]
}

/// Every combination.
pub fn full() -> Vec<Kind> {
    let mut kinds = vec![BASE];
    for axis in Axis::ALL {
        let places = axis.varied();
        kinds = kinds.iter().flat_map(|kind| places.iter().map(|place| axis.put(*kind, place))).collect();
    }
    kinds
}

impl Axis {
    /// A case with this property of another.
    const fn put(self, kind: Kind, place: &Kind) -> Kind {
        let (mut work, mut link) = (kind.work, kind.link);
        match self {
            Self::Memory => work.memory = place.work.memory,
            Self::Set => work.set_percent = place.work.set_percent,
            Self::Writes => work.writes_per_s = place.work.writes_per_s,
            Self::Link => link.rate = place.link.rate,
            Self::Delay => link.delay = place.link.delay,
            Self::Mirror => return Kind { mirror: place.mirror, ..kind },
            Self::Mode => return Kind { mode: place.mode, ..kind },
        }
        Kind { work, link, ..kind }
    }
}

/// Each once, in the order of the first.
fn distinct(kinds: impl Iterator<Item = Kind>) -> Vec<Kind> {
    kinds.fold(Vec::new(), |mut all, kind| {
        if !all.contains(&kind) {
            all.push(kind);
        }
        all
    })
}

impl Kind {
    /// What it is called: link, writes and what the target holds, and what else is not as in the base case.
    pub fn name(&self) -> String {
        let mut parts = Vec::new();
        if self.work.memory != BASE.work.memory {
            parts.push(Axis::Memory.of(self));
        }
        if self.work.set_percent != BASE.work.set_percent {
            parts.push(Axis::Set.of(self));
        }
        parts.push(Axis::Link.of(self));
        if self.link.delay != BASE.link.delay {
            parts.push(Axis::Delay.of(self));
        }
        parts.extend([Axis::Writes.of(self), Axis::Mirror.of(self)]);
        if self.mode != BASE.mode {
            parts.push(Axis::Mode.of(self));
        }
        parts.join(", ")
    }

    /// For programs.
    pub fn params(&self) -> Value {
        json!({
            "memory_bytes": self.work.memory.0,
            "working_set_percent": self.work.set_percent,
            "writes_per_s": self.work.writes_per_s,
            "content": "mixed",
            "link_bit_per_s": self.link.rate.map(|rate| rate.0),
            "delay_ms": self.link.delay.as_secs_f64() * 1e3,
            "mirror": self.mirror,
            "mode": self.mode,
        })
    }

    /// What the machine is told.
    pub fn load(&self) -> String {
        let Work { set_percent, writes_per_s, .. } = self.work;
        format!("dirty {set_percent}% {writes_per_s}/s --content mixed")
    }

    /// Pages that are rewritten, about.
    pub fn set_pages(&self) -> u64 {
        self.work.memory.0 / kage_machine::PAGE_SIZE as u64 * u64::from(self.work.set_percent) / 100
    }
}

fn memory(size: Size) -> String {
    if size.0.is_multiple_of(1024 * MIB) {
        format!("{} GiB", size.0 / (1024 * MIB))
    } else {
        format!("{} MiB", size.0 / MIB)
    }
}

fn link(rate: Option<Rate>) -> String {
    match rate {
        None => "unshaped".to_owned(),
        Some(Rate(bits)) if bits.is_multiple_of(1_000_000_000) => format!("{} Gbit/s", bits / 1_000_000_000),
        Some(Rate(bits)) => format!("{} Mbit/s", bits / 1_000_000),
    }
}

const fn mirror(mirror: Mirror) -> &'static str {
    match mirror {
        Mirror::None => "none",
        Mirror::Old => "old",
        Mirror::Fresh => "fresh",
    }
}

const fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Auto => "auto",
        Mode::Precopy => "precopy",
        Mode::Postcopy => "postcopy",
    }
}

/// A number with commas.
fn thousands(number: u32) -> String {
    match (number / 1000, number % 1000) {
        (0, rest) => rest.to_string(),
        (thousands, rest) => format!("{thousands},{rest:03}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many properties differ.
    fn apart(one: &Kind, other: &Kind) -> usize {
        Axis::ALL.iter().filter(|axis| axis.of(one) != axis.of(other)).count()
    }

    #[test]
    fn each_property_is_varied_alone_and_has_the_base_case_on_it() {
        for axis in Axis::ALL {
            let kinds = axis.varied();
            assert_eq!(kinds.iter().filter(|kind| **kind == BASE).count(), 1, "{axis:?}");
            for kind in &kinds {
                let differ: Vec<_> =
                    Axis::ALL.into_iter().filter(|other| other.of(kind) != other.of(&BASE)).collect();
                assert!(differ.is_empty() || differ == [axis], "{axis:?}: {differ:?}");
            }
        }
    }

    #[test]
    fn the_usual_cases_are_distinct_and_hold_the_table_and_all_axes() {
        let usual = usual();
        for (at, kind) in usual.iter().enumerate() {
            assert!(!usual[..at].contains(kind), "{} is there twice", kind.name());
        }
        assert_eq!(usual[0], BASE);
        assert!(
            table()
                .iter()
                .chain(Axis::ALL.map(Axis::varied).iter().flatten())
                .all(|kind| usual.contains(kind))
        );
        assert_eq!(quick().len(), 6);
        assert!(quick().iter().all(|kind| usual.contains(kind)));
    }

    #[test]
    fn the_product_has_every_combination_once() {
        let full = full();
        assert_eq!(full.len(), 3 * 2 * 4 * 5 * 3 * 3 * 3);
        let mut names: Vec<_> = full.iter().map(Kind::name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), full.len());
        let far = full.last().copied().unwrap();
        assert_eq!(apart(&far, &BASE), 6, "{}", far.name());
    }

    #[test]
    fn names_say_what_differs() {
        assert_eq!(BASE.name(), "50 Mbit/s, 500/s, none");
        assert_eq!(table()[6].name(), "unshaped, 5,000/s, none");
        assert_eq!(table()[7].name(), "1 GiB, 5 %, 1 Gbit/s, 500/s, none");
        let [_, after] = paged_in(10);
        assert_eq!(after.name(), "10 %, 50 Mbit/s, 500/s, none, postcopy");
        let slow = Kind { link: Link { delay: DELAYS[1], ..BASE.link }, ..BASE };
        assert_eq!(slow.name(), "50 Mbit/s, 10 ms, 500/s, none");
        assert_eq!(BASE.load(), "dirty 30% 500/s --content mixed");
        assert_eq!(BASE.set_pages(), 4915);
    }
}

//! The guest's memory, compiled for the host at the guest's own addresses: frames are given once, zero and all of
//! them, and what the host is asked to map is what the windows hold.
#![expect(unsafe_code, reason = "maps memory where the guest has it")]

extern crate alloc;

#[path = "../../guest/src/local.rs"]
#[allow(unsafe_code, dead_code)]
mod local;
#[path = "../../guest/src/memory/mod.rs"]
#[allow(unsafe_code, dead_code, unused_imports)]
mod memory;

use std::{collections::BTreeMap, sync::Mutex};

use kage_abi::{MEMORY, frame, window};
use memory::{Access, Frames, Kind, PAGE, Window};
use proptest::prelude::*;

/// What the machine and its host are here: plain memory, and a host that keeps its promises to the letter.
mod arch {
    use std::{
        collections::BTreeMap,
        sync::{
            Mutex,
            atomic::{AtomicU32, AtomicUsize, Ordering},
        },
    };

    use kage_abi::{MAP_RANGES, MEMORY, MapRange, frame};

    use super::{HOST, Host, MACHINE};

    static TABLE: AtomicUsize = AtomicUsize::new(0);
    static FIRST: AtomicU32 = AtomicU32::new(0);

    pub fn free_range() -> (usize, usize) {
        (MEMORY as usize + 0x7_0000, MEMORY as usize + MACHINE)
    }

    pub fn set_frame_table(at: usize) {
        TABLE.store(at, Ordering::Relaxed);
    }

    pub fn set_first_frame(frame: u32) {
        FIRST.store(frame, Ordering::Relaxed);
    }

    pub fn entry(number: u32) -> u64 {
        let at = TABLE.load(Ordering::Relaxed) as *const u64;
        // SAFETY: the guest has said that its table lies there, and the test keeps it mapped.
        unsafe { at.wrapping_add(number as usize).read_volatile() }
    }

    fn add(host: &mut Host, number: u32) -> bool {
        assert!((number as usize) < MACHINE / super::PAGE);
        let entry = entry(number);
        if entry & frame::PRESENT == 0 {
            return true;
        }
        assert!(number >= FIRST.load(Ordering::Relaxed), "frame {number:#x} is mapped below the first");
        let address = entry & frame::ADDRESS;
        assert_ne!(entry & (frame::WRITABLE | frame::EXECUTABLE), frame::WRITABLE | frame::EXECUTABLE);
        let new = host.tables.insert(address >> 21);
        if new && host.tables.len() > host.budget {
            host.tables.remove(&(address >> 21));
            return false;
        }
        let there = *host.mapped.entry(address).or_insert((number, entry));
        assert_eq!(there, (number, entry), "{address:#x} is mapped to something else");
        if entry & frame::EXECUTABLE != 0 {
            host.code.insert(number);
        }
        let is_code = host.code.contains(&number);
        assert!(entry & frame::WRITABLE == 0 || !is_code, "{number:#x} is executable and becomes writable");
        true
    }

    static ASKED: Mutex<Vec<MapRange>> = Mutex::new(Vec::new());

    pub fn set_map(ranges: &[MapRange; MAP_RANGES], count: usize) {
        *ASKED.lock().unwrap() = ranges[..count].to_vec();
    }

    pub fn map() -> bool {
        moved_meanwhile();
        let ranges = ASKED.lock().unwrap().clone();
        let mut host = HOST.lock().unwrap();
        let frames: u32 = ranges.iter().map(|range| range.count).sum();
        assert!(u64::from(frames) <= kage_abi::MAP_FRAMES);
        ranges.iter().flat_map(|range| range.first..range.first + range.count).all(|at| add(&mut host, at))
    }

    /// All but what is being asked for has tables wherever the machine goes.
    fn moved_meanwhile() {
        let ranges = ASKED.lock().unwrap().clone();
        let mut other = Host { budget: HOST.lock().unwrap().budget, ..Host::default() };
        let asked =
            |at: u32| ranges.iter().any(|range| (range.first..range.first + range.count).contains(&at));
        assert!((0..(MACHINE / super::PAGE) as u32).filter(|&at| !asked(at)).all(|at| add(&mut other, at)));
    }

    pub fn rebuild() -> bool {
        let mut host = HOST.lock().unwrap();
        host.mapped = BTreeMap::new();
        host.tables.clear();
        host.code.clear();
        host.rebuilds += 1;
        (0..(MACHINE / super::PAGE) as u32).all(|at| add(&mut host, at))
    }
}

/// A heap that takes from the free memory and gives back, as the test says.
mod heap {
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    pub const RESERVE: usize = 5 << 20;
    /// Bytes the heap holds beyond its start, none of them used.
    static UNUSED: AtomicUsize = AtomicUsize::new(0);
    /// What it holds from among the frames, which is none of them.
    static CLAIMS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

    pub fn start() {
        UNUSED.store(0, Ordering::Relaxed);
        CLAIMS.lock().unwrap().clear();
    }

    pub fn shrink() {
        let unused = UNUSED.swap(0, Ordering::Relaxed);
        let claims = std::mem::take(&mut *CLAIMS.lock().unwrap());
        let claimed: usize = claims.iter().map(|claim| claim.1).sum();
        crate::memory::cut_heap(crate::memory::heap_end() - (unused - claimed));
        for (at, bytes) in claims {
            crate::memory::give_back_claim(at, bytes);
        }
    }

    pub fn unused_bytes() -> usize {
        UNUSED.load(Ordering::Relaxed)
    }

    pub fn grow(bytes: usize) {
        let start = crate::memory::heap_end();
        if crate::memory::extend_heap(bytes) {
            UNUSED.fetch_add(bytes, Ordering::Relaxed);
            // SAFETY: the memory is mapped and was just given to the heap.
            unsafe { (start as *mut u8).write_bytes(0xee, bytes) };
        } else if let Some((at, bytes)) = crate::memory::claim(bytes) {
            CLAIMS.lock().unwrap().push((at, bytes));
            UNUSED.fetch_add(bytes, Ordering::Relaxed);
            // SAFETY: as above.
            unsafe { (at as *mut u8).write_bytes(0xee, bytes) };
        }
    }
}

/// Bytes of the machine.
const MACHINE: usize = 16 << 20;

#[derive(Default)]
struct Host {
    mapped: BTreeMap<u64, (u32, u64)>,
    tables: std::collections::BTreeSet<u64>,
    /// Frames that are executable somewhere.
    code: std::collections::BTreeSet<u32>,
    budget: usize,
    rebuilds: usize,
}

static HOST: Mutex<Host> = Mutex::new(Host {
    mapped: BTreeMap::new(),
    tables: std::collections::BTreeSet::new(),
    code: std::collections::BTreeSet::new(),
    budget: 0,
    rebuilds: 0,
});

/// A machine just started; there is one at a time.
fn machine(budget: usize) -> std::sync::MutexGuard<'static, ()> {
    static ALONE: Mutex<bool> = Mutex::new(false);
    static ONE: Mutex<()> = Mutex::new(());
    let alone = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut mapped = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let at = MEMORY as *mut libc::c_void;
    let fixed =
        if std::mem::replace(&mut *mapped, true) { libc::MAP_FIXED } else { libc::MAP_FIXED_NOREPLACE };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
    // SAFETY: nothing of this process lies there, or only what an earlier call has mapped and nobody uses any more.
    let got = unsafe { libc::mmap(at, MACHINE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_eq!(got, at, "the guest's addresses are free");
    HOST.clear_poison();
    *HOST.lock().unwrap() = Host { budget, ..Host::default() };
    memory::start();
    alone
}

#[derive(Clone, Debug)]
enum Step {
    Take(usize),
    GiveBack(usize),
    Cut(usize, usize),
    Heap(usize),
    Reserve(u8),
    Map(usize, usize, usize),
    Stack(usize),
    Drop(usize),
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1usize..700).prop_map(Step::Take),
        any::<usize>().prop_map(Step::GiveBack),
        (any::<usize>(), any::<usize>()).prop_map(|(which, at)| Step::Cut(which, at)),
        prop_oneof![1usize..64, 500usize..600].prop_map(|pages| Step::Heap(pages * PAGE)),
        (0u8..3).prop_map(Step::Reserve),
        (any::<usize>(), 0usize..2000, 1usize..300)
            .prop_map(|(which, page, pages)| Step::Map(which, page, pages)),
        prop_oneof![Just(16usize), Just(48)].prop_map(Step::Stack),
        any::<usize>().prop_map(Step::Drop),
    ]
}

/// A window and where it has pages.
struct Held {
    window: Window,
    kind: Kind,
    ranges: Vec<(usize, usize)>,
}

/// Marks the pages, having seen that they are zero.
fn mark(frames: &mut Frames) {
    for index in 0..frames.count() {
        let page = frames.page_mut(index).unwrap();
        assert!(page.iter().all(|&byte| byte == 0), "a frame that is given holds something");
        page.fill(0x5a);
    }
    assert!(frames.page_mut(frames.count()).is_none());
}

/// What the host has mapped is what is held, beside what was given up since tables were last built.
fn check(held: &[Held], spare: bool) {
    let host = HOST.lock().unwrap();
    let mut frames = BTreeMap::new();
    for held in held {
        for &(first, count) in &held.ranges {
            for page in first..first + count {
                let address = (held.window.base() + page * PAGE) as u64;
                let (number, entry) = host.mapped[&address];
                assert_eq!(arch::entry(number), entry);
                assert_eq!(frames.insert(number, address), None, "frame {number:#x} is mapped twice");
            }
        }
        assert_eq!(held.window.mapped_pages(), held.ranges.iter().map(|range| range.1).sum::<usize>());
    }
    let present = (0..(MACHINE / PAGE) as u32).filter(|&at| arch::entry(at) & frame::PRESENT != 0).count();
    assert!(
        present == frames.len() || spare && present > frames.len(),
        "{present} entries, {} held",
        frames.len()
    );
}

fn run(steps: Vec<Step>, budget: usize) {
    let _alone = machine(budget);
    let all = memory::free_frames();
    let mut taken: Vec<Frames> = Vec::new();
    let mut held: Vec<Held> = Vec::new();
    for step in steps {
        match step {
            Step::Take(count) => match Frames::take(count) {
                Ok(mut frames) => {
                    assert_eq!(frames.count(), count);
                    mark(&mut frames);
                    taken.push(frames);
                }
                Err(memory::OutOfMemory) => assert!(memory::free_frames() < count),
            },
            Step::GiveBack(which) if !taken.is_empty() => drop(taken.swap_remove(which % taken.len())),
            Step::Heap(bytes) => heap::grow(bytes),
            Step::Reserve(kind) => {
                let kind = [Kind::Memory, Kind::Stack, Kind::Code][usize::from(kind)];
                let window = Window::reserve(kind).expect("there are many windows");
                held.push(Held { window, kind, ranges: Vec::new() });
            }
            Step::Map(which, first, pages) if !held.is_empty() => {
                let which = which % held.len();
                let held = &mut held[which];
                let first = first.min(held.window.bytes() / PAGE - pages);
                if held.ranges.iter().any(|&(at, count)| at < first + pages && first < at + count) {
                    continue;
                }
                let access = if held.kind == Kind::Code { Access::ReadExecute } else { Access::ReadWrite };
                if held.window.map(first, pages, access).is_ok() {
                    held.ranges.push((first, pages));
                    held.window.write(first * PAGE + 7, &[1; 5000]);
                }
            }
            Step::Cut(which, at) if !held.is_empty() => {
                let which = which % held.len();
                let held = &mut held[which];
                if let Some(&(first, _)) = held.ranges.get(at % held.ranges.len().max(1)) {
                    held.window.cut(first);
                    held.ranges.retain(|range| range.0 < first);
                }
            }
            Step::Stack(pages) => {
                if let Ok(window) = Window::stack(pages) {
                    let first = window.bytes() / PAGE - pages;
                    held.push(Held { window, kind: Kind::Stack, ranges: vec![(first, pages)] });
                }
            }
            Step::Drop(which) if !held.is_empty() => drop(held.swap_remove(which % held.len())),
            _ => {}
        }
        check(&held, true);
        for frames in &mut taken {
            let count = frames.count();
            assert!(
                [0, count - 1].into_iter().all(|at| frames
                    .page_mut(at)
                    .unwrap()
                    .iter()
                    .all(|&byte| byte == 0x5a))
            );
        }
    }
    drop((taken, held));
    heap::shrink();
    assert_eq!(memory::free_frames(), all, "frames were lost");
    // All of them can be had at once, spare stacks included.
    mark(&mut Frames::take(all).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn frames_and_windows_are_what_they_promise(all in prop::collection::vec(steps(), 1..80)) {
        run(all, usize::MAX);
    }

    #[test]
    fn so_they_are_when_tables_run_out(all in prop::collection::vec(steps(), 1..80), budget in 3usize..20) {
        run(all, budget);
    }
}

#[test]
fn the_heap_has_what_was_freed_though_a_frame_lies_below_it() {
    let _alone = machine(2048);
    let all = Frames::take(memory::free_frames()).unwrap();
    let room = memory::heap_free_bytes();
    // The last that was given lies lowest.
    assert!(room <= heap::RESERVE + PAGE);
    drop(all);
    let mut frames: Vec<_> = (0..memory::free_frames() / 64).map(|_| Frames::take(64).unwrap()).collect();
    let pinning = frames.pop().unwrap();
    drop(frames);
    let free = memory::free_frames() * PAGE;
    assert!(
        memory::heap_free_bytes() > 3 * heap::RESERVE / 2 && memory::heap_free_bytes() + (2 << 20) > free
    );
    let before = memory::heap_free_bytes();
    for _ in 0..4 {
        heap::grow(heap::RESERVE / 4 * 3);
    }
    assert!(heap::unused_bytes() > heap::RESERVE / 4 * 6, "{} of {before}", heap::unused_bytes());
    heap::shrink();
    assert_eq!(memory::free_frames() * PAGE, free);
    drop(pinning);
}

#[test]
fn a_thousand_processes_after_another_seldom_rebuild() {
    let _alone = machine(2048);
    let resident = {
        let mut window = Window::reserve(Kind::Memory).unwrap();
        window.map(0, 300, Access::ReadWrite).unwrap();
        window
    };
    for _ in 0..1000 {
        let stack = Window::stack(48).unwrap();
        let mut linear = Window::reserve(Kind::Memory).unwrap();
        linear.map(0, 17, Access::ReadWrite).unwrap();
        linear.map(17, 200, Access::ReadWrite).unwrap();
        assert!((window::MEMORY..window::STACK).contains(&(linear.base() as u64)));
        drop((stack, linear));
    }
    let rebuilds = HOST.lock().unwrap().rebuilds;
    println!("{rebuilds} rebuilds");
    assert!((1..=4).contains(&rebuilds), "{rebuilds}");
    assert_eq!(resident.mapped_pages(), 300);
    // The next machine finds no spare stack of this one.
    drop(Frames::take(memory::free_frames()).unwrap());
}

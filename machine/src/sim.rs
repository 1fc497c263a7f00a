//! A simulated machine: pages, dirty tracking, a guest that writes and emits as time goes by, a gate.
//!
//! A [`SimVmm`] stands for the VMM process: it outlives the handles ([`SimMachine`]) that daemons hold on
//! it, and can be killed. Its guest is a function of its own memory: page 0 holds a random state and
//! a sequence number; every [`TICK`] it writes pages of its working set and emits the next number. So
//! a machine that was moved wrongly shows: numbers are doubled or missing ([`Outside`]), or page 0 and
//! the saved state disagree. Now and then it reads, writes or discards a block of its disk ([`SimDisk`]),
//! which belongs to the host and not to the process.
//!
//! A guest whose step touches a page that is missing ([`Machine::miss`]) does not take it until that page is brought;
//! what it emits at a shut gate is part of its saved state, as a ring is.
//!
//! Time is an argument: the guest runs up to what the clock says whenever the machine is called.

mod disk;
mod missing;
mod outside;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    Geometry, Gone, HostInstant, Machine, MachineError, Memory, Missing, OutputMark, PAGE_SIZE, PageBytes,
    PageIndex, PageSet, PauseCause, Paused, SavedState, Started,
    control::Phase,
    disk::Block,
    state::{ClockState, STATE_VERSION, VcpuState},
};

/// The guest's step.
pub const TICK: Duration = Duration::from_micros(250);

/// Most steps made up for in one call: a simulated second.
const MAX_TICKS: u64 = 4_000;

pub use disk::{SimDisk, digests};
pub use outside::{Emission, Outside};

/// Most numbers that wait at a shut gate, as a ring holds so many frames and no more: the guest waits then.
const HELD_MAX: usize = 1 << 14;

/// The guest uses its disk every so many steps.
const DISK_TICKS: u64 = 16;

/// Reads a host's clock.
pub type Clock = Arc<dyn Fn() -> HostInstant + Send + Sync>;

/// A call that can be made to go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// [`Machine::harvest`].
    Harvest,
    /// [`Machine::pause`].
    Pause,
    /// [`Machine::resume`].
    Resume,
    /// [`Machine::restore`].
    Restore,
    /// [`Machine::run_gated`].
    RunGated,
    /// [`Machine::open_gate`].
    OpenGate,
    /// [`Machine::release`].
    Release,
}

/// How it goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mishap {
    /// The machine refuses and is as before.
    Refuse,
    /// The process dies before it did anything.
    Die,
    /// The process dies after it did it.
    DieAfter,
}

/// What a simulated machine is like.
#[derive(Clone, Debug)]
pub struct SimSpec {
    /// Its page space.
    pub geometry: Geometry,
    /// Names the process in [`Emission`]s.
    pub vmm: u64,
    /// Pages from 1 on that the guest writes.
    pub working_set: u32,
    /// Pages written in a [`TICK`].
    pub writes_per_tick: u32,
    /// Features of its host's CPU; states of a higher baseline are refused.
    pub cpu_baseline: u8,
}

/// A VMM process.
#[derive(Clone)]
pub struct SimVmm {
    shared: Arc<Shared>,
}

struct Shared {
    spec: SimSpec,
    outside: Outside,
    state: Mutex<State>,
    /// The process ended, or the guest began to wait for a page.
    changed: Condvar,
}

struct State {
    phase: Phase,
    alive: bool,
    /// Those of memory.
    pages: Vec<PageBytes>,
    disk: SimDisk,
    /// The disk as it was when the machine began to run with its gate shut: nothing written since is kept if it ends
    /// so, as it may be another host's machine that goes on.
    uncommitted: Option<SimDisk>,
    dirty: PageSet,
    lack: missing::Lack,
    /// Whether the gate opens again after a pause.
    gate_open: bool,
    /// What the guest emitted while its gate was shut.
    held: VecDeque<Emission>,
    clock: Clock,
    /// The host's clock up to which the guest has run.
    ran_to: HostInstant,
    /// Guest time − host time.
    guest_ns: u64,
    mishap: Option<(Call, Mishap)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The guest's own variables, in page 0.
#[derive(Clone, Copy)]
struct Guest {
    random: u64,
    sequence: u64,
    generation: u64,
}

impl Guest {
    /// Draws the next page that it writes.
    fn next_page(&mut self, spec: &SimSpec) -> usize {
        // xorshift64 (Marsaglia 2003)
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        1 + (self.random % u64::from(spec.working_set.max(1))) as usize
    }
}

impl State {
    fn guest(&self) -> Guest {
        let word = |index: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&self.pages[0][index * 8..][..8]);
            u64::from_le_bytes(bytes)
        };
        Guest { random: word(0), sequence: word(1), generation: word(2) }
    }

    fn set_guest(&mut self, guest: Guest) {
        for (index, word) in [guest.random, guest.sequence, guest.generation].into_iter().enumerate() {
            self.pages[0][index * 8..][..8].copy_from_slice(&word.to_le_bytes());
        }
        self.dirty.insert(PageIndex(0));
    }

    /// Runs the guest up to what the clock says.
    fn catch_up(&mut self, spec: &SimSpec, outside: &Outside) {
        let now = (self.clock)();
        let Phase::Running { gate_open } = self.phase else { return };
        let ticks = (now.since(self.ran_to).as_nanos() / TICK.as_nanos()) as u64;
        if ticks > 0 {
            self.ran_to = HostInstant { ns: self.ran_to.ns + ticks * TICK.as_nanos() as u64 };
            self.guest_ns += ticks * TICK.as_nanos() as u64;
        }
        for _ in 0..ticks.min(MAX_TICKS) {
            if self.lack.waits() || self.held.len() >= HELD_MAX {
                return;
            }
            self.step(spec, outside, gate_open);
        }
    }

    /// Takes a step, unless a page that it touches is missing.
    fn step(&mut self, spec: &SimSpec, outside: &Outside, gate_open: bool) {
        if let Some(page) = self.first_lacking(spec) {
            self.lack.wait_for(page);
            return;
        }
        let emission = self.tick(spec);
        if gate_open { outside.take(emission) } else { self.held.push_back(emission) }
    }

    /// The process ends, however.
    fn die(&mut self) {
        self.alive = false;
        if let Some(committed) = self.uncommitted.take() {
            self.disk.restore(&committed);
        }
    }

    /// Guest time passes, though the guest does not run.
    fn pass_time(&mut self) {
        let now = (self.clock)();
        self.guest_ns += now.since(self.ran_to).as_nanos() as u64;
        self.ran_to = now;
    }

    fn tick(&mut self, spec: &SimSpec) -> Emission {
        let mut guest = self.guest();
        for _ in 0..spec.writes_per_tick {
            let page = guest.next_page(spec);
            if page < self.pages.len() {
                let offset = (guest.random >> 32) as usize % (PAGE_SIZE / 8) * 8;
                self.pages[page][offset..][..8].copy_from_slice(&guest.random.to_le_bytes());
                self.dirty.insert(PageIndex(page as u32));
            }
        }
        guest.sequence += 1;
        if guest.sequence.is_multiple_of(DISK_TICKS) && spec.geometry.disk_pages > 0 {
            self.use_disk(spec, guest.random);
        }
        self.set_guest(guest);
        Emission { vmm: spec.vmm, generation: guest.generation, sequence: guest.sequence, carried: false }
    }
}

impl State {
    /// Reads, writes or discards a block. Half of the disk is only read, so that what is missing of it stays so.
    fn use_disk(&mut self, spec: &SimSpec, random: u64) {
        let blocks = spec.geometry.disk_pages;
        let (what, number) = (random >> 61, (random >> 40) as u32);
        let block = if what < 5 { number % blocks.div_ceil(2) } else { number % blocks };
        let mut bytes = [0; PAGE_SIZE];
        match what {
            0..3 => {
                bytes.as_chunks_mut().0.iter_mut().for_each(|word| *word = random.to_le_bytes());
                self.disk.write(block, &bytes);
            }
            3 => self.disk.write(block, &bytes),
            // The same bytes again.
            4 => match self.disk.read(block, &mut bytes) {
                Block::Missing(_) => return,
                Block::Zeros | Block::Held(_) => self.disk.write(block, &bytes),
            },
            _ => {
                self.disk.read(block, &mut bytes);
                return;
            }
        }
        self.dirty.insert(PageIndex(spec.geometry.memory_pages + block));
    }
}

impl SimVmm {
    /// A shell with a disk of zeros: no state yet.
    #[must_use]
    pub fn shell(spec: SimSpec, clock: Clock, outside: Outside) -> Self {
        let disk = SimDisk::new(spec.geometry.disk_pages);
        Self::shell_on(disk, spec, clock, outside)
    }

    /// A shell on a disk of its host's.
    #[must_use]
    pub fn shell_on(disk: SimDisk, spec: SimSpec, clock: Clock, outside: Outside) -> Self {
        let pages = spec.geometry.pages();
        let state = State {
            phase: Phase::Shell,
            alive: true,
            pages: vec![[0; PAGE_SIZE]; spec.geometry.memory_pages as usize],
            disk,
            uncommitted: None,
            dirty: PageSet::empty(pages),
            lack: missing::Lack::none(pages),
            gate_open: true,
            held: VecDeque::new(),
            ran_to: clock(),
            guest_ns: 0,
            clock,
            mishap: None,
        };
        Self { shared: Arc::new(Shared { spec, outside, state: Mutex::new(state), changed: Condvar::new() }) }
    }

    /// A machine started from nothing, gate open, some of its memory filled from `seed`.
    #[must_use]
    pub fn started(spec: SimSpec, clock: Clock, outside: Outside, generation: u64, seed: u64) -> Self {
        let disk = SimDisk::new(spec.geometry.disk_pages);
        Self::started_on(disk, spec, clock, outside, generation, seed)
    }

    /// As [`Self::started`], on a disk of its host's.
    #[must_use]
    pub fn started_on(
        disk: SimDisk,
        spec: SimSpec,
        clock: Clock,
        outside: Outside,
        generation: u64,
        seed: u64,
    ) -> Self {
        let vmm = Self::shell_on(disk, spec, clock, outside);
        let mut state = lock(&vmm.shared.state);
        let mut random = seed | 1;
        for page in 1..state.pages.len() {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            if random.is_multiple_of(3) {
                let bytes = random.to_le_bytes();
                for chunk in state.pages[page].chunks_exact_mut(8).step_by(1 + random as usize % 7) {
                    chunk.copy_from_slice(&bytes);
                }
            }
        }
        state.set_guest(Guest { random: seed | 1, sequence: 0, generation });
        state.phase = Phase::Running { gate_open: true };
        drop(state);
        vmm
    }

    /// A daemon's handle.
    #[must_use]
    pub fn handle(&self) -> SimMachine {
        SimMachine { vmm: self.clone() }
    }

    /// Kills the process.
    pub fn kill(&self) {
        let mut state = lock(&self.shared.state);
        if state.alive {
            state.catch_up(&self.shared.spec, &self.shared.outside);
            state.die();
            self.shared.changed.notify_all();
        }
    }

    /// Whether the process lives.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        lock(&self.shared.state).alive
    }

    /// Where it stands; `None` when dead.
    #[must_use]
    pub fn phase(&self) -> Option<Phase> {
        let state = lock(&self.shared.state);
        state.alive.then_some(state.phase)
    }

    /// Runs the guest up to now.
    pub fn catch_up(&self) {
        let mut state = lock(&self.shared.state);
        if state.alive {
            state.catch_up(&self.shared.spec, &self.shared.outside);
        }
    }

    /// Guest time.
    #[must_use]
    pub fn guest_time(&self) -> Duration {
        Duration::from_nanos(lock(&self.shared.state).guest_ns)
    }

    /// The next call of that kind goes wrong, once.
    pub fn set_mishap(&self, mishap: Option<(Call, Mishap)>) {
        lock(&self.shared.state).mishap = mishap;
    }

    /// Its disk.
    #[must_use]
    pub fn disk(&self) -> SimDisk {
        lock(&self.shared.state).disk.clone()
    }

    /// The pages that are missing.
    #[must_use]
    pub fn missing(&self) -> PageSet {
        lock(&self.shared.state).lack.pages.clone()
    }

    /// All pages of memory as they are; those that are missing are zeros.
    #[must_use]
    pub fn contents(&self) -> Vec<PageBytes> {
        lock(&self.shared.state).pages.clone()
    }
}

/// Which of the saved registers says how many numbers wait at the gate.
const WAITING: usize = 0;

/// The point behind a number.
const fn mark(sequence: u64) -> OutputMark {
    OutputMark(sequence as u16)
}

/// A daemon's handle on a [`SimVmm`].
#[derive(Clone)]
pub struct SimMachine {
    vmm: SimVmm,
}

fn refused<T>(reason: &str) -> Result<T, MachineError> {
    Err(MachineError::Refused { reason: reason.to_owned() })
}

impl SimMachine {
    /// The process behind the handle.
    #[must_use]
    pub fn vmm(&self) -> &SimVmm {
        &self.vmm
    }

    /// Brings the guest up to now, then does `work`, unless the process is gone.
    fn with<T>(
        &self,
        work: impl FnOnce(&SimSpec, &Outside, &mut State) -> Result<T, MachineError>,
    ) -> Result<T, MachineError> {
        self.vmm.shared.alive(work)?
    }

    /// One call: as [`Self::with`], but lets a mishap happen.
    fn call<T>(
        &self,
        call: Call,
        work: impl FnOnce(&SimSpec, &Outside, &mut State) -> Result<T, MachineError>,
    ) -> Result<T, MachineError> {
        self.with(|spec, outside, state| {
            let mishap = state.mishap.take_if(|(at, _)| *at == call).map(|(_, mishap)| mishap);
            match mishap {
                Some(Mishap::Refuse) => refused("as told"),
                Some(Mishap::Die) => {
                    state.die();
                    Err(killed().into())
                }
                Some(Mishap::DieAfter) => {
                    let _ = work(spec, outside, state);
                    state.die();
                    Err(killed().into())
                }
                None => work(spec, outside, state),
            }
        })
    }
}

fn killed() -> Gone {
    Gone { reason: "killed".into() }
}

impl Machine for SimMachine {
    fn memory(&self) -> Arc<dyn Memory> {
        self.vmm.shared.clone()
    }

    fn base(&self) -> crate::BaseHash {
        crate::BaseHash::default()
    }

    fn harvest(&mut self) -> Result<PageSet, MachineError> {
        self.call(Call::Harvest, |_, _, state| Ok(state.take_dirty()))
    }

    fn pause(&mut self, _: PauseCause) -> Result<Paused, MachineError> {
        self.call(Call::Pause, |spec, _, state| {
            let Phase::Running { gate_open } = state.phase else {
                return refused("only a running machine is paused");
            };
            state.gate_open = gate_open;
            state.phase = Phase::Paused;
            state.pass_time();
            let (generation, sequence) = state.place();
            let mut vcpu = VcpuState { rip: sequence, ..VcpuState::default() };
            vcpu.general[WAITING] = state.held.len() as u64;
            Ok(Paused {
                state: SavedState {
                    version: STATE_VERSION,
                    cpu_baseline: spec.cpu_baseline,
                    vcpu,
                    devices: vec![],
                    clock: ClockState { monotonic_ns: state.guest_ns, wall_ns: 0, generation },
                },
                dirty: state.take_dirty(),
                at: (state.clock)(),
                output: mark(sequence),
            })
        })
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.call(Call::Resume, |_, _, state| match state.phase {
            Phase::Paused => {
                state.phase = Phase::Running { gate_open: state.gate_open };
                state.pass_time();
                Ok(())
            }
            Phase::Released => refused("it is released"),
            _ => refused("it is not paused"),
        })
    }

    fn restore(&mut self, saved: &SavedState, paused_at: HostInstant) -> Result<(), MachineError> {
        self.call(Call::Restore, |spec, _, state| {
            if state.phase != Phase::Shell {
                return refused("only a shell takes a state");
            }
            if saved.version != STATE_VERSION || saved.cpu_baseline > spec.cpu_baseline {
                return refused("its version or CPU features are not this host's");
            }
            if !state.is_at(saved.vcpu.rip) {
                return refused("its pages and its state are not of one instant");
            }
            let (generation, last) = (saved.clock.generation, saved.vcpu.rip);
            let waiting = saved.vcpu.general[WAITING].min(HELD_MAX as u64).min(last);
            let carried = |sequence| Emission { vmm: spec.vmm, generation, sequence, carried: true };
            state.held = (last - waiting + 1..=last).map(carried).collect();
            state.lack.place = Some((generation, last));
            state.guest_ns = saved.clock.monotonic_ns;
            state.ran_to = paused_at;
            state.dirty = PageSet::empty(spec.geometry.pages());
            state.phase = Phase::Restored;
            Ok(())
        })
    }

    fn run_gated(&mut self) -> Result<Started, MachineError> {
        self.call(Call::RunGated, |_, _, state| {
            if state.phase != Phase::Restored {
                return refused("it has no state, or runs already");
            }
            state.pass_time();
            state.uncommitted = Some(state.disk.copy());
            state.phase = Phase::Running { gate_open: false };
            Ok(Started { at: state.ran_to })
        })
    }

    fn open_gate(&mut self) -> Result<(), MachineError> {
        self.call(Call::OpenGate, |_, outside, state| {
            if !matches!(state.phase, Phase::Running { .. }) {
                return refused("it does not run");
            }
            state.phase = Phase::Running { gate_open: true };
            state.uncommitted = None;
            state.held.drain(..).for_each(|emission| outside.take(emission));
            Ok(())
        })
    }

    fn miss(&mut self, pages: &PageSet) -> Result<Arc<dyn Missing>, MachineError> {
        self.with(|spec, _, state| {
            if state.phase != Phase::Shell {
                return refused("only a shell misses pages");
            }
            state.miss(spec, pages)
        })?;
        Ok(Arc::new(missing::SimMissing::of(Arc::clone(&self.vmm.shared))))
    }

    fn let_out(&mut self, output: OutputMark) -> Result<(), MachineError> {
        self.with(|_, outside, state| {
            if !matches!(state.phase, Phase::Running { .. }) {
                return refused("it does not run");
            }
            // Of two numbers the one ahead is less than half the space ahead, which is more than can wait.
            let before = |emission: &Emission| output.0.wrapping_sub(mark(emission.sequence).0) < 1 << 15;
            while let Some(emission) = state.held.pop_front_if(|emission| before(emission)) {
                outside.take(emission);
            }
            Ok(())
        })
    }

    fn release(&mut self) -> Result<(), MachineError> {
        self.call(Call::Release, |_, _, state| {
            if !matches!(state.phase, Phase::Paused | Phase::Released) {
                return refused("it is not paused");
            }
            state.phase = Phase::Released;
            Ok(())
        })
    }

    fn end(&mut self) {
        self.vmm.kill();
    }
}

impl Shared {
    /// Does `work` in a process that lives, with its guest brought up to now.
    fn alive<T>(&self, work: impl FnOnce(&SimSpec, &Outside, &mut State) -> T) -> Result<T, Gone> {
        let mut state = lock(&self.state);
        if !state.alive {
            return Err(killed());
        }
        state.catch_up(&self.spec, &self.outside);
        let done = work(&self.spec, &self.outside, &mut state);
        if !state.alive || state.lack.waits() {
            self.changed.notify_all();
        }
        Ok(done)
    }

    /// Which block of the disk a page is.
    fn block_of(&self, page: PageIndex) -> Option<u32> {
        page.0.checked_sub(self.spec.geometry.memory_pages)
    }
}

impl Memory for Shared {
    fn geometry(&self) -> Geometry {
        self.spec.geometry
    }

    fn read(&self, page: PageIndex, into: &mut PageBytes) {
        let mut state = lock(&self.state);
        match self.block_of(page) {
            Some(block) => drop(state.disk.read(block, into)),
            None if state.lack.read(page) => into.fill(0),
            None => *into = state.pages.get(page.0 as usize).copied().unwrap_or([0; PAGE_SIZE]),
        }
    }

    fn write(&self, page: PageIndex, bytes: &PageBytes) {
        let mut state = lock(&self.state);
        match self.block_of(page) {
            Some(block) => state.disk.write(block, bytes),
            None if state.bring(&self.spec, &self.outside, page, bytes) => {}
            None => {
                if let Some(slot) = state.pages.get_mut(page.0 as usize) {
                    *slot = *bytes;
                }
            }
        }
    }

    fn zero(&self, page: PageIndex) {
        self.write(page, &[0; PAGE_SIZE]);
    }

    fn populated(&self) -> PageSet {
        let state = lock(&self.state);
        let mut set = PageSet::empty(self.spec.geometry.pages());
        for (index, page) in state.pages.iter().enumerate() {
            if page.iter().any(|&byte| byte != 0) {
                set.insert(PageIndex(index as u32));
            }
        }
        set.union(&state.lack.pages);
        for (index, block) in state.disk.blocks().into_iter().enumerate() {
            if block != Block::Zeros {
                set.insert(PageIndex(self.spec.geometry.memory_pages + index as u32));
            }
        }
        set
    }

    fn block(&self, page: PageIndex) -> Block {
        let mut bytes = [0; PAGE_SIZE];
        match self.block_of(page) {
            Some(block) => lock(&self.state).disk.block(block),
            None => self.read_block(page, &mut bytes),
        }
    }

    fn read_block(&self, page: PageIndex, into: &mut PageBytes) -> Block {
        if let Some(block) = self.block_of(page) {
            return lock(&self.state).disk.read(block, into);
        }
        self.read(page, into);
        Block::of(into)
    }

    fn leave_missing(&self, page: PageIndex, digest: u64) -> bool {
        let block = self.block_of(page);
        if let Some(block) = block {
            lock(&self.state).disk.leave_missing(block, Some(digest));
        }
        block.is_some()
    }
}

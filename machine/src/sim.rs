//! A simulated machine: pages, dirty tracking, a guest that writes and emits as time goes by, a gate.
//!
//! A [`SimVmm`] stands for the VMM process: it outlives the handles ([`SimMachine`]) that daemons hold on
//! it, and can be killed. Its guest is a function of its own memory: page 0 holds a random state and
//! a sequence number; every [`TICK`] it writes pages of its working set and emits the next number. So
//! a machine that was moved wrongly shows: numbers are doubled or missing ([`Outside`]), or page 0 and
//! the saved state disagree.
//!
//! Time is an argument: the guest runs up to what the clock says whenever the machine is called.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    Geometry, Gone, HostInstant, Machine, MachineError, Memory, PAGE_SIZE, PageBytes, PageIndex, PageSet,
    PauseCause, Paused, SavedState, Started,
    control::Phase,
    state::{ClockState, STATE_VERSION, VcpuState},
};

/// The guest's step.
pub const TICK: Duration = Duration::from_micros(250);

/// Most steps made up for in one call: a simulated second.
const MAX_TICKS: u64 = 4_000;

/// Reads a host's clock.
pub type Clock = Arc<dyn Fn() -> HostInstant + Send + Sync>;

/// Where simulated machines' output arrives: the order in which it left.
#[derive(Clone, Debug, Default)]
pub struct Outside(Arc<Mutex<Vec<Emission>>>);

/// One number that left a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emission {
    /// Which VMM process emitted it.
    pub vmm: u64,
    /// Which start from nothing it goes back to.
    pub generation: u64,
    /// The number.
    pub sequence: u64,
}

impl Outside {
    /// All that left so far.
    #[must_use]
    pub fn log(&self) -> Vec<Emission> {
        lock(&self.0).clone()
    }

    /// Checks that within each generation no number is doubled, missing or out of order, and that a
    /// generation ends when the next one begins.
    ///
    /// # Errors
    /// The first pair of emissions that does not fit.
    pub fn check(&self) -> Result<(), (Emission, Emission)> {
        let log = self.log();
        for pair in log.windows(2) {
            let [before, after] = [pair[0], pair[1]];
            let next = after.generation == before.generation && after.sequence == before.sequence + 1;
            let anew = after.generation > before.generation && after.sequence == 1;
            if !next && !anew {
                return Err((before, after));
            }
        }
        Ok(())
    }
}

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
}

struct State {
    phase: Phase,
    alive: bool,
    pages: Vec<PageBytes>,
    dirty: PageSet,
    /// What the guest emitted while its gate was shut.
    held: Vec<Emission>,
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
            let emission = self.tick(spec);
            if gate_open { lock(&outside.0).push(emission) } else { self.held.push(emission) }
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
            // xorshift64 (Marsaglia 2003)
            guest.random ^= guest.random << 13;
            guest.random ^= guest.random >> 7;
            guest.random ^= guest.random << 17;
            let page = 1 + (guest.random % u64::from(spec.working_set.max(1))) as usize;
            if page < self.pages.len() {
                let offset = (guest.random >> 32) as usize % (PAGE_SIZE / 8) * 8;
                self.pages[page][offset..][..8].copy_from_slice(&guest.random.to_le_bytes());
                self.dirty.insert(PageIndex(page as u32));
            }
        }
        guest.sequence += 1;
        self.set_guest(guest);
        Emission { vmm: spec.vmm, generation: guest.generation, sequence: guest.sequence }
    }
}

impl SimVmm {
    /// A shell: no state yet.
    #[must_use]
    pub fn shell(spec: SimSpec, clock: Clock, outside: Outside) -> Self {
        let pages = spec.geometry.pages();
        let state = State {
            phase: Phase::Shell,
            alive: true,
            pages: vec![[0; PAGE_SIZE]; pages as usize],
            dirty: PageSet::empty(pages),
            held: Vec::new(),
            ran_to: clock(),
            guest_ns: 0,
            clock,
            mishap: None,
        };
        Self { shared: Arc::new(Shared { spec, outside, state: Mutex::new(state) }) }
    }

    /// A machine started from nothing, gate open, some of its memory filled from `seed`.
    #[must_use]
    pub fn started(spec: SimSpec, clock: Clock, outside: Outside, generation: u64, seed: u64) -> Self {
        let vmm = Self::shell(spec, clock, outside);
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
            state.alive = false;
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

    /// All pages as they are.
    #[must_use]
    pub fn contents(&self) -> Vec<PageBytes> {
        lock(&self.shared.state).pages.clone()
    }
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

    /// One call: brings the guest up to now, lets a mishap happen, else does `work`.
    fn call<T>(
        &self,
        call: Call,
        work: impl FnOnce(&SimSpec, &Outside, &mut State) -> Result<T, MachineError>,
    ) -> Result<T, MachineError> {
        let shared = &self.vmm.shared;
        let mut state = lock(&shared.state);
        let gone = || MachineError::Gone(Gone { reason: "killed".into() });
        if !state.alive {
            return Err(gone());
        }
        state.catch_up(&shared.spec, &shared.outside);
        let mishap = match state.mishap {
            Some((at, mishap)) if at == call => {
                state.mishap = None;
                Some(mishap)
            }
            _ => None,
        };
        match mishap {
            Some(Mishap::Refuse) => refused("as told"),
            Some(Mishap::Die) => {
                state.alive = false;
                Err(gone())
            }
            Some(Mishap::DieAfter) => {
                let _ = work(&shared.spec, &shared.outside, &mut state);
                state.alive = false;
                Err(gone())
            }
            None => work(&shared.spec, &shared.outside, &mut state),
        }
    }
}

impl Machine for SimMachine {
    fn memory(&self) -> Arc<dyn Memory> {
        self.vmm.shared.clone()
    }

    fn base(&self) -> crate::BaseHash {
        crate::BaseHash::default()
    }

    fn harvest(&mut self) -> Result<PageSet, MachineError> {
        self.call(Call::Harvest, |_, _, state| Ok(state.dirty.take()))
    }

    fn pause(&mut self, _: PauseCause) -> Result<Paused, MachineError> {
        self.call(Call::Pause, |spec, _, state| {
            if state.phase != (Phase::Running { gate_open: true }) {
                return refused("only a running machine with an open gate is paused");
            }
            state.phase = Phase::Paused;
            state.pass_time();
            let guest = state.guest();
            Ok(Paused {
                state: SavedState {
                    version: STATE_VERSION,
                    cpu_baseline: spec.cpu_baseline,
                    vcpu: VcpuState { rip: guest.sequence, ..VcpuState::default() },
                    devices: vec![],
                    clock: ClockState {
                        monotonic_ns: state.guest_ns,
                        wall_ns: 0,
                        generation: guest.generation,
                    },
                },
                dirty: state.dirty.take(),
                at: (state.clock)(),
            })
        })
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.call(Call::Resume, |_, _, state| match state.phase {
            Phase::Paused => {
                state.phase = Phase::Running { gate_open: true };
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
            if state.guest().sequence != saved.vcpu.rip {
                return refused("its pages and its state are not of one instant");
            }
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
            lock(&outside.0).append(&mut state.held);
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

impl Memory for Shared {
    fn geometry(&self) -> Geometry {
        self.spec.geometry
    }

    fn read(&self, page: PageIndex, into: &mut PageBytes) {
        *into = lock(&self.state).pages.get(page.0 as usize).copied().unwrap_or([0; PAGE_SIZE]);
    }

    fn write(&self, page: PageIndex, bytes: &PageBytes) {
        if let Some(slot) = lock(&self.state).pages.get_mut(page.0 as usize) {
            *slot = *bytes;
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
        set
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn spec(vmm: u64) -> SimSpec {
        SimSpec {
            geometry: Geometry { memory_pages: 64, disk_pages: 0 },
            vmm,
            working_set: 20,
            writes_per_tick: 2,
            cpu_baseline: 3,
        }
    }

    struct Time(Arc<AtomicU64>);

    impl Time {
        fn new() -> Self {
            Self(Arc::new(AtomicU64::new(0)))
        }

        fn pass(&self, time: Duration) {
            self.0.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
        }

        fn clock(&self) -> Clock {
            let ns = self.0.clone();
            Arc::new(move || HostInstant { ns: ns.load(Ordering::Relaxed) })
        }
    }

    fn copy(from: &SimVmm, to: &SimVmm) {
        let memory = to.handle().memory();
        for (index, page) in from.contents().iter().enumerate() {
            memory.write(PageIndex(index as u32), page);
        }
    }

    #[test]
    fn a_move_keeps_the_numbers_in_order_and_guest_time_true() {
        let (time, outside) = (Time::new(), Outside::default());
        let a = SimVmm::started(spec(1), time.clock(), outside.clone(), 1, 7);
        let b = SimVmm::shell(spec(2), time.clock(), outside.clone());
        time.pass(TICK * 10);
        let paused = a.handle().pause(PauseCause::Switch).unwrap();
        assert!(!paused.dirty.is_empty());
        copy(&a, &b);
        time.pass(TICK * 4);
        b.handle().restore(&paused.state, paused.at).unwrap();
        b.handle().run_gated().unwrap();
        time.pass(TICK * 5);
        b.catch_up();
        assert_eq!(outside.log().len(), 10, "nothing leaves a shut gate");
        a.handle().release().unwrap();
        b.handle().open_gate().unwrap();
        time.pass(TICK * 5);
        b.catch_up();
        assert_eq!(outside.log().len(), 20);
        assert_eq!(outside.check(), Ok(()));
        assert_eq!(b.guest_time(), TICK * 24);
    }

    #[test]
    fn a_released_machine_never_runs_again() {
        let time = Time::new();
        let a = SimVmm::started(spec(1), time.clock(), Outside::default(), 1, 7);
        let mut handle = a.handle();
        assert!(handle.release().is_err());
        handle.pause(PauseCause::Switch).unwrap();
        handle.release().unwrap();
        assert!(handle.resume().is_err() && handle.open_gate().is_err());
    }

    #[test]
    fn two_emitting_copies_are_noticed() {
        let (time, outside) = (Time::new(), Outside::default());
        let a = SimVmm::started(spec(1), time.clock(), outside.clone(), 1, 7);
        let b = SimVmm::shell(spec(2), time.clock(), outside.clone());
        let paused = a.handle().pause(PauseCause::Switch).unwrap();
        copy(&a, &b);
        b.handle().restore(&paused.state, paused.at).unwrap();
        b.handle().run_gated().unwrap();
        b.handle().open_gate().unwrap();
        a.handle().resume().unwrap();
        time.pass(TICK);
        a.catch_up();
        b.catch_up();
        assert!(outside.check().is_err());
    }

    #[test]
    fn pages_and_state_of_two_instants_are_refused() {
        let time = Time::new();
        let a = SimVmm::started(spec(1), time.clock(), Outside::default(), 1, 7);
        let b = SimVmm::shell(spec(2), time.clock(), Outside::default());
        copy(&a, &b);
        time.pass(TICK * 3);
        let paused = a.handle().pause(PauseCause::Switch).unwrap();
        assert!(matches!(b.handle().restore(&paused.state, paused.at), Err(MachineError::Refused { .. })));
    }

    #[test]
    fn mishaps_happen_once_where_they_were_set() {
        let time = Time::new();
        let a = SimVmm::started(spec(1), time.clock(), Outside::default(), 1, 7);
        a.set_mishap(Some((Call::Pause, Mishap::Refuse)));
        assert!(a.handle().harvest().is_ok());
        assert!(a.handle().pause(PauseCause::Switch).is_err());
        assert!(a.handle().pause(PauseCause::Switch).is_ok());
        a.set_mishap(Some((Call::Release, Mishap::DieAfter)));
        assert!(matches!(a.handle().release(), Err(MachineError::Gone(_))));
        assert_eq!(a.phase(), None);
    }
}

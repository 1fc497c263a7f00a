//! The handle on one machine, as replication and handover see it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{Geometry, PAGE_SIZE, PageBytes, PageIndex, PageSet, SavedState, disk::Block};

/// The machine's process is gone: killed, crashed, or its control socket closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machine's process is gone: {reason}")]
pub struct Gone {
    /// What was seen of its end.
    pub reason: String,
}

/// Why a machine did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// Its process is gone.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// It answered that it will not, and why; it is as it was before.
    #[error("the machine refused: {reason}")]
    Refused {
        /// The machine's own words.
        reason: String,
    },
    /// The guest itself has failed (fault, panic, hang); it can neither run nor move.
    #[error("the guest has failed: {reason}")]
    GuestFailed {
        /// What the guest or its watchdog reported.
        reason: String,
    },
}

/// A point of the host's `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostInstant {
    /// Nanoseconds since the host's start.
    pub ns: u64,
}

impl HostInstant {
    /// Time since `earlier`; zero when that lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.ns.saturating_sub(earlier.ns))
    }
}

/// BLAKE3 of a machine's read-only base: what of it is never sent, since every host has the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BaseHash(pub [u8; 32]);

/// The page space of a machine as its daemon maps it.
///
/// Reads of a running machine's pages may tear; they are tracked as dirty again, so that a torn
/// read is always followed by another.
pub trait Memory: Send + Sync {
    /// Sizes of the page space.
    fn geometry(&self) -> Geometry;
    /// Copies one page out. A page outside the space reads as zeros.
    fn read(&self, page: PageIndex, into: &mut PageBytes);
    /// Overwrites one page. A page outside the space is ignored.
    fn write(&self, page: PageIndex, bytes: &PageBytes);
    /// Makes one page zero, giving its backing back where that is possible.
    fn zero(&self, page: PageIndex);
    /// Pages that may hold something other than zeros, or are missing.
    fn populated(&self) -> PageSet;
    /// What is known of a page of the disk without reading it, where it is kept by its digest.
    fn block(&self, page: PageIndex) -> Block {
        let mut bytes = [0; PAGE_SIZE];
        self.read(page, &mut bytes);
        Block::of(&bytes)
    }
    /// Reads a page of the disk; the bytes are its own unless it is missing.
    fn read_block(&self, page: PageIndex, into: &mut PageBytes) -> Block {
        self.read(page, into);
        Block::of(into)
    }
    /// Makes a page of the disk missing here; a host that has a block of this digest has it. Unless that is what is
    /// held already. False where pages cannot be missing.
    fn leave_missing(&self, _page: PageIndex, _digest: u64) -> bool {
        false
    }
}

/// What asked for a pause; shown in events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PauseCause {
    /// The switch of a handover.
    Switch,
    /// A copy of this instant is made; it runs on at once.
    Checkpoint,
    /// An operator or a policy.
    Hold,
}

/// A machine's state at the instant it stopped.
#[derive(Clone, Debug, PartialEq)]
pub struct Paused {
    /// vCPU, devices, clock.
    pub state: SavedState,
    /// Pages written since the last harvest.
    pub dirty: PageSet,
    /// The last exit from `KVM_RUN`, or from the interrupted idle wait.
    pub at: HostInstant,
    /// Up to where its output was queued.
    pub output: OutputMark,
}

/// A point in a machine's output: what it queued before lies in front of it. Wraps around.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OutputMark(pub u16);

/// The pages that a machine runs without until they are brought.
///
/// Shared between threads; the machine keeps what is missing whether or not this is kept. Read through [`Memory`], a
/// missing page is zeros, and it counts as written once it is here, so that whoever copied it copies it again;
/// written, it is brought.
pub trait Missing: Send + Sync {
    /// Waits until `until` at most for a page that the machine waits for. The same page may be named more than once.
    ///
    /// # Errors
    /// [`Gone`].
    fn wanted(&self, until: Instant) -> Result<Option<PageIndex>, Gone>;
    /// Brings a page and wakes who waits for it; says whether it was missing. A page that is here stays as it is.
    ///
    /// # Errors
    /// [`Gone`].
    fn bring(&self, page: PageIndex, bytes: &PageBytes) -> Result<bool, Gone>;
    /// What is still missing.
    fn left(&self) -> PageSet;
}

/// A machine's first entry into `KVM_RUN` after a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// When it entered.
    pub at: HostInstant,
}

/// One machine: a VMM process, or its simulation.
///
/// States: `shell → restored → running(gated) → running ⇄ paused → released`. A call that does not
/// fit the state is [`MachineError::Refused`] and changes nothing.
pub trait Machine: Send {
    /// The page space.
    fn memory(&self) -> Arc<dyn Memory>;

    /// The base it runs on; it runs on no other.
    fn base(&self) -> BaseHash;

    /// Pages written since the last harvest, by the guest and by the VMM. The first harvest after a
    /// start or a restore says every page written since then; pages from before are found by
    /// [`Memory::populated`].
    ///
    /// # Errors
    /// [`MachineError`]; nothing is lost: a later harvest repeats what this one did not return.
    fn harvest(&mut self) -> Result<PageSet, MachineError>;

    /// Stops the vCPU and returns its state. Output that has not left yet waits in the rings and is
    /// part of the state.
    ///
    /// # Errors
    /// [`MachineError`]; except when gone, the machine runs on.
    fn pause(&mut self, cause: PauseCause) -> Result<Paused, MachineError>;

    /// Runs on after [`Machine::pause`], gate as before.
    ///
    /// # Errors
    /// Refused once the machine is released.
    fn resume(&mut self) -> Result<(), MachineError>;

    /// Gives a shell the state to start from; `paused_at` is the instant of the source's pause on
    /// *this* host's clock, so that guest time goes on by the true elapsed time.
    ///
    /// # Errors
    /// Refused when the state's version or CPU features are not this host's.
    fn restore(&mut self, state: &SavedState, paused_at: HostInstant) -> Result<(), MachineError>;

    /// Runs a restored machine with its gate shut: nothing it emits leaves.
    ///
    /// # Errors
    /// [`MachineError`].
    fn run_gated(&mut self) -> Result<Started, MachineError>;

    /// Opens the gate: the right to emit is settled.
    ///
    /// # Errors
    /// [`MachineError`].
    fn open_gate(&mut self) -> Result<(), MachineError>;

    /// Takes pages of its memory out of a shell: whoever touches one from here on waits until it is brought, be it the
    /// guest or a call on this handle such as [`Machine::restore`]. So another thread has to bring pages meanwhile. When
    /// the last is here the machine is as any other; until then a guest that does not answer has not failed.
    ///
    /// # Errors
    /// Refused once it has a state, the second time, for pages of the disk, and where this host cannot do it.
    fn miss(&mut self, pages: &PageSet) -> Result<Arc<dyn Missing>, MachineError> {
        let _ = pages;
        Err(MachineError::Refused { reason: "it cannot run while pages are missing".into() })
    }

    /// Stops a running machine for as long as `copy` takes, which is given the pages written since the last harvest and
    /// may read them; it runs on, gate as before.
    ///
    /// # Errors
    /// [`MachineError`]; except when gone, the machine runs on.
    fn checkpoint(&mut self, copy: &mut dyn FnMut(&PageSet)) -> Result<Paused, MachineError> {
        let paused = self.pause(PauseCause::Checkpoint)?;
        copy(&paused.dirty);
        self.resume()?;
        Ok(paused)
    }

    /// Lets out what a machine behind its gate had queued at a checkpoint. The gate stays shut for all that came later.
    ///
    /// # Errors
    /// [`MachineError`].
    fn let_out(&mut self, output: OutputMark) -> Result<(), MachineError> {
        let _ = output;
        Err(MachineError::Refused { reason: "its gate is open or shut, not between".into() })
    }

    /// Gives the right away for ever: stored where the VMM process and any later daemon see it;
    /// the machine never runs again. Returns only once that is stored.
    ///
    /// # Errors
    /// [`MachineError::Gone`]: then it will not run again either.
    fn release(&mut self) -> Result<(), MachineError>;

    /// Ends the machine's process. Idempotent.
    fn end(&mut self);
}

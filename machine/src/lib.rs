//! What a machine is, without KVM.
//!
//! Everything that decides something (replication plans, handover, failover, placement) depends on
//! this crate alone and so runs the same against a real machine ([`kage_vmm`'s remote handle]) and
//! against [`sim::SimMachine`].
//!
//! - [`page`]: page numbers, sets of pages, the geometry of a machine.
//! - [`state`]: the versioned saved state of vCPU, devices and clock.
//! - [`control`]: messages between the daemon and one VMM process.
//! - [`identity`]: names that never change: VIDs, hosts, users, terms, epochs.
//! - [`disk`]: blocks known by their digests, and the handle on a machine's disk.
//! - [`Machine`]: the handle. Every method is fallible, since the machine is another process.
//!
//! Deliberately not here: sockets, clocks, threads, KVM.
//!
//! [`kage_vmm`'s remote handle]: https://docs.rs/kage-vmm

pub mod control;
pub mod disk;
pub mod identity;
mod machine;
pub mod page;
pub mod sim;
pub mod state;

pub use identity::{Epoch, HandoverId, HostName, ImageNumber, SitePrefix, Term, UserName, Vid};
pub use machine::{
    BaseHash, Gone, HostInstant, Machine, MachineError, Memory, Missing, OutputMark, PauseCause, Paused,
    Started,
};
pub use page::{Geometry, PAGE_SIZE, PageBytes, PageIndex, PageSet};
pub use state::SavedState;

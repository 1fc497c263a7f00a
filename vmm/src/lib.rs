//! One machine on KVM, in a process of its own.
//!
//! - [`process`]: what `kage vmm` runs: `KVM_RUN`, serve the door, repeat.
//! - [`remote`]: the daemon's handle on such a process, an implementation of [`kage_machine::Machine`].
//! - [`confine`]: what `kage compile-module` runs: the compiler for user programs, where it can do no harm.
//! - [`inspect`]: the guest's table of resources.
//! - `disk`: the thread that writes the disk's log, and what it and the daemon say to each other.
//! - [`pool`]: shells and logins made ready before they are wanted.
//!
//! Deliberately not here: keys, peers, policy. The process that runs hostile code opens nothing;
//! everything arrives as a descriptor.

mod clock;
pub mod confine;
mod cpu;
mod dirty;
mod disk;
pub mod inspect;
mod jail;
mod packet;
pub mod pool;
pub mod process;
pub mod remote;
mod sys;
mod tables;
mod upcall;
pub mod users;
mod vcpu;
mod virtio;

//! The unikernel: one user's machine, in ring 3, with one door to everything outside.
//!
//! - [`arch`]: entry, fault stubs, the mailbox, the door, upcalls.
//! - [`memory`]: frames and the windows they are mapped in; [`heap`]: the kernel's own memory.
//! - [`kernel`]: the loop: knock, poll the network, run what is runnable.
//! - [`executor`]: tasks and timers; [`local`]: state of the one thread.
//! - [`virtio`]: drivers; [`net`]: TCP and UDP as async streams; [`random`]: randomness of a generation.
//! - [`process`]: programs in WebAssembly, each on a stack of its own; [`programs`]: those of the image.
//! - [`service`]: what listens; [`shell`]: what a user runs; [`fs`]: what a user keeps; [`vid`]: what names it,
//!   [`resources`]: where the host sees it.
#![no_std]
#![no_main]

extern crate alloc;

mod arch;
mod executor;
mod fs;
mod heap;
mod kernel;
mod local;
mod log;
mod memory;
mod net;
mod process;
mod programs;
mod random;
mod resources;
mod service;
mod shell;
mod time;
mod vid;
mod virtio;

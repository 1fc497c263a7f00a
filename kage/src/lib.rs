//! The `kage` program: command line, daemon, VMM process, testbed, demonstration, measurements.
//!
//! - [`bench`]: what is measured, and how.
//! - [`cli`]: the tree of commands.
//! - [`client`]: talking to a daemon.
//! - [`copy`]: files into and out of a machine.
//! - [`demo`]: the main job, to be watched.
//! - [`operation`]: following what a daemon does to its end.
//! - [`operator`]: how the operator reaches a machine.
//! - [`output`]: tables and JSON.
//! - [`probe`]: what a device sees of a machine.
//! - [`testbed`]: hosts, access points and devices as network namespaces.

pub mod bench;
pub mod cli;
pub mod client;
mod commands;
pub mod copy;
pub mod demo;
mod operation;
pub mod operator;
pub mod output;
pub mod probe;
mod ssh;
pub mod testbed;

pub use commands::run;

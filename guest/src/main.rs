//! The unikernel: one user's machine.
#![no_std]
#![no_main]

mod arch;
mod kernel;

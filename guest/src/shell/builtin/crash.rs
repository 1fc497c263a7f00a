//! Ends the machine in ways that tests need. Not in `help`.
#![expect(unsafe_code, reason = "breaks things on purpose")]

use alloc::string::String;
use core::hint::black_box;

use crate::{net, shell::Failure};

pub async fn run(arguments: &[String]) -> Result<u32, Failure> {
    match arguments {
        [how] if how == "panic" => panic_at_once(),
        [how] if how == "fault" => read_nothing(),
        [how] if how == "loop" => loop_for_ever(),
        [how] if how == "rings" => net::spoil_rings(),
        _ => return Err(Failure::Usage("crash panic|fault|loop|rings")),
    }
    Ok(0)
}

#[inline(never)]
fn panic_at_once() {
    panic!("asked to panic");
}

#[inline(never)]
fn read_nothing() {
    // SAFETY: none: the address is mapped nowhere, and the fault that follows is what the user asked for.
    black_box(unsafe { black_box(0x40 as *const u64).read_volatile() });
}

#[inline(never)]
fn loop_for_ever() {
    while black_box(true) {
        core::hint::spin_loop();
    }
}

//! What listens: measuring services, HTTP, SSH.

mod measure;

use core::time::Duration;

use kage_abi::Config;

use crate::local::Local;

/// What services know of the machine.
pub struct Machine {
    /// Guest time of the first generation: when the user's machine began.
    pub started: Duration,
}

/// Set once the first generation is there.
pub static MACHINE: Local<Machine> = Local::new();

/// Starts all services.
pub fn start(_config: &'static Config, now: Duration) {
    MACHINE.set(Machine { started: now });
    measure::start();
}

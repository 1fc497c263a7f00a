//! What listens: measuring services, HTTP, SSH with SFTP, and the services of the image.

mod http;
mod measure;
mod programs;
pub mod sftp;
mod ssh;

use alloc::string::String;
use core::time::Duration;

use kage_abi::Config;

use crate::{arch, local::Local};

/// What services know of the machine.
pub struct Machine {
    /// Guest time of the first generation: when the user's machine began.
    pub started: Duration,
}

/// Set once the first generation is there.
pub static MACHINE: Local<Machine> = Local::new();

/// Starts all services.
pub fn start(config: &'static Config, now: Duration) {
    MACHINE.set(Machine { started: now });
    crate::fs::start(&user(config), arch::memory_bytes(), crate::programs::files());
    measure::start();
    http::start();
    ssh::start();
    programs::start(&user(config));
}

/// The user's name as it may stand in paths and prompts.
pub fn user(config: &Config) -> String {
    let bytes = config.user.get(..usize::from(config.user_length)).unwrap_or_default();
    let name = String::from_utf8_lossy(bytes);
    name.chars()
        .map(|character| if character.is_control() || character == '/' { '_' } else { character })
        .collect()
}

/// Guest time since the user's machine began.
pub fn uptime() -> Duration {
    crate::time::now().saturating_sub(MACHINE.get().started)
}

//! The log: lines into the ring that the host shows.

use core::fmt::{self, Write};

struct Ring;

impl Write for Ring {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        crate::arch::log_bytes(text.as_bytes());
        Ok(())
    }
}

/// Writes one line, stamped with guest time.
pub fn line(arguments: fmt::Arguments<'_>) {
    let now = crate::time::now();
    let _ = writeln!(Ring, "[{:>6}.{:06}] {arguments}", now.as_secs(), now.subsec_micros());
}

/// Logs a line.
#[macro_export]
macro_rules! log {
    ($($argument:tt)*) => { $crate::log::line(format_args!($($argument)*)) };
}

//! How far a copy is, for those who wait longer than a second.

use std::{
    io::{IsTerminal, stderr},
    time::{Duration, Instant},
};

use crate::output::{Output, bytes, shown};

/// Nothing is said before.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks of a terminal, and of anything else.
const OFTEN: Duration = Duration::from_millis(250);
const SELDOM: Duration = Duration::from_secs(5);

/// What was copied so far.
pub struct Progress {
    output: Output,
    terminal: bool,
    begun: Instant,
    said: Option<Instant>,
    done: u64,
    expected: u64,
}

impl Progress {
    /// Of a command that began at `begun`.
    pub fn new(output: Output, begun: Instant) -> Self {
        let terminal = stderr().is_terminal();
        Self { output, terminal, begun, said: None, done: 0, expected: 0 }
    }

    /// So much will be copied, and this will not.
    pub fn expect(&mut self, bytes: u64, skipped: &[String]) {
        self.expected = bytes;
        for path in skipped {
            self.output.warn(format!("{}: neither a file nor a directory; left out", shown(path)));
        }
    }

    /// So much more was copied.
    pub fn advance(&mut self, more: u64, name: &str) {
        self.done += more;
        let due = match self.said {
            None => self.begun + PATIENCE,
            Some(said) => said + if self.terminal { OFTEN } else { SELDOM },
        };
        let now = Instant::now();
        if now < due || self.output.is_quiet() {
            return;
        }
        self.said = Some(now);
        let (done, expected) = (bytes(self.done), bytes(self.expected.max(self.done)));
        if self.terminal {
            // Over the line before, and clear what it had more (ECMA-48 §8.3.41).
            eprint!("\r{done} of {expected}  {}\x1b[K", shown(name));
        } else {
            eprintln!("{done} of {expected}");
        }
    }

    /// Clears the line.
    pub fn end(&mut self) {
        if self.terminal && self.said.take().is_some() {
            eprint!("\r\x1b[K");
        }
    }
}

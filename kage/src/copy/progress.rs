//! How far a copy is, for those who wait longer than a second.

use std::time::Duration;

use crate::output::{Output, Status, bytes, shown};

/// Nothing is said before.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks of anything but a terminal.
const SELDOM: Duration = Duration::from_secs(5);

/// What was copied so far.
pub struct Progress {
    output: Output,
    status: Status,
    done: u64,
    expected: u64,
}

impl Progress {
    /// Of a command that begins now.
    pub fn new(output: Output) -> Self {
        Self { output, status: Status::new(output, PATIENCE, SELDOM), done: 0, expected: 0 }
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
        let (done, expected) = (self.done, self.expected.max(self.done));
        self.status.say(|| format!("{} of {}  {}", bytes(done), bytes(expected), shown(name)));
    }

    /// Clears the line.
    pub fn end(&mut self) {
        self.status.end();
    }
}

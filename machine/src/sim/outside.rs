//! Where what simulated machines emit arrives.

use std::sync::{Arc, Mutex};

use super::lock;

/// Where simulated machines' output arrives: the order in which it left.
#[derive(Clone, Debug, Default)]
pub struct Outside(Arc<Mutex<Vec<Emission>>>);

/// One number that left a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emission {
    /// Which VMM process emitted it.
    pub vmm: u64,
    /// Which start from nothing it goes back to.
    pub generation: u64,
    /// The number.
    pub sequence: u64,
    /// It waited at the gate in the state from which this process went on: it may have left already.
    pub carried: bool,
}

impl Outside {
    /// Lets a number out.
    pub(super) fn take(&self, emission: Emission) {
        lock(&self.0).push(emission);
    }

    /// All that left so far.
    #[must_use]
    pub fn log(&self) -> Vec<Emission> {
        lock(&self.0).clone()
    }

    /// Checks that within each generation no number is doubled, missing or out of order, and that a
    /// generation ends when the next one begins. Numbers that were carried may leave again, as frames may: a machine
    /// that goes on from a checkpoint does not know which of those that waited in it have left.
    ///
    /// # Errors
    /// The first pair of emissions that does not fit.
    pub fn check(&self) -> Result<(), (Emission, Emission)> {
        let log = self.log();
        let mut last = 0;
        for pair in log.windows(2) {
            let [before, after] = [pair[0], pair[1]];
            last = last.max(before.sequence);
            let same = after.generation == before.generation;
            let next = same && after.sequence == last + 1;
            let again = same && after.carried && after.sequence <= last;
            let anew = after.generation > before.generation && after.sequence == 1;
            if anew {
                last = 0;
            }
            if !next && !again && !anew {
                return Err((before, after));
            }
        }
        Ok(())
    }
}

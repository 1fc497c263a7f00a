//! The thin blocking shell around the deciders: links, machine, directory, clock.
//!
//! Each handover runs on a thread of its own at either host. The driver executes a decider's actions
//! in order and feeds back what came of each; it decides nothing itself.
//!
//! - [`source`]: [`source::run`], [`source::resume`].
//! - [`target`]: [`target::Targets`], which pairs links with sessions and answers inquiries.
//!
//! Deliberately not here: what a daemon knows (configuration, users, taps, routes): it lends that by
//! [`source::SourceSide`], [`target::TargetHost`] and [`target::TargetSide`].

pub mod source;
pub mod target;
#[cfg(test)]
mod tests;

use std::{
    sync::{Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use kage_directory::{Directory, DirectoryError, ImageRecord, Records, Versioned, records};
use kage_machine::{HostInstant, Memory, PAGE_SIZE, PageIndex};
use kage_replicate::digest::PageDigest;

use crate::ownership::{Change, Standing, Ticket};

/// How long the drivers wait.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For the other side's next word around the switch. A restore takes milliseconds; longer than
    /// a retransmission of TCP (200 ms) or two.
    pub switch: Duration,
    /// Between two looks at the directory or the peer while something is not settled.
    pub poll: Duration,
    /// For the answer to an inquiry or a probe.
    pub answer: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            switch: Duration::from_secs(2),
            poll: Duration::from_millis(200),
            answer: Duration::from_secs(2),
        }
    }
}

/// Through which others reach a running handover.
#[derive(Debug, Default)]
pub struct Control {
    cancelled: Mutex<bool>,
    changed: Condvar,
}

impl Control {
    /// Asks the handover to stop. Without effect once the switch was offered.
    pub fn cancel(&self) {
        *self.cancelled.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Whether it was asked to stop.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        *self.cancelled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits that long; a cancel, which matters to no state that waits so, does not shorten it.
    fn wait(&self, time: Duration) {
        let deadline = Instant::now() + time;
        let mut guard = self.cancelled.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            guard = match self.changed.wait_timeout(guard, left) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

/// This host's `CLOCK_MONOTONIC`.
#[must_use]
pub fn now() -> HostInstant {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    HostInstant { ns: time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64 }
}

/// BLAKE3 of all pages of memory in order, and of what every block of the disk is: proof, where asked for, that
/// both sides hold the same machine. A block counts as held whether its bytes are here or elsewhere.
#[must_use]
pub fn hash_memory(memory: &dyn Memory) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = [0; PAGE_SIZE];
    let geometry = memory.geometry();
    for page in 0..geometry.memory_pages {
        memory.read(PageIndex(page), &mut bytes);
        hasher.update(&bytes);
    }
    for page in (geometry.memory_pages..geometry.pages()).map(PageIndex) {
        let block = PageDigest::of_block(page, memory.block(page));
        hasher.update(&block.map_or([u8::MAX; 16], PageDigest::to_bytes));
    }
    *hasher.finalize().as_bytes()
}

/// What the directory answered.
enum Told {
    Swapped,
    Record(Standing),
    Away(String),
}

/// The image's record as one side of a handover sees and changes it.
struct Ownership<'a> {
    directory: &'a dyn Directory,
    ticket: Ticket,
    seen: Option<Versioned<ImageRecord>>,
}

impl<'a> Ownership<'a> {
    fn new(directory: &'a dyn Directory, ticket: Ticket) -> Self {
        Self { directory, ticket, seen: None }
    }

    fn standing(&self) -> Standing {
        Standing::of(self.seen.as_ref().map(|seen| &seen.record), &self.ticket)
    }

    fn read(&mut self) -> Told {
        match self.directory.read::<ImageRecord>(&self.ticket.user) {
            Ok(record) => {
                self.seen = record;
                Told::Record(self.standing())
            }
            Err(error) => Told::Away(error.to_string()),
        }
    }

    fn swap(&mut self, change: Change) -> Told {
        // Nothing read yet: the decider judges what is there. What made it want the change may be older
        // than the other side's own.
        let Some(Versioned { revision, record }) = &self.seen else { return self.read() };
        let next = change.apply(record, &self.ticket);
        match self.directory.swap(&self.ticket.user, *revision, Some(&next)) {
            Ok(revision) => {
                self.seen = Some(Versioned { revision, record: next });
                Told::Swapped
            }
            Err(DirectoryError::Conflict { current }) => self.conflict(current),
            Err(error) => Told::Away(error.to_string()),
        }
    }

    fn conflict(&mut self, current: Option<kage_directory::Entry>) -> Told {
        let decoded = current.map(|entry| {
            let record = records::decode::<ImageRecord>(&entry.key, &entry.value)?;
            Ok::<_, DirectoryError>(Versioned { revision: entry.revision, record })
        });
        match decoded.transpose() {
            Ok(seen) => {
                self.seen = seen;
                Told::Record(self.standing())
            }
            Err(error) => Told::Away(error.to_string()),
        }
    }
}

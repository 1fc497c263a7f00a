//! Who compiles next.
//!
//! ```text
//! waiting ── free compiler, none of this asker's or for this module runs ──▶ running ──▶ over
//! ```
//! An asker has one compiler at a time, so that none keeps all of them to itself. Of those that wait, the asker comes
//! first whose turn was longest ago. Who asks for what is being compiled waits for that, and finds it kept.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
};

/// Why a turn did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoTurn {
    /// Who asked has gone.
    Gone,
    /// It took too long.
    Late,
}

struct Waiting {
    ticket: u64,
    owner: u32,
    key: blake3::Hash,
    granted: Arc<OwnedFd>,
}

#[derive(Default)]
struct Queue {
    next: u64,
    running: Vec<(u64, u32, blake3::Hash)>,
    waiting: Vec<Waiting>,
    /// The last ticket of each asker that had a turn.
    served: BTreeMap<u32, u64>,
}

impl Queue {
    /// The place in the queue of whoever is next, when `most` may run.
    fn next(&self, most: usize) -> Option<usize> {
        if self.running.len() >= most {
            return None;
        }
        let may = |wait: &Waiting| {
            !self.running.iter().any(|(_, owner, key)| *owner == wait.owner || *key == wait.key)
        };
        let order = |wait: &Waiting| (self.served.get(&wait.owner).copied().unwrap_or(0), wait.ticket);
        let able = self.waiting.iter().enumerate().filter(|(_, wait)| may(wait));
        able.min_by_key(|(_, wait)| order(wait)).map(|(at, _)| at)
    }

    /// Gives every turn that can be given.
    fn grant(&mut self, most: impl Fn(usize) -> usize) {
        while let Some(at) = self.next(most(self.running.len())) {
            let wait = self.waiting.remove(at);
            self.served.insert(wait.owner, self.next);
            self.next += 1;
            self.running.push((wait.ticket, wait.owner, wait.key));
            // A counter of a few bytes has room.
            let _ = rustix::io::write(&wait.granted, &1_u64.to_ne_bytes());
        }
        if self.running.is_empty() && self.waiting.is_empty() {
            self.served.clear();
        }
    }

    fn leave(&mut self, ticket: u64) {
        self.running.retain(|(running, ..)| *running != ticket);
        self.waiting.retain(|wait| wait.ticket != ticket);
    }

    fn runs(&self, ticket: u64) -> bool {
        self.running.iter().any(|(running, ..)| *running == ticket)
    }
}

/// The turns at a host's compilers.
pub struct Turns {
    queue: Mutex<Queue>,
    /// How many may run, while so many do.
    most: Box<dyn Fn(usize) -> usize + Send + Sync>,
}

impl Turns {
    /// As many turns at a time as `most` says, given how many run.
    pub fn new(most: impl Fn(usize) -> usize + Send + Sync + 'static) -> Self {
        Self { queue: Mutex::default(), most: Box::new(most) }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn of `owner`'s to compile what `key` names; no longer than the other end of `asker` is there.
    ///
    /// # Errors
    /// No descriptor for it. [`NoTurn`] inside.
    pub fn wait(
        &self,
        owner: u32,
        key: blake3::Hash,
        asker: &impl AsFd,
        until: Instant,
    ) -> io::Result<Result<Turn<'_>, NoTurn>> {
        let granted = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut queue = self.queue();
        let ticket = queue.next;
        queue.next += 1;
        queue.waiting.push(Waiting { ticket, owner, key, granted: granted.clone() });
        queue.grant(&self.most);
        drop(queue);
        // From here on it is taken out of the queue, however this ends.
        let turn = Turn { turns: self, ticket };
        loop {
            if self.queue().runs(ticket) {
                return Ok(Ok(turn));
            }
            let Some(left) = left(until) else { return Ok(Err(NoTurn::Late)) };
            let mut polled = [PollFd::new(&granted, PollFlags::IN), PollFd::new(asker, PollFlags::RDHUP)];
            match poll(&mut polled, Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !polled[1].revents().is_empty() {
                return Ok(Err(NoTurn::Gone));
            }
        }
    }
}

/// What is left until a time, if anything.
pub fn left(until: Instant) -> Option<Timespec> {
    let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
    Timespec::try_from(left).ok()
}

/// The right to run a compiler, given back when dropped.
pub struct Turn<'a> {
    turns: &'a Turns,
    ticket: u64,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut queue = self.turns.queue();
        queue.leave(self.ticket);
        queue.grant(&self.turns.most);
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, sync::mpsc, thread, time::Duration};

    use super::*;

    fn key(of: u64) -> blake3::Hash {
        blake3::hash(&of.to_le_bytes())
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn one_that_asks_without_end_leaves_the_others_their_turns() {
        let turns = Turns::new(|_| 2);
        let (stream, _other) = UnixStream::pair().unwrap();
        let greedy = turns.wait(1, key(0), &stream, soon()).unwrap().unwrap_or_else(|_| panic!("a turn"));
        let (told, order) = mpsc::channel();
        thread::scope(|scope| {
            for ask in 1..4 {
                let (told, turns, stream) = (told.clone(), &turns, &stream);
                scope.spawn(move || {
                    let turn = turns.wait(1, key(ask), stream, soon()).unwrap();
                    told.send(1).unwrap();
                    drop(turn);
                });
            }
            while turns.queue().waiting.len() < 3 {
                thread::yield_now();
            }
            // The second compiler is free all the while.
            let other = turns.wait(2, key(9), &stream, Instant::now()).unwrap();
            assert!(other.is_ok(), "its turn comes at once");
            let (again, told) = ((&turns, &stream), told.clone());
            scope.spawn(move || {
                let turn = again.0.wait(3, key(10), again.1, soon()).unwrap();
                told.send(3).unwrap();
                drop(turn);
            });
            while turns.queue().waiting.len() < 4 {
                thread::yield_now();
            }
            drop(other);
            assert_eq!(order.recv_timeout(Duration::from_secs(10)), Ok(3));
            drop(greedy);
        });
        assert_eq!(order.try_iter().collect::<Vec<_>>(), [1, 1, 1]);
        assert!(turns.queue().served.is_empty());
    }

    #[test]
    fn the_longest_unserved_comes_first_and_a_module_is_compiled_once_at_a_time() {
        let mut queue = Queue::default();
        let granted = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        for (ticket, owner, module) in [(0, 1, 1), (1, 1, 2), (2, 2, 1), (3, 2, 3), (4, 3, 4)] {
            queue.waiting.push(Waiting { ticket, owner, key: key(module), granted: granted.clone() });
        }
        queue.next = 5;
        queue.grant(|_| 2);
        let running = |queue: &Queue| queue.running.iter().map(|(ticket, ..)| *ticket).collect::<Vec<_>>();
        assert_eq!(running(&queue), [0, 3], "not the same module, nor the same asker, a second time");
        queue.leave(0);
        queue.grant(|_| 2);
        assert_eq!(running(&queue), [3, 4], "who has had no turn yet");
        queue.leave(4);
        queue.grant(|_| 1);
        assert_eq!(running(&queue), [3], "fewer while memory is short");
        queue.grant(|_| 2);
        assert_eq!(running(&queue), [3, 1]);
    }

    #[test]
    fn who_goes_or_waits_too_long_leaves_the_queue() {
        let turns = Turns::new(|_| 1);
        let (stream, other) = UnixStream::pair().unwrap();
        let first = turns.wait(1, key(1), &stream, soon()).unwrap();
        assert!(first.is_ok());
        let late = turns.wait(2, key(2), &stream, Instant::now()).unwrap();
        assert_eq!(late.err(), Some(NoTurn::Late));
        drop(other);
        let gone = turns.wait(2, key(2), &stream, soon()).unwrap();
        assert_eq!(gone.err(), Some(NoTurn::Gone));
        assert!(turns.queue().waiting.is_empty());
    }
}

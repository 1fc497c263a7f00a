//! Background jobs: pipelines that a session does not wait for. They live on when it ends.

use alloc::{rc::Rc, string::String, vec::Vec};
use core::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    task::{Poll, Waker},
};

use super::Session;
use crate::executor;

/// Jobs of a session, running or not yet reported.
const MOST: usize = 64;

/// One job.
pub struct Job {
    /// Its number in the session.
    pub number: u32,
    /// The command line.
    pub text: String,
    /// What its commands share; its interrupt ends them.
    session: Rc<Session>,
    status: Cell<Option<u32>>,
    waiters: RefCell<Vec<Waker>>,
}

impl Job {
    /// Status of its last command, once it has ended.
    pub fn status(&self) -> Option<u32> {
        self.status.get()
    }

    /// Ends its commands.
    pub fn interrupt(&self) {
        self.session.interrupt.raise();
    }

    /// Waits for its end; returns its status.
    pub async fn wait(&self) -> u32 {
        poll_fn(|context| match self.status.get() {
            Some(status) => Poll::Ready(status),
            None => {
                self.waiters.borrow_mut().push(context.waker().clone());
                Poll::Pending
            }
        })
        .await
    }
}

/// The jobs of a session.
#[derive(Default)]
pub struct Jobs(RefCell<Vec<Rc<Job>>>);

impl Jobs {
    /// Starts a job; `run` makes its commands, given the session they share. `None` when there are too many.
    pub fn start<F: Future<Output = u32> + 'static>(
        &self,
        text: String,
        session: Rc<Session>,
        run: impl FnOnce(Rc<Session>) -> F,
    ) -> Option<Rc<Job>> {
        let mut jobs = self.0.borrow_mut();
        if jobs.len() >= MOST {
            jobs.retain(|job| job.status().is_none());
        }
        if jobs.len() >= MOST {
            return None;
        }
        let number = jobs.last().map_or(1, |job| job.number + 1);
        let commands = run(Rc::clone(&session));
        let job =
            Rc::new(Job { number, text, session, status: Cell::new(None), waiters: RefCell::default() });
        jobs.push(Rc::clone(&job));
        let ended = Rc::clone(&job);
        executor::spawn("job", async move {
            let status = commands.await;
            ended.status.set(Some(status));
            let waiters = core::mem::take(&mut *ended.waiters.borrow_mut());
            waiters.into_iter().for_each(Waker::wake);
        });
        Some(job)
    }

    /// All of them, oldest first.
    pub fn all(&self) -> Vec<Rc<Job>> {
        self.0.borrow().clone()
    }

    /// The job of a number.
    pub fn find(&self, number: u32) -> Option<Rc<Job>> {
        self.0.borrow().iter().find(|job| job.number == number).cloned()
    }

    /// Forgets those that have ended.
    pub fn forget_ended(&self) {
        self.0.borrow_mut().retain(|job| job.status().is_none());
    }
}

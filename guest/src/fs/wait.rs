//! Who waits for something of the files.

use alloc::{boxed::Box, vec::Vec};
use core::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, Waker},
};

/// Tasks to wake.
#[derive(Default)]
pub struct Waiters(Vec<Waker>);

impl Waiters {
    /// Nobody.
    pub const fn new() -> Self {
        Self(Vec::new())
    }
}

impl Waiters {
    /// Has a task woken.
    pub fn add(&mut self, context: &Context<'_>) {
        if !self.0.iter().any(|waker| waker.will_wake(context.waker())) {
            self.0.push(context.waker().clone());
        }
    }

    /// Wakes all, who then look for themselves.
    pub fn wake(&mut self) {
        core::mem::take(&mut self.0).into_iter().for_each(Waker::wake);
    }
}

/// Runs futures, `most` at a time; the first error, after all of them are done.
///
/// # Errors
/// That of a future.
pub async fn all<F, E>(most: usize, futures: impl IntoIterator<Item = F>) -> Result<(), E>
where
    F: Future<Output = Result<(), E>>,
{
    let mut waiting = futures.into_iter();
    let mut running: Vec<Pin<Box<F>>> = Vec::new();
    let mut outcome = Ok(());
    poll_fn(|context| {
        loop {
            running.retain_mut(|future| match future.as_mut().poll(context) {
                Poll::Pending => true,
                Poll::Ready(result) => {
                    if outcome.is_ok() {
                        outcome = result;
                    }
                    false
                }
            });
            let mut more = false;
            while running.len() < most {
                let Some(future) = waiting.next() else { break };
                running.push(Box::pin(future));
                more = true;
            }
            if !more {
                return if running.is_empty() { Poll::Ready(()) } else { Poll::Pending };
            }
        }
    })
    .await;
    outcome
}

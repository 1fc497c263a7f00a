//! Bounded byte pipes between tasks.
//!
//! Both ends are counted: a reader sees the end once no writer is left, a writer learns when nobody will read.
//! An emptied pipe starts again at its first byte, so an idle one keeps touching the same few pages.

use alloc::{rc::Rc, vec::Vec};
use core::{
    cell::RefCell,
    future::poll_fn,
    task::{Context, Poll, Waker},
};

/// Bytes a pipe holds before its writers wait.
pub const CAPACITY: usize = 32 << 10;

/// Nobody will read what is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    head: usize,
    writers: usize,
    readers: usize,
    /// The writing side said that nothing more comes, whoever still holds it.
    ended: bool,
    on_data: Vec<Waker>,
    on_room: Vec<Waker>,
}

impl State {
    fn len(&self) -> usize {
        self.bytes.len() - self.head
    }

    fn room(&self) -> usize {
        CAPACITY.saturating_sub(self.len())
    }

    fn take(&mut self, count: usize) {
        self.head += count;
        if self.head == self.bytes.len() {
            self.bytes.clear();
            self.head = 0;
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        if self.head > 0 && self.head >= self.len() {
            self.bytes.drain(..self.head);
            self.head = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }
}

fn remember(wakers: &mut Vec<Waker>, context: &Context<'_>) {
    if !wakers.iter().any(|waker| waker.will_wake(context.waker())) {
        wakers.push(context.waker().clone());
    }
}

fn wake(state: &Rc<RefCell<State>>, which: impl FnOnce(&mut State) -> &mut Vec<Waker>) {
    let wakers = core::mem::take(which(&mut state.borrow_mut()));
    wakers.into_iter().for_each(Waker::wake);
}

/// The end that reads.
pub struct Reader(Rc<RefCell<State>>);

/// The end that writes.
pub struct Writer(Rc<RefCell<State>>);

/// A pipe.
pub fn pipe() -> (Writer, Reader) {
    let state = Rc::new(RefCell::new(State { writers: 1, readers: 1, ..State::default() }));
    (Writer(Rc::clone(&state)), Reader(state))
}

impl Reader {
    /// Shows what is there, at least a byte; the count that `take` returns is taken out. `Ready(None)` at the end.
    pub fn poll_take<R>(
        &self,
        context: &Context<'_>,
        take: impl FnOnce(&[u8]) -> (usize, R),
    ) -> Poll<Option<R>> {
        let (result, woken) = {
            let mut state = self.0.borrow_mut();
            if state.len() == 0 {
                if state.writers == 0 || state.ended {
                    return Poll::Ready(None);
                }
                remember(&mut state.on_data, context);
                return Poll::Pending;
            }
            let head = state.head;
            let (count, result) = take(&state.bytes[head..]);
            state.take(count);
            (result, count > 0)
        };
        if woken {
            wake(&self.0, |state| &mut state.on_room);
        }
        Poll::Ready(Some(result))
    }

    /// Ready when there is something to read, with how much; `None` at the end.
    pub fn poll_readable(&self, context: &Context<'_>) -> Poll<Option<usize>> {
        let mut state = self.0.borrow_mut();
        match state.len() {
            0 if state.writers == 0 || state.ended => Poll::Ready(None),
            0 => {
                remember(&mut state.on_data, context);
                Poll::Pending
            }
            count => Poll::Ready(Some(count)),
        }
    }

    /// Has `context` woken when more arrives, and shows what is there, perhaps nothing.
    pub fn watch<R>(&self, context: &Context<'_>, look: impl FnOnce(&[u8]) -> R) -> R {
        let mut state = self.0.borrow_mut();
        remember(&mut state.on_data, context);
        look(&state.bytes[state.head..])
    }

    /// Takes out what is there, up to `count` bytes.
    pub fn discard(&self, count: usize) {
        {
            let mut state = self.0.borrow_mut();
            let count = count.min(state.len());
            state.take(count);
        }
        wake(&self.0, |state| &mut state.on_room);
    }

    /// Whether nothing is there and nothing will come.
    pub fn is_at_end(&self) -> bool {
        let state = self.0.borrow();
        state.len() == 0 && (state.writers == 0 || state.ended)
    }
}

impl Writer {
    /// Writes what there is room for; `Pending` when there is none.
    pub fn poll_write(&self, context: &Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Broken>> {
        let count = {
            let mut state = self.0.borrow_mut();
            if state.readers == 0 || state.ended {
                return Poll::Ready(Err(Broken));
            }
            let count = bytes.len().min(state.room());
            if count == 0 && !bytes.is_empty() {
                remember(&mut state.on_room, context);
                return Poll::Pending;
            }
            state.put(&bytes[..count]);
            count
        };
        wake(&self.0, |state| &mut state.on_data);
        Poll::Ready(Ok(count))
    }

    /// Ready when there is room for `wanted` bytes, with how much there is.
    pub fn poll_writable(&self, context: &Context<'_>, wanted: usize) -> Poll<Result<usize, Broken>> {
        let mut state = self.0.borrow_mut();
        if state.readers == 0 || state.ended {
            return Poll::Ready(Err(Broken));
        }
        match state.room() {
            room if room < wanted => {
                remember(&mut state.on_room, context);
                Poll::Pending
            }
            room => Poll::Ready(Ok(room)),
        }
    }

    /// Writes everything.
    ///
    /// # Errors
    /// [`Broken`].
    pub async fn write_all(&self, mut bytes: &[u8]) -> Result<(), Broken> {
        while !bytes.is_empty() {
            let count = poll_fn(|context| self.poll_write(context, bytes)).await?;
            bytes = &bytes[count..];
        }
        Ok(())
    }

    /// Says that nothing more comes, whoever else holds a writing end.
    pub fn end(&self) {
        self.0.borrow_mut().ended = true;
        wake(&self.0, |state| &mut state.on_data);
    }
}

impl Clone for Reader {
    fn clone(&self) -> Self {
        self.0.borrow_mut().readers += 1;
        Self(Rc::clone(&self.0))
    }
}

impl Clone for Writer {
    fn clone(&self) -> Self {
        self.0.borrow_mut().writers += 1;
        Self(Rc::clone(&self.0))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let last = {
            let mut state = self.0.borrow_mut();
            state.readers -= 1;
            state.readers == 0
        };
        if last {
            wake(&self.0, |state| &mut state.on_room);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let last = {
            let mut state = self.0.borrow_mut();
            state.writers -= 1;
            state.writers == 0
        };
        if last {
            wake(&self.0, |state| &mut state.on_data);
        }
    }
}

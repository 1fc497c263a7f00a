//! The shell: command lines over pipes, a terminal, or a script on standard input.
//!
//! A session is one task. Its commands are futures within it: ending the session's task, or dropping a command's
//! future at an interrupt, frees whatever they hold. [`pipe`] and [`stdio`] are what they read and write, [`parse`]
//! the language, [`run`] runs a line, [`session`] is the loop around it, [`builtin`] the commands.

mod builtin;
pub mod parse;
pub mod pipe;
mod run;
pub mod session;
pub mod stdio;

use alloc::{rc::Rc, string::String};
use core::{
    cell::{Cell, RefCell},
    fmt,
    task::{Context, Poll, Waker},
};

use crate::fs::FileError;

/// How a command fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Nobody reads its output any more.
    Broken,
    /// A file.
    File(String, FileError),
    /// Arguments it does not understand; the text says what it wants.
    Usage(&'static str),
}

impl Failure {
    /// The exit status.
    pub const fn status(&self) -> u32 {
        match self {
            Self::Broken => 141,
            Self::File(..) => 1,
            Self::Usage(_) => 2,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broken => formatter.write_str("nobody reads the output"),
            Self::File(path, error) => write!(formatter, "{path}: {error}"),
            Self::Usage(text) => write!(formatter, "usage: {text}"),
        }
    }
}

/// An interrupt that was asked for.
#[derive(Default)]
pub struct Interrupt {
    raised: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Interrupt {
    /// Asks for it.
    pub fn raise(&self) {
        self.raised.set(true);
        self.wake();
    }

    /// Wakes who waits for it, so that it looks around.
    fn wake(&self) {
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Forgets one that was asked for.
    pub fn clear(&self) {
        self.raised.set(false);
    }

    /// Ready once it was asked for.
    pub fn poll(&self, context: &Context<'_>) -> Poll<()> {
        if self.raised.get() {
            return Poll::Ready(());
        }
        *self.waker.borrow_mut() = Some(context.waker().clone());
        Poll::Pending
    }
}

/// What the commands of a session share.
pub struct Session {
    /// The user.
    pub user: String,
    /// The home directory.
    pub home: String,
    /// The working directory.
    pub directory: RefCell<String>,
    /// Status of the last command.
    pub status: Cell<u32>,
    /// Set by `exit`.
    pub leaving: Cell<Option<u32>>,
    /// An interrupt for the running command.
    pub interrupt: Interrupt,
    /// Columns of the terminal, 0 if unknown.
    pub columns: Cell<u32>,
}

impl Session {
    /// A new session of a user.
    pub fn new(user: &str, columns: u32) -> Rc<Self> {
        let home = alloc::format!("/home/{user}");
        Rc::new(Self {
            user: user.into(),
            directory: RefCell::new(home.clone()),
            home,
            status: Cell::new(0),
            leaving: Cell::new(None),
            interrupt: Interrupt::default(),
            columns: Cell::new(columns),
        })
    }

    /// Notes the terminal's new width.
    pub fn resize(&self, columns: u32) {
        self.columns.set(columns);
        self.interrupt.wake();
    }

    /// Makes a path absolute.
    pub fn path(&self, path: &str) -> String {
        crate::fs::resolve(&self.directory.borrow(), path)
    }
}

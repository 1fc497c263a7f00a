//! The shell: command lines over pipes, a terminal, or a script on standard input.
//!
//! A session is one task. Its commands are futures within it: ending the session's task, or dropping a command's
//! future at an interrupt, frees whatever they hold. [`pipe`] and [`stdio`] are what they read and write, [`parse`]
//! the language, [`run`] runs a line, [`session`] is the loop around it, [`builtin`] the commands, [`program`] those
//! that are processes, [`jobs`] what runs in the background.

mod builtin;
mod jobs;
pub mod parse;
pub mod pipe;
mod program;
mod run;
pub mod session;
pub mod stdio;

use alloc::{collections::BTreeMap, format, rc::Rc, string::String, vec::Vec};
use core::{
    cell::{Cell, RefCell},
    fmt,
    task::{Context, Poll, Waker},
};

use crate::{fs::FileError, process::Allowed};

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

    /// Whether it was asked for.
    pub fn is_raised(&self) -> bool {
        self.raised.get()
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

/// Most variables of a session, and most bytes of their names and values.
const VARIABLES: usize = 256;
const VARIABLE_BYTES: usize = 64 << 10;

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
    /// It has a terminal.
    pub at_terminal: bool,
    /// Columns of the terminal, 0 if unknown.
    pub columns: Cell<u32>,
    /// What its programs may use.
    pub allowed: Cell<Allowed>,
    /// What runs in the background.
    pub jobs: jobs::Jobs,
    variables: RefCell<BTreeMap<String, String>>,
}

impl Session {
    /// A new session of a user; `columns` is the width of its terminal, if it has one.
    pub fn new(user: &str, columns: Option<u32>) -> Rc<Self> {
        let home = format!("/home/{user}");
        let mut variables = BTreeMap::from([
            ("HOME".into(), home.clone()),
            ("USER".into(), user.into()),
            ("PATH".into(), format!("/bin:{home}/bin:{home}")),
        ]);
        if columns.is_some() {
            variables.insert("TERM".into(), "xterm".into());
        }
        Rc::new(Self {
            user: user.into(),
            directory: RefCell::new(home.clone()),
            home,
            status: Cell::new(0),
            leaving: Cell::new(None),
            interrupt: Interrupt::default(),
            at_terminal: columns.is_some(),
            columns: Cell::new(columns.unwrap_or(0)),
            allowed: Cell::default(),
            jobs: jobs::Jobs::default(),
            variables: RefCell::new(variables),
        })
    }

    /// A session like this one with an interrupt of its own: what a job's commands share.
    pub fn apart(&self) -> Rc<Self> {
        Rc::new(Self {
            user: self.user.clone(),
            home: self.home.clone(),
            directory: self.directory.clone(),
            status: self.status.clone(),
            leaving: Cell::new(None),
            interrupt: Interrupt::default(),
            at_terminal: self.at_terminal,
            columns: self.columns.clone(),
            allowed: self.allowed.clone(),
            jobs: jobs::Jobs::default(),
            variables: self.variables.clone(),
        })
    }

    /// Value of a variable.
    pub fn variable(&self, name: &str) -> Option<String> {
        self.variables.borrow().get(name).cloned()
    }

    /// Sets a variable; false when its name is none, or there are too many.
    pub fn set_variable(&self, name: &str, value: &str) -> bool {
        let mut variables = self.variables.borrow_mut();
        let others = variables.iter().filter(|(other, _)| other.as_str() != name);
        let (count, bytes) = others
            .fold((0, 0), |(count, bytes), (name, value)| (count + 1, bytes + name.len() + value.len()));
        let fits = count < VARIABLES && bytes + name.len() + value.len() <= VARIABLE_BYTES;
        let set = parse::is_name(name) && fits;
        if set {
            variables.insert(name.into(), value.into());
        }
        set
    }

    /// Forgets a variable.
    pub fn unset_variable(&self, name: &str) {
        self.variables.borrow_mut().remove(name);
    }

    /// All variables as programs get them.
    pub fn environment(&self) -> Vec<String> {
        let mut all: Vec<String> =
            self.variables.borrow().iter().map(|(name, value)| format!("{name}={value}")).collect();
        all.push(format!("PWD={}", self.directory.borrow()));
        all
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

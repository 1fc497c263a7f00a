//! Processes: programs in WebAssembly, each on a fiber of its own.
//!
//! ```text
//! spawn ──▶ Runnable ◀─▶ Waiting ──▶ ended: Exit in whoever holds the process
//!              │ kill, Ctrl-C, end of its session: at its next pause
//!              ▼
//!            ended
//! ```
//!
//! - [`engine`]: wasmtime and what ties it to the machine; [`fiber`]: stacks and switches; [`limits`]: memory.
//! - [`code`]: programs, from the image and from files; [`compile`]: the service that compiles the latter.
//! - [`wasi`]: what programs call; [`table`]: the processes there are.
//!
//! A process owns a store (its instance and memory), a fiber, and what WASI opened for it. None of these is shared, so
//! one that traps, exceeds its limits or is killed takes nothing with it. Programs run when nothing else wants to, a
//! slice each in turn.

pub mod code;
pub mod compile;
pub mod engine;
pub mod fiber;
mod limits;
mod run;
pub mod table;
pub mod wasi;

use alloc::{rc::Rc, string::String, sync::Arc, vec::Vec};
use core::{
    cell::{Cell, RefCell},
    fmt,
    future::poll_fn,
    task::{Poll, Waker},
    time::Duration,
};

pub use limits::{Limits, Usage};
pub use run::spawn;

use crate::{shell::stdio::Stdio, vid::Vid};

/// What a new process gets.
pub struct Spec {
    /// Its name and arguments.
    pub arguments: Vec<String>,
    /// Variables, `NAME=value`.
    pub environment: Vec<String>,
    /// Working directory, absolute.
    pub directory: String,
    /// Standard input, output and error.
    pub stdio: Stdio,
    /// What it may use, if less than any process may.
    pub allowed: Allowed,
}

/// Limits of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Bytes of memory.
    pub memory: Option<usize>,
    /// Time it may run.
    pub time: Option<Duration>,
}

/// What the engine keeps for a process: the data of its store.
pub struct State {
    /// What it has open.
    pub wasi: wasi::Context,
    /// What it may use.
    pub limits: Limits,
    /// Itself.
    pub process: Rc<Process>,
}

/// How a process was told to end. The numbers are POSIX's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Ctrl-C.
    Interrupt = 2,
    /// At once.
    Kill = 9,
    /// Nobody reads what it writes.
    Pipe = 13,
    /// Asked to.
    Terminate = 15,
    /// It has run for as long as it may.
    Time = 24,
}

impl Signal {
    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Interrupt => "INT",
            Self::Kill => "KILL",
            Self::Pipe => "PIPE",
            Self::Terminate => "TERM",
            Self::Time => "XCPU",
        }
    }

    /// The signal of a name or number. Those that would end a process anyway count as the nearest there is.
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text.strip_prefix("SIG").unwrap_or(text) {
            "2" | "INT" => Self::Interrupt,
            "9" | "KILL" => Self::Kill,
            "13" | "PIPE" => Self::Pipe,
            "15" | "TERM" | "1" | "HUP" | "3" | "QUIT" => Self::Terminate,
            _ => return None,
        })
    }
}

/// An exit code, as the error by which a hostcall ends its process: `proc_exit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitCode(pub u32);

impl fmt::Display for ExitCode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "exit code {}", self.0)
    }
}

impl core::error::Error for ExitCode {}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself.
    Code(u32),
    /// It trapped.
    Trap(String),
    /// It could not start or go on.
    Failed(String),
    /// It was told to.
    Signal(Signal),
}

impl Exit {
    /// The status a shell shows: the code's low byte, 134 as if by SIGABRT, 126, or 128 and the signal.
    pub const fn status(&self) -> u32 {
        match self {
            Self::Code(code) => *code & 0xff,
            Self::Trap(_) => 134,
            Self::Failed(_) => 126,
            Self::Signal(signal) => 128 + *signal as u32,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(formatter, "exit {code}"),
            Self::Trap(text) => write!(formatter, "trap: {text}"),
            Self::Failed(text) => formatter.write_str(text),
            Self::Signal(Signal::Time) => formatter.write_str("has run for as long as it may"),
            Self::Signal(signal) => write!(formatter, "killed by {}", signal.name()),
        }
    }
}

/// Why there is no new process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SpawnError {
    /// As many as there may be.
    TooMany,
    /// Not enough memory for a stack.
    NoMemory,
    /// The host has given no identities for it yet.
    NoIdentity,
}

impl fmt::Display for SpawnError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany => {
                write!(formatter, "{} processes run, and no more may", table::most())
            }
            Self::NoMemory => formatter.write_str("not enough memory for another process"),
            Self::NoIdentity => formatter.write_str("no identity is left for it; try again later"),
        }
    }
}

/// One process, while it runs and after.
pub struct Process {
    pid: u32,
    vid: Vid,
    arguments: Vec<String>,
    usage: Arc<Usage>,
    /// Door time it has run.
    time: Cell<Duration>,
    allowed: Allowed,
    waiting: Cell<bool>,
    signal: Cell<Option<Signal>>,
    exit: RefCell<Option<Exit>>,
    /// Of its task.
    waker: RefCell<Option<Waker>>,
    /// Who waits for its end.
    waiters: RefCell<Vec<Waker>>,
}

impl Process {
    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its identity.
    pub fn vid(&self) -> Vid {
        self.vid
    }

    /// What it is called: the first argument.
    pub fn name(&self) -> &str {
        self.arguments.first().map(String::as_str).unwrap_or_default()
    }

    /// Name and arguments in a line.
    pub fn command(&self) -> String {
        self.arguments.join(" ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
    }

    /// How long it has run.
    pub fn time(&self) -> Duration {
        self.time.get()
    }

    fn add_time(&self, span: Duration) {
        let time = self.time.get() + span;
        self.time.set(time);
        if self.allowed.time.is_some_and(|most| time > most) && self.signal.get().is_none() {
            self.kill(Signal::Time);
        }
    }

    /// Bytes of memory it may have.
    pub fn memory_limit(&self) -> usize {
        let most = table::memory_limit();
        self.allowed.memory.map_or(most, |own| own.min(most))
    }

    /// Bytes of memory it has.
    pub fn memory_bytes(&self) -> usize {
        self.usage.bytes()
    }

    /// Whether it waits for something, and would not run if it could.
    pub fn is_waiting(&self) -> bool {
        self.waiting.get()
    }

    /// How it ended, once it has.
    pub fn exit(&self) -> Option<Exit> {
        self.exit.borrow().clone()
    }

    /// Has it end. The first signal is the one that counts.
    pub fn kill(&self, signal: Signal) {
        if self.signal.get().is_none() {
            self.signal.set(Some(signal));
        }
        let waker = self.waker.borrow().clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits until it has ended.
    pub async fn wait(&self) -> Exit {
        poll_fn(|context| match self.exit() {
            Some(exit) => Poll::Ready(exit),
            None => {
                let mut waiters = self.waiters.borrow_mut();
                if !waiters.iter().any(|waker| waker.will_wake(context.waker())) {
                    waiters.push(context.waker().clone());
                }
                Poll::Pending
            }
        })
        .await
    }

    fn end(&self, exit: Exit) {
        *self.exit.borrow_mut() = Some(exit);
        *self.waker.borrow_mut() = None;
        let waiters = core::mem::take(&mut *self.waiters.borrow_mut());
        waiters.into_iter().for_each(Waker::wake);
    }
}

/// Prepares processes.
pub fn start() {
    table::start();
    engine::start();
    code::start();
}

//! What a connection tells its driver.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// A channel of one connection. Numbers are not used again, so a stale one names nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelId(pub(crate) u32);

impl fmt::Display for ChannelId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Which of a program's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// The size of a terminal; 0 where unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WindowSize {
    /// Width in characters.
    pub columns: u32,
    /// Height in characters.
    pub rows: u32,
    /// Width in pixels.
    pub width_px: u32,
    /// Height in pixels.
    pub height_px: u32,
}

/// A terminal at the peer's end of a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pty {
    /// The value of `TERM`.
    pub term: String,
    /// Its size.
    pub size: WindowSize,
    /// Its modes, encoded as RFC 4254 §8 says.
    pub modes: Vec<u8>,
}

/// What is to run on a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    /// The user's shell.
    Shell,
    /// One command line.
    Exec(Vec<u8>),
    /// A named service, such as `sftp`.
    Subsystem(String),
}

/// Something happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A user proved a key.
    Authenticated {
        /// The account.
        user: String,
        /// The key's fingerprint.
        fingerprint: String,
    },
    /// A session channel is open; what runs on it follows.
    Opened {
        /// The channel.
        channel: ChannelId,
    },
    /// The channel has a terminal. It is granted already.
    Pty {
        /// The channel.
        channel: ChannelId,
        /// The terminal.
        pty: Pty,
    },
    /// An environment variable for the program to come. It is granted already.
    Env {
        /// The channel.
        channel: ChannelId,
        /// The variable.
        name: Vec<u8>,
        /// Its value.
        value: Vec<u8>,
    },
    /// A program is to start: answer with `accept` or `refuse` before the next `input`, which refuses otherwise.
    Start {
        /// The channel.
        channel: ChannelId,
        /// What is to run.
        program: Program,
    },
    /// There is more to read with `data`.
    Data {
        /// The channel.
        channel: ChannelId,
    },
    /// The peer sends no more data on the channel; what came before can still be read.
    Eof {
        /// The channel.
        channel: ChannelId,
    },
    /// The terminal has another size.
    WindowChange {
        /// The channel.
        channel: ChannelId,
        /// The new size.
        size: WindowSize,
    },
    /// A signal for the program, named as RFC 4254 §6.10 does: `INT`, `TERM`, …
    Signal {
        /// The channel.
        channel: ChannelId,
        /// The signal.
        name: String,
    },
    /// The channel is gone, with whatever was not read.
    Closed {
        /// The channel.
        channel: ChannelId,
    },
    /// The peer ended the connection.
    Disconnected {
        /// Its reason code (RFC 4253 §11.1).
        reason: u32,
        /// What it said, cut.
        text: String,
    },
}

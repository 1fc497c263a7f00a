//! An SSH-2 server without I/O, time or randomness of its own, and a line editor for its shells.
//!
//! A unikernel's driver hands each TCP connection's bytes to a [`Connection`], sends what comes out of it, and runs
//! programs on its channels. The crate is `no_std` and the same on the host, where it is tested against OpenSSH and
//! where [`keys`] checks a user's key file.
//!
//! Algorithms: `curve25519-sha256`, `ssh-ed25519` host keys, `chacha20-poly1305@openssh.com`, strict key exchange;
//! users prove keys of type ed25519, ECDSA P-256 or RSA.
//!
//! Invariants. Nothing a peer sends makes this crate panic, index out of bounds, or hold more memory than
//! [`Limits`] allow. No byte of a record is used before its tag was checked. Secrets are compared in constant time
//! and wiped.
//!
//! A driver takes turns until nothing moves, and only then waits: for bytes while [`Connection::takes_input`], for
//! room in the socket while there is [`Connection::output`], and for whatever its programs wait for. Sending makes
//! room that a program may be waiting for, so a turn that sent something is followed by another.
//!
//! ```
//! use kage_ssh::{Connection, Event};
//!
//! /// Takes one turn; whether another is to follow at once. `send` is a socket's non-blocking write. `run` starts
//! /// and stops programs as events say, lets each use its `data` and `write`, and says whether any did.
//! fn turn(
//!     connection: &mut Connection, received: &mut Vec<u8>, mut send: impl FnMut(&[u8]) -> usize,
//!     mut run: impl FnMut(&mut Connection, &[Event]) -> bool,
//! ) -> bool {
//!     // After an error the connection is closed; its last output says why.
//!     let taken = connection.input(received).unwrap_or(received.len());
//!     received.drain(..taken);
//!     let events: Vec<Event> = std::iter::from_fn(|| connection.event()).collect();
//!     let ran = run(connection, &events);
//!     let sent = send(connection.output());
//!     connection.sent(sent);
//!     taken > 0 || ran || sent > 0
//! }
//! ```
//!
//! A connection that [`Connection::is_closed`] is dropped, with its socket, once its output is empty. One that is
//! not [`Connection::is_authenticated`] after a minute or two should be, too: there is no clock in here.
//!
//! Not here on purpose: passwords, forwarding, compression, certificates, SFTP (a program on a channel may speak it).

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod buffer;
mod channel;
mod cipher;
mod config;
mod connection;
mod error;
mod event;
pub mod keys;
pub mod line;
mod message;
mod random;
mod transport;
mod wire;

pub use config::{Account, Config, Limits, MAX_PACKET};
pub use connection::{ChannelEnded, Connection};
pub use error::Error;
pub use event::{ChannelId, Event, Program, Pty, Stream, WindowSize};
pub use message::Reason;
pub use random::Random;

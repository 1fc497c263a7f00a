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

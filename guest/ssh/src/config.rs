//! What a connection is given: identity, who may log in, and bounds.

use alloc::string::String;
use alloc::vec::Vec;

use crate::keys::{HostKey, PublicKey};

/// Largest packet of channel data either side may send here.
pub const MAX_PACKET: u32 = 32 * 1024;

/// A user who may log in.
#[derive(Debug, Clone)]
pub struct Account {
    /// The name before the `@`.
    pub user: String,
    /// The keys that prove it.
    pub keys: Vec<PublicKey>,
}

/// Everything that bounds one connection. [`Limits::default`] suits a machine of tens of megabytes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Channels open at a time; a window's memory each in the worst case.
    pub channels: usize,
    /// Bytes a peer may send on a channel before the program there reads them. Two megabytes keep 100 Mbit/s going
    /// over 160 ms.
    pub receive_window: u32,
    /// Bytes of output held before channel data is no longer taken. Below that the network is idle between two
    /// turns of its driver; above, a keystroke's echo waits behind it.
    pub output: usize,
    /// Failed attempts to authenticate before the connection ends.
    pub auth_failures: u32,
    /// Bytes in one direction after which keys are renewed (RFC 4253 §9: one gigabyte).
    pub rekey_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            channels: 16,
            receive_window: 2 << 20,
            output: 256 << 10,
            auth_failures: 10,
            rekey_bytes: 1 << 30,
        }
    }
}

/// What every connection of a machine is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// The machine's identity.
    pub host_key: HostKey,
    /// Who may log in, and by which keys.
    pub accounts: Vec<Account>,
    /// The bounds.
    pub limits: Limits,
}

impl Config {
    /// Whether `key` lets `user` in.
    pub(crate) fn allows(&self, user: &[u8], key: &PublicKey) -> bool {
        self.accounts.iter().any(|account| account.user.as_bytes() == user && account.keys.contains(key))
    }
}

//! The store's trait: keys, values, revisions.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// Longest key.
pub const MAX_KEY_BYTES: usize = 255;

/// Largest value: a record with a user's keys is a few hundred bytes.
pub const MAX_VALUE_BYTES: usize = 64 << 10;

/// The store's count of changes at which a key got its value. Zero stands for "absent".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl Revision {
    /// What a swap expects of a key that does not exist.
    pub const ABSENT: Self = Self(0);
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A key's value and when it was set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: Vec<u8>,
    /// When it was set.
    pub revision: Revision,
}

/// All entries under a prefix.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// The entries in order of their keys.
    pub entries: Vec<Entry>,
    /// A watch after this revision sees every change the listing does not show.
    pub revision: Revision,
}

/// A key that changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The key.
    pub key: String,
    /// When it last changed.
    pub revision: Revision,
    /// Its value now; `None` once it is deleted.
    pub value: Option<Vec<u8>>,
}

/// What a watch saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// The keys that changed, oldest first, each once; empty when the time ran out.
    pub changes: Vec<Change>,
    /// Where the next watch goes on.
    pub revision: Revision,
}

/// Why the directory did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum DirectoryError {
    /// The key's revision is not the one expected; nothing changed.
    #[error("changed by another meanwhile (now at revision {})", current.as_ref().map_or(Revision::ABSENT, |entry| entry.revision))]
    Conflict {
        /// What the key holds now.
        current: Option<Entry>,
    },
    /// No answer. A swap may or may not have applied.
    #[error("directory unreachable: {reason}")]
    Unreachable {
        /// What the transport reported.
        reason: String,
    },
    /// The store itself failed. A swap may or may not have applied.
    #[error("directory storage failed: {reason}")]
    Storage {
        /// What the store reported.
        reason: String,
    },
    /// A watch asked for changes the store no longer holds: list again.
    #[error("changes after revision {after} are forgotten; list again")]
    Forgotten {
        /// The revision asked for.
        after: Revision,
    },
    /// A request beyond the limits, or not understood.
    #[error("directory request refused: {reason}")]
    Refused {
        /// Which limit, or what was not understood.
        reason: String,
    },
    /// A record that this build cannot read.
    #[error("directory record {key} is unreadable: {reason}")]
    Unreadable {
        /// Its key.
        key: String,
        /// Why.
        reason: String,
    },
}

impl DirectoryError {
    /// Whether a swap that ended so may nevertheless have applied, now or soon.
    #[must_use]
    pub const fn is_unknown(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Storage { .. })
    }
}

/// A durable store of keys with revisions. Calls block.
pub trait Directory: Send + Sync {
    /// Reads one key.
    ///
    /// # Errors
    /// [`DirectoryError`].
    fn get(&self, key: &str) -> Result<Option<Entry>, DirectoryError>;

    /// Reads all keys that start with `prefix`.
    ///
    /// # Errors
    /// [`DirectoryError`].
    fn list(&self, prefix: &str) -> Result<Listing, DirectoryError>;

    /// Sets (`Some`) or deletes (`None`) a key whose revision is `expected`, [`Revision::ABSENT`] for one
    /// that must not exist; returns its new revision.
    ///
    /// # Errors
    /// [`DirectoryError::Conflict`] with what is there; when [`DirectoryError::is_unknown`] it may or may
    /// not have applied.
    fn compare_and_swap(
        &self,
        key: &str,
        expected: Revision,
        value: Option<&[u8]>,
    ) -> Result<Revision, DirectoryError>;

    /// Waits until a key under `prefix` has changed after revision `after`, or `timeout` has passed.
    ///
    /// # Errors
    /// [`DirectoryError::Forgotten`] when `after` is too old.
    fn watch(&self, prefix: &str, after: Revision, timeout: Duration) -> Result<Changes, DirectoryError>;
}

/// Checks a key and a value against the limits.
pub(crate) fn check(key: &str, value: Option<&[u8]>) -> Result<(), DirectoryError> {
    let refused = |reason: String| Err(DirectoryError::Refused { reason });
    if key.len() > MAX_KEY_BYTES {
        return refused(format!("key of {} bytes, at most {MAX_KEY_BYTES}", key.len()));
    }
    match value {
        Some(value) if value.len() > MAX_VALUE_BYTES => {
            refused(format!("value of {} bytes, at most {MAX_VALUE_BYTES}", value.len()))
        }
        _ => Ok(()),
    }
}

//! Files of public keys: OpenSSH's `authorized_keys` and `.pub` files, without options.

use alloc::string::{String, ToString as _};
use alloc::vec::Vec;

use super::{KeyError, PublicKey, base64, shown};

/// Most keys one file may hold.
pub const MAX_KEYS: usize = 64;

/// One line of an `authorized_keys` file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorizedKey {
    /// The key.
    pub key: PublicKey,
    /// What follows it on the line, often `user@host`.
    pub comment: String,
}

/// Why a file is no list of public keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyFileError {
    /// A line that is no key.
    #[error("line {line}: {cause}")]
    Line {
        /// The line's number, from 1.
        line: usize,
        /// What is wrong with it.
        #[source]
        cause: KeyError,
    },
    /// Nothing but comments and empty lines.
    #[error("there is no key in it; expected a line such as `ssh-ed25519 AAAA… comment`")]
    Empty,
    /// More than [`MAX_KEYS`].
    #[error("there are more than {MAX_KEYS} keys in it")]
    TooMany,
}

impl AuthorizedKey {
    /// Parses one line, `type base64 [comment]`.
    ///
    /// # Errors
    /// [`KeyError`] saying what the line is instead and what to do.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let text = text.trim();
        if text.starts_with("-----BEGIN ") && text.contains("PRIVATE KEY")
            || text.starts_with("PuTTY-User-Key-File")
        {
            return Err(KeyError::Private);
        }
        if text.starts_with("---- BEGIN SSH2") || text.starts_with("-----BEGIN ") {
            return Err(KeyError::OtherFormat);
        }
        let (stated, rest) = text.split_once([' ', '\t']).ok_or(KeyError::NotAKey)?;
        let rest = rest.trim_start();
        let (encoded, comment) = rest.split_once([' ', '\t']).unwrap_or((rest, ""));
        if !is_key_type(stated) {
            // OpenSSH allows options here: `from="…" ssh-ed25519 AAAA…`. Dropping one would widen access.
            let has_key = text.split([' ', '\t']).any(is_key_type);
            return Err(if has_key {
                KeyError::Options { option: shown(stated.as_bytes()) }
            } else {
                KeyError::NotAKey
            });
        }
        let damaged = || KeyError::Damaged { algorithm: shown(stated.as_bytes()) };
        let blob = base64::decode(encoded).ok_or_else(damaged)?;
        let key = PublicKey::from_blob(&blob).map_err(|cause| match cause {
            KeyError::NotAKey => damaged(),
            cause => cause,
        })?;
        if key.algorithm() != stated {
            return Err(KeyError::Mismatch {
                stated: shown(stated.as_bytes()),
                found: key.algorithm().to_string(),
            });
        }
        Ok(Self { key, comment: comment.trim().to_string() })
    }
}

/// Reads a file of keys, a line each; empty lines and lines that start with `#` are skipped.
///
/// # Errors
/// [`KeyFileError`] at the first line that is no key, or for a file without any.
pub fn authorized_keys(text: &str) -> Result<Vec<AuthorizedKey>, KeyFileError> {
    let mut keys = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let key =
            AuthorizedKey::parse(line).map_err(|cause| KeyFileError::Line { line: index + 1, cause })?;
        if keys.len() == MAX_KEYS {
            return Err(KeyFileError::TooMany);
        }
        keys.push(key);
    }
    if keys.is_empty() { Err(KeyFileError::Empty) } else { Ok(keys) }
}

/// Whether a word names a type of key, supported or not.
fn is_key_type(word: &str) -> bool {
    ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-"].iter().any(|prefix| word.starts_with(prefix))
}

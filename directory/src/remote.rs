//! The directory over any request-reply transport.
//!
//! [`serve`] answers one encoded request from a [`Directory`]; [`Remote`] is a [`Directory`] whose calls
//! go through a [`Transport`]. Messages are postcard; both sides refuse what they do not understand.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::store::{Changes, Directory, DirectoryError, Entry, Listing, Revision};

/// Bytes of entries in one reply to a listing; the rest is asked for again.
const LISTING_BYTES: usize = 256 << 10;

/// Longest time a served watch is held.
pub const MAX_WATCH: Duration = Duration::from_secs(30);

/// A request as it is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// [`Directory::get`].
    Get {
        /// The key.
        key: String,
    },
    /// [`Directory::list`], a part of it.
    List {
        /// The prefix.
        prefix: String,
        /// Only keys after this one.
        after: Option<String>,
    },
    /// [`Directory::compare_and_swap`].
    Swap {
        /// The key.
        key: String,
        /// The revision it must have.
        expected: Revision,
        /// The value to set; `None` deletes.
        value: Option<Vec<u8>>,
    },
    /// [`Directory::watch`].
    Watch {
        /// The prefix.
        prefix: String,
        /// Only changes after this revision.
        after: Revision,
        /// How long to wait, at most [`MAX_WATCH`].
        timeout_ms: u32,
    },
}

/// A reply as it is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Request::Get`].
    Entry(Option<Entry>),
    /// To [`Request::List`].
    Listing {
        /// This part.
        listing: Listing,
        /// Whether more follows after the last key of this part.
        more: bool,
    },
    /// To [`Request::Swap`].
    Swapped(Revision),
    /// To [`Request::Watch`].
    Changes(Changes),
    /// To any.
    Failed(DirectoryError),
}

/// Answers one request. Anything that is no request is answered as refused.
#[must_use]
pub fn serve(directory: &dyn Directory, request: &[u8]) -> Vec<u8> {
    let reply = match postcard::from_bytes::<Request>(request) {
        Ok(request) => answer(directory, request).unwrap_or_else(Reply::Failed),
        Err(_) => Reply::Failed(DirectoryError::Refused { reason: "not a directory request".into() }),
    };
    // Encoding into a growing vector cannot fail for these types.
    postcard::to_stdvec(&reply).unwrap_or_default()
}

fn answer(directory: &dyn Directory, request: Request) -> Result<Reply, DirectoryError> {
    Ok(match request {
        Request::Get { key } => Reply::Entry(directory.get(&key)?),
        Request::List { prefix, after } => {
            let mut listing = directory.list(&prefix)?;
            if let Some(after) = after {
                listing.entries.retain(|entry| entry.key > after);
            }
            let mut bytes = 0;
            let fits = listing
                .entries
                .iter()
                .take_while(|entry| {
                    bytes += entry.key.len() + entry.value.len() + 16;
                    bytes <= LISTING_BYTES
                })
                .count();
            let more = fits < listing.entries.len();
            listing.entries.truncate(fits);
            Reply::Listing { listing, more }
        }
        Request::Swap { key, expected, value } => {
            Reply::Swapped(directory.compare_and_swap(&key, expected, value.as_deref())?)
        }
        Request::Watch { prefix, after, timeout_ms } => {
            let timeout = Duration::from_millis(timeout_ms.into()).min(MAX_WATCH);
            Reply::Changes(directory.watch(&prefix, after, timeout)?)
        }
    })
}

/// Carries one request to the directory's host and its reply back.
pub trait Transport: Send + Sync {
    /// Sends `request` and waits at most `patience` for the reply.
    ///
    /// # Errors
    /// The reason, for [`DirectoryError::Unreachable`]: the request may or may not have arrived.
    fn call(&self, request: &[u8], patience: Duration) -> Result<Vec<u8>, String>;
}

impl<F> Transport for F
where
    F: Fn(&[u8], Duration) -> Result<Vec<u8>, String> + Send + Sync,
{
    fn call(&self, request: &[u8], patience: Duration) -> Result<Vec<u8>, String> {
        self(request, patience)
    }
}

/// A directory at another host.
pub struct Remote<T> {
    transport: T,
    patience: Duration,
}

impl<T: Transport> Remote<T> {
    /// Asks through `transport`; a call without an answer within `patience` counts as unreachable.
    pub const fn new(transport: T, patience: Duration) -> Self {
        Self { transport, patience }
    }

    fn ask(&self, request: &Request, patience: Duration) -> Result<Reply, DirectoryError> {
        let unreachable = |reason: String| DirectoryError::Unreachable { reason };
        let bytes = postcard::to_stdvec(request).map_err(|error| unreachable(error.to_string()))?;
        let reply = self.transport.call(&bytes, patience).map_err(unreachable)?;
        match postcard::from_bytes(&reply) {
            Ok(Reply::Failed(error)) => Err(error),
            Ok(reply) => Ok(reply),
            Err(_) => Err(unreachable("its reply is damaged".into())),
        }
    }
}

fn unexpected<T>() -> Result<T, DirectoryError> {
    Err(DirectoryError::Unreachable { reason: "it answered another question".into() })
}

impl<T: Transport> Directory for Remote<T> {
    fn get(&self, key: &str) -> Result<Option<Entry>, DirectoryError> {
        match self.ask(&Request::Get { key: key.to_owned() }, self.patience)? {
            Reply::Entry(entry) => Ok(entry),
            _ => unexpected(),
        }
    }

    fn list(&self, prefix: &str) -> Result<Listing, DirectoryError> {
        let mut whole = Listing::default();
        let mut after = None;
        loop {
            let request = Request::List { prefix: prefix.to_owned(), after: after.clone() };
            let Reply::Listing { listing, more } = self.ask(&request, self.patience)? else {
                return unexpected();
            };
            // Parts may be of different moments; a watch from the first one sees what later ones missed.
            if after.is_none() {
                whole.revision = listing.revision;
            }
            let last = listing.entries.last().map(|entry| entry.key.clone());
            whole.entries.extend(listing.entries);
            match (more, last) {
                (false, _) => return Ok(whole),
                (true, Some(last)) if after.as_ref().is_none_or(|after| *after < last) => after = Some(last),
                (true, _) => return unexpected(),
            }
        }
    }

    fn compare_and_swap(
        &self,
        key: &str,
        expected: Revision,
        value: Option<&[u8]>,
    ) -> Result<Revision, DirectoryError> {
        let request = Request::Swap { key: key.to_owned(), expected, value: value.map(<[u8]>::to_vec) };
        match self.ask(&request, self.patience)? {
            Reply::Swapped(revision) => Ok(revision),
            _ => unexpected(),
        }
    }

    fn watch(&self, prefix: &str, after: Revision, timeout: Duration) -> Result<Changes, DirectoryError> {
        let timeout = timeout.min(MAX_WATCH);
        let request = Request::Watch {
            prefix: prefix.to_owned(),
            after,
            timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
        };
        match self.ask(&request, self.patience + timeout)? {
            Reply::Changes(changes) => Ok(changes),
            _ => unexpected(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Embedded, contract::ScratchDir};

    #[test]
    fn messages_keep_their_bytes() {
        let request = Request::Swap { key: "k".into(), expected: Revision(300), value: Some(vec![7]) };
        let bytes = postcard::to_stdvec(&request).unwrap();
        assert_eq!(bytes, [2, 1, b'k', 0xac, 2, 1, 1, 7]);
        let reply = Reply::Failed(DirectoryError::Conflict { current: None });
        assert_eq!(postcard::to_stdvec(&reply).unwrap(), [4, 0, 0]);
    }

    #[test]
    fn damaged_requests_are_refused_and_damaged_replies_are_unreachable() {
        let dir = ScratchDir::new();
        let store = Embedded::open(&dir.path().join("d.redb")).unwrap();
        let request = postcard::to_stdvec(&Request::Watch {
            prefix: "p".into(),
            after: Revision(1),
            timeout_ms: 70000,
        })
        .unwrap();
        for end in 0..request.len() {
            let reply: Reply = postcard::from_bytes(&serve(&store, &request[..end])).unwrap();
            assert!(matches!(reply, Reply::Failed(DirectoryError::Refused { .. })), "cut at {end}");
        }
        let noise = Remote::new(|_: &[u8], _| Ok(vec![99, 1]), Duration::from_secs(1));
        assert!(matches!(noise.get("k"), Err(DirectoryError::Unreachable { .. })));
        let other = Remote::new(
            |_: &[u8], _| Ok(postcard::to_stdvec(&Reply::Swapped(Revision(1))).unwrap()),
            Duration::from_secs(1),
        );
        assert!(matches!(other.list(""), Err(DirectoryError::Unreachable { .. })));
    }
}

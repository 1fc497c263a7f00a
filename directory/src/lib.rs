//! The site's directory: who owns which image, which hosts, access points and devices there are.
//!
//! A small store of keys with revisions ([`Directory`]): get, list, compare-and-swap, watch. What is
//! kept in it is typed by [`records`]; everything that changes an owner is one compare-and-swap on the
//! record's revision.
//!
//! - [`embedded::Embedded`]: the store inside one host's daemon, durable, on redb.
//! - [`remote`]: the same trait over any request-reply transport, and the serving side of it.
//!
//! Invariants, held by every implementation and checked by one contract suite:
//! - A swap that returned `Ok` is durable and visible to every later read.
//! - A swap applies at most once, and only when the key's revision is the expected one. Where its answer
//!   is lost ([`DirectoryError::is_unknown`]) it may or may not have applied: read again.
//! - Revisions grow over the whole store; a watcher misses no change of a key, though it may see only
//!   the newest of several.
//!
//! Deliberately not here: sockets and threads (a daemon puts a link under [`remote::Transport`]), leases,
//! and any rule about who may become owner, which is `migrate`'s.

#[cfg(test)]
mod contract;
pub mod embedded;
pub mod records;
pub mod remote;
mod store;

pub use embedded::Embedded;
pub use records::{
    ApRecord, DeviceRecord, DiskOrigin, HostRecord, ImageRecord, Intent, Ipv4Record, Mobility, Profile,
    Record, Records, Versioned, Wanted, allocate_image_number,
};
pub use remote::{Remote, Transport, serve};
pub use store::{
    Change, Changes, Directory, DirectoryError, Entry, Listing, MAX_KEY_BYTES, MAX_VALUE_BYTES, Revision,
};

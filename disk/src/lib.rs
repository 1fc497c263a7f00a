//! The host's block store: one image's disk as a log that survives any crash.
//!
//! A disk of 4 KiB blocks is a sparse *log file* and an *index* in memory that processes share. One
//! writer ([`Store`]) appends; any number of [`Reader`]s in any process read without a lock.
//!
//! ```text
//! log file   ┌────────────┬────────┬────────┬───────────┬───────────┬─────┬───────────┐
//!            │ superblock │ slot A │ slot B │ segment 0 │ segment 1 │  …  │ segment n │
//!            │ twice      │ checkpoints     │ 2 MiB     │           │     │           │
//!            └────────────┴────────┴────────┴───────────┴───────────┴─────┴───────────┘
//! segment    ┌────────┬─────────────────┬────────┬─────┬────────┬────────┬────────────┐
//!            │ header │ block … block   │ header │ blk │ commit │ header │ … → next    │
//!            └────────┴─────────────────┴────────┴─────┴────────┴────────┴────────────┘
//!              one record: whole sectors, up to 256 blocks, one pwritev
//! index      ┌────────┬──────────────────┬──────────────────┬─────
//!            │ header │ word 0  digest 0 │ word 1  digest 1 │ …     zeros · missing · position ∥ tag
//!            └────────┴──────────────────┴──────────────────┴─────
//! ```
//!
//! Records are numbered without gaps, and each carries the checksum of the one before, the store it
//! belongs to and a number drawn by its writer, so bytes of a segment's earlier life never pass for
//! current ones. A record's header has the digest of every block behind it.
//!
//! **Writing.** Write, discard, mark missing: append a record, then store the index words; everyone reads
//! it at once. **Flush**: append a commit, sync. **Opening** takes the newest checkpoint, walks the records
//! behind it and ends at the last commit before the first record that did not arrive whole. A handover
//! passes both descriptors and a [`State`] and reads no log.
//!
//! # Invariants
//! 1. After any crash the disk is what it was at the last flush that returned, or at a later one.
//! 2. A segment is used again only if neither the current state nor the last commit needs a block of it,
//!    the record that took away its last block is synced, and a synced checkpoint covers its records.
//! 3. A checkpoint is written only when all it covers is synced; of the two slots the one with the last
//!    synced checkpoint is never overwritten.
//! 4. A record testifies which commit or move was the last synced when it was appended. A log that ends
//!    before such a one is damaged and refused; it never passes for an older state.
//! 5. Cleaning and repair change places, never bytes: their records hold without a commit, and hold for
//!    the last commit's state and the current one alike.
//! 6. A read returns bytes with the digest that was written, or says zeros, missing or corrupt.
//! 7. What another host had is taken for a missing block only if it has the digest that is expected, where
//!    one is. Expectations are kept in memory alone.
//! 8. After a failed sync nothing is written any more: what reached the medium is unknown.
//!
//! # Not here
//! Threads, locks between writers (passing the role on is the caller's), compression, snapshots.

mod backing;
mod checkpoint;
mod codec;
mod index;
mod layout;
mod mapping;
mod reader;
mod record;
mod recovery;
mod segments;
mod simulated;
mod store;

pub use backing::Backing;
pub use index::{Index, IndexHeader, Known, Place, digest_of};
pub use layout::{Geometry, GeometryError};
pub use reader::{Found, ReadError, Reader};
pub use recovery::RecoveryError;
pub use simulated::{Seeded, SimulatedDisk};
pub use store::{Cleaned, Initial, OpenError, Scrubbed, State, StateError, Stats, Store, StoreError, Tuning};

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;

/// Bytes that reach a medium whole or not at all.
pub const SECTOR_BYTES: usize = 512;

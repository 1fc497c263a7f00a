//! Streaming a machine's pages from its owner to its followers.
//!
//! ```text
//! owner:     harvest → tracker → planner → sender ──link──▶ receiver → store  :follower
//!                                          codec, pace
//! ```
//! - [`tracker`]: which pages each follower lacks, and how hot pages are.
//! - [`planner`]: what to send now; what a handover would cost now. Pure.
//! - [`codec`]: how pages are written and which way pays. The choice is pure.
//! - [`mirrors`]: the streams that keep a machine's mirrors fresh.
//! - [`predict`]: where a user goes next. Pure.
//! - [`choose`]: which hosts get mirrors. Pure.
//! - [`pace`]: rates, limited and measured. Pure.
//! - [`sender`], [`receiver`]: the two ends of a page stream.
//! - [`store`]: what a follower holds; [`digest`]: proof of it.
//! - [`link`]: the transport.
//!
//! Invariants: what a replica claims to hold it holds, byte for byte (every epoch ends with a
//! digest of everything held, computed at both ends); nothing a peer sends panics, or grows this
//! host without bound.
//!
//! Deliberately not here: when to switch, and who owns (`kage-migrate`).

mod cache;
pub mod choose;
pub mod codec;
mod courtesy;
pub mod digest;
pub mod link;
pub mod mirrors;
pub mod pace;
pub mod planner;
pub mod predict;
pub mod receiver;
pub mod sender;
pub mod store;
pub mod tracker;

#[cfg(test)]
mod testing;

pub use link::{Link, LinkError, TlsIdentity, TlsLink};
pub use mirrors::{Given, Mirrors, OwnerSide};
pub use pace::Rate;
pub use receiver::{ReceiveError, Receiver};
pub use sender::{EpochStats, LastEpoch, LastError, Progress, SendError, Sender, UnknownBlock, find_unknown};
pub use store::ElsewhereError;
pub use tracker::Tracker;

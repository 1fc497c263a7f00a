//! Where users are: the accounting feed of access points.
//!
//! - [`radius`]: packets as bytes.
//! - [`sessions`]: what reports mean, pure.
//! - [`listener`]: the socket.

pub mod listener;
pub mod radius;
pub mod sessions;

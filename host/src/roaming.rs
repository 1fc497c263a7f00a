//! Where users are: the accounting feed of access points.
//!
//! - [`radius`]: packets as bytes.
//! - [`names`]: whom and which access point they name, pure.
//! - [`sessions`]: what reports mean, pure; `clocks`: when they were.
//! - [`intake`]: from a datagram to its answer and consequence, pure; [`recent`] remembers.
//! - [`backlog`]: consequences that wait, pure.
//! - [`listener`]: the socket, and what follows.

pub mod backlog;
mod clocks;
pub mod intake;
pub mod listener;
pub mod names;
pub mod radius;
pub mod recent;
pub mod sessions;

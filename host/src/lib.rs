//! The edge-host daemon: lifecycle of images, roaming feed, API, supervision.
//!
//! - [`config`], [`units`]: `host.toml`.
//! - [`init`]: a site's keys and certificates.
//! - [`lifecycle`]: login, start, stop, death, adoption; [`moves`]: handovers; [`drain`]: emptying this host.
//! - [`api`], [`http`], [`peers`]: the HTTP API, here and at other hosts.
//! - [`roaming`]: where users are.
//! - [`events`], [`operations`], [`metrics`], [`logs`]: what is seen of it.
//! - [`prediction`]: where users go next.
//! - `mirrors`: copies of machines, kept nearly fresh.
//! - [`resources`]: what machines consist of.
//! - [`disks`]: where the blocks of disks are, and fetching those that are elsewhere.
//! - [`machines`]: the traits behind which machines and the network are.
//!
//! Deliberately not here: KVM, netlink, page streams, the rules of a handover.

pub mod api;
pub mod compile;
pub mod config;
pub mod daemon;
pub mod disks;
pub mod drain;
pub mod events;
#[cfg(test)]
mod fake;
pub mod handover;
pub mod http;
pub mod init;
pub mod lifecycle;
pub mod links;
pub mod logs;
pub mod machines;
pub mod metrics;
mod mirrors;
pub mod moves;
pub mod operations;
pub mod peers;
pub mod prediction;
pub mod real;
pub mod resources;
pub mod roaming;
pub mod routes;
#[cfg(test)]
mod scratch;
pub mod serve;
pub mod tls;
pub mod units;

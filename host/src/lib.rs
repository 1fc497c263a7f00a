//! The edge-host daemon: lifecycle of images, roaming feed, API, supervision.
//!
//! - [`config`], [`units`]: `host.toml`.
//! - [`init`]: a site's keys and certificates.

pub mod config;
pub mod init;
pub mod roaming;
#[cfg(test)]
mod scratch;
pub mod tls;
pub mod units;

//! kage-replicate.

pub mod link;

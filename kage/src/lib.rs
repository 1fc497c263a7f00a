//! kage.

pub mod testbed;

//! kage.

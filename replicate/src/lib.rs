//! kage-replicate.

//! kage-wire.

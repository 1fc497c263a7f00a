//! kage-host.

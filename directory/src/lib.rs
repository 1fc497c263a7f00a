//! kage-directory.

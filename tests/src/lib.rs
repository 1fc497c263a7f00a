//! kage-tests.

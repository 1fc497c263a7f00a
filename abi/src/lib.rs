//! kage-abi.

//! Virtio devices, served at the door.
//!
//! No device touches guest memory while the guest runs and none raises an interrupt: the guest
//! knocks, and finds its rings served when it goes on.

pub mod block;
pub mod entropy;
pub mod mmio;
pub mod net;

#[cfg(test)]
mod tests;

//! kage-vmm.

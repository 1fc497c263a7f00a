//! kage-fabric.

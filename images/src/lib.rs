//! kage-images.

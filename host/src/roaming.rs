//! Where users are: the accounting feed of access points.

pub mod radius;

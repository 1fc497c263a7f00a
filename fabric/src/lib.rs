//! The network fabric of one host: taps, routes, access-point bridges and the tunnel between hosts.
//!
//! ```text
//!   device ── bridge kb-ap-1 ──┐                       ┌── tap kt7 ── image 7
//!             fe80::1          │  kernel IPv6 routing  │   fe80::1, fe80::2 pinned
//!                              └────────┬──────────────┘
//!                                     kage0   VXLAN over the underlay, one pinned neighbour per peer
//! ```
//!
//! An image's /88 goes to its tap on the owner's host and through `kage0` to the owner everywhere else; a device's
//! /128 likewise by the host where it is attached. Every tap and every access-point bridge has the same gateway
//! address and MAC, so what guests and devices have learnt stays right wherever they are.
//!
//! Invariants:
//! - Every operation is idempotent: doing it twice is doing it once, and a restarted daemon may do all of it again.
//! - Changing a route is one netlink request that replaces it; no packet ever finds no route in between.
//! - Names, link-local addresses and MACs are functions of names known to every host ([`names`]): nothing is
//!   negotiated.
//! - A tap lives as long as somebody holds its descriptor: the VMM process, not the daemon, decides.
//!
//! Everything is blocking and needs no executor, since the switch path runs on plain threads. One netlink socket is
//! kept for routes alone, so that a flip never waits behind another request.
//!
//! Deliberately not here: who owns an image, where a device is, when to flip (`host/`, `migrate/`).

mod fabric;
mod link;
pub mod names;
mod netlink;
mod route;
mod sys;
mod sysctl;
mod tap;

pub use fabric::{Fabric, FabricError, FabricSpec, Hop, MIN_GUEST_MTU, Route, TUNNEL_BYTES};
pub use link::TapCounters;
pub use netlink::NetlinkError;
pub use sysctl::SysctlError;
pub use tap::{
    Drained, TapError, VNET_HEADER_BYTES, drain, drain_until_quiet, open as open_tap, set_offload,
};

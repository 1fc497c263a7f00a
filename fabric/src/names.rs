//! Interface names, link-local addresses and MACs, all derived from names that every host knows.

use std::net::Ipv6Addr;

use kage_machine::{HostName, ImageNumber, identity::ApName};

/// The tunnel between hosts.
pub const OVERLAY: &str = "kage0";

/// Longest interface name (`IFNAMSIZ` without its NUL).
pub const MAX_INTERFACE_NAME: usize = 15;

/// Name of an image's tap: `kt` and the number in hexadecimal, at most 12 characters.
#[must_use]
pub fn tap(image: ImageNumber) -> String {
    format!("kt{:x}", image.0)
}

/// Whether a name is that of an image's tap.
#[must_use]
pub fn is_tap(name: &str) -> bool {
    let digits = name.strip_prefix("kt").unwrap_or_default();
    !digits.is_empty() && digits.chars().all(|digit| matches!(digit, '0'..='9' | 'a'..='f'))
}

/// Name of an access point's bridge: `kb-` and its name if that fits and is plain, else `kb` and a hash of it.
#[must_use]
pub fn ap_bridge(ap: &ApName) -> String {
    let name = ap.as_str();
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    if plain && name.len() + 3 <= MAX_INTERFACE_NAME {
        format!("kb-{name}")
    } else {
        format!("kb{:013x}", fingerprint(name) >> 12)
    }
}

/// A host's link-local address on the tunnel.
#[must_use]
pub fn overlay_address(host: &HostName) -> Ipv6Addr {
    Ipv6Addr::from(0xfe80_u128 << 112 | u128::from(fingerprint(host.as_str())))
}

/// A host's MAC on the tunnel: locally administered, unicast.
#[must_use]
pub fn overlay_mac(host: &HostName) -> [u8; 6] {
    let [_, _, _, a, b, c, d, e] = fingerprint(host.as_str()).to_be_bytes();
    [0x02, a, b, c, d, e]
}

/// FNV-1a, 64 bits, with a final mix (murmur3's) so that similar names differ in every part. Spread is all that is
/// asked of it: two hosts that collide are refused when they meet.
fn fingerprint(name: &str) -> u64 {
    let mut hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn interface_names_fit_the_kernel() {
        assert_eq!(tap(ImageNumber(7)), "kt7");
        assert_eq!(tap(ImageNumber((1 << 40) - 1)), "ktffffffffff");
        for name in ["ap-1", "a", "building-7.floor-3.ap-12", "x@y", "012345678901"] {
            let bridge = ap_bridge(&name.parse().unwrap());
            assert!(bridge.len() <= MAX_INTERFACE_NAME, "{bridge}");
            assert!(bridge.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "{bridge}");
        }
        assert_eq!(ap_bridge(&"ap-1".parse().unwrap()), "kb-ap-1");
    }

    #[test]
    fn hosts_differ_on_the_tunnel() {
        let hosts: Vec<HostName> = (0..10_000).map(|n| format!("edge-{n}").parse().unwrap()).collect();
        let addresses: HashSet<_> = hosts.iter().map(overlay_address).collect();
        let macs: HashSet<_> = hosts.iter().map(overlay_mac).collect();
        assert_eq!((addresses.len(), macs.len()), (hosts.len(), hosts.len()));
        for host in &hosts {
            assert_eq!(overlay_mac(host)[0], 0x02);
            assert_eq!(overlay_address(host).segments()[..4], [0xfe80, 0, 0, 0]);
        }
    }

    #[test]
    fn addresses_never_change() {
        let host: HostName = "edge-a".parse().unwrap();
        assert_eq!(overlay_address(&host).to_string(), "fe80::661d:7776:aff6:8a77");
    }
}

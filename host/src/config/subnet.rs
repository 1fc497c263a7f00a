//! Networks in configuration.

use std::{
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, de};

/// A source address or network of accounting clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    address: IpAddr,
    length: u8,
}

impl Subnet {
    /// Whether an address lies in it. IPv4-mapped IPv6 addresses count as IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let bits = |address: IpAddr| match address.to_canonical() {
            IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 32u8),
            IpAddr::V6(v6) => (v6.to_bits(), 128u8),
        };
        let ((mine, width), (theirs, other)) = (bits(self.address), bits(address));
        let mask = if self.length == 0 { 0 } else { u128::MAX << (128 - u32::from(self.length)) };
        width == other && mine & mask == theirs & mask
    }
}

impl FromStr for Subnet {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let cure = || format!("{text:?} is no network; write it as 10.0.0.0/8 or fd00::/16");
        let (address, length) = text.split_once('/').ok_or_else(cure)?;
        let address: IpAddr = address.parse().map_err(|_| cure())?;
        let length: u8 = length.parse().map_err(|_| cure())?;
        if length > if address.is_ipv4() { 32 } else { 128 } {
            return Err(cure());
        }
        Ok(Self { address, length })
    }
}

impl<'de> Deserialize<'de> for Subnet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A network whose addresses are given to images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Pool {
    address: Ipv4Addr,
    length: u8,
}

impl Ipv4Pool {
    /// Its first address.
    #[must_use]
    pub const fn address(self) -> Ipv4Addr {
        self.address
    }

    /// Bits that its addresses have in common.
    #[must_use]
    pub const fn length(self) -> u8 {
        self.length
    }

    /// Whether an address lies in it.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        (u32::from(self.address) ^ u32::from(address)).leading_zeros() >= u32::from(self.length)
    }

    /// Its addresses, without the first and the last, which old software takes for the network and for everybody.
    pub fn hosts(self) -> impl Iterator<Item = Ipv4Addr> {
        let first = u32::from(self.address);
        let last = first | u32::MAX >> self.length;
        (first + 1..last).map(Ipv4Addr::from)
    }
}

impl FromStr for Ipv4Pool {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let cure = || format!("{text:?} is no IPv4 network for images; write it as 10.77.0.0/24, /8 to /30");
        let (address, length) = text.split_once('/').ok_or_else(cure)?;
        let address: Ipv4Addr = address.parse().map_err(|_| cure())?;
        let length: u8 = length.parse().map_err(|_| cure())?;
        if !(8..=30).contains(&length) || u32::from(address) & u32::MAX >> length != 0 {
            return Err(cure());
        }
        if address.is_link_local() || address.is_loopback() || address.is_multicast() {
            return Err(cure());
        }
        Ok(Self { address, length })
    }
}

impl<'de> Deserialize<'de> for Ipv4Pool {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_gives_what_lies_between_its_ends() {
        let pool: Ipv4Pool = "10.77.0.8/30".parse().unwrap();
        let hosts: Vec<_> = pool.hosts().map(|address| address.to_string()).collect();
        assert_eq!(hosts, ["10.77.0.9", "10.77.0.10"]);
        assert!(pool.contains(Ipv4Addr::new(10, 77, 0, 11)) && !pool.contains(Ipv4Addr::new(10, 77, 0, 12)));
        for bad in ["10.77.0.1/24", "10.77.0.0/31", "10.0.0.0/7", "169.254.0.0/24", "10.77.0.0", "fd00::/8"] {
            assert!(bad.parse::<Ipv4Pool>().is_err(), "{bad}");
        }
    }
}

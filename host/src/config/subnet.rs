//! Networks in configuration.

use std::{net::IpAddr, str::FromStr};

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

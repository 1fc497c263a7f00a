//! Identities that never change and numbers that only grow.

use std::{fmt, net::Ipv6Addr, str::FromStr};

use serde::{Deserialize, Serialize};

/// An ownership's number: it only grows and fences older owners.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Term(pub u64);

impl Term {
    /// The term after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A numbered step of a machine's state, captured at one instant, within a term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// A name was not of the allowed form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} {name:?} is refused; use 1 to 63 of a-z, A-Z, 0-9, '-', '_', '.', '@', not starting with '-' or '.'"
)]
pub struct NameError {
    what: &'static str,
    name: String,
}

fn check_name(what: &'static str, name: &str) -> Result<(), NameError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    if name.is_empty() || name.len() > 63 || name.starts_with(['-', '.']) || !name.chars().all(allowed) {
        return Err(NameError { what, name: name.chars().take(80).collect() });
    }
    Ok(())
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                check_name($what, name)?;
                Ok(Self(name.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                check_name($what, &name)?;
                Ok(Self(name))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    };
}

name_type!(
    /// Name of an edge host, as in its configuration and in its certificate.
    HostName, "host name"
);
name_type!(
    /// Name of a user, and so of the user's image.
    UserName, "user name"
);
name_type!(
    /// Name of an access point.
    ApName, "access point name"
);

/// Names one attempt of a handover; drawn at random by its source.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HandoverId(pub [u8; 16]);

impl fmt::Display for HandoverId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for HandoverId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HandoverId({self})")
    }
}

/// The site's 48-bit IPv6 prefix, in which every VID lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SitePrefix([u8; 6]);

/// A site prefix was not a /48.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// Not `ADDRESS/LENGTH`.
    #[error("{0:?} is no IPv6 prefix; write it as fd4b:6167:6500::/48")]
    Syntax(String),
    /// VIDs need exactly 80 bits below the prefix.
    #[error("prefix length {0} is refused; a site prefix is a /48")]
    Length(u8),
    /// Bits are set below the prefix.
    #[error("{0} has bits set below /48")]
    HostBits(Ipv6Addr),
}

impl FromStr for SitePrefix {
    type Err = PrefixError;
    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let syntax = || PrefixError::Syntax(text.chars().take(80).collect());
        let (address, length) = text.split_once('/').ok_or_else(syntax)?;
        let address: Ipv6Addr = address.parse().map_err(|_| syntax())?;
        let length: u8 = length.parse().map_err(|_| syntax())?;
        if length != 48 {
            return Err(PrefixError::Length(length));
        }
        let octets = address.octets();
        if octets[6..].iter().any(|&byte| byte != 0) {
            return Err(PrefixError::HostBits(address));
        }
        let mut prefix = [0; 6];
        prefix.copy_from_slice(&octets[..6]);
        Ok(Self(prefix))
    }
}

impl TryFrom<String> for SitePrefix {
    type Error = PrefixError;
    fn try_from(text: String) -> Result<Self, PrefixError> {
        text.parse()
    }
}

impl From<SitePrefix> for String {
    fn from(prefix: SitePrefix) -> Self {
        prefix.to_string()
    }
}

impl fmt::Display for SitePrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut octets = [0; 16];
        octets[..6].copy_from_slice(&self.0);
        write!(f, "{}/48", Ipv6Addr::from(octets))
    }
}

/// Number of an image within its site, 40 bits, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ImageNumber(pub u64);

/// What a VID names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The image itself.
    Image = 0,
    /// A process in it.
    Process = 1,
    /// A file in it.
    File = 2,
    /// A socket in it.
    Socket = 3,
}

impl Kind {
    /// Every kind, in the order of its number.
    pub const ALL: [Self; 4] = [Self::Image, Self::Process, Self::File, Self::Socket];

    /// The kind of a number as it stands in an address.
    #[must_use]
    pub fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// Its name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Process => "process",
            Self::File => "file",
            Self::Socket => "socket",
        }
    }
}

/// Fixed, system-wide identity of an image or of a resource in it: an IPv6 address,
/// site prefix (48 bits) ∥ image (40) ∥ kind (4) ∥ index (36, never reused).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Vid(Ipv6Addr);

impl Vid {
    /// Bits of an image number.
    pub const IMAGE_BITS: u32 = 40;
    /// Bits of an index.
    pub const INDEX_BITS: u32 = 36;
    /// Length of the prefix that all addresses of one image share.
    pub const IMAGE_PREFIX_LENGTH: u8 = 88;

    /// Builds a VID; bits of `image` and `index` beyond their widths are dropped.
    #[must_use]
    pub fn new(prefix: SitePrefix, image: ImageNumber, kind: Kind, index: u64) -> Self {
        let mut octets = [0; 16];
        octets[..6].copy_from_slice(&prefix.0);
        let low = (u128::from(image.0) & ((1 << Self::IMAGE_BITS) - 1)) << 40
            | (kind as u128) << Self::INDEX_BITS
            | (u128::from(index) & ((1 << Self::INDEX_BITS) - 1));
        Self(Ipv6Addr::from(u128::from(Ipv6Addr::from(octets)) | low))
    }

    /// The VID of an image: index 1, since the all-zero address of a prefix is every router's (RFC 4291 §2.6.1).
    #[must_use]
    pub fn of_image(prefix: SitePrefix, image: ImageNumber) -> Self {
        Self::new(prefix, image, Kind::Image, 1)
    }

    /// Reads an address as a VID of this site.
    ///
    /// # Errors
    /// [`VidError`], for addresses that never name anything.
    pub fn parse(prefix: SitePrefix, address: Ipv6Addr) -> Result<Self, VidError> {
        let vid = Self(address);
        if address.octets()[..6] != prefix.0 {
            return Err(VidError::Prefix { address, prefix });
        }
        let number = (u128::from(address) >> Self::INDEX_BITS) as u8 & 0xf;
        let kind = Kind::of(number).ok_or(VidError::Kind { address, number })?;
        match (kind, vid.index()) {
            (_, 0) => Err(VidError::Index { address }),
            (Kind::Image, 2..) => Err(VidError::Index { address }),
            _ => Ok(vid),
        }
    }

    /// What it names.
    #[must_use]
    pub fn kind(self) -> Kind {
        // Both ways to make a VID leave only numbers that are kinds.
        Kind::of((u128::from(self.0) >> Self::INDEX_BITS) as u8 & 0xf).unwrap_or(Kind::Image)
    }

    /// Its index within its image.
    #[must_use]
    pub fn index(self) -> u64 {
        (u128::from(self.0) & ((1 << Self::INDEX_BITS) - 1)) as u64
    }

    /// The VID as an address.
    #[must_use]
    pub const fn address(self) -> Ipv6Addr {
        self.0
    }

    /// First address of the image's /88.
    #[must_use]
    pub fn image_prefix(self) -> Ipv6Addr {
        Ipv6Addr::from(u128::from(self.0) & !((1 << 40) - 1))
    }

    /// The number of the image it belongs to.
    #[must_use]
    pub fn image(self) -> ImageNumber {
        ImageNumber(((u128::from(self.0) >> 40) & ((1 << Self::IMAGE_BITS) - 1)) as u64)
    }
}

/// An address names nothing at this site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VidError {
    /// Of another site.
    #[error("{address} is no VID of this site, whose prefix is {prefix}")]
    Prefix {
        /// The address.
        address: Ipv6Addr,
        /// The site's prefix.
        prefix: SitePrefix,
    },
    /// Of no kind.
    #[error("{address} names nothing: {number} is no kind of resource")]
    Kind {
        /// The address.
        address: Ipv6Addr,
        /// What stands where the kind does.
        number: u8,
    },
    /// An index nothing has.
    #[error("{address} names nothing: nothing has that index")]
    Index {
        /// The address.
        address: Ipv6Addr,
    },
}

impl fmt::Display for Vid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vid_is_an_address_in_its_images_prefix() {
        let prefix: SitePrefix = "fd4b:6167:6500::/48".parse().unwrap();
        let vid = Vid::of_image(prefix, ImageNumber(7));
        assert_eq!(vid.to_string(), "fd4b:6167:6500::700:0:1");
        assert_eq!(vid.image(), ImageNumber(7));
        assert_eq!(vid.image_prefix().to_string(), "fd4b:6167:6500::700:0:0");
        let file = Vid::new(prefix, ImageNumber(7), Kind::File, 3);
        assert_eq!(file.to_string(), "fd4b:6167:6500::720:0:3");
        assert_eq!(file.image_prefix(), vid.image_prefix());
    }

    #[test]
    fn an_address_is_taken_apart_as_it_was_composed() {
        let prefix: SitePrefix = "fd4b:6167:6500::/48".parse().unwrap();
        for kind in [Kind::Process, Kind::File, Kind::Socket] {
            for (image, index) in [(1, 1), ((1 << 40) - 1, (1 << 36) - 1), (0x12_3456_789a, 0xf_edcb_a987)] {
                let vid = Vid::new(prefix, ImageNumber(image), kind, index);
                assert_eq!(Vid::parse(prefix, vid.address()), Ok(vid));
                assert_eq!((vid.image(), vid.kind(), vid.index()), (ImageNumber(image), kind, index));
            }
        }
        let image = Vid::of_image(prefix, ImageNumber(7));
        assert_eq!(Vid::parse(prefix, image.address()), Ok(image));
    }

    #[test]
    fn addresses_that_name_nothing_are_told_apart() {
        let prefix: SitePrefix = "fd4b:6167:6500::/48".parse().unwrap();
        let parse = |text: &str| Vid::parse(prefix, text.parse().unwrap());
        assert!(matches!(parse("fd4b:6167:6501::700:0:1"), Err(VidError::Prefix { .. })));
        assert!(matches!(parse("fd4b:6167:6500::740:0:1"), Err(VidError::Kind { number: 4, .. })));
        assert!(matches!(parse("fd4b:6167:6500::710:0:0"), Err(VidError::Index { .. })));
        assert!(matches!(parse("fd4b:6167:6500::700:0:2"), Err(VidError::Index { .. })));
    }

    #[test]
    fn prefixes_of_other_lengths_are_refused() {
        for (text, cause) in [
            ("fd00::/40", PrefixError::Length(40)),
            ("fd00::/64", PrefixError::Length(64)),
            ("fd00::1/48", PrefixError::HostBits("fd00::1".parse().unwrap())),
            ("fd00::", PrefixError::Syntax("fd00::".into())),
        ] {
            assert_eq!(text.parse::<SitePrefix>(), Err(cause));
        }
    }

    #[test]
    fn names_are_checked_when_read() {
        assert!(serde_json_like("alice@example.org").is_ok());
        for bad in ["", "a b", "../x", "-o", &"x".repeat(64)] {
            assert!(serde_json_like(bad).is_err(), "{bad}");
        }
    }

    fn serde_json_like(name: &str) -> Result<UserName, NameError> {
        UserName::try_from(name.to_owned())
    }
}

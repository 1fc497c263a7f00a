//! Who and where a report is about: identities of users, names of access points. Pure.
//!
//! - A user is named by Chargeable-User-Identity, then Class, then User-Name. An identity of `[[user]]` stands for
//!   that user's image; any other gets an image of its own at its first use, whose name derives from it
//!   ([`image_name`]), and is never the image of another's `[[user]]`.
//! - An access point is named by NAS-Identifier, else by its address, else by Called-Station-Id.
//!
//! User-Name is what a device claims outside the tunnel of its authentication: it may be anonymous, or somebody
//! else's. So it does not count where Chargeable-User-Identity is told, and an anonymous one names nobody.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use kage_machine::{UserName, identity::ApName};

use super::radius::Accounting;
use crate::config::IdentityKind;

/// Characters of an identity that are kept in a name derived from it.
const READABLE: usize = 30;
/// Hexadecimal digits of the digest that makes such a name the identity's own.
const DIGITS: usize = 32;

/// What is known about the access network.
#[derive(Clone, Debug, Default)]
pub struct Names {
    aps: BTreeMap<String, ApName>,
    users: BTreeMap<String, UserName>,
    /// Images that are somebody's by configuration.
    images: BTreeSet<UserName>,
    order: Vec<IdentityKind>,
}

impl Names {
    /// Access points by the `nas` of `[[ap]]`, users by the identities of `[[user]]`, and which attributes name
    /// a user, the first one first.
    #[must_use]
    pub fn new(
        aps: impl IntoIterator<Item = (String, ApName)>,
        users: impl IntoIterator<Item = (String, UserName)>,
        order: &[IdentityKind],
    ) -> Self {
        let aps = aps.into_iter().map(|(nas, ap)| (canonical(&nas), ap)).collect();
        let users: BTreeMap<_, _> = users.into_iter().collect();
        let images = users.values().cloned().collect();
        Self { aps, users, images, order: order.to_vec() }
    }

    /// The access point a report comes from. A controller may give all its own name: the first of its names that is
    /// configured counts.
    #[must_use]
    pub fn ap(&self, report: &Accounting) -> Option<&ApName> {
        let address = |address: Option<IpAddr>| address.map(|address| address.to_string());
        let called = report.called_station_id.as_deref();
        // "02-00-00-00-00-01:network": the address alone is a name, too.
        let station = called.and_then(|called| called.get(..17));
        [
            report.nas_identifier.as_deref().map(canonical),
            address(report.nas_ipv6_address.map(IpAddr::V6)),
            address(report.nas_ip_address.map(IpAddr::V4)),
            called.map(canonical),
            station.map(canonical),
        ]
        .into_iter()
        .flatten()
        .find_map(|name| self.aps.get(&name))
    }

    /// Whose image a report is about; `None` if it names nobody.
    #[must_use]
    pub fn user(&self, report: &Accounting) -> Option<UserName> {
        let cui = report.chargeable_user_identity.as_deref().filter(|cui| is_told(cui));
        let told: Vec<(IdentityKind, &[u8])> = self
            .order
            .iter()
            .filter_map(|kind| {
                let value = match kind {
                    IdentityKind::Cui => cui,
                    IdentityKind::Class => report.class.as_deref(),
                    IdentityKind::UserName => report.user_name.as_deref().map(str::as_bytes),
                };
                Some((*kind, value?))
            })
            .collect();
        let trusts_cui = told.iter().any(|(kind, _)| *kind == IdentityKind::Cui);
        let told = || told.iter().filter(|(kind, _)| !trusts_cui || *kind != IdentityKind::UserName);
        let configured = |value: &[u8]| self.users.get(std::str::from_utf8(value).ok()?).cloned();
        told()
            .find_map(|(_, value)| configured(value))
            .or_else(|| told().find_map(|(kind, value)| self.first_use(*kind, value)))
    }

    /// The image of an identity that nothing is configured for; never one that is another's by configuration. Class
    /// is often something else, a group or a server's own note: it counts where it could be a user's name as it stands.
    fn first_use(&self, kind: IdentityKind, value: &[u8]) -> Option<UserName> {
        let own = |value: &[u8]| Some(image_name(value)).filter(|name| !self.images.contains(name));
        match kind {
            IdentityKind::Cui => Some(own(value).unwrap_or_else(|| derived(value))),
            IdentityKind::Class => {
                let name = std::str::from_utf8(value).ok()?.parse().ok()?;
                (!self.images.contains(&name)).then_some(name)
            }
            IdentityKind::UserName if is_anonymous(value) => None,
            IdentityKind::UserName => Some(own(value).unwrap_or_else(|| derived(value))),
        }
    }
}

/// An empty Chargeable-User-Identity, or one octet of zero, asks for it (RFC 4372 §2.1).
fn is_told(cui: &[u8]) -> bool {
    !matches!(cui, [] | [0])
}

/// Whether a User-Name names nobody: `anonymous`, `anonymous@realm`, `@realm` (RFC 7542 §2.4), or nothing at all.
fn is_anonymous(name: &[u8]) -> bool {
    let local = name.split(|octet| *octet == b'@').next().unwrap_or_default();
    local.is_empty() || local.eq_ignore_ascii_case(b"anonymous")
}

/// The name of the image of an identity: the identity itself where that is a name, else what is readable of it and
/// a digest of the whole, so that two identities never share an image. What only looks like such a name is digested,
/// too.
#[must_use]
pub fn image_name(identity: &[u8]) -> UserName {
    let plain = std::str::from_utf8(identity).ok().and_then(|text| text.parse::<UserName>().ok());
    match plain {
        Some(name) if !is_derived(name.as_str()) => name,
        _ => derived(identity),
    }
}

fn is_derived(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, digits)| {
        digits.len() == DIGITS && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
    })
}

fn derived(identity: &[u8]) -> UserName {
    let readable = |octet: &u8| match char::from(*octet) {
        c if c.is_ascii_alphanumeric() || "-_.@".contains(c) => c,
        _ => '-',
    };
    let readable: String = identity.iter().take(READABLE).map(readable).collect();
    let readable = match readable.trim_start_matches(['-', '.']) {
        "" => "user",
        readable => readable,
    };
    let digest = blake3::hash(identity).to_hex();
    let digits = digest.get(..DIGITS).unwrap_or_default();
    // At most 63 of the characters that names have, and not beginning with a dash or a dot.
    format!("{readable}.{digits}").parse().unwrap_or_else(|error| unreachable!("{error}"))
}

/// A name as it is compared: addresses and station identifiers are written in several ways.
pub(super) fn canonical(name: &str) -> String {
    match name.parse::<IpAddr>() {
        Ok(address) => address.to_string(),
        Err(_) => station(name).unwrap_or_else(|| name.to_owned()),
    }
}

/// The digits of a MAC address, however it is written; `None` if it is none.
pub(super) fn station(name: &str) -> Option<String> {
    let separators: &[char] = &['-', ':', '.'];
    let digits: String =
        name.chars().filter(|c| !separators.contains(c)).map(|c| c.to_ascii_lowercase()).collect();
    let is_mac = name.len() <= 17 && digits.len() == 12 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    is_mac.then_some(digits)
}

#[cfg(test)]
mod tests;

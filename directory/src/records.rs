//! What is kept in the directory, typed.
//!
//! A record's value is one byte of version, then postcard. [`Records`] reads and swaps them by type.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::Range,
    str::FromStr,
};

use kage_machine::{HandoverId, HostName, ImageNumber, Term, UserName, Vid, identity::ApName};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::store::{Directory, DirectoryError, Revision};

/// A typed record under its own prefix.
pub trait Record: Serialize + DeserializeOwned {
    /// What names one.
    type Key: fmt::Display + FromStr;
    /// Where they are kept, with the closing slash.
    const PREFIX: &'static str;
    /// Version this build writes and reads.
    const VERSION: u8;
}

/// A record with the revision a swap on it must expect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned<R> {
    /// When it was last changed.
    pub revision: Revision,
    /// The record.
    pub record: R,
}

/// Typed access to any [`Directory`].
pub trait Records: Directory {
    /// Reads one record.
    ///
    /// # Errors
    /// [`DirectoryError`].
    fn read<R: Record>(&self, key: &R::Key) -> Result<Option<Versioned<R>>, DirectoryError> {
        let entry = self.get(&key_of::<R>(key))?;
        entry
            .map(|entry| {
                Ok(Versioned { revision: entry.revision, record: decode(&entry.key, &entry.value)? })
            })
            .transpose()
    }

    /// Reads all records of a type, with the revision for a watch on [`Record::PREFIX`].
    ///
    /// # Errors
    /// [`DirectoryError`].
    #[expect(clippy::type_complexity, reason = "one pair, read at the call")]
    fn read_all<R: Record>(&self) -> Result<(Vec<(R::Key, Versioned<R>)>, Revision), DirectoryError> {
        let listing = self.list(R::PREFIX)?;
        let mut records = Vec::with_capacity(listing.entries.len());
        for entry in listing.entries {
            let key = parse_key::<R>(&entry.key)?;
            let record = decode(&entry.key, &entry.value)?;
            records.push((key, Versioned { revision: entry.revision, record }));
        }
        Ok((records, listing.revision))
    }

    /// Sets (`Some`) or deletes (`None`) a record whose revision is `expected`.
    ///
    /// # Errors
    /// As [`Directory::compare_and_swap`].
    fn swap<R: Record>(
        &self,
        key: &R::Key,
        expected: Revision,
        record: Option<&R>,
    ) -> Result<Revision, DirectoryError> {
        let value = record.map(encode);
        self.compare_and_swap(&key_of::<R>(key), expected, value.as_deref())
    }

    /// Sets a record that only one writer writes, whatever it held.
    ///
    /// # Errors
    /// As [`Directory::compare_and_swap`].
    fn publish<R: Record>(&self, key: &R::Key, record: &R) -> Result<Revision, DirectoryError> {
        let mut expected = self.get(&key_of::<R>(key))?.map_or(Revision::ABSENT, |entry| entry.revision);
        loop {
            match self.swap(key, expected, Some(record)) {
                Err(DirectoryError::Conflict { current }) => {
                    expected = current.map_or(Revision::ABSENT, |entry| entry.revision);
                }
                other => return other,
            }
        }
    }
}

impl<D: Directory + ?Sized> Records for D {}

fn key_of<R: Record>(key: &R::Key) -> String {
    format!("{}{key}", R::PREFIX)
}

/// The name in a key of this type's prefix, as a watch reports it.
///
/// # Errors
/// [`DirectoryError::Unreadable`].
pub fn parse_key<R: Record>(key: &str) -> Result<R::Key, DirectoryError> {
    key.strip_prefix(R::PREFIX).and_then(|name| name.parse().ok()).ok_or_else(|| DirectoryError::Unreadable {
        key: key.to_owned(),
        reason: "its key is not of its type".into(),
    })
}

/// Encodes a record's value.
pub fn encode<R: Record>(record: &R) -> Vec<u8> {
    // Writing into a growing vector cannot fail for types without maps or unsized sequences.
    postcard::to_extend(record, vec![R::VERSION]).unwrap_or_default()
}

/// Decodes a record's value, as a watch reports it.
///
/// # Errors
/// [`DirectoryError::Unreadable`].
pub fn decode<R: Record>(key: &str, value: &[u8]) -> Result<R, DirectoryError> {
    let unreadable = |reason: String| DirectoryError::Unreadable { key: key.to_owned(), reason };
    let (&version, body) = value.split_first().ok_or_else(|| unreadable("it is empty".into()))?;
    if version != R::VERSION {
        return Err(unreadable(format!("version {version}, this host reads version {}", R::VERSION)));
    }
    match postcard::take_from_bytes(body) {
        Ok((record, [])) => Ok(record),
        Ok(_) => Err(unreadable("bytes follow it".into())),
        Err(error) => Err(unreadable(error.to_string())),
    }
}

/// A handover the owner has announced.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Intent {
    /// Who is to become owner.
    pub target: HostName,
    /// Which attempt.
    pub handover: HandoverId,
}

/// Whether a machine is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Wanted {
    /// Started again whenever its owner can.
    Running,
    /// Its disk and identity are kept.
    Stopped,
}

/// What any host needs to start a user's machine.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Name of the image file it starts from.
    pub image: String,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of disk.
    pub disk_bytes: u64,
    /// From which its SSH host key is made.
    pub host_key_seed: [u8; 32],
    /// Public keys that log in, as in OpenSSH's `authorized_keys`.
    pub authorized_keys: Vec<String>,
}

impl fmt::Debug for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Profile")
            .field("image", &self.image)
            .field("memory_bytes", &self.memory_bytes)
            .field("disk_bytes", &self.disk_bytes)
            .field("authorized_keys", &self.authorized_keys.len())
            .finish_non_exhaustive()
    }
}

/// An image: who owns it, and what it is. Every change is one swap on its revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The owner's term; it only grows.
    pub term: Term,
    /// The one host whose copy's output may leave.
    pub owner: HostName,
    /// An announced handover to another host.
    pub intent: Option<Intent>,
    /// The host that may promote its checkpoint.
    pub backup: Option<HostName>,
    /// Whether it is to run.
    pub wanted: Wanted,
    /// Its number, from which its addresses are made.
    pub number: ImageNumber,
    /// Indices of VIDs its machine may give out: what lies below the end may have been given out.
    pub indices: Range<u64>,
    /// Its IPv4 address, if it has one.
    pub ipv4: Option<Ipv4Addr>,
    /// The host that has the blocks of its disk which the owner has not fetched yet, and the term under which it gave
    /// the image away. Until a start under a later term nothing of the disk is at the owner.
    pub disk_origin: Option<DiskOrigin>,
    /// What any host needs to start it.
    pub profile: Profile,
}

/// Where the rest of a disk is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOrigin {
    /// The host; it keeps the disk as it was.
    pub host: HostName,
    /// The record's term when the image was given away.
    pub since: Term,
}

impl ImageRecord {
    /// Indices of a machine that has never run. 0 is left out, since the lowest address of a prefix is every
    /// router's (RFC 4291 §2.6.1).
    pub const FIRST_INDICES: Range<u64> = 1..1 + Self::INDEX_LEASE;
    /// How many indices are set aside at a time. Half of them are left when more are asked for, which is a minute
    /// of making 8,000 files a second; a host that dies wastes at most this many of an image's 2³⁶.
    pub const INDEX_LEASE: u64 = 1 << 20;
    const INDICES: u64 = 1 << Vid::INDEX_BITS;

    /// Sets aside indices for a machine that starts from nothing, behind all that were.
    pub fn renew_indices(&mut self) {
        let start = self.indices.end;
        self.indices = start..(start + Self::INDEX_LEASE).min(Self::INDICES);
    }

    /// Sets aside more for a machine whose next index is `next`. False when it has enough.
    pub fn extend_indices(&mut self, next: u64) -> bool {
        let short = next >= self.comfortable_below();
        if short {
            // Whatever a guest claims, it costs it one lease a time.
            self.indices.end = (self.indices.end + Self::INDEX_LEASE).min(Self::INDICES);
        }
        short
    }

    /// A machine whose next index is lower has enough.
    #[must_use]
    pub fn comfortable_below(&self) -> u64 {
        if self.indices.end < Self::INDICES {
            self.indices.end.saturating_sub(Self::INDEX_LEASE / 2)
        } else {
            u64::MAX
        }
    }

    /// Gives back what a machine that has ended did not give out, when it says so believably.
    pub fn return_indices(&mut self, next: u64) {
        if self.indices.contains(&next) {
            self.indices.end = next;
        }
    }
}

impl Record for ImageRecord {
    type Key = UserName;
    const PREFIX: &'static str = "image/";
    const VERSION: u8 = 3;
}

/// An IPv4 address that belongs to a user's image, so that it is given out once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipv4Record {
    /// Whose it is.
    pub user: UserName,
}

impl Record for Ipv4Record {
    type Key = Ipv4Addr;
    const PREFIX: &'static str = "ipv4/";
    const VERSION: u8 = 1;
}

/// An edge host, published by its own daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Where its peers connect.
    pub advertise: SocketAddr,
    /// Its tunnel end in the underlay.
    pub underlay: IpAddr,
    /// Where its API listens beside its socket.
    pub api: Option<SocketAddr>,
    /// Drawn at each start of its daemon.
    pub incarnation: u64,
    /// Whether new images are kept away.
    pub cordoned: bool,
}

impl Record for HostRecord {
    type Key = HostName;
    const PREFIX: &'static str = "host/";
    const VERSION: u8 = 1;
}

/// How a device's address follows it from one access point to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mobility {
    /// The access network keeps it.
    L2,
    /// The host where it attaches installs its route.
    Route,
}

/// An access point, published by the host it belongs to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ApRecord {
    /// Its nearest host.
    pub host: HostName,
    /// Its NAS identifier in accounting.
    pub nas: String,
    /// Where it stands, in metres.
    pub position_m: [f64; 2],
    /// How devices keep their address there.
    pub mobility: Mobility,
}

impl Record for ApRecord {
    type Key = ApName;
    const PREFIX: &'static str = "ap/";
    const VERSION: u8 = 1;
}

/// A user's device, by one of its addresses; published by the host where it is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Whose it is.
    pub user: UserName,
    /// Where it is attached.
    pub host: HostName,
    /// At which access point.
    pub ap: ApName,
    /// The accounting event that said so, in milliseconds since 1970: later ones win.
    pub since_ms: u64,
}

impl Record for DeviceRecord {
    type Key = IpAddr;
    const PREFIX: &'static str = "device/";
    const VERSION: u8 = 1;
}

/// The last image number given out.
#[derive(Serialize, Deserialize)]
struct Sequence(u64);

impl Record for Sequence {
    type Key = String;
    const PREFIX: &'static str = "sequence/";
    const VERSION: u8 = 1;
}

/// Takes the next image number. It is never given out again, also when its record is never made.
///
/// # Errors
/// [`DirectoryError`]; after [`DirectoryError::Unreachable`] a number may be lost, which is harmless.
pub fn allocate_image_number(directory: &dyn Directory) -> Result<ImageNumber, DirectoryError> {
    let name = "image".to_owned();
    loop {
        let (expected, last) = match directory.read::<Sequence>(&name)? {
            Some(Versioned { revision, record }) => (revision, record.0),
            None => (Revision::ABSENT, 0),
        };
        let number = last + 1;
        if number >= 1 << Vid::IMAGE_BITS {
            return Err(DirectoryError::Refused { reason: "all image numbers are used".into() });
        }
        match directory.swap(&name, expected, Some(&Sequence(number))) {
            Ok(_) => return Ok(ImageNumber(number)),
            Err(DirectoryError::Conflict { .. }) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageRecord {
        ImageRecord {
            term: Term(3),
            owner: "h1".parse().unwrap(),
            intent: Some(Intent { target: "h2".parse().unwrap(), handover: HandoverId([9; 16]) }),
            backup: None,
            wanted: Wanted::Running,
            number: ImageNumber(7),
            indices: 5..9,
            ipv4: Some(Ipv4Addr::new(10, 77, 0, 5)),
            disk_origin: Some(DiskOrigin { host: "h4".parse().unwrap(), since: Term(2) }),
            profile: Profile {
                image: "default".into(),
                memory_bytes: 64 << 20,
                disk_bytes: 0,
                host_key_seed: [5; 32],
                authorized_keys: vec!["ssh-ed25519 AAAA".into()],
            },
        }
    }

    #[test]
    fn an_image_record_keeps_its_bytes() {
        let bytes = encode(&image());
        assert_eq!(bytes[..10], [3, 3, 2, b'h', b'1', 1, 2, b'h', b'2', 9]);
        assert_eq!(bytes[25..43], [0, 0, 7, 5, 9, 1, 10, 77, 0, 5, 1, 2, b'h', b'4', 2, 7, b'd', b'e']);
        assert_eq!(decode::<ImageRecord>("image/a", &bytes), Ok(image()));
        for end in 0..bytes.len() {
            assert!(decode::<ImageRecord>("image/a", &bytes[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn records_of_another_version_are_named_not_guessed() {
        let mut bytes = encode(&image());
        bytes[0] = 1;
        let error = decode::<ImageRecord>("image/a", &bytes).unwrap_err();
        assert_eq!(
            error.to_string(),
            "directory record image/a is unreadable: version 1, this host reads version 3"
        );
    }

    #[test]
    fn no_index_is_set_aside_twice() {
        let mut record = ImageRecord { indices: ImageRecord::FIRST_INDICES, ..image() };
        let lease = ImageRecord::INDEX_LEASE;
        assert!(!record.extend_indices(lease / 2));
        assert!(record.extend_indices(lease / 2 + 1));
        assert_eq!(record.indices, 1..1 + 2 * lease);
        // A host that dies says nothing of how far its machine came.
        record.renew_indices();
        assert_eq!(record.indices, 1 + 2 * lease..1 + 3 * lease);
        // One that stops it in order does, as long as it can be true.
        record.return_indices(7);
        record.return_indices(2 + 3 * lease);
        assert_eq!(record.indices.end, 1 + 3 * lease);
        record.return_indices(5 + 2 * lease);
        record.renew_indices();
        assert_eq!(record.indices.start, 5 + 2 * lease);
    }

    #[test]
    fn a_profile_does_not_print_its_seed() {
        assert!(!format!("{:?}", image()).contains("5, 5"));
    }
}

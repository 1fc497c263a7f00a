//! Follows the directory: routes, access points, this host's own record.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use kage_directory::{
    ApRecord, DeviceRecord, DirectoryError, HostRecord, ImageRecord, Mobility, Record, Records as _,
    Revision,
    records::{decode, parse_key},
};
use kage_machine::{ImageNumber, UserName, Vid, identity::ApName};

use super::Daemon;
use crate::{
    api::error::ErrorBody,
    config,
    routes::{Records, desired},
};

/// How long one watch is held.
const WATCH: Duration = Duration::from_secs(20);

impl Daemon {
    /// Publishes this host and its access points; blocks.
    ///
    /// # Errors
    /// When the directory does not answer.
    pub fn publish(&self) -> Result<(), ErrorBody> {
        let mut incarnation = [0; 8];
        crate::init::random(&mut incarnation);
        let mut record = HostRecord {
            advertise: self.config.peer.advertise,
            underlay: self.config.peer.advertise.ip(),
            api: self.config.api.listen,
            incarnation: u64::from_le_bytes(incarnation),
            cordoned: false,
        };
        loop {
            let found = self.directory.read::<HostRecord>(&self.me)?;
            let expected = found.as_ref().map_or(Revision::ABSENT, |found| found.revision);
            // A daemon that is started again takes no images that its host was not to take.
            record.cordoned = found.is_some_and(|found| found.record.cordoned);
            match self.directory.swap(&self.me, expected, Some(&record)) {
                Ok(_) => break,
                Err(DirectoryError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        for ap in self.config.aps.iter().filter(|ap| ap.host == self.me) {
            let record = ApRecord {
                host: self.me.clone(),
                nas: ap.nas().to_owned(),
                position_m: ap.position_m.unwrap_or_default(),
                mobility: match ap.mobility {
                    config::Mobility::L2 => Mobility::L2,
                    config::Mobility::Route => Mobility::Route,
                },
            };
            self.directory.publish(&ap.id, &record)?;
        }
        Ok(())
    }

    /// Follows the directory until the daemon is gone; runs on its own thread.
    pub fn follow(self: Arc<Self>) {
        let daemon = Arc::downgrade(&self);
        drop(self);
        let mut state: Option<(Records, Revision)> = None;
        while let Some(daemon) = daemon.upgrade() {
            let step = match state.take() {
                None => daemon.read_everything(),
                Some((records, after)) => daemon.watch_once(records, after),
            };
            match step {
                Ok((records, revision)) => {
                    daemon.routes.follow(desired(
                        &records,
                        &daemon.me,
                        daemon.config.network.prefix,
                        daemon.config.uses_ipv4(),
                    ));
                    daemon.site_seen(records.clone());
                    state = Some((records, revision));
                }
                Err(DirectoryError::Forgotten { .. }) => {}
                Err(error) => {
                    tracing::warn!(%error, "the directory is not followed for now");
                    drop(daemon);
                    std::thread::sleep(super::AGAIN);
                }
            }
        }
    }

    fn read_everything(&self) -> Result<(Records, Revision), DirectoryError> {
        let (hosts, first) = self.directory.read_all::<HostRecord>()?;
        let (images, _) = self.directory.read_all::<ImageRecord>()?;
        let (devices, _) = self.directory.read_all::<DeviceRecord>()?;
        let (aps, _) = self.directory.read_all::<ApRecord>()?;
        fn plain<R: Record>(all: Vec<(R::Key, kage_directory::Versioned<R>)>) -> BTreeMap<R::Key, R>
        where
            R::Key: Ord,
        {
            all.into_iter().map(|(key, found)| (key, found.record)).collect()
        }
        Ok((
            Records {
                hosts: plain::<HostRecord>(hosts),
                images: plain::<ImageRecord>(images),
                devices: plain::<DeviceRecord>(devices),
                aps: plain::<ApRecord>(aps),
            },
            first,
        ))
    }

    fn watch_once(
        &self,
        mut records: Records,
        after: Revision,
    ) -> Result<(Records, Revision), DirectoryError> {
        let changes = self.directory.watch("", after, WATCH)?;
        for change in &changes.changes {
            let (key, value) = (change.key.as_str(), change.value.as_deref());
            let known = if key.starts_with(HostRecord::PREFIX) {
                merge::<HostRecord>(&mut records.hosts, key, value)
            } else if key.starts_with(ImageRecord::PREFIX) {
                merge::<ImageRecord>(&mut records.images, key, value)
            } else if key.starts_with(DeviceRecord::PREFIX) {
                merge::<DeviceRecord>(&mut records.devices, key, value)
            } else if key.starts_with(ApRecord::PREFIX) {
                merge::<ApRecord>(&mut records.aps, key, value)
            } else {
                Ok(())
            };
            // A record of a newer build is no reason to lose all others.
            if let Err(error) = known {
                tracing::warn!(%error, "a record is not understood");
            }
        }
        Ok((records, changes.revision))
    }

    /// Why an address cannot be that of a device. A report is an access point's word for a device's, and its route
    /// would be every host's: it must not lead anything else astray.
    fn not_a_devices(&self, address: IpAddr) -> Option<&'static str> {
        if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
            return Some("nobody has it for itself");
        }
        let image = match address {
            IpAddr::V6(address) if address.is_unicast_link_local() => {
                return Some("it means something on one link only");
            }
            IpAddr::V4(address) if address.is_link_local() => {
                return Some("it means something on one link only");
            }
            // 0.0.0.0/8, and 240.0.0.0/4 with what accounting says for "none yet" (RFC 2865 §5.8).
            IpAddr::V4(address) if matches!(address.octets()[0], 0 | 240..) => return Some("it is reserved"),
            IpAddr::V4(_) if !self.config.uses_ipv4() => {
                return Some("this site has no IPv4; see `ipv4` in [network]");
            }
            IpAddr::V6(address) => {
                let of_site = Vid::of_image(self.config.network.prefix, ImageNumber(0)).address();
                address.segments()[..3] == of_site.segments()[..3]
            }
            IpAddr::V4(address) => {
                self.config.network.ipv4.is_some_and(|pool| pool.contains(address))
                    || self.config.users.iter().any(|user| user.ipv4 == Some(address))
            }
        };
        let seen = self.seen.borrow();
        let underlay = self.config.peer.advertise.ip() == address
            || seen.hosts.values().any(|host| [host.underlay, host.advertise.ip()].contains(&address));
        if underlay {
            return Some("it is a host's");
        }
        image.then_some("it is an image's")
    }

    /// Publishes where a device is, unless something later is known; blocks. Its route is set here at once.
    ///
    /// # Errors
    /// When the directory does not answer.
    pub fn attach_device(
        &self,
        address: IpAddr,
        user: &UserName,
        ap: &ApName,
        since_ms: u64,
    ) -> Result<bool, ErrorBody> {
        if let Some(why) = self.not_a_devices(address) {
            return Err(ErrorBody::bad_request(format!("{address} is no address of a device: {why}")));
        }
        let record = DeviceRecord { user: user.clone(), host: self.me.clone(), ap: ap.clone(), since_ms };
        loop {
            let found = self.directory.read::<DeviceRecord>(&address)?;
            let expected = match &found {
                Some(found) if found.record.since_ms > since_ms => return Ok(false),
                Some(found) if found.record == record => break,
                Some(found) => found.revision,
                None => Revision::ABSENT,
            };
            match self.directory.swap(&address, expected, Some(&record)) {
                Ok(_) => break,
                Err(DirectoryError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.routes.device(address, &crate::machines::Via::Ap(ap.clone())).map_err(ErrorBody::failed)?;
        Ok(true)
    }
}

fn merge<R: Record>(
    into: &mut BTreeMap<R::Key, R>,
    key: &str,
    value: Option<&[u8]>,
) -> Result<(), DirectoryError>
where
    R::Key: Ord,
{
    let name = parse_key::<R>(key)?;
    match value {
        Some(value) => {
            into.insert(name, decode(key, value)?);
        }
        None => {
            into.remove(&name);
        }
    }
    Ok(())
}

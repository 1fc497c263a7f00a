//! A stopped image goes to the host where its user logs in.
//!
//! The host that wants it asks, so that nothing is given to one that is down; the owner gives it in one swap with its
//! slot held, so that nothing of it runs. Where its disk is from then on: see [`crate::disks`].

use std::sync::Arc;

use kage_directory::{DiskOrigin, ImageRecord, Versioned, Wanted};
use kage_machine::{HostName, Term, UserName};
use serde_json::json;

use super::{Daemon, blocking};
use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{GiveRequest, Given},
    },
    http::Call,
};

/// Who has the blocks of a disk once its owner has given it to `to` under `term`; `None` within: all of it is there.
/// `untouched`: nothing of it was ever at the owner, or it was never made. `None`: it cannot be given away.
fn origin_after(
    record: &ImageRecord,
    to: &HostName,
    untouched: bool,
    term: Term,
) -> Option<Option<DiskOrigin>> {
    let origin = |host: &HostName| Some(DiskOrigin { host: host.clone(), since: term });
    match &record.disk_origin {
        _ if record.profile.disk_bytes == 0 => Some(None),
        None if untouched => Some(None),
        None => Some(origin(&record.owner)),
        Some(before) if untouched && before.host == *to => Some(None),
        Some(before) if untouched => Some(origin(&before.host)),
        Some(_) => None,
    }
}

impl Daemon {
    /// Whether this host, as its owner, may give an image away; blocks.
    pub(super) fn may_give(&self, record: &ImageRecord) -> bool {
        record.owner == self.me
            && origin_after(record, &record.owner, self.has_none_of(record), record.term).is_some()
    }

    /// Whether nothing of an image's disk was ever at this host, its owner; blocks.
    fn has_none_of(&self, record: &ImageRecord) -> bool {
        match record.disk_origin {
            Some(_) => self.is_untouched(record),
            None => !self.has_log(record),
        }
    }

    /// Gives an image to another host, if it is stopped and can be given.
    ///
    /// # Errors
    /// [`ErrorBody`]; nothing has changed.
    pub async fn give(self: &Arc<Self>, user: &UserName, to: &HostName) -> Result<Given, ErrorBody> {
        let image = self.image(user);
        let slot = image.slot.clone().lock_owned().await;
        let (daemon, to) = (self.clone(), to.clone());
        let given = blocking(move || {
            let Versioned { revision, record } = daemon.existing(&image.user)?;
            let stays = Ok(Given { term: None });
            if record.owner != daemon.me || record.wanted != Wanted::Stopped || slot.machine.is_some() {
                return stays;
            }
            Self::reachable(&image, &slot)?;
            if record.intent.is_some() {
                let message = format!("a move of {}'s machine is not settled yet; try again", image.user);
                return Err(ErrorBody::new(Code::Busy, message));
            }
            let term = record.term.next();
            let Some(disk_origin) = origin_after(&record, &to, daemon.has_none_of(&record), term) else {
                return stays;
            };
            let mut given = ImageRecord { owner: to, term, disk_origin, wanted: Wanted::Running, ..record };
            given.renew_indices();
            daemon.swap(&image.user, revision, &given)?;
            image.update(|status| *status = super::Status::default());
            let details = json!({ "to": given.owner, "term": term });
            daemon.events.emit("given", Some(&image.user), details);
            Ok(Given { term: Some(term) })
        });
        given.await
    }

    /// Asks an image's owner for it.
    ///
    /// # Errors
    /// As the owner, or that it does not answer.
    pub(super) async fn take(
        self: &Arc<Self>,
        user: &UserName,
        owner: &HostName,
    ) -> Result<Given, ErrorBody> {
        let request = GiveRequest { to: self.me.clone() };
        let call = Call::new(http::Method::POST, format!("/v1/images/{user}/give")).json(&request);
        self.peers.call(owner, self.address(owner)?, &call).await?.into_value()
    }
}

#[cfg(test)]
mod tests {
    use kage_machine::ImageNumber;

    use super::*;

    fn host(name: &str) -> HostName {
        name.parse().unwrap()
    }

    fn record(origin: Option<&str>, disk_bytes: u64) -> ImageRecord {
        ImageRecord {
            term: Term(4),
            owner: host("a"),
            intent: None,
            backup: None,
            wanted: Wanted::Stopped,
            number: ImageNumber(7),
            indices: ImageRecord::FIRST_INDICES,
            ipv4: None,
            disk_origin: origin.map(|name| DiskOrigin { host: host(name), since: Term(3) }),
            profile: kage_directory::Profile { disk_bytes, ..crate::fake::profile() },
        }
    }

    #[test]
    fn no_block_is_lost_by_giving_an_image_away() {
        let from = |name: &str| Some(Some(DiskOrigin { host: host(name), since: Term(5) }));
        for (origin, bytes, untouched, to, expected) in [
            (None, 4096, false, "b", from("a")),
            (None, 4096, true, "b", Some(None)),
            // Some of it is here alone, some of it elsewhere alone.
            (Some("o"), 4096, false, "b", None),
            (Some("b"), 4096, false, "b", None),
            // Nothing of it was ever here.
            (Some("o"), 4096, true, "b", from("o")),
            (Some("b"), 4096, true, "b", Some(None)),
            (None, 0, false, "b", Some(None)),
        ] {
            let after = origin_after(&record(origin, bytes), &host(to), untouched, Term(5));
            assert_eq!(after, expected, "{origin:?} {bytes} {untouched}");
        }
    }
}

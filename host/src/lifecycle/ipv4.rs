//! Which IPv4 address an image has: the one configured for its user, or one of the pool, or none.
//!
//! An address is claimed by a record of its own before the image's record names it, so that two hosts never give
//! out the same one; a claim that came to nothing is found again by the user's next try. An image keeps what it has for
//! life, unless its user is configured another: the former one is given up once the record names the new one.

use std::{collections::BTreeSet, net::Ipv4Addr};

use kage_directory::{DirectoryError, Ipv4Record, Records as _, Revision};
use kage_machine::UserName;

use super::Daemon;
use crate::api::error::ErrorBody;

impl Daemon {
    /// The address that an image with address `now` has from its next start on; blocks.
    ///
    /// # Errors
    /// When the one configured is another user's, or the directory does not answer.
    pub(super) fn assign_ipv4(
        &self,
        user: &UserName,
        now: Option<Ipv4Addr>,
    ) -> Result<Option<Ipv4Addr>, ErrorBody> {
        let configured = self.config.users.iter().find(|other| other.image == *user && other.ipv4.is_some());
        if let Some(wanted) = configured.and_then(|other| other.ipv4) {
            if now == Some(wanted) {
                return Ok(now);
            }
            if !self.claim_ipv4(user, wanted)? {
                return Err(ErrorBody::failed(format!(
                    "{user} is to have {wanted}, which is another image's; give another address in [[user]]"
                )));
            }
            return Ok(Some(wanted));
        }
        let Some(pool) = self.config.network.ipv4.filter(|_| now.is_none()) else { return Ok(now) };
        let claims = self.directory.read_all::<Ipv4Record>()?.0;
        let own =
            claims.iter().find(|(address, claim)| claim.record.user == *user && pool.contains(*address));
        if let Some((address, _)) = own {
            return Ok(Some(*address));
        }
        let mut taken: BTreeSet<Ipv4Addr> = claims.into_iter().map(|(address, _)| address).collect();
        taken.extend(self.config.users.iter().filter_map(|other| other.ipv4));
        for address in pool.hosts().filter(|address| !taken.contains(address)) {
            if self.claim_ipv4(user, address)? {
                return Ok(Some(address));
            }
        }
        tracing::warn!(%user, "no IPv4 address is left in network.ipv4; the image has none");
        Ok(None)
    }

    /// Claims an address. False: it is somebody else's.
    fn claim_ipv4(&self, user: &UserName, address: Ipv4Addr) -> Result<bool, ErrorBody> {
        let record = Ipv4Record { user: user.clone() };
        match self.directory.swap(&address, Revision::ABSENT, Some(&record)) {
            Ok(_) => Ok(true),
            Err(DirectoryError::Conflict { .. }) => {
                let found = self.directory.read::<Ipv4Record>(&address)?;
                Ok(found.is_some_and(|found| found.record.user == *user))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Lets others have an address that the image's record names no longer.
    ///
    /// # Errors
    /// When the directory does not answer.
    pub(super) fn give_up_ipv4(&self, user: &UserName, address: Ipv4Addr) -> Result<(), ErrorBody> {
        let Some(found) = self.directory.read::<Ipv4Record>(&address)? else { return Ok(()) };
        if found.record.user == *user {
            self.directory.swap::<Ipv4Record>(&address, found.revision, None)?;
        }
        Ok(())
    }
}

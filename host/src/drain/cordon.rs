//! A cordoned host gets no new images: no login starts one there, no move without a host named leads there, no mirror is
//! kept there, no machine follows its user there. What is there stays and runs on.

use std::sync::Arc;

use kage_directory::{DirectoryError, HostRecord, Records as _};
use kage_machine::HostName;

use crate::{
    api::error::{Code, ErrorBody},
    lifecycle::{Daemon, blocking},
    prediction::nearest,
};

impl Daemon {
    /// Cordons a host or lets it have images again, whether its daemon runs or not; says whether that has changed anything.
    ///
    /// # Errors
    /// An unknown host; when the directory does not answer.
    pub(crate) async fn set_cordoned(
        self: &Arc<Self>,
        host: &HostName,
        cordoned: bool,
    ) -> Result<bool, ErrorBody> {
        let (daemon, host) = (self.clone(), host.clone());
        blocking(move || {
            loop {
                let found = daemon.directory.read::<HostRecord>(&host)?;
                let found = found.ok_or_else(|| ErrorBody::no_host(host.as_str()))?;
                if found.record.cordoned == cordoned {
                    return Ok(false);
                }
                let record = HostRecord { cordoned, ..found.record };
                match daemon.directory.swap(&host, found.revision, Some(&record)) {
                    Ok(_) => {
                        let kind = if cordoned { "cordoned" } else { "uncordoned" };
                        daemon.events.emit(kind, None, serde_json::json!({ "to": host }));
                        return Ok(true);
                    }
                    Err(DirectoryError::Conflict { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        })
        .await
    }

    /// Whether a host is cordoned, as last seen.
    pub(crate) fn is_cordoned(&self, host: &HostName) -> bool {
        self.seen.borrow().hosts.get(host).is_some_and(|record| record.cordoned)
    }

    /// The host where a machine starts whose user is at `place`: that one, or the nearest that is not cordoned; of equally
    /// near ones that with the fewest images. Where another host has found so already it is this one, if it may.
    ///
    /// # Errors
    /// Every host is cordoned.
    pub(crate) fn open_near(&self, place: &HostName, passed_on: bool) -> Result<HostName, ErrorBody> {
        if !self.is_cordoned(place) {
            return Ok(place.clone());
        }
        if passed_on && !self.is_cordoned(&self.me) {
            return Ok(self.me.clone());
        }
        let places = self.predictions.places();
        let here = places.values().find(|here| here.host == *place);
        let near = here.map(|here| nearest(&places, here)).unwrap_or_default();
        let distance = |host: &HostName| near.iter().position(|near| near == host).unwrap_or(usize::MAX);
        let seen = self.seen.borrow();
        let load = |host: &HostName| seen.images.values().filter(|image| image.owner == *host).count();
        let open = seen.hosts.iter().filter(|(_, record)| !record.cordoned).map(|(host, _)| host);
        let best = open.min_by_key(|host| (distance(host), load(host)));
        best.cloned().ok_or_else(|| {
            let message = "every host is cordoned; `kage host-uncordon HOST` lets one have images again";
            ErrorBody::new(Code::Busy, message)
        })
    }
}

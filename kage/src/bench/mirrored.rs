//! Mirrors of a desk's machine, pinned by hand: benches say themselves where they are.

use std::time::{Duration, Instant};

use http::Method;
use kage_host::{
    api::types::{ImageView, Replica},
    http::Call,
};
use serde_json::{Value, json};

use super::desk::{Desk, runtime};
use crate::{client::Failure, testbed::Cancel};

/// Longest wait until mirrors are as many as asked for, and have caught up.
const CAUGHT_UP: Duration = Duration::from_secs(120);
/// Pause between two looks at them: no event tells of a mirror's freshness.
const LOOK: Duration = Duration::from_millis(100);
/// A mirror that lacks no more than this has caught up …
const FRESH: u64 = 1 << 20;
/// … and so has one that has lacked no less for so long: the load dirties pages as fast as they are worth sending.
const NO_LONGER_FALLS: Duration = Duration::from_secs(2);

impl Desk<'_> {
    /// Keeps mirrors at exactly those hosts; `None` lets the owner choose again.
    ///
    /// # Errors
    /// What the daemon says.
    pub fn pin(&self, hosts: Option<&[String]>) -> Result<(), Failure> {
        let path = format!("/v1/images/{}/mirrors", self.user);
        let call = Call::new(Method::POST, path).json(&json!({ "hosts": hosts }));
        let _: Value = runtime()?.block_on(self.client.call(&call))?;
        Ok(())
    }

    /// Keeps mirrors at exactly those hosts, and waits until they have caught up with a machine of so much memory.
    ///
    /// # Errors
    /// When they do not come about, or the bench is cancelled.
    pub fn mirrored(&self, hosts: &[String], memory_bytes: u64, cancel: &Cancel) -> Result<(), Failure> {
        self.pin(Some(hosts))?;
        let begun = Instant::now();
        let (mut least, mut since) = (u64::MAX, begun);
        loop {
            let replicas = self.view()?.replicas;
            let lacked: u64 = replicas.iter().map(|replica| replica.missing_bytes).sum();
            let mut there: Vec<_> = replicas.iter().map(|replica| replica.host.to_string()).collect();
            there.sort_unstable();
            if lacked < least {
                (least, since) = (lacked, Instant::now());
            }
            if there == hosts && caught_up(&replicas, lacked, since.elapsed(), memory_bytes) {
                return Ok(());
            }
            if begun.elapsed() > CAUGHT_UP {
                return Err(Failure::new(format!(
                    "mirrors at {hosts:?} do not come about; there are {there:?}, which lack {lacked} bytes; \
                     see the hosts' logs"
                )));
            }
            cancel.wait_until(Instant::now() + LOOK).map_err(Failure::new)?;
        }
    }

    /// The machine as its owner shows it.
    ///
    /// # Errors
    /// What the daemon says.
    pub fn view(&self) -> Result<ImageView, Failure> {
        let call = Call::new(Method::GET, format!("/v1/images/{}", self.user));
        Ok(runtime()?.block_on(self.client.call(&call))?)
    }
}

/// Whether mirrors are as fresh as they get: those that lack so much, and no less since so long.
fn caught_up(replicas: &[Replica], lacked: u64, falls_no_more: Duration, memory_bytes: u64) -> bool {
    let fresh = lacked <= FRESH * replicas.len() as u64 || falls_no_more >= NO_LONGER_FALLS;
    fresh && lacked < memory_bytes / 2
}

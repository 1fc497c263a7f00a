//! Whether mirrors are what they claim, by reading all of them.

use std::{
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use kage_machine::{Epoch, HostName, UserName};
use tokio::sync::oneshot;

use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{MirrorCheck, MirrorState},
    },
    http::Call,
    lifecycle::{Daemon, blocking},
};

/// Longest wait for a stream to come to the end of an epoch.
const EPOCH: Duration = Duration::from_secs(10);

/// Longest time a mirror takes to be read.
const READ: Duration = Duration::from_secs(20);

/// How long anybody else who wants a stream waits for one that is being compared.
const WAYSIDE: Duration = Duration::from_millis(10);

impl Daemon {
    /// Compares each mirror of a machine that this host owns with what was sent to it: its stream is held meanwhile.
    ///
    /// # Errors
    /// A mirror that does not answer.
    pub async fn check_mirrors(self: &Arc<Self>, user: &UserName) -> Result<Vec<MirrorCheck>, ErrorBody> {
        let image = self.known(user).ok_or_else(|| ErrorBody::no_user(user))?;
        let mut checks = Vec::new();
        for host in image.mirrors.streams.hosts() {
            let (tell, told) = oneshot::channel();
            let (release, held) = mpsc::channel::<()>();
            let asked = image.mirrors.streams.ask(&host, move |epoch, digest, is_free| {
                let until = Instant::now() + READ;
                let mut waits = tell.send((epoch, digest)).is_ok();
                while waits {
                    // Ends as soon as whoever asked has its answer, or is gone; a handover does not wait for it.
                    let ended = held.recv_timeout(WAYSIDE);
                    waits = matches!(ended, Err(RecvTimeoutError::Timeout))
                        && Instant::now() < until
                        && is_free();
                }
            });
            if !asked {
                continue;
            }
            let busy = || {
                ErrorBody::new(
                    Code::Busy,
                    format!("the mirror at host {host} did not come to rest; try again"),
                )
            };
            let (epoch, owner) =
                tokio::time::timeout(EPOCH, told).await.map_err(|_| busy())?.map_err(|_| busy())?;
            let state = self.ask_state(&host, user).await;
            drop(release);
            let state = state?;
            checks.push(MirrorCheck {
                host,
                epoch,
                owner_digest: format!("{owner:032x}"),
                mirror_digest: state.digest,
                mirror_epoch: state.epoch,
                scrubbed_wrong_pages: state.wrong_pages,
            });
        }
        Ok(checks)
    }

    async fn ask_state(&self, host: &HostName, user: &UserName) -> Result<MirrorState, ErrorBody> {
        let call = Call::new(http::Method::POST, format!("/v1/mirrors/{user}/check")).patience(READ);
        self.peers.call(host, self.address(host)?, &call).await?.into_value()
    }

    /// Reads the mirror that this host keeps.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub async fn check_own_mirror(self: &Arc<Self>, user: &UserName) -> Result<MirrorState, ErrorBody> {
        let (daemon, name) = (self.clone(), user.clone());
        let checked = blocking(move || Ok(daemon.targets.check_mirror(&name))).await?;
        let checked = checked.ok_or_else(|| {
            ErrorBody::new(Code::NotFound, format!("host {} keeps no mirror of {user}'s machine", self.me))
        })?;
        let Epoch(epoch) = checked.epoch;
        Ok(MirrorState {
            epoch: Epoch(epoch),
            digest: format!("{:032x}", checked.digest),
            wrong_pages: checked.wrong_pages,
        })
    }
}

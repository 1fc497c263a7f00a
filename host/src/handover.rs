//! What the daemon lends to the drivers of handovers: the machine, links, routes, the tap.
//!
//! - [`leaving`]: this host is the source.
//! - [`arriving`]: this host is the target.
//! - [`pulse`]: what the guest itself felt of it.
//!
//! The drivers block, so each handover has a thread of its own at either host. The image's slot is held from
//! the first word to the last: nobody else starts, stops or moves it meanwhile.

mod arriving;
mod leaving;
mod pulse;
#[cfg(test)]
pub(crate) mod tests;

use std::{sync::Arc, time::Duration};

use kage_machine::HandoverId;
use kage_migrate::{
    Ticket,
    converge::{Goal, Stubborn},
    drive::{Limits, source::SourceSpec},
    source,
    source::Source,
    target,
    target::Target,
};
use kage_replicate::Rate;
use tokio::sync::{OwnedMutexGuard, oneshot};

use crate::{
    api::{error::ErrorBody, types::MigrateRequest},
    lifecycle::{Daemon, Image, Slot},
};

/// A handover that an earlier daemon began.
pub enum Resumed {
    /// As its source.
    Source(Ticket, Source, Vec<source::Action>),
    /// As its target.
    Target(Ticket, Target, Vec<target::Action>),
}

/// Runs `work` on a thread of its own, named for what it does.
async fn on_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ErrorBody> {
    let (done, result) = oneshot::channel();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            // Whoever asked may be gone.
            let _ = done.send(work());
        })
        .map_err(ErrorBody::failed)?;
    result.await.map_err(|_| ErrorBody::failed("the handover's thread ended; see the daemon's log"))
}

impl Daemon {
    /// What is asked of a move.
    pub(crate) fn goal(&self, request: &MigrateRequest) -> Goal {
        let defaults = &self.config.migrate;
        Goal {
            blackout: request.blackout.unwrap_or(defaults.blackout).duration(),
            timeout: request.timeout.unwrap_or(defaults.timeout).duration(),
            // Who names a blackout means it; else a move that is late is better than none.
            stubborn: if request.blackout.is_some() { Stubborn::Keep } else { Stubborn::Switch },
        }
    }

    fn source_spec(&self, ticket: Ticket, request: &MigrateRequest) -> SourceSpec {
        let goal = self.goal(request);
        let bandwidth = request.bandwidth.or(self.config.replicate.max_rate);
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let bandwidth = bandwidth.map(|rate| Rate::bytes_per_s(rate.bytes_per_second() as f64));
        let (verify, plain) = (request.verify, request.plain);
        SourceSpec { ticket, goal, bandwidth, verify, plain, limits: Limits::default() }
    }

    /// Goes on with a handover that an earlier daemon began, until it is settled; whether it could.
    pub(crate) async fn resume(
        self: &Arc<Self>,
        image: &Arc<Image>,
        slot: OwnedMutexGuard<Slot>,
        resumed: Resumed,
    ) -> bool {
        let (daemon, image) = (self.clone(), image.clone());
        let settled = match resumed {
            Resumed::Source(ticket, source, actions) => {
                let spec = self.source_spec(ticket, &MigrateRequest::default());
                on_thread("kage-source", move || {
                    let mut side = leaving::Leaving::new(&daemon, &image, slot, &spec.ticket, None);
                    let control = kage_migrate::drive::Control::default();
                    let directory = daemon.directory.clone();
                    let report = kage_migrate::drive::source::resume(
                        &spec,
                        source,
                        actions,
                        &mut side,
                        &*directory,
                        &control,
                    );
                    side.over(&report);
                    daemon.tell_move(&report, true);
                    true
                })
                .await
            }
            Resumed::Target(ticket, target, actions) => {
                on_thread("kage-target", move || match arriving::Arriving::adopted(&daemon, &image, slot) {
                    Some(side) => {
                        let outcome = daemon.targets.resume(ticket, target, actions, Box::new(side));
                        tracing::info!(user = %image.user, ?outcome, "a handover was settled");
                        true
                    }
                    None => {
                        tracing::error!(user = %image.user, "a handover was to be settled without a machine");
                        false
                    }
                })
                .await
            }
        };
        settled.unwrap_or_else(|error| {
            tracing::error!(%error, "a handover was not settled");
            false
        })
    }
}

/// A handover's number.
fn new_handover() -> HandoverId {
    let mut bytes = [0; 16];
    crate::init::random(&mut bytes);
    HandoverId(bytes)
}

/// So many bytes tell what a link carries.
pub(crate) const MEASURES: u64 = 1 << 20;

/// Longest wait for a link to a peer.
const CONNECT: Duration = Duration::from_secs(2);

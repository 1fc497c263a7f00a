//! Mirrors: copies of machines kept nearly fresh at the hosts where their users may be next.
//!
//! - This file: at the owner. The streams are [`kage_replicate::mirrors`]; which hosts is somebody else's to say.
//! - [`shelf`]: at a follower, and what a former owner keeps.
//! - [`check`]: whether a mirror is what it claims.

mod check;
mod shelf;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use kage_directory::Wanted;
use kage_machine::{HostName, Memory, PAGE_SIZE, PageSet, UserName};
use kage_replicate::{EpochStats, Link, Mirrors, OwnerSide, Rate, link::tls};
use kage_wire::{Hello, Purpose, handover::Follow};

use crate::{
    api::types::{Replica, ReplicaKind},
    handover::MEASURES,
    lifecycle::{Daemon, Image},
};

pub use shelf::{Parts, Shelf, memory as memory_here};

/// Longest wait for a link to a follower.
const CONNECT: Duration = Duration::from_secs(2);

/// What of a page's record is not its content.
const RECORD: u64 = 8;

/// The mirrors of an image at this host, its owner.
#[derive(Default)]
pub struct ImageMirrors {
    /// Their streams.
    pub streams: Mirrors,
    wish: Mutex<Wish>,
}

/// Where mirrors are to be.
#[derive(Default)]
struct Wish {
    /// As chosen.
    chosen: Vec<HostName>,
    /// As an operator said, instead.
    pinned: Option<Vec<HostName>>,
}

impl ImageMirrors {
    fn wish(&self) -> std::sync::MutexGuard<'_, Wish> {
        self.wish.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wanted(&self) -> Vec<HostName> {
        let wish = self.wish();
        wish.pinned.clone().unwrap_or_else(|| wish.chosen.clone())
    }
}

/// Counts handovers from this host, before which mirrors wait: what is queued on a thin link is in the way of a last
/// epoch, whose machine stands still.
#[derive(Clone, Default)]
pub struct Departures(Arc<AtomicUsize>);

/// A handover under way, until it is dropped.
pub struct Departure(Departures);

impl Departures {
    /// One begins.
    #[must_use]
    pub fn begin(&self) -> Departure {
        self.0.fetch_add(1, Ordering::SeqCst);
        Departure(self.clone())
    }

    /// Whether one is under way.
    #[must_use]
    pub fn any(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 0
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The daemon as the streams of one image see it.
struct Owning {
    daemon: Arc<Daemon>,
    image: Arc<Image>,
}

impl OwnerSide for Owning {
    fn memory(&self) -> Option<Arc<dyn Memory>> {
        self.image.status().memory
    }

    fn harvest(&self) -> Option<PageSet> {
        // Whoever holds it longer than a moment moves, starts or stops it.
        let mut slot = self.image.slot.try_lock().ok()?;
        slot.machine.as_mut()?.as_machine().harvest().ok()
    }

    fn request(&self, expects: Option<u128>) -> Result<Follow, String> {
        let record = self.daemon.existing(&self.image.user).map_err(|error| error.message)?.record;
        if record.owner != self.daemon.me || record.wanted != Wanted::Running {
            return Err("its machine does not run at this host".to_owned());
        }
        if let Some(origin) = &record.disk_origin {
            return Err(format!("some of its disk is at host {} still", origin.host));
        }
        let slot = self.image.slot.blocking_lock();
        let machine = slot.machine.as_ref().ok_or("its machine does not run at this host")?;
        Ok(Follow {
            user: self.image.user.clone(),
            term: record.term,
            geometry: machine.memory().geometry(),
            base: machine.base(),
            expects,
        })
    }

    fn connect(&self, host: &HostName) -> Result<Box<dyn Link>, String> {
        self.daemon.link_to(host, Purpose::Mirror, CONNECT)
    }

    fn limit(&self) -> Option<Rate> {
        let limit = self.daemon.config.replicate.max_rate?;
        let streams =
            self.daemon.local().iter().map(|image| image.mirrors.streams.hosts().len()).sum::<usize>();
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        Some(Rate::bytes_per_s(limit.bytes_per_second() as f64 / streams.max(1) as f64))
    }

    fn is_busy(&self) -> bool {
        self.daemon.leaving.any()
    }

    fn sent(&self, host: &HostName, stats: &EpochStats, lag: Duration) {
        let took = stats.sending + stats.acknowledged;
        if stats.bytes_wire >= MEASURES && self.daemon.config.replicate.max_rate.is_none() && !took.is_zero()
        {
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            self.daemon.link_carried(host, stats.bytes_wire as f64 / took.as_secs_f64());
        }
        self.daemon.metrics.observe("kage_replica_lag_seconds", &[], lag);
        self.daemon.metrics.add("kage_replica_bytes_total", &[("kind", "mirror")], stats.bytes_wire);
    }

    fn found(&self, pages: u64) {
        let bytes = pages * (PAGE_SIZE as u64 + RECORD);
        self.daemon.metrics.add("kage_replica_bytes_total", &[("kind", "naive")], bytes);
    }
}

impl Daemon {
    /// From now on keeps mirrors of a machine that this host owns at exactly those hosts, the most important first;
    /// returns at once. Those elsewhere are dropped. What an operator has pinned goes before.
    pub(crate) fn mirror_to(self: &Arc<Self>, user: &UserName, hosts: &[HostName]) {
        let Some(image) = self.known(user) else { return };
        image.mirrors.wish().chosen = hosts.to_vec();
        self.keep_mirrors(&image);
    }

    /// Pins the mirrors of a machine by hand, or gives the choice back.
    pub(crate) fn pin_mirrors(self: &Arc<Self>, image: &Arc<Image>, hosts: Option<Vec<HostName>>) {
        image.mirrors.wish().pinned = hosts;
        self.keep_mirrors(image);
    }

    /// Keeps the mirrors that are wanted, where the machine runs here.
    pub(crate) fn keep_mirrors(self: &Arc<Self>, image: &Arc<Image>) {
        let mut hosts = image.mirrors.wanted();
        if image.status().memory.is_none() {
            hosts.clear();
        }
        let seen = self.seen.borrow().clone();
        hosts.retain(|host| *host != self.me && seen.hosts.contains_key(host));
        for host in image.mirrors.streams.want(&hosts) {
            let owning = Owning { daemon: self.clone(), image: image.clone() };
            let spawned = std::thread::Builder::new()
                .name("kage-mirror".to_owned())
                .spawn(move || owning.image.mirrors.streams.run(&owning, &host));
            if let Err(error) = spawned {
                tracing::warn!(%error, user = %image.user, "a mirror is not kept");
            }
        }
    }

    /// Opens a link to another host; blocks.
    ///
    /// # Errors
    /// Why not, in words.
    pub(crate) fn link_to(
        &self,
        host: &HostName,
        purpose: Purpose,
        patience: Duration,
    ) -> Result<Box<dyn Link>, String> {
        let address = self.address(host).map_err(|error| error.message)?;
        let hello = Hello::new(self.me.clone(), purpose);
        tls::connect(address, host, self.peers.identity().links(), &hello, patience)
            .map(|link| Box::new(link) as Box<dyn Link>)
            .map_err(|error| format!("host {host} at {address}: {error}"))
    }

    /// The mirrors of a machine that this host owns, as they are now.
    pub(crate) fn replicas(&self, user: &UserName) -> Vec<Replica> {
        let Some(image) = self.known(user) else { return Vec::new() };
        let views = image.mirrors.streams.views();
        let there = views.into_iter().filter(|view| view.note.is_none() && view.epoch.0 > 0);
        let replicas = there.map(|view| Replica {
            host: view.host,
            kind: ReplicaKind::Mirror,
            watermark: None,
            lag_ms: view.lag.as_secs_f64() * 1e3,
            missing_bytes: view.missing_bytes,
            handover_ms: view.estimate.blackout.as_secs_f64() * 1e3,
            handover_bytes: view.estimate.bytes_wire,
        });
        replicas.collect()
    }
}

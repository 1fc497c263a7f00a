//! The daemon learns where users go, and keeps mirrors where they may be next.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use http::Method;
use kage_directory::ApRecord;
use kage_machine::{HostName, UserName, identity::ApName};
use kage_replicate::{
    choose::{Budget, Scene, choose},
    predict::{Place, Places},
};
use serde_json::json;

use super::{Kept, Learned, Outlook};
use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{HostChance, NextView, PredictionView, State},
    },
    config::Model,
    events::now_ms,
    http::Call,
    lifecycle::{Daemon, blocking},
    routes::Records,
};

/// Between two writes of what was learned.
const WRITE: Duration = Duration::from_secs(3);

/// Between two looks at all mirrors, in writes: the time left at an access point changes where its user goes next.
const PLAN: u32 = 4;

/// How long a former owner may take to tell what it knows, and how long it may wait for its own former owner.
const TELL: Duration = Duration::from_secs(3);
const WAIT: Duration = Duration::from_secs(2);

/// How much of a forecast is shown.
const SHOWN: usize = 16;

impl Daemon {
    fn predicts(&self) -> bool {
        self.config.replicate.model != Model::Off
    }

    /// Takes in what the directory says now. Hosts and access points that come and go, and hosts that are cordoned,
    /// change where mirrors belong.
    pub(crate) fn site_seen(self: &Arc<Self>, records: Records) {
        let before = self.seen.borrow().clone();
        let (moved, changed) = (before.aps != records.aps, before.hosts != records.hosts);
        if moved {
            let place = |ap: &ApRecord| Place { host: ap.host.clone(), position_m: ap.position_m };
            self.predictions.set_places(records.aps.iter().map(|(id, ap)| (id.clone(), place(ap))).collect());
        }
        self.seen.send_replace(Arc::new(records));
        if moved || changed {
            let daemon = self.clone();
            self.runtime.spawn_blocking(move || daemon.plan_all_mirrors());
        }
    }

    /// Takes in that a user is at an access point, before anything is done about it; blocks.
    pub(crate) fn learn(self: &Arc<Self>, user: &UserName, ap: &ApName, at_ms: u64) {
        if !self.predicts() {
            return;
        }
        if let Some(learned) = self.predictions.arrived(user, ap, at_ms) {
            self.tell_prediction(user, &learned);
        }
        // What is about to follow takes what mirrors there are; its new owner chooses.
        if self.predictions.places().get(ap).is_none_or(|place| place.host == self.me) {
            self.plan_mirrors(user);
        }
    }

    /// Takes in that a user has left, or wants no machine; blocks.
    pub(crate) fn learn_left(self: &Arc<Self>, user: &UserName) {
        if self.predicts() {
            self.predictions.left(user, now_ms());
            if self.config.replicate.followers > 0 {
                self.mirror_to(user, &[]);
            }
        }
    }

    /// Writes a change of access point into figures and events: how it was foreseen, and what was done for it.
    fn tell_prediction(self: &Arc<Self>, user: &UserName, learned: &Learned) {
        let result = match learned.rank {
            Some(0) => "hit1",
            Some(1 | 2) => "hitk",
            Some(_) | None => "miss",
        };
        self.metrics.add("kage_prediction_total", &[("result", result)], 1);
        let host = self.predictions.places().get(&learned.ap).map(|place| place.host.clone());
        let elsewhere = host.as_ref().filter(|host| **host != self.me);
        let replica =
            elsewhere.and_then(|host| self.replicas(user).into_iter().find(|replica| replica.host == *host));
        let details = json!({
            "ap": learned.ap,
            "to": host,
            "rank": learned.rank.map(|rank| u32::from(rank) + 1),
            "mirror": elsewhere.map(|_| replica.is_some()),
            "missing_bytes": replica.map(|replica| replica.missing_bytes),
        });
        self.events.emit("predicted", Some(user), details);
    }

    /// Chooses the hosts that get mirrors of a machine that runs here; blocks. While it moves, or is about to, they stay
    /// as they are.
    pub(crate) fn plan_mirrors(self: &Arc<Self>, user: &UserName) {
        if let Some(hosts) = self.wanted_mirrors(user) {
            self.mirror_to(user, &hosts);
        }
    }

    /// The hosts that get mirrors of a machine; `None` where it does not run here, or none are made.
    pub(super) fn wanted_mirrors(self: &Arc<Self>, user: &UserName) -> Option<Vec<HostName>> {
        let replicate = &self.config.replicate;
        if replicate.followers == 0 || !self.predicts() {
            return None;
        }
        let image = self.known(user)?;
        let status = image.status();
        let settled = status.state == State::Running && !image.following.has_goal();
        let memory = status.memory.filter(|_| settled)?;
        let seen = self.seen.borrow().clone();
        let usable: BTreeSet<_> = seen
            .hosts
            .iter()
            .filter(|(name, record)| **name != self.me && !record.cordoned)
            .map(|(name, _)| name.clone())
            .collect();
        let Outlook { at, forecast, .. } = self.predictions.outlook(user, now_ms());
        let places = self.predictions.places();
        let here = at.as_ref().and_then(|at| places.get(at));
        let near = here.map(|here| nearest(&places, here)).unwrap_or_default();
        let followers = image.mirrors.streams.hosts();
        let former = image.following.former(Instant::now());
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let bytes_per_s = replicate.max_rate.map(|rate| rate.bytes_per_second() as f64);
        Some(choose(&Scene {
            owner: &self.me,
            user_at: here.map(|here| &here.host),
            likely: forecast.as_ref().map_or(&[], |forecast| &forecast.hosts),
            left_s: forecast.as_ref().and_then(|forecast| forecast.left_s),
            near: &near,
            followers: &followers,
            former: former.as_ref().map(|(host, since)| (host, *since)),
            usable: &usable,
            machine_bytes: memory.geometry().memory_bytes(),
            budget: Budget {
                mirrors: usize::from(replicate.followers),
                memory_bytes: replicate.max_memory.map_or(u64::MAX, |size| size.0),
                bytes_per_s,
            },
        }))
    }

    /// Chooses anew for every machine here; blocks.
    pub(crate) fn plan_all_mirrors(self: &Arc<Self>) {
        if self.config.replicate.followers > 0 && self.predicts() {
            for image in self.local() {
                self.plan_mirrors(&image.user);
            }
        }
    }

    /// Writes what was learned, and looks after mirrors. Ends with the daemon.
    pub async fn look_ahead(daemon: Weak<Self>) {
        let mut ticks = 0_u32;
        loop {
            tokio::time::sleep(WRITE).await;
            let Some(daemon) = daemon.upgrade() else { return };
            ticks = ticks.wrapping_add(1);
            let work = move || {
                daemon.predictions.write();
                if ticks.is_multiple_of(PLAN) {
                    daemon.plan_all_mirrors();
                }
                Ok(())
            };
            if let Err(error) = blocking(work).await {
                tracing::error!(%error, "nothing was looked ahead for");
            }
        }
    }

    /// Asks the host that had a machine for what it knows of its user, in the background. Events wait for the answer.
    pub(crate) fn ask_for_history(self: &Arc<Self>, user: &UserName, former: &HostName) {
        if !self.predicts() || *former == self.me {
            return;
        }
        self.predictions.ask(user);
        let (daemon, user, former) = (self.clone(), user.clone(), former.clone());
        self.runtime.spawn(async move {
            let answer = daemon.history_of(&user, &former).await.unwrap_or_else(|error| {
                tracing::info!(%error, %user, %former, "what its former owner knows of a user stays there");
                None
            });
            if let (Some(kept), Some(image)) = (&answer, daemon.known(&user)) {
                image.following.knows(kept.last_ms());
            }
            let work = move || {
                for learned in daemon.predictions.answered(&user, answer) {
                    daemon.tell_prediction(&user, &learned);
                }
                daemon.plan_mirrors(&user);
                Ok(())
            };
            if let Err(error) = blocking(work).await {
                tracing::error!(%error, "what was learned of a user was not taken over");
            }
        });
    }

    async fn history_of(&self, user: &UserName, former: &HostName) -> Result<Option<Kept>, ErrorBody> {
        let call = Call::new(Method::GET, format!("/v1/images/{user}/history")).patience(TELL);
        let answer = self.peers.call(former, self.address(former)?, &call).await?;
        if !answer.status.is_success() {
            let error = answer.into_error();
            return if error.code == Code::NotFound { Ok(None) } else { Err(error) };
        }
        let kept = Kept::from_foreign(&answer.body, now_ms());
        kept.map(Some)
            .map_err(|reason| ErrorBody::failed(format!("host {former}'s answer is refused: {reason}")))
    }

    /// What this host knows of a user, for the next owner of the machine.
    ///
    /// # Errors
    /// [`Code::NotFound`] where that is nothing.
    pub(crate) async fn tell_history(self: &Arc<Self>, user: &UserName) -> Result<Vec<u8>, ErrorBody> {
        // What this host was told of it goes on to the next.
        let _ = tokio::time::timeout(WAIT, self.predictions.settled(user)).await;
        let (daemon, user) = (self.clone(), user.clone());
        blocking(move || {
            let known = daemon.predictions.for_next_owner(&user);
            known.ok_or_else(|| ErrorBody::new(Code::NotFound, format!("nothing is known of {user} here")))
        })
        .await
    }

    /// Where the user of a machine that this host owns may be next.
    ///
    /// # Errors
    /// None of its own.
    pub(crate) async fn prediction(self: &Arc<Self>, user: &UserName) -> Result<PredictionView, ErrorBody> {
        if !self.predicts() {
            return Ok(view(user, Outlook::default()));
        }
        // A machine that has just come brings more.
        let _ = tokio::time::timeout(WAIT, self.predictions.settled(user)).await;
        let (daemon, user) = (self.clone(), user.clone());
        blocking(move || Ok(view(&user, daemon.predictions.outlook(&user, now_ms())))).await
    }
}

fn view(user: &UserName, outlook: Outlook) -> PredictionView {
    let Outlook { at, forecast, score } = outlook;
    let (next, hosts, left_s) =
        forecast.map(|forecast| (forecast.next, forecast.hosts, forecast.left_s)).unwrap_or_default();
    let next = next.into_iter().take(SHOWN);
    let hosts = hosts.into_iter().take(SHOWN);
    PredictionView {
        user: user.clone(),
        at,
        next: next
            .map(|next| NextView { ap: next.ap, host: next.host, probability: next.probability })
            .collect(),
        hosts: hosts.map(|(host, probability)| HostChance { host, probability }).collect(),
        left_s,
        window: score.window,
        hit1: score.hit1,
        hit3: score.hit3,
    }
}

/// Other hosts by the distance of their nearest access point. One without a position of its own is at the same as
/// others, and says nothing.
pub(crate) fn nearest(places: &Places, here: &Place) -> Vec<HostName> {
    let mut hosts: BTreeMap<&HostName, f64> = BTreeMap::new();
    for place in places.values().filter(|place| place.host != here.host) {
        let [x, y] = [0, 1].map(|axis| place.position_m[axis] - here.position_m[axis]);
        let distance = x.hypot(y);
        if distance > 0.0 {
            let least = hosts.entry(&place.host).or_insert(f64::INFINITY);
            *least = least.min(distance);
        }
    }
    let mut hosts: Vec<_> = hosts.into_iter().collect();
    hosts.sort_by(|a, b| a.1.total_cmp(&b.1));
    hosts.into_iter().map(|(host, _)| host.clone()).collect()
}

//! A machine follows its user: carries out what [`super::chase`] decides, until it is there.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use kage_machine::{HostName, UserName};
use serde_json::json;
use tokio::sync::watch;

use super::{
    chase::{AGAIN, Chase, MOST_TRIES, Place, Rest, Scene, Step},
    was_cancelled,
};
use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{MigrateRequest, MoveOutcome, MoveReport, RoamAction, RoamRequest},
    },
    events::now_ms,
    lifecycle::{self, Daemon, Image, blocking},
};

/// An image's chase, and who hears of it.
pub struct Following {
    chase: Mutex<Chase>,
    /// Held by whoever takes a step.
    turn: tokio::sync::Mutex<()>,
    /// Somebody takes one step after another.
    busy: AtomicBool,
    /// Bumped whenever the user is seen.
    seen: watch::Sender<u64>,
    over: watch::Sender<Over>,
}

/// What the last goal came to.
#[derive(Clone)]
pub struct Over {
    /// Its number; 0 before the first.
    pub goal: u64,
    /// What it came to. A machine that was kept is said to be so while the next try is still to come.
    pub came_to: CameTo,
}

/// What followed, with the last move's report.
pub type CameTo = Result<(RoamAction, Option<MoveReport>), ErrorBody>;

/// What a step was.
#[derive(Clone, Debug)]
pub enum Progress {
    /// There is no goal any more.
    Rest(Rest),
    /// The machine is another host's by now.
    PassOn(Place),
    /// A move away from here was cancelled, and has to end.
    Recalls(String),
    /// A move to elsewhere has to end first.
    Awaits(String),
    /// A move to the goal is under way, by hand.
    Comes(String),
    /// One was begun.
    Begun(String),
    /// Nothing is done before then.
    Waits(Instant),
}

impl Default for Following {
    fn default() -> Self {
        Self {
            chase: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            busy: AtomicBool::new(false),
            seen: watch::Sender::new(0),
            over: watch::Sender::new(Over { goal: 0, came_to: Ok((RoamAction::Stays, None)) }),
        }
    }
}

impl Following {
    fn chase(&self) -> MutexGuard<'_, Chase> {
        self.chase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Chase::seen`]. Whoever waits for another goal is told that it is superseded.
    pub fn seen(&self, place: Place, under_way: &[(String, HostName)], now: Instant) -> Option<u64> {
        let goal = self.chase().seen(place, under_way, now)?;
        let message = "the user is elsewhere by now; the machine follows there";
        self.end_open(goal - 1, Err(ErrorBody::new(Code::Cancelled, message)));
        self.seen.send_modify(|count| *count += 1);
        Some(goal)
    }

    /// Whether the machine is to go elsewhere, or is on its way.
    #[must_use]
    pub fn has_goal(&self) -> bool {
        self.chase().goal().is_some()
    }

    /// Whether there is anything to do for it.
    #[cfg(test)]
    pub fn is_busy(&self) -> bool {
        self.has_goal() || self.busy.load(Ordering::SeqCst)
    }

    /// What goals come to.
    #[must_use]
    pub fn over(&self) -> watch::Receiver<Over> {
        self.over.subscribe()
    }

    /// Tells what a goal came to.
    fn end(&self, goal: u64, came_to: CameTo) {
        self.over.send_if_modified(|over| {
            let news = goal >= over.goal;
            if news {
                *over = Over { goal, came_to };
            }
            news
        });
    }

    /// Tells what a goal came to, if nothing was told yet.
    fn end_open(&self, goal: u64, came_to: CameTo) {
        self.over.send_if_modified(|over| {
            let news = goal > over.goal;
            if news {
                *over = Over { goal, came_to };
            }
            news
        });
    }

    /// The machine has gone to a host.
    pub fn left(&self, to: &HostName) {
        self.chase().left(to, Instant::now());
    }

    /// The machine has come from a host.
    pub fn came(&self, from: &HostName) {
        self.chase().came(from, Instant::now());
    }

    /// A former owner has seen the user at that time.
    pub fn knows(&self, at_ms: u64) {
        self.chase().knows(at_ms);
    }

    /// The host that the machine last came from, and how long ago.
    #[must_use]
    pub fn former(&self, now: Instant) -> Option<(HostName, Duration)> {
        self.chase().former(now)
    }
}

impl Daemon {
    /// Takes one step, if the user was seen elsewhere.
    ///
    /// # Errors
    /// When the directory does not answer; when a move could not begin, which counts as a try.
    pub(super) async fn advance(self: &Arc<Self>, image: &Arc<Image>) -> Result<Progress, ErrorBody> {
        let _turn = image.following.turn.lock().await;
        loop {
            let (daemon, user) = (self.clone(), image.user.clone());
            let record = blocking(move || daemon.existing(&user)).await?.record;
            let under_way = self.operations.under_way(&image.user);
            let begun = image.status().operation;
            let scene =
                Scene { me: &self.me, record: &record, under_way: &under_way, begun: begun.as_deref() };
            let (step, goal) = {
                let mut chase = image.following.chase();
                let step = chase.step(&scene, self.config.dwell.duration(), Instant::now());
                (step, chase.last_goal())
            };
            return Ok(match step {
                Step::Cancel(ids) => {
                    for id in ids {
                        self.operations.cancel(&id)?;
                        self.events.emit("cancel", Some(&image.user), json!({ "operation": id }));
                    }
                    continue;
                }
                Step::Rest(rest) => Progress::Rest(rest),
                Step::PassOn(place) => {
                    self.runtime.spawn(self.clone().tell_next_owner(image.clone(), goal, place.clone()));
                    Progress::PassOn(place)
                }
                Step::Await(id) if image.following.chase().stays(&self.me) => Progress::Recalls(id),
                Step::Await(id) => Progress::Awaits(id),
                Step::Comes(id) if image.following.chase().has_begun(&id) => Progress::Begun(id),
                Step::Comes(id) => Progress::Comes(id),
                Step::Wait(until) => Progress::Waits(until),
                Step::Begin(host) if self.is_cordoned(&host) => {
                    let error = ErrorBody::new(Code::Busy, format!("host {host} is cordoned"));
                    self.came_to_nothing(image, &error.message);
                    return Err(error);
                }
                Step::Begin(host) => {
                    let request = MigrateRequest { to: Some(host), ..MigrateRequest::default() };
                    match self.begin_move(&image.user, &request).await {
                        Ok(operation) => {
                            image.following.chase().began(&operation.id);
                            Progress::Begun(operation.id)
                        }
                        Err(error) => {
                            self.came_to_nothing(image, &error.message);
                            return Err(error);
                        }
                    }
                }
            });
        }
    }

    /// Takes one step after another in the background, until there is no goal.
    pub(super) fn keep_following(self: &Arc<Self>, image: &Arc<Image>) {
        let busy = |image: &Image| image.following.busy.swap(true, Ordering::SeqCst);
        if !image.following.has_goal() || busy(image) {
            return;
        }
        let (daemon, image) = (self.clone(), image.clone());
        self.runtime.spawn(async move {
            loop {
                daemon.follow_on(&image).await;
                image.following.busy.store(false, Ordering::SeqCst);
                // Whoever set a goal in between has found this at work.
                if !image.following.has_goal() || busy(&image) {
                    return;
                }
            }
        });
    }

    async fn follow_on(self: &Arc<Self>, image: &Arc<Image>) {
        let following = &image.following;
        loop {
            let mut seen = following.seen.subscribe();
            let Some(goal) = following.chase().goal() else { return };
            let progress = match self.advance(image).await {
                Ok(progress) => progress,
                Err(error) => {
                    following.end(goal, Err(error));
                    let _ = tokio::time::timeout(lifecycle::AGAIN, seen.changed()).await;
                    continue;
                }
            };
            match progress {
                Progress::Rest(Rest::There) => following.end(goal, Ok((RoamAction::Stays, None))),
                Progress::Rest(Rest::Stopped) => following.end(goal, Ok((RoamAction::Stopped, None))),
                Progress::Rest(Rest::Overruled) => {
                    let message = "the machine is moved elsewhere by hand";
                    following.end(goal, Err(ErrorBody::new(Code::Cancelled, message)));
                }
                Progress::PassOn(_) => {}
                Progress::Waits(until) => {
                    let _ = tokio::time::timeout_at(until.into(), seen.changed()).await;
                }
                Progress::Recalls(id) | Progress::Awaits(id) => tokio::select! {
                    _ = self.operations.ended(&id, self.move_patience()) => {}
                    _ = seen.changed() => {}
                    () = self.gone(image) => {}
                },
                Progress::Comes(id) | Progress::Begun(id) => tokio::select! {
                    outcome = self.await_move(&id) => self.move_ended(image, &id, goal, outcome),
                    _ = seen.changed() => {}
                },
            }
        }
    }

    /// Waits until the directory shows that another host has taken the machine from this one.
    async fn gone(&self, image: &Image) {
        let term = image.status().term;
        let mut seen = self.seen.subscribe();
        let gone = seen.wait_for(|seen| {
            seen.images.get(&image.user).is_some_and(|record| record.owner != self.me && record.term > term)
        });
        if gone.await.is_err() {
            std::future::pending().await
        }
    }

    /// Takes in how a move to the goal has ended.
    fn move_ended(&self, image: &Image, id: &str, goal: u64, outcome: Result<MoveReport, ErrorBody>) {
        let cancelled = match &outcome {
            Ok(report) => was_cancelled(report),
            Err(error) => error.code == Code::Cancelled,
        };
        let nothing = match &outcome {
            Ok(report) if report.outcome == MoveOutcome::HandedOver => None,
            Ok(report) => Some(report.reason.clone().unwrap_or_else(|| report.outcome.to_string())),
            Err(error) => Some(error.message.clone()),
        };
        if cancelled {
            image.following.chase().cancelled(id, goal);
        } else if let Some(reason) = nothing {
            self.came_to_nothing(image, &reason);
        }
        image.following.end(goal, outcome.map(|report| (RoamAction::Moves, Some(report))));
    }

    fn came_to_nothing(&self, image: &Image, reason: &str) {
        if image.following.chase().failed(Instant::now()) {
            let details = json!({ "reason": reason, "tries": MOST_TRIES });
            self.events.emit("not_followed", Some(&image.user), details);
        }
    }

    /// Tells the machine's new owner where its user is. That may be this host again by then, so that this leads to itself.
    fn tell_next_owner(
        self: Arc<Self>,
        image: Arc<Image>,
        goal: u64,
        place: Place,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let mut tries = 1;
            let came_to = loop {
                let outcome = self.tell_owner(&roam_request(&image.user, &place), &place.host, 0).await;
                let again = outcome.as_ref().is_err_and(|error| {
                    matches!(error.code, Code::OwnershipLost | Code::Busy | Code::Unreachable)
                });
                if !again || tries >= MOST_TRIES {
                    break outcome;
                }
                tries += 1;
                tokio::time::sleep(AGAIN).await;
            };
            if let Err(error) = &came_to
                && error.code != Code::Cancelled
            {
                tracing::warn!(%error, user = %image.user, to = %place.host, "a machine may not follow its user");
            }
            image.following.end_open(goal, came_to.map(|reply| (reply.action, reply.report)));
        })
    }
}

fn roam_request(user: &UserName, place: &Place) -> RoamRequest {
    RoamRequest {
        user: user.clone(),
        ap: place.ap.clone(),
        device: None,
        wait: true,
        age_ms: now_ms().saturating_sub(place.at_ms),
        at_ms: Some(place.at_ms),
    }
}

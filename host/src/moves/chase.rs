//! Following a user: where the machine is to be, and the next step to get it there. Pure; time is an argument.
//!
//! ```text
//!              seen elsewhere                    handed over
//!  (no goal) ────────────────▶ goal ─▶ moving ─────────────────▶ (no goal)
//!      ▲                      │  ▲ ▲      │ kept: again, later
//!      │ user here, stopped,  │  │ └──────┘
//!      └──────────────────────┘  └─ dwelling (ping-pong)
//!        overruled, given up
//! ```
//!
//! Each owner has one [`Chase`] per image, and asks for a [`Step`] whenever something has changed. Rules:
//!
//! - The latest place counts, by the time of its event: word of an earlier one is not acted on, however late it comes.
//! - A move that has begun ends as it would have, unless the machine is to stay: a user who walks fast would else
//!   never be followed. Moves to elsewhere that only wait for their turn are cancelled. Then the goal is gone for.
//! - The machine went elsewhere with the goal open: its new owner is told of it.
//! - A move that comes to nothing is tried again, [`MOST_TRIES`] times, [`AGAIN`] later and then at twice the pause.
//! - *Ping-pong*: the machine went from here to a host, was back within [`QUICK`], and is to go there once more within
//!   [`QUICK`]. It goes once the user has been there for the dwell time. A walk through other hosts, or a single
//!   return, is never held up, and neither is anybody who stays.
//! - Whoever moves or stops a machine by hand after its user was seen is right.

use std::time::{Duration, Instant};

use kage_directory::{ImageRecord, Wanted};
use kage_machine::{HostName, identity::ApName};

/// How soon a machine has to come and go for that to be ping-pong. Between two access points that cover one place
/// devices change every few seconds; people who turn round take longer.
pub const QUICK: Duration = Duration::from_secs(10);

/// How often one goal is gone for.
pub const MOST_TRIES: u32 = 10;

/// Pause before a move that came to nothing is tried again for the first time.
pub const AGAIN: Duration = Duration::from_millis(300);

/// Longest such pause.
pub const LATEST_AGAIN: Duration = Duration::from_secs(5);

/// Where a machine is to be, and what is known of its last moves.
#[derive(Clone, Debug, Default)]
pub struct Chase {
    goal: Option<Goal>,
    /// Counts goals.
    serial: u64,
    /// When the user was last seen, in milliseconds since 1970.
    seen_ms: u64,
    /// The last move from here.
    left: Option<(HostName, Instant)>,
    /// The last arrival here.
    came: Option<(HostName, Instant)>,
    /// The moves that were cancelled last for the user's sake.
    recalled: Vec<String>,
    /// The move that was begun last for it.
    begun: Option<String>,
}

#[derive(Clone, Debug)]
struct Goal {
    /// As last seen.
    place: Place,
    /// Since when the user is at that host.
    since: Instant,
    /// Nothing was done about it yet.
    fresh: bool,
    /// Moves to elsewhere that were under way when it was set.
    before: Vec<String>,
    tries: u32,
    again: Option<Instant>,
}

/// What is under way.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// This host.
    pub me: &'a HostName,
    /// The image's record.
    pub record: &'a ImageRecord,
    /// Moves that have not ended, and where they lead.
    pub under_way: &'a [(String, HostName)],
    /// Which of them has begun.
    pub begun: Option<&'a str>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing: there is no goal any more.
    Rest(Rest),
    /// To tell the owner, which is another host by now. The goal is the owner's from here on.
    PassOn(Place),
    /// To cancel these moves, then to ask again.
    Cancel(Vec<String>),
    /// To ask again once this move to elsewhere is over.
    Await(String),
    /// To ask again once this move to the goal is over, or to say how it failed.
    Comes(String),
    /// To ask again then.
    Wait(Instant),
    /// To begin a move there.
    Begin(HostName),
}

/// Why there is no goal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// The machine is there, or there never was one.
    There,
    /// It is stopped; nobody starts it by walking.
    Stopped,
    /// Somebody moves it elsewhere by hand.
    Overruled,
}

/// A place where a user was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The access point.
    pub ap: ApName,
    /// Its host.
    pub host: HostName,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
}

impl Chase {
    /// The user was seen. The number of the goal that this is, or `None` where something later is known. `now` is the
    /// time of the event.
    pub fn seen(&mut self, place: Place, under_way: &[(String, HostName)], now: Instant) -> Option<u64> {
        if place.at_ms < self.seen_ms {
            return None;
        }
        self.seen_ms = place.at_ms;
        let elsewhere = under_way.iter().filter(|(_, target)| *target != place.host);
        let before = elsewhere.map(|(id, _)| id.clone()).collect();
        match &mut self.goal {
            Some(goal) if goal.place.host == place.host => {
                (goal.place, goal.before, goal.fresh) = (place, before, true);
            }
            former => {
                // Whoever did not stay for the dwell time goes on with the ping-pong.
                if let Some(former) = former
                    && is_ping_pong(self.left.as_ref(), self.came.as_ref(), &former.place.host, now)
                {
                    for last in [&mut self.left, &mut self.came].into_iter().flatten() {
                        last.1 = now;
                    }
                }
                self.serial += 1;
                *former = Some(Goal { place, since: now, fresh: true, before, tries: 0, again: None });
            }
        }
        Some(self.serial)
    }

    /// Somebody who had the machine before has seen the user at that time.
    pub fn knows(&mut self, at_ms: u64) {
        self.seen_ms = self.seen_ms.max(at_ms);
    }

    /// The number of the goal there is.
    #[must_use]
    pub fn goal(&self) -> Option<u64> {
        self.goal.as_ref().map(|_| self.serial)
    }

    /// The number of the goal there was last; 0: none yet.
    #[must_use]
    pub const fn last_goal(&self) -> u64 {
        self.serial
    }

    /// Whether the goal is that it stays at this host.
    #[must_use]
    pub fn stays(&self, me: &HostName) -> bool {
        self.goal.as_ref().is_some_and(|goal| goal.place.host == *me)
    }

    /// The host that the machine last came from, and how long ago.
    #[must_use]
    pub fn former(&self, now: Instant) -> Option<(HostName, Duration)> {
        self.came.as_ref().map(|(from, at)| (from.clone(), now.saturating_duration_since(*at)))
    }

    /// The machine has gone from here.
    pub fn left(&mut self, to: &HostName, now: Instant) {
        self.left = Some((to.clone(), now));
    }

    /// The machine has come here.
    pub fn came(&mut self, from: &HostName, now: Instant) {
        self.came = Some((from.clone(), now));
    }

    /// A move to the goal was begun.
    pub fn began(&mut self, id: &str) {
        self.begun = Some(id.to_owned());
    }

    /// Whether that was the last one begun for the user's sake.
    #[must_use]
    pub fn has_begun(&self, id: &str) -> bool {
        self.begun.as_deref() == Some(id)
    }

    /// A move to the goal came to nothing; whether it is given up.
    pub fn failed(&mut self, now: Instant) -> bool {
        let Some(goal) = &mut self.goal else { return false };
        goal.tries += 1;
        if goal.tries >= MOST_TRIES {
            self.goal = None;
            return true;
        }
        let pause = AGAIN.saturating_mul(1 << (goal.tries - 1).min(8)).min(LATEST_AGAIN);
        goal.again = Some(now + pause);
        false
    }

    /// A move to this goal was cancelled. Who does that does not want the machine to follow, unless it was for the sake
    /// of a user who has come back since.
    pub fn cancelled(&mut self, id: &str, goal: u64) {
        if self.serial == goal && !self.recalled.iter().any(|recalled| recalled == id) {
            self.goal = None;
        }
    }

    /// The next step. `dwell` is how long a user has to stay where ping-pong leads to.
    pub fn step(&mut self, scene: &Scene<'_>, dwell: Duration, now: Instant) -> Step {
        let step = self.decide(scene, dwell, now);
        match &step {
            Step::Rest(_) | Step::PassOn(_) => self.goal = None,
            Step::Cancel(ids) => self.recalled.clone_from(ids),
            Step::Await(_) | Step::Comes(_) | Step::Wait(_) | Step::Begin(_) => {}
        }
        step
    }

    fn decide(&mut self, scene: &Scene<'_>, dwell: Duration, now: Instant) -> Step {
        let Self { goal: Some(goal), left, came, begun, .. } = self else { return Step::Rest(Rest::There) };
        let to = &goal.place.host;
        if scene.record.wanted == Wanted::Stopped {
            return Step::Rest(Rest::Stopped);
        }
        if scene.record.owner != *scene.me {
            return Step::PassOn(goal.place.clone());
        }
        let stays = to == scene.me;
        let mut elsewhere = scene.under_way.iter().filter(|(_, target)| target != to).map(|(id, _)| id);
        if std::mem::take(&mut goal.fresh) {
            // One that has begun ends as it would have, unless the machine is to stay.
            let over: Vec<_> =
                elsewhere.clone().filter(|id| stays || scene.begun != Some(id.as_str())).cloned().collect();
            if !over.is_empty() {
                return Step::Cancel(over);
            }
        }
        // One begun for the user's sake is nobody's order, even where the goal did not know of it yet.
        let ordered = |id: &String| !goal.before.contains(id) && begun.as_ref() != Some(id);
        if elsewhere.clone().any(ordered) {
            return Step::Rest(Rest::Overruled);
        }
        if let Some((id, _)) = scene.under_way.iter().find(|(_, target)| target == to) {
            return Step::Comes(id.clone());
        }
        if let Some(id) = elsewhere.next() {
            return Step::Await(id.clone());
        }
        if stays {
            return Step::Rest(Rest::There);
        }
        let dwelt = is_ping_pong(left.as_ref(), came.as_ref(), to, now).then(|| goal.since + dwell);
        match goal.again.max(dwelt).filter(|until| now < *until) {
            Some(until) => Step::Wait(until),
            None => Step::Begin(to.clone()),
        }
    }
}

/// Whether a machine that went from here and came back is to go to the same host once more, all of it quickly.
fn is_ping_pong(
    left: Option<&(HostName, Instant)>,
    came: Option<&(HostName, Instant)>,
    to: &HostName,
    now: Instant,
) -> bool {
    let (Some((went, left)), Some((from, came))) = (left, came) else { return false };
    let within =
        |from: Instant, to: Instant| to.checked_duration_since(from).is_some_and(|time| time < QUICK);
    went == to && from == to && within(*left, *came) && within(*came, now)
}

#[cfg(test)]
mod tests;

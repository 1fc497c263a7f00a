//! Where a user goes next: from the user's own habits, everybody's, and speed and direction. Pure; time is an argument.
//!
//! Online: whatever is asked is answered from what was seen before. Bounded: a history and what is known of
//! everybody take so much memory at most, however long they learn.
//!
//! ```text
//! visits, everybody, motion ──▶ experts ──▶ mixer ──▶ Forecast
//! ```
//! - [`visits`]: one user's past; [`everybody`]: what all users do.
//! - [`motion`]: speed and direction over positions. [`stay`]: the time left.
//! - [`experts`]: what each of them gives each candidate; [`mixer`]: how much each expert's word counts, by its success.
//! - [`markov`]: simple predictors to compare with; [`trial`]: scores predictors on a trace; [`campus`], [`fleet`]: make traces.
//!
//! Deliberately not here: which forecasts are worth a mirror.

use std::collections::BTreeMap;

use kage_machine::{HostName, identity::ApName};
use serde::{Deserialize, Serialize};

pub mod campus;
mod everybody;
mod experts;
pub mod fleet;
pub mod markov;
mod mixer;
mod motion;
mod stay;
pub mod trial;
mod visits;

#[cfg(test)]
mod tests;

pub use everybody::Everybody;
use experts::Field;
use mixer::{Own, Trust};
use visits::Visits;

/// Changes of access point that a [`Score`] is over.
const WINDOW: usize = 100;
/// Places of a forecast that count as found.
const FOUND: usize = 3;
/// Most access points in a forecast.
const MOST_NEXT: usize = 16;
/// Below that an access point is not worth naming.
const LEAST: f32 = 1e-4;

/// An access point.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Its nearest host.
    pub host: HostName,
    /// Where it stands, in metres. One that is not finite is taken for unknown.
    pub position_m: [f64; 2],
}

/// The site's access points.
pub type Places = BTreeMap<ApName, Place>;

/// What is known of one user: at most 16 KiB serialised. Safe to use whoever wrote it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "Stored")]
pub struct History {
    visits: Visits,
    own: Own,
    trust: Trust,
    /// Share of the last changes that led to an access point no expert had thought of.
    surprise: f32,
    /// Of the last changes of access point: at which place of the forecast before it the new one stood, from 0.
    ranks: Vec<Option<u8>>,
}

/// The same as written, by whoever.
#[derive(Deserialize)]
struct Stored {
    visits: Visits,
    own: Own,
    trust: Trust,
    surprise: f32,
    ranks: Vec<Option<u8>>,
}

impl From<Stored> for History {
    fn from(stored: Stored) -> Self {
        let Stored { visits, own, trust, surprise, mut ranks } = stored;
        ranks.drain(..ranks.len().saturating_sub(WINDOW));
        ranks.shrink_to_fit();
        let surprise = if surprise.is_finite() { surprise.clamp(0.0, 1.0) } else { 0.0 };
        Self { visits: visits.checked(), own: own.checked(), trust: trust.checked(), surprise, ranks }
    }
}

/// Where a user may be next.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// Where the user is.
    pub at: ApName,
    /// Access points, the likeliest first; they add up to at most 1.
    pub next: Vec<Next>,
    /// Hosts other than the current access point's, the likeliest first: each the sum of its access points.
    pub hosts: Vec<(HostName, f64)>,
    /// How much longer the user will be here, in seconds: half of the times less than that. Absent where nothing is known.
    pub left_s: Option<f64>,
}

/// A possible next access point.
#[derive(Clone, Debug, PartialEq)]
pub struct Next {
    /// Which.
    pub ap: ApName,
    /// Its host.
    pub host: HostName,
    /// How likely.
    pub probability: f64,
}

/// How often forecasts were right.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Changes of access point that count.
    pub window: u32,
    /// Share of them found first in the forecast.
    pub hit1: f64,
    /// Share found among the first three.
    pub hit3: f64,
}

impl History {
    /// Takes in that the user is at an access point, at that time in milliseconds since 1970. Where that is another one
    /// than before, the place the forecast just before gave it, from 0; `Some(None)` where it gave none.
    pub fn arrived(
        &mut self,
        everybody: &mut Everybody,
        places: &Places,
        ap: &ApName,
        at_ms: u64,
    ) -> Option<Option<u8>> {
        let before = self.at().cloned();
        if before.as_ref() == Some(ap) {
            return None;
        }
        let rank = before.map(|before| {
            everybody.enter(&before, places);
            everybody.look_around(&before, places);
            let rank = self.learn(everybody, places, ap, at_ms);
            everybody.learn(&experts::situation(&self.visits, everybody, at_ms), ap, places);
            rank
        });
        if let Some(rank) = rank {
            if self.ranks.len() >= WINDOW {
                self.ranks.remove(0);
            }
            self.ranks.push(rank);
        }
        self.visits.arrived(ap, at_ms);
        everybody.enter(ap, places);
        everybody.look_around(ap, places);
        rank
    }

    /// Weighs the experts by what they said of a change; the place at which the forecast had it.
    fn learn(&mut self, everybody: &mut Everybody, places: &Places, ap: &ApName, at_ms: u64) -> Option<u8> {
        let field = experts::field(&self.visits, everybody, places, at_ms);
        let mixed = self.mix(everybody, &field);
        let probabilities = self.blend(everybody, &field, &mixed);
        let features = || field.candidates.iter().map(|candidate| &candidate.features);
        let came = field.candidates.iter().position(|candidate| candidate.ap == ap);
        self.surprise += (f32::from(u8::from(came.is_none())) - self.surprise) * 0.05;
        let came = came?;
        let gradient = mixer::gradient(features(), &mixed, came);
        self.trust.note(&mut everybody.trust, mixed[came], &field.candidates[came].features);
        everybody.weights.follow(field.kind, &mut self.own, &gradient);
        let mut ranked = order(&field, &probabilities).into_iter().take(FOUND);
        ranked.position(|at| at == came).and_then(|rank| u8::try_from(rank).ok())
    }

    /// Probabilities of candidates, as if no other were possible.
    fn weigh(&self, everybody: &Everybody, field: &Field<'_>) -> Vec<f32> {
        let mixed = self.mix(everybody, field);
        self.blend(everybody, field, &mixed)
    }

    /// The mix beside the experts that speak for themselves.
    fn blend(&self, everybody: &Everybody, field: &Field<'_>, mixed: &[f32]) -> Vec<f32> {
        let features = field.candidates.iter().map(|candidate| &candidate.features);
        self.trust.blend(&everybody.trust, mixed, features)
    }

    /// The mix of all experts.
    fn mix(&self, everybody: &Everybody, field: &Field<'_>) -> Vec<f32> {
        let weights = everybody.weights.for_case(field.kind, &self.own);
        mixer::softmax(&weights, field.candidates.iter().map(|candidate| &candidate.features))
    }

    /// The user has left.
    pub fn left(&mut self, at_ms: u64) {
        self.visits.left(at_ms);
    }

    /// Where the user was last seen; nowhere after it left.
    #[must_use]
    pub fn at(&self) -> Option<&ApName> {
        self.visits.at()
    }

    /// Where the user may be next.
    #[must_use]
    pub fn forecast(&self, everybody: &Everybody, places: &Places, now_ms: u64) -> Option<Forecast> {
        let at = self.at()?.clone();
        let field = experts::field(&self.visits, everybody, places, now_ms);
        let probabilities = self.weigh(everybody, &field);
        let known = f64::from(1.0 - self.surprise) * (1.0 - 1e-6);
        let likely = |at: usize| f64::from(probabilities[at]) * known;
        let here = places.get(&at).map(|place| &place.host);
        let mut hosts: Vec<(HostName, f64)> = Vec::new();
        let ranked = order(&field, &probabilities);
        for &at in &ranked {
            let host = &field.candidates[at].place.host;
            match hosts.iter_mut().find(|(known, _)| known == host) {
                Some((_, sum)) => *sum += likely(at),
                None if Some(host) != here => hosts.push((host.clone(), likely(at))),
                None => {}
            }
        }
        hosts.sort_by(|a, b| b.1.total_cmp(&a.1));
        let named = ranked.into_iter().take(MOST_NEXT).filter(|&at| probabilities[at] >= LEAST);
        let next = named.map(|at| {
            let candidate = &field.candidates[at];
            Next { ap: candidate.ap.clone(), host: candidate.place.host.clone(), probability: likely(at) }
        });
        Some(Forecast {
            at,
            next: next.collect(),
            hosts,
            left_s: stay::left_s(&self.visits, everybody, now_ms),
        })
    }

    /// How often forecasts for this user were right.
    #[must_use]
    pub fn score(&self) -> Score {
        let share = |most: usize| {
            let hits =
                self.ranks.iter().filter(|rank| rank.is_some_and(|rank| usize::from(rank) < most)).count();
            hits as f64 / self.ranks.len().max(1) as f64
        };
        Score {
            window: u32::try_from(self.ranks.len()).unwrap_or(u32::MAX),
            hit1: share(1),
            hit3: share(FOUND),
        }
    }
}

/// Candidates by their probabilities, the likeliest first.
fn order(field: &Field<'_>, probabilities: &[f32]) -> Vec<usize> {
    let mut ranked: Vec<usize> = (0..field.candidates.len()).collect();
    ranked.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
    ranked
}

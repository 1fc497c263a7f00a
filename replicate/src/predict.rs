//! Where a user goes next: from the user's own habits, everybody's, and speed and direction. Pure; time is an argument.
//!
//! Online: whatever is asked is answered from what was seen before. Bounded: a history and what is known of
//! everybody take so much memory at most, however long they learn.

use std::collections::BTreeMap;

use kage_machine::{HostName, identity::ApName};
use serde::{Deserialize, Serialize};

/// An access point.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Its nearest host.
    pub host: HostName,
    /// Where it stands, in metres.
    pub position_m: [f64; 2],
}

/// The site's access points.
pub type Places = BTreeMap<ApName, Place>;

/// What is known over all users of this host's access points.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Everybody {
    next: BTreeMap<ApName, BTreeMap<ApName, u32>>,
}

/// What is known of one user.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    at: Option<ApName>,
    /// Of the last changes of access point: at which place of the forecast before it the new one stood, from 0.
    ranks: Vec<Option<u8>>,
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
        let before = self.at.clone().filter(|before| before != ap);
        let rank = before.map(|before| {
            let forecast = self.forecast(everybody, places, at_ms);
            let next = forecast.iter().flat_map(|forecast| &forecast.next);
            let rank = next.take(3).position(|next| next.ap == *ap).and_then(|rank| u8::try_from(rank).ok());
            *everybody.next.entry(before).or_default().entry(ap.clone()).or_default() += 1;
            rank
        });
        self.ranks.extend(rank);
        self.at = Some(ap.clone());
        rank
    }

    /// The user has left.
    pub fn left(&mut self, _at_ms: u64) {
        self.at = None;
    }

    /// Where the user was last seen; nowhere after it left.
    #[must_use]
    pub const fn at(&self) -> Option<&ApName> {
        self.at.as_ref()
    }

    /// Where the user may be next.
    #[must_use]
    pub fn forecast(&self, everybody: &Everybody, places: &Places, _now_ms: u64) -> Option<Forecast> {
        let at = self.at.clone()?;
        let counts = everybody.next.get(&at).cloned().unwrap_or_default();
        let total: u32 = counts.values().sum();
        let mut next: Vec<_> = counts
            .into_iter()
            .filter_map(|(ap, count)| {
                let host = places.get(&ap)?.host.clone();
                Some(Next { ap, host, probability: f64::from(count) / f64::from(total.max(1)) })
            })
            .collect();
        next.sort_by(|a, b| b.probability.total_cmp(&a.probability));
        let mut hosts: BTreeMap<HostName, f64> = BTreeMap::new();
        let here = places.get(&at).map(|place| place.host.clone());
        for next in next.iter().filter(|next| Some(&next.host) != here.as_ref()) {
            *hosts.entry(next.host.clone()).or_default() += next.probability;
        }
        let mut hosts: Vec<_> = hosts.into_iter().collect();
        hosts.sort_by(|a, b| b.1.total_cmp(&a.1));
        Some(Forecast { at, next, hosts, left_s: None })
    }

    /// How often forecasts for this user were right.
    #[must_use]
    pub fn score(&self) -> Score {
        let share = |most: u8| {
            let hits = self.ranks.iter().filter(|rank| rank.is_some_and(|rank| rank < most)).count();
            hits as f64 / self.ranks.len().max(1) as f64
        };
        Score { window: self.ranks.len() as u32, hit1: share(1), hit3: share(3) }
    }
}

//! Scores predictors on a trace, side by side: each is asked just before each change, and told afterwards.
//!
//! What counts: an event whose access point is another than that user's previous one, with no leaving in between. Every
//! such event counts for access points and for hosts alike, also where both access points belong to one host; the host
//! asked for is the new access point's. A predictor that names nothing has missed.

use std::collections::{BTreeMap, HashMap};

use kage_machine::{HostName, identity::ApName};

use super::{Everybody, History, Place, Places};

/// Number of an access point.
pub type Ap = u32;

/// How soon a return is counted apart, in milliseconds.
pub const RETURN_MS: u64 = 30_000;

/// Access points and hosts, by number.
#[derive(Clone, Debug, Default)]
pub struct Site {
    places: Places,
    names: Vec<ApName>,
    hosts: Vec<HostName>,
    host_of: Vec<u32>,
    numbers: BTreeMap<ApName, Ap>,
    host_numbers: BTreeMap<HostName, u32>,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Event {
    /// When, in milliseconds.
    pub at_ms: u64,
    /// To whom.
    pub user: u32,
    /// Where the user is now; nowhere.
    pub ap: Option<Ap>,
}

/// What a predictor holds to be next, the likeliest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Guess {
    /// Access points.
    pub aps: Vec<Ap>,
    /// Hosts, the present one among them.
    pub hosts: Vec<u32>,
}

/// Something that predicts.
pub trait Predictor {
    /// Where the user is next.
    fn guess(&self, user: u32, at_ms: u64, site: &Site) -> Guess;
    /// What happened.
    fn learn(&mut self, event: &Event, site: &Site);
}

/// Hits among the first one, two and three of a guess.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    /// How many guesses were scored.
    pub predictions: u64,
    /// Access points found.
    pub aps: [u64; 3],
    /// Hosts found.
    pub hosts: [u64; 3],
}

/// Hits by what they are over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Every change.
    pub all: Hits,
    /// Those back to the access point before, within 30 s of leaving it.
    pub returns: Hits,
    /// Those to an access point of another host; a guess's hosts are then those other than the present.
    pub moves: Hits,
}

/// Predictors on one trace.
pub struct Trial<'a> {
    site: &'a Site,
    entrants: Vec<(String, Box<dyn Predictor + 'a>, Tally)>,
    /// Where each user is, since when, and where before without a gap.
    users: HashMap<u32, (Ap, u64, Option<Ap>)>,
}

impl Site {
    /// From access points in their order.
    #[must_use]
    pub fn new(aps: Vec<(ApName, Place)>) -> Self {
        let mut site = Self::default();
        for (number, (name, place)) in (0..).zip(aps) {
            let next = u32::try_from(site.hosts.len()).unwrap_or(u32::MAX);
            let host = *site.host_numbers.entry(place.host.clone()).or_insert(next);
            if host == next {
                site.hosts.push(place.host.clone());
            }
            site.host_of.push(host);
            site.numbers.insert(name.clone(), number);
            site.names.push(name.clone());
            site.places.insert(name, place);
        }
        site
    }

    /// As the predictor sees them.
    #[must_use]
    pub const fn places(&self) -> &Places {
        &self.places
    }

    /// Names of the access points.
    #[must_use]
    pub fn names(&self) -> &[ApName] {
        &self.names
    }

    /// Names of the hosts.
    #[must_use]
    pub fn hosts(&self) -> &[HostName] {
        &self.hosts
    }

    /// The host of an access point.
    ///
    /// # Panics
    /// If there is no such access point.
    #[must_use]
    pub fn host_of(&self, ap: Ap) -> u32 {
        self.host_of[ap as usize]
    }
}

impl Hits {
    fn count(&mut self, aps: &[Ap], ap: Ap, hosts: &[u32], host: u32) {
        self.predictions += 1;
        for first in 0..3 {
            self.aps[first] += u64::from(aps.iter().take(first + 1).any(|&guess| guess == ap));
            self.hosts[first] += u64::from(hosts.iter().take(first + 1).any(|&guess| guess == host));
        }
    }

    /// The share of guesses that so many hits are.
    #[must_use]
    pub fn share(&self, hits: u64) -> f64 {
        hits as f64 / self.predictions.max(1) as f64
    }

    /// Share of access points found first.
    #[must_use]
    pub fn hit1(&self) -> f64 {
        self.share(self.aps[0])
    }
}

impl<'a> Trial<'a> {
    /// A trial of these predictors.
    #[must_use]
    pub fn new(site: &'a Site, predictors: Vec<(String, Box<dyn Predictor + 'a>)>) -> Self {
        let entrants = predictors.into_iter().map(|(name, it)| (name, it, Tally::default())).collect();
        Self { site, entrants, users: HashMap::new() }
    }

    /// The predictor of this crate and the Markov predictors.
    #[must_use]
    pub fn of_all(site: &'a Site) -> Self {
        use super::markov::{Markov, Past};
        let mut all: Vec<(String, Box<dyn Predictor + 'a>)> =
            vec![("kage".to_owned(), Box::new(Kage::default()))];
        for past in [Past::Own, Past::Everybody] {
            for order in 1..=3 {
                let markov = Markov::new(order, past);
                all.push((markov.name(), Box::new(markov)));
            }
        }
        Self::new(site, all)
    }

    /// Has everybody guess what an event will bring, counts the hits, and tells it.
    pub fn feed(&mut self, event: &Event) {
        let now = event.ap.map(|ap| (ap, event.at_ms));
        match (self.users.get(&event.user).copied(), now) {
            (Some((from, ..)), Some((to, _))) if from == to => {}
            (Some((from, since, before)), Some((to, at_ms))) => {
                let soon = before == Some(to) && at_ms.saturating_sub(since) <= RETURN_MS;
                self.score(event, from, to, soon);
                self.users.insert(event.user, (to, at_ms, Some(from)));
            }
            (None, Some((to, at_ms))) => {
                self.users.insert(event.user, (to, at_ms, None));
            }
            (_, None) => {
                self.users.remove(&event.user);
            }
        }
        self.entrants.iter_mut().for_each(|(_, predictor, _)| predictor.learn(event, self.site));
    }

    fn score(&mut self, event: &Event, from: Ap, to: Ap, soon: bool) {
        let (here, host) = (self.site.host_of(from), self.site.host_of(to));
        for (_, predictor, tally) in &mut self.entrants {
            let guess = predictor.guess(event.user, event.at_ms, self.site);
            tally.all.count(&guess.aps, to, &guess.hosts, host);
            if soon {
                tally.returns.count(&guess.aps, to, &guess.hosts, host);
            }
            if host != here {
                let others: Vec<u32> = guess.hosts.iter().copied().filter(|&other| other != here).collect();
                tally.moves.count(&guess.aps, to, &others, host);
            }
        }
    }

    /// How each did, by name.
    pub fn results(&self) -> impl Iterator<Item = (&str, &Tally)> {
        self.entrants.iter().map(|(name, _, tally)| (name.as_str(), tally))
    }
}

/// The predictor of this crate, for all users.
#[derive(Debug, Default)]
pub struct Kage {
    /// What is known of everybody.
    pub everybody: Everybody,
    /// What is known of each.
    pub users: HashMap<u32, History>,
}

impl Predictor for Kage {
    fn guess(&self, user: u32, at_ms: u64, site: &Site) -> Guess {
        let history = self.users.get(&user);
        let forecast = history.and_then(|history| history.forecast(&self.everybody, &site.places, at_ms));
        let Some(forecast) = forecast else { return Guess::default() };
        let aps =
            forecast.next.iter().filter_map(|next| site.numbers.get(&next.ap).copied()).take(3).collect();
        let mut hosts = forecast.hosts;
        if let Some(place) = site.places.get(&forecast.at) {
            let here = forecast.next.iter().filter(|next| next.host == place.host);
            hosts.push((place.host.clone(), here.map(|next| next.probability).sum()));
        }
        hosts.sort_by(|a, b| b.1.total_cmp(&a.1));
        let hosts = hosts.iter().filter_map(|(host, _)| site.host_numbers.get(host).copied()).collect();
        Guess { aps, hosts }
    }

    fn learn(&mut self, event: &Event, site: &Site) {
        let history = self.users.entry(event.user).or_default();
        match event.ap.and_then(|ap| site.names.get(ap as usize)) {
            Some(ap) => {
                history.arrived(&mut self.everybody, &site.places, ap, event.at_ms);
            }
            None => history.left(event.at_ms),
        }
    }
}

//! Which hosts get a mirror, from where the user may be next. Pure.
//!
//! A mirror costs its filling once and the owner's dirty pages from then on; it pays when the user goes there. So a
//! mirror is begun where that is likely enough and can be filled in time, and one that stands is kept for longer
//! than it took to begin it: only a clear gain is worth the filling of another.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use kage_machine::HostName;

/// No mirror is begun where the user goes next with less probability than this: at one move in twenty the filling
/// of a mirror costs more than it saves.
pub const BEGIN: f64 = 0.05;

/// A mirror that stands goes once its host is less likely than this.
pub const KEEP: f64 = 0.02;

/// By how much a mirror's host has to be outdone before it gives way: a host is worth more with a mirror by this
/// share, and by [`STANDING`] beside.
pub const GAIN: f64 = 0.5;

/// See [`GAIN`]: what makes a small probability not flutter.
pub const STANDING: f64 = 0.05;

/// How long the former owner keeps a mirror where nothing likelier needs the place. It lacks only what was written
/// since, and people turn round.
pub const FORMER: Duration = Duration::from_secs(600);

/// What nearness says of where nothing else does: this share of what the forecast leaves open goes to the nearest
/// other host, half as much to the next one, and so on.
pub const NEAR: f64 = 0.5;

/// What mirrors of one machine may cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Most mirrors.
    pub mirrors: usize,
    /// Most memory they may take at all hosts together.
    pub memory_bytes: u64,
    /// Rate of filling them, where it is limited.
    pub bytes_per_s: Option<f64>,
}

/// What is known when mirrors are chosen.
#[derive(Clone, Debug)]
pub struct Scene<'a> {
    /// The machine's owner.
    pub owner: &'a HostName,
    /// The host of the access point where the user is, if that is known.
    pub user_at: Option<&'a HostName>,
    /// Hosts where the user may be next, and how likely; they add up to at most 1.
    pub likely: &'a [(HostName, f64)],
    /// How much longer the user will be here.
    pub left_s: Option<f64>,
    /// Other hosts by the distance of their access points, the nearest first.
    pub near: &'a [HostName],
    /// Where mirrors stand.
    pub followers: &'a [HostName],
    /// The host that had the machine before, and how long ago.
    pub former: Option<(&'a HostName, Duration)>,
    /// Hosts that are known and take machines: all others get no mirror.
    pub usable: &'a BTreeSet<HostName>,
    /// The machine's size: what filling a mirror takes, and what it takes of its host's memory.
    pub machine_bytes: u64,
    /// What mirrors may cost.
    pub budget: Budget,
}

/// A host, and what a mirror there is worth.
struct Candidate<'a> {
    host: &'a HostName,
    worth: f64,
    stands: bool,
}

/// The hosts that get mirrors, the most important first. A user who is at another host than the machine needs it there:
/// that host comes first, and nothing else is begun meanwhile.
#[must_use]
pub fn choose(scene: &Scene<'_>) -> Vec<HostName> {
    let most = most_mirrors(scene);
    let away = scene.user_at.filter(|host| *host != scene.owner);
    let mut chosen = Vec::with_capacity(most);
    let mut filling_s = 0.0;
    for candidate in candidates(scene, away) {
        if chosen.len() == most {
            break;
        }
        let expected = away == Some(candidate.host);
        if !candidate.stands && !expected && (away.is_some() || !in_time(scene, &mut filling_s)) {
            continue;
        }
        chosen.push(candidate.host.clone());
    }
    chosen
}

/// How many mirrors number and memory allow.
fn most_mirrors(scene: &Scene<'_>) -> usize {
    let by_memory = scene.budget.memory_bytes.checked_div(scene.machine_bytes).unwrap_or(u64::MAX);
    scene.budget.mirrors.min(usize::try_from(by_memory).unwrap_or(usize::MAX))
}

/// Whether one more mirror can be filled while the user is still here. The likeliest always is begun: a part of it
/// is a part less to carry over.
fn in_time(scene: &Scene<'_>, filling_s: &mut f64) -> bool {
    #[expect(clippy::cast_precision_loss, reason = "a time")]
    let one = scene.budget.bytes_per_s.map_or(0.0, |rate| scene.machine_bytes as f64 / rate.max(1.0));
    let first = *filling_s == 0.0;
    *filling_s += one;
    first || scene.left_s.is_none_or(|left| *filling_s <= left.max(0.0))
}

/// Hosts that may have a mirror, the most worth it first.
fn candidates<'a>(scene: &Scene<'a>, away: Option<&'a HostName>) -> Vec<Candidate<'a>> {
    let mut candidates: Vec<_> = probabilities(scene, away)
        .into_iter()
        .filter(|(host, _)| *host != scene.owner && scene.usable.contains(*host))
        .filter_map(|(host, probability)| {
            let stands = scene.followers.contains(host);
            let former =
                scene.former.is_some_and(|(former, since)| former == host && since < FORMER) && stands;
            let pays = probability >= if stands { KEEP } else { BEGIN };
            let worth = if stands { probability * (1.0 + GAIN) + STANDING } else { probability };
            // Without a probability of its own the former owner fills a place that nobody else needs.
            let worth = if former && !pays { KEEP } else { worth };
            (pays || former).then_some(Candidate { host, worth, stands })
        })
        .collect();
    candidates.sort_by(by_worth);
    candidates
}

fn by_worth(a: &Candidate<'_>, b: &Candidate<'_>) -> Ordering {
    b.worth.total_cmp(&a.worth).then_with(|| a.host.cmp(b.host))
}

/// How likely the machine is needed at each host next: as forecast, what that leaves open by nearness.
fn probabilities<'a>(scene: &Scene<'a>, away: Option<&'a HostName>) -> BTreeMap<&'a HostName, f64> {
    let sane = |probability: f64| if probability.is_finite() { probability.clamp(0.0, 1.0) } else { 0.0 };
    let mut all: BTreeMap<&HostName, f64> = BTreeMap::new();
    for (host, probability) in scene.likely {
        *all.entry(host).or_default() += sane(*probability);
    }
    let known: f64 = all.values().sum();
    let mut share = (1.0 - known).max(0.0) * NEAR;
    for host in scene.near.iter().filter(|host| *host != scene.owner && scene.usable.contains(*host)) {
        *all.entry(host).or_default() += share;
        share /= 2.0;
    }
    for host in scene.followers.iter().chain(scene.former.map(|(former, _)| former)) {
        all.entry(host).or_default();
    }
    if let Some(host) = away {
        // Whatever else it is, it is needed now; nothing with a mirror is worth more.
        all.insert(host, f64::INFINITY);
    }
    all
}

#[cfg(test)]
mod tests;

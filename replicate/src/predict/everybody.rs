//! What all users of a host's access points do: counts of where they go on from where they are and came from, how long
//! they stay, and what each expert's word was worth.
//!
//! Only access points of the site are learnt, so that the table of names is bounded by its configuration, and by
//! [`MAX_NAMES`]. Contexts are bounded by [`MAX_CONTEXTS`]: when there are more, all counts are halved, and what falls to
//! nothing is dropped: the rare and the old.

use std::collections::BTreeMap;

use kage_machine::identity::ApName;
use serde::{Deserialize, Serialize};

use super::{
    Place, Places,
    mixer::{Trust, Weights},
    motion, visits,
};

/// Most access points that are known by number.
pub const MAX_NAMES: usize = 16_384;
/// Most contexts that are counted in.
pub const MAX_CONTEXTS: usize = 131_072;
/// Most access points counted after one context; a further one takes the place of one that was seen once.
const MAX_AFTER: usize = 16;
/// Steps of a histogram of stays: two to a doubling of seconds, up to a day and a half.
const STAYS: usize = 34;
/// Neighbours that are looked at, by distance.
pub const NEIGHBOURS: usize = 14;
/// Uses after which neighbours are looked up anew: access points may have been moved.
const FRESH: u16 = 512;

/// Counts of what came next, most 16 of them.
pub type After = Vec<(u16, u16)>;

/// What is known over all users of this host's access points.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(from = "Stored")]
pub struct Everybody {
    names: Vec<ApName>,
    contexts: BTreeMap<u64, After>,
    stays: BTreeMap<u16, Vec<u16>>,
    pub(super) weights: Weights,
    pub(super) trust: Trust,
    /// Derived: numbers of the names.
    #[serde(skip_serializing)]
    numbers: BTreeMap<ApName, u16>,
    /// Derived from the site: neighbours of access points, the nearest first, and how often they may yet be used.
    #[serde(skip_serializing)]
    around: BTreeMap<u16, (u16, Vec<ApName>)>,
}

/// The same as written, by whoever.
#[derive(Deserialize)]
struct Stored {
    names: Vec<ApName>,
    contexts: BTreeMap<u64, After>,
    stays: BTreeMap<u16, Vec<u16>>,
    weights: Weights,
    trust: Trust,
}

impl From<Stored> for Everybody {
    fn from(stored: Stored) -> Self {
        let Stored { mut names, mut contexts, mut stays, weights, trust } = stored;
        names.truncate(MAX_NAMES);
        names.shrink_to_fit();
        let known = |number: u16| usize::from(number) < names.len();
        while contexts.len() > MAX_CONTEXTS {
            contexts.pop_last();
        }
        for after in contexts.values_mut() {
            after.retain(|&(number, _)| known(number));
            after.truncate(MAX_AFTER);
            after.shrink_to_fit();
        }
        stays.retain(|&number, _| known(number));
        for counts in stays.values_mut() {
            counts.resize(STAYS, 0);
            counts.shrink_to_fit();
        }
        let mut numbers = BTreeMap::new();
        for (number, name) in (0..).zip(&names) {
            numbers.entry(name.clone()).or_insert(number);
        }
        Self {
            names,
            contexts,
            stays,
            weights: weights.checked(),
            trust: trust.checked(),
            numbers,
            around: BTreeMap::new(),
        }
    }
}

/// What is derived says nothing new.
impl PartialEq for Everybody {
    fn eq(&self, other: &Self) -> bool {
        self.names == other.names
            && self.contexts == other.contexts
            && self.stays == other.stays
            && self.weights == other.weights
            && self.trust == other.trust
    }
}

/// What a user's situation has in common with others'.
#[derive(Clone, Copy, Debug)]
pub struct Situation {
    /// Where the user is.
    pub at: Option<u16>,
    /// Where the user came from.
    pub before: Option<u16>,
    /// And before that.
    pub earlier: Option<u16>,
    /// How long the user is there, as [`visits::stay_code`].
    pub stay: u8,
    /// Minute of the week.
    pub minute: u16,
}

impl Situation {
    /// The contexts of a situation: at an access point; coming from another; and another; so long; at that time of day.
    pub fn contexts(&self) -> [Option<u64>; 5] {
        let at = self.at.map(u64::from);
        let before = at.zip(self.before).map(|(at, before)| at | u64::from(before) << 16);
        let earlier = before.zip(self.earlier).map(|(both, earlier)| both | u64::from(earlier) << 32);
        let length = u64::from(length_class(self.stay)) << 32;
        let half_hour = u64::from(self.minute % visits::DAY / 30) << 32;
        let key = |kind: u64, context: Option<u64>| context.map(|context| kind << 56 | context);
        [
            key(1, at),
            key(2, before),
            key(3, earlier),
            key(4, before.map(|before| before | length)),
            key(5, at.map(|at| at | half_hour)),
        ]
    }
}

/// Passing, pausing, sitting, staying.
fn length_class(stay: u8) -> u8 {
    let stay_s = visits::stay_s(stay);
    [90.0, 600.0, 3600.0].iter().map(|&limit| u8::from(stay_s >= limit)).sum()
}

impl Everybody {
    /// The number of an access point that was learnt.
    pub(super) fn number_of(&self, ap: &ApName) -> Option<u16> {
        self.numbers.get(ap).copied()
    }

    /// The name of a number.
    pub(super) fn name(&self, number: u16) -> Option<&ApName> {
        self.names.get(usize::from(number))
    }

    /// What came next in a context.
    pub(super) fn after(&self, context: u64) -> &[(u16, u16)] {
        self.contexts.get(&context).map_or(&[], Vec::as_slice)
    }

    /// How many stays at an access point were how long: seconds and counts.
    pub(super) fn stays(&self, ap: &ApName) -> impl Iterator<Item = (f32, u16)> {
        let counts = self.number_of(ap).and_then(|number| self.stays.get(&number));
        let counts = counts.map_or(&[][..], Vec::as_slice).iter();
        counts.enumerate().filter(|(_, count)| **count > 0).map(|(step, count)| (step_s(step), *count))
    }

    /// Counts that somebody in that situation went to an access point of the site.
    pub(super) fn learn(&mut self, situation: &Situation, to: &ApName, places: &Places) {
        let Some(to) = self.enter(to, places) else { return };
        for context in situation.contexts().into_iter().flatten() {
            if self.contexts.len() >= MAX_CONTEXTS && !self.contexts.contains_key(&context) {
                self.fade();
            }
            count(self.contexts.entry(context).or_default(), to);
        }
        let Some(at) = situation.at.filter(|_| situation.stay > 0) else { return };
        let stays = self.stays.entry(at).or_insert_with(|| vec![0; STAYS]);
        if let Some(count) = stays.get_mut(stay_step(visits::stay_s(situation.stay))) {
            *count += 1;
            if *count == u16::MAX {
                stays.iter_mut().for_each(|count| *count /= 2);
            }
        }
    }

    /// The number of an access point of the site, which gets one where there is room.
    pub(super) fn enter(&mut self, ap: &ApName, places: &Places) -> Option<u16> {
        if let Some(number) = self.number_of(ap) {
            return Some(number);
        }
        let number =
            u16::try_from(self.names.len()).ok().filter(|number| usize::from(*number) < MAX_NAMES)?;
        places.contains_key(ap).then(|| {
            self.names.push(ap.clone());
            self.numbers.insert(ap.clone(), number);
            number
        })
    }

    /// Makes room for contexts, a quarter at least.
    fn fade(&mut self) {
        while self.contexts.len() > MAX_CONTEXTS / 4 * 3 {
            self.contexts.retain(|_, after| {
                after.iter_mut().for_each(|(_, count)| *count /= 2);
                after.retain(|&(_, count)| count > 0);
                !after.is_empty()
            });
        }
    }

    /// Looks up the neighbours of an access point unless that was done of late.
    pub(super) fn look_around(&mut self, at: &ApName, places: &Places) {
        let Some(number) = self.number_of(at) else { return };
        match self.around.get_mut(&number) {
            Some((uses, _)) if *uses > 0 => *uses -= 1,
            _ => {
                let names = nearest(at, places).into_iter().map(|(name, _)| name.clone()).collect();
                self.around.insert(number, (FRESH, names));
            }
        }
    }

    /// The neighbours of an access point, the nearest first.
    pub(super) fn around<'a>(&self, at: &ApName, places: &'a Places) -> Vec<(&'a ApName, &'a Place)> {
        match self.number_of(at).and_then(|number| self.around.get(&number)) {
            Some((_, names)) => names.iter().filter_map(|name| places.get_key_value(name)).collect(),
            None => nearest(at, places),
        }
    }
}

/// The access points nearest to one, by looking at all.
fn nearest<'a>(at: &ApName, places: &'a Places) -> Vec<(&'a ApName, &'a Place)> {
    let Some(here) = places.get(at).and_then(|place| motion::sound(place.position_m)) else {
        return Vec::new();
    };
    let mut all: Vec<_> = places
        .iter()
        .filter(|(name, _)| *name != at)
        .filter_map(|entry| Some((motion::distance(here, motion::sound(entry.1.position_m)?), entry)))
        .collect();
    if all.len() > NEIGHBOURS {
        all.select_nth_unstable_by(NEIGHBOURS, |a, b| a.0.total_cmp(&b.0));
        all.truncate(NEIGHBOURS);
    }
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    all.into_iter().map(|(_, entry)| entry).collect()
}

/// Adds one to what came next.
fn count(after: &mut After, to: u16) {
    if let Some((_, count)) = after.iter_mut().find(|(number, _)| *number == to) {
        *count += 1;
        if *count == u16::MAX {
            after.iter_mut().for_each(|(_, count)| *count = (*count / 2).max(1));
        }
    } else if after.len() < MAX_AFTER {
        after.reserve_exact(1);
        after.push((to, 1));
    } else if let Some(least) = after.iter_mut().min_by_key(|(_, count)| *count) {
        *least = if least.1 <= 1 { (to, 1) } else { (least.0, least.1 - 1) };
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "held in the histogram")]
fn stay_step(stay_s: f32) -> usize {
    ((stay_s + 1.0).log2() * 2.0).round().clamp(0.0, (STAYS - 1) as f32) as usize
}

fn step_s(step: usize) -> f32 {
    (step as f32 / 2.0).exp2() - 1.0
}

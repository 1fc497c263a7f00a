//! Which pages each follower lacks, and how hot pages are.
//!
//! A harvest clears the machine's own record of dirty pages, so it is spread over all followers at
//! once, here; what could not be sent is put back. Pure; time is an argument.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use kage_machine::{Geometry, HostName, PageIndex, PageSet};

/// Which of the last eight harvests had a page, the latest as the highest bit: 0 for none, 255 for
/// all; later writes weigh more than any number of earlier ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Heat(pub u8);

/// The bit of the latest harvest.
const WRITTEN: u8 = 128;

/// The dirty rate follows the last few harvests: each counts so much.
const RATE_WEIGHT: f64 = 0.3;

/// Dirty pages of one machine by follower.
#[derive(Clone, Debug)]
pub struct Tracker {
    geometry: Geometry,
    followers: BTreeMap<HostName, PageSet>,
    harvests: u32,
    /// Per page: the harvest it was last in, and its heat then; shifted down only when read.
    heat: Vec<(u32, u8)>,
    last: Option<Instant>,
    pages_per_s: Option<f64>,
}

impl Tracker {
    /// Without followers.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            followers: BTreeMap::new(),
            harvests: 0,
            heat: vec![(0, 0); geometry.pages() as usize],
            last: None,
            pages_per_s: None,
        }
    }

    /// Adds a follower that lacks `pages`, or replaces what it lacks. Call it with the machine's
    /// populated pages *before* the harvest that begins its first epoch.
    pub fn follow(&mut self, follower: HostName, pages: PageSet) {
        let mut due = PageSet::empty(self.geometry.pages());
        due.union(&pages);
        self.followers.insert(follower, due);
    }

    /// Forgets a follower.
    pub fn unfollow(&mut self, follower: &HostName) {
        self.followers.remove(follower);
    }

    /// Spreads a harvest over all followers.
    pub fn harvest(&mut self, now: Instant, dirty: &PageSet) {
        for due in self.followers.values_mut() {
            due.union(dirty);
        }
        self.harvests = self.harvests.saturating_add(1);
        for page in dirty.iter() {
            let heat = self.heat(page).0 | WRITTEN;
            if let Some(slot) = self.heat.get_mut(page.0 as usize) {
                *slot = (self.harvests, heat);
            }
        }
        let since = self.last.map(|last| now.saturating_duration_since(last));
        self.last = Some(now);
        if let Some(since) = since.filter(|since| *since > Duration::ZERO) {
            let rate = f64::from(dirty.len()) / since.as_secs_f64();
            let mean = self.pages_per_s.map_or(rate, |old| old + (rate - old) * RATE_WEIGHT);
            self.pages_per_s = Some(mean);
        }
    }

    /// Whether it is a follower.
    #[must_use]
    pub fn follows(&self, follower: &HostName) -> bool {
        self.followers.contains_key(follower)
    }

    /// What the follower lacks; nothing of an unknown one.
    #[must_use]
    pub fn due(&self, follower: &HostName) -> PageSet {
        self.followers.get(follower).cloned().unwrap_or_else(|| PageSet::empty(self.geometry.pages()))
    }

    /// Takes what is about to be sent. What then cannot be is [`Self::put_back`].
    pub fn take(&mut self, follower: &HostName, pages: &PageSet) {
        if let Some(due) = self.followers.get_mut(follower) {
            due.subtract(pages);
        }
    }

    /// Puts back what was taken and not sent.
    pub fn put_back(&mut self, follower: &HostName, pages: &PageSet) {
        if let Some(due) = self.followers.get_mut(follower) {
            due.union(pages);
        }
    }

    /// How hot a page is.
    #[must_use]
    pub fn heat(&self, page: PageIndex) -> Heat {
        let (harvest, heat) = self.heat.get(page.0 as usize).copied().unwrap_or((0, 0));
        Heat(heat.checked_shr(self.harvests - harvest).unwrap_or(0))
    }

    /// Pages dirtied per second, over the last few harvests; none before the second one. A page
    /// written often counts once per harvest: the rate falls as harvests are further apart.
    #[must_use]
    pub const fn dirty_pages_per_s(&self) -> Option<f64> {
        self.pages_per_s
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use proptest::prelude::*;

    use super::*;

    const GEOMETRY: Geometry = Geometry { memory_pages: 60, disk_pages: 10 };

    fn set(pages: &[u32]) -> PageSet {
        let mut set = PageSet::empty(GEOMETRY.pages());
        pages.iter().for_each(|&page| {
            set.insert(PageIndex(page));
        });
        set
    }

    fn host(name: &str) -> HostName {
        name.parse().unwrap()
    }

    #[test]
    fn pages_cool_down_and_heat_up() {
        let (mut tracker, now) = (Tracker::new(GEOMETRY), Instant::now());
        let mut last = Heat(0);
        for _ in 0..10 {
            tracker.harvest(now, &set(&[1]));
            assert!(tracker.heat(PageIndex(1)) >= last);
            last = tracker.heat(PageIndex(1));
        }
        assert_eq!((last, tracker.heat(PageIndex(2))), (Heat(255), Heat(0)));
        for _ in 0..8 {
            tracker.harvest(now, &set(&[]));
            assert!(tracker.heat(PageIndex(1)) < last);
            last = tracker.heat(PageIndex(1));
        }
        assert_eq!(last, Heat(0));
        assert_eq!(tracker.heat(PageIndex(9999)), Heat(0));
    }

    #[test]
    fn the_dirty_rate_is_pages_over_time() {
        let (mut tracker, start) = (Tracker::new(GEOMETRY), Instant::now());
        tracker.harvest(start, &set(&[1]));
        assert_eq!(tracker.dirty_pages_per_s(), None);
        tracker.harvest(start, &set(&[1]));
        assert_eq!(tracker.dirty_pages_per_s(), None);
        tracker.harvest(start + Duration::from_millis(10), &set(&[1, 2, 3]));
        assert!((tracker.dirty_pages_per_s().unwrap() - 300.0).abs() < 1e-6);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Harvest(Vec<u32>),
        Take(u8, Vec<u32>),
        PutBack(u8, Vec<u32>),
        Follow(u8, Vec<u32>),
        Unfollow(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let pages = || prop::collection::vec(0u32..80, 0..12);
        prop_oneof![
            pages().prop_map(Step::Harvest),
            (0u8..3, pages()).prop_map(|(host, pages)| Step::Take(host, pages)),
            (0u8..3, pages()).prop_map(|(host, pages)| Step::PutBack(host, pages)),
            (0u8..3, pages()).prop_map(|(host, pages)| Step::Follow(host, pages)),
            (0u8..3).prop_map(Step::Unfollow),
        ]
    }

    proptest! {
        #[test]
        fn every_follower_is_due_what_was_written_and_not_taken(steps in prop::collection::vec(step(), 0..40)) {
            let mut tracker = Tracker::new(GEOMETRY);
            let mut model: HashMap<u8, BTreeSet<u32>> = HashMap::new();
            let inside = |pages: Vec<u32>| pages.into_iter().filter(|&page| page < GEOMETRY.pages());
            for step in steps {
                match step {
                    Step::Harvest(pages) => {
                        tracker.harvest(Instant::now(), &set(&pages));
                        model.values_mut().for_each(|due| due.extend(inside(pages.clone())));
                    }
                    Step::Take(follower, pages) => {
                        tracker.take(&host(&format!("h{follower}")), &set(&pages));
                        if let Some(due) = model.get_mut(&follower) {
                            due.retain(|page| !pages.contains(page));
                        }
                    }
                    Step::PutBack(follower, pages) => {
                        tracker.put_back(&host(&format!("h{follower}")), &set(&pages));
                        if let Some(due) = model.get_mut(&follower) {
                            due.extend(inside(pages));
                        }
                    }
                    Step::Follow(follower, pages) => {
                        tracker.follow(host(&format!("h{follower}")), set(&pages));
                        model.insert(follower, inside(pages).collect());
                    }
                    Step::Unfollow(follower) => {
                        tracker.unfollow(&host(&format!("h{follower}")));
                        model.remove(&follower);
                    }
                }
                for follower in 0..3u8 {
                    let due: Vec<_> = tracker.due(&host(&format!("h{follower}"))).iter().map(|page| page.0).collect();
                    let expected: Vec<_> = model.get(&follower).into_iter().flatten().copied().collect();
                    prop_assert_eq!(due, expected);
                }
            }
        }
    }
}

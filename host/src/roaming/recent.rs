//! Bounded memories: what was taken already, and what was said already. Pure: time is an argument.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    hash::Hash,
    time::{Duration, Instant},
};

/// What was seen within some time, the latest of it.
#[derive(Clone, Debug)]
pub struct Recent<K> {
    age: Duration,
    most: usize,
    seen: HashMap<K, Instant>,
    order: VecDeque<K>,
}

impl<K: Hash + Eq + Clone> Recent<K> {
    /// Remembers the last `most` for `age` each.
    #[must_use]
    pub fn new(most: usize, age: Duration) -> Self {
        Self { age, most, seen: HashMap::new(), order: VecDeque::new() }
    }

    /// Whether this was seen before; remembers it if not.
    pub fn again(&mut self, key: K, now: Instant) -> bool {
        let age = self.age;
        let is_old = |at: &Instant| now.saturating_duration_since(*at) >= age;
        while self.order.front().is_some_and(|oldest| self.seen.get(oldest).is_none_or(is_old)) {
            self.forget_oldest();
        }
        if self.seen.contains_key(&key) {
            return true;
        }
        if self.order.len() >= self.most {
            self.forget_oldest();
        }
        self.seen.insert(key.clone(), now);
        self.order.push_back(key);
        false
    }

    fn forget_oldest(&mut self) {
        if let Some(oldest) = self.order.pop_front() {
            self.seen.remove(&oldest);
        }
    }

    /// How many are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.seen.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }
}

/// Keeps what is logged from becoming a flood: one line of a kind in some time, which says how many were withheld.
#[derive(Clone, Debug)]
pub struct Quiet {
    pause: Duration,
    said: BTreeMap<&'static str, (Instant, u64)>,
}

impl Quiet {
    /// One line of each kind per `pause`.
    #[must_use]
    pub fn new(pause: Duration) -> Self {
        Self { pause, said: BTreeMap::new() }
    }

    /// Whether a line of this kind may be written now; if so, how many were withheld before it.
    pub fn may_say(&mut self, kind: &'static str, now: Instant) -> Option<u64> {
        match self.said.get_mut(kind) {
            Some((at, withheld)) if now.saturating_duration_since(*at) < self.pause => {
                *withheld += 1;
                None
            }
            Some((at, withheld)) => {
                *at = now;
                Some(std::mem::take(withheld))
            }
            None => {
                self.said.insert(kind, (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_is_known_until_it_is_old_or_crowded_out() {
        let (mut recent, start) = (Recent::new(3, Duration::from_secs(10)), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(!recent.again(1, start));
        assert!(recent.again(1, after(9)));
        assert!(!recent.again(1, after(10)), "its time is over");
        for key in 2..=4 {
            assert!(!recent.again(key, after(11)));
        }
        assert_eq!(recent.len(), 3);
        assert!(!recent.again(1, after(12)), "three came after it");
        assert!(recent.again(4, after(12)));
    }

    #[test]
    fn a_thousand_lines_become_two() {
        let (mut quiet, start) = (Quiet::new(Duration::from_secs(10)), Instant::now());
        assert_eq!(quiet.may_say("a", start), Some(0));
        for _ in 0..999 {
            assert_eq!(quiet.may_say("a", start + Duration::from_secs(9)), None);
        }
        assert_eq!(quiet.may_say("b", start), Some(0));
        assert_eq!(quiet.may_say("a", start + Duration::from_secs(10)), Some(999));
    }
}

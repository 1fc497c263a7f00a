//! Markov predictors of order 1 to 3, to compare with: the most frequent successors of the last places.
//!
//! An order that has not seen its context leaves it to the next lower one, the user's own before everybody's; what one
//! order cannot fill of the first three places the next fills. Of equally frequent successors the latest is first.
//! Unbounded: for trials only.

use std::collections::HashMap;

use super::trial::{Ap, Event, Guess, Predictor, Site};

/// Deepest order.
const DEEPEST: usize = 3;
/// Places of a guess that are filled.
const FILLED: usize = 3;

/// Whose past counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// The user's, and everybody's where that says nothing.
    Own,
    /// Everybody's alone.
    Everybody,
}

/// A Markov predictor.
#[derive(Debug)]
pub struct Markov {
    order: usize,
    past: Past,
    /// By whom (0 for everybody), and the last places, the present one first.
    after: HashMap<(u32, [Ap; DEEPEST]), Successors>,
    last: HashMap<u32, Vec<Ap>>,
    events: u32,
}

/// Successor, how often, and when last.
type Successors = Vec<(Ap, u32, u32)>;

/// No place.
const NONE: Ap = Ap::MAX;

impl Markov {
    /// A predictor of an order from 1 to 3.
    #[must_use]
    pub fn new(order: usize, past: Past) -> Self {
        let order = order.clamp(1, DEEPEST);
        Self { order, past, after: HashMap::new(), last: HashMap::new(), events: 0 }
    }

    /// Its name in reports.
    #[must_use]
    pub fn name(&self) -> String {
        format!("markov-{}{}", self.order, if self.past == Past::Own { "" } else { "-all" })
    }

    /// The contexts to be asked, one after the other.
    fn contexts(&self, user: u32) -> Vec<(u32, [Ap; DEEPEST])> {
        let Some(last) = self.last.get(&user) else { return Vec::new() };
        let whose = match self.past {
            Past::Own => &[user + 1, 0][..],
            Past::Everybody => &[0],
        };
        let orders = (1..=self.order.min(last.len())).rev();
        let context = |order: usize| {
            let mut context = [NONE; DEEPEST];
            context.iter_mut().zip(last.iter().rev().take(order)).for_each(|(to, ap)| *to = *ap);
            context
        };
        whose.iter().flat_map(|&who| orders.clone().map(move |order| (who, context(order)))).collect()
    }
}

impl Predictor for Markov {
    fn guess(&self, user: u32, _at_ms: u64, site: &Site) -> Guess {
        let mut guess = Guess::default();
        let mut hosts: Vec<(u32, f64)> = Vec::new();
        for context in self.contexts(user) {
            let Some(after) = self.after.get(&context) else { continue };
            let mut after = after.clone();
            after.sort_by_key(|&(_, count, seen)| std::cmp::Reverse((count, seen)));
            // The first order that knows anything says which hosts; the sums of others would add up to more than 1.
            if hosts.is_empty() {
                for &(ap, count, _) in &after {
                    let host = site.host_of(ap);
                    match hosts.iter_mut().find(|(known, _)| *known == host) {
                        Some((_, sum)) => *sum += f64::from(count),
                        None => hosts.push((host, f64::from(count))),
                    }
                }
                hosts.sort_by(|a, b| b.1.total_cmp(&a.1));
                guess.hosts = hosts.iter().map(|(host, _)| *host).collect();
            }
            for (ap, ..) in after {
                if guess.aps.len() < FILLED && !guess.aps.contains(&ap) {
                    guess.aps.push(ap);
                }
            }
        }
        for &ap in &guess.aps {
            let host = site.host_of(ap);
            if !guess.hosts.contains(&host) {
                guess.hosts.push(host);
            }
        }
        guess
    }

    fn learn(&mut self, event: &Event, _site: &Site) {
        let Some(to) = event.ap else {
            self.last.remove(&event.user);
            return;
        };
        self.events += 1;
        let last = self.last.entry(event.user).or_default();
        if last.last() == Some(&to) {
            return;
        }
        let known = last.clone();
        last.push(to);
        if last.len() > DEEPEST {
            last.remove(0);
        }
        for who in [event.user + 1, 0] {
            if who != 0 && self.past == Past::Everybody {
                continue;
            }
            for order in 1..=self.order.min(known.len()) {
                let mut context = [NONE; DEEPEST];
                context.iter_mut().zip(known.iter().rev().take(order)).for_each(|(to, ap)| *to = *ap);
                let after = self.after.entry((who, context)).or_default();
                match after.iter_mut().find(|(ap, ..)| *ap == to) {
                    Some((_, count, seen)) => (*count, *seen) = (*count + 1, self.events),
                    None => after.push((to, 1, self.events)),
                }
            }
        }
    }
}

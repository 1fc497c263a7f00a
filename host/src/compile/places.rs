//! Connections of machines to the compile service: so many in all, so many of each.
//!
//! When all places are taken, one whose machine has the most of them gives way to a machine that has fewer: whoever
//! opens connections without end shuts out itself.

use std::{
    collections::BTreeMap,
    net::{Shutdown, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The places there are.
pub struct Places {
    most: usize,
    most_each: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    next: u64,
    /// By interface and number, the latest last.
    streams: BTreeMap<(u32, u64), Arc<TcpStream>>,
}

impl Taken {
    fn of(&self, interface: u32) -> usize {
        self.streams.range((interface, 0)..=(interface, u64::MAX)).count()
    }

    /// The interface with the most places, and how many these are.
    fn greediest(&self) -> Option<(u32, usize)> {
        let mut counts = BTreeMap::<u32, usize>::new();
        for (interface, _) in self.streams.keys() {
            *counts.entry(*interface).or_default() += 1;
        }
        counts.into_iter().max_by_key(|(_, count)| *count)
    }
}

impl Places {
    /// `most` places, `most_each` for one interface.
    pub fn new(most: usize, most_each: usize) -> Arc<Self> {
        Arc::new(Self { most, most_each, taken: Mutex::default() })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for a connection that came over `interface`; `None` when it is to come again.
    pub fn take(self: &Arc<Self>, interface: u32, stream: &Arc<TcpStream>) -> Option<Place> {
        let mut taken = self.taken();
        let own = taken.of(interface);
        if own >= self.most_each {
            return None;
        }
        if taken.streams.len() >= self.most {
            let (greedy, count) = taken.greediest()?;
            if count <= own + 1 {
                return None;
            }
            let (key, given_up) = taken.streams.range((greedy, 0)..=(greedy, u64::MAX)).next_back()?;
            let key = *key;
            // Whoever reads or waits on it sees its end.
            let _ = given_up.shutdown(Shutdown::Both);
            taken.streams.remove(&key);
        }
        let key = (interface, taken.next);
        taken.next += 1;
        taken.streams.insert(key, stream.clone());
        drop(taken);
        Some(Place { places: self.clone(), key })
    }
}

/// One connection's place.
pub struct Place {
    places: Arc<Places>,
    key: (u32, u64),
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken().streams.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        net::{Ipv6Addr, TcpListener},
    };

    use super::*;

    #[test]
    fn a_machine_has_its_share_and_gives_way_to_others() {
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        let connect = || {
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (client, Arc::new(listener.accept().unwrap().0))
        };
        let places = Places::new(4, 3);
        let mut greedy: Vec<_> = (0..3).map(|_| connect()).collect();
        let mut held: Vec<_> = greedy.iter().map(|(_, stream)| places.take(1, stream).unwrap()).collect();
        let more = connect();
        assert!(places.take(1, &more.1).is_none(), "no more than its share");
        let others: Vec<_> = (0..4).map(|_| connect()).collect();
        let second = places.take(2, &others[0].1).unwrap();
        let third = places.take(3, &others[1].1).unwrap();
        assert_eq!(greedy[2].0.read(&mut [0]).unwrap(), 0, "its latest connection gave way");
        assert!(
            places.take(2, &others[2].1).is_none(),
            "one more of theirs would be as many as the other has"
        );
        assert!(places.take(4, &others[2].1).is_some());
        // A place that gave way is not given back a second time.
        held.truncate(2);
        assert_eq!(places.taken().of(1), 1);
        drop((held, second, third));
        assert!(places.taken().streams.is_empty());
    }
}

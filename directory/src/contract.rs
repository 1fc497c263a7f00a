//! What every directory must do, run against each implementation.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    Directory, DirectoryError, Embedded, Remote, Revision,
    records::{DeviceRecord, HostRecord, Records, allocate_image_number},
    serve,
};

/// A directory of files that ends with the test.
pub struct ScratchDir(PathBuf);

impl ScratchDir {
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kage-directory-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

fn on_every_implementation(check: fn(Arc<dyn Directory>)) {
    let dir = ScratchDir::new();
    check(Arc::new(Embedded::open(&dir.path().join("embedded.redb")).unwrap()));
    let served = Embedded::open(&dir.path().join("served.redb")).unwrap();
    let loopback = move |request: &[u8], _: Duration| Ok(serve(&served, request));
    check(Arc::new(Remote::new(loopback, Duration::from_secs(5))));
}

#[test]
fn a_swap_needs_the_revision_it_expects() {
    on_every_implementation(|store| {
        assert_eq!(store.get("k").unwrap(), None);
        let first = store.compare_and_swap("k", Revision::ABSENT, Some(b"a")).unwrap();
        let refused = store.compare_and_swap("k", Revision::ABSENT, Some(b"b"));
        let Err(DirectoryError::Conflict { current: Some(current) }) = refused else { panic!("{refused:?}") };
        assert_eq!((current.revision, current.value.as_slice()), (first, &b"a"[..]));
        let second = store.compare_and_swap("k", first, Some(b"b")).unwrap();
        assert!(second > first);
        assert!(matches!(
            store.compare_and_swap("k", first, Some(b"c")),
            Err(DirectoryError::Conflict { .. })
        ));
        store.compare_and_swap("k", second, None).unwrap();
        assert_eq!(store.get("k").unwrap(), None);
        assert_eq!(
            store.compare_and_swap("k", second, Some(b"d")),
            Err(DirectoryError::Conflict { current: None })
        );
        assert!(store.compare_and_swap("k", Revision::ABSENT, Some(b"d")).unwrap() > second);
    });
}

#[test]
fn of_swaps_that_race_exactly_one_wins() {
    on_every_implementation(|store| {
        let wins: usize = thread::scope(|scope| {
            let racers: Vec<_> = (0..4u8)
                .map(|racer| {
                    let store = &store;
                    scope.spawn(move || store.compare_and_swap("k", Revision::ABSENT, Some(&[racer])).is_ok())
                })
                .collect();
            racers.into_iter().map(|racer| usize::from(racer.join().unwrap())).sum()
        });
        assert_eq!(wins, 1);
    });
}

#[test]
fn a_listing_shows_its_prefix_in_order_however_large() {
    on_every_implementation(|store| {
        let value = vec![1; 60_000];
        for number in 0..12 {
            store.compare_and_swap(&format!("b/{number:02}"), Revision::ABSENT, Some(&value)).unwrap();
        }
        store.compare_and_swap("a/1", Revision::ABSENT, Some(b"")).unwrap();
        store.compare_and_swap("c/1", Revision::ABSENT, Some(b"")).unwrap();
        let keys: Vec<_> = store.list("b/").unwrap().entries.into_iter().map(|entry| entry.key).collect();
        assert_eq!(keys, (0..12).map(|number| format!("b/{number:02}")).collect::<Vec<_>>());
        assert_eq!(store.list("").unwrap().entries.len(), 14);
    });
}

#[test]
fn a_watch_sees_every_changed_key_and_deletions() {
    on_every_implementation(|store| {
        let start = store.list("w/").unwrap().revision;
        let a = store.compare_and_swap("w/a", Revision::ABSENT, Some(b"1")).unwrap();
        store.compare_and_swap("w/a", a, Some(b"2")).unwrap();
        let b = store.compare_and_swap("w/b", Revision::ABSENT, Some(b"1")).unwrap();
        store.compare_and_swap("other", Revision::ABSENT, Some(b"1")).unwrap();
        store.compare_and_swap("w/b", b, None).unwrap();
        let seen = store.watch("w/", start, Duration::ZERO).unwrap();
        let shown: Vec<_> = seen.changes.iter().map(|c| (c.key.as_str(), c.value.as_deref())).collect();
        assert_eq!(shown, [("w/a", Some(&b"2"[..])), ("w/b", None)]);
        assert!(store.watch("w/", seen.revision, Duration::ZERO).unwrap().changes.is_empty());
    });
}

#[test]
fn a_watch_wakes_at_the_change() {
    on_every_implementation(|store| {
        let start = store.list("").unwrap().revision;
        let watcher = {
            let store = Arc::clone(&store);
            thread::spawn(move || {
                let begun = Instant::now();
                (store.watch("w/", start, Duration::from_secs(20)).unwrap(), begun.elapsed())
            })
        };
        store.compare_and_swap("other", Revision::ABSENT, Some(b"1")).unwrap();
        store.compare_and_swap("w/a", Revision::ABSENT, Some(b"1")).unwrap();
        let (seen, waited) = watcher.join().unwrap();
        assert_eq!(seen.changes.len(), 1);
        assert!(waited < Duration::from_secs(10));
    });
}

#[test]
fn requests_beyond_the_limits_are_refused() {
    on_every_implementation(|store| {
        let long = "k".repeat(256);
        assert!(matches!(store.get(&long), Err(DirectoryError::Refused { .. })));
        let large = vec![0; (64 << 10) + 1];
        assert!(matches!(
            store.compare_and_swap("k", Revision::ABSENT, Some(&large)),
            Err(DirectoryError::Refused { .. })
        ));
    });
}

#[test]
fn image_numbers_are_never_given_twice() {
    on_every_implementation(|store| {
        let mut numbers: Vec<_> = thread::scope(|scope| {
            let takers: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        (0..5).map(|_| allocate_image_number(&*store).unwrap().0).collect::<Vec<_>>()
                    })
                })
                .collect();
            takers.into_iter().flat_map(|taker| taker.join().unwrap()).collect()
        });
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=15).collect::<Vec<_>>());
    });
}

#[test]
fn typed_records_are_read_back() {
    on_every_implementation(|store| {
        let name = "h1".parse().unwrap();
        let mut host = HostRecord {
            advertise: "[fd00::1]:7701".parse().unwrap(),
            underlay: "fd00::1".parse().unwrap(),
            api: None,
            incarnation: 1,
            cordoned: false,
        };
        store.publish(&name, &host).unwrap();
        host.incarnation = 2;
        let revision = store.publish(&name, &host).unwrap();
        let (hosts, _) = store.read_all::<HostRecord>().unwrap();
        assert_eq!(hosts.len(), 1);
        assert_eq!((hosts[0].1.revision, &hosts[0].1.record), (revision, &host));
        let address = "fd00::d1".parse().unwrap();
        assert_eq!(store.read::<DeviceRecord>(&address).unwrap(), None);
        assert!(store.swap::<HostRecord>(&name, revision, None).is_ok());
        assert_eq!(store.read::<HostRecord>(&name).unwrap(), None);
    });
}

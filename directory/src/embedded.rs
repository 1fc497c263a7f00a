//! The directory inside one host's daemon, on redb.
//!
//! Three tables: `entries` (key → revision, deleted, value), `changes` (revision → key, one row per key:
//! its newest change), `counters`. Deleted keys stay as tombstones, so that a watcher learns of them, up
//! to [`MAX_TOMBSTONES`]; beyond that the oldest is dropped and `forgotten` remembers how far back a
//! watch may start.

use std::{
    ops::Bound,
    path::Path,
    sync::{Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::store::{Change, Changes, Directory, DirectoryError, Entry, Listing, Revision, check};

/// Deleted keys kept for watchers.
pub const MAX_TOMBSTONES: u64 = 4096;

/// Most changes one watch returns; the next one goes on where it ended.
const MAX_CHANGES: usize = 1024;

const ENTRIES: TableDefinition<'_, &str, (u64, bool, &[u8])> = TableDefinition::new("entries");
const CHANGES: TableDefinition<'_, u64, &str> = TableDefinition::new("changes");
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");

/// A durable directory in one file.
pub struct Embedded {
    database: Database,
    latest: Mutex<u64>,
    changed: Condvar,
}

fn storage(error: impl Into<redb::Error>) -> DirectoryError {
    DirectoryError::Storage { reason: error.into().to_string() }
}

impl Embedded {
    /// Opens the store at `path`, creating it when absent.
    ///
    /// # Errors
    /// [`DirectoryError::Storage`]: not readable, damaged, or held by another process.
    pub fn open(path: &Path) -> Result<Self, DirectoryError> {
        let database = Database::create(path).map_err(storage)?;
        let write = database.begin_write().map_err(storage)?;
        write.open_table(ENTRIES).map_err(storage)?;
        write.open_table(CHANGES).map_err(storage)?;
        let latest = {
            let counters = write.open_table(COUNTERS).map_err(storage)?;
            counter(&counters, "revision")?
        };
        write.commit().map_err(storage)?;
        Ok(Self { database, latest: Mutex::new(latest), changed: Condvar::new() })
    }

    fn changes_after(&self, prefix: &str, after: Revision) -> Result<Changes, DirectoryError> {
        let read = self.database.begin_read().map_err(storage)?;
        let counters = read.open_table(COUNTERS).map_err(storage)?;
        if after.0 < counter(&counters, "forgotten")? {
            return Err(DirectoryError::Forgotten { after });
        }
        let latest = counter(&counters, "revision")?;
        let changes = read.open_table(CHANGES).map_err(storage)?;
        let entries = read.open_table(ENTRIES).map_err(storage)?;
        let mut seen = Changes { changes: Vec::new(), revision: Revision(latest) };
        for row in changes.range((Bound::Excluded(after.0), Bound::Unbounded)).map_err(storage)? {
            let (revision, key) = row.map_err(storage)?;
            let (revision, key) = (revision.value(), key.value());
            if !key.starts_with(prefix) {
                continue;
            }
            let Some(entry) = entries.get(key).map_err(storage)? else { continue };
            let (_, deleted, value) = entry.value();
            seen.changes.push(Change {
                key: key.to_owned(),
                revision: Revision(revision),
                value: (!deleted).then(|| value.to_vec()),
            });
            if seen.changes.len() == MAX_CHANGES {
                seen.revision = Revision(revision);
                break;
            }
        }
        Ok(seen)
    }
}

fn counter(table: &impl ReadableTable<&'static str, u64>, name: &str) -> Result<u64, DirectoryError> {
    Ok(table.get(name).map_err(storage)?.map_or(0, |value| value.value()))
}

impl Directory for Embedded {
    fn get(&self, key: &str) -> Result<Option<Entry>, DirectoryError> {
        check(key, None)?;
        let read = self.database.begin_read().map_err(storage)?;
        let entries = read.open_table(ENTRIES).map_err(storage)?;
        live(&entries, key)
    }

    fn list(&self, prefix: &str) -> Result<Listing, DirectoryError> {
        check(prefix, None)?;
        let read = self.database.begin_read().map_err(storage)?;
        let revision = counter(&read.open_table(COUNTERS).map_err(storage)?, "revision")?;
        let table = read.open_table(ENTRIES).map_err(storage)?;
        let mut entries = Vec::new();
        for row in table.range(prefix..).map_err(storage)? {
            let (key, entry) = row.map_err(storage)?;
            if !key.value().starts_with(prefix) {
                break;
            }
            let (set_at, deleted, value) = entry.value();
            if !deleted {
                entries.push(Entry {
                    key: key.value().to_owned(),
                    value: value.to_vec(),
                    revision: Revision(set_at),
                });
            }
        }
        Ok(Listing { entries, revision: Revision(revision) })
    }

    fn compare_and_swap(
        &self,
        key: &str,
        expected: Revision,
        value: Option<&[u8]>,
    ) -> Result<Revision, DirectoryError> {
        check(key, value)?;
        let write = self.database.begin_write().map_err(storage)?;
        let revision = {
            let mut entries = write.open_table(ENTRIES).map_err(storage)?;
            let mut changes = write.open_table(CHANGES).map_err(storage)?;
            let mut counters = write.open_table(COUNTERS).map_err(storage)?;
            let current = live(&entries, key)?;
            if current.as_ref().map_or(Revision::ABSENT, |entry| entry.revision) != expected {
                return Err(DirectoryError::Conflict { current });
            }
            if current.is_none() && value.is_none() {
                return Ok(Revision::ABSENT);
            }
            let revision = counter(&counters, "revision")? + 1;
            counters.insert("revision", revision).map_err(storage)?;
            let tombstones = counter(&counters, "tombstones")?;
            let before = entries
                .insert(key, (revision, value.is_none(), value.unwrap_or_default()))
                .map_err(storage)?;
            let (former, was_tombstone) = before.map_or((None, false), |entry| {
                let (former, deleted, _) = entry.value();
                (Some(former), deleted)
            });
            if let Some(former) = former {
                changes.remove(former).map_err(storage)?;
            }
            changes.insert(revision, key).map_err(storage)?;
            let tombstones = tombstones + u64::from(value.is_none()) - u64::from(was_tombstone);
            counters.insert("tombstones", tombstones).map_err(storage)?;
            if tombstones > MAX_TOMBSTONES {
                forget_oldest(&mut entries, &mut changes, &mut counters)?;
            }
            revision
        };
        write.commit().map_err(storage)?;
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        *latest = (*latest).max(revision);
        drop(latest);
        self.changed.notify_all();
        Ok(Revision(revision))
    }

    fn watch(&self, prefix: &str, after: Revision, timeout: Duration) -> Result<Changes, DirectoryError> {
        check(prefix, None)?;
        let deadline = Instant::now() + timeout;
        loop {
            let seen = self.changes_after(prefix, after)?;
            let left = deadline.saturating_duration_since(Instant::now());
            if !seen.changes.is_empty() || left.is_zero() {
                return Ok(seen);
            }
            let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
            if *latest <= seen.revision.0 {
                drop(self.changed.wait_timeout(latest, left));
            }
        }
    }
}

fn live(
    entries: &impl ReadableTable<&'static str, (u64, bool, &'static [u8])>,
    key: &str,
) -> Result<Option<Entry>, DirectoryError> {
    Ok(entries.get(key).map_err(storage)?.and_then(|entry| {
        let (revision, deleted, value) = entry.value();
        (!deleted).then(|| Entry { key: key.to_owned(), value: value.to_vec(), revision: Revision(revision) })
    }))
}

/// Drops the oldest tombstone.
fn forget_oldest(
    entries: &mut redb::Table<'_, &'static str, (u64, bool, &'static [u8])>,
    changes: &mut redb::Table<'_, u64, &'static str>,
    counters: &mut redb::Table<'_, &'static str, u64>,
) -> Result<(), DirectoryError> {
    let mut oldest = None;
    for row in changes.iter().map_err(storage)? {
        let (revision, key) = row.map_err(storage)?;
        if entries.get(key.value()).map_err(storage)?.is_some_and(|entry| entry.value().1) {
            oldest = Some((revision.value(), key.value().to_owned()));
            break;
        }
    }
    if let Some((revision, key)) = oldest {
        entries.remove(key.as_str()).map_err(storage)?;
        changes.remove(revision).map_err(storage)?;
        counters.insert("forgotten", revision).map_err(storage)?;
        let tombstones = counter(counters, "tombstones")?;
        counters.insert("tombstones", tombstones - 1).map_err(storage)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_swapped_is_there_after_a_restart() {
        let dir = crate::contract::ScratchDir::new();
        let path = dir.path().join("directory.redb");
        let first = {
            let store = Embedded::open(&path).unwrap();
            store.compare_and_swap("a", Revision::ABSENT, Some(b"1")).unwrap()
        };
        let store = Embedded::open(&path).unwrap();
        assert_eq!(store.get("a").unwrap().unwrap().value, b"1");
        let second = store.compare_and_swap("b", Revision::ABSENT, Some(b"2")).unwrap();
        assert!(second > first);
    }

    #[test]
    fn a_store_held_by_another_is_refused_not_damaged() {
        let dir = crate::contract::ScratchDir::new();
        let path = dir.path().join("directory.redb");
        let _held = Embedded::open(&path).unwrap();
        assert!(matches!(Embedded::open(&path), Err(DirectoryError::Storage { .. })));
    }

    #[test]
    fn old_deletions_are_forgotten_and_watchers_told() {
        let dir = crate::contract::ScratchDir::new();
        let store = Embedded::open(&dir.path().join("directory.redb")).unwrap();
        // Shrink the allowance by pretending most of it is used.
        let write = store.database.begin_write().unwrap();
        write.open_table(COUNTERS).unwrap().insert("tombstones", MAX_TOMBSTONES - 1).unwrap();
        write.commit().unwrap();
        let start = store.list("").unwrap().revision;
        for key in ["a", "b"] {
            let set = store.compare_and_swap(key, Revision::ABSENT, Some(b"x")).unwrap();
            store.compare_and_swap(key, set, None).unwrap();
        }
        assert!(matches!(store.watch("", start, Duration::ZERO), Err(DirectoryError::Forgotten { .. })));
        let now = store.list("").unwrap();
        assert!(store.watch("", now.revision, Duration::ZERO).unwrap().changes.is_empty());
    }
}

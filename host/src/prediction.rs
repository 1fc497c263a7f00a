//! What this host knows of where users go: a history for each user whose machine it has or had, and what it learned over
//! all of them. In memory as far as it is in use, in `STATE_DIR/predictions` all of it.
//!
//! - [`ahead`]: what the daemon does with it.
//!
//! Invariants:
//! - An event counts once, and none counts that is older than what is known.
//! - A history follows its machine. While its former owner is asked for it events wait, and count behind what comes.
//! - At most [`MOST_USERS`] histories are in memory; damaged or missing files mean less knowledge, and nothing else.
//!
//! Files are one byte of version, then postcard. They are replaced as a whole, without waiting for the disk: a power
//! cut may cost what was learned last.

mod ahead;

pub(crate) use ahead::nearest;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kage_machine::{UserName, identity::ApName};
use kage_replicate::predict::{Everybody, Forecast, History, Places, Score};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::sync::watch;

/// Version of the files, and of a history that goes to another host.
const VERSION: u8 = 1;

/// Histories in memory; the one not used for longest gives way.
const MOST_USERS: usize = 4096;

/// Largest history taken from a file or another host.
pub const MAX_HISTORY_BYTES: usize = 256 << 10;

/// Largest file of what is known over all users.
const MAX_EVERYBODY_BYTES: usize = 64 << 20;

/// Events that wait for a history; the oldest give way.
const MOST_WAITING: usize = 256;

/// How far in the future the last event of a history from elsewhere may be: clocks differ.
const AHEAD_MS: u64 = 60_000;

/// What is kept of a user.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    history: History,
    /// When its last event was, in milliseconds since 1970.
    last_ms: u64,
}

impl Kept {
    /// Reads what another host sent.
    ///
    /// # Errors
    /// In words.
    pub fn from_foreign(bytes: &[u8], now_ms: u64) -> Result<Self, String> {
        let mut kept: Self = decode(bytes, MAX_HISTORY_BYTES)?;
        if kept.last_ms > now_ms.saturating_add(AHEAD_MS) {
            return Err("its last event is in the future; do the hosts' clocks differ?".to_owned());
        }
        // By this clock: else what comes in the meantime would be older than it.
        kept.last_ms = kept.last_ms.min(now_ms);
        Ok(kept)
    }

    /// When its last event was, in milliseconds since 1970.
    #[must_use]
    pub const fn last_ms(&self) -> u64 {
        self.last_ms
    }
}

/// Something that happened to a user.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Arrived(ApName),
    Left,
}

/// A change of access point that was taken in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learned {
    /// Where the user is now.
    pub ap: ApName,
    /// At which place the forecast just before had it, from 0.
    pub rank: Option<u8>,
}

/// How a user stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outlook {
    /// Where the user is.
    pub at: Option<ApName>,
    /// Where the user may be next.
    pub forecast: Option<Forecast>,
    /// How often forecasts were right.
    pub score: Score,
}

#[derive(Default)]
struct Known {
    kept: Kept,
    /// Not in its file yet.
    dirty: bool,
    /// How many former owners are being asked.
    asked: u32,
    waiting: Vec<(Event, u64)>,
    /// When it was last needed.
    used: u64,
}

#[derive(Default)]
struct Inner {
    users: BTreeMap<UserName, Known>,
    /// `None` until it is needed.
    everybody: Option<Everybody>,
    everybody_dirty: bool,
    places: Arc<Places>,
    uses: u64,
}

/// All that is known. Whatever reads a history may read its file, and so blocks.
pub struct Predictions {
    dir: PathBuf,
    inner: Mutex<Inner>,
    /// Held by whoever writes files.
    writing: Mutex<()>,
    /// Bumped whenever a former owner has answered.
    answered: watch::Sender<u64>,
}

impl Predictions {
    /// With files in `STATE_DIR/predictions`, made when something is written.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self {
            dir: state_dir.join("predictions"),
            inner: Mutex::default(),
            writing: Mutex::default(),
            answered: watch::Sender::new(0),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, user: &UserName) -> PathBuf {
        self.dir.join("users").join(format!("{user}.bin"))
    }

    fn everybody_file(&self) -> PathBuf {
        self.dir.join("everybody.bin")
    }

    /// The site's access points are these from now on.
    pub fn set_places(&self, places: Places) {
        self.inner().places = Arc::new(places);
    }

    /// The site's access points.
    #[must_use]
    pub fn places(&self) -> Arc<Places> {
        self.inner().places.clone()
    }

    /// Works on what is known of a user.
    fn with<T>(&self, user: &UserName, work: impl FnOnce(&mut Known, &mut Everybody, &Places) -> T) -> T {
        let mut inner = self.inner();
        let Inner { users, everybody, places, uses, .. } = &mut *inner;
        let everybody = everybody.get_or_insert_with(|| load(&self.everybody_file(), MAX_EVERYBODY_BYTES));
        *uses += 1;
        let known = users
            .entry(user.clone())
            .or_insert_with(|| Known { kept: load(&self.file(user), MAX_HISTORY_BYTES), ..Known::default() });
        known.used = *uses;
        let result = work(known, everybody, places);
        if inner.users.len() > MOST_USERS {
            self.make_room(&mut inner);
        }
        result
    }

    /// Forgets the history that was not used for longest, once it is in its file.
    fn make_room(&self, inner: &mut Inner) {
        let idle = inner.users.iter().filter(|(_, known)| known.asked == 0);
        let Some(oldest) = idle.min_by_key(|(_, known)| known.used).map(|(user, _)| user.clone()) else {
            return;
        };
        if let Some(known) = inner.users.remove(&oldest).filter(|known| known.dirty)
            && let Err(error) = replace(&self.file(&oldest), &encode(&known.kept))
        {
            tracing::warn!(%error, user = %oldest, "what was learned of a user is lost");
        }
    }

    /// A user is at an access point, since then. What follows from it, unless something later is known or a former
    /// owner is still asked.
    pub fn arrived(&self, user: &UserName, ap: &ApName, at_ms: u64) -> Option<Learned> {
        self.take_in(user, Event::Arrived(ap.clone()), at_ms)
    }

    /// A user has left.
    pub fn left(&self, user: &UserName, at_ms: u64) {
        self.take_in(user, Event::Left, at_ms);
    }

    fn take_in(&self, user: &UserName, event: Event, at_ms: u64) -> Option<Learned> {
        let (learned, changed) = self.with(user, |known, everybody, places| {
            if known.asked > 0 {
                if known.waiting.len() >= MOST_WAITING {
                    known.waiting.remove(0);
                }
                known.waiting.push((event, at_ms));
                return (None, false);
            }
            let learned = known.take_in(everybody, places, event, at_ms);
            let changed = learned.is_some();
            (learned, changed)
        });
        if changed {
            self.inner().everybody_dirty = true;
        }
        learned
    }

    /// From now on events wait, until the former owner that is asked has answered.
    pub fn ask(&self, user: &UserName) {
        self.with(user, |known, _, _| known.asked += 1);
    }

    /// A former owner has answered, or has not. What it knows counts when it is newer; then come the events that waited.
    pub fn answered(&self, user: &UserName, answer: Option<Kept>) -> Vec<Learned> {
        let learned = self.with(user, |known, everybody, places| {
            known.asked = known.asked.saturating_sub(1);
            if let Some(newer) = answer.filter(|answer| answer.last_ms > known.kept.last_ms) {
                (known.kept, known.dirty) = (newer, true);
            }
            if known.asked > 0 {
                return Vec::new();
            }
            let waiting = std::mem::take(&mut known.waiting);
            let taken = waiting.into_iter();
            taken.filter_map(|(event, at_ms)| known.take_in(everybody, places, event, at_ms)).collect()
        });
        if !learned.is_empty() {
            self.inner().everybody_dirty = true;
        }
        self.answered.send_modify(|count| *count += 1);
        learned
    }

    /// Waits until no former owner of a user's machine is asked.
    pub async fn settled(&self, user: &UserName) {
        let mut answered = self.answered.subscribe();
        let is_asked = || self.inner().users.get(user).is_some_and(|known| known.asked > 0);
        // The sender lives as long as this.
        let _ = answered.wait_for(|_| !is_asked()).await;
    }

    /// How a user stands.
    #[must_use]
    pub fn outlook(&self, user: &UserName, now_ms: u64) -> Outlook {
        self.with(user, |known, everybody, places| {
            let history = &known.kept.history;
            Outlook {
                at: history.at().cloned(),
                forecast: history.forecast(everybody, places, now_ms),
                score: history.score(),
            }
        })
    }

    /// What is known of a user, for its machine's next owner; `None` where that is nothing.
    #[must_use]
    pub fn for_next_owner(&self, user: &UserName) -> Option<Vec<u8>> {
        self.with(user, |known, _, _| (known.kept.last_ms > 0).then(|| encode(&known.kept)))
    }

    /// Writes what is not in its file yet; blocks. What cannot be written is tried again the next time.
    pub fn write(&self) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let (users, everybody) = {
            let mut inner = self.inner();
            let dirty = |(user, known): (&UserName, &mut Known)| {
                std::mem::take(&mut known.dirty).then(|| (user.clone(), encode(&known.kept)))
            };
            let users: Vec<_> = inner.users.iter_mut().filter_map(dirty).collect();
            let changed = std::mem::take(&mut inner.everybody_dirty);
            (users, inner.everybody.as_ref().filter(|_| changed).map(encode))
        };
        for (user, bytes) in users {
            if let Err(error) = replace(&self.file(&user), &bytes) {
                tracing::warn!(%error, %user, "what was learned of a user is not written for now");
                if let Some(known) = self.inner().users.get_mut(&user) {
                    known.dirty = true;
                }
            }
        }
        if let Some(bytes) = everybody
            && let Err(error) = replace(&self.everybody_file(), &bytes)
        {
            tracing::warn!(%error, "what was learned of all users is not written for now");
            self.inner().everybody_dirty = true;
        }
    }
}

impl Known {
    /// Takes in an event, unless something later is known.
    fn take_in(
        &mut self,
        everybody: &mut Everybody,
        places: &Places,
        event: Event,
        at_ms: u64,
    ) -> Option<Learned> {
        if at_ms < self.kept.last_ms {
            return None;
        }
        (self.kept.last_ms, self.dirty) = (at_ms, true);
        match event {
            Event::Arrived(ap) => {
                let rank = self.kept.history.arrived(everybody, places, &ap, at_ms)?;
                Some(Learned { ap, rank })
            }
            Event::Left => {
                self.kept.history.left(at_ms);
                None
            }
        }
    }
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    // Writing into a growing vector cannot fail for types whose lengths are known.
    postcard::to_extend(value, vec![VERSION]).unwrap_or_default()
}

fn decode<T: DeserializeOwned>(bytes: &[u8], most: usize) -> Result<T, String> {
    if bytes.len() > most {
        return Err(format!("it has {} bytes, at most {most} are taken", bytes.len()));
    }
    match bytes.split_first() {
        Some((&VERSION, body)) => match postcard::take_from_bytes(body) {
            Ok((value, [])) => Ok(value),
            Ok(_) => Err("bytes follow it".to_owned()),
            Err(error) => Err(error.to_string()),
        },
        Some((version, _)) => Err(format!("version {version}, this host reads version {VERSION}")),
        None => Err("it is empty".to_owned()),
    }
}

/// What a file holds; nothing where there is none, or where it is damaged.
fn load<T: DeserializeOwned + Default>(file: &Path, most: usize) -> T {
    let read = || -> io::Result<Vec<u8>> {
        let length = fs::metadata(file)?.len();
        if usize::try_from(length).map_or(true, |length| length > most) {
            return Err(io::Error::other(format!("it has {length} bytes, at most {most} are read")));
        }
        fs::read(file)
    };
    let loaded = match read() {
        Ok(bytes) => decode(&bytes, most),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return T::default(),
        Err(error) => Err(error.to_string()),
    };
    loaded.unwrap_or_else(|reason| {
        tracing::warn!(file = %file.display(), reason, "damaged; what it held is learned anew");
        T::default()
    })
}

/// Replaces a file as a whole.
fn replace(file: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    let new = file.with_extension("new");
    fs::write(&new, bytes)?;
    fs::rename(&new, file)
}

#[cfg(test)]
mod tests;

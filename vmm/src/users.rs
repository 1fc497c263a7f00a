//! Users and groups without rights, one for each VMM process: one that broke out could not even signal another.

use std::{
    collections::BTreeSet,
    sync::{
        LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use rustix::{
    process::Pid,
    rand::{GetRandomFlags, getrandom},
};

/// How many a range has.
const RANGE: u32 = 1 << 16;

/// Those that processes of this program's have now.
static TAKEN: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// Where the search begins: elsewhere in each daemon, since others on this machine share the range.
static NEXT: LazyLock<AtomicU32> = LazyLock::new(|| {
    let mut bytes = [0; 4];
    // Without it the search begins at the first, and still finds a free one.
    let _ = getrandom(&mut bytes, GetRandomFlags::empty());
    AtomicU32::new(u32::from_ne_bytes(bytes))
});

fn taken() -> MutexGuard<'static, BTreeSet<u32>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A user that one process has for itself until this is dropped.
#[derive(Debug)]
pub struct User(u32);

impl User {
    /// A free one of the range that begins with `first`; `None` when all are taken.
    pub fn take(first: u32) -> Option<Self> {
        let mut taken = taken();
        let mut tries = (0..RANGE).map(|_| first + NEXT.fetch_add(1, Ordering::Relaxed) % RANGE);
        let number = tries.find(|number| !taken.contains(number))?;
        taken.insert(number);
        Some(Self(number))
    }

    /// The one that a process of an earlier daemon's has, as the kernel says; `None` for one with rights, and for
    /// one that is kept already.
    pub fn of(process: Pid) -> Option<Self> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.as_raw_nonzero())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        let number = line.split_whitespace().next()?.parse().ok().filter(|&number| number != 0)?;
        // While another handle keeps it, it is that one's to give back.
        taken().insert(number).then(|| Self(number))
    }

    /// Its number.
    pub const fn number(&self) -> u32 {
        self.0
    }
}

impl Drop for User {
    fn drop(&mut self) {
        taken().remove(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_of_a_process_is_kept_once_and_root_is_none() {
        let mut process = std::process::Command::new("sleep");
        let mut process = std::os::unix::process::CommandExt::uid(&mut process, 0x7001_0007)
            .arg("60")
            .spawn()
            .expect("tests run as root");
        let pid = Pid::from_raw(process.id() as i32).unwrap();
        let user = User::of(pid).expect("a user without rights");
        assert_eq!(user.number(), 0x7001_0007);
        assert!(User::of(pid).is_none());
        drop(user);
        assert!(User::of(pid).is_some());
        assert!(User::of(rustix::process::getpid()).is_none());
        process.kill().unwrap();
        process.wait().unwrap();
    }

    #[test]
    fn nobody_gets_a_user_that_another_has() {
        let first = 0x7000_0000;
        let kept = User::take(first).unwrap();
        // Once around, giving each back at once.
        for _ in 0..=RANGE {
            let other = User::take(first).unwrap();
            assert_ne!(kept.number(), other.number());
            assert_eq!(other.number() >> 16, first >> 16);
        }
        let number = kept.number();
        drop(kept);
        assert!((0..=RANGE).any(|_| User::take(first).is_some_and(|other| other.number() == number)));
    }
}

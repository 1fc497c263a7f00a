//! What the guest's parts expect of the kernel around them, for tests on the host.
//!
//! A test crate that compiles a part of the guest makes these its own root modules.

#![allow(dead_code, reason = "some tests use all of it, others a part")]

pub mod disk;
pub mod executor;

/// The block device is a simulated one.
pub mod virtio {
    pub use super::disk as block;
}

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The guest has one thread, and so has a test while it holds this.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    executor::start();
    disk::attach(0, 0);
    memory::set_free_bytes(1 << 30);
    alone
}

/// Memory that never ends unless a test says so.
pub mod memory {
    use std::sync::atomic::{AtomicUsize, Ordering};

    static FREE: AtomicUsize = AtomicUsize::new(1 << 30);

    pub fn heap_free_bytes() -> usize {
        FREE.load(Ordering::Relaxed)
    }

    pub fn kernel_room(bytes: usize) -> bool {
        heap_free_bytes() >= bytes + super::heap::RESERVE / 2
    }

    pub fn set_free_bytes(bytes: usize) {
        FREE.store(bytes, Ordering::Relaxed);
    }
}

/// What the heap keeps for connections.
pub mod heap {
    pub const RESERVE: usize = 5 << 20;

    /// A buffer with something in it.
    pub fn buffer(bytes: usize) -> Vec<u8> {
        vec![0xb5; bytes]
    }
}

/// A clock that goes on by itself.
pub mod time {
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        time::Duration,
    };

    static NOW: AtomicU64 = AtomicU64::new(1);

    /// Goes on to a time, unless it is past.
    pub fn advance(to: Duration) {
        NOW.fetch_max(u64::try_from(to.as_micros()).unwrap(), Ordering::Relaxed);
    }

    pub use super::executor::{Sleep, sleep_until};

    pub fn now() -> Duration {
        Duration::from_micros(NOW.fetch_add(1, Ordering::Relaxed))
    }

    pub fn wall() -> Duration {
        Duration::from_secs(1_000_000_000) + now()
    }
}

/// Identities by a plain counter.
pub mod vid {
    use std::sync::atomic::{AtomicU64, Ordering};

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub enum Kind {
        Process = 1,
        File = 2,
        Socket = 3,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub struct Vid(Kind, u64);

    impl Vid {
        pub const fn kind(self) -> Kind {
            self.0
        }

        pub const fn index(self) -> u64 {
            self.1
        }
    }

    static NEXT: AtomicU64 = AtomicU64::new(1);
    /// Indices before it may be given out.
    static LIMIT: AtomicU64 = AtomicU64::new(1 << 36);

    pub const fn again(kind: Kind, index: u64) -> Vid {
        Vid(kind, index)
    }

    pub fn upcoming() -> u64 {
        NEXT.load(Ordering::Relaxed)
    }

    pub fn resume(next: u64) -> bool {
        let ours = next <= LIMIT.load(Ordering::Relaxed);
        if ours {
            NEXT.fetch_max(next, Ordering::Relaxed);
        }
        ours
    }

    pub fn set_limit(limit: u64) {
        LIMIT.store(limit, Ordering::Relaxed);
    }

    pub fn has_room() -> bool {
        true
    }

    pub fn next(kind: Kind) -> Vid {
        Vid(kind, NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

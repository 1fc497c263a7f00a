//! What the guest's parts expect of the kernel around them, for tests on the host.
//!
//! A test crate that compiles a part of the guest makes these its own root modules.

#![allow(dead_code, reason = "some tests use all of it, others a part")]

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The guest has one thread, and so has a test while it holds this.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
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
}

/// A clock that goes on by itself.
pub mod time {
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        time::Duration,
    };

    static NOW: AtomicU64 = AtomicU64::new(1);

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

    pub fn has_room() -> bool {
        true
    }

    pub fn next(kind: Kind) -> Vid {
        Vid(kind, NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

//! The unsafe part of the VMM: mappings, ioctls that have no wrapper, the watchdog's signal.
#![expect(unsafe_code, reason = "maps memory, issues ioctls, installs a signal handler")]

pub mod faults;
pub mod mapping;
pub mod ring;
pub mod slice;
pub mod watchdog;
pub mod words;

pub use mapping::Mapping;
pub use words::Words;

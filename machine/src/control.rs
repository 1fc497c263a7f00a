//! Messages between the daemon and one VMM process.

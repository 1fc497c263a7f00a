//! Courtesy towards machines on the same processors.
//!
//! Copying computes without end; a machine wakes up four thousand times a second for microseconds. A kernel that
//! preempts lazily (Linux 6.13 and later) lets who woke up wait until whoever computes enters it, or to the next tick:
//! 4 ms, which a guest sees (measured: longest gap 4.2 ms instead of 1.5, on two cores).

/// Pages handled between two calls of [`let_others_run`]: some 50 to 150 µs of work.
pub const PAGES: usize = 16;

/// Bytes compressed between two.
pub const BYTES: usize = PAGES * kage_machine::PAGE_SIZE / 2;

/// Enters the kernel, so that who waits for this processor gets it. Costs 0.1 µs where nobody does.
pub fn let_others_run() {
    let _ = rustix::thread::gettid();
}

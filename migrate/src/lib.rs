//! Handover: moves a running machine from one host to another.
//!
//! ```text
//! source   Preparing ─▶ Converging ─▶ Switching ─▶ Offered ─▶ Released ─▶ Draining
//! target   Preparing ─▶ Mirroring ─▶ Ready ─▶ Running(gated) ─▶ Running
//! record   (N, A)  ─▶ (N, A, intent B)                       ─▶ (N+1, B)      or (N+2, A)
//! ```
//! - [`source`], [`target`]: the two deciders, pure; their headers draw the states.
//! - [`ownership`]: what the directory's record means for a handover, and its changes.
//! - [`recover`]: what a daemon does with what a former one left.
//! - [`converge`]: when to stop copying and switch; [`clock`]: the offset between two hosts.
//! - [`drive`]: the blocking shell around them; [`report`], [`outcome`]: what came of it.
//!
//! Invariants, explored exhaustively over the real deciders (`tests/ownership_model.rs`) and simulated
//! with time, pages and networks (`tests/simulation`):
//! 1. At most one copy of an image whose output can leave, at any instant, whatever dies or is cut.
//! 2. Once everything is back up, one copy emits and its host is the owner; an image is started anew only
//!    when a machine's process died.
//! 3. Memory at the target equals the source's at the switch, and its disk block by block by digest, whatever
//!    an earlier stay left there: digests are compared at each epoch.
//! 4. A block that the owner misses is held by some host. That rests on what the hosts keep of a disk:
//!    - nothing that arrives, and nothing a gated machine writes, is committed before its gate is to open: ended
//!      sooner, it leaves the disk it found, which may hold what the source misses;
//!    - where a gate was opened, the disk says so with the handover's ticket: should the machine and its daemon end
//!      before the record does, that host says it holds a copy, and claims ([`recover::ran_here`]).
//!
//! What happens when, before or in a step, something fails. "Kept": the machine runs on at A, connections
//! alive, and the reason is reported. B drops what it has as soon as it sees the link's end.
//!
//! | step | link cut, or B's daemon dies | A's daemon dies | B's machine dies | A's machine dies | directory away |
//! | --- | --- | --- | --- | --- | --- |
//! | Preparing | kept | machine runs on; adopted | kept: B says why | restarted at A, one swap | kept: the intent cannot be recorded |
//! | Converging | kept | machine runs on; the intent is cleared at adoption | kept: B says why | restarted at A, one swap | goes on: nothing is asked of it |
//! | Switching (paused, nothing sent) | resumed at once: kept | adopted paused: take-back, kept | kept: B refuses | restarted at A, one swap | goes on |
//! | Offered | A takes back, B claims: one swap wins; kept or handed over | adopted paused: take-back against B's claim; kept or handed over | B says so, which binds: resumed at once, kept | unnoticed: B's start is answered by the release | link up: goes on. Link cut too: paused and gated, in doubt until it is back |
//! | Released | B has heard it, or claims by itself; A asks until one is so | adopted released: tells B so on a new link | B restarts it after its claim, or says "nothing held" and A does | handed over | B runs; N+1 is recorded when it is back; no next handover before |
//! | Draining | handed over | B owns it: A's rest is ended at adoption | as any machine of B | handed over | handed over |
//!
//! And for the pairs the table leaves out: B's daemon dying keeps its machine, so a restarted one adopts it
//! gated (it claims) or running (it confirms); a shell, or a state that never ran, is ended. When A's machine
//! *and* daemon died with an intent open, A asks B: "held" leaves it to B's claim, "nothing held" binds B and
//! A restarts it. A swap whose answer was lost is read again before anything else is done, and one that
//! applies late meets another revision. A silent B after the release leaves A waiting, in doubt: it never
//! runs the machine again on a guess.
//!
//! Deliberately not here: pages still missing at the switch (`--mode postcopy`), backups and failover.
//! Their seams: [`ownership::Standing`] and [`ownership::Change`] for further owners, the target's `Running`
//! for a gate with a second lock, the source's `Draining` for pages asked for after the switch.

pub mod clock;
pub mod converge;
pub mod drive;
pub mod estimate;
pub mod outcome;
pub mod ownership;
pub mod recover;
pub mod report;
pub mod source;
pub mod target;

pub use outcome::{Cause, Outcome};
pub use ownership::Ticket;
pub use report::Report;

//! Handover: moves a running machine from one host to another.

pub mod clock;
pub mod converge;
pub mod drive;
pub mod outcome;
pub mod ownership;
pub mod recover;
pub mod report;
pub mod source;
pub mod target;

pub use outcome::{Cause, Outcome};
pub use ownership::Ticket;
pub use report::Report;

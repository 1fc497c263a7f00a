//! Messages of one handover.

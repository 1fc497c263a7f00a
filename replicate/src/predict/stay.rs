//! How much longer a user stays: the median of stays that lasted longer than this one has.
//!
//! The user's own stays at the place count by how like this one they are (time of day, where the user came from);
//! everybody's stand in where there are few.

use super::{
    everybody::Everybody,
    visits::{self, Visits},
};

/// What everybody's stays weigh together, in stays of the user's.
const EVERYBODY: f32 = 2.0;

/// The half of the time left, in seconds: it is as likely less as more. None where nothing is known of so long a stay.
pub fn left_s(visits: &Visits, everybody: &Everybody, now_ms: u64) -> Option<f64> {
    let (here, last) = (visits.at()?, visits.log().last()?);
    let elapsed_s = now_ms.saturating_sub(visits.since_ms()) as f32 / 1000.0;
    let mut stays: Vec<(f32, f32)> = Vec::new();
    let log = visits.log();
    let before = log.len().checked_sub(2).map(|at| log[at].ap);
    for (at, visit) in log.iter().enumerate().filter(|(_, visit)| visit.ap == last.ap && visit.stay > 0) {
        let same = at.checked_sub(1).map(|at| log[at].ap) == before;
        let weight =
            (0.1 + super::experts::like_time(visit.minute, last.minute)) * if same { 2.0 } else { 1.0 };
        stays.push((visits::stay_s(visit.stay), weight));
    }
    let counted: f32 = everybody.stays(here).map(|(_, count)| f32::from(count)).sum();
    stays.extend(everybody.stays(here).map(|(s, count)| (s, EVERYBODY * f32::from(count) / counted)));
    stays.retain(|&(s, _)| s > elapsed_s);
    stays.sort_by(|a, b| a.0.total_cmp(&b.0));
    let half: f32 = stays.iter().map(|(_, weight)| weight / 2.0).sum();
    let mut sum = 0.0;
    let median = stays.iter().find(|(_, weight)| {
        sum += weight;
        sum >= half
    });
    median.map(|&(s, _)| f64::from(s - elapsed_s))
}

//! Processor time of all of a testbed's hosts together, those of their processes included that have ended.

use std::fs;

use crate::{
    client::Failure,
    testbed::{Testbed, delay},
};

/// Clock ticks in a second (`sysconf(_SC_CLK_TCK)`): 100 on every Linux there is.
const TICKS: f64 = 100.0;

/// Seconds that daemons and machines have used so far. Threads and processes of theirs that have ended are in it: the
/// kernel adds their time to their process's and their daemon's.
///
/// # Errors
/// When the processes cannot be listed.
pub fn used_s(testbed: &Testbed) -> Result<f64, Failure> {
    let pids = testbed.processes().map_err(Failure::new)?;
    let carries_frames = |pid: u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|&byte| byte == 0).nth(1) == Some(delay::COMMAND.as_bytes())
    };
    // One that has just ended counts with its daemon. What makes a link slow is the link.
    let counted = pids.into_iter().filter(|&pid| !carries_frames(pid));
    let stats = counted.filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok());
    Ok(stats.filter_map(|stat| ticks(&stat)).sum::<u64>() as f64 / TICKS)
}

/// Fields 14 to 17 of `/proc/PID/stat`: user and system time, its own and that of children which were waited for. The name
/// in field 2 may hold spaces and parentheses.
fn ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split(' ').skip(11).take(4).map(|field| field.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_read_behind_any_name() {
        let stat = "7 (a) (b) Z) S 1 7 7 0 -1 4194560 100 200 0 0 11 22 33 44 20 0 1 0 4242 5";
        assert_eq!(ticks(stat), Some(110));
        assert_eq!(ticks("nothing"), None);
    }
}

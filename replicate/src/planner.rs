//! What to send now, and what a handover would cost now. Pure.

use std::time::Duration;

use kage_machine::{PAGE_SIZE, PageIndex, PageSet};

use crate::{pace::Rate, tracker::Heat};

/// What a stream moves and gains, as [`crate::Sender::rates`] measures it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StreamRates {
    /// Bytes per second the link takes, or is allowed.
    pub link: Rate,
    /// Bytes on the wire per byte of non-zero memory.
    pub ratio: f64,
    /// Shortest time from an epoch's end to its acknowledgement; zero before the first.
    pub round_trip: Duration,
}

/// What a switch costs beside its pages and the link: vCPU out, harvest, save, restore, first
/// instruction. Measured between two processes at 2 residual pages: 150–250 µs.
pub const SWITCH_FIXED: Duration = Duration::from_micros(250);

/// What a page costs on top of its bytes on the wire (copy, digest, encode, decode, apply): measured
/// 1,500 µs for 1,000 pages between two processes.
pub const SWITCH_PER_PAGE: Duration = Duration::from_nanos(1_250);

/// What a handover would cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes of the pages that would be sent at the switch.
    pub bytes_raw: u64,
    /// The same on the wire.
    pub bytes_wire: u64,
    /// How long nobody would run the machine.
    pub blackout: Duration,
}

/// What a handover would cost if it came now, with that many pages not sent.
#[must_use]
pub fn if_now(due_pages: u32, rates: &StreamRates) -> Estimate {
    let bytes_raw = u64::from(due_pages) * PAGE_SIZE as u64;
    let bytes_wire = (bytes_raw as f64 * rates.ratio) as u64;
    let blackout = SWITCH_FIXED
        .saturating_add(SWITCH_PER_PAGE.saturating_mul(due_pages))
        .saturating_add(rates.round_trip / 2)
        .saturating_add(rates.link.time_for(bytes_wire));
    Estimate { bytes_raw, bytes_wire, blackout }
}

/// How long one more epoch with that many pages would take, acknowledgement included.
#[must_use]
pub fn epoch_time(due_pages: u32, rates: &StreamRates) -> Duration {
    let bytes_wire = f64::from(due_pages) * PAGE_SIZE as f64 * rates.ratio;
    rates.link.time_for(bytes_wire as u64).saturating_add(rates.round_trip)
}

/// Which of the pages due to send now: the coldest, up to `budget` pages. Hot ones would be
/// written again before the switch; sent later, they are sent once.
#[must_use]
pub fn coldest(due: &PageSet, heat: impl Fn(PageIndex) -> Heat, budget: u32) -> PageSet {
    if due.len() <= budget {
        return due.clone();
    }
    let mut by_heat = [0u32; 256];
    for page in due.iter() {
        by_heat[usize::from(heat(page).0)] += 1;
    }
    // All pages below `limit`, and as many of that heat as are left.
    let (mut limit, mut left) = (0, budget);
    while left >= by_heat[limit] && limit < 255 {
        left -= by_heat[limit];
        limit += 1;
    }
    let mut now = PageSet::empty(due.pages());
    for page in due.iter() {
        let heat = usize::from(heat(page).0);
        if heat < limit {
            now.insert(page);
        } else if heat == limit && left > 0 {
            left -= 1;
            now.insert(page);
        }
    }
    now
}

/// Pages cooler than this are sent at once: not written in any of the last three harvests.
const COLD: Heat = Heat(32);

/// How much of a switch may be spent on pages that a mirror was not sent since they are always written anew. Of the
/// 5 ms that a handover to a mirror may stop the machine; a hot page then costs its delta once, at the switch, instead
/// of at every harvest.
pub const HOLD: Duration = Duration::from_millis(2);

/// What to send a mirror now: cold pages at once (the paper's "proactively flush rarely updated pages"), of the others
/// the coolest ones, until those left could be sent in `hold`.
#[must_use]
pub fn for_mirror(
    due: &PageSet,
    heat: impl Fn(PageIndex) -> Heat,
    rates: &StreamRates,
    hold: Duration,
) -> PageSet {
    let page = SWITCH_PER_PAGE + rates.link.time_for((PAGE_SIZE as f64 * rates.ratio) as u64);
    let left = u32::try_from(hold.as_nanos() / page.as_nanos().max(1)).unwrap_or(u32::MAX);
    let mut now = coldest(due, &heat, due.len().saturating_sub(left));
    for page in due.iter().filter(|&page| heat(page) < COLD) {
        now.insert(page);
    }
    now
}

/// Shortest time between two harvests. Each costs a question to the machine and a fault at the first write to every
/// page it writes again: ten a second with an epoch to two mirrors took 7 ms of processor a second, nearly as much as
/// a machine that is typed at takes itself.
pub const HARVEST_LEAST: Duration = Duration::from_millis(100);
/// And longest. What it costs the machine, a fault for each page of its working set, comes once per harvest; what a
/// handover sends for it is bounded by [`HARVEST_PAGES`], but where a quiet machine has just begun to write.
pub const HARVEST_MOST: Duration = Duration::from_millis(3200);

/// Pages that may be found in one harvest. A handover sends them before it pauses the machine: some 10 ms at
/// 50 Mbit/s, as deltas.
const HARVEST_PAGES: f64 = 256.0;

/// How long after a harvest that found what was written in `since` the next one is due.
#[must_use]
pub fn next_harvest(since: Duration, dirty_pages: u32) -> Duration {
    let longer = since.saturating_mul(2);
    let wanted = since.as_secs_f64() * HARVEST_PAGES / f64::from(dirty_pages);
    let wanted = Duration::try_from_secs_f64(wanted).unwrap_or(HARVEST_MOST);
    // One quiet moment is no reason to look away for long.
    wanted.min(longer).clamp(HARVEST_LEAST, HARVEST_MOST)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_thin_link_is_what_a_handover_costs() {
        let rates = StreamRates {
            link: Rate::bytes_per_s(6.25e6),
            ratio: 0.5,
            round_trip: Duration::from_millis(10),
        };
        let estimate = if_now(100, &rates);
        assert_eq!((estimate.bytes_raw, estimate.bytes_wire), (409_600, 204_800));
        assert_eq!(estimate.blackout, Duration::from_micros(250 + 125 + 5_000 + 32_768));
        assert_eq!(epoch_time(100, &rates), Duration::from_micros(10_000 + 32_768));
    }

    #[test]
    fn senseless_rates_do_not_overflow() {
        let rates = StreamRates { link: Rate::bytes_per_s(0.0), ratio: 1e300, round_trip: Duration::MAX };
        assert_eq!(if_now(u32::MAX, &rates).blackout, Duration::MAX);
        assert_eq!(epoch_time(u32::MAX, &rates), Duration::MAX);
    }

    #[test]
    fn a_mirror_gets_cold_pages_at_once_and_hot_ones_where_they_would_hold_up_a_switch() {
        let rates =
            StreamRates { link: Rate::bytes_per_s(6.25e6), ratio: 0.1, round_trip: Duration::from_millis(1) };
        let heat = |page: PageIndex| Heat(if page.0 < 10 { 16 } else { 255 });
        let due = PageSet::full(20);
        let now: Vec<_> = for_mirror(&due, heat, &rates, HOLD).iter().map(|page| page.0).collect();
        assert_eq!(now, (0..10).collect::<Vec<_>>(), "ten hot pages take 0.7 ms");
        assert_eq!(for_mirror(&due, heat, &rates, Duration::ZERO).len(), 20);
        let thin = StreamRates { link: Rate::bytes_per_s(1e5), ..rates };
        assert_eq!(for_mirror(&due, heat, &thin, HOLD).len(), 20);
    }

    #[test]
    fn a_machine_that_nobody_uses_is_looked_at_less_and_less() {
        let mut interval = HARVEST_LEAST;
        for _ in 0..10 {
            interval = next_harvest(interval, 0);
        }
        assert_eq!(interval, HARVEST_MOST);
        assert_eq!(next_harvest(interval, u32::MAX), HARVEST_LEAST);
        assert_eq!(next_harvest(Duration::ZERO, 0), HARVEST_LEAST);
        assert_eq!(next_harvest(Duration::MAX, 1), HARVEST_MOST);
    }

    #[test]
    fn a_machine_is_looked_at_before_it_has_written_too_much() {
        // 500 pages a second, however it was looked at before.
        for since_ms in [100, 300, 800] {
            let mut since = Duration::from_millis(since_ms);
            for _ in 0..4 {
                since = next_harvest(since, (since.as_secs_f64() * 500.0) as u32);
            }
            assert!((500..530).contains(&since.as_millis()), "{since:?}");
        }
        // A small working set, always the same: as seldom as may be.
        let mut since = HARVEST_LEAST;
        for _ in 0..8 {
            since = next_harvest(since, 40);
        }
        assert_eq!(since, HARVEST_MOST);
    }

    proptest! {
        #[test]
        fn the_budget_is_used_and_no_page_left_is_colder(
            heats in prop::collection::vec(prop_oneof![Just(0u8), Just(128), Just(255), any::<u8>()], 1..80),
            budget in 0u32..90,
        ) {
            let due = PageSet::full(heats.len() as u32);
            let heat = |page: PageIndex| Heat(heats[page.0 as usize]);
            let now = coldest(&due, heat, budget);
            prop_assert_eq!(now.len(), budget.min(due.len()));
            let hottest = now.iter().map(heat).max();
            let mut left = due;
            left.subtract(&now);
            if let (Some(hottest), Some(coldest)) = (hottest, left.iter().map(heat).min()) {
                prop_assert!(hottest <= coldest);
            }
        }
    }
}

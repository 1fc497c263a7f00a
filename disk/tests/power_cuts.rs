//! Power cuts at random operations of the medium, against a model.

mod model;

use std::panic::{AssertUnwindSafe, catch_unwind};

use kage_disk::{Initial, Seeded};
use model::{Harness, Op, drawn, eager, small};

/// Runs one seed: a disk's life with a few cuts in it.
fn life(seed: u64) -> (u64, u64) {
    let mut random = Seeded::new(seed);
    let blocks = 60 + random.below(140);
    // From hardly enough log to plenty.
    let segments = u32::try_from(blocks / 6 + 8 + random.below(blocks / 3)).unwrap();
    let initial = if random.below(4) == 0 { Initial::Missing } else { Initial::Zeros };
    let mut harness = Harness::new(small(blocks, segments), initial, eager(), seed);
    for _ in 0..4 {
        harness.step(&Op::CutSoon(1 + random.below(120)));
        let cuts = harness.cuts;
        for _ in 0..200 {
            harness.step(&drawn(&mut random, blocks));
            if harness.cuts > cuts {
                break;
            }
        }
        harness.step(&Op::Cut(random.next_number()));
    }
    (harness.cuts, harness.full)
}

#[test]
fn no_power_cut_loses_a_flush_or_mixes_two() {
    let mut totals = (0, 0);
    // More of them, for a night: KAGE_DISK_SEEDS=20000.
    let seeds = std::env::var("KAGE_DISK_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    for seed in 0..seeds.unwrap_or(400) {
        match catch_unwind(AssertUnwindSafe(|| life(seed))) {
            Ok((cuts, full)) => totals = (totals.0 + cuts, totals.1 + full),
            Err(panic) => {
                eprintln!("seed {seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{} cuts, {} times full", totals.0, totals.1);
    assert!(totals.0 > 1200, "{} cuts", totals.0);
}

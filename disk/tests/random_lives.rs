//! Anything a caller may do, in any order, against a model.

mod model;

use kage_disk::Initial;
use model::{Harness, Op, eager, small};
use proptest::prelude::*;

const BLOCKS: u64 = 120;

fn range(most: u64) -> impl Strategy<Value = std::ops::Range<u64>> {
    (0..BLOCKS, 1..=most).prop_map(|(first, count)| first..(first + count).min(BLOCKS))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => range(5).prop_map(Op::Write),
        2 => range(BLOCKS).prop_map(Op::Write),
        3 => proptest::collection::vec(0..BLOCKS, 1..12).prop_map(Op::Scatter),
        3 => range(20).prop_map(Op::Discard),
        1 => range(20).prop_map(Op::Lose),
        1 => range(40).prop_map(Op::Fill),
        5 => Just(Op::Flush),
        1 => (0..300_000_u64).prop_map(Op::Clean),
        1 => Just(Op::Scrub),
        1 => Just(Op::Handover),
        1 => Just(Op::TakeOver),
        1 => Just(Op::Reopen),
        1 => any::<u64>().prop_map(Op::Cut),
        1 => (1..40_u64).prop_map(Op::CutSoon),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_store_is_a_plain_disk_whatever_happens(ops in proptest::collection::vec(op(), 1..80), segments in 26..60_u32) {
        let mut harness = Harness::new(small(BLOCKS, segments), Initial::Zeros, eager(), 1);
        for op in &ops {
            harness.step(op);
        }
        harness.step(&Op::Cut(3));
        harness.verify();
    }
}

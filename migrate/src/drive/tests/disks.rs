//! Machines whose disk is partly elsewhere, moved to hosts that had it before.

use kage_machine::{
    PageBytes,
    disk::{Block, block_digest},
    sim::digests,
};

use super::*;

fn bytes(which: u32) -> PageBytes {
    std::array::from_fn(|at| (at as u32 * 7 + which + 1) as u8)
}

/// The first half is written by the guest: zeros and old bytes. Of the second half a quarter each is equal at both
/// hosts, another at the target, missing at the source and held at the target, missing at both.
pub(super) fn fill(source: &SimDisk, target: &SimDisk) {
    for block in 0..GEOMETRY.disk_pages {
        let digest = block_digest(&bytes(block));
        match (block, block % 4) {
            (0..8, _) => target.write(block, &bytes(block + 50)),
            (_, 0) => {
                source.write(block, &bytes(block));
                target.write(block, &bytes(block));
            }
            (_, 1) => {
                source.write(block, &bytes(block));
                target.write(block, &bytes(block + 50));
            }
            (_, 2) => {
                source.leave_missing(block, Some(digest));
                target.write(block, &bytes(block));
            }
            _ => {
                source.leave_missing(block, Some(digest));
                target.leave_missing(block, Some(block_digest(&bytes(block + 50))));
            }
        }
    }
}

/// A block that the source missed and the target held is held, and the disks agree on what was only read.
pub(super) fn check_nothing_lost(source: &SimDisk, target: &SimDisk, what: &str) {
    for block in 8..GEOMETRY.disk_pages {
        let held = Block::Held(block_digest(&bytes(block)));
        match block % 4 {
            2 => assert_eq!(target.block(block), held, "{what}: block {block}"),
            3 => assert_eq!(source.block(block), Block::Missing(Some(block_digest(&bytes(block)))), "{what}"),
            _ => assert_eq!(source.block(block), held, "{what}: block {block}"),
        }
    }
}

#[test]
fn a_disk_arrives_by_what_its_blocks_are_and_only_what_differs_is_sent() {
    let bench = Bench::new();
    let source = bench.a.vmm().unwrap();
    let report = bench.run(Cuts::default());
    assert_eq!((report.outcome, report.reason.as_deref()), (Outcome::HandedOver, None));
    // The source stands still since its pause; the guest at the target writes no more than the first half.
    let (source, target) = (digests(&source.disk().blocks()), digests(&bench.b.disk.blocks()));
    assert_eq!(source[8..], target[8..]);
    // What the target holds need not even be named.
    assert_eq!(report.disk_pages_elsewhere, 2, "{report:?}");
    assert_eq!(report.disk_pages_held, 14, "{report:?}");
    // Two of the half that is only read; of the other each as often as it was written.
    assert!(report.disk_pages_sent >= 2 && report.disk_pages_sent < report.pages_sent, "{report:?}");
    assert!(report.disk_bytes_sent > 0 && report.disk_bytes_sent < report.bytes_wire, "{report:?}");
    for block in [11, 15] {
        assert_eq!(bench.b.disk.block(block), Block::Missing(Some(block_digest(&bytes(block)))));
    }
    bench.check(&report, "a disk");
}

#[test]
fn a_machine_whose_disk_is_not_known_yet_stays_and_nobody_is_asked() {
    let bench = Bench::new();
    bench.a.disk.leave_missing(12, None);
    let report = bench.run(Cuts::default());
    assert_eq!(report.outcome, Outcome::KeptHere);
    assert_eq!(report.reason.as_deref(), Some("the list of its disk's blocks is still being fetched"));
    assert!(bench.b.vmm().is_none());
    // Once it is known, it moves.
    assert!(bench.a.disk.fill(12, &bytes(12)));
    let report = bench.run(Cuts::default());
    assert_eq!(report.outcome, Outcome::HandedOver, "{report:?}");
    bench.check(&report, "known by now");
}

#[test]
fn what_is_not_known_in_the_middle_keeps_the_machine() {
    let bench = Bench::new();
    let mut side = bench.side(Cuts::default());
    // Forgotten between the look at the start and the first round.
    struct Forgets<'a>(&'a mut AsSource);
    impl SourceSide for Forgets<'_> {
        fn machine(&mut self) -> Option<&mut dyn Machine> {
            self.0.machine()
        }
        fn connect(&mut self, purpose: Purpose) -> Result<Box<dyn Link>, String> {
            self.0.connect(purpose)
        }
        fn announced(&mut self) -> Result<(), String> {
            self.0.host.disk.leave_missing(13, None);
            Ok(())
        }
        fn source_released(&mut self) {}
        fn drain(&mut self) -> Drained {
            Drained::default()
        }
        fn restart(&mut self) {
            self.0.restart();
        }
        fn in_doubt(&mut self, cause: &Cause) {
            self.0.in_doubt(cause);
        }
    }
    let threads = side.threads.clone();
    let report =
        source::run(&bench.spec, &mut Forgets(&mut side), &*bench.world.directory, &Control::default());
    drop(side);
    for thread in std::mem::take(&mut *threads.lock().unwrap()) {
        thread.join().unwrap();
    }
    assert_eq!(report.outcome, Outcome::KeptHere);
    assert_eq!(report.reason.as_deref(), Some("the list of its disk's blocks is still being fetched"));
    assert!(bench.a.disk.fill(13, &bytes(13)));
    bench.check(&report, "forgotten");
}

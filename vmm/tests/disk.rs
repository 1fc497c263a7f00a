//! A machine with a disk: its files outlive it, and go with it.

#[expect(dead_code, reason = "the lab serves all of these tests, each uses a part of it")]
mod lab;

use std::time::Instant;

use kage_images::ImageFile;
use kage_machine::Machine;
use lab::{
    Lab,
    desk::{Desk, HOST_SEED, hex},
};
use sha2::{Digest, Sha256};

const DISK: u64 = 256 << 20;

fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).take(length / 8).flatten().collect()
}

/// Copies files there or back.
fn copy(desk: &Desk<'_>, from: &str, to: &str) {
    let began = Instant::now();
    let output = desk.client("scp").args(["-q", from, to]).output().expect("scp is installed");
    assert!(output.status.success(), "{output:?}");
    println!("{from} to {to}: {} ms", began.elapsed().as_millis());
}

#[test]
fn files_outlive_the_machine_and_move_with_it() {
    Lab::run_with_disk(ImageFile::embedded(), DISK, |lab| {
        let mut desk = Desk::new(lab);
        let bytes = pattern(100 << 20);
        let sum = hex(&Sha256::digest(&bytes));
        let local = lab.dir().join("local");
        std::fs::write(&local, &bytes).unwrap();
        println!("{}", desk.say("df; fsck"));
        // More than the machine has memory for.
        copy(&desk, local.to_str().unwrap(), &desk.remote("big"));
        assert!(desk.say("sum big").starts_with(&sum));
        let vid = desk.say("stat big");
        desk.say("mkdir d; echo kept > d/kept; sync; echo lost > lost");
        desk.walk();
        assert!(desk.say("sum big").starts_with(&sum), "after a move");
        assert_eq!(desk.say("fsck"), "all is well\n");
        println!("{}", desk.say("df"));
        // The process is killed: what was written and not flushed is gone, all of it or none.
        desk.machine().end();
        desk.machine = None;
        let again = lab.login_with(desk.public_key(), HOST_SEED, [11; 32]);
        desk.machine = Some(again);
        assert_eq!(desk.say("cat d/kept"), "kept\n");
        assert!(!desk.exec("cat lost").status.success());
        assert_eq!(desk.say("stat big"), vid, "with its identity");
        let back = lab.dir().join("back");
        copy(&desk, &desk.remote("big"), back.to_str().unwrap());
        assert!(std::fs::read(&back).unwrap() == bytes);
        assert_eq!(desk.say("fsck -a"), "all is well\n");
        desk.say("rm big; sync");
        println!("{}", desk.say("df"));
        println!("{}", desk.lab.logs(desk.machine()));
    });
}

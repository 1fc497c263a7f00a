//! SIGKILLs of a real writer on a real file: what was flushed is there, and a successor can take over.

use std::{
    fs::{File, OpenOptions},
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use kage_disk::{BLOCK_BYTES, Geometry, Index, Initial, Seeded, Store, Tuning};

const IDENTITY: [u8; 16] = [3; 16];
const BLOCKS: u64 = 600;
const WRITER: &str = "KAGE_DISK_WRITER";

fn shape() -> Geometry {
    Geometry { blocks: BLOCKS, segment_bytes: 128 << 10, segments: 40 }
}

fn tuning() -> Tuning {
    Tuning { checkpoint_bytes: 1 << 20, log_slack_bytes: 256 << 10, ..Tuning::default() }
}

/// Writes of the transaction that ends with commit `commit`: block and stamp.
fn writes(commit: u64) -> Vec<(u64, u64)> {
    let mut random = Seeded::new(commit);
    (0..1 + random.below(40)).map(|_| (random.below(BLOCKS), random.next_number() | 1)).collect()
}

fn bytes(stamp: u64) -> Vec<u8> {
    stamp.to_le_bytes().repeat(BLOCK_BYTES / 8)
}

fn open_log(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// The writer's process: goes on from the last commit until it is killed.
fn write_until_killed(path: &Path) -> ! {
    let index = Index::private(BLOCKS).unwrap();
    let mut store = Store::open(open_log(path), index, IDENTITY, tuning()).unwrap();
    loop {
        for (block, stamp) in writes(store.commits() + 1) {
            store.write(block, &bytes(stamp)).unwrap();
        }
        store.flush().unwrap();
        // Straight to the descriptor: the test harness keeps what `println!` says.
        rustix::io::write(rustix::stdio::stdout(), format!("commit {}\n", store.commits()).as_bytes())
            .unwrap();
    }
}

fn contents(store: &Store<File>) -> Vec<u64> {
    let mut read = vec![0; BLOCK_BYTES];
    let mut stamp = |block| {
        store.read(block, &mut read).unwrap();
        let stamp = u64::from_le_bytes(read[..8].try_into().unwrap());
        assert!(read == bytes(stamp));
        stamp
    };
    (0..BLOCKS).map(&mut stamp).collect()
}

fn after(commits: u64) -> Vec<u64> {
    let mut disk = vec![0; BLOCKS as usize];
    for (block, stamp) in (1..=commits).flat_map(writes) {
        disk[block as usize] = stamp;
    }
    disk
}

#[test]
fn twenty_kills_lose_no_flush_and_a_successor_finds_every_write() {
    if let Some(path) = std::env::var_os(WRITER) {
        write_until_killed(Path::new(&path));
    }
    let path = std::env::temp_dir().join(format!("kage-disk-killed-{}.log", std::process::id()));
    let log = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    let index = Index::private(BLOCKS).unwrap();
    drop(Store::create(log, index, IDENTITY, shape(), Initial::Zeros, tuning()).unwrap());
    let mut random = Seeded::new(11);
    let mut commits = 0;
    for _ in 0..20 {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "twenty_kills_lose_no_flush_and_a_successor_finds_every_write"])
            .env(WRITER, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(writer.stdout.take().unwrap()).lines();
        let mut acknowledged = commits;
        for _ in 0..1 + random.below(20) {
            let line = said.find(|line| line.as_ref().unwrap().starts_with("commit")).unwrap().unwrap();
            acknowledged = line.trim_start_matches("commit ").parse().unwrap();
        }
        std::thread::sleep(Duration::from_micros(random.below(3000)));
        writer.kill().unwrap();
        writer.wait().unwrap();
        for line in said.map_while(Result::ok) {
            acknowledged = line.trim_start_matches("commit ").parse().unwrap_or(acknowledged);
        }
        let successor =
            Store::take_over(open_log(&path), Index::private(BLOCKS).unwrap(), IDENTITY, tuning()).unwrap();
        assert_eq!(successor.check(), Vec::<String>::new());
        let kept = successor.commits();
        let mut disk = after(kept);
        let found = contents(&successor);
        let mut rest = writes(kept + 1).into_iter();
        while disk != found {
            let (block, stamp) = rest.next().expect("the successor has a prefix of the last writes");
            disk[block as usize] = stamp;
        }
        drop(successor);
        let store =
            Store::open(open_log(&path), Index::private(BLOCKS).unwrap(), IDENTITY, tuning()).unwrap();
        commits = store.commits();
        assert!((acknowledged..=acknowledged + 1).contains(&commits), "{commits} after {acknowledged}");
        assert_eq!(commits, kept);
        assert!(contents(&store) == after(commits), "not the disk of commit {commits}");
        assert_eq!(store.check(), Vec::<String>::new());
    }
    std::fs::remove_file(&path).unwrap();
}

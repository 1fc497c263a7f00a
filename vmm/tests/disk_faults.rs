//! A machine's disk where things go wrong: killed processes, blocks that are elsewhere or corrupt, daemons that vanish.

#[expect(dead_code, reason = "the lab serves all of these tests, each uses a part of it")]
mod lab;

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    process::{Child, Stdio},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    time::Duration,
};

use kage_abi::stream::Stream as Content;
use kage_disk::{Geometry, Index, Place, Store, Tuning};
use kage_images::ImageFile;
use kage_machine::{
    Machine, PAGE_SIZE, PageBytes,
    disk::{Block, Disk, DiskEvents, Fill},
};
use kage_vmm::remote::RemoteMachine;
use lab::{
    DISK, Lab,
    desk::{Desk, HOST_SEED},
};

const BYTES: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// Blocks of a disk that is elsewhere.
type Blocks = BTreeMap<u32, Box<PageBytes>>;

fn blocks_of(disk: &dyn Disk) -> Blocks {
    let mut bytes = [0; PAGE_SIZE];
    let all = (0..disk.blocks()).filter_map(|block| match disk.read(block, &mut bytes) {
        Block::Held(_) => Some((block, Box::new(bytes))),
        Block::Zeros => None,
        Block::Missing(digest) => panic!("block {block} is missing: {digest:?}"),
    });
    all.collect()
}

/// Whether a block is one of the file system's own.
fn is_metadata(bytes: &PageBytes) -> bool {
    bytes.starts_with(b"kmet") || bytes.starts_with(b"kagefile")
}

fn fill_of(blocks: &Blocks, block: u32) -> (u32, Fill) {
    (block, blocks.get(&block).map_or(Fill::Zeros, |bytes| Fill::Bytes(bytes.clone())))
}

/// Keeps what a disk tells.
#[derive(Clone)]
struct Listener {
    needed: Sender<Vec<u32>>,
    corrupt: Sender<u32>,
}

impl DiskEvents for Listener {
    fn needed(&self, blocks: &[u32]) {
        let _ = self.needed.send(blocks.to_vec());
    }
    fn corrupt(&self, block: u32) {
        let _ = self.corrupt.send(block);
    }
    fn failed(&self, reason: &str) {
        panic!("{reason}");
    }
}

fn listen(machine: &RemoteMachine) -> (Receiver<Vec<u32>>, Receiver<u32>) {
    let ((needed, needs), (corrupt, corrupts)) = (channel(), channel());
    machine.watch_disk(Arc::new(Listener { needed, corrupt })).unwrap();
    (needs, corrupts)
}

/// Gives a disk what it needs, out of another's blocks.
struct Server {
    disk: Arc<dyn Disk>,
    blocks: Blocks,
    given: Mutex<u32>,
}

impl DiskEvents for Server {
    fn needed(&self, blocks: &[u32]) {
        *self.given.lock().unwrap() += blocks.len() as u32;
        let fills: Vec<_> = blocks.iter().map(|block| fill_of(&self.blocks, *block)).collect();
        self.disk.fill(&fills).unwrap();
    }
    fn corrupt(&self, block: u32) {
        panic!("block {block} is corrupt");
    }
    fn failed(&self, reason: &str) {
        panic!("{reason}");
    }
}

fn start(desk: &Desk<'_>, line: &str) -> Child {
    let mut ssh = desk.ssh(&[]);
    ssh.args(["--", line]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn said(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Starts the machine anew, on the disk that the lab has now.
fn again(desk: &mut Desk<'_>, stamp: u8) {
    if let Some(mut machine) = desk.machine.take() {
        machine.end();
    }
    desk.machine = Some(desk.lab.login_with(desk.public_key(), HOST_SEED, [stamp; 32]));
}

/// A machine with a file of some size.
fn with_big(lab: &Lab) -> Desk<'_> {
    let desk = Desk::new(lab);
    let mut bytes = vec![0; 3 << 20];
    Content::new(9).fill(&mut bytes);
    let local = lab.dir().join("local");
    std::fs::write(&local, &bytes).unwrap();
    let copied = desk.client("scp").arg("-q").arg(&local).arg(desk.remote("big")).status();
    assert!(copied.is_ok_and(|status| status.success()));
    desk
}

/// Leaves a machine's disk behind and gives it one of which every block is elsewhere.
fn leave(desk: &mut Desk<'_>, stamp: u8) -> Blocks {
    desk.say("sync");
    let blocks = blocks_of(&*desk.machine().disk().unwrap());
    desk.machine().end();
    desk.machine = None;
    desk.lab.another_disk();
    desk.lab.disk_elsewhere.set(true);
    again(desk, stamp);
    blocks
}

#[test]
fn what_was_synced_is_there_after_each_of_twenty_kills_under_load() {
    Lab::run_with_disk(ImageFile::embedded(), BYTES, |lab| {
        let mut desk = with_big(lab);
        for round in 0..20u8 {
            desk.say(&format!("echo {round} > kept-{round}; sync"));
            // Written and removed again and again until the process is killed in the midst of it.
            let mut load = start(&desk, &"cat big > more; sync; rm more; ".repeat(50));
            let half = desk.exec(&format!("cat kept-{round}; echo half > half-{round}"));
            assert!(half.status.success(), "{half:?}");
            again(&mut desk, round);
            // A client whose machine is gone waits for ever.
            let _ = load.kill();
            let _ = load.wait();
            for kept in 0..=round {
                assert_eq!(desk.say(&format!("cat kept-{kept}")), format!("{kept}\n"), "round {round}");
            }
            assert_eq!(desk.say("fsck"), "all is well\n", "round {round}");
        }
        assert_eq!(desk.say("fsck -a"), "all is well\n");
        println!("{}", desk.say("df"));
    });
}

#[test]
fn a_guest_that_is_asked_to_has_everything_on_the_disk() {
    Lab::run_with_disk(ImageFile::embedded(), BYTES, |lab| {
        let mut desk = Desk::new(lab);
        desk.say("echo kept > kept");
        desk.machine().disk().unwrap().sync_guest(PATIENCE).unwrap();
        again(&mut desk, 1);
        assert_eq!(desk.say("cat kept"), "kept\n");
    });
}

#[test]
fn a_machine_whose_disk_is_elsewhere_starts_and_gets_what_it_reads() {
    Lab::run_with_disk(ImageFile::embedded(), BYTES, |lab| {
        let mut desk = with_big(lab);
        desk.say("mkdir d; echo kept > d/kept");
        let sum = desk.say("sum big");
        let blocks = leave(&mut desk, 1);
        // It is there before its disk is.
        let disk = desk.machine().disk().unwrap();
        let wait = start(&desk, "cat d/kept");
        let (needs, _) = listen(desk.machine());
        let needed = needs.recv_timeout(PATIENCE).unwrap();
        assert_eq!(disk.block(needed[0]), Block::Missing(None));
        // What is not the block it is said to be is not taken.
        let right = blocks.get(&needed[0]).map_or(Block::Zeros, |bytes| Block::of(bytes));
        let digest = match right {
            Block::Held(digest) => digest,
            other => panic!("{other:?}"),
        };
        disk.fill(&[(needed[0], Fill::Expect(digest))]).unwrap();
        assert_eq!(disk.block(needed[0]), Block::Missing(Some(digest)));
        assert!(disk.fill(&[(needed[0], Fill::Bytes(Box::new([7; PAGE_SIZE])))]).is_err());
        let server = Arc::new(Server { disk: disk.clone(), blocks, given: Mutex::default() });
        desk.machine().watch_disk(server.clone()).unwrap();
        server.needed(&needed);
        assert_eq!(said(wait), "kept\n");
        assert_eq!(desk.say("sum big"), sum);
        assert_eq!(desk.say("fsck -a"), "all is well\n");
        println!("{} blocks were asked for", server.given.lock().unwrap());
        // It is its own by now, once that is durable.
        disk.flush().unwrap();
        desk.lab.disk_elsewhere.set(false);
        again(&mut desk, 2);
        let server = Server {
            disk: desk.machine().disk().unwrap(),
            blocks: server.blocks.clone(),
            given: Mutex::default(),
        };
        let server = Arc::new(server);
        desk.machine().watch_disk(server.clone()).unwrap();
        assert_eq!(desk.say("sum big"), sum);
        assert_eq!(*server.given.lock().unwrap(), 0, "nothing is fetched twice");
    });
}

#[test]
fn a_read_that_nobody_can_serve_fails_and_the_machine_goes_on() {
    Lab::run_with_disk(ImageFile::embedded(), BYTES, |lab| {
        let mut desk = with_big(lab);
        desk.say("echo more > kept; sync");
        let blocks = leave(&mut desk, 1);
        let disk = desk.machine().disk().unwrap();
        let (needs, _) = listen(desk.machine());
        let wait = start(&desk, "cat kept; cat big > /dev/null || echo broken");
        // One block of the large file is lost for good.
        let data: Vec<u32> =
            blocks.iter().filter(|(_, bytes)| !is_metadata(bytes)).map(|(at, _)| *at).collect();
        let lost = data[data.len() / 2];
        let text = std::thread::scope(|scope| {
            let waited = scope.spawn(|| said(wait));
            while !waited.is_finished() {
                let Ok(needed) = needs.recv_timeout(Duration::from_millis(100)) else { continue };
                let fills = needed.iter().map(|block| {
                    if *block == lost { (lost, Fill::Unavailable) } else { fill_of(&blocks, *block) }
                });
                disk.fill(&fills.collect::<Vec<_>>()).unwrap();
            }
            waited.join().unwrap()
        });
        assert_eq!(disk.block(lost), Block::Missing(None));
        assert_eq!(text, "more\nbroken\n");
        assert_eq!(desk.say("echo on"), "on\n");
    });
}

#[test]
fn corrupt_blocks_are_found_and_put_right() {
    Lab::run_with_disk(ImageFile::embedded(), BYTES, |lab| {
        let mut desk = with_big(lab);
        let sum = desk.say("sum big");
        desk.say("sync");
        let blocks = blocks_of(&*desk.machine().disk().unwrap());
        desk.machine().end();
        desk.machine = None;
        // Two bits of the largest stretch.
        let log = File::from(desk.lab.disk_log());
        let count = BYTES / PAGE_SIZE as u64;
        let index = Index::private(count).unwrap();
        let store = Store::open(log.try_clone().unwrap(), index, DISK, Tuning::default()).unwrap();
        let data: Vec<u32> =
            blocks.iter().filter(|(_, bytes)| !is_metadata(bytes)).map(|(at, _)| *at).collect();
        let harmed = [data[data.len() / 2], data[data.len() / 2 + 1]];
        for block in harmed {
            let Place::At(at) = store.index().place(block.into()) else {
                panic!("block {block} is not held")
            };
            let mut byte = [0];
            log.read_exact_at(&mut byte, at + 99).unwrap();
            log.write_all_at(&[byte[0] ^ 4], at + 99).unwrap();
        }
        drop(store);
        again(&mut desk, 1);
        let disk = desk.machine().disk().unwrap();
        let (needs, corrupt) = listen(desk.machine());
        let wait = start(&desk, "sum big");
        let needed = needs.recv_timeout(PATIENCE).unwrap();
        assert_eq!(needed, harmed);
        assert_eq!([corrupt.recv_timeout(PATIENCE), corrupt.recv_timeout(PATIENCE)], harmed.map(Ok));
        let mut bytes = [0; PAGE_SIZE];
        assert!(matches!(disk.read(harmed[0], &mut bytes), Block::Missing(Some(_))));
        let mut found = Vec::new();
        loop {
            let scrubbed = disk.scrub(4 << 20).unwrap();
            found.extend(scrubbed.corrupt);
            if scrubbed.done {
                break;
            }
        }
        assert_eq!(found, harmed);
        assert!(disk.fill(&[(harmed[0], Fill::Bytes(Box::new([7; PAGE_SIZE])))]).is_err());
        disk.fill(&harmed.map(|block| fill_of(&blocks, block))).unwrap();
        assert_eq!(said(wait), sum);
        assert!(Geometry::log_bytes_for(count) > BYTES);
    });
}

#[test]
fn reads_that_wait_go_with_the_machine_and_outlive_its_daemon() {
    Lab::run_with_disk(ImageFile::embedded(), BYTES, |lab| {
        let mut desk = with_big(lab);
        desk.say("echo kept > kept");
        let sum = desk.say("sum big");
        let blocks = leave(&mut desk, 1);
        let disk = desk.machine().disk().unwrap();
        // What is where is known.
        let all: Vec<_> = (0..disk.blocks())
            .map(|block| match blocks.get(&block) {
                Some(bytes) => match Block::of(bytes) {
                    Block::Held(digest) => (block, Fill::Expect(digest)),
                    _ => (block, Fill::Zeros),
                },
                None => (block, Fill::Zeros),
            })
            .collect();
        disk.fill(&all).unwrap();
        let (needs, _) = listen(desk.machine());
        let wait = start(&desk, "cat kept; sum big");
        let first = needs.recv_timeout(PATIENCE).unwrap();
        drop(disk);
        // To another process, where the same is missing.
        desk.lab.disk_elsewhere.set(false);
        desk.walk();
        let disk = desk.machine().disk().unwrap();
        let (needs, _) = listen(desk.machine());
        assert_eq!(needs.recv_timeout(PATIENCE).unwrap(), first);
        // The daemon ends, and another comes.
        drop(disk);
        let path = desk.lab.dir().join("left.sock");
        desk.machine().move_socket(&path).unwrap();
        desk.machine = None;
        desk.machine = Some(RemoteMachine::adopt(&path).unwrap().expect("it is there"));
        let (needs, _) = listen(desk.machine());
        assert_eq!(needs.recv_timeout(PATIENCE).unwrap(), first);
        let disk = desk.machine().disk().unwrap();
        let server = Arc::new(Server { disk, blocks, given: Mutex::default() });
        desk.machine().watch_disk(server.clone()).unwrap();
        server.needed(&first);
        assert_eq!(said(wait), format!("kept\n{sum}"));
        assert_eq!(desk.say("fsck -a"), "all is well\n");
    });
}

//! A namespace with a fabric, a pool, and one user's machine.

pub mod compile;
pub mod desk;

use std::{
    cell::Cell,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use kage_fabric::{Fabric, FabricSpec, names};
use kage_images::{ImageFile, Symbols};
use kage_machine::{
    Geometry, ImageNumber, Machine, PAGE_SIZE, PageSet, PauseCause, Vid, control::Identity, disk::Block,
};
use kage_vmm::{
    pool::{Pool, PoolSpec},
    remote::{RemoteMachine, Spawn},
};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Identity of the disk.
pub const DISK: [u8; 16] = *b"the lab's a disk";

pub struct Lab {
    fabric: Fabric,
    pub pool: Pool,
    image: ImageFile,
    vid: Vid,
    tap: OwnedFd,
    dir: PathBuf,
    disk_bytes: u64,
    /// Which file is the disk of the machine that runs, or ran last.
    disk: Cell<u32>,
    /// A log that is made anew has every block missing.
    #[allow(dead_code, reason = "not every test has one")]
    pub disk_elsewhere: Cell<bool>,
    /// IPv4 address of machines that log in from now on.
    pub ipv4: Cell<Option<Ipv4Addr>>,
    /// One past the last index that they may give out.
    pub indices: Cell<u64>,
}

impl Lab {
    /// Runs a test in a namespace of its own.
    pub fn run(test: impl FnOnce(&Lab) + Send + 'static) {
        Self::run_with(ImageFile::embedded(), test);
    }

    /// The same with machines of another image.
    pub fn run_with(image: ImageFile, test: impl FnOnce(&Lab) + Send + 'static) {
        Self::run_with_disk(image, 0, test);
    }

    /// The same with machines that have a disk: the same one after each other.
    #[allow(dead_code, reason = "not every test has one")]
    pub fn run_with_disk(image: ImageFile, disk_bytes: u64, test: impl FnOnce(&Lab) + Send + 'static) {
        let body = move || {
            enter_namespace();
            let lab = Lab::new(image, disk_bytes);
            test(&lab);
        };
        let result = std::thread::spawn(body).join();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    }

    fn new(image: ImageFile, disk_bytes: u64) -> Self {
        for line in [
            "link set lo up",
            "link add under type veth peer name far",
            "link set far up",
            "addr add fd00:6b::1/64 dev under nodad",
            "link set under up",
        ] {
            assert!(
                Command::new("ip").args(line.split(' ')).status().expect("ip is installed").success(),
                "ip {line}"
            );
        }
        let prefix = "fd4b:6167:6500::/48".parse().unwrap();
        let fabric = Fabric::open(FabricSpec {
            host: "h1".parse().unwrap(),
            prefix,
            underlay: "under".into(),
            underlay_address: "fd00:6b::1".parse().unwrap(),
            vxlan_id: 7,
            vxlan_port: 4789,
            ipv4: true,
            ipv4_pool: None,
        })
        .unwrap();
        fabric.setup().unwrap();
        let vid = Vid::of_image(prefix, ImageNumber(7));
        let name = names::tap(ImageNumber(7));
        let tap = fabric.create_tap(&name).unwrap();
        fabric.route_image_to_tap(vid, &name).unwrap();
        let dir = std::env::temp_dir().join(format!(
            "kage-vmm-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir_all(&dir).unwrap();
        let pool = start_pool(&dir, &image, disk_bytes);
        let (ipv4, indices) = (Cell::new(None), Cell::new(1 << 20));
        Self {
            fabric,
            pool,
            image,
            vid,
            tap,
            dir,
            disk_bytes,
            disk: Cell::new(0),
            disk_elsewhere: Cell::new(false),
            ipv4,
            indices,
        }
    }

    /// A second pool, as a daemon has one for each image and size.
    pub fn another_pool(&self) -> Pool {
        start_pool(&self.dir, &self.image, self.disk_bytes)
    }

    pub fn address(&self) -> Ipv6Addr {
        self.vid.address()
    }

    /// A machine with identity and network.
    pub fn login(&self) -> RemoteMachine {
        self.login_with(String::new(), [7; 32], [9; 32])
    }

    /// The same with the keys that may log in, the host key's seed and the generation's.
    pub fn login_with(
        &self,
        authorized_keys: String,
        host_key_seed: [u8; 32],
        seed: [u8; 32],
    ) -> RemoteMachine {
        let mut machine = self.pool.take_login().unwrap();
        machine.set_label(b"alice".to_vec()).unwrap();
        self.attach_disk(&mut machine);
        machine.attach_tap(self.tap.as_fd()).unwrap();
        let identity = Identity {
            user: "alice".into(),
            address: self.vid.address().octets(),
            prefix_length: Vid::IMAGE_PREFIX_LENGTH,
            ipv4: self.ipv4.get().map(|address| address.octets()),
            mtu: self.fabric.guest_mtu() as u16,
            host_key_seed,
            authorized_keys,
        };
        machine.give_generation(Some(identity), seed, 1..self.indices.get()).unwrap();
        machine
    }

    /// Gives a machine the disk, if it is to have one; that of a machine that arrives is blank.
    fn attach_disk(&self, machine: &mut RemoteMachine) {
        if self.disk_bytes > 0 {
            machine.attach_disk(self.disk_log(), DISK, self.disk_elsewhere.get()).unwrap();
        }
    }

    /// The log of the disk of the machine that runs, or ran last.
    #[allow(dead_code, reason = "not every test has one")]
    pub fn disk_log(&self) -> OwnedFd {
        let path = self.dir.join(format!("disk-{}", self.disk.get()));
        let file = fs::File::options().read(true).write(true).create(true).truncate(false).open(path);
        file.unwrap().into()
    }

    /// Machines from now on have another disk.
    #[allow(dead_code, reason = "not every test has one")]
    pub fn another_disk(&self) {
        self.disk.set(self.disk.get() + 1);
    }

    /// A directory that is removed with the lab.
    pub fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    /// A shell with network and a disk of its own, for a machine that comes.
    pub fn arriving(&self) -> RemoteMachine {
        let mut target = self.pool.take_shell().unwrap();
        target.set_label(b"alice".to_vec()).unwrap();
        self.disk.set(self.disk.get() + 1);
        self.attach_disk(&mut target);
        target.wait_disk(Duration::from_secs(10)).unwrap_or_else(|error| panic!("{error}"));
        target.attach_tap(self.tap.as_fd()).unwrap();
        target
    }

    /// Moves a machine to another process the plain way: everything that is not zero, what was written
    /// meanwhile, then the state. Both must then hold the same, byte for byte.
    /// Returns the machine and how long it stood.
    pub fn move_machine(&self, mut source: RemoteMachine) -> (RemoteMachine, Duration) {
        let mut target = self.arriving();
        let (from, to) = (source.memory(), target.memory());
        let mut bytes = [0; PAGE_SIZE];
        let _ = source.harvest().unwrap();
        let mut copy = |pages: &PageSet| {
            for page in pages.iter() {
                match from.read_block(page, &mut bytes) {
                    Block::Missing(Some(digest)) if page.0 >= from.geometry().memory_pages => {
                        assert!(to.leave_missing(page, digest));
                    }
                    Block::Missing(_) => panic!("nothing is known of {page:?}"),
                    Block::Zeros | Block::Held(_) => to.write(page, &bytes),
                }
            }
        };
        copy(&from.populated());
        for _ in 0..3 {
            copy(&source.harvest().unwrap());
        }
        let paused = source.pause(PauseCause::Switch).unwrap();
        copy(&paused.dirty);
        let mut other = [0; PAGE_SIZE];
        let all = PageSet::full(from.geometry().pages());
        let differ = all.iter().filter(|&page| {
            from.read(page, &mut bytes);
            to.read(page, &mut other);
            bytes != other || from.block(page) != to.block(page)
        });
        let differ: Vec<_> = differ.collect();
        assert!(differ.is_empty(), "{} pages differ: {:?}", differ.len(), &differ[..differ.len().min(20)]);
        target.restore(&paused.state, paused.at).unwrap_or_else(|error| panic!("{error}"));
        let started = target.run_gated().unwrap();
        source.release().unwrap();
        target.open_gate().unwrap();
        source.end();
        (target, started.at.since(paused.at))
    }

    pub fn logs(&self, machine: &RemoteMachine) -> String {
        machine.logs(&Symbols::of(ImageFile::embedded().kernel()))
    }
}

fn start_pool(dir: &Path, image: &ImageFile, disk_bytes: u64) -> Pool {
    let spec = PoolSpec {
        spawn: Spawn {
            program: env!("CARGO_BIN_EXE_kage-vmm").into(),
            arguments: Vec::new(),
            jail: Some(0x6b61_0000),
        },
        socket_dir: dir.to_owned(),
        geometry: Geometry::from_bytes(64 << 20, disk_bytes).unwrap(),
        logins: 1,
        shells: 1,
    };
    Pool::start(spec, image).unwrap_or_else(|error| panic!("{error}"))
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[expect(unsafe_code, reason = "gives this thread a network namespace of its own")]
fn enter_namespace() {
    // SAFETY: only the network namespace of this one thread changes; no shared file table is unshared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
        .expect("tests run as root");
}

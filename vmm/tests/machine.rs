//! A real machine on real KVM.

use std::{
    fs::File,
    os::fd::AsFd,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use kage_images::{Base, ImageFile, Symbols};
use kage_machine::{Geometry, Machine};
use kage_vmm::remote::{BaseFile, RemoteMachine, Spawn};

static NEXT: AtomicU32 = AtomicU32::new(0);

struct Lab {
    kvm: File,
    base: BaseFile,
    geometry: Geometry,
    spawn: Spawn,
    dir: PathBuf,
}

impl Lab {
    fn new() -> Self {
        let geometry = Geometry::from_bytes(64 << 20, 0).unwrap();
        let base = Base::build(ImageFile::embedded().kernel(), geometry).unwrap();
        let dir = std::env::temp_dir().join(format!("kage-vmm-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir_all(&dir).unwrap();
        Self {
            kvm: File::options().read(true).write(true).open("/dev/kvm").expect("this test needs /dev/kvm"),
            base: BaseFile::new(base).unwrap(),
            geometry,
            spawn: Spawn {
                program: env!("CARGO_BIN_EXE_kage-vmm").into(),
                arguments: Vec::new(),
                jail: None,
            },
            dir,
        }
    }

    fn shell(&self) -> RemoteMachine {
        let path = self.dir.join(format!("{}.sock", NEXT.fetch_add(1, Ordering::Relaxed)));
        RemoteMachine::spawn(&self.spawn, &path, self.kvm.as_fd(), &self.base, self.geometry).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[test]
fn a_guest_boots_in_ring_3() {
    let lab = Lab::new();
    let mut machine = lab.shell();
    machine.boot().unwrap();
    let end = std::time::Instant::now() + std::time::Duration::from_secs(2);
    while machine.guest_status() != kage_abi::status::AWAITING_GENERATION && std::time::Instant::now() < end {
        std::thread::yield_now();
    }
    println!("{}", machine.logs(&Symbols::of(ImageFile::embedded().kernel())));
    println!("{:?} {:?}", machine.guest_status(), machine.status());
    println!("{:?}", machine.harvest());
    machine.end();
}

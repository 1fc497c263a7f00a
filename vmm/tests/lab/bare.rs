//! Machines that boot a kernel of a few instructions instead of the product's.
#![allow(dead_code, reason = "some tests use all of it, others a part")]

use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use kage_abi::{self as abi, offset};
use kage_images::{Base, ImageFile};
use kage_machine::{Geometry, Machine, PAGE_SIZE, PageIndex};
use kage_vmm::remote::{BaseFile, RemoteMachine, Spawn};

#[allow(unused_macros, reason = "not every test has a kernel of its own")]
/// Defines a function that returns the code of a kernel; the two names are those of its ends.
macro_rules! kernel {
    ($name:ident, $first:ident, $end:ident, $($line:literal),+; $($operand:tt)*) => {
        std::arch::global_asm!(
            ".section .rodata.bare, \"a\", @progbits",
            concat!(stringify!($first), ":"),
            $($line),+,
            concat!(stringify!($end), ":"),
            ".text",
            $($operand)*
        );
        fn $name() -> &'static [u8] {
            unsafe extern "C" {
                static $first: u8;
                static $end: u8;
            }
            let (first, end) = (&raw const $first, &raw const $end);
            // SAFETY: both lie in the one block of bytes that the assembler made above, in this order.
            unsafe { std::slice::from_raw_parts(first, end as usize - first as usize) }
        }
    };
}
#[allow(unused_imports, reason = "not every test has a kernel of its own")]
pub(crate) use kernel;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Where the code of these kernels starts: behind the product's fault stubs, which they keep.
const CODE: u64 = abi::PARK + 0x10;

/// `out 0x5a, al` and a jump back to it.
const STUB_LOOP: [u8; 4] = [0xe6, abi::DOOR_PORT as u8, 0xeb, 0xfc];

pub struct Bare {
    kvm: File,
    base: BaseFile,
    dir: PathBuf,
    stub_loop: u64,
}

impl Bare {
    /// For machines of 64 MiB that boot `code`, which may stand anywhere.
    pub fn new(code: &[u8]) -> Self {
        let product = Base::build(&ImageFile::embedded(), geometry()).unwrap();
        let stubs = &product.bytes[(abi::KERNEL - abi::BASE) as usize..(CODE - abi::BASE) as usize];
        let base = Base::build(&ImageFile::bare(executable(&[stubs, code].concat())), geometry()).unwrap();
        let at =
            stubs.windows(STUB_LOOP.len()).position(|bytes| bytes == STUB_LOOP).expect("the stubs knock");
        let stub_loop = abi::KERNEL + at as u64;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("kage-bare-{}-{number}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("/dev/kvm is there");
        Self { kvm, base: BaseFile::new(base).unwrap(), dir, stub_loop }
    }

    /// Where the fault stubs knock for ever.
    pub fn stub_loop(&self) -> u64 {
        self.stub_loop
    }

    pub fn geometry(&self) -> Geometry {
        geometry()
    }

    /// A machine that has not begun.
    pub fn shell(&self) -> RemoteMachine {
        let spawn = Spawn {
            program: env!("CARGO_BIN_EXE_kage-vmm").into(),
            arguments: Vec::new(),
            jail: Some(0x6b62_0000),
        };
        let path = self.dir.join(format!("{}.sock", NEXT.fetch_add(1, Ordering::Relaxed)));
        RemoteMachine::spawn(&spawn, &path, self.kvm.as_fd(), &self.base, geometry())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// A machine that boots, with its memory prepared.
    pub fn start(&self, prepare: impl FnOnce(&RemoteMachine)) -> RemoteMachine {
        let mut machine = self.shell();
        prepare(&machine);
        machine.boot().unwrap_or_else(|error| panic!("{error}"));
        machine
    }

    fn place(address: u64) -> (PageIndex, usize) {
        let offset = address - abi::MEMORY;
        (PageIndex((offset / abi::PAGE) as u32), (offset % abi::PAGE) as usize)
    }

    /// A word of a machine's memory.
    pub fn word(machine: &RemoteMachine, address: u64) -> u64 {
        let (page, at) = Self::place(address);
        let mut bytes = [0; PAGE_SIZE];
        machine.memory().read(page, &mut bytes);
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Sets a word of the memory of a machine that does not run.
    pub fn set(machine: &RemoteMachine, address: u64, word: u64) {
        Self::set_all(machine, &[(address, word)]);
    }

    /// Sets words, in order of their addresses.
    pub fn set_all(machine: &RemoteMachine, words: &[(u64, u64)]) {
        let memory = machine.memory();
        let mut bytes = [0; PAGE_SIZE];
        for words in words.chunk_by(|a, b| Self::place(a.0).0 == Self::place(b.0).0) {
            let page = Self::place(words[0].0).0;
            memory.read(page, &mut bytes);
            for &(address, word) in words {
                let at = Self::place(address).1;
                bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
            memory.write(page, &bytes);
        }
    }
}

/// Where a field of the boot page lies.
pub const fn boot(field: usize) -> u64 {
    abi::MEMORY + offset::BOOT + field as u64
}

/// Waits until `done` says so.
pub fn until(what: &str, machine: &RemoteMachine, mut done: impl FnMut(&RemoteMachine) -> bool) {
    let limit = Instant::now() + Duration::from_secs(10);
    while !done(machine) {
        assert!(Instant::now() < limit, "{what} does not happen: {:?}", machine.failure());
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn geometry() -> Geometry {
    Geometry::from_bytes(64 << 20, 0).unwrap()
}

/// An ELF executable of one segment of code at the kernel's place (System V ABI, chapters 4 and 5).
fn executable(code: &[u8]) -> Vec<u8> {
    const HEADERS: usize = 64 + 56;
    let mut file = vec![0; HEADERS];
    let mut put = |at: usize, what: &[u8]| file[at..at + what.len()].copy_from_slice(what);
    put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(16, &2u16.to_le_bytes()); // ET_EXEC
    put(18, &62u16.to_le_bytes()); // EM_X86_64
    put(20, &1u32.to_le_bytes());
    put(24, &CODE.to_le_bytes()); // entry
    put(32, &64u64.to_le_bytes()); // program headers
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes()); // PT_LOAD
    put(68, &5u32.to_le_bytes()); // r-x
    put(72, &(HEADERS as u64).to_le_bytes());
    put(80, &abi::KERNEL.to_le_bytes());
    put(88, &abi::KERNEL.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &(code.len() as u64).to_le_bytes());
    put(112, &1u64.to_le_bytes());
    file.extend(code);
    file
}

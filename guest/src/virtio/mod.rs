//! Virtio drivers over virtio-mmio (virtio 1.2 §4.2), notifications suppressed: the door is the notice.
#![expect(unsafe_code, reason = "device registers and rings shared with the VMM")]

pub mod block;
pub mod entropy;
pub mod net;
mod queue;

pub use queue::Queue;

use kage_abi::{MMIO, PAGE};

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const VERSION_1: u64 = 1 << 32;

/// A device's register page.
#[derive(Clone, Copy)]
pub struct Device {
    base: u64,
}

impl Device {
    fn read(self, offset: u64) -> u32 {
        // SAFETY: the page belongs to the device for ever; registers are read as aligned words.
        unsafe { ((self.base + offset) as *const u32).read_volatile() }
    }

    fn write(self, offset: u64, value: u32) {
        // SAFETY: as in `read`.
        unsafe { ((self.base + offset) as *mut u32).write_volatile(value) }
    }

    fn write_address(self, offset: u64, address: u64) {
        self.write(offset, address as u32);
        self.write(offset + 4, (address >> 32) as u32);
    }

    /// Initialises the device in `slot` (virtio 1.2 §3.1.1): accepts `features` as far as offered, makes
    /// its queues. Returns the accepted features.
    ///
    /// # Panics
    /// When the slot holds another device: the VMM and the kernel do not fit.
    pub fn start(slot: usize, id: u32, features: u64, queues: &mut [Queue]) -> (Self, u64) {
        let device = Self { base: MMIO + slot as u64 * PAGE };
        assert_eq!((device.read(0), device.read(8)), (0x7472_6976, id), "virtio device in slot {slot}");
        device.write(0x70, 0);
        device.write(0x70, ACKNOWLEDGE | DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            device.write(0x14, half);
            offered |= u64::from(device.read(0x10)) << (32 * half);
        }
        let accepted = offered & (features | VERSION_1);
        for half in 0..2 {
            device.write(0x24, half);
            device.write(0x20, (accepted >> (32 * half)) as u32);
        }
        device.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert!(device.read(0x70) & FEATURES_OK != 0, "virtio device {id} refuses its own features");
        for (index, queue) in queues.iter_mut().enumerate() {
            device.write(0x30, index as u32);
            device.write(0x38, u32::from(queue.size()));
            let [desc, avail, used] = queue.addresses();
            device.write_address(0x80, desc);
            device.write_address(0x90, avail);
            device.write_address(0xa0, used);
            device.write(0x44, 1);
        }
        device.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        (device, accepted)
    }

    /// A word of the configuration space.
    pub fn config(self, offset: u64) -> u32 {
        self.read(0x100 + offset)
    }
}

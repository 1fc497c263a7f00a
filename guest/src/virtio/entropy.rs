//! The entropy device.

use super::{
    Device, Queue,
    queue::{Part, forever},
};
use kage_abi::device;

/// Draws fresh bytes from the host. Returns once they are there.
pub struct Entropy {
    queue: [Queue; 1],
    buffer: *mut u8,
}

impl Entropy {
    /// Starts the device.
    pub fn start() -> Self {
        let mut queue = [Queue::new(8)];
        Device::start(device::ENTROPY, 4, 0, &mut queue);
        Self { queue, buffer: forever(32) }
    }

    /// 32 bytes; the buffer is erased.
    pub fn draw(&mut self) -> [u8; 32] {
        let part = Part { address: self.buffer as u64, length: 32, writable: true };
        let mut bytes = [0; 32];
        if self.queue[0].push(&[part]).is_none() {
            return bytes;
        }
        while self.queue[0].pop().is_none() {
            crate::arch::door(u64::MAX);
        }
        // SAFETY: the buffer holds 32 bytes and the request is complete.
        unsafe {
            bytes.copy_from_slice(core::slice::from_raw_parts(self.buffer, 32));
            self.buffer.write_bytes(0, 32);
        }
        bytes
    }
}

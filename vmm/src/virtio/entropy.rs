//! The entropy device (virtio 1.2 §5.4).

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::QueueT;
use vm_memory::Bytes;

use super::mmio::Transport;
use crate::dirty::GuestMemory;

/// Device id.
pub const ID: u32 = 4;
/// Bytes given for one request.
const MOST: usize = 256;

/// The entropy device.
pub struct Entropy {
    /// Its registers.
    pub transport: Transport,
}

impl Entropy {
    /// A device after reset.
    #[must_use]
    pub fn new() -> Self {
        Self { transport: Transport::new(ID, 0, Vec::new(), 1) }
    }

    /// Fills what the guest asked for; returns whether anything was.
    pub fn serve(&mut self, memory: &GuestMemory) -> bool {
        if !self.transport.is_live() {
            return false;
        }
        let mut served = false;
        for _ in 0..16 {
            let Some(chain) = self.transport.queues[0].pop_descriptor_chain(memory) else { break };
            let head = chain.head_index();
            let mut bytes = [0; MOST];
            let mut given = 0;
            if let Some(descriptor) = chain.writable().next() {
                let wanted = (descriptor.len() as usize).min(MOST);
                if let Ok(filled) = getrandom(&mut bytes[..wanted], GetRandomFlags::empty())
                    && memory.write_slice(&bytes[..filled], descriptor.addr()).is_ok()
                {
                    given = filled as u32;
                }
            }
            if self.transport.queues[0].add_used(memory, head, given).is_err() {
                self.transport.fail();
            }
            served = true;
        }
        served
    }
}

//! The register interface of a virtio-mmio device (virtio 1.2 §4.2.2), without its function.

use kage_machine::state::{QueueState, VirtioState};
use virtio_queue::{Queue, QueueT};

use crate::dirty::GuestMemory;

/// Largest queue offered.
pub const QUEUE_MAX: u16 = 1024;
/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;

const MAGIC: u32 = 0x7472_6976;
const VENDOR: u32 = u32::from_le_bytes(*b"kage");
const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const NEEDS_RESET: u8 = 64;

/// A device's registers and queues.
pub struct Transport {
    device_id: u32,
    device_features: u64,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    status: u8,
    interrupt_status: u32,
    config: Vec<u8>,
    /// The queues, in the order the device's specification gives them.
    pub queues: Vec<Queue>,
}

/// A saved device does not fit this one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("saved virtio device {found} does not fit device {expected}: {what}")]
pub struct Misfit {
    expected: u32,
    found: u32,
    what: &'static str,
}

impl Transport {
    /// A device after reset.
    #[must_use]
    pub fn new(device_id: u32, device_features: u64, config: Vec<u8>, queues: usize) -> Self {
        Self {
            device_id,
            device_features: device_features | VERSION_1,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            status: 0,
            interrupt_status: 0,
            config,
            queues: (0..queues).filter_map(|_| Queue::new(QUEUE_MAX).ok()).collect(),
        }
    }

    /// Whether the driver runs and its features are settled.
    #[must_use]
    pub const fn is_live(&self) -> bool {
        self.status & DRIVER_OK != 0 && self.status & NEEDS_RESET == 0
    }

    /// Stops a device whose driver broke the rules (virtio 1.2 §2.1.1); the rest of the machine goes on.
    pub fn fail(&mut self) {
        self.status |= NEEDS_RESET;
    }

    fn reset(&mut self) {
        self.driver_features = 0;
        self.status = 0;
        self.interrupt_status = 0;
        for queue in &mut self.queues {
            queue.reset();
        }
    }

    fn queue(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(self.queue_select as usize)
    }

    /// Reads a register or the configuration space; unknown places read as 0.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= 0x100 {
            let at = (offset - 0x100) as usize;
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = self.config.get(at + index).copied().unwrap_or(0);
            }
            return;
        }
        let value = match offset {
            0x000 => MAGIC,
            0x004 => 2,
            0x008 => self.device_id,
            0x00c => VENDOR,
            0x010 if self.device_features_select < 2 => {
                (self.device_features >> (32 * self.device_features_select)) as u32
            }
            0x034 => self.queue().map_or(0, |queue| u32::from(queue.max_size())),
            0x044 => self.queue().map_or(0, |queue| u32::from(queue.ready())),
            0x060 => self.interrupt_status,
            0x070 => u32::from(self.status),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(index).copied().unwrap_or(0);
        }
    }

    /// Writes a register; writes the specification does not allow are ignored.
    pub fn write(&mut self, offset: u64, data: &[u8], memory: &GuestMemory) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        let negotiating = self.status & FEATURES_OK == 0;
        match offset {
            0x014 => self.device_features_select = value,
            0x020 if negotiating && self.driver_features_select < 2 => {
                let shift = 32 * self.driver_features_select;
                let mask = u64::from(u32::MAX) << shift;
                self.driver_features =
                    self.driver_features & !mask | (u64::from(value) << shift) & self.device_features;
            }
            0x024 => self.driver_features_select = value,
            0x030 => self.queue_select = value,
            0x038 => {
                if let (Some(queue), Ok(size)) = (self.queue(), u16::try_from(value)) {
                    queue.set_size(size);
                }
            }
            0x044 => {
                if let Some(queue) = self.queue() {
                    queue.set_ready(value == 1);
                    if value == 1 && !queue.is_valid(memory) {
                        queue.set_ready(false);
                        self.fail();
                    }
                }
            }
            0x064 => self.interrupt_status &= !value,
            0x070 if value == 0 => self.reset(),
            0x070 => {
                let wanted = value as u8;
                let settled = self.driver_features & VERSION_1 != 0;
                self.status = if settled { wanted } else { wanted & !FEATURES_OK };
            }
            0x080 | 0x084 | 0x090 | 0x094 | 0x0a0 | 0x0a4 => {
                let (low, high) = if offset & 4 == 0 { (Some(value), None) } else { (None, Some(value)) };
                if let Some(queue) = self.queue() {
                    match offset & !4 {
                        0x080 => queue.set_desc_table_address(low, high),
                        0x090 => queue.set_avail_ring_address(low, high),
                        _ => queue.set_used_ring_address(low, high),
                    }
                }
            }
            _ => {}
        }
    }

    /// The device's state; `unfinished` requests of queue 0 are put back.
    #[must_use]
    pub fn save(&self, unfinished: u16) -> VirtioState {
        let queues = self.queues.iter().enumerate().map(|(index, queue)| QueueState {
            size: queue.size(),
            ready: queue.ready(),
            desc: queue.desc_table(),
            avail: queue.avail_ring(),
            used: queue.used_ring(),
            next_avail: if index == 0 {
                queue.next_avail().wrapping_sub(unfinished)
            } else {
                queue.next_avail()
            },
            next_used: queue.next_used(),
        });
        VirtioState {
            device_id: self.device_id,
            status: self.status,
            driver_features: self.driver_features,
            selectors: [self.device_features_select, self.driver_features_select, self.queue_select],
            interrupt_status: self.interrupt_status,
            queues: queues.collect(),
        }
    }

    /// Takes a saved state.
    ///
    /// # Errors
    /// [`Misfit`] for another device, for features this one does not offer, for rings outside memory.
    pub fn restore(&mut self, state: &VirtioState, memory: &GuestMemory) -> Result<(), Misfit> {
        let misfit = |what| Misfit { expected: self.device_id, found: state.device_id, what };
        if state.device_id != self.device_id || state.queues.len() != self.queues.len() {
            return Err(misfit("another device"));
        }
        if state.driver_features & !self.device_features != 0 {
            return Err(misfit("features this host does not offer"));
        }
        let mut queues = Vec::new();
        for saved in &state.queues {
            let raw = virtio_queue::QueueState {
                max_size: QUEUE_MAX,
                next_avail: saved.next_avail,
                next_used: saved.next_used,
                event_idx_enabled: false,
                size: saved.size,
                ready: saved.ready,
                desc_table: saved.desc,
                avail_ring: saved.avail,
                used_ring: saved.used,
            };
            let queue = Queue::try_from(raw).map_err(|_| misfit("a malformed queue"))?;
            if saved.ready && !queue.is_valid(memory) {
                return Err(misfit("a queue outside memory"));
            }
            queues.push(queue);
        }
        self.queues = queues;
        self.status = state.status;
        self.driver_features = state.driver_features;
        [self.device_features_select, self.driver_features_select, self.queue_select] = state.selectors;
        self.interrupt_status = state.interrupt_status;
        Ok(())
    }
}

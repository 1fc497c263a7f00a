//! The saved state of a machine beside its pages: vCPU, devices, clock. Versioned, explicit, small.

use serde::{Deserialize, Serialize};

/// Version of [`SavedState`] this build writes; older ones that it reads are listed in [`SavedState::decode`].
pub const STATE_VERSION: u16 = 1;

/// Largest encoded state a peer may send.
pub const MAX_STATE_BYTES: usize = 64 << 10;

/// Everything of a paused machine that is not a page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// Always [`STATE_VERSION`] when written by this build.
    pub version: u16,
    /// CPU features the image was given; a host without one of them refuses.
    pub cpu_baseline: u8,
    /// The one vCPU.
    pub vcpu: VcpuState,
    /// Virtio devices in slot order: network, block, entropy.
    pub devices: Vec<VirtioState>,
    /// Guest time at the pause.
    pub clock: ClockState,
}

/// Registers of the vCPU. Segments, control registers and tables are a pure function of the memory
/// layout and are not saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// rax rbx rcx rdx rsi rdi rsp rbp r8…r15, in `struct kvm_regs` order.
    pub general: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// FS base (SDM vol. 3 §3.4.4).
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// Extended control register 0.
    pub xcr0: u64,
    /// XSAVE area (SDM vol. 1 §13.4), trailing zeros cut.
    pub xsave: Vec<u8>,
}

/// One virtio-mmio device (virtio 1.2 §4.2.2) with its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// Device id (virtio 1.2 §5).
    pub device_id: u32,
    /// Device status register.
    pub status: u8,
    /// Features the driver accepted.
    pub driver_features: u64,
    /// `DeviceFeaturesSel`, `DriverFeaturesSel`, `QueueSel`.
    pub selectors: [u32; 3],
    /// Interrupt status register.
    pub interrupt_status: u32,
    /// The device's queues. Requests taken and not completed are put back: the device serves each
    /// queue in order, so `next_avail` minus their number re-issues exactly them.
    pub queues: Vec<QueueState>,
}

/// One split virtqueue (virtio 1.2 §2.7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries.
    pub size: u16,
    /// Whether the driver enabled it.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub desc: u64,
    /// Guest address of the available ring.
    pub avail: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Next available entry the device takes.
    pub next_avail: u16,
    /// Next used entry the device writes.
    pub next_used: u16,
}

/// Guest time at the pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// Guest monotonic time in nanoseconds.
    pub monotonic_ns: u64,
    /// Guest wall clock in nanoseconds since 1970.
    pub wall_ns: u64,
    /// Generation last given to the guest.
    pub generation: u64,
}

/// Why an encoded state is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Written by a build this one does not know.
    #[error("saved state has version {found}; this host reads version {STATE_VERSION}")]
    Version {
        /// The version found.
        found: u16,
    },
    /// Cut short, too long, or not a state.
    #[error("saved state is damaged: {0}")]
    Damaged(&'static str),
}

impl SavedState {
    /// Encodes: version as 2 bytes little-endian, then postcard.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        // Writing into a growing vector cannot fail for a type without maps or unsized sequences.
        postcard::to_extend(self, self.version.to_le_bytes().to_vec()).unwrap_or_default()
    }

    /// Decodes what [`SavedState::encode`] wrote.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        if bytes.len() > MAX_STATE_BYTES {
            return Err(StateError::Damaged("too long"));
        }
        let (version, rest) = bytes.split_first_chunk::<2>().ok_or(StateError::Damaged("too short"))?;
        let found = u16::from_le_bytes(*version);
        if found != STATE_VERSION {
            return Err(StateError::Version { found });
        }
        let (state, rest): (Self, _) =
            postcard::take_from_bytes(rest).map_err(|_| StateError::Damaged("not a state"))?;
        if !rest.is_empty() || state.version != found {
            return Err(StateError::Damaged("trailing bytes or two versions"));
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> SavedState {
        SavedState {
            version: STATE_VERSION,
            cpu_baseline: 3,
            vcpu: VcpuState { rip: 0x100_0000, rflags: 2, xsave: vec![1, 2, 3], ..VcpuState::default() },
            devices: vec![VirtioState {
                device_id: 1,
                queues: vec![QueueState { size: 256, ready: true, ..QueueState::default() }; 2],
                ..VirtioState::default()
            }],
            clock: ClockState { monotonic_ns: 5, wall_ns: 6, generation: 1 },
        }
    }

    #[test]
    fn round_trip() {
        assert_eq!(SavedState::decode(&sample().encode()), Ok(sample()));
    }

    #[test]
    fn truncation_at_every_byte_is_refused() {
        let bytes = sample().encode();
        for end in 0..bytes.len() {
            assert!(SavedState::decode(&bytes[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn an_unknown_version_is_named() {
        let mut bytes = sample().encode();
        bytes[0] = 9;
        assert_eq!(SavedState::decode(&bytes), Err(StateError::Version { found: 9 }));
    }
}

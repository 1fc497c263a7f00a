//! Which pages were written: by the guest, as KVM tells, and by the VMM itself, as `vm-memory` notes.

use std::io;

use kage_machine::{Geometry, PageIndex, PageSet};
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend as _, bitmap::AtomicBitmap};

use crate::sys::ring::DirtyRing;

/// The slot of the machine's memory.
pub const MEMORY_SLOT: u32 = 1;
/// The slot of the read-only base.
pub const BASE_SLOT: u32 = 0;

/// The slot of the windows' page tables.
pub const TABLES_SLOT: u32 = 2;

/// Guest memory whose writes by this process are noted.
pub type GuestMemory = vm_memory::GuestMemoryMmap<AtomicBitmap>;

/// How KVM tells.
enum Source {
    Ring(DirtyRing),
    Bitmap,
}

/// Collects written pages between two harvests.
pub struct Tracker {
    source: Source,
    geometry: Geometry,
    seen: PageSet,
}

/// Asks for the dirty ring; must come before the vCPU is made. Returns whether this KVM has it.
pub fn enable_ring(vm: &VmFd) -> bool {
    [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING].into_iter().any(|capability| {
        let mut request = kvm_enable_cap { cap: capability, ..kvm_enable_cap::default() };
        request.args[0] = DirtyRing::BYTES;
        vm.enable_cap(&request).is_ok()
    })
}

impl Tracker {
    /// A tracker for the vCPU; `ring` is what [`enable_ring`] said.
    ///
    /// # Errors
    /// When the ring cannot be mapped.
    pub fn new(vcpu: &VcpuFd, ring: bool, geometry: Geometry) -> io::Result<Self> {
        let source = if ring { Source::Ring(DirtyRing::map(vcpu)?) } else { Source::Bitmap };
        Ok(Self { source, geometry, seen: PageSet::empty(geometry.pages()) })
    }

    /// Notes a written disk block.
    pub fn note_disk(&mut self, block: u32) {
        self.seen.insert(PageIndex(self.geometry.memory_pages.saturating_add(block)));
    }

    /// Takes over what KVM has noted so far; must be called when the ring is full.
    ///
    /// # Errors
    /// Those of the ioctls.
    pub fn collect(&mut self, vm: &VmFd) -> io::Result<()> {
        let Self { source, seen, geometry } = self;
        match source {
            Source::Ring(ring) => {
                while ring.drain(vm, |slot, offset| {
                    if slot == MEMORY_SLOT && offset < u64::from(geometry.memory_pages) {
                        seen.insert(PageIndex(offset as u32));
                    }
                })? == crate::sys::ring::ENTRIES
                {}
            }
            Source::Bitmap => {
                let words = vm.get_dirty_log(MEMORY_SLOT, geometry.memory_bytes() as usize)?;
                seen.union(&PageSet::from_words(geometry.memory_pages, words));
            }
        }
        Ok(())
    }

    /// All pages written since the last harvest.
    ///
    /// # Errors
    /// Those of the ioctls; nothing is forgotten then.
    pub fn harvest(&mut self, vm: &VmFd, memory: &GuestMemory) -> io::Result<PageSet> {
        self.collect(vm)?;
        for region in memory.iter() {
            let mapping: &vm_memory::MmapRegion<AtomicBitmap> = region;
            let words = mapping.bitmap().get_and_reset();
            self.seen.union(&PageSet::from_words(self.geometry.memory_pages, words));
        }
        Ok(self.seen.take())
    }
}

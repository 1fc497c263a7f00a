//! KVM's dirty ring (api.rst §8.29), for which `kvm-ioctls` has no wrapper.

use std::{
    io,
    os::fd::AsRawFd,
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

use kvm_ioctls::{VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmm_sys_util::{ioctl::ioctl, ioctl_io_nr};

use super::watchdog;

const KVMIO: u32 = 0xae;
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// `KVM_DIRTY_LOG_PAGE_OFFSET` of x86: pages before the ring in the vCPU's mapping.
const RING_PAGE: u64 = 64;
const DIRTY: u32 = 1;
const RESET: u32 = 2;

#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: u32,
    offset: u64,
}

/// Entries of the ring. When it is full the vCPU exits, so this trades memory (16 bytes an entry)
/// against exits while a guest writes much; 4,096 cover 16 MiB between two doors.
pub const ENTRIES: u32 = 4096;

/// The mapped ring of the one vCPU.
pub struct DirtyRing {
    entries: NonNull<Entry>,
    next: u32,
}

// SAFETY: the mapping belongs to this value alone on our side; KVM's side is ordered by the flags.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// Bytes to enable the capability with.
    pub const BYTES: u64 = ENTRIES as u64 * size_of::<Entry>() as u64;

    /// Maps the ring of a vCPU whose VM has it enabled.
    ///
    /// # Errors
    /// Those of `mmap(2)`.
    pub fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
        let file = unsafe { std::os::fd::BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address the kernel chooses aliases nothing.
        let at = unsafe {
            mmap(
                std::ptr::null_mut(),
                Self::BYTES as usize,
                protection,
                MapFlags::SHARED,
                file,
                RING_PAGE * 4096,
            )
        }?;
        let entries = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { entries, next: 0 })
    }

    /// Takes all entries: `each(slot, page offset in the slot)`; then hands them back to KVM, which
    /// write-protects those pages again.
    ///
    /// # Errors
    /// Those of `KVM_RESET_DIRTY_RINGS`.
    pub fn drain(&mut self, vm: &VmFd, mut each: impl FnMut(u32, u64)) -> io::Result<u32> {
        let mut taken = 0;
        while taken < ENTRIES {
            // SAFETY: the index is reduced to the ring's size, and all patterns are valid for `Entry`.
            let entry = unsafe { &*self.entries.as_ptr().wrapping_add((self.next % ENTRIES) as usize) };
            if entry.flags.load(Ordering::Acquire) & DIRTY == 0 {
                break;
            }
            each(entry.slot, entry.offset);
            entry.flags.store(RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            taken += 1;
        }
        self.reset(vm, taken)?;
        Ok(taken)
    }
}

impl DirtyRing {
    /// Has KVM write-protect the taken pages again. With a signal pending the ioctl ends early and says
    /// only how many entries it got to: the others would stay writable, and what the guest writes there
    /// next would never be seen. So the alarm is kept off meanwhile, and the call repeated until all are done.
    fn reset(&self, vm: &VmFd, taken: u32) -> io::Result<()> {
        if taken == 0 {
            return Ok(());
        }
        let _quiet = watchdog::Quiet::begin();
        let mut left = taken;
        while left > 0 {
            // SAFETY: the ioctl takes no argument and touches only the ring and the VM's page tables.
            let done = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
            match u32::try_from(done) {
                Ok(done) => left = left.saturating_sub(done),
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `map` mapped.
        let _ = unsafe { munmap(self.entries.as_ptr().cast(), Self::BYTES as usize) };
    }
}

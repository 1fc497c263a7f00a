//! The VM and its one vCPU: made, started, saved, restored.
//!
//! Order of making: dirty ring, memory slots, vCPU, CPUID, then registers. Slots come before anything
//! that registers on a bus (a slot added later costs milliseconds), and the ring must be on before the
//! vCPU exists (api.rst §8.29).

use std::{
    io,
    os::fd::{IntoRawFd, OwnedFd},
};

use kage_abi as abi;
use kage_machine::{control::Setup, state::VcpuState};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_dtable, kvm_regs,
    kvm_segment, kvm_userspace_memory_region, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, SyncReg, VcpuFd, VmFd};

use crate::{
    cpu,
    dirty::{self, BASE_SLOT, MEMORY_SLOT, TABLES_SLOT, Tracker},
    sys::watchdog,
    tables::Tables,
    upcall::Continuation,
};

/// What could not be done to the vCPU, with the cause.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct VcpuError {
    /// The step.
    pub what: &'static str,
    /// The cause.
    #[source]
    pub source: io::Error,
}

fn step<T, E: Into<io::Error>>(what: &'static str, result: Result<T, E>) -> Result<T, VcpuError> {
    result.map_err(|error| VcpuError { what, source: error.into() })
}

/// A VM with its vCPU. Never dropped: it lives as long as its process.
pub struct Vcpu {
    /// The VM, for its ioctls.
    pub vm: VmFd,
    /// The vCPU.
    pub fd: VcpuFd,
    entry: u64,
    page_table_root: u64,
}

impl Vcpu {
    /// Makes a VM over base and memory, both mapped in this process for good.
    ///
    /// # Errors
    /// [`VcpuError`] names the step.
    pub fn new(
        kvm: OwnedFd,
        setup: &Setup,
        base: u64,
        memory: u64,
        tables: &Tables,
    ) -> Result<(Self, Tracker), VcpuError> {
        let kvm = kvm_from(kvm);
        if !kvm.check_extension(Cap::SyncRegs) {
            return step("KVM_CAP_SYNC_REGS", Err(io::Error::from(io::ErrorKind::Unsupported)));
        }
        let supported: CpuId =
            step("KVM_GET_SUPPORTED_CPUID", kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))?;
        let cpuid = cpu::restrict(supported).map_err(|missing| VcpuError {
            what: "CPU baseline",
            source: io::Error::new(io::ErrorKind::Unsupported, missing),
        })?;
        let vm = step("KVM_CREATE_VM", kvm.create_vm())?;
        let ring = dirty::enable_ring(&vm);
        let slots = [
            (BASE_SLOT, KVM_MEM_READONLY, abi::BASE, setup.base_bytes, base),
            (MEMORY_SLOT, KVM_MEM_LOG_DIRTY_PAGES, abi::MEMORY, setup.geometry.memory_bytes(), memory),
            (TABLES_SLOT, 0, abi::TABLES, tables.bytes(), tables.address()),
        ];
        for (slot, flags, guest_phys_addr, memory_size, userspace_addr) in slots {
            let region =
                kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr };
            step("KVM_SET_USER_MEMORY_REGION", set_region(&vm, region))?;
        }
        let mut fd = step("KVM_CREATE_VCPU", vm.create_vcpu(0))?;
        step("KVM_SET_CPUID2", fd.set_cpuid2(&cpuid))?;
        fd.set_sync_valid_reg(SyncReg::Register);
        fd.set_sync_valid_reg(SyncReg::VcpuEvents);
        let tracker = step("map the dirty ring", Tracker::new(&fd, ring, setup.geometry))?;
        step("install the watchdog", watchdog::watch(watchdog::immediate_exit_of(fd.get_kvm_run())))?;
        let vcpu = Self { vm, fd, entry: setup.entry, page_table_root: setup.page_table_root };
        vcpu.set_system_registers(0, 0)?;
        Ok((vcpu, tracker))
    }

    /// Flat 64-bit segments at ring 3, tables from the base slot, write protection and no-execute on.
    fn set_system_registers(&self, fs_base: u64, gs_base: u64) -> Result<(), VcpuError> {
        let mut sregs = step("KVM_GET_SREGS", self.fd.get_sregs())?;
        sregs.cs = segment(abi::selector::USER_CODE, 0xb, 0);
        let data = |base| segment(abi::selector::USER_DATA, 3, base);
        (sregs.ds, sregs.es, sregs.ss) = (data(0), data(0), data(0));
        (sregs.fs, sregs.gs) = (data(fs_base), data(gs_base));
        sregs.tr = kvm_segment {
            base: abi::TSS,
            limit: abi::PAGE as u32 - 1,
            selector: abi::selector::TSS,
            type_: 11,
            present: 1,
            ..kvm_segment::default()
        };
        sregs.gdt = kvm_dtable { base: abi::GDT, limit: 7 * 8 - 1, ..kvm_dtable::default() };
        sregs.idt =
            kvm_dtable { base: abi::IDT, limit: (abi::FAULT_STUBS * 16 - 1) as u16, ..kvm_dtable::default() };
        sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31; // PE MP ET NE WP PG
        sregs.cr3 = self.page_table_root;
        sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 18; // PAE OSFXSR OSXMMEXCPT OSXSAVE
        sregs.efer = 1 << 8 | 1 << 10 | 1 << 11; // LME LMA NXE
        step("KVM_SET_SREGS", self.fd.set_sregs(&sregs))?;
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
        xcrs.xcrs[0].value = cpu::XCR0;
        step("KVM_SET_XCRS", self.fd.set_xcrs(&xcrs))
    }

    fn set_rip(&self, rip: u64) -> Result<(), VcpuError> {
        let rsp = abi::MEMORY + abi::offset::STACK_TOP - 8;
        step("KVM_SET_REGS", self.fd.set_regs(&kvm_regs { rip, rsp, rflags: 2, ..kvm_regs::default() }))
    }

    /// Points the vCPU at the kernel's first instruction.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn boot(&self) -> Result<(), VcpuError> {
        self.set_rip(self.entry)
    }

    /// Points the vCPU at the stub that knocks and touches nothing.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn park(&self) -> Result<(), VcpuError> {
        self.set_rip(abi::PARK)
    }

    /// Completes a pending exit, so that the registers say what the guest has seen (api.rst, `KVM_RUN`).
    ///
    /// # Errors
    /// [`VcpuError`] when the vCPU exits for another reason than the one asked for.
    pub fn complete_exit(&mut self) -> Result<(), VcpuError> {
        // An alarm that has rung is still to be heard, one that rings meanwhile is when this is over.
        let quiet = watchdog::Quiet::begin();
        let rang = self.fd.get_kvm_run().immediate_exit;
        self.fd.set_kvm_immediate_exit(1);
        let result = match self.fd.run() {
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(io::Error::from(error)),
            Ok(exit) => Err(io::Error::other(format!("unexpected exit {exit:?}"))),
        };
        self.fd.set_kvm_immediate_exit(rang);
        drop(quiet);
        step("complete a pending exit", result)
    }

    /// Reads the registers of a vCPU without a pending exit.
    ///
    /// # Errors
    /// [`VcpuError`]; a vCPU in ring 0 is within a fault and cannot be saved.
    pub fn save(&self) -> Result<VcpuState, VcpuError> {
        let regs = step("KVM_GET_REGS", self.fd.get_regs())?;
        let sregs = step("KVM_GET_SREGS", self.fd.get_sregs())?;
        if sregs.ss.dpl != 3 {
            return step("save", Err(io::Error::other("the guest is within a fault")));
        }
        let xsave = step("KVM_GET_XSAVE", self.fd.get_xsave())?;
        let mut bytes: Vec<u8> = xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1));
        Ok(VcpuState {
            general: [
                regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rsp, regs.rbp, regs.r8,
                regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
            ],
            rip: regs.rip,
            rflags: regs.rflags,
            fs_base: sregs.fs.base,
            gs_base: sregs.gs.base,
            xcr0: cpu::XCR0,
            xsave: bytes,
        })
    }

    /// Sets the registers of a saved vCPU. The system registers are already the layout's; they are set
    /// again only for other segment bases, since that costs the next run 60–100 µs.
    ///
    /// # Errors
    /// [`VcpuError`]; a state this vCPU cannot take is refused.
    pub fn restore(&self, state: &VcpuState) -> Result<(), VcpuError> {
        if state.xcr0 != cpu::XCR0 || state.xsave.len() > 4096 {
            return step("restore", Err(io::Error::other("the state's XSAVE area is not this build's")));
        }
        if state.fs_base != 0 || state.gs_base != 0 {
            self.set_system_registers(state.fs_base, state.gs_base)?;
        }
        let [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15] = state.general;
        let regs = kvm_regs {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip: state.rip,
            rflags: state.rflags,
        };
        step("KVM_SET_REGS", self.fd.set_regs(&regs))?;
        let mut xsave = kvm_xsave::default();
        for (word, chunk) in xsave.region.iter_mut().zip(state.xsave.chunks(4)) {
            let mut bytes = [0; 4];
            bytes[..chunk.len()].copy_from_slice(chunk);
            *word = u32::from_le_bytes(bytes);
        }
        step("KVM_SET_XSAVE", set_xsave(&self.fd, &xsave))
    }

    /// Where the vCPU stood when it last left the guest.
    #[must_use]
    pub fn instruction_pointer(&self) -> u64 {
        self.fd.sync_regs().regs.rip
    }

    /// Whether it stands in ring 0.
    #[must_use]
    pub fn is_in_ring_0(&self) -> bool {
        self.fd.get_sregs().is_ok_and(|sregs| sregs.ss.dpl == 0)
    }

    /// Whether an exception is on its way into the guest, so that the instruction pointer must stay.
    #[must_use]
    pub fn takes_exception(&self) -> bool {
        self.fd.sync_regs().events.exception.injected != 0
    }

    /// Has the next entry go on at `rip`, all other registers as they are.
    pub fn continue_at(&mut self, rip: u64) {
        self.fd.sync_regs_mut().regs.rip = rip;
        self.fd.set_sync_dirty_reg(SyncReg::Register);
    }

    /// Takes the vCPU from the fault stub in ring 0 back to ring 3.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn leave_fault(&mut self, to: Continuation) -> Result<(), VcpuError> {
        self.complete_exit()?;
        let mut sregs = step("KVM_GET_SREGS", self.fd.get_sregs())?;
        sregs.cs = segment(abi::selector::USER_CODE, 0xb, 0);
        sregs.ss = segment(abi::selector::USER_DATA, 3, 0);
        step("KVM_SET_SREGS", self.fd.set_sregs(&sregs))?;
        let mut regs = step("KVM_GET_REGS", self.fd.get_regs())?;
        (regs.rip, regs.rsp, regs.rflags, regs.rax) = (to.rip, to.rsp, to.rflags, to.rax);
        step("KVM_SET_REGS", self.fd.set_regs(&regs))
    }

    /// Takes the slot of the windows' tables away, has it filled anew, and gives it back: the one way to have a
    /// change of present entries seen.
    ///
    /// # Errors
    /// [`VcpuError`]; the machine cannot go on then.
    pub fn replace_tables<T>(
        &self,
        tables: &mut Tables,
        fill: impl FnOnce(&mut Tables) -> T,
    ) -> Result<T, VcpuError> {
        let region = |tables: &Tables, memory_size| kvm_userspace_memory_region {
            slot: TABLES_SLOT,
            flags: 0,
            guest_phys_addr: abi::TABLES,
            memory_size,
            userspace_addr: tables.address(),
        };
        step("remove the slot of tables", set_region(&self.vm, region(tables, 0)))?;
        step("clear the tables", tables.clear())?;
        let filled = fill(tables);
        step("restore the slot of tables", set_region(&self.vm, region(tables, tables.bytes())))?;
        Ok(filled)
    }
}

/// A flat segment of the selector's privilege; code has bit 3 of its type set (SDM vol. 3 §3.4.5.1).
fn segment(selector: u16, type_: u8, base: u64) -> kvm_segment {
    kvm_segment {
        base,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: (selector & 3) as u8,
        db: u8::from(type_ & 8 == 0),
        s: 1,
        l: u8::from(type_ & 8 != 0),
        g: 1,
        ..kvm_segment::default()
    }
}

#[expect(
    unsafe_code,
    reason = "kvm-ioctls takes an owned descriptor by number, and trusts mappings it is given"
)]
mod unsafe_calls {
    use super::{IntoRawFd, Kvm, OwnedFd, VcpuFd, VmFd, io, kvm_userspace_memory_region, kvm_xsave};
    use std::os::fd::FromRawFd;

    pub fn kvm_from(kvm: OwnedFd) -> Kvm {
        // SAFETY: the descriptor is open, owned, and given up to the new value.
        unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) }
    }

    pub fn set_region(vm: &VmFd, region: kvm_userspace_memory_region) -> io::Result<()> {
        // SAFETY: the caller's mappings cover the region and live until the process ends.
        unsafe { vm.set_user_memory_region(region) }.map_err(io::Error::from)
    }

    pub fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> io::Result<()> {
        // SAFETY: without dynamically enabled features (XCR0 is at most AVX) the area is the 4 KiB of `kvm_xsave`.
        unsafe { vcpu.set_xsave(xsave) }.map_err(io::Error::from)
    }
}
use unsafe_calls::{kvm_from, set_region, set_xsave};

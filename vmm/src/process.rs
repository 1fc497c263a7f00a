//! What `kage vmm` runs: one machine, one thread.
//!
//! ```text
//! Empty ──Setup──▶ Shell ──Boot──────────────────▶ Running ⇄ Paused ──Release──▶ Released
//!                    └──Restore──▶ Restored ──Run──▶┘                              (never runs again)
//! ```
//!
//! Invariants: guest memory is touched only between two entries into the vCPU; nothing leaves while
//! the gate is shut; a released machine is never entered again, by this process or after it, since the
//! control page says so before the release is answered.

mod mailbox;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
    time::Duration,
};

use kage_abi::{self as abi, BootPage, offset, resources::Resources};
use kage_machine::{
    HostInstant, PauseCause, SavedState,
    control::{
        CONTROL_VERSION, MAX_PACKET, Made, Phase, Reply, Request, Setup, control_page, decode, encode,
    },
    state::STATE_VERSION,
};
use kvm_ioctls::VcpuExit;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{RecvFlags, SocketFlags, accept_with},
    time::{ClockId, clock_gettime},
};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestRegionMmap, bitmap::AtomicBitmap, mmap::MmapRegionBuilder,
};

use crate::{
    clock::GuestClock,
    cpu,
    dirty::{GuestMemory, Tracker},
    disk::Attach,
    inspect::Answering,
    jail,
    packet::{self, Packet},
    sys::{Mapping, faults::Faults, slice, watchdog},
    tables::{MapError, Tables},
    upcall,
    vcpu::Vcpu,
    virtio::{block::Block, entropy::Entropy, mmio::Misfit, net::Net},
};

/// Period of the alarm that takes a busy vCPU out of the guest.
const ALARM: Duration = Duration::from_millis(10);
/// Shortest period that a guest can ask for to have its processes interrupted.
const SHORTEST_ALARM: Duration = Duration::from_micros(200);
/// A guest that has not knocked for so long has failed.
const HANG: Duration = Duration::from_secs(5);
/// Idle waits longer than this stop the alarm.
const QUIET: Duration = Duration::from_millis(20);

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn host_now() -> HostInstant {
    let time = clock_gettime(ClockId::Monotonic);
    HostInstant { ns: time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64 }
}

fn wall_now() -> u64 {
    let time = clock_gettime(ClockId::Realtime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Runs a VMM process whose listening control socket is descriptor `listener`. Returns when the
/// machine has ended.
///
/// # Errors
/// Text for the log; the daemon learns the reason from the control page or from the answer.
pub fn main(listener: i32) -> Result<(), String> {
    let listener = take_descriptor(listener)?;
    // Listening once more makes the socket's credentials this process's (unix(7), SO_PEERCRED).
    rustix::net::listen(&listener, 4).map_err(|error| format!("control socket: {error}"))?;
    let mut process = Process::new(listener);
    loop {
        process.serve_control(true)?;
        while let Some(machine) = process.machine.as_mut().filter(|machine| machine.runs()) {
            match machine.enter() {
                Ok(Entered::Door) => process.door()?,
                // In ring 0 a machine cannot be saved: it is out of there within microseconds.
                Ok(Entered::Alarm) if machine.in_fault() => {}
                Ok(Entered::Alarm) => {
                    machine.news |= machine.inspecting.hear(&machine.memory);
                    process.serve_control(false)?;
                    if let Some(machine) = process.machine.as_mut().filter(|machine| machine.runs()) {
                        machine.preempt();
                    }
                }
                Ok(Entered::Again) => {}
                Err(failure) => return process.fail(&failure),
            }
        }
    }
}

/// The control socket's side of the process.
struct Process {
    listener: OwnedFd,
    connection: Option<OwnedFd>,
    buffer: Vec<u8>,
    label: Vec<u8>,
    machine: Option<Box<Machine>>,
}

/// One machine and all it is made of.
struct Machine {
    setup: Setup,
    phase: Phase,
    /// Whether the gate is open once it runs on after a pause.
    gate_open: bool,
    vcpu: Vcpu,
    tracker: Tracker,
    memory: GuestMemory,
    _base: Mapping,
    tables: Tables,
    control: Mapping,
    /// Where the memory is mapped.
    memory_at: u64,
    /// The page faults of this process, which its daemon answers; kept open for as long as it lives.
    faults: Option<OwnedFd>,
    /// Memory, control page and, once attached, the disk's log and index: what a daemon that adopts the machine gets.
    shared: Vec<OwnedFd>,
    net: Net,
    block: Block,
    entropy: Entropy,
    clock: GuestClock,
    generation: u64,
    /// The last exit from the guest, or from an interrupted idle wait.
    stopped_at: HostInstant,
    /// When the guest last knocked.
    knocked_at: HostInstant,
    /// It has knocked and was not entered since. However long it waits at its door, it does not hang.
    at_door: bool,
    /// Pages were missing when the alarm last rang.
    was_short: bool,
    doors: u64,
    /// An exit waits to be completed by the next entry.
    exit_pending: bool,
    /// Period of the alarm; zero while it is off.
    alarm: Duration,
    /// The mailbox has news for the guest.
    news: bool,
    inspecting: Answering,
    /// What the guest was last told to sync for: the number it answers, and the daemon's requests.
    syncing: Option<(u32, Vec<u64>)>,
}

enum Entered {
    Door,
    Alarm,
    Again,
}

impl Process {
    fn new(listener: OwnedFd) -> Self {
        Self { listener, connection: None, buffer: vec![0; MAX_PACKET], label: Vec::new(), machine: None }
    }

    /// Stores why the machine ended, where its daemon, or the next one, reads it.
    fn fail(&self, reason: &str) -> Result<(), String> {
        if let Some(machine) = &self.machine {
            let text = &reason.as_bytes()[..reason.len().min(control_page::FAILURE_MAX)];
            machine.control.write(control_page::FAILURE, text);
            machine.control.write(control_page::FAILURE_LENGTH, &(text.len() as u16).to_le_bytes());
        }
        Err(reason.to_owned())
    }

    /// Answers what waits on the control socket; with `block`, until the machine runs.
    fn serve_control(&mut self, block: bool) -> Result<(), String> {
        loop {
            let runs = self.machine.as_ref().is_some_and(|machine| machine.runs());
            let wait = block && !runs;
            match self.next_packet(wait) {
                Ok(Some(packet)) => self.answer(packet)?,
                Ok(None) if wait => {}
                Ok(None) => return Ok(()),
                Err(error) => return Err(format!("control socket: {error}")),
            }
            if block && self.machine.as_ref().is_some_and(|machine| machine.runs()) {
                return Ok(());
            }
        }
    }

    /// The next packet, `None` when none waits (or, when waiting, when something else happened first).
    fn next_packet(&mut self, wait: bool) -> io::Result<Option<Packet>> {
        if wait {
            let mut polled = vec![PollFd::new(&self.listener, PollFlags::IN)];
            if let Some(connection) = &self.connection {
                polled.push(PollFd::new(connection, PollFlags::IN));
            }
            match ppoll_for(&mut polled, None) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        if let Some(connection) = &self.connection {
            match packet::receive(connection.as_fd(), &mut self.buffer, RecvFlags::DONTWAIT) {
                Ok(packet) if packet.bytes.is_empty() => self.lost_daemon()?,
                Ok(packet) => return Ok(Some(packet)),
                Err(error) if is_retry(&error) => {}
                Err(_) => self.lost_daemon()?,
            }
        }
        match accept_with(&self.listener, SocketFlags::CLOEXEC) {
            Ok(connection) => self.connection = Some(connection),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(None)
    }

    /// A machine that belongs to someone waits for the next daemon; a mere shell ends.
    fn lost_daemon(&mut self) -> io::Result<()> {
        self.connection = None;
        if self.label.is_empty() {
            Err(io::Error::other("the daemon is gone and this shell is nobody's"))
        } else {
            Ok(())
        }
    }

    fn answer(&mut self, packet: Packet) -> Result<(), String> {
        let request = match decode::<Request>(&packet.bytes) {
            Ok(request) => request,
            Err(error) => return self.reply(&Reply::Refused { reason: error.to_string() }),
        };
        let reply = match request {
            Request::Hello { .. } => return self.hello(),
            Request::End => {
                self.reply(&Reply::Done)?;
                return Err("ended on request".into());
            }
            Request::Label(label) => {
                self.label = label;
                Reply::Done
            }
            Request::Forget if !self.label.is_empty() => {
                Reply::Refused { reason: "this machine is somebody's".into() }
            }
            Request::Setup(setup) if self.machine.is_none() => {
                match Machine::new(setup, packet.descriptors) {
                    Ok(machine) => {
                        self.machine = Some(Box::new(machine));
                        return self.ready();
                    }
                    Err(reason) => Reply::Refused { reason },
                }
            }
            request => match &mut self.machine {
                Some(machine) => machine
                    .perform(request, packet.descriptors)
                    .unwrap_or_else(|reason| Reply::Refused { reason }),
                None => Reply::Refused { reason: "nothing is set up".into() },
            },
        };
        let Reply::Started { gate_open, .. } = reply else { return self.reply(&reply) };
        // The answer to `Run` says when the vCPU was entered, and must not delay it: send it first, stamped
        // at the last instant before the entry.
        self.reply(&Reply::Started { at: host_now(), gate_open })
    }

    fn reply(&mut self, reply: &Reply) -> Result<(), String> {
        let Some(connection) = &self.connection else { return Ok(()) };
        if packet::send(connection.as_fd(), &encode(reply), &[]).is_err() {
            self.lost_daemon().map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Says that the machine is set up, and hands its page faults over.
    fn ready(&mut self) -> Result<(), String> {
        let (Some(connection), Some(machine)) = (&self.connection, &self.machine) else { return Ok(()) };
        let faults: Vec<_> = machine.faults.iter().map(AsFd::as_fd).collect();
        let reply = encode(&Reply::Ready { memory_at: machine.memory_at });
        if packet::send(connection.as_fd(), &reply, &faults).is_err() {
            self.lost_daemon().map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn hello(&mut self) -> Result<(), String> {
        let machine = self.machine.as_deref();
        let phase = machine.map_or(Phase::Empty, |machine| machine.phase);
        let made = machine.map(Machine::made);
        let label = self.label.clone();
        let reply = encode(&Reply::Hello { version: CONTROL_VERSION, phase, machine: made, label });
        let descriptors: Vec<BorrowedFd<'_>> = machine
            .iter()
            .flat_map(|machine| machine.shared.iter().chain(machine.net.attached()).map(AsFd::as_fd))
            .collect();
        if let Some(connection) = &self.connection
            && packet::send(connection.as_fd(), &reply, &descriptors).is_err()
        {
            self.lost_daemon().map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Serves one door: everything queued leaves, everything that arrived is delivered; waits until the
    /// guest's deadline when nothing was.
    fn door(&mut self) -> Result<(), String> {
        loop {
            self.serve_control(false)?;
            let Some(machine) = self.machine.as_mut() else { return Ok(()) };
            if !machine.runs() {
                return Ok(());
            }
            if let Some(failure) = machine.guest_failure() {
                return self.fail(&failure);
            }
            machine.inspecting.serve(&machine.memory);
            let deadline = machine.deadline();
            let delivered = machine.serve_devices();
            let now = machine.clock.at(host_now());
            if delivered || machine.news || now >= deadline {
                machine.tell_time();
                return Ok(());
            }
            let left = Duration::from_nanos(deadline.saturating_sub(now));
            machine.rest(left);
            let mut polled = vec![PollFd::new(&self.listener, PollFlags::IN)];
            if let Some(connection) = &self.connection {
                polled.push(PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::IN));
            }
            polled.push(PollFd::from_borrowed_fd(machine.block.wake(), PollFlags::IN));
            if let Some(inspector) = machine.inspecting.socket() {
                polled.push(PollFd::from_borrowed_fd(inspector, PollFlags::IN));
            }
            if let Some(tap) = machine.net.tap() {
                polled.push(PollFd::from_borrowed_fd(tap.as_fd(), PollFlags::IN));
            }
            let waited = ppoll_for(&mut polled, (deadline != u64::MAX).then_some(left));
            drop(polled);
            machine.stopped_at = host_now();
            machine.news |= machine.inspecting.hear(&machine.memory);
            match waited {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(format!("ppoll: {error}"));
                }
                _ => {}
            }
        }
    }
}

impl Machine {
    fn new(setup: Setup, descriptors: Vec<OwnedFd>) -> Result<Self, String> {
        let [kvm, base, memory, control]: [OwnedFd; 4] =
            descriptors.try_into().map_err(|_| "setup needs four descriptors".to_owned())?;
        let text = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        let base = Mapping::new(base, setup.base_bytes as usize, false).map_err(text("map the base"))?;
        let control_mapping =
            Mapping::new(&control, abi::PAGE as usize, true).map_err(text("map the control page"))?;
        let size = setup.geometry.memory_bytes() as usize;
        let page = std::num::NonZeroUsize::new(abi::PAGE as usize).ok_or("no page size")?;
        let file = File::from(memory.try_clone().map_err(text("memory"))?);
        let region = MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::new(size, page))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, 0))
            .build()
            .map_err(|error| format!("map memory: {error}"))?;
        let at = region.as_ptr() as u64;
        let region = GuestRegionMmap::new(region, GuestAddress(abi::MEMORY)).ok_or("memory overflows")?;
        let guest_memory =
            GuestMemory::from_regions(vec![region]).map_err(|error| format!("memory: {error}"))?;
        let tables = Tables::new(setup.geometry.memory_bytes()).map_err(text("map the tables"))?;
        let (mut vcpu, tracker) =
            Vcpu::new(kvm, &setup, base.address(), at, &tables).map_err(|error| error.to_string())?;
        // Only with privilege. Without it, or where the kernel has none, this machine's pages cannot be missing.
        let faults = Faults::of_this_process().ok();
        jail::share_heap();
        jail::drop_privileges(setup.jail).map_err(text("jail"))?;
        let block = Block::new(setup.geometry.disk_bytes()).map_err(text("disk worker"))?;
        // After the disk's worker has begun, which may wait.
        slice::ask_for_short_slices();
        // Read once before the filter: finding the vDSO takes system calls that reading the clock does not.
        let now = host_now();
        jail::filter().map_err(text("system call filter"))?;
        vcpu.park().map_err(|error| error.to_string())?;
        match vcpu.fd.run() {
            Ok(VcpuExit::IoOut(abi::DOOR_PORT, _)) => {}
            other => return Err(format!("warming up: {other:?}")),
        }
        vcpu.complete_exit().map_err(|error| error.to_string())?;
        Ok(Self {
            setup,
            phase: Phase::Shell,
            gate_open: true,
            vcpu,
            tracker,
            memory: guest_memory,
            _base: base,
            tables,
            control: control_mapping,
            memory_at: at,
            faults,
            shared: vec![memory, control],
            net: Net::new(),
            block,
            entropy: Entropy::new(),
            clock: GuestClock::start(now, wall_now()),
            generation: 0,
            stopped_at: now,
            knocked_at: now,
            at_door: false,
            was_short: false,
            doors: 0,
            exit_pending: false,
            alarm: Duration::ZERO,
            news: false,
            inspecting: Answering::default(),
            syncing: None,
        })
    }

    fn made(&self) -> Made {
        let Setup { geometry, base, .. } = self.setup;
        Made { geometry, base, disk: self.shared.len() > 2, tap: self.net.attached().is_some() }
    }

    const fn runs(&self) -> bool {
        matches!(self.phase, Phase::Running { .. })
    }

    fn set_alarm(&mut self, period: Duration) {
        if period != self.alarm {
            watchdog::set_period(period);
            self.alarm = period;
        }
    }

    /// The period that suits a guest about to run.
    fn alarm_period(&self) -> Duration {
        match u32::from_le_bytes(self.read_word(std::mem::offset_of!(BootPage, preempt_us))) {
            0 => ALARM,
            micros => Duration::from_micros(micros.into()).clamp(SHORTEST_ALARM, ALARM),
        }
    }

    /// Stops the alarm for a wait that it would only interrupt.
    fn rest(&mut self, wait: Duration) {
        if wait >= QUIET.min(self.alarm * 2) {
            self.set_alarm(Duration::ZERO);
        }
    }

    /// Whether the vCPU runs a stub that notes a fault. Code in ring 3 can go there too, and is like any other.
    fn in_fault(&self) -> bool {
        upcall::in_fault_stub(self.vcpu.instruction_pointer()) && self.vcpu.is_in_ring_0()
    }

    /// Interrupts process code: what a door would deliver is delivered, and the vCPU goes on in the kernel. The kernel
    /// itself is only told that it has had enough.
    fn preempt(&mut self) {
        let entry = if self.vcpu.takes_exception() {
            None
        } else {
            upcall::preempt(&self.memory, self.vcpu.instruction_pointer())
        };
        if let Some(rip) = entry {
            self.vcpu.continue_at(rip);
            self.serve_devices();
            self.tell_time();
            self.knocked_at = self.stopped_at;
        } else {
            self.write_word(std::mem::offset_of!(BootPage, late), &1_u32.to_le_bytes());
        }
    }

    /// Enters the guest until it knocks, faults, or the alarm rings.
    fn enter(&mut self) -> Result<Entered, String> {
        self.set_alarm(self.alarm_period());
        self.exit_pending = false;
        if std::mem::take(&mut self.at_door) {
            self.knocked_at = host_now();
        }
        let mut mmio = None;
        let outcome = match self.vcpu.fd.run() {
            Ok(VcpuExit::IoOut(abi::DOOR_PORT, data)) => {
                self.exit_pending = true;
                match data.first().copied() {
                    Some(abi::call::KNOCK) => {
                        self.doors += 1;
                        Ok(Entered::Door)
                    }
                    Some(abi::call::MAP) => self.map(false).map(|()| Entered::Again),
                    Some(abi::call::REBUILD) => self.map(true).map(|()| Entered::Again),
                    Some(abi::call::FAULT) => self.fault().map(|()| Entered::Again),
                    call => Err(format!("the guest asked its door for what there is not: {call:?}")),
                }
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                let mut bytes = [0; 8];
                let length = data.len().min(8);
                bytes[..length].copy_from_slice(&data[..length]);
                mmio = Some((address, bytes, length));
                Ok(Entered::Again)
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                let device = match device_slot(address) {
                    Some(abi::device::NET) => Some(&mut self.net.transport),
                    Some(abi::device::BLOCK) => Some(&mut self.block.transport),
                    Some(abi::device::ENTROPY) => Some(&mut self.entropy.transport),
                    _ => None,
                };
                match device {
                    Some(device) => device.read(address % abi::PAGE, data),
                    None => data.fill(0),
                }
                Ok(Entered::Again)
            }
            Ok(VcpuExit::Intr) => Ok(Entered::Alarm),
            Ok(VcpuExit::Unsupported(reason)) if reason == kvm_bindings::KVM_EXIT_DIRTY_RING_FULL => self
                .tracker
                .collect(&self.vcpu.vm)
                .map(|()| Entered::Again)
                .map_err(|error| format!("dirty ring: {error}")),
            Ok(VcpuExit::Shutdown) => {
                Err("the guest faulted within its fault handler (triple fault)".to_owned())
            }
            Ok(exit) => Err(format!("the guest did what no guest does: {exit:?}")),
            Err(error) if error.errno() == libc::EINTR => Ok(Entered::Alarm),
            Err(error) if error.errno() == libc::EAGAIN => Ok(Entered::Again),
            Err(error) => Err(format!("KVM_RUN: {error}")),
        };
        let now = host_now();
        self.stopped_at = now;
        if let Some((address, bytes, length)) = mmio {
            let device = match device_slot(address) {
                Some(abi::device::NET) => Some(&mut self.net.transport),
                Some(abi::device::BLOCK) => Some(&mut self.block.transport),
                Some(abi::device::ENTROPY) => Some(&mut self.entropy.transport),
                _ => None,
            };
            if let Some(device) = device {
                device.write(address % abi::PAGE, &bytes[..length], &self.memory);
            }
        }
        match outcome {
            Ok(Entered::Door) => (self.knocked_at, self.at_door) = (now, true),
            Ok(Entered::Alarm) => {
                self.vcpu.fd.set_kvm_immediate_exit(0);
                if self.may_wait_for_page() {
                    self.knocked_at = now;
                }
                if now.since(self.knocked_at) > HANG {
                    let rip = self.vcpu.instruction_pointer();
                    return Err(format!(
                        "the guest has not opened its door for {} s, at {rip:#x}",
                        HANG.as_secs()
                    ));
                }
            }
            _ => {}
        }
        outcome
    }

    /// Serves all devices; returns whether anything was delivered to the guest.
    fn serve_devices(&mut self) -> bool {
        if self.phase == (Phase::Running { gate_open: true }) {
            self.net.send(&self.memory);
        }
        let received = self.net.receive(&self.memory);
        let tracker = &mut self.tracker;
        let blocks = self.block.serve(&self.memory, |block| tracker.note_disk(block));
        let entropy = self.entropy.serve(&self.memory);
        self.relay_syncs();
        received > 0 || blocks || entropy
    }

    fn perform(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Reply, String> {
        let refuse = |what: &str, phase: Phase| Err(format!("cannot {what} while {phase:?}"));
        match request {
            Request::AttachTap => {
                self.net.attach(descriptors.into_iter().next());
                Ok(Reply::Done)
            }
            Request::AttachDisk { identity, disk_elsewhere } => {
                let [log, index, line]: [OwnedFd; 3] =
                    descriptors.try_into().map_err(|_| "a disk comes with three descriptors")?;
                let copy = |of: &OwnedFd| of.try_clone().map_err(|error| format!("disk: {error}"));
                let (shared_log, shared_index) = (copy(&log)?, copy(&index)?);
                let attach = Attach { log: log.into(), index, identity, elsewhere: disk_elsewhere, line };
                self.block.attach(attach)?;
                self.shared.extend([shared_log, shared_index]);
                Ok(Reply::Done)
            }
            Request::AttachDiskLine => {
                let line = descriptors.into_iter().next().ok_or("a line comes with its connection")?;
                self.block.attach_line(line);
                Ok(Reply::Done)
            }
            Request::Boot => {
                if self.phase != Phase::Shell {
                    return refuse("boot", self.phase);
                }
                self.vcpu.boot().map_err(|error| error.to_string())?;
                self.clock = GuestClock::start(host_now(), wall_now());
                self.write_word(0, &abi::BOOT_MAGIC.to_le_bytes());
                self.write_word(std::mem::offset_of!(BootPage, abi_version), &abi::ABI_VERSION.to_le_bytes());
                let bytes = self.setup.geometry.memory_bytes();
                self.write_word(std::mem::offset_of!(BootPage, memory_bytes), &bytes.to_le_bytes());
                self.tell_time();
                self.start(true)
            }
            Request::Generation { identity, seed, indices } => {
                if let Some(identity) = &identity {
                    self.write_config(identity)?;
                }
                self.generation += 1;
                self.write_word(std::mem::offset_of!(BootPage, generation), &self.generation.to_le_bytes());
                self.write_word(std::mem::offset_of!(BootPage, seed), &seed);
                self.write_indices(std::mem::offset_of!(Resources, first_index), indices.start);
                self.write_indices(std::mem::offset_of!(Resources, limit_index), indices.end);
                self.news = true;
                Ok(Reply::Done)
            }
            Request::AttachInspector => {
                let socket =
                    descriptors.into_iter().next().ok_or("an inspector comes with its connection")?;
                self.inspecting.attach(socket);
                Ok(Reply::Done)
            }
            Request::RaiseIndices { limit } => {
                let field = std::mem::offset_of!(Resources, limit_index);
                let mut now = [0; 8];
                let at = GuestAddress(abi::MEMORY + offset::RESOURCES + field as u64);
                self.memory.read_slice(&mut now, at).map_err(|error| format!("resources: {error}"))?;
                self.write_indices(field, limit.max(u64::from_le_bytes(now)));
                self.news = true;
                Ok(Reply::Done)
            }
            Request::Restore { state, paused_at, moved } => {
                if self.phase != Phase::Shell {
                    return refuse("restore", self.phase);
                }
                let state = SavedState::decode(&state).map_err(|error| error.to_string())?;
                self.restore(&state, paused_at, moved)?;
                self.phase = Phase::Restored;
                Ok(Reply::Done)
            }
            Request::Run { gate_open } if self.phase == Phase::Restored => {
                self.tell_time();
                self.start(gate_open)
            }
            Request::OpenGate if self.runs() => {
                self.phase = Phase::Running { gate_open: true };
                self.block.settle();
                Ok(Reply::Done)
            }
            Request::LetOut(output) if self.runs() => {
                // A guest that found its ring full goes on.
                self.news |= self.net.send_up_to(&self.memory, output) > 0;
                Ok(Reply::Done)
            }
            Request::Harvest => Ok(Reply::Dirty(self.harvest()?)),
            Request::Pause { cause } if self.runs() => self.pause(cause),
            Request::Resume if self.phase == Phase::Paused => {
                if self.is_released() {
                    return refuse("resume", Phase::Released);
                }
                self.tell_time();
                self.start(self.gate_open)
            }
            Request::Forget if self.phase == Phase::Paused && !self.is_released() => {
                self.forget_mappings()?;
                self.generation = 0;
                self.phase = Phase::Shell;
                Ok(Reply::Done)
            }
            Request::Release if matches!(self.phase, Phase::Paused | Phase::Released) => {
                self.control.write(control_page::RELEASED, &[1]);
                self.phase = Phase::Released;
                Ok(Reply::Done)
            }
            Request::Heartbeat { on } => {
                let round =
                    u32::from_le_bytes(self.read_word(std::mem::offset_of!(BootPage, heartbeat_round)));
                self.write_word(std::mem::offset_of!(BootPage, heartbeat_on), &u32::from(on).to_le_bytes());
                let next = round.wrapping_add(1).to_le_bytes();
                self.write_word(std::mem::offset_of!(BootPage, heartbeat_round), &next);
                self.news = true;
                Ok(Reply::Done)
            }
            Request::Status => {
                Ok(Reply::Status { phase: self.phase, net: self.net.counters, doors: self.doors })
            }
            Request::Run { .. } => refuse("run", self.phase),
            Request::OpenGate => refuse("open the gate", self.phase),
            Request::LetOut(_) => refuse("let output out", self.phase),
            Request::Pause { .. } => refuse("pause", self.phase),
            Request::Resume => refuse("resume", self.phase),
            Request::Release => refuse("release", self.phase),
            Request::Forget => refuse("forget", self.phase),
            Request::Setup(_) => refuse("set up again", self.phase),
            Request::Hello { .. } | Request::Label(_) | Request::End => refuse("do that", self.phase),
        }
    }

    fn is_released(&self) -> bool {
        self.control_says(control_page::RELEASED)
    }

    fn control_says(&self, at: usize) -> bool {
        let mut byte = [0];
        self.control.read(at, &mut byte);
        byte[0] != 0
    }

    /// Whether the guest may have waited for a page since this was last asked.
    fn may_wait_for_page(&mut self) -> bool {
        let is_short = self.control_says(control_page::MISSING);
        std::mem::replace(&mut self.was_short, is_short) || is_short
    }

    fn start(&mut self, gate_open: bool) -> Result<Reply, String> {
        if self.is_released() {
            return Err("this machine is released and never runs again".into());
        }
        self.phase = Phase::Running { gate_open };
        self.block.go();
        let at = host_now();
        (self.stopped_at, self.knocked_at) = (at, at);
        Ok(Reply::Started { at, gate_open })
    }

    fn harvest(&mut self) -> Result<kage_machine::PageSet, String> {
        self.tracker.harvest(&self.vcpu.vm, &self.memory).map_err(|error| format!("harvest: {error}"))
    }

    fn pause(&mut self, cause: PauseCause) -> Result<Reply, String> {
        let paused = self.stop(cause);
        if paused.is_err() {
            self.block.go();
        }
        paused
    }

    fn stop(&mut self, cause: PauseCause) -> Result<Reply, String> {
        let at = self.stopped_at;
        let gate_open = self.phase == (Phase::Running { gate_open: true });
        if gate_open {
            self.net.send(&self.memory);
        }
        if self.exit_pending {
            self.vcpu.complete_exit().map_err(|error| error.to_string())?;
            self.exit_pending = false;
        }
        let vcpu = self.vcpu.save().map_err(|error| error.to_string())?;
        match cause {
            PauseCause::Switch | PauseCause::Hold => {
                self.set_alarm(Duration::ZERO);
                self.net.give_back_held();
            }
            // It runs on at once, with its alarm, and what is held is delivered here.
            PauseCause::Checkpoint => {}
        }
        let tracker = &mut self.tracker;
        let unsettled = self.block.halt(&self.memory, |block| tracker.note_disk(block));
        let state = SavedState {
            version: STATE_VERSION,
            cpu_baseline: cpu::BASELINE_V3,
            vcpu,
            devices: vec![
                self.net.transport.save(0),
                self.block.save(&self.memory, unsettled),
                self.entropy.transport.save(0),
            ],
            clock: self.clock.save(at, self.generation),
        };
        let dirty = self.harvest()?;
        (self.phase, self.gate_open) = (Phase::Paused, gate_open);
        let output = self.net.queued(&self.memory);
        Ok(Reply::Paused { state: state.encode(), dirty, at, output })
    }

    /// Empties the windows' page tables.
    fn forget_mappings(&mut self) -> Result<(), String> {
        if self.tables.is_empty() {
            return Ok(());
        }
        self.vcpu.replace_tables(&mut self.tables, |_| ()).map_err(|error| error.to_string())
    }

    fn restore(&mut self, state: &SavedState, paused_at: HostInstant, moved: bool) -> Result<(), String> {
        if state.cpu_baseline != cpu::BASELINE_V3 {
            return Err(format!("the image wants CPU baseline v{}, this build gives v3", state.cpu_baseline));
        }
        let [net, block, entropy] = state.devices.as_slice() else {
            return Err("the state has not three devices".into());
        };
        let misfit = |error: Misfit| error.to_string();
        self.net.transport.restore(net, &self.memory).map_err(misfit)?;
        self.block.restore(block, &self.memory).map_err(misfit)?;
        self.entropy.transport.restore(entropy, &self.memory).map_err(misfit)?;
        self.vcpu.restore(&state.vcpu).map_err(|error| error.to_string())?;
        // Nothing of a machine that was here before, or of a restore that failed half way.
        self.forget_mappings()?;
        match self.tables.map_all(&self.memory) {
            Err(MapError::NoTable) => {
                // Paused between asking for more than there are tables for and hearing so: all but that fits.
                self.forget_mappings()?;
                self.tables.map_all_but_requested(&self.memory)
            }
            mapped => mapped,
        }
        .map_err(|error| error.to_string())?;
        self.clock = GuestClock::resume(state.clock, paused_at);
        self.generation = state.clock.generation;
        if moved {
            let field = std::mem::offset_of!(BootPage, moves);
            let moves = u32::from_le_bytes(self.read_word(field)).wrapping_add(1);
            self.write_word(field, &moves.to_le_bytes());
        }
        Ok(())
    }
}

fn device_slot(address: u64) -> Option<usize> {
    let slot = address.checked_sub(abi::MMIO)? / abi::PAGE;
    (slot < abi::device::COUNT as u64).then_some(slot as usize)
}

fn is_retry(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn ppoll_for(polled: &mut [PollFd<'_>], left: Option<Duration>) -> io::Result<usize> {
    let timeout =
        left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
    Ok(poll(polled, timeout.as_ref())?)
}

#[expect(unsafe_code, reason = "takes over the descriptor its parent left")]
fn take_descriptor(number: i32) -> Result<OwnedFd, String> {
    if number < 3 {
        return Err(format!(
            "descriptor {number} is no control socket; `kage vmm` is started by `kage host`"
        ));
    }
    // SAFETY: the parent left this descriptor for this process alone; a closed one is only reported below.
    let owned = unsafe { OwnedFd::from_raw_fd(number) };
    match rustix::io::fcntl_getfd(&owned) {
        Ok(_) => Ok(owned),
        Err(error) => {
            std::mem::forget(owned);
            Err(format!("descriptor {number}: {error}"))
        }
    }
}

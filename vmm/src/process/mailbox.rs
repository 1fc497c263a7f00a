//! What passes through a machine's boot page: words of either side, and what the guest asks for at its door.

use kage_abi::{self as abi, BootPage, Config, offset};
use kage_machine::control::Identity;
use vm_memory::{Bytes, GuestAddress};

use super::{Machine, host_now, wall_now};
use crate::{tables::MapError, upcall};

impl Machine {
    /// Maps frames in windows as the guest asks; with `anew`, drops all that is mapped first.
    pub(super) fn map(&mut self, anew: bool) -> Result<(), String> {
        let memory = &self.memory;
        let mapped = if anew {
            let filled = self.vcpu.replace_tables(&mut self.tables, |tables| tables.map_all(memory));
            filled.map_err(|error| error.to_string())?
        } else {
            self.tables.map_requested(memory)
        };
        let status = match mapped {
            Ok(()) => abi::map_status::DONE,
            Err(MapError::NoTable) => abi::map_status::NO_TABLE,
            Err(error) => return Err(error.to_string()),
        };
        self.write_word(std::mem::offset_of!(BootPage, map_status), &status.to_le_bytes());
        Ok(())
    }

    /// Takes a fault of process code to the guest's kernel; one of the kernel itself ends the machine.
    pub(super) fn fault(&mut self) -> Result<(), String> {
        let Some(to) = upcall::fault(&self.memory) else {
            let failed = abi::status::FAILED.to_le_bytes();
            self.write_word(std::mem::offset_of!(BootPage, guest_status), &failed);
            return Err(self.guest_failure().unwrap_or_default());
        };
        self.exit_pending = false;
        self.vcpu.leave_fault(to).map_err(|error| error.to_string())
    }

    fn boot_page(&self) -> GuestAddress {
        GuestAddress(abi::MEMORY + offset::BOOT)
    }

    pub(super) fn read_word<const N: usize>(&self, field: usize) -> [u8; N] {
        let mut bytes = [0; N];
        // The boot page lies in memory by construction; a failed read leaves zeros.
        let _ = self.memory.read_slice(&mut bytes, GuestAddress(self.boot_page().0 + field as u64));
        bytes
    }

    pub(super) fn write_word(&self, field: usize, bytes: &[u8]) {
        let _ = self.memory.write_slice(bytes, GuestAddress(self.boot_page().0 + field as u64));
    }

    pub(super) fn write_indices(&self, field: usize, index: u64) {
        let at = GuestAddress(abi::MEMORY + offset::RESOURCES + field as u64);
        // The record lies in memory by construction.
        let _ = self.memory.write_slice(&index.to_le_bytes(), at);
    }

    pub(super) fn deadline(&self) -> u64 {
        u64::from_le_bytes(self.read_word(std::mem::offset_of!(BootPage, deadline_ns)))
    }

    /// The guest's own report of its end.
    pub(super) fn guest_failure(&self) -> Option<String> {
        let status = u32::from_le_bytes(self.read_word(std::mem::offset_of!(BootPage, guest_status)));
        (status == abi::status::FAILED).then(|| "the guest stopped on a fault or panic".to_owned())
    }

    /// Tells the guest that it is to sync, and the disk's worker that it has.
    pub(super) fn relay_syncs(&mut self) {
        if let Some(requests) = self.block.take_syncs() {
            let field = std::mem::offset_of!(BootPage, sync_wanted);
            let number = u32::from_le_bytes(self.read_word(field)).wrapping_add(1);
            self.write_word(field, &number.to_le_bytes());
            let (wanted, waiting) = self.syncing.get_or_insert_default();
            *wanted = number;
            waiting.extend(requests);
            self.news = true;
        }
        let Some((number, _)) = &self.syncing else { return };
        let done = u32::from_le_bytes(self.read_word(std::mem::offset_of!(BootPage, sync_done)));
        if done.wrapping_sub(*number).cast_signed() < 0 {
            return;
        }
        let status = u32::from_le_bytes(self.read_word(std::mem::offset_of!(BootPage, sync_status)));
        let result = match status {
            abi::sync_status::DONE => Ok(()),
            _ => Err("its files are not safe on the disk; `kage logs` says why".to_owned()),
        };
        if let Some((_, requests)) = self.syncing.take() {
            self.block.synced(requests, &result);
        }
    }

    /// Writes the door's answer.
    pub(super) fn tell_time(&mut self) {
        let reading = self.clock.read(host_now(), wall_now());
        let mut both = [0; 16];
        both[..8].copy_from_slice(&reading.monotonic_ns.to_le_bytes());
        both[8..].copy_from_slice(&reading.wall_ns.to_le_bytes());
        self.write_word(std::mem::offset_of!(BootPage, now_ns), &both);
        // What an alarm since the last exit was for has just been done.
        self.vcpu.fd.set_kvm_immediate_exit(0);
        self.write_word(std::mem::offset_of!(BootPage, late), &0_u32.to_le_bytes());
        self.news = false;
    }

    pub(super) fn write_config(&mut self, identity: &Identity) -> Result<(), String> {
        let (user, keys) = (identity.user.as_bytes(), identity.authorized_keys.as_bytes());
        if user.len() > abi::USER_MAX || keys.len() > abi::AUTHORIZED_KEYS_MAX {
            return Err(format!(
                "user name over {} or keys over {} bytes",
                abi::USER_MAX,
                abi::AUTHORIZED_KEYS_MAX
            ));
        }
        let mut bytes = vec![0; size_of::<Config>()];
        let mut put = |at: usize, what: &[u8]| bytes[at..at + what.len()].copy_from_slice(what);
        put(std::mem::offset_of!(Config, address), &identity.address);
        put(std::mem::offset_of!(Config, prefix_length), &[identity.prefix_length]);
        put(std::mem::offset_of!(Config, mtu), &identity.mtu.to_le_bytes());
        put(std::mem::offset_of!(Config, user_length), &(user.len() as u16).to_le_bytes());
        put(std::mem::offset_of!(Config, authorized_keys_length), &(keys.len() as u16).to_le_bytes());
        put(std::mem::offset_of!(Config, user), user);
        put(std::mem::offset_of!(Config, host_key_seed), &identity.host_key_seed);
        put(std::mem::offset_of!(Config, authorized_keys), keys);
        put(std::mem::offset_of!(Config, ipv4), &identity.ipv4.unwrap_or_default());
        self.memory
            .write_slice(&bytes, GuestAddress(abi::MEMORY + offset::CONFIG))
            .map_err(|error| format!("config: {error}"))?;
        let field = std::mem::offset_of!(BootPage, config_version);
        let version = u32::from_le_bytes(self.read_word(field)).wrapping_add(1);
        self.write_word(field, &version.to_le_bytes());
        Ok(())
    }
}

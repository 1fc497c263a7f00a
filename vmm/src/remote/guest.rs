//! What the guest has left in its memory for its host to see.

use kage_abi::{self as abi, BootPage, FaultRecord, LogRing, offset};
use kage_images::Symbols;

use super::RemoteMachine;

impl RemoteMachine {
    fn word<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some(pages) = &self.pages {
            pages.read_bytes(at as usize, &mut bytes);
        }
        bytes
    }

    /// What the guest says it is doing: one of `kage_abi::status`.
    #[must_use]
    pub fn guest_status(&self) -> u32 {
        u32::from_le_bytes(self.word(offset::BOOT + std::mem::offset_of!(BootPage, guest_status) as u64))
    }

    /// Figures of the heartbeat: (beats, longest gap, stall).
    #[must_use]
    pub fn heartbeat(&self) -> (u64, std::time::Duration, std::time::Duration) {
        let base = offset::BOOT + std::mem::offset_of!(BootPage, heartbeat) as u64;
        let at = |field: usize| u64::from_le_bytes(self.word(base + field as u64));
        use kage_abi::Heartbeat;
        (
            at(std::mem::offset_of!(Heartbeat, beats)),
            std::time::Duration::from_nanos(at(std::mem::offset_of!(Heartbeat, longest_ns))),
            std::time::Duration::from_nanos(at(std::mem::offset_of!(Heartbeat, stall_ns))),
        )
    }

    /// The last part of the guest's log, and its fault with a backtrace when it has one.
    #[must_use]
    pub fn logs(&self, symbols: &Symbols) -> String {
        let written = u64::from_le_bytes(self.word(offset::LOG));
        let size = abi::LOG_BYTES as u64;
        let mut ring = vec![0; abi::LOG_BYTES];
        if let Some(pages) = &self.pages {
            pages.read_bytes(offset::LOG as usize + std::mem::offset_of!(LogRing, text), &mut ring);
        }
        let kept = written.min(size);
        let text: Vec<u8> = (written - kept..written).map(|at| ring[(at % size) as usize]).collect();
        let mut text = String::from_utf8_lossy(&text).into_owned();
        if self.guest_status() == abi::status::FAILED {
            text.push_str(&self.fault(symbols));
        }
        if let Some(reason) = self.failure() {
            text.push_str(&format!("machine ended: {reason}\n"));
        }
        text
    }

    /// The fault record in words, with the return addresses of the frame-pointer chain.
    fn fault(&self, symbols: &Symbols) -> String {
        let at = |field: usize| u64::from_le_bytes(self.word(offset::FAULT + field as u64));
        let vector = at(std::mem::offset_of!(FaultRecord, vector));
        let rip = at(std::mem::offset_of!(FaultRecord, rip));
        let mut text = if vector == abi::VECTOR_PANIC {
            let length =
                at(std::mem::offset_of!(FaultRecord, message_length)).min(abi::PANIC_MESSAGE_MAX as u64);
            let mut message = vec![0; length as usize];
            if let Some(pages) = &self.pages {
                let from = offset::FAULT as usize + std::mem::offset_of!(FaultRecord, message);
                pages.read_bytes(from, &mut message);
            }
            format!("guest panic: {}\n", String::from_utf8_lossy(&message))
        } else {
            format!(
                "guest fault: vector {vector} error {:#x} at {rip:#x} touching {:#x}\n",
                at(std::mem::offset_of!(FaultRecord, error_code)),
                at(std::mem::offset_of!(FaultRecord, address)),
            )
        };
        let mut frame = at(std::mem::offset_of!(FaultRecord, rbp));
        let mut address = rip;
        for depth in 0..32 {
            text.push_str(&format!("  #{depth:<2} {}\n", symbols.name(address)));
            let (low, high) = (abi::MEMORY + offset::STACK, abi::MEMORY + offset::STACK_TOP);
            if !(low..high - 16).contains(&frame) || !frame.is_multiple_of(8) {
                break;
            }
            address = u64::from_le_bytes(self.word(frame + 8 - abi::MEMORY));
            let next = u64::from_le_bytes(self.word(frame - abi::MEMORY));
            if next <= frame {
                break;
            }
            frame = next;
        }
        text
    }
}

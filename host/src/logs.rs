//! The guest's log, read from the memory it shares with its daemon.

use kage_machine::{Memory, PAGE_SIZE, PageBytes, PageIndex, UserName};

use crate::{
    api::{error::ErrorBody, types::LogView},
    lifecycle::Daemon,
};

/// Bytes of the ring's header: the count of bytes ever written, then padding.
const HEADER: usize = 64;

/// Reads the ring at its place in memory: bytes ever written and the text kept.
fn ring(memory: &dyn Memory) -> (u64, Vec<u8>) {
    let first = (kage_abi::offset::LOG / PAGE_SIZE as u64) as u32;
    let pages = (HEADER + kage_abi::LOG_BYTES).div_ceil(PAGE_SIZE) as u32;
    let mut bytes = Vec::with_capacity(pages as usize * PAGE_SIZE);
    let mut page: PageBytes = [0; PAGE_SIZE];
    for index in first..first + pages {
        memory.read(PageIndex(index), &mut page);
        bytes.extend_from_slice(&page);
    }
    let text = bytes.split_off(HEADER);
    let written = bytes.first_chunk::<8>().map_or(0, |count| u64::from_le_bytes(*count));
    (written, text)
}

/// What of the log lies after byte `after`. The count is the guest's: whatever it says, what is read stays in the ring.
fn since(memory: &dyn Memory, after: u64) -> LogView {
    let (written, text) = ring(memory);
    let kept = kage_abi::LOG_BYTES as u64;
    let oldest = written.saturating_sub(kept);
    // A machine started anew writes a new log: a reader of the old one begins again.
    let after = if after > written { 0 } else { after };
    let from = after.max(oldest);
    let bytes: Vec<u8> =
        (from..written).map(|at| text.get((at % kept) as usize).copied().unwrap_or(b'?')).collect();
    LogView { text: String::from_utf8_lossy(&bytes).into_owned(), next: written, truncated: after < oldest }
}

impl Daemon {
    /// The log of a machine on this host.
    ///
    /// # Errors
    /// When there is none.
    pub fn logs(&self, user: &UserName, after: u64) -> Result<LogView, ErrorBody> {
        let image = self.image(user);
        let status = image.status();
        let Some(memory) = status.memory else {
            let note = status.note.map_or_else(String::new, |note| format!(" ({note})"));
            return Err(ErrorBody::new(
                crate::api::error::Code::NotFound,
                format!(
                    "{user}'s machine is not running{note}, so it has no log; `kage start {user}` starts it"
                ),
            ));
        };
        let mut view = since(&*memory, after);
        // A guest that failed says more than its ring: the fault with a backtrace.
        if status.state == crate::api::types::State::Failed
            && after < view.next.max(1)
            && let Ok(slot) = image.slot.try_lock()
            && let Some(machine) = &slot.machine
        {
            view.text = machine.logs();
        }
        Ok(view)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Mutex};

    use kage_machine::{Geometry, PageSet};

    use super::*;

    struct Guest(Mutex<BTreeMap<u32, PageBytes>>);

    impl Memory for Guest {
        fn geometry(&self) -> Geometry {
            Geometry { memory_pages: 4096, disk_pages: 0 }
        }
        fn read(&self, page: PageIndex, into: &mut PageBytes) {
            *into = self.0.lock().unwrap().get(&page.0).copied().unwrap_or([0; PAGE_SIZE]);
        }
        fn write(&self, page: PageIndex, bytes: &PageBytes) {
            self.0.lock().unwrap().insert(page.0, *bytes);
        }
        fn zero(&self, _: PageIndex) {}
        fn populated(&self) -> PageSet {
            PageSet::empty(4096)
        }
    }

    /// A guest that wrote `text` and says that it wrote `written` bytes.
    fn guest(written: u64, text: &[u8]) -> Guest {
        let guest = Guest(Mutex::default());
        let mut ring = vec![0; HEADER + kage_abi::LOG_BYTES];
        ring[..8].copy_from_slice(&written.to_le_bytes());
        for (at, byte) in text.iter().enumerate() {
            let index = (written as usize - text.len() + at) % kage_abi::LOG_BYTES;
            ring[HEADER + index] = *byte;
        }
        let first = (kage_abi::offset::LOG / PAGE_SIZE as u64) as u32;
        for (index, chunk) in ring.chunks(PAGE_SIZE).enumerate() {
            let mut page = [0; PAGE_SIZE];
            page[..chunk.len()].copy_from_slice(chunk);
            guest.write(PageIndex(first + index as u32), &page);
        }
        guest
    }

    #[test]
    fn a_reader_goes_on_where_it_stopped() {
        let guest = guest(12, b"hello\nworld\n");
        let view = since(&guest, 0);
        assert_eq!((view.text.as_str(), view.next, view.truncated), ("hello\nworld\n", 12, false));
        assert_eq!(since(&guest, 6).text, "world\n");
        assert_eq!(since(&guest, 12).text, "");
        assert_eq!(since(&guest, 99).text, "hello\nworld\n");
    }

    #[test]
    fn a_wrapped_ring_keeps_its_end_and_says_so() {
        let written = 3 * kage_abi::LOG_BYTES as u64 + 5;
        let view = since(&guest(written, b"end"), written - 3);
        assert_eq!((view.text.as_str(), view.truncated), ("end", false));
        let view = since(&guest(written, b"end"), 1);
        assert!(view.truncated && view.text.len() == kage_abi::LOG_BYTES && view.text.ends_with("end"));
    }

    #[test]
    fn a_count_that_cannot_be_is_harmless() {
        let view = since(&guest(u64::MAX, b"x"), u64::MAX - 1);
        assert_eq!(view.text, "x");
    }
}

//! Resources of machines: the indices their VIDs may have.

use std::{mem::offset_of, sync::Arc, time::Duration};

use kage_abi::resources::Resources;
use kage_directory::Versioned;
use kage_machine::{Memory, PAGE_SIZE, PageBytes, PageIndex};

use crate::{
    api::{error::ErrorBody, types::State},
    lifecycle::{Daemon, Image, blocking},
};

/// How often machines are looked at for indices running short: one word of shared memory each. Half a lease lasts
/// longer than this at 250,000 new resources a second.
const LOOK: Duration = Duration::from_secs(2);

/// The index a machine gives out next: the guest's word.
#[must_use]
pub fn next_index(memory: &dyn Memory) -> u64 {
    let mut page: PageBytes = [0; PAGE_SIZE];
    memory.read(PageIndex((kage_abi::offset::RESOURCES / PAGE_SIZE as u64) as u32), &mut page);
    let field = offset_of!(Resources, next_index);
    page.get(field..field + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

impl Daemon {
    /// Sets more indices aside for machines that run short of them, for ever.
    pub async fn keep_indices(self: Arc<Self>) {
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            for image in self.local() {
                let status = image.status();
                let Some(memory) = status.memory.filter(|_| status.state == State::Running) else { continue };
                let next = next_index(&*memory);
                if next < status.index_limit {
                    continue;
                }
                let (daemon, holder) = (self.clone(), image.clone());
                if let Err(error) = blocking(move || daemon.extend_indices(&holder, next)).await {
                    tracing::warn!(user = %image.user, %error, "no more indices were set aside");
                }
            }
        }
    }

    /// Sets indices aside in the directory, then lets the machine have them. While somebody else is at work on the
    /// image nothing is done: the next look comes soon.
    fn extend_indices(&self, image: &Image, next: u64) -> Result<(), ErrorBody> {
        let Ok(mut slot) = image.slot.try_lock() else { return Ok(()) };
        let Some(machine) = &mut slot.machine else { return Ok(()) };
        let Versioned { revision, mut record } = self.existing(&image.user)?;
        if record.owner != self.me || record.intent.is_some() {
            return Ok(());
        }
        if record.extend_indices(next) {
            self.swap(&image.user, revision, &record)?;
        }
        machine.raise_indices(record.indices.end)?;
        let comfort = record.comfortable_below();
        image.update(|status| status.index_limit = comfort);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use kage_machine::{Geometry, PageSet};

    use super::*;

    struct Guest(Mutex<PageBytes>);

    impl Memory for Guest {
        fn geometry(&self) -> Geometry {
            Geometry { memory_pages: 1024, disk_pages: 0 }
        }
        fn read(&self, page: PageIndex, into: &mut PageBytes) {
            into.fill(0);
            if u64::from(page.0) * PAGE_SIZE as u64 == kage_abi::offset::RESOURCES {
                into.copy_from_slice(&*self.0.lock().unwrap());
            }
        }
        fn write(&self, _: PageIndex, _: &PageBytes) {}
        fn zero(&self, _: PageIndex) {}
        fn populated(&self) -> PageSet {
            PageSet::empty(1024)
        }
    }

    #[test]
    fn the_next_index_is_read_where_the_guest_keeps_it() {
        let mut page = [0; PAGE_SIZE];
        page[16..24].copy_from_slice(&0x1_2345_6789_u64.to_le_bytes());
        assert_eq!(next_index(&Guest(Mutex::new(page))), 0x1_2345_6789);
    }
}

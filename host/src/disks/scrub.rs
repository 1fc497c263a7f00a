//! Looking for damage in a disk before anybody needs what is damaged, and putting it right.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use kage_machine::UserName;
use serde_json::json;

use super::{BLOCKS, fetch::Why, pull::Step};
use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{Operation, ScrubReport},
    },
    lifecycle::{Daemon, Image, blocking},
    operations::Handle,
};

/// Bytes of a log that are looked at in one step.
const STEP: u64 = 8 << 20;

/// Corrupt blocks that are kept track of; the report of a disk with more says so by its counts.
const MOST: usize = 1 << 16;

/// Lost blocks that a report names.
const NAMED: usize = 1024;

/// Whose turn it is to scrub a disk, and whether the last one left off in the middle.
#[derive(Default)]
pub(super) struct Turn {
    taken: AtomicBool,
    midway: AtomicBool,
}

/// Gives the turn back.
struct Taken(Arc<Image>);

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.disk.scrub.taken.store(false, Ordering::SeqCst);
    }
}

impl Daemon {
    /// Begins to look through the disk of an image that this host owns, running or not.
    ///
    /// # Errors
    /// Unknown images, and those that are being scrubbed.
    pub async fn begin_scrub(self: &Arc<Self>, user: &UserName) -> Result<Operation, ErrorBody> {
        let (daemon, name) = (self.clone(), user.clone());
        let record = blocking(move || daemon.existing(&name)).await?.record;
        if record.profile.disk_bytes == 0 {
            return Err(ErrorBody::bad_request(format!("{user}'s machine has no disk")));
        }
        let image = self.image(user);
        if image.disk.scrub.taken.swap(true, Ordering::SeqCst) {
            return Err(ErrorBody::new(Code::Busy, format!("{user}'s disk is being scrubbed already")));
        }
        let taken = Taken(image.clone());
        let handle = self.operations.begin("scrub", user, &self.me);
        let id = handle.id();
        let daemon = self.clone();
        self.runtime.spawn(async move {
            let outcome = daemon.scrub(&image, &handle).await;
            if let Ok(report) = &outcome {
                daemon.events.emit("scrubbed", Some(&image.user), json!(report));
            }
            drop(taken);
            handle.end(outcome.map(|report| json!(report)));
        });
        self.operations.get(&id, std::time::Duration::ZERO).await
    }

    async fn scrub(self: &Arc<Self>, image: &Arc<Image>, handle: &Handle) -> Result<ScrubReport, ErrorBody> {
        let (daemon, holder) = (self.clone(), image.clone());
        let (record, disk) = blocking(move || {
            let record = daemon.existing(&holder.user)?.record;
            let disk = daemon.disk(&holder, &record)?;
            Ok((record, disk))
        })
        .await?;
        let disk = disk.ok_or_else(|| {
            let message =
                format!("nothing of {}'s disk is here, or its machine is just starting", image.user);
            ErrorBody::new(Code::Busy, message)
        })?;
        let mut report = ScrubReport::of(&image.user);
        let mut corrupt: Vec<u32> = Vec::new();
        // A scrub that was cut short goes on where it left off: its rest first, then all.
        let mut passes = if image.disk.scrub.midway.swap(true, Ordering::SeqCst) { 2 } else { 1 };
        while passes > 0 {
            if handle.control().is_cancelled() {
                return Err(ErrorBody::new(Code::Cancelled, "cancelled"));
            }
            let scrubbed = disk.clone();
            let found = blocking(move || Ok(scrubbed.scrub(STEP)?)).await.map_err(|error| {
                if self.is_gone(image, &disk) {
                    let message =
                        format!("{}'s machine was started, stopped or moved; scrub again", image.user);
                    ErrorBody::new(Code::Busy, message)
                } else {
                    error
                }
            })?;
            report.checked_bytes += found.checked_bytes;
            corrupt.extend(found.corrupt);
            corrupt.truncate(MOST);
            if found.done {
                passes -= 1;
            }
            handle
                .progress(json!({ "checked_bytes": report.checked_bytes, "corrupt_blocks": corrupt.len() }));
        }
        image.disk.scrub.midway.store(false, Ordering::SeqCst);
        corrupt.sort_unstable();
        corrupt.dedup();
        for part in corrupt.chunks(BLOCKS) {
            let fetched = match self.fetch(image, &record, &disk, part, Why::Repair).await {
                Ok(fetched) => fetched,
                Err(Step::Later(error)) => return Err(error),
                Err(_) => {
                    let message =
                        format!("{}'s machine was started, stopped or moved; scrub again", image.user);
                    return Err(ErrorBody::new(Code::Busy, message));
                }
            };
            report.corrupt_blocks += (fetched.repaired.len() + fetched.lost.len()) as u64;
            report.repaired_blocks += fetched.repaired.len() as u64;
            report.lost_blocks += fetched.lost.len() as u64;
            let room = NAMED.saturating_sub(report.lost.len());
            report.lost.extend(fetched.lost.into_iter().take(room));
        }
        if report.repaired_blocks > 0 {
            let flushed = disk.clone();
            blocking(move || Ok(flushed.flush()?)).await?;
        }
        Ok(report)
    }
}

//! From whom blocks are had: an earlier stay's log, the origin, any host that has one of the digest.

use std::sync::Arc;

use kage_directory::ImageRecord;
use kage_machine::{
    HostName, PAGE_SIZE,
    disk::{Block, Disk, Fill},
};
use serde_json::json;

use super::{
    BLOCKS, Wanted,
    peers::{Given, give},
    pull::{Step, disk_error, of_disk},
};
use crate::{
    api::error::ErrorBody,
    lifecycle::{Daemon, Image, blocking},
};

/// What blocks are fetched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// Somebody waits for them.
    Needed,
    /// They are missing.
    Ahead,
    /// They were found to be corrupt.
    Repair,
}

/// What came of blocks that were to be fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fetched {
    /// Corrupt before, and right now.
    pub repaired: Vec<u32>,
    /// Nobody has them.
    pub lost: Vec<u32>,
    /// The origin has not given some of which not even the digest is known yet.
    pub unknown: bool,
}

/// Blocks on their way.
struct Errand {
    /// Nobody has given them yet.
    open: Vec<Wanted>,
    got: Vec<(u32, Fill)>,
    /// Of those that were asked for, the ones that are held and corrupt.
    corrupt: Vec<u32>,
    /// Blocks that came from other hosts.
    pulled: usize,
}

impl Errand {
    /// What is here by now, or can be read again, answers whoever waits for it.
    fn new(disk: &dyn Disk, blocks: &[u32], why: Why) -> Self {
        let mut errand = Self { open: Vec::new(), got: Vec::new(), corrupt: Vec::new(), pulled: 0 };
        for &block in blocks.iter().take(BLOCKS) {
            match disk.block(block) {
                Block::Missing(digest) => errand.open.push(Wanted { block, digest }),
                Block::Zeros | Block::Held(_) if why == Why::Ahead => {}
                Block::Zeros => errand.got.push((block, Fill::Zeros)),
                Block::Held(digest) => {
                    let mut bytes = Box::new([0; PAGE_SIZE]);
                    match disk.read(block, &mut bytes) {
                        Block::Missing(_) => {
                            errand.open.push(Wanted { block, digest: Some(digest) });
                            errand.corrupt.push(block);
                        }
                        Block::Zeros => errand.got.push((block, Fill::Zeros)),
                        Block::Held(_) => errand.got.push((block, Fill::Bytes(bytes))),
                    }
                }
            }
        }
        errand
    }

    /// Takes in what somebody gave of what was wanted; returns how many blocks of bytes that was.
    fn take(&mut self, given: Vec<Given>, wanted: &[Wanted]) -> usize {
        let mut blocks = 0;
        for (given, wanted) in given.into_iter().zip(wanted) {
            let fill = match given {
                Given::Nothing => continue,
                Given::Bytes(bytes) => {
                    blocks += 1;
                    Fill::Bytes(bytes)
                }
                Given::Zeros => Fill::Zeros,
            };
            self.got.push((wanted.block, fill));
            self.open.retain(|open| open.block != wanted.block);
        }
        blocks
    }

    fn known(&self) -> Vec<Wanted> {
        self.open.iter().filter(|wanted| wanted.digest.is_some()).copied().collect()
    }
}

impl Daemon {
    /// Fetches blocks, at most [`BLOCKS`], and gives them to the disk. Those that nobody has are said to be lost, and
    /// whoever waits for them is told.
    pub(super) async fn fetch(
        self: &Arc<Self>,
        image: &Arc<Image>,
        record: &ImageRecord,
        disk: &Arc<dyn Disk>,
        blocks: &[u32],
        why: Why,
    ) -> Result<Fetched, Step> {
        if blocks.is_empty() {
            return Ok(Fetched::default());
        }
        let (daemon, holder, looked, record_here, asked) =
            (self.clone(), image.clone(), disk.clone(), record.clone(), blocks.to_vec());
        let begun = blocking(move || {
            let mut errand = Errand::new(&*looked, &asked, why);
            let known = errand.known();
            if let Some(aside) = Some(known).filter(|known| !known.is_empty()).and_then(|known| {
                let aside = daemon.aside(&holder, &record_here)?;
                Some((aside, known))
            }) {
                let (aside, known) = aside;
                let given = known.iter().map(|wanted| give(None, Some(&*aside), *wanted)).collect();
                errand.take(given, &known);
            }
            Ok(errand)
        });
        let mut errand = begun.await.map_err(Step::Later)?;
        let silent = self.ask_origin(image, record, &mut errand).await;
        self.ask_others(image, record, &mut errand).await;
        self.hand_over_blocks(image, disk, blocks, errand, silent, why).await
    }

    /// Asks the origin for what is open. Returns why it did not answer.
    async fn ask_origin(
        &self,
        image: &Image,
        record: &ImageRecord,
        errand: &mut Errand,
    ) -> Option<ErrorBody> {
        let origin = record.disk_origin.as_ref().filter(|origin| origin.host != self.me)?;
        let wanted = errand.open.clone();
        if wanted.is_empty() {
            return None;
        }
        match self.ask_blocks(&origin.host, &image.user, &wanted).await {
            Ok(given) => {
                errand.pulled += errand.take(given, &wanted);
                None
            }
            Err(error) => Some(error),
        }
    }

    /// Asks every other host for what is still open, by digest.
    async fn ask_others(&self, image: &Image, record: &ImageRecord, errand: &mut Errand) {
        let origin = record.disk_origin.as_ref().map(|origin| &origin.host);
        let seen = self.seen.borrow().clone();
        let others = seen.hosts.keys().filter(|host| **host != self.me && Some(*host) != origin);
        for host in others.cloned().collect::<Vec<HostName>>() {
            let wanted = errand.known();
            if wanted.is_empty() {
                return;
            }
            match self.ask_blocks(&host, &image.user, &wanted).await {
                Ok(given) => errand.pulled += errand.take(given, &wanted),
                Err(error) => tracing::debug!(%error, %host, user = %image.user, "it gives no blocks"),
            }
        }
    }

    async fn hand_over_blocks(
        self: &Arc<Self>,
        image: &Arc<Image>,
        disk: &Arc<dyn Disk>,
        asked: &[u32],
        errand: Errand,
        silent: Option<ErrorBody>,
        why: Why,
    ) -> Result<Fetched, Step> {
        let (holder, filled, asked) = (image.clone(), disk.clone(), asked.to_vec());
        let waits = silent.is_some() && why != Why::Repair;
        let result = blocking(move || {
            let Errand { open, mut got, corrupt, pulled } = errand;
            let pulls = &holder.disk.pulls;
            // Those that wait for the origin or its list stay needed; all others are answered now.
            let unlisted = why == Why::Needed && !pulls.is_listed();
            let (still, nobodys): (Vec<Wanted>, Vec<Wanted>) =
                open.iter().partition(|open| waits || (unlisted && open.digest.is_none()));
            let still: Vec<u32> = still.iter().map(|open| open.block).collect();
            pulls.settle(filled.blocks(), asked.into_iter().filter(|block| !still.contains(block)));
            let mut lost: Vec<u32> = nobodys.iter().map(|open| open.block).collect();
            // Whatever they were fetched for, somebody may have begun to wait for them meanwhile.
            got.extend(lost.iter().map(|block| (*block, Fill::Unavailable)));
            filled.fill(&got).map_err(disk_error)?;
            pulls.add_pulled(pulled);
            let mut repaired = Vec::new();
            let mut bytes = [0; PAGE_SIZE];
            for block in corrupt {
                if lost.contains(&block) || still.contains(&block) {
                    continue;
                }
                match filled.read(block, &mut bytes) {
                    Block::Missing(_) => lost.push(block),
                    Block::Zeros | Block::Held(_) => repaired.push(block),
                }
            }
            let mut needs = pulls.needs(filled.blocks());
            for (block, fill) in &got {
                if !matches!(fill, Fill::Unavailable) && !lost.contains(block) {
                    needs.find(*block);
                }
            }
            let new = needs.lose(&lost);
            drop(needs);
            Ok((Fetched { repaired, lost, unknown: !still.is_empty() }, new))
        });
        match result.await {
            Ok((fetched, new)) => {
                if !fetched.repaired.is_empty() {
                    let details = json!({ "blocks": fetched.repaired });
                    self.events.emit("disk_repaired", Some(&image.user), details);
                }
                if !new.is_empty() {
                    self.events.emit("disk_damaged", Some(&image.user), json!({ "blocks": new }));
                }
                match silent {
                    Some(error) if waits => Err(Step::Later(error)),
                    _ => Ok(fetched),
                }
            }
            Err(error) => Err(of_disk(error, self.is_gone(image, disk))),
        }
    }
}

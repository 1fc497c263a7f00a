//! What an image's owner fetches of its disk, and when.
//!
//! ```text
//! needed blocks ──▶ asked for at once, with missing neighbours behind them
//! the rest      ──▶ the list of digests, then every missing block in order, while nobody waits
//! ```
//! One task an image, as long as there is something to fetch. A question that nobody answers is asked again after a
//! pause that doubles up to [`LONGEST`], or once the directory changes, as it does when a host comes back; whoever
//! reads meanwhile waits.

use std::{
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use kage_directory::{DirectoryError, ImageRecord, Versioned};
use kage_machine::{
    MachineError, PAGE_SIZE, PageIndex, PageSet,
    disk::{Block, Disk, Fill},
};
use serde_json::json;
use tokio::sync::{Notify, watch};

use super::{BLOCKS, Held, Stay, fetch::Why, locked, peers::List};
use crate::{
    api::error::{Code, ErrorBody},
    lifecycle::{Daemon, Image, blocking},
};

/// First pause after a question that nobody answered.
const SHORTEST: Duration = Duration::from_millis(100);

/// Longest pause.
const LONGEST: Duration = Duration::from_secs(5);

/// Pause before blocks are asked for again that no host had.
const LOST: Duration = Duration::from_secs(30);

/// How long a needed block of which nothing is known waits for the list before it is asked for again.
const LIST_SOON: Duration = Duration::from_secs(1);

/// Missing neighbours that are asked for behind a needed block, at first; doubled for whoever reads on in order.
const AHEAD: u32 = 8;

/// Blocks that are looked at for one round in the background.
const ROUND: usize = 2 * BLOCKS;

/// Hints of one call to a disk.
const HINTS: usize = 4096;

/// What is under way for one disk.
pub(super) struct Pulls {
    needs: Mutex<Needs>,
    /// Whether somebody waits for a block.
    waiting: watch::Sender<bool>,
    /// Whether the digest of every missing block is known.
    listed: watch::Sender<bool>,
    /// Something that was asked for has been answered, or more is waited for.
    came: Notify,
    running: AtomicBool,
    /// Somebody asked since the last look.
    asked: AtomicBool,
    pulled: AtomicU64,
}

impl Default for Pulls {
    fn default() -> Self {
        Self {
            needs: Mutex::default(),
            waiting: watch::Sender::new(false),
            listed: watch::Sender::new(false),
            came: Notify::new(),
            running: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            pulled: AtomicU64::new(0),
        }
    }
}

/// Blocks by what is to be done about them: one bit of each map, whatever is asked for.
pub(super) struct Needs {
    wanted: PageSet,
    /// Asked for, and not answered yet.
    in_hand: PageSet,
    /// Nobody has them; not asked for again for a while.
    lost: PageSet,
    /// Said to be lost.
    told: PageSet,
    /// Where a reader in order goes on, and how far ahead it is read for.
    next: u32,
    ahead: u32,
}

impl Default for Needs {
    fn default() -> Self {
        let none = PageSet::empty(0);
        Self {
            wanted: none.clone(),
            in_hand: none.clone(),
            lost: none.clone(),
            told: none,
            next: 0,
            ahead: AHEAD,
        }
    }
}

impl Needs {
    fn fit(&mut self, blocks: u32) {
        if self.wanted.pages() != blocks {
            let none = PageSet::empty(blocks);
            (self.wanted, self.in_hand) = (none.clone(), none.clone());
            (self.lost, self.told) = (none.clone(), none);
        }
    }

    fn need(&mut self, blocks: &[u32]) {
        for block in blocks {
            self.wanted.insert(PageIndex(*block));
            self.lost.remove(PageIndex(*block));
        }
    }

    /// The blocks to ask for first, lowest first, and missing ones behind the last.
    fn first(&mut self, missing: impl Fn(u32) -> bool) -> Vec<u32> {
        let asked = |block: &PageIndex| !self.in_hand.contains(*block);
        let mut batch: Vec<u32> =
            self.wanted.iter().filter(asked).take(BLOCKS).map(|block| block.0).collect();
        let (Some(first), Some(last)) = (batch.first().copied(), batch.last().copied()) else { return batch };
        let in_order = first == self.next;
        self.ahead = if in_order { (self.ahead * 2).min(BLOCKS as u32) } else { AHEAD };
        let room = BLOCKS.saturating_sub(batch.len()).min(self.ahead as usize);
        let behind = (last.saturating_add(1)..self.wanted.pages()).take(BLOCKS);
        let behind = behind.filter(|block| missing(*block) && !self.in_hand.contains(PageIndex(*block)));
        batch.extend(behind.take(room));
        self.take_in_hand(&batch);
        self.next = batch.last().map_or(0, |last| last.saturating_add(1));
        batch
    }

    fn take_in_hand(&mut self, blocks: &[u32]) {
        for block in blocks {
            self.in_hand.insert(PageIndex(*block));
        }
    }

    /// These are answered.
    fn settle(&mut self, blocks: impl IntoIterator<Item = u32>) {
        for block in blocks {
            self.wanted.remove(PageIndex(block));
        }
    }

    /// Nobody has these; returns those of which that was not known.
    pub fn lose(&mut self, blocks: &[u32]) -> Vec<u32> {
        let mut new = Vec::new();
        for block in blocks {
            self.lost.insert(PageIndex(*block));
            if self.told.insert(PageIndex(*block)) {
                new.push(*block);
            }
        }
        new
    }

    pub fn find(&mut self, block: u32) {
        self.lost.remove(PageIndex(block));
        self.told.remove(PageIndex(block));
    }
}

impl Pulls {
    /// Somebody waits for these blocks of a disk of so many.
    pub fn need(&self, blocks: u32, needed: &[u32]) {
        let mut needs = self.needs(blocks);
        needs.need(needed);
        self.waiting.send_replace(!needs.wanted.is_empty());
        self.came.notify_one();
    }

    pub fn needs(&self, blocks: u32) -> std::sync::MutexGuard<'_, Needs> {
        let mut needs = locked(&self.needs);
        needs.fit(blocks);
        needs
    }

    fn first(&self, disk: &dyn Disk) -> Vec<u32> {
        let mut needs = self.needs(disk.blocks());
        let batch = needs.first(|block| matches!(disk.block(block), Block::Missing(_)));
        self.waiting.send_replace(!needs.wanted.is_empty());
        batch
    }

    /// Answered from here on: whoever asks again later is asked for again.
    pub fn settle(&self, blocks: u32, answered: impl IntoIterator<Item = u32>) {
        self.needs(blocks).settle(answered);
    }

    pub fn add_pulled(&self, blocks: usize) {
        self.pulled.fetch_add((blocks * PAGE_SIZE) as u64, Ordering::Relaxed);
    }

    pub fn pulled_bytes(&self) -> u64 {
        self.pulled.load(Ordering::Relaxed)
    }

    /// A stay begins of which nothing is here.
    pub fn begin(&self) {
        self.forget();
        self.pulled.store(0, Ordering::Relaxed);
    }

    /// Nobody waits any more: the machine that did has ended, and the digests that its process was told with it.
    pub fn forget(&self) {
        let _ = locked(&self.needs).wanted.take();
        self.listed.send_replace(false);
        self.waiting.send_replace(false);
    }

    /// Waits a moment for the list of digests.
    async fn listed_soon(&self) {
        let mut listed = self.listed.subscribe();
        let _ = tokio::time::timeout(LIST_SOON, listed.wait_for(|listed| *listed)).await;
    }

    pub fn is_listed(&self) -> bool {
        *self.listed.borrow()
    }

    /// The next missing blocks from `from` on that somebody may have, and where to go on.
    fn next(&self, disk: &dyn Disk, from: u32) -> (Vec<u32>, u32) {
        let passed_over = {
            let needs = self.needs(disk.blocks());
            let mut set = needs.lost.clone();
            set.union(&needs.in_hand);
            set
        };
        let (mut batch, mut next) = (Vec::new(), from);
        while next < disk.blocks() && batch.len() < ROUND {
            if matches!(disk.block(next), Block::Missing(_)) && !passed_over.contains(PageIndex(next)) {
                batch.push(next);
            }
            next += 1;
        }
        self.needs(disk.blocks()).take_in_hand(&batch);
        (batch, next)
    }

    /// These are no longer under way.
    fn answered(&self, blocks: &[u32]) {
        {
            let mut needs = locked(&self.needs);
            for block in blocks {
                needs.in_hand.remove(PageIndex(*block));
            }
        }
        self.came.notify_one();
    }

    /// Nothing is under way.
    fn start_over(&self) {
        let _ = locked(&self.needs).in_hand.take();
    }

    /// Whether everything that is missing is known to be nobody's.
    fn only_lost(&self, disk: &dyn Disk) -> bool {
        let lost = self.needs(disk.blocks()).lost.clone();
        let missing = |block: &u32| matches!(disk.block(*block), Block::Missing(_));
        (0..disk.blocks()).filter(missing).all(|block| lost.contains(PageIndex(block)))
    }
}

/// How a round of fetching ended.
pub(super) enum Step {
    /// There is nothing more to fetch, or it is not this host's to.
    Over,
    /// Nobody answers, or this host cannot for now.
    Later(ErrorBody),
    /// Some blocks nobody has.
    Lost,
    /// Another look.
    Again,
    /// Another look in a moment: the disk is just being closed, or the last blocks are on their way.
    Soon,
}

/// What a disk's failure is to whoever fetches for it: one that is gone is soon another, or nobody's.
pub(super) fn of_disk(error: ErrorBody, gone: bool) -> Step {
    match error.code {
        _ if gone => Step::Again,
        Code::Cancelled => Step::Soon,
        _ => Step::Later(error),
    }
}

/// An error of a disk; of one that is gone as something that was cancelled.
pub(super) fn disk_error(error: MachineError) -> ErrorBody {
    match error {
        MachineError::Gone(gone) => ErrorBody::new(Code::Cancelled, gone.to_string()),
        error => error.into(),
    }
}

impl Daemon {
    /// Sees to it that what an image's disk lacks here is fetched; nothing to do where that is under way.
    pub(crate) fn pull(self: &Arc<Self>, image: &Arc<Image>) {
        image.disk.pulls.asked.store(true, Ordering::SeqCst);
        if !image.disk.pulls.running.swap(true, Ordering::SeqCst) {
            self.runtime.spawn(pull_until_over(Arc::downgrade(self), image.clone()));
        }
    }

    /// Waits until the digests of all missing blocks are known: a move carries them, and a block of which nothing is
    /// known could not be told from another at its target.
    ///
    /// # Errors
    /// When they are not in time.
    pub(crate) async fn await_digests(
        self: &Arc<Self>,
        image: &Arc<Image>,
        record: &ImageRecord,
        patience: Duration,
    ) -> Result<(), ErrorBody> {
        let Some(origin) = record.disk_origin.as_ref().filter(|_| record.profile.disk_bytes > 0) else {
            return Ok(());
        };
        let holder = image.clone();
        let unknown = blocking(move || Ok(holder.disk.here().is_some_and(|disk| lacks_digests(&*disk))));
        if !unknown.await? {
            return Ok(());
        }
        self.pull(image);
        let mut listed = image.disk.pulls.listed.subscribe();
        let in_time = tokio::time::timeout(patience, listed.wait_for(|listed| *listed)).await;
        match in_time {
            Ok(Ok(_)) => Ok(()),
            _ => Err(ErrorBody::new(
                Code::Busy,
                format!(
                    "the list of what is missing of {}'s disk has not come from host {} yet; try again when that is up",
                    image.user, origin.host
                ),
            )),
        }
    }

    async fn pull_step(self: &Arc<Self>, image: &Arc<Image>) -> Step {
        image.disk.pulls.start_over();
        let (daemon, holder) = (self.clone(), image.clone());
        let scene = blocking(move || {
            let Some(found) = daemon.record(&holder.user)? else { return Ok(None) };
            let is_mine = found.record.owner == daemon.me;
            if !is_mine && !holder.disk.is_lent() {
                return Ok(None);
            }
            let disk = daemon.disk(&holder, &found.record)?;
            Ok(disk.map(|disk| (found.record, disk, is_mine)))
        });
        let (record, disk, is_mine) = match scene.await {
            Ok(Some(scene)) => scene,
            Ok(None) => return Step::Over,
            Err(error) => return Step::Later(error),
        };
        let needed = self.pull_needed(image, &record, &disk);
        if record.disk_origin.is_none() || !is_mine {
            let mut waiting = image.disk.pulls.waiting.subscribe();
            return tokio::select! {
                step = needed => step,
                _ = async { let _ = waiting.wait_for(|waiting| !waiting).await; } => Step::Over,
            };
        }
        tokio::select! {
            step = needed => step,
            step = self.pull_rest(image, &record, &disk) => step,
        }
    }

    /// Fetches what is waited for, for ever.
    async fn pull_needed(
        self: &Arc<Self>,
        image: &Arc<Image>,
        record: &ImageRecord,
        disk: &Arc<dyn Disk>,
    ) -> Step {
        let mut waiting = image.disk.pulls.waiting.subscribe();
        loop {
            if waiting.wait_for(|waiting| *waiting).await.is_err() {
                return Step::Over;
            }
            let (holder, looked) = (image.clone(), disk.clone());
            let batch = match blocking(move || Ok(holder.disk.pulls.first(&*looked))).await {
                Ok(batch) if batch.is_empty() => {
                    // All of it is on its way already. What was answered before anybody looked counts, too.
                    if *waiting.borrow_and_update() {
                        image.disk.pulls.came.notified().await;
                    }
                    continue;
                }
                Ok(batch) => batch,
                Err(error) => return Step::Later(error),
            };
            let fetched = self.fetch(image, record, disk, &batch, Why::Needed).await;
            image.disk.pulls.answered(&batch);
            match fetched {
                Ok(fetched) if fetched.unknown => image.disk.pulls.listed_soon().await,
                Ok(_) => {}
                Err(step) => return step,
            }
        }
    }

    /// Fetches the list, then everything that is missing, whenever nobody waits.
    async fn pull_rest(
        self: &Arc<Self>,
        image: &Arc<Image>,
        record: &ImageRecord,
        disk: &Arc<dyn Disk>,
    ) -> Step {
        if let Err(step) = self.learn_digests(image, record, disk).await {
            return step;
        }
        let mut waiting = image.disk.pulls.waiting.subscribe();
        let (mut from, mut any) = (0, false);
        loop {
            if waiting.wait_for(|waiting| !waiting).await.is_err() {
                return Step::Over;
            }
            let (holder, looked) = (image.clone(), disk.clone());
            let (batch, next) = match blocking(move || Ok(holder.disk.pulls.next(&*looked, from))).await {
                Ok(found) => found,
                Err(error) => return Step::Later(error),
            };
            let (first, second) = batch.split_at(batch.len().min(BLOCKS));
            let fetch = |part| self.fetch(image, record, disk, part, Why::Ahead);
            if let (Err(step), _) | (_, Err(step)) = tokio::join!(fetch(first), fetch(second)) {
                return step;
            }
            image.disk.pulls.answered(&batch);
            any |= !batch.is_empty();
            from = next;
            if from >= disk.blocks() {
                if !any {
                    return self.settle_origin(image, record, disk).await;
                }
                // A block may have gone missing behind the reader only by being lost; one more look says.
                (from, any) = (0, false);
            }
        }
    }

    /// Learns the digest of every missing block, and which of them are zeros.
    async fn learn_digests(
        self: &Arc<Self>,
        image: &Arc<Image>,
        record: &ImageRecord,
        disk: &Arc<dyn Disk>,
    ) -> Result<(), Step> {
        let Some(origin) = &record.disk_origin else { return Ok(()) };
        let looked = disk.clone();
        let unknown = blocking(move || Ok(lacks_digests(&*looked))).await.map_err(Step::Later)?;
        if unknown && origin.host != self.me {
            let list = self.ask_list(&origin.host, &image.user, record).await.map_err(Step::Later)?;
            let told = disk.clone();
            let taken = blocking(move || tell(&*told, &list)).await;
            taken.map_err(|error| of_disk(error, self.is_gone(image, disk)))?;
        }
        if self.is_gone(image, disk) {
            return Err(Step::Again);
        }
        image.disk.pulls.listed.send_replace(true);
        Ok(())
    }

    /// Whether a disk is no longer this image's here.
    pub(super) fn is_gone(&self, image: &Image, disk: &Arc<dyn Disk>) -> bool {
        !image.disk.here().is_some_and(|here| Arc::ptr_eq(&here, disk))
    }

    /// Nothing more is to be had: writes into the record that all is here, if it is.
    async fn settle_origin(
        self: &Arc<Self>,
        image: &Arc<Image>,
        record: &ImageRecord,
        disk: &Arc<dyn Disk>,
    ) -> Step {
        // A move has the slot from its first word to its last, and swaps the record itself.
        let slot = image.slot.clone().lock_owned().await;
        let (daemon, holder, disk, since) =
            (self.clone(), image.clone(), disk.clone(), record.disk_origin.clone());
        let settled = blocking(move || {
            let _slot = slot;
            if daemon.is_gone(&holder, &disk) {
                return Ok(Step::Again);
            }
            if Held::of(&*disk).missing_bytes > 0 {
                let only_lost = holder.disk.pulls.only_lost(&*disk);
                return Ok(if only_lost { Step::Lost } else { Step::Soon });
            }
            disk.flush().map_err(disk_error)?;
            loop {
                let Versioned { revision, mut record } = daemon.existing(&holder.user)?;
                // A log of which this stay knows nothing is an earlier one's, however whole it is.
                if record.owner != daemon.me || record.disk_origin != since || daemon.is_untouched(&record) {
                    return Ok(Step::Again);
                }
                let origin = record.disk_origin.take().map(|origin| origin.host);
                match daemon.swap(&holder.user, revision, &record) {
                    Ok(_) => {
                        daemon.disk_is_whole(&holder, &record);
                        let details = json!({ "from": origin, "bytes": holder.disk.pulled_bytes() });
                        daemon.events.emit("disk_whole", Some(&holder.user), details);
                        return Ok(Step::Over);
                    }
                    Err(DirectoryError::Conflict { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        });
        settled.await.unwrap_or_else(|error| of_disk(error, false))
    }

    fn disk_is_whole(&self, image: &Image, record: &ImageRecord) {
        if let Some(old) = locked(&image.disk.aside).take() {
            old.close();
        }
        let stay = Stay { dir: &self.disks_dir(), number: record.number };
        if let Err(error) = stay.end() {
            tracing::warn!(%error, user = %image.user, "what an earlier stay left was not removed");
        }
    }
}

fn lacks_digests(disk: &dyn Disk) -> bool {
    (0..disk.blocks()).any(|block| disk.block(block) == Block::Missing(None))
}

/// Tells a disk what its origin's list says of the blocks of which it knows nothing.
fn tell(disk: &dyn Disk, list: &List) -> Result<(), ErrorBody> {
    let mut fills = Vec::new();
    for block in 0..disk.blocks() {
        if disk.block(block) == Block::Missing(None) {
            match list.block(block) {
                Block::Zeros => fills.push((block, Fill::Zeros)),
                Block::Held(digest) => fills.push((block, Fill::Expect(digest))),
                Block::Missing(_) => {}
            }
        }
        if fills.len() == HINTS {
            disk.fill(&fills).map_err(disk_error)?;
            fills.clear();
        }
    }
    disk.fill(&fills).map_err(disk_error)
}

async fn pull_until_over(daemon: Weak<Daemon>, image: Arc<Image>) {
    let mut pause = SHORTEST;
    let mut said = false;
    loop {
        let Some(strong) = daemon.upgrade() else { return };
        let mut seen = strong.seen.subscribe();
        seen.mark_unchanged();
        let before = image.disk.pulled_bytes();
        image.disk.pulls.asked.store(false, Ordering::SeqCst);
        let step = strong.pull_step(&image).await;
        if image.disk.pulled_bytes() > before {
            (pause, said) = (SHORTEST, false);
        }
        let (longest, wakes) = match &step {
            Step::Again => {
                tokio::task::yield_now().await;
                continue;
            }
            Step::Over => {
                let pulls = &image.disk.pulls;
                pulls.running.store(false, Ordering::SeqCst);
                // Whoever asked just before found it running.
                if pulls.asked.load(Ordering::SeqCst) && !pulls.running.swap(true, Ordering::SeqCst) {
                    continue;
                }
                return;
            }
            Step::Later(error) => {
                if !std::mem::replace(&mut said, true) {
                    let details = json!({ "reason": error.message });
                    strong.events.emit("disk_waits", Some(&image.user), details);
                }
                (pause, false)
            }
            Step::Soon => (SHORTEST, false),
            Step::Lost => (LOST, true),
        };
        drop(strong);
        let mut waiting = image.disk.pulls.waiting.subscribe();
        tokio::time::sleep(SHORTEST).await;
        tokio::select! {
            () = tokio::time::sleep(longest.saturating_sub(SHORTEST)) => {}
            changed = seen.changed() => if changed.is_err() { return },
            _ = waiting.wait_for(|waiting| *waiting), if wakes => {}
        }
        if let Step::Lost = step {
            // They may have come back.
            let mut needs = locked(&image.disk.pulls.needs);
            let _ = needs.lost.take();
        }
        pause = (pause * 2).min(LONGEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(blocks: u32, needed: &[u32]) -> Needs {
        let mut needs = Needs::default();
        needs.fit(blocks);
        needs.need(needed);
        needs
    }

    #[test]
    fn needed_blocks_come_first_and_missing_neighbours_behind_them() {
        let mut needs = needs(1000, &[100, 40]);
        let batch = needs.first(|block| block % 2 == 0);
        assert_eq!(batch[..2], [40, 100]);
        assert_eq!(batch[2..], [102, 104, 106, 108, 110, 112, 114, 116]);
        needs.need(&[101]);
        assert_eq!(needs.first(|block| block % 2 == 0)[..3], [101, 118, 120], "not twice at a time");
        needs.settle(batch);
        needs.settle([101]);
        assert!(needs.first(|_| true).is_empty());
    }

    #[test]
    fn whoever_reads_in_order_is_read_ahead_for_more_each_time() {
        let mut needs = needs(10_000, &[500]);
        let mut lengths = Vec::new();
        for _ in 0..5 {
            let batch = needs.first(|_| true);
            needs.settle(batch.clone());
            lengths.push(batch.len());
            needs.need(&[batch.last().unwrap() + 1]);
        }
        assert_eq!(lengths, [9, 17, 33, 64, 64]);
    }

    #[test]
    fn nothing_that_is_asked_for_makes_it_grow() {
        let mut needs = needs(100, &(0..10_000).collect::<Vec<_>>());
        assert_eq!((needs.wanted.len(), needs.first(|_| true).len()), (100, BLOCKS));
        assert_eq!(needs.lose(&[5, 5, 7000]), [5]);
        assert!(needs.lose(&[5]).is_empty(), "said once");
        needs.find(5);
        assert_eq!(needs.lose(&[5]), [5]);
    }
}

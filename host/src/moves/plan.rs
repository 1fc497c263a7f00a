//! What a move would cost: measured as far as it can be without moving anything.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::Method;
use kage_machine::{Epoch, HostName, MachineError, Memory, PAGE_SIZE, PageSet, UserName};
use kage_migrate::{
    converge::Verdict,
    estimate::{Facts, Writing, estimate},
    report::ReplicaHit,
};
use kage_replicate::codec::{Encoder, Scheme};
use kage_wire::pages::BatchWriter;
use tokio::sync::OwnedMutexGuard;

use crate::{
    api::{
        error::ErrorBody,
        types::{MigrateRequest, MovePlan},
    },
    http::Call,
    lifecycle::{Daemon, Image, Slot, blocking},
};

/// What a machine writes is watched for so long, and looked at once after a part of it.
const WATCHED: Duration = Duration::from_millis(400);
const PART: Duration = Duration::from_millis(100);

/// How long a plan waits for a machine that somebody is at work on.
const SLOT: Duration = Duration::from_secs(1);

/// How long the target may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// Pages that are encoded to see how many bytes one takes.
const SAMPLE: usize = 256;

/// Pages of a batch.
const BATCH: usize = 64;

/// What a link carries where nothing was ever sent on it: a gigabit.
const LINK: f64 = 125e6;

/// A round trip where the target did not answer.
const RTT: Duration = Duration::from_millis(1);

impl Daemon {
    /// Says what a move would do, and what of that is assumed.
    ///
    /// # Errors
    /// As the move.
    pub async fn plan_move(
        self: &Arc<Self>,
        user: &UserName,
        request: &MigrateRequest,
    ) -> Result<MovePlan, ErrorBody> {
        let to = self.target(user, request)?;
        let image = self.image(user);
        let memory = image.status().memory.ok_or_else(|| self.not_running(user))?;
        let mut assumed = Vec::new();
        let rtt = self.round_trip(&to).await;
        let reachable = rtt.is_some();
        let rtt = rtt.unwrap_or_else(|| assume(&mut assumed, "rtt_ms", RTT));
        let known = self.link_rate(&to).unwrap_or_else(|| assume(&mut assumed, "bytes_per_s", LINK));
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let cap =
            request.bandwidth.or(self.config.replicate.max_rate).map(|cap| cap.bytes_per_second() as f64);
        let bytes_per_s = cap.map_or(known, |cap| cap.min(known));
        if cap.is_some_and(|cap| cap <= known) {
            assumed.retain(|field| field != "bytes_per_s");
        }
        let slot = tokio::time::timeout(SLOT, image.slot.clone().lock_owned()).await.ok();
        let holder = image.clone();
        let sampled = memory.clone();
        let (writing, pages, bytes_per_page) = blocking(move || {
            let populated = sampled.populated();
            let pages = u64::from(populated.len());
            let writing = slot.and_then(|slot| watch(&holder, slot, sampled.geometry().pages().into()).ok());
            Ok((writing, pages, cost_of_a_page(&*sampled, &populated, bytes_per_s)))
        })
        .await?;
        let writing =
            writing.unwrap_or_else(|| assume(&mut assumed, "dirty_pages_per_s", Writing::default()));
        let mirror =
            image.mirrors.streams.views().into_iter().find(|view| view.host == to && view.note.is_none());
        let missing = mirror.as_ref().map(|mirror| mirror.missing_bytes / PAGE_SIZE as u64);
        let replica_hit = match &mirror {
            Some(mirror) if mirror.whole => ReplicaHit::Full,
            Some(_) => ReplicaHit::Partial,
            None => ReplicaHit::None,
        };
        let bytes_per_page =
            bytes_per_page.unwrap_or_else(|| assume(&mut assumed, "bytes_per_page", PAGE_SIZE as f64));
        let facts = Facts { pages: missing.unwrap_or(pages), bytes_per_page, bytes_per_s, rtt, writing };
        let found = estimate(&facts, &self.goal(request));
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Ok(MovePlan {
            user: user.clone(),
            from: self.me.clone(),
            to,
            mode: "precopy".to_owned(),
            reachable,
            pages,
            bytes_raw: pages * PAGE_SIZE as u64,
            replica_hit,
            pages_to_send: found.pages_sent,
            pages_at_switch: found.pages_at_switch,
            rounds: found.rounds,
            bytes_wire: found.bytes_wire,
            total_ms: ms(found.total),
            blackout_ms: ms(found.blackout),
            converges: found.verdict == Verdict::Switch,
            reason: match found.verdict {
                Verdict::GiveUp(why) => Some(why),
                Verdict::Round | Verdict::Switch => None,
            },
            dirty_pages_per_s: writing.pages_per_s,
            working_set_pages: writing.working_set,
            bytes_per_page,
            bytes_per_s,
            rtt_ms: ms(rtt),
            assumed,
            dry_run: true,
        })
    }

    /// How long a host takes to answer on a connection that is open: somewhat longer than the link's round trip.
    async fn round_trip(&self, host: &HostName) -> Option<Duration> {
        let address = self.address(host).ok()?;
        let call = Call::new(Method::GET, "/healthz").patience(ANSWER);
        self.peers.call(host, address, &call).await.ok()?;
        let begun = Instant::now();
        self.peers.call(host, address, &call).await.ok()?;
        Some(begun.elapsed())
    }
}

/// Notes that a figure is assumed.
fn assume<T>(assumed: &mut Vec<String>, field: &str, value: T) -> T {
    assumed.push(field.to_owned());
    value
}

/// Watches what a machine writes; blocks. Mirrors are told of every harvest, and make none meanwhile: the slot is held.
fn watch(image: &Image, mut slot: OwnedMutexGuard<Slot>, most: u64) -> Result<Writing, MachineError> {
    let mut harvest = || -> Result<PageSet, MachineError> {
        let gone = || MachineError::Gone(kage_machine::Gone { reason: "it does not run here".to_owned() });
        let pages = slot.machine.as_mut().ok_or_else(gone)?.as_machine().harvest()?;
        image.mirrors.streams.harvested(&pages);
        Ok(pages)
    };
    harvest()?;
    let begun = Instant::now();
    std::thread::sleep(PART);
    let mut pages = harvest()?;
    let (first, part) = (u64::from(pages.len()), begun.elapsed());
    std::thread::sleep(WATCHED.saturating_sub(part));
    pages.union(&harvest()?);
    Ok(Writing::measured(first, part, pages.len().into(), begun.elapsed(), most))
}

/// Bytes that a page of a machine takes on the wire of a link, by a sample from all over its memory; `None` of nothing.
fn cost_of_a_page(memory: &dyn Memory, populated: &PageSet, bytes_per_s: f64) -> Option<f64> {
    let memory_pages = memory.geometry().memory_pages;
    let pages: Vec<_> = populated.iter().take_while(|page| page.0 < memory_pages).collect();
    let every = pages.len().div_ceil(SAMPLE).max(1);
    // As a stream would choose: what takes time is for links that take more.
    let scheme = if bytes_per_s < LINK { Scheme::Zstd } else { Scheme::Lz4 };
    let (mut encoder, mut bytes, mut wire, mut count) = (Encoder::new(), [0; PAGE_SIZE], 0, 0);
    let sample: Vec<_> = pages.into_iter().step_by(every).collect();
    for batch in sample.chunks(BATCH) {
        let mut writer = BatchWriter::new(Epoch(1));
        for page in batch {
            memory.read(*page, &mut bytes);
            if bytes.iter().any(|byte| *byte != 0) {
                encoder.push(&mut writer, scheme, *page, &bytes, None);
            }
        }
        wire += encoder.finish(&mut writer, scheme).len();
        count += batch.len();
    }
    #[expect(clippy::cast_precision_loss, reason = "a mean")]
    (count > 0).then(|| wire as f64 / count as f64)
}

//! Fills memory and keeps rewriting a part of it: the load that moves are measured with.

use alloc::{format, rc::Rc, string::String, vec::Vec};
use core::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use kage_abi::content::{Content, PAGE_WORDS, fill_page, turn_page, turn_word};

use super::measure::seconds;
use crate::{
    executor,
    memory::Frames,
    shell::{Failure, Session, stdio::Stdio},
    time,
};

const USAGE: &str = "dirty W% R/s [--content mixed|zero|random] [--words 8] [--for SECONDS]";
/// Pages taken at once.
const EXTENT: usize = 64;
/// Filling a page that was never touched, and checking one, in estimated nanoseconds.
const FILL_COST: u64 = 8_000;
const CHECK_COST: u64 = 5_000;
/// Erasing one.
const ERASE_COST: u64 = 1_000;
/// Rewriting words of a page.
const TOUCH_COST: u64 = 200;
/// Shortest pause between two batches.
const BATCH: Duration = Duration::from_micros(200);
/// Rewriting that was missed, by a pause or for want of time, and is made up for.
const DEBT: u64 = 2_000;

/// What was asked for.
struct Load {
    percent: u64,
    rate: u64,
    content: Content,
    words: usize,
    limit: Option<Duration>,
}

impl Load {
    fn parse(arguments: &[String]) -> Option<Self> {
        let [percent, rate, options @ ..] = arguments else { return None };
        let percent =
            percent.strip_suffix('%').unwrap_or(percent).parse().ok().filter(|percent| *percent <= 100)?;
        let rate = rate.strip_suffix("/s").unwrap_or(rate).parse().ok().filter(|rate| *rate <= 10_000_000)?;
        let mut load = Self { percent, rate, content: Content::Mixed, words: 8, limit: None };
        for option in options.chunks(2) {
            let [name, value] = option else { return None };
            match name.as_str() {
                "--content" => load.content = Content::parse(value)?,
                "--words" => {
                    load.words = value.parse().ok().filter(|words| (1..=PAGE_WORDS).contains(words))?
                }
                "--for" => load.limit = Some(seconds(value)?),
                _ => return None,
            }
        }
        Some(load)
    }
}

/// The pages that were filled. The working set is the first of them.
struct Pages {
    extents: Vec<Frames>,
    count: usize,
}

impl Pages {
    /// Takes all memory but the reserve.
    async fn fill(content: Content) -> Self {
        let mut pages = Self { extents: Vec::new(), count: 0 };
        while let Ok(extent) = Frames::take(EXTENT) {
            pages.extents.push(extent);
            for _ in 0..EXTENT {
                let index = pages.count;
                if let Some(page) = pages.page(index) {
                    fill_page(content, index as u64, page);
                }
                pages.count += 1;
                executor::work(FILL_COST).await;
            }
        }
        pages
    }

    fn page(&mut self, index: usize) -> Option<&mut [u64; PAGE_WORDS]> {
        self.extents.get_mut(index / EXTENT)?.words_mut(index % EXTENT)
    }

    /// A checksum of the pages from `first` on, and whether they are as they were filled.
    async fn check(&mut self, first: usize, content: Content) -> (u64, bool) {
        let mut sum = 0;
        let mut whole = true;
        let mut expected = [0; PAGE_WORDS];
        for index in first..self.count {
            fill_page(content, index as u64, &mut expected);
            let Some(page) = self.page(index) else { break };
            whole &= *page == expected;
            sum = page.iter().fold(sum, |sum: u64, word| (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3));
            executor::work(CHECK_COST).await;
        }
        (sum, whole)
    }
}

impl Drop for Pages {
    /// Erases the pages before they are free, a few at a time: pages of zeros cost the next move nothing.
    fn drop(&mut self) {
        let extents = core::mem::take(&mut self.extents);
        executor::spawn("erase", async move {
            for mut extent in extents {
                for index in 0..extent.count() {
                    if let Some(page) = extent.words_mut(index) {
                        page.fill(0);
                        // What is about to be freed would not be written otherwise.
                        core::hint::black_box(page);
                    }
                    executor::work(ERASE_COST).await;
                }
            }
        });
    }
}

/// Runs until interrupted, or for the time given.
pub async fn run(session: &Rc<Session>, arguments: &[String], stdio: &Stdio) -> Result<u32, Failure> {
    let load = Load::parse(arguments).ok_or(Failure::Usage(USAGE))?;
    let mut pages = Pages::fill(load.content).await;
    let set = (pages.count as u64 * load.percent / 100) as usize;
    let text = format!("dirty: {} pages, {set} of them rewritten at {}/s\n", pages.count, load.rate);
    stdio.output.write(text.as_bytes()).await?;

    let touched = rewrite(session, &load, &mut pages, set).await;

    let untouched = pages.count - set;
    let (sum, whole) = pages.check(set, load.content).await;
    let verdict = if whole { "whole" } else { "DAMAGED" };
    let text = format!(
        "dirty: rewrote {touched} pages; {untouched} untouched pages {verdict}, checksum {sum:016x}\n"
    );
    stdio.output.write(text.as_bytes()).await?;
    Ok(u32::from(!whole))
}

/// Rewrites until it is time to stop; returns how many pages were.
async fn rewrite(session: &Session, load: &Load, pages: &mut Pages, set: usize) -> u64 {
    let started = time::now();
    let stop_at = load.limit.map(|limit| started.saturating_add(limit));
    let (mut done, mut forgiven) = (0u64, 0u64);
    let mut turn = 0u64;
    loop {
        let now = time::now();
        if stop_at.is_some_and(|at| now >= at) {
            return done;
        }
        let elapsed = u64::try_from((now - started).as_micros()).unwrap_or(u64::MAX);
        let due = (u128::from(elapsed) * u128::from(load.rate) / 1_000_000) as u64;
        let mut owed = due.saturating_sub(done + forgiven);
        forgiven += owed.saturating_sub(DEBT.max(load.rate / 100));
        owed = owed.min(DEBT.max(load.rate / 100));
        while owed > 0 && set > 0 {
            if let Some(page) = pages.page(turn_page(turn, set as u64) as usize) {
                for word in 0..load.words {
                    let (at, becomes) = turn_word(turn, word as u64);
                    page[at] = becomes;
                }
            }
            (turn, done, owed) = (turn + 1, done + 1, owed - 1);
            if executor::charge(TOUCH_COST) {
                break;
            }
        }
        let next = if owed > 0 && set > 0 {
            now
        } else {
            let micros = 1_000_000u64.checked_div(load.rate).unwrap_or(1_000_000).max(1);
            now + BATCH.max(Duration::from_micros(micros))
        };
        if interrupted(session, stop_at.map_or(next, |at| at.min(next)), owed > 0 && set > 0).await {
            return done;
        }
    }
}

/// Waits until `next`, or just for a door; true when an interrupt came.
async fn interrupted(session: &Session, next: Duration, at_once: bool) -> bool {
    let mut sleep = time::sleep_until(next);
    let mut yielding = pin!(executor::yield_now());
    poll_fn(|context| {
        if session.interrupt.poll(context).is_ready() {
            return Poll::Ready(true);
        }
        let waited =
            if at_once { yielding.as_mut().poll(context) } else { Pin::new(&mut sleep).poll(context) };
        waited.map(|()| false)
    })
    .await
}

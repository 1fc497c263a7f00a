//! Pages that a machine runs without until its daemon brings them.
//!
//! They are holes of the memory's file. The VMM process hears of nothing: a touch of a hole, its own or its guest's,
//! stops it there until [`Faults::copy`] has filled the page. The daemon's own mapping of the file has no such guard; a
//! touch of a hole there would make the page zeros for good. So [`super::Pages`] asks here before every touch.

use std::{
    ops::Range,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use kage_machine::{
    Gone, MachineError, Missing, PAGE_SIZE, PageBytes, PageIndex, PageSet, control::control_page,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use super::refused;
use crate::sys::{Mapping, faults::Faults};

/// Most ranges that are registered: each splits the process's mapping, of which a process may have 65,530.
const RANGES: usize = 1024;

/// How a VMM process's faults are heard, and where it has its memory.
pub(super) struct Heard {
    /// A duplicate of its descriptor.
    pub faults: OwnedFd,
    /// Address of the memory in the process.
    pub at: u64,
}

/// What is missing.
pub(super) struct Lack {
    faults: Faults,
    at: u64,
    /// The process.
    pid: OwnedFd,
    control: Arc<Mapping>,
    ranges: Vec<Range<u32>>,
    left: AtomicU32,
    pages: Mutex<Pages>,
}

struct Pages {
    missing: PageSet,
    /// Those that somebody read meanwhile.
    read: PageSet,
}

impl Lack {
    /// Has every touch of `missing`, all of them holes, wait.
    pub(super) fn begin(
        heard: Heard,
        pid: OwnedFd,
        control: Arc<Mapping>,
        missing: &PageSet,
    ) -> Result<Self, MachineError> {
        let lack = Self {
            faults: Faults::new(heard.faults),
            at: heard.at,
            pid,
            control,
            ranges: ranges(missing, RANGES),
            left: AtomicU32::new(missing.len()),
            pages: Mutex::new(Pages { missing: missing.clone(), read: PageSet::empty(missing.pages()) }),
        };
        for range in &lack.ranges {
            if let Err(error) = lack.faults.register(&lack.addresses(range)) {
                lack.end();
                return Err(refused(&format!("its pages cannot be missing: {error}")));
            }
        }
        if !missing.is_empty() {
            lack.control.write(control_page::MISSING, &[1]);
        }
        Ok(lack)
    }

    /// Whether the process may be waiting for a page.
    pub(super) fn is_short(&self) -> bool {
        self.left.load(Ordering::Acquire) > 0
    }

    /// Whether a page is missing.
    pub(super) fn is_missing(&self, page: PageIndex) -> bool {
        self.is_short() && self.lock().missing.contains(page)
    }

    /// Whether a page that is about to be read is missing; it then counts as written once it is here.
    pub(super) fn note_read(&self, page: PageIndex) -> bool {
        if !self.is_short() {
            return false;
        }
        let Pages { missing, read } = &mut *self.lock();
        let is_missing = missing.contains(page);
        if is_missing && read.insert(page) {
            eprintln!("kage: page {} was read while it was missing, and is to be read again", page.0);
        }
        is_missing
    }

    /// Pages that were read while they were missing and have come since.
    pub(super) fn take_late(&self) -> PageSet {
        let Pages { missing, read } = &mut *self.lock();
        let mut late = read.clone();
        late.subtract(missing);
        read.subtract(&late);
        late
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn address(&self, page: u32) -> u64 {
        self.at + u64::from(page) * PAGE_SIZE as u64
    }

    fn addresses(&self, pages: &Range<u32>) -> Range<u64> {
        self.address(pages.start)..self.address(pages.end)
    }

    /// The page of an address, and whether it is missing.
    fn place(&self, address: u64) -> (PageIndex, bool) {
        let page = address.saturating_sub(self.at) / PAGE_SIZE as u64;
        let page = PageIndex(u32::try_from(page).unwrap_or(u32::MAX));
        (page, self.is_missing(page))
    }

    /// Nothing is missing any more: the memory is as any other.
    fn end(&self) {
        for range in &self.ranges {
            // A process that is gone has nothing registered.
            let _ = self.faults.unregister(&self.addresses(range));
        }
        self.control.write(control_page::MISSING, &[0]);
    }

    fn has_ended(&self, error: &std::io::Error) -> Gone {
        Gone { reason: format!("filling its memory: {error}") }
    }
}

impl Missing for Lack {
    fn wanted(&self, until: Instant) -> Result<Option<PageIndex>, Gone> {
        loop {
            while let Some(address) = self.faults.next().map_err(|error| self.has_ended(&error))? {
                let (page, missing) = self.place(address);
                if missing {
                    return Ok(Some(page));
                }
                // A hole between missing pages, or a page that has come since. With the last one here, nobody waits.
                match self.faults.zero(self.address(page.0)) {
                    Err(error) if self.is_short() => return Err(self.has_ended(&error)),
                    Ok(_) | Err(_) => {}
                }
            }
            let mut polled =
                [PollFd::new(&self.pid, PollFlags::IN), PollFd::new(&self.faults, PollFlags::IN)];
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).ok();
            match poll(&mut polled, left.as_ref()) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.has_ended(&error.into())),
                Ok(0) => return Ok(None),
                Ok(_) if polled[0].revents().contains(PollFlags::IN) => {
                    return Err(Gone { reason: "its process has ended".into() });
                }
                Ok(_) => {}
            }
        }
    }

    fn bring(&self, page: PageIndex, bytes: &PageBytes) -> Result<bool, Gone> {
        // One at a time: whether a page is missing and whether it is in the file must be one.
        let mut pages = self.lock();
        if !pages.missing.contains(page) {
            return Ok(false);
        }
        let filled = self.faults.copy(self.address(page.0), bytes).map_err(|error| self.has_ended(&error))?;
        pages.missing.remove(page);
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.end();
        }
        Ok(filled)
    }

    fn left(&self) -> PageSet {
        self.lock().missing.clone()
    }
}

/// At most `most` ranges that cover all pages of a set, with as short gaps within them as that allows.
fn ranges(set: &PageSet, most: usize) -> Vec<Range<u32>> {
    let mut ranges: Vec<Range<u32>> = Vec::new();
    for page in set.iter() {
        match ranges.last_mut() {
            Some(last) if last.end == page.0 => last.end += 1,
            _ => ranges.push(page.0..page.0 + 1),
        }
    }
    let mut gap = 1;
    while ranges.len() > most.max(1) {
        ranges = ranges.into_iter().fold(Vec::new(), |mut joined: Vec<Range<u32>>, range| {
            match joined.last_mut() {
                Some(last) if range.start - last.end <= gap => last.end = range.end,
                _ => joined.push(range),
            }
            joined
        });
        gap = gap.saturating_mul(2);
    }
    ranges
}

/// What is to be missing, when it can be.
pub(super) fn check(pages: &PageSet, memory_pages: u32) -> Result<(), MachineError> {
    if pages.iter().any(|page| page.0 >= memory_pages) {
        return Err(refused("only pages of memory can be missing"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(pages: &[u32]) -> PageSet {
        let mut set = PageSet::empty(200);
        pages.iter().for_each(|&page| assert!(set.insert(PageIndex(page))));
        set
    }

    #[test]
    fn ranges_join_over_the_shortest_gaps_first() {
        let pages = set(&[0, 1, 2, 5, 9, 10, 100]);
        assert_eq!(ranges(&pages, 9), [0..3, 5..6, 9..11, 100..101]);
        assert_eq!(ranges(&pages, 3), [0..6, 9..11, 100..101]);
        assert_eq!(ranges(&pages, 2), [0..11, 100..101]);
        assert_eq!(ranges(&pages, 1), [0..101]);
        assert!(ranges(&set(&[]), 1).is_empty());
    }

    proptest! {
        #[test]
        fn ranges_cover_all_and_lie_apart(pages in proptest::collection::btree_set(0u32..200, 0..60), most in 1usize..20) {
            let pages: Vec<u32> = pages.into_iter().collect();
            let ranges = ranges(&set(&pages), most);
            prop_assert!(ranges.len() <= most);
            prop_assert!(pages.iter().all(|page| ranges.iter().any(|range| range.contains(page))));
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            let ends = |page: &u32| pages.contains(page);
            prop_assert!(ranges.iter().all(|range| ends(&range.start) && ends(&(range.end - 1))));
        }
    }
}

//! Pages that a simulated machine runs without until they are brought.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use super::{Outside, Shared, SimSpec, State, TICK, lock, refused};
use crate::{Gone, MachineError, Missing, PageBytes, PageIndex, PageSet, control::Phase};

/// What a machine lacks.
pub(super) struct Lack {
    /// The pages.
    pub pages: PageSet,
    /// Those of them that somebody read.
    read: PageSet,
    /// The one that the guest waits for, and whether that was told.
    waits_for: Option<(PageIndex, bool)>,
    /// Generation and sequence of the state restored, which page 0 must have.
    pub place: Option<(u64, u64)>,
}

impl Lack {
    pub(super) fn none(pages: u32) -> Self {
        let none = PageSet::empty(pages);
        Self { pages: none.clone(), read: none, waits_for: None, place: None }
    }

    /// Whether the guest waits for a page.
    pub(super) const fn waits(&self) -> bool {
        self.waits_for.is_some()
    }

    pub(super) fn wait_for(&mut self, page: PageIndex) {
        self.waits_for = Some((page, false));
    }

    /// Notes that a page is read; says whether it is missing.
    pub(super) fn read(&mut self, page: PageIndex) -> bool {
        let missing = self.pages.contains(page);
        if missing {
            self.read.insert(page);
        }
        missing
    }
}

impl State {
    /// Takes pages away.
    pub(super) fn miss(&mut self, spec: &SimSpec, pages: &PageSet) -> Result<(), MachineError> {
        if pages.iter().any(|page| page.0 >= spec.geometry.memory_pages) {
            return refused("only pages of memory can be missing");
        }
        if !self.lack.pages.is_empty() {
            return refused("pages of it are missing already");
        }
        self.lack.pages.union(pages);
        for page in pages.iter() {
            if let Some(bytes) = self.pages.get_mut(page.0 as usize) {
                bytes.fill(0);
            }
        }
        Ok(())
    }

    /// The first missing page that the guest's next step touches.
    pub(super) fn first_lacking(&self, spec: &SimSpec) -> Option<PageIndex> {
        let lacks = |page: &PageIndex| self.lack.pages.contains(*page);
        let mut guest = self.guest();
        let written = (0..spec.writes_per_tick).map(|_| PageIndex(guest.next_page(spec) as u32));
        Some(PageIndex(0)).filter(lacks).or_else(|| written.into_iter().find(lacks))
    }

    /// Generation and sequence: what page 0 says, once it is here.
    pub(super) fn place(&self) -> (u64, u64) {
        let guest = self.guest();
        self.lack
            .place
            .filter(|_| self.lack.pages.contains(PageIndex(0)))
            .unwrap_or((guest.generation, guest.sequence))
    }

    /// Whether page 0 has this sequence, or may have.
    pub(super) fn is_at(&self, sequence: u64) -> bool {
        self.lack.pages.contains(PageIndex(0)) || self.guest().sequence == sequence
    }

    /// Pages written since last asked. One that was read while it was missing counts once it is here: whoever read it
    /// has zeros.
    pub(super) fn take_dirty(&mut self) -> PageSet {
        let mut dirty = self.dirty.take();
        let mut late = self.lack.read.clone();
        late.subtract(&self.lack.pages);
        self.lack.read.subtract(&late);
        dirty.union(&late);
        dirty
    }

    /// Brings a page; says whether it was missing. A guest that waits for it takes its step.
    pub(super) fn bring(
        &mut self,
        spec: &SimSpec,
        outside: &Outside,
        page: PageIndex,
        bytes: &PageBytes,
    ) -> bool {
        if !self.lack.pages.remove(page) {
            return false;
        }
        if let Some(slot) = self.pages.get_mut(page.0 as usize) {
            *slot = *bytes;
        }
        if page == PageIndex(0)
            && let Some((_, sequence)) = self.lack.place
            && self.guest().sequence != sequence
        {
            // Its pages and its state are not of one instant.
            self.die();
        }
        if self.lack.waits_for.is_some_and(|(wanted, _)| wanted == page) {
            self.lack.waits_for = None;
            if let (Phase::Running { gate_open }, true) = (self.phase, self.alive) {
                self.pass_time();
                self.step(spec, outside, gate_open);
            }
        }
        true
    }
}

/// The handle.
pub(super) struct SimMissing(Arc<Shared>);

impl SimMissing {
    pub(super) const fn of(shared: Arc<Shared>) -> Self {
        Self(shared)
    }
}

impl Missing for SimMissing {
    /// A page is named once for each time that the guest waits for it.
    fn wanted(&self, until: Instant) -> Result<Option<PageIndex>, Gone> {
        loop {
            let wanted = self.0.alive(|_, _, state| {
                let (page, told) = state.lack.waits_for.as_mut()?;
                (!std::mem::replace(told, true)).then_some(*page)
            })?;
            let left = until.saturating_duration_since(Instant::now());
            if wanted.is_some() || left == Duration::ZERO {
                return Ok(wanted);
            }
            // The guest takes its steps only when somebody looks.
            let state = lock(&self.0.state);
            drop(self.0.changed.wait_timeout(state, left.min(TICK)).unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn bring(&self, page: PageIndex, bytes: &PageBytes) -> Result<bool, Gone> {
        self.0.alive(|spec, outside, state| state.bring(spec, outside, page, bytes))
    }

    fn left(&self) -> PageSet {
        lock(&self.0.state).lack.pages.clone()
    }
}

//! The last sent versions of pages, for deltas: a bounded number of them.
//!
//! While there is room every page sent is kept, since the first delta of a page saves as much as any
//! later one. Once full, a page sent for the second time replaces the one kept longest: pages that
//! are written once never push out those that are written always.

use std::collections::HashMap;

use kage_machine::{PageBytes, PageIndex};

/// Last sent versions of some pages of one follower.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    slots: HashMap<PageIndex, usize>,
    pages: Vec<(PageIndex, Box<PageBytes>)>,
    capacity: usize,
    /// The slot kept longest, once full.
    oldest: usize,
}

impl Cache {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    pub(crate) fn get(&self, page: PageIndex) -> Option<&PageBytes> {
        let slot = *self.slots.get(&page)?;
        self.pages.get(slot).map(|(_, bytes)| &**bytes)
    }

    /// Keeps what was sent; `again` where it was not the page's first time.
    pub(crate) fn put(&mut self, page: PageIndex, bytes: &PageBytes, again: bool) {
        if let Some(&slot) = self.slots.get(&page) {
            *self.pages[slot].1 = *bytes;
        } else if self.pages.len() < self.capacity {
            self.slots.insert(page, self.pages.len());
            self.pages.push((page, Box::new(*bytes)));
        } else if again && self.capacity > 0 {
            let slot = self.oldest;
            self.oldest = (slot + 1) % self.capacity;
            let (old, kept) = &mut self.pages[slot];
            self.slots.remove(old);
            (*old, **kept) = (page, *bytes);
            self.slots.insert(page, slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use kage_machine::PAGE_SIZE;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pages_sent_once_do_not_push_out_others() {
        let mut cache = Cache::new(2);
        for page in 0..5 {
            cache.put(PageIndex(page), &[page as u8; PAGE_SIZE], false);
        }
        assert!(cache.get(PageIndex(0)).is_some() && cache.get(PageIndex(1)).is_some());
        assert!(cache.get(PageIndex(2)).is_none());
        cache.put(PageIndex(4), &[9; PAGE_SIZE], true);
        assert!(cache.get(PageIndex(0)).is_none());
        assert_eq!(cache.get(PageIndex(4)), Some(&[9; PAGE_SIZE]));
    }

    proptest! {
        #[test]
        fn what_is_found_is_what_was_put_last(
            capacity in 0usize..6,
            puts in prop::collection::vec((0u32..10, any::<u8>(), any::<bool>()), 0..60),
        ) {
            let (mut cache, mut last) = (Cache::new(capacity), HashMap::new());
            for (page, value, again) in puts {
                let held = cache.get(PageIndex(page)).is_some();
                cache.put(PageIndex(page), &[value; PAGE_SIZE], again);
                last.insert(page, value);
                prop_assert!(cache.pages.len() <= capacity && cache.slots.len() == cache.pages.len());
                prop_assert!(!held || cache.get(PageIndex(page)).is_some());
                for (page, value) in &last {
                    if let Some(bytes) = cache.get(PageIndex(*page)) {
                        prop_assert_eq!(bytes[0], *value);
                    }
                }
            }
        }
    }
}

//! The checker: every invariant that can be seen from a store at rest.

use std::collections::HashMap;

use crate::{
    BLOCK_BYTES, Backing, ReadError, Store,
    index::Place,
    recovery::{Uncommitted, recover},
    store::commit::committed_entry,
};

impl<B: Backing> Store<B> {
    /// Checks everything: segment accounting, every live block's bytes, and that opening the log anew
    /// would find the last commit. Returns what is wrong, nothing if all is well.
    #[must_use]
    pub fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        self.check_segments(&mut wrong);
        self.check_blocks(&mut wrong);
        self.check_recovery(&mut wrong);
        wrong
    }

    fn check_segments(&self, wrong: &mut Vec<String>) {
        let mut live: HashMap<u32, u32> = HashMap::new();
        let mut owners: HashMap<u64, u64> = HashMap::new();
        let shadows = self.pending.iter().map(|(block, entry)| (u64::from(block), *entry));
        let current = (0..self.geometry.blocks).filter_map(|block| Some((block, self.index.entry(block)?)));
        for (block, entry) in current.chain(shadows) {
            let at = match entry.word.place() {
                Place::Zeros | Place::Missing => continue,
                Place::At(at) => at,
                Place::Unknown => {
                    wrong.push(format!("block {block} has word {:#x}", entry.word.0));
                    continue;
                }
            };
            let segment = self.geometry.segment_of(at);
            match segment {
                Some(segment) if self.geometry.holds_block(at) => *live.entry(segment).or_default() += 1,
                _ => wrong.push(format!("block {block} lies at {at}, outside the log")),
            }
            if let Some(other) = owners.insert(at, block) {
                wrong.push(format!("blocks {block} and {other} both lie at {at}"));
            }
            if !entry.word.tagged(entry.digest) {
                wrong.push(format!("block {block} has another word's digest"));
            }
            if self.listed
                && segment.is_some_and(|segment| {
                    !self.segments.blocks(segment).iter().any(|other| u64::from(*other) == block)
                })
            {
                wrong.push(format!("block {block} is not in the list of its segment"));
            }
        }
        let held: u64 = live.values().map(|count| u64::from(*count)).sum();
        if held != self.segments.held() {
            wrong.push(format!("{held} blocks are held, {} counted", self.segments.held()));
        }
        let free = self.segments.free_list();
        for segment in 0..self.geometry.segments {
            let counted = self.segments.live(segment);
            let found = live.get(&segment).copied();
            if counted.unwrap_or(0) != found.unwrap_or(0) {
                wrong.push(format!("segment {segment} holds {found:?} blocks, {counted:?} counted"));
            }
            let listed = free.iter().filter(|free| **free == segment).count();
            if listed != usize::from(counted.is_none()) {
                wrong.push(format!("segment {segment} is listed free {listed} times, in use: {counted:?}"));
            }
        }
        if self.segments.live(self.log.segment).is_none() || self.segments.is_closed(self.log.segment) {
            wrong.push(format!("the log goes on in segment {}, which is not active", self.log.segment));
        }
    }

    fn check_blocks(&self, wrong: &mut Vec<String>) {
        let mut bytes = [0; BLOCK_BYTES];
        for block in 0..self.geometry.blocks {
            match self.read(block, &mut bytes) {
                Ok(()) | Err(ReadError::Missing { .. }) => {}
                Err(error) => wrong.push(error.to_string()),
            }
        }
    }

    fn check_recovery(&self, wrong: &mut Vec<String>) {
        let recovered = match recover(&self.backing, Uncommitted::Drop) {
            Ok(recovered) => recovered,
            Err(error) => {
                wrong.push(error.to_string());
                return;
            }
        };
        if recovered.log.commit != self.log.commit {
            wrong.push(format!("commit {} would open, not {}", recovered.log.commit, self.log.commit));
        }
        for (block, found) in (0..).zip(&recovered.committed) {
            let expected = committed_entry(&self.index, &self.pending, block);
            // Moves that are not synced may be ignored: then the bytes are still where they were.
            if found.word != expected.word
                && (found.digest != expected.digest || self.durable == self.log.sequence)
            {
                wrong.push(format!("block {block} would open as {found:?}, not {expected:?}"));
            }
        }
    }
}

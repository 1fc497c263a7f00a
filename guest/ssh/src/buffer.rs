//! A byte queue whose used memory stays low and compact.
//!
//! Not a ring: an emptied queue starts again at its first byte, so an idle connection keeps touching the same few
//! pages, and pages touched are pages that a moving machine has to send.

use alloc::vec::Vec;

/// Capacity beyond this is given back as soon as the queue is empty.
const KEPT: usize = 64 * 1024;

/// Bytes appended at the back and taken off the front.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Vec<u8>,
    head: usize,
}

impl Buffer {
    /// The bytes queued.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(self.head..).unwrap_or_default()
    }

    /// How many bytes are queued.
    pub fn len(&self) -> usize {
        self.bytes.len().saturating_sub(self.head)
    }

    /// Whether nothing is queued.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The vector to append to; what is in it already must stay.
    pub fn back(&mut self) -> &mut Vec<u8> {
        // Moving the rest down costs at most one copy per byte: only when at least as much was taken.
        if self.head > 0 && self.head >= self.len() {
            self.bytes.drain(..self.head);
            self.head = 0;
        }
        &mut self.bytes
    }

    /// Takes `count` bytes off the front, at most all.
    pub fn consume(&mut self, count: usize) {
        self.head += count.min(self.len());
        if self.is_empty() {
            self.head = 0;
            self.bytes.clear();
            if self.bytes.capacity() > KEPT {
                self.bytes = Vec::new();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_queue(steps in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..40), 0usize..60), 0..60)) {
            let mut buffer = Buffer::default();
            let mut model: Vec<u8> = Vec::new();
            for (appended, taken) in steps {
                buffer.back().extend_from_slice(&appended);
                model.extend_from_slice(&appended);
                prop_assert_eq!(buffer.bytes(), &model[..]);
                prop_assert!(buffer.bytes.len() <= 2 * model.len(), "at most half is waste");
                buffer.consume(taken);
                model.drain(..taken.min(model.len()));
                prop_assert_eq!(buffer.bytes(), &model[..]);
            }
        }
    }
}

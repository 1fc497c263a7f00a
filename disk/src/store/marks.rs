//! A set of blocks, each with a value: a table to look up, a list to walk.

/// Blocks that are marked, each with a `T`.
#[derive(Debug, Clone)]
pub(super) struct Marks<T> {
    /// Of each block its place in the list, from 1; 0 for one that is not marked. Memory that is never
    /// touched costs nothing.
    places: Vec<u32>,
    list: Vec<(u32, T)>,
}

impl<T> Marks<T> {
    pub(super) fn new(blocks: u64) -> Self {
        Self { places: vec![0; usize::try_from(blocks).unwrap_or(0)], list: Vec::new() }
    }

    fn place(&self, block: u32) -> Option<usize> {
        (self.places.get(block as usize)?.checked_sub(1)).map(|place| place as usize)
    }

    /// Marks a block with `value`, unless it is marked; true if it was not.
    pub(super) fn mark(&mut self, block: u32, value: T) -> bool {
        let Some(place @ 0) = self.places.get_mut(block as usize) else { return false };
        self.list.push((block, value));
        *place = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
        true
    }

    pub(super) fn get(&self, block: u32) -> Option<&T> {
        self.list.get(self.place(block)?).map(|(_, value)| value)
    }

    pub(super) fn get_mut(&mut self, block: u32) -> Option<&mut T> {
        let place = self.place(block)?;
        self.list.get_mut(place).map(|(_, value)| value)
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Brings the walk into the order of blocks.
    pub(super) fn sort(&mut self) {
        self.list.sort_unstable_by_key(|(block, _)| *block);
        for (number, (block, _)) in (1..).zip(&self.list) {
            if let Some(place) = self.places.get_mut(*block as usize) {
                *place = number;
            }
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.list.iter().map(|(block, value)| (*block, value))
    }

    pub(super) fn clear(&mut self) {
        for (block, _) in self.list.drain(..) {
            if let Some(place) = self.places.get_mut(block as usize) {
                *place = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_keep_their_first_value_through_sorting_and_clearing() {
        let mut marks = Marks::new(10);
        assert!(marks.mark(7, 'a') && marks.mark(2, 'b') && !marks.mark(7, 'c') && !marks.mark(10, 'd'));
        marks.sort();
        assert_eq!(marks.iter().collect::<Vec<_>>(), [(2, &'b'), (7, &'a')]);
        assert_eq!((marks.get(7), marks.get(2), marks.get(3)), (Some(&'a'), Some(&'b'), None));
        marks.clear();
        assert_eq!((marks.len(), marks.get(7)), (0, None));
        assert!(marks.mark(7, 'e'));
    }
}

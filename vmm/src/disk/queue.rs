//! Requests of a guest, and which of them may be done before others.
//!
//! Any may overtake any but those that touch the same blocks, where one of the two changes them: these keep their
//! order. So a read that waits for a missing block holds up what would overwrite that block and nothing else. A flush
//! makes safe what was answered before it came, so it waits for nobody.

use std::{
    collections::{BTreeSet, VecDeque},
    ops::Range,
};

use kage_machine::PAGE_SIZE;

/// Most blocks written at once.
const GATHERED: usize = 256;

/// What a guest asks of its disk, in blocks.
#[derive(Debug, PartialEq, Eq)]
pub enum Job {
    /// Read these.
    Read(Range<u32>),
    /// Write whole blocks.
    Write {
        /// The first of them.
        first: u32,
        /// All their bytes.
        bytes: Vec<u8>,
    },
    /// Make these zeros.
    Discard(Range<u32>),
    /// Make all that was answered durable, as one.
    Flush,
}

impl Job {
    /// Blocks that it touches.
    pub fn blocks(&self) -> Range<u32> {
        match self {
            Self::Read(blocks) | Self::Discard(blocks) => blocks.clone(),
            Self::Write { first, bytes } => *first..first.saturating_add((bytes.len() / PAGE_SIZE) as u32),
            Self::Flush => 0..0,
        }
    }

    /// Whether it changes them.
    pub const fn changes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard(_))
    }

    fn must_follow(&self, earlier: &Self) -> bool {
        let (mine, its) = (self.blocks(), earlier.blocks());
        (self.changes() || earlier.changes()) && mine.start < its.end && its.start < mine.end
    }
}

/// A request that is not answered.
#[derive(Debug)]
pub struct Task {
    /// Its number.
    pub number: u64,
    /// What is asked.
    pub job: Job,
    /// Blocks that a read waits for.
    pub missing: Vec<u32>,
}

/// All that are not answered, in the order in which they came.
#[derive(Debug, Default)]
pub struct Queue {
    tasks: VecDeque<Task>,
}

impl Queue {
    /// Adds one.
    pub fn push(&mut self, number: u64, job: Job) {
        self.tasks.push_back(Task { number, job, missing: Vec::new() });
    }

    /// Takes out what may be done next: one task, or some writes that lie together in the queue and apart on the disk.
    pub fn next(&mut self) -> Vec<Task> {
        let Some(at) = (0..self.tasks.len()).find(|at| self.is_free(*at)) else { return Vec::new() };
        let mut taken: Vec<Task> = self.tasks.remove(at).into_iter().collect();
        let mut blocks = 0;
        while let Some(Task { job: Job::Write { bytes, .. }, .. }) = taken.last() {
            blocks += bytes.len() / PAGE_SIZE;
            // What stood before `at` and is taken already stands in the way of nobody but each other.
            let next = self.tasks.get(at).filter(|next| {
                let fits = matches!(&next.job, Job::Write { bytes, .. } if blocks + bytes.len() / PAGE_SIZE <= GATHERED);
                fits && !taken.iter().any(|taken| next.job.must_follow(&taken.job))
            });
            if next.is_none() || !self.is_free(at) {
                break;
            }
            taken.extend(self.tasks.remove(at));
        }
        taken
    }

    fn is_free(&self, at: usize) -> bool {
        let Some(task) = self.tasks.get(at) else { return false };
        task.missing.is_empty()
            && !self.tasks.iter().take(at).any(|earlier| task.job.must_follow(&earlier.job))
    }

    /// Puts a read back that waits for blocks; its place among others is where its number says.
    pub fn park(&mut self, task: Task) {
        let at = self.tasks.partition_point(|other| other.number < task.number);
        self.tasks.insert(at, task);
    }

    /// Blocks that reads wait for.
    pub fn missing(&self) -> BTreeSet<u32> {
        self.tasks.iter().flat_map(|task| &task.missing).copied().collect()
    }

    /// Has reads tried again that wait for one of these.
    pub fn retry(&mut self, blocks: &BTreeSet<u32>) {
        for task in &mut self.tasks {
            if task.missing.iter().any(|block| blocks.contains(block)) {
                task.missing.clear();
            }
        }
    }

    /// Takes out reads that wait for one of these.
    pub fn give_up(&mut self, blocks: &BTreeSet<u32>) -> Vec<Task> {
        let mut given_up = Vec::new();
        for task in std::mem::take(&mut self.tasks) {
            if task.missing.iter().any(|block| blocks.contains(block)) {
                given_up.push(task);
            } else {
                self.tasks.push_back(task);
            }
        }
        given_up
    }

    /// Takes out all.
    pub fn take(&mut self) -> VecDeque<Task> {
        std::mem::take(&mut self.tasks)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(first: u32, blocks: usize) -> Job {
        Job::Write { first, bytes: vec![0; blocks * PAGE_SIZE] }
    }

    fn numbers(tasks: &[Task]) -> Vec<u64> {
        tasks.iter().map(|task| task.number).collect()
    }

    fn queue(jobs: impl IntoIterator<Item = Job>) -> Queue {
        let mut queue = Queue::default();
        (1..).zip(jobs).for_each(|(number, job)| queue.push(number, job));
        queue
    }

    #[test]
    fn a_read_that_waits_holds_up_what_touches_its_blocks_and_nothing_else() {
        let mut queue = queue([
            Job::Read(4..8),
            write(20, 1),
            write(7, 1),
            Job::Read(5..6),
            Job::Read(7..9),
            Job::Flush,
            Job::Discard(0..5),
        ]);
        let mut read = queue.next();
        assert_eq!(numbers(&read), [1]);
        let mut read = read.pop().unwrap();
        read.missing = vec![6];
        queue.park(read);
        assert_eq!(queue.missing(), BTreeSet::from([6]));
        let done: Vec<_> =
            std::iter::from_fn(|| Some(queue.next()).filter(|next| !next.is_empty())).collect();
        assert_eq!(done.iter().map(|next| numbers(next)).collect::<Vec<_>>(), [vec![2], vec![4], vec![6]]);
        queue.retry(&BTreeSet::from([5]));
        assert_eq!(numbers(&queue.next()), Vec::<u64>::new());
        queue.retry(&BTreeSet::from([6]));
        let done: Vec<_> =
            std::iter::from_fn(|| Some(queue.next()).filter(|next| !next.is_empty())).collect();
        assert_eq!(
            done.iter().map(|next| numbers(next)).collect::<Vec<_>>(),
            [vec![1], vec![3], vec![5], vec![7]]
        );
        assert!(queue.is_empty());
    }

    #[test]
    fn writes_that_follow_one_another_are_gathered() {
        let mut queue =
            queue([write(0, 4), write(9, 1), write(4, 5), write(3, 1), write(30, 256), Job::Flush]);
        assert_eq!(numbers(&queue.next()), [1, 2, 3], "the fourth writes what the first does");
        assert_eq!(numbers(&queue.next()), [4], "too many for one");
        assert_eq!(numbers(&queue.next()), [5]);
        assert_eq!(numbers(&queue.next()), [6]);
    }

    #[test]
    fn what_nobody_has_fails_those_who_wait_for_it() {
        let mut queue = queue([Job::Read(0..2), Job::Read(2..3), write(0, 1)]);
        for _ in 0..2 {
            let mut read = queue.next().pop().unwrap();
            read.missing = read.job.blocks().collect();
            queue.park(read);
        }
        assert_eq!(numbers(&queue.give_up(&BTreeSet::from([1, 7]))), [1]);
        assert_eq!(numbers(&queue.next()), [3]);
        assert_eq!(queue.missing(), BTreeSet::from([2]));
    }
}

//! Tasks and timers of the one thread.
//!
//! A task that has long work yields ([`yield_now`]): between two rounds the kernel knocks, and rounds
//! are what bounds the time between two doors.

use alloc::{
    boxed::Box,
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    task::Wake,
    vec::Vec,
};
use core::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use crate::local::Local;

/// Names a task; never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TaskId(u64);

type Task = Pin<Box<dyn Future<Output = ()>>>;

struct Executor {
    tasks: BTreeMap<TaskId, (&'static str, Task)>,
    runnable: VecDeque<TaskId>,
    queued: BTreeSet<TaskId>,
    timers: BTreeMap<(Duration, u64), Waker>,
    next_task: u64,
    next_timer: u64,
}

static EXECUTOR: Local<Executor> = Local::new();

/// Prepares the executor.
pub fn start() {
    EXECUTOR.set(Executor {
        tasks: BTreeMap::new(),
        runnable: VecDeque::new(),
        queued: BTreeSet::new(),
        timers: BTreeMap::new(),
        next_task: 0,
        next_timer: 0,
    });
}

struct TaskWaker(TaskId);

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut executor = EXECUTOR.get();
        if executor.queued.insert(self.0) {
            executor.runnable.push_back(self.0);
        }
    }
}

/// Starts a task.
pub fn spawn(name: &'static str, future: impl Future<Output = ()> + 'static) -> TaskId {
    let mut executor = EXECUTOR.get();
    let id = TaskId(executor.next_task);
    executor.next_task += 1;
    executor.tasks.insert(id, (name, Box::pin(future)));
    executor.queued.insert(id);
    executor.runnable.push_back(id);
    id
}

/// Wakes `waker` once guest time reaches `at`.
pub fn wake_at(at: Duration, waker: &Waker) {
    let mut executor = EXECUTOR.get();
    let number = executor.next_timer;
    executor.next_timer += 1;
    executor.timers.insert((at, number), waker.clone());
}

/// Lets the kernel knock and other tasks run.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|context| {
        if core::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Wakes tasks whose timers have come.
pub fn fire_timers(now: Duration) {
    let due: Vec<Waker> = {
        let mut executor = EXECUTOR.get();
        let later = executor.timers.split_off(&(now + Duration::from_nanos(1), 0));
        core::mem::replace(&mut executor.timers, later).into_values().collect()
    };
    due.into_iter().for_each(Waker::wake);
}

/// Runs each task that is runnable now once, `most` at the most.
pub fn run_round(most: usize) {
    let waiting = EXECUTOR.get().runnable.len().min(most);
    for _ in 0..waiting {
        let (id, name, mut task) = {
            let mut executor = EXECUTOR.get();
            let Some(id) = executor.runnable.pop_front() else { return };
            executor.queued.remove(&id);
            // A task that is not there has ended, or is the one that polls right now.
            let Some((name, task)) = executor.tasks.remove(&id) else { continue };
            (id, name, task)
        };
        let waker = Waker::from(Arc::new(TaskWaker(id)));
        if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            EXECUTOR.get().tasks.insert(id, (name, task));
        }
    }
}

/// When something is to run next: at once, at a time, or only once something arrives.
pub fn next_run() -> Option<Duration> {
    let executor = EXECUTOR.get();
    if executor.runnable.is_empty() {
        executor.timers.keys().next().map(|(at, _)| *at)
    } else {
        Some(Duration::ZERO)
    }
}

/// Names of the tasks there are, oldest first.
pub fn tasks() -> Vec<(u64, &'static str)> {
    EXECUTOR.get().tasks.iter().map(|(id, (name, _))| (id.0, *name)).collect()
}

//! Tasks and timers of the one thread.
//!
//! A task that has long work charges for it ([`charge`]) and yields ([`yield_now`]): between two rounds the
//! kernel knocks, and what a round may cost is what bounds the time between two doors. There is no clock to
//! look at between doors, so costs are estimates; where they are wrong, the host's alarm ends the round.
//!
//! Tasks of processes are a class of their own: they run a *slice* at a time ([`run_slice`]), in turn, and only when
//! the kernel finds that nothing else wants to run.

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

use crate::{arch, local::Local};

/// What a round may cost, in nanoseconds of estimated work. A heartbeat wants a door each 250 µs, and the network
/// and the host have their share of that.
const ROUND_COST: u64 = 120_000;

/// Names a task; never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TaskId(u64);

struct Task {
    name: &'static str,
    class: Class,
    /// Taken while the task is polled.
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
    waker: Waker,
}

/// Which tasks run before which.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Kernel,
    Process,
}

struct Executor {
    tasks: BTreeMap<TaskId, Task>,
    /// By class.
    runnable: [VecDeque<TaskId>; 2],
    queued: BTreeSet<TaskId>,
    timers: BTreeMap<Timer, Waker>,
    next_task: u64,
    next_timer: u64,
    cost: u64,
}

/// Names a timer: when it rings, and a number of its own.
pub type Timer = (Duration, u64);

static EXECUTOR: Local<Executor> = Local::new();

/// Prepares the executor.
pub fn start() {
    EXECUTOR.set(Executor {
        tasks: BTreeMap::new(),
        runnable: [VecDeque::new(), VecDeque::new()],
        queued: BTreeSet::new(),
        timers: BTreeMap::new(),
        next_task: 0,
        next_timer: 0,
        cost: 0,
    });
}

struct TaskWaker(TaskId, Class);

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut executor = EXECUTOR.get();
        if executor.queued.insert(self.0) {
            executor.runnable[self.1 as usize].push_back(self.0);
        }
    }
}

/// Starts a task.
pub fn spawn(name: &'static str, future: impl Future<Output = ()> + 'static) -> TaskId {
    add(name, Class::Kernel, future)
}

/// Starts the task of a process.
pub fn spawn_process(future: impl Future<Output = ()> + 'static) -> TaskId {
    add("process", Class::Process, future)
}

fn add(name: &'static str, class: Class, future: impl Future<Output = ()> + 'static) -> TaskId {
    let mut executor = EXECUTOR.get();
    let id = TaskId(executor.next_task);
    executor.next_task += 1;
    let waker = Waker::from(Arc::new(TaskWaker(id, class)));
    executor.tasks.insert(id, Task { name, class, future: Some(Box::pin(future)), waker });
    executor.queued.insert(id);
    executor.runnable[class as usize].push_back(id);
    id
}

/// Ends a task and frees what it holds. The task that calls this cannot end itself so.
pub fn end(id: TaskId) {
    // The task's destructors use the executor: they run when it is free again.
    let task = EXECUTOR.get().tasks.remove(&id);
    drop(task);
}

/// Has a timer ring at `at`.
pub fn wake_at(at: Duration, waker: &Waker) -> Timer {
    let mut executor = EXECUTOR.get();
    let timer = (at, executor.next_timer);
    executor.next_timer += 1;
    executor.timers.insert(timer, waker.clone());
    timer
}

/// Forgets a timer.
pub fn forget_timer(timer: Timer) {
    let waker = EXECUTOR.get().timers.remove(&timer);
    drop(waker);
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

/// Accounts for work of about `nanoseconds`; true when the round has had enough, and the caller is to yield.
pub fn charge(nanoseconds: u64) -> bool {
    let mut executor = EXECUTOR.get();
    executor.cost = executor.cost.saturating_add(nanoseconds);
    executor.cost >= ROUND_COST || arch::is_late()
}

/// What this round or slice has cost so far.
pub fn cost() -> Duration {
    Duration::from_nanos(EXECUTOR.get().cost)
}

/// [`charge`], and [`yield_now`] when it says so.
pub async fn work(nanoseconds: u64) {
    if charge(nanoseconds) {
        yield_now().await;
    }
}

/// Wakes tasks whose timers have come.
pub fn fire_timers(now: Duration) {
    let due: Vec<Waker> = {
        let mut executor = EXECUTOR.get();
        if executor.timers.keys().next().is_none_or(|(at, _)| *at > now) {
            return;
        }
        let later = executor.timers.split_off(&(now + Duration::from_nanos(1), 0));
        core::mem::replace(&mut executor.timers, later).into_values().collect()
    };
    due.into_iter().for_each(Waker::wake);
}

/// Runs each of the kernel's tasks that is runnable now once, `most` at the most, until the round costs enough. Returns
/// how many ran.
pub fn run_round(most: usize) -> usize {
    run(Class::Kernel, most)
}

/// Runs processes in turn, `most` at the most, until the first that is interrupted.
pub fn run_slice(most: usize) -> usize {
    run(Class::Process, most)
}

/// Ends the slice: what runs has used it up.
pub fn end_slice() {
    charge(ROUND_COST);
}

/// Whether a process could run.
pub fn wants_slice() -> bool {
    !EXECUTOR.get().runnable[Class::Process as usize].is_empty()
}

/// Whether a task of the kernel could run.
pub fn wants_round() -> bool {
    !EXECUTOR.get().runnable[Class::Kernel as usize].is_empty()
}

fn run(class: Class, most: usize) -> usize {
    let waiting = {
        let mut executor = EXECUTOR.get();
        executor.cost = 0;
        executor.runnable[class as usize].len().min(most)
    };
    for ran in 0..waiting {
        let (id, mut future, waker) = {
            let mut executor = EXECUTOR.get();
            // The kernel's own tasks are short. Each has its turn before the next door: services listen before the
            // first packet comes in.
            let late = class == Class::Process && ran > 0 && arch::is_late();
            if executor.cost >= ROUND_COST || late {
                return ran;
            }
            let Some(id) = executor.runnable[class as usize].pop_front() else { return ran };
            executor.queued.remove(&id);
            // A task that is not there has ended.
            let Some(task) = executor.tasks.get_mut(&id) else { continue };
            let Some(future) = task.future.take() else { continue };
            (id, future, task.waker.clone())
        };
        let done = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let rest = {
            let mut executor = EXECUTOR.get();
            match executor.tasks.get_mut(&id) {
                Some(task) if !done => {
                    task.future = Some(future);
                    None
                }
                _ => Some((executor.tasks.remove(&id), future)),
            }
        };
        drop(rest);
    }
    waiting
}

/// When something is to run next: at once, at a time, or only once something arrives.
pub fn next_run() -> Option<Duration> {
    let executor = EXECUTOR.get();
    if executor.runnable.iter().all(VecDeque::is_empty) {
        executor.timers.keys().next().map(|(at, _)| *at)
    } else {
        Some(Duration::ZERO)
    }
}

/// Numbers and names of the kernel's tasks, oldest first.
pub fn tasks() -> Vec<(u64, &'static str)> {
    let executor = EXECUTOR.get();
    let tasks = executor.tasks.iter().filter(|(_, task)| task.class == Class::Kernel);
    tasks.map(|(id, task)| (id.0, task.name)).collect()
}

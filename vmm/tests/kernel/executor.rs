//! Tasks on a simulated clock: a task runs when it was woken, in an order that a seed shuffles; when none is and the
//! disk has nothing to do, the clock goes on to the next timer, and where there is none, something waits for ever.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use super::{disk, time};

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    woken: Arc<Flag>,
}

thread_local! {
    static TASKS: RefCell<Vec<Task>> = const { RefCell::new(Vec::new()) };
    static TIMERS: RefCell<BTreeMap<(Duration, u64), Waker>> = const { RefCell::new(BTreeMap::new()) };
    static NEXT: Cell<u64> = const { Cell::new(0) };
    static RANDOM: Cell<u64> = const { Cell::new(0) };
}

/// Forgets all tasks and timers.
pub fn start() {
    TASKS.take();
    TIMERS.take();
    seed(1);
}

/// Shuffles from here on as this number says.
pub fn seed(seed: u64) {
    RANDOM.set(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
}

/// A number below `limit`.
pub fn random(limit: u64) -> u64 {
    let mut state = RANDOM.get();
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    RANDOM.set(state);
    (state >> 11) % limit
}

pub fn spawn(_name: &'static str, future: impl Future<Output = ()> + 'static) {
    let woken = Arc::new(Flag(AtomicBool::new(true)));
    TASKS.with_borrow_mut(|tasks| tasks.push(Task { future: Box::pin(future), woken }));
}

pub async fn work(_nanoseconds: u64) {}

/// Lets each woken task run once; whether any did.
fn run_tasks() -> bool {
    let mut tasks = TASKS.take();
    let mut ran = false;
    for index in (1..tasks.len()).rev() {
        tasks.swap(index, random(index as u64 + 1) as usize);
    }
    tasks.retain_mut(|task| {
        if !task.woken.0.swap(false, Ordering::Relaxed) {
            return true;
        }
        ran = true;
        let waker = Waker::from(Arc::clone(&task.woken));
        task.future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending()
    });
    TASKS.with_borrow_mut(|all| {
        tasks.append(all);
        *all = tasks;
    });
    ran
}

/// Goes on to the next timer, if there is one.
fn ring() -> bool {
    let Some(((at, _), waker)) = TIMERS.with_borrow_mut(BTreeMap::pop_first) else { return false };
    time::advance(at);
    waker.wake();
    true
}

/// Runs a future to its end, and all tasks beside it.
pub fn block_on<F: Future>(future: F) -> F::Output {
    run(future, usize::MAX).unwrap_or_else(|| panic!("something waits for ever"))
}

/// Runs a future for so many rounds at the most; `None` if it is not done by then.
pub fn run<F: Future>(future: F, rounds: usize) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    let woken = Arc::new(Flag(AtomicBool::new(true)));
    let waker = Waker::from(Arc::clone(&woken));
    for _ in 0..rounds {
        if woken.0.swap(false, Ordering::Relaxed)
            && let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker))
        {
            return Some(output);
        }
        let ran = run_tasks() | disk::step();
        if !ran && !woken.0.load(Ordering::Relaxed) && !ring() {
            return None;
        }
    }
    None
}

/// Runs what can run, until nothing but timers is left.
pub fn settle() {
    while run_tasks() | disk::step() {}
}

pub struct Sleep {
    at: Duration,
    timer: Option<(Duration, u64)>,
}

pub fn sleep_until(at: Duration) -> Sleep {
    Sleep { at, timer: None }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if time::now() >= self.at {
            return Poll::Ready(());
        }
        if let Some(timer) = self.timer.take() {
            TIMERS.with_borrow_mut(|timers| timers.remove(&timer));
        }
        let timer = (self.at, NEXT.get());
        NEXT.set(NEXT.get() + 1);
        TIMERS.with_borrow_mut(|timers| timers.insert(timer, context.waker().clone()));
        self.timer = Some(timer);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(timer) = self.timer.take() {
            // A test's thread may have ended, and its timers with it.
            let _ = TIMERS.try_with(|timers| timers.borrow_mut().remove(&timer));
        }
    }
}

//! Guest time: what the last door returned.

use core::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use crate::executor::{self, Timer};

/// Monotonic time since the template was started.
pub fn now() -> Duration {
    Duration::from_nanos(crate::arch::mail().now_ns)
}

/// Wall clock since 1970.
pub fn wall() -> Duration {
    Duration::from_nanos(crate::arch::mail().wall_ns)
}

/// Waits until guest time reaches `at`.
pub fn sleep_until(at: Duration) -> Sleep {
    Sleep { at, timer: None }
}

/// Waits for `span`.
pub fn sleep(span: Duration) -> Sleep {
    sleep_until(now().saturating_add(span))
}

/// A wait; its timer goes with it.
pub struct Sleep {
    at: Duration,
    timer: Option<(Timer, Waker)>,
}

impl Sleep {
    fn forget(&mut self) {
        if let Some((timer, _)) = self.timer.take() {
            executor::forget_timer(timer);
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if now() >= self.at {
            self.forget();
            return Poll::Ready(());
        }
        if self.timer.as_ref().is_none_or(|(_, waker)| !waker.will_wake(context.waker())) {
            self.forget();
            self.timer = Some((executor::wake_at(self.at, context.waker()), context.waker().clone()));
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.forget();
    }
}

//! Guest time: what the last door returned.

use core::{future::poll_fn, task::Poll, time::Duration};

/// Monotonic time since the template was started.
pub fn now() -> Duration {
    Duration::from_nanos(crate::arch::mail().now_ns)
}

/// Wall clock since 1970.
pub fn wall() -> Duration {
    Duration::from_nanos(crate::arch::mail().wall_ns)
}

/// Waits until guest time reaches `at`.
pub async fn sleep_until(at: Duration) {
    poll_fn(|context| {
        if now() >= at {
            return Poll::Ready(());
        }
        crate::executor::wake_at(at, context.waker());
        Poll::Pending
    })
    .await;
}

/// Waits for `span`.
pub async fn sleep(span: Duration) {
    sleep_until(now() + span).await;
}

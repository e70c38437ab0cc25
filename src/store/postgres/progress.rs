//! The time since an operation sent its last statement.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Mutex;
use std::time::Duration;

use crate::clock::Stopwatch;
use crate::sharded::lock;

thread_local! {
    /// Whether the operation that this thread polls has sent a statement during this poll.
    static HAS_SENT: Cell<bool> = const { Cell::new(false) };
}

/// Records that the operation that this thread polls sends a statement.
pub(super) fn note_statement() {
    HAS_SENT.set(true);
}

/// Measures the time since an operation sent its last statement.
pub(super) struct Progress(Mutex<Stopwatch>);

impl Progress {
    pub(super) fn start() -> Self {
        Self(Mutex::new(Stopwatch::start()))
    }

    pub(super) fn elapsed(&self) -> Duration {
        lock(&self.0).elapsed()
    }

    /// Runs the operation, and records the times of its statements.
    pub(super) async fn watch<T>(&self, operation: impl Future<Output = T>) -> T {
        let mut operation = pin!(operation);
        poll_fn(|cx| {
            HAS_SENT.set(false);
            let polled = operation.as_mut().poll(cx);
            if HAS_SENT.take() {
                *lock(&self.0) = Stopwatch::start();
            }
            polled
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, sleep};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn each_statement_restarts_the_time_and_no_other_poll_does() {
        let progress = Progress::start();
        let operation = progress.watch(async {
            for _ in 0..3 {
                note_statement();
                sleep(10 * SECOND).await;
            }
        });
        let mut operation = pin!(operation);
        for (at, since) in [(0, 0), (4, 4), (8, 8), (12, 0), (16, 4), (20, 8), (24, 0)] {
            assert!(futures::poll!(&mut operation).is_pending());
            // A timer of tokio fires up to one millisecond late.
            assert!(progress.elapsed().abs_diff(since * SECOND) < SECOND, "{at}");
            advance(4 * SECOND).await;
        }
    }
}

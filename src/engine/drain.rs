//! The wait for executions that run without a caller.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::within;
use crate::detach::TaskTracker;

/// Waits for executions, also those that continue after their callers have left. The method `drain`
/// of a layer returns a drain. `Drain::default()` makes one for calls of `client::once`, which join
/// it with `with_drain`.
///
/// Stop taking requests first, then wait, then end the process:
///
/// ```no_run
/// # use axum::{routing::post, Router};
/// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
/// # async fn serve(listener: tokio::net::TcpListener) -> std::io::Result<()> {
/// let idempotency = IdempotencyLayer::new(MemoryStore::new());
/// let drain = idempotency.drain();
/// let app = Router::new().route("/payments", post(|| async { "paid" })).layer(idempotency);
/// axum::serve(listener, app).with_graceful_shutdown(async { tokio::signal::ctrl_c().await.unwrap() }).await?;
/// drain.wait().await;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Drain {
    tracker: Arc<TaskTracker>,
    /// Returns whether executions run that the tracker does not count yet.
    is_busy: Option<Arc<dyn Fn() -> bool + Send + Sync>>,
}

impl Drain {
    pub(crate) fn new(tracker: &Arc<TaskTracker>) -> Self {
        Self {
            tracker: Arc::clone(tracker),
            is_busy: None,
        }
    }

    #[cfg(feature = "once")]
    pub(crate) fn tracker(&self) -> Arc<TaskTracker> {
        Arc::clone(&self.tracker)
    }

    pub(crate) fn while_busy(mut self, is_busy: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.is_busy = Some(Arc::new(is_busy));
        self
    }

    /// Returns the number of executions, releases and deferred writes to the store that run without
    /// a caller now.
    #[must_use]
    pub fn running(&self) -> usize {
        self.tracker.running()
    }

    /// Waits until no execution runs, with a caller or without. Finish or drop your
    /// futures first, because this also waits for a future that you hold and do not poll.
    ///
    /// Put a timeout around this call. If a handler never ends, this never resolves. If a store is
    /// unreachable, this waits until the deferred writes have succeeded or their time is up, two
    /// minutes by default.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn wait(&self) {
        // A server may report shutdown slightly before it drops its last requests, which then reach
        // the tracker.
        const MOMENT: Duration = Duration::from_millis(5);
        // Leave the loop only when nothing is left (I11).
        loop {
            let mut ended = pin!(self.tracker.ended());
            ended.as_mut().enable();
            // Read before `running()`, because detached work is counted as running before it stops
            // being busy.
            let busy = self.tracker.attended() > 0 || self.is_busy.as_ref().is_some_and(|is_busy| is_busy());
            if self.running() > 0 {
                ended.await;
            } else if busy {
                drop(within(MOMENT, ended).await);
            } else {
                return;
            }
        }
    }
}

impl Default for Drain {
    /// Makes a drain that waits for nothing until calls of `client::once` join it.
    fn default() -> Self {
        Self::new(&Arc::default())
    }
}

impl fmt::Debug for Drain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drain").field("running", &self.running()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_debug_form_shows_how_much_runs() {
        assert_eq!(format!("{:?}", Drain::default()), "Drain { running: 0 }");
    }
}

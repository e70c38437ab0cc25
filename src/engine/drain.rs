//! The wait for what runs without a caller.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::within;
use crate::detach::TaskTracker;

/// Waits for executions, also those that continue after their callers have left. `drain` of a layer returns one.
/// `Drain::default()` makes one for calls of `client::once`, which join it by `with_drain`.
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
    /// Whether executions run that the tracker does not count yet.
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

    /// How many executions, releases and questions to the store run without a caller now.
    #[must_use]
    pub fn running(&self) -> usize {
        self.tracker.running()
    }

    /// Resolves once no execution runs, with a caller or without. Finish or drop what you have begun first: a future that is held
    /// and not polled is waited for. Put a timeout around it: a handler that never ends never lets it resolve, and a store that is
    /// away is waited for, two minutes by default, so that it is told what it missed.
    ///
    /// # Cancel safety
    ///
    /// Dropping it changes nothing.
    pub async fn wait(&self) {
        // A server may say that it has stopped a moment before it drops its last requests, of which the tracker then hears.
        const MOMENT: Duration = Duration::from_millis(5);
        loop {
            let mut ended = pin!(self.tracker.ended());
            ended.as_mut().enable();
            // Read first: what leaves its caller is counted as running before it is no longer busy.
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

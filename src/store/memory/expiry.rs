//! The task of a memory store that frees expired records.

use std::pin::pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::future::{Either, select};
use tokio::runtime::Handle;

use super::StoreStats;
use super::inner::Inner;
use crate::clock::Timer;
use crate::sharded::SHARDS;
use crate::sync::atomic::Ordering;
use crate::telemetry;

impl Inner {
    /// Starts the sweeping task, unless it runs already. Returns false outside a tokio runtime,
    /// where no task can run.
    pub(super) fn start_sweeper(self: &Arc<Self>) -> bool {
        if self.sweeping.load(Ordering::Relaxed) {
            return true;
        }
        let Ok(runtime) = Handle::try_current() else {
            return false;
        };
        if !self.sweeping.swap(true, Ordering::Relaxed) {
            runtime.spawn(sweep_every_second(Sweeper(Arc::downgrade(self))));
        }
        true
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.closed.notify_one();
    }
}

/// The store that a sweeping task works for. If the runtime drops the task, the next claim starts
/// another one.
struct Sweeper(Weak<Inner>);

impl Drop for Sweeper {
    fn drop(&mut self) {
        if let Some(inner) = self.0.upgrade() {
            inner.sweeping.store(false, Ordering::Relaxed);
        }
    }
}

async fn sweep_every_second(sweeper: Sweeper) {
    const SECOND: Duration = Duration::from_secs(1);
    let Some(closed) = sweeper.0.upgrade().map(|inner| Arc::clone(&inner.closed)) else {
        return;
    };
    loop {
        // This timer does not use the runtime's timers. The runtime may have none, and a claim must
        // not spawn a task that panics.
        let tick = pin!(Timer::of_any_runtime(SECOND));
        if let Either::Right(_) = select(tick, pin!(closed.notified())).await {
            return;
        }
        while sweeper.0.upgrade().is_some_and(|inner| inner.free_some()) {
            // Let other tasks of this runtime run between the portions.
            tokio::task::yield_now().await;
        }
        for shard in 0..SHARDS {
            let Some(inner) = sweeper.0.upgrade() else { return };
            inner.free_abandoned_in(shard);
            drop(inner);
            tokio::task::yield_now().await;
        }
        let Some(inner) = sweeper.0.upgrade() else { return };
        inner.tidy();
        let StoreStats {
            records,
            bytes,
            in_flight,
            waiters,
        } = inner.stats();
        telemetry::store_figures(records, bytes, in_flight, waiters);
    }
}

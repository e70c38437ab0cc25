//! The deletion of expired rows.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::runtime::Handle;

use super::lent::Lent;
use super::{Inner, PostgresStore};
use crate::clock::sleep;
use crate::error::Error;
use crate::telemetry::{self, Event};

/// Whether the sweeping task runs, and how often it sweeps.
#[derive(Debug)]
pub(super) struct Sweeping {
    running: AtomicBool,
    interval: Duration,
}

impl Sweeping {
    pub(super) const fn every(interval: Duration) -> Self {
        Self {
            running: AtomicBool::new(false),
            interval,
        }
    }
}

impl PostgresStore {
    /// Deletes what has expired, in batches of 1,000, and says how many rows there were. The store does so itself while it is
    /// used.
    ///
    /// # Errors
    ///
    /// [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) when the server cannot be reached; some rows may be deleted.
    pub async fn sweep(&self) -> Result<u64, Error> {
        const BATCH: i64 = 1_000;
        let mut swept = 0;
        loop {
            let deleting = |store: Self, mut lent: Lent| async move {
                let done = store.on(lent.connection()?).sweep(BATCH).await;
                lent.give_back(done)
            };
            let deleted = self.operate(deleting).await?;
            swept += deleted;
            if deleted < BATCH.unsigned_abs() {
                return Ok(swept);
            }
        }
    }

    pub(super) fn start_sweeper(&self) {
        if self.0.sweeping.running.load(Ordering::Relaxed) {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        if !self.0.sweeping.running.swap(true, Ordering::Relaxed) {
            runtime.spawn(sweep_now_and_then(
                Sweeper(Arc::downgrade(&self.0)),
                self.0.sweeping.interval,
            ));
        }
    }
}

/// The store that a task works for. Dropped with its runtime, it lets the next claim start another.
struct Sweeper(Weak<Inner>);

impl Drop for Sweeper {
    fn drop(&mut self) {
        if let Some(inner) = self.0.upgrade() {
            inner.sweeping.running.store(false, Ordering::Relaxed);
        }
    }
}

async fn sweep_now_and_then(sweeper: Sweeper, interval: Duration) {
    loop {
        // Processes that were started together drift apart.
        sleep(interval.mul_f64(0.5 + rand::random::<f64>())).await;
        let Some(inner) = sweeper.0.upgrade() else { return };
        if let Err(error) = PostgresStore(inner).sweep().await {
            telemetry::failure(Event::SweepFailed, &error);
        }
    }
}

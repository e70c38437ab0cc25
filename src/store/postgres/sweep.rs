//! The deletion of expired rows.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::runtime::Handle;

use super::pooled::PooledConnection;
use super::{Inner, PostgresStore};
use crate::clock::sleep;
use crate::error::Error;
use crate::telemetry::{self, Event};

/// The largest number of rows that one statement deletes.
const LARGEST_BATCH: u32 = 1_000;

/// The state of the sweeping task, its interval, and the size of its batches.
#[derive(Debug)]
pub(super) struct Sweeping {
    running: AtomicBool,
    interval: Duration,
    /// The number of rows that the next statement deletes. It is halved if a statement takes too
    /// long, and doubled with each statement that succeeds.
    batch: AtomicU32,
}

impl Sweeping {
    pub(super) const fn every(interval: Duration) -> Self {
        Self {
            running: AtomicBool::new(false),
            interval,
            batch: AtomicU32::new(LARGEST_BATCH),
        }
    }

    fn batch(&self) -> u32 {
        self.batch.load(Ordering::Relaxed)
    }

    fn set_batch(&self, batch: u32) {
        self.batch.store(batch.clamp(1, LARGEST_BATCH), Ordering::Relaxed);
    }
}

/// The reply of the server to one batch.
enum Swept {
    /// So many rows are deleted.
    Deleted(u64),
    /// The server ended the statement, because it took too long, and has rolled it back.
    Cancelled(Error),
}

impl PostgresStore {
    /// Deletes expired rows in batches of at most 1,000, and returns their number. The store also
    /// does this by itself while it is used. If the server ends a statement because it takes too
    /// long, the next batch has half the size.
    ///
    /// # Errors
    ///
    /// [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) if the server cannot be reached, or
    /// a single row takes too long. Some rows may be deleted.
    pub async fn sweep(&self) -> Result<u64, Error> {
        let sweeping = &self.0.sweeping;
        let mut swept = 0;
        loop {
            let batch = sweeping.batch();
            match self.sweep_batch(batch).await {
                Ok(Swept::Deleted(deleted)) => {
                    swept += deleted;
                    sweeping.set_batch(batch.saturating_mul(2));
                    if deleted < u64::from(batch) {
                        return Ok(swept);
                    }
                }
                Ok(Swept::Cancelled(_)) if batch > 1 => sweeping.set_batch(batch / 2),
                Ok(Swept::Cancelled(error)) => return Err(error),
                // If the server was reached, the statement may continue there, so this sweep sends
                // no further one.
                Err(error) => return Err(error),
            }
        }
    }

    /// Deletes at most `batch` expired rows.
    async fn sweep_batch(&self, batch: u32) -> Result<Swept, Error> {
        let deleting = move |store: Self, mut pooled: PooledConnection| async move {
            let done = store.on(pooled.connection()?).sweep(i64::from(batch)).await;
            match pooled.finish(done) {
                Err(failed) if failed.is_cancelled => Ok(Swept::Cancelled(failed.error)),
                done => done.map(Swept::Deleted),
            }
        };
        self.operate(deleting).await
    }

    pub(super) fn start_sweeper(&self) {
        if self.0.sweeping.running.load(Ordering::Relaxed) {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        if !self.0.sweeping.running.swap(true, Ordering::Relaxed) {
            runtime.spawn(sweep_at_intervals(
                Sweeper(Arc::downgrade(&self.0)),
                self.0.sweeping.interval,
            ));
        }
    }
}

/// The store that a task works for. If the runtime drops the task, the next claim starts another
/// one.
struct Sweeper(Weak<Inner>);

impl Drop for Sweeper {
    fn drop(&mut self) {
        if let Some(inner) = self.0.upgrade() {
            inner.sweeping.running.store(false, Ordering::Relaxed);
        }
    }
}

async fn sweep_at_intervals(sweeper: Sweeper, interval: Duration) {
    loop {
        // The random pause lets processes that were started together drift apart.
        sleep(interval.mul_f64(0.5 + rand::random::<f64>())).await;
        let Some(inner) = sweeper.0.upgrade() else { return };
        if let Err(error) = PostgresStore(inner).sweep().await {
            telemetry::failure(Event::SweepFailed, &error);
        }
    }
}

//! How a memory store frees what has expired: moka's own expiry, driven by a task of the store.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use moka::Expiry;
use tokio::runtime::Handle;

use super::books::Books;
use super::Figures;
use crate::clock::Timestamp;
use crate::protocol::{Record, StorageKey};
use crate::telemetry;

impl Books {
    /// Makes sure that the sweeper runs, where there is a runtime to run it.
    pub(super) fn start_sweeper(self: &Arc<Self>) {
        if self.sweeping.load(Ordering::Relaxed) {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        if !self.sweeping.swap(true, Ordering::Relaxed) {
            runtime.spawn(sweep_every_second(Sweeper(Arc::downgrade(self))));
        }
    }
}

/// The store that a sweeping task works for. Dropped with its runtime, it lets the next claim start another.
struct Sweeper(Weak<Books>);

impl Drop for Sweeper {
    fn drop(&mut self) {
        if let Some(inner) = self.0.upgrade() {
            inner.sweeping.store(false, Ordering::Relaxed);
        }
    }
}

async fn sweep_every_second(sweeper: Sweeper) {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        match sweeper.0.upgrade() {
            Some(inner) => {
                inner.sweep();
                let Figures {
                    records,
                    bytes,
                    in_flight,
                    waiters,
                } = inner.figures();
                telemetry::store_figures(records, bytes, in_flight, waiters);
            }
            None => return,
        }
    }
}

/// A record that has ended, with the time after which its memory may be freed.
pub(super) struct Done {
    pub(super) record: Record,
    free_after: Duration,
}

impl Done {
    pub(super) fn new(record: Record, now: Timestamp) -> Self {
        // moka counts in nanoseconds; no process lives for a century.
        const CENTURY: Duration = Duration::from_secs(100 * 365 * 86_400);
        let left = record.expires_at().saturating_since(now);
        Self {
            record,
            free_after: left.min(CENTURY) + Duration::from_secs(1),
        }
    }
}

/// Tells moka when it may free a record. The record itself decides whether it has expired; this only comes after.
pub(super) struct FreeExpired;

impl Expiry<StorageKey, Arc<Done>> for FreeExpired {
    fn expire_after_create(&self, _: &StorageKey, done: &Arc<Done>, _: Instant) -> Option<Duration> {
        Some(done.free_after)
    }

    fn expire_after_update(
        &self,
        _: &StorageKey,
        done: &Arc<Done>,
        _: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        Some(done.free_after)
    }
}

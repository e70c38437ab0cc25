//! The embedded default: records in this process, the completed ones in a moka cache.

mod expiry;
mod inner;
mod ledger;

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::OptionFuture;
use pin_project_lite::pin_project;
use tokio::sync::futures::OwnedNotified;

use self::inner::Inner;
use super::Store;
use crate::clock::Clock;
use crate::error::Error;
use crate::protocol::{
    Claim, Completion, Decision, Fence, Outcome, Owner, Release, Renewal, Resolution, ResolveResult, Snapshot,
    StorageKey,
};
use crate::sync::atomic::{AtomicU64, Ordering};

/// A store in the memory of this process: the embedded default.
///
/// It fulfils the whole [contract](Store#contract) for as long as the process lives. A restart
/// forgets every key. Owners live as long as the store, so the store needs no renewal of leases.
///
/// The store is a ledger, not a cache: it removes no record before its expiry. Two budgets bound
/// it:
///
/// * **Record budget.** At this limit the store refuses new keys with
///   [`StoreFull`](crate::ErrorKind::StoreFull) (the layer responds with 503), and replays continue
///   to work. A record lives for its whole retention, so set the budget to *new keys per second ×
///   retention in seconds*.
/// * **Byte budget.** At this limit the oldest stored responses become tombstones. Their keys still
///   never run again, and their duplicates get 409 `response-not-stored`.
///
/// Clones share one store.
///
/// # Defaults
///
/// * 1,000,000 records, 0.5 to 0.7 KiB each with a response of a few bytes
/// * 256 MiB of stored responses
/// * the machine's monotonic clock
///
/// ```
/// use tower_idempotency::MemoryStore;
///
/// let store = MemoryStore::builder().with_record_budget(100_000).with_byte_budget(64 << 20).build();
/// assert_eq!(store.stats().records, 0);
/// ```
#[derive(Clone)]
pub struct MemoryStore(Arc<Inner>);

/// Builder of a [`MemoryStore`]. See there for the defaults.
#[derive(Clone, Debug)]
pub struct MemoryStoreBuilder {
    clock: Clock,
    record_budget: u64,
    byte_budget: u64,
}

/// Statistics of a [`MemoryStore`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreStats {
    /// Number of records in every state. In a tokio runtime, an expired record stops counting
    /// within two seconds.
    pub records: u64,
    /// Size of the stored responses in bytes.
    pub bytes: u64,
    /// Number of records whose attempt has not ended, including attempts that have given up their
    /// lease. An unknown record, such as that of a rejected message, does not count.
    pub in_flight: u64,
    /// Number of watches that wait for a change.
    pub waiters: u64,
}

impl MemoryStore {
    /// Makes an empty store with the default budgets.
    #[must_use]
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// Returns a builder, for a store with other budgets or another clock.
    #[must_use]
    pub fn builder() -> MemoryStoreBuilder {
        MemoryStoreBuilder {
            clock: Clock::system(),
            record_budget: 1_000_000,
            byte_budget: 256 << 20,
        }
    }

    /// Returns the current statistics.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        self.0.stats()
    }

    /// Frees the records that have expired by the store's clock. The store also does this by
    /// itself: once a second in a tokio runtime (with or without timers), and with every claim
    /// outside a runtime. Outside a runtime, a claim frees records that were never completed only
    /// if the store is full.
    pub fn sweep(&self) {
        self.0.sweep();
    }
}

impl MemoryStoreBuilder {
    /// Sets the largest number of records, in every state. Default: 1,000,000.
    #[must_use]
    pub fn with_record_budget(mut self, records: u64) -> Self {
        self.record_budget = records;
        self
    }

    /// Sets the largest total size of the stored responses (headers and bodies), in bytes. Default:
    /// 256 MiB. The store copies exactly these bytes, so a small slice of a large buffer takes no
    /// more memory than the store counts.
    #[must_use]
    pub fn with_byte_budget(mut self, bytes: u64) -> Self {
        self.byte_budget = bytes;
        self
    }

    /// Sets the clock that decides about expiry. Default: the machine's monotonic clock. Tests set
    /// a [manual](Clock::manual) clock.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Makes an empty store.
    #[must_use]
    pub fn build(self) -> MemoryStore {
        MemoryStore(Arc::new(Inner::new(self.clock, self.record_budget, self.byte_budget)))
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MemoryStore").field(&self.stats()).finish()
    }
}

/// Counts a watch for as long as the watch lives.
#[derive(Debug)]
struct Counted(Arc<AtomicU64>);

impl Counted {
    fn new(counter: &Arc<AtomicU64>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counter))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

pin_project! {
    /// A future that resolves when a record of a [`MemoryStore`] has changed. It resolves at once
    /// if the record is absent or completed.
    #[derive(Debug)]
    pub struct MemoryWatch {
        #[pin]
        change: OptionFuture<OwnedNotified>,
        _counted: Counted,
    }
}

impl Future for MemoryWatch {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.project().change.poll(cx).map(drop)
    }
}

impl Store for MemoryStore {
    type Watch = MemoryWatch;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        self.0.claim(claim)
    }

    fn claim_now(&self, claim: &Claim) -> Option<Result<Decision, Error>> {
        self.0.claim_now(claim).map(Ok)
    }

    async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        Ok(self.0.renew(key, owner, lease))
    }

    async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        Ok(self.0.complete(key, owner, outcome, retention))
    }

    async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        Ok(self.0.release(key, owner))
    }

    async fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Result<ResolveResult, Error> {
        Ok(self.0.resolve(key, fence, resolution))
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        Ok(self.0.peek(key))
    }

    async fn watch(&self, key: &StorageKey) -> Result<MemoryWatch, Error> {
        Ok(self.0.watch(key))
    }
}

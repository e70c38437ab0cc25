//! The embedded default: records in this process, completed ones in a moka cache.

mod books;
mod freeing;
mod ledger;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::sync::futures::OwnedNotified;

use self::books::Books;
use super::Store;
use crate::clock::Clock;
use crate::error::Error;
use crate::protocol::{
    Claim, Completion, Decision, Fence, Outcome, Owner, Release, Renewal, Resolution, ResolveResult, Snapshot,
    StorageKey,
};

/// Keeps records in the memory of this process: the embedded default.
///
/// It promises everything that the [contract](Store#contract) says for as long as the process lives, and nothing beyond: a
/// restart forgets every key. Owners live as long as the store does, so it asks for no renewal of leases.
///
/// It is a ledger, not a cache: no record goes before its time. What is bounded is refused at the door:
///
/// * over the **record budget**, new keys are refused with [`StoreFull`](crate::ErrorKind::StoreFull) (the layer answers 503); replays
///   go on. A record lives for its whole retention, so the budget to set is *new keys per second × retention in seconds*.
/// * over the **byte budget**, the oldest kept answers shrink to tombstones: their keys still never run again, and their
///   duplicates get 409 `response-not-stored`.
///
/// Clones share one store.
///
/// # Defaults
///
/// * 1,000,000 records, 0.5 to 0.7 KiB each with an answer of a few bytes
/// * 256 MiB of kept answers
/// * the machine's monotonic clock
///
/// ```
/// use tower_idempotency::MemoryStore;
///
/// let store = MemoryStore::builder().with_record_budget(100_000).with_byte_budget(64 << 20).build();
/// assert_eq!(store.stats().records, 0);
/// ```
#[derive(Clone)]
pub struct MemoryStore(Arc<Books>);

/// Sets up a [`MemoryStore`]; see there for the defaults.
#[derive(Clone, Debug)]
pub struct MemoryStoreBuilder {
    clock: Clock,
    record_budget: u64,
    byte_budget: u64,
}

/// What a [`MemoryStore`] holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreStats {
    /// Records in every state. Expired ones are struck within two seconds.
    pub records: u64,
    /// Bytes of the kept answers.
    pub bytes: u64,
    /// Records with an owner that has not ended, also if it has given up its lease. An unknown record, such as that of a
    /// rejected message, does not count.
    pub in_flight: u64,
    /// Watches that wait for a change.
    pub waiters: u64,
}

impl MemoryStore {
    /// An empty store with the default budgets.
    #[must_use]
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// Sets up a store with other budgets.
    #[must_use]
    pub fn builder() -> MemoryStoreBuilder {
        MemoryStoreBuilder {
            clock: Clock::system(),
            record_budget: 1_000_000,
            byte_budget: 256 << 20,
        }
    }

    /// What the store holds now.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        self.0.stats()
    }

    /// Frees the records that have expired by the store's clock. The store also does this by itself, once a second in a
    /// tokio runtime (with or without timers), and outside a runtime with every claim. There, a claim frees
    /// records that were never completed only if the store is full.
    pub fn sweep(&self) {
        self.0.sweep();
    }
}

impl MemoryStoreBuilder {
    /// At most this many records, in every state; 1,000,000 by default.
    #[must_use]
    pub fn with_record_budget(mut self, records: u64) -> Self {
        self.record_budget = records;
        self
    }

    /// At most this many bytes of kept answers (headers and bodies); 256 MiB by default. The store copies exactly these
    /// bytes, so a small slice of a large buffer takes no more memory than the store counts.
    #[must_use]
    pub fn with_byte_budget(mut self, bytes: u64) -> Self {
        self.byte_budget = bytes;
        self
    }

    /// Sets the clock that decides about expiry. Default: the machine's monotonic clock. Tests set a
    /// [manual](Clock::manual) one.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// An empty store.
    #[must_use]
    pub fn build(self) -> MemoryStore {
        MemoryStore(Arc::new(Books::new(self.clock, self.record_budget, self.byte_budget)))
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

/// Counts a watch for as long as it lives.
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
    /// Resolves when a record of a [`MemoryStore`] has changed; at once when the record is absent or has ended.
    #[derive(Debug)]
    pub struct MemoryWatch {
        #[pin]
        change: Option<OwnedNotified>,
        _counted: Counted,
    }
}

impl Future for MemoryWatch {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match self.project().change.as_pin_mut() {
            Some(change) => change.poll(cx),
            None => Poll::Ready(()),
        }
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

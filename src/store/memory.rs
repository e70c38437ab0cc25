//! The embedded default: records in this process, answers in a moka cache.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use moka::sync::Cache;
use moka::Expiry;
use pin_project_lite::pin_project;
use tokio::runtime::Handle;
use tokio::sync::futures::OwnedNotified;
use tokio::sync::Notify;

use super::ledger::{KeptAnswer, Ledger};
use super::Store;
use crate::clock::{Clock, Timestamp};
use crate::error::{Error, ErrorKind};
use crate::protocol::{
    Answer, Change, Claim, Completion, Decision, Fence, KeyHasher, Outcome, Owner, Record, Release, Renewal,
    Resolution, Resolved, Snapshot, StorageKey, Transition,
};
use crate::sharded::{lock, Sharded};
use crate::telemetry;

/// Keeps records in the memory of this process: the embedded default.
///
/// It promises everything that the [contract](Store#contract) says for as long as the process lives, and nothing beyond: a
/// restart forgets every key. Owners live as long as the store does, so it asks for no renewal of leases.
///
/// It is a ledger, not a cache: no record goes before its time. What is bounded is refused at the door:
///
/// * over the **record budget**, new keys are refused with [`StoreFull`](ErrorKind::StoreFull) (the layer answers 503); replays
///   go on. A record lives for its whole retention, so the budget to set is *new keys per second × retention in seconds*.
/// * over the **byte budget**, the oldest kept answers shrink to tombstones: their keys still never run again, and their
///   duplicates get 409 `answer-not-kept`.
///
/// Clones share one store.
///
/// # Defaults
///
/// * 1,000,000 records, about 0.7 KiB each beside their answers
/// * 256 MiB of kept answers
/// * the machine's monotonic clock
///
/// ```
/// use tower_idempotency::MemoryStore;
///
/// let store = MemoryStore::builder().with_record_budget(100_000).with_byte_budget(64 << 20).build();
/// assert_eq!(store.figures().records, 0);
/// ```
#[derive(Clone)]
pub struct MemoryStore(Arc<Inner>);

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
pub struct Figures {
    /// Records in every state. Expired ones are struck within two seconds.
    pub records: u64,
    /// Bytes of the kept answers.
    pub bytes: u64,
    /// Records that are not completed.
    pub in_flight: u64,
    /// Watches that wait for a change.
    pub waiters: u64,
}

struct Inner {
    clock: Clock,
    record_budget: u64,
    /// Everything that has not ended: in flight, lost, unknown.
    open: Sharded<StorageKey, Open, KeyHasher>,
    /// Everything that has ended. A key is never in neither: it enters here before it leaves `open`.
    done: Cache<StorageKey, Arc<Done>, KeyHasher>,
    ledger: Mutex<Ledger>,
    records: AtomicU64,
    in_flight: AtomicU64,
    waiters: Arc<AtomicU64>,
    sweeping: AtomicBool,
}

struct Open {
    record: Record,
    watchers: Option<Arc<Notify>>,
}

type Shard = HashMap<StorageKey, Open, KeyHasher>;

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
    pub fn figures(&self) -> Figures {
        self.0.figures()
    }

    /// Strikes what has expired and frees its memory. The store does so itself, once a second, while a tokio runtime runs.
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

    /// At most this many bytes of kept answers (headers and bodies); 256 MiB by default.
    #[must_use]
    pub fn with_byte_budget(mut self, bytes: u64) -> Self {
        self.byte_budget = bytes;
        self
    }

    /// The clock that decides about expiry; the machine's monotonic clock by default.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// An empty store.
    #[must_use]
    pub fn build(self) -> MemoryStore {
        let hasher = KeyHasher::random();
        let done = Cache::builder()
            .expire_after(FreeExpired)
            .build_with_hasher(hasher.clone());
        MemoryStore(Arc::new(Inner {
            clock: self.clock,
            record_budget: self.record_budget,
            open: Sharded::new(hasher),
            done,
            ledger: Mutex::new(Ledger::new(self.byte_budget)),
            records: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            waiters: Arc::default(),
            sweeping: AtomicBool::new(false),
        }))
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MemoryStore").field(&self.figures()).finish()
    }
}

impl Inner {
    fn claim(self: &Arc<Self>, claim: &Claim) -> Result<Decision, Error> {
        self.start_sweeper();
        // The owner lives as long as the store, so its lease has no end.
        let claim = Claim {
            lease: Duration::MAX,
            ..claim.clone()
        };
        let now = self.clock.now();
        let mut shard = self.open.lock(&claim.key);
        let decision = match shard.get_mut(&claim.key) {
            Some(open) if !open.record.is_expired(now) => {
                let transition = Record::claim(Some(&open.record), &claim, now);
                if let Change::Put(record) = transition.change {
                    open.record = record;
                }
                transition.reply
            }
            expired => {
                let reserved = expired.is_some();
                let done = self.done.get(&claim.key);
                let transition = Record::claim(done.as_ref().map(|done| &done.record), &claim, now);
                if let Change::Put(record) = transition.change {
                    if !reserved {
                        self.reserve(now)?;
                    }
                    shard.insert(claim.key, Open { record, watchers: None });
                }
                transition.reply
            }
        };
        Ok(unleased(decision))
    }

    fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Renewal {
        // Anything but giving it up leaves the lease without end.
        let lease = if lease.is_zero() { lease } else { Duration::MAX };
        self.change_open(key, |record, now| Record::renew(record, owner, lease, now))
    }

    fn complete(&self, key: &StorageKey, owner: Owner, outcome: &Outcome, retention: Duration) -> Completion {
        self.change_open(key, |record, now| {
            Record::complete(record, owner, outcome, retention, now)
        })
    }

    fn release(&self, key: &StorageKey, owner: Owner) -> Release {
        self.change_open(key, |record, now| Record::release(record, owner, now))
    }

    fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Resolved {
        self.change_open(key, |record, now| Record::resolve(record, fence, resolution, now))
    }

    fn peek(&self, key: &StorageKey) -> Option<Snapshot> {
        let now = self.clock.now();
        let shard = self.open.lock(key);
        match shard.get(key) {
            Some(open) => Record::peek(Some(&open.record), now),
            None => Record::peek(self.done.get(key).as_ref().map(|done| &done.record), now),
        }
    }

    fn watch(&self, key: &StorageKey) -> MemoryWatch {
        let mut shard = self.open.lock(key);
        let change = shard.get_mut(key).map(|open| {
            let watchers = open.watchers.get_or_insert_with(Arc::default);
            Arc::clone(watchers).notified_owned()
        });
        self.waiters.fetch_add(1, Ordering::Relaxed);
        MemoryWatch {
            change,
            _counted: Counted(Arc::clone(&self.waiters)),
        }
    }

    /// Applies a transition to a record that has not ended; one that has ended can only be looked at.
    fn change_open<R>(
        &self,
        key: &StorageKey,
        transition: impl FnOnce(Option<&Record>, Timestamp) -> Transition<R>,
    ) -> R {
        let now = self.clock.now();
        let mut shrinking = Vec::new();
        let mut shard = self.open.lock(key);
        let Some(open) = shard.get_mut(key) else {
            return transition(self.done.get(key).as_ref().map(|done| &done.record), now).reply;
        };
        let Transition { reply, change } = transition(Some(&open.record), now);
        match change {
            Change::Keep => return reply,
            Change::Put(record) if record.is_completed() => {
                let record = self.settle(key, record, now, &mut shrinking);
                self.done.insert(*key, Arc::new(Done::new(record, now)));
                self.close(&mut shard, key);
            }
            Change::Put(record) => {
                open.record = record;
                open.wake();
            }
            Change::Remove => {
                self.records.fetch_sub(1, Ordering::Relaxed);
                self.close(&mut shard, key);
            }
        }
        drop(shard);
        shrinking.iter().for_each(|answer| self.shrink(answer, now));
        reply
    }

    /// Reserves a record, or refuses.
    fn reserve(&self, now: Timestamp) -> Result<(), Error> {
        const FULL: Error = Error::new(
            ErrorKind::StoreFull,
            "the memory store has reached its record budget; raise it to new keys per second × retention in seconds",
        );
        if !self.try_reserve() {
            self.strike_expired(now);
            if !self.try_reserve() {
                return Err(FULL);
            }
        }
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn try_reserve(&self) -> bool {
        if self.records.fetch_add(1, Ordering::Relaxed) < self.record_budget {
            return true;
        }
        self.records.fetch_sub(1, Ordering::Relaxed);
        false
    }

    /// Enters a record that has ended in the ledger and returns it as it is to be stored.
    fn settle(&self, key: &StorageKey, record: Record, now: Timestamp, shrinking: &mut Vec<KeptAnswer>) -> Record {
        let expires = record.expires_at();
        let mut ledger = lock(&self.ledger);
        match record.answer().map(size) {
            Some(bytes) if ledger.fits(bytes) => {
                ledger.enter_kept(*key, expires, bytes, now, |answer| shrinking.push(answer));
                record
            }
            _ => {
                ledger.enter_tombstone(expires);
                record.into_tombstone()
            }
        }
    }

    /// Takes a record out of `open` and wakes who watched it.
    fn close(&self, shard: &mut Shard, key: &StorageKey) {
        if let Some(open) = shard.remove(key) {
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            open.wake();
        }
    }

    /// Turns an answer into a tombstone, unless its record has gone since.
    fn shrink(&self, answer: &KeptAnswer, now: Timestamp) {
        let _shard = self.open.lock(&answer.key);
        let Some(done) = self.done.get(&answer.key) else { return };
        if done.record.expires_at() == answer.expires {
            let tombstone = done.record.clone().into_tombstone();
            self.done.insert(answer.key, Arc::new(Done::new(tombstone, now)));
        }
    }

    fn strike_expired(&self, now: Timestamp) {
        let expired = lock(&self.ledger).expire(now);
        self.records.fetch_sub(expired, Ordering::Relaxed);
    }

    fn sweep(&self) {
        let now = self.clock.now();
        self.strike_expired(now);
        let mut abandoned = 0;
        self.open.each(|shard| {
            shard.retain(|_, open| {
                let expired = open.record.is_expired(now);
                abandoned += u64::from(expired);
                !expired
            });
        });
        self.records.fetch_sub(abandoned, Ordering::Relaxed);
        self.in_flight.fetch_sub(abandoned, Ordering::Relaxed);
        self.done.run_pending_tasks();
    }

    fn figures(&self) -> Figures {
        Figures {
            records: self.records.load(Ordering::Relaxed),
            bytes: lock(&self.ledger).bytes(),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            waiters: self.waiters.load(Ordering::Relaxed),
        }
    }

    /// Makes sure that the sweeper runs, where there is a runtime to run it.
    fn start_sweeper(self: &Arc<Self>) {
        if self.sweeping.load(Ordering::Relaxed) {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        if !self.sweeping.swap(true, Ordering::Relaxed) {
            runtime.spawn(sweep_every_second(Sweeper(Arc::downgrade(self))));
        }
    }
}

impl Open {
    fn wake(&self) {
        if let Some(watchers) = &self.watchers {
            watchers.notify_waiters();
        }
    }
}

/// The store that a sweeping task works for. Dropped with its runtime, it lets the next claim start another.
struct Sweeper(Weak<Inner>);

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
struct Done {
    record: Record,
    free_after: Duration,
}

impl Done {
    fn new(record: Record, now: Timestamp) -> Self {
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
struct FreeExpired;

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

fn unleased(decision: Decision) -> Decision {
    match decision {
        Decision::Execute(mut grant) => {
            grant.lease = None;
            Decision::Execute(grant)
        }
        Decision::Recover(mut grant) => {
            grant.lease = None;
            Decision::Recover(grant)
        }
        other => other,
    }
}

fn size(answer: &Answer) -> u64 {
    u64::try_from(answer.len()).unwrap_or(u64::MAX)
}

#[derive(Debug)]
struct Counted(Arc<AtomicU64>);

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

    async fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Result<Resolved, Error> {
        Ok(self.0.resolve(key, fence, resolution))
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        Ok(self.0.peek(key))
    }

    async fn watch(&self, key: &StorageKey) -> Result<MemoryWatch, Error> {
        Ok(self.0.watch(key))
    }
}

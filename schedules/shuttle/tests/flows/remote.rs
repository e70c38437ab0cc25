//! A store outside of the processes. Other tasks run before and after each operation.

use std::collections::HashMap;
use std::future::{Pending, pending};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use shuttle::future::yield_now;
use shuttle::sync::Mutex;
use tower_idempotency::protocol::{
    Change, Claim, Completion, Decision, Fence, Outcome, Owner, Record, Release, Renewal, Resolution, ResolveResult,
    Snapshot, StorageKey, Transition,
};
use tower_idempotency::{Clock, Error, ErrorKind, Store, Timestamp};

/// A store of records with leases.
#[derive(Clone, Default)]
pub(crate) struct RemoteStore(Arc<Remote>);

#[derive(Default)]
struct Remote {
    records: Mutex<HashMap<StorageKey, Record>>,
    clock: Clock,
    /// The number of operations that have begun and not ended.
    busy: AtomicUsize,
    /// The number of claims that take effect, and whose replies are lost.
    lost_claims: AtomicUsize,
    /// The number of completions that fail, and have no effect.
    failed_completions: AtomicUsize,
    renewals: Mutex<HashMap<StorageKey, usize>>,
}

impl RemoteStore {
    /// Makes a store that loses the replies of its first claims.
    pub(crate) fn losing_claims(count: usize) -> Self {
        let store = Self::default();
        store.0.lost_claims.store(count, Ordering::SeqCst);
        store
    }

    /// Makes a store whose first completions fail.
    pub(crate) fn failing_completions(count: usize) -> Self {
        let store = Self::default();
        store.0.failed_completions.store(count, Ordering::SeqCst);
        store
    }

    pub(crate) fn end_faults(&self) {
        self.0.lost_claims.store(0, Ordering::SeqCst);
        self.0.failed_completions.store(0, Ordering::SeqCst);
    }

    /// Returns how many renewals of a key have begun.
    pub(crate) fn renewals(&self, key: &StorageKey) -> usize {
        self.0.renewals.lock().unwrap().get(key).copied().unwrap_or(0)
    }

    /// Spawns a task that moves the clock until `is_over` is set. The clock stands still during an
    /// operation, so that the store is fast enough for every timeout.
    pub(crate) fn spawn_clock(&self, is_over: &Arc<AtomicBool>) -> tokio::task::JoinHandle<()> {
        let (store, is_over) = (Arc::clone(&self.0), Arc::clone(is_over));
        tokio::spawn(async move {
            while !is_over.load(Ordering::SeqCst) {
                if store.busy.load(Ordering::SeqCst) == 0 {
                    tokio::time::advance_to_next_timer();
                }
                yield_now().await;
            }
        })
    }

    async fn apply<R>(
        &self,
        key: &StorageKey,
        transition: impl FnOnce(Option<&Record>, Timestamp) -> Transition<R>,
    ) -> Result<R, Error> {
        let _busy = Busy::begin(&self.0.busy);
        yield_now().await;
        let reply = {
            let mut records = self.0.records.lock().unwrap();
            let Transition { reply, change } = transition(records.get(key), self.0.clock.now());
            match change {
                Change::Unchanged => {}
                Change::Put(record) => drop(records.insert(*key, record)),
                Change::Remove => drop(records.remove(key)),
            }
            reply
        };
        yield_now().await;
        Ok(reply)
    }
}

/// Fails if a fault is left, and uses it up.
fn fail_if_left(faults: &AtomicUsize) -> Result<(), Error> {
    let one_less = faults.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
    one_less.map_or(Ok(()), |_| {
        Err(Error::new(ErrorKind::StoreUnavailable, "the store failed"))
    })
}

/// An operation that has not ended.
struct Busy<'b>(&'b AtomicUsize);

impl<'b> Busy<'b> {
    fn begin(busy: &'b AtomicUsize) -> Self {
        busy.fetch_add(1, Ordering::SeqCst);
        Self(busy)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Store for RemoteStore {
    type Watch = Pending<()>;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        let claimed = self
            .apply(&claim.key, |record, now| Record::claim(record, claim, now))
            .await;
        fail_if_left(&self.0.lost_claims)?;
        claimed
    }

    async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        if !lease.is_zero() {
            *self.0.renewals.lock().unwrap().entry(*key).or_default() += 1;
        }
        self.apply(key, |record, now| Record::renew(record, owner, lease, now))
            .await
    }

    async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        fail_if_left(&self.0.failed_completions)?;
        self.apply(key, |record, now| {
            Record::complete(record, owner, outcome, retention, now)
        })
        .await
    }

    async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        self.apply(key, |record, now| Record::release(record, owner, now)).await
    }

    async fn resolve(&self, key: &StorageKey, fence: Fence, to: &Resolution) -> Result<ResolveResult, Error> {
        self.apply(key, |record, now| Record::resolve(record, fence, to, now))
            .await
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        let peek = |record: Option<&Record>, now| Transition {
            reply: Record::peek(record, now),
            change: Change::Unchanged,
        };
        self.apply(key, peek).await
    }

    async fn watch(&self, _: &StorageKey) -> Result<Pending<()>, Error> {
        Ok(pending())
    }
}

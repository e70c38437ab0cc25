//! The ends of an attempt, as its owner reports them to the store.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use super::held_lease::HeldLease;
use crate::clock::Stopwatch;
use crate::detach::{Deferred, TaskTracker};
use crate::error::Error;
use crate::protocol::{Completion, Outcome, Owner, Release, Renewal, Snapshot, Status, StorageKey};
#[cfg(feature = "postgres")]
use crate::store::resolve_transaction_late;
use crate::store::{AttemptEnd, Store, StoreRetry, record_end};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::telemetry::{self, Event};

/// Whether an attempt still owned its key when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// The attempt owned the key. This is also assumed if the store did not reply.
    Owned,
    /// Another attempt took the key over.
    Superseded,
}

/// The result of a transaction that completes a record together with an effect.
#[cfg(feature = "postgres")]
pub(crate) enum TransactionEnd {
    /// The transaction was committed, and the record holds this outcome.
    Committed(Outcome),
    /// The transaction was rolled back, and the attempt still owns its key.
    RolledBack,
    /// Another attempt took the key over.
    Superseded,
    /// The store did not reply, so the result is not known yet.
    Undecided(Error),
}

/// The owner of a key. It repeats each operation while the store fails. If the time for repeats
/// ends first, a task without a caller continues, unless the end of the lease has the same effect.
/// The store compares nonce and fence in each operation, so that only the owner changes a claim
/// (I8).
pub(crate) struct KeyOwner<'a, St> {
    pub(crate) store: &'a St,
    pub(crate) key: &'a StorageKey,
    pub(crate) lease: &'a HeldLease,
    pub(crate) retry: StoreRetry,
    pub(crate) tracker: &'a Arc<TaskTracker>,
}

impl<St: Store + Clone> KeyOwner<'_, St> {
    const fn owner(&self) -> Owner {
        self.lease.owner()
    }

    /// Records the outcome. The renewal task renews the lease while this function repeats the write, so that no other
    /// attempt runs meanwhile (I1).
    pub(crate) async fn complete(&self, outcome: &Outcome, retention: Duration) -> Result<Completion, Error> {
        self.lease.set_completing();
        let (since_first, tries) = (Stopwatch::start(), AtomicUsize::new(0));
        let complete = || {
            tries.fetch_add(1, Ordering::Relaxed);
            self.store.complete(self.key, self.owner(), outcome, retention)
        };
        let completion = self.retry.retry(complete).await;
        // An earlier try may have taken effect without a reply, and its record may have expired since.
        // The store then reports `Superseded` although no other attempt took the key over.
        let has_expired =
            || tries.load(Ordering::Relaxed) > 1 && since_first.elapsed() >= retention && self.lease.certainly_lasts();
        if matches!(completion, Ok(Completion::Superseded(None))) && has_expired() {
            return Ok(Completion::Completed);
        }
        // The effect may have happened, so the store must still get the outcome (I6).
        if let Err(error) = &completion {
            self.record_later(error, AttemptEnd::completed(outcome, retention));
        }
        completion
    }

    /// Frees the key, because the attempt had no effect.
    pub(crate) async fn release(&self) -> Ownership {
        self.lease.set_released();
        let release = || self.store.release(self.key, self.owner());
        match self.retry.retry(release).await {
            Ok(Release::Superseded) => self.ended_before().await,
            Ok(_) => Ownership::Owned,
            Err(error) => {
                self.record_later(&error, AttemptEnd::Released);
                telemetry::failure(Event::Unrecorded, &error);
                Ownership::Owned
            }
        }
    }

    /// Returns the ownership of an attempt whose end the store refused. There are two reasons to
    /// refuse the end although no attempt took the key over before it:
    ///
    /// 1. A claim found the lease over, and the outcome of this attempt counts as unknown.
    /// 2. The attempt had ended already: a renewal in flight ended it, or an earlier try took effect
    ///    without a reply. The lease would still last otherwise. If the next attempt has an outcome by
    ///    now, the caller gets that outcome. Otherwise it gets the failure of this attempt at once.
    async fn ended_before(&self) -> Ownership {
        let record = self.retry.retry(|| self.store.peek(self.key)).await;
        let owner = self.owner();
        let is_ours = |record: &Snapshot| (record.nonce, record.fence) == (owner.nonce, owner.fence);
        match record {
            Ok(Some(record)) if is_ours(&record) && record.status == Status::Unknown => Ownership::Owned,
            Ok(Some(record)) if matches!(record.status, Status::Completed(_)) => Ownership::Superseded,
            _ if self.lease.certainly_lasts() => Ownership::Owned,
            _ => Ownership::Superseded,
        }
    }

    /// Ends the lease at once, because it is unknown whether the attempt took effect. The record
    /// stays as evidence of the attempt (I6). If the store fails, the attempt ends when its lease
    /// expires.
    pub(crate) async fn give_up(&self) -> Ownership {
        self.lease.set_given_up();
        let give_up = || self.store.renew(self.key, self.owner(), Duration::ZERO);
        match self.retry.retry(give_up).await {
            Ok(Renewal::Superseded) => self.ended_before().await,
            Ok(Renewal::Renewed) => Ownership::Owned,
            Err(error) => {
                telemetry::failure(Event::Unrecorded, &error);
                Ownership::Owned
            }
        }
    }

    /// Finds out how the transaction that completes the record ended. The handler may not know
    /// this, because a commit may have taken effect although its reply was lost.
    #[cfg(feature = "postgres")]
    pub(crate) async fn transaction_end(&self, lease: Duration) -> TransactionEnd {
        match self.committed_outcome().await {
            Ok(Some(outcome)) => return TransactionEnd::Committed(outcome),
            Ok(None) => {}
            Err(error) => return TransactionEnd::Undecided(error),
        }
        // An open transaction holds a lock on the row of the record, and a renewal waits for this
        // lock. So a renewal that succeeds proves that the transaction was rolled back.
        let owner = self.owner();
        match self.retry.retry(|| self.store.renew(self.key, owner, lease)).await {
            Ok(Renewal::Renewed) => {
                self.lease.transaction.roll_back();
                TransactionEnd::RolledBack
            }
            // The transaction may have been committed while the renewal waited.
            Ok(Renewal::Superseded) => match self.committed_outcome().await {
                Ok(Some(outcome)) => TransactionEnd::Committed(outcome),
                Ok(None) => TransactionEnd::Superseded,
                Err(error) => TransactionEnd::Undecided(error),
            },
            Err(error) => TransactionEnd::Undecided(error),
        }
    }

    /// Returns the outcome of the record, if this attempt has completed it.
    #[cfg(feature = "postgres")]
    async fn committed_outcome(&self) -> Result<Option<Outcome>, Error> {
        let record = self.retry.retry(|| self.store.peek(self.key)).await?;
        // Compare nonce and fence: a resolution by an operator keeps the fence, and may have
        // recorded another outcome.
        let owner = self.owner();
        let ours = record.filter(|record| (record.nonce, record.fence) == (owner.nonce, owner.fence));
        Ok(match ours.map(|record| record.status) {
            Some(Status::Completed(outcome)) => Some(outcome),
            _ => None,
        })
    }

    /// Continues to report the end of the attempt to a store that failed, in a task for which the
    /// caller does not wait.
    fn record_later(&self, error: &Error, end: AttemptEnd) {
        let (store, key, owner, retry) = (self.store.clone(), *self.key, self.owner(), self.retry.deferred());
        self.defer(error, end.bytes(), async move {
            record_end(&store, &key, owner, &end, retry).await;
        });
    }

    /// Continues to find out whether the transaction of the attempt was committed, in a task for
    /// which the caller does not wait. After a rollback the task records `end`. Otherwise the
    /// attempt would count as lost when its lease is over.
    #[cfg(feature = "postgres")]
    pub(crate) fn resolve_later(&self, error: &Error, end: AttemptEnd) {
        // A renewal may wait for the row lock of the transaction, and prolong the lease after the
        // task has recorded the end. If so, `HeldLease::renew` ends the prolonged lease again.
        match end {
            AttemptEnd::Completed(..) => {}
            AttemptEnd::Released => self.lease.set_released(),
            AttemptEnd::GivenUp => self.lease.set_given_up(),
        }
        let (store, key, owner, retry) = (self.store.clone(), *self.key, self.owner(), self.retry.deferred());
        self.defer(error, end.bytes(), async move {
            resolve_transaction_late(&store, &key, owner, &end, retry).await;
        });
    }

    /// Runs a deferred write of `bytes` bytes in a task, if the error is temporary.
    fn defer(&self, error: &Error, bytes: usize, write: impl Future<Output = ()> + Send + 'static) {
        let Ok(runtime) = Handle::try_current() else { return };
        if StoreRetry::repeats(error) {
            self.tracker.spawn_deferred(&runtime, Deferred::RecordEnd(bytes), write);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EngineSettings;
    use crate::protocol::{Decision, Fingerprint, Grant, Nonce};
    use crate::store::MemoryStore;

    const SECOND: Duration = Duration::from_secs(1);
    const KEY: StorageKey = StorageKey::from_bytes([7; 32]);

    async fn claim(store: &MemoryStore) -> Grant {
        let claim = EngineSettings::default().claim(KEY, Fingerprint::NONE, Nonce::random());
        match store.claim(&claim).await.unwrap() {
            Decision::Execute(grant) => grant,
            other => panic!("{other:?}"),
        }
    }

    fn owner<'o>(
        store: &'o MemoryStore,
        lease: &'o HeldLease,
        tracker: &'o Arc<TaskTracker>,
    ) -> KeyOwner<'o, MemoryStore> {
        KeyOwner {
            store,
            key: &KEY,
            lease,
            retry: StoreRetry::new(SECOND, SECOND),
            tracker,
        }
    }

    /// An end without a reply may have taken effect, and a renewal in flight may end the attempt, too.
    /// The next attempt then owns the key before the owner's own end arrives.
    #[tokio::test(start_paused = true)]
    async fn a_repeated_end_is_a_takeover_only_if_the_lease_may_have_ended() {
        for (past, is_release, expected) in [
            (1, true, Ownership::Owned),
            (1, false, Ownership::Owned),
            (3, true, Ownership::Superseded),
            (3, false, Ownership::Superseded),
        ] {
            let (store, tracker) = (MemoryStore::new(), Arc::default());
            // Leases of the memory store have no end, so give this one an end.
            let grant = Grant {
                lease: Some(2 * SECOND),
                ..claim(&store).await
            };
            let lease = HeldLease::new(grant, Stopwatch::start);
            store.release(&KEY, lease.owner()).await.unwrap();
            claim(&store).await;
            tokio::time::advance(past * SECOND).await;
            let owner = owner(&store, &lease, &tracker);
            let ownership = if is_release {
                owner.release().await
            } else {
                owner.give_up().await
            };
            assert_eq!(ownership, expected, "{past} {is_release}");
        }
    }

    /// A renewal may still wait for the row lock of the transaction. It must see that the attempt has
    /// ended, because otherwise it would prolong the lease after the end is recorded.
    #[cfg(feature = "postgres")]
    #[tokio::test]
    async fn a_renewal_in_flight_learns_that_the_end_is_recorded_later() {
        let outcome = Outcome::Stored(crate::protocol::StoredResponse::default());
        for (end, is_given_up) in [
            (AttemptEnd::completed(&outcome, SECOND), false),
            (AttemptEnd::Released, true),
            (AttemptEnd::GivenUp, true),
        ] {
            let lease = HeldLease::of_first_attempt(SECOND);
            let down = Error::new(crate::error::ErrorKind::StoreUnavailable, "down");
            owner(&MemoryStore::new(), &lease, &Arc::default()).resolve_later(&down, end);
            assert_eq!(lease.is_given_up(), is_given_up);
        }
    }

    /// A resolution keeps the fence. The outcome that it recorded is not that of the transaction.
    #[cfg(feature = "postgres")]
    #[tokio::test]
    async fn the_outcome_of_a_resolution_is_not_taken_for_that_of_a_transaction() {
        let (store, tracker) = (MemoryStore::new(), Arc::default());
        let lease = HeldLease::new(claim(&store).await, Stopwatch::start);
        store.renew(&KEY, lease.owner(), Duration::ZERO).await.unwrap();
        let resolution = crate::protocol::Resolution::Completed(Outcome::Tombstone, SECOND);
        store.resolve(&KEY, lease.owner().fence, &resolution).await.unwrap();
        let end = owner(&store, &lease, &tracker).transaction_end(SECOND).await;
        assert!(matches!(end, TransactionEnd::Superseded));
    }

    #[cfg(feature = "postgres")]
    #[tokio::test]
    async fn an_owner_whose_transaction_was_rolled_back_renews_its_lease_again() {
        let (store, tracker) = (MemoryStore::new(), Arc::default());
        let lease = HeldLease::new(claim(&store).await, Stopwatch::start);
        lease.transaction.begin();
        lease.transaction.succeed();
        let end = owner(&store, &lease, &tracker).transaction_end(SECOND).await;
        assert!(matches!(end, TransactionEnd::RolledBack));
        assert!(!lease.transaction.is_completed());
    }
}

//! The ends of an attempt, as its owner reports them to the store.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::detach::{Deferred, TaskTracker};
use crate::error::Error;
use crate::protocol::{Completion, Outcome, Owner, Release, Renewal, StorageKey};
#[cfg(feature = "postgres")]
use crate::store::resolve_transaction_late;
use crate::store::{record_end, AttemptEnd, Store, StoreRetry};
use crate::telemetry::{self, Event};

/// Whether an attempt still owned its key when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// The attempt owned the key. If the store did not answer, nobody knows better.
    Held,
    /// Another attempt took the key over.
    Superseded,
}

/// The owner of a key. Repeats each operation while the store fails. If the store still fails after that, a task without a
/// caller continues, unless the end of the lease has the same effect.
pub(crate) struct KeyOwner<'a, St> {
    pub(crate) store: &'a St,
    pub(crate) key: &'a StorageKey,
    pub(crate) owner: Owner,
    pub(crate) retry: StoreRetry,
    pub(crate) tracker: &'a Arc<TaskTracker>,
}

impl<St: Store + Clone> KeyOwner<'_, St> {
    /// Records the outcome.
    pub(crate) async fn complete(&self, outcome: &Outcome, retention: Duration) -> Result<Completion, Error> {
        let complete = || self.store.complete(self.key, self.owner, outcome, retention);
        let completion = self.retry.retry(complete).await;
        if let Err(error) = &completion {
            self.record_later(error, AttemptEnd::completed(outcome, retention));
        }
        completion
    }

    /// Frees the key, because the attempt had no effect.
    pub(crate) async fn release(&self) -> Ownership {
        match self.retry.retry(|| self.store.release(self.key, self.owner)).await {
            Ok(Release::Superseded) => Ownership::Superseded,
            Ok(_) => Ownership::Held,
            Err(error) => {
                self.record_later(&error, AttemptEnd::Released);
                telemetry::failure(Event::Unrecorded, &error);
                Ownership::Held
            }
        }
    }

    /// Ends the lease at once and keeps the evidence of the attempt, because nobody knows whether it took effect. If the store
    /// fails, the lease ends the attempt a little later.
    pub(crate) async fn give_up(&self) -> Ownership {
        let give_up = || self.store.renew(self.key, self.owner, Duration::ZERO);
        match self.retry.retry(give_up).await {
            Ok(Renewal::Superseded) => Ownership::Superseded,
            Ok(Renewal::Renewed) => Ownership::Held,
            Err(error) => {
                telemetry::failure(Event::Unrecorded, &error);
                Ownership::Held
            }
        }
    }

    /// Continues to report the end of the attempt to a store that failed, in a task for which the caller does not wait.
    fn record_later(&self, error: &Error, end: AttemptEnd) {
        let Ok(runtime) = Handle::try_current() else { return };
        if StoreRetry::repeats(error) {
            let (store, key, owner, retry) = (self.store.clone(), *self.key, self.owner, self.retry.deferred());
            self.tracker
                .spawn_deferred(&runtime, Deferred::RecordEnd(end.bytes()), async move {
                    record_end(&store, &key, owner, &end, retry).await;
                });
        }
    }

    /// Continues to ask a store that failed whether the transaction of the attempt was committed, in a task for which the caller
    /// does not wait. After a rollback the task records `end`; otherwise the attempt would count as lost when its lease is over.
    #[cfg(feature = "postgres")]
    pub(crate) fn resolve_later(&self, error: &Error, end: AttemptEnd) {
        let Ok(runtime) = Handle::try_current() else { return };
        if StoreRetry::repeats(error) {
            let (store, key, owner, retry) = (self.store.clone(), *self.key, self.owner, self.retry.deferred());
            self.tracker
                .spawn_deferred(&runtime, Deferred::RecordEnd(end.bytes()), async move {
                    resolve_transaction_late(&store, &key, owner, &end, retry).await;
                });
        }
    }
}

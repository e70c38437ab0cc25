//! Deferred writes: the writes that this process still owes a store once the store is reachable
//! again, after the caller has its response.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::runtime::Handle;

#[cfg(feature = "postgres")]
use super::with_timeout;
use super::{Store, StoreRetry};
#[cfg(feature = "postgres")]
use crate::clock::{Deadline, Stopwatch, sleep};
use crate::detach::{Deferred, TaskTracker};
use crate::error::Error;
#[cfg(feature = "postgres")]
use crate::protocol::Renewal;
use crate::protocol::{Claim, Completion, Decision, Outcome, Owner, Release, Snapshot, Status, StorageKey};
use crate::telemetry::{self, Event};

/// The error while [too many claims](TaskTracker::has_many_lost_claims) are waiting for a reply.
pub(crate) const MANY_LOST_CLAIMS: Error = Error::store_unavailable(
    "too many claims got no reply from the idempotency store, so no more are sent until it replies",
);

/// A claim that got no reply. The store may have granted it, or may still grant it. So later claims
/// use the same nonce: whichever of them the store grants, it is one grant.
///
/// When this is dropped, a spawned task releases the key if the store granted it to this claim.
pub(crate) struct LostClaim {
    claim: Claim,
    /// The operation that releases the key, and its runtime. `None` once the grant has an owner, or
    /// outside of a runtime.
    release: Option<(Handle, BoxFuture<'static, ()>)>,
    tracker: Arc<TaskTracker>,
}

impl LostClaim {
    /// Records a lost claim. `release` releases the key if the store granted it to `claim`; see
    /// [`release_lost_claim`].
    pub(crate) fn new(
        claim: Claim,
        tracker: &Arc<TaskTracker>,
        release: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let runtime = Handle::try_current().ok();
        Self {
            claim,
            release: runtime.map(|runtime| (runtime, Box::pin(release) as BoxFuture<'static, ()>)),
            tracker: Arc::clone(tracker),
        }
    }

    pub(crate) const fn claim(&self) -> &Claim {
        &self.claim
    }

    /// Records that a later claim with the same nonce was granted, so that the key has an owner.
    pub(crate) fn granted(mut self) {
        self.release = None;
    }
}

impl Drop for LostClaim {
    fn drop(&mut self) {
        if let Some((runtime, release)) = self.release.take() {
            self.tracker.spawn_deferred(&runtime, Deferred::ReleaseClaim, release);
        }
    }
}

/// The end of an attempt.
pub(crate) enum AttemptEnd {
    /// The attempt has an outcome, which is stored for this retention.
    Completed(Outcome, Duration),
    /// The attempt had no effect. Its key becomes free.
    Released,
    /// It is unknown whether the attempt took effect. Its lease ends at once.
    #[cfg(feature = "postgres")]
    GivenUp,
}

impl AttemptEnd {
    /// Makes the end of an attempt with this outcome. Holds an exact copy of the bytes, because the
    /// tracker counts them while they wait for the store.
    pub(crate) fn completed(outcome: &Outcome, retention: Duration) -> Self {
        Self::Completed(outcome.to_exact(), retention)
    }

    /// Returns the size of the response in bytes.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Completed(Outcome::Stored(response), _) => response.head.len() + response.body.len(),
            Self::Completed(Outcome::Rejected | Outcome::Tombstone, _) | Self::Released => 0,
            #[cfg(feature = "postgres")]
            Self::GivenUp => 0,
        }
    }

    /// Records the end. Returns false if the owner has lost the key.
    async fn record<St: Store>(&self, store: &St, key: &StorageKey, owner: Owner) -> Result<bool, Error> {
        Ok(match self {
            Self::Completed(outcome, retention) => {
                let completion = store.complete(key, owner, outcome, *retention).await?;
                completion == Completion::Completed
            }
            Self::Released => store.release(key, owner).await? != Release::Superseded,
            #[cfg(feature = "postgres")]
            Self::GivenUp => store.renew(key, owner, Duration::ZERO).await? != Renewal::Superseded,
        })
    }
}

/// Records the end of an attempt, which would otherwise count as lost. Changes nothing after a
/// takeover.
pub(crate) async fn record_end<St: Store>(
    store: &St,
    key: &StorageKey,
    owner: Owner,
    end: &AttemptEnd,
    store_retry: StoreRetry,
) {
    let recorded = store_retry.retry(|| end.record(store, key, owner));
    match recorded.await {
        Ok(true) => telemetry::event(Event::OutcomeRecordedLate),
        Ok(false) => telemetry::event(Event::Superseded),
        Err(error) => telemetry::failure(Event::Unrecorded, &error),
    }
}

/// Ends an attempt after a transaction with an unknown result, as soon as the store can be reached.
/// `end` is the end after a rollback. The operation waits for the lock that an open transaction
/// holds on the record, and changes nothing after a commit. If the store does not reply in time,
/// the lease ends the attempt.
#[cfg(feature = "postgres")]
pub(crate) async fn resolve_transaction_late<St: Store>(
    store: &St,
    key: &StorageKey,
    owner: Owner,
    end: &AttemptEnd,
    store_retry: StoreRetry,
) {
    // While the transaction is open, each query waits for its lock and occupies a connection of the
    // pool, so back off.
    const LONGEST_PAUSE: Duration = Duration::from_secs(5);
    const LONGEST_PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(1);
    let at_once = Duration::from_millis(250).min(store_retry.operation / 2);
    let mut pause = Duration::from_millis(100);
    // The loop runs at least once.
    let deadline = Deadline::after(store_retry.in_all.max(pause));
    while !deadline.left().is_zero() {
        sleep(pause.min(deadline.left())).await;
        let started = Stopwatch::start();
        let ended = with_timeout(store_retry.operation, end.record(store, key, owner)).await;
        // After an immediate failure, try again within a second, to notice the store's return
        // before the lease ends.
        let longest = match started.elapsed() < at_once {
            true => LONGEST_PAUSE_AFTER_FAILURE,
            false => LONGEST_PAUSE,
        };
        pause = longest.min(pause * 2);
        match ended {
            Ok(_) => return telemetry::event(Event::TransactionResolvedLate),
            Err(error) if StoreRetry::repeats(&error) => {}
            Err(error) => return telemetry::failure(Event::Unrecorded, &error),
        }
    }
}

/// Releases a claim that may have been granted and that no attempt uses. Otherwise the claim would
/// occupy the key for a whole lease, and the key would then count as lost.
pub(crate) async fn release_lost_claim<St: Store>(store: &St, claim: &Claim, store_retry: StoreRetry) {
    match store_retry.retry(|| release_if_granted(store, claim)).await {
        Ok(true) => telemetry::event(Event::ClaimReleasedLate),
        Ok(false) => {}
        Err(error) => telemetry::failure(Event::Unrecorded, &error),
    }
}

/// Releases the key if the store granted it to this claim. Returns whether it did.
async fn release_if_granted<St: Store>(store: &St, claim: &Claim) -> Result<bool, Error> {
    let owner = match store.peek(&claim.key).await? {
        Some(Snapshot {
            status: Status::Completed(_),
            ..
        }) => return Ok(false),
        Some(Snapshot { nonce, fence, .. }) if nonce == claim.nonce => Owner { nonce, fence },
        // Another owner holds the record. A claim would use up one of its attempts.
        Some(_) => return Ok(false),
        // Our claim may still be in flight; repeating it returns the same grant. If it arrives even
        // later, its lease expires.
        None => match store.claim(claim).await? {
            Decision::Execute(grant) | Decision::Recover(grant) => grant.owner,
            _ => return Ok(false),
        },
    };
    store.release(&claim.key, owner).await?;
    Ok(true)
}

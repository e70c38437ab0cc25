//! The claim of a key. A claim that fails is repeated once.

use std::sync::Arc;
use std::time::Duration;

use super::settings::EngineSettings;
use crate::clock::Deadline;
use crate::detach::TaskTracker;
use crate::error::{Error, ErrorKind};
use crate::protocol::{Claim, Decision};
use crate::store::{LostClaim, Store, claim_with_timeout, limit_in_wait, release_lost_claim};
use crate::telemetry::{self, Event};

/// A claim without a decision of the store.
pub(crate) enum ClaimError {
    /// The wait of the request ended before the store replied. This says nothing about the store.
    TimeUp,
    Failed(Error),
}

/// Claims keys for one request. `wait` is the deadline of its wait, if it has waited before.
pub(crate) struct Claimer<'a, St> {
    pub(crate) store: &'a St,
    pub(crate) settings: &'a EngineSettings,
    pub(crate) tracker: &'a Arc<TaskTracker>,
    pub(crate) wait: Option<Deadline>,
}

impl<St: Store + Clone> Claimer<'_, St> {
    /// Returns how long the next claim may take. A claim that follows a wait must end by the deadline of that wait.
    pub(crate) fn limit(&self) -> Duration {
        let timeout = self.settings.store_timeout;
        self.wait.map_or(timeout, |wait| limit_in_wait(timeout, wait))
    }

    fn is_wait_over(&self) -> bool {
        self.wait.is_some_and(|wait| wait.left().is_zero())
    }

    /// Repeats a claim that failed with `error`. Repeats it once, with the same nonce, so that the
    /// store makes at most one grant for both claims (I1).
    ///
    /// A claim that got no reply is put into `lost`, because the store may still grant it. It stays
    /// there after a decision and after [`ClaimError::TimeUp`]. The owner of `lost` takes it out when
    /// a later claim is granted; otherwise dropping it releases the key. After
    /// [`ClaimError::Failed`], `lost` is empty, because the release of the key has begun.
    pub(crate) async fn again(
        &self,
        claim: &Claim,
        error: Error,
        lost: &mut Option<Box<LostClaim>>,
    ) -> Result<Decision, ClaimError> {
        // If the claim fails for good, begin the release before other requests for this key
        // continue.
        let failed = |error, lost: &mut Option<_>| {
            *lost = None;
            Err(ClaimError::Failed(error))
        };
        if error.kind() != ErrorKind::StoreUnavailable {
            return failed(error, lost);
        }
        telemetry::failure(Event::ClaimRepeated, &error);
        lost.get_or_insert_with(|| self.lost(claim.clone()));
        if self.is_wait_over() {
            return Err(ClaimError::TimeUp);
        }
        match claim_with_timeout(self.limit(), self.store, claim).await {
            Ok(decision) => Ok(decision),
            Err(error) if error.kind() == ErrorKind::StoreUnavailable && self.is_wait_over() => Err(ClaimError::TimeUp),
            Err(error) => failed(error, lost),
        }
    }

    fn lost(&self, claim: Claim) -> Box<LostClaim> {
        let (store, retry) = (self.store.clone(), self.settings.retry().deferred());
        let release = {
            let claim = claim.clone();
            async move { release_lost_claim(&store, &claim, retry).await }
        };
        Box::new(LostClaim::new(claim, self.tracker, release))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Fingerprint, Nonce, StorageKey};
    use crate::store::MemoryStore;

    fn misconfigured() -> Error {
        Error::new(ErrorKind::Configuration, "the table does not exist")
    }

    /// A lost claim stayed claimed until its request had ended, if the claim after it failed for good.
    #[tokio::test]
    async fn a_claim_that_fails_for_good_begins_the_release_of_a_lost_claim() {
        let (store, settings, tracker) = (MemoryStore::new(), EngineSettings::default(), Arc::default());
        let claimer = Claimer {
            store: &store,
            settings: &settings,
            tracker: &tracker,
            wait: None,
        };
        let key = StorageKey::from_bytes([7; 32]);
        let claim = settings.claim(key, Fingerprint::NONE, Nonce::random());
        // The store grants the lost claim.
        assert!(store.claim(&claim).await.is_ok());
        let mut lost = Some(claimer.lost(claim.clone()));
        let failed = claimer.again(&claim, misconfigured(), &mut lost).await;
        assert!(matches!(failed, Err(ClaimError::Failed(_))));
        assert!(lost.is_none());
        while tracker.running() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(store.peek(&key).await.unwrap().is_none());
    }
}

//! The claim of a key. A claim that fails is repeated once.

use std::sync::Arc;
use std::time::Duration;

use super::settings::EngineSettings;
use crate::clock::Deadline;
use crate::detach::TaskTracker;
use crate::error::{Error, ErrorKind};
use crate::protocol::{Claim, Decision};
use crate::store::{claim_with_timeout, limit_in_wait, release_lost_claim, LostClaim, Store};
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
    /// Returns how long the next claim may take. After a wait, the claim must not outlast the wait.
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
    /// A claim that got no reply stays in `lost`, because the store may still grant it. The owner
    /// of `lost` takes it out when a later claim is granted; otherwise dropping it releases the
    /// key.
    pub(crate) async fn again(
        &self,
        claim: &Claim,
        error: Error,
        lost: &mut Option<Box<LostClaim>>,
    ) -> Result<Decision, ClaimError> {
        if error.kind() != ErrorKind::StoreUnavailable {
            return Err(ClaimError::Failed(error));
        }
        telemetry::failure(Event::ClaimRepeated, &error);
        lost.get_or_insert_with(|| self.lost(claim.clone()));
        if self.is_wait_over() {
            return Err(ClaimError::TimeUp);
        }
        match claim_with_timeout(self.limit(), self.store, claim).await {
            Ok(decision) => Ok(decision),
            Err(error) if error.kind() == ErrorKind::StoreUnavailable && self.is_wait_over() => Err(ClaimError::TimeUp),
            Err(error) => {
                // Begin the release before other requests for this key continue.
                *lost = None;
                Err(ClaimError::Failed(error))
            }
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

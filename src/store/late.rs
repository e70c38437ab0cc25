//! What a store that was away is told when it is back, and nobody waits for.

use std::time::Duration;

use super::{Patience, Store};
use crate::error::Error;
use crate::protocol::{Claim, Completion, Decision, Outcome, Owner, Release, Snapshot, Status, StorageKey};
use crate::telemetry::{self, Event};

/// How an attempt ended.
pub(crate) enum End {
    /// With an outcome, which is kept for so long.
    Completed(Outcome, Duration),
    Released,
}

impl End {
    /// Makes the end of an attempt with this outcome. Holds an exact copy of the bytes, because the tracker counts them
    /// while they wait for the store.
    pub(crate) fn completed(outcome: &Outcome, retention: Duration) -> Self {
        Self::Completed(outcome.to_exact(), retention)
    }

    /// What it takes of memory.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Completed(Outcome::Kept(answer), _) => answer.head.len() + answer.body.len(),
            Self::Completed(Outcome::Tombstone, _) | Self::Released => 0,
        }
    }
}

/// Tells how an attempt ended, which would else count as lost. Whoever took the key over since is not disturbed.
pub(crate) async fn end_late<St: Store>(store: &St, key: &StorageKey, owner: Owner, end: &End, patience: Patience) {
    let told = patience.persist(|| async {
        Ok(match end {
            End::Completed(outcome, retention) => {
                let completion = store.complete(key, owner, outcome, *retention).await?;
                completion == Completion::Completed
            }
            End::Released => store.release(key, owner).await? != Release::Superseded,
        })
    });
    match told.await {
        Ok(true) => telemetry::event(Event::RecordedBehind),
        Ok(false) => telemetry::event(Event::Superseded),
        Err(error) => telemetry::failure(Event::Unrecorded, &error),
    }
}

/// Ends a claim of unknown fate, on which nothing was built: it would hold the key for a lease, or make it count as lost.
pub(crate) async fn release_late<St: Store>(store: &St, claim: &Claim, patience: Patience) {
    match patience.persist(|| release_if_granted(store, claim)).await {
        Ok(true) => telemetry::event(Event::ReleasedBehind),
        Ok(false) => {}
        Err(error) => telemetry::failure(Event::Unrecorded, &error),
    }
}

async fn release_if_granted<St: Store>(store: &St, claim: &Claim) -> Result<bool, Error> {
    let owner = match store.peek(&claim.key).await? {
        Some(Snapshot {
            status: Status::Completed(_),
            ..
        }) => return Ok(false),
        Some(Snapshot { nonce, fence, .. }) if nonce == claim.nonce => Owner { nonce, fence },
        // It is another's, of whose attempts none is to be used up.
        Some(_) => return Ok(false),
        // It may be arriving now: then both are one grant. One that arrives after this is ended by its lease.
        None => match store.claim(claim).await? {
            Decision::Execute(grant) | Decision::Recover(grant) => grant.owner,
            _ => return Ok(false),
        },
    };
    store.release(&claim.key, owner).await?;
    Ok(true)
}

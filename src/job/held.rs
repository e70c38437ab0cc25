//! A key whose attempt is under way.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Duration;

use futures::FutureExt;
use tokio::task::JoinHandle;

use super::attempt::Attempt;
use super::engine::Job;
use crate::clock::sleep;
use crate::protocol::{Owner, Renewal};
use crate::store::{in_time, Store};
use crate::telemetry::{self, Event};

/// Has the lease of a key renewed, at a third of it. Dropped before its [`end`](Self::end), by a runtime that ends, it gives the lease
/// up where the store can do so at once: a store in this process knows no other end of a lease.
pub(super) struct Held<'j, St: Store> {
    job: &'j Job<St>,
    owner: Option<Owner>,
    renewal: Option<JoinHandle<()>>,
}

impl<'j, St: Store + Clone> Held<'j, St> {
    pub(super) fn begin(job: &'j Job<St>, attempt: &Attempt) -> Self {
        let grant = attempt.grant();
        let renewal = grant.lease.map(|lease| {
            // One that hangs leaves time for another, a third later, before the lease is over.
            let timeout = job.terms.store_timeout.min(lease / 6);
            // In a task of its own: a call that blocks its thread does not lose its lease.
            let renewal = tokio::spawn(renew(job.store.clone(), attempt.clone(), lease, timeout));
            // The task that was spawned last waits in a slot of this very thread, from which no other thread takes it, and the call
            // may block the thread now. So it is not to be the last.
            drop(tokio::spawn(async {}));
            renewal
        });
        Self {
            job,
            owner: Some(grant.owner),
            renewal,
        }
    }
}

impl<St: Store> Held<'_, St> {
    /// For the time in which its end is written.
    pub(super) fn stop_renewing(&mut self) {
        if let Some(task) = self.renewal.take() {
            task.abort();
        }
    }

    /// The attempt has had its end.
    pub(super) fn end(mut self) {
        self.owner = None;
    }
}

impl<St: Store> Drop for Held<'_, St> {
    fn drop(&mut self) {
        self.stop_renewing();
        if let Some(owner) = self.owner {
            let job = self.job;
            // The code of a store may panic where its runtime has gone. Without it the lease ends by itself.
            drop(catch_unwind(AssertUnwindSafe(|| {
                telemetry::event(Event::Abandoned);
                drop(job.store.renew(&job.key, owner, Duration::ZERO).now_or_never());
            })));
        }
    }
}

async fn renew<St: Store>(store: St, attempt: Attempt, lease: Duration, timeout: Duration) {
    let owner = attempt.grant().owner;
    while attempt.is_held() {
        sleep(lease / 3).await;
        // A completed record is locked until its transaction ends, which keeps others out.
        if attempt.is_completed() {
            continue;
        }
        match in_time(timeout, store.renew(attempt.key(), owner, lease)).await {
            Ok(Renewal::Renewed) => {}
            // Or it waited for the very transaction that completes the record.
            Ok(Renewal::Superseded) if attempt.is_completed() => {}
            Ok(Renewal::Superseded) => attempt.lose(),
            Err(error) => telemetry::failure(Event::RenewalFailed, &error),
        }
    }
}

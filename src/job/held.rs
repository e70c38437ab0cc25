//! A key whose attempt is under way.

use std::future::Future;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Duration;

use futures::FutureExt;
use tokio::task::JoinHandle;

use super::attempt::Attempt;
use super::engine::Job;
use crate::protocol::{Owner, Renewal};
use crate::store::{in_time, Store};
use crate::telemetry::{self, Event};

/// Renews the lease of a key, at a third of it. Dropped before its [`end`](Self::end), by a runtime that ends, it gives the lease up
/// where the store can do so at once: a store in this process knows no other end of a lease.
pub(super) struct Held<'j, St: Store> {
    job: &'j Job<St>,
    owner: Option<Owner>,
    renewal: Option<JoinHandle<()>>,
}

impl<'j, St: Store + Clone> Held<'j, St> {
    pub(super) fn begin(job: &'j Job<St>, attempt: &Attempt) -> Self {
        let grant = attempt.grant();
        Self {
            job,
            owner: Some(grant.owner),
            // In a task of its own: a call that blocks its thread does not lose its lease.
            renewal: grant.lease.map(|lease| tokio::spawn(renew(job, attempt, lease))),
        }
    }
}

impl<St: Store> Held<'_, St> {
    /// Nobody is to stay in possession of the key for longer than what is being written about it may take.
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

/// Renews a lease until it is lost.
fn renew<St: Store + Clone>(
    job: &Job<St>,
    attempt: &Attempt,
    lease: Duration,
) -> impl Future<Output = ()> + Send + use<St> {
    let (store, key, owner, attempt) = (job.store.clone(), job.key, attempt.grant().owner, attempt.clone());
    // One that hangs leaves time for another, a third later, before the lease is over.
    let timeout = job.terms.store_timeout.min(lease / 6);
    async move {
        loop {
            tokio::time::sleep(lease / 3).await;
            // The record is locked until the transaction ends, which keeps others out.
            #[cfg(feature = "postgres")]
            if attempt.is_completed() {
                continue;
            }
            match in_time(timeout, store.renew(&key, owner, lease)).await {
                Ok(Renewal::Renewed) => {}
                Ok(Renewal::Superseded) => {
                    // It waited for the very transaction that completes the record.
                    #[cfg(feature = "postgres")]
                    if attempt.is_completed() {
                        return;
                    }
                    return attempt.lose();
                }
                Err(error) => telemetry::failure(Event::RenewalFailed, &error),
            }
        }
    }
}

//! A key whose attempt is under way.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::FutureExt;

use super::attempt::Attempt;
use super::engine::Job;
use super::renewals::Renewed;
use crate::protocol::{Owner, Renewal, StorageKey};
use crate::store::{in_time, Store};
use crate::telemetry::{self, Event};

/// Has the lease of a key renewed. Dropped before its [`end`](Self::end), by a runtime that ends, it gives the lease up where the
/// store can do so at once: a store in this process knows no other end of a lease.
pub(super) struct Held<'j, St: Store> {
    job: &'j Job<St>,
    owner: Option<Owner>,
    renewed: Option<Renewed>,
}

impl<'j, St: Store + Clone> Held<'j, St> {
    pub(super) fn begin(job: &'j Job<St>, attempt: &Attempt) -> Self {
        let grant = attempt.grant();
        let renewed = grant.lease.map(|lease| {
            let (store, key, attempt) = (job.store.clone(), job.key, attempt.clone());
            // One that hangs leaves time for another, a third later, before the lease is over.
            let timeout = job.terms.store_timeout.min(lease / 6);
            let renew = move || renew(store.clone(), key, attempt.clone(), lease, timeout);
            job.terms.renewals.renew(lease, renew)
        });
        Self {
            job,
            owner: Some(grant.owner),
            renewed,
        }
    }
}

impl<St: Store> Held<'_, St> {
    /// For the time in which its end is written.
    pub(super) fn stop_renewing(&mut self) {
        self.renewed = None;
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

fn renew<St: Store>(
    store: St,
    key: StorageKey,
    attempt: Attempt,
    lease: Duration,
    timeout: Duration,
) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        // A completed record is locked until its transaction ends, which keeps others out.
        if !attempt.is_held() || attempt.is_completed() {
            return;
        }
        match in_time(timeout, store.renew(&key, attempt.grant().owner, lease)).await {
            Ok(Renewal::Renewed) => {}
            // Or it waited for the very transaction that completes the record.
            Ok(Renewal::Superseded) if attempt.is_completed() => {}
            Ok(Renewal::Superseded) => attempt.lose(),
            Err(error) => telemetry::failure(Event::RenewalFailed, &error),
        }
    })
}

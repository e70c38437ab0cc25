//! The guard of a lease while its attempt runs.

use std::future::Future;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::pin::pin;
use std::time::Duration;

use futures::future::poll_fn;
use futures::FutureExt;
use tokio::runtime::{Handle, Id};
use tokio::task::{JoinHandle, JoinSet};

use super::attempt::Attempt;
use crate::clock::sleep;
use crate::detach::spawn_apart;
use crate::protocol::{Owner, Renewal};
use crate::store::{with_timeout, Store};
use crate::telemetry::{self, Event};

/// Renews the lease of a key until the attempt [ends](Self::end), so that no other attempt runs
/// meanwhile (I1). A runtime that shuts down may drop the guard before the end. The guard then
/// gives the lease up, provided that the store can do so without waiting. In an in-process store,
/// this is the only way in which the lease ends.
///
/// A task renews the lease, so that a call that blocks its thread does not lose the lease. The
/// owner renews the lease as well if it is polled while the task is late. The task is late if its
/// runtime has ended, or if the owner keeps the runtime so busy that the runtime serves no timers.
pub(super) struct LeaseGuard<'j, St: Store> {
    store: &'j St,
    store_timeout: Duration,
    attempt: Attempt,
    owner: Option<Owner>,
    renewing: Option<Renewing>,
}

/// The tasks that renew the lease.
struct Renewing {
    task: JoinHandle<()>,
    /// The runtime of the task.
    runtime: Id,
    /// The last renewal that the owner began by itself.
    by_owner: Option<JoinHandle<()>>,
}

impl<'j, St: Store + Clone> LeaseGuard<'j, St> {
    /// Starts to renew the lease of an attempt, if the lease has an end.
    pub(super) fn begin(store: &'j St, store_timeout: Duration, attempt: &Attempt) -> Self {
        let mut guard = Self {
            store,
            store_timeout,
            attempt: attempt.clone(),
            owner: Some(attempt.grant().owner),
            renewing: None,
        };
        if attempt.schedule().is_some() {
            guard.start_renewing();
        }
        guard
    }

    /// Starts a renewal task on the current runtime, in place of the old one.
    fn start_renewing(&mut self) {
        let Ok(runtime) = Handle::try_current() else { return };
        let task = spawn_apart(&runtime, renew_when_due(self.renewer()));
        let old = self.renewing.replace(Renewing {
            task,
            runtime: runtime.id(),
            by_owner: None,
        });
        if let Some(old) = old {
            old.abort();
        }
    }

    fn renewer(&self) -> Renewer<St> {
        Renewer {
            store: self.store.clone(),
            attempt: self.attempt.clone(),
            store_timeout: self.store_timeout,
        }
    }

    /// Polls the owner's work, and renews the lease if it is overdue at a poll.
    pub(super) async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        poll_fn(|cx| {
            self.look_after_lease();
            work.as_mut().poll(cx)
        })
        .await
    }

    /// Starts a new renewal task if the old one has ended or belongs to another runtime. Begins a
    /// renewal if one is overdue.
    fn look_after_lease(&mut self) {
        let (Some(renewing), Some(schedule)) = (&self.renewing, self.attempt.schedule()) else {
            return;
        };
        let Ok(runtime) = Handle::try_current() else { return };
        if renewing.runtime != runtime.id() || renewing.task.is_finished() && self.attempt.is_held() {
            self.start_renewing();
        } else if !self.attempt.is_completed() && schedule.take_overdue() {
            let renewal = spawn_apart(&runtime, self.renewer().renew());
            if let Some(renewing) = &mut self.renewing {
                if let Some(old) = renewing.by_owner.replace(renewal) {
                    old.abort();
                }
            }
        }
    }
}

impl<St: Store> LeaseGuard<'_, St> {
    /// Stops renewing the lease. Call this before the key is released, before the lease is given
    /// up, and before the result of a transaction is looked up.
    pub(super) fn stop_renewing(&mut self) {
        if let Some(renewing) = self.renewing.take() {
            renewing.abort();
        }
    }

    /// Drops the guard without giving the lease up, because the end of the attempt has been
    /// written.
    pub(super) fn end(mut self) {
        self.owner = None;
    }
}

impl Renewing {
    fn abort(self) {
        self.task.abort();
        if let Some(renewal) = self.by_owner {
            renewal.abort();
        }
    }
}

impl<St: Store> Drop for LeaseGuard<'_, St> {
    fn drop(&mut self) {
        self.stop_renewing();
        if let Some(owner) = self.owner {
            // The code of a store may panic after its runtime has ended. If it does, the lease
            // expires by itself.
            drop(catch_unwind(AssertUnwindSafe(|| {
                telemetry::event(Event::Abandoned);
                drop(
                    self.store
                        .renew(self.attempt.key(), owner, Duration::ZERO)
                        .now_or_never(),
                );
            })));
        }
    }
}

/// Renews one lease.
#[derive(Clone)]
struct Renewer<St> {
    store: St,
    attempt: Attempt,
    store_timeout: Duration,
}

impl<St: Store> Renewer<St> {
    /// Renews the lease once. Marks the attempt as lost if another attempt took the key over.
    async fn renew(self) {
        let Some(schedule) = self.attempt.schedule() else {
            return;
        };
        let (key, owner, lease) = (self.attempt.key(), self.attempt.grant().owner, schedule.lease());
        // A renewal that hangs must leave time for another one before the lease ends.
        let timeout = self.store_timeout.min(lease / 6);
        match with_timeout(timeout, self.store.renew(key, owner, lease)).await {
            Ok(Renewal::Renewed) => {}
            // The renewal waited for the transaction that completes the record. The attempt is not
            // lost.
            Ok(Renewal::Superseded) if self.attempt.is_completed() => {}
            Ok(Renewal::Superseded) => self.attempt.lose(),
            Err(error) => {
                schedule.repeat();
                telemetry::failure(Event::RenewalFailed, &error);
            }
        }
    }
}

/// Begins each renewal in its own task, so that a store that panics or hangs stops only one
/// renewal. Dropping this future aborts these tasks.
async fn renew_when_due<St: Store + Clone>(renewer: Renewer<St>) {
    let Some(schedule) = renewer.attempt.schedule() else {
        return;
    };
    // Look four times in each period, because a renewal that failed is due again at once.
    let pause = schedule.lease() / 12;
    let mut renewals = JoinSet::new();
    while renewer.attempt.is_held() {
        sleep(pause).await;
        while renewals.try_join_next().is_some() {}
        // The transaction that completed the record locks it until the transaction ends. This lock
        // keeps other owners out.
        if !renewer.attempt.is_completed() && schedule.take(Duration::ZERO) {
            renewals.spawn(renewer.clone().renew());
        }
    }
}

//! The owner's share in the renewal of its lease.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::runtime::Handle;

use super::held_lease::HeldLease;
use super::renewal::{Renewer, ensure_renewal_task};
use crate::catch_panic::catch_panic_in;
use crate::detach::{TaskTracker, spawn_apart};
use crate::error::Error;
use crate::protocol::{Renewal, StorageKey};
use crate::store::{Store, with_timeout};
use crate::telemetry::{self, Event};

/// The ownership of a key, from its grant to the end of the attempt.
///
/// A task renews the lease, so that work that blocks its thread does not lose the lease. The owner
/// renews the lease as well if it is polled while the task is late. The task is late if its runtime
/// has ended, or if the work keeps the runtime so busy that the runtime serves no timers.
pub(crate) struct LeaseGuard {
    is_leased: bool,
    /// The runtime that polled the owner last, if there is a lease. If the owner is dropped outside
    /// of any runtime, the lease is given up on this one.
    runtime: Option<Handle>,
}

impl LeaseGuard {
    /// Begins the ownership of a key. Enter the lease in the table of `renewer` first.
    pub(crate) fn begin<R: Renewer>(renewer: &Arc<R>, lease: &HeldLease) -> Self {
        let is_leased = lease.has_end();
        let runtime = if is_leased { Handle::try_current().ok() } else { None };
        if let Some(runtime) = &runtime {
            ensure_renewal_task(renewer, runtime);
        }
        Self { is_leased, runtime }
    }

    /// Checks the renewal of the lease at a poll. If the owner has moved to another runtime, its
    /// lease moves, too, and a task of that runtime renews it. On the same runtime, renews the
    /// lease if a renewal is overdue.
    pub(crate) fn look_after<R: Renewer>(
        &mut self,
        renewer: &Arc<R>,
        lease: &HeldLease,
        holder: impl FnOnce() -> R::Holder,
    ) {
        if !self.is_leased {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        if self.runtime.as_ref().map(Handle::id) != Some(runtime.id()) {
            lease.move_to(runtime.id());
            ensure_renewal_task(renewer, &runtime);
            self.runtime = Some(runtime);
        } else if lease.take_overdue_renewal() {
            ensure_renewal_task(renewer, &runtime);
            drop(spawn_apart(&runtime, Arc::clone(renewer).renew(holder())));
        }
    }

    /// Ends the ownership without a change of the record, because the outcome is recorded or cannot
    /// be.
    pub(crate) fn end(self, lease: &HeldLease) {
        if self.is_leased {
            lease.set_over();
        }
    }

    /// Gives up the lease of a dropped owner, by a renewal with a lease of zero. The record remains
    /// as evidence of the attempt (I6). The store has `timeout` for the renewal.
    pub(crate) fn give_up<St: Store>(
        self,
        store: impl FnOnce() -> St,
        key: StorageKey,
        timeout: Duration,
        lease: &HeldLease,
        tracker: &Arc<TaskTracker>,
    ) {
        lease.set_given_up();
        let owner = lease.owner();
        // The code of a store may panic if its runtime is gone. The drop of the owner may be part
        // of an unwinding already, so a second panic would abort the process. If the lease cannot
        // be given up, it expires.
        let _ = catch_panic_in(|| {
            telemetry::event(Event::Abandoned);
            let store = store();
            let mut renewal = Box::pin(async move { store.renew(&key, owner, Duration::ZERO).await });
            let _entered = self.runtime.as_ref().map(Handle::enter);
            // Poll the renewal here first, because a store in memory is done at the first poll, and
            // the runtime may be gone by now. For any other store, a tracked task continues the
            // renewal, and the drain waits for it (I11).
            match (&mut renewal).now_or_never() {
                Some(renewed) => report(renewed),
                None => {
                    if let Some(runtime) = &self.runtime {
                        tracker.spawn(runtime, with_timeout(timeout, renewal).map(report));
                    }
                }
            }
        });
    }
}

/// Logs a renewal that gave a lease up, if it failed.
fn report(renewed: Result<Renewal, Error>) {
    if let Err(error) = renewed {
        telemetry::failure(Event::RenewalFailed, &error);
    }
}

/// Polls the owner's work, and calls `look` before each poll.
pub(crate) async fn with_look<T>(mut look: impl FnMut(), work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|cx| {
        look();
        work.as_mut().poll(cx)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Stopwatch;
    use crate::engine::JobLeases;
    use crate::protocol::Grant;

    #[tokio::test]
    async fn only_a_lease_with_an_end_needs_a_task_that_renews_it() {
        let lease = HeldLease::of_first_attempt(Duration::from_secs(30));
        let grant = Grant {
            lease: None,
            ..*lease.grant()
        };
        let (renewer, tasks) = (Arc::<JobLeases>::default(), Handle::current().metrics());
        LeaseGuard::begin(&renewer, &HeldLease::new(grant, Stopwatch::start));
        assert_eq!(tasks.num_alive_tasks(), 0);
        LeaseGuard::begin(&renewer, &lease);
        assert!(tasks.num_alive_tasks() > 0);
    }
}

//! The leases of jobs, and the guard of a job's lease while its attempt runs.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::attempt::Attempt;
use super::held_lease::HeldLease;
use super::lease_guard::{LeaseGuard, with_look};
use super::renewal::{RenewalTasks, Renewer};
use crate::detach::TaskTracker;
use crate::protocol::Nonce;
use crate::sharded::lock;
use crate::store::Store;
use crate::sync::Mutex;

/// The leases of the jobs of one layer, or of one call. One task per runtime renews them.
#[derive(Default)]
pub(crate) struct JobLeases {
    leases: Mutex<HashMap<Nonce, Arc<dyn JobLease>>>,
    tasks: Arc<RenewalTasks>,
}

/// The lease of a job, with a store of any type.
pub(crate) trait JobLease: Send + Sync {
    fn lease(&self) -> &HeldLease;

    /// Renews the lease once.
    fn renew(self: Arc<Self>) -> BoxFuture<'static, ()>;
}

/// The lease of a job, and the store that renews it.
struct StoredLease<St> {
    store: St,
    attempt: Attempt,
    store_timeout: Duration,
}

impl<St: Store> JobLease for StoredLease<St> {
    fn lease(&self) -> &HeldLease {
        self.attempt.lease()
    }

    fn renew(self: Arc<Self>) -> BoxFuture<'static, ()> {
        async move {
            let (lease, key) = (self.lease(), self.attempt.key());
            lease.renew(&self.store, key, self.store_timeout).await;
        }
        .boxed()
    }
}

impl Renewer for JobLeases {
    type Holder = Arc<dyn JobLease>;

    fn tasks(&self) -> &Arc<RenewalTasks> {
        &self.tasks
    }

    fn holders(&self, mut is: impl FnMut(&HeldLease) -> bool) -> Vec<Arc<dyn JobLease>> {
        let leases = lock(&self.leases);
        leases.values().filter(|lease| is(lease.lease())).cloned().collect()
    }

    fn any(&self, is: impl Fn(&HeldLease) -> bool) -> bool {
        lock(&self.leases).values().any(|lease| is(lease.lease()))
    }

    async fn renew(self: Arc<Self>, holder: Arc<dyn JobLease>) {
        holder.renew().await;
    }
}

/// Keeps the lease of a job until the attempt [ends](Self::end), so that no other attempt runs
/// meanwhile (I1). A runtime that shuts down may drop the guard before the end. The guard then
/// gives the lease up. A lease in an in-process store never expires, so without this the key would stay in flight.
pub(super) struct JobGuard<'j, St: Store + Clone> {
    store: &'j St,
    store_timeout: Duration,
    leases: &'j Arc<JobLeases>,
    tracker: &'j Arc<TaskTracker>,
    attempt: Attempt,
    owned: Option<LeaseGuard>,
}

impl<'j, St: Store + Clone> JobGuard<'j, St> {
    /// Enters the lease of an attempt in the table, if the lease has an end.
    pub(super) fn begin(
        store: &'j St,
        store_timeout: Duration,
        leases: &'j Arc<JobLeases>,
        tracker: &'j Arc<TaskTracker>,
        attempt: &Attempt,
    ) -> Self {
        let lease = attempt.lease();
        if lease.has_end() {
            let stored_lease = stored_lease(store, store_timeout, attempt);
            lock(&leases.leases).insert(lease.owner().nonce, stored_lease);
        }
        Self {
            store,
            store_timeout,
            leases,
            tracker,
            attempt: attempt.clone(),
            owned: Some(LeaseGuard::begin(leases, lease)),
        }
    }

    /// Polls the owner's work, and renews the lease if a renewal is overdue at a poll.
    pub(super) fn during<'g, W: Future>(&'g mut self, work: W) -> impl Future<Output = W::Output> + use<'g, 'j, St, W> {
        with_look(|| self.look_after_lease(), work)
    }

    fn look_after_lease(&mut self) {
        if let Some(owned) = &mut self.owned {
            let (store, store_timeout, attempt) = (self.store, self.store_timeout, &self.attempt);
            owned.look_after(self.leases, attempt.lease(), || {
                stored_lease(store, store_timeout, attempt)
            });
        }
    }

    /// Drops the guard without giving the lease up, because the end of the attempt is recorded or
    /// deferred.
    pub(super) fn end(mut self) {
        if let Some(owned) = self.owned.take() {
            owned.end(self.attempt.lease());
        }
    }
}

fn stored_lease<St: Store + Clone>(store: &St, store_timeout: Duration, attempt: &Attempt) -> Arc<dyn JobLease> {
    Arc::new(StoredLease {
        store: store.clone(),
        attempt: attempt.clone(),
        store_timeout,
    })
}

impl<St: Store + Clone> Drop for JobGuard<'_, St> {
    fn drop(&mut self) {
        let lease = self.attempt.lease();
        if lease.has_end() {
            let stored_lease = lock(&self.leases.leases).remove(&lease.owner().nonce);
            // Drop the clone of the store after the lock.
            drop(stored_lease);
        }
        if let Some(owned) = self.owned.take() {
            let (key, timeout) = (*self.attempt.key(), self.store_timeout);
            owned.give_up(|| self.store.clone(), key, timeout, lease, self.tracker);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Fingerprint, StorageKey};
    use crate::store::MemoryStore;

    /// An entry holds a clone of the store.
    #[tokio::test]
    async fn the_table_has_no_lease_whose_attempt_has_ended() {
        let (store, tracker, leases) = (MemoryStore::new(), Arc::default(), Arc::<JobLeases>::default());
        for is_dropped in [true, false] {
            let lease = HeldLease::of_first_attempt(Duration::from_secs(30));
            let attempt = Attempt::new(StorageKey::from_bytes([7; 32]), Fingerprint::NONE, lease);
            let guard = JobGuard::begin(&store, Duration::from_secs(1), &leases, &tracker, &attempt);
            assert_eq!(lock(&leases.leases).len(), 1);
            if is_dropped {
                drop(guard);
            } else {
                guard.end();
            }
            assert!(lock(&leases.leases).is_empty());
        }
    }
}

//! The guard of a key: the entry in the table of this process, and the ownership in the store. It
//! gives up the lease of a request that is dropped.

use std::sync::Arc;

use super::settings::{Values, Waiting};
use super::singleflight::{Follower, InFlight, InFlightTable, Joined, SharedResult};
use crate::clock::Stopwatch;
use crate::detach::TaskTracker;
use crate::engine::{Drain, HeldLease, LeaseGuard, RenewalTasks, Renewer, with_look};
use crate::protocol::Grant;
use crate::store::Store;
use crate::telemetry;

/// The reason why no key may be claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Barred {
    /// The number of executions without a caller has reached its limit.
    Detached,
    /// Too many claims got no reply from the store.
    LostClaims,
}

/// The state that a layer shares with its clones.
pub(super) struct Shared<St> {
    pub(super) store: Arc<St>,
    pub(super) in_flight_table: Arc<InFlightTable>,
    pub(super) tracker: Arc<TaskTracker>,
    renewal: Arc<RenewalTasks>,
}

impl<St> Shared<St> {
    pub(super) fn new(store: St) -> Self {
        Self {
            store: Arc::new(store),
            in_flight_table: Arc::new(InFlightTable::new()),
            tracker: Arc::default(),
            renewal: Arc::default(),
        }
    }
}

impl<St> Shared<St> {
    /// Returns the reason why no key may be claimed at the moment; `None` if keys may be claimed.
    pub(super) fn barred(&self, settings: &Values) -> Option<Barred> {
        if self.tracker.detached() >= settings.engine.max_detached {
            return Some(Barred::Detached);
        }
        self.tracker.has_many_lost_claims().then_some(Barred::LostClaims)
    }

    pub(super) fn drain(&self) -> Drain {
        let in_flight_table = Arc::clone(&self.in_flight_table);
        Drain::new(&self.tracker).while_busy(move || in_flight_table.any_guarded())
    }
}

/// A request's hold on its key: the entry in the table of this process, and the ownership in the
/// store. A request may have either, both or neither.
///
/// The drop first gives up the lease, so that no waiter waits for an owner that is gone (I7). It
/// then frees the entry, and hands the key over to the followers. The order matters, because the
/// followers look at the record after the handover.
pub(super) struct KeyGuard<St: Store> {
    pub(super) shared: Arc<Shared<St>>,
    pub(super) in_flight: Arc<InFlight>,
    leads: bool,
    owned: Option<LeaseGuard>,
}

impl<St: Store> KeyGuard<St> {
    /// Returns the guard of a request that has neither the entry nor the ownership.
    pub(super) const fn new(shared: Arc<Shared<St>>, in_flight: Arc<InFlight>) -> Self {
        Self {
            shared,
            in_flight,
            leads: false,
            owned: None,
        }
    }

    /// Returns the guard of a request that already has both the entry and the ownership.
    pub(super) fn granted(shared: Arc<Shared<St>>, in_flight: Arc<InFlight>, grant: Grant) -> Self {
        let mut key_guard = Self::leads(shared, in_flight);
        key_guard.acquire(grant, Stopwatch::start);
        key_guard
    }

    /// Returns the guard of a request that has the entry only.
    pub(super) const fn leads(shared: Arc<Shared<St>>, in_flight: Arc<InFlight>) -> Self {
        let mut key_guard = Self::new(shared, in_flight);
        key_guard.leads = true;
        key_guard
    }

    /// Takes the entry of the key, or joins the request that has it.
    pub(super) fn join(&mut self, waiting: &Waiting) -> Joined {
        if self.leads {
            return Joined::Lead;
        }
        let joined = self.shared.in_flight_table.join(&self.in_flight, waiting);
        self.leads = matches!(joined, Joined::Lead);
        joined
    }

    /// Counts this request as a waiter for an owner in another process. Returns `None` if too many
    /// requests wait already.
    pub(super) fn wait(&self, waiting: &Waiting) -> Option<Follower> {
        self.shared.in_flight_table.admit(Arc::clone(&self.in_flight), waiting)
    }

    /// Shares the result with the followers, and frees the entry, if this request has it.
    pub(super) fn release_slot(&mut self, shared_result: SharedResult) {
        if std::mem::take(&mut self.leads) {
            self.shared.in_flight_table.release_slot(&self.in_flight, shared_result);
        }
    }

    /// Makes this request the owner of the key. `started` returns a stopwatch that was started
    /// before the claim.
    pub(super) fn acquire(&mut self, grant: Grant, started: impl FnOnce() -> Stopwatch) {
        let lease = self.in_flight.set_grant(grant, started);
        telemetry::in_flight(1.0);
        self.owned = Some(LeaseGuard::begin(&self.shared, lease));
    }

    /// Polls the application's work, and renews the lease if a renewal is overdue at a poll.
    pub(super) fn during<'g, W: Future>(&'g mut self, work: W) -> impl Future<Output = W::Output> + use<'g, St, W> {
        with_look(|| self.look_after_lease(), work)
    }

    fn look_after_lease(&mut self) {
        if let (Some(owned), Some(lease)) = (&mut self.owned, self.in_flight.lease()) {
            owned.look_after(&self.shared, lease, || Arc::clone(&self.in_flight));
        }
    }

    /// Returns the lease; `None` if this request does not own the key.
    pub(super) fn owned_lease(&self) -> Option<&HeldLease> {
        self.owned.as_ref().and_then(|_| self.in_flight.lease())
    }

    /// Ends the ownership without a change of the record, because the outcome is recorded or cannot
    /// be.
    pub(super) fn end_ownership(&mut self) {
        if let Some(owned) = self.owned.take() {
            telemetry::in_flight(-1.0);
            if let Some(lease) = self.in_flight.lease() {
                owned.end(lease);
            }
        }
    }
}

impl<St: Store> Drop for KeyGuard<St> {
    fn drop(&mut self) {
        if let Some(owned) = self.owned.take() {
            telemetry::in_flight(-1.0);
            if let Some(lease) = self.in_flight.lease() {
                let (store, key) = (Arc::clone(&self.shared.store), self.in_flight.storage_key);
                let timeout = self.in_flight.store_timeout;
                owned.give_up(|| store, key, timeout, lease, &self.shared.tracker);
            }
        }
        self.release_slot(SharedResult::Handover);
    }
}

impl<St: Store> Renewer for Shared<St> {
    type Holder = Arc<InFlight>;

    fn tasks(&self) -> &Arc<RenewalTasks> {
        &self.renewal
    }

    fn holders(&self, is: impl FnMut(&HeldLease) -> bool) -> Vec<Arc<InFlight>> {
        self.in_flight_table.leased(is)
    }

    fn any(&self, is: impl Fn(&HeldLease) -> bool) -> bool {
        self.in_flight_table.any_lease(is)
    }

    async fn renew(self: Arc<Self>, in_flight: Arc<InFlight>) {
        if let Some(lease) = in_flight.lease() {
            let (key, timeout) = (&in_flight.storage_key, in_flight.store_timeout);
            lease.renew(&self.store, key, timeout).await;
        }
    }
}

//! The guard of a key. It tracks executions without a caller, renews the leases of running
//! handlers, and gives up the lease of a request that is dropped.

use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures::future::poll_fn;
use futures::FutureExt;
use tokio::runtime::{Handle, Id};

use super::settings::{Values, Waiting};
use super::singleflight::{Follower, InFlight, InFlightTable, Joined, SharedResult};
use crate::clock::{sleep, Stopwatch};
use crate::detach::{spawn_apart, TaskTracker};
use crate::engine::Drain;
use crate::protocol::{Grant, Owner, Renewal};
use crate::sharded::lock;
use crate::store::{with_timeout, Store};
use crate::telemetry::{self, Event};

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
    owned: Option<Owned>,
}

/// The ownership of a key in the store.
struct Owned {
    owner: Owner,
    is_leased: bool,
    /// The runtime that polled the request last, if the request has a lease. If the request is
    /// dropped outside of any runtime, the lease is given up on this one.
    runtime: Option<Handle>,
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
        self.in_flight.set_grant(grant, started);
        telemetry::in_flight(1.0);
        let is_leased = grant.lease.is_some();
        let runtime = if is_leased { Handle::try_current().ok() } else { None };
        if let Some(runtime) = &runtime {
            self.shared.ensure_renewal_task(runtime);
        }
        self.owned = Some(Owned {
            owner: grant.owner,
            is_leased,
            runtime,
        });
    }

    /// Polls the application's work, and renews the lease if a renewal is overdue at a poll. The
    /// task that renews leases is late if its runtime has ended, or if the work keeps the runtime
    /// so busy that the runtime serves no timers.
    pub(super) async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        poll_fn(|cx| {
            self.look_after_lease();
            work.as_mut().poll(cx)
        })
        .await
    }

    /// Checks the renewal of the lease at a poll. If the request has moved to another runtime,
    /// makes sure that a task of that runtime renews leases. On the same runtime, renews the lease
    /// if a renewal is overdue.
    fn look_after_lease(&mut self) {
        let Some(owned) = self.owned.as_mut().filter(|owned| owned.is_leased) else {
            return;
        };
        let Ok(runtime) = Handle::try_current() else { return };
        if owned.runtime.as_ref().map(Handle::id) != Some(runtime.id()) {
            self.shared.ensure_renewal_task(&runtime);
            owned.runtime = Some(runtime);
        } else if self.in_flight.take_overdue_renewal() {
            self.shared.ensure_renewal_task(&runtime);
            let (shared, in_flight) = (Arc::clone(&self.shared), Arc::clone(&self.in_flight));
            drop(spawn_apart(&runtime, async move { shared.renew(&in_flight).await }));
        }
    }

    pub(super) fn owner(&self) -> Option<Owner> {
        self.owned.as_ref().map(|owned| owned.owner)
    }

    /// Ends the ownership without a change of the record, because the outcome is recorded or cannot
    /// be.
    pub(super) fn end_ownership(&mut self) {
        if self.owned.take().is_some() {
            telemetry::in_flight(-1.0);
        }
    }

    /// Gives up the lease of a dropped request, by a renewal with a lease of zero. The record
    /// remains as evidence of the attempt (I6).
    fn give_up(&self, owned: &Owned) {
        self.in_flight.set_given_up();
        let (shared, in_flight, owner) = (Arc::clone(&self.shared), Arc::clone(&self.in_flight), owned.owner);
        let mut renewal = Box::pin(async move {
            if let Err(error) = shared.store.renew(&in_flight.storage_key, owner, Duration::ZERO).await {
                telemetry::failure(Event::RenewalFailed, &error);
            }
        });
        let _entered = owned.runtime.as_ref().map(Handle::enter);
        // Poll the renewal here first, because a store in memory is done at the first poll, and the
        // runtime may be gone by now. Any other store goes on in a tracked task, for which the
        // drain waits (I11).
        if (&mut renewal).now_or_never().is_none() {
            if let Some(runtime) = &owned.runtime {
                self.shared.tracker.spawn(runtime, renewal);
            }
        }
    }
}

impl<St: Store> Drop for KeyGuard<St> {
    fn drop(&mut self) {
        if let Some(owned) = self.owned.take() {
            telemetry::in_flight(-1.0);
            // The code of a store may panic if its runtime is gone. This drop may be part of an
            // unwinding already, so a second panic would abort the process. If the lease cannot be
            // given up, it expires.
            drop(std::panic::catch_unwind(AssertUnwindSafe(|| {
                telemetry::event(Event::Abandoned);
                self.give_up(&owned);
            })));
        }
        self.release_slot(SharedResult::Handover);
    }
}

/// The tasks that renew the leases of a layer. Each runtime that polls an owner has one such task,
/// as long as the layer has any leases. The task renews a lease of its own runtime after each third
/// of the lease. The task renews a lease of another runtime only if the renewal is overdue, because
/// that runtime may have ended or be blocked.
#[derive(Debug, Default)]
struct RenewalTasks {
    runtimes: Mutex<Vec<Id>>,
}

/// The interval at which a task checks the leases. The shortest lease is four times as long.
const TICK: Duration = Duration::from_millis(250);

impl<St: Store> Shared<St> {
    /// Starts the task that renews leases on this runtime, unless the task runs already.
    fn ensure_renewal_task(self: &Arc<Self>, runtime: &Handle) {
        let id = runtime.id();
        {
            let mut runtimes = lock(&self.renewal.runtimes);
            if runtimes.contains(&id) {
                return;
            }
            runtimes.push(id);
        }
        let renewing = RenewalTaskGuard {
            renewals: Arc::clone(&self.renewal),
            runtime: id,
            has_ended: false,
        };
        // tokio puts a newly spawned task into the LIFO slot of this worker, from which other
        // workers cannot steal. The handler that is called next may block this worker, so
        // `spawn_apart` moves the task to the queue.
        drop(spawn_apart(runtime, renew_while_any(Arc::downgrade(self), renewing)));
    }

    /// Renews the lease of a request once.
    async fn renew(&self, in_flight: &InFlight) {
        let Some((owner, lease)) = in_flight.held().and_then(|grant| Some((grant.owner, grant.lease?))) else {
            return;
        };
        // If a renewal hangs, there must be time for another one before the lease ends.
        let timeout = in_flight.store_timeout.min(lease / 6);
        match with_timeout(timeout, self.store.renew(&in_flight.storage_key, owner, lease)).await {
            // The request gave the lease up meanwhile. This renewal may have reached the store
            // later, and prolonged the lease.
            Ok(Renewal::Renewed) if in_flight.is_given_up() => self.take_back(in_flight, owner, timeout).await,
            Ok(Renewal::Renewed) => {}
            // The handler's own transaction may have completed the record while the renewal waited
            // for the row lock.
            Ok(Renewal::Superseded) if in_flight.is_completing() => {}
            Ok(Renewal::Superseded) => in_flight.set_superseded(),
            Err(error) if in_flight.is_given_up() => {
                telemetry::failure(Event::RenewalFailed, &error);
                self.take_back(in_flight, owner, timeout).await;
            }
            Err(error) => {
                in_flight.repeat_renewal();
                telemetry::failure(Event::RenewalFailed, &error);
            }
        }
    }

    /// Ends a lease that a renewal may have prolonged after it was given up. If the key is being
    /// released, releases the key here, too, because the other release may reach the store later.
    /// Until then, a lease of zero would look like a lost attempt.
    async fn take_back(&self, in_flight: &InFlight, owner: Owner, timeout: Duration) {
        let key = &in_flight.storage_key;
        if in_flight.is_released() {
            drop(with_timeout(timeout, self.store.release(key, owner)).await);
        } else {
            drop(with_timeout(timeout, self.store.renew(key, owner, Duration::ZERO)).await);
        }
    }
}

/// The entry of a renewal task in the list of runtimes. Dropping it removes the entry.
struct RenewalTaskGuard {
    renewals: Arc<RenewalTasks>,
    runtime: Id,
    has_ended: bool,
}

impl RenewalTaskGuard {
    /// Removes the entry if no leases are left, and returns whether it did. The check happens under
    /// the lock of the list, so that the next lease finds either a task that runs on or no entry,
    /// and then starts another task.
    fn ends(&mut self, any_leased: impl FnOnce() -> bool) -> bool {
        let mut runtimes = lock(&self.renewals.runtimes);
        self.has_ended = !any_leased();
        if self.has_ended {
            runtimes.retain(|runtime| *runtime != self.runtime);
        }
        self.has_ended
    }
}

impl Drop for RenewalTaskGuard {
    fn drop(&mut self) {
        if !self.has_ended {
            lock(&self.renewals.runtimes).retain(|runtime| *runtime != self.runtime);
        }
    }
}

/// Renews leases on one runtime until the layer has no leases left or is dropped.
async fn renew_while_any<St: Store>(shared: Weak<Shared<St>>, mut renewing: RenewalTaskGuard) {
    loop {
        sleep(TICK).await;
        let Some(shared) = shared.upgrade() else { return };
        for in_flight in shared.in_flight_table.take_renewals(renewing.runtime, TICK) {
            let shared = Arc::clone(&shared);
            // Begin each renewal in its own task, so that a renewal that hangs or panics does not
            // delay the others. If one renewal waits for a blocked thread, a later one can still
            // succeed.
            drop(tokio::spawn(async move { shared.renew(&in_flight).await }));
        }
        if renewing.ends(|| shared.in_flight_table.any_leased()) {
            return;
        }
    }
}

impl<St> fmt::Debug for Shared<St> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("in_flight", &self.in_flight_table)
            .field("tracker", &self.tracker)
            .finish_non_exhaustive()
    }
}

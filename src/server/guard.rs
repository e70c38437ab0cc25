//! What keeps an execution alive and its key held: tracking of what runs without a caller, renewal, giving up.

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
    /// The limit of executions without a caller is reached.
    Detached,
    /// Too many claims got no reply from the store.
    LostClaims,
}

/// What a layer and its clones share.
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

/// What a request has of its key: the seat among the requests of this process, and the ownership in the store.
///
/// Dropped with either, it gives the lease up, so that nobody waits for an owner that is gone, and then leaves the seat to
/// those who wait: in this order, since they look for themselves.
pub(super) struct KeyGuard<St: Store> {
    pub(super) shared: Arc<Shared<St>>,
    pub(super) in_flight: Arc<InFlight>,
    leads: bool,
    owned: Option<Owned>,
}

struct Owned {
    owner: Owner,
    is_leased: bool,
    /// The runtime that polled the request last, if the request has a lease. If the request is dropped outside of any
    /// runtime, the lease is given up on this one.
    runtime: Option<Handle>,
}

impl<St: Store> KeyGuard<St> {
    /// A request that has neither.
    pub(super) const fn new(shared: Arc<Shared<St>>, in_flight: Arc<InFlight>) -> Self {
        Self {
            shared,
            in_flight,
            leads: false,
            owned: None,
        }
    }

    /// A request that has both already.
    pub(super) fn granted(shared: Arc<Shared<St>>, in_flight: Arc<InFlight>, grant: Grant) -> Self {
        let mut key_guard = Self::leads(shared, in_flight);
        key_guard.acquire(grant, Stopwatch::start);
        key_guard
    }

    /// A request that has the seat.
    pub(super) const fn leads(shared: Arc<Shared<St>>, in_flight: Arc<InFlight>) -> Self {
        let mut key_guard = Self::new(shared, in_flight);
        key_guard.leads = true;
        key_guard
    }

    /// Asks for the seat.
    pub(super) fn join(&mut self, waiting: &Waiting) -> Joined {
        if self.leads {
            return Joined::Lead;
        }
        let joined = self.shared.in_flight_table.join(&self.in_flight, waiting);
        self.leads = matches!(joined, Joined::Lead);
        joined
    }

    /// Counts this request among the waiters, because it waits for an owner in another process.
    pub(super) fn wait(&self, waiting: &Waiting) -> Option<Follower> {
        self.shared.in_flight_table.admit(Arc::clone(&self.in_flight), waiting)
    }

    /// Tells those who wait what it came to, and leaves the seat.
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

    /// Polls the application's work, and renews the lease if it is overdue at a poll. The task that renews the lease is
    /// late if its runtime has ended, or if the work keeps the runtime so busy that the runtime serves no timers.
    pub(super) async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        poll_fn(|cx| {
            self.look_after_lease();
            work.as_mut().poll(cx)
        })
        .await
    }

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

    /// The outcome is recorded, or cannot be.
    pub(super) fn end_ownership(&mut self) {
        if self.owned.take().is_some() {
            telemetry::in_flight(-1.0);
        }
    }

    fn give_up(&self, owned: &Owned) {
        self.in_flight.set_given_up();
        let (shared, in_flight, owner) = (Arc::clone(&self.shared), Arc::clone(&self.in_flight), owned.owner);
        let mut renewal = Box::pin(async move {
            if let Err(error) = shared.store.renew(&in_flight.storage_key, owner, Duration::ZERO).await {
                telemetry::failure(Event::RenewalFailed, &error);
            }
        });
        let _entered = owned.runtime.as_ref().map(Handle::enter);
        // A store in memory is done at the first poll, and the runtime may be gone by now.
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
            // The code of a store may panic where its runtime has gone, and a panic may be under way already. Without it the
            // lease ends by itself.
            drop(std::panic::catch_unwind(AssertUnwindSafe(|| {
                telemetry::event(Event::Abandoned);
                self.give_up(&owned);
            })));
        }
        self.release_slot(SharedResult::Handover);
    }
}

/// The tasks that renew the leases of a layer. Each runtime that polls an owner has one such task, as long as the layer
/// has any leases. The task renews a lease of its own runtime after each third of the lease. It renews a lease of
/// another runtime only when the renewal is overdue, because that runtime may have ended or be blocked.
#[derive(Debug, Default)]
struct RenewalTasks {
    runtimes: Mutex<Vec<Id>>,
}

/// How often leases are looked at. The shortest lease is four times as long.
const TICK: Duration = Duration::from_millis(250);

impl<St: Store> Shared<St> {
    /// Starts the task that renews leases on this runtime, unless it runs.
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
        // Let another thread run the task, because the handler that is called next may block this one.
        drop(spawn_apart(runtime, renew_while_any(Arc::downgrade(self), renewing)));
    }

    async fn renew(&self, in_flight: &InFlight) {
        let Some((owner, lease)) = in_flight.held().and_then(|grant| Some((grant.owner, grant.lease?))) else {
            return;
        };
        // A renewal that hangs must leave time for another one before the lease ends.
        let timeout = in_flight.store_timeout.min(lease / 6);
        match with_timeout(timeout, self.store.renew(&in_flight.storage_key, owner, lease)).await {
            // The renewal may have reached the store after the end of the lease.
            Ok(Renewal::Renewed) if in_flight.is_given_up() => self.take_back(in_flight, owner, timeout).await,
            Ok(Renewal::Renewed) => {}
            // The renewal may have waited for the transaction that completes the record.
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

    /// Ends a lease that a renewal may have prolonged after its end. If the key is being released, releases it here, too:
    /// the other release may arrive later, and until then a lease of zero would look like a lost attempt.
    async fn take_back(&self, in_flight: &InFlight, owner: Owner, timeout: Duration) {
        let key = &in_flight.storage_key;
        if in_flight.is_released() {
            drop(with_timeout(timeout, self.store.release(key, owner)).await);
        } else {
            drop(with_timeout(timeout, self.store.renew(key, owner, Duration::ZERO)).await);
        }
    }
}

/// A task that renews leases, and its entry in the list of runtimes.
struct RenewalTaskGuard {
    renewals: Arc<RenewalTasks>,
    runtime: Id,
    has_ended: bool,
}

impl RenewalTaskGuard {
    /// Removes the entry if no leases are left. The next lease then finds no entry, and starts another task.
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

async fn renew_while_any<St: Store>(shared: Weak<Shared<St>>, mut renewing: RenewalTaskGuard) {
    loop {
        sleep(TICK).await;
        let Some(shared) = shared.upgrade() else { return };
        for in_flight in shared.in_flight_table.take_renewals(renewing.runtime, TICK) {
            let shared = Arc::clone(&shared);
            // Begin each renewal in its own task. A renewal that hangs or panics does not delay the others, and if one
            // waits for a blocked thread, a later one can still succeed.
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

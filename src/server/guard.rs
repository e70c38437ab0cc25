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

use super::flights::{Flight, Flights, Follower, Joined, Landing};
use super::settings::{Values, Waiting};
use crate::clock::{sleep, Stopwatch};
use crate::job::Drain;
use crate::protocol::{Grant, Owner, Renewal};
use crate::sharded::lock;
use crate::store::{in_time, Store};
use crate::telemetry::{self, Event};
use crate::uncut::{spawn_apart, Tracker};

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
    pub(super) store: St,
    pub(super) flights: Arc<Flights>,
    pub(super) tracker: Arc<Tracker>,
    renewal: Arc<Renewals>,
}

impl<St> Shared<St> {
    pub(super) fn new(store: St) -> Self {
        Self {
            store,
            flights: Arc::new(Flights::new()),
            tracker: Arc::default(),
            renewal: Arc::default(),
        }
    }
}

impl<St> Shared<St> {
    /// Returns the reason why no key may be claimed at the moment; `None` if keys may be claimed.
    pub(super) fn barred(&self, settings: &Values) -> Option<Barred> {
        if self.tracker.detached() >= settings.max_detached {
            return Some(Barred::Detached);
        }
        self.tracker.has_many_lost_claims().then_some(Barred::LostClaims)
    }

    pub(super) fn drain(&self) -> Drain {
        let flights = Arc::clone(&self.flights);
        Drain::new(&self.tracker).while_busy(move || flights.any_guarded())
    }
}

/// What a request has of its key: the seat among the requests of this process, and the ownership in the store.
///
/// Dropped with either, it gives the lease up, so that nobody waits for an owner that is gone, and then leaves the seat to
/// those who wait: in this order, since they look for themselves.
pub(super) struct Hold<St: Store> {
    pub(super) shared: Arc<Shared<St>>,
    pub(super) flight: Arc<Flight>,
    seated: bool,
    owned: Option<Owned>,
}

struct Owned {
    owner: Owner,
    is_leased: bool,
    /// The runtime that polled the request last, if the request has a lease. If the request is dropped outside of any
    /// runtime, the lease is given up on this one.
    runtime: Option<Handle>,
}

impl<St: Store> Hold<St> {
    /// A request that has neither.
    pub(super) const fn new(shared: Arc<Shared<St>>, flight: Arc<Flight>) -> Self {
        Self {
            shared,
            flight,
            seated: false,
            owned: None,
        }
    }

    /// A request that has both already.
    pub(super) fn granted(shared: Arc<Shared<St>>, flight: Arc<Flight>, grant: Grant) -> Self {
        let mut hold = Self::seated(shared, flight);
        hold.own(grant, Stopwatch::start);
        hold
    }

    /// A request that has the seat.
    pub(super) const fn seated(shared: Arc<Shared<St>>, flight: Arc<Flight>) -> Self {
        let mut hold = Self::new(shared, flight);
        hold.seated = true;
        hold
    }

    /// Asks for the seat.
    pub(super) fn join(&mut self, waiting: &Waiting) -> Joined {
        if self.seated {
            return Joined::Lead;
        }
        let joined = self.shared.flights.join(&self.flight, waiting);
        self.seated = matches!(joined, Joined::Lead);
        joined
    }

    /// Counts this request among the waiters, because it waits for an owner in another process.
    pub(super) fn wait(&self, waiting: &Waiting) -> Option<Follower> {
        self.shared.flights.admit(Arc::clone(&self.flight), waiting)
    }

    /// Tells those who wait what it came to, and leaves the seat.
    pub(super) fn leave(&mut self, landing: Landing) {
        if std::mem::take(&mut self.seated) {
            self.shared.flights.leave(&self.flight, landing);
        }
    }

    /// Makes this request the owner of the key. `asked` returns a stopwatch that was started before the claim.
    pub(super) fn own(&mut self, grant: Grant, asked: impl FnOnce() -> Stopwatch) {
        self.flight.hold(grant, asked);
        telemetry::in_flight(1.0);
        let is_leased = grant.lease.is_some();
        let runtime = if is_leased { Handle::try_current().ok() } else { None };
        if let Some(runtime) = &runtime {
            self.shared.keep_renewed(runtime);
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
            self.shared.keep_renewed(&runtime);
            owned.runtime = Some(runtime);
        } else if self.flight.take_overdue_renewal() {
            self.shared.keep_renewed(&runtime);
            let (shared, flight) = (Arc::clone(&self.shared), Arc::clone(&self.flight));
            drop(spawn_apart(&runtime, async move { shared.renew(&flight).await }));
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
        self.flight.set_given_up();
        let (shared, flight, owner) = (Arc::clone(&self.shared), Arc::clone(&self.flight), owned.owner);
        let mut renewal = Box::pin(async move {
            if let Err(error) = shared.store.renew(&flight.storage_key, owner, Duration::ZERO).await {
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

impl<St: Store> Drop for Hold<St> {
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
        self.leave(Landing::Handover);
    }
}

/// The tasks that renew the leases of a layer. Each runtime that polls an owner has one such task, as long as the layer
/// has any leases. The task renews a lease of its own runtime after each third of the lease. It renews a lease of
/// another runtime only when the renewal is overdue, because that runtime may have ended or be blocked.
#[derive(Debug, Default)]
struct Renewals {
    runtimes: Mutex<Vec<Id>>,
}

/// How often leases are looked at. The shortest lease is four times as long.
const TICK: Duration = Duration::from_millis(250);

impl<St: Store> Shared<St> {
    /// Starts the task that renews leases on this runtime, unless it runs.
    fn keep_renewed(self: &Arc<Self>, runtime: &Handle) {
        let id = runtime.id();
        {
            let mut runtimes = lock(&self.renewal.runtimes);
            if runtimes.contains(&id) {
                return;
            }
            runtimes.push(id);
        }
        let renewing = Renewing {
            renewals: Arc::clone(&self.renewal),
            runtime: id,
            has_ended: false,
        };
        // Let another thread run the task, because the handler that is called next may block this one.
        drop(spawn_apart(runtime, renew_while_any(Arc::downgrade(self), renewing)));
    }

    async fn renew(&self, flight: &Flight) {
        let Some((owner, lease)) = flight.held().and_then(|grant| Some((grant.owner, grant.lease?))) else {
            return;
        };
        // A renewal that hangs must leave time for another one before the lease ends.
        let timeout = flight.store_timeout.min(lease / 6);
        match in_time(timeout, self.store.renew(&flight.storage_key, owner, lease)).await {
            // The renewal may have reached the store after the end of the lease.
            Ok(Renewal::Renewed) if flight.is_given_up() => self.take_back(flight, owner, timeout).await,
            Ok(Renewal::Renewed) => {}
            // The renewal may have waited for the transaction that completes the record.
            Ok(Renewal::Superseded) if flight.is_completing() => {}
            Ok(Renewal::Superseded) => flight.set_superseded(),
            Err(error) if flight.is_given_up() => {
                telemetry::failure(Event::RenewalFailed, &error);
                self.take_back(flight, owner, timeout).await;
            }
            Err(error) => {
                flight.repeat_renewal();
                telemetry::failure(Event::RenewalFailed, &error);
            }
        }
    }

    /// Ends a lease that a renewal may have prolonged after its end. If the key is being released, releases it here, too:
    /// the other release may arrive later, and until then a lease of zero would look like a lost attempt.
    async fn take_back(&self, flight: &Flight, owner: Owner, timeout: Duration) {
        let key = &flight.storage_key;
        if flight.is_released() {
            drop(in_time(timeout, self.store.release(key, owner)).await);
        } else {
            drop(in_time(timeout, self.store.renew(key, owner, Duration::ZERO)).await);
        }
    }
}

/// A task that renews leases, and its entry in the list of runtimes.
struct Renewing {
    renewals: Arc<Renewals>,
    runtime: Id,
    has_ended: bool,
}

impl Renewing {
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

impl Drop for Renewing {
    fn drop(&mut self) {
        if !self.has_ended {
            lock(&self.renewals.runtimes).retain(|runtime| *runtime != self.runtime);
        }
    }
}

async fn renew_while_any<St: Store>(shared: Weak<Shared<St>>, mut renewing: Renewing) {
    loop {
        sleep(TICK).await;
        let Some(shared) = shared.upgrade() else { return };
        for flight in shared.flights.take_renewals(renewing.runtime, TICK) {
            let shared = Arc::clone(&shared);
            // Begin each renewal in its own task. A renewal that hangs or panics does not delay the others, and if one
            // waits for a blocked thread, a later one can still succeed.
            drop(tokio::spawn(async move { shared.renew(&flight).await }));
        }
        if renewing.ends(|| shared.flights.any_leased()) {
            return;
        }
    }
}

impl<St> fmt::Debug for Shared<St> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("flights", &self.flights)
            .field("tracker", &self.tracker)
            .finish_non_exhaustive()
    }
}

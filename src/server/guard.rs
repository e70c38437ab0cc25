//! What keeps an execution alive and its key held: tracking of what runs without a caller, renewal, giving up.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::future::{select, Either};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio::runtime::Handle;

use super::flights::{Flight, Flights, Joined, Landing};
use super::settings::Waiting;
use crate::clock::sleep;
use crate::job::Drain;
use crate::protocol::{Grant, Owner, Renewal};
use crate::store::{in_time, Store};
use crate::telemetry::{self, Event};
use crate::uncut::Tracker;

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
    /// Where a store that is not in this process gets its turn; it may be dropped elsewhere.
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
        hold.own(grant);
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

    /// Tells those who wait what it came to, and leaves the seat.
    pub(super) fn leave(&mut self, landing: Landing) {
        if std::mem::take(&mut self.seated) {
            self.shared.flights.leave(&self.flight, landing);
        }
    }

    /// Takes possession of what was granted.
    pub(super) fn own(&mut self, grant: Grant) {
        self.flight.hold(grant);
        telemetry::in_flight(1.0);
        self.owned = Some(Owned {
            owner: grant.owner,
            runtime: grant.lease.and_then(|_| Handle::try_current().ok()),
        });
        if grant.lease.is_some() {
            self.shared.keep_renewed();
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

/// The task that renews the leases of a layer: one for all of them, for as long as there are any.
#[derive(Debug, Default)]
struct Renewals {
    running: AtomicBool,
    /// Counts on for ever, also while no task runs.
    tick: AtomicU64,
}

/// How often leases are looked at. The shortest lease is four times as long.
const TICK: Duration = Duration::from_millis(250);

impl<St: Store> Shared<St> {
    /// Makes sure that the lease of a flight just granted will be renewed in time.
    pub(super) fn keep_renewed(self: &Arc<Self>) {
        let Ok(runtime) = Handle::try_current() else { return };
        if self.renewal.running.swap(true, Ordering::AcqRel) {
            return;
        }
        let renewing = Renewing(Arc::clone(&self.renewal));
        let renewals = renew_while_any(Arc::downgrade(self), renewing);
        // A task that is spawned or woken from here waits in a slot of this very thread, which no other thread may take it
        // from, and the handler that is called next may block the thread. From a thread of the blocking pool it goes to all.
        let spawner = runtime.clone();
        runtime.spawn_blocking(move || drop(spawner.spawn(renewals)));
    }

    /// The flights whose leases are to be renewed at the next tick.
    fn next_due(&self) -> impl Iterator<Item = Arc<Flight>> {
        let tick = self.renewal.tick.fetch_add(1, Ordering::Relaxed) + 1;
        let leased = self.flights.leased().into_iter();
        leased.filter(move |flight| flight.is_renewal_due(tick, TICK))
    }

    async fn renew(&self, flight: &Flight) {
        let Some((owner, lease)) = flight.held().and_then(|grant| Some((grant.owner, grant.lease?))) else {
            return;
        };
        match in_time(lease / 3, self.store.renew(&flight.storage_key, owner, lease)).await {
            Ok(Renewal::Renewed) => {}
            Ok(Renewal::Superseded) => flight.set_superseded(),
            Err(error) => {
                flight.hurry_renewal();
                telemetry::failure(Event::RenewalFailed, &error);
            }
        }
    }
}

struct Renewing(Arc<Renewals>);

impl Drop for Renewing {
    fn drop(&mut self) {
        self.0.running.store(false, Ordering::Release);
    }
}

async fn renew_while_any<St: Store>(shared: Weak<Shared<St>>, renewing: Renewing) {
    // Each runs by itself: one that hangs must not hold up the others.
    let mut renewals = FuturesUnordered::new();
    loop {
        let mut tick = pin!(sleep(TICK));
        while !renewals.is_empty() {
            if let Either::Left(_) = select(tick.as_mut(), renewals.next()).await {
                break;
            }
        }
        if renewals.is_empty() {
            tick.await;
        }
        match shared.upgrade() {
            Some(shared) if shared.flights.any_leased() => {
                for flight in shared.next_due() {
                    let shared = Arc::clone(&shared);
                    renewals.push(async move { shared.renew(&flight).await });
                }
            }
            _ => break,
        }
    }
    drop(renewing);
    // A flight that was granted its lease between the last look and the end of this task starts another.
    if let Some(shared) = shared.upgrade() {
        if shared.flights.any_leased() {
            shared.keep_renewed();
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

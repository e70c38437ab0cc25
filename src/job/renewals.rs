//! The renewal of leases.

use std::collections::HashMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::{select, BoxFuture, Either};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio::runtime::Handle;
use tokio::time::sleep;

/// How often leases are looked at.
const TICK: Duration = Duration::from_millis(250);

/// The shortest lease: it is renewed at every look.
pub(super) const SHORTEST_LEASE: Duration = TICK.saturating_mul(4);

/// Makes one renewal.
type Renew = Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// The leases of a layer's jobs, each renewed at a third of it: by one task for all of them, for as long as there are any.
#[derive(Default)]
pub(crate) struct Renewals(Mutex<Leases>);

#[derive(Default)]
struct Leases {
    is_running: bool,
    /// Counts on for ever, also while no task runs.
    tick: u64,
    next: u64,
    held: HashMap<u64, Lease>,
}

struct Lease {
    every: u64,
    due: u64,
    renew: Renew,
}

/// A lease that is renewed until this is dropped.
pub(super) struct Renewed {
    renewals: Arc<Renewals>,
    number: u64,
}

impl Renewals {
    /// Calls `renew` at every third of the lease.
    pub(super) fn renew(
        self: &Arc<Self>,
        lease: Duration,
        renew: impl Fn() -> BoxFuture<'static, ()> + Send + Sync + 'static,
    ) -> Renewed {
        let ticks = (lease / 3).as_millis() / TICK.as_millis();
        let every = u64::try_from(ticks).unwrap_or(u64::MAX).max(1);
        let mut leases = self.lock();
        let (number, due) = (leases.next, leases.tick.saturating_add(every));
        leases.next += 1;
        let renew = Arc::new(renew);
        leases.held.insert(number, Lease { every, due, renew });
        let is_running = std::mem::replace(&mut leases.is_running, true);
        drop(leases);
        let renewals = Arc::clone(self);
        if !is_running {
            Running(Some(Arc::clone(self))).begin();
        }
        Renewed { renewals, number }
    }

    fn due(&self) -> Vec<Renew> {
        let mut leases = self.lock();
        leases.tick += 1;
        let tick = leases.tick;
        let due = leases.held.values_mut().filter(|lease| lease.due <= tick);
        due.map(|lease| {
            lease.due = tick.saturating_add(lease.every);
            Arc::clone(&lease.renew)
        })
        .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Leases> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Renewed {
    fn drop(&mut self) {
        let ended = self.renewals.lock().held.remove(&self.number);
        // The last handle of a store may go with it: not under the lock.
        drop(ended);
    }
}

/// The right to be the task that renews. Dropped early, since its runtime has ended, it leaves that to the next lease's.
struct Running(Option<Arc<Renewals>>);

impl Running {
    fn begin(self) {
        let Ok(runtime) = Handle::try_current() else { return };
        let spawner = runtime.clone();
        // A task that is spawned or woken from here waits in a slot of this very thread, which no other thread may take it from,
        // and the work that comes next may block the thread. From a thread of the blocking pool it goes to all. For the same
        // reason nobody wakes it: it looks at every tick.
        runtime.spawn_blocking(move || drop(spawner.spawn(self.renew())));
    }

    async fn renew(mut self) {
        // Each runs by itself: one that hangs must not hold up the others.
        let mut under_way = FuturesUnordered::new();
        while let Some(renewals) = self.unless_done() {
            let mut tick = pin!(sleep(TICK));
            while !under_way.is_empty() {
                if let Either::Left(_) = select(tick.as_mut(), under_way.next()).await {
                    break;
                }
            }
            if under_way.is_empty() {
                tick.await;
            }
            for renew in renewals.due() {
                // The code of a store may panic.
                under_way.push(AssertUnwindSafe(async move { renew().await }).catch_unwind());
            }
        }
    }

    fn unless_done(&mut self) -> Option<Arc<Renewals>> {
        let renewals = self.0.as_ref()?;
        let mut leases = renewals.lock();
        if leases.held.is_empty() {
            leases.is_running = false;
            drop(leases);
            self.0 = None;
        }
        self.0.clone()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(renewals) = &self.0 {
            renewals.lock().is_running = false;
        }
    }
}

impl fmt::Debug for Renewals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Renewals").finish_non_exhaustive()
    }
}

//! The per-key lock inside a process: who works on a key, and who waits for it.

use std::collections::HashMap;
use std::fmt;
use std::pin::pin;
#[cfg(feature = "postgres")]
use std::sync::atomic::AtomicU16;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;

use super::settings::Waiting;
use crate::clock::{within, Deadline};
use crate::http::Refusal;
use crate::protocol::{Answer, Fingerprint, Grant, IdempotencyKey, KeyHasher, StorageKey};
use crate::sharded::Sharded;

/// One guarded request. The one that got the seat of its key is what the others wait for.
pub(super) struct Flight {
    pub(super) key: IdempotencyKey,
    pub(super) storage_key: StorageKey,
    pub(super) fingerprint: Fingerprint,
    /// Whether the rest of the exchange must go on without its caller.
    guarded: AtomicBool,
    /// Whether others wait for it, or did.
    joined: AtomicBool,
    /// Whether the store said that the key belongs to this flight's fingerprint.
    confirmed: AtomicBool,
    held: OnceLock<Grant>,
    superseded: AtomicBool,
    /// Whether its handler has begun to complete in a transaction, of which it may not be known what became.
    #[cfg(feature = "postgres")]
    in_transaction: AtomicBool,
    /// Whether that failed, so that its answer says nothing about the request.
    #[cfg(feature = "postgres")]
    transaction_failed: AtomicBool,
    /// The status that it tried to record last.
    #[cfg(feature = "postgres")]
    recorded_status: AtomicU16,
    /// Whether its lease is being given up, and must not be renewed again.
    ending: AtomicBool,
    /// The tick at which its lease is to be renewed; 0 until it was looked at first.
    renewal_due: AtomicU64,
    landing: OnceLock<Landing>,
    changed: Notify,
    waiters: AtomicUsize,
}

/// What a flight came to, for those who waited.
#[derive(Clone, Debug)]
pub(super) enum Landing {
    /// This answer, a kept one or not.
    Answer { answer: Answer, kept: bool },
    /// It ended without; look for yourself.
    Handover,
    /// This refusal.
    Refused(Refusal),
}

impl Flight {
    pub(super) fn new(key: IdempotencyKey, storage_key: StorageKey, fingerprint: Fingerprint) -> Self {
        Self {
            key,
            storage_key,
            fingerprint,
            guarded: AtomicBool::new(false),
            joined: AtomicBool::new(false),
            confirmed: AtomicBool::new(false),
            held: OnceLock::new(),
            superseded: AtomicBool::new(false),
            #[cfg(feature = "postgres")]
            in_transaction: AtomicBool::new(false),
            #[cfg(feature = "postgres")]
            transaction_failed: AtomicBool::new(false),
            #[cfg(feature = "postgres")]
            recorded_status: AtomicU16::new(0),
            ending: AtomicBool::new(false),
            renewal_due: AtomicU64::new(0),
            landing: OnceLock::new(),
            changed: Notify::new(),
            waiters: AtomicUsize::new(0),
        }
    }

    /// One whose request was granted its key already.
    pub(super) fn granted(mut self, grant: Grant) -> Self {
        self.guarded = AtomicBool::new(true);
        self.confirmed = AtomicBool::new(true);
        self.held = OnceLock::from(grant);
        self
    }

    /// From here on the exchange goes on when its caller leaves, or (`false`) does not.
    pub(super) fn set_guarded(&self, guarded: bool) {
        self.guarded.store(guarded, Ordering::Release);
    }

    pub(super) fn is_guarded(&self) -> bool {
        self.guarded.load(Ordering::Acquire)
    }

    /// Enters the grant.
    pub(super) fn hold(&self, grant: Grant) {
        if self.held.set(grant).is_ok() {
            self.confirm();
        }
    }

    /// From now on the key is known to belong to this flight's fingerprint, so that others are a mismatch.
    pub(super) fn confirm(&self) {
        if !self.confirmed.swap(true, Ordering::AcqRel) {
            self.changed.notify_waiters();
        }
    }

    fn is_confirmed(&self) -> bool {
        self.confirmed.load(Ordering::Acquire)
    }

    pub(super) fn held(&self) -> Option<&Grant> {
        self.held.get()
    }

    /// The handler is about to complete in a transaction, with an answer of this status.
    #[cfg(feature = "postgres")]
    pub(super) fn set_in_transaction(&self, status: http::StatusCode) {
        self.recorded_status.store(status.as_u16(), Ordering::Relaxed);
        self.in_transaction.store(true, Ordering::Release);
    }

    #[cfg(feature = "postgres")]
    pub(super) fn set_transaction_failed(&self, failed: bool) {
        self.transaction_failed.store(failed, Ordering::Relaxed);
    }

    #[cfg(feature = "postgres")]
    pub(super) fn has_transaction_failed(&self) -> bool {
        self.transaction_failed.load(Ordering::Relaxed)
    }

    /// Whether the handler has tried to complete in a transaction.
    #[cfg(feature = "postgres")]
    pub(super) fn is_in_transaction(&self) -> bool {
        self.in_transaction.load(Ordering::Acquire)
    }

    #[cfg(feature = "postgres")]
    pub(super) fn has_recorded(&self, status: http::StatusCode) -> bool {
        self.recorded_status.load(Ordering::Relaxed) == status.as_u16()
    }

    pub(super) fn set_superseded(&self) {
        self.superseded.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_superseded(&self) -> bool {
        self.superseded.load(Ordering::Relaxed)
    }

    /// From here on the lease is not renewed: it is about to be given up.
    pub(super) fn end_renewal(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    fn is_leased(&self) -> bool {
        // A transaction that completes holds the record locked: a renewal would only wait for it, and so would whoever wants it.
        #[cfg(feature = "postgres")]
        if self.is_in_transaction() && !self.has_transaction_failed() {
            return false;
        }
        !self.is_superseded()
            && !self.ending.load(Ordering::Relaxed)
            && self.held().is_some_and(|grant| grant.lease.is_some())
    }

    /// Whether the lease is to be renewed at this tick; if so, the next time is a third of the lease later.
    pub(super) fn is_renewal_due(&self, tick: u64, length: Duration) -> bool {
        let Some(lease) = self.held().and_then(|grant| grant.lease) else {
            return false;
        };
        let due = self.renewal_due.load(Ordering::Relaxed);
        if tick < due {
            return false;
        }
        let third = u64::try_from((lease / 3).as_micros() / length.as_micros()).unwrap_or(u64::MAX);
        self.renewal_due
            .store(tick.saturating_add(third.max(1)), Ordering::Relaxed);
        due > 0
    }

    /// The renewal failed: it is tried again at the next tick.
    pub(super) fn hurry_renewal(&self) {
        self.renewal_due.store(1, Ordering::Relaxed);
    }

    fn land(&self, landing: Landing) {
        if self.landing.set(landing).is_ok() {
            self.changed.notify_waiters();
        }
    }

    /// Waits until `seen` finds something. Subscribes before it looks: the other order would miss the last change.
    async fn until<'f, T>(&'f self, seen: impl Fn(&'f Self) -> Option<T>) -> T {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(seen) = seen(self) {
                return seen;
            }
            changed.await;
        }
    }

    /// Waits until it is known whose fingerprint the key belongs to.
    async fn decided(&self) {
        self.until(|flight| (flight.is_confirmed() || flight.landing.get().is_some()).then_some(()))
            .await;
    }
}

impl fmt::Debug for Flight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flight")
            .field("held", &self.held.get())
            .field("superseded", &self.is_superseded())
            .field("landed", &self.landing.get().is_some())
            .finish_non_exhaustive()
    }
}

/// All flights of a layer and its clones.
#[derive(Debug)]
pub(super) struct Flights {
    table: Sharded<StorageKey, Arc<Flight>, KeyHasher>,
    waiters: AtomicUsize,
}

/// What a request finds when it asks for the seat of its key.
#[derive(Debug)]
pub(super) enum Joined {
    /// Somebody else is at the same request: wait for it.
    Follow(Follower),
    /// Too many wait already.
    Full,
    /// The seat is yours, until you [leave](Flights::leave) it.
    Lead,
    /// Somebody else holds the key for another request.
    Mismatch,
    /// Somebody else asks for the key for another request, and has no answer yet.
    Undecided(Follower),
}

/// A seat that is free. Others who ask for a key of the same shard are held up.
pub(super) struct Vacancy<'f>(MutexGuard<'f, HashMap<StorageKey, Arc<Flight>, KeyHasher>>);

impl Vacancy<'_> {
    /// Takes the seat, until it is [left](Flights::leave).
    pub(super) fn take(mut self, flight: Flight) -> Arc<Flight> {
        let flight = Arc::new(flight);
        self.0.insert(flight.storage_key, Arc::clone(&flight));
        flight
    }
}

impl Flights {
    pub(super) fn new() -> Self {
        Self {
            table: Sharded::new(KeyHasher::random()),
            waiters: AtomicUsize::new(0),
        }
    }

    pub(super) fn join(self: &Arc<Self>, flight: &Arc<Flight>, limits: &Waiting) -> Joined {
        let mut shard = self.table.lock(&flight.storage_key);
        let Some(leader) = shard.get(&flight.storage_key) else {
            shard.insert(flight.storage_key, Arc::clone(flight));
            return Joined::Lead;
        };
        let leader = Arc::clone(leader);
        leader.joined.store(true, Ordering::Relaxed);
        drop(shard);
        if leader.fingerprint == flight.fingerprint {
            return self.admit(leader, limits).map_or(Joined::Full, Joined::Follow);
        }
        if leader.is_confirmed() {
            return Joined::Mismatch;
        }
        self.admit(leader, limits).map_or(Joined::Full, Joined::Undecided)
    }

    /// The seat of a key, if it is free; nobody takes it while this is looked at.
    pub(super) fn vacancy(&self, key: &StorageKey) -> Option<Vacancy<'_>> {
        let shard = self.table.lock(key);
        (!shard.contains_key(key)).then_some(Vacancy(shard))
    }

    /// Leaves the seat and tells the others what it came to.
    pub(super) fn leave(&self, flight: &Flight, landing: Landing) {
        let mut shard = self.table.lock(&flight.storage_key);
        let seated = shard.remove(&flight.storage_key);
        // Whoever joined did so under this lock.
        let joined = flight.joined.load(Ordering::Relaxed);
        drop(shard);
        drop(seated);
        if joined {
            flight.land(landing);
        }
    }

    /// A place among those who wait for a flight, unless they are too many.
    fn admit(self: &Arc<Self>, leader: Arc<Flight>, limits: &Waiting) -> Option<Follower> {
        let of_key = leader.waiters.fetch_add(1, Ordering::Relaxed);
        let in_all = self.waiters.fetch_add(1, Ordering::Relaxed);
        // Made first, so that a refused one is counted off again.
        let follower = Follower {
            flights: Arc::clone(self),
            leader,
        };
        (of_key < limits.per_key && in_all < limits.in_all).then_some(follower)
    }

    /// The flights that hold a lease that must be renewed.
    pub(super) fn leased(&self) -> Vec<Arc<Flight>> {
        let mut leased = Vec::new();
        self.table.each(|shard| {
            leased.extend(shard.values().filter(|flight| flight.is_leased()).cloned());
        });
        leased
    }

    pub(super) fn any_leased(&self) -> bool {
        self.any(Flight::is_leased)
    }

    /// Whether something runs that goes on without its caller.
    pub(super) fn any_guarded(&self) -> bool {
        self.any(Flight::is_guarded)
    }

    fn any(&self, is: impl Fn(&Flight) -> bool) -> bool {
        let mut any = false;
        self.table.each(|shard| any |= shard.values().any(|flight| is(flight)));
        any
    }
}

/// A place among those who wait for a flight.
#[derive(Debug)]
pub(super) struct Follower {
    flights: Arc<Flights>,
    leader: Arc<Flight>,
}

impl Follower {
    /// What the flight came to; `None` when the time is up first.
    pub(super) async fn landing(&self, deadline: Deadline) -> Option<Landing> {
        if let Some(landing) = self.leader.landing.get() {
            return Some(landing.clone());
        }
        let landing = self.leader.until(|flight| flight.landing.get());
        within(deadline.left(), landing).await.ok().cloned()
    }
}

impl Follower {
    /// Waits until it is known whose fingerprint the key belongs to; `false` when the time is up first.
    pub(super) async fn decided(&self, deadline: Deadline) -> bool {
        within(deadline.left(), self.leader.decided()).await.is_ok()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.leader.waiters.fetch_sub(1, Ordering::Relaxed);
        self.flights.waiters.fetch_sub(1, Ordering::Relaxed);
    }
}

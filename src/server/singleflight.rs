//! The lock for each key inside a process. The leader of a key works on it, and its followers wait
//! for the leader's result (I1).

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;

use super::derived_keys::DerivedKeys;
use super::settings::Waiting;
use crate::clock::{Deadline, Stopwatch, within};
#[cfg(feature = "postgres")]
use crate::engine::TransactionState;
use crate::engine::{HeldLease, POLL};
use crate::http::Refusal;
use crate::protocol::{Fingerprint, Grant, IdempotencyKey, KeyHasher, StorageKey, StoredResponse};
use crate::sharded::Sharded;
#[cfg(feature = "postgres")]
use crate::sharded::lock;
#[cfg(feature = "postgres")]
use crate::sync::Mutex;
use crate::sync::MutexGuard;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// One guarded request. The request that has the entry of its key in the table is the leader, for
/// which duplicates wait.
pub(super) struct InFlight {
    pub(super) key: IdempotencyKey,
    pub(super) storage_key: StorageKey,
    pub(super) fingerprint: Fingerprint,
    /// The maximum time for one renewal.
    pub(super) store_timeout: Duration,
    /// Whether the exchange must continue if its caller leaves. The exchange sets the flag before it
    /// claims, and its caller reads the flag in the same task. A drain may read an old value while
    /// the caller still holds the future.
    guarded: AtomicBool,
    /// Whether the caller has left, and the exchange continues.
    detached: AtomicBool,
    /// Whether any duplicate has joined this request. The lock of the shard orders all accesses.
    joined: AtomicBool,
    /// The grant of the key, once the store has granted it.
    held: OnceLock<HeldLease>,
    /// The number of looks at the record that this request has begun while it waits for an owner in
    /// another process.
    looks: AtomicU64,
    /// The number of the last look that found this request's fingerprint in the record. The leader
    /// writes the number, then takes the lock of `changed`. A waiter takes that lock before it
    /// reads the number. So a waiter that subscribed too late for the notification sees the number.
    confirmed_by: AtomicU64,
    /// Makes this request look at the record at once.
    look_again: Notify,
    /// The responses that the handler tried to record in transactions.
    #[cfg(feature = "postgres")]
    tried: Mutex<Tried>,
    shared_result: OnceLock<SharedResult>,
    changed: Notify,
    /// The number of waiters. No other data depends on it, so its steps need only be atomic.
    waiters: AtomicUsize,
}

/// The responses that a handler tried to record in transactions.
#[cfg(feature = "postgres")]
#[derive(Debug, Default)]
struct Tried {
    /// The count of these responses.
    count: u64,
    /// The number, from 1, of the last response that may be in the record.
    last: u64,
    /// Their statuses, each once and in the form of [`status_and_code`].
    statuses: Vec<u32>,
}

/// One response that the handler tries to record in a transaction.
#[cfg(feature = "postgres")]
#[derive(Debug)]
pub(super) struct Recording {
    /// The number of the response among those of the handler, from 1.
    pub(super) number: u64,
    /// The number of the last response before it that may be in the record.
    last_before: u64,
}

/// The result of a leader, for its followers.
#[derive(Clone, Debug)]
pub(super) enum SharedResult {
    /// A response. `is_stored` shows whether the store holds it.
    Response { response: StoredResponse, is_stored: bool },
    /// The leader ended without a result. Each follower has to join again, or to look at the
    /// record.
    Handover,
    /// A refusal.
    Refused(Refusal),
}

impl InFlight {
    pub(super) fn new(
        key: IdempotencyKey,
        storage_key: StorageKey,
        fingerprint: Fingerprint,
        store_timeout: Duration,
    ) -> Self {
        Self {
            key,
            storage_key,
            fingerprint,
            store_timeout,
            guarded: AtomicBool::new(false),
            detached: AtomicBool::new(false),
            joined: AtomicBool::new(false),
            held: OnceLock::new(),
            looks: AtomicU64::new(0),
            confirmed_by: AtomicU64::new(0),
            look_again: Notify::new(),
            #[cfg(feature = "postgres")]
            tried: Mutex::default(),
            shared_result: OnceLock::new(),
            changed: Notify::new(),
            waiters: AtomicUsize::new(0),
        }
    }

    /// Returns an entry for a request that already owns its key.
    pub(super) fn granted(mut self, grant: Grant) -> Self {
        self.guarded = AtomicBool::new(true);
        self.held = OnceLock::from(HeldLease::new(grant, Stopwatch::start));
        self
    }

    pub(super) const fn derived_keys(&self) -> DerivedKeys {
        DerivedKeys {
            storage_key: self.storage_key,
            fingerprint: self.fingerprint,
        }
    }

    /// Sets whether the exchange continues if its caller leaves.
    pub(super) fn set_guarded(&self, guarded: bool) {
        self.guarded.store(guarded, Ordering::Release);
    }

    pub(super) fn is_guarded(&self) -> bool {
        self.guarded.load(Ordering::Acquire)
    }

    /// Records that the caller has left and the exchange continues.
    pub(super) fn set_detached(&self) {
        self.detached.store(true, Ordering::Release);
    }

    pub(super) fn is_detached(&self) -> bool {
        self.detached.load(Ordering::Acquire)
    }

    /// Enters the grant of this request, and returns its lease. `started` returns a stopwatch that
    /// was started before the claim.
    pub(super) fn set_grant(&self, grant: Grant, started: impl FnOnce() -> Stopwatch) -> &HeldLease {
        if let Some(lease) = self.held.get() {
            return lease;
        }
        let lease = self.held.get_or_init(|| HeldLease::new(grant, started));
        self.changed.notify_waiters();
        lease
    }

    /// Returns the lease, if the store has granted the key. The request may have lost the key since.
    pub(super) fn lease(&self) -> Option<&HeldLease> {
        self.held.get()
    }

    /// Whether this request owns the key, so that the key certainly belongs to its fingerprint. If
    /// another attempt has taken the key over, or this request is about to give it up, only the
    /// store knows the fingerprint.
    fn is_owner(&self) -> bool {
        self.lease()
            .is_some_and(|lease| !lease.is_superseded() && !lease.is_given_up())
    }

    /// Begins a look at the record, and returns the number of the look. Numbers start at 1.
    pub(super) fn begin_look(&self) -> u64 {
        self.looks.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Records that the look with this number found this request's fingerprint in the record.
    pub(super) fn confirm(&self, look: u64) {
        self.confirmed_by.store(look, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Waits until another request needs a new look at the record.
    pub(super) async fn look_requested(&self) {
        self.look_again.notified().await;
    }

    /// Records that the handler is about to complete the record in a transaction, with a response
    /// of this HTTP status and gRPC code.
    #[cfg(feature = "postgres")]
    pub(super) fn begin_transaction(&self, status: http::StatusCode, code: Option<u8>) -> Recording {
        let status = status_and_code(status, code);
        let mut tried = lock(&self.tried);
        tried.count += 1;
        let recording = Recording {
            number: tried.count,
            last_before: tried.last,
        };
        tried.last = recording.number;
        if !tried.statuses.contains(&status) {
            tried.statuses.push(status);
        }
        drop(tried);
        if let Some(lease) = self.lease() {
            lease.transaction.begin();
        }
        recording
    }

    /// Records that a response is in the record, unless its transaction is rolled back.
    #[cfg(feature = "postgres")]
    pub(super) fn succeed_transaction(&self, recording: &Recording) {
        lock(&self.tried).last = recording.number;
        if let Some(transaction) = self.transaction() {
            transaction.succeed();
        }
    }

    /// Records that a response is certainly not in the record.
    #[cfg(feature = "postgres")]
    pub(super) fn supersede_transaction(&self, recording: &Recording) {
        let mut tried = lock(&self.tried);
        if tried.last == recording.number {
            tried.last = recording.last_before;
        }
    }

    /// Returns the number of the last response that may be in the record.
    #[cfg(feature = "postgres")]
    pub(super) fn last_recorded(&self) -> u64 {
        lock(&self.tried).last
    }

    /// Returns the handler's transaction that completes the record.
    #[cfg(feature = "postgres")]
    pub(super) fn transaction(&self) -> Option<&TransactionState> {
        self.lease().map(|lease| &lease.transaction)
    }

    /// Whether any response that the handler tried to record has this status. Every gRPC response
    /// has the HTTP status 200, so the gRPC codes are compared, too.
    #[cfg(feature = "postgres")]
    pub(super) fn has_tried_to_record(&self, status: http::StatusCode, code: Option<u8>) -> bool {
        lock(&self.tried).statuses.contains(&status_and_code(status, code))
    }

    pub(super) fn set_superseded(&self) {
        if let Some(lease) = self.lease() {
            lease.set_superseded();
        }
    }

    pub(super) fn is_superseded(&self) -> bool {
        self.lease().is_some_and(HeldLease::is_superseded)
    }

    /// Shares the result with the followers. Only the first result counts.
    fn publish(&self, shared_result: SharedResult) {
        if self.shared_result.set(shared_result).is_ok() {
            self.changed.notify_waiters();
        }
    }

    /// Waits until `seen` returns a value. Subscribes before it calls `seen`, because the other
    /// order would miss a change between the two.
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

    /// Waits until this request owns the key, or a look with a higher number than `look` has found
    /// its fingerprint in the record. Returns `false` if this request ends first.
    async fn confirmed_after(&self, look: u64) -> bool {
        self.until(|in_flight| {
            if in_flight.is_owner() || in_flight.confirmed_by.load(Ordering::Acquire) > look {
                return Some(true);
            }
            in_flight.shared_result.get().is_some().then_some(false)
        })
        .await
    }
}

/// Returns one number for an HTTP status and an optional gRPC code. The upper 16 bits are the gRPC
/// code plus one, or zero.
#[cfg(feature = "postgres")]
fn status_and_code(status: http::StatusCode, code: Option<u8>) -> u32 {
    u32::from(status.as_u16()) | code.map_or(0, |code| (u32::from(code) + 1) << 16)
}

/// The leaders of all keys in flight, for a layer and its clones.
pub(super) struct InFlightTable {
    table: Sharded<StorageKey, Arc<InFlight>, KeyHasher>,
    /// The number of waiters for all keys. No other data depends on it.
    waiters: AtomicUsize,
}

/// The result of a request's attempt to get the entry of its key.
pub(super) enum Joined {
    /// Another request with the same fingerprint leads. Wait for it.
    Follow(Follower),
    /// Too many requests wait already.
    Full,
    /// The request has the entry, until it [releases](InFlightTable::release_slot) the entry.
    Lead,
    /// A request with another fingerprint owns the key.
    Mismatch,
    /// A request with another fingerprint has the entry, and does not know yet whether it will own
    /// the key.
    Undecided(Undecided),
}

/// A vacant entry. Holds the shard's lock, so requests for other keys of the shard block until it
/// is dropped.
pub(super) struct VacantEntry<'f>(MutexGuard<'f, HashMap<StorageKey, Arc<InFlight>, KeyHasher>>);

impl VacantEntry<'_> {
    /// Takes the entry, until it is [released](InFlightTable::release_slot).
    pub(super) fn take(mut self, in_flight: InFlight) -> Arc<InFlight> {
        let in_flight = Arc::new(in_flight);
        self.0.insert(in_flight.storage_key, Arc::clone(&in_flight));
        in_flight
    }
}

impl InFlightTable {
    pub(super) fn new() -> Self {
        Self {
            table: Sharded::new(KeyHasher::random()),
            waiters: AtomicUsize::new(0),
        }
    }

    /// Takes the entry of the request's key, or joins the request that has it.
    ///
    /// 1. If the entry is vacant, the request leads.
    /// 2. If the leader has the same fingerprint, the request follows it.
    /// 3. If a leader with another fingerprint owns the key, the request is a mismatch (I4).
    /// 4. If that leader does not own the key yet, the decision needs another look at the record.
    pub(super) fn join(self: &Arc<Self>, in_flight: &Arc<InFlight>, limits: &Waiting) -> Joined {
        let mut shard = self.table.lock(&in_flight.storage_key);
        let Some(leader) = shard.get(&in_flight.storage_key) else {
            shard.insert(in_flight.storage_key, Arc::clone(in_flight));
            return Joined::Lead;
        };
        // Set `joined` under the shard's lock. `release_slot` reads it under the same lock.
        let leader = Arc::clone(leader);
        leader.joined.store(true, Ordering::Relaxed);
        drop(shard);
        if leader.fingerprint == in_flight.fingerprint {
            return self.admit(leader, limits).map_or(Joined::Full, Joined::Follow);
        }
        if leader.is_owner() {
            return Joined::Mismatch;
        }
        // An owner in another process may have released the key since the last look, so require a
        // look that begins from now on.
        let look = leader.looks.load(Ordering::Acquire);
        leader.look_again.notify_one();
        let undecided = |follower| Joined::Undecided(Undecided { follower, look });
        self.admit(leader, limits).map_or(Joined::Full, undecided)
    }

    /// Whether this request has the entry of its key.
    pub(super) fn is_leader(&self, in_flight: &Arc<InFlight>) -> bool {
        let shard = self.table.lock(&in_flight.storage_key);
        shard
            .get(&in_flight.storage_key)
            .is_some_and(|leads| Arc::ptr_eq(leads, in_flight))
    }

    /// Returns the key's entry if it is vacant. The entry is locked until the returned value is
    /// dropped.
    pub(super) fn vacant_entry(&self, key: &StorageKey) -> Option<VacantEntry<'_>> {
        let shard = self.table.lock(key);
        (!shard.contains_key(key)).then_some(VacantEntry(shard))
    }

    /// Frees the entry of a leader, and shares its result with its followers.
    pub(super) fn release_slot(&self, in_flight: &InFlight, shared_result: SharedResult) {
        let mut shard = self.table.lock(&in_flight.storage_key);
        let leads = shard.remove(&in_flight.storage_key);
        // Followers join under this lock. So after the removal no further follower can join.
        let joined = in_flight.joined.load(Ordering::Relaxed);
        drop(shard);
        drop(leads);
        if joined {
            in_flight.publish(shared_result);
        }
    }

    /// Counts a waiter. A waiter is a duplicate that waits for the leader, or the leader itself if
    /// it waits for an owner in another process. Returns `None` if too many requests wait already
    /// (I10). A refused request counts until its follower is dropped, so near a limit another
    /// request may be refused, too.
    pub(super) fn admit(self: &Arc<Self>, leader: Arc<InFlight>, limits: &Waiting) -> Option<Follower> {
        let of_key = leader.waiters.fetch_add(1, Ordering::Relaxed);
        let in_all = self.waiters.fetch_add(1, Ordering::Relaxed);
        // Make the follower before the check, because its drop undoes the counts of a refused
        // waiter.
        let follower = Follower {
            in_flight_table: Arc::clone(self),
            leader,
        };
        (of_key < limits.per_key && in_all < limits.in_all).then_some(follower)
    }

    /// Returns the leaders for whose leases `is` returns `true`.
    pub(super) fn leased(&self, mut is: impl FnMut(&HeldLease) -> bool) -> Vec<Arc<InFlight>> {
        let mut leased = Vec::new();
        self.table.each(|shard| {
            let leaders = shard.values();
            leased.extend(leaders.filter(|leader| leader.lease().is_some_and(&mut is)).cloned());
        });
        leased
    }

    /// Whether `is` returns `true` for the lease of any leader.
    pub(super) fn any_lease(&self, is: impl Fn(&HeldLease) -> bool) -> bool {
        self.any(|in_flight| in_flight.lease().is_some_and(&is))
    }

    /// Whether any leader has an exchange that continues if its caller leaves.
    pub(super) fn any_guarded(&self) -> bool {
        self.any(InFlight::is_guarded)
    }

    fn any(&self, is: impl Fn(&InFlight) -> bool) -> bool {
        let mut any = false;
        self.table
            .each(|shard| any |= shard.values().any(|in_flight| is(in_flight)));
        any
    }
}

/// The time in which a leader that waits for an owner in another process begins a look at the
/// record, unless its runtime is blocked or the store is slow. A follower that trusts such a look
/// may miss a response that is at most this old.
const RECENTLY: Duration = POLL.saturating_add(Duration::from_millis(50));

/// The end of the wait of a follower.
pub(super) enum Followed {
    Shared(SharedResult),
    /// The deadline has passed. The leader is current if it owns the key and has not begun to record
    /// its outcome, or if it has looked at the record recently. Otherwise its runtime may be
    /// blocked, and the record may have an outcome that the leader has not seen.
    TimeUp {
        is_leader_current: bool,
    },
}

/// A waiter for a leader. Dropping it ends its count in the limits of waiters (I11).
pub(super) struct Follower {
    in_flight_table: Arc<InFlightTable>,
    leader: Arc<InFlight>,
}

impl Follower {
    /// Waits until `following` has the result of the leader, or the deadline passes (I7).
    pub(super) async fn until(&self, deadline: Deadline, following: impl Future<Output = SharedResult>) -> Followed {
        let mut following = pin!(following);
        let early = deadline.left().saturating_sub(RECENTLY);
        if let Ok(shared_result) = within(early, following.as_mut()).await {
            return Followed::Shared(shared_result);
        }
        let looks = self.looks();
        match within(deadline.left(), following).await {
            Ok(shared_result) => Followed::Shared(shared_result),
            Err(_) => Followed::TimeUp {
                is_leader_current: match self.leader.lease() {
                    Some(lease) => lease.is_in_flight(),
                    None => self.looks() > looks,
                },
            },
        }
    }

    /// Waits for the result of the leader.
    pub(super) async fn shared_result(&self) -> SharedResult {
        self.leader
            .until(|in_flight| in_flight.shared_result.get())
            .await
            .clone()
    }

    /// Whether the leader owns the key, or has owned it.
    pub(super) fn has_owner(&self) -> bool {
        self.leader.lease().is_some()
    }

    /// Returns the number of looks at the record that the leader has begun.
    fn looks(&self) -> u64 {
        self.leader.looks.load(Ordering::Acquire)
    }

    /// Waits until the leader owns the key. Returns `false` if the leader ends first.
    pub(super) async fn owned(&self) -> bool {
        let owned = self.leader.until(|in_flight| {
            let has_ended = in_flight.shared_result.get().map(|_| false);
            in_flight.lease().map(|_| true).or(has_ended)
        });
        owned.await
    }
}

/// A waiter for the decision whether the key belongs to the fingerprint of the leader.
pub(super) struct Undecided {
    follower: Follower,
    /// The number of the last look that had begun when the wait began.
    look: u64,
}

impl Undecided {
    /// Waits until the leader knows whether the key belongs to its fingerprint. Returns
    /// `Some(true)` if it does, so that this request is a mismatch. Returns `Some(false)` if the
    /// leader ends first, and `None` if the deadline passes first.
    pub(super) async fn is_mismatch(&self, deadline: Deadline) -> Option<bool> {
        let confirmed = self.follower.leader.confirmed_after(self.look);
        within(deadline.left(), confirmed).await.ok()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.leader.waiters.fetch_sub(1, Ordering::Relaxed);
        self.in_flight_table.waiters.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(all(test, feature = "postgres"))]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_status_and_grpc_code_has_a_number_of_its_own() {
        let mut numbers = HashSet::new();
        for status in [200, 404, 503].map(|status| http::StatusCode::from_u16(status).unwrap()) {
            for code in [None].into_iter().chain((0..=16).map(Some)) {
                assert!(numbers.insert(status_and_code(status, code)), "{status} {code:?}");
            }
        }
    }
}

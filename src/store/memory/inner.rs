//! The state of a memory store: open records, completed records, and their sizes.
//!
//! Two rules keep the state correct for every order of threads and clocks. First, the lock of a
//! key's shard orders all changes of the key, so the store reads the time under that lock. A time
//! that was read earlier could move a fence or an expiry back (I9). Second, moka only holds the
//! records. The clock of the store decides when a record expires, never moka's own clock.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use moka::sync::Cache;
use tokio::sync::Notify;

use super::ledger::{AgedResponse, Ledger};
use super::{Counted, MemoryWatch, StoreStats};
use crate::clock::{Clock, Timestamp};
use crate::error::{Error, ErrorKind};
use crate::protocol::{
    Change, Claim, Completion, Decision, Fence, KeyHasher, Outcome, Owner, Record, Release, Renewal, Resolution,
    ResolveResult, Snapshot, StorageKey, Transition,
};
use crate::sharded::{SHARDS, Sharded, lock};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub(super) struct Inner {
    clock: Clock,
    record_budget: u64,
    byte_budget: u64,
    /// All records without a final outcome: in flight, lost or unknown.
    open: Sharded<StorageKey, Open, KeyHasher>,
    /// All completed records. A live key is always in `open` or in `done`, because it enters `done`
    /// before it leaves `open` (I6).
    done: Cache<StorageKey, Arc<Record>, KeyHasher>,
    ledger: Mutex<Ledger>,
    /// The highest fence of any key. It stays when records are removed, so that fences grow even
    /// after a release, and if the clock stands still or goes back (I9). The lock of a key's shard
    /// orders the claims of the key, and fences of different keys need no order.
    last_fence: AtomicU64,
    /// Counts. No other data depends on them, so their steps need only be atomic.
    records: AtomicU64,
    in_flight: AtomicU64,
    waiters: Arc<AtomicU64>,
    /// Whether a task sweeps. The swap of this one word decides which claim starts the task.
    pub(super) sweeping: AtomicBool,
    /// The second in which a claim last freed expired records that were never completed. The swap
    /// decides which claim of a second frees them.
    abandoned_freed_in: AtomicU64,
    /// Signals the sweeping task to end when the store is dropped.
    pub(super) closed: Arc<Notify>,
}

struct Open {
    record: Record,
    watchers: Option<Arc<Notify>>,
}

type Shard = HashMap<StorageKey, Open, KeyHasher>;

/// The number of expired records that are freed at a time.
const PORTION: usize = 256;

impl Inner {
    pub(super) fn new(clock: Clock, record_budget: u64, byte_budget: u64) -> Self {
        let hasher = KeyHasher::random();
        Self {
            clock,
            record_budget,
            byte_budget,
            open: Sharded::new(hasher.clone()),
            done: Cache::builder().build_with_hasher(hasher),
            ledger: Mutex::new(Ledger::new(byte_budget)),
            last_fence: AtomicU64::new(0),
            records: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            waiters: Arc::default(),
            sweeping: AtomicBool::new(false),
            abandoned_freed_in: AtomicU64::new(u64::MAX),
            closed: Arc::default(),
        }
    }

    pub(super) fn claim(self: &Arc<Self>, claim: &Claim) -> Result<Decision, Error> {
        const FULL: Error = Error::new(
            ErrorKind::StoreFull,
            "the memory store has reached its record budget; raise it to new keys per second × retention in seconds",
        );
        // Without a sweeping task, each claim frees a portion of the expired records.
        if !self.start_sweeper() {
            self.free_some();
        }
        let claim = endless(claim);
        let mut decision = self.try_claim(&claim);
        let mut is_more_expired = true;
        while decision.is_none() && is_more_expired {
            is_more_expired = self.free_some();
            decision = self.try_claim(&claim);
        }
        // The sweeping task may not run, because there is no runtime or nothing drives it.
        if decision.is_none() && self.may_free_abandoned() {
            self.free_abandoned();
            decision = self.try_claim(&claim);
        }
        decision.map(unleased).ok_or(FULL)
    }

    /// Decides a claim without freeing records; `None` if records must be freed first. The caller
    /// may hold a lock, and freeing records may take long, because it may look through all open
    /// records.
    pub(super) fn claim_now(self: &Arc<Self>, claim: &Claim) -> Option<Decision> {
        if !self.start_sweeper() && lock(&self.ledger).has_expired(self.clock.now()) {
            return None;
        }
        self.try_claim(&endless(claim)).map(unleased)
    }

    /// Decides a claim; `None` if it needs a new record beyond the budget.
    ///
    /// The lock of the shard is held for the whole decision, so that one of two concurrent claims
    /// sees the record of the other (I1).
    fn try_claim(&self, claim: &Claim) -> Option<Decision> {
        let mut shard = self.open.lock(&claim.key);
        let now = self.clock.now();
        let floor = Fence::new(self.last_fence.load(Ordering::Relaxed));
        if let Some(open) = shard.get_mut(&claim.key) {
            let transition = Record::claim_above(Some(&open.record), claim, now, floor);
            if let Change::Put(record) = transition.change {
                self.last_fence.fetch_max(record.fence().as_u64(), Ordering::Relaxed);
                self.replace(open, record);
            }
            return Some(transition.reply);
        }
        let done = self.done.get(&claim.key);
        let transition = Record::claim_above(done.as_deref(), claim, now, floor);
        if let Change::Put(record) = transition.change {
            // If the new record replaces an expired one, the number of records stays the same.
            match done {
                Some(done) => self.remove_done(&claim.key, &done),
                None => self.try_reserve().then_some(())?,
            }
            self.last_fence.fetch_max(record.fence().as_u64(), Ordering::Relaxed);
            self.in_flight.fetch_add(1, Ordering::Relaxed);
            shard.insert(claim.key, Open { record, watchers: None });
        }
        Some(transition.reply)
    }

    pub(super) fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Renewal {
        // Any non-zero lease stays endless.
        let lease = if lease.is_zero() { lease } else { Duration::MAX };
        self.change_open(key, |record, now| Record::renew(record, owner, lease, now))
    }

    pub(super) fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Completion {
        let outcome = self.to_store(outcome);
        self.change_open(key, |record, now| {
            Record::complete(record, owner, &outcome, retention, now)
        })
    }

    pub(super) fn release(&self, key: &StorageKey, owner: Owner) -> Release {
        self.change_open(key, |record, now| Record::release(record, owner, now))
    }

    pub(super) fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> ResolveResult {
        let resolution = match resolution {
            Resolution::Completed(outcome, retention) => Resolution::Completed(self.to_store(outcome), *retention),
            Resolution::Absent => Resolution::Absent,
        };
        self.change_open(key, |record, now| Record::resolve(record, fence, &resolution, now))
    }

    pub(super) fn peek(&self, key: &StorageKey) -> Option<Snapshot> {
        let shard = self.open.lock(key);
        let now = self.clock.now();
        match shard.get(key) {
            Some(open) => Record::peek(Some(&open.record), now),
            None => Record::peek(self.done.get(key).as_deref(), now),
        }
    }

    pub(super) fn watch(&self, key: &StorageKey) -> MemoryWatch {
        let mut shard = self.open.lock(key);
        let change = shard.get_mut(key).map(|open| {
            let watchers = open.watchers.get_or_insert_with(Arc::default);
            Arc::clone(watchers).notified_owned()
        });
        MemoryWatch {
            change: change.into(),
            _counted: Counted::new(&self.waiters),
        }
    }

    /// Applies a transition to an open record. A completed record can only be read.
    fn change_open<R>(
        &self,
        key: &StorageKey,
        transition: impl FnOnce(Option<&Record>, Timestamp) -> Transition<R>,
    ) -> R {
        let mut shard = self.open.lock(key);
        let now = self.clock.now();
        let Some(open) = shard.get_mut(key) else {
            return transition(self.done.get(key).as_deref(), now).reply;
        };
        let Transition { reply, change } = transition(Some(&open.record), now);
        match change {
            Change::Unchanged => {}
            Change::Put(record) if record.is_completed() => {
                let exceeds = lock(&self.ledger).enter(key, &record);
                // Insert into `done` before the removal from `open`, so that the key is never
                // absent (I6).
                self.done.insert(*key, Arc::new(record));
                self.close(&mut shard, key);
                drop(shard);
                if exceeds {
                    self.shrink_oldest();
                }
            }
            Change::Put(record) => {
                self.replace(open, record);
                open.wake();
            }
            Change::Remove => {
                self.records.fetch_sub(1, Ordering::Relaxed);
                self.close(&mut shard, key);
            }
        }
        reply
    }

    /// Returns the outcome to store. It is an exact copy, because the bytes may be slices of larger
    /// buffers, and the store must hold as many bytes as it counts (I10). A response larger than
    /// the whole budget becomes a tombstone.
    fn to_store(&self, outcome: &Outcome) -> Outcome {
        match outcome {
            Outcome::Stored(response) if u64::try_from(response.len()).is_ok_and(|len| len <= self.byte_budget) => {
                outcome.to_exact()
            }
            Outcome::Stored(_) | Outcome::Tombstone => Outcome::Tombstone,
            Outcome::Rejected => Outcome::Rejected,
        }
    }

    /// Counts a new record. Returns false if the record budget is used up.
    fn try_reserve(&self) -> bool {
        if self.records.fetch_add(1, Ordering::Relaxed) < self.record_budget {
            return true;
        }
        self.records.fetch_sub(1, Ordering::Relaxed);
        false
    }

    /// Replaces an open record by another open one. An unknown record is open, but not in flight.
    fn replace(&self, open: &mut Open, record: Record) {
        if record.is_in_flight() && !open.record.is_in_flight() {
            self.in_flight.fetch_add(1, Ordering::Relaxed);
        } else if !record.is_in_flight() {
            self.count_off(open);
        }
        open.record = record;
    }

    /// Subtracts a record from the count of records in flight, if it is in flight.
    fn count_off(&self, open: &Open) {
        if open.record.is_in_flight() {
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Takes a record out of `open` and wakes its watchers.
    fn close(&self, shard: &mut Shard, key: &StorageKey) {
        if let Some(open) = shard.remove(key) {
            self.count_off(&open);
            open.wake();
        }
    }

    /// Turns the oldest responses into tombstones until the rest fits into the budget. Locks one
    /// shard at a time, so the caller must hold no shard lock.
    fn shrink_oldest(&self) {
        loop {
            let oldest = lock(&self.ledger).pop_oldest();
            let Some(oldest) = oldest else { return };
            self.shrink(&oldest);
        }
    }

    /// Turns a response into a tombstone, unless its record was removed already.
    fn shrink(&self, response: &AgedResponse) {
        let _shard = self.open.lock(&response.key);
        let Some(done) = self
            .done
            .get(&response.key)
            .filter(|done| done.fence() == response.fence)
        else {
            return;
        };
        lock(&self.ledger).count_off(&done);
        let tombstone = Record::clone(&done).into_tombstone();
        self.done.insert(response.key, Arc::new(tombstone));
    }

    /// Removes a record from `done`. The caller must hold the lock of the record's shard, and must
    /// update the count of records.
    fn remove_done(&self, key: &StorageKey, done: &Record) {
        lock(&self.ledger).count_off(done);
        self.done.invalidate(key);
    }

    /// Frees a portion of the expired completed records. Returns true if more may have expired.
    pub(super) fn free_some(&self) -> bool {
        let now = self.clock.now();
        let expired = lock(&self.ledger).pop_expired(now, PORTION);
        for key in &expired {
            let _shard = self.open.lock(key);
            // A newer record of this key has its own entry in the ledger.
            if let Some(done) = self.done.get(key).filter(|done| done.is_expired(now)) {
                self.remove_done(key, &done);
                self.records.fetch_sub(1, Ordering::Relaxed);
            }
        }
        expired.len() == PORTION
    }

    /// Whether a claim that finds the store full may look through all open records. It may do so
    /// once a second.
    fn may_free_abandoned(&self) -> bool {
        let second = self.clock.now().as_micros() / 1_000_000;
        self.abandoned_freed_in.swap(second, Ordering::Relaxed) != second
    }

    /// Frees the expired records that were never completed: attempts that were given up, or whose
    /// outcome is unknown.
    pub(super) fn free_abandoned(&self) {
        (0..SHARDS).for_each(|shard| self.free_abandoned_in(shard));
        self.tidy();
    }

    /// Does the part of [`free_abandoned`](Self::free_abandoned) for one shard, because rejected
    /// messages can be many and stay open for their whole retention. `shard` is less than
    /// [`SHARDS`].
    pub(super) fn free_abandoned_in(&self, shard: usize) {
        let mut shard = self.open.lock_nth(shard);
        let now = self.clock.now();
        shard.retain(|_, open| {
            let is_expired = open.record.is_expired(now);
            if is_expired {
                self.records.fetch_sub(1, Ordering::Relaxed);
                self.count_off(open);
                open.wake();
            }
            !is_expired
        });
    }

    /// Lets moka clean up after removals.
    pub(super) fn tidy(&self) {
        self.done.run_pending_tasks();
    }

    pub(super) fn sweep(&self) {
        while self.free_some() {}
        self.free_abandoned();
    }

    pub(super) fn stats(&self) -> StoreStats {
        StoreStats {
            records: self.records.load(Ordering::Relaxed),
            bytes: lock(&self.ledger).bytes(),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            waiters: self.waiters.load(Ordering::Relaxed),
        }
    }
}

impl Open {
    fn wake(&self) {
        if let Some(watchers) = &self.watchers {
            watchers.notify_waiters();
        }
    }
}

/// Returns the claim with an endless lease, because the owner lives as long as the store.
fn endless(claim: &Claim) -> Claim {
    Claim {
        lease: Duration::MAX,
        ..claim.clone()
    }
}

fn unleased(decision: Decision) -> Decision {
    match decision {
        Decision::Execute(mut grant) => {
            grant.lease = None;
            Decision::Execute(grant)
        }
        Decision::Recover(mut grant) => {
            grant.lease = None;
            Decision::Recover(grant)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Fingerprint, IfLost, Nonce};

    /// moka holds on to removed records until it cleans up.
    #[test]
    fn a_sweep_frees_the_memory_of_the_records_that_it_removes() {
        const HOUR: Duration = Duration::from_secs(3_600);
        let clock = Clock::manual(Timestamp::from_micros(0));
        let inner = Arc::new(Inner::new(clock.clone(), 10, 100));
        let claim = Claim {
            key: StorageKey::from_bytes([7; 32]),
            fingerprint: Fingerprint::NONE,
            nonce: Nonce::random(),
            lease: HOUR,
            retention: HOUR,
            if_lost: IfLost::Refuse,
            max_attempts: 5,
        };
        let Ok(Decision::Execute(grant)) = inner.claim(&claim) else {
            panic!("a first claim is granted");
        };
        inner.complete(&claim.key, grant.owner, &Outcome::Tombstone, HOUR);
        let record = Arc::downgrade(&inner.done.get(&claim.key).unwrap());
        clock.advance(2 * HOUR);
        inner.sweep();
        assert!(record.upgrade().is_none());
    }
}

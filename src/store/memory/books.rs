//! The books of a memory store: what is open, what is done, and what it costs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use moka::sync::Cache;
use tokio::sync::Notify;

use super::freeing::{Done, FreeExpired};
use super::ledger::{KeptAnswer, Ledger};
use super::{Counted, Figures, MemoryWatch};
use crate::clock::{Clock, Timestamp};
use crate::error::{Error, ErrorKind};
use crate::protocol::{
    Answer, Change, Claim, Completion, Decision, Fence, KeyHasher, Outcome, Owner, Record, Release, Renewal,
    Resolution, Resolved, Snapshot, StorageKey, Transition,
};
use crate::sharded::{lock, Sharded};

pub(super) struct Books {
    clock: Clock,
    record_budget: u64,
    /// Everything that has not ended: in flight, lost, unknown.
    open: Sharded<StorageKey, Open, KeyHasher>,
    /// Everything that has ended. A key is never in neither: it enters here before it leaves `open`.
    done: Cache<StorageKey, Arc<Done>, KeyHasher>,
    ledger: Mutex<Ledger>,
    records: AtomicU64,
    in_flight: AtomicU64,
    waiters: Arc<AtomicU64>,
    pub(super) sweeping: AtomicBool,
}

struct Open {
    record: Record,
    watchers: Option<Arc<Notify>>,
}

type Shard = HashMap<StorageKey, Open, KeyHasher>;

impl Books {
    pub(super) fn new(clock: Clock, record_budget: u64, byte_budget: u64) -> Self {
        let hasher = KeyHasher::random();
        Self {
            clock,
            record_budget,
            open: Sharded::new(hasher.clone()),
            done: Cache::builder().expire_after(FreeExpired).build_with_hasher(hasher),
            ledger: Mutex::new(Ledger::new(byte_budget)),
            records: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            waiters: Arc::default(),
            sweeping: AtomicBool::new(false),
        }
    }

    pub(super) fn claim(self: &Arc<Self>, claim: &Claim) -> Result<Decision, Error> {
        self.start_sweeper();
        // The owner lives as long as the store, so its lease has no end.
        let claim = Claim {
            lease: Duration::MAX,
            ..claim.clone()
        };
        let now = self.clock.now();
        let mut shard = self.open.lock(&claim.key);
        let decision = match shard.get_mut(&claim.key) {
            Some(open) if !open.record.is_expired(now) => {
                let transition = Record::claim(Some(&open.record), &claim, now);
                if let Change::Put(record) = transition.change {
                    open.record = record;
                }
                transition.reply
            }
            expired => {
                let reserved = expired.is_some();
                let done = self.done.get(&claim.key);
                let transition = Record::claim(done.as_ref().map(|done| &done.record), &claim, now);
                if let Change::Put(record) = transition.change {
                    if !reserved {
                        self.reserve(now)?;
                    }
                    shard.insert(claim.key, Open { record, watchers: None });
                }
                transition.reply
            }
        };
        Ok(unleased(decision))
    }

    pub(super) fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Renewal {
        // Anything but giving it up leaves the lease without end.
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
        self.change_open(key, |record, now| {
            Record::complete(record, owner, outcome, retention, now)
        })
    }

    pub(super) fn release(&self, key: &StorageKey, owner: Owner) -> Release {
        self.change_open(key, |record, now| Record::release(record, owner, now))
    }

    pub(super) fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Resolved {
        self.change_open(key, |record, now| Record::resolve(record, fence, resolution, now))
    }

    pub(super) fn peek(&self, key: &StorageKey) -> Option<Snapshot> {
        let now = self.clock.now();
        let shard = self.open.lock(key);
        match shard.get(key) {
            Some(open) => Record::peek(Some(&open.record), now),
            None => Record::peek(self.done.get(key).as_ref().map(|done| &done.record), now),
        }
    }

    pub(super) fn watch(&self, key: &StorageKey) -> MemoryWatch {
        let mut shard = self.open.lock(key);
        let change = shard.get_mut(key).map(|open| {
            let watchers = open.watchers.get_or_insert_with(Arc::default);
            Arc::clone(watchers).notified_owned()
        });
        MemoryWatch {
            change,
            _counted: Counted::new(&self.waiters),
        }
    }

    /// Applies a transition to a record that has not ended; one that has ended can only be looked at.
    fn change_open<R>(
        &self,
        key: &StorageKey,
        transition: impl FnOnce(Option<&Record>, Timestamp) -> Transition<R>,
    ) -> R {
        let now = self.clock.now();
        let mut shrinking = Vec::new();
        let mut shard = self.open.lock(key);
        let Some(open) = shard.get_mut(key) else {
            return transition(self.done.get(key).as_ref().map(|done| &done.record), now).reply;
        };
        let Transition { reply, change } = transition(Some(&open.record), now);
        match change {
            Change::Keep => return reply,
            Change::Put(record) if record.is_completed() => {
                let record = self.settle(key, record, now, &mut shrinking);
                self.done.insert(*key, Arc::new(Done::new(record, now)));
                self.close(&mut shard, key);
            }
            Change::Put(record) => {
                open.record = record;
                open.wake();
            }
            Change::Remove => {
                self.records.fetch_sub(1, Ordering::Relaxed);
                self.close(&mut shard, key);
            }
        }
        drop(shard);
        shrinking.iter().for_each(|answer| self.shrink(answer, now));
        reply
    }

    /// Reserves a record, or refuses.
    fn reserve(&self, now: Timestamp) -> Result<(), Error> {
        const FULL: Error = Error::new(
            ErrorKind::StoreFull,
            "the memory store has reached its record budget; raise it to new keys per second × retention in seconds",
        );
        if !self.try_reserve() {
            self.strike_expired(now);
            if !self.try_reserve() {
                return Err(FULL);
            }
        }
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn try_reserve(&self) -> bool {
        if self.records.fetch_add(1, Ordering::Relaxed) < self.record_budget {
            return true;
        }
        self.records.fetch_sub(1, Ordering::Relaxed);
        false
    }

    /// Enters a record that has ended in the ledger and returns it as it is to be stored.
    fn settle(&self, key: &StorageKey, record: Record, now: Timestamp, shrinking: &mut Vec<KeptAnswer>) -> Record {
        let expires = record.expires_at();
        let mut ledger = lock(&self.ledger);
        match record.answer().map(size) {
            Some(bytes) if ledger.fits(bytes) => {
                ledger.enter_kept(*key, expires, bytes, now, |answer| shrinking.push(answer));
                record
            }
            _ => {
                ledger.enter_tombstone(expires);
                record.into_tombstone()
            }
        }
    }

    /// Takes a record out of `open` and wakes who watched it.
    fn close(&self, shard: &mut Shard, key: &StorageKey) {
        if let Some(open) = shard.remove(key) {
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            open.wake();
        }
    }

    /// Turns an answer into a tombstone, unless its record has gone since.
    fn shrink(&self, answer: &KeptAnswer, now: Timestamp) {
        let _shard = self.open.lock(&answer.key);
        let Some(done) = self.done.get(&answer.key) else { return };
        if done.record.expires_at() == answer.expires {
            let tombstone = done.record.clone().into_tombstone();
            self.done.insert(answer.key, Arc::new(Done::new(tombstone, now)));
        }
    }

    fn strike_expired(&self, now: Timestamp) {
        let expired = lock(&self.ledger).expire(now);
        self.records.fetch_sub(expired, Ordering::Relaxed);
    }

    pub(super) fn sweep(&self) {
        let now = self.clock.now();
        self.strike_expired(now);
        let mut abandoned = 0;
        self.open.each(|shard| {
            shard.retain(|_, open| {
                let expired = open.record.is_expired(now);
                abandoned += u64::from(expired);
                !expired
            });
        });
        self.records.fetch_sub(abandoned, Ordering::Relaxed);
        self.in_flight.fetch_sub(abandoned, Ordering::Relaxed);
        self.done.run_pending_tasks();
    }

    pub(super) fn figures(&self) -> Figures {
        Figures {
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

fn size(answer: &Answer) -> u64 {
    u64::try_from(answer.len()).unwrap_or(u64::MAX)
}

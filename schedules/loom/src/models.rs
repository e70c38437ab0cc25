//! Models of the parts whose atomics are weaker than sequentially consistent. loom runs each model
//! in every order of its steps, and lets each load return every value that the memory model allows.

use std::future::{Pending, pending};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use loom::thread;
use tokio::runtime::Handle;

use crate::clock::{Clock, Stopwatch, Timestamp};
use crate::detach::{Deferred, TaskTracker};
use crate::engine::{Drain, HeldLease, KeyOwner};
use crate::error::Error;
use crate::protocol::{
    Change, Claim, Completion, Decision, Fence, Fingerprint, Grant, IfLost, Nonce, Outcome, Owner, Record, Release,
    Renewal, Resolution, ResolveResult, Snapshot, Status, StorageKey, Transition,
};
use crate::schedule::Schedule;
use crate::store::{MemoryStore, Store, StoreRetry};

const LEASE: Duration = Duration::from_secs(12);
const KEY: StorageKey = StorageKey::from_bytes([7; 32]);

fn claim(nonce: u8) -> Claim {
    Claim {
        key: KEY,
        fingerprint: Fingerprint::of(b"pay"),
        nonce: Nonce::from_bytes([nonce; 16]),
        lease: LEASE,
        retention: LEASE,
        if_lost: IfLost::Refuse,
        max_attempts: 9,
    }
}

/// Runs a model, and prints how many executions it has. In each of them, at most two threads are
/// interrupted in the middle, unless `LOOM_MAX_PREEMPTIONS` says otherwise.
fn model(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(2);
    let executions = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = Arc::clone(&executions);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        model();
    });
    println!("{} executions", executions.load(Ordering::Relaxed));
}

/// A caller hands its work over to a task. A drain must not miss the work in between, and the effect
/// of the work must be visible after the drain.
pub fn a_drain_sees_work_that_is_handed_over() {
    model(|| {
        let (tracker, effect) = (Arc::<TaskTracker>::default(), Arc::new(AtomicBool::new(false)));
        let begun = Arc::new(AtomicBool::new(false));
        let caller = {
            let (tracker, effect, begun) = (Arc::clone(&tracker), Arc::clone(&effect), Arc::clone(&begun));
            thread::spawn(move || {
                let attended = tracker.attend();
                begun.store(true, Ordering::Release);
                tracker.spawn(&Handle::try_current().unwrap(), async move {
                    effect.store(true, Ordering::Relaxed);
                });
                drop(attended);
            })
        };
        let has_begun = begun.load(Ordering::Acquire);
        loom::future::block_on(Drain::new(&tracker).wait());
        if has_begun {
            assert!(effect.load(Ordering::Relaxed), "the drain waits for the work (I11)");
        }
        caller.join().unwrap();
    });
}

/// Two ends of attempts together exceed the bytes that may be pending.
pub fn deferred_writes_stay_within_their_bounds() {
    const MORE_THAN_HALF: Deferred = Deferred::RecordEnd(40 << 20);
    model(|| {
        let tracker = Arc::<TaskTracker>::default();
        let (pending, begun) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let defer = {
            let (tracker, pending, begun) = (Arc::clone(&tracker), Arc::clone(&pending), Arc::clone(&begun));
            move || {
                let (pending, begun) = (Arc::clone(&pending), Arc::clone(&begun));
                tracker.spawn_deferred(&Handle::try_current().unwrap(), MORE_THAN_HALF, async move {
                    begun.fetch_add(1, Ordering::Relaxed);
                    assert_eq!(pending.fetch_add(1, Ordering::Relaxed), 0, "64 MiB at most (I10)");
                    pending.fetch_sub(1, Ordering::Relaxed);
                });
            }
        };
        let other = thread::spawn(defer.clone());
        defer();
        other.join().unwrap();
        loom::future::block_on(Drain::new(&tracker).wait());
        let before = begun.load(Ordering::Relaxed);
        defer();
        loom::future::block_on(Drain::new(&tracker).wait());
        let after = begun.load(Ordering::Relaxed);
        assert_eq!(
            after,
            before + 1,
            "no bytes are left, so there is room for the next end"
        );
    });
}

/// A task and the owner find the same renewal overdue.
pub fn one_of_two_renews_an_overdue_lease() {
    model(|| {
        let schedule = Arc::new(Schedule::new(LEASE, Stopwatch::start()));
        tokio::time::advance(LEASE / 2);
        let task = {
            let schedule = Arc::clone(&schedule);
            thread::spawn(move || schedule.take(Duration::ZERO))
        };
        let by_owner = schedule.take_overdue();
        let by_task = task.join().unwrap();
        assert!(by_owner ^ by_task, "one of them renews: {by_owner} {by_task}");
    });
}

/// A renewal and the release of a second attempt reach the store in any order.
pub fn a_renewal_leaves_a_released_key_free() {
    model(|| {
        let (store, grant) = OneRecord::of_second_attempt();
        let lease = Arc::new(HeldLease::new(grant, Stopwatch::start));
        let renewal = {
            let (store, lease) = (store.clone(), Arc::clone(&lease));
            thread::spawn(move || loom::future::block_on(lease.renew(&store, &KEY, LEASE)))
        };
        let tracker = Arc::default();
        let owner = KeyOwner {
            store: &store,
            key: &KEY,
            lease: &lease,
            retry: StoreRetry::new(LEASE, LEASE),
            tracker: &tracker,
        };
        loom::future::block_on(owner.release());
        renewal.join().unwrap();
        let seen = loom::future::block_on(store.peek(&KEY)).unwrap();
        let is_free = seen.is_some_and(|seen| matches!(seen.status, Status::Lost));
        assert!(is_free, "the next attempt can run (I7)");
    });
}

/// The owners of one key follow each other. Each sees the effect of the owner before.
pub fn owners_of_a_key_in_the_memory_store_see_the_effects_before_theirs() {
    model(|| {
        let clock = Clock::manual(Timestamp::from_micros(1));
        let store = MemoryStore::builder().with_clock(clock).build();
        let last_fence = Arc::new(AtomicU64::new(0));
        let own = |store: &MemoryStore, last_fence: &AtomicU64, nonce| {
            let Some(Ok(Decision::Execute(grant))) = store.claim(&claim(nonce)).now_or_never() else {
                return;
            };
            let (before, fence) = (last_fence.load(Ordering::Relaxed), grant.owner.fence.as_u64());
            assert!(before < fence, "fences grow (I9): {before}, {fence}");
            last_fence.store(fence, Ordering::Relaxed);
            let released = store.release(&KEY, grant.owner).now_or_never();
            assert!(matches!(released, Some(Ok(Release::Released))), "{released:?}");
        };
        let other = {
            let (store, last_fence) = (store.clone(), Arc::clone(&last_fence));
            thread::spawn(move || own(&store, &last_fence, 1))
        };
        own(&store, &last_fence, 2);
        other.join().unwrap();
        let stats = store.stats();
        assert_eq!((stats.records, stats.in_flight), (0, 0));
    });
}

/// A store of one record, whose clock stands still.
#[derive(Clone)]
struct OneRecord(Arc<Mutex<Option<Record>>>);

impl OneRecord {
    /// Makes a store whose key was claimed, lost and claimed again.
    fn of_second_attempt() -> (Self, Grant) {
        let store = Self(Arc::default());
        let lost = Claim {
            lease: Duration::ZERO,
            ..claim(1)
        };
        store.apply(|record, now| Record::claim(record, &lost, now));
        let again = Claim {
            if_lost: IfLost::Execute,
            ..claim(2)
        };
        match store.apply(|record, now| Record::claim(record, &again, now)) {
            Decision::Execute(grant) => (store, grant),
            decision => panic!("a lost attempt runs again, not {decision:?}"),
        }
    }

    fn apply<R>(&self, transition: impl FnOnce(Option<&Record>, Timestamp) -> Transition<R>) -> R {
        let mut record = self.0.lock().unwrap();
        let Transition { reply, change } = transition(record.as_ref(), Timestamp::from_micros(1));
        match change {
            Change::Unchanged => {}
            Change::Put(changed) => *record = Some(changed),
            Change::Remove => *record = None,
        }
        reply
    }
}

impl Store for OneRecord {
    type Watch = Pending<()>;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        Ok(self.apply(|record, now| Record::claim(record, claim, now)))
    }

    async fn renew(&self, _: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        Ok(self.apply(|record, now| Record::renew(record, owner, lease, now)))
    }

    async fn complete(
        &self,
        _: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        Ok(self.apply(|record, now| Record::complete(record, owner, outcome, retention, now)))
    }

    async fn release(&self, _: &StorageKey, owner: Owner) -> Result<Release, Error> {
        Ok(self.apply(|record, now| Record::release(record, owner, now)))
    }

    async fn resolve(&self, _: &StorageKey, fence: Fence, to: &Resolution) -> Result<ResolveResult, Error> {
        Ok(self.apply(|record, now| Record::resolve(record, fence, to, now)))
    }

    async fn peek(&self, _: &StorageKey) -> Result<Option<Snapshot>, Error> {
        Ok(self.apply(|record, now| Transition {
            reply: Record::peek(record, now),
            change: Change::Unchanged,
        }))
    }

    async fn watch(&self, _: &StorageKey) -> Result<Pending<()>, Error> {
        Ok(pending())
    }
}

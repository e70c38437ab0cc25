//! The store reads its clock under the lock of a key. Fences grow, records expire by the clock, and
//! the counts are right in any order of threads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::Context;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::executor::block_on;
use futures::task::ArcWake;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Grant, IfLost, Nonce, Outcome, Resolution, Status, StoredResponse,
};
use tower_idempotency::{Clock, MemoryStore, Store, Timestamp};

use super::{HOUR, claim, clock, stored};

fn any_claim(key: u8) -> Claim {
    Claim {
        nonce: Nonce::random(),
        ..claim(key, 0)
    }
}

fn grant_of(store: &MemoryStore, claim: &Claim) -> Option<Grant> {
    match block_on(store.claim(claim)).unwrap() {
        Decision::Execute(grant) | Decision::Recover(grant) => Some(grant),
        _ => None,
    }
}

fn of_length(bytes: usize) -> Outcome {
    Outcome::Stored(StoredResponse {
        head: Bytes::new(),
        body: vec![0; bytes].into(),
    })
}

fn complete(store: &MemoryStore, key: u8, outcome: &Outcome, retention: Duration) -> Completion {
    let claim = any_claim(key);
    let grant = grant_of(store, &claim).unwrap();
    block_on(store.complete(&claim.key, grant.owner, outcome, retention)).unwrap()
}

/// The store read the clock before it held the lock, so a thread that had waited for the lock got a
/// lower fence than the thread before it.
#[test]
fn the_fence_grows_from_owner_to_owner_among_many_threads() {
    let store = MemoryStore::new();
    let last = AtomicU64::new(0);
    let not_grown = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50_000 {
                    // Only owners get here, one after the other.
                    let claim = any_claim(1);
                    if let Some(grant) = grant_of(&store, &claim) {
                        let fence = grant.owner.fence.as_u64();
                        let grows = fence > last.swap(fence, Ordering::SeqCst);
                        not_grown.fetch_add(u64::from(!grows), Ordering::SeqCst);
                        block_on(store.release(&claim.key, grant.owner)).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(not_grown.into_inner(), 0);
}

/// Each of these ends removes the record, and its fence with it.
#[tokio::test]
async fn the_fence_grows_while_the_clock_stands_still_and_records_are_removed() {
    let store = MemoryStore::builder().with_clock(clock()).build();
    let mut last = 0;
    for n in 0..40 {
        let claim = Claim {
            if_lost: IfLost::Execute,
            ..any_claim(1)
        };
        let grant = grant_of(&store, &claim).unwrap();
        let owner = grant.owner;
        assert!(owner.fence.as_u64() > last, "attempt {n}");
        last = owner.fence.as_u64();
        match n % 4 {
            0 => drop(store.release(&claim.key, owner).await.unwrap()),
            1 => drop(
                store
                    .complete(&claim.key, owner, &stored("x"), Duration::ZERO)
                    .await
                    .unwrap(),
            ),
            2 => {
                store.renew(&claim.key, owner, Duration::ZERO).await.unwrap();
                let absent = Resolution::Absent;
                store.resolve(&claim.key, owner.fence, &absent).await.unwrap();
            }
            // The attempt is lost, and the next claim takes the key over.
            _ => drop(store.renew(&claim.key, owner, Duration::ZERO).await.unwrap()),
        }
        store.sweep();
    }
}

/// A runtime with paused time is an hour ahead of the threads outside of it, so the clock of a
/// store that both use goes back.
#[test]
fn the_fence_grows_and_the_counts_are_right_when_the_clock_goes_back() {
    let ahead = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    ahead.block_on(tokio::time::advance(HOUR));
    let store = MemoryStore::builder().with_byte_budget(100).build();
    let in_future = |claim: &Claim| {
        ahead.block_on(async {
            let Decision::Execute(grant) = store.claim(claim).await.unwrap() else {
                panic!("not granted")
            };
            grant
        })
    };
    let claim = any_claim(1);
    let first = in_future(&claim);
    block_on(store.release(&claim.key, first.owner)).unwrap();
    let second = grant_of(&store, &claim).unwrap();
    assert!(second.owner.fence > first.owner.fence);
    // The completion has a time an hour in the past.
    block_on(store.complete(&claim.key, second.owner, &of_length(80), Duration::ZERO)).unwrap();
    ahead.block_on(async { store.sweep() });
    complete(&store, 2, &of_length(90), HOUR);
    ahead.block_on(async { store.sweep() });
    let third = any_claim(3);
    let ahead_of_us = in_future(&third);
    block_on(store.complete(&third.key, ahead_of_us.owner, &of_length(95), Duration::ZERO)).unwrap();
    store.sweep();
    let figures = store.stats();
    assert!(figures.bytes <= 100 && figures.in_flight == 0, "{figures:?}");
}

/// Blocks the thread that wakes it, once.
struct Gate {
    closed: AtomicBool,
    reached: mpsc::SyncSender<()>,
    open: Mutex<mpsc::Receiver<()>>,
}

impl ArcWake for Gate {
    fn wake_by_ref(gate: &Arc<Self>) {
        if gate.closed.swap(false, Ordering::SeqCst) {
            gate.reached.send(()).unwrap();
            gate.open.lock().unwrap().recv().unwrap();
        }
    }
}

/// A completion that waited for its shard entered its record under a second that the sweep had
/// already removed. When the store then subtracted an older response of that second, the count
/// underflowed, and the completion of a third key panicked after its effect.
#[test]
fn a_completion_that_waits_for_its_shard_does_not_corrupt_the_counts() {
    let clock = Clock::manual(Timestamp::from_micros(10_000_000));
    let store = MemoryStore::builder()
        .with_clock(clock.clone())
        .with_byte_budget(100)
        .build();
    complete(&store, 1, &of_length(80), Duration::ZERO);

    let slow = any_claim(2);
    let owner = grant_of(&store, &slow).unwrap().owner;
    let (reached, is_reached) = mpsc::sync_channel(1);
    let (open_gate, open) = mpsc::channel();
    let gate = Arc::new(Gate {
        closed: AtomicBool::new(true),
        reached,
        open: open.into(),
    });
    let mut watch = Box::pin(block_on(store.watch(&slow.key)).unwrap());
    let waker = futures::task::waker(gate);
    assert!(watch.as_mut().poll_unpin(&mut Context::from_waker(&waker)).is_pending());

    thread::scope(|scope| {
        // The renewal wakes the watch, which stays within the shard until the gate opens.
        scope.spawn(|| block_on(store.renew(&slow.key, owner, HOUR)).unwrap());
        is_reached.recv().unwrap();
        let completing =
            scope.spawn(|| block_on(store.complete(&slow.key, owner, &of_length(10), Duration::ZERO)).unwrap());
        // No signal shows that a thread waits for a lock.
        thread::sleep(Duration::from_millis(100));
        clock.advance(Duration::from_secs(2));
        scope.spawn(|| store.sweep());
        thread::sleep(Duration::from_millis(100));
        open_gate.send(()).unwrap();
        assert_eq!(completing.join().unwrap(), Completion::Completed);
    });

    assert_eq!(complete(&store, 3, &of_length(95), HOUR), Completion::Completed);
    let figures = store.stats();
    assert!(figures.bytes <= 100, "{figures:?}");
    let third = block_on(store.peek(&claim(3, 0).key)).unwrap().unwrap();
    assert!(
        matches!(third.status, Status::Completed(Outcome::Stored(_))),
        "{third:?}"
    );
}

#[test]
fn the_counts_are_right_after_threads_have_raced() {
    const LONGEST: u64 = 3_000;
    let clock = clock();
    let store = MemoryStore::builder()
        .with_clock(clock.clone())
        .with_byte_budget(400)
        .with_record_budget(12)
        .build();
    let run = |thread: u64| {
        for n in 0..5_000_u64 {
            let claim = any_claim(u8::try_from((n * 7 + thread) % 16).unwrap());
            let Ok(Decision::Execute(grant)) = block_on(store.claim(&claim)) else {
                clock.advance(Duration::from_millis(1));
                continue;
            };
            let bytes = usize::try_from(n % 90).unwrap();
            let retention = Duration::from_millis((n * 37) % LONGEST);
            let done = match n % 5 {
                0 => block_on(store.release(&claim.key, grant.owner)).map(drop),
                1 => block_on(store.renew(&claim.key, grant.owner, Duration::ZERO)).map(drop),
                _ => block_on(store.complete(&claim.key, grant.owner, &of_length(bytes), retention)).map(drop),
            };
            done.unwrap();
            clock.advance(Duration::from_millis(n % 40));
            if n % 10 == thread {
                store.sweep();
            }
        }
    };
    thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || run(thread));
        }
    });
    let figures = store.stats();
    assert!(figures.bytes <= 400 && figures.records <= 12, "{figures:?}");
    let keys = (0..16).filter_map(|key| block_on(store.peek(&claim(key, 0).key)).unwrap());
    let held: usize = keys
        .map(|snapshot| match snapshot.status {
            Status::Completed(Outcome::Stored(response)) => response.len(),
            _ => 0,
        })
        .sum();
    assert!(
        figures.bytes >= u64::try_from(held).unwrap(),
        "{held} held, {figures:?}"
    );
    clock.advance(2 * HOUR + Duration::from_millis(LONGEST));
    store.sweep();
    let figures = store.stats();
    assert_eq!((figures.records, figures.bytes, figures.in_flight), (0, 0, 0));
}

/// moka expired records by the machine's clock. The record must live by the store's clock, which
/// stands still here.
#[test]
fn a_record_expires_by_the_clock_of_its_store() {
    let clock = clock();
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    let retention = Duration::from_millis(100);
    complete(&store, 1, &of_length(1), retention);
    // Real time, which must not count.
    thread::sleep(Duration::from_millis(2_000));
    store.sweep();
    assert!(matches!(
        block_on(store.claim(&any_claim(1))).unwrap(),
        Decision::Replay(_)
    ));
    clock.advance(retention);
    assert!(grant_of(&store, &any_claim(1)).is_some());
}

#[test]
fn a_manual_clock_that_is_moved_beyond_its_maximum_stays_there() {
    let clock = clock();
    clock.advance(Duration::MAX);
    clock.advance(Duration::MAX);
    assert_eq!(clock.now(), Timestamp::MAX);
    let store = MemoryStore::builder().with_clock(clock).build();
    complete(&store, 1, &of_length(1), HOUR);
    store.sweep();
}

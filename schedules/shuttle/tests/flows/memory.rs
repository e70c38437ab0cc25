//! The memory store by itself: its lock of each key, its ledger, and its counters.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fingerprint, Grant, IfLost, Nonce, Outcome, Release, Renewal, Snapshot, Status,
    StorageKey, StoredResponse,
};
use tower_idempotency::store::StoreStats;
use tower_idempotency::{Clock, MemoryStore, Store, Timestamp};

use crate::check;

const RETENTION: Duration = Duration::from_secs(2);

const fn key(key: u8) -> StorageKey {
    StorageKey::from_bytes([key; 32])
}

fn claim(of: u8, nonce: u8) -> Claim {
    Claim {
        key: key(of),
        fingerprint: Fingerprint::of(b"pay"),
        nonce: Nonce::from_bytes([nonce; 16]),
        lease: RETENTION,
        retention: RETENTION,
        if_lost: IfLost::Refuse,
        max_attempts: 1_000,
    }
}

async fn granted(store: &MemoryStore, claim: &Claim) -> Option<Grant> {
    match store.claim(claim).await {
        Ok(Decision::Execute(grant)) => Some(grant),
        _ => None,
    }
}

async fn complete(store: &MemoryStore, claim: &Claim, grant: Grant, bytes: usize) {
    let outcome = Outcome::Stored(StoredResponse {
        head: vec![claim.nonce.as_bytes()[0]; bytes].into(),
        ..StoredResponse::default()
    });
    let completion = store.complete(&claim.key, grant.owner, &outcome, RETENTION).await;
    assert_eq!(completion.unwrap(), Completion::Completed, "the owner completes (I8)");
}

/// Runs tasks to their ends.
fn all<F: Future<Output = ()> + Send + 'static>(tasks: impl IntoIterator<Item = F>) {
    let tasks: Vec<_> = tasks.into_iter().map(tokio::spawn).collect();
    shuttle::future::block_on(join_all(tasks))
        .into_iter()
        .for_each(Result::unwrap);
}

/// Makes a store whose clock stands still, so that only the store's own order lets fences grow.
fn standing_still() -> (MemoryStore, Clock) {
    let clock = Clock::manual(Timestamp::from_micros(1));
    (MemoryStore::builder().with_clock(clock.clone()).build(), clock)
}

/// Claims a key until it is completed, and waits while another task owns it.
async fn claim_or_wait(store: MemoryStore, nonce: u8, grants: Arc<Mutex<Vec<u8>>>) {
    let claim = claim(1, nonce);
    loop {
        if let Some(grant) = granted(&store, &claim).await {
            grants.lock().unwrap().push(nonce);
            shuttle::future::yield_now().await;
            return complete(&store, &claim, grant, 1).await;
        }
        let watch = store.watch(&claim.key).await.unwrap();
        let Some(Snapshot { status, .. }) = store.peek(&claim.key).await.unwrap() else {
            panic!("a claimed key is not absent (I6)");
        };
        if let Status::Completed(Outcome::Stored(response)) = status {
            assert_eq!(response.head[0], grants.lock().unwrap()[0], "the owner's response (I2)");
            return;
        }
        watch.await;
    }
}

fn claims() {
    let (store, _) = standing_still();
    let grants = Arc::<Mutex<Vec<_>>>::default();
    all((1..=3).map(|nonce| claim_or_wait(store.clone(), nonce, Arc::clone(&grants))));
    assert_eq!(grants.lock().unwrap().len(), 1, "one owner (I1)");
    let left = StoreStats::default();
    let stats = store.stats();
    assert_eq!(
        (stats.records, stats.in_flight, stats.waiters),
        (1, left.in_flight, left.waiters)
    );
}

#[test]
fn one_claim_owns_a_key_and_every_watch_sees_its_end() {
    check(claims);
}

async fn claim_and_release(store: MemoryStore, nonce: u8, fences: Arc<Mutex<Vec<u64>>>) {
    let mut released = 0;
    while released < 2 {
        let claim = claim(1, nonce);
        if let Some(grant) = granted(&store, &claim).await {
            fences.lock().unwrap().push(grant.owner.fence.as_u64());
            let release = store.release(&claim.key, grant.owner).await.unwrap();
            assert_eq!(release, Release::Released);
            released += 1;
        } else {
            let watch = store.watch(&claim.key).await.unwrap();
            if store.peek(&claim.key).await.unwrap().is_some() {
                watch.await;
            }
        }
    }
}

fn releases() {
    let (store, _) = standing_still();
    let fences = Arc::<Mutex<Vec<_>>>::default();
    all((1..=3).map(|nonce| claim_and_release(store.clone(), nonce, Arc::clone(&fences))));
    let fences = fences.lock().unwrap();
    assert!(
        fences.is_sorted_by(|earlier, later| earlier < later),
        "fences grow (I9): {fences:?}"
    );
    assert_eq!(store.stats(), StoreStats::default(), "nothing is left");
}

#[test]
fn fences_grow_although_releases_remove_the_records() {
    check(releases);
}

/// Claims a key once, gives the lease up, and waits while another task owns the key.
async fn claim_and_give_up(store: MemoryStore, nonce: u8) {
    let claim = Claim {
        if_lost: IfLost::Execute,
        ..claim(1, nonce)
    };
    loop {
        if let Some(grant) = granted(&store, &claim).await {
            let given_up = store.renew(&claim.key, grant.owner, Duration::ZERO).await;
            assert_eq!(given_up.unwrap(), Renewal::Renewed);
            return;
        }
        let watch = store.watch(&claim.key).await.unwrap();
        let seen = store.peek(&claim.key).await.unwrap();
        if seen.is_some_and(|seen| matches!(seen.status, Status::InFlight { .. })) {
            watch.await;
        }
    }
}

fn give_ups() {
    let (store, _) = standing_still();
    all((1..=3).map(|nonce| claim_and_give_up(store.clone(), nonce)));
    let stats = store.stats();
    assert_eq!((stats.records, stats.waiters), (1, 0), "nothing waits (I11)");
}

#[test]
fn every_watch_sees_that_a_lease_is_given_up() {
    check(give_ups);
}

/// Claims keys of its own, completes one of them, and releases the other.
async fn fill(store: MemoryStore, task: u8, granted_at_a_time: Arc<Mutex<(u64, u64)>>) {
    for (attempt, is_completed) in [(0, true), (1, false)] {
        let claim = claim(2 * task + attempt, task);
        let Some(grant) = granted(&store, &claim).await else {
            continue;
        };
        {
            let mut counts = granted_at_a_time.lock().unwrap();
            counts.0 += 1;
            counts.1 = counts.1.max(counts.0);
        }
        if is_completed {
            complete(&store, &claim, grant, 60).await;
        } else {
            // Subtract first, because another task may claim as soon as the key is free.
            granted_at_a_time.lock().unwrap().0 -= 1;
            store.release(&claim.key, grant.owner).await.unwrap();
        }
    }
}

fn budgets() {
    let clock = Clock::manual(Timestamp::from_micros(1));
    let builder = MemoryStore::builder().with_clock(clock.clone());
    let store = builder.with_record_budget(2).with_byte_budget(100).build();
    let counts = Arc::<Mutex<(u64, u64)>>::default();
    all((1..=3).map(|task| fill(store.clone(), task, Arc::clone(&counts))));
    let (left, most) = *counts.lock().unwrap();
    assert!(most <= 2, "at most as many records as the budget (I10)");
    let stats = store.stats();
    assert_eq!((stats.records, stats.in_flight), (left, 0));
    assert!(
        stats.bytes <= 100,
        "at most as many bytes as the budget (I10): {stats:?}"
    );
    clock.advance(2 * RETENTION);
    store.sweep();
    assert_eq!(store.stats(), StoreStats::default(), "every count goes back to zero");
}

#[test]
fn budgets_hold_and_the_counts_go_back_to_zero() {
    check(budgets);
}

/// Runs one of two keys again and again: completes it, and lets it expire. The budget has room for the
/// response of one key only.
async fn expire(store: MemoryStore, clock: Clock, nonce: u8) {
    for _ in 0..2 {
        let claim = claim(nonce % 2, nonce);
        if let Some(grant) = granted(&store, &claim).await {
            complete(&store, &claim, grant, 60).await;
            let seen = store.peek(&claim.key).await.unwrap();
            let is_ours = |seen: &Snapshot| seen.fence == grant.owner.fence;
            assert!(
                seen.as_ref()
                    .is_none_or(|seen| is_ours(seen) || seen.fence > grant.owner.fence),
                "{seen:?}"
            );
        }
        clock.advance(RETENTION + Duration::from_secs(2));
        store.sweep();
    }
}

fn expiry() {
    let clock = Clock::manual(Timestamp::from_micros(1));
    let store = MemoryStore::builder()
        .with_clock(clock.clone())
        .with_byte_budget(100)
        .build();
    all((1..=3).map(|nonce| expire(store.clone(), clock.clone(), nonce)));
    clock.advance(2 * RETENTION);
    store.sweep();
    assert_eq!(store.stats(), StoreStats::default(), "every count goes back to zero");
}

#[test]
fn a_key_that_expires_and_runs_again_is_counted_once() {
    check(expiry);
}

fn sweeper() {
    let store = MemoryStore::new();
    let clock = Clock::system();
    let began = clock.now();
    all((1..=2).map(|nonce| {
        let store = store.clone();
        async move {
            let claim = claim(nonce, nonce);
            let grant = granted(&store, &claim).await.expect("each task has its own key");
            complete(&store, &claim, grant, 1).await;
        }
    }));
    shuttle::future::block_on(async {
        while store.stats().records > 0 {
            tokio::time::advance_to_next_timer();
            shuttle::future::yield_now().await;
        }
    });
    let taken = clock.now().saturating_since(began);
    assert!(
        taken <= RETENTION + Duration::from_secs(2),
        "an expired record is freed within two seconds: {taken:?}"
    );
}

#[test]
fn expired_records_are_freed_without_a_claim() {
    check(sweeper);
}

//! The clock of a store's server jumps by an hour while keys are in flight, completed and lost.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use tokio::sync::Notify;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fingerprint, Grant, IfLost, Nonce, Outcome, Renewal, Status, StorageKey,
    StoredResponse,
};
use tower_idempotency::{IdempotencyLayer, PostgresStore, RedisStore, Store};

use crate::support::postgres::PostgresServer;
use crate::support::redis::RedisServer;
use crate::support::turned_clock::TurnedClock;

const AN_HOUR: i64 = 3_600;
const DAY: Duration = Duration::from_secs(86_400);
const LEASE: Duration = Duration::from_secs(2);

/// Longer than one lease and one claim take on a busy machine, and much shorter than an hour.
const SOON: Duration = Duration::from_secs(20);

fn claim(key: &StorageKey, if_lost: IfLost) -> Claim {
    Claim {
        key: *key,
        fingerprint: Fingerprint::of(b"pay"),
        nonce: Nonce::random(),
        lease: LEASE,
        retention: DAY,
        if_lost,
        max_attempts: 5,
    }
}

fn some_key() -> StorageKey {
    StorageKey::from_bytes(rand::random())
}

fn stored(body: &'static str) -> Outcome {
    Outcome::Stored(StoredResponse {
        head: "head".into(),
        body: body.into(),
    })
}

/// Claims a key and holds its lease.
async fn held(store: &impl Store) -> (StorageKey, Grant) {
    let key = some_key();
    match store.claim(&claim(&key, IfLost::Refuse)).await.unwrap() {
        Decision::Execute(grant) => (key, grant),
        other => panic!("{other:?}"),
    }
}

/// Claims a key and completes it with a stored response.
async fn completed(store: &impl Store) -> StorageKey {
    let (key, grant) = held(store).await;
    complete(store, &key, grant).await;
    key
}

/// Claims a key and lets its lease end.
async fn lost(store: &impl Store) -> (StorageKey, Grant) {
    let (key, grant) = held(store).await;
    settled(async || Some(store.peek(&key).await.unwrap()?.status).filter(|status| *status == Status::Lost)).await;
    (key, grant)
}

async fn complete(store: &impl Store, key: &StorageKey, grant: Grant) {
    let done = store.complete(key, grant.owner, &stored("paid"), DAY).await;
    assert_eq!(done.unwrap(), Completion::Completed);
}

async fn assert_replayed(store: &impl Store, key: &StorageKey) {
    for if_lost in [IfLost::Refuse, IfLost::Execute] {
        match store.claim(&claim(key, if_lost)).await.unwrap() {
            Decision::Replay(response) => assert_eq!(Outcome::Stored(response), stored("paid")),
            other => panic!("the response was lost: {other:?}"),
        }
    }
}

/// Repeats `ask` until it has a result.
async fn settled<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(result) = ask().await {
                return result;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(SOON, asking).await.expect("a claim is stuck")
}

/// Repeats a claim until the decision is no wait. The store never demands a wait longer than a
/// lease.
async fn decided(store: &impl Store, key: &StorageKey, if_lost: IfLost) -> Decision {
    settled(async || match store.claim(&claim(key, if_lost)).await.unwrap() {
        Decision::Wait { left } => {
            assert!(left <= LEASE, "{left:?}");
            None
        }
        decision => Some(decision),
    })
    .await
}

/// Whichever way the clock jumps, stored responses stay, lost keys stay lost, and owners can end
/// their attempts. No key in flight runs twice, and no claim waits until the clock catches up.
async fn survives_a_jump(store: &impl Store, clock: &TurnedClock, seconds: i64) {
    let done = completed(store).await;
    let (gone, _) = lost(store).await;
    let (taken, former) = lost(store).await;
    let (finished, owner) = held(store).await;
    let (renewed, renewer) = held(store).await;
    let (silent, silenced) = held(store).await;
    clock.set(seconds);
    assert_replayed(store, &done).await;

    // An owner can complete, even if its lease has ended by this clock.
    complete(store, &finished, owner).await;
    assert_replayed(store, &finished).await;

    // A renewal counts from the present time of the clock.
    assert_eq!(
        store.renew(&renewed, renewer.owner, LEASE).await.unwrap(),
        Renewal::Renewed
    );
    match store.claim(&claim(&renewed, IfLost::Execute)).await.unwrap() {
        Decision::Wait { left } => assert!(left <= LEASE, "{left:?}"),
        other => panic!("a live lease was taken: {other:?}"),
    }

    // Keys whose owner was silent, before or after the jump, count as lost within one lease, and
    // the store still executes no claim.
    assert_eq!(decided(store, &silent, IfLost::Refuse).await, Decision::Unknown);
    assert_eq!(decided(store, &gone, IfLost::Refuse).await, Decision::Unknown);
    complete(store, &silent, silenced).await;
    assert_replayed(store, &silent).await;

    // A claim that may take over does so, and the fence grows.
    let Decision::Execute(again) = decided(store, &taken, IfLost::Execute).await else {
        panic!("not taken over")
    };
    assert_eq!(again.attempt, 2);
    assert!(again.owner.fence > former.owner.fence);
    let late = store.complete(&taken, former.owner, &stored("paid twice"), DAY).await;
    assert_eq!(late.unwrap(), Completion::Superseded(None));
    complete(store, &taken, again).await;

    // New keys work as before.
    assert_replayed(store, &completed(store).await).await;
    clock.set(0);
    for key in [done, finished, silent, taken] {
        assert_replayed(store, &key).await;
    }
}

/// Two processes have a layer each. The clock jumps while the handler runs in one of them, and both
/// get duplicates.
async fn runs_once_behind_the_layer<S: Store>([here, there]: [S; 2], clock: &TurnedClock, seconds: i64) {
    let runs = Arc::new(AtomicUsize::new(0));
    let (started, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let handler = service_fn({
        let (runs, started, go_on) = (Arc::clone(&runs), Arc::clone(&started), Arc::clone(&go_on));
        move |_: Request<Full<Bytes>>| {
            let run = runs.fetch_add(1, Ordering::SeqCst) + 1;
            let (started, go_on) = (Arc::clone(&started), Arc::clone(&go_on));
            async move {
                started.notify_one();
                go_on.notified().await;
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(format!("run {run}")))))
            }
        }
    });
    let here = IdempotencyLayer::new(here).with_lease(LEASE).layer(handler.clone());
    let there = IdempotencyLayer::new(there).with_lease(LEASE).layer(handler);
    let request = || {
        let request = Request::post("/payments").header("idempotency-key", "one");
        request.body(Full::new(Bytes::from_static(b"pay"))).unwrap()
    };
    let first = tokio::spawn(here.clone().oneshot(request()));
    started.notified().await;
    let waiting = tokio::spawn(there.clone().oneshot(request()));
    clock.set(seconds);
    let others = [
        tokio::spawn(here.clone().oneshot(request())),
        tokio::spawn(there.clone().oneshot(request())),
        waiting,
    ];
    // Long enough for a renewal, and for duplicates that poll.
    tokio::time::sleep(LEASE).await;
    go_on.notify_one();
    let response = tokio::time::timeout(SOON, first)
        .await
        .expect("the owner is stuck")
        .unwrap();
    let Ok(response) = response;
    assert_eq!(response.status(), StatusCode::OK);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "run 1");
    for other in others {
        let Ok(response) = tokio::time::timeout(SOON, other)
            .await
            .expect("a waiter is stuck")
            .unwrap();
        // The clock may have ended the lease before its owner could renew it. The client then gets
        // 409 and retries.
        assert!(
            [StatusCode::OK, StatusCode::CONFLICT].contains(&response.status()),
            "{response:?}"
        );
    }
    for service in [here, there] {
        let Ok(response) = service.oneshot(request()).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), body);
    }
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    clock.set(0);
}

async fn redis() -> (RedisServer, RedisStore, TurnedClock) {
    let clock = TurnedClock::new();
    let server = RedisServer::within(&[], &clock.environment());
    let store = RedisStore::connect(&server.url()).await.unwrap();
    let moved = async || server.command::<(i64, i64)>("TIME").0;
    assert_moves(moved, &clock).await;
    (server, store, clock)
}

async fn postgres() -> (PostgresServer, PostgresStore, TurnedClock) {
    let clock = TurnedClock::new();
    let server = PostgresServer::within(clock.environment());
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let now = "SELECT extract(epoch FROM clock_timestamp())::bigint";
    let moved = async || sqlx::query_scalar(now).fetch_one(store.pool()).await.unwrap();
    assert_moves(moved, &clock).await;
    (server, store, clock)
}

/// Checks that the clock of the server really moves. Otherwise these tests would prove nothing.
async fn assert_moves(now: impl AsyncFn() -> i64, clock: &TurnedClock) {
    let before = now().await;
    clock.set(AN_HOUR);
    assert!(now().await - before >= AN_HOUR, "the server's clock does not move");
    clock.set(-AN_HOUR);
    assert!(now().await - before < AN_HOUR / -2, "the server's clock does not move");
    clock.set(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_survives_a_clock_jump_forwards() {
    let (_server, store, clock) = redis().await;
    survives_a_jump(&store, &clock, AN_HOUR).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_survives_a_clock_jump_backwards() {
    let (_server, store, clock) = redis().await;
    survives_a_jump(&store, &clock, -AN_HOUR).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_runs_once_behind_the_layer_when_the_clock_jumps() {
    for seconds in [AN_HOUR, -AN_HOUR] {
        let (server, here, clock) = redis().await;
        let there = RedisStore::connect(&server.url()).await.unwrap();
        runs_once_behind_the_layer([here, there], &clock, seconds).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_survives_a_clock_jump_forwards() {
    let (_server, store, clock) = postgres().await;
    survives_a_jump(&store, &clock, AN_HOUR).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_survives_a_clock_jump_backwards() {
    let (_server, store, clock) = postgres().await;
    survives_a_jump(&store, &clock, -AN_HOUR).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_runs_once_behind_the_layer_when_the_clock_jumps() {
    for seconds in [AN_HOUR, -AN_HOUR] {
        let (server, here, clock) = postgres().await;
        let there = PostgresStore::connect(&server.url()).await.unwrap();
        runs_once_behind_the_layer([here, there], &clock, seconds).await;
    }
}

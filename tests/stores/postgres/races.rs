//! Concurrent operations on one row of PostgreSQL: one grant, one effect, one response.


use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{to_bytes, Body};
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::Router;
use bytes::Bytes;
use futures::future::join_all;
use sqlx::PgPool;
use tower::ServiceExt;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fingerprint, Grant, IfLost, Nonce, Outcome, Renewal, StorageKey, StoredResponse,
};
use tower_idempotency::{IdempotencyLayer, Lease, OnLost, PostgresStore, Store};

use crate::support::postgres;
use crate::support::postgres::PostgresServer;

const HOUR: Duration = Duration::from_secs(3_600);

async fn started() -> (PostgresServer, PostgresStore) {
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let create = sqlx::query("CREATE TABLE effects (id bigserial PRIMARY KEY, key text NOT NULL)");
    create.execute(store.pool()).await.unwrap();
    (server, store)
}

async fn take_effect(connection: &mut sqlx::PgConnection, key: &str) {
    let insert = sqlx::query("INSERT INTO effects (key) VALUES ($1)").bind(key.to_owned());
    insert.execute(connection).await.unwrap();
}

async fn effects(pool: &PgPool, key: &str) -> i64 {
    let count = sqlx::query_scalar("SELECT count(*) FROM effects WHERE key = $1").bind(key.to_owned());
    count.fetch_one(pool).await.unwrap()
}

fn claim(key: StorageKey, request: usize, lease: Duration, retention: Duration, if_lost: IfLost) -> Claim {
    Claim {
        key,
        fingerprint: Fingerprint::of(&[u8::try_from(request).unwrap()]),
        nonce: Nonce::random(),
        lease,
        retention,
        if_lost,
        max_attempts: 1_000,
    }
}

const fn grant(decision: &Decision) -> Option<Grant> {
    match decision {
        Decision::Execute(grant) | Decision::Recover(grant) => Some(*grant),
        _ => None,
    }
}

/// The behaviour of an owner whose record is lost or expired while others claim it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Old {
    Completes,
    Is,
    Renews,
}

/// Ten claims of two requests run at once on a row that is lost or expired, together with its owner
/// and a sweeper.
async fn rush(store: &PostgresStore, old: Old, retention: Duration, if_lost: IfLost) {
    let key = StorageKey::from_bytes(rand::random());
    let was_lost = !retention.is_zero();
    let lost = claim(key, 0, Duration::ZERO, retention, if_lost);
    let before = grant(&store.claim(&lost).await.unwrap()).unwrap();
    let claims = join_all((0..10).map(|n| {
        let (store, claim) = (store.clone(), claim(key, n % 2, HOUR, HOUR, if_lost));
        tokio::spawn(async move { (n % 2, store.claim(&claim).await.unwrap()) })
    }));
    let stands = async {
        match old {
            Old::Completes => {
                let paid = Outcome::Stored(StoredResponse {
                    head: "head".into(),
                    body: "paid".into(),
                });
                let completion = store.complete(&key, before.owner, &paid, HOUR).await.unwrap();
                completion == Completion::Completed
            }
            Old::Is => false,
            Old::Renews => store.renew(&key, before.owner, HOUR).await.unwrap() == Renewal::Renewed,
        }
    };
    let (claims, stands, swept) = tokio::join!(claims, stands, store.sweep());
    swept.unwrap();
    let claims: Vec<(usize, Decision)> = claims.into_iter().map(Result::unwrap).collect();
    let case = format!("{old:?}, lost {was_lost}, {if_lost:?}: the record stands: {stands}, {claims:?}");
    let granted: Vec<_> = claims
        .iter()
        .filter_map(|(request, decision)| Some((request, grant(decision)?)))
        .collect();
    assert_eq!(granted.len(), usize::from(!stands), "{case}");
    assert!(was_lost || !stands, "{case}");
    let owner = granted.first().map_or(0, |(request, _)| **request);
    for (request, decision) in &claims {
        let is_right = match decision {
            Decision::Execute(grant) | Decision::Recover(grant) if was_lost => {
                (*request, grant.attempt) == (0, 2) && grant.owner.fence > before.owner.fence
            }
            Decision::Execute(grant) => grant.attempt == 1,
            Decision::Mismatch => *request != owner,
            Decision::Replay(response) => *request == owner && old == Old::Completes && response.body == "paid",
            Decision::Wait { left } => *request == owner && *left <= HOUR,
            _ => false,
        };
        assert!(is_right, "{decision:?} of {case}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_the_claims_on_a_lost_or_expired_row_is_granted_unless_its_owner_was_first() {
    let (_server, store) = started().await;
    for _ in 0..25 {
        for old in [Old::Completes, Old::Is, Old::Renews] {
            rush(&store, old, Duration::ZERO, IfLost::Execute).await;
            rush(&store, old, HOUR, IfLost::Execute).await;
            rush(&store, old, HOUR, IfLost::Recover).await;
        }
    }
}

/// Claims until an attempt has completed. `level` begins its transactions. Its lease ends at once.
async fn complete_once(store: PostgresStore, key: StorageKey, name: String, level: &'static str) {
    loop {
        let claim = claim(key, 0, Duration::from_millis(1), HOUR, IfLost::Execute);
        let decision = store.claim(&claim).await.unwrap();
        if decision == Decision::NotStored {
            return;
        }
        let Some(grant) = grant(&decision) else {
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        };
        let mut transaction = store.pool().begin_with(level).await.unwrap();
        take_effect(&mut transaction, &name).await;
        let completion = store.complete_in(&mut transaction, &key, grant.owner, &Outcome::Tombstone, HOUR);
        // At the stricter levels, a concurrent change may fail the completion, and may fail the
        // commit.
        if let Ok(Completion::Completed) = completion.await {
            drop(transaction.commit().await);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_the_transactions_that_take_over_from_each_other_takes_effect_at_every_isolation_level() {
    const LEVELS: [&str; 3] = [
        "BEGIN",
        "BEGIN ISOLATION LEVEL REPEATABLE READ",
        "BEGIN ISOLATION LEVEL SERIALIZABLE",
    ];
    let (_server, store) = started().await;
    for round in 0..30 {
        let (key, name) = (StorageKey::from_bytes(rand::random()), format!("round {round}"));
        let owners = (0..9).map(|n| tokio::spawn(complete_once(store.clone(), key, name.clone(), LEVELS[n % 3])));
        for owner in join_all(owners).await {
            owner.unwrap();
        }
        assert_eq!(effects(store.pool(), &name).await, 1, "{name}");
    }
}

/// In turn, panics before or after its commit, rolls back, commits in the background, or commits.
async fn by_turns(pool: PgPool, runs: Arc<AtomicUsize>, lease: Lease) -> Response {
    let turn = runs.fetch_add(1, Ordering::SeqCst);
    let mut transaction = pool.begin().await.unwrap();
    take_effect(&mut transaction, lease.key().as_str()).await;
    let response = lease.complete_in(&mut transaction, (StatusCode::CREATED, format!("run {turn}")));
    let Ok(response) = response.await else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    match turn % 5 {
        0 => panic!("the handler panics before the commit"),
        1 => {
            transaction.commit().await.unwrap();
            panic!("the handler panics after the commit")
        }
        2 => {
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                transaction.commit().await.unwrap();
            });
            StatusCode::GATEWAY_TIMEOUT.into_response()
        }
        3 => {
            drop(transaction);
            response
        }
        _ => {
            transaction.commit().await.unwrap();
            response
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_leave_and_transactions_that_end_in_any_way_have_one_effect_and_one_response() {
    let (_server, store) = started().await;
    let (pool, runs) = (store.pool().clone(), Arc::new(AtomicUsize::new(0)));
    let handler = move |lease: Lease| by_turns(pool.clone(), Arc::clone(&runs), lease);
    let router = Router::new()
        .route("/", post(handler))
        .layer(IdempotencyLayer::new(store.clone()));
    let send = async |key: &str| -> (StatusCode, Bytes) {
        let request = Request::post("/").header("idempotency-key", key).body(Body::empty());
        let response = router.clone().oneshot(request.unwrap()).await.unwrap();
        (
            response.status(),
            to_bytes(response.into_body(), 1 << 20).await.unwrap(),
        )
    };
    for n in 0..60 {
        let key = format!("key-{n}");
        // The caller leaves at some moment.
        drop(tokio::time::timeout(Duration::from_millis(n % 13), send(&key)).await);
        let mut tries = 0;
        let first = loop {
            let (status, body) = send(&key).await;
            if status == StatusCode::CREATED {
                break body;
            }
            tries += 1;
            assert!(tries < 20, "{key} has no response after {tries} tries");
        };
        assert_eq!(send(&key).await, (StatusCode::CREATED, first));
        assert_eq!(effects(store.pool(), &key).await, 1, "{key}");
    }
}

/// A transaction takes longer than the lease, which is not renewed after the completion. A
/// duplicate in another process waits for the lock, and does not get 409 `outcome-unknown`.
#[tokio::test(flavor = "multi_thread")]
async fn a_duplicate_waits_for_the_transaction_that_completes_its_key() {
    let (_server, store) = started().await;
    for on_lost in [OnLost::Refuse, OnLost::Execute] {
        let key = format!("{on_lost:?}");
        let process = || {
            let pool = store.pool().clone();
            let handler = move |lease: Lease| async move {
                let mut transaction = pool.begin().await.unwrap();
                let completed = lease.complete_in(&mut transaction, (StatusCode::CREATED, "paid"));
                let response = completed.await.unwrap();
                tokio::time::sleep(Duration::from_millis(3_500)).await;
                transaction.commit().await.unwrap();
                response
            };
            let layer = IdempotencyLayer::new(store.clone()).with_lease(Duration::from_secs(1));
            Router::new().route("/", post(handler)).layer(layer.on_lost(on_lost))
        };
        let request = || {
            let request = Request::post("/").header("idempotency-key", &key);
            request.body(Body::empty()).unwrap()
        };
        let first = tokio::spawn(process().oneshot(request()));
        tokio::time::sleep(Duration::from_secs(2)).await;
        let second = process().oneshot(request()).await.unwrap();
        assert_eq!(second.status(), StatusCode::CREATED, "{key}");
        assert!(second.headers().contains_key("idempotent-replayed"));
        assert_eq!(first.await.unwrap().unwrap().status(), StatusCode::CREATED);
    }
}

/// The claim of an expired record was written, but its commit waited for a standby longer than the
/// store timeout. No handler ran, and no caller owned the key.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_was_granted_late_leaves_its_key_free() {
    let (_server, store) = started().await;
    let second = Duration::from_secs(1);
    let layer = IdempotencyLayer::new(store.clone())
        .with_lease(3 * second)
        .with_wait(second)
        .with_store_timeout(second);
    let drain = layer.drain();
    let app = |retention| {
        let layer = layer.clone().with_retention(retention);
        Router::new().route("/", post(|| async { "paid" })).layer(layer)
    };
    let request = || {
        Request::post("/")
            .header("idempotency-key", "k")
            .body(Body::empty())
            .unwrap()
    };
    let standby = async |name: &str| {
        let set = format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'");
        sqlx::raw_sql(sqlx::AssertSqlSafe(set))
            .execute(store.pool())
            .await
            .unwrap();
        sqlx::raw_sql("SELECT pg_reload_conf()")
            .execute(store.pool())
            .await
            .unwrap();
        tokio::time::sleep(second / 3).await;
    };
    assert_eq!(app(second).oneshot(request()).await.unwrap().status(), StatusCode::OK);
    tokio::time::sleep(2 * second).await;
    standby("absent").await;
    let refused = app(HOUR).oneshot(request()).await.unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    standby("").await;
    drain.wait().await;
    tokio::time::sleep(4 * second).await;
    let response = app(HOUR).oneshot(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
}

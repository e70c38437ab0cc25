//! Transactions whose commit or rollback the layer could not see while their callers waited.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use bytes::Bytes;
use tower_idempotency::protocol::{Claim, Decision, IfLost, StorageKey};
use tower_idempotency::{Drain, IdempotencyLayer, Lease, OnError, PostgresStore, Store};

use super::{App, Bench, Ending, HOUR, claim, insert, send};
use crate::support::proxy::{Direction, Fate, Proxy};

/// A layer whose store is cut off after the handler has completed, and which soon stops waiting for
/// the store.
struct CutOff {
    bench: Bench,
    proxy: Proxy,
    router: Router,
    drain: Drain,
}

impl CutOff {
    async fn new(
        commits: bool,
        set: impl FnOnce(IdempotencyLayer<PostgresStore>) -> IdempotencyLayer<PostgresStore>,
    ) -> Self {
        let bench = Bench::new(Ending::Commit).await;
        let proxy = Proxy::to(([127, 0, 0, 1], bench.server.port()).into()).await;
        let store = PostgresStore::connect(&bench.server.url_by(proxy.address.port())).await;
        // The lease is so long that it does not end during a test and cannot end an attempt.
        let layer = IdempotencyLayer::new(store.unwrap())
            .with_lease(HOUR)
            .with_wait(Duration::ZERO);
        let layer = set(layer.with_completion_timeout(Duration::from_secs(1)));
        let drain = layer.drain();
        let (app, cut) = (bench.app.clone(), proxy.clone());
        let handler = move |lease: Lease| {
            let (app, cut) = (app.clone(), cut.clone());
            async move {
                let is_first = app.runs.fetch_add(1, Ordering::SeqCst) == 0;
                let mut transaction = app.pool.begin().await.unwrap();
                insert(&mut transaction).await;
                let response = lease.complete_in(&mut transaction, "paid").await.unwrap();
                if is_first {
                    cut.set(Fate::CutAfter(Direction::ToServer, 0));
                }
                if commits || !is_first {
                    transaction.commit().await.unwrap();
                } else {
                    transaction.rollback().await.unwrap();
                }
                response
            }
        };
        let router = Router::new().route("/payments", post(handler)).layer(layer);
        let this = Self {
            bench,
            proxy,
            router,
            drain,
        };
        let (status, _, body) = send(&this.router, "k").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body:?}");
        assert!(
            String::from_utf8_lossy(&body).contains("could not be recorded"),
            "{body:?}"
        );
        this
    }

    /// Reconnects the store, and waits until the layer has queried it.
    async fn heal(&self) {
        assert_eq!(self.drain.running(), 1);
        self.proxy.heal();
        self.drain.wait().await;
        assert_eq!(self.drain.running(), 0);
    }

    /// Sends the request again. A connection that the cut has killed may fail first.
    async fn again(&self) -> (StatusCode, HeaderMap, Bytes) {
        loop {
            let got = send(&self.router, "k").await;
            if got.0 != StatusCode::SERVICE_UNAVAILABLE {
                return got;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_that_could_not_be_seen_is_seen_when_the_store_is_back() {
    let cut_off = CutOff::new(false, |layer| layer).await;
    cut_off.heal().await;
    let (status, headers, body) = cut_off.again().await;
    assert_eq!((status, &body[..]), (StatusCode::OK, &b"paid"[..]));
    assert!(!headers.contains_key("idempotent-replayed"));
    assert_eq!((cut_off.bench.payments().await, cut_off.bench.runs()), (1, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_is_seen_although_the_outcome_was_recorded_as_unknown_meanwhile() {
    let cut_off = CutOff::new(false, |layer| layer).await;
    let store = &cut_off.bench.store;
    let key: Vec<u8> = sqlx::query_scalar("UPDATE idempotency_records SET lease_until = 0 RETURNING key")
        .fetch_one(store.pool())
        .await
        .unwrap();
    let key = StorageKey::from_bytes(key.try_into().unwrap());
    let refused = Claim {
        fingerprint: store.peek(&key).await.unwrap().unwrap().fingerprint,
        if_lost: IfLost::Refuse,
        ..claim(key)
    };
    assert_eq!(store.claim(&refused).await.unwrap(), Decision::Unknown);
    cut_off.heal().await;
    assert_eq!(cut_off.again().await.0, StatusCode::OK);
    assert_eq!((cut_off.bench.payments().await, cut_off.bench.runs()), (1, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_could_not_be_seen_stands_when_the_store_is_back() {
    for on_error in [OnError::Release, OnError::Store, OnError::Unknown] {
        let cut_off = CutOff::new(true, |layer| layer.on_error(on_error)).await;
        cut_off.heal().await;
        let (status, headers, body) = cut_off.again().await;
        assert_eq!((status, &body[..]), (StatusCode::OK, &b"paid"[..]), "{on_error:?}");
        assert_eq!(headers["idempotent-replayed"], "true");
        assert_eq!((cut_off.bench.payments().await, cut_off.bench.runs()), (1, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_that_is_seen_late_is_handled_as_configured() {
    for (on_error, status) in [
        (OnError::Store, StatusCode::INTERNAL_SERVER_ERROR),
        (OnError::Unknown, StatusCode::CONFLICT),
    ] {
        let cut_off = CutOff::new(false, |layer| layer.on_error(on_error)).await;
        cut_off.heal().await;
        for _ in 0..2 {
            let (returned, headers, _) = cut_off.again().await;
            assert_eq!(returned, status, "{on_error:?}");
            let is_replay = headers.contains_key("idempotent-replayed");
            assert_eq!(is_replay, on_error == OnError::Store);
        }
        assert_eq!((cut_off.bench.payments().await, cut_off.bench.runs()), (0, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_stays_unreachable_is_not_queried_forever() {
    let soon = |layer: IdempotencyLayer<PostgresStore>| layer.with_completion_timeout(Duration::from_millis(10));
    let cut_off = CutOff::new(false, soon).await;
    cut_off.drain.wait().await;
    assert_eq!(cut_off.drain.running(), 0);
    cut_off.proxy.heal();
    assert_eq!(cut_off.again().await.0, StatusCode::CONFLICT);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_rolled_back_after_its_caller_was_refused_leaves_its_key_free() {
    let bench = Bench::new(Ending::Commit).await;
    let (late, mut open) = tokio::sync::mpsc::channel(1);
    let runs = Arc::clone(&bench.app.runs);
    let handler = move |State(app): State<App>, lease: Lease| {
        let (late, runs) = (late.clone(), Arc::clone(&runs));
        async move {
            let mut transaction = app.pool.begin().await.unwrap();
            insert(&mut transaction).await;
            let response = lease.complete_in(&mut transaction, "paid").await.unwrap();
            if runs.fetch_add(1, Ordering::SeqCst) == 0 {
                late.send(transaction).await.unwrap();
            } else {
                transaction.commit().await.unwrap();
            }
            response
        }
    };
    let layer = bench.layer().with_store_timeout(Duration::from_secs(1));
    let layer = layer.with_completion_timeout(Duration::from_secs(1));
    let drain = layer.drain();
    let router = Router::new().route("/payments", post(handler)).layer(layer);
    let router = router.with_state(bench.app.clone());
    assert_eq!(send(&router, "k").await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(drain.running(), 1);
    open.recv().await.unwrap().rollback().await.unwrap();
    drain.wait().await;
    let mut status = StatusCode::SERVICE_UNAVAILABLE;
    while status == StatusCode::SERVICE_UNAVAILABLE {
        status = send(&router, "k").await.0;
    }
    assert_eq!((status, bench.runs(), bench.payments().await), (StatusCode::OK, 2, 1));
}

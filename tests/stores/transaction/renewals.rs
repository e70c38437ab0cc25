//! Leases while a handler's transaction is open.

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::post;
use futures::future::join_all;
use tower_idempotency::protocol::Status;
use tower_idempotency::{Lease, Store};

use super::{App, Bench, Ending, send};

/// Runs two handlers that wait. One has completed in its transaction, which is or is not usable.
/// The other has not completed.
async fn renewed_while_handlers_wait(completes: bool) -> Renewed {
    let bench = Bench::new(Ending::Commit).await;
    let (end, _) = tokio::sync::broadcast::channel::<()>(1);
    let (ready, mut waiting) = tokio::sync::mpsc::channel(2);
    let waits = end.clone();
    let handler = move |State(app): State<App>, lease: Lease| {
        let (mut may_end, ready) = (waits.subscribe(), ready.clone());
        async move {
            let mut transaction = app.pool.begin().await.unwrap();
            let mut response = "beside".into_response();
            if lease.key().as_str() == "completing" {
                if !completes {
                    let fails = sqlx::query("SELECT 1 / 0").execute(&mut *transaction).await;
                    assert!(fails.is_err());
                }
                let completion = lease.complete_in(&mut transaction, "completed").await;
                assert_eq!(completion.is_ok(), completes);
                response = completion.unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response());
            }
            ready
                .send((lease.key().as_str().to_owned(), *lease.storage_key()))
                .await
                .unwrap();
            may_end.recv().await.unwrap();
            transaction.commit().await.unwrap();
            response
        }
    };
    let layer = bench.layer().with_lease(Duration::from_secs(1));
    let router = Router::new().route("/payments", post(handler)).layer(layer);
    let router = router.with_state(bench.app.clone());
    let sends = ["completing", "beside"].map(|key| {
        let router = router.clone();
        tokio::spawn(async move { send(&router, key).await.0 })
    });
    let mut keys = std::collections::HashMap::new();
    for _ in 0..2 {
        let (name, key) = waiting.recv().await.unwrap();
        keys.insert(name, key);
    }
    let lease_until = |name: &str| {
        let lease = sqlx::query_scalar::<_, i64>("SELECT lease_until FROM idempotency_records WHERE key = $1");
        let lease = lease.bind(keys[name].as_bytes().to_vec());
        async { lease.fetch_one(bench.store.pool()).await.unwrap() }
    };
    let (first, mut last, mut renewals) = (lease_until("completing").await, lease_until("beside").await, 0);
    while renewals < 6 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = lease_until("beside").await;
        renewals += usize::from(now > last);
        last = now;
    }
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    let renewed = Renewed {
        completing: lease_until("completing").await > first,
        waiting_for_locks: sqlx::query_scalar(waiting).fetch_one(bench.store.pool()).await.unwrap(),
    };
    end.send(()).unwrap();
    let statuses = join_all(sends).await.into_iter().map(Result::unwrap);
    let completed = if completes { 200 } else { 500 };
    assert!(statuses.eq([completed, 200]));
    renewed
}

/// The observations while the lease of the other handler was renewed several times.
#[derive(Debug)]
struct Renewed {
    completing: bool,
    waiting_for_locks: i64,
}

#[tokio::test(flavor = "multi_thread")]
async fn renewals_do_not_queue_behind_a_transaction_that_has_completed() {
    let seen = renewed_while_handlers_wait(true).await;
    // One renewal may have been in progress.
    assert!(!seen.completing && seen.waiting_for_locks <= 1, "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_failed_leaves_the_lease_renewed() {
    assert!(renewed_while_handlers_wait(false).await.completing);
}

/// The lease is not renewed while a transaction completes. The renewal task had nothing to do and
/// ended. After the transaction was rolled back and the next completion failed, no task renewed the
/// lease.
#[tokio::test(flavor = "multi_thread")]
async fn renewals_resume_at_once_when_a_completion_fails_after_one_that_was_rolled_back() {
    let bench = Bench::new(Ending::Commit).await;
    let (ready, mut waiting) = tokio::sync::mpsc::channel(1);
    let handler = move |State(app): State<App>, lease: Lease| {
        let ready = ready.clone();
        async move {
            let mut transaction = app.pool.begin().await.unwrap();
            drop(lease.complete_in(&mut transaction, "rolled back").await.unwrap());
            tokio::time::sleep(Duration::from_millis(600)).await;
            transaction.rollback().await.unwrap();
            let mut transaction = app.pool.begin().await.unwrap();
            let fails = sqlx::query("SELECT 1 / 0").execute(&mut *transaction).await;
            assert!(fails.is_err());
            assert!(lease.complete_in(&mut transaction, "failed").await.is_err());
            transaction.rollback().await.unwrap();
            ready.send(*lease.storage_key()).await.unwrap();
            tokio::time::sleep(Duration::from_secs(5)).await;
            StatusCode::INTERNAL_SERVER_ERROR
        }
    };
    let layer = bench.layer().with_lease(Duration::from_secs(1));
    let router = Router::new().route("/payments", post(handler)).layer(layer);
    let router = router.with_state(bench.app.clone());
    let sent = tokio::spawn(async move { send(&router, "k").await.0 });
    let key = waiting.recv().await.unwrap();
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        let status = bench.store.peek(&key).await.unwrap().unwrap().status;
        assert!(matches!(status, Status::InFlight { .. }), "{status:?}");
    }
    assert_eq!(sent.await.unwrap(), 500);
}

/// A renewal waited for the transaction that completed the record. The lease then seemed lost,
/// although the response of this attempt is the stored one.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_that_waited_for_the_completing_transaction_does_not_lose_the_lease() {
    let bench = Bench::new(Ending::Commit).await;
    let handler = |State(app): State<App>, lease: Lease| async move {
        let mut transaction = app.pool.begin().await.unwrap();
        let lock = sqlx::query("SELECT FROM idempotency_records WHERE key = $1 FOR UPDATE");
        let lock = lock.bind(lease.storage_key().as_bytes().to_vec());
        lock.execute(&mut *transaction).await.unwrap();
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        let waiting = || sqlx::query_scalar::<_, i64>(waiting).fetch_one(&app.pool);
        while waiting().await.unwrap() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let completion = lease.complete_in(&mut transaction, "paid").await;
        transaction.commit().await.unwrap();
        while waiting().await.unwrap() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(lease.is_held());
        completion.unwrap()
    };
    let layer = bench.layer().with_lease(Duration::from_secs(6));
    let router = Router::new().route("/payments", post(handler)).layer(layer);
    let (status, headers, body) = send(&router.with_state(bench.app.clone()), "k").await;
    assert_eq!((status, &body[..]), (StatusCode::OK, &b"paid"[..]));
    assert!(!headers.contains_key("idempotent-replayed"));
}

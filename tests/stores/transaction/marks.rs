//! Marks on a response that is completed in a transaction.

use tower_idempotency::{DoNotStore, StoreFor, StoreOutcomeOnly};

use super::*;

/// A handler that makes a secret in its transaction and returns it with a mark.
async fn create_secret(State(app): State<App>, lease: Lease, body: Bytes) -> Response {
    app.runs.fetch_add(1, Ordering::SeqCst);
    let mut transaction = app.pool.begin().await.unwrap();
    let insert = sqlx::query("INSERT INTO payments (note) VALUES ('secret')");
    insert.execute(&mut *transaction).await.unwrap();
    // The length is wrong, like one that a handler has copied.
    let fields = [("set-cookie", "sid=1"), ("content-length", "5")];
    let secret = (StatusCode::CREATED, fields, "sk_live_1");
    let completed = if body.starts_with(b"veto") {
        lease.complete_in(&mut transaction, (DoNotStore, secret)).await
    } else {
        lease.complete_in(&mut transaction, (StoreOutcomeOnly, secret)).await
    };
    match completed {
        Ok(response) => {
            transaction.commit().await.unwrap();
            if body.starts_with(b"fail") {
                return StatusCode::INTERNAL_SERVER_ERROR.into_response();
            }
            if body.starts_with(b"stream") {
                let rest = futures::stream::iter([Ok::<_, std::io::Error>("failed")]);
                return (StatusCode::INTERNAL_SERVER_ERROR, Body::from_stream(rest)).into_response();
            }
            response
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Configuration);
            (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response()
        }
    }
}

async fn ask(router: &Router, body: &'static str) -> (StatusCode, HeaderMap, String) {
    let request = Request::post("/secrets").header("idempotency-key", body);
    let response = router
        .clone()
        .oneshot(request.body(Body::from(body)).unwrap())
        .await
        .unwrap();
    let (head, body) = response.into_parts();
    let body = to_bytes(body, 1 << 20).await.unwrap();
    (head.status, head.headers, String::from_utf8_lossy(&body).into_owned())
}

fn router(bench: &Bench) -> Router {
    Router::new()
        .route("/secrets", post(create_secret))
        .layer(bench.layer())
        .with_state(bench.app.clone())
}

/// The table held the secret for a day, and every duplicate got it.
#[tokio::test(flavor = "multi_thread")]
async fn a_secret_of_a_transaction_reaches_its_first_caller_and_no_table() {
    let bench = Bench::new(Ending::Commit).await;
    let router = router(&bench);
    let (status, headers, body) = ask(&router, "secret").await;
    assert_eq!((status, &body[..]), (StatusCode::CREATED, "sk_live_1"));
    assert!(headers.contains_key("set-cookie") && !headers.contains_key("idempotent-replayed"));
    assert!(
        headers.get("content-length").is_none_or(|length| length == "9"),
        "{headers:?}"
    );
    let (status, _, body) = ask(&router, "secret").await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert!(body.contains("response-not-stored"), "{body}");
    assert_eq!((bench.payments().await, bench.runs()), (1, 1));
    let stored: Vec<Option<Vec<u8>>> = sqlx::query_scalar("SELECT body FROM idempotency_records")
        .fetch_all(bench.store.pool())
        .await
        .unwrap();
    assert!(stored.iter().flatten().all(|body| !body.starts_with(b"sk_live")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_whose_handler_failed_after_the_commit_is_done_and_never_runs_again() {
    let bench = Bench::new(Ending::Commit).await;
    let router = router(&bench);
    for failure in ["fail", "stream"] {
        for _ in 0..2 {
            let (status, _, body) = ask(&router, failure).await;
            assert_eq!(status, StatusCode::CONFLICT);
            assert!(body.contains("response-not-stored"), "{body}");
        }
    }
    assert_eq!((bench.payments().await, bench.runs()), (2, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_with_a_veto_cannot_be_completed_in_a_transaction() {
    let bench = Bench::new(Ending::Commit).await;
    let router = router(&bench);
    for _ in 0..2 {
        let (status, _, body) = ask(&router, "veto").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(body.contains("DoNotStore"), "{body}");
    }
    assert_eq!((bench.payments().await, bench.runs()), (0, 2));
}

/// The caller gets only the secret that its handler has committed, and no other response with the
/// same mark.
#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_was_rolled_back_or_made_after_the_commit_reaches_no_caller() {
    let bench = Bench::new(Ending::Commit).await;
    let handler = |State(app): State<App>, lease: Lease, body: Bytes| async move {
        let mut first = app.pool.begin().await.unwrap();
        let rolled_back = lease
            .complete_in(&mut first, (StoreOutcomeOnly, "first"))
            .await
            .unwrap();
        first.rollback().await.unwrap();
        let mut second = app.pool.begin().await.unwrap();
        let committed = lease
            .complete_in(&mut second, (StoreOutcomeOnly, "second"))
            .await
            .unwrap();
        second.commit().await.unwrap();
        match &body[..] {
            b"rolled-back" => rolled_back,
            b"made" => (StoreOutcomeOnly, "third").into_response(),
            _ => committed,
        }
    };
    let router = Router::new().route("/secrets", post(handler)).layer(bench.layer());
    let router = router.with_state(bench.app.clone());
    for returned in ["rolled-back", "made"] {
        let (status, _, body) = ask(&router, returned).await;
        assert_eq!(status, StatusCode::CONFLICT, "{returned}: {body}");
        assert!(body.contains("response-not-stored"), "{returned}: {body}");
    }
    let (status, _, body) = ask(&router, "committed").await;
    assert_eq!((status, &body[..]), (StatusCode::OK, "second"));
}

/// A layer for webhooks would acknowledge the duplicates of such a response.
#[tokio::test(flavor = "multi_thread")]
async fn only_a_layer_for_webhooks_refuses_to_complete_a_failure_without_its_response() {
    let bench = Bench::new(Ending::Commit).await;
    for is_for_webhooks in [false, true] {
        for (is_marked, status) in [
            (false, StatusCode::CREATED),
            (false, StatusCode::PAYMENT_REQUIRED),
            (true, StatusCode::CREATED),
            (true, StatusCode::PAYMENT_REQUIRED),
        ] {
            let handler = move |State(app): State<App>, lease: Lease| async move {
                let mut transaction = app.pool.begin().await.unwrap();
                let mut response = status.into_response();
                if is_marked {
                    response.extensions_mut().insert(StoreOutcomeOnly);
                }
                match lease.complete_in(&mut transaction, response).await {
                    Ok(response) => {
                        transaction.commit().await.unwrap();
                        response
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Configuration);
                        StatusCode::SERVICE_UNAVAILABLE.into_response()
                    }
                }
            };
            let layer = bench.layer();
            let layer = if is_for_webhooks { layer.webhooks() } else { layer };
            let router = Router::new().route("/payments", post(handler)).layer(layer);
            let router = router.with_state(bench.app.clone());
            let (got, ..) = send(
                &router,
                &format!("{is_for_webhooks}-{is_marked}-{status}").replace(' ', "-"),
            )
            .await;
            let is_refused = is_for_webhooks && is_marked && !status.is_success();
            assert_eq!(
                got == StatusCode::SERVICE_UNAVAILABLE,
                is_refused,
                "{status} {is_marked}"
            );
        }
    }
}

/// Returns how long the record of the only key lives from now, in seconds.
async fn left(bench: &Bench) -> f64 {
    let left = sqlx::query_scalar(
        "SELECT (expires / 1e6 - extract(epoch FROM clock_timestamp()))::float8 FROM idempotency_records",
    );
    left.fetch_one(bench.store.pool()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_response_of_a_transaction_is_stored_for_as_long_as_its_mark_or_its_layer_sets() {
    const MINUTE: Duration = Duration::from_secs(60);
    let bench = Bench::new(Ending::Commit).await;
    for (mark, is_alone, minutes) in [
        (None, false, 7),
        (Some(3), false, 3),
        (Some(11), false, 11),
        (Some(3), true, 3),
    ] {
        let handler = move |State(app): State<App>, lease: Lease| async move {
            let mut transaction = app.pool.begin().await.unwrap();
            let mut response = StatusCode::CREATED.into_response();
            if let Some(minutes) = mark {
                response.extensions_mut().insert(StoreFor(minutes * MINUTE));
            }
            if is_alone {
                response.extensions_mut().insert(StoreOutcomeOnly);
            }
            let response = lease.complete_in(&mut transaction, response).await.unwrap();
            transaction.commit().await.unwrap();
            response
        };
        let layer = bench.layer().with_retention(7 * MINUTE);
        let router = Router::new().route("/payments", post(handler)).layer(layer);
        let (status, ..) = send(&router.with_state(bench.app.clone()), "k").await;
        assert_eq!(status, StatusCode::CREATED);
        let (left, set) = (left(&bench).await, f64::from(minutes) * 60.0);
        assert!(left <= set && left > set - 30.0, "{mark:?} {is_alone}: {left} s");
        let delete = sqlx::query("DELETE FROM idempotency_records");
        delete.execute(bench.store.pool()).await.unwrap();
    }
}

//! Effect and response in one transaction of the handler: exactly once, whatever happens to the
//! commit.

mod behind;
#[cfg(feature = "tonic")]
mod grpc;
mod marks;
mod programs;
mod renewals;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use futures::future::join_all;
use sqlx::PgPool;
use tower::ServiceExt;
use tower_idempotency::protocol::{Claim, Completion, Decision, Fingerprint, IfLost, Nonce, Outcome, StorageKey};
use tower_idempotency::{
    BoxStore, ErrorKind, IdempotencyLayer, Lease, MemoryStore, OnError, OnLost, PostgresStore, Store,
};

use crate::support::drop_after;
use crate::support::postgres::PostgresServer;

/// The end of the handler's transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Commit,
    CommitAndFail,
    CommitAndPanic,
    CommitInBackgroundAndFail,
    Forget,
    Rollback,
}

#[derive(Clone)]
struct App {
    pool: PgPool,
    ending: Ending,
    runs: Arc<AtomicUsize>,
    /// Supersedes the handler between its effect and its completion.
    before_completion: Option<Arc<dyn Fn(Lease) -> futures::future::BoxFuture<'static, ()> + Send + Sync>>,
}

async fn pay(State(app): State<App>, lease: Lease, body: Bytes) -> Response {
    let run = app.runs.fetch_add(1, Ordering::SeqCst) + 1;
    let mut transaction = app.pool.begin().await.unwrap();
    let insert =
        sqlx::query("INSERT INTO payments (note) VALUES ($1)").bind(String::from_utf8_lossy(&body).into_owned());
    insert.execute(&mut *transaction).await.unwrap();
    if let Some(happen) = &app.before_completion {
        happen(lease.clone()).await;
    }
    let response = (
        StatusCode::CREATED,
        [("x-run", run.to_string())],
        format!("payment of run {run}"),
    );
    let response = match lease.complete_in(&mut transaction, response).await {
        Ok(response) => response,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Superseded);
            return StatusCode::INTERNAL_SERVER_ERROR.into_response();
        }
    };
    let commit = async move { transaction.commit().await.unwrap() };
    let lost = (StatusCode::INTERNAL_SERVER_ERROR, "the commit's reply was lost").into_response();
    match app.ending {
        Ending::Forget => {}
        Ending::Rollback => return lost,
        Ending::Commit => commit.await,
        Ending::CommitAndPanic => {
            commit.await;
            panic!("the handler panics after the commit");
        }
        Ending::CommitAndFail => {
            commit.await;
            return lost;
        }
        Ending::CommitInBackgroundAndFail => {
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(300)).await;
                commit.await;
            });
            return lost;
        }
    }
    response
}

struct Bench {
    server: PostgresServer,
    store: PostgresStore,
    app: App,
}

impl Bench {
    async fn new(ending: Ending) -> Self {
        let server = PostgresServer::start();
        let store = PostgresStore::connect(&server.url()).await.unwrap();
        let create = sqlx::query("CREATE TABLE payments (id bigserial PRIMARY KEY, note text NOT NULL)");
        create.execute(store.pool()).await.unwrap();
        let app = App {
            pool: store.pool().clone(),
            ending,
            runs: Arc::default(),
            before_completion: None,
        };
        Self { server, store, app }
    }

    fn router(&self, layer: IdempotencyLayer<PostgresStore>) -> Router {
        Router::new()
            .route("/payments", post(pay))
            .layer(layer)
            .with_state(self.app.clone())
    }

    fn layer(&self) -> IdempotencyLayer<PostgresStore> {
        IdempotencyLayer::new(self.store.clone())
    }

    async fn payments(&self) -> i64 {
        let count = sqlx::query_scalar("SELECT count(*) FROM payments");
        count.fetch_one(self.store.pool()).await.unwrap()
    }

    fn runs(&self) -> usize {
        self.app.runs.load(Ordering::SeqCst)
    }
}

async fn send(router: &Router, key: &str) -> (StatusCode, HeaderMap, Bytes) {
    let request = Request::post("/payments")
        .header("idempotency-key", key)
        .body(Body::from("100"))
        .unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    let (head, body) = response.into_parts();
    (head.status, head.headers, to_bytes(body, 1 << 20).await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn effect_and_response_commit_together_and_the_response_is_replayed() {
    let bench = Bench::new(Ending::Commit).await;
    let router = bench.router(bench.layer());
    let (status, headers, body) = send(&router, "k").await;
    assert_eq!((status, &body[..]), (StatusCode::CREATED, &b"payment of run 1"[..]));
    assert!(!headers.contains_key("idempotent-replayed"));
    let (status, headers, again) = send(&router, "k").await;
    assert_eq!((status, &again), (StatusCode::CREATED, &body));
    assert_eq!(headers["idempotent-replayed"], "true");
    assert_eq!(headers["x-run"], "1");
    assert_eq!((bench.payments().await, bench.runs()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn duplicates_at_once_over_two_layers_make_one_payment() {
    let bench = Bench::new(Ending::Commit).await;
    let other = PostgresStore::connect(&bench.server.url()).await.unwrap();
    let routers = [bench.router(bench.layer()), bench.router(IdempotencyLayer::new(other))];
    let sends = (0..100).map(|n| send(&routers[n % 2], "k"));
    for (status, _, body) in join_all(sends).await {
        assert_eq!((status, &body[..]), (StatusCode::CREATED, &b"payment of run 1"[..]));
    }
    assert_eq!((bench.payments().await, bench.runs()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_reply_was_lost_counts_and_the_caller_gets_its_response() {
    for ending in [
        Ending::CommitAndFail,
        Ending::CommitAndPanic,
        Ending::CommitInBackgroundAndFail,
    ] {
        let bench = Bench::new(ending).await;
        let router = bench.router(bench.layer());
        for _ in 0..2 {
            let (status, _, body) = send(&router, "k").await;
            assert_eq!(
                (status, &body[..]),
                (StatusCode::CREATED, &b"payment of run 1"[..]),
                "{ending:?}"
            );
        }
        assert_eq!((bench.payments().await, bench.runs()), (1, 1), "{ending:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_commit_there_is_no_effect_and_no_response_and_the_next_attempt_runs() {
    for ending in [Ending::Forget, Ending::Rollback] {
        let mut bench = Bench::new(ending).await;
        let layer = bench.layer();
        let (status, _, body) = send(&bench.router(layer.clone()), "k").await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{ending:?}");
        assert_ne!(&body[..], b"payment of run 1");
        assert_eq!(bench.payments().await, 0);
        bench.app.ending = Ending::Commit;
        let (status, ..) = send(&bench.router(layer), "k").await;
        assert_eq!(status, StatusCode::CREATED);
        assert_eq!((bench.payments().await, bench.runs()), (1, 2), "{ending:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_owner_rolls_back_and_its_caller_gets_the_response_of_the_other_attempt() {
    let mut bench = Bench::new(Ending::Commit).await;
    let store = bench.store.clone();
    bench.app.before_completion = Some(Arc::new(move |lease| {
        let store = store.clone();
        Box::pin(async move {
            // Another attempt finds the lease lost, takes over and completes.
            let key = *lease.storage_key();
            store.renew(&key, lease.owner(), Duration::ZERO).await.unwrap();
            let fingerprint = store.peek(&key).await.unwrap().unwrap().fingerprint;
            let claim = Claim {
                fingerprint,
                ..claim(key)
            };
            let Decision::Execute(grant) = store.claim(&claim).await.unwrap() else {
                panic!("the claim does not take over")
            };
            let layer = IdempotencyLayer::new(MemoryStore::new());
            let outcome = layer.outcome_of(
                http::Response::builder()
                    .status(201)
                    .body("the other attempt's".into())
                    .unwrap(),
            );
            store.complete(&key, grant.owner, &outcome, HOUR).await.unwrap();
        })
    }));
    let router = bench.router(bench.layer().on_lost(OnLost::Execute));
    let (status, _, body) = send(&router, "k").await;
    assert_eq!((status, &body[..]), (StatusCode::CREATED, &b"the other attempt's"[..]));
    assert_eq!(bench.payments().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_found_in_a_box_and_behind_an_arc() {
    let bench = Bench::new(Ending::Commit).await;
    let boxed = || BoxStore::new(bench.store.clone());
    async fn works<S: Store>(bench: &Bench, key: &str, store: S) {
        let router = Router::new().route("/payments", post(pay));
        let router = router.layer(IdempotencyLayer::new(store)).with_state(bench.app.clone());
        assert_eq!(send(&router, key).await.0, StatusCode::CREATED, "{key}");
    }
    works(&bench, "arc", Arc::new(bench.store.clone())).await;
    works(&bench, "box", boxed()).await;
    works(&bench, "box-behind-an-arc", Arc::new(boxed())).await;
    let shared = BoxStore::new(Arc::new(bench.store.clone()));
    works(&bench, "arc-in-a-box", shared.clone()).await;
    works(
        &bench,
        "boxes-in-a-box",
        BoxStore::new(BoxStore::new(Arc::new(Arc::new(shared)))),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_another_kind_is_a_clear_error() {
    let bench = Bench::new(Ending::Commit).await;
    let handler = |State(app): State<App>, lease: Lease| async move {
        let mut transaction = app.pool.begin().await.unwrap();
        lease
            .complete_in(&mut transaction, "response")
            .await
            .unwrap_err()
            .to_string()
    };
    let router = Router::new().route("/payments", post(handler));
    let router = router
        .layer(IdempotencyLayer::new(MemoryStore::new()))
        .with_state(bench.app.clone());
    let (_, _, body) = send(&router, "k").await;
    assert!(String::from_utf8_lossy(&body).contains("PostgresStore"), "{body:?}");
}

const HOUR: Duration = Duration::from_secs(3_600);

fn claim(key: StorageKey) -> Claim {
    Claim {
        key,
        fingerprint: Fingerprint::of(b"event"),
        nonce: Nonce::random(),
        lease: HOUR,
        retention: HOUR,
        if_lost: IfLost::Execute,
        max_attempts: 9,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn claim_and_completion_within_one_transaction_make_an_event_count_once() {
    let bench = Bench::new(Ending::Commit).await;
    let (store, key) = (&bench.store, StorageKey::from_bytes([7; 32]));
    let handle = |commits: bool| async move {
        let mut transaction = store.pool().begin().await.unwrap();
        match store.claim_in(&mut transaction, &claim(key)).await.unwrap() {
            Decision::Execute(grant) => {
                let insert = sqlx::query("INSERT INTO payments (note) VALUES ('event')");
                insert.execute(&mut *transaction).await.unwrap();
                let ended = store.complete_in(&mut transaction, &key, grant.owner, &Outcome::Tombstone, HOUR);
                assert_eq!(ended.await.unwrap(), Completion::Completed);
                if commits {
                    transaction.commit().await.unwrap();
                }
                true
            }
            Decision::NotStored => false,
            other => panic!("{other:?}"),
        }
    };
    assert!(handle(false).await);
    assert_eq!(bench.payments().await, 0);
    let ran = join_all((0..10).map(|_| handle(true))).await;
    assert_eq!(ran.iter().filter(|ran| **ran).count(), 1);
    assert_eq!(bench.payments().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_in_the_middle_of_commits_has_each_payment_once() {
    const ROUNDS: usize = 12;
    const KEYS: usize = 8;
    let mut bench = Bench::new(Ending::Commit).await;
    let layer = bench
        .layer()
        .on_lost(OnLost::Execute)
        .with_lease(Duration::from_secs(1));
    let router = bench.router(layer.with_completion_timeout(Duration::from_secs(2)));
    let settle = |key: String| {
        let router = router.clone();
        async move {
            for _ in 0..200 {
                let (status, _, body) = send(&router, &key).await;
                if status == StatusCode::CREATED {
                    return body;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            panic!("{key} is stuck")
        }
    };
    for round in 0..ROUNDS {
        let sends: Vec<_> = (0..KEYS)
            .map(|n| tokio::spawn(settle(format!("key-{round}-{n}"))))
            .collect();
        tokio::time::sleep(Duration::from_millis(rand::random_range(1..25))).await;
        bench.server = tokio::task::spawn_blocking(move || {
            let mut server = bench.server;
            server.kill();
            server.run();
            server
        })
        .await
        .unwrap();
        for (n, sent) in sends.into_iter().enumerate() {
            let first = sent.await.unwrap();
            assert_eq!(settle(format!("key-{round}-{n}")).await, first);
        }
    }
    let payments: i64 = {
        let count = sqlx::query_scalar("SELECT count(*) FROM payments");
        count.fetch_one(bench.store.pool()).await.unwrap()
    };
    assert_eq!(usize::try_from(payments).unwrap(), ROUNDS * KEYS);
    println!(
        "{} runs for {} payments",
        bench.app.runs.load(Ordering::SeqCst),
        ROUNDS * KEYS
    );
}

/// Makes a router with the handler of one test. The handler gets the pool and the lease.
async fn with_handler<F>(bench: &Bench, handler: impl Fn(PgPool, Lease) -> F + Clone + Send + Sync + 'static) -> Router
where
    F: Future<Output = Response> + Send + 'static,
{
    let route = post(move |State(app): State<App>, lease: Lease| handler(app.pool, lease));
    Router::new()
        .route("/payments", route)
        .layer(bench.layer())
        .with_state(bench.app.clone())
}

async fn insert(connection: &mut sqlx::PgConnection) {
    let insert = sqlx::query("INSERT INTO payments (note) VALUES ('x')");
    insert.execute(connection).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_is_repeated_after_a_commit_of_unknown_outcome_takes_effect_once() {
    let bench = Bench::new(Ending::Commit).await;
    let router = with_handler(&bench, |pool, lease| async move {
        for _ in 0..2 {
            let mut transaction = pool.begin().await.unwrap();
            insert(&mut transaction).await;
            match lease.complete_in(&mut transaction, "paid").await {
                // The reply to the commit counts as lost, so the handler tries again.
                Ok(_) => transaction.commit().await.unwrap(),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Superseded),
            }
        }
        StatusCode::INTERNAL_SERVER_ERROR.into_response()
    });
    let (status, _, body) = send(&router.await, "k").await;
    assert_eq!((status, &body[..]), (StatusCode::OK, &b"paid"[..]));
    assert_eq!(bench.payments().await, 1);
}

/// The record could hold only a part of the stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_cannot_be_completed_in_a_transaction() {
    let bench = Bench::new(Ending::Commit).await;
    let router = with_handler(&bench, |pool, lease| async move {
        let mut transaction = pool.begin().await.unwrap();
        insert(&mut transaction).await;
        let stream = ([("content-type", "text/event-stream")], "data: paid\n\n");
        let refused = lease.complete_in(&mut transaction, stream).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Configuration);
        transaction.commit().await.unwrap();
        StatusCode::SERVICE_UNAVAILABLE.into_response()
    });
    let (status, ..) = send(&router.await, "k").await;
    assert_eq!((status, bench.payments().await), (StatusCode::SERVICE_UNAVAILABLE, 1));
}

/// The owner shares the committed response with its duplicates, and each duplicate gets it as a
/// replay.
#[tokio::test(flavor = "multi_thread")]
async fn a_duplicate_in_flight_gets_the_committed_response_as_a_replay() {
    let bench = Bench::new(Ending::Commit).await;
    let router = with_handler(&bench, |pool, lease| async move {
        let mut transaction = pool.begin().await.unwrap();
        insert(&mut transaction).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let response = lease.complete_in(&mut transaction, "paid").await.unwrap();
        transaction.commit().await.unwrap();
        response.into_response()
    })
    .await;
    let duplicate = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        send(&router, "k").await
    };
    let (first, duplicate) = tokio::join!(send(&router, "k"), duplicate);
    assert_eq!((&first.2[..], first.2.len()), (&b"paid"[..], duplicate.2.len()));
    let is_replay = [first, duplicate].map(|(_, headers, _)| headers.contains_key("idempotent-replayed"));
    assert_eq!((is_replay, bench.payments().await), ([false, true], 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_success_is_returned_or_stored_after_a_rollback_however_it_was_altered() {
    let bench = Bench::new(Ending::Commit).await;
    let router = with_handler(&bench, |pool, lease| async move {
        for response in ["first", "second"] {
            let mut transaction = pool.begin().await.unwrap();
            insert(&mut transaction).await;
            lease.complete_in(&mut transaction, response).await.unwrap();
        }
        ([("x-touched", "yes")], "second, touched").into_response()
    });
    let router = router.await;
    for _ in 0..2 {
        let (status, headers, _) = send(&router, "k").await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(!headers.contains_key("idempotent-replayed"));
    }
    assert_eq!(bench.payments().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_after_a_rollback_is_stored_like_any_other_response() {
    let bench = Bench::new(Ending::Commit).await;
    let router = with_handler(&bench, |pool, lease| async move {
        let mut transaction = pool.begin().await.unwrap();
        lease.complete_in(&mut transaction, "paid").await.unwrap();
        transaction.rollback().await.unwrap();
        (StatusCode::UNPROCESSABLE_ENTITY, "no such account").into_response()
    });
    let router = router.await;
    for replayed in [false, true] {
        let (status, headers, body) = send(&router, "k").await;
        assert_eq!(
            (status, &body[..]),
            (StatusCode::UNPROCESSABLE_ENTITY, &b"no such account"[..])
        );
        assert_eq!(headers.contains_key("idempotent-replayed"), replayed);
    }
}

/// The handler tries to record one response after the other, each in a transaction of its own, and returns one of them. The
/// layer stored the first one, because it compared only the last one.
#[tokio::test(flavor = "multi_thread")]
async fn no_response_that_was_rolled_back_is_stored() {
    let bench = Bench::new(Ending::Commit).await;
    for (key, statuses, returned) in [
        ("a", [200, 422], 422),
        ("b", [422, 402], 402),
        ("c", [422, 422], 422),
        ("d", [422, 402], 422),
        ("e", [422, 200], 422),
    ] {
        let router = with_handler(&bench, move |pool, lease| async move {
            for status in statuses {
                let mut transaction = pool.begin().await.unwrap();
                let status = StatusCode::from_u16(status).unwrap();
                lease.complete_in(&mut transaction, status).await.unwrap();
                transaction.rollback().await.unwrap();
            }
            StatusCode::from_u16(returned).unwrap().into_response()
        });
        let router = router.await;
        for _ in 0..2 {
            let (status, headers, _) = send(&router, key).await;
            assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{statuses:?}, {returned}");
            assert!(!headers.contains_key("idempotent-replayed"));
        }
    }
}

/// A handler drops its completion after each number of polls in turn, and still commits.
#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_was_dropped_and_still_committed_is_replayed() {
    let bench = Bench::new(Ending::Commit).await;
    let dropped = Arc::new(AtomicUsize::new(0));
    // Without a poll, the completion never begins. Some polls may find the reply already there.
    for (polls, round) in (1..=4).flat_map(|polls| (0..5).map(move |round| (polls, round))) {
        let counted = Arc::clone(&dropped);
        let handler = move |pool: PgPool, lease: Lease| {
            let dropped = Arc::clone(&counted);
            async move {
                let mut transaction = pool.begin().await.unwrap();
                insert(&mut transaction).await;
                let completion = drop_after(polls, lease.complete_in(&mut transaction, "recorded")).await;
                dropped.fetch_add(usize::from(completion.is_none()), Ordering::SeqCst);
                drop(transaction.commit().await);
                "after the drop".into_response()
            }
        };
        let router = with_handler(&bench, handler).await;
        let key = format!("dropped-after-{polls}-{round}");
        let mut responses = Vec::new();
        for _ in 0..3 {
            let (status, headers, body) = send(&router, &key).await;
            responses.push((status, body, headers.contains_key("idempotent-replayed")));
        }
        // Timing decides in each run whether the completion reached the server. Until it is
        // recorded, no response reports success. Once a caller has got the recorded response, every
        // later caller gets it.
        let is_recorded =
            |(status, body, _): &(StatusCode, Bytes, bool)| (status.as_u16(), &body[..]) == (200, b"recorded");
        let first = responses.iter().position(is_recorded).unwrap_or(responses.len());
        let (before, after) = responses.split_at(first);
        assert!(
            before.iter().all(|(status, ..)| status.as_u16() == 500),
            "{polls} polls: {responses:?}"
        );
        assert!(after.iter().all(is_recorded), "{polls} polls: {responses:?}");
        assert!(
            after.iter().skip(1).all(|(.., is_replay)| *is_replay),
            "{polls} polls: {responses:?}"
        );
    }
    assert!(dropped.load(Ordering::SeqCst) > 0, "no completion was dropped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_lost_before_the_completion_leaves_the_key_free() {
    let bench = Bench::new(Ending::Commit).await;
    let runs = Arc::clone(&bench.app.runs);
    let router = with_handler(&bench, move |pool, lease| {
        let is_first = runs.fetch_add(1, Ordering::SeqCst) == 0;
        async move {
            let mut transaction = pool.begin().await.unwrap();
            insert(&mut transaction).await;
            if is_first {
                let own = sqlx::query_scalar::<_, i32>("SELECT pg_backend_pid()");
                let own = own.fetch_one(&mut *transaction).await.unwrap();
                // Waits until the connection has ended, for at most a minute.
                let end = sqlx::query_scalar("SELECT pg_terminate_backend($1, 60000)").bind(own);
                assert!(end.fetch_one(&pool).await.unwrap_or(false));
            }
            match lease.complete_in(&mut transaction, "paid").await {
                Ok(response) => {
                    transaction.commit().await.unwrap();
                    response
                }
                Err(_) => StatusCode::CONFLICT.into_response(),
            }
        }
    });
    let router = router.await;
    // The response of a handler to a failed completion is not stored.
    assert_eq!(send(&router, "k").await.0, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(send(&router, "k").await.0, StatusCode::OK);
    assert_eq!((bench.payments().await, bench.runs()), (1, 2));
}

/// A success whose body broke off was recorded as done, although its transaction had been rolled
/// back.
#[tokio::test(flavor = "multi_thread")]
async fn a_response_that_breaks_off_after_a_rollback_frees_the_key() {
    let bench = Bench::new(Ending::Commit).await;
    let runs = Arc::clone(&bench.app.runs);
    let handler = move |pool: PgPool, lease: Lease| {
        runs.fetch_add(1, Ordering::SeqCst);
        async move {
            let mut transaction = pool.begin().await.unwrap();
            insert(&mut transaction).await;
            drop(lease.complete_in(&mut transaction, "paid").await.unwrap());
            transaction.rollback().await.unwrap();
            let lost = futures::stream::iter([Err::<Bytes, _>(std::io::Error::other("lost"))]);
            Body::from_stream(lost).into_response()
        }
    };
    let router = with_handler(&bench, handler).await;
    for _ in 0..2 {
        assert_eq!(send(&router, "k").await.0, StatusCode::INTERNAL_SERVER_ERROR);
    }
    assert_eq!((bench.payments().await, bench.runs()), (0, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_response_after_a_rollback_reports_success() {
    let bench = Bench::new(Ending::Commit).await;
    for on_error in [OnError::Store, OnError::Release, OnError::Unknown] {
        for ending in [
            "panics",
            "fails",
            "responds",
            "accepts",
            "redirects",
            "streams",
            "predicate-panics",
        ] {
            let handler = move |State(app): State<App>, lease: Lease| async move {
                let mut transaction = app.pool.begin().await.unwrap();
                insert(&mut transaction).await;
                let response = lease.complete_in(&mut transaction, "paid").await.unwrap();
                transaction.rollback().await.unwrap();
                match ending {
                    "panics" => panic!("the handler panics after the rollback"),
                    "fails" => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
                    "responds" => response,
                    "accepts" => (StatusCode::ACCEPTED, "accepted").into_response(),
                    "redirects" => (StatusCode::SEE_OTHER, "elsewhere").into_response(),
                    "streams" => ([("content-type", "text/event-stream")], "paid").into_response(),
                    _ => StatusCode::PAYMENT_REQUIRED.into_response(),
                }
            };
            let mut layer = bench.layer().on_error(on_error);
            if ending == "predicate-panics" {
                layer = layer.store_if(|_| panic!("the predicate panics"));
            }
            let router = Router::new().route("/payments", post(handler)).layer(layer);
            let router = router.with_state(bench.app.clone());
            for _ in 0..2 {
                let (status, ..) = send(&router, &format!("{on_error:?}-{ending}")).await;
                let is_error = status.is_client_error() || status.is_server_error();
                assert!(is_error, "{on_error:?}, {ending}: {status}");
            }
        }
    }
    assert_eq!(bench.payments().await, 0);
}

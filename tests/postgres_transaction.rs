//! Effect and answer in one transaction of the handler's: exactly once, whatever becomes of the commit.

#[path = "support/postgres.rs"]
mod postgres;
#[path = "support/proxy.rs"]
mod proxy;

use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use axum::body::{to_bytes, Body};
use axum::extract::State;
use axum::http::{HeaderMap, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::Router;
use bytes::Bytes;
use futures::future::join_all;
use postgres::PostgresServer;
use proxy::{Direction, Fate, Proxy};
use sqlx::PgPool;
use tower::ServiceExt;
use tower_idempotency::protocol::{Claim, Completion, Decision, Fingerprint, IfLost, Nonce, Outcome, StorageKey};
use tower_idempotency::{
    Drain, ErrorKind, IdempotencyLayer, Lease, MemoryStore, OnError, OnLost, PostgresStore, Store,
};

/// What a handler does with its transaction.
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
    /// What superseded the handler, between its effect and its completion.
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
    let answer = (
        StatusCode::CREATED,
        [("x-run", run.to_string())],
        format!("payment of run {run}"),
    );
    let answer = match lease.complete_in(&mut transaction, answer).await {
        Ok(answer) => answer,
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
            panic!("after the commit");
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
    answer
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
async fn effect_and_answer_commit_together_and_are_replayed() {
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
async fn a_commit_whose_reply_was_lost_counts_and_its_answer_is_given() {
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
async fn without_a_commit_there_is_no_effect_no_answer_and_the_next_attempt_runs() {
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
async fn a_superseded_owner_rolls_back_and_its_caller_gets_the_winners_bytes() {
    let mut bench = Bench::new(Ending::Commit).await;
    let store = bench.store.clone();
    bench.app.before_completion = Some(Arc::new(move |lease| {
        let store = store.clone();
        Box::pin(async move {
            // Somebody finds the lease lost, takes over and completes.
            let key = *lease.storage_key();
            store.renew(&key, lease.owner(), Duration::ZERO).await.unwrap();
            let fingerprint = store.peek(&key).await.unwrap().unwrap().fingerprint;
            let claim = Claim {
                fingerprint,
                ..claim(key)
            };
            let Decision::Execute(grant) = store.claim(&claim).await.unwrap() else {
                panic!("not taken over")
            };
            let layer = IdempotencyLayer::new(MemoryStore::new());
            let outcome = layer.outcome_of(
                http::Response::builder()
                    .status(201)
                    .body("the winner's".into())
                    .unwrap(),
            );
            store.complete(&key, grant.owner, &outcome, HOUR).await.unwrap();
        })
    }));
    let router = bench.router(bench.layer().on_lost(OnLost::Execute));
    let (status, _, body) = send(&router, "k").await;
    assert_eq!((status, &body[..]), (StatusCode::CREATED, &b"the winner's"[..]));
    assert_eq!(bench.payments().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_elsewhere_is_a_clear_error() {
    let bench = Bench::new(Ending::Commit).await;
    let handler = |State(app): State<App>, lease: Lease| async move {
        let mut transaction = app.pool.begin().await.unwrap();
        lease
            .complete_in(&mut transaction, "answer")
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
            Decision::NotKept => false,
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

/// Sends with a handler of one test's own, which gets the pool and how often it ran before.
async fn with_handler<F>(bench: &Bench, handler: impl Fn(PgPool, Lease) -> F + Clone + Send + Sync + 'static) -> Router
where
    F: std::future::Future<Output = Response> + Send + 'static,
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
async fn a_transaction_that_is_repeated_after_a_commit_of_unknown_fate_takes_effect_once() {
    let bench = Bench::new(Ending::Commit).await;
    let router = with_handler(&bench, |pool, lease| async move {
        for _ in 0..2 {
            let mut transaction = pool.begin().await.unwrap();
            insert(&mut transaction).await;
            match lease.complete_in(&mut transaction, "paid").await {
                // Its reply was lost, so the handler tries again.
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

#[tokio::test(flavor = "multi_thread")]
async fn no_success_is_given_or_kept_after_a_rollback_however_it_was_altered() {
    let bench = Bench::new(Ending::Commit).await;
    let router = with_handler(&bench, |pool, lease| async move {
        for answer in ["first", "second"] {
            let mut transaction = pool.begin().await.unwrap();
            insert(&mut transaction).await;
            lease.complete_in(&mut transaction, answer).await.unwrap();
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
async fn a_refusal_after_a_rollback_is_an_answer_like_any_other() {
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

/// Polls a future `polls` times, each after it was woken, then drops it.
async fn give_up_after<F: std::future::Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    let mut polled = 0;
    poll_fn(|cx| {
        polled += 1;
        match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if polled == polls => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// A handler drops its completion after each number of polls in turn, and commits all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_was_given_up_and_committed_all_the_same_is_what_everybody_gets() {
    let bench = Bench::new(Ending::Commit).await;
    let given_up = Arc::new(AtomicUsize::new(0));
    // Without a poll it never begins, and there is no transaction of ours. Some polls may find the reply there already.
    for (polls, round) in (1..=4).flat_map(|polls| (0..5).map(move |round| (polls, round))) {
        let counted = Arc::clone(&given_up);
        let handler = move |pool: PgPool, lease: Lease| {
            let given_up = Arc::clone(&counted);
            async move {
                let mut transaction = pool.begin().await.unwrap();
                insert(&mut transaction).await;
                let completion = give_up_after(polls, lease.complete_in(&mut transaction, "recorded")).await;
                given_up.fetch_add(usize::from(completion.is_none()), Ordering::SeqCst);
                drop(transaction.commit().await);
                "given instead".into_response()
            }
        };
        let router = with_handler(&bench, handler).await;
        let key = format!("given-up-after-{polls}-{round}");
        let mut answers = Vec::new();
        for _ in 0..3 {
            let (status, headers, body) = send(&router, &key).await;
            answers.push((status, body, headers.contains_key("idempotent-replayed")));
        }
        // Whether it arrived is a matter of time, for each run anew. Before it did, nothing is said to have happened; what was
        // given once is given for ever.
        let is_recorded =
            |(status, body, _): &(StatusCode, Bytes, bool)| (status.as_u16(), &body[..]) == (200, b"recorded");
        let first = answers.iter().position(is_recorded).unwrap_or(answers.len());
        let (before, after) = answers.split_at(first);
        assert!(
            before.iter().all(|(status, ..)| status.as_u16() == 500),
            "{polls} polls: {answers:?}"
        );
        assert!(after.iter().all(is_recorded), "{polls} polls: {answers:?}");
        assert!(
            after.iter().skip(1).all(|(.., is_replay)| *is_replay),
            "{polls} polls: {answers:?}"
        );
    }
    assert!(given_up.load(Ordering::SeqCst) > 0, "no completion was given up");
}

/// A layer whose store is cut off when its handler has completed, and that gives its caller up soon.
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
        // A lease that no test sees the end of: what ends an attempt is not that.
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
                let answer = lease.complete_in(&mut transaction, "paid").await.unwrap();
                if is_first {
                    cut.set(Fate::CutAfter(Direction::ToServer, 0));
                }
                if commits || !is_first {
                    transaction.commit().await.unwrap();
                } else {
                    transaction.rollback().await.unwrap();
                }
                answer
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

    /// The store is back, and has been asked.
    async fn heal(&self) {
        assert_eq!(self.drain.running(), 1);
        self.proxy.heal();
        self.drain.wait().await;
        assert_eq!(self.drain.running(), 0);
    }

    /// Sends again; a connection that the cut has killed may be found dead first.
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
async fn a_rollback_is_seen_also_where_others_took_the_outcome_for_unknown_meanwhile() {
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
    for on_error in [OnError::Release, OnError::Keep, OnError::Unknown] {
        let cut_off = CutOff::new(true, |layer| layer.on_error(on_error)).await;
        cut_off.heal().await;
        let (status, headers, body) = cut_off.again().await;
        assert_eq!((status, &body[..]), (StatusCode::OK, &b"paid"[..]), "{on_error:?}");
        assert_eq!(headers["idempotent-replayed"], "true");
        assert_eq!((cut_off.bench.payments().await, cut_off.bench.runs()), (1, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_follows_from_a_rollback_seen_late_is_what_was_set() {
    for (on_error, status) in [
        (OnError::Keep, StatusCode::INTERNAL_SERVER_ERROR),
        (OnError::Unknown, StatusCode::CONFLICT),
    ] {
        let cut_off = CutOff::new(false, |layer| layer.on_error(on_error)).await;
        cut_off.heal().await;
        for _ in 0..2 {
            let (given, headers, _) = cut_off.again().await;
            assert_eq!(given, status, "{on_error:?}");
            let is_replay = headers.contains_key("idempotent-replayed");
            assert_eq!(is_replay, on_error == OnError::Keep);
        }
        assert_eq!((cut_off.bench.payments().await, cut_off.bench.runs()), (0, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_stays_away_is_not_asked_for_ever() {
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
            let answer = lease.complete_in(&mut transaction, "paid").await.unwrap();
            if runs.fetch_add(1, Ordering::SeqCst) == 0 {
                late.send(transaction).await.unwrap();
            } else {
                transaction.commit().await.unwrap();
            }
            answer
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

/// A handler that has completed, in a transaction that is or is not good for it, waits until it may end; another waits beside it.
async fn renewed_while_handlers_wait(completes: bool) -> Renewed {
    let bench = Bench::new(Ending::Commit).await;
    let (end, _) = tokio::sync::broadcast::channel::<()>(1);
    let (ready, mut waiting) = tokio::sync::mpsc::channel(2);
    let waits = end.clone();
    let handler = move |State(app): State<App>, lease: Lease| {
        let (mut may_end, ready) = (waits.subscribe(), ready.clone());
        async move {
            let mut transaction = app.pool.begin().await.unwrap();
            let mut answer = "beside".into_response();
            if lease.key().as_str() == "completing" {
                if !completes {
                    let fails = sqlx::query("SELECT 1 / 0").execute(&mut *transaction).await;
                    assert!(fails.is_err());
                }
                let completion = lease.complete_in(&mut transaction, "completed").await;
                assert_eq!(completion.is_ok(), completes);
                answer = completion.unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response());
            }
            ready
                .send((lease.key().as_str().to_owned(), *lease.storage_key()))
                .await
                .unwrap();
            may_end.recv().await.unwrap();
            transaction.commit().await.unwrap();
            answer
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

/// What was seen while the lease of the handler beside was renewed several times.
#[derive(Debug)]
struct Renewed {
    completing: bool,
    waiting_for_locks: i64,
}

#[tokio::test(flavor = "multi_thread")]
async fn renewals_do_not_queue_up_behind_a_transaction_that_has_completed() {
    let seen = renewed_while_handlers_wait(true).await;
    // One may have been under way.
    assert!(!seen.completing && seen.waiting_for_locks <= 1, "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_failed_leaves_the_lease_renewed() {
    assert!(renewed_while_handlers_wait(false).await.completing);
}

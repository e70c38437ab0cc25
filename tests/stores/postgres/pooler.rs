//! The store, the inbox and the outbox behind PgBouncer.

use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use axum::routing::post;
use futures::future::join_all;
use sqlx::Row;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use tower::ServiceExt;
use tower_idempotency::outbox::{Outbox, OutboxMessage};
use tower_idempotency::protocol::{Completion, Decision, Nonce, Outcome, StorageKey};
use tower_idempotency::receiver::{Inbox, Receipt};
use tower_idempotency::store::conformance;
use tower_idempotency::{BoxStore, Error, ErrorKind, IdempotencyLayer, PostgresStore, Store};

use super::{Claim, HOUR, claim, granted, stored};
use crate::support::bouncer::Bouncer;
use crate::support::postgres::PostgresServer;

/// sqlx sends this parameter when it connects; PgBouncer refuses it by default.
const ACCEPTS_SQLX: &str = "ignore_startup_parameters = extra_float_digits";

async fn pool(server: &PostgresServer, bouncer: &Bouncer, cached: usize) -> PgPool {
    let options = PgConnectOptions::from_str(&server.url_by(bouncer.port())).unwrap();
    let pool = PgPoolOptions::new().max_connections(12);
    pool.connect_with(options.statement_cache_capacity(cached))
        .await
        .unwrap()
}

/// Runs the whole life of a key. Returns the impossible states that it has read.
async fn live(store: PostgresStore, claim: Claim) -> Result<Option<String>, Error> {
    let key = &claim.key;
    let grant = match store.claim(&claim).await? {
        Decision::Execute(grant) => grant,
        other => return Ok(Some(format!("claim: {other:?}"))),
    };
    match store.peek(key).await? {
        Some(seen) if seen.nonce == claim.nonce => {}
        other => return Ok(Some(format!("peek: {other:?}"))),
    }
    drop(store.watch(key).await?);
    store.renew(key, grant.owner, HOUR).await?;
    let completed = store.complete(key, grant.owner, &stored(key.as_bytes()), HOUR).await?;
    if completed != Completion::Completed {
        return Ok(Some(format!("complete: {completed:?}")));
    }
    let again = Claim {
        nonce: Nonce::random(),
        ..claim.clone()
    };
    match store.claim(&again).await? {
        Decision::Replay(response) if response.body[..] == key.as_bytes()[..] => Ok(None),
        other => Ok(Some(format!("replay: {other:?}"))),
    }
}

/// Runs the lives of 240 keys, twelve at a time. Returns the impossible states, and the errors.
async fn lives(store: &PostgresStore) -> (Vec<String>, Vec<Error>) {
    let (mut wrong, mut errors) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let lives = (0..12).map(|_| {
            let claim = Claim {
                key: StorageKey::from_bytes(rand::random()),
                ..claim(0)
            };
            tokio::spawn(live(store.clone(), claim))
        });
        for lived in join_all(lives).await {
            match lived.unwrap() {
                Ok(state) => wrong.extend(state),
                Err(error) => errors.push(error),
            }
        }
    }
    (wrong, errors)
}

/// Five of 240 sequences read the rows of another statement, and `peek` reported a held key as
/// absent.
#[tokio::test(flavor = "multi_thread")]
async fn every_operation_gets_its_own_rows_behind_a_transaction_pooler() {
    let server = PostgresServer::start();
    PostgresStore::connect(&server.url()).await.unwrap();
    let bouncer = Bouncer::start(&server, "transaction", ACCEPTS_SQLX);
    for cached in [0, 100] {
        let builder = PostgresStore::builder().with_transaction_pooler();
        let store = builder.with_pool(pool(&server, &bouncer, cached).await).unwrap();
        let (wrong, errors) = lives(&store).await;
        assert!(wrong.is_empty() && errors.is_empty(), "{cached}: {wrong:?} {errors:?}");
        store.sweep().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_holds_behind_a_transaction_pooler() {
    let server = PostgresServer::start();
    // The default settings of Debian, which refuse the startup parameter of sqlx.
    let bouncer = Bouncer::start(&server, "transaction", "");
    let url = format!("{}?transaction_pooler=true", server.url_by(bouncer.port()));
    conformance::all(&BoxStore::from_url(&url).await.unwrap()).await;
    let store = PostgresStore::connect(&url).await.unwrap();
    conformance::differential(&store, 30, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_pooler_is_refused_at_the_start_without_the_setting() {
    let server = PostgresServer::start();
    PostgresStore::connect(&server.url()).await.unwrap();
    for further in ["", ACCEPTS_SQLX, &format!("{ACCEPTS_SQLX}\nserver_round_robin = 1")] {
        let bouncer = Bouncer::start(&server, "transaction", further);
        let url = server.url_by(bouncer.port());
        let mut errors = vec![
            PostgresStore::connect(&url).await.map(drop).unwrap_err(),
            PostgresStore::builder().connect(&url).await.map(drop).unwrap_err(),
            BoxStore::from_url(&url).await.map(drop).unwrap_err(),
        ];
        if !further.is_empty() {
            let pool = pool(&server, &bouncer, 0).await;
            // Several servers are idle, so the next one is not always the last one.
            join_all((0..8).map(|_| sqlx::raw_sql("SELECT pg_sleep(0.2)").execute(&pool))).await;
            let store = PostgresStore::builder().with_pool(pool.clone()).unwrap();
            errors.push(store.claim(&claim(1)).await.map(drop).unwrap_err());
            errors.push(store.check().await.unwrap_err());
            let relay = Outbox::new(pool).relay(|_: OutboxMessage| async { Ok::<_, String>(()) });
            errors.push(relay.publish_once().await.map(drop).unwrap_err());
        }
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Configuration, "{further}: {error:?}");
            assert!(
                error.to_string().contains("with_transaction_pooler"),
                "{further}: {error:?}"
            );
        }
    }
}

/// The settings of the store's sessions would stay with the server, and the next client would get
/// them.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_pooler_does_not_change_the_sessions_of_its_servers() {
    let server = PostgresServer::start();
    let bouncer = Bouncer::start(&server, "transaction", ACCEPTS_SQLX);
    let url = server.url_by(bouncer.port());
    PostgresStore::connect(&url).await.map(drop).unwrap_err();
    PostgresStore::connect(&format!("{url}?transaction_pooler=true"))
        .await
        .unwrap();
    let pool = pool(&server, &bouncer, 0).await;
    let shown = join_all((0..8).map(|_| {
        let shown = sqlx::raw_sql("SELECT current_setting('lock_timeout') FROM pg_sleep(0.1)");
        shown.fetch_one(&pool)
    }));
    for shown in shown.await {
        assert_eq!(shown.unwrap().get::<String, _>(0), "0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_in_session_mode_is_accepted() {
    let server = PostgresServer::start();
    // In this mode, each client connection has a server connection of its own.
    let bouncer = Bouncer::start(&server, "session", &format!("{ACCEPTS_SQLX}\ndefault_pool_size = 40"));
    for _ in 0..3 {
        let store = PostgresStore::connect(&server.url_by(bouncer.port())).await.unwrap();
        let (wrong, errors) = lives(&store).await;
        assert!(wrong.is_empty() && errors.is_empty(), "{wrong:?} {errors:?}");
        store.pool().close().await;
    }
}

/// The check cannot find a pooler that starts later.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_another_statement_are_errors() {
    let server = PostgresServer::start();
    PostgresStore::connect(&server.url()).await.unwrap();
    for cached in [0, 100] {
        let mut bouncer = Bouncer::start(&server, "session", ACCEPTS_SQLX);
        let pool = pool(&server, &bouncer, cached).await;
        let store = PostgresStore::builder().with_pool(pool).unwrap();
        granted(&store, &claim(u8::from(cached == 0))).await;
        bouncer.restart(&server, "transaction", ACCEPTS_SQLX);
        let (wrong, errors) = lives(&store).await;
        assert_eq!(wrong, Vec::<String>::new());
        assert!(!errors.is_empty(), "the pooler mixed no statements up");
    }
}

/// The same statement on another table takes the same parameters, and its rows look alike.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_another_table_are_errors() {
    let server = PostgresServer::start();
    let mut bouncer = Bouncer::start(&server, "session", ACCEPTS_SQLX);
    let pool = pool(&server, &bouncer, 0).await;
    let store = |table: &str| {
        let builder = PostgresStore::builder().with_table(table);
        builder.with_pool(pool.clone()).unwrap()
    };
    let (holds, is_empty) = (store("holds"), store("is_empty"));
    holds.migrate().await.unwrap();
    is_empty.migrate().await.unwrap();
    let held = claim(1);
    granted(&holds, &held).await;
    bouncer.restart(&server, "transaction", ACCEPTS_SQLX);
    let mut errors = 0;
    for _ in 0..40 {
        let looks = (0..12).map(|turn| {
            let (store, key) = (if turn % 2 == 0 { &holds } else { &is_empty }.clone(), held.key);
            tokio::spawn(async move { (turn, store.peek(&key).await) })
        });
        for looked in join_all(looks).await {
            match looked.unwrap() {
                (turn, Ok(seen)) => assert_eq!(seen.is_some(), turn % 2 == 0, "{turn}"),
                (_, Err(_)) => errors += 1,
            }
        }
    }
    assert!(errors > 0, "the pooler mixed no statements up");
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_of_the_application_work_behind_a_transaction_pooler() {
    let server = PostgresServer::start();
    let bouncer = Bouncer::start(&server, "transaction", ACCEPTS_SQLX);
    let pool = pool(&server, &bouncer, 100).await;
    let builder = PostgresStore::builder().with_transaction_pooler();
    let store = builder.with_pool(pool.clone()).unwrap();
    store.migrate().await.unwrap();
    store.check().await.unwrap();
    let inbox = Inbox::new(store.clone(), "billing");
    let outbox = Outbox::new(pool.clone()).with_transaction_pooler();
    outbox.migrate().await.unwrap();
    let work = (0..48_u8).map(|number| {
        let (store, inbox, outbox, pool) = (store.clone(), inbox.clone(), outbox.clone(), pool.clone());
        tokio::spawn(async move {
            let claim = claim(number);
            let owner = granted(&store, &claim).await.owner;
            let mut transaction = pool.begin().await.unwrap();
            let received = inbox.receive(&mut transaction, number.to_string()).await.unwrap();
            assert_eq!(received, Receipt::First(()));
            let message = OutboxMessage::new("paid", "x").with_id(number.to_string());
            assert!(outbox.put(&mut transaction, &message).await.unwrap());
            let completed = store.complete_in(&mut transaction, &claim.key, owner, &Outcome::Tombstone, HOUR);
            assert_eq!(completed.await.unwrap(), Completion::Completed);
            transaction.commit().await.unwrap();
            let again = Claim {
                nonce: Nonce::random(),
                ..claim
            };
            assert_eq!(store.claim(&again).await.unwrap(), Decision::NotStored);
        })
    });
    for worked in join_all(work).await {
        worked.unwrap();
    }
    let published = Arc::new(Mutex::new(Vec::new()));
    let relays = (0..4).map(|_| {
        let (outbox, published) = (outbox.clone(), Arc::clone(&published));
        tokio::spawn(async move {
            let relay = outbox.relay(move |message: OutboxMessage| {
                published.lock().unwrap().push(message.id().to_owned());
                async { Ok::<_, String>(()) }
            });
            let relay = relay.with_batch(5);
            for _ in 0..12 {
                relay.publish_once().await.unwrap();
            }
        })
    });
    for relayed in join_all(relays).await {
        relayed.unwrap();
    }
    let mut published = published.lock().unwrap().clone();
    published.sort_by_key(|id| id.parse::<u8>().unwrap());
    assert_eq!(published, (0..48).map(|number| number.to_string()).collect::<Vec<_>>());
    assert_eq!(outbox.waiting().await.unwrap(), 0);
}

/// PgBouncer reports all of its own errors with the code for a protocol violation. The store took
/// them for mixed-up statements.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_behind_a_pooler_is_no_misconfiguration() {
    let mut server = PostgresServer::start();
    PostgresStore::connect(&server.url()).await.unwrap();
    let soon = format!("{ACCEPTS_SQLX}\nserver_connect_timeout = 1\nserver_login_retry = 1\nquery_wait_timeout = 1");
    for mode in ["session", "transaction"] {
        let bouncer = Bouncer::start(&server, mode, &format!("{soon}\ndefault_pool_size = 40"));
        let url = server.url_by(bouncer.port());
        let url = match mode {
            "transaction" => format!("{url}?transaction_pooler=true"),
            _ => url,
        };
        let store = PostgresStore::connect(&url).await.unwrap();
        let layer = IdempotencyLayer::new(store.clone()).with_store_timeout(Duration::from_secs(5));
        let router = Router::new().route("/payments", post(|| async { "paid" })).layer(layer);
        let send = |key: &str| {
            let request = Request::post("/payments").header("idempotency-key", key);
            router.clone().oneshot(request.body(Body::empty()).unwrap())
        };
        assert_eq!(send(&format!("{mode}-before")).await.unwrap().status(), StatusCode::OK);
        server.kill();
        let mut errors = vec![PostgresStore::connect(&url).await.map(drop).unwrap_err()];
        for _ in 0..2 {
            errors.push(store.claim(&claim(1)).await.map(drop).unwrap_err());
            errors.push(store.peek(&claim(1).key).await.map(drop).unwrap_err());
        }
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{mode}: {error:?}");
        }
        let refused = send(&format!("{mode}-during")).await.unwrap();
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
        let body = axum::body::to_bytes(refused.into_body(), 10_000).await.unwrap();
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(problem["retryable"], true, "{problem}");
        server.run();
        for tries in 0.. {
            match send(&format!("{mode}-during")).await.unwrap().status() {
                StatusCode::OK => break,
                other => assert!(tries < 100, "{mode}: {other}"),
            }
            // PgBouncer itself tries to connect once a second.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Replaces the statement of a `peek` in the one session of a pool, as a pooler does that changes
/// the server between two messages.
async fn replace(pool: &PgPool, change: impl FnOnce(&str) -> String) {
    let prepared = "SELECT name, parameter_types::text, statement FROM pg_prepared_statements \
        WHERE statement LIKE '%AS standby%' AND statement NOT LIKE '%pg_prepared_statements%'";
    let prepared = sqlx::query_as(prepared).fetch_one(pool).await.unwrap();
    let (name, types, statement): (String, String, String) = prepared;
    let types = types.trim_matches(['{', '}']);
    let sql = format!("DEALLOCATE {name}; PREPARE {name} ({types}) AS {}", change(&statement));
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(pool).await.unwrap();
}

/// Each row must belong to this statement and to this execution of it (I4).
#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_another_execution_or_another_table_and_a_second_row_are_errors() {
    let server = PostgresServer::start();
    PostgresStore::connect(&server.url()).await.unwrap();
    let changes: [fn(&str) -> String; 5] = [
        |peek| format!("SELECT * FROM ({peek}) unchanged"),
        |peek| peek.replace("$2::bigint AS question", "$2::bigint + 1 AS question"),
        |peek| peek.replace("'peek \"idempotency_records\"", "'peek \"other_records\""),
        |peek| peek.replace("records\"'", "records\" of another kind'"),
        |peek| format!("({peek}) UNION ALL ({peek})"),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let pool = PgPoolOptions::new().max_connections(1);
        let pool = pool.connect(&server.url()).await.unwrap();
        let store = PostgresStore::builder().with_pool(pool.clone()).unwrap();
        store.peek(&claim(1).key).await.unwrap();
        replace(&pool, change).await;
        let seen = store.peek(&claim(1).key).await;
        if number == 0 {
            assert_eq!(seen.unwrap(), None);
            continue;
        }
        let error = seen.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{number}: {error:?}");
        assert!(error.to_string().contains("belongs to another statement"), "{error}");
        // The store has closed the connection.
        store.peek(&claim(1).key).await.unwrap();
    }
}

/// PostgreSQL reports parameters of another statement by the code that PgBouncer uses for an
/// outage.
#[tokio::test(flavor = "multi_thread")]
async fn parameters_that_reach_another_statement_are_blamed_on_a_pooler() {
    let server = PostgresServer::start();
    PostgresStore::connect(&server.url()).await.unwrap();
    let pool = PgPoolOptions::new().max_connections(1);
    let pool = pool.connect(&server.url()).await.unwrap();
    let store = PostgresStore::builder().with_pool(pool.clone()).unwrap();
    store.peek(&claim(1).key).await.unwrap();
    let prepared = "SELECT string_agg(format('DEALLOCATE %s; PREPARE %s AS SELECT 1', name, name), '; ') \
        FROM pg_prepared_statements WHERE statement LIKE '%AS standby%'";
    let sql: String = sqlx::query_scalar(prepared)
        .persistent(false)
        .fetch_one(&pool)
        .await
        .unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&pool).await.unwrap();
    let error = store.peek(&claim(1).key).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}");
    assert!(error.to_string().contains("pooler"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiter_is_woken_behind_a_transaction_pooler() {
    let server = PostgresServer::start();
    let bouncer = Bouncer::start(&server, "transaction", ACCEPTS_SQLX);
    let url = format!("{}?transaction_pooler=true", server.url_by(bouncer.port()));
    let store = PostgresStore::connect(&url).await.unwrap();
    let claim = claim(1);
    let owner = granted(&store, &claim).await.owner;
    let watch = store.watch(&claim.key).await.unwrap();
    store.complete(&claim.key, owner, &stored(b"paid"), HOUR).await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), watch).await.unwrap();
}

//! Roles with too few rights, tables that do not fit, and servers that take no writes.

use std::error::Error as _;

use futures::future::join_all;
use sqlx::AssertSqlSafe;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::protocol::Resolution;
use tower_idempotency::receiver::{Disposition, Inbox, ReceiverLayer};
use tower_idempotency::store::conformance;
use tower_idempotency::{BoxStore, Error, ErrorKind, IdempotencyLayer, PostgresStore, RefusalKind, Store};

use super::{HOUR, claim, granted, stored};
use crate::support::postgres::PostgresServer;

async fn pool(url: &str) -> PgPool {
    PgPoolOptions::new().max_connections(4).connect(url).await.unwrap()
}

async fn execute(pool: &PgPool, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(pool)
        .await
        .unwrap();
}

/// The URL of a role with the rights on the table that the documentation of `PostgresStore` lists.
/// The role may not make tables.
async fn role_with_documented_rights(server: &PostgresServer, own: &PgPool) -> String {
    let source = include_str!("../../../src/store/postgres/mod.rs");
    let grants = source.lines().filter(|line| line.starts_with("/// GRANT "));
    let grants: String = grants.map(|line| line.trim_start_matches("///")).collect();
    assert_eq!(grants.matches("GRANT").count(), 2);
    execute(own, "CREATE ROLE web LOGIN; REVOKE ALL ON SCHEMA public FROM public").await;
    execute(own, &grants).await;
    server.url().replace("app@", "web@")
}

async fn assert_misconfigured<T: std::fmt::Debug>(
    what: &str,
    operation: impl Future<Output = Result<T, Error>>,
    reason: &str,
) -> Error {
    let error = operation.await.expect_err(what);
    assert_eq!(error.kind(), ErrorKind::Configuration, "{what}: {error:?}");
    assert!(error.to_string().contains(reason), "{what}: {error}");
    error
}

/// Checks that neither a request nor a message runs, and that the store reports both as failed.
async fn assert_nothing_runs(store: &PostgresStore) {
    let layer = IdempotencyLayer::new(store.clone()).dangerously_run_unprotected_when_the_store_fails();
    let service = layer.layer(service_fn(
        |_: http::Request<http_body_util::Full<bytes::Bytes>>| async {
            panic!("the request runs");
            #[expect(unreachable_code, reason = "it names the type of the response")]
            Ok::<_, std::convert::Infallible>(http::Response::new(http_body_util::Full::<bytes::Bytes>::default()))
        },
    ));
    let request = http::Request::post("/").header("idempotency-key", "k");
    let refused = service.oneshot(request.body("pay".into()).unwrap()).await.unwrap();
    let refusal = refused.extensions().get::<tower_idempotency::Refusal>().unwrap();
    assert_eq!(
        (refused.status().as_u16(), refusal.kind()),
        (500, RefusalKind::StoreMisconfigured)
    );

    let receiver = ReceiverLayer::new(store.clone(), "billing").with_id(|id: &String| id.clone());
    let receiver = receiver.layer(service_fn(|_: String| async {
        panic!("the message is handled");
        #[expect(unreachable_code, reason = "it names the type of the result")]
        Ok::<(), std::convert::Infallible>(())
    }));
    let received = receiver.oneshot("7".to_owned()).await;
    assert_eq!(Disposition::of(&received), Disposition::Redeliver(None), "{received:?}");
}

/// `CREATE TABLE IF NOT EXISTS` needs the right to make a table even if the table exists.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_without_create_can_connect_to_a_table_that_is_there() {
    let server = PostgresServer::start();
    let own = pool(&server.url()).await;
    PostgresStore::connect(&server.url()).await.unwrap();
    let url = role_with_documented_rights(&server, &own).await;
    let store = PostgresStore::connect(&url).await.unwrap();
    BoxStore::from_url(&url).await.unwrap();
    store.migrate().await.unwrap();
    conformance::all(&store).await;
    // The role can listen and wait, notify, and sweep.
    let owner = granted(&store, &claim(9)).await.owner;
    let watch = store.watch(&claim(9).key).await.unwrap();
    store.complete(&claim(9).key, owner, &stored(b"a"), HOUR).await.unwrap();
    tokio::time::timeout(HOUR / 1_800, watch).await.unwrap();
    execute(&own, "UPDATE idempotency_records SET expires = 0").await;
    assert!(store.sweep().await.unwrap() > 0);
    let inbox = Inbox::new(PostgresStore::builder().with_pool(pool(&url).await).unwrap(), "billing");
    inbox
        .receive(&mut store.pool().acquire().await.unwrap(), "7")
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_lacks_a_right_is_refused_with_the_name_of_the_right() {
    let server = PostgresServer::start();
    let own = pool(&server.url()).await;
    let url = {
        PostgresStore::connect(&server.url()).await.unwrap();
        role_with_documented_rights(&server, &own).await
    };
    let checked = PostgresStore::connect(&url).await.unwrap();
    for right in ["SELECT", "INSERT", "UPDATE", "DELETE"] {
        execute(&own, &format!("REVOKE {right} ON idempotency_records FROM web")).await;
        let error = assert_misconfigured("connect", PostgresStore::connect(&url), "lacks a right").await;
        assert!(error.source().unwrap().to_string().contains(right), "{error:?}");
        let store = PostgresStore::builder().with_pool(pool(&url).await).unwrap();
        assert_misconfigured("claim", store.claim(&claim(1)), "lacks a right").await;
        assert_nothing_runs(&store).await;
        execute(&own, &format!("GRANT {right} ON idempotency_records TO web")).await;
        // The store does not remember the failure.
        store.peek(&claim(1).key).await.unwrap();
    }
    execute(&own, "REVOKE INSERT ON idempotency_records FROM web").await;
    assert_misconfigured("claim", checked.claim(&claim(1)), "lacks a right").await;
    assert_nothing_runs(&checked).await;
    execute(&own, "DROP TABLE idempotency_records").await;
    assert_misconfigured("connect", PostgresStore::connect(&url), "may not make it").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_missing_is_found_before_the_first_request_is_served() {
    let server = PostgresServer::start();
    let own = pool(&server.url()).await;
    let store = PostgresStore::builder().with_pool(own.clone()).unwrap();
    let key = &claim(1).key;
    for error in join_all((0..50).map(|number| {
        let store = store.clone();
        async move { store.claim(&claim(number)).await.unwrap_err() }
    }))
    .await
    {
        assert_eq!(error.kind(), ErrorKind::Configuration);
        assert!(error.to_string().contains("call `migrate()`"), "{error}");
    }
    assert_misconfigured("peek", store.peek(key), "call `migrate()`").await;
    let inbox = Inbox::new(store.clone(), "billing");
    let mut transaction = own.begin().await.unwrap();
    let received = inbox.receive(&mut transaction, "7").await;
    assert_eq!(Disposition::of(&received), Disposition::Redeliver(None), "{received:?}");
    // The check has not spoiled the transaction.
    sqlx::query("SELECT 1").execute(&mut *transaction).await.unwrap();
    transaction.rollback().await.unwrap();
    assert_nothing_runs(&store).await;
    store.migrate().await.unwrap();
    granted(&store, &claim(1)).await;
    execute(&own, "ALTER TABLE idempotency_records SET UNLOGGED").await;
    let unlogged = PostgresStore::builder().with_pool(own.clone()).unwrap();
    assert_misconfigured("claim", unlogged.claim(&claim(2)), "unlogged").await;
}

/// If the table changes after the check, the errors of the server show the change.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_changed_later_is_misconfigured_and_the_error_names_the_cause() {
    let server = PostgresServer::start();
    let own = pool(&server.url()).await;
    for (change, reason) in [
        ("ALTER TABLE idempotency_records RENAME TO other", "call `migrate()`"),
        ("ALTER TABLE idempotency_records DROP COLUMN fence", "other columns"),
        (
            "ALTER TABLE idempotency_records DROP CONSTRAINT idempotency_records_pkey",
            "other columns",
        ),
        (
            "ALTER TABLE idempotency_records ADD note text NOT NULL",
            "other columns",
        ),
        (
            "CREATE TABLE other AS TABLE idempotency_records; DROP TABLE idempotency_records; \
             CREATE MATERIALIZED VIEW idempotency_records AS TABLE other",
            "other columns",
        ),
    ] {
        let store = PostgresStore::connect(&server.url()).await.unwrap();
        execute(&own, change).await;
        assert_misconfigured(change, store.claim(&claim(1)), reason).await;
        assert_nothing_runs(&store).await;
        execute(&own, "DROP SCHEMA public CASCADE; CREATE SCHEMA public").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_is_read_only_by_default_is_refused() {
    let server = PostgresServer::start();
    let own = pool(&server.url()).await;
    let checked = PostgresStore::connect(&server.url()).await.unwrap();
    execute(&own, "ALTER ROLE app SET default_transaction_read_only = on").await;
    assert_misconfigured("connect", PostgresStore::connect(&server.url()), "read-only").await;
    let store = PostgresStore::builder().with_pool(pool(&server.url()).await).unwrap();
    assert_misconfigured("claim", store.claim(&claim(1)), "read-only").await;
    assert_nothing_runs(&store).await;
    // A store with an earlier check meets the setting on its next connection.
    execute(
        &own,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname IS NOT NULL",
    )
    .await;
    let mut asked = checked.claim(&claim(1)).await;
    while asked
        .as_ref()
        .is_err_and(|error| error.kind() == ErrorKind::StoreUnavailable)
    {
        asked = checked.claim(&claim(1)).await;
    }
    assert_misconfigured("claim", async { asked }, "read-only").await;
}

/// A failover that leaves the old primary running as a standby, with the same address and with
/// records that may be old.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_became_a_standby_shows_and_changes_no_records() {
    let mut server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let done = granted(&store, &claim(1)).await.owner;
    store.complete(&claim(1).key, done, &stored(b"a"), HOUR).await.unwrap();
    let owner = granted(&store, &claim(2)).await.owner;
    let key = &claim(2).key;
    server.kill();
    server.give("data/standby.signal", "");
    server.run();
    let mut peeked = store.peek(key).await;
    while peeked
        .as_ref()
        .is_err_and(|error| error.kind() == ErrorKind::StoreUnavailable)
    {
        peeked = store.peek(key).await;
    }
    assert_misconfigured("peek", async { peeked }, "read-only").await;
    assert_misconfigured("peek of an absent key", store.peek(&claim(3).key), "read-only").await;
    for number in 1..4 {
        assert_misconfigured("claim", store.claim(&claim(number)), "read-only").await;
    }
    assert_misconfigured("renew", store.renew(key, owner, HOUR), "read-only").await;
    assert_misconfigured("complete", store.complete(key, owner, &stored(b"b"), HOUR), "read-only").await;
    assert_misconfigured("release", store.release(key, owner), "read-only").await;
    assert_misconfigured(
        "resolve",
        store.resolve(key, owner.fence, &Resolution::Absent),
        "read-only",
    )
    .await;
    assert_misconfigured("connect", PostgresStore::connect(&server.url()), "read-only").await;
    assert_nothing_runs(&store).await;
}

/// The check looked at the partitioned table alone, which is logged whatever its partitions are.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_with_an_unlogged_partition_is_refused() {
    let server = PostgresServer::start();
    let own = pool(&server.url()).await;
    let store = PostgresStore::builder().with_pool(own.clone()).unwrap();
    store.migrate().await.unwrap();
    execute(
        &own,
        "ALTER TABLE idempotency_records RENAME TO logged;
        CREATE TABLE idempotency_records (LIKE logged INCLUDING ALL) PARTITION BY HASH (key);
        CREATE TABLE part PARTITION OF idempotency_records FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
    )
    .await;
    granted(&store, &claim(1)).await;
    execute(&own, "ALTER TABLE part SET UNLOGGED").await;
    let unlogged = PostgresStore::builder().with_pool(own).unwrap();
    assert_misconfigured("claim", unlogged.claim(&claim(2)), "unlogged").await;
}

/// A view counted as logged, whatever the table behind it.
#[tokio::test(flavor = "multi_thread")]
async fn a_view_in_place_of_the_table_is_refused() {
    let server = PostgresServer::start();
    let own = pool(&server.url()).await;
    let store = PostgresStore::builder().with_pool(own.clone()).unwrap();
    store.migrate().await.unwrap();
    execute(
        &own,
        "ALTER TABLE idempotency_records RENAME TO unlogged;
        ALTER TABLE unlogged SET UNLOGGED;
        CREATE VIEW idempotency_records AS SELECT * FROM unlogged",
    )
    .await;
    assert_misconfigured("claim", store.claim(&claim(1)), "other columns").await;
}

/// The check of an application's transaction counted for the pool, whose role may lack rights. The
/// check of the pool counted for the application, whose role might not see all rows.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_counts_only_where_it_ran() {
    let server = PostgresServer::start();
    let own = PostgresStore::connect(&server.url()).await.unwrap();
    let app = own.pool();
    execute(
        app,
        "CREATE ROLE web LOGIN; GRANT SELECT, INSERT, UPDATE ON idempotency_records TO web",
    )
    .await;
    let web = pool(&server.url().replace("app@", "web@")).await;
    let store = PostgresStore::builder().with_pool(web.clone()).unwrap();
    let mut transaction = app.begin().await.unwrap();
    store.claim_in(&mut transaction, &claim(1)).await.unwrap();
    transaction.commit().await.unwrap();
    assert_misconfigured("claim", store.claim(&claim(2)), "lacks a right").await;
    execute(
        app,
        "GRANT DELETE ON idempotency_records TO web; ALTER TABLE idempotency_records ENABLE ROW LEVEL SECURITY",
    )
    .await;
    let store = PostgresStore::builder().with_pool(app.clone()).unwrap();
    store.check().await.unwrap();
    let mut transaction = web.begin().await.unwrap();
    let held = claim(1);
    let claimed = store.claim_in(&mut transaction, &held);
    assert_misconfigured("claim_in", claimed, "row-level security").await;
}

//! The connections that a store holds between two operations.

use std::time::Duration;

use futures::future::join_all;
use sqlx::postgres::PgPool;
use tokio::time::{sleep, timeout};
use tower_idempotency::protocol::{Completion, StorageKey};
use tower_idempotency::{PostgresStore, Store};

use super::{HOUR, claim, granted, stored};
use crate::support::postgres::PostgresServer;
use crate::support::proxy::{Direction, Fate, Proxy};

const SECOND: Duration = Duration::from_secs(1);

/// The number of connections in the pool of a store.
const CONNECTIONS: u8 = 16;

async fn pool(server: &PostgresServer) -> PgPool {
    PgPool::connect(&server.url()).await.unwrap()
}

/// Makes a store whose pool has all of its connections, and which holds all of them as spares. As
/// many claims as there are connections run at once, because they wait for a lock.
async fn keeping(server: &PostgresServer, other: &PgPool) -> PostgresStore {
    keeping_by(&server.url(), other).await
}

async fn keeping_by(url: &str, other: &PgPool) -> PostgresStore {
    // The claims wait for the lock for at most two fifths of this.
    let builder = PostgresStore::builder().with_timeout(60 * SECOND);
    let store = builder.connect(url).await.unwrap();
    store.migrate().await.unwrap();
    let mut locked = other.begin().await.unwrap();
    let lock = "LOCK TABLE idempotency_records IN EXCLUSIVE MODE";
    sqlx::raw_sql(lock).execute(&mut *locked).await.unwrap();
    let claims = (0..CONNECTIONS).map(|key| {
        let store = store.clone();
        tokio::spawn(async move { granted(&store, &claim(key)).await })
    });
    let claims: Vec<_> = claims.collect();
    while sessions(other, "wait_event_type = 'Lock'").await < i64::from(CONNECTIONS) {
        sleep(SECOND / 100).await;
    }
    locked.commit().await.unwrap();
    for granted in join_all(claims).await {
        granted.unwrap();
    }
    store
}

/// Returns the number of sessions of other clients in this state.
async fn sessions(other: &PgPool, state: &'static str) -> i64 {
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND {state} AND query <> '' \
         AND query NOT LIKE '%pg_stat_activity%'"
    );
    let counted = sqlx::query_scalar(sqlx::AssertSqlSafe(sql));
    counted.fetch_one(other).await.unwrap()
}

/// The pool does not know that spare connections are free, and `close` waits for all that are in
/// use.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_the_application_closes_gets_all_connections_back() {
    let server = PostgresServer::start();
    let store = keeping(&server, &pool(&server).await).await;
    let closed = timeout(4 * SECOND, store.pool().close()).await;
    closed.expect("the store gives its connections back");
}

/// Without a spare connection, the driver pings each connection before the next operation may use
/// it. The next operation would then open another one.
#[tokio::test(flavor = "multi_thread")]
async fn operations_one_after_the_other_share_one_connection() {
    let server = PostgresServer::start();
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let url = server.url_by(proxy.address.port());
    let store = PostgresStore::connect(&url).await.unwrap();
    proxy.set(Fate::Delay(SECOND / 50));
    for key in 0..20 {
        store.peek(&claim(key).key).await.unwrap();
    }
    let shown = format!("{store:?}");
    assert!(shown.contains("connections: 1,"), "{shown}");
}

/// The listener takes its connection from the same pool.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_holds_all_connections_frees_one_to_listen() {
    let server = PostgresServer::start();
    let other = pool(&server).await;
    let store = keeping(&server, &other).await;
    let watch = store.watch(&StorageKey::from_bytes([1; 32])).await.unwrap();
    assert_eq!(sessions(&other, "query LIKE 'LISTEN%'").await, 1);
    drop(watch);
}

/// An operation that found no spare connection waited for the pool, while the operations that ended
/// kept theirs.
#[tokio::test(flavor = "multi_thread")]
async fn more_callers_than_connections_all_get_one() {
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let callers = (0..4 * CONNECTIONS).map(|key| {
        let store = store.clone();
        tokio::spawn(async move {
            let claim = claim(key);
            let owner = granted(&store, &claim).await.owner;
            let ended = stored(&[key]);
            for _ in 0..50 {
                let completed = store.complete(&claim.key, owner, &ended, HOUR).await.unwrap();
                assert_eq!(completed, Completion::Completed);
            }
        })
    });
    let all = timeout(30 * SECOND, join_all(callers.collect::<Vec<_>>())).await;
    for ended in all.expect("every operation gets a connection") {
        ended.unwrap();
    }
}

/// A restart of the server ends all connections. An operation within the first second may fail. The
/// store tests its connections for later ones.
#[tokio::test(flavor = "multi_thread")]
async fn spare_connections_that_have_died_are_tested_before_they_are_used() {
    let server = PostgresServer::start();
    let other = pool(&server).await;
    let store = keeping(&server, &other).await;
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
        WHERE backend_type = 'client backend' AND query LIKE '%idempotency_records%' AND pid <> pg_backend_pid()";
    sqlx::raw_sql(end).execute(&other).await.unwrap();
    sleep(SECOND + SECOND / 10).await;
    for key in 0..CONNECTIONS {
        granted(&store, &claim(100 + key)).await;
    }
}

/// The network has forgotten all connections. All spare ones held the pool for 5 s, which is the
/// time that an operation may wait.
#[tokio::test(flavor = "multi_thread")]
async fn spare_connections_that_never_reply_delay_an_operation_for_a_second() {
    let server = PostgresServer::start();
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let store = keeping_by(&server.url_by(proxy.address.port()), &pool(&server).await).await;
    sleep(SECOND + SECOND / 10).await;
    proxy.set(Fate::Swallow(Direction::ToClient));
    let claiming = tokio::spawn(async move { granted(&store, &claim(100)).await });
    // The store has sent its tests, and their replies are lost.
    sleep(SECOND / 2).await;
    proxy.set(Fate::Pass);
    let granted = timeout(4 * SECOND, claiming).await;
    granted.expect("the connections are given up").unwrap();
}

#[test]
fn a_store_that_is_dropped_outside_of_its_runtime_closes_its_connections() {
    let server = PostgresServer::start();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let (store, other) = runtime.block_on(async {
        let other = pool(&server).await;
        (keeping(&server, &other).await, other)
    });
    drop(store);
    runtime.block_on(async {
        for _ in 0..400 {
            if sessions(&other, "query LIKE '%idempotency_records%'").await == 0 {
                return;
            }
            sleep(SECOND / 100).await;
        }
        panic!("connections are still open");
    });
}

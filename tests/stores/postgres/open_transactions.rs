//! Sessions that come from a pool with an open transaction, and transactions that fail to begin.

use std::task::Poll;
use std::time::Duration;

use futures::poll;
use sqlx::Postgres;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tower_idempotency::outbox::{Outbox, OutboxMessage};
use tower_idempotency::protocol::{Completion, Decision, Nonce, Release, Renewal, Status};
use tower_idempotency::{PostgresStore, Store};

use super::{Claim, HOUR, claim, granted, stored};
use crate::support::postgres::PostgresServer;

/// The ways in which an application may leave a transaction open. In the second, fourth and fifth,
/// every write of a store fails.
const LEFT_OPEN: [&str; 5] = [
    "BEGIN",
    "BEGIN; SET LOCAL search_path = pg_catalog",
    "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT count(*) FROM pg_class",
    "BEGIN READ ONLY",
    "BEGIN; SELECT * FROM no_such_table",
];

/// A pool of one connection, so that each operation gets the session that the test has prepared.
async fn pool(server: &PostgresServer) -> PgPool {
    let pool = PgPoolOptions::new().max_connections(1).test_before_acquire(false);
    pool.connect(&server.url()).await.unwrap()
}

async fn leave_open(pool: &PgPool, sql: &'static str) {
    let mut connection = pool.acquire().await.unwrap();
    // The last statement may fail, which also leaves the transaction open.
    drop(sqlx::raw_sql(sql).execute(&mut *connection).await);
}

async fn execute(pool: &PgPool, sql: &'static str) {
    sqlx::raw_sql(sql).execute(pool).await.unwrap();
}

/// A time limit that drops `begin` after it has sent its statement.
async fn drop_begin(pool: &PgPool) {
    loop {
        until_idle(pool).await;
        let mut begin = Box::pin(pool.begin());
        match poll!(&mut begin) {
            Poll::Pending => break,
            // The server replied before this task dropped the future.
            Poll::Ready(begun) => begun.unwrap().rollback().await.unwrap(),
        }
    }
    until_idle(pool).await;
}

async fn until_idle(pool: &PgPool) {
    while pool.num_idle() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn again(claim: &Claim) -> Claim {
    Claim {
        nonce: Nonce::random(),
        ..claim.clone()
    }
}

async fn status(store: &PostgresStore, claim: &Claim) -> Option<Status> {
    store.peek(&claim.key).await.unwrap().map(|seen| seen.status)
}

/// The caller got its response, but its record was never committed.
#[tokio::test(flavor = "multi_thread")]
async fn reported_changes_are_committed_although_the_session_had_an_open_transaction() {
    let server = PostgresServer::start();
    let direct = PostgresStore::connect(&server.url()).await.unwrap();
    let pool = pool(&server).await;
    let stores = [
        PostgresStore::builder().with_pool(pool.clone()).unwrap(),
        PostgresStore::builder()
            .with_transaction_pooler()
            .with_pool(pool.clone())
            .unwrap(),
    ];
    let mut key = 0;
    for store in &stores {
        store.check().await.unwrap();
        for left in LEFT_OPEN {
            key += 1;
            let first = claim(key);
            leave_open(&pool, left).await;
            let owner = granted(store, &first).await.owner;
            assert!(
                matches!(status(&direct, &first).await, Some(Status::InFlight { .. })),
                "{left}"
            );
            leave_open(&pool, left).await;
            assert_eq!(
                store.renew(&first.key, owner, 2 * HOUR).await.unwrap(),
                Renewal::Renewed
            );
            match status(&direct, &first).await {
                Some(Status::InFlight { left: lease }) => assert!(lease > HOUR, "{left}"),
                other => panic!("{left}: {other:?}"),
            }
            leave_open(&pool, left).await;
            let completed = store.complete(&first.key, owner, &stored(b"paid"), HOUR).await;
            assert_eq!(completed.unwrap(), Completion::Completed, "{left}");
            let replayed = direct.claim(&again(&first)).await.unwrap();
            assert!(matches!(replayed, Decision::Replay(_)), "{left}: {replayed:?}");
            let released = claim(100 + key);
            let owner = granted(store, &released).await.owner;
            leave_open(&pool, left).await;
            let release = store.release(&released.key, owner).await.unwrap();
            assert_eq!(release, Release::Released, "{left}");
            assert_eq!(status(&direct, &released).await, None, "{left}");
            leave_open(&pool, left).await;
            drop(store.watch(&first.key).await.unwrap());
            leave_open(&pool, left).await;
            store.check().await.unwrap();
            leave_open(&pool, left).await;
            store.sweep().await.unwrap();
        }
    }
}

/// Such a transaction may show the table as it was when the transaction began.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_reads_no_old_record_in_an_open_transaction() {
    let server = PostgresServer::start();
    let direct = PostgresStore::connect(&server.url()).await.unwrap();
    let pool = pool(&server).await;
    let store = PostgresStore::builder().with_pool(pool.clone()).unwrap();
    store.check().await.unwrap();
    leave_open(&pool, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class").await;
    let owner = granted(&direct, &claim(1)).await.owner;
    assert!(matches!(status(&store, &claim(1)).await, Some(Status::InFlight { .. })));
    leave_open(&pool, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class").await;
    direct
        .complete(&claim(1).key, owner, &stored(b"paid"), HOUR)
        .await
        .unwrap();
    assert!(matches!(store.claim(&claim(1)).await.unwrap(), Decision::Replay(_)));
}

/// A pool lends its idle connections in turn.
async fn drop_begin_in_each(pool: &PgPool) {
    for _ in 0..pool.size() {
        drop_begin(pool).await;
    }
}

/// sqlx raises its count of open transactions only after the reply to BEGIN.
#[tokio::test(flavor = "multi_thread")]
async fn a_begin_that_was_dropped_does_not_swallow_a_completion() {
    let server = PostgresServer::start();
    let direct = PostgresStore::connect(&server.url()).await.unwrap();
    for is_own in [false, true] {
        let pool = match is_own {
            true => direct.pool().clone(),
            false => pool(&server).await,
        };
        let store = match is_own {
            true => direct.clone(),
            false => PostgresStore::builder().with_pool(pool.clone()).unwrap(),
        };
        store.check().await.unwrap();
        let claim = claim(u8::from(is_own));
        drop_begin_in_each(&pool).await;
        let owner = granted(&store, &claim).await.owner;
        drop_begin_in_each(&pool).await;
        store.complete(&claim.key, owner, &stored(b"paid"), HOUR).await.unwrap();
        pool.close().await;
        let other = PostgresStore::connect(&server.url()).await.unwrap();
        assert!(matches!(
            other.claim(&again(&claim)).await.unwrap(),
            Decision::Replay(_)
        ));
    }
}

/// LISTEN takes effect only at a commit, and this transaction never committed.
#[tokio::test(flavor = "multi_thread")]
async fn a_waiter_is_woken_although_the_session_that_listens_had_an_open_transaction() {
    let server = PostgresServer::start();
    let direct = PostgresStore::connect(&server.url()).await.unwrap();
    for left in LEFT_OPEN {
        let pool = PgPoolOptions::new().max_connections(2).test_before_acquire(false);
        let pool = pool.connect(&server.url()).await.unwrap();
        let store = PostgresStore::builder().with_pool(pool.clone()).unwrap();
        store.check().await.unwrap();
        until_idle(&pool).await;
        let claim = claim(rand::random());
        let owner = granted(&direct, &claim).await.owner;
        leave_open(&pool, left).await;
        until_idle(&pool).await;
        let watch = store.watch(&claim.key).await.unwrap();
        direct.release(&claim.key, owner).await.unwrap();
        let woken = tokio::time::timeout(Duration::from_secs(5), watch).await;
        assert!(woken.is_ok(), "{left}");
    }
}

/// A relay published the same messages again, or none.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_works_on_a_session_with_an_open_transaction() {
    let server = PostgresServer::start();
    let (pool, own) = (pool(&server).await, PgPool::connect(&server.url()).await.unwrap());
    for outbox in [
        Outbox::new(pool.clone()),
        Outbox::new(pool.clone()).with_transaction_pooler(),
    ] {
        outbox.migrate().await.unwrap();
        for left in LEFT_OPEN {
            leave_open(&pool, left).await;
            outbox.migrate().await.unwrap();
            let relay = outbox.relay(|_: OutboxMessage| async { Ok::<_, String>(()) });
            // A look that finds no message must still close the open transaction.
            leave_open(&pool, left).await;
            assert_eq!(relay.publish_once().await.unwrap().published, 0, "{left}");
            let mut transaction = own.begin().await.unwrap();
            assert!(
                outbox
                    .put(&mut transaction, &OutboxMessage::new("paid", "x"))
                    .await
                    .unwrap()
            );
            transaction.commit().await.unwrap();
            leave_open(&pool, left).await;
            assert_eq!(relay.publish_once().await.unwrap().published, 1, "{left}");
            assert_eq!(Outbox::new(own.clone()).waiting().await.unwrap(), 0, "{left}");
        }
    }
}

/// The migration held its connection outside of any task, so the session stayed in the pool with
/// its lock.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_whose_caller_left_leaves_no_transaction_open() {
    let server = PostgresServer::start();
    let own = PgPool::connect(&server.url()).await.unwrap();
    let pool = pool(&server).await;
    let outbox = Outbox::new(pool.clone());
    let store = PostgresStore::builder().with_pool(pool.clone()).unwrap();
    for is_outbox in [true, false] {
        let mut holder = hold_migrations(&own).await;
        let migrating = async {
            match is_outbox {
                true => outbox.migrate().await,
                false => store.migrate().await,
            }
        };
        let left = tokio::time::timeout(Duration::from_millis(500), migrating).await;
        assert!(left.is_err(), "{left:?}");
        sqlx::query("ROLLBACK").execute(&mut *holder).await.unwrap();
        until_settled(&pool).await;
        let open = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
        let open = sqlx::query_scalar::<_, i64>(open).fetch_one(&own).await.unwrap();
        assert_eq!(open, 0, "outbox: {is_outbox}");
    }
    // The migrations continued without their callers.
    assert_eq!(outbox.waiting().await.unwrap(), 0);
    store.check().await.unwrap();
}

/// Takes the locks that all migrations wait for.
async fn hold_migrations(pool: &PgPool) -> PoolConnection<Postgres> {
    let mut holder = pool.acquire().await.unwrap();
    let locks = "BEGIN; SELECT pg_advisory_xact_lock(2153723918930542593), pg_advisory_xact_lock(2153723918930542594)";
    sqlx::raw_sql(locks).execute(&mut *holder).await.unwrap();
    holder
}

/// Every statement on the connection failed with 25P02 from then on.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_fails_to_begin_does_not_poison_its_connection() {
    let server = PostgresServer::start();
    let own = PgPool::connect(&server.url()).await.unwrap();
    let pool = pool(&server).await;
    let outbox = Outbox::new(pool.clone());
    let store = PostgresStore::builder().with_pool(pool.clone()).unwrap();
    for is_outbox in [true, false] {
        let mut holder = hold_migrations(&own).await;
        let cancel = async {
            let cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'advisory'";
            while sqlx::query(cancel).execute(&own).await.unwrap().rows_affected() == 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let migrating = async {
            match is_outbox {
                true => outbox.migrate().await,
                false => store.migrate().await,
            }
        };
        let (migrated, ()) = tokio::join!(migrating, cancel);
        migrated.unwrap_err();
        until_settled(&pool).await;
        execute(&pool, "SELECT 1").await;
        sqlx::query("ROLLBACK").execute(&mut *holder).await.unwrap();
    }
    outbox.migrate().await.unwrap();
    store.migrate().await.unwrap();
}

/// Waits until the pool has taken its connection back or closed it.
async fn until_settled(pool: &PgPool) {
    while pool.size() > 0 && pool.num_idle() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

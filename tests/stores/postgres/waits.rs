//! Statements that wait for a lock or a standby after their callers have left.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::protocol::{Completion, Decision, IfLost, Nonce, Resolution, Status, StorageKey};
use tower_idempotency::receiver::{Inbox, Receipt, ReceiverLayer};
use tower_idempotency::{ErrorKind, PostgresStore, Store};

use super::{Claim, HOUR, claim, granted, stored};
use crate::support::postgres::PostgresServer;
use crate::support::proxy::{Direction, Fate, Proxy};

const MILLI: Duration = Duration::from_millis(1);

async fn pool(url: &str, connections: u32) -> PgPool {
    let pool = PgPoolOptions::new()
        .max_connections(connections)
        .test_before_acquire(false);
    pool.connect(url).await.unwrap()
}

/// Makes a store over a pool of four connections, and another pool.
async fn started(server: &PostgresServer, timeout: Duration) -> (PostgresStore, PgPool) {
    let builder = PostgresStore::builder().with_timeout(timeout);
    let store = builder.with_pool(pool(&server.url(), 4).await).unwrap();
    store.migrate().await.unwrap();
    (store, pool(&server.url(), 5).await)
}

/// Returns the number of backends that wait for a lock or a standby.
async fn waiting(pool: &PgPool) -> i64 {
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' OR wait_event = 'SyncRep'";
    sqlx::query_scalar(waiting).fetch_one(pool).await.unwrap()
}

async fn until_nothing_waits(pool: &PgPool) {
    for _ in 0..500 {
        if waiting(pool).await == 0 {
            return;
        }
        tokio::time::sleep(10 * MILLI).await;
    }
    panic!("{} backends still wait", waiting(pool).await);
}

/// Makes commits wait for a standby of this name, or for none if it is empty.
async fn standby(pool: &PgPool, name: &str) {
    let set = format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'");
    sqlx::raw_sql(sqlx::AssertSqlSafe(set)).execute(pool).await.unwrap();
    sqlx::raw_sql("SELECT pg_reload_conf()").execute(pool).await.unwrap();
    let shown = || async {
        let shown: String = sqlx::query_scalar("SHOW synchronous_standby_names")
            .fetch_one(pool)
            .await
            .unwrap();
        shown
    };
    while shown().await != name {
        tokio::time::sleep(10 * MILLI).await;
    }
    // The checkpointer passes the setting on to the backends.
    tokio::time::sleep(300 * MILLI).await;
}

/// Waits until the driver has pinged the connection, which it does when the connection comes back
/// to the pool.
async fn until_idle(store: &PostgresStore) {
    while store.peek(&claim(1).key).await.is_err() {}
    while store.pool().num_idle() == 0 {
        tokio::time::sleep(MILLI).await;
    }
}

fn again(claim: &Claim) -> Claim {
    Claim {
        nonce: Nonce::random(),
        ..claim.clone()
    }
}

/// The server ends each of these operations. Earlier, only claims that changed a row had a limit.
#[tokio::test(flavor = "multi_thread")]
async fn every_statement_that_waits_for_a_row_ends_in_the_server() {
    let server = PostgresServer::start();
    let (store, own) = started(&server, 500 * MILLI).await;
    let held = Claim {
        lease: Duration::ZERO,
        ..claim(1)
    };
    let (key, owner) = (held.key, granted(&store, &held).await.owner);
    let mut transaction = own.begin().await.unwrap();
    let lock = sqlx::query("SELECT FROM idempotency_records FOR UPDATE");
    lock.execute(&mut *transaction).await.unwrap();
    store.claim_in(&mut transaction, &claim(2)).await.unwrap();
    let outcome = stored(b"x");
    let refused = [
        store.claim(&held).await.map(drop).unwrap_err(),
        store.claim(&claim(2)).await.map(drop).unwrap_err(),
        store.renew(&key, owner, HOUR).await.map(drop).unwrap_err(),
        store.complete(&key, owner, &outcome, HOUR).await.map(drop).unwrap_err(),
        store.release(&key, owner).await.map(drop).unwrap_err(),
        store
            .resolve(&key, owner.fence, &Resolution::Absent)
            .await
            .map(drop)
            .unwrap_err(),
    ];
    for error in refused {
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
        // The error comes from the server, not from the client: lock not available.
        assert!(format!("{error:?}").contains("55P03"), "{error:?}");
    }
    assert_eq!(waiting(&own).await, 0);
    // An operation that waits for no lock has no delay.
    assert!(store.peek(&key).await.unwrap().is_some());
    drop(store.watch(&key).await.unwrap());
    store.sweep().await.unwrap();
}

/// 54 backends waited, from a pool of four: each attempt closed its connection and made another.
#[tokio::test(flavor = "multi_thread")]
async fn claims_that_meet_an_open_inbox_leave_no_backends_behind() {
    let server = PostgresServer::start();
    let (store, own) = started(&server, 300 * MILLI).await;
    let inbox = Inbox::new(store.clone(), "billing");
    let mut transaction = own.begin().await.unwrap();
    assert_eq!(inbox.receive(&mut transaction, "7").await.unwrap(), Receipt::First(()));
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let layer = ReceiverLayer::new(store, "billing")
        .with_id(|id: &String| id.clone())
        .with_lease(1_000 * MILLI)
        .with_store_timeout(500 * MILLI)
        .with_completion_timeout(100 * MILLI);
    let drain = layer.drain();
    let receiver = layer.layer(service_fn(move |_: String| {
        counted.fetch_add(1, Ordering::SeqCst);
        async { Ok::<_, Infallible>(()) }
    }));
    for _ in 0..6 {
        let received = receiver.clone().oneshot("7".to_owned()).await;
        assert!(received.is_err(), "{received:?}");
        assert!(waiting(&own).await <= 4);
    }
    drain.wait().await;
    until_nothing_waits(&own).await;
    // No consumer handled the message, so its key must be free. Earlier, the server granted a claim
    // after its caller had left, and the message was lost and rejected.
    transaction.rollback().await.unwrap();
    tokio::time::sleep(1_500 * MILLI).await;
    assert_eq!(receiver.oneshot("7".to_owned()).await.unwrap(), Receipt::First(()));
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

/// The server takes the lock on a table before any statement can set a timeout for itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_locked_table_takes_no_more_backends_than_the_pool_has() {
    let server = PostgresServer::start();
    let (store, own) = started(&server, 200 * MILLI).await;
    granted(&store, &claim(100)).await;
    let mut transaction = own.begin().await.unwrap();
    let lock = sqlx::raw_sql("LOCK TABLE idempotency_records IN ACCESS EXCLUSIVE MODE");
    lock.execute(&mut *transaction).await.unwrap();
    for turn in 0..3 {
        let claims = (0..8).map(|key| {
            let (store, claim) = (store.clone(), claim(8 * turn + key));
            tokio::spawn(async move { tokio::time::timeout(300 * MILLI, store.claim(&claim)).await })
        });
        for claimed in join_all(claims).await {
            assert!(!matches!(claimed.unwrap(), Ok(Ok(_))));
        }
        // The statements wait, although their callers have left.
        assert!((1..=4).contains(&waiting(&own).await));
    }
    transaction.rollback().await.unwrap();
    until_nothing_waits(&own).await;
    // The server granted those four claims after their callers had left, and the store releases
    // them.
    for key in 0..24 {
        let claim = claim(key);
        for tries in 0.. {
            match store.claim(&claim).await {
                Ok(Decision::Execute(_)) => break,
                other => assert!(tries < 100, "{key}: {other:?}"),
            }
            tokio::time::sleep(20 * MILLI).await;
        }
    }
}

/// The server grants a lost key after its caller has left. The grants after a lost attempt are of
/// two kinds.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_grant_of_a_lost_key_is_released_whatever_its_kind() {
    let server = PostgresServer::start();
    let (store, own) = started(&server, 200 * MILLI).await;
    for (key, if_lost) in [(1, IfLost::Execute), (2, IfLost::Recover)] {
        let claim = Claim {
            if_lost,
            max_attempts: 9,
            ..claim(key)
        };
        let owner = granted(&store, &claim).await.owner;
        store.renew(&claim.key, owner, Duration::ZERO).await.unwrap();
        let mut transaction = own.begin().await.unwrap();
        let lock = sqlx::raw_sql("LOCK TABLE idempotency_records IN ACCESS EXCLUSIVE MODE");
        lock.execute(&mut *transaction).await.unwrap();
        let late = again(&claim);
        let claimed = tokio::time::timeout(300 * MILLI, store.claim(&late)).await;
        assert!(!matches!(claimed, Ok(Ok(_))));
        // The store looks for the statement when its caller leaves. The lock stays longer than that.
        tokio::time::sleep(200 * MILLI).await;
        transaction.rollback().await.unwrap();
        until_nothing_waits(&own).await;
        for tries in 0.. {
            match store.peek(&claim.key).await {
                Ok(Some(seen)) if seen.attempt > 1 => break,
                other => assert!(tries < 100, "the claim was not granted: {other:?}"),
            }
            tokio::time::sleep(20 * MILLI).await;
        }
        for tries in 0.. {
            match store.claim(&again(&claim)).await {
                Ok(Decision::Execute(_) | Decision::Recover(_)) => break,
                other => assert!(tries < 100, "{if_lost:?}: {other:?}"),
            }
            tokio::time::sleep(20 * MILLI).await;
        }
    }
}

/// A role that was set, or another user name in the options of the pool, hid the waiting backends.
/// So their connections counted as dead, and each attempt made another one.
#[tokio::test(flavor = "multi_thread")]
async fn backends_of_a_hidden_role_count_against_the_pool() {
    let server = PostgresServer::start();
    let (store, own) = started(&server, 200 * MILLI).await;
    let roles = "CREATE ROLE team; CREATE ROLE login LOGIN IN ROLE team; CREATE ROLE first LOGIN IN ROLE team; \
                 CREATE ROLE second LOGIN IN ROLE team; ALTER ROLE login SET role = team; \
                 GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_records TO team";
    sqlx::raw_sql(roles).execute(&own).await.unwrap();
    drop(store);
    for user in ["login", "first"] {
        let pool = pool(&server.url().replace("app@", &format!("{user}@")), 4).await;
        let builder = PostgresStore::builder().with_timeout(200 * MILLI);
        let store = builder.with_pool(pool.clone()).unwrap();
        store.check().await.unwrap();
        join_all((0..4).map(|_| sqlx::query("SELECT pg_sleep(0.1)").execute(&pool))).await;
        if user == "first" {
            pool.set_connect_options((*pool.connect_options()).clone().username("second"));
        }
        let mut transaction = own.begin().await.unwrap();
        let lock = sqlx::raw_sql("LOCK TABLE idempotency_records IN ACCESS EXCLUSIVE MODE");
        lock.execute(&mut *transaction).await.unwrap();
        for turn in 0..4 {
            let claims = (0..8).map(|key| {
                let (store, claim) = (store.clone(), claim(8 * turn + key));
                tokio::spawn(async move { tokio::time::timeout(300 * MILLI, store.claim(&claim)).await })
            });
            join_all(claims).await;
            assert!(
                (1..=4).contains(&waiting(&own).await),
                "{user}: {}",
                waiting(&own).await
            );
        }
        transaction.rollback().await.unwrap();
        until_nothing_waits(&own).await;
    }
}

/// The statement took so long that the commit was younger than half of the timeout when the store
/// looked.
#[tokio::test(flavor = "multi_thread")]
async fn an_operation_of_several_statements_is_not_given_up_during_the_last_one() {
    let server = PostgresServer::start();
    let own = pool(&server.url(), 5).await;
    let builder = PostgresStore::builder()
        .with_timeout(1_000 * MILLI)
        .with_transaction_pooler();
    let store = builder.with_pool(pool(&server.url(), 2).await).unwrap();
    store.migrate().await.unwrap();
    store.check().await.unwrap();
    let slow = "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.7); RETURN NEW; END'; \
                CREATE TRIGGER slow BEFORE INSERT ON idempotency_records FOR EACH ROW EXECUTE FUNCTION wait()";
    sqlx::raw_sql(slow).execute(&own).await.unwrap();
    standby(&own, "away").await;
    for turn in 0..3 {
        let claims = (0..2).map(|key| {
            let (store, claim) = (store.clone(), claim(2 * turn + key));
            tokio::spawn(async move { store.claim(&claim).await })
        });
        join_all(claims).await;
        // The first look comes after the callers have left.
        tokio::time::sleep(500 * MILLI).await;
        assert!(
            (1..=2).contains(&waiting(&own).await),
            "{turn}: {}",
            waiting(&own).await
        );
    }
    standby(&own, "").await;
    until_nothing_waits(&own).await;
}

/// The claim that waited is granted and committed. It is sent again to get its whole lease, and the
/// server refuses that.
#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_could_not_be_renewed_at_once_is_released() {
    let server = PostgresServer::start();
    let (store, own) = started(&server, 2_000 * MILLI).await;
    let full = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
                    'BEGIN RAISE EXCEPTION ''the disk is full'' USING ERRCODE = ''53100''; END'; \
                CREATE TRIGGER full_disk BEFORE UPDATE ON idempotency_records FOR EACH ROW EXECUTE FUNCTION refuse()";
    sqlx::raw_sql(full).execute(&own).await.unwrap();
    let claim = claim(1);
    let mut transaction = own.begin().await.unwrap();
    store.claim_in(&mut transaction, &again(&claim)).await.unwrap();
    let (claimed, ()) = tokio::join!(store.claim(&claim), async {
        tokio::time::sleep(300 * MILLI).await;
        transaction.rollback().await.unwrap();
    });
    let error = claimed.unwrap_err();
    assert!(format!("{error:?}").contains("53100"), "{error:?}");
    for tries in 0.. {
        match store.claim(&again(&claim)).await {
            Ok(Decision::Execute(grant)) => {
                assert_eq!(grant.attempt, 1);
                break;
            }
            other => assert!(tries < 100, "the key stays held although its claim failed: {other:?}"),
        }
        tokio::time::sleep(100 * MILLI).await;
    }
}

/// A test of the connection had no time limit of its own, so each dead connection used up the whole
/// time to get a connection.
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_that_died_are_replaced_soon() {
    let server = PostgresServer::start();
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let store = PostgresStore::connect(&server.url_by(proxy.address.port()))
        .await
        .unwrap();
    until_idle(&store).await;
    tokio::time::sleep(1_200 * MILLI).await;
    proxy.set(Fate::Swallow(Direction::ToClient));
    let key = claim(1).key;
    let (peeked, ()) = tokio::join!(tokio::time::timeout(3_000 * MILLI, store.peek(&key)), async {
        tokio::time::sleep(500 * MILLI).await;
        // The reply to the test is lost, and new connections work.
        proxy.pass();
    });
    assert_eq!(
        peeked
            .expect("the operation takes no longer than the test of the connection")
            .unwrap(),
        None
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_is_away_takes_no_more_backends_than_the_pool_has_and_blocks_no_key() {
    let server = PostgresServer::start();
    let (store, own) = started(&server, 300 * MILLI).await;
    standby(&own, "away").await;
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let layer = ReceiverLayer::new(store, "billing")
        .with_id(|id: &String| id.clone())
        .with_lease(1_000 * MILLI)
        .with_store_timeout(500 * MILLI)
        .with_completion_timeout(100 * MILLI);
    let drain = layer.drain();
    let receiver = layer.layer(service_fn(move |_: String| {
        counted.fetch_add(1, Ordering::SeqCst);
        async { Ok::<_, Infallible>(()) }
    }));
    for id in 0..8 {
        let received = receiver.clone().oneshot(id.to_string()).await;
        assert!(received.is_err(), "{received:?}");
        assert!(waiting(&own).await <= 4);
    }
    drain.wait().await;
    // Nothing was cancelled, because a cancelled wait leaves the commit on the primary alone.
    assert!(waiting(&own).await > 0);
    standby(&own, "").await;
    until_nothing_waits(&own).await;
    tokio::time::sleep(1_500 * MILLI).await;
    for id in 0..8 {
        let received = receiver.clone().oneshot(id.to_string()).await;
        assert_eq!(received.unwrap(), Receipt::First(()), "{id}");
    }
    assert_eq!(runs.load(Ordering::SeqCst), 8);
}

/// A restart of the server shows commits that its standby lacks. The caller must not get its response
/// before the standby has it.
#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_completion_waits_for_the_standby() {
    let server = PostgresServer::start();
    let (store, own) = started(&server, 1_000 * MILLI).await;
    let claim = claim(1);
    let owner = granted(&store, &claim).await.owner;
    let paid = stored(b"paid");
    let complete = || store.complete(&claim.key, owner, &paid, HOUR);
    assert_eq!(complete().await.unwrap(), Completion::Completed);
    standby(&own, "away").await;
    assert!(tokio::time::timeout(300 * MILLI, complete()).await.is_err());
    standby(&own, "").await;
    until_nothing_waits(&own).await;
    assert_eq!(complete().await.unwrap(), Completion::Completed);
}

/// The pursuit of the first claim must not release the grant of the repeated claim.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_is_repeated_while_it_waits_is_granted_once_and_not_released() {
    let server = PostgresServer::start();
    let (store, own) = started(&server, 1_000 * MILLI).await;
    for drops in [false, true] {
        let claim = claim(u8::from(drops));
        standby(&own, "away").await;
        if drops {
            let left = tokio::time::timeout(200 * MILLI, store.claim(&claim)).await;
            assert!(left.is_err());
        } else {
            assert!(store.claim(&claim).await.is_err());
        }
        let repeated = tokio::spawn({
            let (store, claim) = (store.clone(), claim.clone());
            async move {
                loop {
                    if let Ok(decision) = store.claim(&claim).await {
                        return decision;
                    }
                }
            }
        });
        tokio::time::sleep(300 * MILLI).await;
        // The repeated claim waits for the statement of the first one, and sends no statement.
        assert_eq!(waiting(&own).await, 1);
        standby(&own, "").await;
        let Decision::Execute(grant) = repeated.await.unwrap() else {
            panic!("the claim is not granted")
        };
        // A pursuit that continued would look the claim up after the store's timeout.
        tokio::time::sleep(2_500 * MILLI).await;
        let seen = store.peek(&claim.key).await.unwrap().unwrap();
        assert_eq!((seen.nonce, seen.fence), (claim.nonce, grant.owner.fence));
        assert!(matches!(seen.status, Status::InFlight { .. }));
    }
}

/// It is uncertain whether the server received the claim, and no caller repeats it.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_whose_connection_was_lost_is_pursued() {
    let server = PostgresServer::start();
    let direct = PostgresStore::connect(&server.url()).await.unwrap();
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let builder = PostgresStore::builder().with_timeout(300 * MILLI);
    let through = pool(&server.url_by(proxy.address.port()), 2).await;
    let store = builder.with_pool(through).unwrap();
    for turn in 0..4 {
        let claim = Claim {
            key: StorageKey::from_bytes(rand::random()),
            ..claim(0)
        };
        until_idle(&store).await;
        if turn % 2 == 0 {
            proxy.set(Fate::CutAfter(Direction::ToClient, 1));
            assert!(store.claim(&claim).await.is_err());
        } else {
            proxy.set(Fate::Swallow(Direction::ToClient));
            assert!(store.claim(&claim).await.is_err());
        }
        proxy.heal();
        for tries in 0.. {
            match direct.claim(&again(&claim)).await.unwrap() {
                Decision::Execute(grant) => {
                    assert_eq!(grant.attempt, 1);
                    break;
                }
                other => assert!(matches!(other, Decision::Wait { .. }) && tries < 200, "{other:?}"),
            }
            tokio::time::sleep(50 * MILLI).await;
        }
    }
}

/// The reply to a claim is lost. Before the store looks the claim up, another caller may hold the
/// key (I8).
#[tokio::test(flavor = "multi_thread")]
async fn a_pursuit_releases_its_own_grant_and_no_other() {
    let server = PostgresServer::start();
    let direct = PostgresStore::connect(&server.url()).await.unwrap();
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let builder = PostgresStore::builder().with_timeout(300 * MILLI);
    let through = pool(&server.url_by(proxy.address.port()), 1).await;
    let store = builder.with_pool(through).unwrap();
    for (key, is_replaced) in [(1, false), (2, true)] {
        // The driver prepares the statement once for a connection. So the next claim is executed.
        granted(&store, &claim(key + 10)).await;
        until_idle(&store).await;
        proxy.set(Fate::CutAfter(Direction::ToClient, 1));
        assert!(store.claim(&claim(key)).await.is_err());
        proxy.heal();
        assert!(format!("{store:?}").contains("pursued_claims: 1"), "{store:?}");
        let other = again(&claim(key));
        assert!(direct.peek(&other.key).await.unwrap().is_some());
        if is_replaced {
            let deleted = sqlx::raw_sql("DELETE FROM idempotency_records");
            deleted.execute(direct.pool()).await.unwrap();
            granted(&direct, &other).await;
        }
        while format!("{store:?}").contains("pursued_claims: 1") {
            tokio::time::sleep(10 * MILLI).await;
        }
        let seen = direct.peek(&other.key).await.unwrap();
        let nonce = seen.map(|seen| seen.nonce);
        assert_eq!(nonce, is_replaced.then_some(other.nonce));
    }
}

/// While the first statement waits for a standby, its record cannot be seen, and the claim of the pursuit waits for it in
/// vain. This does not show that the first statement has failed.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_nobody_waits_for_is_pursued_until_its_standby_is_back() {
    let server = PostgresServer::start();
    let own = pool(&server.url(), 5).await;
    let direct = PostgresStore::connect(&server.url()).await.unwrap();
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let through = pool(&server.url_by(proxy.address.port()), 2).await;
    let store = PostgresStore::builder().with_timeout(300 * MILLI).with_pool(through);
    let store = store.unwrap();
    until_idle(&store).await;
    standby(&own, "away").await;
    let left = tokio::time::timeout(100 * MILLI, store.claim(&claim(1))).await;
    assert!(left.is_err());
    assert_eq!(waiting(&own).await, 1);
    // The store loses the connection, but the server does not notice this while the statement waits.
    proxy.lead_to(([127, 0, 0, 1], server.port()).into());
    // The pursuit looks the claim up.
    tokio::time::sleep(1_500 * MILLI).await;
    standby(&own, "").await;
    for tries in 0.. {
        match direct.claim(&again(&claim(1))).await.unwrap() {
            Decision::Execute(grant) => {
                assert_eq!(grant.attempt, 1);
                break;
            }
            other => assert!(matches!(other, Decision::Wait { .. }) && tries < 200, "{other:?}"),
        }
        tokio::time::sleep(50 * MILLI).await;
    }
}

/// A half-open connection: neither end knows that it is dead. The server replies on other
/// connections, and is idle.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_dead_leaves_the_pool() {
    let server = PostgresServer::start();
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let through = pool(&server.url_by(proxy.address.port()), 1).await;
    let builder = PostgresStore::builder().with_timeout(300 * MILLI);
    let store = builder.with_pool(through).unwrap();
    store.migrate().await.unwrap();
    until_idle(&store).await;
    proxy.set(Fate::Swallow(Direction::ToClient));
    assert!(store.peek(&claim(1).key).await.is_err());
    // The proxy has dropped the bytes, but keeps the connection open.
    proxy.pass();
    let mut tries = 0;
    while store.peek(&claim(1).key).await.is_err() {
        tries += 1;
        assert!(tries < 20, "the pool has no usable connection");
    }
}

/// A claim that waited for a lock lost the time of the wait from its lease, or over when the claim was granted.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_waited_has_its_whole_lease() {
    let server = PostgresServer::start();
    let (store, own) = started(&server, 5_000 * MILLI).await;
    let wait = 1_200 * MILLI;
    let first = Claim {
        lease: 1_000 * MILLI,
        ..claim(1)
    };
    let mut transaction = own.begin().await.unwrap();
    let inserted = store.claim_in(&mut transaction, &again(&first)).await.unwrap();
    assert!(matches!(inserted, Decision::Execute(_)));
    let (granted, ()) = tokio::join!(store.claim(&first), async {
        tokio::time::sleep(wait).await;
        transaction.rollback().await.unwrap();
    });
    let Decision::Execute(grant) = granted.unwrap() else {
        panic!("the claim is not granted")
    };
    let seen = store.peek(&first.key).await.unwrap().unwrap();
    assert_eq!(seen.fence, grant.owner.fence);
    let Status::InFlight { left } = seen.status else {
        panic!("{seen:?}")
    };
    assert!(left > 700 * MILLI, "{left:?}");
}

/// Returns how many sessions of the server listen for notifications.
async fn listeners(pool: &PgPool) -> i64 {
    let counted = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN %'";
    sqlx::query_scalar(counted).fetch_one(pool).await.unwrap()
}

/// A store listens for ten more seconds, because the next waiter often comes soon.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_listens_as_long_as_a_request_waits_and_then_frees_its_connection() {
    let server = PostgresServer::start();
    let (waits, pool) = started(&server, Duration::from_secs(5)).await;
    let (has_waited, _) = started(&server, Duration::from_secs(5)).await;
    let owner = granted(&waits, &claim(1)).await.owner;
    let mut watch = Box::pin(waits.watch(&claim(1).key).await.unwrap());
    drop(has_waited.watch(&claim(1).key).await.unwrap());
    assert_eq!(listeners(&pool).await, 2);
    let one_is_left = async {
        while listeners(&pool).await != 1 {
            tokio::time::sleep(100 * MILLI).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), one_is_left)
        .await
        .unwrap();
    assert!(futures::poll!(&mut watch).is_pending(), "nothing has changed");
    waits.renew(&claim(1).key, owner, Duration::ZERO).await.unwrap();
    watch.await;
}

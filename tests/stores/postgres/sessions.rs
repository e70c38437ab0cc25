//! The settings of a role or a database for its sessions do not change the behaviour of the store.

use std::time::Duration;

use futures::future::join_all;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tower_idempotency::protocol::{Completion, Decision, Nonce, Outcome, Resolution, Status};
use tower_idempotency::receiver::{Inbox, ReceiveError};
use tower_idempotency::store::conformance;
use tower_idempotency::{ErrorKind, PostgresStore, Store};

use super::{Claim, HOUR, claim, granted, stored};
use crate::support::postgres::PostgresServer;

async fn pool(server: &PostgresServer, connections: u32) -> PgPool {
    let pool = PgPoolOptions::new().max_connections(connections);
    pool.connect(&server.url()).await.unwrap()
}

async fn execute(server: &PostgresServer, sql: &str) {
    let pool = pool(server, 1).await;
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&pool).await.unwrap();
}

/// Returns how many of 32 concurrent claims of one key were granted.
async fn storm(store: &PostgresStore, key: u8) -> usize {
    let claims = (0..32).map(|_| {
        let (store, claim) = (store.clone(), claim(key));
        tokio::spawn(async move { store.claim(&claim).await.unwrap() })
    });
    let decisions = join_all(claims).await.into_iter().map(Result::unwrap);
    let granted = decisions.filter(|decision| match decision {
        Decision::Execute(_) => true,
        Decision::Wait { .. } => false,
        other => panic!("{other:?}"),
    });
    granted.count()
}

/// A third of the duplicates failed at the stricter levels.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_concurrent_claims_is_granted_at_every_default_isolation() {
    let server = PostgresServer::start();
    PostgresStore::connect(&server.url()).await.unwrap();
    for isolation in ["read committed", "repeatable read", "serializable"] {
        let set =
            format!("ALTER ROLE app SET default_transaction_isolation = '{isolation}'; TRUNCATE idempotency_records");
        execute(&server, &set).await;
        let yours = PostgresStore::builder().with_pool(pool(&server, 16).await).unwrap();
        let own = PostgresStore::connect(&server.url()).await.unwrap();
        for key in 0..10 {
            assert_eq!(storm(&yours, key).await, 1, "{isolation}");
            assert_eq!(storm(&own, 100 + key).await, 1, "{isolation}");
        }
    }
}

/// All settings at once, as in a role for reports.
const UNUSUAL: &str = "
    CREATE SCHEMA elsewhere;
    ALTER ROLE app SET default_transaction_isolation = 'serializable';
    ALTER ROLE app SET default_transaction_deferrable = on;
    ALTER ROLE app SET synchronous_commit = off;
    ALTER ROLE app SET standard_conforming_strings = off;
    ALTER ROLE app SET bytea_output = 'escape';
    ALTER ROLE app SET DateStyle = 'German';
    ALTER ROLE app SET IntervalStyle = 'sql_standard';
    ALTER ROLE app SET TimeZone = 'Asia/Kathmandu';
    ALTER ROLE app SET idle_in_transaction_session_timeout = '1s';
    ALTER ROLE app SET search_path = elsewhere, public;
    ALTER ROLE app SET plan_cache_mode = 'force_generic_plan';";

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_holds_with_unusual_defaults_of_the_role() {
    let server = PostgresServer::start();
    execute(&server, UNUSUAL).await;
    let own = PostgresStore::connect(&server.url()).await.unwrap();
    conformance::all(&own).await;
    conformance::differential(&own, 50, 1).await;
    let yours = PostgresStore::builder().with_pool(pool(&server, 4).await).unwrap();
    conformance::all(&yours).await;
    conformance::differential(&yours, 50, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_changes_the_sessions_of_its_own_pool_and_not_those_of_the_applications() {
    let server = PostgresServer::start();
    execute(&server, UNUSUAL).await;
    let shown = async |pool: &PgPool, name: &str| -> String {
        let shown = sqlx::query_scalar("SELECT current_setting($1)").bind(name);
        shown.fetch_one(pool).await.unwrap()
    };
    let own = PostgresStore::connect(&server.url()).await.unwrap();
    let yours = PostgresStore::builder().with_pool(pool(&server, 1).await).unwrap();
    storm(&yours, 1).await;
    for (name, set, left) in [
        ("default_transaction_isolation", "read committed", "serializable"),
        ("default_transaction_deferrable", "off", "on"),
        ("synchronous_commit", "on", "off"),
        ("row_security", "off", "on"),
        ("lock_timeout", "2s", "0"),
        ("statement_timeout", "4s", "0"),
    ] {
        assert_eq!(shown(own.pool(), name).await, set, "{name}");
        assert_eq!(shown(yours.pool(), name).await, left, "{name}");
    }
}

/// A policy that hides rows would make a held key look absent.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_a_policy_hides_are_an_error() {
    let server = PostgresServer::start();
    let direct = PostgresStore::connect(&server.url()).await.unwrap();
    let first = claim(1);
    granted(&direct, &first).await;
    let policy = "
        CREATE ROLE web LOGIN;
        GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_records TO web;
        ALTER TABLE idempotency_records ENABLE ROW LEVEL SECURITY;";
    execute(&server, policy).await;
    let builder = PostgresStore::builder();
    let url = server.url().replace("app@", "web@");
    let store = builder.connect(&url).await.unwrap();
    let pool = PgPool::connect(&url).await.unwrap();
    let yours = PostgresStore::builder().with_pool(pool).unwrap();
    for store in [store, yours] {
        let errors = [
            store.peek(&first.key).await.map(drop).unwrap_err(),
            store.claim(&claim(1)).await.map(drop).unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}");
            assert!(error.to_string().contains("row-level security"), "{error:?}");
        }
    }
}

/// The store cannot repeat these statements inside the transaction, which has failed as a whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_the_application_that_conflicts_with_another_must_be_run_again() {
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let inbox = Inbox::new(store.clone(), "billing");
    let claim = claim(1);
    let owner = granted(&store, &claim).await.owner;
    let pool = pool(&server, 2).await;
    let mut errors = Vec::new();
    for is_inbox in [true, false] {
        let mut transaction = pool.begin_with("BEGIN ISOLATION LEVEL SERIALIZABLE").await.unwrap();
        // From here on, the transaction sees no newer data.
        sqlx::query("SELECT count(*) FROM idempotency_records")
            .execute(&mut *transaction)
            .await
            .unwrap();
        if is_inbox {
            let mut other = pool.begin().await.unwrap();
            inbox.receive(&mut other, "7").await.unwrap();
            other.commit().await.unwrap();
            let received = inbox.receive(&mut transaction, "7").await.unwrap_err();
            let ReceiveError::Store(error) = received else {
                panic!("{received:?}")
            };
            errors.push(error);
        } else {
            store.renew(&claim.key, owner, HOUR).await.unwrap();
            let completed = store.complete_in(&mut transaction, &claim.key, owner, &Outcome::Tombstone, HOUR);
            errors.push(completed.await.unwrap_err());
        }
        transaction.rollback().await.unwrap();
    }
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error:?}");
        assert!(
            error.to_string().contains("roll it back and run all of it again"),
            "{error:?}"
        );
    }
}

/// The number of a try is the value of a sequence, which no rollback takes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_conflicts_is_sent_again_but_not_for_ever() {
    let server = PostgresServer::start();
    PostgresStore::connect(&server.url()).await.unwrap();
    let conflicts = "
        CREATE SEQUENCE tries;
        CREATE TABLE conflicts (number bigint);
        INSERT INTO conflicts VALUES (0);
        CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF nextval('tries') <= (SELECT number FROM conflicts) THEN RAISE serialization_failure; END IF;
                RETURN NEW;
            END $$;
        CREATE TRIGGER conflicts BEFORE INSERT ON idempotency_records FOR EACH ROW EXECUTE FUNCTION conflict();";
    execute(&server, conflicts).await;
    let direct = PostgresStore::builder();
    let behind_pooler = PostgresStore::builder().with_transaction_pooler();
    for (key, builder, most) in [(1, direct, 10), (3, behind_pooler, 9)] {
        let store = builder.with_pool(pool(&server, 1).await).unwrap();
        for (number, tries) in [(3, 4), (1_000, most)] {
            let restart = format!("UPDATE conflicts SET number = {number}; ALTER SEQUENCE tries RESTART");
            execute(&server, &restart).await;
            match store.claim(&claim(key)).await {
                Ok(decision) => assert!(number == 3 && matches!(decision, Decision::Execute(_)), "{decision:?}"),
                Err(error) => assert_eq!(
                    (number, error.kind()),
                    (1_000, ErrorKind::StoreUnavailable),
                    "{error:?}"
                ),
            }
            let last = sqlx::query_scalar("SELECT last_value FROM tries");
            let last: i64 = last.fetch_one(&pool(&server, 1).await).await.unwrap();
            assert_eq!(last, tries, "{number} conflicts");
            execute(
                &server,
                "UPDATE conflicts SET number = 0; DELETE FROM idempotency_records",
            )
            .await;
        }
        granted(&store, &claim(key)).await;
    }
}

/// Behind a pooler, each operation is a transaction, and the server may refuse it at its commit, for
/// example because it shuts down.
#[tokio::test(flavor = "multi_thread")]
async fn an_operation_whose_commit_is_refused_fails_and_has_no_effect() {
    let server = PostgresServer::start();
    PostgresStore::connect(&server.url()).await.unwrap();
    let refuse =
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused'; END $$";
    execute(&server, refuse).await;
    let direct = PostgresStore::builder();
    let behind_pooler = PostgresStore::builder().with_transaction_pooler();
    for (key, builder) in [(1, direct), (11, behind_pooler)] {
        let store = builder.with_pool(pool(&server, 1).await).unwrap();
        let (held, lost, free) = (claim(key), claim(key + 1), claim(key + 2));
        let owner = granted(&store, &held).await.owner;
        let lost_owner = granted(&store, &lost).await.owner;
        store.renew(&lost.key, lost_owner, Duration::ZERO).await.unwrap();
        let refuse_commits = "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT OR UPDATE OR DELETE ON idempotency_records \
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()";
        execute(&server, refuse_commits).await;
        for (operation, done) in [
            ("claim", store.claim(&free).await.map(drop)),
            ("renew", store.renew(&held.key, owner, HOUR).await.map(drop)),
            (
                "complete",
                store.complete(&held.key, owner, &stored(b"paid"), HOUR).await.map(drop),
            ),
            ("release", store.release(&held.key, owner).await.map(drop)),
            (
                "resolve",
                store
                    .resolve(&lost.key, lost_owner.fence, &Resolution::Absent)
                    .await
                    .map(drop),
            ),
        ] {
            let kind = done.map_err(|error| error.kind());
            assert_eq!(kind, Err(ErrorKind::StoreUnavailable), "{operation}");
        }
        execute(&server, "DROP TRIGGER refuse ON idempotency_records").await;
        let mut statuses = Vec::new();
        for claim in [&held, &lost, &free] {
            let record = store.peek(&claim.key).await.unwrap();
            statuses.push(record.map(|record| record.status));
        }
        assert!(
            matches!(&statuses[..], [Some(Status::InFlight { .. }), Some(Status::Lost), None]),
            "{statuses:?}"
        );
    }
}

/// A pool of one was refused, because a waiter would have taken its connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_of_one_connection_is_enough() {
    let server = PostgresServer::start();
    let store = PostgresStore::builder().with_pool(pool(&server, 1).await).unwrap();
    store.migrate().await.unwrap();
    store.check().await.unwrap();
    conformance::all(&store).await;
    let claim = claim(1);
    let owner = granted(&store, &claim).await.owner;
    let watch = store.watch(&claim.key).await.unwrap();
    let completed = store.complete(&claim.key, owner, &stored(b"paid"), HOUR).await.unwrap();
    assert_eq!(completed, Completion::Completed);
    watch.await;
    let again = Claim {
        nonce: Nonce::random(),
        ..claim
    };
    assert!(matches!(store.claim(&again).await.unwrap(), Decision::Replay(_)));
}

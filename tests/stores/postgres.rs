//! The store in PostgreSQL, against servers that each test starts for itself.

mod checks;
mod open_transactions;
mod pooler;
mod rights;
mod sessions;
mod spare;
mod waits;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use sqlx::Row;
use sqlx::postgres::PgPoolOptions;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fingerprint, Grant, IfLost, Nonce, Outcome, Release, Renewal, Resolution,
    ResolveResult, Status, StorageKey, StoredResponse,
};
use tower_idempotency::store::conformance;
use tower_idempotency::{BoxStore, ErrorKind, PostgresStore, Store};

use crate::support::port::free_port;
use crate::support::postgres::PostgresServer;
use crate::support::proxy;
use crate::support::proxy::{Direction, Fate, Proxy};
use crate::support::sequences;

const HOUR: Duration = Duration::from_secs(3_600);

fn claim(key: u8) -> Claim {
    Claim {
        key: StorageKey::from_bytes([key; 32]),
        fingerprint: Fingerprint::of(b"pay"),
        nonce: Nonce::random(),
        lease: HOUR,
        retention: HOUR,
        if_lost: IfLost::Refuse,
        max_attempts: 5,
    }
}

fn stored(body: &[u8]) -> Outcome {
    Outcome::Stored(StoredResponse {
        head: Bytes::from_static(b"head"),
        body: Bytes::copy_from_slice(body),
    })
}

async fn granted(store: &PostgresStore, claim: &Claim) -> Grant {
    match store.claim(claim).await.unwrap() {
        Decision::Execute(grant) | Decision::Recover(grant) => grant,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_meets_the_contract() {
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    conformance::all(&store).await;
    conformance::all(&Arc::new(store.clone())).await;
    conformance::all(&BoxStore::new(store.clone())).await;
    conformance::differential(&store, sequences(), 1).await;
    let damaged = store.clone();
    let damage = |key: StorageKey| {
        let pool = damaged.pool().clone();
        async move {
            let damage = sqlx::query("UPDATE idempotency_records SET version = 9 WHERE key = $1");
            damage.bind(&key.as_bytes()[..]).execute(&pool).await.unwrap();
        }
    };
    conformance::unreadable_is_not_absent(&store, damage).await;
    let server = Arc::new(Mutex::new(server));
    let url = server.lock().unwrap().url();
    let reopen = || async {
        server.lock().unwrap().kill();
        server.lock().unwrap().run();
        PostgresStore::connect(&url).await.unwrap()
    };
    conformance::durable(store, reopen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_claimed_lost_taken_over_and_completed() {
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let first = claim(1);
    let grant = granted(&store, &first).await;
    assert_eq!((grant.attempt, grant.lease), (1, Some(HOUR)));
    assert_eq!(store.claim(&first).await.unwrap(), Decision::Execute(grant));
    assert!(matches!(store.claim(&claim(1)).await.unwrap(), Decision::Wait { left } if left <= HOUR));
    let other = Claim {
        fingerprint: Fingerprint::of(b"refund"),
        ..claim(1)
    };
    assert_eq!(store.claim(&other).await.unwrap(), Decision::Mismatch);
    let key = &first.key;
    assert_eq!(store.renew(key, grant.owner, HOUR).await.unwrap(), Renewal::Renewed);
    assert_eq!(
        store.renew(key, grant.owner, Duration::ZERO).await.unwrap(),
        Renewal::Renewed
    );
    let snapshot = store.peek(key).await.unwrap().unwrap();
    assert_eq!(snapshot.status, Status::Lost);
    let second = Claim {
        if_lost: IfLost::Recover,
        ..claim(1)
    };
    let Decision::Recover(taken) = store.claim(&second).await.unwrap() else {
        panic!("the claim does not take over")
    };
    assert!(taken.owner.fence > grant.owner.fence);
    assert_eq!(taken.attempt, 2);
    assert_eq!(
        store.complete(key, grant.owner, &stored(b"late"), HOUR).await.unwrap(),
        Completion::Superseded(None)
    );
    assert_eq!(
        store.complete(key, taken.owner, &stored(b"paid"), HOUR).await.unwrap(),
        Completion::Completed
    );
    assert_eq!(
        store.complete(key, taken.owner, &stored(b"again"), HOUR).await.unwrap(),
        Completion::Completed
    );
    assert_eq!(
        store.complete(key, grant.owner, &stored(b"late"), HOUR).await.unwrap(),
        Completion::Superseded(Some(stored(b"paid")))
    );
    let Decision::Replay(response) = store.claim(&claim(1)).await.unwrap() else {
        panic!("the response is not replayed")
    };
    assert_eq!(stored(b"paid"), Outcome::Stored(response));
    assert_eq!(store.release(key, taken.owner).await.unwrap(), Release::Superseded);
    assert!(matches!(
        store
            .resolve(key, taken.owner.fence, &Resolution::Absent)
            .await
            .unwrap(),
        ResolveResult::Conflict(Some(_))
    ));
}

/// The caller rolls its transaction back, and serves the outcome that stands. A key that another
/// owner still holds has none.
#[tokio::test(flavor = "multi_thread")]
async fn a_completion_in_a_transaction_reports_the_outcome_that_stands() {
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let key = claim(1).key;
    let lost = granted(&store, &claim(1)).await.owner;
    store.renew(&key, lost, Duration::ZERO).await.unwrap();
    let next = Claim {
        if_lost: IfLost::Execute,
        ..claim(1)
    };
    let owner = granted(&store, &next).await.owner;
    let complete = async |key: &StorageKey, owner, body: &[u8]| {
        let mut transaction = store.pool().begin().await.unwrap();
        let outcome = stored(body);
        let completing = store.complete_in(&mut transaction, key, owner, &outcome, HOUR);
        let completion = completing.await.unwrap();
        transaction.commit().await.unwrap();
        completion
    };
    let paid = Completion::Superseded(Some(stored(b"paid")));
    assert_eq!(complete(&key, lost, b"late").await, Completion::Superseded(None));
    assert_eq!(complete(&key, owner, b"paid").await, Completion::Completed);
    assert_eq!(complete(&key, owner, b"again").await, paid);
    assert_eq!(complete(&key, lost, b"late").await, paid);
    let absent = complete(&claim(2).key, owner, b"none").await;
    assert_eq!(absent, Completion::Superseded(None));
}

/// Makes a store whose one connection goes through a proxy.
async fn through_proxy(server: &PostgresServer) -> (PostgresStore, Proxy) {
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let pool = PgPoolOptions::new().max_connections(2).test_before_acquire(false);
    let pool = pool.connect(&server.url_by(proxy.address.port())).await.unwrap();
    (PostgresStore::builder().with_pool(pool).unwrap(), proxy)
}

/// Starts a server, with a store on it and four stores behind proxies.
async fn behind_proxies() -> (PostgresServer, PostgresStore, Vec<(PostgresStore, Proxy)>) {
    let server = PostgresServer::start();
    let direct = PostgresStore::connect(&server.url()).await.unwrap();
    let proxied = join_all((0..4).map(|_| through_proxy(&server))).await;
    (server, direct, proxied)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_is_cut_after_any_byte_can_be_repeated() {
    let (_server, direct, proxied) = behind_proxies().await;
    let cuts = proxy::cut_after_every_byte(proxied, &direct).await;
    println!("{cuts} cuts");
    assert!(cuts > 1_000, "{cuts}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_is_cut_while_it_is_prepared_can_be_repeated() {
    let (_server, direct, proxied) = behind_proxies().await;
    let cuts = proxy::cut_while_preparing(proxied, &direct).await;
    println!("{cuts} cuts");
    assert!(cuts > 2_000, "{cuts}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_whose_reply_is_late_can_be_repeated() {
    let server = PostgresServer::start();
    let direct = PostgresStore::connect(&server.url()).await.unwrap();
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let pool = PgPoolOptions::new().max_connections(30).test_before_acquire(false);
    let pool = pool.connect(&server.url_by(proxy.address.port())).await.unwrap();
    let builder = PostgresStore::builder().with_timeout(Duration::from_millis(100));
    let proxied = builder.with_pool(pool.clone()).unwrap();
    proxied.check().await.unwrap();
    // Later, the operations need no new connections.
    join_all((0..30).map(|_| sqlx::query("SELECT pg_sleep(0.3)").execute(&pool))).await;
    proxy::reply_late((&proxied, &proxy), &direct, Duration::from_millis(300)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_whose_future_is_dropped_is_still_sent() {
    let server = PostgresServer::start();
    let (store, proxy) = through_proxy(&server).await;
    store.migrate().await.unwrap();
    let claim = claim(1);
    let owner = granted(&store, &claim).await.owner;
    proxy.set(Fate::Delay(Duration::from_millis(100)));
    let outcome = stored(b"paid");
    let completion = store.complete(&claim.key, owner, &outcome, HOUR);
    assert!(
        tokio::time::timeout(Duration::from_millis(10), completion)
            .await
            .is_err()
    );
    proxy.heal();
    let completed = || async {
        matches!(store.peek(&claim.key).await, Ok(Some(snapshot)) if matches!(snapshot.status, Status::Completed(_)))
    };
    while !completed().await {}
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_concurrent_claims_is_granted() {
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    for round in 0..50 {
        let claims: Vec<Claim> = (0..64).map(|_| claim(round)).collect();
        let decisions = join_all(claims.iter().map(|claim| store.claim(claim))).await;
        let granted = decisions
            .iter()
            .filter(|decision| matches!(decision, Ok(Decision::Execute(_))));
        assert_eq!(granted.count(), 1, "{decisions:?}");
        assert!(
            decisions
                .iter()
                .all(|decision| matches!(decision, Ok(Decision::Execute(_) | Decision::Wait { .. })))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_loses_power_keeps_the_records_that_it_reported_as_committed() {
    let mut server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let mut done = Vec::new();
    for key in 0..20 {
        let claim = claim(key);
        let owner = granted(&store, &claim).await.owner;
        store.complete(&claim.key, owner, &stored(&[key]), HOUR).await.unwrap();
        done.push(claim);
    }
    let open = claim(99);
    let grant = granted(&store, &open).await;
    server.kill();
    let error = store.claim(&claim(100)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
    server.run();
    let mut again = store.claim(&open).await;
    while again.is_err() {
        again = store.claim(&open).await;
    }
    assert_eq!(again.unwrap(), Decision::Execute(grant));
    for (key, done) in (0..).zip(done) {
        let replay = store
            .claim(&Claim {
                nonce: Nonce::random(),
                ..done
            })
            .await
            .unwrap();
        assert!(matches!(replay, Decision::Replay(response) if response.body[..] == [key]));
    }
}

/// Every idle connection is dead. As many operations as there were idle connections failed.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_operation_after_a_restart_of_the_server_succeeds() {
    let mut server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let claims: Vec<Claim> = (0..64).map(claim).collect();
    join_all(claims.iter().map(|claim| store.claim(claim))).await;
    while store.pool().num_idle() < 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    server.kill();
    server.run();
    // The store does not test connections that it used within the last second.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert!(matches!(store.claim(&claim(99)).await, Ok(Decision::Execute(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiter_is_woken_and_without_a_waiter_no_notification_is_sent() {
    let server = PostgresServer::start();
    let [here, there] = [server.url(), server.url()];
    let (here, there) = (
        PostgresStore::connect(&here).await.unwrap(),
        PostgresStore::connect(&there).await.unwrap(),
    );
    let ends: [(&str, bool); 3] = [("complete", true), ("release", true), ("give up", true)];
    for (number, (end, _)) in (10..).zip(ends) {
        let claim = claim(number);
        let owner = granted(&there, &claim).await.owner;
        let watch = here.watch(&claim.key).await.unwrap();
        match end {
            "complete" => drop(there.complete(&claim.key, owner, &stored(b"x"), HOUR).await.unwrap()),
            "release" => drop(there.release(&claim.key, owner).await.unwrap()),
            _ => drop(there.renew(&claim.key, owner, Duration::ZERO).await.unwrap()),
        }
        let woken = tokio::time::timeout(Duration::from_secs(20), watch).await;
        assert!(woken.is_ok(), "{end} did not wake the waiter");
    }
    let mut listener = sqlx::postgres::PgListener::connect(&server.url()).await.unwrap();
    listener.listen("idempotency_records").await.unwrap();
    let unwatched = claim(20);
    let owner = granted(&there, &unwatched).await.owner;
    there
        .complete(&unwatched.key, owner, &stored(b"x"), HOUR)
        .await
        .unwrap();
    let notified = tokio::time::timeout(Duration::from_millis(300), listener.recv()).await;
    assert!(notified.is_err(), "{notified:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiter_is_woken_when_the_listening_connection_is_lost() {
    let mut server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let claim = claim(1);
    granted(&store, &claim).await;
    let watch = store.watch(&claim.key).await.unwrap();
    server.kill();
    assert!(tokio::time::timeout(Duration::from_secs(20), watch).await.is_ok());
    server.run();
    while store.watch(&claim.key).await.is_err() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_rows_count_as_absent_and_are_swept() {
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    for key in 0..3 {
        let claim = claim(key);
        let owner = granted(&store, &claim).await.owner;
        let retention = if key == 0 { HOUR } else { Duration::ZERO };
        store
            .complete(&claim.key, owner, &stored(b"x"), retention)
            .await
            .unwrap();
    }
    assert_eq!(store.peek(&claim(1).key).await.unwrap(), None);
    assert_eq!(granted(&store, &claim(1)).await.attempt, 1);
    assert_eq!(store.sweep().await.unwrap(), 1);
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM idempotency_records")
        .fetch_one(store.pool())
        .await
        .unwrap();
    assert_eq!(left, 2);
}

/// The sweep sent the same batch again and again, and the server ended it each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_of_rows_that_are_slow_to_delete_takes_smaller_batches() {
    let server = PostgresServer::start();
    let builder = PostgresStore::builder().with_timeout(Duration::from_millis(500));
    let store = builder.connect(&server.url()).await.unwrap();
    store.migrate().await.unwrap();
    granted(&store, &claim(0)).await;
    // The server ends a statement after 400 ms, and 40 rows take 2 s.
    let slow = "INSERT INTO idempotency_records \
            SELECT sha256(number::text::bytea), version, 2, kind, fingerprint, nonce, fence, attempt, lease, retention, 0, 0 \
            FROM idempotency_records, generate_series(1, 40) AS number; \
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.05); RETURN OLD; END'; \
        CREATE TRIGGER slow BEFORE DELETE ON idempotency_records FOR EACH ROW EXECUTE FUNCTION wait()";
    sqlx::raw_sql(slow).execute(store.pool()).await.unwrap();
    assert_eq!(store.sweep().await.unwrap(), 40);
    assert_eq!(store.sweep().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_over_a_server_that_has_vanished_ends() {
    let server = PostgresServer::start();
    let proxy = Proxy::to(([127, 0, 0, 1], server.port()).into()).await;
    let builder = PostgresStore::builder().with_timeout(Duration::from_millis(200));
    let store = builder.connect(&server.url_by(proxy.address.port())).await.unwrap();
    store.migrate().await.unwrap();
    while store.sweep().await.is_err() {}
    proxy.set(Fate::Swallow(Direction::ToClient));
    let swept = tokio::time::timeout(Duration::from_secs(60), store.sweep()).await;
    assert_eq!(
        swept.expect("the sweep ends").unwrap_err().kind(),
        ErrorKind::StoreUnavailable
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_processes_may_make_the_table_at_once_in_a_schema_of_its_own() {
    let server = PostgresServer::start();
    let pool = PgPoolOptions::new()
        .max_connections(20)
        .connect(&server.url())
        .await
        .unwrap();
    sqlx::query("CREATE SCHEMA shop").execute(&pool).await.unwrap();
    let store = PostgresStore::builder()
        .with_table("shop.keys")
        .with_pool(pool)
        .unwrap();
    assert!(store.check().await.unwrap_err().to_string().contains("migrate"));
    for made in join_all((0..16).map(|_| store.migrate())).await {
        made.unwrap();
    }
    store.check().await.unwrap();
    assert_eq!(granted(&store, &claim(1)).await.attempt, 1);
    assert!(store.schema().contains("\"shop\".\"keys\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scheme_of_a_url_is_case_insensitive() {
    let server = PostgresServer::start();
    for scheme in ["POSTGRES", "Postgres", "PostgreSQL"] {
        let url = server.url().replace("postgres://", &format!("{scheme}://"));
        BoxStore::from_url(&url).await.unwrap();
        PostgresStore::connect(&url).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unusable_server_or_table_is_refused_at_the_start() {
    let server = PostgresServer::start();
    let kind_of = |url: String| async move { PostgresStore::connect(&url).await.unwrap_err() };
    for (url, kind) in [
        ("mysql://localhost/x".to_owned(), ErrorKind::Configuration),
        (server.url().replace("/postgres", "/nowhere"), ErrorKind::Configuration),
        (
            server.url().replace("app@", "stranger:secret-word@"),
            ErrorKind::Configuration,
        ),
        (
            format!("postgres://app:secret-word@127.0.0.1:{}/x", free_port()),
            ErrorKind::StoreUnavailable,
        ),
    ] {
        let error = kind_of(url.clone()).await;
        assert_eq!(error.kind(), kind, "{url}: {error:?}");
        assert!(!format!("{error:?}").contains("secret-word"));
    }
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    sqlx::query("ALTER TABLE idempotency_records SET UNLOGGED")
        .execute(store.pool())
        .await
        .unwrap();
    let error = kind_of(server.url()).await;
    assert!(error.to_string().contains("unlogged"), "{error}");
    let alter = "ALTER TABLE idempotency_records SET LOGGED, ALTER fence TYPE text";
    sqlx::query(alter).execute(store.pool()).await.unwrap();
    let error = kind_of(server.url()).await;
    assert!(error.to_string().contains("other columns"), "{error}");
    sqlx::query("DROP TABLE idempotency_records")
        .execute(store.pool())
        .await
        .unwrap();
    let error = store.claim(&claim(1)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    assert!(error.to_string().contains("migrate"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_cannot_be_read_is_an_error_everywhere_and_stays() {
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    for (number, damage) in (0..).zip([
        "version = 2",
        "version = 2, state = 77",
        "nonce = 'x'",
        "fingerprint = ''",
        "state = 3",
        "attempt = -1",
        "head = 'head without a body'",
    ]) {
        let first = claim(number);
        let owner = granted(&store, &first).await.owner;
        let statement = format!("UPDATE idempotency_records SET {damage} WHERE key = $1");
        let damaging = sqlx::query(sqlx::AssertSqlSafe(statement)).bind(&first.key.as_bytes()[..]);
        damaging.execute(store.pool()).await.unwrap();
        let errors = [
            store.claim(&claim(number)).await.map(drop).unwrap_err(),
            store.peek(&first.key).await.map(drop).unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::CorruptRecord, "{damage}: {error:?}");
        }
        if damage.starts_with("version") {
            let key = &first.key;
            let errors = [
                store.renew(key, owner, HOUR).await.map(drop).unwrap_err(),
                store
                    .complete(key, owner, &stored(b"x"), HOUR)
                    .await
                    .map(drop)
                    .unwrap_err(),
                store.release(key, owner).await.map(drop).unwrap_err(),
                store
                    .resolve(key, owner.fence, &Resolution::Absent)
                    .await
                    .map(drop)
                    .unwrap_err(),
            ];
            assert!(
                errors.iter().all(|error| error.kind() == ErrorKind::CorruptRecord),
                "{errors:?}"
            );
        }
        store.sweep().await.unwrap();
    }
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM idempotency_records")
        .fetch_one(store.pool())
        .await
        .unwrap();
    assert_eq!(left, 7);
}

/// The guide `operations` has this query for operators.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_query_lists_the_keys_that_are_lost_or_unknown() {
    let guide = include_str!("../../docs/operations.md");
    let query = guide.split("```sql\n").nth(1).unwrap().split("```").next().unwrap();
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    // 1: in flight. 2: completed. 3: lost. 4: unknown. 5: lost, and its retention is over.
    for number in 1..=5 {
        let claim = Claim {
            retention: if number == 5 { Duration::from_millis(1) } else { HOUR },
            ..claim(number)
        };
        let owner = granted(&store, &claim).await.owner;
        match number {
            1 => {}
            2 => drop(store.complete(&claim.key, owner, &stored(b"paid"), HOUR).await.unwrap()),
            _ => drop(store.renew(&claim.key, owner, Duration::ZERO).await.unwrap()),
        }
        if number == 4 {
            let nonce = Nonce::random();
            assert_eq!(store.claim(&Claim { nonce, ..claim }).await.unwrap(), Decision::Unknown);
        }
    }
    // The retention of key 5 ends a millisecond after its lease.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let rows = sqlx::raw_sql(query).fetch_all(store.pool()).await.unwrap();
    let keys: Vec<String> = rows.iter().map(|row| row.get("storage_key")).collect();
    assert_eq!(keys, ["03".repeat(32), "04".repeat(32)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_come_back_byte_for_byte() {
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    for (number, len) in (0..).zip([0, 1, 8_000, 2 << 20]) {
        let body: Vec<u8> = (0..len).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect();
        let first = claim(number);
        let owner = granted(&store, &first).await.owner;
        store.complete(&first.key, owner, &stored(&body), HOUR).await.unwrap();
        let Decision::Replay(response) = store.claim(&claim(number)).await.unwrap() else {
            panic!("the response is not replayed")
        };
        assert_eq!(Outcome::Stored(response), stored(&body));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_drops_one_direction_is_given_up_by_the_caller() {
    let server = PostgresServer::start();
    let direct = PostgresStore::connect(&server.url()).await.unwrap();
    let (proxied, proxy) = through_proxy(&server).await;
    for direction in [Direction::ToServer, Direction::ToClient] {
        let claim = claim(if direction == Direction::ToServer { 1 } else { 2 });
        proxied.peek(&claim.key).await.unwrap();
        // sqlx pings a connection that comes back to the pool, and waits for the reply without a
        // bound.
        while proxied.pool().num_idle() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        proxy.set(Fate::Swallow(direction));
        let asked = tokio::time::timeout(Duration::from_millis(300), proxied.claim(&claim)).await;
        assert!(asked.is_err());
        assert_eq!(granted(&direct, &claim).await.attempt, 1);
        proxy.heal();
        // The next operation does not use the connection that was given up.
        let mut asked = tokio::time::timeout(Duration::from_secs(5), proxied.claim(&claim)).await;
        for _ in 0..10 {
            if matches!(asked, Ok(Ok(_))) {
                break;
            }
            asked = tokio::time::timeout(Duration::from_secs(5), proxied.claim(&claim)).await;
        }
        assert!(matches!(asked, Ok(Ok(Decision::Execute(_)))), "{asked:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_the_server_is_reported_without_the_data_that_it_got() {
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let first = claim(1);
    let owner = granted(&store, &first).await.owner;
    // A trigger raises the error of the server for a full disk, because a really full disk would
    // affect this machine.
    let trigger = "
        CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$;
        CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON idempotency_records FOR EACH ROW EXECUTE FUNCTION full_disk();";
    sqlx::raw_sql(trigger).execute(store.pool()).await.unwrap();
    let errors = [
        store.claim(&claim(2)).await.map(drop).unwrap_err(),
        store
            .complete(&first.key, owner, &stored(b"card of Alice"), HOUR)
            .await
            .map(drop)
            .unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
        assert!(format!("{error:?}").contains("53100"), "{error:?}");
        assert!(!format!("{error:?}").contains("Alice"));
    }
    // The error of the server for a failed check contains the row, including its body.
    let check = "
        DROP TRIGGER full_disk ON idempotency_records;
        ALTER TABLE idempotency_records ADD CHECK (body IS NULL);";
    sqlx::raw_sql(check).execute(store.pool()).await.unwrap();
    let refused = store.complete(&first.key, owner, &stored(b"card of Alice"), HOUR).await;
    let error = refused.unwrap_err();
    let hex: String = b"card of Alice".iter().map(|byte| format!("{byte:02x}")).collect();
    let shown = format!("{error:?} {error}");
    assert!(!shown.contains("Alice") && !shown.contains(&hex), "{shown}");
    assert_eq!(store.peek(&claim(2).key).await.unwrap(), None);
}

//! Operations of the stores on servers that are dropped at each of their awaits.
#![expect(clippy::future_not_send, reason = "each test awaits these futures in its own task")]

use std::time::Duration;

use futures::future::join_all;
use redis::cluster::ClusterClient;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tower_idempotency::protocol::{Decision, IfLost};
use tower_idempotency::{PostgresStore, RedisStore, Store};

use crate::support::drop_after;
use crate::support::operation::{Case, Operation, Reply};
use crate::support::postgres::PostgresServer;
use crate::support::proxy::Proxy;
use crate::support::redis::RedisServer;

const MILLI: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3_600);

/// The promise about an operation that was polled and dropped.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Promise {
    /// It takes effect.
    Done,
    /// Its key is free again, at the latest when its lease ends.
    Free,
    /// It takes effect, or it does not.
    Either,
}

/// A store whose operations are dropped.
struct Bench<'s, S> {
    store: &'s S,
    /// A store on the same server, which looks at the records.
    direct: &'s S,
    /// The operations that take effect once they have been polled.
    lasting: fn(&Operation) -> bool,
    /// The lease of a claim whose caller does not come back.
    lease: Duration,
}

impl<S: Store> Bench<'_, S> {
    fn promise(&self, operation: &Operation) -> Promise {
        match operation {
            Operation::Claim(_) | Operation::TakeOver(IfLost::Execute | IfLost::Recover) => Promise::Free,
            operation if (self.lasting)(operation) => Promise::Done,
            _ => Promise::Either,
        }
    }

    /// Drops each operation after each number of polls, until it ends by itself. Then its caller
    /// leaves for good or repeats it. `before` prepares the store for each operation. Returns the
    /// largest number of polls.
    async fn cancel_all(&self, before: impl AsyncFn()) -> usize {
        let operations = Operation::all();
        let cancelled = operations.iter().map(|operation| self.cancel(operation, &before));
        join_all(cancelled).await.into_iter().max().unwrap()
    }

    async fn cancel(&self, operation: &Operation, before: &impl AsyncFn()) -> usize {
        for polls in 1..200 {
            let case = Case::new(operation, self.direct).await;
            before().await;
            let ended = drop_after(polls, case.run(self.store)).await;
            let repeated = case.repeat_until_it_succeeds(self.store).await;
            if let Some(Ok(first @ Reply::Claim(_))) = ended {
                assert_eq!(first, repeated, "{operation:?}");
            }
            case.repeat(Some(&repeated), self.direct).await;
            let mut case = Case::new(operation, self.direct).await;
            case.claim.lease = case.claim.lease.min(self.lease);
            before().await;
            if drop_after(polls, case.run(self.store)).await.is_some() {
                return polls;
            }
            self.abandoned(&case, polls).await;
        }
        panic!("{operation:?} does not end");
    }

    /// Checks the key of an operation whose caller has left for good.
    async fn abandoned(&self, case: &Case, polls: usize) {
        let name = format!("{:?} that was dropped after {polls} polls", case.operation);
        match self.promise(&case.operation) {
            Promise::Done => until(&name, async || case.has_effect(self.direct).await).await,
            Promise::Free => {
                // The claim may be on its way.
                tokio::time::sleep(10 * MILLI).await;
                let is_free = async || matches!(self.direct.claim(&case.other()).await, Ok(Decision::Execute(_)));
                until(&name, is_free).await;
            }
            Promise::Either => drop(self.direct.claim(&case.other()).await.unwrap()),
        }
    }
}

/// Waits until the condition holds.
async fn until(name: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..400 {
        if holds().await {
            return;
        }
        tokio::time::sleep(10 * MILLI).await;
    }
    panic!("{name}: not within 4 s");
}

async fn connect(url: &str) -> RedisStore {
    // A busy machine may need longer for a reply than the 500 ms of the default.
    let builder = RedisStore::builder().with_response_timeout(5_000 * MILLI);
    builder.connect(url).await.unwrap()
}

/// Returns the number of connections to the server.
fn clients(server: &RedisServer) -> usize {
    server.command::<String>("CLIENT LIST").lines().count()
}

/// Drops the operations of a store at each await. Afterwards, the store has no waiter, and the
/// server no channel and no further connection.
async fn cancel_all_at_redis(
    server: &RedisServer,
    store: &RedisStore,
    lasting: fn(&Operation) -> bool,
    before: impl AsyncFn(),
) -> usize {
    let direct = &connect(&server.url()).await;
    let connections = clients(server);
    let lease = 20 * MILLI;
    let bench = Bench {
        store,
        direct,
        lasting,
        lease,
    };
    let polls = bench.cancel_all(before).await;
    until(&format!("nothing is left of {store:?}"), async || {
        let shown = format!("{store:?}");
        let channels = server.command::<Vec<String>>("PUBSUB SHARDCHANNELS");
        let is_watched = shown.contains(" keys)") && !shown.contains("(0 keys)");
        !is_watched && channels.is_empty() && clients(server) <= connections
    })
    .await;
    polls
}

const fn changes(operation: &Operation) -> bool {
    use Operation::{Complete, Release, Renew, Resolve};
    matches!(operation, Complete(_) | Release(_) | Renew(_) | Resolve(_))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_is_dropped_at_any_await_leaves_nothing_at_redis() {
    let server = RedisServer::start();
    let store = connect(&server.url()).await;
    let polls = cancel_all_at_redis(&server, &store, changes, async || {}).await;
    assert!(polls >= 2, "{polls} polls");
    // The server no longer knows the scripts, so an operation also checks the server.
    let flush = async || server.command("SCRIPT FLUSH");
    let polls = cancel_all_at_redis(&server, &store, changes, flush).await;
    assert!(polls >= 4, "{polls} polls");
    let client = redis::Client::open(server.url()).unwrap();
    let manager = client.get_connection_manager().await.unwrap();
    let store = RedisStore::from_connection_manager(manager).await.unwrap();
    cancel_all_at_redis(&server, &store, changes, async || {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_is_dropped_while_redis_is_connected_again_leaves_nothing() {
    let server = RedisServer::start();
    let address = ([127, 0, 0, 1], server.port()).into();
    let proxy = Proxy::to(address).await;
    let store = connect(&server.url_by(proxy.address.port())).await;
    // An operation on a broken connection fails, and has no effect.
    let polls = cancel_all_at_redis(&server, &store, |_| false, async || proxy.lead_to(address)).await;
    assert!(polls >= 3, "{polls} polls");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_is_dropped_at_any_await_leaves_nothing_at_replicated_redis() {
    let server = RedisServer::start();
    let builder = RedisStore::builder().with_replication(1, 10 * MILLI);
    let store = builder.connect(&server.url()).await.unwrap();
    let direct = connect(&server.url()).await;
    // Without a replica, a claim that is refused also releases its key.
    for operation in [Operation::Claim(20 * MILLI), Operation::TakeOver(IfLost::Recover)] {
        for polls in 1.. {
            let mut case = Case::new(&operation, &direct).await;
            case.claim.lease = 20 * MILLI;
            let refused = drop_after(polls, case.run(&store)).await;
            let is_free = async || matches!(direct.claim(&case.other()).await, Ok(Decision::Execute(_)));
            until(&format!("{operation:?} after {polls} polls"), is_free).await;
            if let Some(refused) = refused {
                assert!(refused.is_err() && polls > 2, "{refused:?} after {polls} polls");
                break;
            }
        }
    }
    let replica = server.replica();
    cancel_all_at_redis(&server, &store, changes, async || {}).await;
    drop(replica);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_is_dropped_at_any_await_leaves_nothing_at_a_cluster() {
    let server = RedisServer::with(&["--cluster-enabled", "yes", "--cluster-require-full-coverage", "no"]);
    server.command::<()>("CLUSTER ADDSLOTSRANGE 0 16383");
    server.wait_for_cluster();
    let client = ClusterClient::new([server.url()]).unwrap();
    let connection = async || client.get_async_connection().await.unwrap();
    let store = &RedisStore::from_cluster(connection().await).await.unwrap();
    let direct = &RedisStore::from_cluster(connection().await).await.unwrap();
    let (lasting, lease): (fn(&Operation) -> bool, _) = (changes, 20 * MILLI);
    let bench = Bench {
        store,
        direct,
        lasting,
        lease,
    };
    bench.cancel_all(async || {}).await;
}

const WAITING: &str = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";

async fn count(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

/// Waits until the server and the store have nothing left of earlier operations: no transaction, no
/// lock, no waiter and no pursued claim. Then uses all connections of the store at the same time.
async fn nothing_is_left_at_postgres(store: &PostgresStore, other: &PgPool, connections: i64) {
    const OPEN: &str = "SELECT count(*) FROM pg_stat_activity a LEFT JOIN pg_locks l ON l.pid = a.pid \
        WHERE backend_type = 'client backend' AND a.pid <> pg_backend_pid() \
        AND (xact_start IS NOT NULL OR l.pid IS NOT NULL)";
    until(&format!("nothing is left of {store:?}"), async || {
        let shown = format!("{store:?}");
        let is_idle = ["waiting: 0,", "watched_keys: 0,", "pursued_claims: 0,"];
        count(other, OPEN).await == 0 && is_idle.iter().all(|idle| shown.contains(idle))
    })
    .await;
    let mut locked = other.begin().await.unwrap();
    let lock = sqlx::raw_sql("LOCK TABLE idempotency_records IN EXCLUSIVE MODE");
    lock.execute(&mut *locked).await.unwrap();
    let claims = (0..connections).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            let case = Case::new(&Operation::Claim(HOUR), &store).await;
            case.run(&store).await
        })
    });
    let claims: Vec<_> = claims.collect();
    until(&format!("all connections of {store:?} are in use"), async || {
        count(other, WAITING).await == connections
    })
    .await;
    locked.commit().await.unwrap();
    for claimed in join_all(claims).await {
        claimed.unwrap().unwrap();
    }
}

async fn postgres() -> (PostgresServer, PostgresStore, PgPool) {
    let server = PostgresServer::start();
    let direct = PostgresStore::connect(&server.url()).await.unwrap();
    let other = PgPool::connect(&server.url()).await.unwrap();
    (server, direct, other)
}

const fn ends(operation: &Operation) -> bool {
    matches!(operation, Operation::Complete(_) | Operation::Release(_))
}

fn bench_at_postgres<'s>(store: &'s PostgresStore, direct: &'s PostgresStore) -> Bench<'s, PostgresStore> {
    Bench {
        store,
        direct,
        lasting: ends,
        lease: HOUR,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_is_dropped_at_any_await_leaves_nothing_at_postgres() {
    let (server, direct, other) = postgres().await;
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    let polls = bench_at_postgres(&store, &direct).cancel_all(async || {}).await;
    assert!(polls >= 2, "{polls} polls");
    nothing_is_left_at_postgres(&store, &other, 15).await;
}

/// Behind a pooler, each operation is a transaction of several statements.
#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_is_dropped_at_any_await_leaves_no_transaction_behind_a_pooler() {
    let (server, direct, other) = postgres().await;
    let pool = PgPoolOptions::new().max_connections(3).test_before_acquire(false);
    let pool = pool.connect(&server.url()).await.unwrap();
    let builder = PostgresStore::builder().with_transaction_pooler();
    let store = builder.with_pool(pool).unwrap();
    let polls = bench_at_postgres(&store, &direct).cancel_all(async || {}).await;
    assert!(polls >= 2, "{polls} polls");
    nothing_is_left_at_postgres(&store, &other, 3).await;
}

/// A backend goes on with its statement when its client has closed the connection.
#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_is_dropped_while_it_waits_for_a_lock_keeps_its_connection() {
    let (server, direct, other) = postgres().await;
    let pool = PgPoolOptions::new().max_connections(1).test_before_acquire(false);
    let pool = pool.connect(&server.url()).await.unwrap();
    let store = PostgresStore::builder().with_pool(pool).unwrap();
    store.check().await.unwrap();
    let bench = bench_at_postgres(&store, &direct);
    // With one connection, a watch sends nothing.
    for operation in Operation::kinds() {
        if matches!(operation, Operation::Watch) {
            continue;
        }
        let cases = [(); 2].map(|()| Case::new(&operation, &direct));
        let [first, second] = <[Case; 2]>::try_from(join_all(cases).await).unwrap();
        let mut locked = other.begin().await.unwrap();
        let lock = sqlx::raw_sql("LOCK TABLE idempotency_records IN ACCESS EXCLUSIVE MODE");
        lock.execute(&mut *locked).await.unwrap();
        let name = format!("{operation:?} waits");
        tokio::select! {
            reply = first.run(&store) => panic!("{operation:?}: {reply:?}"),
            () = until(&name, async || count(&other, WAITING).await == 1) => {}
        }
        let refused = tokio::time::timeout(40 * MILLI, second.run(&store)).await;
        assert!(!matches!(refused, Ok(Ok(_))), "{operation:?}: {refused:?}");
        assert_eq!(count(&other, WAITING).await, 1, "{operation:?}");
        locked.rollback().await.unwrap();
        bench.abandoned(&first, 1).await;
    }
    nothing_is_left_at_postgres(&store, &other, 1).await;
}

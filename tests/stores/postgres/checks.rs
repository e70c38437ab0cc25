//! The check of the server before the first operation, in a store that several runtimes share.

use std::time::Duration;

use futures::poll;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;
use tower_idempotency::{ErrorKind, PostgresStore, Store};

use super::claim;
use crate::support::postgres::PostgresServer;

const SECOND: Duration = Duration::from_secs(1);

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Makes a store over a pool, with a table, that has not checked its server yet.
async fn unchecked(server: &PostgresServer) -> PostgresStore {
    drop(PostgresStore::connect(&server.url()).await.unwrap());
    let pool: PgPool = PgPoolOptions::new().connect_lazy(&server.url()).unwrap();
    PostgresStore::builder().with_pool(pool).unwrap()
}

/// An operation of a blocked runtime kept its handle of the failed check. Meanwhile, all other
/// operations got the error of that check, although the server was back.
#[test]
fn a_server_that_is_back_is_used_although_a_runtime_is_blocked_since_the_failed_check() {
    let mut server = PostgresServer::start();
    let (blocked, other) = (runtime(), runtime());
    let key = claim(1).key;
    let store = other.block_on(unchecked(&server));
    server.kill();
    let (mut failing, mut waiting) = (Box::pin(store.peek(&key)), Box::pin(store.peek(&key)));
    other.block_on(async { assert!(poll!(&mut failing).is_pending()) });
    blocked.block_on(async { assert!(poll!(&mut waiting).is_pending()) });
    let failed = other.block_on(failing).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::StoreUnavailable);
    server.run();
    let seen = other.block_on(async { timeout(4 * SECOND, store.peek(&key)).await });
    assert_eq!(
        seen.expect("the operation does not wait for the other runtime")
            .unwrap(),
        None
    );
    blocked.block_on(async { drop(waiting) });
}

/// The permit of the check stayed with an operation that nothing polled, and the operations of all
/// other runtimes waited for it without a limit.
#[test]
fn a_runtime_that_is_blocked_during_the_check_delays_no_other_runtime() {
    let server = PostgresServer::start();
    let (blocked, other) = (runtime(), runtime());
    let key = claim(1).key;
    let store = other.block_on(unchecked(&server));
    let mut checking = Box::pin(store.peek(&key));
    blocked.block_on(async { assert!(poll!(&mut checking).is_pending()) });
    let seen = other.block_on(async { timeout(4 * SECOND, store.peek(&key)).await });
    assert_eq!(
        seen.expect("the operation does not wait for the other runtime")
            .unwrap(),
        None
    );
    blocked.block_on(async { drop(checking) });
}

/// The listener runs in the runtime of the first waiter. The waiters of other runtimes waited for
/// its start, and did not look at their records meanwhile.
#[test]
fn a_runtime_that_is_blocked_before_it_listens_delays_no_waiter_of_another_runtime() {
    let server = PostgresServer::start();
    let (blocked, other) = (runtime(), runtime());
    let key = claim(1).key;
    let store = other.block_on(async { PostgresStore::connect(&server.url()).await.unwrap() });
    let mut listening = Box::pin(store.watch(&key));
    blocked.block_on(async { assert!(poll!(&mut listening).is_pending()) });
    other.block_on(async {
        let watch = timeout(4 * SECOND, store.watch(&key)).await;
        let watch = watch.expect("the waiter does not wait for the other runtime").unwrap();
        timeout(4 * SECOND, watch).await.expect("the watch wakes its waiter");
    });
    blocked.block_on(async { drop(listening) });
}

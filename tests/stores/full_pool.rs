//! Stores whose server has a name, in a runtime whose pool for blocking work is full. tokio looks
//! names up in that pool, so the store cannot connect until the pool has room.

use std::convert::Infallible;
use std::sync::mpsc;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::client::{Failure, OnceError, once};
use tower_idempotency::receiver::{Receipt, ReceiveError, ReceiverLayer};
use tower_idempotency::{BoxStore, ErrorKind, IdempotencyLayer, PostgresStore, RedisStore};

use crate::support::postgres::PostgresServer;
use crate::support::redis::RedisServer;
use crate::support::settings::is_thorough;
use crate::support::{Handler, Timer, post, send};

const STORE_TIMEOUT: Duration = Duration::from_secs(1);
/// A claim is repeated once. The rest is for a machine that is busy.
const LONGEST_CLAIM: Duration = Duration::from_secs(5);
/// The longest time to make a store, or until a connection is tried again.
const LONGEST_CONNECT: Duration = Duration::from_secs(11);

/// The pool for blocking work of a runtime with one place, which is taken.
struct Taken(#[expect(dead_code, reason = "dropping it frees the place")] mpsc::Sender<()>);

fn runtime() -> Runtime {
    let mut builder = Builder::new_multi_thread();
    builder
        .worker_threads(2)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

fn take_pool(runtime: &Runtime) -> Taken {
    let (end, ended) = mpsc::channel();
    let (begin, begun) = mpsc::channel();
    runtime.spawn_blocking(move || {
        begin.send(()).unwrap();
        assert!(ended.recv().is_err());
    });
    begun.recv().unwrap();
    Taken(end)
}

/// The kinds of store failures of one request, one message and one call; `None` for each of them
/// that ran.
type Failures = [Option<ErrorKind>; 3];

const ALL_RAN: Failures = [None; 3];
const NONE_RAN: Failures = [Some(ErrorKind::StoreUnavailable); 3];

async fn use_everywhere(store: &BoxStore, key: &'static str) -> Failures {
    let service = IdempotencyLayer::new(store.clone())
        .with_store_timeout(STORE_TIMEOUT)
        .layer(Handler::new());
    let receiver = ReceiverLayer::new(store.clone(), "billing")
        .with_id(|id: &&str| (*id).to_owned())
        .with_store_timeout(STORE_TIMEOUT)
        .layer(service_fn(|_: &str| async { Ok::<_, Infallible>(()) }));
    let call = once(store.clone(), key)
        .with_store_timeout(STORE_TIMEOUT)
        .run(|_| async { Ok::<_, Failure<String>>(1) });
    let (got, received, called) = futures::join!(send(&service, post(key, "pay")), receiver.oneshot(key), call);
    let of_layer = match (got.status(), got.code()) {
        (201, _) => None,
        (503, "store-unavailable") => Some(ErrorKind::StoreUnavailable),
        _ => panic!("{got:?}"),
    };
    let of_receiver = match received {
        Ok(Receipt::First(()) | Receipt::Duplicate) => None,
        // An earlier claim was granted late, and is not released yet.
        Ok(Receipt::InFlight { .. }) => Some(ErrorKind::StoreUnavailable),
        Err(ReceiveError::Store(error)) => Some(error.kind()),
        other => panic!("{other:?}"),
    };
    let of_once = match called {
        Ok(_) => None,
        Err(OnceError::NotRun(error)) => Some(error.kind()),
        Err(other) => panic!("{other:?}"),
    };
    [of_layer, of_receiver, of_once]
}

/// Restarts the server of a store while the pool is full. Each user of the store gets an error in
/// time, and works again when the pool has room.
fn lose_connections(runtime: &Runtime, store: &BoxStore, restart: impl FnOnce()) {
    assert_eq!(runtime.block_on(use_everywhere(store, "before")), ALL_RAN);
    let taken = take_pool(runtime);
    restart();
    runtime.block_on(async {
        let timer = Timer::start();
        assert_eq!(use_everywhere(store, "meanwhile").await, NONE_RAN);
        assert!(timer.elapsed() < LONGEST_CLAIM, "{:?}", timer.elapsed());
    });
    drop(taken);
    runtime.block_on(async {
        let timer = Timer::start();
        for n in 0.. {
            let key: &'static str = format!("after-{n}").leak();
            if use_everywhere(store, key).await == ALL_RAN {
                break;
            }
            assert!(timer.elapsed() < LONGEST_CONNECT, "the store does not recover");
        }
        // The claims that failed have been released.
        let timer = Timer::start();
        while use_everywhere(store, "meanwhile").await != ALL_RAN {
            assert!(timer.elapsed() < LONGEST_CONNECT, "a key is stuck");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
}

#[test]
fn redis_by_name_is_unavailable_within_its_time_while_the_pool_is_full() {
    let (runtime, mut server) = (runtime(), RedisServer::start());
    let url = server.url().replace("127.0.0.1", "localhost");
    let store = runtime.block_on(RedisStore::connect(&url)).unwrap();
    lose_connections(&runtime, &BoxStore::new(store), || server.restart());
    let taken = take_pool(&runtime);
    let connecting = runtime.block_on(async { timeout(LONGEST_CONNECT, RedisStore::connect(&url)).await });
    assert_eq!(connecting.unwrap().unwrap_err().kind(), ErrorKind::StoreUnavailable);
    drop(taken);
    runtime.block_on(RedisStore::connect(&url)).unwrap();
}

#[test]
fn postgres_by_name_is_unavailable_within_its_time_while_the_pool_is_full() {
    let (runtime, mut server) = (runtime(), PostgresServer::start());
    let url = server.url().replace("127.0.0.1", "localhost");
    let store = runtime.block_on(PostgresStore::connect(&url)).unwrap();
    runtime.block_on(store.migrate()).unwrap();
    lose_connections(&runtime, &BoxStore::new(store), || {
        server.kill();
        server.run();
    });
    if !is_thorough() {
        return;
    }
    // This takes ten seconds.
    let taken = take_pool(&runtime);
    let connecting = runtime.block_on(async { timeout(LONGEST_CONNECT, PostgresStore::connect(&url)).await });
    assert_eq!(connecting.unwrap().unwrap_err().kind(), ErrorKind::StoreUnavailable);
    drop(taken);
    runtime.block_on(PostgresStore::connect(&url)).unwrap();
}

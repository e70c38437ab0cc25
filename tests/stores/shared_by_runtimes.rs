//! One store that is shared by runtimes of one thread each. The connections of a store belong to
//! runtimes, so a runtime that blocks or ends takes connections with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tower::Layer;
use tower_idempotency::{BoxStore, Idempotency, IdempotencyLayer, PostgresStore, RedisStore};

use crate::support::postgres::PostgresServer;
use crate::support::redis::RedisServer;
use crate::support::{Handler, Timer, post, send};

/// A claim takes at most 5 s, and is repeated once.
const LONGEST_CLAIM: Duration = Duration::from_secs(11);

type Service = Idempotency<Handler, BoxStore>;

fn one_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Sends requests with new keys until one of them runs, and returns its key. Each request ends in
/// time.
async fn runs_soon(service: &Service, keys: &str) -> String {
    let all = Timer::start();
    let mut number = 0;
    loop {
        let (timer, key) = (Timer::start(), format!("{keys}-{number}"));
        let got = send(service, post(&key, "pay")).await;
        assert!(timer.elapsed() < LONGEST_CLAIM, "{:?}", timer.elapsed());
        if got.status() == 201 {
            println!("{keys}: after {:?}", all.elapsed());
            return key;
        }
        number += 1;
        assert_eq!(got.code(), "store-unavailable");
        assert!(all.elapsed() < 3 * LONGEST_CLAIM, "the store does not recover");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The first runtime makes the connections of the store. It blocks its thread, continues, and ends.
/// Another runtime uses the store all the time.
fn outlive_a_runtime(store: &BoxStore, first: Runtime) {
    let handler = Handler::new();
    let service = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    let first_key = first.block_on(runs_soon(&service, "first"));
    let (block, blocked) = mpsc::channel::<()>();
    let ends = Arc::new(AtomicBool::new(false));
    let (theirs, end) = (service.clone(), Arc::clone(&ends));
    let blocking = thread::spawn(move || {
        first.block_on(async {
            assert!(blocked.recv().is_err(), "this blocks the thread");
            while !end.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            runs_soon(&theirs, "continued").await
        })
    });
    one_thread().block_on(async {
        let timer = Timer::start();
        let got = send(&service, post("meanwhile", "pay")).await;
        assert!(matches!(got.status(), 201 | 503), "{got:?}");
        assert!(timer.elapsed() < LONGEST_CLAIM, "{:?}", timer.elapsed());
        println!(
            "while the first runtime is blocked: {} after {:?}",
            got.status(),
            timer.elapsed()
        );
        drop(block);
        runs_soon(&service, "unblocked").await;
        ends.store(true, Ordering::SeqCst);
        let continued = tokio::task::spawn_blocking(|| blocking.join().unwrap());
        let keys = [first_key, continued.await.unwrap(), runs_soon(&service, "ended").await];
        let runs = handler.runs();
        for key in keys {
            assert!(send(&service, post(&key, "pay")).await.is_replay());
        }
        assert_eq!(handler.runs(), runs);
    });
}

#[test]
fn redis_outlives_a_runtime_that_blocks_and_ends() {
    let (server, first) = (RedisServer::start(), one_thread());
    let store = first.block_on(RedisStore::connect(&server.url())).unwrap();
    outlive_a_runtime(&BoxStore::new(store), first);
}

#[test]
fn postgres_outlives_a_runtime_that_blocks_and_ends() {
    let (server, first) = (PostgresServer::start(), one_thread());
    let store = first.block_on(PostgresStore::connect(&server.url())).unwrap();
    first.block_on(store.migrate()).unwrap();
    outlive_a_runtime(&BoxStore::new(store), first);
}

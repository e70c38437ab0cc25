//! Whole layers on one server.

use std::time::Duration;

use tower::Layer;
use tower_idempotency::{IdempotencyLayer, Store};

use super::{HOUR, RedisServer, claim, completed, connect, granted, replayed, stored};
use crate::support::{Handler, Timer, post, send, start};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_layers_on_two_stores_run_a_storm_of_duplicates_once() {
    let server = RedisServer::start();
    let handler = Handler::new().taking(Duration::from_millis(20));
    let services = [
        IdempotencyLayer::new(connect(&server).await).layer(handler.clone()),
        IdempotencyLayer::new(connect(&server).await).layer(handler.clone()),
    ];
    for round in 0..20 {
        let key = format!("key-{round}");
        let requests = (0..64).map(|n: usize| start(&services[n % 2], post(&key, "x")));
        for got in futures::future::join_all(requests).await {
            let got = got.unwrap();
            assert_eq!((got.status(), got.body), (201, format!("run {}", round + 1).into()));
        }
        assert_eq!(handler.runs(), round + 1);
    }
}

#[tokio::test]
async fn a_duplicate_in_another_process_is_woken_and_need_not_poll() {
    let server = RedisServer::start();
    let handler = Handler::new().taking(Duration::from_millis(600));
    let here = IdempotencyLayer::new(connect(&server).await).layer(handler.clone());
    let there = IdempotencyLayer::new(connect(&server).await).layer(handler.clone());
    let timer = Timer::start();
    let first = start(&here, post("k", "x"));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let second = start(&there, post("k", "x"));
    first.await.unwrap();
    let first_took = timer.elapsed();
    assert!(second.await.unwrap().is_replay());
    // The waiter polls at 550 ms and would poll again at 1050 ms.
    let behind = timer.elapsed() - first_took;
    assert!(behind < Duration::from_millis(200), "{behind:?}");
    assert_eq!(handler.runs(), 1);
}

#[tokio::test]
async fn a_replay_costs_one_round_trip_and_a_first_run_two() {
    let server = RedisServer::start();
    let service = IdempotencyLayer::new(connect(&server).await).layer(Handler::new());
    // The server caches the scripts.
    send(&service, post("warm", "x")).await;
    send(&service, post("warm", "x")).await;
    // The commands that a client can send, without those that only scripts call.
    let asked = || {
        [
            "evalsha",
            "eval",
            "ssubscribe",
            "sunsubscribe",
            "wait",
            "script|load",
            "multi",
        ]
        .map(|name| server.calls(name))
    };
    let before = asked();
    send(&service, post("first", "x")).await;
    let mut wanted = before;
    wanted[0] += 2;
    assert_eq!(asked(), wanted);
    assert!(send(&service, post("first", "x")).await.is_replay());
    wanted[0] += 1;
    assert_eq!(asked(), wanted);
}

#[tokio::test]
async fn flushed_scripts_are_loaded_again_at_every_operation() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    let flush = || server.command::<()>("SCRIPT FLUSH");
    let key = claim(1, 1).key;
    flush();
    let grant = granted(&store, &claim(1, 1)).await;
    flush();
    store.renew(&key, grant.owner, HOUR).await.unwrap();
    flush();
    store.complete(&key, grant.owner, &stored("a"), HOUR).await.unwrap();
    flush();
    assert!(store.peek(&key).await.unwrap().is_some());
    flush();
    assert_eq!(replayed(&store, 1).await.body, "a");
    flush();
    let grant = granted(&store, &claim(2, 1)).await;
    flush();
    store.release(&claim(2, 1).key, grant.owner).await.unwrap();
    flush();
    completed(&store, 3, "b").await;
}

//! Runtimes that were built without timers, and threads without any runtime.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use futures::executor::block_on;
use http::Request;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::protocol::{Decision, Renewal};
use tower_idempotency::receiver::{Receipt, ReceiverLayer};
use tower_idempotency::{IdempotencyLayer, MemoryStore, Store};

use super::{HOUR, claim, clock, granted, stored};
use crate::support::{AnyBody, Got, Handler, Play, RemoteStore, Timer, frames, post, request, send, start};

const SHORT: Duration = Duration::from_millis(100);

fn without_timers<F: Future>(work: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(work)
}

thread_local! {
    static PANICS: Cell<usize> = const { Cell::new(0) };
}

/// Each claim spawned a sweeping task, which made a timer and panicked.
#[test]
fn a_memory_store_spawns_no_task_that_panics() {
    let others = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.set(PANICS.get() + 1);
        others(panic);
    }));
    without_timers(async {
        let service = IdempotencyLayer::new(MemoryStore::new()).layer(Handler::new());
        for n in 0..100 {
            assert_eq!(send(&service, post(&n.to_string(), "")).await.status(), 201);
            tokio::task::yield_now().await;
        }
    });
    // The runtime has one thread, this one.
    assert_eq!(PANICS.get(), 0);
}

/// The layer holds a lock while it calls `claim_now`. Without a runtime, each call freed a portion
/// of the records.
#[test]
fn claim_now_frees_no_records_without_a_runtime_either() {
    let clock = clock();
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    let Some(Ok(Decision::Execute(grant))) = store.claim_now(&claim(1, 1)) else {
        panic!("a first claim is granted at once");
    };
    let key = claim(1, 1).key;
    block_on(store.complete(&key, grant.owner, &stored("x"), HOUR)).unwrap();
    assert!(matches!(store.claim_now(&claim(1, 2)), Some(Ok(Decision::Replay(_)))));
    clock.advance(2 * HOUR);
    assert!(store.claim_now(&claim(2, 1)).is_none());
    assert_eq!(store.stats().records, 1);
    block_on(granted(&store, &claim(2, 1)));
    assert_eq!(store.stats().records, 1);
    assert!(store.claim_now(&claim(3, 1)).is_some());
}

#[test]
fn a_memory_store_removes_expired_records_without_timers_and_without_a_runtime() {
    without_timers(async {
        let (clock, started) = (clock(), Timer::start());
        let store = MemoryStore::builder().with_clock(clock.clone()).build();
        let grant = granted(&store, &claim(1, 1)).await;
        let key = claim(1, 1).key;
        store.complete(&key, grant.owner, &stored("x"), HOUR).await.unwrap();
        clock.advance(2 * HOUR);
        while store.stats().records > 0 {
            assert!(
                started.elapsed() < Duration::from_secs(20),
                "the store removed no record"
            );
            tokio::task::yield_now().await;
        }
    });
    let clock = clock();
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    for n in 0..200 {
        let grant = block_on(granted(&store, &claim(n, 1)));
        let (key, outcome) = (claim(n, 1).key, stored("x"));
        block_on(store.complete(&key, grant.owner, &outcome, SHORT)).unwrap();
        clock.advance(Duration::from_secs(1));
    }
    assert!(store.stats().records < 5, "{:?}", store.stats());
}

/// Outside of a runtime, no task freed such a record, so a store that was full of them stayed full.
#[test]
fn records_that_expired_without_an_end_make_room_without_a_runtime() {
    let clock = clock();
    let store = MemoryStore::builder()
        .with_clock(clock.clone())
        .with_record_budget(8)
        .build();
    for n in 0..200 {
        let grant = block_on(granted(&store, &claim(n, 1)));
        let given_up = block_on(store.renew(&claim(n, 1).key, grant.owner, Duration::ZERO));
        assert_eq!(given_up.unwrap(), Renewal::Renewed);
        if n % 8 == 7 {
            assert!(
                block_on(store.claim(&claim(n + 1, 1))).is_err(),
                "the store made room although no record has expired"
            );
            clock.advance(2 * HOUR);
        }
    }
    assert!(store.stats().records <= 8, "{:?}", store.stats());
}

/// A search through all open records at each claim would take too long.
#[test]
fn a_full_store_looks_for_records_that_expired_without_an_end_once_a_second() {
    const BEFORE: Duration = Duration::from_millis(700);
    let clock = clock();
    let store = MemoryStore::builder()
        .with_clock(clock.clone())
        .with_record_budget(1)
        .build();
    clock.advance(Duration::from_millis(500));
    let grant = block_on(granted(&store, &claim(1, 1)));
    block_on(store.renew(&claim(1, 1).key, grant.owner, Duration::ZERO)).unwrap();
    clock.advance(HOUR - BEFORE);
    let is_full = || block_on(store.claim(&claim(2, 1))).is_err();
    // The last of these claims comes in the second after the record has expired.
    let full = [0, 400, 200, 200, 400].map(|millis| {
        clock.advance(Duration::from_millis(millis));
        is_full()
    });
    assert_eq!(full, [true, true, true, true, false]);
}

/// Only a full store searches all open records, which takes long.
#[test]
fn a_claim_that_finds_room_leaves_records_without_an_end_to_a_sweep() {
    let clock = clock();
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    let grant = block_on(granted(&store, &claim(1, 1)));
    block_on(store.renew(&claim(1, 1).key, grant.owner, Duration::ZERO)).unwrap();
    clock.advance(2 * HOUR);
    block_on(granted(&store, &claim(2, 1)));
    assert_eq!(store.stats().records, 2);
    store.sweep();
    assert_eq!(store.stats().records, 1);
}

#[tokio::test]
async fn the_task_of_a_dropped_store_ends_at_once() {
    let (store, runtime) = (MemoryStore::new(), tokio::runtime::Handle::current());
    granted(&store, &claim(1, 1)).await;
    tokio::task::yield_now().await;
    assert_eq!(runtime.metrics().num_alive_tasks(), 1);
    drop(store);
    tokio::task::yield_now().await;
    assert_eq!(runtime.metrics().num_alive_tasks(), 0);
}

#[test]
fn a_store_whose_runtime_has_ended_sweeps_on_the_runtime_of_the_next_claim() {
    let store = MemoryStore::new();
    for key in 0..2 {
        without_timers(async {
            granted(&store, &claim(key, 1)).await;
            assert_eq!(tokio::runtime::Handle::current().metrics().num_alive_tasks(), 1);
        });
    }
}

fn never(_: Request<AnyBody>) -> impl Future<Output = Result<http::Response<AnyBody>, Infallible>> {
    pending()
}

#[test]
fn a_layer_times_its_requests_without_the_runtimes_timers() {
    without_timers(async {
        let layer = IdempotencyLayer::new(MemoryStore::new())
            .with_wait(SHORT)
            .with_body_timeout(SHORT);
        let service = layer.layer(service_fn(never));
        let stalls = send(&service, request("stalls", frames(vec![Play::Stall]))).await;
        assert_eq!((stalls.status(), stalls.code()), (408, "body-timeout"));
        let owner = start(&service, post("k", ""));
        tokio::task::yield_now().await;
        let duplicate: Got = send(&service, post("k", "")).await;
        assert_eq!((duplicate.status(), duplicate.code()), (409, "request-outstanding"));
        owner.abort();
    });
}

#[test]
fn leases_are_renewed_without_the_runtimes_timers() {
    without_timers(async {
        let store = RemoteStore::new();
        let layer = IdempotencyLayer::new(store.clone()).with_lease(Duration::from_secs(1));
        let service = layer.with_wait(Duration::from_millis(900)).layer(service_fn(never));
        let owner = start(&service, post("k", ""));
        tokio::task::yield_now().await;
        assert_eq!(send(&service, post("k", "")).await.code(), "request-outstanding");
        assert!(store.calls("renew") > 0);
        owner.abort();
    });
}

#[cfg(feature = "once")]
#[test]
fn calls_that_are_made_once_need_no_timers_of_the_runtime() {
    use std::sync::Arc;

    use tokio::sync::Notify;
    use tower_idempotency::client::{Done, Failure, OnceError, once};

    without_timers(async {
        let (store, may_end) = (RemoteStore::new(), Arc::new(Notify::new()));
        let call = |may_end: Arc<Notify>| {
            once(store.clone(), "k").run(|_| async move {
                may_end.notified().await;
                Ok::<_, Failure<String>>(7)
            })
        };
        let first = tokio::spawn(call(Arc::clone(&may_end)));
        tokio::task::yield_now().await;
        let second = tokio::spawn(call(Arc::default()));
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        may_end.notify_one();
        let value = |ended: Result<Done<i32>, OnceError<i32, String>>| ended.unwrap().into_value();
        assert_eq!((value(first.await.unwrap()), value(second.await.unwrap())), (7, 7));
    });
}

#[test]
fn a_receiver_needs_no_timers_of_the_runtime() {
    without_timers(async {
        let store = RemoteStore::new();
        let layer = ReceiverLayer::new(store.clone(), "billing")
            .with_id(|message: &String| message.clone())
            .with_wait(SHORT);
        let receiver = layer.layer(service_fn(|_: String| pending::<Result<(), String>>()));
        let first = tokio::spawn(receiver.clone().oneshot("m".to_owned()));
        tokio::task::yield_now().await;
        let second = receiver.oneshot("m".to_owned()).await;
        assert!(matches!(second, Ok(Receipt::InFlight { .. })), "{second:?}");
        first.abort();
    });
}

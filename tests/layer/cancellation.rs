//! A caller may leave at any moment. Afterwards no key is stuck, nothing runs twice, and no task is
//! left.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Context;
use std::time::Duration;

use futures::task::{ArcWake, waker};
use http::StatusCode;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::{Layer, Service, ServiceExt};
use tower_idempotency::{Drain, IdempotencyLayer, MemoryStore, Store};

use crate::support::{
    Fault, Handler, Play, RemoteStore, frames, got, poll_then_drop, post, request, send, start, text,
};

/// Sends a request, drops it after `polls` polls, and sends it again. The second one must get the
/// response, with one run in all. Returns whether the first one got its response before it was
/// dropped.
async fn leave_after<St: Store + Clone>(polls: usize, store: St, handler: Handler) -> bool {
    let layer = IdempotencyLayer::new(store).with_lease(Duration::from_secs(5));
    let service = layer.layer(handler.clone());
    let slow_body = || frames(vec![Play::Data("pay"), Play::Data(" 100")]);

    let first = service.clone().oneshot(request("k", slow_body()));
    let delivered = match poll_then_drop(polls, first).await {
        Some(response) => Some(got(response.unwrap()).await),
        None => None,
    };
    let again = send(&service, request("k", slow_body())).await;
    assert_eq!(
        (again.status(), &again.body[..]),
        (201, &b"run 1"[..]),
        "after {polls} polls"
    );
    if let Some(delivered) = &delivered {
        assert!(!delivered.is_replay() && again.is_replay());
        assert_eq!(delivered.body, again.body);
    }
    let drain = layer.drain();
    tokio::time::timeout(Duration::from_secs(60), drain.wait())
        .await
        .expect("every execution ends");
    assert_eq!((handler.runs(), handler.finished()), (1, 1), "after {polls} polls");
    assert!(send(&service, request("k", slow_body())).await.is_replay());
    delivered.is_some()
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_at_any_await_point_leaves_no_key_stuck_in_memory() {
    let mut polls = 0;
    while !leave_after(polls, MemoryStore::new(), Handler::new().yielding(3)).await {
        polls += 1;
    }
    assert!(polls >= 7, "only {polls} await points were tried");
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_at_any_await_point_leaves_no_key_stuck_in_a_remote_store() {
    let mut polls = 0;
    while !leave_after(polls, RemoteStore::new(), Handler::new().yielding(3)).await {
        polls += 1;
    }
    assert!(polls >= 11, "only {polls} await points were tried");
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_at_any_await_point_leaves_no_key_stuck_in_a_store_that_decides_at_once() {
    let mut polls = 0;
    while !leave_after(polls, RemoteStore::deciding_at_once(), Handler::new().yielding(3)).await {
        polls += 1;
    }
    assert!(polls >= 9, "only {polls} await points were tried");
}

/// Sends requests for few keys. A third of the callers leave after a few polls.
async fn storm<St: Store + Clone>(store: St) {
    const KEYS: usize = 301;
    let handler = Handler::new().yielding(1);
    let layer = IdempotencyLayer::new(store);
    let service = layer.layer(handler.clone());
    let callers: Vec<_> = (0..20 * KEYS)
        .map(|n| {
            let sent = post(&format!("key-{}", n % KEYS), "pay");
            let service = service.clone();
            tokio::spawn(async move {
                if n % 3 == 0 {
                    return drop(poll_then_drop(n % 5, service.oneshot(sent)).await);
                }
                assert_eq!(send(&service, sent).await.status(), 201);
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    tokio::time::timeout(Duration::from_secs(60), layer.drain().wait())
        .await
        .expect("every execution ends");
    assert_eq!((handler.runs(), handler.finished()), (KEYS, KEYS));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_key_runs_once_although_many_callers_leave() {
    storm(MemoryStore::new()).await;
    storm(RemoteStore::deciding_at_once()).await;
    storm(RemoteStore::new()).await;
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_leaves_at_any_await_point_does_not_affect_other_requests() {
    for polls in 0..12 {
        let handler = Handler::new().taking(Duration::from_secs(1));
        let layer = IdempotencyLayer::new(RemoteStore::new());
        let service = layer.layer(handler.clone());
        let owner = tokio::spawn({
            let service = service.clone();
            async move { send(&service, post("k", "pay")).await }
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        let waiter = service.clone().oneshot(post("k", "pay"));
        assert!(poll_then_drop(polls, waiter).await.is_none());
        assert_eq!(layer.drain().running(), 0, "the layer does not detach a waiter");
        let owner = owner.await.unwrap();
        assert_eq!((owner.status(), owner.is_replay(), handler.runs()), (201, false, 1));
        assert!(send(&service, post("k", "pay")).await.is_replay());
    }
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_watches_another_process_and_leaves_hands_over_to_its_followers() {
    let store = RemoteStore::new();
    let handler = Handler::new().taking(Duration::from_secs(3));
    let here = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    let there = IdempotencyLayer::new(store).layer(handler.clone());
    let owner = tokio::spawn(async move { send(&there, post("k", "pay")).await });
    tokio::time::sleep(Duration::from_millis(10)).await;

    let watcher = tokio::spawn({
        let here = here.clone();
        async move { send(&here, post("k", "pay")).await }
    });
    tokio::time::sleep(Duration::from_millis(10)).await;
    let joined = tokio::spawn(async move { send(&here, post("k", "pay")).await });
    tokio::time::sleep(Duration::from_millis(10)).await;
    watcher.abort();
    assert_eq!(joined.await.unwrap().body, owner.await.unwrap().body);
    assert_eq!(handler.runs(), 1);
}

/// A waker that notes what a drain waits for at the moment of the last wake.
struct AtWake {
    drain: Drain,
    running: AtomicUsize,
}

impl ArcWake for AtWake {
    fn wake_by_ref(at_wake: &Arc<Self>) {
        at_wake.running.store(at_wake.drain.running(), Ordering::SeqCst);
    }
}

/// The entry of the key was free before the release of the lost claim had begun. A drain that looked
/// in between did not wait for the release, and the store could grant the claim to nobody.
#[tokio::test(start_paused = true)]
async fn a_waiter_that_leaves_begins_the_release_of_its_lost_claim_before_it_hands_over() {
    let store = RemoteStore::new();
    let handler = Handler::new().taking(Duration::from_secs(3));
    let there = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    let owner = start(&there, post("k", "pay"));
    tokio::time::sleep(Duration::from_millis(10)).await;
    store.fail("claim", [Fault::Before]);
    let layer = IdempotencyLayer::new(store);
    let here = layer.layer(handler);
    let mut watcher = Box::pin(here.clone().oneshot(post("k", "pay")));
    let watching = tokio::time::timeout(Duration::from_secs(1), &mut watcher);
    assert!(watching.await.is_err());

    let (drain, running) = (layer.drain(), AtomicUsize::new(usize::MAX));
    let at_wake = Arc::new(AtWake { drain, running });
    let mut joined = Box::pin(here.oneshot(post("k", "pay")));
    let polled = joined
        .as_mut()
        .poll(&mut Context::from_waker(&waker(Arc::clone(&at_wake))));
    assert!(polled.is_pending());
    drop(watcher);
    assert_eq!(at_wake.running.load(Ordering::SeqCst), 1);
    assert_eq!(got(joined.await.unwrap()).await.body, owner.await.unwrap().body);
    at_wake.drain.wait().await;
}

#[tokio::test(start_paused = true)]
async fn an_execution_goes_on_when_its_waiter_has_claimed_again_and_leaves() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(1))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let there = IdempotencyLayer::new(store.clone()).layer(failing);
    let handler = Handler::new().taking(Duration::from_secs(2));
    let layer = IdempotencyLayer::new(store);
    let here = layer.layer(handler.clone());
    let owner = start(&there, post("k", "pay"));
    tokio::time::sleep(Duration::from_millis(10)).await;
    let waiter = start(&here, post("k", "pay"));
    assert_eq!(owner.await.unwrap().status(), 502);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((handler.runs(), handler.finished()), (1, 0));
    waiter.abort();
    assert!(waiter.await.unwrap_err().is_cancelled());
    layer.drain().wait().await;
    assert_eq!((handler.runs(), handler.finished()), (1, 1));
    assert!(send(&here, post("k", "pay")).await.is_replay());
}

/// The layer went on to wait for such a request after its caller had left. It counted the request
/// as an execution, so a shutdown waited for it, and ran it once the key was free.
#[tokio::test(start_paused = true)]
async fn a_request_whose_caller_leaves_while_it_claims_does_not_wait_for_an_owner_elsewhere() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(3))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let there = IdempotencyLayer::new(store.clone()).layer(failing);
    let handler = Handler::new();
    let layer = IdempotencyLayer::new(store);
    let here = layer.layer(handler.clone());
    let owner = start(&there, post("k", "pay"));
    tokio::time::sleep(Duration::from_millis(10)).await;
    let leaving = here.clone().oneshot(post("k", "pay"));
    assert!(poll_then_drop(1, leaving).await.is_none());
    let joined = start(&here, post("k", "pay more"));
    let drain = layer.drain();
    assert_eq!(drain.running(), 1, "the claim may have reached the store");
    let timely = tokio::time::timeout(Duration::from_secs(1), drain.wait()).await;
    timely.expect("the request does not wait for the owner");
    assert_eq!(joined.await.unwrap().code(), "key-reused");
    assert_eq!(owner.await.unwrap().status(), 502);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(handler.runs(), 0);
    assert_eq!(send(&here, post("k", "pay")).await.status(), 201);
}

/// A concurrency limit further out counts callers only. A client that sent requests and hung up
/// could start any number of executions.
#[tokio::test(start_paused = true)]
async fn executions_whose_callers_left_are_bounded() {
    const MOST: usize = 100;
    async fn check<St: Store + Clone>(store: St) {
        let handler = Handler::new().taking(Duration::from_secs(20));
        let layer = IdempotencyLayer::new(store.clone()).with_max_detached(MOST);
        let service = GlobalConcurrencyLimitLayer::new(1).layer(layer.layer(handler.clone()));
        assert_eq!(send(&service, post("before", "")).await.status(), 201);
        for n in 0..10 * MOST {
            let mut service = service.clone();
            let response = service.ready().await.unwrap().call(post(&n.to_string(), ""));
            drop(poll_then_drop(6, response).await);
        }
        assert_eq!(layer.drain().running(), MOST);
        assert_eq!(handler.runs(), MOST + 1);
        let refused = send(&service, post("new", "")).await;
        assert_eq!((refused.status(), refused.code()), (503, "overloaded"));
        assert!(refused.head.headers.contains_key("retry-after"));
        let key = layer.storage_key(None, "new").unwrap();
        assert_eq!(store.peek(&key).await.unwrap(), None, "a refused request claims no key");
        // A duplicate still gets a stored response or waits for one.
        assert!(send(&service, post("before", "")).await.is_replay());
        assert!(send(&service, post("0", "")).await.is_replay());
        layer.drain().wait().await;
        assert_eq!(send(&service, post("new", "")).await.status(), 201);
    }
    check(MemoryStore::new()).await;
    check(RemoteStore::new()).await;
}

#[test]
fn an_execution_whose_runtime_ends_loses_its_key_and_is_not_repeated() {
    let handler = Handler::new().taking(Duration::from_secs(3_600));
    let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone());
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };

    let first = runtime();
    let started = handler.clone();
    first.block_on(async {
        let mut service = service.clone();
        tokio::spawn(async move { service.ready().await.unwrap().call(post("k", "pay")).await });
        while started.runs() == 0 {
            tokio::task::yield_now().await;
        }
    });
    drop(first);

    let response = runtime().block_on(send(&service, post("k", "pay")));
    assert_eq!((response.status(), response.code()), (409, "outcome-unknown"));
    assert_eq!(handler.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_can_wait_for_executions_whose_callers_left() {
    let handler = Handler::new().taking(Duration::from_secs(2));
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let service = layer.layer(handler.clone());
    assert!(
        poll_then_drop(3, service.clone().oneshot(post("k", "pay")))
            .await
            .is_none()
    );
    let drain = layer.drain();
    assert_eq!((drain.running(), handler.finished()), (1, 0));
    drain.wait().await;
    assert_eq!((drain.running(), handler.finished()), (0, 1));
}

/// The renewal that gives up the lease of a dropped owner had no time limit.
#[tokio::test(start_paused = true)]
async fn a_shutdown_waits_only_for_a_while_if_the_store_never_replies_to_an_owner_that_gives_up() {
    let store = RemoteStore::new();
    store.fail("complete", [Fault::Panic]);
    store.fail("renew", [Fault::Hang]);
    let layer = IdempotencyLayer::new(store);
    let owner = start(&layer.layer(Handler::new()), post("k", "pay"));
    assert!(owner.await.unwrap_err().is_panic());
    let drain = layer.drain();
    assert_eq!(drain.running(), 1, "the lease is being given up");
    let timely = tokio::time::timeout(Duration::from_secs(60), drain.wait()).await;
    timely.expect("the store has a time limit");
}

#[test]
fn a_future_dropped_outside_of_its_runtime_is_detached_onto_that_runtime() {
    let store = RemoteStore::new();
    store.set_timers(true);
    let handler = Handler::new().taking(Duration::from_millis(50));
    let layer = IdempotencyLayer::new(store);
    let mut service = layer.layer(handler.clone());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let mut future = Box::pin(service.call(post("k", "pay")));
    while handler.runs() == 0 {
        runtime.block_on(async {
            assert!(futures::poll!(&mut future).is_pending());
            tokio::time::sleep(Duration::from_millis(1)).await;
        });
    }
    drop(future);
    runtime.block_on(layer.drain().wait());
    assert_eq!((handler.runs(), handler.finished()), (1, 1));
    assert!(runtime.block_on(send(&service, post("k", "pay"))).is_replay());
}

/// The layer handed the rest of the execution to the runtime of the first poll, which had ended.
#[test]
fn a_future_that_outlives_the_runtime_of_its_first_poll_is_detached_onto_that_of_its_last_poll() {
    let handler = Handler::new().yielding(20);
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let mut service = layer.layer(handler.clone());
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let (first, last) = (runtime(), runtime());
    let mut future = Box::pin(service.call(post("k", "pay")));
    for runtime in [&first, &last] {
        runtime.block_on(async { assert!(futures::poll!(&mut future).is_pending()) });
    }
    drop(first);
    drop(future);
    last.block_on(layer.drain().wait());
    assert_eq!((handler.runs(), handler.finished()), (1, 1));
    assert!(last.block_on(send(&service, post("k", "pay"))).is_replay());
}

#[test]
fn a_future_dropped_after_its_runtime_ended_does_not_panic() {
    let store = RemoteStore::new();
    store.set_timers(true);
    let handler = Handler::new().taking(Duration::from_secs(3_600));
    let mut service = IdempotencyLayer::new(store).layer(handler.clone());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut future = Box::pin(service.call(post("k", "pay")));
    while handler.runs() == 0 {
        runtime.block_on(async {
            assert!(futures::poll!(&mut future).is_pending());
            tokio::time::sleep(Duration::from_millis(1)).await;
        });
    }
    drop(runtime);
    drop(future);
}

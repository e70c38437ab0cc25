//! A caller may leave at any moment: nothing is stuck afterwards, nothing runs twice, nothing is left behind.

use std::time::Duration;

use http::StatusCode;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::{Layer, Service, ServiceExt};
use tower_idempotency::{IdempotencyLayer, MemoryStore, Store};

use crate::support::{frames, got, poll_then_drop, post, request, send, start, text, Handler, Play, RemoteStore};

/// Sends the first request and drops it after `polls` polls; then the same request must be answered, with one run in all.
/// Returns whether the first was answered before it could be dropped.
async fn leave_after<St: Store + Clone>(polls: usize, store: St, handler: Handler) -> bool {
    let layer = IdempotencyLayer::new(store).with_lease(Duration::from_secs(5));
    let service = layer.layer(handler.clone());
    let slow_body = || frames(vec![Play::Data("pay"), Play::Data(" 100")]);

    let first = service.clone().oneshot(request("k", slow_body()));
    let answered = match poll_then_drop(polls, first).await {
        Some(response) => Some(got(response.unwrap()).await),
        None => None,
    };
    let again = send(&service, request("k", slow_body())).await;
    assert_eq!(
        (again.status(), &again.body[..]),
        (201, &b"run 1"[..]),
        "after {polls} polls"
    );
    if let Some(answered) = &answered {
        assert!(!answered.is_replay() && again.is_replay());
        assert_eq!(answered.body, again.body);
    }
    let drain = layer.drain();
    tokio::time::timeout(Duration::from_secs(60), drain.wait())
        .await
        .expect("nothing runs for ever");
    assert_eq!((handler.runs(), handler.finished()), (1, 1), "after {polls} polls");
    assert!(send(&service, request("k", slow_body())).await.is_replay());
    answered.is_some()
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_at_any_await_point_leaves_nothing_stuck_in_memory() {
    let mut polls = 0;
    while !leave_after(polls, MemoryStore::new(), Handler::new().yielding(3)).await {
        polls += 1;
    }
    assert!(polls >= 7, "only {polls} await points were tried");
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_at_any_await_point_leaves_nothing_stuck_far_away() {
    let mut polls = 0;
    while !leave_after(polls, RemoteStore::new(), Handler::new().yielding(3)).await {
        polls += 1;
    }
    assert!(polls >= 11, "only {polls} await points were tried");
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_at_any_await_point_leaves_nothing_stuck_where_claims_are_decided_at_once() {
    let mut polls = 0;
    while !leave_after(polls, RemoteStore::deciding_at_once(), Handler::new().yielding(3)).await {
        polls += 1;
    }
    assert!(polls >= 9, "only {polls} await points were tried");
}

/// Callers of few keys, of whom each third leaves after a few polls.
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
        .expect("nothing runs for ever");
    assert_eq!((handler.runs(), handler.finished()), (KEYS, KEYS));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_key_runs_once_in_a_storm_of_callers_that_leave() {
    storm(MemoryStore::new()).await;
    storm(RemoteStore::deciding_at_once()).await;
    storm(RemoteStore::new()).await;
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_leaves_at_any_await_point_disturbs_nobody() {
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
        assert_eq!(layer.drain().running(), 0, "a waiter is not rescued");
        let owner = owner.await.unwrap();
        assert_eq!((owner.status(), owner.is_replay(), handler.runs()), (201, false, 1));
        assert!(send(&service, post("k", "pay")).await.is_replay());
    }
}

#[tokio::test(start_paused = true)]
async fn a_watcher_of_another_process_that_leaves_hands_over_to_those_who_joined_it() {
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

#[tokio::test(start_paused = true)]
async fn a_waiter_that_claims_again_and_leaves_runs_to_its_end() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(1))
        .answering(|_| text(StatusCode::BAD_GATEWAY, "failed"));
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

/// Such a request waited without its caller, was counted as an execution, held up a shutdown, and ran once the key was free.
#[tokio::test(start_paused = true)]
async fn a_request_whose_caller_leaves_while_it_claims_does_not_wait_for_an_owner_elsewhere() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(3))
        .answering(|_| text(StatusCode::BAD_GATEWAY, "failed"));
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
    assert_eq!(drain.running(), 1, "its claim may have arrived");
    let timely = tokio::time::timeout(Duration::from_secs(1), drain.wait()).await;
    timely.expect("nobody waits for it");
    assert_eq!(joined.await.unwrap().code(), "key-reused");
    assert_eq!(owner.await.unwrap().status(), 502);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(handler.runs(), 0);
    assert_eq!(send(&here, post("k", "pay")).await.status(), 201);
}

/// A limit further out counts callers. A client that sent requests and hung up could start any number of executions.
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
            let answer = service.ready().await.unwrap().call(post(&n.to_string(), ""));
            drop(poll_then_drop(6, answer).await);
        }
        assert_eq!(layer.drain().running(), MOST);
        assert_eq!(handler.runs(), MOST + 1);
        let refused = send(&service, post("new", "")).await;
        assert_eq!((refused.status(), refused.code()), (503, "overloaded"));
        assert!(refused.head.headers.contains_key("retry-after"));
        let key = layer.storage_key(None, "new").unwrap();
        assert_eq!(store.peek(&key).await.unwrap(), None, "nothing was claimed");
        // Duplicates still get a stored response, or wait for one.
        assert!(send(&service, post("before", "")).await.is_replay());
        assert!(send(&service, post("0", "")).await.is_replay());
        layer.drain().wait().await;
        assert_eq!(send(&service, post("new", "")).await.status(), 201);
    }
    check(MemoryStore::new()).await;
    check(RemoteStore::new()).await;
}

#[test]
fn an_execution_whose_runtime_ends_gives_its_key_up_and_is_not_run_again() {
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

    let answer = runtime().block_on(send(&service, post("k", "pay")));
    assert_eq!((answer.status(), answer.code()), (409, "outcome-unknown"));
    assert_eq!(handler.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_can_wait_for_executions_whose_callers_left() {
    let handler = Handler::new().taking(Duration::from_secs(2));
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let service = layer.layer(handler.clone());
    assert!(poll_then_drop(3, service.clone().oneshot(post("k", "pay")))
        .await
        .is_none());
    let drain = layer.drain();
    assert_eq!((drain.running(), handler.finished()), (1, 0));
    drain.wait().await;
    assert_eq!((drain.running(), handler.finished()), (0, 1));
}

#[test]
fn a_future_dropped_outside_of_its_runtime_is_rescued_on_it() {
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

/// The rest was handed to the runtime of the first poll, which had ended.
#[test]
fn a_future_that_outlives_the_runtime_of_its_first_poll_is_rescued_on_that_of_its_last() {
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
fn a_future_dropped_after_its_runtime_does_not_panic_whatever_its_store_needs() {
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

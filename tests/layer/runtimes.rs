//! One layer in several runtimes of one thread each, as in a server with a thread per core. Requests
//! with one key reach different runtimes, and a runtime blocks or ends while it owns a key.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::pending;
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use http::{Request, Response, StatusCode};
use tokio::runtime::{Builder, Runtime};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_idempotency::{IdempotencyLayer, Lease, MemoryStore, OnLost, Store};

use crate::support::{AnyBody, Got, Handler, RemoteStore, Timer, post, send, text};

const SECOND: Duration = Duration::from_secs(1);
const RUNTIMES: usize = 4;

fn one_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs `work` with the number of the runtime in each of several runtimes at once.
fn in_each_runtime<T: Send>(work: impl Fn(usize, &Runtime) -> T + Sync) -> Vec<T> {
    let barrier = Barrier::new(RUNTIMES);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..RUNTIMES)
            .map(|number| {
                let (work, barrier) = (&work, &barrier);
                scope.spawn(move || {
                    let runtime = one_thread();
                    barrier.wait();
                    work(number, &runtime)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn run_once<St: Store + Clone>(store: St) {
    const KEYS: usize = 300;
    let handler = Handler::new().yielding(3);
    let layer = IdempotencyLayer::new(store);
    let service = layer.layer(handler.clone());
    let of_all = in_each_runtime(|_, runtime| {
        runtime.block_on(async {
            let mut bodies = Vec::new();
            for key in 0..KEYS {
                let got = send(&service, post(&format!("key-{key}"), "pay")).await;
                assert_eq!(got.status(), 201, "{got:?}");
                bodies.push(got.body);
            }
            bodies
        })
    });
    assert!(of_all.iter().all(|bodies| *bodies == of_all[0]));
    assert_eq!(handler.runs(), KEYS);
    one_thread().block_on(layer.drain().wait());
}

#[test]
fn requests_of_one_key_in_many_runtimes_run_once() {
    run_once(MemoryStore::new());
    let store = RemoteStore::new();
    store.set_timers(true);
    run_once(store);
}

/// Starts the owner of the key `k` in a runtime of its own. The first attempt of the handler never
/// ends, and later ones succeed.
fn owned_by_another_runtime(
    on_lost: OnLost,
) -> (
    Runtime,
    impl Service<Request<AnyBody>, Response = Response<AnyBody>, Error = Infallible, Future: Send>
    + Clone
    + Send
    + Sync
    + 'static,
) {
    let layer = IdempotencyLayer::new(MemoryStore::new())
        .with_lease(SECOND)
        .on_lost(on_lost);
    let (begin, mut begun) = tokio::sync::mpsc::unbounded_channel();
    let service = layer.layer(service_fn(move |request: Request<AnyBody>| {
        let attempt = request.extensions().get::<Lease>().unwrap().attempt().number();
        let is_first = begin.send(()).is_ok() && attempt == 1;
        async move {
            if is_first {
                pending::<()>().await;
            }
            Ok::<_, Infallible>(text(StatusCode::CREATED, format!("attempt {attempt}")))
        }
    }));
    let owner = one_thread();
    owner.block_on(async {
        tokio::spawn(service.clone().oneshot(post("k", "pay")));
        begun.recv().await.unwrap();
    });
    (owner, service)
}

/// Waits for the key in several runtimes while the runtime of its owner ends. Returns the responses.
fn end_the_owner(on_lost: OnLost) -> Vec<Got> {
    let (owner, service) = owned_by_another_runtime(on_lost);
    let owner = Mutex::new(Some(owner));
    in_each_runtime(|number, runtime| {
        runtime.block_on(async {
            let timer = Timer::start();
            let waiting = crate::support::start(&service, post("k", "pay"));
            tokio::time::sleep(SECOND / 5).await;
            if number == 0 {
                assert!(!waiting.is_finished());
                owner.lock().unwrap().take().unwrap().shutdown_background();
            }
            let got = waiting.await.unwrap();
            assert!(timer.elapsed() < 10 * SECOND, "{:?}", timer.elapsed());
            got
        })
    })
}

/// A duplicate that waits in the process of the owner never runs the handler. So under
/// `OnLost::Execute`, its client gets 409 and must try again.
#[test]
fn waiters_in_other_runtimes_are_refused_when_the_runtime_of_the_owner_ends() {
    for got in end_the_owner(OnLost::Refuse) {
        assert_eq!((got.status(), got.code()), (409, "outcome-unknown"));
    }
    for got in end_the_owner(OnLost::Execute) {
        assert_eq!((got.status(), got.code()), (409, "request-outstanding"));
    }
    let (owner, service) = owned_by_another_runtime(OnLost::Execute);
    drop(owner);
    let next = one_thread().block_on(send(&service, post("k", "pay")));
    assert_eq!((next.status(), &next.body[..]), (201, &b"attempt 2"[..]));
}

/// A handler that blocks its thread stops its runtime. In the other runtimes, duplicates get 409
/// after their wait, and other keys run at once.
#[test]
fn a_blocked_runtime_delays_duplicates_no_longer_than_their_wait() {
    let (end, ended) = mpsc::channel::<()>();
    let ended = Mutex::new(ended);
    let layer = IdempotencyLayer::new(MemoryStore::new()).with_wait(SECOND / 2);
    let runs = Arc::new(Mutex::new(HashMap::<String, usize>::new()));
    let counted = Arc::clone(&runs);
    let (begin, begun) = mpsc::channel();
    let ended = Arc::new(ended);
    let service = layer.layer(service_fn(move |request: Request<AnyBody>| {
        let key = request.headers()["idempotency-key"].to_str().unwrap().to_owned();
        *counted.lock().unwrap().entry(key.clone()).or_default() += 1;
        if key == "k" {
            begin.send(()).unwrap();
            assert!(ended.lock().unwrap().recv().is_err(), "this blocks the thread");
        }
        async move { Ok::<_, Infallible>(text(StatusCode::CREATED, key)) }
    }));
    thread::scope(|scope| {
        let owner = scope.spawn(|| one_thread().block_on(send(&service, post("k", "pay"))));
        begun.recv().unwrap();
        one_thread().block_on(async {
            let timer = Timer::start();
            assert_eq!(send(&service, post("other", "pay")).await.status(), 201);
            assert!(timer.elapsed() < SECOND, "{:?}", timer.elapsed());
            let duplicate = send(&service, post("k", "pay")).await;
            assert_eq!((duplicate.status(), duplicate.code()), (409, "request-outstanding"));
            assert!(timer.elapsed() < 4 * SECOND, "{:?}", timer.elapsed());
            drop(end);
            assert_eq!(owner.join().unwrap().status(), 201);
            assert!(send(&service, post("k", "pay")).await.is_replay());
        });
    });
    assert_eq!(runs.lock().unwrap()["k"], 1);
}

/// Requests of other runtimes follow a request that watches an owner in another process. While the
/// runtime of that request was blocked, the layer refused the others, although the store had the
/// response.
#[test]
fn a_watcher_in_a_blocked_runtime_keeps_no_response_from_other_runtimes() {
    keeps_no_response_back(20);
}

/// The same, if that request waits for the reply to its claim.
#[test]
fn a_claim_in_a_blocked_runtime_keeps_no_response_from_other_runtimes() {
    keeps_no_response_back(1);
}

/// The same, if that request looks at the record once more after the other request began to follow it.
#[test]
fn a_watcher_that_is_blocked_after_a_look_keeps_no_response_from_its_followers() {
    let store = RemoteStore::new();
    let (owner, blocked, other) = (one_thread(), one_thread(), one_thread());
    let handler = Handler::new().taking(SECOND / 5);
    let there = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    let here = IdempotencyLayer::new(store.clone())
        .with_wait(2 * SECOND)
        .layer(handler.clone());
    let owned = owner.spawn(async move { send(&there, post("k", "pay")).await });
    owner.block_on(begun(&handler, 1));
    let mut watching = Box::pin(here.clone().oneshot(post("k", "pay")));
    blocked.block_on(async { assert!(tokio::time::timeout(SECOND / 10, &mut watching).await.is_err()) });
    let follower = other.spawn(async move { send(&here, post("k", "pay")).await });
    other.block_on(async { tokio::time::sleep(SECOND / 10).await });
    let looks = store.calls("peek");
    blocked.block_on(async { assert!(tokio::time::timeout(SECOND, &mut watching).await.is_err()) });
    assert!(store.calls("peek") > looks);
    assert_eq!(owner.block_on(owned).unwrap().status(), 201);
    let got = other.block_on(follower).unwrap();
    assert_eq!((got.status(), got.is_replay()), (201, true), "{got:?}");
    blocked.block_on(async { drop(watching) });
    assert_eq!(handler.runs(), 1);
}

/// The runtime of an owner is blocked, so another process takes its key over. The followers of the
/// blocked owner get the response of that process.
#[test]
fn an_owner_in_a_blocked_runtime_keeps_no_response_of_another_process_from_its_followers() {
    let store = RemoteStore::new();
    let (blocked, other) = (one_thread(), one_thread());
    let handler = Handler::new().taking(SECOND / 5);
    let layer = || {
        let layer = IdempotencyLayer::new(store.clone()).on_lost(OnLost::Execute);
        layer.with_lease(SECOND).with_wait(SECOND)
    };
    let (here, there) = (layer().layer(handler.clone()), layer().layer(handler.clone()));
    let owned = {
        let here = here.clone();
        blocked.spawn(async move { send(&here, post("k", "pay")).await })
    };
    blocked.block_on(begun(&handler, 1));
    other.block_on(async { tokio::time::sleep(SECOND).await });
    let taken_over = other.block_on(send(&there, post("k", "pay")));
    assert_eq!(
        (taken_over.status(), taken_over.is_replay()),
        (201, false),
        "{taken_over:?}"
    );
    let got = other.block_on(send(&here, post("k", "pay")));
    assert_eq!((got.status(), got.is_replay()), (201, true), "{got:?}");
    assert_eq!(blocked.block_on(owned).unwrap().body, taken_over.body);
    assert_eq!(handler.runs(), 2);
}

/// Waits until the handler has begun this number of runs.
async fn begun(handler: &Handler, runs: usize) {
    while handler.runs() < runs {
        tokio::task::yield_now().await;
    }
}

/// Polls a request `polls` times, then stops its runtime. Another runtime must return the stored
/// response.
fn keeps_no_response_back(polls: usize) {
    let store = RemoteStore::new();
    let (owner, blocked, other) = (one_thread(), one_thread(), one_thread());
    let handler = Handler::new().taking(SECOND / 5);
    let there = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    let here = IdempotencyLayer::new(store).with_wait(SECOND).layer(handler.clone());
    let owned = owner.spawn(async move { send(&there, post("k", "pay")).await });
    owner.block_on(begun(&handler, 1));
    let mut watching = Box::pin(here.clone().oneshot(post("k", "pay")));
    blocked.block_on(async {
        for _ in 0..polls {
            assert!(futures::poll!(&mut watching).is_pending());
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(owner.block_on(owned).unwrap().status(), 201);
    let got = other.block_on(send(&here, post("k", "pay")));
    assert_eq!((got.status(), got.is_replay()), (201, true), "{got:?}");
    blocked.block_on(async { drop(watching) });
    assert_eq!(handler.runs(), 1);
}

//! Owners of a call that were superseded, keep their runtime busy, or have lost their caller.

use std::convert::Infallible;
use std::future::{Ready, pending, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::sync::Notify;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::Recovered;
use tower_idempotency::client::{Done, Failure, OnceError, OnceLayer, ProviderProfile, once};
use tower_idempotency::protocol::{Resolution, ResolveResult, Status};
use tower_idempotency::receiver::{Receipt, ReceiverLayer};
use tower_idempotency::{Drain, ErrorKind, IdempotencyLayer, MemoryStore, OnError, Store};

use crate::support;
use crate::support::{Fault, RemoteStore, Timer};

type Ended = Result<Done<usize>, OnceError<usize, String>>;

const LEASE: Duration = Duration::from_secs(30);

/// Runs an attempt that cannot renew its lease and that ends when it is notified.
fn stalled(
    store: &RemoteStore,
    input: &'static str,
    end: Result<usize, Failure<String>>,
) -> (Arc<Notify>, tokio::task::JoinHandle<Ended>) {
    store.fail("renew", [Fault::Before; 1_000]);
    let go_on = Arc::new(Notify::new());
    let gate = Arc::clone(&go_on);
    let call = once(store.clone(), "k").with_input(input).at_least_once();
    let running = tokio::spawn(call.run(move |_| async move {
        gate.notified().await;
        end
    }));
    (go_on, running)
}

#[tokio::test(start_paused = true)]
async fn a_superseded_owner_whose_call_fails_returns_the_value_that_the_key_holds() {
    let store = RemoteStore::new();
    let (go_on, first) = stalled(&store, "one", Err(Failure::NotDone("refused".to_owned())));
    tokio::time::sleep(LEASE * 2).await;
    let second: Ended = once(store.clone(), "k")
        .with_input("one")
        .at_least_once()
        .run(|_| ready(Ok(2)))
        .await;
    assert_eq!(second.unwrap().into_value(), 2);
    go_on.notify_one();
    // A superseded owner drops its own result and returns the value that the key holds.
    let first = first.await.unwrap();
    assert!(matches!(&first, Ok(done) if *done.value() == 2), "{first:?}");
}

#[tokio::test(start_paused = true)]
async fn a_superseded_owner_never_gets_the_value_for_another_input() {
    let store = RemoteStore::new();
    let (go_on, first) = stalled(&store, "one", Ok(1));
    tokio::time::sleep(LEASE * 2).await;
    let (key, _) = store.only();
    let fence = store.peek(&key).await.unwrap().unwrap().fence;
    store.resolve(&key, fence, &Resolution::Absent).await.unwrap();
    let second: Ended = once(store.clone(), "k").with_input("two").run(|_| ready(Ok(2))).await;
    assert_eq!(second.unwrap().into_value(), 2);
    go_on.notify_one();
    let first = first.await.unwrap();
    assert!(!matches!(&first, Ok(done) if *done.value() == 2), "I4: {first:?}");
}

/// The call ran, so its caller must not take it for a call that was not made.
#[tokio::test(start_paused = true)]
async fn a_superseded_owner_that_cannot_read_the_outcome_may_have_happened() {
    for is_removed in [false, true] {
        let store = RemoteStore::new();
        let (go_on, first) = stalled(&store, "one", Ok(1));
        tokio::time::sleep(LEASE * 2).await;
        if is_removed {
            let (key, _) = store.only();
            let fence = store.peek(&key).await.unwrap().unwrap().fence;
            store.resolve(&key, fence, &Resolution::Absent).await.unwrap();
        } else {
            let second = once(store.clone(), "k").with_input("one").at_least_once();
            let second: Ended = second.run(|_| ready(Ok(2))).await;
            assert_eq!(second.unwrap().into_value(), 2);
            store.fail("peek", [Fault::Before; 1_000]);
        }
        go_on.notify_one();
        let error = first.await.unwrap().unwrap_err();
        assert!(
            matches!(error, OnceError::Unknown(None)) && error.may_have_happened(),
            "{is_removed}: {error:?}"
        );
    }
}

/// The store treated the late owner's completion as a repeat. So the owner's caller got a different
/// value from all later calls.
#[tokio::test(start_paused = true)]
async fn an_owner_that_comes_back_after_a_resolution_returns_the_value_that_stands() {
    let (store, elsewhere) = (RemoteStore::new(), RemoteStore::new());
    let (go_on, first) = stalled(&store, "one", Ok(1));
    tokio::time::sleep(LEASE * 2).await;
    let found: Ended = once(elsewhere.clone(), "k")
        .with_input("one")
        .run(|_| ready(Ok(2)))
        .await;
    assert_eq!(found.unwrap().into_value(), 2);
    let (key, _) = elsewhere.only();
    let Status::Completed(outcome) = elsewhere.peek(&key).await.unwrap().unwrap().status else {
        panic!("the value was not stored");
    };
    let fence = store.peek(&key).await.unwrap().unwrap().fence;
    let resolution = Resolution::Completed(outcome, LEASE * 100);
    assert_eq!(
        store.resolve(&key, fence, &resolution).await.unwrap(),
        ResolveResult::Resolved
    );
    go_on.notify_one();
    assert_eq!(first.await.unwrap().unwrap().into_value(), 2);
    let again: Ended = once(store.clone(), "k").with_input("one").run(|_| ready(Ok(3))).await;
    assert_eq!(again.unwrap().into_value(), 2);
}

#[tokio::test(start_paused = true)]
async fn one_renewal_that_hangs_does_not_lose_a_short_lease() {
    let store = RemoteStore::new();
    let runs = Arc::new(AtomicUsize::new(0));
    let call = |time| {
        let runs = Arc::clone(&runs);
        let call = once(store.clone(), "k")
            .with_lease(Duration::from_secs(5))
            .with_wait(Duration::ZERO)
            .at_least_once();
        call.run(move |_| async move {
            runs.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(time).await;
            Ok::<_, Failure<String>>(0)
        })
    };
    store.fail("renew", [Fault::Hang]);
    let first = tokio::spawn(call(Duration::from_secs(20)));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let second = call(Duration::ZERO).await;
    assert!(matches!(second, Err(OnceError::InFlight { .. })), "{second:?}");
    assert!(first.await.unwrap().is_ok());
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

/// A job that may not wait gave the store half a second to return the outcome, and then reported
/// that another call is in flight.
#[tokio::test(start_paused = true)]
async fn a_superseded_owner_that_may_not_wait_reads_a_slow_record() {
    let store = RemoteStore::new();
    store.fail("renew", [Fault::Before; 1_000]);
    let go_on = Arc::new(Notify::new());
    let gate = Arc::clone(&go_on);
    let call = once(store.clone(), "k").at_least_once().with_wait(Duration::ZERO);
    let first = tokio::spawn(call.run(move |_| async move {
        gate.notified().await;
        Ok::<_, Failure<String>>(1)
    }));
    tokio::time::sleep(LEASE * 2).await;
    let second: Ended = once(store.clone(), "k").at_least_once().run(|_| ready(Ok(2))).await;
    assert_eq!(second.unwrap().into_value(), 2);
    store.fail("peek", [Fault::Slow(2)]);
    go_on.notify_one();
    let first = first.await.unwrap();
    assert!(matches!(&first, Ok(done) if *done.value() == 2), "{first:?}");
}

/// The superseded owner waited until the deadline of its own claim, which had passed long before.
#[tokio::test(start_paused = true)]
async fn a_superseded_owner_waits_for_the_winner_after_its_own_lease_has_ended() {
    let store = RemoteStore::new();
    let (go_on, first) = stalled(&store, "one", Ok(1));
    tokio::time::sleep(LEASE * 2).await;
    let second = once(store.clone(), "k")
        .with_input("one")
        .at_least_once()
        .run(|_| async {
            tokio::time::sleep(LEASE / 2).await;
            Ok::<_, Failure<String>>(2)
        });
    let second = tokio::spawn(second);
    tokio::time::sleep(Duration::from_secs(1)).await;
    go_on.notify_one();
    let first = first.await.unwrap();
    assert!(matches!(&first, Ok(done) if *done.value() == 2), "{first:?}");
    assert!(second.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_or_hangs_does_not_prolong_a_wait_for_another_call() {
    for fault in [Fault::Before, Fault::Hang] {
        let store = RemoteStore::new();
        let first = tokio::spawn(once(store.clone(), "k").run(|_| pending::<Result<usize, Failure<String>>>()));
        tokio::time::sleep(Duration::from_millis(100)).await;
        let begin = Timer::start();
        let second = tokio::spawn(
            once(store.clone(), "k")
                .with_wait(Duration::from_secs(1))
                .with_store_timeout(Duration::from_secs(20))
                .with_completion_timeout(Duration::from_secs(20))
                .run(|_| ready(Ok::<_, Failure<String>>(2))),
        );
        support::yield_times(10).await;
        store.fail("claim", [fault]);
        store.fail("claim", [Fault::Hang; 100]);
        // The store failed only because the wait was over, so the error is that of another call in flight.
        let second = second.await.unwrap();
        assert!(
            second.is_err_and(|error| matches!(error, OnceError::InFlight { .. })),
            "{fault:?}"
        );
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
        first.abort();
    }
}

/// The renewal task sleeps while its runtime is busy. The runtime polls the owner, which finds its
/// renewal overdue.
#[test]
fn a_call_that_keeps_its_runtime_busy_renews_its_lease_itself() {
    let store = RemoteStore::new();
    store.set_yields(0);
    let call = |wait| {
        let call = once(store.clone(), "k")
            .with_lease(Duration::from_secs(1))
            .at_least_once();
        call.with_wait(wait)
    };
    let busy = call(Duration::ZERO).run(|_| async {
        let mut polls = 0;
        std::future::poll_fn(|cx| {
            polls += 1;
            std::thread::sleep(Duration::from_millis(100));
            cx.waker().wake_by_ref();
            if polls < 30 {
                std::task::Poll::Pending
            } else {
                std::task::Poll::Ready(())
            }
        })
        .await;
        Ok::<_, Failure<String>>(1)
    });
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let first = std::thread::spawn(move || runtime().block_on(async { tokio::spawn(busy).await.unwrap() }));
    std::thread::sleep(Duration::from_secs(2));
    let second: Ended = runtime().block_on(call(Duration::ZERO).run(|_| ready(Ok(2))));
    assert!(matches!(second, Err(OnceError::InFlight { .. })), "{second:?}");
    assert_eq!(first.join().unwrap().unwrap().into_value(), 1);
}

#[tokio::test(start_paused = true)]
async fn calls_whose_callers_left_are_bounded() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let http = service_fn(move |_: Request<Full<Bytes>>| {
        counted.fetch_add(1, Ordering::SeqCst);
        async {
            tokio::time::sleep(Duration::from_secs(10)).await;
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("paid")))
        }
    });
    let layer = OnceLayer::new(MemoryStore::new(), ProviderProfile::draft()).with_max_detached(3);
    let client = layer.layer(http);
    let call = |n: usize| {
        let request = Request::post("https://bank.example/pay").header("idempotency-key", n.to_string());
        client
            .clone()
            .oneshot(request.body(Full::<Bytes>::from("100")).unwrap())
    };
    for n in 0..10 {
        assert!(tokio::time::timeout(Duration::from_millis(10), call(n)).await.is_err() || n >= 3);
    }
    assert_eq!((runs.load(Ordering::SeqCst), layer.drain().running()), (3, 3));
    let refused = call(10).await.unwrap_err();
    assert!(matches!(refused, OnceError::NotRun(error) if error.kind() == ErrorKind::Overloaded));
    layer.drain().wait().await;
    assert!(call(10).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn calls_by_value_whose_callers_left_are_bounded() {
    let (store, drain) = (MemoryStore::new(), Drain::default());
    let call = |n: usize| {
        let call = once(store.clone(), n.to_string())
            .with_drain(&drain)
            .with_max_detached(3);
        call.run(|_| async {
            tokio::time::sleep(Duration::from_secs(10)).await;
            Ok::<_, Failure<Infallible>>(1)
        })
    };
    for n in 0..10 {
        assert!(tokio::time::timeout(Duration::from_millis(10), call(n)).await.is_err() || n >= 3);
    }
    assert_eq!(drain.running(), 3);
    let refused = call(10).await.unwrap_err();
    assert!(matches!(refused, OnceError::NotRun(error) if error.kind() == ErrorKind::Overloaded));
    drain.wait().await;
    assert!(call(10).await.is_ok());
}

/// The job waited for the outcome of the other attempt for its whole wait, although its caller had
/// left.
#[tokio::test(start_paused = true)]
async fn a_superseded_job_waits_for_no_outcome_once_its_caller_has_left() {
    for (leaves_during_the_run, hangs) in [(true, false), (false, false), (true, true), (false, true)] {
        let (store, drain, go_on) = (RemoteStore::new(), Drain::default(), Arc::new(Notify::new()));
        store.fail("renew", [Fault::Before; 1_000]);
        let gate = Arc::clone(&go_on);
        let call = once(store.clone(), "k").at_least_once().with_drain(&drain);
        let first = tokio::spawn(call.run(move |_| async move {
            gate.notified().await;
            Ok::<_, Failure<Infallible>>(1)
        }));
        tokio::time::sleep(LEASE * 2).await;
        let second = once(store.clone(), "k").at_least_once();
        let second = tokio::spawn(second.run(|_| async {
            tokio::time::sleep(LEASE * 100).await;
            Ok::<_, Failure<Infallible>>(2)
        }));
        tokio::time::sleep(Duration::from_millis(10)).await;
        store.heal();
        if hangs {
            store.fail("peek", [Fault::Hang; 10]);
        }
        if leaves_during_the_run {
            first.abort();
        }
        go_on.notify_one();
        tokio::time::sleep(Duration::from_millis(10)).await;
        first.abort();
        let left = Timer::start();
        drop(first.await);
        drain.wait().await;
        assert!(left.elapsed() < Duration::from_secs(1), "{:?}", left.elapsed());
        second.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_detached_limit_of_zero_counts_as_one() {
    let once: Ended = once(MemoryStore::new(), "k")
        .with_max_detached(0)
        .run(|_| ready(Ok(1)))
        .await;
    assert_eq!(once.unwrap().into_value(), 1);

    let http = service_fn(|_: Request<Full<Bytes>>| ready(Ok::<_, Infallible>(Response::new(Full::from("paid")))));
    let client = OnceLayer::new(MemoryStore::new(), ProviderProfile::draft()).with_max_detached(0);
    let request = Request::post("https://bank.example/pay").header("idempotency-key", "k");
    let response = client
        .layer(http)
        .oneshot(request.body(Full::<Bytes>::from("100")).unwrap())
        .await;
    assert_eq!(response.unwrap().status(), 200);

    let receiver = ReceiverLayer::new(MemoryStore::new(), "c")
        .with_id(|id: &u64| *id)
        .with_max_detached(0);
    let receiver = receiver.layer(service_fn(|_: u64| ready(Ok::<_, Infallible>(()))));
    assert!(matches!(receiver.oneshot(1).await, Ok(Receipt::First(()))));

    let handler = support::Handler::new();
    let server = IdempotencyLayer::new(MemoryStore::new())
        .with_max_detached(0)
        .layer(handler.clone());
    assert_eq!(support::send(&server, support::post("k", "pay")).await.status(), 201);
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_caller_leaves_during_the_check_does_not_begin() {
    let store = RemoteStore::new();
    let lost: Ended = once(store.clone(), "k")
        .run(|_| ready(Err(Failure::Unknown("reset".to_owned()))))
        .await;
    assert!(lost.is_err());
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let again = once(store.clone(), "k").run_or_recover(
        |_| async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            Recovered::NotHappened
        },
        move |_| async move {
            counted.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Failure<String>>(1_usize)
        },
    );
    assert!(tokio::time::timeout(Duration::from_secs(1), again).await.is_err());
    tokio::time::sleep(Duration::from_secs(10)).await;
    // If the caller drops a call before it began, the call does not begin.
    assert_eq!(runs.load(Ordering::SeqCst), 0);
    // The key is free for the next caller, and the lease is not left to expire.
    assert_eq!(store.calls("release"), 1);
    let timer = Timer::start();
    let next: Ended = once(store, "k")
        .run_or_recover(|_| ready(Recovered::NotHappened), |_| ready(Ok(2)))
        .await;
    assert_eq!((*next.unwrap().value(), timer.elapsed()), (2, Duration::ZERO));
}

#[tokio::test]
async fn a_check_that_panics_before_it_returns_a_future_counts_as_undecided() {
    #[expect(clippy::panic, reason = "the test needs a check that panics")]
    fn panics() -> Ready<Recovered<()>> {
        panic!("the check is broken")
    }
    let store = RemoteStore::new();
    let layer = ReceiverLayer::new(store.clone(), "c")
        .with_id(|id: &u64| *id)
        .on_error(OnError::Unknown);
    let failing = layer.clone().layer(service_fn(|_: u64| ready(Err::<(), _>("no"))));
    assert!(failing.oneshot(7).await.is_err());
    let receiver = layer
        .with_recovery(|_, _| panics())
        .layer(service_fn(|_: u64| ready(Ok::<_, &str>(()))));
    let received = tokio::spawn(receiver.oneshot(7)).await;
    assert!(
        matches!(received, Ok(Ok(Receipt::InFlight { .. }))),
        "a panic of the check must not end the task of the consumer: {received:?}"
    );
}

#[tokio::test]
async fn a_memory_store_reports_the_remaining_lease_of_a_call_in_flight() {
    let store = MemoryStore::new();
    let first = tokio::spawn(once(store.clone(), "k").run(|_| pending::<Result<usize, Failure<String>>>()));
    tokio::task::yield_now().await;
    let second: Ended = once(store, "k").with_wait(Duration::ZERO).run(|_| ready(Ok(2))).await;
    first.abort();
    assert!(
        matches!(second, Err(OnceError::InFlight { left }) if left <= LEASE),
        "{second:?}"
    );
}

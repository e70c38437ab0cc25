//! Messages while the store, the check or the handler fails.

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::Recovered;
use tower_idempotency::protocol::{Claim, Fingerprint, IfLost, Nonce};
use tower_idempotency::receiver::{Disposition, Receipt, ReceiveError, ReceiverLayer, receive_all};
use tower_idempotency::{MemoryStore, OnError, Store};

use super::kit::{Message, layer, message, zombie};
use crate::support::late::LateStore;
use crate::support::{Fault, RemoteStore, Timer};

#[tokio::test(start_paused = true)]
async fn a_store_that_cannot_be_read_rejects_no_message() {
    let store = RemoteStore::new();
    let received = zombie(&store, Ok(()), || store.fail("peek", [Fault::Before])).await;
    assert!(matches!(received, Err(ReceiveError::Unrecorded(_))), "{received:?}");
    assert_eq!(Disposition::of(&received), Disposition::Redeliver(None));
}

#[tokio::test(start_paused = true)]
async fn a_check_without_a_result_is_repeated_until_the_attempts_are_used_up() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let layer = layer(RemoteStore::new())
        .on_error(OnError::Unknown)
        .with_max_attempts(4)
        .with_recovery(move |_, _| {
            counted.fetch_add(1, Ordering::SeqCst);
            ready(Recovered::Unknown)
        });
    let receiver = layer.layer(service_fn(|_: Message| ready(Err::<(), _>("reset"))));
    assert!(receiver.clone().oneshot(message("m", "")).await.is_err());
    let mut dispositions = Vec::new();
    for _ in 0..4 {
        dispositions.push(Disposition::of(&receiver.clone().oneshot(message("m", "")).await));
    }
    let again = Disposition::Redeliver(Some(Duration::from_secs(30)));
    assert_eq!(dispositions, [again, again, Disposition::Reject, Disposition::Reject]);
    assert_eq!(asked.load(Ordering::SeqCst), 3);
}

/// The result of a handler's failure and of a lost attempt, for every setting.
#[tokio::test(start_paused = true)]
async fn a_failed_handler_affects_its_message_as_configured() {
    type Set = fn(ReceiverLayer<RemoteStore, Message>) -> ReceiverLayer<RemoteStore, Message>;
    let refuse: Set = |layer| layer;
    let execute: Set = ReceiverLayer::at_least_once;
    let ask: Set = |layer| layer.with_recovery(|_, _| ready(Recovered::NotHappened));
    let found: Set = |layer| layer.with_recovery(|_, _| ready(Recovered::Happened(())));
    for (on_error, set, runs, second) in [
        (OnError::Release, refuse, 2, "First"),
        (OnError::Release, execute, 2, "First"),
        (OnError::Release, ask, 2, "First"),
        (OnError::Release, found, 2, "First"),
        (OnError::Store, refuse, 1, "Duplicate"),
        (OnError::Store, execute, 1, "Duplicate"),
        (OnError::Store, ask, 1, "Duplicate"),
        (OnError::Store, found, 1, "Duplicate"),
        (OnError::Unknown, refuse, 1, "Unknown"),
        (OnError::Unknown, execute, 2, "First"),
        (OnError::Unknown, ask, 2, "First"),
        (OnError::Unknown, found, 1, "Duplicate"),
    ] {
        for panics in [false, true] {
            let counted = Arc::new(AtomicUsize::new(0));
            let run = Arc::clone(&counted);
            let layer = set(layer(RemoteStore::new()).on_error(on_error));
            let receiver = layer.layer(service_fn(move |_: Message| {
                let first = run.fetch_add(1, Ordering::SeqCst) == 0;
                assert!(!(first && panics), "the handler panics");
                ready(if first { Err("no") } else { Ok(()) })
            }));
            let case = format!("{on_error:?}, {second}, panics: {panics}");
            assert!(receiver.clone().oneshot(message("m", "")).await.is_err(), "{case}");
            let again = receiver.oneshot(message("m", "")).await.unwrap();
            assert!(format!("{again:?}").starts_with(second), "{case}: {again:?}");
            assert_eq!(counted.load(Ordering::SeqCst), runs, "{case}");
        }
    }
}

/// The handler failed while the store was down for a minute. The receiver tries to record the
/// failure for ten seconds.
#[tokio::test(start_paused = true)]
async fn a_message_whose_handler_failed_while_the_store_was_down_is_handled_again() {
    let store = RemoteStore::new();
    let runs = Arc::new(AtomicUsize::new(0));
    let (counted, down) = (Arc::clone(&runs), store.clone());
    let layer = ReceiverLayer::new(store.clone(), "c").with_id(|id: &u64| *id);
    let drain = layer.drain();
    let receiver = layer.layer(service_fn(move |_: u64| {
        let is_first = counted.fetch_add(1, Ordering::SeqCst) == 0;
        if is_first {
            go_down(&down);
        }
        ready(if is_first { Err("the database is down") } else { Ok(()) })
    }));
    let first = receiver.clone().oneshot(7).await;
    assert_eq!(Disposition::of(&first), Disposition::Redeliver(None), "{first:?}");
    tokio::time::sleep(Duration::from_secs(60)).await;
    store.heal();
    tokio::time::sleep(Duration::from_secs(60)).await;
    drain.wait().await;
    let again = receiver.oneshot(7).await;
    assert!(matches!(again, Ok(Receipt::First(()))), "{again:?}");
}

fn go_down(store: &RemoteStore) {
    for operation in ["claim", "renew", "release", "complete", "peek", "watch"] {
        store.fail(operation, [Fault::Before; 10_000]);
    }
}

/// A message was handled, but the store was down for a minute. The message then stayed unknown
/// forever.
#[tokio::test(start_paused = true)]
async fn a_message_that_was_handled_while_the_store_was_down_is_a_duplicate_when_it_is_back() {
    let store = RemoteStore::new();
    let down = store.clone();
    let layer = ReceiverLayer::new(store.clone(), "c").with_id(|id: &u64| *id);
    let drain = layer.drain();
    let receiver = layer.layer(service_fn(move |_: u64| {
        go_down(&down);
        ready(Ok::<_, Infallible>(()))
    }));
    let first = receiver.clone().oneshot(7).await;
    assert!(matches!(first, Err(ReceiveError::Unrecorded(_))), "{first:?}");
    tokio::time::sleep(Duration::from_secs(60)).await;
    store.heal();
    drain.wait().await;
    let again = receiver.oneshot(7).await;
    assert!(matches!(again, Ok(Receipt::Duplicate)), "{again:?}");
}

/// A failover: the claim was written, its reply was lost, and the store came back half a minute
/// later. No handler ran.
#[tokio::test(start_paused = true)]
async fn a_message_that_never_ran_is_not_unknown_because_the_store_was_unreachable() {
    let store = RemoteStore::new();
    let layer = ReceiverLayer::new(store.clone(), "c").with_id(|id: &u64| *id);
    let drain = layer.drain();
    let receiver = layer.layer(service_fn(|_: u64| ready(Ok::<_, Infallible>(()))));
    store.fail("claim", [Fault::After]);
    store.fail("claim", [Fault::Before; 1_000]);
    store.fail("peek", [Fault::Before; 1_000]);
    let first = receiver.clone().oneshot(7).await;
    assert!(matches!(first, Err(ReceiveError::Store(_))), "{first:?}");
    tokio::time::sleep(Duration::from_secs(30)).await;
    store.heal();
    tokio::time::sleep(Duration::from_secs(60)).await;
    drain.wait().await;
    let again = receiver.oneshot(7).await;
    assert!(
        matches!(again, Ok(Receipt::First(()))),
        "no handler ever ran: {again:?}"
    );
}

#[tokio::test]
async fn a_panic_of_poll_ready_affects_only_its_message() {
    #[derive(Clone)]
    struct Panics;
    impl tower::Service<u64> for Panics {
        type Response = ();
        type Error = &'static str;
        type Future = std::future::Ready<Result<(), &'static str>>;
        fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), &'static str>> {
            panic!("planned")
        }
        fn call(&mut self, _: u64) -> Self::Future {
            ready(Ok(()))
        }
    }
    let receiver = ReceiverLayer::new(MemoryStore::new(), "c")
        .with_id(|id: &u64| *id)
        .layer(Panics);
    let batch = receive_all(&receiver, [1, 2], 2).await;
    assert_eq!(batch.failed().collect::<Vec<_>>(), [0, 1]);
}

/// A process died with the message, and the store was unreachable for a minute with six deliveries
/// of the message. Each claim that the receiver released in the background took the lost attempt
/// over.
#[tokio::test(start_paused = true)]
async fn late_releases_use_up_no_attempts() {
    let store = RemoteStore::new();
    let layer = ReceiverLayer::new(store.clone(), "c")
        .with_id(|id: &u64| *id)
        .at_least_once();
    let claim = Claim {
        key: layer.storage_key(7_u64).unwrap(),
        fingerprint: Fingerprint::NONE,
        nonce: Nonce::random(),
        lease: Duration::from_secs(30),
        retention: Duration::from_secs(7 * 86_400),
        if_lost: IfLost::Execute,
        max_attempts: 5,
    };
    drop(store.claim(&claim).await.unwrap());
    let drain = layer.drain();
    let receiver = layer.layer(service_fn(|_: u64| ready(Ok::<_, Infallible>(()))));
    go_down(&store);
    for _ in 0..6 {
        assert!(receiver.clone().oneshot(7).await.is_err());
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    tokio::time::sleep(Duration::from_secs(20)).await;
    store.heal();
    drain.wait().await;
    let again = receiver.oneshot(7).await;
    assert!(matches!(again, Ok(Receipt::First(()))), "{again:?}");
}

#[tokio::test]
async fn a_panic_before_the_handler_began_leaves_the_message_free() {
    #[expect(clippy::panic, reason = "the application may panic")]
    fn panics() {
        panic!("a panic of the application")
    }
    let receiver = ReceiverLayer::new(MemoryStore::new(), "c")
        .with_id(|id: &u64| *id)
        .pass_lease(|_, _| panics())
        .layer(service_fn(|_: u64| ready(Ok::<_, &str>(()))));
    let first = receiver.clone().oneshot(7).await;
    let again = receiver.oneshot(7).await;
    assert!(
        matches!(again, Err(ReceiveError::Panicked)),
        "no handler ran, but: {first:?}, {again:?}"
    );
}

/// Every reply of the store comes after its timeout, for five minutes.
#[tokio::test(start_paused = true)]
async fn a_store_that_is_late_delays_messages_and_repeats_none() {
    const SECOND: Duration = Duration::from_secs(1);
    let (store, handled) = (LateStore::default(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&handled);
    let layer = ReceiverLayer::new(store.clone(), "billing")
        .with_id(|id: &usize| id.to_string())
        .at_least_once();
    let drain = layer.drain();
    let receiver = layer.layer(service_fn(move |_: usize| {
        counted.fetch_add(1, Ordering::SeqCst);
        ready(Ok::<_, Infallible>(()))
    }));
    store.set_late(true);
    let mut deliveries = Vec::new();
    for _ in 0..300 {
        for _ in 0..10 {
            let (receiver, timer) = (receiver.clone(), Timer::start());
            let delivery = receiver.oneshot(deliveries.len());
            deliveries.push(tokio::spawn(async move { (delivery.await, timer.elapsed()) }));
        }
        tokio::time::sleep(SECOND).await;
        // 1,024 claims to release, and the claims that are being made.
        assert!(drain.running() <= 1_024 + 10 * 11, "{}", drain.running());
    }
    let ids = 0..deliveries.len();
    for delivery in deliveries {
        let (received, time) = delivery.await.unwrap();
        assert_eq!(Disposition::of(&received), Disposition::Redeliver(None), "{received:?}");
        assert!(time <= 11 * SECOND, "{time:?}");
    }
    store.set_late(false);
    drain.wait().await;
    // The lease of a claim that could not be released.
    tokio::time::sleep(30 * SECOND).await;
    for id in ids.clone() {
        let received = receiver.clone().oneshot(id).await;
        assert!(matches!(received, Ok(Receipt::First(()))), "{received:?}");
    }
    assert_eq!((handled.load(Ordering::SeqCst), drain.running()), (ids.len(), 0));
}

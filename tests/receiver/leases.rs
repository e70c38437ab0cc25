//! Leases of messages: renewals, superseded owners, deliveries that were dropped.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::receiver::{Disposition, OnMissingId, Receipt, ReceiveError, ReceiverLayer, receive_all};
use tower_idempotency::{ErrorKind, MemoryStore};

use super::kit::{Message, layer, message, zombie};
use crate::support::RemoteStore;

#[tokio::test(start_paused = true)]
async fn a_zombie_does_not_reject_a_message_that_may_be_handled_again() {
    let store = RemoteStore::new();
    let received = zombie(&store, Err("not now"), || {}).await;
    assert_eq!(
        Disposition::of(&received),
        Disposition::Redeliver(Some(Duration::ZERO)),
        "{received:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_waits_for_deliveries_that_were_aborted_a_moment_ago() {
    for unprotected in [false, true] {
        let effects = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&effects);
        let layer = layer(RemoteStore::new()).on_missing_id(OnMissingId::Unprotected);
        let receiver = layer.clone().layer(service_fn(move |_: Message| {
            let effects = Arc::clone(&counted);
            async move {
                tokio::time::sleep(Duration::from_secs(5)).await;
                effects.fetch_add(1, Ordering::SeqCst);
                Ok::<_, Infallible>(())
            }
        }));
        let id = if unprotected { "" } else { "m" };
        let delivery = tokio::spawn(receiver.oneshot(message(id, "")));
        tokio::time::sleep(Duration::from_secs(1)).await;
        delivery.abort();
        layer.drain().wait().await;
        assert_eq!(effects.load(Ordering::SeqCst), 1, "unprotected: {unprotected}");
    }
}

#[tokio::test]
async fn a_panic_within_a_batch_affects_only_its_message() {
    type Handling = BoxFuture<'static, Result<(), &'static str>>;
    for at_once in [1, 2, 5] {
        let handler = service_fn(|message: Message| -> Handling {
            assert!(message.id != "at once", "the handler panics");
            async move {
                assert!(message.id != "later", "the handler panics");
                if message.id == "fails" {
                    return Err("no");
                }
                Ok(())
            }
            .boxed()
        });
        let receiver = layer(MemoryStore::new()).layer(handler);
        let batch = ["a", "at once", "later", "fails", "", "b"].map(|id| message(id, ""));
        let received = receive_all(&receiver, batch, at_once).await;
        let dispositions: Vec<_> = received.dispositions().collect();
        let again = Disposition::Redeliver(None);
        let done = Disposition::Acknowledge;
        assert_eq!(
            dispositions,
            [done, again, again, again, Disposition::Reject, done],
            "{at_once}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_blocks_its_thread_keeps_its_message() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let store = RemoteStore::new();
    let receiver = ReceiverLayer::new(store.clone(), "c")
        .with_id(|id: &u64| *id)
        .with_lease(Duration::from_secs(2))
        .layer(service_fn(move |_: u64| {
            let counted = Arc::clone(&counted);
            async move {
                counted.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_secs(5));
                Ok::<_, Infallible>(())
            }
        }));
    let first = tokio::spawn(receiver.clone().oneshot(7));
    while runs.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_millis(3_500)).await;
    let second = receiver.oneshot(7).await;
    assert!(
        matches!(second, Ok(Receipt::InFlight { .. })),
        "its lease was renewed {} times: {second:?}",
        store.calls("renew")
    );
    assert!(matches!(first.await.unwrap(), Ok(Receipt::First(()))));
}

/// The task of a layer renews each lease after each third of it, and stops when the delivery ends.
#[tokio::test(start_paused = true)]
async fn each_lease_is_renewed_at_its_third_and_never_after_its_end() {
    let store = RemoteStore::new();
    let receiver = |lease: u64| {
        ReceiverLayer::new(store.clone(), "c")
            .with_id(|(id, _): &(u64, u64)| *id)
            .with_lease(Duration::from_secs(lease))
            .layer(service_fn(|(_, seconds)| async move {
                tokio::time::sleep(Duration::from_secs(seconds)).await;
                Ok::<_, Infallible>(())
            }))
    };
    let (short, long) = (receiver(3), receiver(30));
    let deliveries = [
        short.clone().oneshot((1, 10)),
        short.oneshot((2, 20)),
        long.oneshot((3, 60)),
    ];
    for received in futures::future::join_all(deliveries).await {
        assert!(matches!(received, Ok(Receipt::First(()))));
    }
    let renewals = store.calls("renew");
    assert!(
        (30..=36).contains(&renewals),
        "9 + 19 + 5, at most one more or less for each: {renewals}"
    );
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(store.calls("renew"), renewals);
}

/// Runtime `one` has had a renewal task and is no longer polled. Runtime `two` has no free blocking
/// thread. The lease on `two` is renewed all the same.
#[test]
fn each_lease_is_renewed_by_its_own_runtime() {
    let store = RemoteStore::new();
    let receiver = ReceiverLayer::new(store, "c")
        .with_id(|(id, _): &(u64, u64)| *id)
        .with_lease(Duration::from_secs(2))
        .at_least_once()
        .layer(service_fn(|(_, millis): (u64, u64)| async move {
            tokio::time::sleep(Duration::from_millis(millis)).await;
            Ok::<_, Infallible>(())
        }));
    let one = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let two = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(1)
        .enable_all()
        .build();
    one.block_on(receiver.clone().oneshot((1, 300))).unwrap();
    two.unwrap().block_on(async {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || assert!(ended.recv().is_err()));
        let first = tokio::spawn(receiver.clone().oneshot((2, 5_000)));
        tokio::time::sleep(Duration::from_millis(3_500)).await;
        let second = receiver.clone().oneshot((2, 0)).await;
        drop(end);
        assert!(matches!(second, Ok(Receipt::InFlight { .. })), "{second:?}");
        first.await.unwrap().unwrap();
    });
}

#[tokio::test(start_paused = true)]
async fn messages_whose_deliveries_were_dropped_are_bounded() {
    let layer = ReceiverLayer::new(MemoryStore::new(), "c")
        .with_id(|id: &u64| *id)
        .with_max_detached(3);
    let drain = layer.drain();
    let receiver = layer.layer(service_fn(|_: u64| async {
        tokio::time::sleep(Duration::from_secs(10)).await;
        Ok::<_, Infallible>(())
    }));
    for id in 0..10 {
        drop(tokio::time::timeout(Duration::from_millis(10), receiver.clone().oneshot(id)).await);
    }
    assert_eq!(drain.running(), 3);
    let refused = receiver.clone().oneshot(10).await;
    assert_eq!(Disposition::of(&refused), Disposition::Redeliver(None));
    assert!(matches!(refused, Err(ReceiveError::Store(error)) if error.kind() == ErrorKind::Overloaded));
    drain.wait().await;
    assert!(matches!(receiver.oneshot(10).await, Ok(Receipt::First(()))));
}

#[tokio::test(start_paused = true)]
async fn a_slow_message_does_not_delay_its_batch() {
    let handled = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&handled);
    let handler = service_fn(move |id: u64| {
        let handled = Arc::clone(&counted);
        async move {
            if id == 0 {
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
            handled.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Infallible>(())
        }
    });
    let receiver = ReceiverLayer::new(MemoryStore::new(), "c")
        .with_id(|id: &u64| *id)
        .layer(handler);
    let batch = receive_all(&receiver, 0..10, 2);
    assert!(tokio::time::timeout(Duration::from_secs(1), batch).await.is_err());
    assert_eq!(handled.load(Ordering::SeqCst), 9);
}

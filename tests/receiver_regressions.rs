//! What a reviewer broke in the receiver: each test states what holds.

mod support;

use std::convert::Infallible;
use std::future::ready;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::FutureExt;
use support::{Fault, RemoteStore};
use tower::{service_fn, Layer, ServiceExt};
use tower_idempotency::client::Found;
use tower_idempotency::protocol::Status;
use tower_idempotency::receiver::{
    receive_all, Disposition, Lease, OnMismatch, OnMissingId, Receipt, ReceiveError, ReceiverLayer,
};
use tower_idempotency::{IdempotencyLayer, MemoryStore, OnError, Store};

#[derive(Clone, Default)]
struct Message {
    id: String,
    payload: String,
    lease: Option<Lease>,
}

fn message(id: &str, payload: &str) -> Message {
    Message {
        id: id.to_owned(),
        payload: payload.to_owned(),
        lease: None,
    }
}

fn layer<St>(store: St) -> ReceiverLayer<St, Message> {
    ReceiverLayer::new(store, "billing")
        .with_id(|message: &Message| message.id.clone())
        .pass_lease(|message: &mut Message, lease| message.lease = Some(lease))
}

/// The third party took the order of the first attempt, and its answer was lost.
#[tokio::test]
async fn what_does_not_matter_in_a_payload_does_not_change_the_id_for_a_third_party() {
    for on_mismatch in [OnMismatch::Duplicate, OnMismatch::Error] {
        let ids = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&ids);
        let receiver = layer(MemoryStore::new())
            .with_payload(|message: &Message| message.payload.as_bytes())
            .on_mismatch(on_mismatch)
            .at_least_once()
            .layer(service_fn(move |message: Message| {
                let mut ids = noted.lock().unwrap();
                ids.push(message.lease.unwrap().id("order"));
                ready(if ids.len() == 1 { Err("reset") } else { Ok(()) })
            }));
        assert!(receiver.clone().oneshot(message("m", "sent at 1")).await.is_err());
        let again = receiver.oneshot(message("m", "sent at 2")).await;
        assert!(matches!(again, Ok(Receipt::First(()))), "{again:?}");
        let ids = ids.lock().unwrap();
        assert_eq!(ids[0], ids[1], "one message, two orders at the third party");
    }
}

/// An attempt that loses its lease and is taken over; `other` is what comes of the one that takes over.
async fn zombie(
    store: &RemoteStore,
    other: Result<(), &'static str>,
    before_the_end: impl FnOnce(),
) -> Result<Receipt<()>, ReceiveError<&'static str>> {
    let layer = layer(store.clone()).at_least_once();
    store.fail("renew", [Fault::Before; 1_000]);
    let slow = layer.clone().layer(service_fn(|_: Message| async {
        tokio::time::sleep(Duration::from_secs(100)).await;
        Ok::<_, &str>(())
    }));
    let zombie = tokio::spawn(slow.oneshot(message("m", "")));
    tokio::time::sleep(Duration::from_secs(60)).await;
    store.heal();
    let quick = layer.layer(service_fn(move |_: Message| ready(other)));
    drop(quick.oneshot(message("m", "")).await);
    before_the_end();
    zombie.await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_store_that_cannot_be_read_rejects_no_message() {
    let store = RemoteStore::new();
    let received = zombie(&store, Ok(()), || store.fail("peek", [Fault::Before])).await;
    assert!(matches!(received, Err(ReceiveError::Unrecorded(_))), "{received:?}");
    assert_eq!(Disposition::of(&received), Disposition::Redeliver(None));
}

#[tokio::test(start_paused = true)]
async fn what_may_be_handled_again_is_not_rejected_by_a_zombie() {
    let store = RemoteStore::new();
    let received = zombie(&store, Err("not now"), || {}).await;
    assert_eq!(
        Disposition::of(&received),
        Disposition::Redeliver(Some(Duration::ZERO)),
        "{received:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn another_payload_of_a_lost_message_is_not_rejected_where_it_may_be_handled_again() {
    let store = RemoteStore::new();
    let layer = layer(store.clone())
        .with_payload(|message: &Message| message.payload.as_bytes())
        .on_mismatch(OnMismatch::Duplicate)
        .at_least_once()
        .on_error(OnError::Unknown);
    let failing = layer
        .clone()
        .layer(service_fn(|_: Message| ready(Err::<(), _>("reset"))));
    assert!(failing.oneshot(message("m", "sent at 1")).await.is_err());
    let receiver = layer.layer(service_fn(|_: Message| ready(Ok::<_, &str>(()))));
    let received = receiver.oneshot(message("m", "sent at 2")).await;
    assert_eq!(
        Disposition::of(&received),
        Disposition::Redeliver(Some(Duration::from_secs(30))),
        "{received:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_check_that_could_not_ask_is_asked_again_until_the_attempts_are_used_up() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let layer = layer(RemoteStore::new())
        .on_error(OnError::Unknown)
        .with_max_attempts(4)
        .with_recovery(move |_, _| {
            counted.fetch_add(1, Ordering::SeqCst);
            ready(Found::Unknown)
        });
    let receiver = layer.layer(service_fn(|_: Message| ready(Err::<(), _>("reset"))));
    assert!(receiver.clone().oneshot(message("m", "")).await.is_err());
    let mut told = Vec::new();
    for _ in 0..4 {
        told.push(Disposition::of(&receiver.clone().oneshot(message("m", "")).await));
    }
    let again = Disposition::Redeliver(Some(Duration::from_secs(30)));
    assert_eq!(told, [again, again, Disposition::Reject, Disposition::Reject]);
    assert_eq!(asked.load(Ordering::SeqCst), 3);
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

#[tokio::test(start_paused = true)]
async fn payloads_that_are_compared_from_now_on_make_no_handled_message_a_mismatch() {
    let store = RemoteStore::new();
    let handler = || service_fn(|_: Message| ready(Ok::<_, Infallible>(())));
    let plain = || layer(store.clone()).layer(handler());
    let comparing = || layer(store.clone()).with_payload(|message: &Message| message.payload.as_bytes());
    assert!(plain().oneshot(message("m", "a")).await.is_ok());
    let again = comparing().layer(handler()).oneshot(message("m", "a")).await;
    assert!(matches!(again, Ok(Receipt::Duplicate)), "{again:?}");
    assert!(comparing().layer(handler()).oneshot(message("n", "a")).await.is_ok());
    let again = plain().oneshot(message("n", "a")).await;
    assert!(matches!(again, Ok(Receipt::Duplicate)), "{again:?}");
    let again = comparing().layer(handler()).oneshot(message("n", "b")).await;
    assert!(matches!(again, Err(ReceiveError::Mismatch)), "{again:?}");

    // What was lost before, nobody who compares can take over.
    let failing = service_fn(|_: Message| ready(Err::<(), _>("reset")));
    let losing = layer(store.clone()).at_least_once().on_error(OnError::Unknown);
    assert!(losing.layer(failing).oneshot(message("o", "a")).await.is_err());
    let again = comparing()
        .at_least_once()
        .layer(handler())
        .oneshot(message("o", "a"))
        .await;
    assert!(matches!(again, Ok(Receipt::Unknown)), "{again:?}");
}

#[tokio::test]
async fn an_operator_can_name_the_record_of_every_message() {
    let store = MemoryStore::new();
    let layer = layer(store.clone())
        .with_payload(|message: &Message| message.payload.as_bytes())
        .on_missing_id(OnMissingId::FromPayload);
    let receiver = layer
        .clone()
        .layer(service_fn(|_: Message| ready(Ok::<_, Infallible>(()))));
    for message in [message("m", "a"), message("", "b")] {
        let key = layer.storage_key_of(&message).unwrap().unwrap();
        assert!(receiver.clone().oneshot(message).await.is_ok());
        let status = store.peek(&key).await.unwrap().unwrap().status;
        assert!(matches!(status, Status::Completed(_)), "{status:?}");
    }
    let refusing = layer.on_missing_id(OnMissingId::Refuse);
    assert_eq!(refusing.storage_key_of(&message("", "b")).unwrap(), None);
    assert_eq!(
        refusing.storage_key_of(&message("m", "a")).unwrap(),
        Some(refusing.storage_key("m").unwrap())
    );
}

#[tokio::test]
async fn a_message_a_request_and_a_call_of_one_name_are_three_records() {
    let store = MemoryStore::new();
    let message_key = ReceiverLayer::<_, Message>::new(store.clone(), "k")
        .storage_key("k")
        .unwrap();
    let request_key = IdempotencyLayer::new(store.clone()).storage_key(None, "k").unwrap();
    assert_ne!(message_key, request_key);
    let other = ReceiverLayer::<_, Message>::new(store, "kk").storage_key("").unwrap();
    assert_ne!(message_key, other);
}

/// What a handler's failure and a lost attempt come to, for every setting.
#[tokio::test(start_paused = true)]
async fn a_failed_handler_does_to_its_message_what_was_set() {
    type Set = fn(ReceiverLayer<RemoteStore, Message>) -> ReceiverLayer<RemoteStore, Message>;
    let refuse: Set = |layer| layer;
    let execute: Set = ReceiverLayer::at_least_once;
    let ask: Set = |layer| layer.with_recovery(|_, _| ready(Found::NotHappened));
    let found: Set = |layer| layer.with_recovery(|_, _| ready(Found::Happened(())));
    for (on_error, set, runs, second) in [
        (OnError::Release, refuse, 2, "First"),
        (OnError::Release, execute, 2, "First"),
        (OnError::Release, ask, 2, "First"),
        (OnError::Release, found, 2, "First"),
        (OnError::Keep, refuse, 1, "Duplicate"),
        (OnError::Keep, execute, 1, "Duplicate"),
        (OnError::Keep, ask, 1, "Duplicate"),
        (OnError::Keep, found, 1, "Duplicate"),
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
                assert!(!(first && panics), "as planned");
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

#[tokio::test]
async fn a_panic_within_a_batch_is_that_messages_own() {
    type Handling = BoxFuture<'static, Result<(), &'static str>>;
    for at_once in [1, 2, 5] {
        let handler = service_fn(|message: Message| -> Handling {
            assert!(message.id != "at once", "as planned");
            async move {
                assert!(message.id != "later", "as planned");
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
        let told: Vec<_> = received.dispositions().collect();
        let again = Disposition::Redeliver(None);
        let done = Disposition::Acknowledge;
        assert_eq!(
            told,
            [done, again, again, again, Disposition::Reject, done],
            "{at_once}"
        );
    }
}

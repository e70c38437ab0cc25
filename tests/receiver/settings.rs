//! Each setter of the receiver has the effect that its documentation promises, and a clone with one
//! other setting has all the others.

use std::convert::Infallible;
use std::future::{pending, ready};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::receiver::{
    HandlerErrorClass, MessageLease, OnMismatch, OnMissingId, Receipt, ReceiveError, ReceiverLayer,
};
use tower_idempotency::{ErrorKind, OnError, Recovered};

use crate::kit::{Message, layer, message};
use crate::support::{Fault, RemoteStore, Timer};

const HOUR: Duration = Duration::from_secs(3_600);

type Changed = ReceiverLayer<RemoteStore, Message>;

/// Returns a clone of a layer with another retention. The layer itself still has its own settings,
/// so the two share none.
fn clone_of(layer: &Changed) -> Changed {
    layer.clone().with_retention(HOUR)
}

/// Delivers a message. Returns the result, and how often the handler ran.
async fn deliver(
    layer: &Changed,
    message: Message,
    result: Result<(), &'static str>,
) -> (Result<Receipt<()>, ReceiveError<&'static str>>, usize) {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let receiver = layer.layer(service_fn(move |message: Message| {
        assert!(message.lease.is_some(), "the handler gets the lease");
        counted.fetch_add(1, Ordering::SeqCst);
        ready(result)
    }));
    let received = receiver.oneshot(message).await;
    (received, runs.load(Ordering::SeqCst))
}

#[test]
fn a_changed_clone_has_the_other_settings_of_its_layer() {
    let set = layer(RemoteStore::new())
        .with_retention(HOUR)
        .with_lease(Duration::from_secs(9))
        .with_wait(Duration::from_secs(9))
        .on_error(OnError::Unknown)
        .on_mismatch(OnMismatch::Duplicate)
        .on_missing_id(OnMissingId::FromPayload)
        .with_error_class(|_: &&'static str| HandlerErrorClass::Reject);
    assert_eq!(format!("{:?}", clone_of(&set)), format!("{set:?}"));
}

#[tokio::test(start_paused = true)]
async fn a_changed_clone_has_the_functions_of_its_layer() {
    let checks = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&checks);
    let set = layer(RemoteStore::new())
        .with_payload(|message: &Message| message.payload.as_bytes())
        .with_error_class(|error: &&'static str| match *error {
            "final" => HandlerErrorClass::Reject,
            _ => HandlerErrorClass::Redeliver,
        })
        .on_error(OnError::Unknown)
        .with_recovery(move |_: &Message, _: MessageLease| {
            counted.fetch_add(1, Ordering::SeqCst);
            ready(Recovered::Happened(()))
        });
    let clone = clone_of(&set);
    assert!(matches!(
        deliver(&clone, message("a", "1"), Ok(())).await,
        (Ok(Receipt::First(())), 1)
    ));
    let other = deliver(&clone, message("a", "2"), Ok(())).await;
    assert!(matches!(other, (Err(ReceiveError::Mismatch), 0)), "{other:?}");
    assert!(deliver(&clone, message("b", "1"), Err("lost")).await.0.is_err());
    let checked = deliver(&clone, message("b", "1"), Ok(())).await;
    assert!(matches!(checked, (Ok(Receipt::Duplicate), 0)), "{checked:?}");
    assert_eq!(checks.load(Ordering::SeqCst), 1);
    let rejected = deliver(&clone, message("c", "1"), Err("final")).await;
    assert!(matches!(rejected, (Err(ReceiveError::Rejected(_)), 1)), "{rejected:?}");
}

#[tokio::test(start_paused = true)]
async fn a_time_limit_is_as_long_as_its_setting() {
    const TIME: Duration = Duration::from_secs(3);
    // The layer claims twice.
    let store = RemoteStore::new();
    store.fail("claim", [Fault::Hang; 2]);
    let timer = Timer::start();
    let (failed, runs) = deliver(&layer(store).with_store_timeout(TIME), message("m", ""), Ok(())).await;
    assert!(matches!(failed, Err(ReceiveError::Store(error)) if error.kind() == ErrorKind::StoreUnavailable));
    assert_eq!((timer.elapsed(), runs), (2 * TIME, 0));

    let store = RemoteStore::new();
    store.fail("complete", [Fault::Before; 1_000]);
    let timer = Timer::start();
    let unrecorded = deliver(&layer(store).with_completion_timeout(TIME), message("m", ""), Ok(())).await;
    assert!(unrecorded.0.is_err());
    assert_eq!((timer.elapsed().as_secs(), unrecorded.1), (TIME.as_secs(), 1));

    let store = RemoteStore::new();
    let settling = layer(store)
        .on_error(OnError::Unknown)
        .with_settle_delay(TIME)
        .with_recovery(|_, _| ready(Recovered::NotHappened));
    assert!(deliver(&settling, message("m", ""), Err("lost")).await.0.is_err());
    let timer = Timer::start();
    assert!(deliver(&settling, message("m", ""), Ok(())).await.0.is_ok());
    assert_eq!(timer.elapsed(), TIME);
}

/// A message without an id runs without a record, but it takes the same resources.
#[tokio::test(start_paused = true)]
async fn unprotected_messages_whose_deliveries_were_dropped_are_bounded() {
    let layer = layer(RemoteStore::new())
        .on_missing_id(OnMissingId::Unprotected)
        .with_max_detached(2);
    let runs = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&runs);
    let receiver = layer.layer(service_fn(move |_: Message| {
        *counted.lock().unwrap() += 1;
        pending::<Result<(), Infallible>>()
    }));
    for _ in 0..5 {
        let delivery = receiver.clone().oneshot(message("", ""));
        drop(tokio::time::timeout(Duration::from_millis(10), delivery).await);
    }
    assert_eq!(*runs.lock().unwrap(), 2);
}

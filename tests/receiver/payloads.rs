//! The rules by which two deliveries are the same message, and the names of their records.

use std::convert::Infallible;
use std::future::ready;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::Notify;
use tower::util::BoxCloneService;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fence, Outcome, Owner, Release, Renewal, Resolution, ResolveResult, Snapshot, Status,
    StorageKey,
};
use tower_idempotency::receiver::{Disposition, OnMismatch, OnMissingId, Receipt, ReceiveError, ReceiverLayer};
use tower_idempotency::{Error, IdempotencyLayer, MemoryStore, OnError, Store};

use super::kit::{Message, layer, message};
use crate::support::RemoteStore;

/// The third party took the order of the first attempt, and its response was lost.
#[tokio::test]
async fn insignificant_parts_of_a_payload_do_not_change_the_id_for_a_third_party() {
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
        assert_eq!(ids[0], ids[1], "one message made two orders at the third party");
    }
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
async fn newly_compared_payloads_make_no_handled_message_a_mismatch() {
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

    // A layer that compares payloads cannot take over an attempt that was lost before, because its
    // record has no payload.
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

type Race = Arc<Mutex<Option<Box<dyn FnOnce() -> BoxFuture<'static, ()> + Send>>>>;

/// A store that runs a function of the test before the next `peek`.
#[derive(Clone)]
struct Racing(MemoryStore, Race);

impl Store for Racing {
    type Watch = <MemoryStore as Store>::Watch;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        self.0.claim(claim).await
    }

    async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        self.0.renew(key, owner, lease).await
    }

    async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        self.0.complete(key, owner, outcome, retention).await
    }

    async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        self.0.release(key, owner).await
    }

    async fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Result<ResolveResult, Error> {
        self.0.resolve(key, fence, resolution).await
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        let race = self.1.lock().unwrap().take();
        if let Some(race) = race {
            race().await;
        }
        self.0.peek(key).await
    }

    async fn watch(&self, key: &StorageKey) -> Result<Self::Watch, Error> {
        self.0.watch(key).await
    }
}

type Receiving<E> = BoxCloneService<String, Receipt<()>, ReceiveError<E>>;

/// Makes a receiver of messages with one id. Its handler refuses the payload `a` once `fail` is notified, and handles all
/// others.
fn refusing_a(race: &Race, fail: &Arc<Notify>, on_mismatch: OnMismatch) -> Receiving<String> {
    let (store, failed) = (Racing(MemoryStore::new(), Arc::clone(race)), Arc::clone(fail));
    let layer = ReceiverLayer::new(store, "c")
        .with_id(|_: &String| 7_u64)
        .with_payload(|payload: &String| payload.as_bytes())
        .on_mismatch(on_mismatch);
    BoxCloneService::new(layer.layer(service_fn(move |payload: String| {
        let failed = Arc::clone(&failed);
        async move {
            if payload == "a" {
                failed.notified().await;
                return Err("no".to_owned());
            }
            Ok(())
        }
    })))
}

/// Between the claim and the look at the record, the handler of the other payload failed, so no record is left.
#[tokio::test]
async fn a_message_whose_mismatch_left_no_record_is_not_acknowledged() {
    for on_mismatch in [OnMismatch::Duplicate, OnMismatch::Error] {
        let (race, fail) = (Race::default(), Arc::new(Notify::new()));
        let receiver = refusing_a(&race, &fail, on_mismatch);
        let first = tokio::spawn(receiver.clone().oneshot("a".to_owned()));
        tokio::task::yield_now().await;
        *race.lock().unwrap() = Some(Box::new(move || {
            Box::pin(async move {
                fail.notify_one();
                assert!(first.await.unwrap().is_err());
            })
        }));
        let received = receiver.clone().oneshot("b".to_owned()).await;
        assert!(
            matches!(Disposition::of(&received), Disposition::Redeliver(_)),
            "{on_mismatch:?}: {received:?}"
        );
        let again = receiver.oneshot("b".to_owned()).await;
        assert!(matches!(again, Ok(Receipt::First(()))), "{on_mismatch:?}: {again:?}");
    }
}

/// Between the claim and the look at the record, the handler of the other payload failed, and a
/// duplicate of this message was handled.
#[tokio::test]
async fn a_message_is_no_mismatch_of_its_own_duplicate() {
    let (race, fail) = (Race::default(), Arc::new(Notify::new()));
    let receiver = refusing_a(&race, &fail, OnMismatch::Error);
    let first = tokio::spawn(receiver.clone().oneshot("a".to_owned()));
    tokio::task::yield_now().await;
    let copy = receiver.clone();
    *race.lock().unwrap() = Some(Box::new(move || {
        Box::pin(async move {
            fail.notify_one();
            assert!(first.await.unwrap().is_err());
            assert!(matches!(copy.oneshot("b".to_owned()).await, Ok(Receipt::First(()))));
        })
    }));
    let received = receiver.clone().oneshot("b".to_owned()).await;
    assert!(matches!(received, Ok(Receipt::InFlight { .. })), "{received:?}");
    assert!(matches!(receiver.oneshot("b".to_owned()).await, Ok(Receipt::Duplicate)));
}

#[tokio::test(start_paused = true)]
async fn another_payload_is_no_duplicate_while_nothing_is_recorded() {
    let layer = ReceiverLayer::new(MemoryStore::new(), "c")
        .with_id(|_: &&'static [u8]| 7_u64)
        .with_payload(|payload| payload)
        .on_mismatch(OnMismatch::Duplicate);
    let receiver = layer.layer(service_fn(|_: &'static [u8]| async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        Err::<(), _>("no")
    }));
    let first = tokio::spawn(receiver.clone().oneshot(&b"sent at 1"[..]));
    tokio::task::yield_now().await;
    let second = receiver.oneshot(&b"sent at 2"[..]).await;
    assert!(first.await.unwrap().is_err(), "the handler failed");
    assert!(
        !matches!(second, Ok(Receipt::Duplicate)),
        "a duplicate was acknowledged without a recorded outcome: {second:?}"
    );
}

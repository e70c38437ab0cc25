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
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fence, Fingerprint, IfLost, Nonce, Outcome, Owner, Release, Renewal, Resolution,
    ResolveResult, Snapshot, Status, StorageKey,
};
use tower_idempotency::receiver::{
    receive_all, Disposition, MessageLease, OnMismatch, OnMissingId, Receipt, ReceiveError, ReceiverLayer,
};
use tower_idempotency::Recovered;
use tower_idempotency::{Error, IdempotencyLayer, MemoryStore, OnError, Store};

#[derive(Clone, Default)]
struct Message {
    id: String,
    payload: String,
    lease: Option<MessageLease>,
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
            ready(Recovered::Unknown)
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

/// Many leases are renewed by one task, each at its third, and those that ended no more.
#[tokio::test(start_paused = true)]
async fn each_lease_is_renewed_at_its_third_and_by_nobody_after_its_end() {
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
        "9 and 19 and 5, or one more each: {renewals}"
    );
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(store.calls("renew"), renewals);
}

/// The handler said that it failed; the store, down for a minute, was told of it for ten seconds.
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

/// It was handled, and that could not be recorded for a minute: then it was refused as unknown for ever.
#[tokio::test(start_paused = true)]
async fn what_was_handled_while_the_store_was_down_is_a_duplicate_when_it_is_back() {
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

/// A failover: the claim was written, its reply was lost, and the store came back half a minute later. Nothing ran.
#[tokio::test(start_paused = true)]
async fn a_message_that_never_ran_is_not_unknown_because_the_store_was_away() {
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
async fn a_panic_of_poll_ready_is_one_messages_own() {
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

type Race = Arc<Mutex<Option<Box<dyn FnOnce() -> BoxFuture<'static, ()> + Send>>>>;

/// A store at which something happens before the next look at a record.
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

/// Between the claim and the look, the other payload's handler failed, and a copy of this very message was handled.
#[tokio::test]
async fn a_message_is_no_mismatch_of_its_own_copy() {
    let (race, fail) = (Race::default(), Arc::new(tokio::sync::Notify::new()));
    let (store, told) = (Racing(MemoryStore::new(), Arc::clone(&race)), Arc::clone(&fail));
    let receiver = ReceiverLayer::new(store, "c")
        .with_id(|_: &String| 7_u64)
        .with_payload(|payload: &String| payload.as_bytes())
        .layer(service_fn(move |payload: String| {
            let told = Arc::clone(&told);
            async move {
                if payload == "a" {
                    told.notified().await;
                    return Err("no".to_owned());
                }
                Ok(())
            }
        }));
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

/// One runtime that is not polled for now, as where a thread handles one message after another; one whose blocking threads are all
/// taken: neither keeps others from renewing.
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

/// A process died with the message, and the store was away for a minute, in which the message was delivered six times. The claims that
/// were released behind those deliveries took the lost one over, each of them.
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

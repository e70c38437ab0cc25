//! The receiver handles each message once, and acknowledges no message before its outcome is
//! recorded.

use std::future::pending;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use tokio::task::JoinHandle;
use tower::{Layer, Service, ServiceExt};
use tower_idempotency::Recovered;
use tower_idempotency::protocol::{Fence, Resolution};
use tower_idempotency::receiver::{
    Disposition, MessageId, MessageLease, OnMismatch, OnMissingId, Receipt, ReceiveError, Receiver, ReceiverLayer,
};
use tower_idempotency::{ErrorKind, MemoryStore, OnError, Store};

use crate::support::{Fault, RemoteStore};

#[derive(Clone, Default)]
struct Message {
    id: Vec<u8>,
    payload: Vec<u8>,
    lease: Option<MessageLease>,
}

fn message(id: impl Into<Vec<u8>>) -> Message {
    Message {
        id: id.into(),
        ..Message::default()
    }
}

impl Message {
    fn with(mut self, payload: &str) -> Self {
        self.payload = payload.into();
        self
    }
}

/// The next behaviour of a handler. Without a plan, it succeeds at once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plan {
    Fail,
    Hang,
    Panic,
    Take(Duration),
}

/// Counts its runs and its effects. The effect comes at the end of a run.
#[derive(Clone, Default)]
struct Handler {
    runs: Arc<AtomicUsize>,
    effects: Arc<AtomicUsize>,
    plans: Arc<Mutex<Vec<Plan>>>,
    leases: Arc<Mutex<Vec<MessageLease>>>,
}

impl Handler {
    fn planning(plans: impl Into<Vec<Plan>>) -> Self {
        Self {
            plans: Arc::new(Mutex::new(plans.into())),
            ..Self::default()
        }
    }

    fn counts(&self) -> (usize, usize) {
        (self.runs.load(Ordering::SeqCst), self.effects.load(Ordering::SeqCst))
    }
}

impl Service<Message> for Handler {
    type Response = usize;
    type Error = String;
    type Future = BoxFuture<'static, Result<usize, String>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), String>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, message: Message) -> Self::Future {
        let run = self.runs.fetch_add(1, Ordering::SeqCst) + 1;
        self.leases.lock().unwrap().extend(message.lease);
        let plan = {
            let mut plans = self.plans.lock().unwrap();
            (!plans.is_empty()).then(|| plans.remove(0))
        };
        let handler = self.clone();
        Box::pin(async move {
            tokio::task::yield_now().await;
            match plan {
                Some(Plan::Fail) => return Err("no".to_owned()),
                Some(Plan::Hang) => pending().await,
                Some(Plan::Panic) => panic!("the handler panics"),
                Some(Plan::Take(time)) => tokio::time::sleep(time).await,
                None => {}
            }
            handler.effects.fetch_add(1, Ordering::SeqCst);
            Ok(run)
        })
    }
}

type Received = Result<Receipt<usize>, ReceiveError<String>>;

fn layer<St>(store: St) -> ReceiverLayer<St, Message> {
    ReceiverLayer::new(store, "billing")
        .with_id(|message: &Message| message.id.clone())
        .with_lease(Duration::from_secs(30))
}

async fn deliver<St: Store + Clone>(receiver: &Receiver<Handler, St, Message>, message: Message) -> Received {
    receiver.clone().oneshot(message).await
}

fn disposition(received: &Received) -> Disposition {
    Disposition::of(received)
}

#[tokio::test(start_paused = true)]
async fn a_message_is_handled_once_by_each_consumer() {
    let (store, handler) = (RemoteStore::new(), Handler::default());
    let billing = layer(store.clone()).layer(handler.clone());
    assert!(matches!(deliver(&billing, message("m")).await, Ok(Receipt::First(1))));
    for _ in 0..3 {
        let again = deliver(&billing, message("m")).await;
        assert!(matches!(again, Ok(Receipt::Duplicate)));
        assert_eq!(disposition(&again), Disposition::Acknowledge);
    }
    let others = [
        ReceiverLayer::new(store.clone(), "shipping").with_id(|message: &Message| message.id.clone()),
        layer(store.clone()).with_namespace("test"),
        layer(store.clone()).with_secret(&[7; 32]).unwrap(),
        layer(store.clone()).with_id(|message: &Message| MessageId::of([b"shop-2".as_slice(), &message.id])),
    ];
    for other in others {
        let receiver = other.layer(handler.clone());
        assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::First(_))));
    }
    assert_eq!(handler.counts(), (5, 5));
}

#[tokio::test(start_paused = true)]
async fn a_first_message_takes_two_round_trips_and_a_duplicate_one() {
    let (store, handler) = (RemoteStore::new(), Handler::default());
    let receiver = layer(store.clone()).layer(handler.clone());
    let calls = || ["claim", "complete", "release", "renew", "peek"].map(|operation| store.calls(operation));
    assert!(deliver(&receiver, message("m")).await.is_ok());
    assert_eq!(calls(), [1, 1, 0, 0, 0]);
    for _ in 0..10 {
        assert!(deliver(&receiver, message("m")).await.is_ok());
    }
    assert_eq!(calls(), [11, 1, 0, 0, 0]);
}

#[tokio::test(start_paused = true)]
async fn one_of_many_concurrent_deliveries_is_handled_and_the_others_are_redelivered() {
    let (store, handler) = (
        RemoteStore::new(),
        Handler::planning([Plan::Take(Duration::from_secs(100))]),
    );
    let receiver = layer(store).layer(handler.clone());
    let all = join_all((0..50).map(|_| deliver(&receiver, message("m")))).await;
    let firsts = all.iter().filter(|got| matches!(got, Ok(Receipt::First(1)))).count();
    let in_flight = all.iter().filter(|got| match got {
        Ok(Receipt::InFlight { retry_after }) => {
            assert_eq!(disposition(got), Disposition::Redeliver(Some(*retry_after)));
            *retry_after > Duration::ZERO && *retry_after <= Duration::from_secs(30)
        }
        _ => false,
    });
    assert_eq!((firsts, in_flight.count()), (1, 49));
    assert_eq!(handler.counts(), (1, 1));
    assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::Duplicate)));
}

#[tokio::test(start_paused = true)]
async fn a_delivery_can_wait_for_the_one_in_flight() {
    let (store, handler) = (
        RemoteStore::new(),
        Handler::planning([Plan::Take(Duration::from_secs(100))]),
    );
    let receiver = layer(store).with_wait(Duration::from_secs(200)).layer(handler.clone());
    let all = join_all((0..50).map(|_| deliver(&receiver, message("m")))).await;
    assert_eq!(
        all.iter().filter(|got| matches!(got, Ok(Receipt::Duplicate))).count(),
        49
    );
    assert_eq!(handler.counts(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_failed_handler_does_not_lose_its_message() {
    let (store, handler) = (RemoteStore::new(), Handler::planning([Plan::Fail, Plan::Panic]));
    let receiver = layer(store).layer(handler.clone());
    let failed = deliver(&receiver, message("m")).await;
    assert!(matches!(&failed, Err(ReceiveError::Handler(error)) if error == "no"));
    assert_eq!(disposition(&failed), Disposition::Redeliver(None));
    let panicked = deliver(&receiver, message("m")).await;
    assert!(matches!(panicked, Err(ReceiveError::Panicked)));
    assert_eq!(disposition(&panicked), Disposition::Redeliver(None));
    assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::First(3))));
    assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::Duplicate)));
}

#[tokio::test(start_paused = true)]
async fn a_failure_can_count_as_handled_or_as_lost() {
    for plan in [Plan::Fail, Plan::Panic] {
        let handler = Handler::planning([plan]);
        let receiver = layer(RemoteStore::new())
            .on_error(OnError::Store)
            .layer(handler.clone());
        assert!(deliver(&receiver, message("m")).await.is_err());
        assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::Duplicate)));
        assert_eq!(handler.counts(), (1, 0));

        let handler = Handler::planning([plan]);
        let layer = layer(RemoteStore::new()).on_error(OnError::Unknown);
        let receiver = layer.clone().layer(handler.clone());
        assert!(deliver(&receiver, message("m")).await.is_err());
        let again = deliver(&receiver, message("m")).await;
        assert!(matches!(again, Ok(Receipt::Unknown)));
        assert_eq!(disposition(&again), Disposition::Reject);
        assert_eq!(handler.counts(), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_of_poll_ready_is_an_error_of_the_handler() {
    let inner = tower::util::BoxCloneService::new(tower::service_fn(|_: Message| async { Ok::<(), String>(()) }));
    let never_ready = tower::util::MapErr::new(NotReady(inner), |error: String| error);
    let receiver = layer(RemoteStore::new()).layer(never_ready);
    let failed = receiver.oneshot(message("m")).await;
    assert!(matches!(failed, Err(ReceiveError::Handler(error)) if error == "not ready"));
}

#[derive(Clone)]
struct NotReady<S>(S);

impl<S: Service<Message, Error = String>> Service<Message> for NotReady<S> {
    type Response = S::Response;
    type Error = String;
    type Future = S::Future;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), String>> {
        Poll::Ready(Err("not ready".to_owned()))
    }

    fn call(&mut self, message: Message) -> S::Future {
        self.0.call(message)
    }
}

/// Handles a message for 20 s, and fails without an effect.
async fn fail_after_20_seconds(store: RemoteStore) {
    let slow = tower::service_fn(|_: Message| async {
        tokio::time::sleep(Duration::from_secs(20)).await;
        Err::<(), _>("failed")
    });
    let failed = layer(store).layer(slow).oneshot(message("a")).await;
    assert!(matches!(failed, Err(ReceiveError::Handler("failed"))));
}

type Limited = Receiver<tower::limit::ConcurrencyLimit<Handler>, RemoteStore, Message>;

/// Returns a receiver whose handler has one permit, and a delivery to it that waits for its message
/// while the owner in another process fails.
async fn one_that_waits(store: &RemoteStore, handler: &Handler) -> (JoinHandle<()>, Limited, JoinHandle<Received>) {
    let owner = tokio::spawn(fail_after_20_seconds(store.clone()));
    crate::support::advance(Duration::from_secs(1)).await;
    let limit = tower::limit::GlobalConcurrencyLimitLayer::new(1);
    let receiver = layer(store.clone()).with_wait(Duration::from_secs(30));
    let receiver = receiver.layer(limit.layer(handler.clone()));
    let waiting = tokio::spawn(receiver.clone().oneshot(message("a")));
    crate::support::advance(Duration::from_secs(1)).await;
    (owner, receiver, waiting)
}

/// A delivery that waited for its message held a permit of the handler, so no other message could
/// begin.
#[tokio::test(start_paused = true)]
async fn a_delivery_that_waits_holds_no_permit() {
    let (store, handler) = (RemoteStore::new(), Handler::default());
    let (owner, receiver, waiting) = one_that_waits(&store, &handler).await;
    let other = tokio::time::timeout(Duration::from_secs(5), receiver.oneshot(message("b")));
    assert!(matches!(other.await, Ok(Ok(Receipt::First(_)))));
    owner.await.unwrap();
    assert!(matches!(waiting.await.unwrap(), Ok(Receipt::First(_))));
    assert_eq!(handler.counts(), (2, 2));
}

/// A delivery that waited claimed its message again after it had seen the outcome. If the record had
/// expired before that claim, the store granted the message, and a handler ran that was not ready.
#[tokio::test(start_paused = true)]
async fn a_delivery_that_waited_never_runs_a_handler_that_is_not_ready() {
    let (store, handler) = (RemoteStore::new(), Handler::default());
    let slow = tower::service_fn(|_: Message| async {
        tokio::time::sleep(Duration::from_secs(20)).await;
        Ok::<_, String>(())
    });
    let owner = layer(store.clone()).with_retention(Duration::from_secs(1)).layer(slow);
    let owner = tokio::spawn(owner.oneshot(message("a")));
    crate::support::advance(Duration::from_secs(1)).await;
    let limit = tower::limit::GlobalConcurrencyLimitLayer::new(1);
    let receiver = layer(store.clone()).with_wait(Duration::from_secs(30));
    let receiver = receiver.layer(limit.layer(handler.clone()));
    let waiting = tokio::spawn(receiver.oneshot(message("a")));
    crate::support::advance(Duration::from_secs(1)).await;
    store.fail("claim", [Fault::Slow(3)]);
    assert!(matches!(owner.await.unwrap(), Ok(Receipt::First(()))));
    let received = waiting.await.unwrap();
    assert!(matches!(received, Ok(Receipt::Duplicate)), "{received:?}");
    assert_eq!(handler.counts(), (0, 0));
}

/// The message is free, and the handler is busy. If the caller leaves then, nothing runs.
#[tokio::test(start_paused = true)]
async fn a_delivery_whose_caller_leaves_before_the_handler_is_ready_does_not_begin() {
    let (store, handler) = (
        RemoteStore::new(),
        Handler::planning([Plan::Take(Duration::from_secs(50))]),
    );
    let (owner, receiver, waiting) = one_that_waits(&store, &handler).await;
    let busy = tokio::spawn(receiver.clone().oneshot(message("b")));
    owner.await.unwrap();
    crate::support::advance(Duration::from_secs(5)).await;
    waiting.abort();
    assert!(matches!(busy.await.unwrap(), Ok(Receipt::First(_))));
    crate::support::advance(Duration::from_secs(5)).await;
    assert_eq!(handler.counts(), (1, 1));
    assert!(matches!(receiver.oneshot(message("a")).await, Ok(Receipt::First(_))));
}

/// A consumer may reserve the only permit of its handler for the next message. A delivery that waits
/// for that permit does not own its message, so another process can handle it, and the delivery ends
/// in time.
#[tokio::test(start_paused = true)]
async fn a_delivery_that_waits_for_a_permit_keeps_no_other_process_from_its_message() {
    let (store, handler) = (RemoteStore::new(), Handler::default());
    let (owner, receiver, waiting) = one_that_waits(&store, &handler).await;
    let mut reserved = receiver.clone();
    reserved.ready().await.unwrap();
    owner.await.unwrap();
    crate::support::advance(Duration::from_secs(5)).await;
    assert!(!waiting.is_finished());
    let elsewhere = layer(store).layer(handler.clone());
    assert!(matches!(elsewhere.oneshot(message("a")).await, Ok(Receipt::First(_))));
    // The delivery learns that without the permit.
    let waited = tokio::time::timeout(Duration::from_secs(1), waiting).await;
    assert!(matches!(waited, Ok(Ok(Ok(Receipt::Duplicate)))));
    assert_eq!(handler.counts(), (1, 1));
    drop(reserved);
}

#[tokio::test(start_paused = true)]
async fn a_delivery_whose_handler_is_not_ready_in_time_leaves_its_message_free() {
    let (store, handler) = (RemoteStore::new(), Handler::default());
    let (owner, receiver, waiting) = one_that_waits(&store, &handler).await;
    let mut reserved = receiver.clone();
    reserved.ready().await.unwrap();
    owner.await.unwrap();
    let begin = crate::support::Timer::start();
    let waited = waiting.await.unwrap();
    assert!(begin.elapsed() > Duration::from_secs(5) && begin.elapsed() < Duration::from_secs(12));
    assert!(matches!(waited, Ok(Receipt::InFlight { retry_after }) if retry_after.is_zero()));
    assert!(matches!(reserved.call(message("a")).await, Ok(Receipt::First(_))));
    assert_eq!(handler.counts(), (1, 1));
}

/// A duplicate needs no handler, so it does not wait for a busy one.
#[tokio::test(start_paused = true)]
async fn a_delivery_that_waited_is_a_duplicate_at_once_although_the_handler_is_busy() {
    let store = RemoteStore::new();
    let elsewhere = layer(store.clone()).layer(Handler::planning([Plan::Take(Duration::from_secs(20))]));
    let owner = tokio::spawn(elsewhere.oneshot(message("a")));
    crate::support::advance(Duration::from_secs(1)).await;
    let limit = tower::limit::GlobalConcurrencyLimitLayer::new(1);
    let receiver = layer(store).with_wait(Duration::from_secs(60));
    let receiver = receiver.layer(limit.layer(Handler::planning([Plan::Hang])));
    let waiting = tokio::spawn(receiver.clone().oneshot(message("a")));
    crate::support::advance(Duration::from_secs(1)).await;
    let _busy = tokio::spawn(receiver.oneshot(message("b")));
    assert!(matches!(owner.await.unwrap(), Ok(Receipt::First(_))));
    let waited = tokio::time::timeout(Duration::from_secs(2), waiting).await;
    assert!(matches!(waited, Ok(Ok(Ok(Receipt::Duplicate)))));
}

/// The handler was ready before the wait, and fails afterwards. The message stays free.
#[tokio::test(start_paused = true)]
async fn a_handler_that_is_broken_after_a_wait_leaves_the_message_free() {
    let store = RemoteStore::new();
    let owner = tokio::spawn(fail_after_20_seconds(store.clone()));
    crate::support::advance(Duration::from_secs(1)).await;
    let handler = Breaking {
        handler: Handler::default(),
        polls: Arc::default(),
    };
    let receiver = layer(store.clone()).with_wait(Duration::from_secs(30));
    let waited = receiver.layer(handler.clone()).oneshot(message("a")).await;
    owner.await.unwrap();
    assert!(matches!(waited, Ok(Receipt::InFlight { retry_after }) if retry_after.is_zero()));
    assert_eq!(handler.handler.counts(), (0, 0));
    let elsewhere = layer(store).layer(Handler::default());
    assert!(matches!(elsewhere.oneshot(message("a")).await, Ok(Receipt::First(_))));
}

/// A handler that is ready once, and then broken.
#[derive(Clone)]
struct Breaking {
    handler: Handler,
    polls: Arc<AtomicUsize>,
}

impl Service<Message> for Breaking {
    type Response = usize;
    type Error = String;
    type Future = BoxFuture<'static, Result<usize, String>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), String>> {
        let is_first = self.polls.fetch_add(1, Ordering::SeqCst) == 0;
        Poll::Ready(is_first.then_some(()).ok_or_else(|| "broken".to_owned()))
    }

    fn call(&mut self, message: Message) -> Self::Future {
        self.handler.call(message)
    }
}

#[tokio::test(start_paused = true)]
async fn ids_are_any_bytes_up_to_a_limit() {
    let (store, handler) = (RemoteStore::new(), Handler::default());
    let receiver = layer(store.clone()).layer(handler.clone());
    for id in [vec![0], vec![0xff, 0xfe], b"caf\xe9".to_vec(), vec![b'x'; 4096]] {
        assert!(matches!(
            deliver(&receiver, message(id.clone())).await,
            Ok(Receipt::First(_))
        ));
        assert!(matches!(deliver(&receiver, message(id)).await, Ok(Receipt::Duplicate)));
    }
    assert_eq!(store.len(), 4);
    // The type of a number does not matter: its id is the decimal form.
    let seven = [
        MessageId::from(7_i32),
        7_i64.into(),
        7_u32.into(),
        7_u64.into(),
        7_u128.into(),
        (&"7".to_owned()).into(),
    ];
    assert!(seven.iter().all(|id| *id == MessageId::from("7")));
    let huge = deliver(&receiver, message(vec![b'x'; 4097])).await;
    assert!(matches!(&huge, Err(ReceiveError::InvalidId(error)) if error.length() == 4097));
    assert_eq!(disposition(&huge), Disposition::Reject);
    assert!(huge.unwrap_err().to_string().contains("id"));
    assert_eq!(
        (store.len(), handler.counts().0),
        (4, 4),
        "no handler ran and no record was made"
    );
}

#[tokio::test(start_paused = true)]
async fn a_message_without_an_id_is_treated_as_configured() {
    let (store, handler) = (RemoteStore::new(), Handler::default());
    let payload = |message: &'_ Message| -> Vec<u8> { message.payload.clone() };
    assert_eq!(payload(&message("").with("p")), b"p");
    let refusing = [
        layer(store.clone()),
        ReceiverLayer::new(store.clone(), "billing"),
        // This layer has no payload to derive an id from.
        layer(store.clone()).on_missing_id(OnMissingId::FromPayload),
    ];
    for layer in refusing {
        let refused = deliver(&layer.layer(handler.clone()), message("")).await;
        assert!(matches!(refused, Err(ReceiveError::MissingId)));
        assert_eq!(disposition(&refused), Disposition::Reject);
    }
    assert_eq!((handler.counts(), store.calls("claim")), ((0, 0), 0));

    let unprotected = layer(store.clone())
        .on_missing_id(OnMissingId::Unprotected)
        .layer(handler.clone());
    for _ in 0..2 {
        assert!(matches!(
            deliver(&unprotected, message("")).await,
            Ok(Receipt::First(_))
        ));
    }
    assert_eq!((handler.counts(), store.calls("claim")), ((2, 2), 0));

    let derived = layer(store.clone())
        .on_missing_id(OnMissingId::FromPayload)
        .with_payload(|message: &Message| &message.payload)
        .layer(handler.clone());
    assert!(matches!(
        deliver(&derived, message("").with("a")).await,
        Ok(Receipt::First(_))
    ));
    assert!(matches!(
        deliver(&derived, message("").with("a")).await,
        Ok(Receipt::Duplicate)
    ));
    assert!(matches!(
        deliver(&derived, message("").with("b")).await,
        Ok(Receipt::First(_))
    ));
}

/// The check looked at the length of all parts together, so the second message without an id was a
/// duplicate of the first.
#[tokio::test]
async fn an_empty_id_beside_a_source_is_no_id() {
    let (store, handler) = (RemoteStore::new(), Handler::default());
    let with_source = layer(store.clone()).with_id(|message: &Message| MessageId::of([&b"shop-2"[..], &message.id]));
    let receiver = with_source.layer(handler.clone());
    for payload in ["a", "b"] {
        let received = deliver(&receiver, message("").with(payload)).await;
        assert!(matches!(received, Err(ReceiveError::MissingId)));
    }
    assert_eq!((handler.counts(), store.calls("claim")), ((0, 0), 0));
    assert!(MessageId::of(["", "7"]).is_missing() && MessageId::of::<&str>([]).is_missing());
    assert!(!MessageId::of(["shop-2", "7"]).is_missing());
}

#[tokio::test(start_paused = true)]
async fn another_payload_under_an_id_is_an_error_or_a_duplicate() {
    let (store, handler) = (RemoteStore::new(), Handler::default());
    let comparing = layer(store.clone()).with_payload(|message: &Message| &message.payload);
    let receiver = comparing.clone().layer(handler.clone());
    assert!(matches!(
        deliver(&receiver, message("m").with("a")).await,
        Ok(Receipt::First(1))
    ));
    assert!(matches!(
        deliver(&receiver, message("m").with("a")).await,
        Ok(Receipt::Duplicate)
    ));
    let other = deliver(&receiver, message("m").with("b")).await;
    assert!(matches!(other, Err(ReceiveError::Mismatch)));
    assert_eq!(disposition(&other), Disposition::Reject);
    let lenient = comparing.on_mismatch(OnMismatch::Duplicate).layer(handler.clone());
    assert!(matches!(
        deliver(&lenient, message("m").with("b")).await,
        Ok(Receipt::Duplicate)
    ));
    assert_eq!(handler.counts(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_slow_handler_keeps_its_message_for_as_long_as_it_takes() {
    let (store, handler) = (
        RemoteStore::new(),
        Handler::planning([Plan::Take(Duration::from_secs(3_600))]),
    );
    let receiver = layer(store.clone()).at_least_once().layer(handler.clone());
    let slow = tokio::spawn({
        let receiver = receiver.clone();
        async move { deliver(&receiver, message("m")).await }
    });
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert!(matches!(
            deliver(&receiver, message("m")).await,
            Ok(Receipt::InFlight { .. })
        ));
    }
    assert!(matches!(slow.await.unwrap(), Ok(Receipt::First(1))));
    assert_eq!(handler.counts(), (1, 1));
    assert!(store.calls("renew") >= 300, "{}", store.calls("renew"));
}

/// Polls a future this many times, each time after it was woken, then drops it.
async fn poll_times<F: Future + Unpin>(mut future: F, times: usize) -> Option<F::Output> {
    for _ in 0..times {
        if let Poll::Ready(output) = futures::poll!(Pin::new(&mut future)) {
            return Some(output);
        }
        tokio::task::yield_now().await;
    }
    None
}

#[tokio::test(start_paused = true)]
async fn a_delivery_that_is_dropped_at_any_point_is_handled_to_the_end_or_not_at_all() {
    let (mut finished, mut rescued, mut never) = (false, 0, 0);
    for polls in 0..100 {
        let (store, handler) = (RemoteStore::new(), Handler::default());
        let receiver = layer(store.clone()).layer(handler.clone());
        finished = poll_times(receiver.clone().oneshot(message("m")).boxed(), polls)
            .await
            .is_some();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (runs, effects) = handler.counts();
        assert_eq!(runs, effects, "dropped after {polls} polls");
        let again = deliver(&receiver, message("m")).await;
        if runs == 0 {
            never += 1;
            assert!(matches!(again, Ok(Receipt::First(1))), "{polls}: {again:?}");
        } else {
            rescued += usize::from(!finished);
            assert!(matches!(again, Ok(Receipt::Duplicate)), "{polls}: {again:?}");
        }
        assert_eq!(handler.counts(), (1, 1));
        if finished {
            break;
        }
    }
    assert!(finished && never > 1 && rescued > 1, "{finished} {never} {rescued}");
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_can_wait_for_handlers_whose_deliveries_were_dropped() {
    let (store, handler) = (
        RemoteStore::new(),
        Handler::planning([Plan::Take(Duration::from_secs(100))]),
    );
    let layer = layer(store);
    let (receiver, drain) = (layer.layer(handler.clone()), layer.drain());
    drain.wait().await;
    let dropped = tokio::time::timeout(Duration::from_secs(1), deliver(&receiver, message("m"))).await;
    assert!(dropped.is_err());
    assert_eq!((drain.running(), handler.counts()), (1, (1, 0)));
    drain.wait().await;
    assert_eq!((drain.running(), handler.counts()), (0, (1, 1)));
    assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::Duplicate)));
}

/// Each consumer of a process may have settings of its own, and one drain waits for all of them.
#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_the_handlers_of_clones_with_other_settings() {
    let handler = Handler::planning([Plan::Take(Duration::from_secs(100))]);
    let layer = layer(RemoteStore::new()).with_max_detached(1);
    let drain = layer.drain();
    let clone = layer.clone().with_retention(Duration::from_secs(60));
    let receiver = clone.layer(handler.clone());
    let dropped = deliver(&receiver, message("m"));
    assert!(tokio::time::timeout(Duration::from_secs(1), dropped).await.is_err());
    assert_eq!((drain.running(), clone.drain().running()), (1, 1));
    // The two share the limit of handlers without a delivery, too.
    let refused = deliver(&layer.layer(handler.clone()), message("other")).await;
    assert!(matches!(refused, Err(ReceiveError::Store(error)) if error.kind() == ErrorKind::Overloaded));
    drain.wait().await;
    assert_eq!(handler.counts(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_before_the_handler_prevents_the_run() {
    for fault in [Fault::Before, Fault::After, Fault::Hang] {
        let (store, handler) = (RemoteStore::new(), Handler::default());
        let receiver = layer(store.clone()).layer(handler.clone());
        store.fail("claim", [fault; 2]);
        let failed = deliver(&receiver, message("m")).await;
        assert!(matches!(failed, Err(ReceiveError::Store(_))), "{fault:?}: {failed:?}");
        assert_eq!(disposition(&failed), Disposition::Redeliver(None));
        assert_eq!(handler.counts(), (0, 0));
        // The receiver releases the claim in the background if it reached the store.
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(
            matches!(deliver(&receiver, message("m")).await, Ok(Receipt::First(1))),
            "{fault:?}"
        );
    }
    let (store, handler) = (RemoteStore::new(), Handler::default());
    let receiver = layer(store.clone()).layer(handler.clone());
    for (fault, kind) in [
        (Fault::Corrupt, ErrorKind::CorruptRecord),
        (Fault::Misconfigured, ErrorKind::Configuration),
    ] {
        store.fail("claim", [fault]);
        let failed = deliver(&receiver, message("m")).await;
        assert!(
            matches!(&failed, Err(ReceiveError::Store(error)) if error.kind() == kind),
            "{failed:?}"
        );
        // The message is neither acknowledged nor rejected, because an operator may correct the
        // store.
        assert_eq!(disposition(&failed), Disposition::Redeliver(None));
    }
    assert_eq!(handler.counts(), (0, 0));
    // The first claim took effect and its reply was lost.
    store.fail("claim", [Fault::After, Fault::Misconfigured]);
    assert_eq!(
        disposition(&deliver(&receiver, message("m")).await),
        Disposition::Redeliver(None)
    );
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::First(1))));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_vanishes_between_effect_and_completion_acknowledges_nothing() {
    const SHORT: Duration = Duration::from_secs(60);
    const LONG: Duration = Duration::from_secs(600);
    for (again_runs, fault, absence) in [
        (false, Fault::Before, SHORT),
        (true, Fault::Before, SHORT),
        (false, Fault::Before, LONG),
        (true, Fault::Before, LONG),
        (false, Fault::After, LONG),
    ] {
        let (store, handler) = (RemoteStore::new(), Handler::default());
        let mut layer = layer(store.clone());
        if again_runs {
            layer = layer.at_least_once();
        }
        let receiver = layer.layer(handler.clone());
        store.fail("complete", [fault; 10_000]);
        let unrecorded = deliver(&receiver, message("m")).await;
        assert!(matches!(unrecorded, Err(ReceiveError::Unrecorded(_))), "{unrecorded:?}");
        assert_eq!(disposition(&unrecorded), Disposition::Redeliver(None));
        assert_eq!(handler.counts(), (1, 1));
        tokio::time::sleep(absence).await;
        store.heal();
        tokio::time::sleep(SHORT).await;
        let again = deliver(&receiver, message("m")).await;
        match (fault, absence, again_runs) {
            // The completion was deferred and recorded when the store was back.
            (Fault::After, ..) | (_, SHORT, _) => assert!(matches!(again, Ok(Receipt::Duplicate)), "{again:?}"),
            (_, _, true) => assert!(matches!(again, Ok(Receipt::First(2))), "{again:?}"),
            _ => assert!(matches!(again, Ok(Receipt::Unknown)), "{again:?}"),
        }
    }
    // The receiver waits until a short failure ends.
    let (store, handler) = (RemoteStore::new(), Handler::default());
    store.fail("complete", [Fault::Before, Fault::After]);
    let receiver = layer(store).layer(handler.clone());
    assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::First(1))));
    assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::Duplicate)));
}

async fn after_death(
    attempts: usize,
    change: impl Fn(ReceiverLayer<RemoteStore, Message>) -> ReceiverLayer<RemoteStore, Message>,
) -> (Received, Handler, RemoteStore, Receiver<Handler, RemoteStore, Message>) {
    let (store, handler) = (RemoteStore::new(), Handler::planning(vec![Plan::Hang; attempts]));
    let layer = change(layer(store.clone())).pass_lease(|message: &mut Message, lease| message.lease = Some(lease));
    let receiver = layer.layer(handler.clone());
    // The test simulates processes that died in the handler: it never ends, and no lease is
    // renewed.
    store.fail("renew", vec![Fault::Before; 10_000]);
    for _ in 0..attempts {
        let dying = receiver.clone();
        tokio::spawn(async move { deliver(&dying, message("m")).await });
        tokio::time::sleep(Duration::from_secs(31)).await;
    }
    store.heal();
    let received = deliver(&receiver, message("m")).await;
    (received, handler, store, receiver)
}

#[tokio::test(start_paused = true)]
async fn a_lost_attempt_is_unknown_until_it_is_resolved() {
    let (received, handler, store, receiver) = after_death(1, |layer| layer).await;
    assert!(matches!(received, Ok(Receipt::Unknown)));
    assert_eq!(handler.counts(), (1, 0));
    let key = layer(store.clone()).storage_key("m").unwrap();
    let fence = store.peek(&key).await.unwrap().unwrap().fence;
    store.resolve(&key, fence, &Resolution::Absent).await.unwrap();
    assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::First(2))));
}

#[tokio::test(start_paused = true)]
async fn a_lost_attempt_is_repeated_only_where_configured_and_not_forever() {
    let (received, handler, ..) = after_death(4, ReceiverLayer::at_least_once).await;
    assert!(matches!(received, Ok(Receipt::First(5))));
    let leases = handler.leases.lock().unwrap().clone();
    assert_eq!(
        leases.iter().map(MessageLease::attempt).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5]
    );
    assert!(leases.windows(2).all(|two| two[0].fence() < two[1].fence()));
    let ids: Vec<_> = leases
        .iter()
        .map(|lease| (lease.id("order"), lease.id("mail")))
        .collect();
    assert!(ids.iter().all(|both| *both == ids[0] && both.0 != both.1));

    let (received, handler, ..) = after_death(5, ReceiverLayer::at_least_once).await;
    assert!(matches!(received, Ok(Receipt::Unknown)), "the attempts are used up");
    assert_eq!(handler.counts(), (5, 0));
    let (received, ..) = after_death(1, |layer| layer.at_least_once().with_max_attempts(1)).await;
    assert!(matches!(received, Ok(Receipt::Unknown)));
}

#[tokio::test(start_paused = true)]
async fn a_lost_attempt_can_be_checked() {
    for found in [Recovered::Happened(()), Recovered::NotHappened, Recovered::Unknown] {
        let asked = Arc::new(Mutex::new(Vec::<(Vec<u8>, Fence)>::new()));
        let (received, handler, _, receiver) = after_death(1, |layer| {
            let (asked, found) = (Arc::clone(&asked), found.clone());
            layer.with_recovery(move |message: &Message, lease: MessageLease| {
                asked.lock().unwrap().push((message.id.clone(), lease.fence()));
                let found = found.clone();
                async move { found }
            })
        })
        .await;
        let lost = handler.leases.lock().unwrap()[0].fence();
        assert!(matches!(&asked.lock().unwrap()[..], [(id, fence)] if id == b"m" && *fence > lost));
        let again = deliver(&receiver, message("m")).await;
        match found {
            Recovered::Happened(()) => {
                assert!(matches!(
                    (received, again),
                    (Ok(Receipt::Duplicate), Ok(Receipt::Duplicate))
                ));
                assert_eq!(handler.counts(), (1, 0));
            }
            Recovered::NotHappened => {
                assert!(matches!(
                    (received, again),
                    (Ok(Receipt::First(2)), Ok(Receipt::Duplicate))
                ));
                assert_eq!(handler.counts(), (2, 1));
            }
            Recovered::Unknown => {
                // The next delivery repeats the check.
                assert!(matches!(
                    (received, again),
                    (Ok(Receipt::InFlight { .. }), Ok(Receipt::InFlight { .. }))
                ));
                assert_eq!(handler.counts(), (1, 0));
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_check_that_panics_leaves_the_outcome_open() {
    async fn panics() -> Recovered<()> {
        panic!("the check panics")
    }
    let (received, handler, ..) = after_death(1, |layer| layer.with_recovery(|_, _| panics())).await;
    assert!(matches!(received, Ok(Receipt::InFlight { .. })));
    assert_eq!(handler.counts(), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_zombie_acknowledges_only_a_recorded_outcome() {
    let (store, handler) = (
        RemoteStore::new(),
        Handler::planning([Plan::Take(Duration::from_secs(3_600))]),
    );
    let receiver = layer(store.clone()).at_least_once().layer(handler.clone());
    store.fail("renew", [Fault::Hang; 1_000]);
    let zombie = tokio::spawn({
        let receiver = receiver.clone();
        async move { deliver(&receiver, message("m")).await }
    });
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::First(2))));
    assert!(
        matches!(zombie.await.unwrap(), Ok(Receipt::Duplicate)),
        "the outcome of the other attempt counts"
    );
}

#[tokio::test(start_paused = true)]
async fn a_message_is_forgotten_after_its_retention() {
    let (store, handler) = (RemoteStore::new(), Handler::default());
    let receiver = layer(store.clone()).layer(handler.clone());
    assert!(deliver(&receiver, message("m")).await.is_ok());
    tokio::time::sleep(Duration::from_secs(7 * 24 * 3_600 - 1)).await;
    assert!(
        matches!(deliver(&receiver, message("m")).await, Ok(Receipt::Duplicate)),
        "the retention is a week"
    );
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::First(2))));
}

#[tokio::test(start_paused = true)]
async fn a_poison_message_does_not_block_others() {
    let handler = Handler::planning([Plan::Fail, Plan::Panic, Plan::Fail]);
    let receiver = layer(MemoryStore::new()).layer(handler.clone());
    for _ in 0..3 {
        assert!(deliver(&receiver, message("poison")).await.is_err());
    }
    for id in 0_u8..100 {
        assert!(matches!(deliver(&receiver, message([id])).await, Ok(Receipt::First(_))));
    }
}

#[test]
fn nothing_is_begun_outside_of_a_runtime() {
    let handler = Handler::default();
    let receiver = layer(MemoryStore::new()).layer(handler.clone());
    let received = deliver(&receiver, message("m")).now_or_never().unwrap();
    assert!(matches!(received, Err(ReceiveError::Store(_))));
    assert_eq!(handler.counts(), (0, 0));
}

#[test]
fn only_a_first_delivery_and_its_duplicates_count_as_handled() {
    let in_flight = Receipt::InFlight {
        retry_after: Duration::ZERO,
    };
    for (receipt, is_handled) in [
        (Receipt::First(()), true),
        (Receipt::Duplicate, true),
        (in_flight, false),
        (Receipt::Unknown, false),
    ] {
        assert_eq!(receipt.is_handled(), is_handled, "{receipt:?}");
    }
}

#[test]
fn an_error_of_the_receiver_names_its_cause() {
    let failure = || std::io::Error::other("no disk");
    let too_long = layer(MemoryStore::new()).storage_key("m".repeat(5_000)).unwrap_err();
    let store = tower_idempotency::Error::new(ErrorKind::StoreUnavailable, "no store");
    for (error, cause) in [
        (ReceiveError::Handler(failure()), "no disk"),
        (ReceiveError::Rejected(Some(failure())), "no disk"),
        (ReceiveError::InvalidId(too_long), "5000 bytes"),
        (ReceiveError::Store(store), "no store"),
    ] {
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains(cause), "{source}");
    }
    assert!(std::error::Error::source(&ReceiveError::<std::io::Error>::Panicked).is_none());
}

#[test]
fn debug_output_contains_no_id() {
    let layer = layer(MemoryStore::new()).with_secret(&[7; 32]).unwrap();
    let future = layer.layer(Handler::default()).call(message("secret-id"));
    let id = MessageId::from("secret-id");
    let shown = format!("{layer:?} {:?} {future:?} {id:?}", layer.layer(7_u8));
    for part in [
        "ReceiverLayer",
        "billing",
        "ErrorClasses(none)",
        "Receiver {",
        "ReceiverFuture",
        "MessageId(..)",
    ] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    assert!(!shown.contains("secret-id"), "{shown}");
}

mod rejections;
mod types;

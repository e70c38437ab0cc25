//! Messages that their handler rejects permanently.

use tower_idempotency::receiver::{HandlerErrorClass, receive_all};

use super::*;

/// A layer that rejects every error of the handler.
fn rejecting<St>(store: St) -> ReceiverLayer<St, Message> {
    layer(store).with_error_class(|_: &String| HandlerErrorClass::Reject)
}

fn is_rejected(received: &Received) -> bool {
    matches!(received, Err(ReceiveError::Rejected(Some(error))) if error == "no")
        && disposition(received) == Disposition::Reject
}

fn is_duplicate_of_a_rejected_message(received: &Received) -> bool {
    matches!(received, Ok(Receipt::Unknown)) && disposition(received) == Disposition::Reject
}

type SetUp = fn(ReceiverLayer<RemoteStore, Message>) -> ReceiverLayer<RemoteStore, Message>;

/// The settings for a lost attempt. A rejected attempt does not count as lost.
fn if_lost() -> [SetUp; 3] {
    [
        |layer| layer,
        ReceiverLayer::at_least_once,
        |layer| layer.with_recovery(|_, _| async { Recovered::NotHappened }),
    ]
}

#[tokio::test(start_paused = true)]
async fn a_rejected_message_is_not_handled_again_within_its_retention() {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    for if_lost in if_lost() {
        let (store, handler) = (RemoteStore::new(), Handler::planning([Plan::Fail]));
        let layer = if_lost(rejecting(store.clone())).with_retention(2 * DAY);
        let receiver = layer.layer(handler.clone());
        assert!(is_rejected(&deliver(&receiver, message("m")).await));
        let calls = ["claim", "complete", "release", "renew", "peek"].map(|operation| store.calls(operation));
        assert_eq!(calls, [1, 1, 0, 0, 0]);
        for _ in 0..3 {
            let duplicate = deliver(&receiver, message("m")).await;
            assert!(is_duplicate_of_a_rejected_message(&duplicate), "{duplicate:?}");
        }
        tokio::time::sleep(DAY).await;
        assert!(is_duplicate_of_a_rejected_message(
            &deliver(&receiver, message("m")).await
        ));
        assert_eq!(handler.counts(), (1, 0));
        tokio::time::sleep(DAY).await;
        assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::First(2))));
    }
}

#[tokio::test(start_paused = true)]
async fn duplicates_that_wait_for_a_message_are_rejected_with_it() {
    for if_lost in if_lost() {
        let handler = Handler::planning([Plan::Fail]);
        let layer = if_lost(rejecting(RemoteStore::new())).with_wait(Duration::from_secs(60));
        let receiver = layer.layer(handler.clone());
        let all = join_all((0..20).map(|_| deliver(&receiver, message("m")))).await;
        assert_eq!(all.iter().filter(|received| is_rejected(received)).count(), 1);
        let duplicates = all
            .iter()
            .filter(|received| is_duplicate_of_a_rejected_message(received));
        assert_eq!(duplicates.count(), 19);
        assert_eq!(handler.counts(), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_memory_store_rejects_duplicates_too() {
    let handler = Handler::planning([Plan::Fail]);
    let receiver = rejecting(MemoryStore::new()).at_least_once().layer(handler.clone());
    assert!(is_rejected(&deliver(&receiver, message("m")).await));
    assert!(is_duplicate_of_a_rejected_message(
        &deliver(&receiver, message("m")).await
    ));
    assert_eq!(handler.counts(), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn an_operator_decides_the_outcome_of_a_rejected_message() {
    const HOUR: Duration = Duration::from_secs(60 * 60);
    let handled = Resolution::Completed(tower_idempotency::protocol::Outcome::Tombstone, HOUR);
    for (resolution, runs) in [(Resolution::Absent, 2), (handled, 1)] {
        let (store, handler) = (RemoteStore::new(), Handler::planning([Plan::Fail]));
        let layer = rejecting(store.clone());
        let receiver = layer.clone().layer(handler.clone());
        assert!(is_rejected(&deliver(&receiver, message("m")).await));
        let key = layer.storage_key("m").unwrap();
        let fence = store.peek(&key).await.unwrap().unwrap().fence;
        store.resolve(&key, fence, &resolution).await.unwrap();
        let again = deliver(&receiver, message("m")).await;
        assert_eq!(disposition(&again), Disposition::Acknowledge);
        assert_eq!(handler.counts().0, runs);
    }
}

#[tokio::test(start_paused = true)]
async fn each_error_has_its_class_whatever_the_setting_for_the_others() {
    for (on_error, redelivered) in [
        (OnError::Release, Disposition::Acknowledge),
        (OnError::Reject, Disposition::Acknowledge),
        (OnError::Store, Disposition::Acknowledge),
        (OnError::Unknown, Disposition::Reject),
    ] {
        let runs = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&runs);
        let handler = tower::service_fn(move |message: Message| {
            let is_first = counted.fetch_add(1, Ordering::SeqCst) < 2;
            let error = String::from_utf8(message.payload).unwrap();
            async move { if is_first { Err(error) } else { Ok(()) } }
        });
        let classify = |error: &String| match error.as_str() {
            "poison" => HandlerErrorClass::Reject,
            _ => HandlerErrorClass::Redeliver,
        };
        let receiver = layer(RemoteStore::new())
            .on_error(on_error)
            .with_error_class(classify)
            .layer(handler);
        let deliver = |id: &'static str| receiver.clone().oneshot(message(id).with(id));
        let (poison, failed) = (deliver("poison").await, deliver("failure").await);
        assert!(matches!(&poison, Err(ReceiveError::Rejected(Some(_)))), "{poison:?}");
        assert!(matches!(&failed, Err(ReceiveError::Handler(_))), "{failed:?}");
        assert_eq!(Disposition::of(&failed), Disposition::Redeliver(None));
        assert_eq!(Disposition::of(&deliver("poison").await), Disposition::Reject);
        assert_eq!(Disposition::of(&deliver("failure").await), redelivered, "{on_error:?}");
        let again = usize::from(matches!(on_error, OnError::Release | OnError::Reject));
        assert_eq!(runs.load(Ordering::SeqCst), 2 + again, "{on_error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn every_failure_can_be_a_rejection() {
    for plan in [Plan::Fail, Plan::Panic] {
        let handler = Handler::planning([plan]);
        let layer = layer(RemoteStore::new()).at_least_once().on_error(OnError::Reject);
        let receiver = layer.layer(handler.clone());
        let rejected = deliver(&receiver, message("m")).await;
        let has_error =
            matches!(&rejected, Err(ReceiveError::Rejected(error)) if error.is_some() == (plan == Plan::Fail));
        assert!(has_error, "{rejected:?}");
        assert_eq!(disposition(&rejected), Disposition::Reject);
        assert!(is_duplicate_of_a_rejected_message(
            &deliver(&receiver, message("m")).await
        ));
        assert_eq!(handler.counts(), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_without_a_record_can_be_rejected_too() {
    let handler = Handler::planning([Plan::Fail]);
    let layer = rejecting(RemoteStore::new()).on_missing_id(OnMissingId::Unprotected);
    let receiver = layer.layer(handler.clone());
    assert!(is_rejected(&deliver(&receiver, message("")).await));
}

#[tokio::test(start_paused = true)]
async fn a_rejection_that_cannot_be_recorded_is_recorded_when_the_store_is_back() {
    for if_lost in if_lost() {
        let (store, handler) = (RemoteStore::new(), Handler::planning([Plan::Fail]));
        let receiver = if_lost(rejecting(store.clone())).layer(handler.clone());
        store.fail("complete", [Fault::Before; 10_000]);
        assert!(is_rejected(&deliver(&receiver, message("m")).await));
        store.heal();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(is_duplicate_of_a_rejected_message(
            &deliver(&receiver, message("m")).await
        ));
        assert_eq!(handler.counts(), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_classifier_that_panics_is_a_handler_that_panics() {
    let classify = |_: &String| -> HandlerErrorClass { panic!("the classifier panics") };
    let handler = Handler::planning([Plan::Fail]);
    let receiver = layer(RemoteStore::new())
        .with_error_class(classify)
        .layer(handler.clone());
    assert!(matches!(
        deliver(&receiver, message("m")).await,
        Err(ReceiveError::Panicked)
    ));
    assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::First(2))));
}

#[tokio::test(start_paused = true)]
async fn an_error_of_another_type_than_the_classifiers_is_not_rejected() {
    let handler = Handler::planning([Plan::Fail]);
    let layer = layer(RemoteStore::new()).with_error_class(|_: &std::io::Error| HandlerErrorClass::Reject);
    let receiver = layer.layer(handler.clone());
    assert!(matches!(
        deliver(&receiver, message("m")).await,
        Err(ReceiveError::Handler(_))
    ));
    assert!(matches!(deliver(&receiver, message("m")).await, Ok(Receipt::First(2))));
}

#[tokio::test(start_paused = true)]
async fn a_rejection_within_a_batch_affects_only_its_message() {
    let receiver = rejecting(RemoteStore::new()).layer(Handler::planning([Plan::Fail]));
    let batch = receive_all(&receiver, ["a", "b", "a"].map(message), 1).await;
    let dispositions: Vec<_> = batch.dispositions().collect();
    assert_eq!(
        dispositions,
        [Disposition::Reject, Disposition::Acknowledge, Disposition::Reject]
    );
    assert_eq!(batch.rejected().collect::<Vec<_>>(), [0, 2]);
    assert_eq!(batch.failed().collect::<Vec<_>>(), [0, 2]);
}

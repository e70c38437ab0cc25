//! Ends of executions: the responses for duplicates, and the operations that reach the store.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Response, StatusCode, header};
use tower::Layer;
use tower_idempotency::{
    IdempotencyLayer, LostAttempt, MemoryStore, OnError, OnLost, Recovered, Store, StoreOutcomeOnly,
};

use super::{lost_key, outer, superseded, with_two_keys};
use crate::support::{AnyBody, Fault, Handler, Play, RemoteStore, frames, post, send, start, text};

type Respond = fn() -> Response<AnyBody>;

/// Returns a response with this status and the media type of a stream.
fn event_stream(status: StatusCode) -> Response<AnyBody> {
    let mut response = Response::new(frames(vec![Play::Data("data: paid\n\n")]));
    *response.status_mut() = status;
    let kind = "text/event-stream".parse().unwrap();
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_in_flight_gets_the_failure_that_its_owner_stores() {
    let handler = Handler::new()
        .taking(Duration::from_secs(1))
        .responding(|_| panic!("after the effect"));
    let service = IdempotencyLayer::new(MemoryStore::new())
        .on_error(OnError::Store)
        .layer(handler.clone());
    let owner = start(&service, post("k", "pay"));
    tokio::time::sleep(Duration::from_millis(10)).await;
    let waiter = start(&service, post("k", "pay")).await.unwrap();
    let (first, later) = (owner.await.unwrap(), send(&service, post("k", "pay")).await);
    assert!(!first.body.is_empty() && !first.is_replay());
    for replay in [waiter, later] {
        assert_eq!((replay.status(), replay.is_replay()), (500, true));
        assert_eq!(replay.body, first.body);
    }
    assert_eq!(handler.runs(), 1);
}

/// The owner knows the result, so its duplicates need no look at the store. None of them runs.
#[tokio::test(start_paused = true)]
async fn a_duplicate_in_flight_of_a_response_that_is_not_stored_gets_its_result_from_the_owner() {
    let stream = || event_stream(StatusCode::BAD_GATEWAY);
    let endings: [(OnError, Respond, &str); 3] = [
        (OnError::Release, stream, "request-outstanding"),
        (OnError::Unknown, stream, "outcome-unknown"),
        (
            OnError::Release,
            || Response::new(frames(vec![Play::Break])),
            "response-not-stored",
        ),
    ];
    for (on_error, respond, code) in endings {
        let store = RemoteStore::new();
        let handler = Handler::new()
            .taking(Duration::from_secs(1))
            .responding(move |_| respond());
        let service = IdempotencyLayer::new(store.clone())
            .on_error(on_error)
            .layer(handler.clone());
        let owner = start(&service, post("k", "pay"));
        tokio::time::sleep(Duration::from_millis(10)).await;
        let waiter = start(&service, post("k", "pay")).await.unwrap();
        assert_eq!((waiter.code(), handler.runs()), (code, 1));
        assert!(owner.await.unwrap().status() >= 500);
        assert_eq!((store.calls("claim"), store.calls("peek")), (1, 0), "{code}");
    }
}

/// One operation ends each attempt. The guard of the key would send another one if it still took the
/// attempt for the owner.
#[tokio::test(start_paused = true)]
async fn an_execution_that_has_ended_sends_nothing_more_to_the_store() {
    let endings: [(&str, OnError, Respond, &str); 7] = [
        (
            "a response",
            OnError::Release,
            || text(StatusCode::OK, "paid"),
            "complete",
        ),
        (
            "a stream",
            OnError::Release,
            || event_stream(StatusCode::OK),
            "complete",
        ),
        (
            "a broken response",
            OnError::Release,
            || Response::new(frames(vec![Play::Break])),
            "complete",
        ),
        (
            "a stored panic",
            OnError::Store,
            || panic!("after the effect"),
            "complete",
        ),
        (
            "a released panic",
            OnError::Release,
            || panic!("after the effect"),
            "release",
        ),
        (
            "a released failure",
            OnError::Release,
            || text(StatusCode::BAD_GATEWAY, "failed"),
            "release",
        ),
        (
            "an unknown failure",
            OnError::Unknown,
            || text(StatusCode::BAD_GATEWAY, "failed"),
            "renew",
        ),
    ];
    for (name, on_error, respond, operation) in endings {
        let store = RemoteStore::new();
        let handler = Handler::new().responding(move |_| respond());
        let service = IdempotencyLayer::new(store.clone()).on_error(on_error).layer(handler);
        send(&service, post("k", "pay")).await;
        tokio::time::sleep(Duration::from_secs(100)).await;
        for each in ["complete", "release", "renew"] {
            assert_eq!(store.calls(each), usize::from(each == operation), "{each} after {name}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_superseded_execution_sends_nothing_more_to_the_store() {
    let store = RemoteStore::new();
    let layer = IdempotencyLayer::new(store.clone()).on_lost(OnLost::Execute);
    let renewals = Arc::new(AtomicUsize::new(0));
    let (seen, owners) = (Arc::clone(&renewals), store.clone());
    let handler = Handler::new().taking(Duration::from_secs(60)).responding(move |_| {
        seen.store(owners.calls("renew"), Ordering::SeqCst);
        text(StatusCode::OK, "too late")
    });
    let late = superseded(&store, layer.layer(handler)).await;
    assert!(late.is_replay());
    tokio::time::sleep(Duration::from_secs(100)).await;
    let calls = ["complete", "release", "renew"].map(|operation| store.calls(operation));
    assert_eq!(calls, [2, 0, renewals.load(Ordering::SeqCst)]);
}

/// The refusal reports only that another attempt runs. The handler of this attempt ran, too, so the
/// outer layer does not take the refusal as proof that the request had no effect.
#[tokio::test(start_paused = true)]
async fn an_inner_attempt_that_ran_and_waits_in_vain_for_its_successor_has_an_unknown_outcome() {
    let store = RemoteStore::new();
    let inner = || IdempotencyLayer::new(store.clone()).on_lost(OnLost::Execute);
    let handler = Handler::new().taking(Duration::from_secs(60));
    let service = outer()
        .on_error(OnError::Unknown)
        .layer(inner().with_wait(Duration::ZERO).layer(handler.clone()));
    let owner = start(&service, with_two_keys());
    tokio::time::sleep(Duration::from_secs(1)).await;
    store.fail("renew", [Fault::Before; 1_000]);
    tokio::time::sleep(Duration::from_secs(40)).await;
    store.heal();
    let elsewhere = inner().layer(Handler::new().taking(Duration::from_secs(3_600)));
    let successor = start(&elsewhere, with_two_keys());
    assert_eq!(owner.await.unwrap().code(), "request-outstanding");
    assert_eq!(send(&service, with_two_keys()).await.code(), "outcome-unknown");
    assert_eq!(handler.runs(), 1);
    successor.abort();
}

/// The request had waited for most of its time before it ran.
#[tokio::test(start_paused = true)]
async fn a_superseded_owner_waits_for_its_successor_as_long_as_a_new_request() {
    let store = RemoteStore::new();
    let layer = || IdempotencyLayer::new(store.clone()).on_lost(OnLost::Execute);
    let failing = Handler::new()
        .taking(Duration::from_secs(25))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let first = start(&layer().layer(failing), post("k", "pay"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let owner = start(
        &layer().layer(Handler::new().taking(Duration::from_secs(60))),
        post("k", "pay"),
    );
    assert_eq!(first.await.unwrap().status(), 502);
    tokio::time::sleep(Duration::from_secs(2)).await;
    store.fail("renew", [Fault::Before; 1_000]);
    tokio::time::sleep(Duration::from_secs(40)).await;
    store.heal();
    // The successor ends about 20 s after the owner.
    let successor = start(
        &layer().layer(Handler::new().taking(Duration::from_secs(40))),
        post("k", "pay"),
    );
    let owner = owner.await.unwrap();
    assert_eq!((owner.status(), owner.is_replay()), (201, true));
    assert!(!successor.await.unwrap().is_replay());
}

/// The third party refuses the lost attempt from then on, if it has seen the fence of the check.
#[tokio::test(start_paused = true)]
async fn a_recovery_check_gets_the_fence_of_its_attempt() {
    let store = RemoteStore::new();
    let zombie = lost_key(&store).await;
    store.heal();
    let (key, _) = store.only();
    let lost = store.peek(&key).await.unwrap().unwrap().fence;
    let seen = Arc::new(Mutex::new(None));
    let fence = Arc::clone(&seen);
    let check = move |attempt: LostAttempt| {
        *fence.lock().unwrap() = Some(attempt.fence);
        async { Recovered::NotHappened }
    };
    let service = IdempotencyLayer::new(store.clone())
        .with_recovery(check)
        .layer(Handler::new());
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
    let fence = seen.lock().unwrap().unwrap();
    assert!(fence > lost);
    assert_eq!(fence, store.peek(&key).await.unwrap().unwrap().fence);
    zombie.abort();
}

/// The check could not find anything out, but the key has an outcome by now.
#[tokio::test(start_paused = true)]
async fn a_check_that_lost_its_key_returns_the_response_that_the_key_holds() {
    let store = RemoteStore::new();
    let zombie = lost_key(&store).await;
    store.heal();
    let check = |_| async {
        tokio::time::sleep(Duration::from_secs(60)).await;
        Recovered::Unknown
    };
    let layer = IdempotencyLayer::new(store.clone()).with_recovery(check);
    let got = superseded(&store, layer.layer(Handler::new())).await;
    assert_eq!((got.status(), got.is_replay()), (201, true));
    zombie.abort();
}

/// The store must not have the secret, so only the first caller gets it.
#[tokio::test(start_paused = true)]
async fn a_duplicate_in_flight_of_a_secret_that_was_recovered_is_refused() {
    let store = RemoteStore::new();
    let zombie = lost_key(&store).await;
    store.heal();
    let check = |_| async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut response = Response::new("secret".into());
        response.extensions_mut().insert(StoreOutcomeOnly);
        Recovered::Happened(response)
    };
    let handler = Handler::new();
    let service = IdempotencyLayer::new(store.clone())
        .with_recovery(check)
        .layer(handler.clone());
    let first = start(&service, post("k", "pay"));
    tokio::time::sleep(Duration::from_millis(10)).await;
    let looks = store.calls("peek");
    let waiter = start(&service, post("k", "pay")).await.unwrap();
    assert_eq!((waiter.code(), store.calls("peek")), ("response-not-stored", looks));
    assert_eq!((&first.await.unwrap().body[..], handler.runs()), (&b"secret"[..], 0));
    zombie.abort();
}

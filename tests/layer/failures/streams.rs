//! Responses whose heads reach their callers before their bodies have ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::BodyExt;
use tower::{Layer, ServiceExt};
use tower_idempotency::protocol::{Outcome, Status};
use tower_idempotency::{
    DoNotStore, IdempotencyLayer, MemoryStore, OnError, Recovered, Refusal, Store, StoreFor, StoreOutcomeOnly,
    StoreResponse, StreamResponse,
};

use super::code_of;
use crate::support::{self, AnyBody, Handler, RemoteStore, Timer, post, send, start, text};

/// Counts up when it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Returns a handler whose response has this status and stalls after its first frame, and the
/// number of its bodies that were dropped.
fn stalls(status: StatusCode) -> (Handler, Arc<AtomicUsize>) {
    let dropped = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&dropped);
    let handler = Handler::new().responding(move |_| {
        let counted = Counted(Arc::clone(&count));
        let for_ever = async move {
            std::future::pending::<()>().await;
            drop(counted);
        };
        let mut response = Response::new(support::stalling("front", for_ever));
        *response.status_mut() = status;
        response
    });
    (handler, dropped)
}

#[tokio::test(start_paused = true)]
async fn a_response_that_stalls_gets_a_tombstone_and_streams_on() {
    let store = RemoteStore::new();
    let (handler, dropped) = stalls(StatusCode::OK);
    let layer = IdempotencyLayer::new(store.clone()).with_lease(Duration::from_secs(3));
    let drain = layer.drain();
    let service = layer.layer(handler.clone());
    let begin = Timer::start();
    let owner = tokio::spawn(service.clone().oneshot(post("k", "pay")));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let waiter = start(&service, post("k", "pay"));
    let mut response = owner.await.unwrap().unwrap();
    assert_eq!((begin.elapsed().as_secs(), response.status()), (10, StatusCode::OK));
    assert!(store.only().1.is_completed(), "the tombstone is stored first");
    assert!(
        store.calls("renew") >= 6,
        "the owner renews its lease while it reads the body"
    );
    let front = response.body_mut().frame().await.unwrap().unwrap();
    assert_eq!(front.into_data().unwrap(), "front");
    assert_eq!(waiter.await.unwrap().code(), "response-not-stored");
    assert_eq!(send(&service, post("k", "pay")).await.code(), "response-not-stored");
    assert_eq!((handler.runs(), dropped.load(Ordering::SeqCst)), (1, 0));
    // The caller leaves while the response streams.
    drop(response);
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    drain.wait().await;
}

/// The layer went on reading from a response whose caller had left. The key was stuck, and draining
/// never ended.
#[tokio::test(start_paused = true)]
async fn a_response_that_stalls_without_a_caller_is_dropped() {
    for timeout in [10, 2] {
        let (handler, dropped) = stalls(StatusCode::OK);
        let timeout = Duration::from_secs(timeout);
        let layer = IdempotencyLayer::new(MemoryStore::new()).with_response_timeout(timeout);
        let drain = layer.drain();
        let service = layer.layer(handler.clone());
        let owner = start(&service, post("k", "pay"));
        tokio::time::sleep(Duration::from_secs(1)).await;
        owner.abort();
        let begin = Timer::start();
        drain.wait().await;
        assert_eq!(begin.elapsed().as_secs() + 1, timeout.as_secs());
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
        let again = service.clone().oneshot(post("k", "pay")).await.unwrap();
        assert_eq!(code_of(&again), "response-not-stored");
    }
}

#[tokio::test(start_paused = true)]
async fn a_response_that_stalls_and_is_not_to_be_stored_frees_its_key_and_streams_on() {
    for (status, on_error, second) in [
        (StatusCode::FORBIDDEN, OnError::Release, ""),
        (StatusCode::BAD_GATEWAY, OnError::Release, ""),
        (StatusCode::BAD_GATEWAY, OnError::Unknown, "outcome-unknown"),
        (StatusCode::BAD_GATEWAY, OnError::Store, "response-not-stored"),
    ] {
        let (handler, _) = stalls(status);
        let layer = IdempotencyLayer::new(MemoryStore::new()).on_error(on_error);
        let service = layer.layer(handler.clone());
        let first = service.clone().oneshot(post("k", "pay")).await.unwrap();
        let again = service.clone().oneshot(post("k", "pay")).await.unwrap();
        assert_eq!((first.status(), code_of(&again)), (status, second), "{on_error:?}");
    }
}

/// The attempt counts as lost. A duplicate that waited got a final refusal, although the next request
/// ran the handler again.
#[tokio::test(start_paused = true)]
async fn a_duplicate_of_a_lost_stream_may_repeat_its_request_while_attempts_are_left() {
    for (attempts, code) in [(2, "request-outstanding"), (1, "outcome-unknown")] {
        let layer = IdempotencyLayer::new(MemoryStore::new()).on_error(OnError::Unknown);
        let layer = layer.at_least_once().with_max_attempts(attempts);
        let (handler, _) = stalls(StatusCode::BAD_GATEWAY);
        let handler = handler.taking(Duration::from_secs(2));
        let service = layer.layer(handler.clone());
        let owner = tokio::spawn(service.clone().oneshot(post("k", "pay")));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let waiter = start(&service, post("k", "pay"));
        let _first = owner.await.unwrap().unwrap();
        let refused = waiter.await.unwrap();
        let refusal = refused.head.extensions.get::<Refusal>().unwrap();
        assert_eq!((refused.code(), refusal.is_retryable()), (code, attempts > 1));
        let _again = service.oneshot(post("k", "pay")).await.unwrap();
        assert_eq!(handler.runs(), attempts as usize);
    }
}

/// Changes a response before the handler returns it.
type Change = fn(&mut Response<AnyBody>);

/// Returns a handler whose responses stall after their first frame.
fn endless(change: Change) -> Handler {
    Handler::new().responding(move |_| {
        let mut response = Response::new(support::stalling("front", std::future::pending()));
        change(&mut response);
        response
    })
}

fn set_type(response: &mut Response<AnyBody>, media_type: &'static str) {
    let media_type = HeaderValue::from_static(media_type);
    response.headers_mut().insert(header::CONTENT_TYPE, media_type);
}

/// Sends a request and returns its response and the first bytes of its body. Panics if any time
/// passes.
async fn first_bytes(service: impl Serve) -> Response<AnyBody> {
    let begin = Timer::start();
    let mut response = service.oneshot(post("k", "pay")).await.unwrap();
    let front = response.body_mut().frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(front, "front");
    assert_eq!(begin.elapsed(), Duration::ZERO);
    response
}

/// The service type of these tests.
trait Serve:
    tower::Service<http::Request<AnyBody>, Response = Response<AnyBody>, Error = std::convert::Infallible, Future: Send>
    + Clone
    + Send
    + 'static
{
}

impl<S> Serve for S where
    S: tower::Service<
            http::Request<AnyBody>,
            Response = Response<AnyBody>,
            Error = std::convert::Infallible,
            Future: Send,
        > + Clone
        + Send
        + 'static
{
}

/// An endless response with a veto never delivered a byte.
#[tokio::test(start_paused = true)]
async fn a_response_that_is_not_stored_streams_at_once_and_frees_its_key() {
    let changes: [(&str, Change); 4] = [
        ("a veto", |response| {
            response.extensions_mut().insert(DoNotStore);
        }),
        ("a veto together with another mark", |response| {
            response.extensions_mut().insert(StoreOutcomeOnly);
            response.extensions_mut().insert(DoNotStore);
        }),
        ("a status that is not stored", |response| {
            *response.status_mut() = StatusCode::NOT_FOUND;
        }),
        ("a failure", |response| {
            *response.status_mut() = StatusCode::BAD_GATEWAY;
        }),
    ];
    for (name, change) in changes {
        let handler = endless(change);
        let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone());
        let first = first_bytes(service.clone()).await;
        drop(first_bytes(service.clone()).await);
        assert_eq!(handler.runs(), 2, "{name}");
        drop(first);
    }
    let handler = endless(|_| {});
    let layer = IdempotencyLayer::new(MemoryStore::new()).store_if(|_| false);
    let service = layer.layer(handler.clone());
    drop(first_bytes(service.clone()).await);
    drop(first_bytes(service.clone()).await);
    assert_eq!(handler.runs(), 2);
}

/// Only server-sent events streamed. The layer held NDJSON back until its limits.
#[tokio::test(start_paused = true)]
async fn a_stream_that_would_be_stored_leaves_a_tombstone_before_its_first_byte() {
    let changes: [(&str, Change); 5] = [
        ("server-sent events", |response| set_type(response, "text/event-stream")),
        ("NDJSON", |response| {
            set_type(response, "Application/X-NDJSON; charset=utf-8");
        }),
        ("JSON sequences", |response| set_type(response, "application/json-seq")),
        ("a mark", |response| {
            response.extensions_mut().insert(StreamResponse);
        }),
        ("a mark on a failure that is stored", |response| {
            *response.status_mut() = StatusCode::BAD_GATEWAY;
            response.extensions_mut().insert(StoreResponse);
            response.extensions_mut().insert(StreamResponse);
        }),
    ];
    for (name, change) in changes {
        let handler = endless(change);
        let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone());
        let first = first_bytes(service.clone()).await;
        assert_eq!(
            send(&service, post("k", "pay")).await.code(),
            "response-not-stored",
            "{name}"
        );
        drop(first);
        assert_eq!(
            send(&service, post("k", "pay")).await.code(),
            "response-not-stored",
            "{name}"
        );
        assert_eq!(handler.runs(), 1, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_custom_list_of_stream_types_replaces_the_default_list() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).with_stream_types(["application/x-rows"]);
    let rows = layer.layer(endless(|response| set_type(response, "application/x-rows")));
    drop(first_bytes(rows).await);
    let stored = Handler::new().responding(|_| {
        let mut response = text(StatusCode::OK, "{}\n");
        set_type(&mut response, "application/x-ndjson");
        response
    });
    let service = layer.layer(stored);
    send(&service, post("other", "pay")).await;
    assert!(send(&service, post("other", "pay")).await.is_replay());
}

#[tokio::test(start_paused = true)]
async fn a_complete_failure_reaches_the_duplicates_in_its_process() {
    let handler = Handler::new()
        .taking(Duration::from_secs(1))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "the bank is down"));
    let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone());
    let both = [start(&service, post("k", "pay")), start(&service, post("k", "pay"))];
    for got in both {
        let got = got.await.unwrap();
        assert_eq!(
            (got.status(), &got.body[..], got.is_replay()),
            (502, &b"the bank is down"[..], false)
        );
    }
    assert_eq!(handler.runs(), 1);
}

/// The store held a one-time secret for a day.
#[tokio::test(start_paused = true)]
async fn a_secret_reaches_its_caller_and_is_never_stored() {
    for status in [StatusCode::CREATED, StatusCode::BAD_GATEWAY, StatusCode::NOT_FOUND] {
        let handler = Handler::new().taking(Duration::from_secs(1)).responding(move |_| {
            let mut response = text(status, "sk_live_1");
            response.extensions_mut().insert(StoreOutcomeOnly);
            response.extensions_mut().insert(StoreFor(Duration::from_secs(60)));
            response
        });
        let store = MemoryStore::new();
        let layer = IdempotencyLayer::new(store.clone());
        let service = layer.layer(handler.clone());
        let first = start(&service, post("k", "pay"));
        tokio::time::sleep(Duration::from_millis(10)).await;
        let waiter = start(&service, post("k", "pay"));
        let first = first.await.unwrap();
        assert_eq!((first.status(), &first.body[..]), (status.as_u16(), &b"sk_live_1"[..]));
        assert_eq!(waiter.await.unwrap().code(), "response-not-stored", "{status}");
        assert_eq!(
            send(&service, post("k", "pay")).await.code(),
            "response-not-stored",
            "{status}"
        );
        assert_eq!(handler.runs(), 1);
        let key = layer.storage_key(None, "k").unwrap();
        let record = store.peek(&key).await.unwrap().unwrap();
        assert!(
            matches!(record.status, Status::Completed(Outcome::Tombstone)),
            "{:?}",
            record.status
        );
    }
}

/// The callers of endless responses leave at every stage: before the head, while the layer reads
/// the body, and while the response streams.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_endless_responses_whose_callers_left_leave_nothing_behind() {
    let dropped = Arc::new(AtomicUsize::new(0));
    let handler = {
        let dropped = Arc::clone(&dropped);
        Handler::new().responding(move |n| {
            let counted = Counted(Arc::clone(&dropped));
            let body = if n % 2 == 0 {
                let for_ever = async move {
                    std::future::pending::<()>().await;
                    drop(counted);
                };
                support::stalling("front", for_ever)
            } else {
                // The stream is ready at every poll, so that only the limits end it.
                let lines = futures::stream::repeat_with(move || {
                    let _ = &counted;
                    Ok(http_body::Frame::data(bytes::Bytes::from_static(&[b'x'; 1024])))
                });
                http_body_util::StreamBody::new(lines).boxed_unsync()
            };
            let mut response = Response::new(body);
            match n % 3 {
                0 => set_type(&mut response, "application/x-ndjson"),
                1 => *response.status_mut() = StatusCode::BAD_GATEWAY,
                _ => {}
            }
            response
        })
    };
    let layer = IdempotencyLayer::new(MemoryStore::new())
        .with_response_timeout(Duration::from_millis(200))
        .with_response_limit(8 * 1024);
    let (service, drain) = (layer.layer(handler.clone()), layer.drain());
    for n in 0..10_000 {
        let request = service.clone().oneshot(post(&format!("k-{n}"), "pay"));
        if n % 4 == 0 {
            // The caller leaves while it waits for the rest of the body, or after it has got the
            // response.
            drop(support::poll_then_drop(3, request).await);
        } else {
            let response = tokio::time::timeout(Duration::from_millis(u64::from(n % 3 == 0)), request).await;
            if let Ok(Ok(mut response)) = response {
                let _ = response.body_mut().frame().await;
            }
        }
    }
    drain.wait().await;
    assert!(handler.runs() > 5_000, "{}", handler.runs());
    assert_eq!(dropped.load(Ordering::SeqCst), handler.runs(), "every body was dropped");
}

/// A recovery check or an operator reports a response with a secret and marks it. A request that
/// took effect cannot free its key, so `DoNotStore` has the same effect as `StoreOutcomeOnly`.
#[tokio::test(start_paused = true)]
async fn a_secret_in_a_recovered_or_resolved_response_is_not_stored() {
    let marks: [fn(&mut Response<bytes::Bytes>); 2] = [
        |response| {
            response.extensions_mut().insert(StoreOutcomeOnly);
        },
        |response| {
            response.extensions_mut().insert(DoNotStore);
        },
    ];
    for mark in marks {
        let secret = move || {
            let mut response = Response::new("sk_live_1".into());
            mark(&mut response);
            response
        };
        let store = RemoteStore::new();
        let zombie = super::lost_key(&store).await;
        store.heal();
        let check = move |_| async move { Recovered::Happened(secret()) };
        let handler = Handler::new();
        let layer = IdempotencyLayer::new(store).with_recovery(check);
        let service = layer.layer(handler.clone());
        let first = send(&service, post("k", "pay")).await;
        assert_eq!((&first.body[..], first.is_replay()), (&b"sk_live_1"[..], false));
        assert_eq!(send(&service, post("k", "pay")).await.code(), "response-not-stored");
        assert_eq!(handler.runs(), 0);
        assert!(matches!(layer.outcome_of(secret()), Outcome::Tombstone));
        zombie.abort();
    }
}

/// A layer for webhooks acknowledges a duplicate of a tombstone, which must not happen after a
/// failure.
#[test]
fn an_outcome_without_its_response_is_a_tombstone_unless_it_would_acknowledge_a_failure() {
    for status in [StatusCode::OK, StatusCode::PAYMENT_REQUIRED] {
        for is_for_webhooks in [false, true] {
            let layer = IdempotencyLayer::new(MemoryStore::new());
            let layer = if is_for_webhooks { layer.webhooks() } else { layer };
            let mut response = Response::new("sk_live_1".into());
            *response.status_mut() = status;
            response.extensions_mut().insert(StoreOutcomeOnly);
            assert_eq!(
                matches!(layer.outcome_of(response), Outcome::Tombstone),
                status.is_success() || !is_for_webhooks,
                "{status} {is_for_webhooks}"
            );
        }
    }
}

/// A layer for webhooks must not acknowledge the duplicates of a failure, so it stores a refusal in
/// place of the secret. The caller of the recovery got that refusal too, and the application did
/// not render it.
#[tokio::test(start_paused = true)]
async fn a_recovered_secret_failure_reaches_its_caller_and_duplicates_get_a_rendered_refusal() {
    let store = RemoteStore::new();
    let check = |_| async {
        let mut response = Response::new("declined, reference 17".into());
        *response.status_mut() = StatusCode::PAYMENT_REQUIRED;
        response.extensions_mut().insert(StoreOutcomeOnly);
        Recovered::Happened(response)
    };
    let layer = || IdempotencyLayer::new(store.clone()).webhooks();
    let zombie = super::lost_key_of(&store, layer()).await;
    store.heal();
    let layer = layer().with_refusals(|refusal, head| {
        let mut response = Response::new(bytes::Bytes::from(format!("{} {}", refusal.code(), head.uri.path())));
        *response.status_mut() = refusal.status();
        response
    });
    let handler = Handler::new();
    let service = layer.with_recovery(check).layer(handler.clone());
    let first = send(&service, post("k", "pay")).await;
    assert_eq!((first.status(), &first.body[..]), (402, &b"declined, reference 17"[..]));
    let again = send(&service, post("k", "pay")).await;
    assert_eq!(
        (again.status(), &again.body[..]),
        (500, &b"handler-failed /payments"[..])
    );
    assert_eq!(handler.runs(), 0);
    zombie.abort();
}

/// A response whose error was ready at once became a 500, but one whose error came after a pause
/// streamed.
#[tokio::test]
async fn the_status_of_a_response_that_is_not_stored_does_not_depend_on_the_pace_of_its_body() {
    let handler = Handler::new().responding(|_| {
        let frames = [Ok(http_body::Frame::data("for".into())), Err(support::Broken)];
        let body = http_body_util::StreamBody::new(futures::stream::iter(frames));
        let mut response = Response::new(body.boxed_unsync());
        *response.status_mut() = StatusCode::FORBIDDEN;
        response
    });
    let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler);
    let response = service.oneshot(post("k", "pay")).await.unwrap();
    assert_eq!(response.status(), StatusCode::FORBIDDEN);
    assert!(response.into_body().collect().await.is_err());
}

/// The duplicates of such a failure would get half of its body.
#[tokio::test]
async fn a_failure_whose_body_ends_before_its_declared_length_frees_its_key() {
    let handler = Handler::new().responding(|_| {
        let mut response = Response::new(support::short("half", 4));
        *response.status_mut() = StatusCode::BAD_GATEWAY;
        response
    });
    let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone());
    for run in 1..=2 {
        assert_eq!(send(&service, post("k", "pay")).await.code(), "handler-failed");
        assert_eq!(handler.runs(), run);
    }
}

/// The bodies of some middlewares return their first size hint to the end. The layer judged such a
/// body to be too short.
#[tokio::test]
async fn a_body_whose_size_hint_never_falls_is_whole() {
    let frames = ["char", "ged"];
    let handler = Handler::new().responding(move |_| Response::new(support::fixed_hint(&frames)));
    let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone());
    for is_replay in [false, true] {
        let got = send(&service, support::request("k", support::fixed_hint(&["p", "", "ay"]))).await;
        assert_eq!(
            (got.head.status, got.body.as_ref()),
            (StatusCode::OK, &b"charged"[..]),
            "{is_replay}"
        );
    }
    assert_eq!(
        send(&service, post("k", "pay")).await.body,
        "charged",
        "the request with a fixed size hint has the same fingerprint"
    );
    assert_eq!(handler.runs(), 1);
}

//! Failures of the handler, its response, the store and the owner. No request is stuck, and no
//! execution is repeated unless a setting allows it.

mod endings;
mod late_store;
mod leases;
mod streams;

use std::convert::Infallible;
use std::iter::repeat_n;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::protocol::{Outcome, Resolution, Status};
use tower_idempotency::{
    DoNotStore, IdempotencyLayer, Lease, LostAttempt, MemoryStore, OnError, OnLost, Recovered, Refusal, Store,
    StoreFor, StoreResponse,
};

use crate::support;
use crate::support::{
    AnyBody, Fault, Got, Handler, Play, RemoteStore, Timer, frames, full, post, request, send, short, start, text,
};

const DAY: Duration = Duration::from_secs(86_400);

/// Returns the code of a refusal, or an empty string for a response of the handler.
fn code_of(response: &Response<AnyBody>) -> &'static str {
    response.extensions().get().map_or("", Refusal::code)
}

fn on_memory(handler: &Handler) -> tower_idempotency::Idempotency<Handler, MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone())
}

// --- the handler -------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_panic_is_a_500_for_the_caller_and_its_duplicates_and_frees_the_key() {
    let handler = Handler::new().taking(Duration::from_secs(1)).responding(|n| {
        assert!(n > 1, "the first run panics");
        text(StatusCode::CREATED, "paid")
    });
    let service = on_memory(&handler);
    let owner = start(&service, post("k", "pay"));
    tokio::time::sleep(Duration::from_millis(10)).await;
    let waiter = start(&service, post("k", "pay"));
    for response in [owner.await.unwrap(), waiter.await.unwrap()] {
        assert_eq!((response.status(), response.code()), (500, "handler-failed"));
        let refusal = response.head.extensions.get::<Refusal>().unwrap();
        assert!(refusal.is_retryable(), "the next attempt can run");
    }
    assert_eq!(handler.runs(), 1);
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
    assert!(send(&service, post("k", "pay")).await.is_replay());
}

#[tokio::test]
async fn a_panic_before_the_first_poll_is_caught_too() {
    let inner = service_fn(
        |_: Request<AnyBody>| -> std::future::Ready<Result<Response<AnyBody>, Infallible>> { panic!("in call") },
    );
    let service = IdempotencyLayer::new(MemoryStore::new()).layer(inner);
    for _ in 0..2 {
        assert_eq!(send(&service, post("k", "pay")).await.code(), "handler-failed");
    }
}

#[tokio::test]
async fn on_error_store_replays_failures_panics_and_errors_of_the_service() {
    let handler = Handler::new().responding(|n| match n {
        1 => text(StatusCode::BAD_GATEWAY, "the bank is down"),
        _ => panic!("the second key panics"),
    });
    let service = IdempotencyLayer::new(MemoryStore::new())
        .on_error(OnError::Store)
        .layer(handler.clone());
    for key in ["responses", "panics"] {
        let first = send(&service, post(key, "pay")).await;
        let again = send(&service, post(key, "pay")).await;
        assert!(first.status() >= 500 && !first.is_replay() && again.is_replay());
        assert_eq!((again.status(), again.body), (first.status(), first.body));
    }
    assert_eq!(handler.runs(), 2);

    let broken = service_fn(|_: Request<AnyBody>| async { Err::<Response<AnyBody>, _>("connection lost") });
    let service = IdempotencyLayer::new(MemoryStore::new())
        .on_error(OnError::Store)
        .layer(broken);
    assert_eq!(
        service.clone().oneshot(post("k", "pay")).await.unwrap_err(),
        "connection lost"
    );
    let again = send(&service, post("k", "pay")).await;
    assert_eq!((again.status(), again.is_replay()), (500, true));
}

#[tokio::test]
async fn on_error_unknown_gives_failures_an_unknown_outcome() {
    let handler = Handler::new().responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let service = IdempotencyLayer::new(MemoryStore::new())
        .on_error(OnError::Unknown)
        .layer(handler.clone());
    assert_eq!(send(&service, post("k", "pay")).await.status(), 502);
    assert_eq!(send(&service, post("k", "pay")).await.code(), "outcome-unknown");
    assert_eq!(handler.runs(), 1);
}

#[tokio::test]
async fn an_unknown_outcome_can_be_resolved() {
    let store = RemoteStore::new();
    let handler = Handler::new().responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let service = IdempotencyLayer::new(store.clone())
        .on_error(OnError::Unknown)
        .layer(handler.clone());
    send(&service, post("k", "pay")).await;
    let (key, _) = store.only();
    let fence = store.peek(&key).await.unwrap().unwrap().fence;
    store
        .resolve(&key, fence, &Resolution::Completed(Outcome::Tombstone, DAY))
        .await
        .unwrap();
    assert_eq!(send(&service, post("k", "pay")).await.code(), "response-not-stored");
    assert_eq!(handler.runs(), 1);
}

#[tokio::test]
async fn an_operator_resolves_a_key_by_the_key_that_the_client_sent() {
    let handler = Handler::new().responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let layer = IdempotencyLayer::new(MemoryStore::new())
        .with_namespace("billing")
        .on_error(OnError::Unknown);
    let service = layer.layer(handler.clone());
    send(&service, post("k", "pay")).await;
    assert_eq!(send(&service, post("k", "pay")).await.code(), "outcome-unknown");

    let key = layer.storage_key(None, "\"k\"").unwrap();
    let fence = layer.store().peek(&key).await.unwrap().unwrap().fence;
    let found = Response::builder()
        .status(201)
        .header("location", "/1")
        .body("found".into())
        .unwrap();
    let resolution = Resolution::Completed(layer.outcome_of(found), DAY);
    layer.store().resolve(&key, fence, &resolution).await.unwrap();
    let again = send(&service, post("k", "pay")).await;
    assert_eq!(
        (again.status(), again.is_replay(), &again.body[..]),
        (201, true, &b"found"[..])
    );
    assert_eq!(
        (&again.head.headers["location"], handler.runs()),
        (&header::HeaderValue::from_static("/1"), 1)
    );
    assert!(layer.storage_key(None, "").is_err());
}

#[tokio::test(start_paused = true)]
async fn a_timeout_inside_the_layer_follows_the_setting_for_failures() {
    for (on_error, runs) in [(OnError::Store, 1), (OnError::Unknown, 1), (OnError::Release, 2)] {
        let handler = Handler::new().taking(Duration::from_secs(60));
        let after = Duration::from_secs(1);
        let timeout = tower_http::timeout::TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, after);
        let inner = timeout.layer(handler.clone());
        let service = IdempotencyLayer::new(MemoryStore::new())
            .on_error(on_error)
            .layer(inner);
        assert_eq!(send(&service, post("k", "pay")).await.status(), 408);
        send(&service, post("k", "pay")).await;
        assert_eq!(handler.runs(), runs, "{on_error:?}");
    }
}

#[tokio::test]
async fn a_handler_may_store_a_failure_and_set_its_retention() {
    let clock = tower_idempotency::Clock::manual(tower_idempotency::Timestamp::from_micros(1_000_000_000));
    let handler = Handler::new().responding(|n| {
        let mut response = text(StatusCode::SERVICE_UNAVAILABLE, format!("final {n}"));
        response.extensions_mut().insert(StoreResponse);
        response.extensions_mut().insert(StoreFor(Duration::from_secs(60)));
        response
    });
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    let service = IdempotencyLayer::new(store).layer(handler.clone());
    send(&service, post("k", "pay")).await;
    clock.advance(Duration::from_secs(59));
    assert!(send(&service, post("k", "pay")).await.is_replay());
    clock.advance(Duration::from_secs(1));
    assert!(!send(&service, post("k", "pay")).await.is_replay());
    assert_eq!(handler.runs(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_blocks_its_thread_past_the_lease_runs_once() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let inner = service_fn(move |_: Request<AnyBody>| {
        let counted = Arc::clone(&counted);
        async move {
            counted.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(2_500));
            Ok::<_, Infallible>(text(StatusCode::CREATED, "slow"))
        }
    });
    let store = RemoteStore::new();
    let layer = |store: &RemoteStore| {
        let layer = IdempotencyLayer::new(store.clone()).with_lease(Duration::from_secs(1));
        layer.on_lost(OnLost::Execute)
    };
    let here = layer(&store).layer(inner.clone());
    let there = layer(&store).layer(inner);
    let owner = start(&here, post("k", "pay"));
    while runs.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let elsewhere = send(&there, post("k", "pay")).await;
    assert_eq!((elsewhere.status(), elsewhere.is_replay()), (201, true));
    assert_eq!(owner.await.unwrap().status(), 201);
    assert!(store.calls("renew") >= 5, "renewed {} times", store.calls("renew"));
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn one_task_renews_leases_of_all_lengths_and_ends_with_them() {
    let store = RemoteStore::new();
    let handler = Handler::new().taking(Duration::from_secs(100));
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let long = IdempotencyLayer::new(store.clone()).with_lease(Duration::from_secs(300));
    let short = long.clone().with_lease(Duration::from_secs(3));
    let (long, short) = (long.layer(handler.clone()), short.layer(handler.clone()));
    let mut responses = vec![start(&long, post("long", "x"))];
    tokio::time::sleep(Duration::from_secs(1)).await;
    responses.extend((0..50).map(|n| start(&short, post(&format!("short-{n}"), "x"))));
    tokio::time::sleep(Duration::from_secs(50)).await;
    assert_eq!(tasks(), responses.len() + 1);
    for response in responses {
        assert_eq!(response.await.unwrap().status(), 201);
    }
    assert_eq!(handler.runs(), 51);
    let renewals = store.calls("renew");
    assert!(renewals >= 50 * 90, "{renewals} renewals");
    tokio::time::sleep(Duration::from_secs(1_000)).await;
    assert_eq!(
        (store.calls("renew"), tasks()),
        (renewals, 0),
        "the renewal task has ended"
    );
    let again = start(&short, post("again", "x"));
    assert_eq!(again.await.unwrap().status(), 201);
    assert!(store.calls("renew") >= renewals + 90, "a new renewal task has begun");
}

// --- bodies ------------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_request_body_that_breaks_off_or_trickles_runs_nothing_and_leaves_the_key_free() {
    let handler = Handler::new();
    let service = on_memory(&handler);
    let broken = send(&service, request("k", frames(vec![Play::Data("pa"), Play::Break]))).await;
    assert_eq!((broken.status(), broken.code()), (400, "body-broken"));
    let begin = Timer::start();
    let stalled = send(&service, request("k", frames(vec![Play::Data("pa"), Play::Stall]))).await;
    assert_eq!((stalled.status(), stalled.code()), (408, "body-timeout"));
    assert_eq!(begin.elapsed().as_secs(), 30);
    assert_eq!(handler.runs(), 0);
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
}

#[tokio::test]
async fn a_request_whose_response_breaks_off_is_never_executed_again() {
    for play in [vec![Play::Data("par"), Play::Break], vec![Play::Break]] {
        let play = std::sync::Mutex::new(Some(play));
        let handler = Handler::new().responding(move |_| Response::new(frames(play.lock().unwrap().take().unwrap())));
        let service = on_memory(&handler);
        let first = send(&service, post("k", "pay")).await;
        assert_eq!((first.status(), first.code()), (500, "response-broken"));
        let again = send(&service, post("k", "pay")).await;
        assert_eq!((again.status(), again.code()), (409, "response-not-stored"));
        assert_eq!(handler.runs(), 1);
    }
}

/// A body that broke off blocked its key for a day, even if its head had a status that frees the
/// key.
#[tokio::test]
async fn a_response_that_is_not_stored_frees_its_key_although_its_body_breaks_off() {
    for (status, mark) in [
        (401, false),
        (403, false),
        (429, false),
        (500, false),
        (503, false),
        (200, true),
    ] {
        let handler = Handler::new().responding(move |n| {
            if n > 1 {
                return text(StatusCode::CREATED, "paid");
            }
            let mut response = Response::new(frames(vec![Play::Data("slow d"), Play::Break]));
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            if mark {
                response.extensions_mut().insert(DoNotStore);
            }
            response
        });
        let service = on_memory(&handler);
        let first = service.clone().oneshot(post("k", "pay")).await.unwrap();
        assert_eq!(first.status(), status, "the handler's response streams");
        assert_eq!(send(&service, post("k", "pay")).await.status(), 201, "{status}");
        assert!(first.into_body().collect().await.is_err(), "{status}");
    }
}

#[tokio::test]
async fn a_failure_whose_body_breaks_off_follows_the_setting_for_failures() {
    for (on_error, first, second) in [
        (OnError::Release, "", ""),
        (OnError::Unknown, "", "outcome-unknown"),
        (OnError::Store, "response-broken", "response-not-stored"),
    ] {
        let handler = Handler::new().responding(|_| {
            let mut response = Response::new(frames(vec![Play::Data("fai"), Play::Break]));
            *response.status_mut() = StatusCode::BAD_GATEWAY;
            response
        });
        let layer = IdempotencyLayer::new(MemoryStore::new()).on_error(on_error);
        let service = layer.layer(handler.clone());
        for code in [first, second] {
            let response = service.clone().oneshot(post("k", "pay")).await.unwrap();
            assert_eq!(code_of(&response), code, "{on_error:?}");
            // The response of the handler streams, so it breaks off for its caller, too.
            assert_eq!(response.into_body().collect().await.is_err(), code.is_empty());
        }
        assert_eq!(handler.runs(), if on_error == OnError::Release { 2 } else { 1 });
    }
}

/// The tombstone expired after the hour that the layer sets, so the request ran again after two
/// hours.
#[tokio::test]
async fn the_tombstone_of_a_response_without_its_body_lives_as_long_as_its_head_asks() {
    for (body, limit) in [("breaks", 100), ("long", 3)] {
        let handler = Handler::new().responding(move |_| {
            let mut response = match body {
                "breaks" => Response::new(frames(vec![Play::Data("par"), Play::Break])),
                _ => text(StatusCode::OK, "too long"),
            };
            response.extensions_mut().insert(StoreFor(DAY));
            response
        });
        let clock = tower_idempotency::Clock::manual(tower_idempotency::Timestamp::from_micros(1));
        let store = MemoryStore::builder().with_clock(clock.clone()).build();
        let layer = IdempotencyLayer::new(store)
            .with_retention(Duration::from_secs(3_600))
            .with_response_limit(limit);
        let service = layer.layer(handler.clone());
        send(&service, post("k", "pay")).await;
        clock.advance(Duration::from_secs(7_200));
        assert_eq!(
            send(&service, post("k", "pay")).await.code(),
            "response-not-stored",
            "{body}"
        );
        assert_eq!(handler.runs(), 1, "{body}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_response_that_is_slow_within_its_time_is_stored() {
    let handler = Handler::new().responding(|_| {
        Response::new(support::stalling(
            "slow",
            tokio::time::sleep(Duration::from_millis(9_900)),
        ))
    });
    let service = on_memory(&handler);
    assert_eq!(send(&service, post("k", "pay")).await.body, "slow");
    assert!(send(&service, post("k", "pay")).await.is_replay());
}

/// Such a response may declare the length that its body would have.
#[tokio::test]
async fn a_response_that_has_no_body_is_complete_although_it_declares_a_length() {
    for (method, status) in [(Method::HEAD, 200), (Method::POST, 204), (Method::POST, 304)] {
        let respond = move |_| {
            let mut response = Response::new(short("", 5));
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            response
        };
        let layer = IdempotencyLayer::new(MemoryStore::new()).with_methods([Method::HEAD, Method::POST]);
        let service = layer.layer(Handler::new().responding(respond));
        for is_replay in [false, true] {
            let mut request = post("k", "pay");
            *request.method_mut() = method.clone();
            let got = send(&service, request).await;
            assert_eq!((got.status(), got.is_replay()), (status, is_replay), "{method}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_response_of_endless_empty_frames_ends_at_the_time_limit() {
    let handler = Handler::new().responding(|_| Response::new(support::empty_frames()));
    let service = on_memory(&handler);
    let owner = tokio::spawn(service.clone().oneshot(post("k", "pay")));
    support::advance(Duration::from_secs(9)).await;
    assert!(!owner.is_finished());
    support::advance(Duration::from_secs(1)).await;
    assert!(owner.is_finished());
    assert_eq!(owner.await.unwrap().unwrap().status(), 200);
    assert_eq!(send(&service, post("k", "pay")).await.code(), "response-not-stored");
}

#[test]
fn bodies_can_be_read_on_a_runtime_without_timers() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let handler = Handler::new().responding(|_| Response::new(frames(vec![Play::Data("pa"), Play::Data("id")])));
        let service = on_memory(&handler);
        for is_replay in [false, true] {
            let body = frames(vec![Play::Data("pa"), Play::Data("y")]);
            let got = send(&service, request("k", body)).await;
            assert_eq!((got.is_replay(), &got.body[..]), (is_replay, &b"paid"[..]));
        }
    });
}

/// The layer took the panic of a body for a panic of the handler, so it freed the key of a success.
#[tokio::test]
async fn a_response_whose_body_panics_counts_as_broken_off() {
    let handler = Handler::new().responding(|_| Response::new(frames(vec![Play::Data("x"), Play::Panic])));
    let service = on_memory(&handler);
    for (status, code) in [(500, "response-broken"), (409, "response-not-stored")] {
        let got = send(&service, post("k", "pay")).await;
        assert_eq!((got.status(), got.code()), (status, code));
    }
    assert_eq!(handler.runs(), 1);
}

#[tokio::test]
async fn a_response_too_large_to_store_reaches_its_caller_whole_and_never_runs_again() {
    for known in [true, false] {
        let handler = Handler::new().responding(move |_| {
            if known {
                return text(StatusCode::OK, "0123456789");
            }
            Response::new(frames(vec![Play::Data("01234"), Play::Data("56"), Play::Data("789")]))
        });
        let service = IdempotencyLayer::new(MemoryStore::new())
            .with_response_limit(6)
            .layer(handler.clone());
        let first = send(&service, post("k", "pay")).await;
        assert_eq!((first.status(), &first.body[..]), (200, &b"0123456789"[..]));
        let again = send(&service, post("k", "pay")).await;
        assert_eq!((again.status(), again.code()), (409, "response-not-stored"));
        assert_eq!(handler.runs(), 1);
    }
}

#[tokio::test]
async fn an_event_stream_begins_after_its_tombstone_is_stored() {
    let handler = Handler::new().responding(|_| {
        let mut response = Response::new(frames(vec![Play::Data("data: 1\n\n"), Play::Stall]));
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, "text/event-stream".parse().unwrap());
        response
    });
    let service = on_memory(&handler);
    let mut body = service.clone().oneshot(post("k", "pay")).await.unwrap().into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "data: 1\n\n");
    assert_eq!(send(&service, post("k", "pay")).await.code(), "response-not-stored");
    assert_eq!(handler.runs(), 1);
}

// --- layers within layers ------------------------------------------------------------------------------------------

/// A request with a key for each of two layers.
fn with_two_keys() -> Request<AnyBody> {
    let mut request = post("inner", "pay");
    request.headers_mut().insert("x-outer-key", "outer".parse().unwrap());
    request
}

fn outer() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new()).with_header(header::HeaderName::from_static("x-outer-key"))
}

/// The outer layer took every refusal of an inner layer as proof that the request had no effect.
#[tokio::test]
async fn a_failure_that_an_inner_layer_reports_counts_as_a_failure_of_the_handler() {
    for (on_error, runs, codes) in [
        (OnError::Unknown, 1, ["handler-failed", "outcome-unknown"]),
        (OnError::Store, 1, ["handler-failed", ""]),
        (OnError::Release, 2, ["handler-failed", "handler-failed"]),
    ] {
        let handler = Handler::new().responding(|_| panic!("after the effect"));
        let inner = IdempotencyLayer::new(MemoryStore::new());
        let service = outer().on_error(on_error).layer(inner.layer(handler.clone()));
        let first = send(&service, with_two_keys()).await;
        let second = send(&service, with_two_keys()).await;
        assert_eq!(
            ([first.code(), second.code()], handler.runs()),
            (codes, runs),
            "{on_error:?}"
        );
        assert_eq!(second.is_replay(), on_error == OnError::Store);
    }
}

/// The inner layer forgets its key after an hour. After that, the outer layer must not run the
/// request again.
#[tokio::test]
async fn a_request_that_an_inner_layer_reports_as_done_is_done_for_the_outer_layer() {
    let clock = tower_idempotency::Clock::manual(tower_idempotency::Timestamp::from_micros(1));
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    let inner = IdempotencyLayer::new(store).with_retention(Duration::from_secs(3_600));
    let handler = Handler::new().responding(|_| Response::new(frames(vec![Play::Data("par"), Play::Break])));
    let service = outer().layer(inner.layer(handler.clone()));
    assert_eq!(send(&service, with_two_keys()).await.code(), "response-broken");
    clock.advance(Duration::from_secs(7_200));
    assert_eq!(send(&service, with_two_keys()).await.code(), "response-not-stored");
    assert_eq!(handler.runs(), 1);
}

/// The layer took the completion of the late owner for a repeated completion. The caller of the
/// owner got another response than all duplicates.
#[tokio::test(start_paused = true)]
async fn an_owner_that_comes_back_after_a_resolution_returns_the_response_that_stands() {
    for fails in [false, true] {
        let store = RemoteStore::new();
        let handler = Handler::new()
            .taking(Duration::from_secs(60))
            .responding(move |_| match fails {
                true => text(StatusCode::BAD_GATEWAY, "the owner's"),
                false => text(StatusCode::CREATED, "the owner's"),
            });
        let layer = IdempotencyLayer::new(store.clone());
        let service = layer.layer(handler.clone());
        let owner = start(&service, post("k", "pay"));
        tokio::time::sleep(Duration::from_secs(1)).await;
        store.fail("renew", [Fault::Before; 1_000]);
        tokio::time::sleep(Duration::from_secs(40)).await;
        let (key, _) = store.only();
        let fence = store.peek(&key).await.unwrap().unwrap().fence;
        let found = Response::builder().status(201).body("found".into()).unwrap();
        let resolution = Resolution::Completed(layer.outcome_of(found), DAY);
        store.resolve(&key, fence, &resolution).await.unwrap();
        let duplicate = send(&layer.layer(handler.clone()), post("k", "pay")).await;
        for got in [duplicate, owner.await.unwrap(), send(&service, post("k", "pay")).await] {
            assert_eq!((got.status(), &got.body[..]), (201, &b"found"[..]), "{fails}");
        }
        assert_eq!(handler.runs(), 1);
    }
}

#[tokio::test]
async fn a_request_that_an_inner_layer_refuses_before_its_handler_frees_the_outer_key() {
    let handler = Handler::new();
    let inner = IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone());
    send(&inner, post("inner", "another payment")).await;
    let service = outer().on_error(OnError::Unknown).layer(inner);
    for _ in 0..2 {
        assert_eq!(send(&service, with_two_keys()).await.code(), "key-reused");
    }
    assert_eq!(handler.runs(), 1);
}

/// The inner attempt ran and lost its key to another request. Its refusal does not show whether it
/// took effect.
#[tokio::test(start_paused = true)]
async fn an_inner_attempt_that_ran_and_was_superseded_has_an_unknown_outcome() {
    let store = RemoteStore::new();
    let handler = Handler::new().taking(Duration::from_secs(60));
    let inner = IdempotencyLayer::new(store.clone());
    let service = outer().on_error(OnError::Unknown).layer(inner.layer(handler.clone()));
    let owner = start(&service, with_two_keys());
    tokio::time::sleep(Duration::from_secs(1)).await;
    store.fail("renew", [Fault::Before; 1_000]);
    tokio::time::sleep(Duration::from_secs(40)).await;
    let (key, _) = store.only();
    let fence = store.peek(&key).await.unwrap().unwrap().fence;
    store.resolve(&key, fence, &Resolution::Absent).await.unwrap();
    store.heal();
    let elsewhere = IdempotencyLayer::new(store.clone()).layer(Handler::new());
    send(&elsewhere, post("inner", "another payment")).await;
    assert_eq!(owner.await.unwrap().code(), "outcome-unknown");
    assert_eq!(send(&service, with_two_keys()).await.code(), "outcome-unknown");
    assert_eq!(handler.runs(), 1);
}

/// Sends a request whose handler takes 60 s. Another process takes over the key in the meantime.
async fn superseded<S>(store: &RemoteStore, owner: S) -> Got
where
    S: tower::Service<Request<AnyBody>, Response = Response<AnyBody>> + Clone + Send + Sync + 'static,
    S::Future: Send,
    S::Error: std::fmt::Debug + Send,
{
    let taken_over = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        store.fail("renew", [Fault::Before; 1_000]);
        tokio::time::sleep(Duration::from_secs(40)).await;
        store.heal();
        let elsewhere = IdempotencyLayer::new(store.clone()).on_lost(OnLost::Execute);
        let second = send(&elsewhere.layer(Handler::new()), post("k", "pay")).await;
        assert_eq!((second.status(), second.is_replay()), (201, false));
    };
    tokio::join!(send(&owner, post("k", "pay")), taken_over).0
}

/// An owner that released its key, or whose service failed, served its own result although the key
/// held another one.
#[tokio::test(start_paused = true)]
async fn a_superseded_owner_serves_the_stored_response_however_it_ended() {
    for on_error in [OnError::Release, OnError::Unknown, OnError::Store] {
        for ending in ["failure", "panic", "broken body", "stream"] {
            let store = RemoteStore::new();
            let layer = IdempotencyLayer::new(store.clone())
                .on_lost(OnLost::Execute)
                .on_error(on_error);
            let handler = Handler::new().taking(Duration::from_secs(60)).responding(move |_| {
                let mut response = match ending {
                    "panic" => panic!("after the effect"),
                    "broken body" => Response::new(frames(vec![Play::Data("par"), Play::Break])),
                    _ => text(StatusCode::OK, "failed"),
                };
                if ending == "stream" {
                    let kind = "text/event-stream".parse().unwrap();
                    response.headers_mut().insert(header::CONTENT_TYPE, kind);
                }
                *response.status_mut() = StatusCode::BAD_GATEWAY;
                response
            });
            let got = superseded(&store, layer.layer(handler)).await;
            assert_eq!((got.status(), got.is_replay()), (201, true), "{on_error:?}, {ending}");
        }
        let store = RemoteStore::new();
        let layer = IdempotencyLayer::new(store.clone())
            .on_lost(OnLost::Execute)
            .on_error(on_error);
        let failing = service_fn(|_: Request<AnyBody>| async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            Err::<Response<AnyBody>, _>("disconnected")
        });
        let got = superseded(&store, layer.layer(failing)).await;
        assert_eq!((got.status(), got.is_replay()), (201, true), "{on_error:?}");
    }
}

/// The refusal claimed that the request was not processed.
#[tokio::test(start_paused = true)]
async fn a_superseded_owner_that_cannot_read_the_record_reports_an_unknown_outcome() {
    for fault in [Fault::Before, Fault::Misconfigured] {
        let store = RemoteStore::new();
        let layer = IdempotencyLayer::new(store.clone()).on_lost(OnLost::Execute);
        let failing = store.clone();
        let handler = Handler::new().taking(Duration::from_secs(60)).responding(move |_| {
            failing.fail("peek", [fault; 10]);
            text(StatusCode::CREATED, "too late")
        });
        let got = superseded(&store, layer.layer(handler)).await;
        assert_eq!((got.status(), got.code()), (503, "outcome-unknown"), "{fault:?}");
    }
}

/// A refusal said that no retry can succeed, and then the retry ran.
#[tokio::test(start_paused = true)]
async fn the_refusal_of_a_failed_attempt_is_retryable_if_and_only_if_the_retry_runs() {
    let layer = || IdempotencyLayer::new(MemoryStore::new());
    let lost = || {
        let recovering = layer().with_recovery(|_| async { Recovered::NotHappened });
        [layer(), layer().at_least_once(), recovering]
    };
    for on_error in [OnError::Release, OnError::Unknown, OnError::Store] {
        for number in 0..3 {
            for (retention, attempts) in [(DAY, 5), (DAY, 1), (DAY, 2), (Duration::ZERO, 1)] {
                let handler = Handler::new().responding(|_| panic!("after the effect"));
                let layer = lost()[number].clone().on_error(on_error).with_retention(retention);
                let service = layer.with_max_attempts(attempts).layer(handler.clone());
                let mut can_run = true;
                for request in 1..5 {
                    let before = handler.runs();
                    let failed = send(&service, post("k", "pay")).await;
                    let case = format!("{on_error:?}, {number}, {retention:?}, {attempts}, {request}");
                    assert_eq!(handler.runs() > before, can_run, "{case}");
                    let refusal = failed.head.extensions.get::<Refusal>();
                    can_run &= refusal.is_some_and(Refusal::is_retryable);
                }
            }
        }
    }
}

/// The caller and the duplicates got the replay marker, although no record held the failure.
#[tokio::test(start_paused = true)]
async fn a_failure_that_could_not_be_recorded_is_not_marked_as_a_replay() {
    for panics in [true, false] {
        let store = RemoteStore::new();
        store.fail("complete", [Fault::Before; 100]);
        let handler = Handler::new().taking(Duration::from_secs(1)).responding(move |_| {
            assert!(!panics, "after the effect");
            text(StatusCode::BAD_GATEWAY, "failed")
        });
        let layer = IdempotencyLayer::new(store.clone()).on_error(OnError::Store);
        let service = layer.layer(handler.clone());
        let owner = start(&service, post("k", "pay"));
        tokio::time::sleep(Duration::from_millis(10)).await;
        let waiter = start(&service, post("k", "pay"));
        for got in [owner.await.unwrap(), waiter.await.unwrap()] {
            assert!(got.status() >= 500 && !got.is_replay(), "{panics}: {:?}", got.head);
        }
        assert_eq!(handler.runs(), 1);
    }
}

// --- the store ---------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_claim_that_fails_once_or_whose_reply_is_lost_is_repeated_and_granted() {
    for fault in [Fault::Before, Fault::After, Fault::Hang] {
        let store = RemoteStore::new();
        store.fail("claim", [fault]);
        let handler = Handler::new();
        let service = IdempotencyLayer::new(store.clone()).layer(handler.clone());
        let response = send(&service, post("k", "pay")).await;
        assert_eq!(
            (response.status(), handler.runs(), store.calls("claim")),
            (201, 1, 2),
            "{fault:?}"
        );
        assert!(send(&service, post("k", "pay")).await.is_replay());
    }
}

/// The store granted the first claim. Its release would free the key under the handler.
#[tokio::test(start_paused = true)]
async fn a_claim_whose_reply_was_lost_is_not_released_once_the_repeated_claim_is_granted() {
    for fault in [Fault::Before, Fault::After] {
        let store = RemoteStore::new();
        store.fail("claim", [fault]);
        let handler = Handler::new()
            .taking(Duration::from_secs(20))
            .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
        let layer = IdempotencyLayer::new(store.clone()).on_error(OnError::Unknown);
        let owner = start(&layer.layer(handler.clone()), post("k", "pay"));
        tokio::time::sleep(Duration::from_secs(10)).await;
        let (key, _) = store.only();
        let status = store.peek(&key).await.unwrap().unwrap().status;
        assert!(matches!(status, Status::InFlight { .. }), "{fault:?}");
        assert_eq!(owner.await.unwrap().status(), 502);
        layer.drain().wait().await;
        tokio::time::sleep(Duration::from_secs(300)).await;
        let again = send(&layer.layer(handler.clone()), post("k", "pay")).await;
        assert_eq!((again.code(), handler.runs()), ("outcome-unknown", 1), "{fault:?}");
        assert_eq!(store.calls("release"), 0, "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_fails_runs_nothing_and_is_released_after_the_refusal() {
    for faults in [
        [Fault::Before; 2],
        [Fault::After; 2],
        [Fault::Hang; 2],
        [Fault::After, Fault::Before],
    ] {
        let store = RemoteStore::new();
        store.fail("claim", faults);
        let handler = Handler::new();
        let layer = IdempotencyLayer::new(store.clone());
        let service = layer.layer(handler.clone());
        let refused = send(&service, post("k", "pay")).await;
        assert_eq!(
            (refused.status(), refused.code(), handler.runs()),
            (503, "store-unavailable", 0),
            "{faults:?}"
        );
        assert_eq!(refused.head.headers["retry-after"], "1");
        layer.drain().wait().await;
        assert_eq!(store.len(), 0, "{faults:?}");
        assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
    }
}

/// The store was away for longer than the lease of a lost owner. When it was back, each deferred
/// release first took over the lost claim, which used up an attempt.
#[tokio::test(start_paused = true)]
async fn claims_that_are_released_late_use_up_no_attempts() {
    let (store, handler) = (RemoteStore::new(), Handler::new());
    let layer = IdempotencyLayer::new(store.clone()).on_lost(OnLost::Execute);
    let drain = layer.drain();
    let owner = lost_key(&store).await;
    let service = layer.layer(handler.clone());
    for operation in ["claim", "peek", "release"] {
        store.fail(operation, [Fault::Before; 10_000]);
    }
    for _ in 0..6 {
        assert_eq!(send(&service, post("k", "pay")).await.status(), 503);
    }
    tokio::time::sleep(Duration::from_secs(60)).await;
    store.heal();
    // The owner still cannot reach the store.
    store.fail("renew", [Fault::Before; 10_000]);
    drain.wait().await;
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
    assert_eq!(handler.runs(), 1);
    owner.abort();
}

/// The store granted claims without a reply. Beyond 1,024 of them, the layer released none of the
/// keys, so requests that never ran got an unknown outcome.
#[tokio::test(start_paused = true)]
async fn the_layer_releases_the_keys_of_all_claims_that_a_store_granted_without_a_reply() {
    let (store, handler) = (RemoteStore::new(), Handler::new());
    let layer = IdempotencyLayer::new(store.clone());
    let service = layer.layer(handler.clone());
    store.fail("claim", [Fault::After; 10_000]);
    for operation in ["peek", "release"] {
        store.fail(operation, repeat_n(Fault::Before, 200_000));
    }
    let keys = || (0..2_000).map(|n| n.to_string());
    for key in keys() {
        assert_eq!(send(&service, post(&key, "pay")).await.code(), "store-unavailable");
    }
    assert_eq!(store.calls("claim"), 2 * 1_024);
    store.heal();
    layer.drain().wait().await;
    assert_eq!((store.len(), handler.runs()), (0, 0));
    for key in keys() {
        assert_eq!(send(&service, post(&key, "pay")).await.status(), 201);
    }
}

/// While many claims are lost, a duplicate still gets its response. An application that allows it
/// runs new requests unprotected.
#[tokio::test(start_paused = true)]
async fn requests_are_served_while_many_claims_are_lost() {
    let (store, handler) = (RemoteStore::new(), Handler::new());
    let layer = IdempotencyLayer::new(store.clone());
    let service = layer.layer(handler.clone());
    assert_eq!(send(&service, post("done", "pay")).await.status(), 201);
    store.fail("claim", [Fault::Before; 10_000]);
    store.fail("release", repeat_n(Fault::Before, 200_000));
    for n in 0..1_024 {
        assert_eq!(send(&service, post(&n.to_string(), "pay")).await.status(), 503);
    }
    assert!(send(&service, post("done", "pay")).await.is_replay());
    assert_eq!(send(&service, post("new", "pay")).await.code(), "store-unavailable");
    let unprotected = layer.clone().dangerously_run_unprotected_when_the_store_fails();
    let unprotected = unprotected.layer(handler.clone());
    assert_eq!(send(&unprotected, post("new", "pay")).await.status(), 201);
    store.fail("peek", [Fault::Before]);
    assert_eq!(send(&unprotected, post("new", "pay")).await.status(), 201);
    assert_eq!(handler.runs(), 3);
}

/// The store went away while a handler ran. The deferred releases of failed claims must not
/// displace the deferred completion of that handler.
#[tokio::test(start_paused = true)]
async fn claims_that_fail_do_not_displace_deferred_completions() {
    let store = RemoteStore::new();
    let layer = IdempotencyLayer::new(store.clone());
    let (drain, handler) = (layer.drain(), Handler::new().taking(Duration::from_secs(15)));
    let service = layer.layer(handler.clone());
    let owner = start(&service, post("k", "pay"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    for operation in ["claim", "complete", "peek", "renew"] {
        store.fail(operation, repeat_n(Fault::Before, 200_000));
    }
    for key in 0..1_500 {
        assert_eq!(send(&service, post(&key.to_string(), "pay")).await.status(), 503);
    }
    assert_eq!(owner.await.unwrap().status(), 201);
    tokio::time::sleep(Duration::from_secs(10)).await;
    store.heal();
    drain.wait().await;
    assert!(send(&service, post("k", "pay")).await.is_replay());
    assert_eq!(handler.runs(), 1);
}

/// An outage of minutes leaves a bounded number of tasks, not one for each request that comes in
/// the meantime.
#[tokio::test(start_paused = true)]
async fn an_outage_leaves_a_bounded_number_of_tasks_that_end_with_it() {
    let store = RemoteStore::new();
    let layer = IdempotencyLayer::new(store.clone());
    let (drain, service) = (layer.drain(), layer.layer(Handler::new()));
    for operation in ["claim", "peek"] {
        store.fail(operation, repeat_n(Fault::Before, 200_000));
    }
    for key in 0..5_000 {
        assert_eq!(send(&service, post(&key.to_string(), "pay")).await.status(), 503);
    }
    assert_eq!(drain.running(), 1_024);
    store.heal();
    drain.wait().await;
    assert_eq!((drain.running(), store.len()), (0, 0));
}

/// When the store fails at the claim, the handler does not run, so the claim must not use up an
/// attempt of a lost key.
#[tokio::test(start_paused = true)]
async fn claims_of_a_lost_key_that_fail_use_up_no_attempts() {
    let store = RemoteStore::new();
    let handler = Handler::new().responding(|run| {
        assert!(run > 1, "the first run is lost");
        text(StatusCode::CREATED, "paid")
    });
    let layer = IdempotencyLayer::new(store.clone())
        .on_lost(OnLost::Execute)
        .on_error(OnError::Unknown);
    let service = layer.layer(handler.clone());
    assert_eq!(send(&service, post("k", "pay")).await.status(), 500);
    for _ in 0..6 {
        store.fail("claim", [Fault::Before; 2]);
        assert_eq!(send(&service, post("k", "pay")).await.code(), "store-unavailable");
        layer.drain().wait().await;
    }
    let last = send(&service, post("k", "pay")).await;
    assert_eq!((last.status(), handler.runs()), (201, 2));
}

/// The store granted the claim, its reply was lost, and the lease ended while the store was away.
/// The layer must still release the claim.
#[tokio::test(start_paused = true)]
async fn a_claim_whose_lease_ended_while_the_store_was_away_is_released_after_the_refusal() {
    let store = RemoteStore::new();
    store.fail("claim", [Fault::After, Fault::Before]);
    store.fail("peek", [Fault::Before; 3]);
    let handler = Handler::new();
    let layer = IdempotencyLayer::new(store.clone()).with_lease(Duration::from_secs(1));
    let service = layer.layer(handler.clone());
    assert_eq!(send(&service, post("k", "pay")).await.code(), "store-unavailable");
    layer.drain().wait().await;
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
}

/// The store timeout of the layer is 5 s. A store with a claim limit of at most 5 s needs no timer
/// of the layer. A store with a longer limit gets one, so that it does not hold up a caller.
#[tokio::test(start_paused = true)]
async fn a_store_whose_claim_limit_is_within_the_store_timeout_gets_no_timer() {
    for (limit, is_untimed) in [(5, true), (6, false)] {
        let store = RemoteStore::new();
        store.set_claim_limit(Duration::from_secs(limit));
        store.fail("claim", [Fault::Hang; 2]);
        let service = IdempotencyLayer::new(store).layer(Handler::new());
        let asked = tokio::time::timeout(Duration::from_secs(60), send(&service, post("k", "pay"))).await;
        assert_eq!(asked.is_err(), is_untimed, "{limit}");
    }
}

/// Faults that last until an operator acts, with the code of their refusal.
const LASTING: [(Fault, &str); 2] = [
    (Fault::Misconfigured, "store-misconfigured"),
    (Fault::Corrupt, "record-unreadable"),
];

#[tokio::test]
async fn a_misconfigured_store_and_an_unreadable_record_run_nothing_and_ask_for_no_retry() {
    for (fault, code) in LASTING {
        for unprotected in [false, true] {
            let (store, handler) = (RemoteStore::new(), Handler::new());
            store.fail("claim", [fault]);
            let mut layer = IdempotencyLayer::new(store.clone());
            if unprotected {
                layer = layer.dangerously_run_unprotected_when_the_store_fails();
            }
            let service = layer.layer(handler.clone());
            let refused = send(&service, post("k", "pay")).await;
            assert_eq!((refused.status(), refused.code()), (500, code));
            assert!(!refused.head.headers.contains_key("retry-after"));
            let document: serde_json::Value = serde_json::from_slice(&refused.body).unwrap();
            assert_eq!(
                (&document["code"], &document["retryable"]),
                (&code.into(), &false.into())
            );
            assert_eq!((handler.runs(), store.calls("claim")), (0, 1));
        }
    }
}

#[tokio::test]
async fn a_waiter_for_another_process_gets_the_code_of_a_misconfigured_store_or_an_unreadable_record() {
    for (fault, code) in LASTING {
        let (store, handler) = (RemoteStore::new(), Handler::new());
        let here = IdempotencyLayer::new(store.clone()).layer(handler.clone());
        let there = IdempotencyLayer::new(store.clone()).layer(Handler::new().taking(Duration::from_secs(3_600)));
        let owner = start(&there, post("k", "pay"));
        while store.calls("claim") == 0 || store.len() == 0 {
            tokio::task::yield_now().await;
        }
        store.fail("peek", [fault]);
        let refused = send(&here, post("k", "pay")).await;
        assert_eq!((refused.status(), refused.code(), handler.runs()), (500, code, 0));
        owner.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn stripe_clients_get_an_error_type_that_permits_no_retry() {
    for (fault, code) in LASTING {
        let store = RemoteStore::new();
        store.fail("claim", [fault]);
        let stripe = send(
            &IdempotencyLayer::new(store).stripe().layer(Handler::new()),
            post("k", "pay"),
        )
        .await;
        let error: serde_json::Value = serde_json::from_slice(&stripe.body).unwrap();
        assert_eq!((stripe.status(), &error["error"]["type"]), (500, &"api_error".into()));
        assert_eq!(error["error"]["code"], code.replace('-', "_"));
    }
}

#[cfg(feature = "tonic")]
#[tokio::test(start_paused = true)]
async fn grpc_clients_get_a_status_that_their_policies_do_not_retry() {
    for (fault, _) in LASTING {
        let store = RemoteStore::new();
        store.fail("claim", [fault]);
        let grpc = send(
            &IdempotencyLayer::new(store).with_grpc_refusals().layer(Handler::new()),
            post("k", "pay"),
        )
        .await;
        // The retry policies of gRPC retry UNAVAILABLE but not INTERNAL.
        assert_eq!(grpc.head.headers["grpc-status"], "13");
        assert!(!grpc.head.headers.contains_key("retry-after"));
    }
}

/// A failover: the old primary refuses writes until its host name leads to the new primary.
#[tokio::test(start_paused = true)]
async fn an_owner_records_its_response_once_a_misconfigured_store_is_corrected() {
    let (store, handler) = (RemoteStore::new(), Handler::new());
    store.fail("complete", [Fault::Misconfigured; 5]);
    let service = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
    assert!(store.only().1.is_completed());
    assert!(send(&service, post("k", "pay")).await.is_replay());
    // The old primary stays read-only for longer than the completion timeout.
    store.fail("complete", [Fault::Misconfigured; 30]);
    assert_eq!(send(&service, post("k2", "pay")).await.status(), 201);
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert!(send(&service, post("k2", "pay")).await.is_replay());
    assert_eq!(handler.runs(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_claim_whose_reply_was_lost_is_released_when_the_second_claim_fails_too() {
    for (fault, code) in LASTING {
        let (store, handler) = (RemoteStore::new(), Handler::new());
        store.fail("claim", [Fault::After, fault]);
        let layer = IdempotencyLayer::new(store.clone());
        let service = layer.layer(handler.clone());
        assert_eq!(send(&service, post("k", "pay")).await.code(), code);
        layer.drain().wait().await;
        assert_eq!((store.len(), handler.runs()), (0, 0), "{fault:?}");
        assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_runs_unprotected_when_the_store_fails_if_the_application_allows_it() {
    let store = RemoteStore::new();
    store.fail("claim", [Fault::Before; 2]);
    let handler = Handler::new();
    let layer = IdempotencyLayer::new(store).dangerously_run_unprotected_when_the_store_fails();
    let response = send(&layer.layer(handler.clone()), post("k", "pay")).await;
    assert_eq!((response.status(), handler.runs()), (201, 1));
}

/// Without a record there is no response to wait for.
#[tokio::test(start_paused = true)]
async fn a_duplicate_does_not_wait_for_an_unprotected_run() {
    let store = RemoteStore::new();
    store.fail("claim", [Fault::Before; 4]);
    let handler = Handler::new().taking(Duration::from_secs(20));
    let layer = IdempotencyLayer::new(store).dangerously_run_unprotected_when_the_store_fails();
    let service = layer.layer(handler.clone());
    let requests = [(); 2].map(|()| start(&service, post("k", "pay")));
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(handler.runs(), 2);
    for request in requests {
        assert_eq!(request.await.unwrap().status(), 201);
    }
}

/// An unprotected run would exceed the limit, as a protected one would.
#[tokio::test(start_paused = true)]
async fn no_request_runs_unprotected_beyond_the_limit_of_detached_executions() {
    let store = RemoteStore::new();
    let handler = Handler::new().taking(Duration::from_secs(20));
    let layer = IdempotencyLayer::new(store.clone()).with_max_detached(1);
    let service = layer
        .dangerously_run_unprotected_when_the_store_fails()
        .layer(handler.clone());
    drop(support::poll_then_drop(6, service.clone().oneshot(post("k", "pay"))).await);
    assert_eq!(handler.runs(), 1);
    store.fail("peek", [Fault::Before]);
    let refused = send(&service, post("new", "pay")).await;
    assert_eq!((refused.code(), handler.runs()), ("store-unavailable", 1));
}

#[tokio::test(start_paused = true)]
async fn a_completion_that_fails_for_a_while_is_repeated_before_the_response_leaves() {
    for fault in [Fault::Before, Fault::After, Fault::Hang] {
        let store = RemoteStore::new();
        store.fail("complete", [fault; 2]);
        let handler = Handler::new();
        let service = IdempotencyLayer::new(store.clone()).layer(handler.clone());
        let response = send(&service, post("k", "pay")).await;
        let (_, record) = store.only();
        assert!(
            record.is_completed(),
            "{fault:?}: the response left before it was recorded"
        );
        assert_eq!((response.status(), store.calls("complete")), (201, 3));
        assert!(send(&service, post("k", "pay")).await.is_replay());
        assert_eq!(handler.runs(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_completion_that_never_succeeds_leaves_the_key_claimed() {
    for (on_lost, status, code) in [(OnLost::Refuse, 201, ""), (OnLost::Execute, 503, "outcome-unknown")] {
        let store = RemoteStore::new();
        store.fail("complete", [Fault::Before; 100]);
        let handler = Handler::new();
        let layer = IdempotencyLayer::new(store.clone())
            .on_lost(on_lost)
            .with_wait(Duration::ZERO);
        let service = layer.layer(handler.clone());
        let response = send(&service, post("k", "pay")).await;
        assert_eq!((response.status(), response.code()), (status, code));
        assert_eq!(send(&service, post("k", "pay")).await.code(), "request-outstanding");
        tokio::time::sleep(Duration::from_secs(31)).await;
        let later = send(&service, post("k", "pay")).await;
        match on_lost {
            OnLost::Refuse => assert_eq!((later.code(), handler.runs()), ("outcome-unknown", 1)),
            _ => assert_eq!(handler.runs(), 2),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_release_that_fails_for_a_while_is_repeated() {
    let store = RemoteStore::new();
    store.fail("release", [Fault::Before, Fault::After]);
    let handler = Handler::new().responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let service = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    assert_eq!(send(&service, post("k", "pay")).await.status(), 502);
    assert_eq!((store.len(), store.calls("release")), (0, 3));
}

/// A failover: the store was away for a minute, in which handlers ended. The layer did not record
/// their outcomes, and refused their keys for a day.
#[tokio::test(start_paused = true)]
async fn an_outcome_is_recorded_once_the_store_is_reachable_again() {
    for (status, is_stored) in [(StatusCode::CREATED, true), (StatusCode::SERVICE_UNAVAILABLE, false)] {
        let (store, handler) = (RemoteStore::new(), Handler::new());
        let handler = handler.responding(move |_| text(status, "paid"));
        let layer = IdempotencyLayer::new(store.clone());
        let drain = layer.drain();
        let service = layer.layer(handler.clone());
        for operation in ["complete", "peek", "release", "renew"] {
            store.fail(operation, [Fault::Before; 10_000]);
        }
        assert_eq!(send(&service, post("k", "pay")).await.status(), status);
        tokio::time::sleep(Duration::from_secs(60)).await;
        store.heal();
        drain.wait().await;
        let again = send(&service, post("k", "pay")).await;
        assert_eq!((again.status(), again.is_replay()), (status.as_u16(), is_stored));
        assert_eq!(handler.runs(), if is_stored { 1 } else { 2 });
    }
}

#[tokio::test]
async fn a_full_store_refuses_new_keys_and_still_replays() {
    let store = MemoryStore::builder().with_record_budget(2).build();
    let handler = Handler::new();
    let service = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    for key in ["a", "b"] {
        assert_eq!(send(&service, post(key, "pay")).await.status(), 201);
    }
    let refused = send(&service, post("c", "pay")).await;
    assert_eq!(
        (refused.status(), refused.code(), handler.runs()),
        (503, "store-full", 2)
    );
    assert!(refused.head.headers.contains_key("retry-after"));
    assert!(send(&service, post("a", "pay")).await.is_replay());
    assert_eq!(store.stats().records, 2);
}

// --- lost owners -------------------------------------------------------------------------------------------------

/// Leaves a key in flight whose owner stopped renewing its lease while the handler ran.
async fn lost_key(store: &RemoteStore) -> tokio::task::JoinHandle<Got> {
    lost_key_of(store, IdempotencyLayer::new(store.clone())).await
}

async fn lost_key_of(store: &RemoteStore, layer: IdempotencyLayer<RemoteStore>) -> tokio::task::JoinHandle<Got> {
    let handler = Handler::new()
        .taking(Duration::from_secs(3_600))
        .responding(|_| text(StatusCode::CREATED, "the zombie"));
    let layer = layer
        .with_store_timeout(Duration::from_secs(1))
        .with_wait(Duration::ZERO);
    let owner = start(&layer.layer(handler), post("k", "pay"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    // From here on, the owner cannot reach the store.
    store.fail("renew", [Fault::Before; 10_000]);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let (key, _) = store.only();
    assert_eq!(store.peek(&key).await.unwrap().unwrap().status, Status::Lost);
    owner
}

#[tokio::test(start_paused = true)]
async fn duplicates_of_a_lost_owner_are_refused_by_default_until_it_completes() {
    let store = RemoteStore::new();
    let zombie = lost_key(&store).await;
    let handler = Handler::new();
    let service = IdempotencyLayer::new(store).layer(handler.clone());
    assert_eq!(send(&service, post("k", "pay")).await.code(), "outcome-unknown");
    assert_eq!(send(&service, post("k", "other")).await.code(), "key-reused");
    assert_eq!(zombie.await.unwrap().body, "the zombie");
    let healed = send(&service, post("k", "pay")).await;
    assert_eq!(
        (healed.is_replay(), &healed.body[..], handler.runs()),
        (true, &b"the zombie"[..], 0)
    );
}

#[tokio::test(start_paused = true)]
async fn a_lost_owner_is_taken_over_under_execute_and_serves_the_stored_response() {
    let store = RemoteStore::new();
    let zombie = lost_key(&store).await;
    let handler = Handler::new().responding(|_| text(StatusCode::CREATED, "the winner"));
    let service = IdempotencyLayer::new(store)
        .on_lost(OnLost::Execute)
        .layer(handler.clone());
    let winner = send(&service, post("k", "pay")).await;
    assert_eq!(
        (winner.status(), winner.is_replay(), &winner.body[..]),
        (201, false, &b"the winner"[..])
    );
    let zombie = zombie.await.unwrap();
    assert_eq!((zombie.is_replay(), &zombie.body[..]), (true, &b"the winner"[..]));
    assert!(send(&service, post("k", "pay")).await.is_replay());
}

#[tokio::test(start_paused = true)]
async fn attempts_are_numbered_fenced_and_capped() {
    let store = RemoteStore::new();
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let witness = Arc::clone(&seen);
    let inner = service_fn(move |request: Request<AnyBody>| {
        let lease = request.extensions().get::<Lease>().unwrap().clone();
        witness
            .lock()
            .unwrap()
            .push((lease.attempt(), lease.fence(), lease.derive_key("charge")));
        let id = lease.derive_id("charge");
        assert_eq!(id.replace('-', "")[..12], lease.derive_key("charge")[..12]);
        assert_ne!(id, lease.derive_id("refund"));
        assert_eq!((id.len(), &id[14..15]), (36, "8"), "a UUID of version 8");
        async { Ok::<_, Infallible>(text(StatusCode::BAD_GATEWAY, "failed")) }
    });
    let layer = IdempotencyLayer::new(store)
        .on_lost(OnLost::Execute)
        .on_error(OnError::Unknown)
        .with_max_attempts(3);
    let service = layer.layer(inner);
    for _ in 0..3 {
        assert_eq!(send(&service, post("k", "pay")).await.status(), 502);
    }
    assert_eq!(send(&service, post("k", "pay")).await.code(), "outcome-unknown");
    let seen = seen.lock().unwrap();
    let numbers: Vec<_> = seen.iter().map(|(attempt, ..)| attempt.number()).collect();
    assert_eq!(numbers, [1, 2, 3]);
    assert!(seen[0].0.is_first() && !seen[1].0.is_first());
    assert!(seen.windows(2).all(|pair| pair[0].1 < pair[1].1), "the fence grows");
    assert!(
        seen.windows(2).all(|pair| pair[0].2 == pair[1].2),
        "every attempt derives the same key"
    );
    assert_eq!(seen[0].2.len(), 64);
}

/// Once a key has expired, a client may use it for another request. The third party must not take
/// that request for the first one.
#[tokio::test]
async fn two_requests_with_one_key_derive_different_keys() {
    let (used, mut keys) = tokio::sync::mpsc::unbounded_channel();
    let inner = service_fn(move |request: Request<AnyBody>| {
        let lease = request.extensions().get::<Lease>().unwrap();
        used.send((lease.derive_key("charge"), lease.derive_id("charge")))
            .unwrap();
        async { Ok::<_, Infallible>(text(StatusCode::OK, "paid")) }
    });
    let service = IdempotencyLayer::new(MemoryStore::new())
        .with_retention(Duration::ZERO)
        .layer(inner);
    for body in ["pay", "pay", "pay more"] {
        assert_eq!(send(&service, post("k", body)).await.status(), 200);
    }
    let [first, retry, other] = [(); 3].map(|()| keys.try_recv().unwrap());
    assert_eq!(first, retry);
    assert!(other.0 != first.0 && other.1 != first.1);
}

#[tokio::test(start_paused = true)]
async fn the_recovery_check_is_asked_before_the_handler_runs_again() {
    for found in ["happened", "not-happened", "unknown"] {
        let store = RemoteStore::new();
        let zombie = lost_key(&store).await;
        store.heal();
        let handler = Handler::new().responding(|_| text(StatusCode::CREATED, "run again"));
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let check = move |lost: LostAttempt| {
            count.fetch_add(1, Ordering::SeqCst);
            assert_eq!((lost.key.as_str(), lost.attempt > 1), ("k", true));
            assert_eq!(lost.head.uri.path(), "/payments");
            assert!(format!("{lost:?}").starts_with("LostAttempt { fence"));
            async move {
                match found {
                    "happened" => Recovered::Happened(Response::new("found at the bank".into())),
                    "not-happened" => Recovered::NotHappened,
                    _ => Recovered::Unknown,
                }
            }
        };
        let service = IdempotencyLayer::new(store).with_recovery(check).layer(handler.clone());
        let response = send(&service, post("k", "pay")).await;
        let again = send(&service, post("k", "pay")).await;
        match found {
            "happened" => {
                assert_eq!(
                    (response.is_replay(), &response.body[..]),
                    (true, &b"found at the bank"[..])
                );
                assert_eq!((again.body, handler.runs()), (response.body, 0));
            }
            "not-happened" => {
                assert_eq!((response.is_replay(), &response.body[..]), (false, &b"run again"[..]));
                assert_eq!((again.is_replay(), handler.runs()), (true, 1));
            }
            _ => {
                for refused in [response, again] {
                    assert_eq!((refused.status(), refused.code()), (409, "check-undecided"));
                }
                assert_eq!(handler.runs(), 0);
                assert_eq!(asked.load(Ordering::SeqCst), 2, "the layer asks the check again");
            }
        }
        zombie.abort();
    }
}

/// The next request calls the check again, so a client that treats the refusal as final gives up too early.
#[tokio::test(start_paused = true)]
async fn a_refusal_after_an_undecided_check_is_retryable_while_attempts_are_left() {
    let store = RemoteStore::new();
    let zombie = lost_key(&store).await;
    store.heal();
    let check = |lost: LostAttempt| async move {
        match lost.attempt {
            2 => Recovered::Unknown,
            _ => Recovered::NotHappened,
        }
    };
    let service = IdempotencyLayer::new(store).with_recovery(check).layer(Handler::new());
    let refused = send(&service, post("k", "pay")).await;
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
    let refusal = refused.head.extensions.get::<Refusal>().unwrap();
    assert!(refusal.is_retryable(), "{refusal:?}");
    zombie.abort();
}

#[tokio::test(start_paused = true)]
async fn an_undecided_check_of_the_last_attempt_is_final() {
    let store = RemoteStore::new();
    let zombie = lost_key(&store).await;
    store.heal();
    let checks = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&checks);
    let check = move |_: LostAttempt| {
        counted.fetch_add(1, Ordering::SeqCst);
        std::future::ready(Recovered::Unknown)
    };
    let service = IdempotencyLayer::new(store).with_max_attempts(3).with_recovery(check);
    let service = service.layer(Handler::new());
    for (code, asked) in [("check-undecided", 1), ("outcome-unknown", 2), ("outcome-unknown", 2)] {
        assert_eq!(send(&service, post("k", "pay")).await.code(), code);
        assert_eq!(checks.load(Ordering::SeqCst), asked);
    }
    zombie.abort();
}

/// The store completed the record without a reply, and the record expired before the completion was
/// repeated.
#[tokio::test(start_paused = true)]
async fn a_caller_gets_its_response_although_a_short_retention_ends_before_the_completion_is_repeated() {
    let store = RemoteStore::new();
    store.fail("complete", [Fault::After]);
    let service = IdempotencyLayer::new(store).with_retention(Duration::ZERO);
    let first = send(&service.layer(Handler::new()), post("k", "pay")).await;
    assert_eq!((first.status(), first.code()), (201, ""));
}

/// The handler has stored its failure, so the event is handled for good.
#[tokio::test]
async fn a_webhook_failure_without_room_for_its_response_is_replayed_as_a_bare_200() {
    let store = MemoryStore::builder().with_byte_budget(100).build();
    let handler = Handler::new().responding(|_| {
        let mut response = text(StatusCode::GONE, vec![b'x'; 200]);
        response.extensions_mut().insert(StoreResponse);
        response
    });
    let service = IdempotencyLayer::new(store).webhooks().layer(handler);
    assert_eq!(send(&service, post("k", "event")).await.status(), 410);
    assert_eq!(send(&service, post("k", "event")).await.status(), 200);
}

/// The check looks for the effect at the third party under the key that the lost attempt used there.
#[tokio::test(start_paused = true)]
async fn a_recovery_check_derives_the_keys_of_the_lost_attempt() {
    let store = RemoteStore::new();
    let layer = || IdempotencyLayer::new(store.clone());
    let (used, mut keys) = tokio::sync::mpsc::unbounded_channel();
    let handler = service_fn(move |request: Request<AnyBody>| {
        let lease = request.extensions().get::<Lease>().unwrap();
        used.send((lease.derive_key("charge"), lease.derive_id("charge")))
            .unwrap();
        std::future::pending::<Result<Response<AnyBody>, Infallible>>()
    });
    let zombie = tokio::spawn(layer().layer(handler).oneshot(post("k", "pay")));
    let (key, id) = keys.recv().await.unwrap();
    store.fail("renew", [Fault::Before; 10_000]);
    tokio::time::sleep(Duration::from_secs(60)).await;
    store.heal();

    let check = move |lost: LostAttempt| {
        assert_eq!(
            (lost.derive_key("charge"), lost.derive_id("charge")),
            (key.clone(), id.clone())
        );
        assert_ne!(lost.derive_key("refund"), key);
        async { Recovered::Happened(Response::new("found at the bank".into())) }
    };
    let service = layer().with_recovery(check).layer(Handler::new());
    assert_eq!(send(&service, post("k", "pay")).await.body, "found at the bank");
    zombie.abort();
}

#[tokio::test(start_paused = true)]
async fn a_recovery_check_that_panics_runs_nothing_and_is_asked_again() {
    for store in [RemoteStore::new(), RemoteStore::deciding_at_once()] {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let check = move |_| {
            let asked = count.fetch_add(1, Ordering::SeqCst);
            assert_ne!(asked, 0, "panics before it returns a future");
            async move {
                tokio::task::yield_now().await;
                assert_ne!(asked, 1, "panics within its future");
                Recovered::NotHappened
            }
        };
        let handler = Handler::new().responding(|n| match n {
            1 => text(StatusCode::INTERNAL_SERVER_ERROR, "of unknown effect"),
            _ => text(StatusCode::CREATED, "run again"),
        });
        let layer = IdempotencyLayer::new(store)
            .on_error(OnError::Unknown)
            .with_recovery(check);
        let service = layer.layer(handler.clone());
        assert_eq!(send(&service, post("k", "pay")).await.status(), 500);
        for panics in 1..=2 {
            assert_eq!(send(&service, post("k", "pay")).await.code(), "check-undecided");
            assert_eq!((asked.load(Ordering::SeqCst), handler.runs()), (panics, 1));
        }
        assert_eq!(send(&service, post("k", "pay")).await.body, "run again");
        assert!(send(&service, post("k", "pay")).await.is_replay());
        assert_eq!((asked.load(Ordering::SeqCst), handler.runs()), (3, 2));
        layer.drain().wait().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_fingerprint_function_that_panics_leaves_no_claim() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let layer = IdempotencyLayer::new(RemoteStore::deciding_at_once()).with_fingerprint(move |_, body| {
        assert_ne!(
            count.fetch_add(1, Ordering::SeqCst),
            0,
            "the function panics at its first call"
        );
        body.to_vec()
    });
    let service = layer.layer(Handler::new());
    assert!(start(&service, post("k", "pay")).await.unwrap_err().is_panic());
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
    layer.drain().wait().await;
}

#[tokio::test]
async fn a_request_whose_predicate_panics_is_not_executed_again() {
    // The panic unwound through the layer. The caller got no response, and the key stayed in flight
    // until its lease ended.
    let s = IdempotencyLayer::new(MemoryStore::new())
        .store_if(|_| panic!("predicate"))
        .layer(Handler::new());
    let one = {
        let s = s.clone();
        tokio::spawn(async move { send(&s, post("k", "x")).await.head.status }).await
    };
    let two = {
        let s = s.clone();
        tokio::spawn(async move { send(&s, post("k", "x")).await.code() }).await
    };
    assert_eq!(
        (one.unwrap(), two.unwrap()),
        (500.try_into().unwrap(), "response-not-stored")
    );
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_timed_out_is_not_run_again_under_on_error_unknown() {
    // The 408 of a timeout released the key, whatever the setting for failures was.
    use tower_http::timeout::TimeoutLayer;
    let effects = Arc::new(AtomicUsize::new(0));
    let e = effects.clone();
    let inner = service_fn(move |_r: Request<AnyBody>| {
        let e = e.clone();
        async move {
            e.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_secs(60)).await;
            Ok::<_, Infallible>(Response::new(full("ok")))
        }
    });
    let timed = TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, Duration::from_secs(10)).layer(inner);
    let timed = timed.map_response(|r: Response<_>| r.map(|_| full("")));
    let s = IdempotencyLayer::new(MemoryStore::new())
        .on_error(OnError::Unknown)
        .layer(timed);
    let a = send(&s, post("k", "x")).await;
    let b = send(&s, post("k", "x")).await;
    assert_eq!((a.status(), b.code()), (408, "outcome-unknown"));
    assert_eq!(effects.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_request_with_an_unreadable_record_never_runs_unprotected() {
    // The layer took the error for that of a store that does not reply.
    let store = RemoteStore::new();
    let handler = Handler::new();
    let s = IdempotencyLayer::new(store.clone())
        .dangerously_run_unprotected_when_the_store_fails()
        .layer(handler.clone());
    send(&s, post("k", "x")).await;
    store.fail("claim", [Fault::Corrupt]);
    let b = send(&s, post("k", "x")).await;
    assert_eq!((b.status(), handler.runs()), (500, 1));
}

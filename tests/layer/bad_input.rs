//! Bad input: every case gets a clear response and costs other callers nothing.

use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use http::{Request, StatusCode};
use proptest::prelude::*;
use tower::Layer;
use tower_idempotency::receiver::ReceiverLayer;
use tower_idempotency::{ErrorKind, IdempotencyLayer, KeySyntax, MemoryStore, Refusal, RefusalKind, Scope};

use crate::support;
use crate::support::{AnyBody, Got, Handler, Play, frames, full, post, request, send, text};

fn with_keys(keys: &[&[u8]]) -> Request<AnyBody> {
    let mut request = Request::post("/payments").body(full("pay")).unwrap();
    for key in keys {
        request
            .headers_mut()
            .append("idempotency-key", HeaderValue::from_bytes(key).unwrap());
    }
    request
}

fn layer() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new())
}

fn is_problem(response: &Got, status: u16, code: &str) {
    assert_eq!((response.status(), response.code()), (status, code));
    assert_eq!(response.head.headers["content-type"], "application/problem+json");
    assert_eq!(response.head.headers["cache-control"], "no-store");
    let document: serde_json::Value = serde_json::from_slice(&response.body).unwrap();
    assert_eq!((&document["status"], &document["code"]), (&status.into(), &code.into()));
    assert!(document["detail"].as_str().unwrap().len() > 20, "{document}");
}

#[tokio::test]
async fn every_malformed_key_is_400_and_runs_nothing() {
    let handler = Handler::new();
    let service = layer().layer(handler.clone());
    let long = [b'x'; 256];
    let cases: [&[&[u8]]; 12] = [
        &[b""],
        &[b"  "],
        &[b"\"\""],
        &[b"a b"],
        &[b"\"a b\""],
        &[b"a\tb"],
        &[b"caf\xe9"],
        &[b"\"open"],
        &[b"\"bad\\x\""],
        &[&long],
        &[b"a", b"b"],
        &[b"a", b"a"],
    ];
    for keys in cases {
        is_problem(&send(&service, with_keys(keys)).await, 400, "key-invalid");
    }
    let strict = layer().with_key_syntax(KeySyntax::Strict).layer(handler.clone());
    for bad in [
        &b"bare"[..],
        b"?1",
        b":YWJj:",
        b"(\"a\")",
        b"\"a\";",
        b"\"a\";=1",
        b"\"a\" ;b",
    ] {
        is_problem(&send(&strict, with_keys(&[bad])).await, 400, "key-invalid");
    }
    let digits = layer()
        .with_key_validator(|key| key.bytes().all(|byte| byte.is_ascii_digit()))
        .layer(handler.clone());
    is_problem(&send(&digits, with_keys(&[b"12a"])).await, 400, "key-invalid");
    is_problem(
        &send(&layer().require_key().layer(handler.clone()), with_keys(&[])).await,
        400,
        "key-missing",
    );
    assert_eq!(handler.runs(), 0);
}

#[tokio::test]
async fn a_declared_or_streamed_body_over_the_limit_gets_413_and_leaves_the_key_free() {
    let handler = Handler::new();
    let service = layer().with_body_limit(10).layer(handler.clone());
    is_problem(&send(&service, post("k", "01234567890")).await, 413, "body-too-large");
    let streamed = frames(vec![Play::Data("01234"), Play::Data("56789"), Play::Data("0")]);
    is_problem(&send(&service, request("k", streamed)).await, 413, "body-too-large");
    assert_eq!(handler.runs(), 0);
    assert_eq!(send(&service, post("k", "0123456789")).await.status(), 201);
}

/// Such a body has no length to bound and no pause to time, so the server read it without end.
#[tokio::test(start_paused = true)]
async fn a_body_of_endless_empty_frames_is_refused_at_the_time_limit() {
    let handler = Handler::new();
    let service = layer().layer(handler.clone());
    let sent = support::start(&service, request("k", support::empty_frames()));
    support::advance(Duration::from_secs(29)).await;
    assert!(!sent.is_finished());
    support::advance(Duration::from_secs(1)).await;
    assert!(sent.is_finished());
    is_problem(&sent.await.unwrap(), 408, "body-timeout");
    assert_eq!(handler.runs(), 0);
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
}

#[tokio::test]
async fn an_endless_body_is_refused_at_the_size_limit() {
    let endless = futures::stream::repeat_with(|| Ok(http_body::Frame::data(Bytes::from_static(&[0; 1024]))));
    let endless = http_body_util::BodyExt::boxed_unsync(http_body_util::StreamBody::new(endless));
    let service = layer().layer(Handler::new());
    is_problem(&send(&service, request("k", endless)).await, 413, "body-too-large");
}

#[tokio::test]
async fn a_hostile_connection_header_does_not_strip_the_response() {
    let handler = Handler::new().responding(|_| {
        let mut response = text(StatusCode::CREATED, "{}");
        let headers = response.headers_mut();
        headers.insert(
            "connection",
            HeaderValue::from_static("close, content-type, location, x-hop"),
        );
        headers.insert("content-type", HeaderValue::from_static("application/json"));
        headers.insert("location", HeaderValue::from_static("/payments/1"));
        headers.insert("x-hop", HeaderValue::from_static("1"));
        response
    });
    let service = layer().layer(handler);
    // The `Connection` header of the request does not apply to the response either.
    let hostile = || {
        let mut request = post("k", "pay");
        request
            .headers_mut()
            .insert("connection", HeaderValue::from_static("content-type, idempotency-key"));
        request
    };
    send(&service, hostile()).await;
    let again = send(&service, hostile()).await;
    assert!(again.is_replay());
    assert_eq!(again.head.headers["content-type"], "application/json");
    assert_eq!(again.head.headers["location"], "/payments/1");
    assert!(!again.head.headers.contains_key("x-hop") && !again.head.headers.contains_key("connection"));
}

#[tokio::test]
async fn a_replay_has_the_marker_of_the_layer_and_not_that_of_the_handler() {
    let handler = Handler::new().responding(|n| {
        let mut response = text(StatusCode::OK, format!("{n}"));
        response
            .headers_mut()
            .insert("idempotent-replayed", HeaderValue::from_static("maybe"));
        response
    });
    let service = layer().layer(handler);
    send(&service, post("k", "pay")).await;
    let again = send(&service, post("k", "pay")).await;
    assert_eq!(
        again
            .head
            .headers
            .get_all("idempotent-replayed")
            .iter()
            .collect::<Vec<_>>(),
        ["true"]
    );
}

#[tokio::test]
async fn many_and_long_headers_are_replayed() {
    let handler = Handler::new().responding(|_| {
        let mut response = text(StatusCode::OK, "x");
        for n in 0..2_000 {
            let name = HeaderName::from_bytes(format!("x-many-{n}").as_bytes()).unwrap();
            response.headers_mut().insert(name, HeaderValue::from(n));
        }
        let long = HeaderValue::from_bytes(&vec![0xe9; 100_000]).unwrap();
        response.headers_mut().insert("x-long", long);
        response
    });
    let service = layer().layer(handler);
    let first = send(&service, post("k", "pay")).await;
    let mut again = send(&service, post("k", "pay")).await;
    again.head.headers.remove("idempotent-replayed");
    assert_eq!(again.head.headers, first.head.headers);
}

#[tokio::test]
async fn a_flood_of_keys_is_refused_and_evicts_no_stored_response() {
    let store = MemoryStore::builder().with_record_budget(1_000).build();
    let handler = Handler::new();
    let service = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    let mine = send(&service, post("mine", "pay")).await;
    for n in 0..5_000 {
        let response = send(&service, post(&format!("flood-{n}"), "x")).await;
        assert_eq!(response.status(), if n < 999 { 201 } else { 503 }, "{n}");
    }
    let again = send(&service, post("mine", "pay")).await;
    assert_eq!((again.is_replay(), again.body), (true, mine.body));
    assert_eq!((store.stats().records, handler.runs()), (1_000, 1_000));
}

#[tokio::test]
async fn a_flood_of_large_responses_turns_the_oldest_into_tombstones_and_repeats_no_execution() {
    let store = MemoryStore::builder().with_byte_budget(100_000).build();
    let handler = Handler::new().responding(|_| text(StatusCode::OK, vec![7; 9_000]));
    let service = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    for n in 0..100 {
        send(&service, post(&format!("k-{n}"), "x")).await;
        assert!(store.stats().bytes <= 100_000);
    }
    assert_eq!(send(&service, post("k-0", "x")).await.code(), "response-not-stored");
    assert!(send(&service, post("k-99", "x")).await.is_replay());
    assert_eq!((store.stats().records, handler.runs()), (100, 100));
}

#[tokio::test]
async fn refusals_reveal_neither_the_key_nor_a_body() {
    let service = layer().layer(Handler::new());
    send(&service, post("secret-key", "card 4242")).await;
    let refusal = send(&service, post("secret-key", "card 1111")).await;
    assert_eq!(refusal.status(), 422);
    let shown = format!("{:?} {:?}", refusal.head, refusal.body);
    for secret in ["secret-key", "4242", "1111"] {
        assert!(!shown.contains(secret), "{shown}");
    }
}

#[test]
fn bad_configuration_fails_at_construction() {
    let receiver = ReceiverLayer::<_, ()>::new(MemoryStore::new(), "c").with_secret(b"short");
    assert_eq!(receiver.unwrap_err().kind(), ErrorKind::Configuration);
    assert_eq!(
        layer().with_secret(b"short").unwrap_err().kind(),
        ErrorKind::Configuration
    );
    assert_eq!(
        layer().with_problem_base("https://x/\"").unwrap_err().kind(),
        ErrorKind::Configuration
    );
    let settings = format!("{:?}", layer().with_secret(b"0123456789abcdef-very-secret").unwrap());
    assert!(!settings.contains("very-secret"), "{settings}");
}

#[tokio::test(start_paused = true)]
async fn settings_of_zero_and_of_the_longest_duration_work() {
    for time in [Duration::ZERO, Duration::MAX] {
        let handler = Handler::new();
        let layer = layer()
            .with_body_timeout(time)
            .with_response_timeout(time)
            .with_store_timeout(time)
            .with_completion_timeout(time);
        let layer = layer
            .with_retention(time)
            .with_lease(time)
            .with_wait(time)
            .with_retry_after(time);
        for store in [true, false] {
            let first = if store {
                send(&layer.layer(handler.clone()), post("k", "pay")).await
            } else {
                let far = IdempotencyLayer::new(support::RemoteStore::new());
                let far = far
                    .with_retention(time)
                    .with_lease(time)
                    .with_wait(time)
                    .with_store_timeout(time.max(Duration::from_secs(1)));
                send(&far.layer(handler.clone()), post("k", "pay")).await
            };
            assert_eq!(first.status(), 201, "{time:?}");
        }
        assert_eq!(handler.runs(), 2);
    }
    let layer = layer()
        .with_body_limit(0)
        .with_response_limit(0)
        .with_max_waiters_per_key(0)
        .with_max_waiters(0)
        .with_max_key_length(0)
        .with_max_attempts(0);
    let service = layer
        .with_retry_after(Duration::MAX)
        .require_key()
        .layer(Handler::new());
    assert_eq!(send(&service, post("k", "")).await.status(), 201);
    assert_eq!(send(&service, post("k", "x")).await.code(), "body-too-large");
    assert_eq!(send(&service, post("k", "")).await.code(), "response-not-stored");
}

#[tokio::test]
async fn an_application_can_render_refusals_itself() {
    let own = |refusal: &Refusal, _: &http::request::Parts| {
        assert_eq!(refusal.kind(), RefusalKind::MissingKey);
        http::Response::builder()
            .status(418)
            .body(Bytes::from_static(b"own"))
            .unwrap()
    };
    let service = layer().require_key().with_refusals(own).layer(Handler::new());
    let response = send(&service, with_keys(&[])).await;
    assert_eq!((response.status(), &response.body[..]), (418, &b"own"[..]));
    let service = layer()
        .require_key()
        .with_problem_base("https://api.example.com/problems#")
        .unwrap();
    let response = send(&service.layer(Handler::new()), with_keys(&[])).await;
    let document: serde_json::Value = serde_json::from_slice(&response.body).unwrap();
    assert_eq!(document["type"], "https://api.example.com/problems#key-missing");
}

/// Generates the key, the body and the tenant of a request.
fn any_request() -> impl Strategy<Value = (Vec<u8>, Vec<u8>, u8)> {
    let key = prop::collection::vec((0x20_u8..0x7f).prop_union(0x80_u8..0xff), 0..300);
    (key, prop::collection::vec(any::<u8>(), 0..100), 0_u8..3)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every request gets a response, and equal requests get equal responses from one run.
    #[test]
    fn every_request_gets_a_response_and_its_duplicate_gets_the_same(requests in prop::collection::vec(any_request(), 1..10)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let scope = |head: &http::request::Parts| Scope::from(head.headers.get("x-tenant").map_or(&b""[..], |v| v.as_bytes()));
            let service = layer().with_scope(scope).with_wait(Duration::ZERO).layer(Handler::new());
            for (key, body, tenant) in requests {
                let make = || {
                    let mut request = Request::post("/").body(full(body.clone())).unwrap();
                    request.headers_mut().insert("idempotency-key", HeaderValue::from_bytes(&key).unwrap());
                    request.headers_mut().insert("x-tenant", HeaderValue::from(u16::from(tenant)));
                    request
                };
                let first = send(&service, make()).await;
                let again = send(&service, make()).await;
                prop_assert!([201, 400, 422].contains(&first.status()), "{}", first.status());
                prop_assert_eq!((first.status(), &first.body), (again.status(), &again.body));
                prop_assert_eq!(again.is_replay(), again.status() == 201);
            }
            Ok(())
        })?;
    }
}

/// Fills a map up to its limit and returns the number of fields.
fn fill(headers: &mut http::HeaderMap) -> usize {
    let name = |n: usize| HeaderName::from_bytes(format!("x-{n}").as_bytes()).unwrap();
    while headers
        .try_insert(name(headers.len()), HeaderValue::from_static("1"))
        .is_ok()
    {}
    headers.len()
}

/// The replay marker was one field too many, and `HeaderMap::insert` panicked.
#[tokio::test]
async fn a_response_with_as_many_headers_as_a_map_takes_is_replayed_without_a_marker() {
    let handler = Handler::new().responding(|_| {
        let mut trailers = http::HeaderMap::new();
        fill(&mut trailers);
        let mut response = http::Response::new(frames(vec![Play::Data("made"), Play::Trailers(trailers)]));
        fill(response.headers_mut());
        response
    });
    let service = layer().layer(handler.clone());
    let first = send(&service, post("k", "")).await;
    let again = send(&service, post("k", "")).await;
    assert_eq!((again.status(), &again.body[..]), (200, &b"made"[..]));
    assert!(first.head.headers.len() > 20_000 && !again.is_replay());
    assert_eq!(again.head.headers, first.head.headers);
    assert_eq!(again.trailers, first.trailers);
    assert_eq!(handler.runs(), 1);
}

#[tokio::test]
async fn a_request_with_as_many_headers_as_a_map_takes_is_guarded() {
    let handler = Handler::new();
    let service = layer().layer(handler.clone());
    for is_replay in [false, true] {
        let mut full = post("k", "");
        fill(full.headers_mut());
        assert_eq!(send(&service, full).await.is_replay(), is_replay);
    }
    assert_eq!(handler.runs(), 1);
}

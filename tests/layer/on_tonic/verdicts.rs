//! The decision which responses are stored, including those that no correct service sends.

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use tower::Layer;
use tower_idempotency::{IdempotencyLayer, MemoryStore, OnError};

use crate::support::{AnyBody, Handler, Play, frames, full, post, send};

fn trailers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    fields
        .iter()
        .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
        .collect()
}

fn grpc(body: AnyBody) -> Response<AnyBody> {
    typed("application/grpc", body)
}

fn typed(content_type: &'static str, body: AnyBody) -> Response<AnyBody> {
    let response = Response::builder().header("content-type", content_type);
    response.body(body).unwrap()
}

/// Returns a response of one message whose head and trailers have these fields.
fn message(head: &[(&'static str, &'static str)], in_trailers: &[(&'static str, &'static str)]) -> Response<AnyBody> {
    let frames = frames(vec![
        Play::Data("\0\0\0\0\u{1}x"),
        Play::Trailers(trailers(in_trailers)),
    ]);
    let mut response = grpc(frames);
    response.headers_mut().extend(trailers(head));
    response
}

fn without_a_status() -> Response<AnyBody> {
    grpc(full(Bytes::from_static(b"\0\0\0\0\x01x")))
}

/// Returns a response with an empty body, which has no trailers.
fn empty() -> Response<AnyBody> {
    grpc(full(""))
}

fn head_says_done_and_trailers_say_unavailable() -> Response<AnyBody> {
    message(&[("grpc-status", "0")], &[("grpc-status", "14")])
}

/// The layer freed the key although the trailers reported that the call had taken effect.
fn head_says_unavailable_and_trailers_say_done() -> Response<AnyBody> {
    message(&[("grpc-status", "14")], &[("grpc-status", "0")])
}

fn broken_off() -> Response<AnyBody> {
    grpc(frames(vec![Play::Data("\0\0\0\0\u{1}x"), Play::Break]))
}

fn invalid_status() -> Response<AnyBody> {
    message(&[], &[("grpc-status", "fine")])
}

fn other_trailers() -> Response<AnyBody> {
    message(&[], &[("x-checksum", "1")])
}

fn two_statuses() -> Response<AnyBody> {
    message(&[], &[("grpc-status", "0"), ("grpc-status", "14")])
}

fn panicking() -> Response<AnyBody> {
    grpc(frames(vec![Play::Data("\0\0\0\0\u{1}x"), Play::Panic]))
}

/// The layer took every 200 for a success, even if the trailers reported a failure.
#[tokio::test]
async fn a_response_without_a_status_is_a_failure() {
    for respond in [
        without_a_status,
        empty,
        head_says_done_and_trailers_say_unavailable,
        head_says_unavailable_and_trailers_say_done,
        broken_off,
        invalid_status,
        other_trailers,
        two_statuses,
        panicking,
    ] {
        for (on_error, runs, code) in [
            (OnError::Release, 2, None),
            (OnError::Unknown, 1, Some("outcome-unknown")),
            (OnError::Store, 1, None),
        ] {
            let handler = Handler::new().responding(move |_| respond());
            let layer = IdempotencyLayer::new(MemoryStore::new()).grpc().on_error(on_error);
            let service = layer.layer(handler.clone());
            let first = send(&service, post("k", "")).await;
            assert!(!first.is_replay());
            let again = send(&service, post("k", "")).await;
            assert_eq!(handler.runs(), runs, "{on_error:?}");
            match code {
                Some(code) => assert_eq!(again.code(), code),
                None if runs == 1 => assert!(again.is_replay() || again.code() == "response-not-stored"),
                None => {}
            }
        }
    }
}

/// A JSON route next to the services, or a service behind `GrpcWebLayer`, ran again with each
/// retry. Such a response has no `grpc-status` that the layer can see.
#[tokio::test]
async fn a_200_that_is_not_grpc_is_stored_as_over_http() {
    let plain = |_: usize| Response::new(full("paid"));
    let json = |_: usize| typed("application/json", full("{}"));
    let web = |_: usize| typed("application/grpc-web+proto", full("\0\0\0\0\u{1}x\u{7f}"));
    let web_text = |_: usize| typed("application/grpc-web-text", full("AAAAAAF4"));
    let other = |_: usize| typed("application/grpcx", full("x"));
    for respond in [plain, json, web, web_text, other] {
        let handler = Handler::new().responding(respond);
        let service = IdempotencyLayer::new(MemoryStore::new()).grpc().layer(handler.clone());
        let first = send(&service, post("k", "")).await;
        let again = send(&service, post("k", "")).await;
        assert_eq!(
            (first.is_replay(), again.is_replay(), handler.runs()),
            (false, true, 1),
            "{:?}",
            first.head.headers
        );
        assert_eq!((again.body, again.trailers), (first.body, first.trailers));
    }
}

#[tokio::test]
async fn a_response_is_grpc_by_its_content_type_or_its_status() {
    for content_type in [
        "application/grpc",
        "application/grpc+proto",
        "application/grpc;v=1",
        "Application/GRPC",
    ] {
        let unavailable = move |_: usize| {
            let frames = frames(vec![Play::Trailers(trailers(&[("grpc-status", "14")]))]);
            typed(content_type, frames)
        };
        assert_eq!(runs_of_two(unavailable).await, 2, "{content_type}");
    }
    let without_a_type = |_: usize| {
        let response = Response::builder().header("grpc-status", "14");
        response.body(full("")).unwrap()
    };
    assert_eq!(runs_of_two(without_a_type).await, 2);
}

/// Sends a request and its retry, and returns the number of runs.
async fn runs_of_two(respond: impl Fn(usize) -> Response<AnyBody> + Send + Sync + 'static) -> usize {
    let handler = Handler::new().responding(respond);
    let service = IdempotencyLayer::new(MemoryStore::new()).grpc().layer(handler.clone());
    for _ in 0..2 {
        send(&service, post("k", "")).await;
    }
    handler.runs()
}

#[tokio::test]
async fn a_status_other_than_200_counts_as_over_http() {
    for (status, runs) in [(404, 2), (503, 2), (400, 1), (409, 1)] {
        let handler = Handler::new().responding(move |_| {
            let mut response = Response::new(full(""));
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            response
        });
        let service = IdempotencyLayer::new(MemoryStore::new()).grpc().layer(handler.clone());
        for _ in 0..2 {
            assert_eq!(send(&service, post("k", "")).await.status(), status);
        }
        assert_eq!(handler.runs(), runs, "{status}");
    }
}

#[tokio::test]
async fn a_predicate_and_a_limit_override_the_trailers() {
    let unavailable = |_: usize| message(&[], &[("grpc-status", "14")]);
    let handler = Handler::new().responding(unavailable);
    let layer = IdempotencyLayer::new(MemoryStore::new()).grpc();
    let service = layer.clone().store_if(|_| true).layer(handler.clone());
    send(&service, post("k", "")).await;
    assert!(send(&service, post("k", "")).await.is_replay());
    // If a response is too long to read, its status comes too late, so the call counts as done.
    let service = layer.with_response_limit(3).layer(handler.clone());
    assert_eq!(
        send(&service, post("long", "")).await.trailers.unwrap()["grpc-status"],
        "14"
    );
    assert_eq!(send(&service, post("long", "")).await.code(), "response-not-stored");
    assert_eq!(handler.runs(), 2);
}

#[tokio::test]
async fn methods_other_than_post_pass() {
    let handler = Handler::new();
    let service = IdempotencyLayer::new(MemoryStore::new()).grpc().layer(handler.clone());
    for _ in 0..2 {
        let request = http::Request::patch("/")
            .header("idempotency-key", "k")
            .body(full(""))
            .unwrap();
        send(&service, request).await;
    }
    assert_eq!(handler.runs(), 2);
}

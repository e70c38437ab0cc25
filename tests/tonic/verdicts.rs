//! Which responses are stored: also those that no correct service sends.

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use tower::Layer;
use tower_idempotency::{IdempotencyLayer, MemoryStore, OnError};

use crate::support::{frames, full, post, send, AnyBody, Handler, Play};

fn trailers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    fields
        .iter()
        .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
        .collect()
}

fn without_a_status() -> Response<AnyBody> {
    Response::new(full(Bytes::from_static(b"\0\0\0\0\x01x")))
}

fn broken_off() -> Response<AnyBody> {
    Response::new(frames(vec![Play::Data("\0\0\0\0\u{1}x"), Play::Break]))
}

fn nonsense() -> Response<AnyBody> {
    let trailers = trailers(&[("grpc-status", "fine")]);
    Response::new(frames(vec![Play::Data("\0\0\0\0\u{1}x"), Play::Trailers(trailers)]))
}

fn other_trailers() -> Response<AnyBody> {
    let trailers = trailers(&[("x-checksum", "1")]);
    Response::new(frames(vec![Play::Data("\0\0\0\0\u{1}x"), Play::Trailers(trailers)]))
}

fn two_statuses() -> Response<AnyBody> {
    let trailers = trailers(&[("grpc-status", "0"), ("grpc-status", "14")]);
    Response::new(frames(vec![Play::Data("\0\0\0\0\u{1}x"), Play::Trailers(trailers)]))
}

fn panicking() -> Response<AnyBody> {
    Response::new(frames(vec![Play::Data("\0\0\0\0\u{1}x"), Play::Panic]))
}

/// A 200 counted as a success whatever stood in the trailers.
#[tokio::test]
async fn a_response_without_a_status_is_a_failure() {
    for respond in [
        without_a_status,
        broken_off,
        nonsense,
        other_trailers,
        two_statuses,
        panicking,
    ] {
        for (on_error, runs, code) in [
            (OnError::Release, 2, None),
            (OnError::Unknown, 1, Some("outcome-unknown")),
            (OnError::Keep, 1, None),
        ] {
            let handler = Handler::new().answering(move |_| respond());
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

#[tokio::test]
async fn another_status_than_200_counts_as_in_http() {
    for (status, runs) in [(404, 2), (503, 2), (400, 1), (409, 1)] {
        let handler = Handler::new().answering(move |_| {
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
async fn a_predicate_and_a_limit_go_before_the_trailers() {
    let unavailable = |_: usize| {
        let trailers = trailers(&[("grpc-status", "14")]);
        Response::new(frames(vec![Play::Data("\0\0\0\0\u{1}x"), Play::Trailers(trailers)]))
    };
    let handler = Handler::new().answering(unavailable);
    let layer = IdempotencyLayer::new(MemoryStore::new()).grpc();
    let service = layer.clone().keep_if(|_| true).layer(handler.clone());
    send(&service, post("k", "")).await;
    assert!(send(&service, post("k", "")).await.is_replay());
    // A response that is too long to read counts as done, because nobody knows its status in time.
    let service = layer.with_answer_limit(3).layer(handler.clone());
    assert_eq!(
        send(&service, post("long", "")).await.trailers.unwrap()["grpc-status"],
        "14"
    );
    assert_eq!(send(&service, post("long", "")).await.code(), "response-not-stored");
    assert_eq!(handler.runs(), 2);
}

#[tokio::test]
async fn other_methods_than_post_pass() {
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
